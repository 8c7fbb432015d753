"""From a checkpoint's names to the target's: through its architecture when the container changes, else name by name."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from converters.activations import moved
from qformats import registry
from qformats.architectures.mapping import Mapped, SourceRows, TensorMap
from qformats.architectures.stacks import Stacks
from qformats.checkpoint import Checkpoint
from qformats.errors import QFormatError, Unsupported

if TYPE_CHECKING:
    from qformats.architectures import Binding

__all__ = ["map_tensors"]


def map_tensors(
    checkpoint: Checkpoint, target: str, stacks: Callable[[TensorMap], bool] | None = None, apart: Container[str] = ()
) -> Mapped:
    """All tensors of the format ``target`` with their source rows; what is no weight goes where the target has a place for it.

    ``stacks``: of which stacks of experts with outputs as rows the target holds the codes in one tensor (none, where it is absent).
    ``apart``: modules of single experts that a stack is taken apart into.
    """
    mapped = _map_weights(checkpoint, target)
    if (stacks is not None or apart) and (binding := _binding(checkpoint)) is not None:
        tensors = mapped.tensors if stacks is None else Stacks(binding).gather(mapped.tensors, stacks)
        mapped = replace(mapped, tensors=Stacks(binding).spread(tensors, apart))
    written: frozenset[str] = getattr(registry.format_module(target), "WRITTEN", frozenset())
    kept, dropped = [], dict(mapped.dropped)
    for (module, leaf), what in checkpoint.extras.items():
        raw = checkpoint.modules[module].parts[leaf]
        own = leaf in written and checkpoint.is_quantized(module)
        if own and checkpoint.format == target:
            continue  # among the parts of the weight
        if not own and checkpoint.format == target:
            source = SourceRows(module, leaf, 0, raw.rows)
            kept.append(TensorMap(module, leaf, raw.shape, (source,), kind="extra"))
        elif not own and (there := moved(checkpoint, target, module, leaf)) is not None:
            kept.append(there)
        else:
            dropped[raw.name] = f"{what}, which {target} has no place for"
    return Mapped((*mapped.tensors, *kept), dropped)


def _map_weights(checkpoint: Checkpoint, target: str) -> Mapped:
    packs, container = _packs_experts(target), registry.row(target).container
    if checkpoint.gguf is None and container == "gguf":
        return checkpoint.binding.to_gguf(checkpoint.shapes(), checkpoint.by_outputs)
    if checkpoint.gguf is not None and container != "gguf":
        mapped = checkpoint.binding.to_hf(checkpoint.shapes(), packed=packs)
        mapped = Mapped(tuple(_from_gguf(tensor, target) for tensor in mapped.tensors), mapped.dropped)
    elif checkpoint.gguf is None:
        mapped = Mapped(tuple(_in_place(checkpoint, tensor, target) for tensor in _same_names(checkpoint)))
    else:
        mapped = Mapped(_same_names(checkpoint))
    return _checked_experts(mapped, checkpoint, target) if packs else mapped


def _packs_experts(name: str) -> bool:
    return bool(getattr(registry.format_module(name), "PACKED_EXPERTS", False))


# ---------------------------------------------------------------- inputs as rows


def _from_gguf(tensor: TensorMap, target: str) -> TensorMap:
    """A matrix of transformers' ``Conv1D`` as the target has it: floats with inputs as rows, codes with outputs."""
    if tensor.kind != "conv1d" or target == "hf" or _packs_experts(target):
        return tensor
    _check_conv1d(target, tensor.target)
    (source,) = tensor.sources
    assert source.transposed is not None
    whole = SourceRows(source.module, source.leaf, *source.transposed)
    return TensorMap(tensor.target, tensor.leaf, tensor.shape[::-1], (whole,), floats=tensor)


def _check_conv1d(target: str, module: str) -> None:
    if not getattr(registry.format_module(target), "CONV1D", False):
        able = [row.name for row in registry.ROWS if getattr(registry.format_module(row.name), "CONV1D", False)]
        text = f"is a Conv1D of transformers, which {target} does not quantize"
        raise Unsupported("conv1d", text, tensor=module, hint=f"formats that do: {', '.join((*able, 'gguf', 'hf'))}")


def _in_place(checkpoint: Checkpoint, tensor: TensorMap, target: str) -> TensorMap:
    """A tensor of an HF checkpoint as ``target`` has it: floats and codes of one weight may differ in name and axes."""
    module, coded = tensor.target, checkpoint.is_quantized(tensor.target)
    if coded and tensor.leaf == "weight" and checkpoint.is_bare(module):
        floats = _bare_floats(checkpoint, tensor)
        return replace(tensor, floats=floats) if _holds(checkpoint, tensor, target) else floats
    if not coded and len(tensor.shape) == 3 and _packs_experts(target) and _inputs_as_rows(checkpoint, module, tensor.leaf):
        sources = _turned(module, tensor.leaf, tensor.shape)
        return TensorMap(f"{module}.{tensor.leaf}", "weight", _swapped(tensor.shape), sources, kind="experts", floats=tensor)
    if tensor.leaf != "weight" or len(tensor.shape) != 2 or _packs_experts(target) or not _inputs_as_rows(checkpoint, module):
        return tensor
    coded = module in checkpoint.by_outputs
    turned = TensorMap(module, "weight", tensor.shape[::-1], _turned(module, "weight", tensor.shape))
    floats = replace(turned if coded else tensor, kind="conv1d")
    if target == "hf":
        return floats
    if target != checkpoint.format:
        _check_conv1d(target, module)
    return replace(tensor if coded else turned, kind="linear", floats=floats)


def _holds(checkpoint: Checkpoint, tensor: TensorMap, target: str) -> bool:
    """Whether ``target`` has a place for a stack of codes under the names of the source."""
    return checkpoint.format == target or (_packs_experts(target) and not _keeps_axes(checkpoint))  # see _checked_experts


def _keeps_axes(checkpoint: Checkpoint) -> bool:
    return bool(getattr(registry.format_module(checkpoint.format), "KEEPS_AXES", False))


def _bare_floats(checkpoint: Checkpoint, tensor: TensorMap) -> TensorMap:
    """Codes (E, N, K) under the name that their floats have, with inputs as rows where these do."""
    module, _, leaf = tensor.target.rpartition(".")
    turned = not _keeps_axes(checkpoint) and (_packs_experts(checkpoint.format) or _inputs_as_rows(checkpoint, module, leaf))
    if not turned:
        return replace(tensor, target=module, leaf=leaf, kind="experts")
    sources = _turned(tensor.target, "weight", tensor.shape)
    return TensorMap(module, leaf, _swapped(tensor.shape), sources, kind="experts")


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return *shape[:-2], shape[-1], shape[-2]


def _turned(module: str, leaf: str, shape: tuple[int, ...]) -> tuple[SourceRows, ...]:
    """The columns of each matrix of the stored ``shape`` as rows."""
    rows, columns = shape[-2:]
    starts = range(0, prod(shape[:-1]), rows)
    return tuple(SourceRows(module, leaf, 0, columns, transposed=(start, start + rows)) for start in starts)


def _inputs_as_rows(checkpoint: Checkpoint, module: str, leaf: str = "weight") -> bool:
    binding = _binding(checkpoint)
    return binding is not None and binding.inputs_as_rows(module, leaf)


def _binding(checkpoint: Checkpoint) -> Binding | None:
    """The checkpoint's architecture, None where it is not known."""
    try:
        return checkpoint.binding
    except QFormatError:
        return None


# ---------------------------------------------------------------- stacked experts


def _checked_experts(mapped: Mapped, checkpoint: Checkpoint, target: str) -> Mapped:
    """``Unsupported('experts')`` unless the model has stacked experts in the target's arrangement."""
    binding = _binding(checkpoint)
    if checkpoint.format != target and (binding is None or not binding.packs_experts):
        name = "an unknown model" if binding is None else binding.architecture.name
        hint = "compressed-tensors, modelopt and fp8 hold such codes of other models"
        raise Unsupported("experts", f"{target} holds the stacked experts of gpt-oss; this is {name}", hint=hint)
    if not any(t.kind == "experts" and t.leaf == "weight" and len(t.shape) == 3 for t in mapped.tensors):
        found = next((t.name for t in mapped.tensors if t.kind == "experts"), None)
        text = f"{target} holds experts stacked in one tensor with outputs as rows; this model has none"
        raise Unsupported("experts", text, tensor=found)
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
        mapped = binding.to_hf(shapes) if checkpoint.gguf is not None else binding.to_gguf(shapes, checkpoint.by_outputs)
    except QFormatError as error:
        module = str(error.tensor or "").rpartition(".")[0]
        if error.code == "tensor-shape" and checkpoint.gguf is None and module in checkpoint.modules and checkpoint.is_quantized(module):
            raise  # planes may say any shape; the architecture knows which one it is
        return {}
    return {(s.module, s.leaf): "linear" if t.kind == "conv1d" else t.kind for t in mapped.tensors for s in t.sources}


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


