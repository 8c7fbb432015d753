"""From a checkpoint's names to the target's: through its architecture when the container changes, else name by name."""

from __future__ import annotations

from math import prod

from qformats.architectures.mapping import Mapped, SourceRows, TensorMap
from qformats.checkpoint import Checkpoint
from qformats.errors import QFormatError

__all__ = ["map_tensors"]


def map_tensors(checkpoint: Checkpoint, container: str) -> Mapped:
    """All target tensors of ``container`` (``"gguf"`` or ``"safetensors"``) with their source rows."""
    if checkpoint.container != container:
        binding, shapes = checkpoint.binding, checkpoint.shapes()
        return binding.to_gguf(shapes) if container == "gguf" else binding.to_hf(shapes)
    return Mapped(_same_names(checkpoint), {})


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
    """Kind of each source tensor as the architecture knows it; empty for architectures that are not known."""
    if not checkpoint.config and checkpoint.gguf is None:
        return {}
    try:
        binding, shapes = checkpoint.binding, checkpoint.shapes()
        mapped = binding.to_hf(shapes) if checkpoint.gguf is not None else binding.to_gguf(shapes)
    except QFormatError:
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


