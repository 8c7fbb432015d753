"""A model on packed weights written back as the checkpoint it came from: the same files, the same bytes where nothing was changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qformats import assemble, registry
from qformats.containers.atomic import OutputDirectory, OutputFile
from qformats.containers.raw import RawTensor
from qformats.containers.source import FileSource, MemorySource
from qformats.errors import Unsupported, WouldLose
from qformats.formats.dense import read_float, write_float
from qformats.reencode import finish, fit
from qformats.runtime.packed import Packed, present
from qformats.runtime.record import FileRecord, Record, Stored

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.formats.protocol import Piece
    from qformats.scheme import Storage
    from qformats.tensor import QuantizedTensor

__all__ = ["save_model", "written"]


def save_model(model: Any, path: str | Path, *, overwrite: bool = False) -> None:
    """Write ``model`` in the format, and in the files, that it was loaded from: a directory of safetensors, or one .gguf.

    Raises ``Unsupported('not-packed')`` for a model that ``load_model`` did not make, ``OutputError`` for the destination.
    """
    record = getattr(model, "qformats_record", None)
    if not isinstance(record, Record):
        raise Unsupported("not-packed", "the model was not loaded by qformats", hint="use its own save_pretrained")
    final = Path(path)
    tensors = _Tensors(model, record)
    if record.checkpoint.gguf is not None and len(record.files) == 1:
        (file,) = record.files
        with OutputFile(final, file.size, overwrite) as out:
            _write(file, tensors, out)
            _seal(record, {"": out})
            out.commit()
        return
    total = sum(file.size for file in record.files) + sum(map(len, record.small.values()))
    with OutputDirectory(final, total, overwrite) as directory:
        outs = {Path(file.name).name: directory.file(Path(file.name).name, file.size) for file in record.files}
        for file in record.files:
            _write(file, tensors, outs[Path(file.name).name])
        _seal(record, outs)
        for name, data in record.small.items():
            folder, _, last = name.rpartition("/")
            directory.write_bytes(last, data, folder=folder)
        directory.commit()


def _write(file: FileRecord, tensors: _Tensors, out: OutputFile) -> None:
    out.pwrite(0, file.header)
    for name, stored in file.tensors.items():
        data = tensors.as_it_was(name, stored) if stored.rounded else stored.kept if stored.kept is not None else tensors.of(name)
        if len(data) != stored.nbytes:
            text = f"has {len(data)} bytes now, {stored.nbytes} in the checkpoint it came from"
            raise WouldLose("changed-size", text, tensor=name, hint="convert the checkpoint instead")
        out.pwrite(stored.offset, data)


def _seal(record: Record, outs: dict[str, OutputFile]) -> None:
    """Give files that are written for the first time the headers that they end with."""
    if record.checkpoint.unwritten is None:
        return
    with ExitStack() as stack:
        files = {name: stack.enter_context(FileSource(out.partial)) for name, out in outs.items()}
        headers = record.checkpoint.unwritten.sealed(files)
    for name, header in headers.items():
        outs[name].pwrite(0, header)


class _Tensors:
    """Every stored tensor's bytes out of the model; the parts of the last module are held, because they follow each other."""

    def __init__(self, model: Any, record: Record) -> None:
        self._record, self._reader = record, _ModelReader(model, record)
        self._last: tuple[str, dict[str, memoryview]] = ("", {})
        modules = record.checkpoint.modules.items()
        self._places = {raw.name: (name, leaf) for name, module in modules for leaf, raw in module.parts.items()}
        gguf = record.checkpoint.gguf is not None
        self._maps = {m.name: m for m in self._gguf_maps()} if gguf else {}

    def _gguf_maps(self) -> Iterator[Any]:
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for tensor in self._record.checkpoint.binding.to_hf(self._record.checkpoint.shapes()).tensors:
            shapes.setdefault(tensor.target, {})[tensor.leaf] = tensor.shape
        yield from self._record.checkpoint.binding.to_gguf(shapes).tensors

    def as_it_was(self, name: str, stored: Stored) -> bytes | memoryview:
        """A tensor that the model holds in a narrower dtype: its stored bytes unless the model's value has changed since."""
        now = self._reader.value(name)
        before = stored.kept if stored.kept is not None else self._read_again(name, stored)
        if before is not None:
            raw = RawTensor(name, stored.dtype, stored.shape, MemorySource(before, name), 0, stored.nbytes)
            if torch.equal(read_float(raw).to(now.dtype), now):
                return before
        return _floats(now, stored.dtype, name)

    def _read_again(self, name: str, stored: Stored) -> bytes | None:
        """The stored bytes from the file, if it is still the one that the model was loaded from."""
        path = self._record.checkpoint.path
        for file in self._record.files:
            if name in file.tensors:
                where = path / Path(file.name).name if path.is_dir() else path
                if where.is_file() and where.stat().st_size == file.size:
                    with FileSource(where) as source:
                        if source.pread(0, len(file.header)) == file.header:
                            return source.pread(stored.offset, stored.nbytes)
        return None

    def of(self, name: str) -> memoryview:
        """The bytes of the stored tensor ``name``."""
        if self._record.checkpoint.gguf is not None:
            return self._of_gguf(name)
        module, leaf = self._places[name]
        if self._last[0] != module:
            self._last = (module, self._parts(module))
        return self._last[1][leaf]

    def _parts(self, name: str) -> dict[str, memoryview]:
        checkpoint = self._record.checkpoint
        module = checkpoint.modules[name]
        found: dict[str, memoryview] = {}
        storage = self._record.storages.get(name)
        if storage is not None:
            shape = checkpoint.scheme(name).shape
            tensor = self._reader.codes(name, 0, prod(shape[:-1]))
            assert tensor is not None
            found.update(written(module.match.format, storage, tensor, shape, module.parts))
        for leaf, raw in module.parts.items():
            if leaf not in found and (storage is None or leaf == "bias"):
                found[leaf] = _floats(self._reader.floats(name, leaf, None, None), raw.dtype, raw.name)
        return found

    def _of_gguf(self, name: str) -> memoryview:
        from qformats.formats.ggml import write
        from qformats.tensor import QuantizedTensor

        tensor, raw = self._maps.get(name), self._record.checkpoint.raw[name]
        if tensor is None:
            raise Unsupported("gguf-tensor", "the model has nothing that this tensor is made of", tensor=name)
        if tensor.constant is not None:
            return _floats(torch.from_numpy(tensor.constant), raw.dtype, name)
        rows = assemble.read_rows(tensor, self._reader, 0, tensor.rows)
        if not isinstance(rows, QuantizedTensor):
            return _floats(tensor.alter(rows), raw.dtype, name)
        storage = self._record.storages[name.rpartition(".")[0]]
        (piece, *_) = write(storage, rows, 0, raw.shape)
        return _bytes(piece.array)


def written(
    kind: str, storage: Storage, tensor: QuantizedTensor, shape: tuple[int, ...], stored: Mapping[str, RawTensor]
) -> dict[str, memoryview]:
    """The bytes of a whole weight's parts by leaf, as the format ``kind`` writes them. ``stored``: how large those of the source are."""
    form = registry.format_module(kind)
    sizes = {leaf: raw.nbytes for leaf, raw in stored.items()}
    return _joined(form.write(storage, _as_stored(tensor, storage, form), 0, shape), form.layout(storage, shape), sizes)


def _as_stored(tensor: QuantizedTensor, storage: Storage, form: Any) -> QuantizedTensor:
    """The rows as their format writes them: tiles that several rows share are taken apart where experts of fewer rows are stacked."""
    if form.can_store(storage, tensor.scheme):
        return tensor
    return finish(tensor, fit(tensor, storage, own=partial(form.can_store, storage)))


def _joined(pieces: list[Piece], layout: Any, sizes: dict[str, int]) -> dict[str, memoryview]:
    """The pieces of a whole weight as its parts."""
    import numpy as np

    found: dict[str, memoryview] = {}
    by_leaf: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_leaf.setdefault(piece.leaf, []).append(piece)
    for leaf, group in by_leaf.items():
        if len(group) == 1 and group[0].array.nbytes == sizes.get(leaf):
            found[leaf] = _bytes(group[0].array)
            continue
        shape = layout[leaf].shape
        rows = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
        whole = np.zeros((rows, shape[-1] if shape else 1), group[0].array.dtype)
        for piece in group:
            array = piece.array.reshape(len(piece.array), -1) if piece.array.ndim else piece.array.reshape(1, 1)
            whole[piece.row : piece.row + len(array), piece.column : piece.column + array.shape[1]] = array
        found[leaf] = _bytes(whole)
    return found


def _bytes(array: np.ndarray[Any, Any]) -> memoryview:
    import numpy as np

    return memoryview(np.ascontiguousarray(array).reshape(-1).view("u1").data)


def _floats(values: Tensor, dtype: str, name: str) -> memoryview:
    return _bytes(write_float(values.reshape(1, -1), dtype, name=name))


class _ModelReader:
    """A model's modules under the checkpoint's names, for ``assemble.read_rows``."""

    def __init__(self, model: Any, record: Record) -> None:
        self._record = record
        self._model = model
        self._state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._state.update(model.named_buffers(remove_duplicate=False))

    def codes(self, module: str, start: int, stop: int, *, codes: bool = True) -> QuantizedTensor | None:
        origin = self._record.packed.get(f"{module}.weight")
        if origin is None:
            return None
        held = self._model.get_submodule(origin.module)
        assert isinstance(held, Packed)
        with present(held):
            return held.rows(origin.start + start, origin.start + stop)

    def value(self, name: str) -> Tensor:
        """The model's own of a stored tensor of floats."""
        own = self._record.renamed.get(name, name)
        value = self._state[own].detach()
        if value.is_meta:  # offloaded
            module, _, leaf = own.rpartition(".")
            with present(self._model.get_submodule(module)):
                value = getattr(self._model.get_submodule(module), leaf).detach()
        return value.cpu()

    def floats(self, module: str, leaf: str, start: int | None, stop: int | None) -> Tensor:
        value = self.value(f"{module}.{leaf}" if module else leaf)
        if start is None:
            return value
        return value.reshape(-1, value.shape[-1])[start:stop]

    def shape(self, module: str, leaf: str) -> tuple[int, ...]:
        return tuple(self.floats(module, leaf, None, None).shape)
