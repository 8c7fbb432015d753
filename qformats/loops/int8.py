"""Compiled products of bytes: inputs rounded to int8 in blocks of 128 columns, times the integers that codes stand for.

Integer products of four columns are summed exactly; each sum is scaled in float32. With ``value = scale (byte - zero) + offset`` a row's
product is the scaled sum of bytes times inputs plus, for each group, ``offset - zero scale`` times the sum of its inputs, which is made
once for all rows. The definition is ``qformats.kernels.cpu.rounded_inputs`` followed by the exact product. What ``head``, ``slots`` and
``constants`` are: ``qformats.loops.rows``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from qformats.loops.compiled import compiled
from qformats.loops.lanes import as_floats, dot, flipped, floats_at, fma, look_up_bytes, pointer, put, total
from qformats.loops.rows import ARITHMETIC as WAY
from qformats.loops.rows import CODES, DIVIDED, GROUPS, KIND, SIGNED, SIXTEEN, WIDTH, params, row_codes, workspace

__all__ = ["BLOCK", "multiply", "quantize"]

Array = np.ndarray[Any, Any]
i8, u32, f32 = np.int8, np.uint32, np.float32

BLOCK = 128
_ROWS = 8  # decoded before they are multiplied; an even number


@compiled
def quantize(x: Array, width: Any, q: Array, scales: Array, sums: Array) -> None:
    """``x`` (M, K) float32 -> ``q`` int8 (M, whole blocks or more), ``scales`` (M, blocks), ``sums`` (M, groups or more) of ``width``.

    A scale is the block's largest magnitude / 127, and a number is x / scale to the nearest, ties to even. A block with an infinity or
    NaN makes the input's products NaN.
    """
    columns = x.shape[1]
    for m in range(len(x)):
        for block in range(scales.shape[1]):
            start, stop = block * BLOCK, min(columns, (block + 1) * BLOCK)
            worst = u32(0)  # magnitudes are ordered like their bits, infinities and NaN above all
            for i in range(start, stop):
                worst = max(worst, u32(f32(x[m, i]).view(u32) & u32(0x7FFFFFFF)))
            largest = u32(worst).view(f32)
            finite = worst < u32(0x7F800000)
            scale = largest / f32(127) if finite else f32(np.nan)
            by = f32(127) / largest if finite and worst > u32(0) else f32(0)
            scales[m, block] = scale
            for i in range(start, stop):
                q[m, i] = i8(np.int32(np.rint(x[m, i] * by))) if finite else i8(0)
            at = start
            while at < stop:
                group = at // width
                end = min(stop, (group + 1) * width)
                added = np.int32(0)
                for i in range(at, end):
                    added += np.int32(q[m, i])
                sums[m, group] += f32(added) * scale
                at = end


@compiled
def _bytes(head: Array, table: Array, row: Any, target: Any, other: Any, aside: Any, room: Any) -> None:
    """A row's integers as unsigned bytes to ``target``, which has ``room`` for whole vectors; by way of ``aside``."""
    codes, kind = row_codes(head, row, aside, other), head[KIND]
    entries, flip = np.intp(table.ctypes.data), 128 if kind == SIGNED else 0
    for i in range(0, min(room, (head[CODES] + 15) // 16 * 16), 16):
        if kind == SIXTEEN:
            look_up_bytes(codes + i, entries, target + i)
        else:
            flipped(codes + i, flip, target + i)


@compiled
def _factors(head: Array, p: Array, unit: Any, bias: Any, lanes: Any, rest: Array) -> None:
    """The scale of every four columns to the floats at ``lanes``, and what a group's inputs are multiplied with beside to ``rest``."""
    quarter, groups, scales, zeros, offsets = head[WIDTH] // 4, head[GROUPS], p[0], p[2], p[3]
    if head[WAY] == DIVIDED:
        for j in range(groups):
            scales[j] /= p[1, j]
    for j in range(groups):
        rest[j] = f32(offsets[j] - (zeros[j] + bias * unit) * scales[j])
    for j in range(groups):
        one = as_floats(f32(scales[j] * unit))
        at = lanes + 4 * j * quarter
        put(at, one)
        for i in range(16, quarter, 16):
            put(at + 4 * i, one)


@compiled
def _pair(w: Any, wide: Any, x: Any, first: Any, second: Any, scale: Any, sums: Any) -> Any:
    """``sums`` plus ``scale`` times the products of one block; ``wide``: bytes from one vector to the next."""
    return fma(dot(w + wide, x + wide, second, dot(w, x, first, as_floats(f32(0)))), scale, sums)


@compiled
def _eight(codes: Any, lanes: Any, blocks: Any, q: Any, across: Any, scales: Any, step: Any, row: Any, out: Array) -> None:
    """Two rows, ``row`` and 4 ``row`` bytes apart in codes and lanes, times four inputs, ``across`` bytes apart, scales ``step`` apart."""
    a0 = as_floats(f32(0))
    b0, c0, d0, a1, b1, c1, d1 = a0, a0, a0, a0, a0, a0, a0
    for block in range(blocks):
        at, s = BLOCK * block, scales + 4 * block
        u, v, x = codes + at, codes + row + at, q + at
        f0, g0 = floats_at(lanes + at), floats_at(lanes + at + 64)
        f1, g1 = floats_at(lanes + row + at), floats_at(lanes + row + at + 64)
        by = as_floats(carray(pointer(s), 1, f32)[0])
        a0, a1 = _pair(u, 64, x, f0, g0, by, a0), _pair(v, 64, x, f1, g1, by, a1)
        x, by = x + across, as_floats(carray(pointer(s + step), 1, f32)[0])
        b0, b1 = _pair(u, 64, x, f0, g0, by, b0), _pair(v, 64, x, f1, g1, by, b1)
        x, by = x + across, as_floats(carray(pointer(s + 2 * step), 1, f32)[0])
        c0, c1 = _pair(u, 64, x, f0, g0, by, c0), _pair(v, 64, x, f1, g1, by, c1)
        x, by = x + across, as_floats(carray(pointer(s + 3 * step), 1, f32)[0])
        d0, d1 = _pair(u, 64, x, f0, g0, by, d0), _pair(v, 64, x, f1, g1, by, d1)
    out[0], out[1], out[2], out[3] = total(a0), total(b0), total(c0), total(d0)
    out[4], out[5], out[6], out[7] = total(a1), total(b1), total(c1), total(d1)


@compiled
def _one(codes: Any, lanes: Any, blocks: Any, q: Any, scales: Any) -> Any:
    zero = as_floats(f32(0))
    a, b = zero, zero
    for block in range(blocks):
        at = BLOCK * block
        factor = as_floats(carray(pointer(scales + 4 * block), 1, f32)[0])
        a = fma(dot(codes + at, q + at, floats_at(lanes + at), zero), factor, a)
        b = fma(dot(codes + at + 64, q + at + 64, floats_at(lanes + at + 64), zero), factor, b)
    return total(a + b)


@compiled
def _beside(rest: Any, sums: Any, vectors: Any) -> Any:
    a = as_floats(f32(0))
    for i in range(vectors):
        a = fma(floats_at(rest + 64 * i), floats_at(sums + 64 * i), a)
    return total(a)


@compiled
def multiply(
    head: Array, slots: Array, constants: Array, table: Array, numbers: Array, x: Array, scales: Array, sums: Array, first: Any, out: Array,
    low: Any, high: Any,
) -> None:  # fmt: skip
    """What ``quantize`` made of the inputs times rows ``first + low`` … ``first + high`` to ``out[:, low:high]`` (M, n) float32.

    ``table``: bytes of sixteen codes; ``numbers``: what a byte counts, and what is taken off it. ``sums`` (M, groups up to a whole vector).
    """
    p, bytes_, _ = workspace(head)
    blocks, inputs, vectors, eight = scales.shape[1], len(x), sums.shape[1] // 16, np.zeros(8, f32)
    line, groups = BLOCK * blocks, sums.shape[1]  # bytes of a row's codes, and of its scales, 32 of 4 bytes a block
    apart, slack = line + BLOCK, head[WIDTH] + 64  # rows a power of two apart would share the lines of the first cache
    held = np.zeros(_ROWS * (2 * apart + 4 * groups) + slack + 64, np.uint8)
    codes = (np.intp(held.ctypes.data) + 63) & ~63
    rest, lanes = codes + _ROWS * apart, codes + _ROWS * (apart + 4 * groups)
    across = x.shape[1]
    x_at, sum_at, scale_at = np.intp(x.ctypes.data), np.intp(sums.ctypes.data), np.intp(scales.ctypes.data)
    other, aside = np.intp(bytes_[1].ctypes.data), np.intp(bytes_[2].ctypes.data)
    for start in range(low, high, _ROWS):
        count = min(_ROWS, high - start)
        for i in range(count):
            params(head, slots, constants, first + start + i, p, aside)
            _bytes(head, table, first + start + i, codes + i * apart, other, np.intp(bytes_[0].ctypes.data), line)
            _factors(head, p, numbers[0], numbers[1], lanes + i * apart, carray(pointer(rest + 4 * i * groups), groups, f32))
        m = 0
        while m + 4 <= inputs:
            q, s = x_at + m * across, scale_at + 4 * m * blocks
            for i in range(0, count, 2):  # of an odd number the row after the last is counted and left
                _eight(codes + i * apart, lanes + i * apart, blocks, q, across, s, 4 * blocks, apart, eight)
                for r in range(i, min(count, i + 2)):
                    for j in range(4):
                        beside = _beside(rest + 4 * r * groups, sum_at + 4 * (m + j) * groups, vectors)
                        out[m + j, start + r] = eight[4 * (r - i) + j] + beside
            m += 4
        while m < inputs:
            for i in range(count):
                made = _one(codes + i * apart, lanes + i * apart, blocks, x_at + m * across, scale_at + 4 * m * blocks)
                out[m, start + i] = made + _beside(rest + 4 * i * groups, sum_at + 4 * m * groups, vectors)
            m += 1
