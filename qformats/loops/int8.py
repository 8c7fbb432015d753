"""Compiled products of bytes: inputs rounded to int8 in blocks of 128 columns, times the integers that codes stand for.

Integer products of a few columns are summed exactly; each sum is scaled in float32. With ``value = scale (byte - zero) + offset`` a row's
product is the scaled sum of bytes times inputs plus, for each group, ``offset - zero scale`` times the sum of its inputs, which is made
once for all rows. Codes and inputs lie in strips (``qformats.loops.strips``), a strip being a block. The definition is
``qformats.kernels.cpu.rounded_inputs`` followed by the exact product. What ``head``, ``slots`` and ``constants`` are:
``qformats.loops.rows``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from qformats.loops.compiled import compiled, inlined
from qformats.loops.factors import factors, group_at, lanes_of, room
from qformats.loops.lanes import as_floats, floats_at, fma, pointer, put, total
from qformats.loops.rows import KIND, PADDED, SIGNED, SIXTEEN
from qformats.loops.strips import STRIP, bytes_at, dot, dots, flip, keep, lanes, names_of, paired, planes_of, strip, widths_of

__all__ = ["BLOCK", "multiply", "quantize"]

Array = np.ndarray[Any, Any]
i8, u8, u32, f32 = np.int8, np.uint8, np.uint32, np.float32

BLOCK = STRIP
_ROWS = 8  # decoded before they are multiplied; an even number


@compiled
def quantize(x: Array, width: Any, q: Array, scales: Array, sums: Array) -> None:
    """``x`` (M, K) float32 -> ``q`` int8 (M, strips), ``scales`` (M, blocks), ``sums`` (M, groups or more) of ``width``.

    A scale is the block's largest magnitude / 127, and a number is x / scale to the nearest, ties to even. A block with an infinity or
    NaN makes the input's products NaN.
    """
    columns, plain = x.shape[1], np.zeros(BLOCK, i8)
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
                plain[i - start] = i8(np.int32(np.rint(x[m, i] * by))) if finite else i8(0)
            plain[stop - start :] = 0
            paired(np.intp(plain.ctypes.data), np.intp(q.ctypes.data) + m * q.shape[1] + start)
            at = start
            while at < stop:
                group = at // width
                end = min(stop, (group + 1) * width)
                added = np.int32(0)
                for i in range(at, end):
                    added += np.int32(plain[i - start])
                sums[m, group] += f32(added) * scale
                at = end


@inlined
def _unsigned(first: Any, second: Any, kind: Any, table: Any) -> Any:
    """A strip's integers as unsigned bytes."""
    if kind == SIXTEEN:
        return names_of(first, table), names_of(second, table)
    return (flip(first, 128), flip(second, 128)) if kind == SIGNED else (first, second)


@compiled
def _beside(held: Array, unit: Any, bias: Any, sums: Any, vectors: Any) -> Any:
    """What the groups' sums of one input add, by the numbers that ``factors`` made of a row."""
    p, step, a = np.intp(held.ctypes.data), 4 * held.shape[1], as_floats(f32(0))
    shift = as_floats(f32(bias * unit))
    for at in range(0, 64 * vectors, 64):
        rest = fma(as_floats(f32(0)) - floats_at(p + 2 * step + at) - shift, floats_at(p + at), floats_at(p + 3 * step + at))
        a = fma(rest, floats_at(sums + at), a)
    return total(a)


@compiled
def _row_times(head: Array, planes: Any, held: Array, table: Any, q: Any, scales: Any) -> Any:
    """The bytes of one row times those of one input, scaled."""
    widths, kind, p, a = widths_of(head), head[KIND], np.intp(held.ctypes.data), as_floats(f32(0))
    right, left, behind, ahead, every = lanes_of(head)
    for k in range(head[PADDED] // STRIP):
        first, second = strip(widths, planes, k)
        first, second = _unsigned(first, second, kind, table)
        at, x, by = p + group_at(k, ahead, every), q + STRIP * k, as_floats(carray(pointer(scales + 4 * k), 1, f32)[0])
        if behind:
            sums = fma(dot(second, x + 64), lanes(at + behind, right, left), dot(first, x) * lanes(at, right, left))
            a = fma(sums, by, a)
        else:
            a = fma(dots(first, second, x), lanes(at, right, left) * by, a)
    return total(a)


@compiled
def _kept(head: Array, planes: Any, held: Array, table: Any, codes: Any, by: Any) -> None:
    """The bytes of one row to ``codes`` and the scales of its lanes, one or two vectors of a strip, to ``by``."""
    widths, kind, p = widths_of(head), head[KIND], np.intp(held.ctypes.data)
    right, left, behind, ahead, every = lanes_of(head)
    for k in range(head[PADDED] // STRIP):
        first, second = strip(widths, planes, k)
        first, second = _unsigned(first, second, kind, table)
        keep(codes + STRIP * k, first), keep(codes + STRIP * k + 64, second)
        at = p + group_at(k, ahead, every)
        put(by + STRIP * k, lanes(at, right, left)), put(by + STRIP * k + 64, lanes(at + behind, right, left))


@inlined
def _pair(w: Any, x: Any, scales: Any, fine: Any, by: Any, sums: Any) -> Any:
    """``sums`` plus the products of one strip, scaled; ``fine``: each of its vectors has scales of its own."""
    if fine:
        return fma(fma(dot(bytes_at(w + 64), x + 64), floats_at(scales + 64), dot(bytes_at(w), x) * floats_at(scales)), by, sums)
    return fma(dots(bytes_at(w), bytes_at(w + 64), x) * floats_at(scales), by, sums)


@compiled
def _eight(codes: Any, lanes_: Any, strips: Any, fine: Any, q: Any, scales: Any, row: Any, out: Array) -> None:
    """Two rows, ``row`` bytes apart in codes and scales, times four inputs, next to each other."""
    a0 = as_floats(f32(0))
    b0, c0, d0, a1, b1, c1, d1 = a0, a0, a0, a0, a0, a0, a0
    across, step = STRIP * strips, 4 * strips
    for k in range(strips):
        u, f, x, s = codes + STRIP * k, lanes_ + STRIP * k, q + STRIP * k, scales + 4 * k
        v, g = u + row, f + row
        by = as_floats(carray(pointer(s), 1, f32)[0])
        a0, a1 = _pair(u, x, f, fine, by, a0), _pair(v, x, g, fine, by, a1)
        x, by = x + across, as_floats(carray(pointer(s + step), 1, f32)[0])
        b0, b1 = _pair(u, x, f, fine, by, b0), _pair(v, x, g, fine, by, b1)
        x, by = x + across, as_floats(carray(pointer(s + 2 * step), 1, f32)[0])
        c0, c1 = _pair(u, x, f, fine, by, c0), _pair(v, x, g, fine, by, c1)
        x, by = x + across, as_floats(carray(pointer(s + 3 * step), 1, f32)[0])
        d0, d1 = _pair(u, x, f, fine, by, d0), _pair(v, x, g, fine, by, d1)
    out[0], out[1], out[2], out[3] = total(a0), total(b0), total(c0), total(d0)
    out[4], out[5], out[6], out[7] = total(a1), total(b1), total(c1), total(d1)


@compiled
def multiply(
    head: Array, slots: Array, constants: Array, table: Array, numbers: Array, x: Array, scales: Array, sums: Array, first: Any, out: Array,
    low: Any, high: Any,
) -> None:  # fmt: skip
    """What ``quantize`` made of the inputs times rows ``first + low`` … ``first + high`` to ``out[:, low:high]`` (M, n) float32.

    ``table``: bytes of sixteen codes; ``numbers``: what a byte counts, and what is taken off it. ``sums`` (M, groups up to a whole vector).
    """
    held, wide, aside = room(head, constants)
    entries, unit, bias, spare = np.intp(table.ctypes.data), f32(numbers[0]), f32(numbers[1]), np.zeros(3 * head[PADDED], u8)
    strips, inputs, vectors, across = scales.shape[1], len(x), sums.shape[1] // 16, x.shape[1]
    x_at, sum_at, scale_at = np.intp(x.ctypes.data), np.intp(sums.ctypes.data), np.intp(scales.ctypes.data)
    if inputs == 1:
        for i in range(low, high):
            factors(head, slots, constants, first + i, held, wide, aside)
            made = _row_times(head, planes_of(head, first + i, spare), held, entries, x_at, scale_at)
            out[0, i] = made * unit + _beside(held, unit, bias, sum_at, vectors)
        return
    apart = across + 64  # rows a power of two apart would share the lines of the first cache
    room_, fine, eight = np.zeros(2 * _ROWS * apart + 64, np.uint8), lanes_of(head)[2] > 0, np.zeros(8, f32)
    beside = np.zeros((_ROWS, inputs), f32)
    codes = (np.intp(room_.ctypes.data) + 63) & ~63
    by = codes + _ROWS * apart
    for start in range(low, high, _ROWS):
        count = min(_ROWS, high - start)
        for i in range(count):
            factors(head, slots, constants, first + start + i, held, wide, aside)
            _kept(head, planes_of(head, first + start + i, spare), held, entries, codes + i * apart, by + i * apart)
            for m in range(inputs):
                beside[i, m] = _beside(held, unit, bias, sum_at + 64 * m * vectors, vectors)
        m = 0
        while m + 4 <= inputs:
            for i in range(0, count, 2):  # of an odd number the row after the last is counted and left
                _eight(codes + i * apart, by + i * apart, strips, fine, x_at + m * across, scale_at + 4 * m * strips, apart, eight)
                for r in range(i, min(count, i + 2)):
                    for j in range(4):
                        out[m + j, start + r] = eight[4 * (r - i) + j] * unit + beside[r, m + j]
            m += 4
        while m < inputs:
            for i in range(count):
                a = as_floats(f32(0))
                for k in range(strips):
                    s = as_floats(scales[m, k])
                    at = STRIP * k + i * apart
                    a = _pair(codes + at, x_at + m * across + STRIP * k, by + at, fine, s, a)
                out[m, start + i] = total(a) * unit + beside[i, m]
            m += 1
