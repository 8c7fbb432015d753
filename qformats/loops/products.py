"""The compiled product of inputs with exact weights of lowered planes, and the weights that it multiplies with.

Weights are made strip by strip in registers where a plan's ``strips`` says so, in word order (``qformats.loops.strips``), else row by row
(``rows.decode``) in the order of columns; inputs lie in the same order. One input is multiplied at once, a few while a row is in cache.
Sums are float32 and their order depends on the shape of the product alone. Definition: ``qformats.kernels.reference.matmul``. What
``head``, ``slots`` and ``constants`` are: ``qformats.loops.rows``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from qformats.loops.compiled import compiled, inlined, pointed
from qformats.loops.factors import (
    AHEAD,
    APART,
    BEHIND,
    COUNT_OF_STRIPS,
    ENTRIES_AT,
    EVERY,
    FIRST,
    LEFT,
    NUMBERS,
    RIGHT,
    ROW_FRAME,
    factoring,
    framed,
    group_at,
    room,
)
from qformats.loops.lanes import alive, as_floats, call, floats_at, fma, pointer, put, total
from qformats.loops.rows import PADDED, ROW, TARGET, decoding, workspace
from qformats.loops.strips import STRIP, lanes, planes_of, strip, value

__all__ = ["few", "few_strips", "row", "row_times", "weights", "weights_strips"]

Array = np.ndarray[Any, Any]
f32, u8 = np.float32, np.uint8

_ROWS = 4  # decoded before they are multiplied; an even number


@inlined
def _weights(codes: Any, how: Any, table: Any, p: Any, step: Any, right: Any, left: Any) -> Any:
    """Four vectors of weights from one of bytes; the numbers of its lanes are at ``p``, scale, zero point and offset ``step`` apart."""
    kind, zeros, offsets = how
    scale = lanes(p, right, left)
    a, b, c, d = value(codes, 0, kind, table), value(codes, 1, kind, table), value(codes, 2, kind, table), value(codes, 3, kind, table)
    if zeros:
        zero = lanes(p + 2 * step, right, left)
        a, b, c, d = a - zero, b - zero, c - zero, d - zero
    if offsets:
        offset = lanes(p + 3 * step, right, left)
        a, b, c, d = fma(a, scale, offset), fma(b, scale, offset), fma(c, scale, offset), fma(d, scale, offset)
    else:
        a, b, c, d = a * scale, b * scale, c * scale, d * scale
    return a, b, c, d


@cache
def row_times(widths: tuple[int, int, int], kind: int, zeros: bool, offsets: bool) -> Any:
    """One row times one input in word order, for ``few_strips``; ``zeros``, ``offsets``: whether there are zero points and offsets."""
    first, second, third = widths

    def run(frame: Any) -> Any:
        f = carray(pointer(frame), ROW_FRAME, np.int64)
        planes, p, step, table, x, s = (f[0], f[1], f[2]), f[NUMBERS], f[APART], f[ENTRIES_AT], f[FIRST], as_floats(f32(0))
        right, left, behind, ahead, every = f[RIGHT], f[LEFT], f[BEHIND], f[AHEAD], f[EVERY]
        t, u, v = s, s, s
        for k in range(f[COUNT_OF_STRIPS]):
            low, high = strip((first, second, third), planes, k)
            at, by = p + group_at(k, ahead, every), x + 4 * STRIP * k
            a, b, c, d = _weights(low, (kind, zeros, offsets), table, at, step, right, left)
            s, t = fma(a, floats_at(by), s), fma(b, floats_at(by + 64), t)
            u, v = fma(c, floats_at(by + 128), u), fma(d, floats_at(by + 192), v)
            a, b, c, d = _weights(high, (kind, zeros, offsets), table, at + behind, step, right, left)
            s, t = fma(a, floats_at(by + 256), s), fma(b, floats_at(by + 320), t)
            u, v = fma(c, floats_at(by + 384), u), fma(d, floats_at(by + 448), v)
        return total((s + t) + (u + v))

    return pointed(run)


@cache
def row(widths: tuple[int, int, int], kind: int, zeros: bool, offsets: bool) -> Any:
    """The weights of one row in word order, for ``few_strips`` and ``weights_strips``."""
    first, second, third = widths

    def run(frame: Any) -> Any:
        f = carray(pointer(frame), ROW_FRAME, np.int64)
        planes, p, step, table, target = (f[0], f[1], f[2]), f[NUMBERS], f[APART], f[ENTRIES_AT], f[FIRST]
        right, left, behind, ahead, every = f[RIGHT], f[LEFT], f[BEHIND], f[AHEAD], f[EVERY]
        for k in range(f[COUNT_OF_STRIPS]):
            low, high = strip((first, second, third), planes, k)
            at, to = p + group_at(k, ahead, every), target + 4 * STRIP * k
            a, b, c, d = _weights(low, (kind, zeros, offsets), table, at, step, right, left)
            put(to, a), put(to + 64, b), put(to + 128, c), put(to + 192, d)
            a, b, c, d = _weights(high, (kind, zeros, offsets), table, at + behind, step, right, left)
            put(to + 256, a), put(to + 320, b), put(to + 384, c), put(to + 448, d)
        return f32(0)

    return pointed(run)


@compiled
def _dot(w: Any, x: Any, vectors: Any) -> Any:
    a = as_floats(f32(0))
    b, c, d = a, a, a
    for i in range(0, vectors, 4):
        a = fma(floats_at(w + 64 * i), floats_at(x + 64 * i), a)
        b = fma(floats_at(w + 64 * i + 64), floats_at(x + 64 * i + 64), b)
        c = fma(floats_at(w + 64 * i + 128), floats_at(x + 64 * i + 128), c)
        d = fma(floats_at(w + 64 * i + 192), floats_at(x + 64 * i + 192), d)
    return total((a + b) + (c + d))


@compiled
def _eight(w: Any, row: Any, x: Any, step: Any, vectors: Any, out: Array) -> None:
    """The products of two rows, ``row`` bytes apart, with four inputs, ``step`` bytes apart."""
    a0 = as_floats(f32(0))
    b0, c0, d0, a1, b1, c1, d1 = a0, a0, a0, a0, a0, a0, a0
    for i in range(vectors):
        u, v, at = floats_at(w + 64 * i), floats_at(w + row + 64 * i), x + 64 * i
        one = floats_at(at)
        a0, a1 = fma(u, one, a0), fma(v, one, a1)
        one = floats_at(at + step)
        b0, b1 = fma(u, one, b0), fma(v, one, b1)
        one = floats_at(at + 2 * step)
        c0, c1 = fma(u, one, c0), fma(v, one, c1)
        one = floats_at(at + 3 * step)
        d0, d1 = fma(u, one, d0), fma(v, one, d1)
    out[0], out[1], out[2], out[3] = total(a0), total(b0), total(c0), total(d0)
    out[4], out[5], out[6], out[7] = total(a1), total(b1), total(c1), total(d1)


@compiled
def _times(w: Any, count: Any, step: Any, x: Any, inputs: Any, vectors: Any, eight: Array, start: Any, out: Array) -> None:
    """``count`` rows of weights, ``step`` bytes apart, times all inputs to ``out[:, start:]``; room for an even number of rows."""
    m = 0
    while m + 4 <= inputs:
        for i in range(0, count, 2):  # of an odd number the row after the last is multiplied and left
            _eight(w + i * step, step, x + m * step, step, vectors, eight)
            for r in range(i, min(count, i + 2)):
                for j in range(4):
                    out[m + j, start + r] = eight[4 * (r - i) + j]
        m += 4
    while m < inputs:
        for i in range(count):
            out[m, start + i] = _dot(w + i * step, x + m * step, vectors)
        m += 1


@compiled
def few(
    head: Array, slots: Array, constants: Array, decoder: Any, x: Array, first: Any, out: Array, low: Any, high: Any
) -> None:
    """``x`` (M, padded) float32 times rows ``first + low`` … ``first + high`` to ``out[:, low:high]`` (M, n); for few inputs.

    ``decoder``: the address of ``qformats.loops.rows.decoder``.
    """
    inputs, vectors, step, at = len(x), head[PADDED] // 16, 4 * head[PADDED], np.intp(x.ctypes.data)
    p, bytes_, values = workspace(head)
    frame = decoding(head, slots, constants, p, bytes_, values)
    frame_at = np.intp(frame.ctypes.data)
    eight, height = np.zeros(8, f32), 1 if inputs < 4 else _ROWS
    room_ = np.zeros(height * head[PADDED] + 32, f32)
    w = (np.intp(room_.ctypes.data) + 63) & ~63
    for start in range(low, high, height):
        count = min(height, high - start)
        for i in range(count):
            frame[ROW], frame[TARGET] = first + start + i, w + i * step
            call(decoder, frame_at)
        _times(w, count, step, at, inputs, vectors, eight, start, out)
    alive(room_), alive(p), alive(bytes_), alive(values), alive(frame)


@compiled
def weights(head: Array, slots: Array, constants: Array, decoder: Any, first: Any, out: Array) -> None:
    """The weights of rows ``first``, ``first + 1`` … to ``out`` (n, padded) float32, which holds zeros, columns in their order."""
    p, bytes_, values = workspace(head)
    frame, at, step = decoding(head, slots, constants, p, bytes_, values), np.intp(out.ctypes.data), 4 * head[PADDED]
    frame_at = np.intp(frame.ctypes.data)
    for i in range(len(out)):
        frame[ROW], frame[TARGET] = first + i, at + i * step
        call(decoder, frame_at)
    alive(p), alive(bytes_), alive(values), alive(frame)


@compiled
def few_strips(
    head: Array, slots: Array, constants: Array, gather: Any, made: Any, table: Any, x: Array, first: Any, out: Array, low: Any, high: Any
) -> None:
    """``few`` for codes in strips, ``x`` in word order; ``table``: the address that the codes' values are read from.

    ``gather``: the address of ``qformats.loops.factors.row_factors``; ``made``: that of ``row_times`` for one input, of ``row`` for more.
    """
    inputs, vectors, step = len(x), head[PADDED] // 16, 4 * head[PADDED]
    held, wide, aside = room(head, constants)
    p, numbers = np.intp(held.ctypes.data), factoring(head, slots, constants, held, wide, aside)
    numbers_at = np.intp(numbers.ctypes.data)
    frame, spare, at = framed(head, table, p, 4 * held.shape[1]), np.zeros(3 * head[PADDED], u8), np.intp(x.ctypes.data)
    eight, height, frame_at = np.zeros(8, f32), 1 if inputs < 4 else _ROWS, np.intp(frame.ctypes.data)
    room_ = np.zeros(height * head[PADDED] + 32, f32)
    w = (np.intp(room_.ctypes.data) + 63) & ~63
    for start in range(low, high, height):
        count = min(height, high - start)
        for i in range(count):
            numbers[0] = first + start + i
            call(gather, numbers_at)
            frame[0], frame[1], frame[2] = planes_of(head, first + start + i, spare)
            frame[FIRST] = at if inputs == 1 else w + i * step
            product = call(made, frame_at)
            if inputs == 1:
                out[0, start] = product
        if inputs > 1:
            _times(w, count, step, at, inputs, vectors, eight, start, out)
    alive(held), alive(wide), alive(aside), alive(numbers), alive(frame), alive(room_)


@compiled
def weights_strips(head: Array, slots: Array, constants: Array, gather: Any, made: Any, table: Any, first: Any, out: Array) -> None:
    """``weights`` for codes in strips, in word order; ``made``: the address of ``row``."""
    held, wide, aside = room(head, constants)
    p, numbers = np.intp(held.ctypes.data), factoring(head, slots, constants, held, wide, aside)
    numbers_at = np.intp(numbers.ctypes.data)
    spare, at, step = np.zeros(3 * head[PADDED], u8), np.intp(out.ctypes.data), 4 * head[PADDED]
    frame = framed(head, table, p, 4 * held.shape[1])
    frame_at = np.intp(frame.ctypes.data)
    for i in range(len(out)):
        numbers[0] = first + i
        call(gather, numbers_at)
        frame[0], frame[1], frame[2] = planes_of(head, first + i, spare)
        frame[FIRST] = at + i * step
        call(made, frame_at)
    alive(held), alive(wide), alive(aside), alive(numbers), alive(frame)
