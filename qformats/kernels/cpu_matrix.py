"""How a lowered weight is multiplied on the CPU's matrix unit (``qformats.loops.matrix``), and the product.

What the unit multiplies are bfloat16 numbers. Codes serve as they are where their values, less a zero point that all share, are such
numbers; every other weight is decoded to float32 and taken in three parts.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qformats.kernels.cpu_plan import Plan, values_of
from qformats.kernels.cpu_strips import strips_of
from qformats.kernels.lower import Lowered
from qformats.kernels.threads import share
from qformats.loops import find

__all__ = ["available", "multiply"]

Array = np.ndarray[Any, Any]

_LARGEST = 2.0**100  # of inputs in three parts: products with codes stay finite


@dataclass(frozen=True, eq=False)
class _Way:
    """What ``qformats.loops.matrix`` is told of a weight.

    ``strips``: whether columns lie as in strips.
    """

    widths: tuple[int, int, int]
    kind: int
    form: int
    each: int
    beside: int
    table: Array
    numbers: int
    zero: float

    @property
    def strips(self) -> bool:
        return self.form != 2


_WAYS: weakref.WeakKeyDictionary[Plan, _Way] = weakref.WeakKeyDictionary()


def available() -> bool:
    """Whether this CPU and process have the unit, and the loops can be compiled."""
    loops = find("amx")
    return loops is not None and bool(loops.available())


def _bf16(values: Tensor) -> bool:
    return bool(((values.to(torch.bfloat16).to(torch.float64) == values) | values.isnan()).all())


def _named(values: Tensor, parts: int) -> Array:
    """Up to 32 numbers as the bits of bfloat16 whose sums they are, uint16 (parts, 32)."""
    rest, found = torch.nn.functional.pad(values, (0, 32 - len(values))).to(torch.float32), []
    for _ in range(parts):
        upper = rest.view(torch.int32) & -65536
        found.append((upper >> 16).to(torch.int16).numpy().view(np.uint16))
        rest = rest - upper.view(torch.float32)
    return np.stack(found)


def _way(plan: Plan, lowered: Lowered) -> _Way:
    loops = find("rows")
    head, slots = plan.head, plan.slots
    roles = {int(row[loops.ROLE]) for row in slots}
    width, groups = plan.group, int(head[loops.GROUPS])
    fits = width in (16, 32, 64) or width % 128 == 0 or groups == 1
    values = values_of(plan) if plan.plain and fits and 1 not in roles else None
    zero, offset = float(plan.constants[2]), float(plan.constants[3])
    if values is not None and 2 not in roles and zero and _bf16(values - zero):
        values, taken = values - zero, zero
    else:
        taken = 0.0
    nothing = np.zeros(32, np.uint16)
    thirds = values is not None and len(values) <= 32 and bool((values.to(torch.float32).to(torch.float64) == values).all())
    if values is None or not (thirds or _bf16(values)):
        return _Way((0, 0, 0), 0, 2, 0, 0, nothing, 0, 0.0)
    beside = bool(roles & {2, 3}) or offset != 0 or (zero != 0 and not taken)
    each = (128 // width if width < 128 and groups > 1 else 1) if beside or groups > 1 else 0
    strips = strips_of(plan, lowered)
    if len(values) <= 32:
        form = 0 if _bf16(values) else 3
        return _Way(strips.widths, 0, form, each, int(beside), _named(values, 3 if form else 1), 0, 0.0)
    kind, numbers = (strips.kind, strips.table) if int(head[loops.KIND]) == loops.MANY else (int(head[loops.KIND]), 0)
    return _Way(strips.widths, kind, 1, each, int(beside), nothing, numbers, taken)


def _lined(shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
    """Zeros of four bytes each, on whole cache lines."""
    held = np.zeros(int(np.prod(shape)) + 16, dtype)
    first = -held.ctypes.data % 64 // 4
    return held[first : len(held) - 16 + first].reshape(shape)


def _sums(x: Array, each: int) -> Array:
    """The sums of the inputs (16 n, padded) of each group, (n, groups, 16) float32."""
    blocks, strips = len(x) // 16, x.shape[1] // 128
    return torch.from_numpy(x).view(blocks, 16, strips * each, 128 // each).sum(-1).transpose(1, 2).contiguous().numpy()


def multiply(x: Tensor, plan: Plan, lowered: Lowered, start: int, stop: int, *, narrow: bool, rounds: bool) -> Tensor | None:
    """``x`` (M, K) float32 times the transposed rows ``start:stop``, (M, stop - start) float32; None for inputs that are not served.

    ``narrow``: the inputs are bfloat16 numbers. ``rounds``: they are rounded to such; none is then further off than as a byte.
    """
    way = _WAYS.get(plan)
    if way is None:
        way = _WAYS[plan] = _way(plan, lowered)
    inputs, count, padded = len(x), stop - start, plan.padded
    if not float(x.abs().max()) < _LARGEST:
        return None
    loops, blocks, strips, each = find("matrix"), -(-inputs // 16), padded // 128, max(1, way.each)
    laid = np.zeros((16 * blocks, padded), np.float32)
    laid[:inputs, : x.shape[1]] = (x.to(torch.bfloat16).to(torch.float32) if rounds and not narrow else x).numpy()
    three = 2 * (way.form > 1) + (0 if rounds or narrow else 1)
    tiles = _lined((3 if three & 1 else 1, blocks, strips, 4, 16, 16), np.uint32)
    loops.lay(len(tiles), way.strips)(laid, tiles)
    sums = _sums(laid, each) if way.beside else np.zeros((1, 1, 16), np.float32)
    pieces = loops.pieces(three, each, int(way.each > 0), way.beside).address
    decoded = 0 if way.form == 2 else loops.decoded(way.widths, way.kind, way.form).address
    out = torch.empty((inputs, count))
    made = (find("rows").decoder() if way.form == 2 else find("factors").row_factors()).address
    how = plan.head, plan.slots, plan.constants, made, decoded, pieces, way.form, way.each, way.table, way.numbers, way.zero
    given = loops.shapes(way.each), tiles, sums, start, out.numpy()
    share(lambda low, high: loops.multiply(*how, *given, low, high), count, count * padded * 4, step=loops.BLOCK)
    return out
