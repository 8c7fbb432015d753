"""What a loaded model remembers of its checkpoint, so that it can be saved as the same files: headers, small tensors, where each row went.

Files keep their header bytes, and every tensor its place in the file: what comes back has the same bytes unless a weight was changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from qformats import registry
from qformats.checkpoint import Checkpoint
from qformats.containers.index import INDEX_SUFFIX
from qformats.containers.raw import RawTensor
from qformats.containers.source import ByteSource
from qformats.formats.protocol import Module, Target
from qformats.scheme import Storage

if TYPE_CHECKING:
    from qformats.architectures.mapping import TensorMap
    from qformats.runtime.supply import Supply

__all__ = ["FileRecord", "Origin", "Record", "Stored"]

_SMALL_NBYTES = 1 << 20


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the checkpoint went: rows from ``start`` on of the packed module ``module``."""

    module: str
    start: int


@dataclass(frozen=True)
class Stored:
    """A stored tensor: its dtype word and shape, and where its bytes lie.

    ``kept``: its bytes, where the model does not hold them. ``rounded``: the model holds it in a narrower dtype; small ones are kept too.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    kept: bytes | None = None
    rounded: bool = False


@dataclass(frozen=True)
class FileRecord:
    """A file of the checkpoint: everything before its first tensor, the tensors in file order, the size of all."""

    name: str
    header: bytes
    tensors: Mapping[str, Stored]
    size: int


@dataclass(frozen=True)
class Record:
    """``checkpoint``: closed, for its configuration and names. ``packed``: a tensor's own name → where its rows are.

    ``storages``: of every quantized module; ``writable``: whether its format writes it. ``renamed``: a tensor's own name → the model's.
    """

    checkpoint: Checkpoint
    files: tuple[FileRecord, ...]
    packed: Mapping[str, Origin]
    storages: Mapping[str, Storage]
    renamed: Mapping[str, str]
    writable: Mapping[str, bool]
    small: Mapping[str, bytes] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> Record:
        return self  # nothing in it changes

    @cached_property
    def rows_of(self) -> Mapping[str, TensorMap]:
        """What each tensor that a Hugging Face checkpoint has is made of, by its own name."""
        from qformats.runtime.supply import Supply

        return Supply.of(self.checkpoint, str).tensors

    @cached_property
    def kept(self) -> Mapping[str, bytes]:
        """The bytes of stored tensors that the model does not hold."""
        return {name: stored.kept for file in self.files for name, stored in file.tensors.items() if stored.kept is not None}

    @staticmethod
    def of(supply: Supply, packed: Mapping[str, Origin], held: set[str], rounded: set[str]) -> Record:
        """``packed``, ``held``, ``rounded``: by the model's own names; all that it holds, and what of it not exactly."""
        checkpoint = supply.checkpoint
        narrowed = {supply.stored[name] for name in rounded}
        stored = {new: old for new, old in supply.stored.items() if new in held}
        storages = {name: _storage(module) for name, module in checkpoint.modules.items() if checkpoint.is_quantized(name)}
        writable = {name: _writable(storage, checkpoint.modules[name]) for name, storage in storages.items()}
        kept = _not_held(checkpoint, writable, set(stored.values()))
        files = tuple(_file(checkpoint, source, kept, narrowed) for source in checkpoint.sources())
        places = {supply.stored[new]: origin for new, origin in packed.items()}
        small = {} if checkpoint.gguf is not None else {**checkpoint.side_files(), **_more_files(checkpoint)}
        return Record(checkpoint, files, places, storages, {old: new for new, old in stored.items()}, writable, small)


def _storage(module: Module) -> Storage:
    form = registry.format_module(module.match.format)
    if hasattr(form, "storage_of"):
        found: Storage = form.storage_of(module)
        return found
    (only,) = form.storages(Target("gguf", module.parts["weight"].dtype.lower()), form.scheme(module))
    return only  # type: ignore[no-any-return]


def _not_held(checkpoint: Checkpoint, writable: Mapping[str, bool], names: set[str]) -> set[str]:
    """Full names of stored tensors that the model has no value of: extras, copies of tied weights, buffers that it computes."""
    found: set[str] = set()
    for name, module in checkpoint.modules.items():
        coded = name in writable
        if coded and not writable[name]:
            found.update(raw.name for raw in module.parts.values())
            continue
        own = registry.format_module(module.match.format).SUFFIXES if coded else ()
        for leaf, raw in module.parts.items():
            weight = coded and (leaf in own or leaf == "weight") and (name, leaf) not in checkpoint.extras
            if checkpoint.gguf is None and f"{name}.{'weight' if weight else leaf}".lstrip(".") not in names:
                found.add(raw.name)
    return found


def _writable(storage: Storage, module: Module) -> bool:
    """Whether the format writes what it reads here: some layouts are only read.

    The scheme knows headers alone, and takes any plane of indices for an order; the storage has looked at them.
    """
    form = registry.format_module(module.match.format)
    scheme = form.scheme(module)
    if scheme.group_index and not storage.group_index:  # its storage knows that the index, which is there, says nothing
        scheme = replace(scheme, group_index=False)
    return bool(form.can_store(storage, scheme))


def _more_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Files that say the same again: the index of the shards, AutoRound's copy of its configuration."""
    if checkpoint.unwritten is not None:
        return {}  # all of them are side files
    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    found = [*directory.glob(f"*{INDEX_SUFFIX}"), directory / "quantization_config.json"]
    return {file.name: file.read_bytes() for file in found if file.is_file()}


def _file(checkpoint: Checkpoint, source: ByteSource, kept: set[str], narrowed: set[str]) -> FileRecord:
    mine = sorted((raw for raw in checkpoint.raw.values() if raw.source is source), key=lambda raw: raw.offset)
    first = mine[0].offset if mine else source.size

    def stored(raw: RawTensor) -> Stored:
        rounded = raw.name in narrowed
        keep = raw.name in kept or (rounded and raw.nbytes <= _SMALL_NBYTES)
        return Stored(raw.dtype, raw.shape, raw.offset, raw.nbytes, raw.read() if keep else None, rounded)

    return FileRecord(source.name, source.pread(0, first), {raw.name: stored(raw) for raw in mine}, source.size)
