"""The compiled product of a few inputs with exact weights of lowered planes: each row is decoded and multiplied while it is in cache.

Sums are float32 and their order depends on the shape of the product alone. Definition: ``qformats.kernels.reference.matmul``. What
``head``, ``slots`` and ``constants`` are: ``qformats.loops.rows``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled
from qformats.loops.lanes import as_floats, floats_at, fma, total
from qformats.loops.rows import PADDED, decode, workspace

__all__ = ["few"]

Array = np.ndarray[Any, Any]
f32 = np.float32

_ROWS = 4  # decoded before they are multiplied; an even number


@compiled
def _dot(w: Any, x: Any, vectors: Any) -> Any:
    a = as_floats(f32(0))
    b, c, d = a, a, a
    i = 0
    while i + 4 <= vectors:
        a = fma(floats_at(w + 64 * i), floats_at(x + 64 * i), a)
        b = fma(floats_at(w + 64 * i + 64), floats_at(x + 64 * i + 64), b)
        c = fma(floats_at(w + 64 * i + 128), floats_at(x + 64 * i + 128), c)
        d = fma(floats_at(w + 64 * i + 192), floats_at(x + 64 * i + 192), d)
        i += 4
    while i < vectors:
        a = fma(floats_at(w + 64 * i), floats_at(x + 64 * i), a)
        i += 1
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
    p, bytes_, values = workspace(head)
    eight, inputs, vectors, step = np.zeros(8, f32), len(x), head[PADDED] // 16, 4 * head[PADDED]
    height = 1 if inputs < 4 else _ROWS
    held = np.zeros(height * head[PADDED] + 32, f32)
    w, at = (np.intp(held.ctypes.data) + 63) & ~63, np.intp(x.ctypes.data)
    for start in range(low, high, height):
        count = min(height, high - start)
        for i in range(count):
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
