"""Opening what may be broken: a checkpoint if there is one, and beside it what the directory holds, as it is.

``read`` raises only where there is nothing to speak of (no such path, no such repository); everything else that is wrong becomes part of
what it returns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qformats.checkpoint import SIDE_FILES, Checkpoint, open_checkpoint, open_found
from qformats.containers.index import INDEX_NAME, INDEX_SUFFIX, file_names
from qformats.containers.safetensors import SafetensorsFile, open_safetensors
from qformats.errors import BadFile, QFormatError, RemoteError

__all__ = ["Found", "Index", "read"]

_FATAL = ("not-found", "several-gguf", "pickle", "unreadable")
_MAX_JSON_NBYTES = 100_000_000


@dataclass(frozen=True)
class Index:
    """The index of shards as it stands. ``weight_map``: None where the file has none that can be read. ``total_size``: as it says."""

    name: str
    weight_map: Mapping[str, str] | None
    total_size: int | None


@dataclass
class Found:
    """``checkpoint``: None where the files contradict themselves; ``problem`` then says how. ``names``: of all files beside the weights.

    ``shards``: the safetensors files whose headers can be read, by name; ``broken``: what is wrong with the others.
    """

    path: str
    directory: Path | None
    checkpoint: Checkpoint | None = None
    problem: QFormatError | None = None
    names: tuple[str, ...] = ()
    index: Index | None = None
    shards: dict[str, SafetensorsFile] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def json(self, name: str) -> dict[str, Any]:
        """The object in the small file ``name``; ``{}`` where there is none or it cannot be read."""
        found = None if self.directory is None or name not in self.names else _json(self.directory / name)
        return found if isinstance(found, dict) else {}

    def close(self) -> None:
        """Close all files."""
        if self.checkpoint is not None:
            self.checkpoint.close()
        for file in self.shards.values():
            for raw in file.tensors.values():
                raw.source.close()
                break


def read(path: str | Path, allow_pickle: bool = False) -> Found:
    """Look at ``path``: a file, a directory or an address of a repository.

    Raises ``BadFile`` (``not-found``, ``several-gguf``), ``Unsafe('pickle')`` and ``RemoteError`` where there is nothing to lint.
    """
    checkpoint, problem = None, None
    try:
        checkpoint = open_checkpoint(path, allow_pickle)
    except RemoteError:
        raise
    except QFormatError as error:
        if error.code in _FATAL:
            raise
        problem = error
    found = Found(str(path), _directory(Path(path), checkpoint), checkpoint, problem)
    if checkpoint is not None and checkpoint.origin is not None:
        found.path = checkpoint.origin
        checkpoint.side_files()  # brings them into the cache
    if found.directory is not None and found.directory.is_dir():
        _look_around(found, whole=Path(path).is_dir() or (checkpoint is not None and checkpoint.origin is not None))
    return found


def _directory(path: Path, checkpoint: Checkpoint | None) -> Path | None:
    if checkpoint is not None:
        path = checkpoint.path
        if checkpoint.gguf is not None:
            return None
    return path if path.is_dir() else path.parent if path.suffix == ".safetensors" else None


def _look_around(found: Found, whole: bool) -> None:
    assert found.directory is not None
    names = file_names(found.directory)
    sides = [name for name in SIDE_FILES if "/" in name and (found.directory / name).is_file()]
    weights = list(found.checkpoint.file_names) if found.checkpoint is not None else []
    if not whole:
        names = [name for name in names if not name.endswith(".safetensors") or name == Path(found.path).name]
    found.names = tuple(sorted({*names, *sides, *weights}))
    found.index = _index(found.directory, names) if whole else None
    if found.checkpoint is not None and found.checkpoint.origin is not None:
        return
    for name in names:
        if name.endswith(".safetensors"):
            try:
                found.shards[name] = open_safetensors(found.directory / name)
            except QFormatError as error:
                found.broken[name] = error.message
    if found.checkpoint is None and found.shards:
        _open_union(found)


def _open_union(found: Found) -> None:
    """The tensors of all shards as one checkpoint, where the index is what keeps it from being opened."""
    assert found.directory is not None
    tensors = {name: raw for file in found.shards.values() for name, raw in file.tensors.items()}
    metadata = {key: value for file in found.shards.values() for key, value in file.metadata.items()}
    try:
        found.checkpoint = open_found(found.directory, tensors, metadata, tuple(found.shards))
    except QFormatError as error:
        found.problem = found.problem or error


def _index(directory: Path, names: list[str]) -> Index | None:
    candidates = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if not candidates:
        return None
    name = INDEX_NAME if INDEX_NAME in candidates else candidates[0]
    value = _json(directory / name)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    said = value.get("metadata") if isinstance(value, dict) else None
    total = said.get("total_size") if isinstance(said, dict) else None
    good = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    return Index(name, weight_map if good else None, total if isinstance(total, int) and not isinstance(total, bool) else None)


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON_NBYTES:
            raise BadFile("side-file-size", f"has more than {_MAX_JSON_NBYTES} bytes", path=path)
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
