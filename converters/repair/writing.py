"""Writing what was mended: to another directory, or file by file in place; digests show that all other tensors kept their bytes.

Files that stay as they are become hard links where the file system has them, else copies. In place every file is replaced at once by a
finished one (``OutputFile``): weights first, then the index, then the rest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from converters.digests import of_tensors
from converters.repair.mending import Mending
from qformats.containers.atomic import OutputDirectory, OutputFile, check_not_same
from qformats.containers.layout import Layout
from qformats.containers.raw import RawTensor
from qformats.containers.safetensors import SafetensorsFile, layout_safetensors, open_safetensors
from qformats.errors import Mismatch, OutputError

__all__ = ["Kept", "write_directory", "write_in_place"]

_STEP_NBYTES = 8 << 20


class Kept:
    """Digests of tensors that were to stay as they are, before and after: ``tensors`` counted, ``digest`` the one both sides have."""

    def __init__(self) -> None:
        self.tensors = 0
        self.digests: dict[str, str] = {}

    def check(self, name: str, before: Mapping[str, RawTensor], after: Mapping[str, RawTensor]) -> None:
        """Compare all of ``before`` with what ``after`` has under the same names; ``Mismatch('tensor-bytes')``."""
        digest = of_tensors(before.values())
        if before.keys() - after.keys() or of_tensors([after[key] for key in before]) != digest:
            raise Mismatch("tensor-bytes", "tensors changed while the file was written; nothing of it is kept", path=name)
        self.tensors += len(before)
        self.digests[name] = digest


def write_directory(mending: Mending, final: Path, overwrite: bool) -> Kept:
    """Write the mended checkpoint as the directory ``final``; it appears complete or not at all."""
    source = mending.found.directory
    assert source is not None
    check_not_same([source], final)
    kept = Kept()
    plans = {name: _plan(file, mending, name) for name, file in mending.found.shards.items() if _changes(mending, name)}
    size = sum(layout.size for layout in plans.values()) + sum(map(len, mending.small.values()))
    with OutputDirectory(final, size, overwrite) as directory:
        for name, layout in plans.items():
            target = mending.names.get(name, name)
            with directory.file(target, layout.size) as out:
                _write_file(mending, name, layout, out, kept)
                out.commit()
        for place, name in _others(source):
            new = mending.names.get(name, name)
            if not place and (name in plans or new in mending.small):
                continue
            _link(source / place / name, directory.partial / place / new)
        for name, data in mending.small.items():
            folder, _, last = name.rpartition("/")
            directory.write_bytes(last, data, folder=folder)
        directory.commit()
    return kept


def write_in_place(mending: Mending) -> Kept:
    """Replace the files that change, each at once; a file under a new name leaves its old one."""
    source = mending.found.directory
    assert source is not None
    kept = Kept()
    for name, file in mending.found.shards.items():
        target = source / mending.names.get(name, name)
        if _changes(mending, name):
            layout = _plan(file, mending, name)
            with OutputFile(target, layout.size, overwrite=target.name == name) as out:
                _write_file(mending, name, layout, out, kept)
                out.commit()
            if target.name != name:
                (source / name).unlink()
        elif target.name != name:
            (source / name).rename(target)
    for name, data in sorted(mending.small.items(), key=lambda item: not item[0].endswith(".index.json")):
        target = source / name
        with OutputFile(target, len(data), overwrite=True) as out:
            out.pwrite(0, data)
            out.commit()
    return kept


def _changes(mending: Mending, name: str) -> bool:
    return name in mending.tensors or name in mending.metadata


def _tensors(file: SafetensorsFile, mending: Mending, name: str) -> dict[str, RawTensor]:
    return {**file.tensors, **mending.tensors.get(name, {})}


def _plan(file: SafetensorsFile, mending: Mending, name: str) -> Layout:
    tensors = [(raw.name, raw.dtype, raw.shape) for raw in _tensors(file, mending, name).values()]
    said = {**file.metadata, **mending.metadata.get(name, {})}
    return layout_safetensors(tensors, {key: text for key, text in said.items() if text is not None})


def _write_file(mending: Mending, name: str, layout: Layout, out: OutputFile, kept: Kept) -> None:
    """Header and tensors, then the digests of those that were to stay, read from what was written."""
    file = mending.found.shards[name]
    out.pwrite(0, layout.header)
    for raw in _tensors(file, mending, name).values():
        buffer = memoryview(bytearray(min(raw.nbytes, _STEP_NBYTES)))
        for at in range(0, raw.nbytes, _STEP_NBYTES):
            piece = buffer[: min(_STEP_NBYTES, raw.nbytes - at)]
            raw.source.pread_into(raw.offset + at, piece)
            out.pwrite(layout.offsets[raw.name] + at, piece)
    out.flush()
    written = open_safetensors(out.partial)
    try:
        changed = mending.tensors.get(name, {})
        kept.check(name, {key: raw for key, raw in file.tensors.items() if key not in changed}, written.tensors)
    finally:
        for raw in written.tensors.values():
            raw.source.close()
            break


def _others(source: Path) -> Iterator[tuple[str, str]]:
    """Folder and name of every file of the directory, folders in it included; links are followed, names with a dot first are not."""
    for entry in sorted(source.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            yield "", entry.name
        elif entry.is_dir():
            for inner in sorted(entry.rglob("*")):
                if inner.is_file():
                    yield inner.parent.relative_to(source).as_posix(), inner.name


def _link(source: Path, target: Path) -> None:
    """``target`` as another name of the file, or a copy of it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:
            shutil.copyfile(source, target)
    except OSError as error:
        raise OutputError("write-failed", f"cannot be copied: {error.strerror}", path=source) from None
