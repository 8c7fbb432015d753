"""A model on packed weights written back as the checkpoint it came from: the same files, the same bytes where nothing was changed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qformats import assemble, registry
from qformats.containers.atomic import OutputDirectory, OutputFile
from qformats.containers.raw import RawTensor
from qformats.containers.safetensors import METADATA_KEY, layout_safetensors, tensor_nbytes
from qformats.containers.source import FileSource, MemorySource
from qformats.errors import Unsupported, WouldLose
from qformats.formats.dense import FLOAT_DTYPES, read_float, write_float
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
    tensors.check_kept()
    files = [_resized(file, tensors.resized) for file in record.files]
    if record.checkpoint.gguf is not None and len(files) == 1:
        (file,) = files
        with OutputFile(final, file.size, overwrite) as out:
            _write(file, tensors, out)
            _seal(record, {"": out})
            out.commit()
        return
    total = sum(file.size for file in files) + sum(map(len, record.small.values()))
    with OutputDirectory(final, total, overwrite) as directory:
        outs = {Path(file.name).name: directory.file(Path(file.name).name, file.size) for file in files}
        for file in files:
            _write(file, tensors, outs[Path(file.name).name])
        _seal(record, outs)
        for name, data in record.small.items():
            folder, _, last = name.rpartition("/")
            directory.write_bytes(last, data, folder=folder)
        directory.commit()


def _resized(file: FileRecord, shapes: Mapping[str, tuple[int, ...]]) -> FileRecord:
    """A file of safetensors with other shapes of some of its tensors."""
    if not shapes.keys() & file.tensors.keys():
        return file
    found = {name: (stored.dtype, shapes.get(name, stored.shape)) for name, stored in file.tensors.items()}
    metadata = json.loads(file.header[8:]).get(METADATA_KEY)
    layout = layout_safetensors([(name, *kind) for name, kind in found.items()], metadata)
    tensors = {
        name: replace(stored, shape=found[name][1], offset=layout.offsets[name], nbytes=tensor_nbytes(*found[name]))
        for name, stored in file.tensors.items()
    }
    order = sorted(tensors, key=lambda name: tensors[name].offset)
    return replace(file, header=layout.header, tensors={name: tensors[name] for name in order}, size=layout.size)


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
        held = [module for module in model.modules() if isinstance(module, Packed) and module.changed]
        self._changed = {part.name: part.storage for module in held for part in module.stretches if part.name in module.changed}
        self.resized = {} if gguf else dict(self._resized())

    def _resized(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Tensors of changed weights that have another shape than in the checkpoint, by their full names."""
        for name, storage in self._changed.items():
            module = self._record.checkpoint.modules[name]
            layout = registry.format_module(module.match.format).layout(storage, self._record.checkpoint.scheme(name).shape)
            for leaf, part in layout.items():
                raw = module.parts.get(leaf)
                if raw is not None and prod(part.shape) != prod(raw.shape):
                    yield raw.name, part.shape

    def _gguf_maps(self) -> Iterator[Any]:
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for tensor in self._record.checkpoint.binding.to_hf(self._record.checkpoint.shapes()).tensors:
            shapes.setdefault(tensor.target, {})[tensor.leaf] = tensor.shape
        yield from self._record.checkpoint.binding.to_gguf(shapes).tensors

    def check_kept(self) -> None:
        """``WouldLose('changed-weight')`` for floats that changed and stand for codes that no writer makes, whose bytes are kept."""
        stored = {name: one for file in self._record.files for name, one in file.tensors.items()}
        for name, writable in self._record.writable.items():
            if writable or f"{name}.weight" in self._record.packed or f"{name}.weight" not in self._record.renamed:
                continue
            now, module = self._reader.value(f"{name}.weight"), self._record.checkpoint.modules[name]
            kept = {leaf: (raw, stored[raw.name].kept) for leaf, raw in module.parts.items()}
            held = {leaf: (raw, MemorySource(data, raw.name)) for leaf, (raw, data) in kept.items() if data is not None}
            parts = {leaf: replace(raw, source=source, offset=0) for leaf, (raw, source) in held.items()}
            form = registry.format_module(module.match.format)
            before = form.read(replace(module, parts=parts, memo={})).dequantize(torch.float32)
            if not torch.equal(before.to(now.dtype).reshape(now.shape), now):
                hint = "call dequantize() on the model and save that"
                raise WouldLose("changed-weight", "it has changed, and its layout is read and never written", tensor=name, hint=hint)

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
        storage = self._changed.get(name, self._record.storages.get(name))
        if storage is not None:
            shape = checkpoint.scheme(name).shape
            tensor = self._reader.codes(name, 0, prod(shape[:-1]))
            assert tensor is not None
            found.update(written(module.match.format, storage, tensor, shape))
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
            if raw.dtype not in FLOAT_DTYPES:
                text = f"is {raw.dtype} in the file, and floats in the model, which has no packed module for weights that lie like this"
                hint = "convert the file itself, or call dequantize() and save floats"
                raise Unsupported("gguf-floats", text, tensor=name, hint=hint)
            return _floats(tensor.alter(rows), raw.dtype, name)
        storage = self._record.storages[name.rpartition(".")[0]]
        (piece, *_) = write(storage, rows, 0, raw.shape)
        return _bytes(piece.array)


def written(
    kind: str, storage: Storage, tensor: QuantizedTensor, shape: tuple[int, ...], sizes: Mapping[str, int] | None = None
) -> dict[str, memoryview]:
    """The bytes of a whole weight's parts by leaf, as the format ``kind`` writes them. ``sizes``: of parts that are blocks, in bytes."""
    form = registry.format_module(kind)
    layout = form.layout(storage, shape)
    if sizes is None:
        sizes = {leaf: tensor_nbytes(part.dtype, part.shape) for leaf, part in layout.items()}
    return _joined(form.write(storage, _as_stored(tensor, storage, form), 0, shape), layout, sizes)


def _as_stored(tensor: QuantizedTensor, storage: Storage, form: Any) -> QuantizedTensor:
    """The rows as their format writes them: tiles that several rows share are taken apart where experts of fewer rows are stacked."""
    if form.can_store(storage, tensor.scheme):
        return tensor
    return finish(tensor, fit(tensor, storage, own=partial(form.can_store, storage)))


def _joined(pieces: list[Piece], layout: Any, sizes: Mapping[str, int]) -> dict[str, memoryview]:
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


def plain_name(name: str) -> str:
    """A module's or a tensor's name without the layer that PEFT put around it."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def check_adapters(model: Any) -> None:
    """``WouldLose('adapter')`` where an adapter changes what the model computes and is not in its weights."""
    for name, module in model.named_modules():
        active = set(getattr(module, "active_adapters", ())) if not getattr(module, "disable_adapters", True) else set()
        if hasattr(module, "base_layer"):
            held = {key for leaf in module.adapter_layer_names for key in getattr(module, leaf, ())}
            lost = (active & held) - set(module.merged_adapters)
        else:
            lost = active if hasattr(module, "original_module") else set()
        if lost:
            hint = "merge it first (merge_and_unload, merge_adapter), or save it alone with the save_pretrained of the PeftModel"
            raise WouldLose("adapter", f"the adapter {min(lost)!r} is not in the weights", tensor=name, hint=hint)


class _ModelReader:
    """A model's modules under the checkpoint's names, for ``assemble.read_rows``."""

    def __init__(self, model: Any, record: Record) -> None:
        check_adapters(model)
        self._record = record
        self._modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
        state = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self._state: dict[str, Tensor] = {plain_name(name): value for name, value in state}

    def codes(self, module: str, start: int, stop: int, *, codes: bool = True) -> QuantizedTensor | None:
        origin = self._record.packed.get(f"{module}.weight")
        if origin is None:
            return None
        held = self._modules[origin.module]
        assert isinstance(held, Packed)
        with present(held):
            return held.rows(origin.start + start, origin.start + stop)

    def value(self, name: str) -> Tensor:
        """The model's own of a stored tensor of floats."""
        own = self._record.renamed.get(name, name)
        value = self._state[own].detach()
        if value.is_meta:  # offloaded
            module, _, leaf = own.rpartition(".")
            with present(self._modules[module]):
                value = getattr(self._modules[module], leaf).detach()
        return value.cpu()

    def floats(self, module: str, leaf: str, start: int | None, stop: int | None) -> Tensor:
        value = self.value(f"{module}.{leaf}" if module else leaf)
        if start is None:
            return value
        return value.reshape(-1, value.shape[-1])[start:stop]

    def shape(self, module: str, leaf: str) -> tuple[int, ...]:
        return tuple(self.floats(module, leaf, None, None).shape)
