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
def _four_dots(w: Any, x: Any, step: Any, vectors: Any, out: Array) -> None:
    """The products of one row with four inputs, ``step`` bytes apart."""
    a = as_floats(f32(0))
    b, c, d = a, a, a
    for i in range(vectors):
        weights = floats_at(w + 64 * i)
        a = fma(weights, floats_at(x + 64 * i), a)
        b = fma(weights, floats_at(x + step + 64 * i), b)
        c = fma(weights, floats_at(x + 2 * step + 64 * i), c)
        d = fma(weights, floats_at(x + 3 * step + 64 * i), d)
    out[0], out[1], out[2], out[3] = total(a), total(b), total(c), total(d)


@compiled
def few(head: Array, slots: Array, constants: Array, x: Array, first: Any, out: Array) -> None:
    """``x`` (M, padded) float32 times rows ``first`` … to ``out`` (M, n); for few inputs."""
    p, bytes_, values = workspace(head)
    four = np.zeros(4, f32)
    inputs, vectors, step = len(x), head[PADDED] // 16, 4 * head[PADDED]
    w, at = np.intp(values[1].ctypes.data), np.intp(x.ctypes.data)
    for i in range(out.shape[1]):
        decode(head, slots, constants, first + i, p, bytes_, values, w)
        m = 0
        while m + 4 <= inputs:
            _four_dots(w, at + m * step, step, vectors, four)
            out[m, i], out[m + 1, i], out[m + 2, i], out[m + 3, i] = four[0], four[1], four[2], four[3]
            m += 4
        while m < inputs:
            out[m, i] = _dot(w, at + m * step, vectors)
            m += 1
