"""Compiled loops that round blocks of 32 float32 weights to ggml's legacy codes. Serial, ``nogil``, no fastmath.

The definitions they must equal, codes and scales bit for bit, are ``_centred``, ``_with_minimum`` and ``_bytes`` in
``qformats.quantize.ggml``. Q8_0 takes maxima on the floats' bit patterns, where integer reductions vectorize; its trip count is an argument
for the reason given in ``qformats.loops.ggml``. ``tops``, uint32 (2,), gets the bit patterns of the largest magnitudes in d and m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qformats.loops.compiled import compiled
from qformats.loops.vectors import LANES, any_lane, greatest, least, load, splat, store_bytes, where

__all__ = ["QUANTIZE", "largest_bits"]

Array = np.ndarray[Any, Any]
u32, i32, f32 = np.uint32, np.int32, np.float32

BLOCK = 32
_MAGNITUDE, _ZERO, _HALF, _NAN = u32(0x7FFFFFFF), f32(0), f32(0.5), f32(np.nan)


@compiled
def largest_bits(bits: Array, b: int, width: int) -> Any:
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
def _ends(x: Array, at: int) -> tuple[Any, Any]:
    """The least and the greatest of 32 numbers; NaN twice if one is, and of zeros either."""
    one, other = load(x, at), load(x, at + LANES)
    if any_lane((one != one) | (other != other)):
        return _NAN, _NAN
    return least(where(one < other, one, other)), greatest(where(one > other, one, other))


@compiled
def _round(x: Array, codes: Array, at: int, low: Any, inverse: Any, add: Any, limit: Any) -> None:
    """Codes of 32 numbers: (x - low) * inverse + add, cut to whole numbers, ``limit`` at most; 0 where ``inverse`` is not finite."""
    if not _finite(inverse):
        low, inverse, add, limit = _ZERO, _ZERO, _ZERO, _ZERO
    bottom, times, more, most = splat(low), splat(inverse), splat(add), splat(limit)
    for i in range(at, at + 2 * LANES, LANES):
        code = (load(x, i) - bottom) * times + more
        store_bytes(codes, i, where(code < most, code, most))


@compiled
def _inverse(scale: Any) -> Any:
    return f32(1) / scale if scale != _ZERO else _ZERO


@compiled
def centred(x: Array, codes: Array, d: Array, tops: Array, zero: Any, limit: Any) -> None:
    """Q4_0 (``zero`` 8, ``limit`` 15) and Q5_0 (16, 31): x float32 and uint8 codes (32 B,), d float32 (B,)."""
    top = u32(0)
    for b in range(len(d)):
        low, high = _ends(x, b * BLOCK)
        extreme = high if high > -low else low
        if high == -low:  # the first of both; +0 for zeros
            at = b * BLOCK
            while abs(x[at]) != high:
                at += 1
            extreme = x[at] if high != _ZERO else _ZERO
        scale = extreme / -zero
        d[b], top = scale, _larger(top, scale)
        _round(x, codes, b * BLOCK, _ZERO, _inverse(scale), zero + _HALF, limit)
    tops[0] = top


@compiled
def minimum(x: Array, codes: Array, d: Array, m: Array, tops: Array, limit: Any) -> None:
    """Q4_1 (``limit`` 15) and Q5_1 (31): x float32 and uint8 codes (32 B,), d and m float32 (B,)."""
    top, top_m = u32(0), u32(0)
    for b in range(len(d)):
        low, high = _ends(x, b * BLOCK)
        if low == _ZERO:  # of several zeros the first one's sign counts
            at = b * BLOCK
            while x[at] != _ZERO:
                at += 1
            low = x[at]
        scale = (high - low + _ZERO) / limit  # of zeros of both signs the difference is +0
        d[b], m[b] = scale, low
        top, top_m = _larger(top, scale), _larger(top_m, low)
        _round(x, codes, b * BLOCK, low, _inverse(scale), _HALF, limit)
    tops[0], tops[1] = top, top_m


@compiled
def eight(x: Array, bits: Array, codes: Array, d: Array, tops: Array, width: int) -> None:
    """Q8_0; ``codes`` int8 (B, 32), ``bits`` is ``x`` seen as uint32."""
    top = u32(0)
    for b in range(x.shape[0]):
        scale = u32(largest_bits(bits, b, width)).view(f32) / f32(127)
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
    "q4_0": lambda x, codes, d, m, tops: centred(x.reshape(-1), codes.reshape(-1), d, tops, f32(8), f32(15)),
    "q4_1": lambda x, codes, d, m, tops: minimum(x.reshape(-1), codes.reshape(-1), d, m, tops, f32(15)),
    "q5_0": lambda x, codes, d, m, tops: centred(x.reshape(-1), codes.reshape(-1), d, tops, f32(16), f32(31)),
    "q5_1": lambda x, codes, d, m, tops: minimum(x.reshape(-1), codes.reshape(-1), d, m, tops, f32(31)),
    "q8_0": lambda x, codes, d, m, tops: eight(x, x.view(u32), codes.view(np.int8), d, tops, BLOCK),
}
