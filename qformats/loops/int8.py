"""Compiled products of bytes: inputs rounded to int8 in blocks of 128 columns, times the integers that codes stand for.

Integer products of a few columns are summed exactly; each sum is scaled in float32. With ``value = scale (byte - zero) + offset`` a row's
product is the scaled sum of bytes times inputs plus, for each group, ``offset - zero scale`` times the sum of its inputs, which is made
once for all rows. Codes and inputs lie in strips (``qformats.loops.strips``), a strip being a block. The definition is
``qformats.kernels.cpu.rounded_inputs`` followed by the exact product. What ``head``, ``slots`` and ``constants`` are:
``qformats.loops.rows``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from qformats.loops.compiled import compiled, inlined, pointed
from qformats.loops.factors import (
    AHEAD,
    BEHIND,
    COUNT_OF_STRIPS,
    ENTRIES_AT,
    EVERY,
    FIRST,
    LEFT,
    NUMBERS,
    RIGHT,
    ROW_FRAME,
    SECOND,
    factoring,
    framed,
    group_at,
    room,
)
from qformats.loops.lanes import alive, as_floats, call, floats_at, fma, pointer, put, total
from qformats.loops.rows import PADDED, SIGNED, SIXTEEN
from qformats.loops.strips import STRIP, bytes_at, dot, dots, flip, keep, lanes, names_of, paired, planes_of, strip

__all__ = ["BLOCK", "kept", "multiply", "quantize", "row_times"]

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


@inlined
def _beside(p: Any, step: Any, unit: Any, bias: Any, sums: Any, vectors: Any) -> Any:
    """What the groups' sums of one input add, by the numbers that ``factors`` made of a row."""
    a = as_floats(f32(0))
    shift = as_floats(f32(bias * unit))
    for at in range(0, 64 * vectors, 64):
        rest = fma(as_floats(f32(0)) - floats_at(p + 2 * step + at) - shift, floats_at(p + at), floats_at(p + 3 * step + at))
        a = fma(rest, floats_at(sums + at), a)
    return total(a)


@cache
def row_times(widths: tuple[int, int, int], kind: int, fine: bool) -> Any:
    """The bytes of one row times those of one input, scaled; ``fine``: the two vectors of a strip have groups of their own."""
    first, second, third = widths

    def run(frame: Any) -> Any:
        f = carray(pointer(frame), ROW_FRAME, np.int64)
        planes, p, table, q, scales, s = (f[0], f[1], f[2]), f[NUMBERS], f[ENTRIES_AT], f[FIRST], f[SECOND], as_floats(f32(0))
        right, left, behind, ahead, every = f[RIGHT], f[LEFT], f[BEHIND], f[AHEAD], f[EVERY]
        for k in range(f[COUNT_OF_STRIPS]):
            a, b = strip((first, second, third), planes, k)
            a, b = _unsigned(a, b, kind, table)
            at, x, by = p + group_at(k, ahead, every), q + STRIP * k, as_floats(carray(pointer(scales + 4 * k), 1, f32)[0])
            if fine:
                s = fma(fma(dot(b, x + 64), lanes(at + behind, right, left), dot(a, x) * lanes(at, right, left)), by, s)
            else:
                s = fma(dots(a, b, x), lanes(at, right, left) * by, s)
        return total(s)

    return pointed(run)


@cache
def kept(widths: tuple[int, int, int], kind: int) -> Any:
    """The bytes of one row and the scales of their lanes, one or two vectors of a strip."""
    first, second, third = widths

    def run(frame: Any) -> Any:
        f = carray(pointer(frame), ROW_FRAME, np.int64)
        planes, p, table, codes, by = (f[0], f[1], f[2]), f[NUMBERS], f[ENTRIES_AT], f[FIRST], f[SECOND]
        right, left, behind, ahead, every = f[RIGHT], f[LEFT], f[BEHIND], f[AHEAD], f[EVERY]
        for k in range(f[COUNT_OF_STRIPS]):
            a, b = strip((first, second, third), planes, k)
            a, b = _unsigned(a, b, kind, table)
            keep(codes + STRIP * k, a), keep(codes + STRIP * k + 64, b)
            at = p + group_at(k, ahead, every)
            put(by + STRIP * k, lanes(at, right, left)), put(by + STRIP * k + 64, lanes(at + behind, right, left))
        return f32(0)

    return pointed(run)


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
def _block(
    codes: Any, by: Any, apart: Any, count: Any, strips: Any, fine: Any, x: Any, across: Any, scales: Any, unit: Any, beside: Array,
    eight: Array, start: Any, out: Array,
) -> None:  # fmt: skip
    """``count`` rows of bytes, with the scales of their lanes, times all inputs."""
    m, inputs = 0, len(out)
    while m + 4 <= inputs:
        for i in range(0, count, 2):  # of an odd number the row after the last is counted and left
            _eight(codes + i * apart, by + i * apart, strips, fine, x + m * across, scales + 4 * m * strips, apart, eight)
            for r in range(i, min(count, i + 2)):
                for j in range(4):
                    out[m + j, start + r] = eight[4 * (r - i) + j] * unit + beside[r, m + j]
        m += 4
    while m < inputs:
        for i in range(count):
            a = as_floats(f32(0))
            for k in range(strips):
                s = as_floats(carray(pointer(scales + 4 * (m * strips + k)), 1, f32)[0])
                at = STRIP * k + i * apart
                a = _pair(codes + at, x + m * across + STRIP * k, by + at, fine, s, a)
            out[m, start + i] = total(a) * unit + beside[i, m]
        m += 1


@compiled
def multiply(
    head: Array, slots: Array, constants: Array, gather: Any, made: Any, table: Array, numbers: Array, x: Array, scales: Array, sums: Array,
    first: Any, out: Array, low: Any, high: Any,
) -> None:  # fmt: skip
    """What ``quantize`` made of the inputs times rows ``first + low`` … ``first + high`` to ``out[:, low:high]`` (M, n) float32.

    ``gather``: the address of ``qformats.loops.factors.row_factors``; ``made``: that of ``row_times`` for one input, of ``kept`` for more.
    ``table``: bytes of sixteen codes; ``numbers``: what a byte counts, and what is taken off it. ``sums`` (M, groups up to a whole vector).
    """
    held, wide, aside = room(head, constants)
    p, step, given = np.intp(held.ctypes.data), 4 * held.shape[1], factoring(head, slots, constants, held, wide, aside)
    given_at = np.intp(given.ctypes.data)
    unit, bias, spare = f32(numbers[0]), f32(numbers[1]), np.zeros(3 * head[PADDED], u8)
    strips, inputs, vectors, across = scales.shape[1], len(x), sums.shape[1] // 16, x.shape[1]
    x_at, sum_at, scale_at = np.intp(x.ctypes.data), np.intp(sums.ctypes.data), np.intp(scales.ctypes.data)
    apart = across + 64  # rows a power of two apart would share the lines of the first cache
    room_, eight = np.zeros(2 * _ROWS * apart + 64 if inputs > 1 else 64, np.uint8), np.zeros(8, f32)
    beside, frame = np.zeros((_ROWS, inputs), f32), framed(head, np.intp(table.ctypes.data), p, step)
    codes = (np.intp(room_.ctypes.data) + 63) & ~63
    by, frame_at = codes + _ROWS * apart, np.intp(frame.ctypes.data)
    frame[FIRST], frame[SECOND] = x_at, scale_at
    for start in range(low, high, _ROWS):
        count = min(_ROWS, high - start)
        for i in range(count):
            given[0] = first + start + i
            call(gather, given_at)
            frame[0], frame[1], frame[2] = planes_of(head, first + start + i, spare)
            if inputs > 1:
                frame[FIRST], frame[SECOND] = codes + i * apart, by + i * apart
            product = call(made, frame_at)
            for m in range(inputs):
                beside[i, m] = _beside(p, step, unit, bias, sum_at + 64 * m * vectors, vectors)
            if inputs == 1:
                out[0, start + i] = product * unit + beside[i, 0]
        if inputs > 1:
            _block(codes, by, apart, count, strips, frame[BEHIND] > 0, x_at, across, scale_at, unit, beside, eight, start, out)
    alive(held), alive(wide), alive(aside), alive(given), alive(room_), alive(frame)
