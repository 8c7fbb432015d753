"""GGUF files as files: cut into shards, put together again, copied with other metadata. Tensor bytes are streamed, never read into values.

Shards follow ``tools/gguf-split`` of llama.cpp v0.5.0: all keys in the first shard only; each has ``split.no`` (u16, from 0),
``split.tensors.count`` (i32, of the whole set) and ``split.count`` (u16), in this order behind the others. Cutting a file and putting
it together again gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from converters.digests import DIGESTS_KEY
from converters.metadata_words import Assignment, assigned
from qformats.checkpoint import PROVENANCE_KEY, is_remote_path, open_checkpoint
from qformats.containers.atomic import OutputFile, check_not_same
from qformats.containers.gguf import GGUFFile, Metadata, TensorInfo, Value, layout_gguf, open_gguf, open_gguf_shards
from qformats.containers.layout import Layout
from qformats.containers.raw import RawTensor
from qformats.containers.source import ByteSource, check_remote
from qformats.errors import BadFile, OutputError, Unsupported, UsageError

__all__ = ["Written", "edit_gguf", "merge_gguf", "split_gguf"]

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
MAX_SHARDS = 65535  # split.count is u16
_PAD_NBYTES = 32  # gguf-split counts every tensor padded to the default alignment
_COPY_NBYTES = 8 << 20
Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Written:
    """``paths`` of the files written, their total size, and how many tensors and keys the model has."""

    paths: tuple[Path, ...]
    nbytes: int
    tensors: int
    keys: int


# ---------------------------------------------------------------- cutting


def split_gguf(
    source: str | Path,
    destination: str | Path,
    *,
    max_nbytes: int | None = None,
    max_tensors: int | None = None,
    no_tensor_first: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write ``source`` as ``DESTINATION-00001-of-0000N.gguf``; ``.gguf`` at the end of ``destination`` is left out.

    A new shard begins before the tensor that would exceed ``max_nbytes`` (tensors alone, each padded to 32 bytes), or after each
    ``max_tensors``. The first shard is written last, so that what is incomplete cannot be opened. Raises ``UsageError``
    (``split-limit``, ``split-count``), ``Unsupported('gguf-big-endian')``, ``OutputError``, and what ``open_gguf`` raises.
    """
    if (max_nbytes is None) == (max_tensors is None):
        raise UsageError("split-limit", "give either a largest size or a largest number of tensors")
    if (max_nbytes if max_nbytes is not None else max_tensors or 0) <= 0:
        raise UsageError("split-limit", "the limit is not positive")
    opened = _open_little_endian(source)
    groups = _groups(list(opened.tensors.values()), max_nbytes, max_tensors)
    if no_tensor_first:
        groups.insert(0, [])
    if len(groups) > MAX_SHARDS:
        raise UsageError("split-count", f"makes {len(groups)} shards, at most {MAX_SHARDS} are possible", path=source)
    base = Path(destination)
    stem = base.name.removesuffix(".gguf")
    paths = [base.with_name(f"{stem}-{number + 1:05d}-of-{len(groups):05d}.gguf") for number in range(len(groups))]
    kept = {key: value for key, value in opened.metadata.items() if key not in SPLIT_KEYS}
    shards = [_shard(kept if number == 0 else {}, number, len(groups), len(opened.tensors)) for number in range(len(groups))]
    jobs = [_Copy(path, metadata, group) for path, metadata, group in zip(paths, shards, groups, strict=True)]
    return _write([*jobs[1:], jobs[0]], opened, overwrite, progress, paths)


def _groups(tensors: Sequence[RawTensor], max_nbytes: int | None, max_tensors: int | None) -> list[list[RawTensor]]:
    if max_tensors is not None:
        return [list(tensors[at : at + max_tensors]) for at in range(0, len(tensors), max_tensors)] or [[]]
    assert max_nbytes is not None
    groups: list[list[RawTensor]] = [[]]
    size = 0
    for raw in tensors:
        nbytes = raw.nbytes + -raw.nbytes % _PAD_NBYTES
        if groups[-1] and size + nbytes > max_nbytes:
            groups.append([])
            size = 0
        groups[-1].append(raw)
        size += nbytes
    return groups


def _shard(kept: Mapping[str, Value], number: int, count: int, tensors: int) -> Metadata:
    return {
        **kept,
        "split.no": Value("u16", number),
        "split.tensors.count": Value("i32", tensors),
        "split.count": Value("u16", count),
    }


# ---------------------------------------------------------------- putting together


def merge_gguf(
    sources: Sequence[str | Path], destination: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Written:
    """Write all shards as one file: those given, or those beside the one that is given.

    Raises ``UsageError('not-split')`` for a file that is no shard, ``BadFile`` for a set that is not whole, and as ``split_gguf``.
    """
    if len(sources) > 1 and any(is_remote_path(source) for source in sources):
        raise UsageError("hub-address", f"{len(sources)} shards are given", path=sources[0], hint="name one shard: the others are found")
    if len(sources) == 1:
        opened = _open_little_endian(sources[0])
    else:
        opened = _checked(open_gguf_shards(sources))
    if "split.count" not in opened.metadata:
        raise UsageError("not-split", "is no shard of a split GGUF", path=sources[0], hint="name a file such as NAME-00001-of-00003.gguf")
    metadata = {key: value for key, value in opened.metadata.items() if key not in SPLIT_KEYS}
    path = Path(destination)
    return _write([_Copy(path, metadata, list(opened.tensors.values()))], opened, overwrite, progress, [path])


# ---------------------------------------------------------------- other metadata


def edit_gguf(
    source: str | Path,
    destination: str | Path,
    *,
    assignments: Iterable[Assignment] = (),
    removed: Iterable[str] = (),
    renamed: Iterable[tuple[str, str]] = (),
    renamed_tensors: Iterable[tuple[str, str]] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Copy ``source`` (a file, or any shard of a set: the copy is one file) with keys renamed, then removed, then set.

    Keys keep their places, new ones follow; tensors keep their bytes and order. Digests of the conversion that made it are left out, and
    with renamed tensors its record too, since neither fits any more. Raises ``UsageError`` (``metadata-missing``, ``metadata-taken``,
    ``metadata-reserved``, ``metadata-value``, ``metadata-type``) and as ``split_gguf``.
    """
    opened = _open_little_endian(source)
    metadata = {key: value for key, value in opened.metadata.items() if key not in (*SPLIT_KEYS, DIGESTS_KEY)}
    metadata = _renamed(metadata, renamed, "key")
    for key in removed:
        if key not in metadata:
            raise UsageError("metadata-missing", f"there is no key {key!r} to remove", path=source)
        del metadata[key]
    for assignment in assignments:
        metadata = assigned(metadata, assignment)
    moved = list(renamed_tensors)
    tensors = _renamed(opened.tensors, moved, "tensor")
    if moved:
        metadata.pop(PROVENANCE_KEY, None)
    path = Path(destination)
    job = _Copy(path, metadata, [replace(raw, name=name) for name, raw in tensors.items()])
    return _write([job], opened, overwrite, progress, [path])


def _renamed(items: Mapping[str, T], pairs: Iterable[tuple[str, str]], what: str) -> dict[str, T]:
    found = dict(items)
    for old, new in pairs:
        if old not in found:
            raise UsageError("metadata-missing", f"there is no {what} {old!r} to rename")
        if new in found:
            raise UsageError("metadata-taken", f"there is a {what} {new!r} already")
        if what == "key" and new.startswith(("split.", "qformats.")):
            raise UsageError("metadata-reserved", f"keys such as {new!r} are written by the tools themselves")
        found = {new if name == old else name: value for name, value in found.items()}
    return found


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class _Copy:
    """One file to be written: its keys, and source tensors under their names there."""

    path: Path
    metadata: Metadata
    tensors: Sequence[RawTensor]

    def layout(self) -> Layout:
        return layout_gguf(self.metadata, [TensorInfo(raw.name, raw.dtype, raw.shape) for raw in self.tensors])


def _open_little_endian(path: str | Path) -> GGUFFile:
    if not is_remote_path(path):
        return _checked(open_gguf(path))
    opened = open_checkpoint(path).gguf
    if opened is None:
        raise BadFile("gguf-magic", "is no GGUF", path=path, hint="name a .gguf of the repository")
    return _checked(opened)


def _checked(opened: GGUFFile) -> GGUFFile:
    if opened.big_endian:
        hint = "convert it first, for example with gguf-py's gguf_convert_endian.py"
        raise Unsupported("gguf-big-endian", "is big-endian, and tensors are only copied here", path=opened.name, hint=hint)
    return opened


def _sources(opened: GGUFFile) -> list[ByteSource]:
    return list({id(raw.source): raw.source for raw in opened.tensors.values()}.values())


def _write(
    jobs: Sequence[_Copy], opened: GGUFFile, overwrite: bool, progress: Progress | None, paths: Sequence[Path]
) -> Written:
    """Write the files one after the other; after a failure none that is new is left."""
    sources = _sources(opened)
    layouts = [job.layout() for job in jobs]
    for job in jobs:
        check_not_same([opened.name, *sources], job.path)
        if not overwrite and os.path.lexists(job.path):
            raise OutputError("exists", "already exists", path=job.path, hint="choose another name or allow overwriting")
    total = sum(layout.size for layout in layouts)
    written, done = 0, []
    try:
        for job, layout in zip(jobs, layouts, strict=True):
            fresh = not os.path.lexists(job.path)
            with OutputFile(job.path, layout.size, overwrite) as out:
                written = _fill(out, job, layout, written, total, progress)
                _check_unchanged(sources)
                out.commit()
            done += [job.path] if fresh else []
    except BaseException:
        for path in done:
            with suppress(OSError):
                path.unlink()
        raise
    finally:
        for source in sources:
            source.close()
    keys = sum(len(job.metadata) for job in jobs) - (len(SPLIT_KEYS) * len(jobs) if SPLIT_KEYS[0] in jobs[0].metadata else 0)
    return Written(tuple(paths), total, sum(len(job.tensors) for job in jobs), keys)


def _fill(out: OutputFile, job: _Copy, layout: Layout, written: int, total: int, progress: Progress | None) -> int:
    """Header and tensors; bytes between them are zero. Returns how much of ``total`` is written then."""
    out.pwrite(0, layout.header)
    buffer = memoryview(bytearray(min(_COPY_NBYTES, max((raw.nbytes for raw in job.tensors), default=0))))
    for raw in job.tensors:
        for at in range(0, raw.nbytes, _COPY_NBYTES):
            piece = buffer[: min(_COPY_NBYTES, raw.nbytes - at)]
            raw.source.pread_into(raw.offset + at, piece)
            out.pwrite(layout.offsets[raw.name] + at, piece)
            if progress is not None:
                progress(written + layout.offsets[raw.name] + at + len(piece), total)
    return written + layout.size


def _check_unchanged(sources: Sequence[ByteSource]) -> None:
    check_remote(sources)
    for source in sources:
        if source.changed():
            raise BadFile("changed", "was written to while it was copied", path=source.name, hint="try again")
