"""Compiled loops that round blocks of 32 float32 weights to ggml's legacy codes. Serial, ``nogil``, no fastmath.

The definitions they must equal, codes and scales bit for bit, are ``_centred``, ``_with_minimum`` and ``_bytes`` in
``qformats.quantize.ggml``. Maxima are taken on the floats' bit patterns, where integer reductions vectorize and float ones may not
be reordered. ``tops``, uint32 (2,), gets the bit patterns of the largest magnitudes in d and m. Trip counts are arguments for the reason
given in ``qformats.loops.ggml``.
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
def _larger(top: Any, value: Any) -> Any:
    """The larger of a magnitude's bit pattern and that of ``value``; a NaN's is above all others."""
    size = u32(f32(value).view(u32) & _MAGNITUDE)
    return size if size > top else top


@compiled
def _finite(value: Any) -> Any:
    return u32(f32(value).view(u32) & _MAGNITUDE) < u32(0x7F800000)


@compiled
def _extreme(x: Array, bits: Array, b: int, width: int) -> Any:
    """The first number of largest magnitude of block ``b``, +0 for a block of zeros."""
    positive, largest = i32(0), u32(0)  # as signed and as unsigned numbers: of the positive and of the negative floats
    for j in range(width):
        v = bits[b, j]
        positive = i32(v) if i32(v) > positive else positive
        largest = v if v > largest else largest
    negative = u32(largest & _MAGNITUDE) if largest > _MAGNITUDE else u32(0)
    if u32(positive) != negative:
        return u32(positive).view(f32) if u32(positive) > negative else u32(largest).view(f32)
    if not negative:
        return f32(0)
    at = 0
    while u32(bits[b, at] & _MAGNITUDE) != negative:
        at += 1
    return x[b, at]


@compiled
def centred(x: Array, bits: Array, codes: Array, d: Array, tops: Array, zero: Any, limit: Any, width: int) -> None:
    """Q4_0 (``zero`` 8, ``limit`` 15) and Q5_0 (16, 31); ``bits`` is ``x`` seen as uint32, ``d`` float32 (B,)."""
    top = u32(0)
    for b in range(x.shape[0]):
        scale = _extreme(x, bits, b, width) / -zero
        d[b], top = scale, _larger(top, scale)
        inverse = f32(1) / scale if scale != f32(0) else f32(0)
        if _finite(inverse):
            add = zero + f32(0.5)
            for j in range(width):
                code = i32(x[b, j] * inverse + add)
                codes[b, j] = u8(code if code < limit else limit)
        else:
            for j in range(width):
                codes[b, j] = u8(0)
    tops[0] = top


@compiled
def minimum(x: Array, bits: Array, codes: Array, d: Array, m: Array, tops: Array, limit: Any, width: int) -> None:
    """Q4_1 (``limit`` 15) and Q5_1 (31); ``bits`` is ``x`` seen as int32, ``d`` and ``m`` float32 (B,)."""
    top, top_m = u32(0), u32(0)
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
        top, top_m = _larger(top, scale), _larger(top_m, smallest)
        inverse = f32(1) / scale if scale != f32(0) else f32(0)
        if _finite(inverse):
            for j in range(width):
                code = i32((x[b, j] - smallest) * inverse + f32(0.5))
                codes[b, j] = u8(code if code < limit else limit)
        else:
            for j in range(width):
                codes[b, j] = u8(0)
    tops[0], tops[1] = top, top_m


@compiled
def eight(x: Array, bits: Array, codes: Array, d: Array, tops: Array, width: int) -> None:
    """Q8_0; ``codes`` int8 (B, 32), ``bits`` is ``x`` seen as uint32."""
    top = u32(0)
    for b in range(x.shape[0]):
        scale = u32(_largest(bits, b, width)).view(f32) / f32(127)
        d[b], top = scale, _larger(top, scale)
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
    tops[0] = top


# type name -> loop over (x, codes, d, m, tops); m is ignored where the type has no minimum
QUANTIZE: dict[str, Callable[[Array, Array, Array, Array, Array], None]] = {
    "q4_0": lambda x, codes, d, m, tops: centred(x, x.view(u32), codes, d, tops, f32(8), i32(15), 32),
    "q4_1": lambda x, codes, d, m, tops: minimum(x, x.view(i32), codes, d, m, tops, i32(15), 32),
    "q5_0": lambda x, codes, d, m, tops: centred(x, x.view(u32), codes, d, tops, f32(16), i32(31), 32),
    "q5_1": lambda x, codes, d, m, tops: minimum(x, x.view(i32), codes, d, m, tops, i32(31), 32),
    "q8_0": lambda x, codes, d, m, tops: eight(x, x.view(u32), codes.view(np.int8), d, tops, 32),
}
