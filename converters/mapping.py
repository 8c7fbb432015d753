"""From a checkpoint's names to the target's: through its architecture when the container changes, else name by name."""

from __future__ import annotations

from math import prod
from typing import Any

from qformats import registry
from qformats.architectures.mapping import Mapped, SourceRows, TensorMap
from qformats.checkpoint import Checkpoint
from qformats.errors import QFormatError, Unsupported

__all__ = ["map_tensors"]


def map_tensors(checkpoint: Checkpoint, target: str) -> Mapped:
    """All tensors of the format ``target`` with their source rows; what is no weight stays in a format that has the same leaf."""
    mapped = _map_weights(checkpoint, target)
    stays: frozenset[str] = getattr(registry.format_module(target), "EXTRAS", frozenset())
    written: frozenset[str] = getattr(registry.format_module(target), "WRITTEN", frozenset())
    kept, dropped = [], dict(mapped.dropped)
    for (module, leaf), what in checkpoint.extras.items():
        raw = checkpoint.modules[module].parts[leaf]
        own = leaf in written and checkpoint.is_quantized(module)
        if own and checkpoint.format == target:
            continue  # among the parts of the weight
        if not own and (checkpoint.format == target or leaf in stays):
            source = SourceRows(module, leaf, 0, raw.rows)
            kept.append(TensorMap(module, leaf, raw.shape, (source,), kind="extra"))
        else:
            dropped[raw.name] = f"{what}, which {target} has no place for"
    return Mapped((*mapped.tensors, *kept), dropped)


def _map_weights(checkpoint: Checkpoint, target: str) -> Mapped:
    packs, container = _packs_experts(target), registry.row(target).container
    if (checkpoint.gguf is None) == (container == "gguf"):
        binding, shapes = checkpoint.binding, checkpoint.shapes()
        if container == "gguf":
            return binding.to_gguf(shapes)
        mapped = binding.to_hf(shapes, packed=packs)
        return _checked_experts(mapped, checkpoint, target) if packs else mapped
    tensors = _same_names(checkpoint)
    if packs:
        return _checked_experts(Mapped(tensors), checkpoint, target)
    return Mapped(tuple(_unpacked(t) if _is_packed(checkpoint, t) else t for t in tensors), {})


def _packs_experts(name: str) -> bool:
    return bool(getattr(registry.format_module(name), "PACKED_EXPERTS", False))


def _is_packed(checkpoint: Checkpoint, tensor: TensorMap) -> bool:
    return _packs_experts(checkpoint.format) and checkpoint.is_quantized(tensor.target) and tensor.leaf == "weight"


def _unpacked(tensor: TensorMap) -> TensorMap:
    """A stacked weight of codes (E, N, K) under the name and in the shape its floats have: (E, K, N), no leaf of its own."""
    experts, rows, columns = tensor.shape
    module, _, leaf = tensor.target.rpartition(".")
    slices = [(expert * rows, (expert + 1) * rows) for expert in range(experts)]
    pieces = tuple(SourceRows(tensor.target, "weight", 0, columns, transposed=rows_of) for rows_of in slices)
    return TensorMap(module, leaf, (experts, columns, rows), pieces, kind="experts")


def _checked_experts(mapped: Mapped, checkpoint: Checkpoint, target: str) -> Mapped:
    """``Unsupported('experts')`` unless there are stacked experts and all of them are codes that the format keeps as they are."""
    experts = [t for t in mapped.tensors if t.kind == "experts" and t.leaf == "weight"]
    form: Any = registry.format_module(target)
    for tensor in experts:
        for source in tensor.sources:
            if not checkpoint.is_quantized(source.module) or not form.can_store(None, checkpoint.scheme(source.module)):
                raise Unsupported("experts", f"{target} keeps experts that are {target} blocks already", tensor=source.module)
    if not experts:
        raise Unsupported("experts", f"{target} holds stacked experts; this model has none")
    return mapped


def _same_names(checkpoint: Checkpoint) -> tuple[TensorMap, ...]:
    kinds = _kinds(checkpoint)
    tensors = []
    for module, leaves in checkpoint.shapes().items():
        for leaf, shape in leaves.items():
            rows = prod(shape[:-1]) if len(shape) > 1 else (shape[0] if shape else 1)
            kind = kinds.get((module, leaf)) or _guess(module, leaf, shape, checkpoint)
            source = SourceRows(module, leaf, 0, rows)
            tensors.append(TensorMap(module, leaf, shape, (source,), kind=kind))
    return tuple(tensors)


def _kinds(checkpoint: Checkpoint) -> dict[tuple[str, str], str]:
    """Kind of each source tensor as the architecture knows it; empty for architectures that are not known.

    ``BadFile('tensor-shape')`` for a weight in codes whose shape is another than the architecture's.
    """
    if not checkpoint.config and checkpoint.gguf is None:
        return {}
    try:
        binding, shapes = checkpoint.binding, checkpoint.shapes()
        mapped = binding.to_hf(shapes) if checkpoint.gguf is not None else binding.to_gguf(shapes)
    except QFormatError as error:
        module = str(error.tensor or "").rpartition(".")[0]
        if error.code == "tensor-shape" and checkpoint.gguf is None and module in checkpoint.modules and checkpoint.is_quantized(module):
            raise  # planes may say any shape; the architecture knows which one it is
        return {}
    return {(s.module, s.leaf): t.kind for t in mapped.tensors for s in t.sources}


def _guess(module: str, leaf: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> str:
    """A tensor's kind from its name, where no architecture file knows it."""
    last = module.rpartition(".")[2]
    if leaf != "weight" or len(shape) < 2:
        return "bias" if leaf == "bias" else "norm"
    if "embed" in last or last in ("wte", "wpe", "token_embd"):
        return "embedding"
    if last in ("lm_head", "output"):
        return "output"
    if last in ("gate", "router", "ffn_gate_inp"):
        return "router"
    return "linear"


def linear_modules(checkpoint: Checkpoint) -> list[str]:
    """Modules that hold a two-dimensional linear weight, by the architecture or by name."""
    kinds = _kinds(checkpoint)
    found = []
    for module, leaves in checkpoint.shapes().items():
        shape = leaves.get("weight")
        if shape is not None and len(shape) == 2:
            kind = kinds.get((module, "weight")) or _guess(module, "weight", shape, checkpoint)
            if kind in ("linear", "experts", "router", "output"):
                found.append(module)
    return found


