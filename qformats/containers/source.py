"""Where bytes come from: a file or memory behind one small reading interface, bounds-checked. Knows no format."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, TypeGuard, runtime_checkable

from qformats.errors import BadFile, did_you_mean

__all__ = ["ByteSource", "FileSource", "MemorySource", "RemoteSource", "check_remote", "is_remote", "near"]

_NEIGHBOURS = 10_000  # entries of a directory that are looked at for a name that was meant


@runtime_checkable
class ByteSource(Protocol):
    """Random access to an immutable run of bytes.

    ``name`` is for messages, ``size`` in bytes, ``identity`` a string that two sources share only if they are the same bytes
    in the same place. ``pread`` returns exactly ``nbytes`` or raises ``BadFile('truncated')``. ``changed`` tells whether the bytes
    were written to since the source was opened, as far as that can be known.
    """

    name: str
    size: int

    def pread(self, offset: int, nbytes: int) -> bytes: ...

    def pread_into(self, offset: int, buffer: memoryview) -> None: ...

    def identity(self) -> str: ...

    def changed(self) -> bool: ...

    def close(self) -> None: ...


class RemoteSource(ByteSource, Protocol):
    """Bytes that are dear to read again, because they come over a network.

    ``digests``: XXH3-128 of the chunks of 1 MiB that passed, by number; ``chunk_digest`` that of one, or None. ``check`` holds the whole
    file against the digest that its owner lists, or raises ``RemoteError``; ``checked`` says that this was done.
    """

    checked: bool

    @property
    def digests(self) -> dict[int, bytes]: ...

    def chunk_digest(self, at: int, nbytes: int) -> bytes | None: ...

    def check(self) -> None: ...


def is_remote(source: ByteSource) -> TypeGuard[RemoteSource]:
    """Whether reading again what was read is dear."""
    return hasattr(source, "chunk_digest")


def check_remote(sources: Iterable[ByteSource]) -> None:
    """Hold what came over a network against the digests that its owner lists; what is done before an output gets its name."""
    for source in sources:
        if is_remote(source):
            source.check()


def _truncated(name: str, offset: int, wanted: int, found: int) -> BadFile:
    return BadFile(
        "truncated",
        f"wanted {wanted} bytes, found {found}",
        path=name,
        offset_bytes=offset,
        hint="the file is incomplete or was cut while it was read; fetch it again",
    )


def near(path: Path) -> str:
    """What to do about a path that does not exist: the name beside it that was probably meant."""
    try:
        names = [found.name for found, _ in zip(path.parent.iterdir(), range(_NEIGHBOURS))]
    except OSError:
        return "check the path"
    return did_you_mean(path.name, names, cutoff=0.8).rstrip() or "check the path"


class FileSource:
    """A file read with ``pread``, so that a file truncated meanwhile is an error and never a SIGBUS. Thread-safe."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = str(path)
        self._fd = -1
        try:
            # without O_NONBLOCK opening a named pipe would wait for a writer
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            raise BadFile("not-found", "no such file", path=path, hint=near(Path(path))) from None
        except IsADirectoryError:
            raise BadFile("not-a-file", "is a directory, not a file", path=path) from None
        except (OSError, ValueError) as error:
            raise BadFile("unreadable", f"cannot be opened: {getattr(error, 'strerror', None) or error}", path=path) from None
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            kind = "is a directory, not a file" if stat.S_ISDIR(found.st_mode) else "is not a regular file"
            raise BadFile("not-a-file", kind, path=path)
        self._fd = fd
        self.size = found.st_size
        self._identity, self._written = f"{found.st_dev}:{found.st_ino}", (found.st_size, found.st_mtime_ns)

    def pread(self, offset: int, nbytes: int) -> bytes:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise _truncated(self.name, offset, nbytes, max(0, self.size - offset))
        buffer = bytearray(nbytes)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0:
            raise BadFile("truncated", f"negative offset {offset}", path=self.name)
        view, done = buffer.cast("B"), 0
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done : done + (1 << 30)]], offset + done)
            except OSError as error:
                raise BadFile("unreadable", f"read failed: {error.strerror}", path=self.name, offset_bytes=offset) from None
            if got == 0:
                raise _truncated(self.name, offset, len(view), done)
            done += got

    def identity(self) -> str:
        return self._identity

    def changed(self) -> bool:
        found = os.fstat(self._fd)
        return (found.st_size, found.st_mtime_ns) != self._written

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __reduce__(self) -> tuple[type[FileSource], tuple[str]]:
        return FileSource, (self.name,)  # a worker process opens the file again

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FileSource({Path(self.name).name!r}, {self.size} bytes)"


class MemorySource:
    """Bytes in memory with the interface of a file."""

    def __init__(self, data: bytes | bytearray | memoryview, name: str = "<memory>") -> None:
        self.name = name
        self._view = memoryview(data).cast("B")
        self.size = len(self._view)

    def pread(self, offset: int, nbytes: int) -> bytes:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise _truncated(self.name, offset, nbytes, max(0, self.size - offset))
        return bytes(self._view[offset : offset + nbytes])

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The bytes themselves, not a copy."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise _truncated(self.name, offset, nbytes, max(0, self.size - offset))
        return self._view[offset : offset + nbytes]

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        if offset < 0 or offset + len(view) > self.size:
            raise _truncated(self.name, offset, len(view), max(0, self.size - offset))
        view[:] = self._view[offset : offset + len(view)]

    def identity(self) -> str:
        return f"memory:{id(self._view)}"

    def changed(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to release."""


