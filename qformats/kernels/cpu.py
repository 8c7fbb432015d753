"""Products with lowered weights on the CPU by compiled loops (``qformats.loops.products``), where a plan serves the layout.

The weights are exact, each rounded once to float32, and sums are float32: ``qformats.kernels.reference`` with another order of sums. Few
inputs are multiplied row by row while a row is in cache, more of them by blocks of rows. A CPU with a matrix unit multiplies more than a
few inputs there (``qformats.kernels.cpu_matrix``), most weights without any rounding of their own. Work is shared among as many threads
as torch has; results do not depend on their number.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qformats.kernels import cpu_matrix, one
from qformats.kernels.cpu_plan import Plan, plan_of
from qformats.kernels.lower import Lowered
from qformats.kernels.threads import share as _share
from qformats.loops import find

__all__ = ["Straight", "dequantize", "embed", "matmul", "matmul_back", "rounded_inputs", "straight"]

_MATRIX = 4  # inputs from which on the CPU's matrix unit multiplies, where there is one
_FEW = 24  # inputs up to which they are multiplied one by one
_TILE_WEIGHTS = 1 << 19  # 2 MiB of float32
_ANY_ROWS = np.empty(0, np.int64)

Array = np.ndarray[Any, Any]


def _plan(lowered: Lowered) -> Plan | None:
    first = lowered.planes["codes0"]
    return plan_of(lowered) if first.device.type == "cpu" and type(first) in (Tensor, torch.nn.Parameter) else None


class Straight:
    """The product with a weight, its plan looked up once: for a caller that keeps it and asks whether it still ``holds``."""

    __slots__ = ("_columns", "_made_of", "_one", "_order", "_rounds", "lowered", "plan")

    def __init__(self, lowered: Lowered, names: Sequence[str], plan: Plan, rounds: bool) -> None:
        self.plan, self.lowered, self._columns, self._rounds = plan, lowered, lowered.layout.columns, rounds
        self._one: one.Product | None = None
        self._order = lowered.planes["order"] if lowered.layout.index == "order" else None
        planes = lowered.planes.values()
        versions = [-1 if plane.is_inference() else plane._version for plane in planes]  # of an inference tensor none is counted
        self._made_of = list(zip(names, planes, versions, strict=True))

    def holds(self, planes: Mapping[str, Tensor | None]) -> bool:
        """Whether these are the planes that the plan was made of, and nothing was written to them."""
        for name, plane, version in self._made_of:
            if planes.get(name) is not plane or (version >= 0 and plane._version != version):
                return False
        return True

    def __call__(self, x: Tensor, start: int, stop: int) -> Tensor:
        """``x`` (..., K) on the CPU times the transposed rows ``start:stop``, in the dtype of ``x``.

        Float32 that is contiguous is taken as it is. Raises RuntimeError where K is another.
        """
        shape, dtype = x.shape, x.dtype
        if shape[-1] != self._columns:
            raise RuntimeError(f"inputs of shape {tuple(shape)} for a weight of {self._columns} columns")
        if x.requires_grad:
            x = x.detach()
        if dtype is torch.float32 and self._order is None and x.numel() == self._columns and x.is_contiguous():
            out = np.empty((*shape[:-1], stop - start), np.float32)
            if self._one is None:
                self._one = (one.rounded if self._rounds else one.exact)(self.plan, self.lowered)
            self._one(x.numpy().reshape(1, -1), start, stop, out.reshape(1, -1))
            return torch.from_numpy(out)
        if dtype is not torch.float32:
            x = x.to(torch.float32)
        if len(shape) != 2:
            x = x.reshape(-1, self._columns)
        if self._order is not None:
            x = x.index_select(1, self._order)
        elif not x.is_contiguous():
            x = x.contiguous()
        made = self._many(x, start, stop, dtype is torch.bfloat16)
        if dtype is not torch.float32:
            made = made.to(dtype)
        return made if len(shape) == 2 else made.view(*shape[:-1], stop - start)

    def _many(self, x: Tensor, start: int, stop: int, narrow: bool) -> Tensor:
        """``x`` (M, K) float32, in the order of the planes; ``narrow``: bfloat16 numbers."""
        if not len(x):
            return x.new_empty((0, stop - start))
        if len(x) >= _MATRIX and cpu_matrix.available():
            made = cpu_matrix.multiply(x, self.plan, self.lowered, start, stop, narrow=narrow, rounds=self._rounds)
            if made is not None:
                return made
        return (_rounded if self._rounds else _exact)(x, self.plan, self.lowered, start, stop)


def straight(lowered: Lowered, names: Sequence[str], compute: str) -> Straight | None:
    """The product with a weight whose planes the caller holds as ``names``, in the order of the layout; None where no loop serves."""
    plan = _plan(lowered)
    rounds = compute == "int8"
    if rounds and (plan is None or plan.integers is None):
        _warn(f"weights on {lowered.layout.grid} are multiplied exactly: there is no product of bytes for them")
        rounds = False
    return None if plan is None else Straight(lowered, names, plan, rounds)


def matmul(x: Tensor, lowered: Lowered, start: int, stop: int, compute: str) -> Tensor | None:
    """``x`` (..., K) times the transposed rows ``start:stop``, (..., stop - start), in the dtype of ``x``; None where no loop serves."""
    product = straight(lowered, lowered.layout.names, compute)
    return None if product is None else product(x, start, stop)


def _exact(x: Tensor, plan: Plan, lowered: Lowered, start: int, stop: int) -> Tensor:
    """The product with ``x`` (M, K) float32, (M, stop - start)."""
    (inputs, columns), count, padded = x.shape, stop - start, plan.padded
    few, how = one.few_of(plan, lowered, inputs == 1)
    out, laid = torch.empty((inputs, count)), np.zeros((inputs, padded), np.float32)
    if plan.strips:
        find("strips").in_words(x.numpy(), laid)
    else:
        laid[:, :columns] = x.numpy()
    if inputs <= _FEW:
        array = out.numpy()
        _share(lambda low, high: few(*how, laid, start, array, low, high), count, count * padded * (1 + inputs // 4))
        return out
    weights = find("products").weights_strips if plan.strips else find("products").weights
    source, room = torch.from_numpy(laid), torch.zeros((min(count, _tile_rows(padded)), padded))
    for rows in _tiles(start, stop, padded):
        tile = room[: rows.stop - rows.start]
        array, first = tile.numpy(), rows.start
        _share(lambda low, high, first=first, array=array: weights(*how, first + low, array[low:high]), len(tile), tile.numel())  # type: ignore[misc]
        torch.mm(source, tile.t(), out=out[:, first - start : rows.stop - start])
    return out


# ---------------------------------------------------------------- products of bytes


@cache
def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def rounded_inputs(x: Tensor) -> Tensor:
    """What ``compute="int8"`` multiplies with for ``x`` (M, K) float32: in each 128 columns whole multiples of the largest / 127.

    More than a few inputs are rounded to bfloat16 instead where the CPU has a matrix unit, which is nearer.
    """
    count, columns = x.shape
    blocks = torch.nn.functional.pad(x, (0, -columns % 128)).view(count, -(-columns // 128), 128)
    largest = blocks.abs().amax(-1, keepdim=True)
    by = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)  # 127 / largest would round twice
    return ((blocks * by).round() * (largest / 127)).flatten(1)[:, :columns]


def _rounded(x: Tensor, plan: Plan, lowered: Lowered, start: int, stop: int) -> Tensor:
    """The product with ``rounded_inputs(x)``, (M, stop - start)."""
    loops, inputs, count, padded = find("int8"), len(x), stop - start, plan.padded
    blocks, groups = padded // loops.BLOCK, -(-padded // plan.group)
    q, scales = np.empty((inputs, padded), np.int8), np.empty((inputs, blocks), np.float32)
    sums = np.zeros((inputs, -(-groups // 16) * 16), np.float32)
    loops.quantize(x.numpy(), plan.group, q, scales, sums)
    out = torch.empty((inputs, count))
    array, (multiply, how) = out.numpy(), one.multiply_of(plan, lowered, inputs == 1)
    how = *how, q, scales, sums, start
    _share(lambda low, high: multiply(*how, array, low, high), count, count * padded * (1 + inputs // 4))
    return out


# ---------------------------------------------------------------- weights


def _decoded(plan: Plan, picked: Array, first: int, out: Tensor) -> Tensor:
    """Rows ``picked``, or those from ``first`` on, in float32 to ``out`` (n, K), columns as in the planes."""
    array, loops = out.numpy(), find("rows")
    how = plan.head, plan.slots, plan.constants, loops.decoder().address
    _share(lambda low, high: loops.dequantize(*how, picked[low:high], first + low, array[low:high]), len(out), out.numel())
    return out


def dequantize(lowered: Lowered, rows: slice | Tensor) -> Tensor | None:
    """``lowered.dequantize(rows)`` in float32 by a loop; ``rows``: a slice of step 1 within the weight, or int64 (n,). None: no loop."""
    plan, total, k = _plan(lowered), lowered.layout.rows, lowered.layout.columns
    if plan is None:
        return None
    if isinstance(rows, slice):
        first, stop, _ = rows.indices(total)
        return _unsorted(_decoded(plan, _ANY_ROWS, first, torch.empty((max(0, stop - first), k))), lowered)
    return _picked(plan, rows, lowered)


def _picked(plan: Plan, rows: Tensor, lowered: Lowered) -> Tensor | None:
    """Rows by number, whole numbers (n,); None where one is not there."""
    picked = rows.to(torch.int64).contiguous().numpy()
    if len(picked) and int(picked.view(np.uint64).max()) >= lowered.layout.rows:  # a negative number is a large one
        return None
    return _unsorted(_decoded(plan, picked, 0, torch.empty((len(picked), lowered.layout.columns))), lowered)


def _unsorted(columns: Tensor, lowered: Lowered) -> Tensor:
    """Columns of the planes as columns of the weight."""
    if lowered.layout.index != "order":
        return columns
    back = torch.empty_like(columns)
    back[:, lowered.planes["order"].to(torch.int64)] = columns
    return back


def _tile_rows(columns: int) -> int:
    return max(64, _TILE_WEIGHTS // max(1, columns))


def _tiles(start: int, stop: int, columns: int) -> Iterable[slice]:
    step = _tile_rows(columns)
    return (slice(at, min(stop, at + step)) for at in range(start, stop, step))


def matmul_back(grad: Tensor, lowered: Lowered, start: int, stop: int) -> Tensor | None:
    """``grad`` (..., stop - start) times the rows ``start:stop`` of the weight, (..., K), in the dtype of ``grad``; None: no loop."""
    plan, columns = _plan(lowered), lowered.layout.columns
    if plan is None:
        return None
    flat = grad.detach().reshape(-1, grad.shape[-1]).to(torch.float32)
    out = flat.new_zeros((len(flat), columns))
    room = torch.empty((min(stop - start, _tile_rows(columns)), columns))
    for rows in _tiles(start, stop, columns):
        tile = _decoded(plan, _ANY_ROWS, rows.start, room[: rows.stop - rows.start])
        out.addmm_(flat[:, rows.start - start : rows.stop - start], tile)
    return _unsorted(out, lowered).to(grad.dtype).reshape(*grad.shape[:-1], columns)


def embed(ids: Tensor, lowered: Lowered, dtype: torch.dtype, plan: Plan | None = None) -> Tensor | None:
    """The rows ``ids`` of the weight in float32, (*ids.shape, K); None where no loop serves them or ``dtype`` is another.

    ``plan``: that of the weight, where the caller has it.
    """
    if dtype != torch.float32 or (plan := plan or _plan(lowered)) is None:
        return None
    made = _picked(plan, ids.reshape(-1), lowered)
    return None if made is None else made.view(*ids.shape, lowered.layout.columns)
