"""Compiled loops that round float32 weights to one bit or three values: Q1_0, Q2_0, TQ1_0, TQ2_0. Serial, ``nogil``, no fastmath.

The definitions they must equal, codes and scales bit for bit, are ``_signs`` and ``_thirds`` in ``qformats.quantize.ternary``. Sums run
in the reference's order, in eight blocks at once because each addition waits for the one before; maxima are taken on the floats' bit
patterns, where integer reductions vectorize; trip counts are arguments for the reason given in ``qformats.loops.ggml``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = ["QUANTIZE"]

Array = np.ndarray[Any, Any]
u8, u32, i32, f32 = np.uint8, np.uint32, np.int32, np.float32

_MAGNITUDE = u32(0x7FFFFFFF)


@compiled
def _sum_of_eight(x: Array, d: Array, b: int, width: int) -> None:
    """The sums of magnitudes of blocks ``b`` … ``b + 7``; the last block stands in for those beyond it."""
    last = x.shape[0] - 1
    b1, b2, b3, b4 = min(b + 1, last), min(b + 2, last), min(b + 3, last), min(b + 4, last)
    b5, b6, b7 = min(b + 5, last), min(b + 6, last), min(b + 7, last)
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = f32(0)
    for i in range(width):
        s0 += abs(x[b, i])
        s1 += abs(x[b1, i])
        s2 += abs(x[b2, i])
        s3 += abs(x[b3, i])
        s4 += abs(x[b4, i])
        s5 += abs(x[b5, i])
        s6 += abs(x[b6, i])
        s7 += abs(x[b7, i])
    count = f32(width)
    d[b], d[b1], d[b2], d[b3] = s0 / count, s1 / count, s2 / count, s3 / count
    d[b4], d[b5], d[b6], d[b7] = s4 / count, s5 / count, s6 / count, s7 / count


@compiled
def signs(x: Array, codes: Array, d: Array, width: int) -> None:
    """Q1_0 of x (B, width) into ``codes`` uint8 (B, width) and ``d`` float32 (B,)."""
    for b in range(0, x.shape[0], 8):
        _sum_of_eight(x, d, b, width)
    for b in range(x.shape[0]):
        for i in range(width):
            codes[b, i] = u8(x[b, i] >= f32(0))


@compiled
def thirds(x: Array, bits: Array, codes: Array, d: Array, overflow: Any, width: int) -> None:
    """Q2_0, TQ1_0, TQ2_0; ``bits`` is ``x`` seen as uint32, ``overflow`` every code of a block where 1 / d is infinite."""
    for b in range(x.shape[0]):
        top = u32(0)
        for i in range(width):
            size = u32(bits[b, i] & _MAGNITUDE)
            top = size if size > top else top
        largest = u32(top).view(f32)
        d[b] = largest
        inverse = f32(1) / largest if top else f32(0)
        if inverse <= f32(3.4028235e38):
            for i in range(width):
                v = x[b, i] * inverse  # -1 … 1, so that rounding half away from zero has three outcomes
                codes[b, i] = u8(i32(1) + i32(v >= f32(0.5)) - i32(v <= f32(-0.5)))
        else:
            for i in range(width):
                codes[b, i] = overflow


# type name -> loop over (x, codes, d)
QUANTIZE: dict[str, Callable[[Array, Array, Array], None]] = {
    "q1_0": lambda x, codes, d: signs(x, codes, d, 128),
    "q2_0": lambda x, codes, d: thirds(x, x.view(u32), codes, d, u8(0), 64),
    "tq1_0": lambda x, codes, d: thirds(x, x.view(u32), codes, d, u8(1), 256),
    "tq2_0": lambda x, codes, d: thirds(x, x.view(u32), codes, d, u8(1), 256),
}
