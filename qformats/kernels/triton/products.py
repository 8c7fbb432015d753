"""The kernels: ``gemv`` for a few rows of x, ``tiles`` for more (also of sorted experts), ``reduce`` for parts of K, ``dequantize``.

Each is one source for all kinds of weights. Every sum has one fixed order: K is cut into ``SPLITS`` parts whose float32 results ``reduce``
adds in turn, nothing is added atomically.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"
# ruff: noqa: B007, RUF005 (of Python, kernels know little)
from __future__ import annotations

import triton
import triton.language as tl

from qformats.kernels.triton.rounding import EMULATED, of, rounded, stored
from qformats.kernels.triton.sums import of_units
from qformats.kernels.triton.weights import parameters, tile

__all__ = ["dequantize", "gemv", "reduce", "tiles"]


@triton.jit
def gemv(
    x, planes, out, count, start, stop,
    S: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """``out`` (SPLITS, count, stop - start) = ``x`` (count, K) times rows ``start:stop``; ``count`` <= MOST, a power of two.

    Program (i, s): ROWS rows, STEPS steps of UNITS units of columns. Values and products in float32, without tensor cores. FULL: ROWS
    divides the rows; then those of a thread lie at constant distances, which loads take without arithmetic.
    """
    width: tl.constexpr = of(S, "width")
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if FULL:
        rows = ((start + tl.program_id(0) * ROWS).to(tl.int64), tl.arange(0, ROWS))
    else:
        rows = (start.to(tl.int64), tl.minimum(place, stop - start - 1))
    sums = ()
    for m in tl.static_range(MOST):
        sums = sums + (tl.zeros([UNITS, ROWS, width // of(S, "chain")], tl.float32),)
    for step in range(0, STEPS):
        units = (tl.program_id(1) * STEPS + step) * UNITS + tl.arange(0, UNITS)
        sums = of_units(x, count, planes, S, rows, units, sums, MOST, ROWS, UNITS)
    for m in tl.static_range(MOST):
        total = tl.sum(tl.sum(sums[m], 2), 0)  # (ROWS,)
        line = (tl.program_id(1) * count + m).to(tl.int64) * (stop - start)
        made = stored(rounded(total, out.dtype.element_ty), out.dtype.element_ty)
        tl.store(out + line + place, made, mask=(place < stop - start) & (m < count))


@triton.jit
def tiles(
    x, planes, out, experts, firsts, lasts, count, start, stop,
    S: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, UNITS: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """``out`` (splits, count, stop - start) = ``x`` (count, K) times rows ``start:stop``, on tensor cores, the weights as left operand.

    Program (i, s): a tile of ROWS rows and BATCH rows of x, tiles in groups of GROUP along the rows; STEPS steps of UNITS units of columns.
    GROUPED: tile j of x is its rows ``firsts[j]:lasts[j]`` and takes the matrix ``experts[j]``, ``start:stop`` being that of the first.
    EVEN: the steps are all columns, no more. FULL: ROWS divides the rows.
    """
    dtype: tl.constexpr = tl.float32 if EMULATED else x.dtype.element_ty
    width: tl.constexpr = of(S, "width")
    phases: tl.constexpr = of(S, "phases")
    columns: tl.constexpr = of(S, "columns")
    height = stop - start
    across = tl.cdiv(height, ROWS)
    down = tl.num_programs(0) // across
    group = tl.program_id(0) // (GROUP * down)
    wide = tl.minimum(across - group * GROUP, GROUP)
    inside = tl.program_id(0) - group * (GROUP * down)
    j = inside // wide
    i = (group * GROUP + inside % wide) * ROWS
    place = i + tl.arange(0, ROWS)
    if GROUPED:
        first = tl.load(firsts + j)
        last = tl.load(lasts + j)
        base = tl.load(experts + j).to(tl.int64) * height + start
    else:
        first = j * BATCH
        last = count
        base = start.to(tl.int64)
    if FULL:
        rows = (base + i, tl.arange(0, ROWS))
    else:
        rows = (base, tl.minimum(place, height - 1))
    m = first + tl.arange(0, BATCH)
    line = tl.minimum(m, count - 1).to(tl.int64)[None, :, None] * columns
    if first < last:
        acc = tl.zeros([ROWS, BATCH], tl.float32)
        for step in range(0, STEPS):
            units = (tl.program_id(1) * STEPS + step) * UNITS + tl.arange(0, UNITS)
            for phase in tl.static_range(phases):
                if phase % of(S, "span") == 0:
                    params = parameters(planes, S, rows, units, phase, ROWS, UNITS, 1, of(S, "wide"))
                w = tile(planes, S, rows, units, params, phase, ROWS, UNITS, x.dtype.element_ty)
                col = units[:, None, None] * of(S, "unit") + phase * width + tl.arange(0, width)[None, None, :]
                if EVEN:
                    held = tl.load(x + line + col)
                else:
                    held = tl.load(x + line + col, mask=col < columns, other=0.0)
                left = tl.reshape(tl.permute(w, (1, 0, 2)), [ROWS, UNITS * width])
                right = tl.reshape(tl.permute(held.to(dtype), (0, 2, 1)), [UNITS * width, BATCH])
                acc = tl.dot(left, right, acc, input_precision="ieee")
        made = stored(rounded(acc, out.dtype.element_ty), out.dtype.element_ty)
        at = (tl.program_id(1) * count + m).to(tl.int64) * height
        tl.store(out + at[None, :] + place[:, None], made, mask=(m[None, :] < last) & (place[:, None] < height))


@triton.jit
def reduce(parts, out, total, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """``out`` (total,) = the sum of ``parts`` (SPLITS, total) float32, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts + split * total + at, mask=at < total, other=0.0)
    tl.store(out + at, stored(rounded(acc, out.dtype.element_ty), out.dtype.element_ty), mask=at < total)


@triton.jit
def dequantize(
    planes, out, ids, order, count, start,
    S: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, CHOSEN: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """``out`` (count, K): the rows from ``start`` on, or the rows ``ids`` (count,) if CHOSEN, rounded once to its dtype.

    ORDERED: column j of the planes is column ``order[j]`` of the weight.
    """
    width: tl.constexpr = of(S, "width")
    columns: tl.constexpr = of(S, "columns")
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if CHOSEN:
        chosen = tl.load(ids + tl.minimum(place, count - 1)).to(tl.int64)
        rows = (0, tl.minimum(tl.maximum(chosen, 0), of(S, "rows") - 1))
    else:
        rows = (start.to(tl.int64), tl.minimum(place, count - 1))
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    line = place.to(tl.int64)[None, :, None] * columns
    for phase in tl.static_range(of(S, "phases")):
        if phase % of(S, "span") == 0:
            params = parameters(planes, S, rows, units, phase, ROWS, UNITS, 1, of(S, "wide"))
        w = tile(planes, S, rows, units, params, phase, ROWS, UNITS, out.dtype.element_ty)
        col = units[:, None, None] * of(S, "unit") + phase * width + tl.arange(0, width)[None, None, :]
        inside = (place[None, :, None] < count) & (col < columns)
        if ORDERED:
            col = tl.load(order + tl.minimum(col, columns - 1))
        tl.store(out + line + col, stored(w, out.dtype.element_ty), mask=inside)
