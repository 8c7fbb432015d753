"""Output that is either complete under its final name or not there at all.

A file is written as ``.NAME.partial`` beside its destination, a directory as ``.NAME.partial/``; ``commit`` flushes it to
disk and renames it. A partial left by a killed run is locked by nobody and is replaced by the next one, or gone on with if that
is asked for (``resume``; ``keep`` leaves one on purpose). Every problem is an
``OutputError``: ``exists``, ``same-file``, ``unwritable``, ``no-space``, ``in-use``, ``not-a-checkpoint``, ``write-failed``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from qformats.containers.source import ByteSource
from qformats.errors import OutputError, Unsafe

__all__ = ["OutputDirectory", "OutputFile", "check_is_local", "check_not_same", "hold", "plain_file_name"]

MAX_WRITE_NBYTES = 1 << 30  # one pwrite call
MAX_STALE_TRIES = 8
FILE_MODE = 0o666  # the umask takes its part away
# what a directory must hold, one of, before --overwrite may delete it
CHECKPOINT_MARKS = ("config.json", "quantize_config.json", "model.safetensors.index.json")
CHECKPOINT_SUFFIXES = (".safetensors", ".gguf")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


def _fail(error: OSError, path: Path) -> NoReturn:
    """Turn an operating system error into the one ``OutputError`` a user can act on."""
    if error.errno in _NO_SPACE:
        raise OutputError("no-space", f"cannot be written: {error.strerror}", path=path, hint="free space or choose another place")
    if error.errno in _UNWRITABLE:
        raise OutputError("unwritable", f"cannot be written: {error.strerror}", path=path, hint="check the place and its permissions")
    raise OutputError("write-failed", f"writing failed: {error.strerror}", path=path) from error


def plain_file_name(name: str, path: object = None) -> str:
    """Return ``name`` if it is one visible file name; raises ``Unsafe('file-name')`` for anything that could leave its directory."""
    if not name or name.startswith(".") or any(c in name for c in "/\\\0:") or len(os.fsencode(name)) > 240:
        raise Unsafe("file-name", f"{name!r} is not a plain file name", path=path, hint="the file names a place outside its directory")
    return name


def _partial_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def check_is_local(path: Path) -> None:
    """Refuse an address, of which ``Path`` makes a name with one slash."""
    if path.parts[:1] == ("hf:",):
        hint = "name a place here; a result goes up with --push ORG/NAME or qconvert push"
        raise OutputError("unwritable", "is an address of the hub, where nothing is written to", path=path, hint=hint)


def _check_destination(final: Path, nbytes: int | None, overwrite: bool) -> None:
    """Refuse before the first byte: a taken name, a missing or read-only parent, a full disk."""
    if final.name in ("", "..") or "\0" in str(final):
        raise OutputError("unwritable", "is no file name", path=final)
    check_is_local(final)
    parent = final.parent
    try:
        if os.path.lexists(final) and not overwrite:
            raise OutputError("exists", "already exists", path=final, hint="choose another name or allow overwriting")
        if not parent.is_dir():
            raise OutputError("unwritable", f"the directory {str(parent)!r} does not exist", path=final, hint="create it first")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError("unwritable", f"the directory {str(parent)!r} is not writable", path=final, hint="check its permissions")
        free = _free_nbytes(parent)
    except OSError as error:
        _fail(error, final)
    if nbytes is not None and free is not None and nbytes > free:
        message = f"needs {nbytes} bytes, the file system has {free} free"
        raise OutputError("no-space", message, path=final, hint="free space or choose another place")


def _free_nbytes(directory: Path) -> int | None:
    if not hasattr(os, "statvfs"):
        return None
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _lock(fd: int) -> bool:
    """Take the advisory lock of a partial; False if another process holds it. A file system without locks counts as free."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return True


def _sync_directory(directory: Path) -> None:
    """Make a rename durable where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _create_locked(partial: Path, final: Path, create: Callable[[Path], int], remove: Callable[[Path], None]) -> int:
    """Create ``partial`` for ourselves and lock it, replacing one that nobody holds any more; returns a descriptor."""
    for _ in range(MAX_STALE_TRIES):
        try:
            fd = create(partial)
        except FileExistsError:
            _remove_stale(partial, final, remove)
            continue
        except OSError as error:
            _fail(error, final)
        if _lock(fd) and _is_same(fd, partial):
            return fd
        os.close(fd)
    raise OutputError("in-use", "another process writes the same destination", path=final, hint="wait for it, or choose another name")


def hold(fd: int, partial: Path, final: Path) -> None:
    """Lock the file that was opened as ``partial`` for this process; ``OutputError('in-use')`` where another one has it or had it."""
    if not (_lock(fd) and _is_same(fd, partial)):
        raise OutputError("in-use", "another process writes the same destination", path=final, hint="wait for it, or choose another name")


def _is_same(fd: int, path: Path) -> bool:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)


def _remove_stale(partial: Path, final: Path, remove: Callable[[Path], None]) -> None:
    try:
        fd = os.open(partial, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return
    except OSError as error:
        _fail(error, final)
    try:
        if not _lock(fd):
            message = "another process writes the same destination"
            raise OutputError("in-use", message, path=final, hint="wait for it, or choose another name")
        if _is_same(fd, partial):
            remove(partial)
    except OSError as error:
        _fail(error, final)
    finally:
        os.close(fd)


class OutputFile:
    """A file of known or growing size, written at any offset from any thread, under its final name only after ``commit``.

    As a context manager it aborts unless committed. ``size`` reserves the space at once and is the final size.
    ``resume``: go on with the partial that is there, of whatever content. Writers must have stopped before ``commit`` or ``abort``.
    """

    def __init__(self, final: Path, size: int | None, overwrite: bool, resume: bool = False) -> None:
        self.final, self.size, self._overwrite = Path(final), size, overwrite
        self.partial = _partial_of(self.final)
        found = resume and self.partial.is_file() and not self.partial.is_symlink()
        _check_destination(self.final, None if found else size, overwrite)
        _check_replaceable_file(self.final)
        self._fd = _create_locked(self.partial, self.final, _open_file if found else _create_file, os.unlink)
        self._closing = threading.Lock()
        try:
            self._reserve()
        except BaseException:
            self.abort()
            raise

    def _reserve(self) -> None:
        if not self.size:
            return
        try:
            os.posix_fallocate(self._fd, 0, self.size)
            return
        except AttributeError:
            pass
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                _fail(error, self.final)
        try:
            os.ftruncate(self._fd, self.size)
        except OSError as error:
            _fail(error, self.final)

    def pwrite(self, offset: int, buffer: bytes | bytearray | memoryview) -> None:
        """Write all of ``buffer`` at ``offset``; raises ``OutputError`` (``no-space``, ``write-failed``, ``write-range``)."""
        view = memoryview(buffer).cast("B")
        if self._fd < 0:
            raise OutputError("write-failed", "the output is closed already", path=self.final)
        if offset < 0 or (self.size is not None and offset + len(view) > self.size):
            message = f"bytes {offset} to {offset + len(view)} are outside the planned {self.size}"
            raise OutputError("write-range", message, path=self.final, offset_bytes=offset)
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._fd, view[done : done + MAX_WRITE_NBYTES], offset + done)
            except OSError as error:
                _fail(error, self.final)

    def flush(self) -> None:
        """Bring to disk what is written so far, while others go on writing; ``OutputError`` if the disk cannot take it."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            _fail(error, self.final)

    def commit(self) -> None:
        """Flush to disk and take the final name; a second call does nothing."""
        if self._fd < 0:
            return
        try:
            os.fsync(self._fd)
            self._rename()
        except OSError as error:
            self.abort()
            _fail(error, self.final)
        except BaseException:
            self.abort()
            raise
        self._close()
        _sync_directory(self.final.parent)

    def _rename(self) -> None:
        if self._overwrite:
            os.replace(self.partial, self.final)
            return
        try:
            os.link(self.partial, self.final, follow_symlinks=False)  # unlike rename, never replaces
        except FileExistsError:
            raise OutputError("exists", "was created meanwhile", path=self.final, hint="choose another name") from None
        except (OSError, NotImplementedError):  # a file system without hard links
            if os.path.lexists(self.final):
                raise OutputError("exists", "was created meanwhile", path=self.final, hint="choose another name") from None
            os.rename(self.partial, self.final)
            return
        os.unlink(self.partial)

    def keep(self) -> None:
        """Leave the partial for a later run to go on with; ``abort`` then does nothing."""
        self._close()

    def abort(self) -> None:
        """Remove what was written; after ``commit`` it does nothing."""
        if self._fd < 0:
            return
        if _is_same(self._fd, self.partial):
            with contextlib.suppress(OSError):
                os.unlink(self.partial)
        self._close()

    def _close(self) -> None:
        with self._closing:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()


def _create_file(partial: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    return os.open(partial, flags, FILE_MODE)


def _open_file(partial: Path) -> int:
    return os.open(partial, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))


class OutputDirectory:
    """A directory of files that appears under its final name, complete, with ``commit``.

    ``size`` is the planned total, for the space check. With ``overwrite`` an existing checkpoint directory is renamed aside,
    the new one takes its place, and the old one is deleted; a directory that holds no checkpoint is never deleted.
    ``resume``: go on with the partial directory that is there.
    """

    def __init__(self, final: Path, size: int | None, overwrite: bool, resume: bool = False) -> None:
        self.final, self._overwrite = Path(os.path.abspath(final)), overwrite
        self.partial = _partial_of(self.final)
        self._resume = resume and self.partial.is_dir() and not self.partial.is_symlink()
        _check_destination(self.final, None if self._resume else size, overwrite)
        _check_replaceable(self.final)
        self._files: dict[str, OutputFile] = {}
        self._open = True
        self._fd = _create_locked(self.partial, self.final, _open_directory if self._resume else _create_directory, _remove_tree)

    def file(self, name: str, size: int | None = None, *, folder: str = "") -> OutputFile:
        """Start the file ``name``, in ``folder`` if given; the directory's ``commit`` finishes it if the caller has not."""
        plain_file_name(name, self.final)
        if not self._open:
            raise OutputError("write-failed", "the output is closed already", path=self.final)
        place = self.partial
        if folder:
            place = self.partial / plain_file_name(folder, self.final)
            place.mkdir(exist_ok=True)
        if f"{folder}/{name}" in self._files:
            raise OutputError("exists", f"the file {name!r} is written twice", path=self.final)
        if self._resume and (place / name).is_file():  # finished before the kill, but not the directory
            os.replace(place / name, _partial_of(place / name))
        self._files[f"{folder}/{name}"] = OutputFile(place / name, size, overwrite=False, resume=self._resume)
        return self._files[f"{folder}/{name}"]

    def write_bytes(self, name: str, data: bytes, *, folder: str = "") -> None:
        """Write a whole small file."""
        with self.file(name, len(data), folder=folder) as out:
            out.pwrite(0, data)
            out.commit()

    def commit(self) -> None:
        """Finish all files and rename the directory; on failure the old directory is back in place."""
        if not self._open:
            return
        try:
            for file in self._files.values():
                file.commit()
            os.fsync(self._fd)
            old = self._swap()
        except OSError as error:
            self.abort()
            _fail(error, self.final)
        except BaseException:
            self.abort()
            raise
        self._close()
        _sync_directory(self.final.parent)
        if old is not None:
            _remove_tree(old)

    def _swap(self) -> Path | None:
        """Rename into place; returns where the old directory is now."""
        if not os.path.lexists(self.final):
            os.rename(self.partial, self.final)
            return None
        if not self._overwrite:
            raise OutputError("exists", "was created meanwhile", path=self.final, hint="choose another name")
        _check_replaceable(self.final)
        old = self.final.with_name(f".{self.final.name}.replaced-{os.getpid()}")
        os.rename(self.final, old)
        try:
            os.rename(self.partial, self.final)
        except BaseException:
            os.rename(old, self.final)
            raise
        return old

    def keep(self) -> None:
        """Leave the partial directory for a later run to go on with; ``abort`` then does nothing."""
        for file in self._files.values():
            file.keep()
        self._close()

    def abort(self) -> None:
        """Remove what was written; after ``commit`` it does nothing."""
        if not self._open:
            return
        for file in self._files.values():
            file.abort()
        if _is_same(self._fd, self.partial):
            _remove_tree(self.partial)
        self._close()

    def _close(self) -> None:
        self._open = False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> OutputDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()


def _create_directory(partial: Path) -> int:
    os.mkdir(partial)
    return os.open(partial, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))


def _open_directory(partial: Path) -> int:
    return os.open(partial, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))


def _remove_tree(path: Path) -> None:
    """Delete a directory of ours; a link or a file under that name is only unlinked."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path, ignore_errors=True)
    else:
        os.unlink(path)


def _check_replaceable_file(final: Path) -> None:
    """Refuse a directory, a device, a pipe or a socket: only a regular file or a link is ever replaced."""
    try:
        mode = os.lstat(final).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        _fail(error, final)
    if stat.S_ISDIR(mode):
        raise OutputError("exists", "is a directory", path=final, hint="name a file")
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise OutputError("exists", "is not a regular file", path=final, hint="name a file")


def _check_replaceable(final: Path) -> None:
    """Refuse to delete a directory that does not look like a checkpoint, or that the user stands in."""
    if not os.path.lexists(final):
        return
    if final.is_symlink() or not final.is_dir():
        raise OutputError("exists", "is not a directory", path=final, hint="choose another name")
    try:
        names = os.listdir(final)
        real = os.path.realpath(final)
        places = [os.path.realpath(place) for place in (os.curdir, os.path.expanduser("~"))]
    except OSError as error:
        _fail(error, final)
    known = not names or any(name in CHECKPOINT_MARKS or name.endswith(CHECKPOINT_SUFFIXES) for name in names)
    inside = any(place == real or place.startswith(real.rstrip(os.sep) + os.sep) for place in places)
    if not known or inside:
        message = "holds the current or the home directory" if inside else "holds files, but no checkpoint"
        raise OutputError("not-a-checkpoint", f"{message}, so it is not replaced", path=final, hint="choose another name")


def check_not_same(sources: str | Path | ByteSource | Iterable[str | Path | ByteSource], destination: str | Path) -> None:
    """Raise ``OutputError('same-file')`` if ``destination`` is a source, lies inside a source directory, or contains a source.

    Links are followed, and two names of one inode are one file. Sources that are no local path are told apart by identity.
    """
    if "\0" in str(destination):
        raise OutputError("unwritable", "is no file name", path=destination)
    target = Path(os.path.realpath(destination))
    items = [sources] if isinstance(sources, (str, Path)) or hasattr(sources, "pread") else list(sources)  # type: ignore[arg-type]
    for item in items:
        source = Path(os.path.realpath(item if isinstance(item, (str, Path)) else item.name))  # type: ignore[union-attr]
        same = source == target or target in source.parents or (source in target.parents and source.is_dir())
        with contextlib.suppress(OSError):
            same = same or os.path.samefile(source, target)
        if same:
            message = f"is the source {str(source)!r}, or one contains the other"
            raise OutputError("same-file", message, path=destination, hint="write to another place; sources are never changed")
