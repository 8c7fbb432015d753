"""Compiled loops that round blocks of 32 float32 weights to ggml's legacy codes. Serial, ``nogil``, no fastmath.

The definitions they must equal, codes and scales bit for bit, are ``_centred``, ``_with_minimum`` and ``_bytes`` in
``qformats.quantize.ggml``. Maxima are taken on the floats' bit patterns, where integer reductions vectorize and float ones may not
be reordered; trip counts are arguments for the reason given in ``qformats.loops.ggml``.
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
def _largest(bits: Array, b: int, width: int) -> Any:
    """The largest magnitude of block ``b`` as a bit pattern."""
    top = u32(0)
    for j in range(width):
        size = u32(bits[b, j] & _MAGNITUDE)
        top = size if size > top else top
    return top


@compiled
def _finite(value: Any) -> Any:
    return u32(f32(value).view(u32) & _MAGNITUDE) < u32(0x7F800000)


@compiled
def centred(x: Array, bits: Array, codes: Array, d: Array, zero: Any, limit: Any, width: int) -> None:
    """Q4_0 (``zero`` 8, ``limit`` 15) and Q5_0 (16, 31); ``bits`` is ``x`` seen as uint32, ``d`` float32 (B,)."""
    for b in range(x.shape[0]):
        top = _largest(bits, b, width)
        extreme = f32(0)
        if top:
            at = 0
            while u32(bits[b, at] & _MAGNITUDE) != top:
                at += 1
            extreme = x[b, at]
        scale = extreme / -zero
        d[b] = scale
        inverse = f32(1) / scale if scale != f32(0) else f32(0)
        if _finite(inverse):
            add = zero + f32(0.5)
            for j in range(width):
                code = i32(x[b, j] * inverse + add)
                codes[b, j] = u8(code if code < limit else limit)
        else:
            for j in range(width):
                codes[b, j] = u8(0)


@compiled
def minimum(x: Array, bits: Array, codes: Array, d: Array, m: Array, limit: Any, width: int) -> None:
    """Q4_1 (``limit`` 15) and Q5_1 (31); ``bits`` is ``x`` seen as int32, ``d`` and ``m`` float32 (B,)."""
    for b in range(x.shape[0]):
        low, high = i32(2147483647), i32(-2147483648)
        for j in range(width):
            v = bits[b, j]
            v = i32(v ^ i32(i32(v >> i32(31)) & i32(0x7FFFFFFF)))  # ordered as the floats are
            low = v if v < low else low
            high = v if v > high else high
        smallest = i32(low ^ i32(i32(low >> i32(31)) & i32(0x7FFFFFFF))).view(f32)
        largest = i32(high ^ i32(i32(high >> i32(31)) & i32(0x7FFFFFFF))).view(f32)
        if smallest == f32(0):  # of several zeros the first one's sign counts
            at = 0
            while x[b, at] != f32(0):
                at += 1
            smallest = x[b, at]
        scale = (largest - smallest) / f32(limit)
        d[b], m[b] = scale, smallest
        inverse = f32(1) / scale if scale != f32(0) else f32(0)
        if _finite(inverse):
            for j in range(width):
                code = i32((x[b, j] - smallest) * inverse + f32(0.5))
                codes[b, j] = u8(code if code < limit else limit)
        else:
            for j in range(width):
                codes[b, j] = u8(0)


@compiled
def eight(x: Array, bits: Array, codes: Array, d: Array, width: int) -> None:
    """Q8_0; ``codes`` int8 (B, 32), ``bits`` is ``x`` seen as uint32."""
    for b in range(x.shape[0]):
        scale = u32(_largest(bits, b, width)).view(f32) / f32(127)
        d[b] = scale
        inverse = f32(1) / scale if scale != f32(0) else f32(0)
        if _finite(inverse):
            for j in range(width):
                v = x[b, j] * inverse
                whole = i32(v)
                rest = v - f32(whole)
                up = i32(1) if rest >= f32(0.5) else i32(0)
                down = i32(1) if rest <= f32(-0.5) else i32(0)
                codes[b, j] = np.int8(whole + up - down)
        else:
            for j in range(width):
                codes[b, j] = np.int8(0)


# type name -> loop over (x, codes, d, m); m is ignored where the type has no minimum
QUANTIZE: dict[str, Callable[[Array, Array, Array, Array], None]] = {
    "q4_0": lambda x, codes, d, m: centred(x, x.view(u32), codes, d, f32(8), i32(15), 32),
    "q4_1": lambda x, codes, d, m: minimum(x, x.view(i32), codes, d, m, i32(15), 32),
    "q5_0": lambda x, codes, d, m: centred(x, x.view(u32), codes, d, f32(16), i32(31), 32),
    "q5_1": lambda x, codes, d, m: minimum(x, x.view(i32), codes, d, m, i32(31), 32),
    "q8_0": lambda x, codes, d, m: eight(x, x.view(u32), codes.view(np.int8), d, 32),
}
