"""Compiled loops that evaluate ``offset + scale * (value(code) - zero)`` on runs of a row. Serial, ``nogil``, no fastmath.

The definitions that they equal are the plain tensor operations of ``qformats.steps`` (``_rounded_rows``, ``_exact_rows``). A row goes
through a line of floats in the nearest cache, one short vectorized loop for each step, so that every combination of steps is served.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = ["BFLOAT16", "FLOAT16", "FLOAT32", "FLOAT64", "exact_rows", "round_line", "rounded_rows"]

Array = np.ndarray[Any, Any]
u8, u16, u32, i32, f32, f64 = np.uint8, np.uint16, np.uint32, np.int32, np.float32, np.float64
FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = 0, 1, 2, 3
"""What is rounded to; float64 by ``exact_rows`` alone."""

_HALF = f32(0.5)
_SIZE, _SIGN = u32(0x7FFFFFFF), u32(0x80000000)
_INFINITY, _LARGE, _SMALL = u32(0x7F800000), u32(0x47800000), u32(0x38800000)  # inf, 2^16, 2^-14


@compiled
def _spell(codes: Array, table: Array, line: Array) -> None:
    """A row's values; an empty table stands for the codes themselves."""
    if len(table) == 0:
        for i in range(len(line)):
            line[i] = codes[i]
    else:
        last = u8(len(table) - 1)  # a power of two: no code leads out of the table
        for i in range(len(line)):
            line[i] = table[u8(codes[i]) & last]


@compiled
def _subtract(groups: Array, plane: Array) -> None:
    for g in range(groups.shape[0]):
        x = plane[g]
        for i in range(groups.shape[1]):
            groups[g, i] -= x


@compiled
def _multiply(groups: Array, plane: Array) -> None:
    for g in range(groups.shape[0]):
        x = plane[g]
        for i in range(groups.shape[1]):
            groups[g, i] *= x


@compiled
def _add(groups: Array, plane: Array) -> None:
    for g in range(groups.shape[0]):
        x = plane[g]
        for i in range(groups.shape[1]):
            groups[g, i] += x


@compiled
def _divide(groups: Array, plane: Array) -> None:
    for g in range(groups.shape[0]):
        x = plane[g]
        for i in range(groups.shape[1]):
            groups[g, i] /= x


@compiled
def _bfloat16(bits: Any) -> Any:
    """The upper half of a float32's bits, rounded to nearest even; a NaN's lower bits are zero."""
    return u32(u32(bits + u32(0x7FFF)) + u32(u32(bits >> u32(16)) & u32(1))) >> u32(16)


@compiled
def _float16(bits: Any) -> Any:
    """A float32's bits as those of a float16, to nearest even: one half added leaves a subnormal at the end of the sum's bits."""
    size = u32(bits & _SIZE)
    small = u32(f32(size.view(f32) + _HALF).view(u32) - u32(0x3F000000))
    usual = u32(u32(u32(size + u32(0xC8000FFF)) + u32(u32(size >> u32(13)) & u32(1))) >> u32(13))
    half = small if size < _SMALL else usual
    half = half if size < _LARGE else u32(0x7C00)
    half = half if size <= _INFINITY else u32(0x7E00)
    return u32(u32(u32(bits >> u32(16)) & u32(0x8000)) | half)


@compiled
def _round_bfloat16(bits: Array) -> None:
    for i in range(len(bits)):
        bits[i] = u32(_bfloat16(bits[i]) << u32(16))


@compiled
def _round_float16(bits: Array) -> None:
    for i in range(len(bits)):
        x = bits[i]
        size = u32(x & _SIZE)
        small = f32(f32(size.view(f32) + _HALF) - _HALF).view(u32)
        usual = u32(u32(u32(size + u32(0x0FFF)) + u32(u32(size >> u32(13)) & u32(1))) & u32(0xFFFFE000))
        usual = usual if usual < _LARGE else _INFINITY
        usual = usual if size <= _INFINITY else u32(0x7FC00000)
        bits[i] = u32(x & _SIGN) | (small if size < _SMALL else usual)


@compiled
def _round(bits: Array, to: int) -> None:
    if to == BFLOAT16:
        _round_bfloat16(bits)
    elif to == FLOAT16:
        _round_float16(bits)


@compiled
def _store(bits: Array, to: int, out: Array) -> None:
    if to == BFLOAT16:
        for i in range(len(bits)):
            out[i] = _bfloat16(bits[i])
    elif to == FLOAT16:
        for i in range(len(bits)):
            out[i] = _float16(bits[i])
    else:
        for i in range(len(bits)):
            out[i] = bits[i]


@compiled
def rounded_rows(
    codes: Array, table: Array, zero: Array, factors: Array, offset: Array, width: int, centred: bool, step: int, to: int, out: Array
) -> None:
    """``codes`` (n, K) of bytes; ``table`` float32 (entries,) or empty; ``zero`` and ``offset`` float32 (n, K / width) or (0, …);
    ``factors`` float32 (count, n, K / width); ``out`` (n, K): uint32 bits of float32, or uint16.

    Every result is rounded to ``step``, except a difference that is exact (``centred`` false), and last to ``to``.
    """
    line = np.empty(codes.shape[1], f32)
    groups, bits = line.reshape((len(line) // width, width)), line.view(u32)
    for row in range(codes.shape[0]):
        _spell(codes[row], table, line)
        if len(zero):
            _subtract(groups, zero[row])
            if centred:
                _round(bits, step)
        for j in range(len(factors)):
            _multiply(groups, factors[j, row])
            if len(offset) or to != step or j + 1 < len(factors):
                _round(bits, step)
        if len(offset):
            _add(groups, offset[row])
            if to != step:
                _round(bits, step)
        _store(bits, to, out[row])


@compiled
def _odd(x: Any) -> Any:
    """A float64 as float32 bits, rounded to odd: one more rounding then goes where a single one would."""
    single = f32(x)
    bits = single.view(u32)
    error = f64(x - f64(single))
    if error != f64(0) and (bits & u32(1)) == u32(0) and u32(bits & _SIZE) < _INFINITY:
        away = (error < f64(0)) == (x < f64(0))
        bits = u32(bits + u32(1)) if away else u32(bits - u32(1))
    return bits


@compiled
def _store_wide(line: Array, to: int, out: Array) -> None:
    if to == BFLOAT16:
        for i in range(len(line)):
            out[i] = _bfloat16(_odd(line[i]))
    elif to == FLOAT16:
        for i in range(len(line)):
            out[i] = _float16(_odd(line[i]))
    elif to == FLOAT64:
        for i in range(len(line)):
            out[i] = line[i]
    else:
        for i in range(len(line)):
            out[i] = f32(line[i]).view(u32)


@compiled
def exact_rows(
    codes: Array, table: Array, zero: Array, factors: Array, divisor: Array, offset: Array, width: int, to: int, out: Array
) -> None:
    """As ``rounded_rows`` with float64 parameters, where no step rounds but perhaps the division; ``out`` may be float64."""
    line = np.empty(codes.shape[1], f64)
    groups = line.reshape((len(line) // width, width))
    for row in range(codes.shape[0]):
        _spell(codes[row], table, line)
        if len(zero):
            _subtract(groups, zero[row])
        for j in range(len(factors)):
            _multiply(groups, factors[j, row])
        if len(divisor):
            _divide(groups, divisor[row])
        if len(offset):
            _add(groups, offset[row])
        _store_wide(line, to, out[row])


_PIECE = 2048  # float64 in the nearest cache


@compiled
def _widened(bits: Array, to: int, wide: Array) -> None:
    """What ``_store_wide`` stored, as float64."""
    if to == BFLOAT16:
        for i in range(len(wide)):
            wide[i] = u32(u32(bits[i]) << u32(16)).view(f32)
    elif to == FLOAT16:
        for i in range(len(wide)):
            h = u32(bits[i])
            sign, size = u32(u32(h & u32(0x8000)) << u32(16)), u32(h & u32(0x7FFF))
            usual = u32(u32(size << u32(13)) + u32(0x38000000))
            usual = usual if size < u32(0x7C00) else u32(usual + u32(0x38000000))
            small = f32(f32(size) * f32(2.0**-24)).view(u32)
            wide[i] = u32(sign | (small if size < u32(0x400) else usual)).view(f32)
    else:
        for i in range(len(wide)):
            wide[i] = u32(bits[i]).view(f32)


@compiled
def round_line(values: Array, to: int, out: Array) -> tuple[int, int]:
    """``values`` float64 (n,) rounded once to the bits ``out`` (uint32 of float32, or uint16); how many of them changed, and are NaN."""
    wide, wrong, none = np.empty(_PIECE, f64), 0, 0
    for first in range(0, len(values), _PIECE):
        line, stored = values[first : first + _PIECE], out[first : first + _PIECE]
        _store_wide(line, to, stored)
        _widened(stored, to, wide[: len(line)])
        for i in range(len(line)):
            wrong += wide[i] != line[i]
            none += line[i] != line[i]
    return wrong, none
