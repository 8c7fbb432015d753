"""Compiled loops over the numbers of two-level scales. Serial, ``nogil``, no fastmath; arrays are contiguous.

The definitions they equal are ``qformats.rewrite.levels.stepped_definition`` (``stepped_codes`` on the numbers that codes stand for)
and ``qformats.reencode.levels.folded_range_definition``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qformats.loops.blocks import greatest_divisor
from qformats.loops.compiled import compiled

__all__ = ["folded_range", "stepped", "stepped_codes"]

Array = np.ndarray[Any, Any]
i16, i32, i64, u64, f64 = np.int16, np.int32, np.int64, np.uint64, np.float64
_FRACTION, _IMPLICIT, _SIZE = u64((1 << 52) - 1), u64(1 << 52), u64((1 << 63) - 1)
_INFINITE, _MOST = u64(2047 << 52), 1 << 15


@compiled
def _place(x: Any) -> Any:
    """The place of the only, or the highest, set bit of an integer below 2^53."""
    return i64(f64(i64(x)).view(u64) >> u64(52)) - i64(1023)


@compiled
def _integers(values: Array, whole: Array) -> Any:
    """``values`` = ± ``whole`` * 2^unit, int64: (unit, bits that they spread over); more than 62 bits where there are none."""
    unit, top = i64(1 << 20), i64(-(1 << 20))
    for i in range(len(values)):
        size = f64(values[i]).view(u64) & _SIZE
        e, m = i64(size >> u64(52)), size & _FRACTION
        if e == i64(2047):
            return 0, 99
        if size:
            m, e = m | (_IMPLICIT if e else u64(0)), max(e, i64(1))
            unit, top = min(unit, e + _place(m & (~m + u64(1)))), max(top, e + _place(m) + i64(1))
    if top < unit:
        whole[:] = 0
        return 0, 0
    if top - unit > 62:
        return 0, 99
    for i in range(len(values)):
        size = f64(values[i]).view(u64) & _SIZE
        e, m = i64(size >> u64(52)), size & _FRACTION
        m, e = m | (_IMPLICIT if e else u64(0)), max(e, i64(1))
        whole[i] = i64(m << u64(e - unit)) if e >= unit else i64(m >> u64(unit - e))
    return unit - 1075, top - unit


@compiled
def _long_row(row: Array, whole: Array, turned: bool, number: Array) -> Any:
    """The step of any numbers, NaN where there is none."""
    unit, bits = _integers(row, whole)
    if bits > 62:
        return f64(np.nan)
    common, most = i64(0), i64(0)
    for i in range(len(row)):
        if common == 1:
            break
        common = greatest_divisor(whole[i], common)
    for i in range(len(row)):
        q = whole[i] // common
        most = max(most, q)
        number[i] = -q if (row[i] < f64(0)) != turned else q
    return f64(math.ldexp(f64(-common if turned else common), unit)) if most <= _MOST else f64(np.nan)


# Of a number whose fraction has three bits, by those bits: which odd numbers up to 15 divide it (bits for 3 5 7 9 11 13 15), and how
# many places there are from its last bit to the third of its fraction.
_DIVIDED = u64(int.from_bytes(bytes((0, 9, 2, 16, 1, 32, 4, 67)), "little"))
_PLACES = u64(int.from_bytes(bytes((3, 0, 1, 0, 2, 0, 1, 0)), "little"))
_THREE = u64((1 << 49) - 1)


@compiled
def _odd(divided: Any) -> Any:
    """The largest odd number up to 15 that divides all."""
    if divided & u64(64):
        return f64(15)
    if divided & u64(8):
        return f64(9)
    if divided & u64(1):
        return f64(3)
    if divided & u64(2):
        return f64(5)
    if divided & u64(4):
        return f64(7)
    return f64(11) if divided & u64(16) else f64(13) if divided & u64(32) else f64(1)


@compiled
def stepped(values: Array, step: Array, number: Array) -> int:
    """Rows of ``values`` float64 (n, count) as ``step`` float64 (n,) times ``number`` int64 (n, count); returns how many are not.

    The step is the largest that divides a row, the size of all numbers where they are equal, and negative where none is positive; a
    row of zeros is 0 times 1. Numbers are up to 2^15. Of numbers of four bits, as the scales of small floats are, it is read off.
    """
    n, count = values.shape
    whole, bits, bad = np.empty(count, i64), values.view(u64), 0
    for r in range(n):
        first, differ, positive, negative = values[r, 0], 0, 0, 0
        low, high, rest, divided = u64(4095), u64(0), u64(0), u64(127)
        for i in range(count):
            x, size = values[r, i], bits[r, i] & _SIZE
            differ += x != first
            positive += x > f64(0)
            negative += x < f64(0)
            three = ((size >> u64(49)) & u64(7)) << u64(3)
            place = (size >> u64(52)) + ((_PLACES >> three) & u64(7))
            low = place if place < low and size else low
            high = size if size > high else high
            rest |= size & _THREE
            divided &= _DIVIDED >> three if size else u64(127)
        if not differ:
            step[r] = f64(0) if first == f64(0) else first
            number[r, :] = 1
            bad += not high < _INFINITE
            continue
        turned = negative > 0 and positive == 0
        if rest or low < u64(100) or high >= _INFINITE:
            step[r] = _long_row(values[r], whole, turned, number[r])
            bad += not np.isfinite(step[r])
            continue
        by = _odd(divided) * u64((low - u64(3)) << u64(52)).view(f64)
        by = -by if turned else by
        for i in range(count):
            number[r, i] = i64(values[r, i] / by)
        step[r] = by
        bad += u64(high).view(f64) / abs(by) > f64(_MOST)
    return bad


@compiled
def _places(book: Array, place: Array, divided: Array, sign: Array) -> None:
    """Of each number of ``book`` what ``stepped`` reads off it: the place of its last bit, its odd divisors, and flags in ``sign``.

    1 is above zero, 2 below, 4 has more bits than four, is too small or not finite.
    """
    for c in range(len(book)):
        x, size = book[c], f64(book[c]).view(u64) & _SIZE
        three = ((size >> u64(49)) & u64(7)) << u64(3)
        place[c] = (size >> u64(52)) + ((_PLACES >> three) & u64(7)) if size else u64(4095)
        divided[c] = (_DIVIDED >> three) & u64(127) if size else u64(127)
        long = size and (size & _THREE or place[c] < u64(100) or size >= _INFINITE)
        sign[c] = (1 if x > f64(0) else 0) | (2 if x < f64(0) else 0) | (4 if long else 0)


@compiled
def stepped_codes(codes: Array, book: Array, step: Array, number: Array) -> int:
    """``stepped`` of ``book[codes]``: uint8 (n, count) of float64 (256,); ``number`` int32."""
    n, count = codes.shape
    place, divided, sign = np.empty(256, u64), np.empty(256, u64), np.empty(256, np.uint8)
    _places(book, place, divided, sign)
    row, numbers, bad = np.empty((1, count), f64), np.empty((1, count), i64), 0
    for r in range(n):
        first, differ, flags, low, by, most = book[codes[r, 0]], 0, np.uint8(0), u64(4095), u64(127), f64(0)
        for i in range(count):
            c = codes[r, i]
            x = book[c]
            differ += x != first
            flags |= sign[c]
            low, by, most = min(low, place[c]), by & divided[c], max(most, abs(x))
        if not differ or flags & np.uint8(4):
            for i in range(count):
                row[0, i] = book[codes[r, i]]
            bad += stepped(row, step[r : r + 1], numbers)
            for i in range(count):
                number[r, i] = i32(numbers[0, i])
            continue
        unit = _odd(by) * u64((low - u64(3)) << u64(52)).view(f64)
        unit = -unit if flags == np.uint8(2) else unit
        for i in range(count):
            number[r, i] = i32(book[codes[r, i]] / unit)
        step[r] = unit
        bad += most / abs(unit) > f64(_MOST)
    return bad


@compiled
def folded_range(low: Array, high: Array, factor: Array, out_low: Array, out_high: Array) -> None:
    """Over each row the smallest ``low * factor`` and the largest ``high * factor``, exchanged where the factor is negative.

    All int16, (n, count) to (n,); products fit.
    """
    for r in range(low.shape[0]):
        smallest, largest = i16(32767), i16(-32768)
        for i in range(low.shape[1]):
            a, b = i16(low[r, i] * factor[r, i]), i16(high[r, i] * factor[r, i])
            smallest, largest = min(smallest, min(a, b)), max(largest, max(a, b))
        out_low[r], out_high[r] = smallest, largest
