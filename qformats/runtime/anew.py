"""New codes for packed modules: floats rounded by the quantizers into the very types that the checkpoint has, weight by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qformats import registry
from qformats.errors import Unsupported
from qformats.kernels.lower import Lowered, lower, raised
from qformats.quantize import can_quantize, needs_importance, rtn
from qformats.rewrite import Refused, concatenate_rows
from qformats.scheme import No

if TYPE_CHECKING:
    from qformats.runtime.record import Origin
    from qformats.runtime.supply import Supply
    from qformats.scheme import Storage
    from qformats.tensor import QuantizedTensor

__all__ = ["Kept", "Stretch", "check", "requantized", "stretches"]

_WAY = "merge into floats: call dequantize() on the model before the adapter is attached, or convert with --lora to another type"


@dataclass(frozen=True)
class Stretch:
    """Rows ``start:stop`` of a packed module, which the checkpoint holds as ``storage``, that of new codes.

    ``name``: the stored module, of ``format``. ``whole``: it has no other rows. ``writable``: its format writes this layout.
    """

    name: str
    format: str
    start: int
    stop: int
    storage: Storage
    whole: bool
    writable: bool


@dataclass(frozen=True)
class Kept:
    """What a packed module held: its segments, and the stored modules whose codes were no longer the checkpoint's."""

    segments: tuple[Lowered, ...]
    changed: frozenset[str]


def stretches(
    supply: Supply, packed: Mapping[str, Origin], storages: Mapping[str, Storage], writable: Mapping[str, bool]
) -> dict[str, tuple[Stretch, ...]]:
    """Of every packed module, in the order of its rows. ``packed``: by the model's own names; the others by stored modules."""
    found: dict[str, list[Stretch]] = {}
    shapes = supply.checkpoint.shapes()
    for name, origin in packed.items():
        at = origin.start
        for source in supply.tensors[name].sources:
            rows = source.stop - source.start
            whole = rows == prod(shapes[source.module][source.leaf][:-1])
            form = supply.checkpoint.modules[source.module].match.format
            storage = _renewed(form, storages[source.module])
            made = Stretch(source.module, form, at, at + rows, storage, whole, writable[source.module])
            found.setdefault(origin.module, []).append(made)
            at += rows
    return {module: tuple(sorted(parts, key=lambda part: part.start)) for module, parts in found.items()}


def _renewed(form: str, storage: Storage) -> Storage:
    hook = getattr(registry.format_module(form), "renewed", None)
    return storage if hook is None else hook(storage)  # type: ignore[no-any-return]


def check(stretch: Stretch, layout_shape: Sequence[int]) -> None:
    """``Unsupported('requantize')`` for weights that cannot be made of floats again in their own type."""
    storage = stretch.storage
    by_row = storage.rows == 1 and not (storage.flat or storage.cyclic or storage.whole or storage.together)
    if not can_quantize(storage):
        why = f"codes of {storage.type} cannot be made of floats: its codebook was learned from the weights it was made of"
    elif needs_importance(storage):
        why = f"codes of {storage.type} cannot be made without importances"
    elif not stretch.writable:
        why = f"its layout of {storage.type} is read and never written"
    elif not by_row and (not stretch.whole or len(layout_shape) > 2):
        why = f"it is a part of a weight of {storage.type}, whose scales serve all of it"
    else:
        return
    raise Unsupported("requantize", why, tensor=stretch.name, hint=_WAY)


def requantized(old: Lowered, first: int, floats: Tensor, parts: Sequence[Stretch]) -> tuple[list[Lowered], set[str]]:
    """The segment ``old``, whose first row is row ``first`` of its module, with codes for ``floats`` (rows, K): one segment or more.

    Beside them the names of the stored modules that have new codes. Each of ``parts`` is rounded by itself; one whose floats are its own
    dequantized values keeps its codes.
    """
    device = old.planes["codes0"].device
    here = Lowered(old.layout, {name: plane.cpu() for name, plane in old.planes.items()})
    tensors, changed = [], set()
    for part in parts:
        rows = slice(part.start - first, part.stop - first)
        wanted = floats[rows].detach().float().cpu()
        all_of_it = len(parts) == 1 and len(old.layout.shape) == 2
        held = raised(here) if all_of_it else here.tensor(rows)
        if not torch.equal(wanted, held.dequantize(torch.float32)):
            check(part, old.layout.shape)
            held = _rounded(wanted, held, part)
            if isinstance(answer := registry.format_module(part.format).can_store(part.storage, held.scheme), No):
                why = f"new codes of {part.storage.type} do not fit what is stored: {answer.reason}"
                raise Unsupported("requantize", why, tensor=part.name, hint=_WAY)
            changed.add(part.name)
        tensors.append(held)
    with suppress(Refused):
        tensors = [concatenate_rows(tensors)]
    made = [lower(tensor) for tensor in tensors]
    return [Lowered(one.layout, {name: plane.to(device) for name, plane in one.planes.items()}) for one in made], changed


def _rounded(wanted: Tensor, held: QuantizedTensor, part: Stretch) -> QuantizedTensor:
    """New codes; columns under an act-order index stay in the groups they are in."""
    index = held.group_index
    if index is None or not part.storage.group_index:
        return rtn(wanted, part.storage)
    order = torch.argsort(index.to(torch.int64), stable=True)
    size = part.storage.group or wanted.shape[-1]
    if not torch.equal(index.to(torch.int64)[order], torch.arange(len(order)) // size):
        raise Unsupported("requantize", "the groups of its act-order index are not of one size", tensor=part.name, hint=_WAY)
    made = rtn(wanted[:, order].contiguous(), part.storage)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return made.replace(codes=made.codes.index_select(-1, back), group_index=index)
