"""Compiled loops over runs of codes in a row: their range, their relabelling, and the search for offsets that fp16 can hold.

The definitions each must equal are in ``qformats.rewrite`` (``block_range``, ``flip_and_shift``) and ``qformats.reencode``
(``search_offset``); ``translate`` is an indexing, ``common_step`` and ``common_divisor`` are defined in ``qformats.rewrite.whole``.
Arrays are contiguous; codes uint8, one run of columns a row, or int8 viewed as uint8 where only wrap-around matters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = [
    "beside", "common_divisor", "common_step", "multiply", "offset_blocks", "recode", "relabel", "run_range", "search_offset",
    "table_range", "translate", "union",
]  # fmt: skip

u8, i8, i16, i32, i64, u32, u64 = np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint32, np.uint64
f32, f64 = np.float32, np.float64
_PIECE = 8192  # codes in the nearest cache
_BELOW_HALF = u64((1 << 42) - 1)  # the 52 - 10 bits of a float64's fraction that fp16 lacks
_MAX_HALF, _OVER_HALF = f64(65504.0), f64(65520.0)  # the largest fp16, and where rounding to it gives infinity


@compiled
def run_range(codes: Any, low: Any, high: Any) -> None:
    """Smallest and largest of each row of ``codes`` (runs, width) into int16 (runs,)."""
    runs, width = codes.shape
    for b in range(runs):
        smallest = codes[b, 0]
        largest = codes[b, 0]
        for i in range(width):
            c = codes[b, i]
            smallest = min(smallest, c)
            largest = max(largest, c)
        low[b] = i16(smallest)
        high[b] = i16(largest)


@compiled
def relabel(codes: Any, shift: Any, flip: Any) -> None:
    """In place, in bytes, for each row of ``codes`` (runs, width): shift + code, or shift - code where ``flip``.

    ``shift`` int16 (runs,), ``flip`` bool (runs,) or empty. One array only: with a second one for the results the compiler would have
    to expect them to overlap.
    """
    runs, width = codes.shape
    for b in range(runs):
        add, mask = u8(shift[b]), u8(0)
        if flip.shape[0] and flip[b]:
            add, mask = u8(add + u8(1)), u8(255)  # s - c = (s + 1) + ~c
        for i in range(width):
            codes[b, i] = u8(u8(codes[b, i] ^ mask) + add)


@compiled
def multiply(codes: Any, factor: Any) -> None:
    """In place, modulo 256: each row of ``codes`` uint8 (runs, width) times its ``factor``, uint8 (runs,)."""
    for b in range(codes.shape[0]):
        f = factor[b]
        for i in range(codes.shape[1]):
            codes[b, i] = u8(codes[b, i] * f)


@compiled
def translate(codes: Any, table: Any, out: Any) -> None:
    """``out[i] = table[codes[i]]``: ``codes`` uint8 (n,), ``table`` (entries,), of all codes; ``out`` (n,) of its dtype, int8 or uint8."""
    for i in range(len(codes)):
        out[i] = table[codes[i]]


@compiled
def _added(table: Any, add: Any) -> Any:
    made = np.empty(len(table), u8)
    for i in range(len(table)):
        made[i] = u8(table[i] + add)
    return made


@compiled
def _spell_multiplied(codes: Any, table: Any, factor: Any, add: Any, out: Any) -> None:
    """``recode`` of a table of at most 16 numbers, uint8 (runs, width), through its products with every byte."""
    products = np.zeros((256, 16), u8)
    for f in range(256):
        for i in range(len(table)):
            products[f, i] = u8(u8(table[i] * u8(f)) + add)
    for b in range(codes.shape[0]):
        row = products[factor[b]]
        for i in range(codes.shape[1]):
            out[b, i] = row[codes[b, i]]


@compiled
def recode(codes: Any, table: Any, factor: Any, add: Any, width: int, out: Any) -> None:
    """``table[code] * factor + add``, modulo 256, for each run of ``width``: uint8 (n,) to ``out`` (n,), which may be ``codes``.

    ``table`` (entries,), of all codes; ``factor`` (runs,) or empty; ``add`` (runs,), or (1,) for all runs. Under one number to add, a
    small table is multiplied by each factor beforehand.
    """
    if len(add) == 1 and not len(factor):
        translate(codes, _added(table, add[0]), out)
        return
    if len(add) == 1 and len(table) <= 16:
        _spell_multiplied(codes.reshape((len(factor), width)), table, factor, add[0], out.reshape((len(factor), width)))
        return
    runs = len(out) // width
    lines, piece = out.reshape((runs, width)), max(1, _PIECE // width)
    for first in range(0, runs, piece):
        last = min(runs, first + piece)
        line = lines[first:last]
        translate(codes[first * width : last * width], table, out[first * width : last * width])
        for b in range(last - first):
            a, f = add[first + b if len(add) > 1 else 0], factor[first + b] if len(factor) else u8(1)
            for i in range(width):
                line[b, i] = u8(u8(line[b, i] * f) + a)


@compiled
def _small_range(codes: Any, table: Any, low: Any, high: Any) -> None:
    """``table_range`` of at most 16 numbers: the codes of a run as a set of bits, whose ends are looked up by halves."""
    least, most = np.full((2, 256), i8(127)), np.full((2, 256), i8(-128))
    for half in range(2):
        for byte in range(256):
            for i in range(8 * half, min(len(table), 8 * half + 8)):
                if byte >> (i - 8 * half) & 1:
                    least[half, byte], most[half, byte] = min(least[half, byte], table[i]), max(most[half, byte], table[i])
    for b in range(codes.shape[0]):
        seen = u32(0)
        for i in range(codes.shape[1]):
            seen |= u32(u32(1) << u32(codes[b, i]))
        lower, upper = seen & u32(255), (seen >> u32(8)) & u32(255)
        low[b], high[b] = i16(min(least[0, lower], least[1, upper])), i16(max(most[0, lower], most[1, upper]))


@compiled
def table_range(codes: Any, table: Any, width: int, low: Any, high: Any) -> None:
    """Smallest and largest ``table[code]`` of each run of ``width``, int16 (runs,); ``table`` int8 (entries,), of all codes."""
    if len(table) <= 16:
        _small_range(codes.reshape((len(low), width)), table, low, high)
        return
    runs = len(low)
    piece = max(1, _PIECE // width)
    line = np.empty((piece, width), np.int8)
    for first in range(0, runs, piece):
        last = min(runs, first + piece)
        source, target = codes[first * width : last * width], line.reshape(-1)
        translate(source, table, target)
        for b in range(last - first):
            smallest, largest = line[b, 0], line[b, 0]
            for i in range(width):
                smallest = min(smallest, line[b, i])
                largest = max(largest, line[b, i])
            low[first + b], high[first + b] = i16(smallest), i16(largest)


@compiled
def beside(codes: Any, zero: Any, most: Any) -> Any:
    """How many rows of ``codes`` (runs, width) hold another number than ``zero + most`` and ``zero - most``; all int16."""
    bad = 0
    for b in range(codes.shape[0]):
        upper, lower, other = i16(zero[b] + most[b]), i16(zero[b] - most[b]), u8(0)
        for i in range(codes.shape[1]):
            other |= u8((codes[b, i] != upper) & (codes[b, i] != lower))
        bad += other != u8(0)
    return bad


@compiled
def union(codes: Any) -> Any:
    """All bits that any of ``codes`` uint8 (n,) has."""
    seen = u8(0)
    for i in range(len(codes)):
        seen = u8(seen | codes[i])
    return seen


@compiled
def greatest_divisor(a: Any, b: Any) -> Any:
    while b:
        a, b = b, i64(a % b)
    return a


@compiled
def _scaled(value: Any, places: Any) -> Any:
    return math.ldexp(value, places)


@compiled
def common_step(values: Any, step: Any) -> None:
    """For each row of ``values`` float64 (n, count) the largest number of which all are integer multiples, to ``step`` (n,).

    1 where all are zero; NaN where they spread over more than 62 bits or are not finite.
    """
    rows, count = values.shape
    for r in range(rows):
        unit, top, wide = i64(1 << 20), i64(-(1 << 20)), False
        for i in range(count):  # the lowest and the highest bit of any
            if not np.isfinite(values[r, i]):
                wide = True
            elif values[r, i] != f64(0):
                fraction, exponent = math.frexp(abs(values[r, i]))
                whole = i64(fraction * f64(1 << 53))
                low = i64(math.frexp(f64(whole & -whole))[1])
                unit, top = min(unit, i64(exponent + low - 54)), max(top, i64(exponent))
        if wide or top - unit > 62:
            step[r] = np.nan
            continue
        common = i64(0)
        for i in range(count):
            if common == 1:
                break
            common = greatest_divisor(i64(_scaled(abs(values[r, i]), -unit)), common)
        step[r] = _scaled(f64(common), unit) if common else f64(1)


@compiled
def common_divisor(numbers: Any, divisor: Any) -> None:
    """The greatest common divisor of each row of ``numbers`` int64 (n, count), 0 where all are, to ``divisor`` (n,)."""
    rows, count = numbers.shape
    for r in range(rows):
        common = i64(0)
        for i in range(count):
            if common == 1:
                break
            common = greatest_divisor(abs(numbers[r, i]), common)
        divisor[r] = common


@compiled
def _fits_half(value: Any) -> Any:
    """Whether an fp16 number x an integer, exact in float64, is a finite fp16 number.

    It is a multiple of 2^-24, so at most 11 significant bits and the largest fp16 are all there is to check.
    """
    return (f64(value).view(u64) & _BELOW_HALF) == u64(0) and abs(value) <= _MAX_HALF


@compiled
def search_offset(scale: Any, smallest: Any, largest: Any, top: int, chosen: Any, flip: Any, found: Any) -> None:
    """For each block with ``found`` unset, the first step and direction whose ``scale x integer`` fp16 holds.

    ``scale`` float32 holding fp16 values, ``smallest``/``largest`` int16: range of code minus zero point. In order of step 0, 1, …:
    shift (integer ``smallest - step``, legal if >= ``largest - top``), then flip (``largest + step``, legal if <= ``smallest + top``).
    Writes the integer to ``chosen`` (int16), the direction to ``flip`` and sets ``found``.
    """
    for b in range(scale.shape[0]):
        if found[b]:
            continue
        s, low, high = f64(scale[b]), i32(smallest[b]), i32(largest[b])
        for step in range(top - (high - low) + 1):  # beyond, both directions leave the grid
            if _fits_half(s * f64(low - step)):
                chosen[b] = i16(low - step)
                flip[b] = False
                found[b] = True
                break
            if _fits_half(s * f64(high + step)):
                chosen[b] = i16(high + step)
                flip[b] = True
                found[b] = True
                break


@compiled
def offset_blocks(
    scale: Any, zero: Any, low: Any, high: Any, ratio: int, top: int, fits: bool, shift: Any, flip: Any, offset: Any, signed: Any
) -> Any:
    """Relabelling and offset of every block, ``ratio`` blocks a group; returns how many blocks round, overflow, move and flip.

    ``scale`` float32 (n, G) holding fp16 values, ``zero`` int16 (n, G), ``low``/``high`` int16 (n, B) or (n, 0) where code ranges are
    not known. Per group the plain offset, else the mirrored one (both only if all codes ``fits``); per block the search of
    ``search_offset``; else the plain one, which rounds. Writes ``shift`` int16, ``flip`` bool, ``offset`` and ``signed`` (the scale
    with the flip's sign) float32, all (n, B).
    """
    n, blocks = shift.shape
    rounded, wrong, moved, flipped = 0, 0, 0, 0
    for r in range(n):
        for g in range(scale.shape[1]):
            s, z = f64(scale[r, g]), i32(zero[r, g])
            plain = fits and _fits_half(s * f64(-z))
            mirror = fits and not plain and _fits_half(s * f64(top - z))
            for b in range(g * ratio, min(blocks, g * ratio + ratio)):
                down, turned, found = -z, mirror, plain or mirror
                code = top - z if mirror else -z
                if not found and low.shape[1] > 0:
                    down, up = i32(low[r, b]) - z, i32(high[r, b]) - z
                    room = top - (up - down)
                    lower, upper = _fits_half(s * f64(down)), _fits_half(s * f64(up))
                    while not (lower or upper) and room > 0:
                        room, down, up = room - 1, down - 1, up + 1
                        lower, upper = _fits_half(s * f64(down)), _fits_half(s * f64(up))
                    found = room >= 0 and (lower or upper)
                    turned = found and not lower
                    code = (down if lower else up) if found else -z
                add = code + z if turned else -code - z
                made = s * f64(code)
                shift[r, b], flip[r, b] = i16(add), turned
                offset[r, b], signed[r, b] = f32(made), f32(-s) if turned else f32(s)
                rounded += not found
                wrong += not abs(made) < _OVER_HALF
                moved += turned or add != 0
                flipped += turned
    return rounded, wrong, moved, flipped
