"""Products with lowered weights on the CPU by compiled loops (``qformats.loops.products``), where a plan serves the layout.

The weights are exact, each rounded once to float32, and sums are float32: ``qformats.kernels.reference`` with another order of sums. Few
inputs are multiplied row by row while a row is in cache, more of them by blocks of rows. Work is shared among as many threads as torch
has; results do not depend on their number.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qformats.kernels import cpu_matrix
from qformats.kernels.cpu_plan import Plan, plan_of
from qformats.kernels.cpu_strips import strips_of
from qformats.kernels.lower import Lowered
from qformats.loops import find

__all__ = ["dequantize", "embed", "matmul", "matmul_back", "rounded_inputs"]

_MATRIX = 4  # inputs from which on the CPU's matrix unit multiplies, where there is one
_FEW = 24  # inputs up to which they are multiplied one by one
_SHARED = 1 << 18  # weights from which on threads share a product
_TILE_WEIGHTS = 1 << 19  # 2 MiB of float32
_ANY_ROWS = np.empty(0, np.int64)

Array = np.ndarray[Any, Any]


class _Pool:
    """Threads for the loops: as many as were last asked for, in this process."""

    def __init__(self) -> None:
        self.made: tuple[int, int, ThreadPoolExecutor] | None = None

    def of(self, threads: int) -> ThreadPoolExecutor:
        made = self.made
        if made is None or made[:2] != (os.getpid(), threads):
            made = os.getpid(), threads, ThreadPoolExecutor(threads, "qformats")
            self.made = made
        return made[2]


_POOL = _Pool()


def _share(run: Callable[[int, int], Any], count: int, work: int) -> None:
    """``run(low, high)`` over 0 … ``count``, in threads where ``work`` is worth it."""
    threads = min(torch.get_num_threads(), count)
    if threads <= 1 or work < _SHARED:
        if count:
            run(0, count)
        return
    ends = [count * i // threads for i in range(threads + 1)]
    pool = _POOL.of(threads - 1)
    waiting = [pool.submit(run, low, high) for low, high in pairwise(ends[1:])]
    run(ends[0], ends[1])
    for task in waiting:
        task.result()


def _plan(lowered: Lowered) -> Plan | None:
    first = lowered.planes["codes0"]
    return plan_of(lowered) if first.device.type == "cpu" and type(first) in (Tensor, torch.nn.Parameter) else None


def _inputs(x: Tensor, lowered: Lowered) -> Tensor:
    """``x`` (M, K) in float32, its columns in the order of the planes."""
    wide = x.to(torch.float32)
    return (wide.index_select(1, lowered.planes["order"]) if lowered.layout.index == "order" else wide).contiguous()


def matmul(x: Tensor, lowered: Lowered, start: int, stop: int, compute: str) -> Tensor | None:
    """``x`` (..., K) times the transposed rows ``start:stop``, (..., stop - start), in the dtype of ``x``; None where no loop serves."""
    plan = _plan(lowered)
    rounds = compute == "int8"
    if rounds and (plan is None or plan.integers is None):
        _warn(f"weights on {lowered.layout.grid} are multiplied exactly: there is no product of bytes for them")
        rounds = False
    if plan is None:
        return None
    if not x.numel():
        return x.new_zeros((*x.shape[:-1], stop - start))
    flat = _inputs(x.detach().reshape(-1, x.shape[-1]), lowered)
    made = None
    if len(flat) >= _MATRIX and cpu_matrix.available():
        made = cpu_matrix.multiply(flat, plan, lowered, start, stop, narrow=x.dtype == torch.bfloat16, rounds=rounds, share=_share)
    if made is None:
        made = (_rounded if rounds else _exact)(flat, plan, lowered, start, stop)
    return made.to(x.dtype).reshape(*x.shape[:-1], stop - start)


def _exact(x: Tensor, plan: Plan, lowered: Lowered, start: int, stop: int) -> Tensor:
    """The product with ``x`` (M, K) float32, (M, stop - start)."""
    (inputs, columns), count, padded = x.shape, stop - start, plan.padded
    loops = find("products")
    how: tuple[Any, ...] = (plan.head, plan.slots, plan.constants, find("rows").decoder().address)
    few, weights = loops.few, loops.weights
    if plan.strips:
        strips = strips_of(plan, lowered)
        made = (loops.row_times if inputs == 1 else loops.row)(strips.widths, strips.kind, strips.zeros, strips.offsets)
        gather = find("factors").row_factors().address
        few, weights, how = loops.few_strips, loops.weights_strips, (*how[:3], gather, made.address, strips.table)
    out, laid = torch.empty((inputs, count)), np.zeros((inputs, padded), np.float32)
    if plan.strips:
        find("strips").in_words(x.numpy(), laid)
    else:
        laid[:, :columns] = x.numpy()
    if inputs <= _FEW:
        array = out.numpy()
        _share(lambda low, high: few(*how, laid, start, array, low, high), count, count * padded * (1 + inputs // 4))
        return out
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
    """What ``compute="int8"`` multiplies with for ``x`` (M, K) float32: in each 128 columns whole multiples of the largest / 127."""
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
    strips, kind = strips_of(plan, lowered), int(plan.head[find("rows").KIND])
    made = loops.row_times(strips.widths, kind, strips.fine) if inputs == 1 else loops.kept(strips.widths, kind)
    array, gather = out.numpy(), find("factors").row_factors().address
    how = plan.head, plan.slots, plan.constants, gather, made.address, *(plan.integers or ()), q, scales, sums, start
    _share(lambda low, high: loops.multiply(*how, array, low, high), count, count * padded * (1 + inputs // 4))
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
    picked = rows.to(torch.int64).contiguous().numpy()
    if len(picked) and not 0 <= int(picked.min()) <= int(picked.max()) < total:
        return None
    return _unsorted(_decoded(plan, picked, 0, torch.empty((len(picked), k))), lowered)


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


def embed(ids: Tensor, lowered: Lowered, dtype: torch.dtype) -> Tensor | None:
    """The rows ``ids`` of the weight in float32, (*ids.shape, K); None where no loop serves them or ``dtype`` is another."""
    if dtype != torch.float32:
        return None
    made = dequantize(lowered, ids.reshape(-1))
    return None if made is None else made.reshape(*ids.shape, lowered.layout.columns)
