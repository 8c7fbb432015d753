"""The compiled product of inputs with exact weights of lowered planes, and the weights that it multiplies with.

Weights are made strip by strip in registers where ``HEAD[STRIPS]`` says so, in word order (``qformats.loops.strips``), else row by row
(``rows.decode``) in the order of columns; inputs lie in the same order. One input is multiplied at once, a few while a row is in cache.
Sums are float32 and their order depends on the shape of the product alone. Definition: ``qformats.kernels.reference.matmul``. What
``head``, ``slots`` and ``constants`` are: ``qformats.loops.rows``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled, inlined
from qformats.loops.factors import factors, group_at, lanes_of, room
from qformats.loops.lanes import as_floats, floats_at, fma, put, total
from qformats.loops.rows import KIND, PADDED, STRIPS, TABLE, decode, workspace
from qformats.loops.strips import STRIP, lanes, planes_of, strip, value, widths_of

__all__ = ["few", "weights"]

Array = np.ndarray[Any, Any]
f32, u8 = np.float32, np.uint8

_ROWS = 4  # decoded before they are multiplied; an even number


@inlined
def _weights(codes: Any, kind: Any, table: Any, p: Any, step: Any, right: Any, left: Any) -> Any:
    """Four vectors of weights from one of bytes; the numbers of its lanes are at ``p``, scale, zero point and offset ``step`` apart."""
    scale, zero, offset = lanes(p, right, left), lanes(p + 2 * step, right, left), lanes(p + 3 * step, right, left)
    a, b = fma(value(codes, 0, kind, table) - zero, scale, offset), fma(value(codes, 1, kind, table) - zero, scale, offset)
    c, d = fma(value(codes, 2, kind, table) - zero, scale, offset), fma(value(codes, 3, kind, table) - zero, scale, offset)
    return a, b, c, d


@compiled
def _row(head: Array, planes: Any, held: Array, target: Any) -> None:
    """The weights of one row in word order to the address ``target``."""
    widths, kind, table, p, step = widths_of(head), head[KIND], head[TABLE], np.intp(held.ctypes.data), 4 * held.shape[1]
    right, left, behind, ahead, every = lanes_of(head)
    for k in range(head[PADDED] // STRIP):
        low, high = strip(widths, planes, k)
        at, to = p + group_at(k, ahead, every), target + 4 * STRIP * k
        a, b, c, d = _weights(low, kind, table, at, step, right, left)
        put(to, a), put(to + 64, b), put(to + 128, c), put(to + 192, d)
        a, b, c, d = _weights(high, kind, table, at + behind, step, right, left)
        put(to + 256, a), put(to + 320, b), put(to + 384, c), put(to + 448, d)


@compiled
def _row_times(head: Array, planes: Any, held: Array, x: Any) -> Any:
    """One row times one input."""
    widths, kind, table, p, step = widths_of(head), head[KIND], head[TABLE], np.intp(held.ctypes.data), 4 * held.shape[1]
    right, left, behind, ahead, every = lanes_of(head)
    s = as_floats(f32(0))
    t, u, v = s, s, s
    for k in range(head[PADDED] // STRIP):
        low, high = strip(widths, planes, k)
        at, by = p + group_at(k, ahead, every), x + 4 * STRIP * k
        a, b, c, d = _weights(low, kind, table, at, step, right, left)
        s, t = fma(a, floats_at(by), s), fma(b, floats_at(by + 64), t)
        u, v = fma(c, floats_at(by + 128), u), fma(d, floats_at(by + 192), v)
        a, b, c, d = _weights(high, kind, table, at + behind, step, right, left)
        s, t = fma(a, floats_at(by + 256), s), fma(b, floats_at(by + 320), t)
        u, v = fma(c, floats_at(by + 384), u), fma(d, floats_at(by + 448), v)
    return total((s + t) + (u + v))


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
def few(head: Array, slots: Array, constants: Array, x: Array, first: Any, out: Array, low: Any, high: Any) -> None:
    """``x`` (M, padded) float32 times rows ``first + low`` … ``first + high`` to ``out[:, low:high]`` (M, n); for few inputs."""
    inputs, vectors, step, strips = len(x), head[PADDED] // 16, 4 * head[PADDED], head[STRIPS]
    p, bytes_, values = workspace(head)
    held, wide, aside = room(head, constants)
    spare, at = np.zeros(3 * head[PADDED], u8), np.intp(x.ctypes.data)
    if inputs == 1 and strips:
        for i in range(low, high):
            factors(head, slots, constants, first + i, held, wide, aside)
            out[0, i] = _row_times(head, planes_of(head, first + i, spare), held, at)
        return
    eight, height = np.zeros(8, f32), 1 if inputs < 4 else _ROWS
    room_ = np.zeros(height * head[PADDED] + 32, f32)
    w = (np.intp(room_.ctypes.data) + 63) & ~63
    for start in range(low, high, height):
        count = min(height, high - start)
        for i in range(count):
            if strips:
                factors(head, slots, constants, first + start + i, held, wide, aside)
                _row(head, planes_of(head, first + start + i, spare), held, w + i * step)
            else:
                decode(head, slots, constants, first + start + i, p, bytes_, values, w + i * step)
        m = 0
        while m + 4 <= inputs:
            for i in range(0, count, 2):  # of an odd number the row after the last is multiplied and left
                _eight(w + i * step, step, at + m * step, step, vectors, eight)
                for r in range(i, min(count, i + 2)):
                    for j in range(4):
                        out[m + j, start + r] = eight[4 * (r - i) + j]
            m += 4
        while m < inputs:
            for i in range(count):
                out[m, start + i] = _dot(w + i * step, at + m * step, vectors)
            m += 1


@compiled
def weights(head: Array, slots: Array, constants: Array, first: Any, out: Array) -> None:
    """The weights of rows ``first``, ``first + 1`` … to ``out`` (n, padded) float32, which holds zeros, in the order of the inputs."""
    held, wide, aside = room(head, constants)
    p, bytes_, values = workspace(head)
    spare, at, step = np.zeros(3 * head[PADDED], u8), np.intp(out.ctypes.data), 4 * head[PADDED]
    for i in range(len(out)):
        if head[STRIPS]:
            factors(head, slots, constants, first + i, held, wide, aside)
            _row(head, planes_of(head, first + i, spare), held, at + i * step)
        else:
            decode(head, slots, constants, first + i, p, bytes_, values, at + i * step)
