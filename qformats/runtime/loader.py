"""``load_model``: any checkpoint as a transformers model whose linears, experts and embeddings keep their packed weights.

Weights are read, lowered and released tensor by tensor, several at a time; no dequantized copy of the model exists. What the checkpoint
stores as floats becomes parameters of ``dtype``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformats.architectures.mapping import TensorMap
from qformats.checkpoint import Checkpoint, fetched, open_checkpoint
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.runtime import skeleton
from qformats.runtime.devices import check_memory, checked, dispatched
from qformats.runtime.model import packed_class
from qformats.runtime.quantizing import quantized
from qformats.runtime.record import Origin, Record
from qformats.runtime.state import attach
from qformats.runtime.streaming import give_back, lowered_by_rows
from qformats.runtime.supply import Supply

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qformats.kernels.lower import Lowered

__all__ = ["Place", "build", "in_order", "load_model", "lowered", "origins", "packed_module", "places", "remember"]


def load_model(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    compute: str = "exact",
    activations: str = "published",
    allow_pickle: bool = False,
    quantize: str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    per_module: Mapping[str, str] | None = None,
    imatrix: str | Path | None = None,
    allow_requantize: bool = False,
) -> Any:
    """The model at ``path`` (a directory, a .safetensors or a .gguf file) as transformers' own class, ready to generate.

    ``dtype``: of the activations and of what is stored as floats; None takes the checkpoint's own, float32 where it names none.
    ``device_map``: instead of one device ``"auto"`` or devices by module names, as of transformers; ``offload_folder`` takes what goes to
    ``"disk"``.
    ``compute``: ``"exact"``: weights exactly, products in float32; ``"int8"``: inputs rounded to bytes too, faster and never a default.
    ``activations``: ``"published"`` rounds the inputs of linear layers where the checkpoint's format does, as its owner does; ``"float"``
    runs the weights alone. Scales of a key-value cache are kept for saving; the cache itself holds floats.
    ``quantize``: a target such as ``"hqq:int4,group=64"`` or ``"gguf:q4_k_m"``; the floats are rounded as they are read, and the model
    saves as the checkpoint that ``qconvert quantize`` makes. What follows it belongs to it, see ``qformats.runtime.quantizing``.

    Raises ``BadFile`` and ``Unsupported`` before any weight is read where the architecture or a type is not supported.
    """
    from qformats.kernels.dispatch import COMPUTE
    from qformats.runtime.inputs import ACTIVATIONS

    if compute not in COMPUTE:
        raise UsageError("compute", f"compute is {compute!r}", hint=f"one of {', '.join(COMPUTE)}")
    if activations not in ACTIVATIONS:
        raise UsageError("activations", f"activations is {activations!r}", hint=f"one of {', '.join(ACTIVATIONS)}")
    if device is not None and device_map is not None:
        raise UsageError("device-map", "device and device_map are both given", hint="device_map says where every module goes")
    where = checked(device)
    how = {"modules_to_not_convert": modules_to_not_convert, "per_module": per_module, "imatrix": imatrix}
    if quantize is None and (any(value is not None for value in how.values()) or allow_requantize):
        raise UsageError("quantize-missing", "options of quantize= are given, and no target", hint="such as quantize='gguf:q4_k_m'")
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(fetched(path), allow_pickle))
        if quantize is not None:
            skeleton.config_of(checkpoint)  # a model that cannot run is refused before its weights are rounded
            checkpoint = stack.enter_context(quantized(checkpoint, quantize, **how, allow_requantize=allow_requantize))  # type: ignore[arg-type]
        if device_map is None and quantize is None:
            check_memory(checkpoint, where)
        put = None if device_map is None else partial(dispatched, device_map=device_map, offload_folder=offload_folder)
        model = build(checkpoint, dtype, compute, activations, put)
    return model if where is None else model.to(where)


def build(
    checkpoint: Checkpoint, dtype: torch.dtype | None, compute: str, activations: str = "published", put: Callable[[Any], Any] | None = None
) -> Any:
    """The model of an opened checkpoint on the CPU, or where ``put`` puts its modules."""
    import torch

    from qformats.runtime.inputs import check

    config = skeleton.config_of(checkpoint)
    wanted = dtype or _dtype_of(config) or torch.float32
    model = skeleton.empty_model(config, wanted)
    supply = _with_stacks(model, Supply.of(checkpoint, skeleton.rename(model)))
    if activations == "published":
        check(checkpoint)
    with torch.inference_mode(False), torch.no_grad():
        packed, rounded = _fill(model, supply, wanted, compute)
        skeleton.finish(model, checkpoint)
        model = model if put is None else put(model)
    remember(model, supply, packed, rounded, activations)
    return model


def remember(model: Any, supply: Supply, packed: dict[str, Origin], rounded: set[str], activations: str) -> None:
    """Make a filled ``model`` one that saves as its checkpoint. ``rounded``: tensors whose stored values its dtype does not hold."""
    from torch import nn

    from qformats.runtime.anew import stretches
    from qformats.runtime.inputs import rules
    from qformats.runtime.linear import TiedHead

    held = {*packed, *(name for name, _ in (*model.named_parameters(), *model.named_buffers()))}
    model.__class__ = packed_class(type(model))  # type: ignore[arg-type]
    model.qformats_record = record = Record.of(supply, packed, held, rounded)
    attach(model)
    for name, parts in stretches(supply, packed, record.storages, record.writable).items():
        module = model.get_submodule(name)
        module.stretches = parts
        if activations == "published" and not isinstance(module, nn.Embedding):
            checkpoint = supply.checkpoint
            module.input_rules, module.output_rules = rules(checkpoint, parts), rules(checkpoint, parts, "outputs")
    for head in (module for module in model.modules() if isinstance(module, TiedHead)):
        head.__dict__["_embedding"].shared = True
    give_back()


def _dtype_of(config: Any) -> torch.dtype | None:
    import torch

    found = getattr(config, "dtype", None) or getattr(getattr(config, "text_config", None), "dtype", None)
    return getattr(torch, found) if isinstance(found, str) else found


# ---------------------------------------------------------------- what goes where


@dataclass(frozen=True)
class Place:
    """A module of the model that takes packed weights (``names``: for each stack its tensors)."""

    module: str
    kind: str
    names: tuple[tuple[str, ...], ...]


def _fill(model: Any, supply: Supply, dtype: torch.dtype, compute: str) -> tuple[dict[str, Origin], set[str]]:
    """Put every tensor in its place; where packed ones went, and which floats the model's dtype does not hold."""
    taken = list(places(model, supply))
    _check(model, supply, taken)
    filled = {place.module for place in taken}
    ties = _tied_names(model)
    floats = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in filled and name in supply.tensors]
    buffers = [name for name, _ in model.named_buffers() if name in supply.tensors]
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        made = in_order(pool, taken, lambda place: lowered(supply, place), workers)
        for place, segments in zip(taken, made, strict=True):
            old = model.get_submodule(place.module)
            model.set_submodule(place.module, packed_module(old, supply, place, segments, dtype, compute))
        values = in_order(pool, [*floats, *buffers], supply.floats, workers)
        rounded = {name for name, value in zip([*floats, *buffers], values, strict=True) if not _put_floats(model, name, value, dtype)}
    _tie(model, ties)
    return {name: origin for place in taken for name, origin in origins(supply, place)}, rounded


def origins(supply: Supply, place: Place) -> Iterator[tuple[str, Origin]]:
    """Where the tensors of a place are in the model."""
    leaves = ("",) if place.kind != "experts" else _leaves(len(place.names))
    for leaf, stack in zip(leaves, place.names, strict=True):
        at = 0
        for name in stack:
            yield name, Origin(f"{place.module}.{leaf}" if leaf else place.module, at)
            at += supply.tensors[name].rows


def _leaves(stacks: int) -> tuple[str, ...]:
    """What the stacks of experts are called."""
    return ("gate_up_proj", "down_proj") if stacks == 2 else ("gate_proj", "up_proj", "down_proj")


def in_order(pool: ThreadPoolExecutor, items: list[Any], make: Any, ahead: int) -> Iterator[Any]:
    """``make`` of every item in order, a few ahead of what is taken, so that memory stays small."""
    pending = [pool.submit(make, item) for item in items[: ahead + 1]]
    for number in range(len(items)):
        yield pending.pop(0).result()
        if number + ahead + 1 < len(items):
            pending.append(pool.submit(make, items[number + ahead + 1]))


def places(model: Any, supply: Supply) -> Iterator[Place]:
    """Every module whose weight the checkpoint has in codes."""
    from torch import nn

    experts = skeleton.expert_sources(model)
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if isinstance(module, nn.Linear | nn.Embedding) and weight in supply.tensors:
            if supply.is_packed(weight):
                yield Place(name, "embedding" if isinstance(module, nn.Embedding) else "linear", ((weight,),))
        elif type(module).__name__ == "Conv1D" and weight in supply.tensors and supply.is_packed(weight):
            yield Place(name, "conv1d", ((weight,),))
        elif hasattr(module, "down_proj") and not isinstance(module.down_proj, nn.Module):
            stacks = _stacks(name, module, supply, experts)
            if stacks and any(supply.is_packed(part) for stack in stacks for part in stack):
                yield Place(name, "experts", stacks)


def _stacks(name: str, module: Any, supply: Supply, experts: dict[str, tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """The tensors that the stacked parameters of ``module`` are made of, expert by expert; empty where the checkpoint has others."""
    found: list[tuple[str, ...]] = []
    for leaf in ("gate_up_proj", "up_proj", "down_proj"):
        if getattr(module, leaf, None) is None:
            continue
        full = f"{name}.{leaf}"
        own = next((full + end for end in ("", ".weight") if full + end in supply.tensors), None)
        if own is not None:
            found.append((own,))
            continue
        patterns = next((sources for target, sources in experts.items() if _ends(full, target)), ())
        for pattern in patterns:
            tail = pattern.rpartition("*")[2]
            parts = tuple(f"{name}.{e}{tail}" for e in range(_count(module)))
            if any(part not in supply.tensors for part in parts):
                return ()
            found.append(parts)
    return tuple(found)


def _with_stacks(model: Any, supply: Supply) -> Supply:
    """The supply with the stacked parameters of experts that the checkpoint has one by one and all in floats."""
    from torch import nn

    tensors, stored = dict(supply.tensors), dict(supply.stored)
    experts = skeleton.expert_sources(model)
    for name, module in model.named_modules():
        stacked = hasattr(module, "down_proj") and not isinstance(module.down_proj, nn.Module)
        stacks = _stacks(name, module, supply, experts) if stacked else ()
        single = [stack for stack in stacks if len(stack) > 1]
        if not single or any(supply.is_packed(part) for stack in stacks for part in stack):
            continue
        *first, down = stacks
        leaf = "gate_up_proj" if getattr(module, "gate_up_proj", None) is not None else "up_proj"
        for full, parts in ((f"{name}.{leaf}", first), (f"{name}.down_proj", [down])):
            made = [tensors.pop(part) for expert in zip(*parts, strict=True) for part in expert]
            shape = tuple(getattr(module, full.rpartition(".")[2]).shape)
            tensors[full] = TensorMap(name, full.rpartition(".")[2], shape, tuple(s for t in made for s in t.sources))
            stored[full] = full
    return replace(supply, tensors=tensors, stored=stored)


def _ends(name: str, pattern: str) -> bool:
    plain = pattern.replace("\\.", ".").rstrip("$").lstrip("^")
    return name.endswith(plain)


def _count(module: Any) -> int:
    return int(module.down_proj.shape[0])


def _check(model: Any, supply: Supply, taken: Iterable[Place]) -> None:
    """Refuse before any weight is read: tensors that nothing takes, parameters that nothing fills."""
    used = {name for place in taken for stack in place.names for name in stack}
    _check_alike(supply, taken)
    filled = {place.module for place in taken}
    own = dict(model.named_parameters())
    tied = set(_tied_names(model))
    path = supply.checkpoint.path
    for name, parameter in own.items():
        module = name.rpartition(".")[0]
        if name in used or module in filled or name in tied:
            continue
        if name not in supply.tensors:
            hint = "the checkpoint is incomplete, or its names are of another version of the model"
            raise BadFile("missing-tensor", "the checkpoint has no such tensor", path=path, tensor=name, hint=hint)
        if tuple(parameter.shape) != tuple(supply.tensors[name].shape):
            text = f"has shape {supply.tensors[name].shape}, the model's is {tuple(parameter.shape)}"
            raise BadFile("tensor-shape", text, path=path, tensor=supply.stored[name], hint="config and tensors disagree")
    known = {*own, *used, *(name for name, _ in model.named_buffers()), *tied}
    for name in supply.tensors:
        if name in known or name.rpartition(".")[0] in filled or _ignored(model, name) or name.endswith("rotary_emb.inv_freq"):
            continue
        if name.endswith(".bias") and any(name.startswith(f"{place}.") for place in filled):
            continue
        text = "transformers' model has no place for it"
        raise Unsupported("unknown-tensor", text, path=path, tensor=supply.stored[name], hint="another version of transformers may")


def _check_alike(supply: Supply, places: Iterable[Place]) -> None:
    """Experts of one layer are codes all together."""
    for place in places:
        loose = next((name for stack in place.names for name in stack if not supply.is_packed(name)), None)
        if loose is not None:
            text, hint = "is floats, and other experts of its layer are codes", "keep all experts of a layer as floats, or none"
            raise Unsupported("mixed-experts", text, path=supply.checkpoint.path, tensor=supply.stored[loose], hint=hint)


def _ignored(model: Any, name: str) -> bool:
    import re

    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


# ---------------------------------------------------------------- filling


def lowered(supply: Supply, place: Place) -> list[list[Lowered]]:
    """The planes of every stack of a place, by segments."""
    from qformats.kernels.lower import lower
    from qformats.rewrite import Refused, concatenate_rows

    found = []
    for stack in place.names:
        if len(stack) == 1 and (whole := lowered_by_rows(supply, stack[0])) is not None:
            found.append([whole])
            continue
        tensors = [segment for name in stack for segment in supply.segments(name)]
        with suppress(Refused):
            tensors = [concatenate_rows(tensors)]
        found.append([lower(t) for t in tensors])
    return found


def packed_module(old: Any, supply: Supply, place: Place, made: list[list[Lowered]], dtype: torch.dtype, compute: str) -> nn.Module:
    """The module that stands for ``old``, the model's own, on the CPU."""
    from qformats.runtime.embedding import QuantEmbedding
    from qformats.runtime.linear import QuantLinear

    bias = f"{place.module}.bias"
    values = supply.floats(bias).to(dtype) if bias in supply.tensors else None
    if place.kind == "experts":
        return _experts(old, supply, place, made, dtype, compute)
    if place.kind == "embedding":
        return QuantEmbedding(made[0], old, dtype, compute)
    return QuantLinear(made[0], values, dtype, compute)


def _experts(old: Any, supply: Supply, place: Place, made: list[list[Lowered]], dtype: torch.dtype, compute: str) -> nn.Module:
    from qformats.runtime.experts import ExpertStack, QuantExperts

    count = _count(old)
    stacks = [ExpertStack(segments, count, dtype, compute) for segments in made]
    *first, down = stacks
    names = _leaves(len(stacks))[:-1]
    biases = {}
    for leaf in ("gate_up_proj_bias", "down_proj_bias"):
        full = f"{place.module}.{leaf}"
        biases[leaf] = supply.floats(full).to(dtype) if full in supply.tensors else None
    return QuantExperts(dict(zip(names, first, strict=True)), down, old, biases["gate_up_proj_bias"], biases["down_proj_bias"])


def _put_floats(model: Any, name: str, value: Tensor, dtype: torch.dtype) -> bool:
    """Put a parameter or a buffer in its place; whether the model's dtype holds it exactly."""
    from torch import nn

    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    old = module._parameters.get(leaf)
    if old is None:
        module._buffers[leaf] = made = value.to(module._buffers[leaf].dtype)
    else:
        made = value.to(old.dtype if old.dtype.is_floating_point else dtype)
        module._parameters[leaf] = nn.Parameter(made, requires_grad=False)
    return made.dtype == value.dtype or bool((made.to(value.dtype) == value).all())


def _tied_names(model: Any) -> dict[str, str]:
    """Parameters that are others: name → the one that it is."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return dict(tied) if isinstance(tied, dict) else {}


def _tie(model: Any, ties: dict[str, str]) -> None:
    """Heads of packed embeddings refer to them; transformers ties what is floats."""
    from qformats.runtime.linear import TiedHead
    from qformats.runtime.packed import Packed

    packed = False
    for name, source in ties.items():
        held = model.get_submodule(source.rpartition(".")[0])
        if isinstance(held, Packed) and name.endswith(".weight"):
            head = model.get_submodule(name.rpartition(".")[0])
            if isinstance(head, Packed):
                continue
            bias = getattr(head, "bias", None)
            model.set_submodule(name.rpartition(".")[0], TiedHead(held, None if bias is None else bias.data))
            packed = True
    if packed:
        model.all_tied_weights_keys = {}
        model._tied_weights_keys = {}
