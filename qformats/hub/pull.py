"""Files down: into the client's cache, or into a directory, where a killed download goes on in the middle of a file.

Every large file is held against the SHA-256 that the hub lists for it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from qformats.containers.atomic import check_is_local, hold
from qformats.errors import OutputError, RemoteError, Unsafe
from qformats.hub import client
from qformats.hub.names import Address
from qformats.hub.source import HubSource, Spool

__all__ = ["Progress", "cached", "cached_file", "chosen", "few", "held", "listed", "literal", "pull", "pull_source"]

_STEP_NBYTES, _FILES_AT_ONCE = 8 << 20, 4
Progress = Callable[[int, int], None]


def chosen(names: Iterable[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """The names that match a pattern of ``include`` (all, if there is none) and none of ``exclude``; ``DIR/`` is all below it.

    >>> chosen(["a.gguf", "b/c.json"], ["b/"])
    ['b/c.json']
    """

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, f"{p}*" if p.endswith("/") else p) for p in patterns)

    return sorted(name for name in names if (not include or matches(name, include)) and not matches(name, exclude))


def cached(address: Address, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Path:
    """The directory of the client's cache that holds the chosen files of ``address``, fetched where they are missing.

    Offline (``HF_HUB_OFFLINE``) what is there is used; ``RemoteError('hub-offline')`` if that is not all.
    """
    package = client.package()
    if client.is_offline():
        with client.translated(address):
            where = package.snapshot_download(address.repo, revision=address.revision, allow_patterns=list(include) or None,
                                              ignore_patterns=list(exclude) or None, local_files_only=True)  # fmt: skip
        return Path(where)
    found = client.snapshot(address)
    names = _named(found, address, include, exclude)
    folder = None
    for name in names:
        folder = _folder(cached_file(found.address(name), found.files[name], address.revision), name)
    assert folder is not None
    return folder


def _folder(path: Path, name: str) -> Path:
    return path.parents[name.count("/")]


def _named(found: client.Snapshot, address: Address, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    names = chosen(found.files, include, exclude)
    if address.file is not None:
        names = [name for name in names if name == address.file]
    if not names:
        wanted = address.file or ", ".join(include) or "any file"
        hint = f"it holds {few(found.files)}"
        raise RemoteError("hub-file", f"the repository has no {wanted}", path=address, hint=hint)
    return names


def held(address: Address, folder: Path, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """The chosen files of ``address`` that ``folder``, its place in the cache, has; ``RemoteError('hub-offline')`` if it has none."""
    names = chosen((p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()), include, exclude)
    names = [name for name in names if address.file in (None, name)]
    if not names:
        hint = f"the cache holds {few(p.name for p in folder.iterdir())}; pull it once while online"
        raise RemoteError("hub-offline", "is not in the cache and cannot be fetched", path=address, hint=hint)
    return names


def few(names: Iterable[str]) -> str:
    """The first names, for a message."""
    listed = sorted(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "") or "nothing"


def cached_file(address: Address, file: client.RemoteFile, revision: str | None = None) -> Path:
    """One file in the client's cache, fetched if it is missing, checked when it was fetched. ``revision``: the name it was asked by."""
    package = client.package()
    assert address.file is not None
    known = package.try_to_load_from_cache(address.repo, address.file, revision=address.revision)
    words = {"revision": address.revision, "endpoint": client.endpoint()}
    path = Path(client.asked(address, lambda: package.hf_hub_download(address.repo, address.file, **words)))
    _remember(address, revision, path)
    if not isinstance(known, str) and not _is_whole(path, file):
        for place in {Path(os.path.realpath(path)), path}:
            place.unlink(missing_ok=True)
        raise _wrong_hash(address)
    return path


def _remember(address: Address, revision: str | None, path: Path) -> None:
    """Write down which commit a branch is, as the client does, so that the branch is found offline."""
    name = revision or "main"
    if name == address.revision or ".." in name:
        return
    snapshots = next(parent for parent in path.parents if parent.name == "snapshots")
    ref = snapshots.parent / "refs" / name
    with suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(address.revision or "", encoding="utf-8")


def _wrong_hash(address: Address) -> RemoteError:
    hint = "it was removed; run the same command again"
    return RemoteError("hub-wrong-hash", "the bytes that came do not have the SHA-256 that the hub lists", path=address, hint=hint)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- into a directory


def pull(
    address: Address,
    destination: str | Path | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Path, list[str]]:
    """Fetch ``address`` into ``destination`` (None: the client's cache); the directory, and the names of its files.

    Files that are there with the right size and digest stay. Raises ``RemoteError`` for the hub, ``OutputError`` for the disk.
    """
    if destination is None:
        folder = cached(address, include, exclude)
        return folder, held(address, folder, include, exclude)
    folder = Path(destination)
    check_is_local(folder)
    if client.is_offline():
        return _copied(address, folder, include, exclude)
    found = client.snapshot(address)
    names = _named(found, address, include, exclude)
    if folder.exists() and not folder.is_dir():
        raise OutputError("exists", "is not a directory", path=folder, hint="name a directory")
    _check_space(folder, {name: found.files[name].size for name in names})
    total, ticker = sum(found.files[name].size for name in names), _Ticker(progress)
    spool = Spool(1)
    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="qformats-pull") as pool:
        fetched = [pool.submit(_fetch_file, found, found.files[name], folder, spool, ticker.of(total)) for name in names]
        try:
            for future in fetched:
                future.result()
        except BaseException:
            ticker.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return folder, names


def listed(address: Address, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[str, dict[str, int]]:
    """The commit that ``address`` names and its chosen files with their sizes; offline those in the cache."""
    if client.is_offline():
        folder = cached(address, include, exclude)
        return folder.name, {name: (folder / name).stat().st_size for name in held(address, folder, include, exclude)}
    found = client.snapshot(address)
    return found.commit, {name: found.files[name].size for name in _named(found, address, include, exclude)}


def pull_source(address: Address, destination: Path, *, progress: Progress | None = None) -> Path:
    """Fetch what a conversion of ``address`` reads into ``destination``; what to open there."""
    from qformats.hub.opening import needed

    found = client.snapshot(address)
    names = needed(found, address)
    pinned = found.address()
    pull(pinned, destination, include=[literal(name) for name in names], progress=progress)
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    single = address.file or gguf
    return destination if single is None else destination / single


def literal(name: str) -> str:
    """A pattern that only ``name`` matches."""
    return re.sub(r"([*?[])", r"[\1]", name)


class _Ticker:
    """Adds up what several files bring; ``stop`` makes the next piece of each raise, so that threads end soon."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._done, self._stopped, self._lock = progress, 0, False, threading.Lock()

    def of(self, total: int) -> Callable[[int], None]:
        def tick(nbytes: int) -> None:
            with self._lock:
                if self._stopped:
                    raise InterruptedError
                self._done += nbytes
                if self._progress is not None:
                    self._progress(self._done, total)

        return tick

    def stop(self) -> None:
        self._stopped = True


def _check_space(folder: Path, sizes: Mapping[str, int]) -> None:
    """Refuse before the first byte what will not fit beside what is there already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [path for name in sizes for path in (folder / name, _partial_of(folder / name))]
        missing = sum(sizes.values()) - sum(path.stat().st_size for path in paths if path.is_file())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _unwritable(folder, error) from None
    if missing > free:
        text = f"needs {missing} bytes, the file system has {free} free"
        raise OutputError("no-space", text, path=folder, hint="free space or choose another place")


def _partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _unwritable(path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError("no-space", "the disk is full", path=path, hint="free space and run the same command again: it goes on")
    return OutputError("unwritable", f"cannot be written: {error.strerror}", path=path, hint="check the place and its permissions")


def _fetch_file(found: client.Snapshot, file: client.RemoteFile, folder: Path, spool: Spool, tick: Callable[[int], None]) -> None:
    """One file under its name, by way of ``.NAME.partial``, which a later run goes on with."""
    for word in file.name.split("/"):
        if word in ("", ".", "..") or "\\" in word or ":" in word:
            raise Unsafe("file-name", f"{file.name!r} is no plain path", path=found.address(), hint="the repository names a place outside")
    path = folder / file.name
    try:
        if path.is_file() and path.stat().st_size == file.size and _is_whole(path, file):
            tick(file.size)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_of(path)
        with partial.open("ab") as out:
            hold(out.fileno(), partial, path)
            if out.tell() > file.size:
                out.truncate(0)
            began = _go_on(found, file, out, spool, tick)
            whole = _is_whole(partial, file)
            if not whole and began:  # what an earlier run left may be of another commit
                out.truncate(0)
                tick(-file.size)
                _go_on(found, file, out, spool, tick)
                whole = _is_whole(partial, file)
            if not whole:
                partial.unlink()
                raise _wrong_hash(found.address(file.name))
            partial.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None


def _go_on(found: client.Snapshot, file: client.RemoteFile, out: BinaryIO, spool: Spool, tick: Callable[[int], None]) -> int:
    """Fetch what ``out`` lacks; how much it had."""
    at = out.seek(0, os.SEEK_END)
    tick(at)
    for piece in HubSource(found.address(), file, spool).stream(at):
        out.write(piece)
        tick(len(piece))
    out.flush()
    os.fsync(out.fileno())
    return at


def _is_whole(path: Path, file: client.RemoteFile) -> bool:
    """Whether a file has the digest that the hub lists: SHA-256, or git's own of small files."""
    if file.sha256 is not None:
        return _sha256(path) == file.sha256
    if file.blob is None:
        return path.stat().st_size == file.size
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as data:
        while piece := data.read(_STEP_NBYTES):
            digest.update(piece)
    return digest.hexdigest() == file.blob


def _copied(address: Address, folder: Path, include: Sequence[str], exclude: Sequence[str]) -> tuple[Path, list[str]]:
    """Offline: out of the cache."""
    source = cached(address, include, exclude)
    names = held(address, source, include, exclude)
    try:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder, names
