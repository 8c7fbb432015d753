"""Compiled loops for ggml's IQ2 and IQ3 quantizers: the entries, signs and scale of every sub-block, one after the other. No fastmath.

The definition they must equal, bit for bit, is ``grid_search`` in ``qformats.quantize.isearch``. All tries of a sub-block are rounded and
summed in SIMD lanes: position first, so that each lane adds in the reference's order. Off the grid, the error of a neighbour is a sum
over its weights of terms that depend only on position and level: those few terms are computed once for a try, the neighbours add them up.

``work`` (float32) holds all state of a sub-block at constant offsets; ``lane`` is the first try of a vector, 0 or 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled
from qformats.loops.positive import positive
from qformats.loops.vectors import LANES as VECTOR
from qformats.loops.vectors import load, nearest, root, splat, store, where

__all__ = ["LANES", "LEVEL", "WORKSPACE", "A", "W", "X", "choose8", "mean_square", "nearest_bits", "search", "weigh"]

Array = np.ndarray[Any, Any]
u8, u64, i32, i64, f32 = np.uint8, np.uint64, np.int32, np.int64, np.float32

LANES = 32  # tries, at most: two vectors
X, W, A, _ID, _SCALE, _SUM_X, _SUM_2 = (i * LANES for i in range(7))
_T, _PREFIX, LEVEL = 7 * LANES, 8 * LANES, 12 * LANES  # terms by position and level, sums of the first four, 2 * level + 1
_POINT, _PLACE = 13 * LANES, 21 * LANES  # of every try: the points of up to 8 entries, and which neighbour is the nearest
_Q = 22 * LANES  # 2 * level + 1 of position i, try t
_TERMS, _SUMS = 54 * LANES, 54 * LANES + 32 * VECTOR  # error terms by position and level, sums of the first four; of a vector of tries
WORKSPACE = _SUMS + 81 * VECTOR
_MAGIC, _ZERO, _HALF, _ONE, _HUGE = f32(12582912.0), f32(0), f32(0.5), f32(1), f32(3.4028235e38)
_OFF = 1 << 14  # set in an entry that is a neighbour


@compiled
def nearest_bits(v: Any) -> Any:
    """``ksearch.nearest`` by the bits; a NaN that arithmetic made has only its top mantissa bit set and gives 0."""
    return i32(i32(f32(v + _MAGIC).view(i32) & i32(0x007FFFFF)) - i32(0x00400000))


@compiled
def mean_square(x: Array, s: int, times: Any) -> Any:
    """``times`` the mean square of super-block s."""
    total = _ZERO
    for i in range(256):
        total += x[s, i] * x[s, i]
    return times * total / f32(256)


@compiled
def weigh(x: Array, q: Array, s: int, first: int, width: int, sigma: Any, plain: Any, work: Array) -> None:
    """Weights ``first`` … of super-block s and their error weights into ``work``.

    With importances q: q * sqrt(sigma + x^2); without: plain * sigma + x^2.
    """
    width = 16 if width == 16 else 32
    for i in range(width):
        work[X + i] = x[s, first + i]
    if len(q):
        at = (s * 256 + first) % len(q)
        for i in range(width):
            v = work[X + i]
            work[W + i] = q[at + i] * np.sqrt(sigma + v * v)
    else:
        base = plain * sigma
        for i in range(width):
            v = work[X + i]
            work[W + i] = base + v * v


@compiled
def _take_signs(work: Array, at: int, even: bool) -> int:
    """The sign byte of eight weights, which become magnitudes; ``even`` turns the sign of the least important one to keep parity."""
    sign, flips = 0, 0
    for i in range(8):
        v = work[X + at + i]
        if not v >= _ZERO:
            work[X + at + i] = -v
            sign |= 1 << i
            flips += 1
    if even and flips % 2:
        least, value = 0, _HUGE
        for i in range(8):
            v = work[X + at + i]
            size = work[W + at + i] * v * v
            if size < value or i == 0:
                least, value = i, size
        work[X + at + least] = -work[X + at + least]
        sign ^= 1 << least
    return sign


@compiled
def _own_terms(work: Array, k: int, scale: Any, per: int, base: int) -> None:
    """The error terms of group k, by position and level, under one scale."""
    for i in range(per):
        v, a = work[X + k * per + i], work[A + k * per + i]
        for level in range(base):
            diff = scale * work[LEVEL + level] - v
            work[_T + i * base + level] = a * diff * diff


@compiled
def _choose4(work: Array, k: int, scale: Any, point: int, starts: Array, offsets: Array) -> Any:
    """The place in ``lists`` of the nearest neighbour of four weights: the first of the least errors."""
    _own_terms(work, k, scale, 4, 8)
    first: Any = u64(starts[point])
    last: Any = u64(starts[point + 1])
    best, place = _HUGE, first
    for j in range(first, last):
        error = work[_T + offsets[j, 0]] + work[_T + offsets[j, 1]]
        error = error + work[_T + offsets[j, 2]]
        error = error + work[_T + offsets[j, 3]]
        if error < best:
            best, place = error, j
    return place


@compiled
def choose8(work: Array, k: int, scale: Any, point: Any, starts: Array, offsets: Array) -> Any:
    """As ``_choose4`` for eight weights of three levels; ``offsets`` name the sum of the first four terms, then the other terms."""
    _own_terms(work, k, scale, 8, 3)
    for a in range(3):
        for b in range(3):
            two = work[_T + a] + work[_T + 3 + b]
            for c in range(3):
                three = two + work[_T + 6 + c]
                for d in range(3):
                    work[_PREFIX + 27 * a + 9 * b + 3 * c + d] = three + work[_T + 9 + d]
    first: Any = u64(starts[point])
    last: Any = u64(starts[point + 1])
    best, place = _HUGE, first
    for j in range(first, last):
        error = work[_PREFIX + offsets[j, 0]] + work[_T + offsets[j, 1]]
        error = error + work[_T + offsets[j, 2]]
        error = error + work[_T + offsets[j, 3]]
        error = error + work[_T + offsets[j, 4]]
        if error < best:
            best, place = error, j
    return place


@compiled
def _round_tries(work: Array, tries: int, width: int, per: int, base: int) -> None:
    """Levels of every weight under every try, and the points they make."""
    half, zero, one, top = splat(_HALF), splat(_ZERO), splat(_ONE), splat(f32(base - 1))
    for lane in range(0, tries, VECTOR):
        inverse = load(work, _ID + lane)
        for k in range(width // per):
            point, power = zero, _ONE
            for i in range(k * per, (k + 1) * per):
                level = nearest(half * (inverse * splat(work[X + i]) - one))
                level = where(level > zero, level, zero)
                level = where(level < top, level, top)
                store(work, _Q + i * LANES + lane, level + level + one)
                point, power = point + level * splat(power), power * f32(base)
            store(work, _POINT + k * LANES + lane, point)


@compiled
def _sum_tries(work: Array, tries: int, width: int) -> None:
    for lane in range(0, tries, VECTOR):
        sum_x = sum_2 = splat(_ZERO)
        for i in range(width):
            w, wx, q = splat(work[W + i]), splat(work[W + i] * work[X + i]), load(work, _Q + i * LANES + lane)
            sum_x, sum_2 = sum_x + wx * q, sum_2 + w * q * q
        store(work, _SUM_X + lane, sum_x)
        store(work, _SUM_2 + lane, sum_2)


@compiled
def _point(work: Array, at: int, per: int, base: int, inverse: Any) -> int:
    """The point of one entry's weights under one inverse scale."""
    point, power = 0, 1
    for i in range(at, at + per):
        level = nearest_bits(_HALF * (inverse * work[X + i] - _ONE))
        point += min(max(level, 0), base - 1) * power
        power *= base
    return point


@compiled
def _best_try(work: Array, tries: int, scale: Any) -> tuple[int, Any]:
    """The winning try, -1 for none, and its scale."""
    best, winner = _ZERO, -1
    for t in range(tries):
        sum_x, sum_2 = work[_SUM_X + t], work[_SUM_2 + t]
        if sum_2 > _ZERO and sum_x * sum_x > best * sum_2:
            scale = sum_x / sum_2
            best = scale * sum_x
            winner = t
    return winner, scale


@compiled
def _fitted(work: Array, entries: Array, width: int, per: int, odd: Array, scale: Any) -> Any:
    """Least squares of the scale under the entries at hand; ``scale`` where all error weights are zero."""
    sum_x, sum_2 = _ZERO, _ZERO
    for k in range(width // per):
        for i in range(per):
            w, q = work[W + k * per + i], odd[entries[k], i]
            sum_x += w * work[X + k * per + i] * q
            sum_2 += w * q * q
    return sum_x / sum_2 if sum_2 > _ZERO else scale


@compiled
def _start(work: Array, width: int, by_search: bool, epsilon: Any, highest: Any, tries: Array, single: Array, code: Array) -> Any:
    """The first scale, -1 where the sub-block is all zeros, with the reach of the levels it divides into ``_SUM_X``."""
    largest = work[X]
    for i in range(width):
        largest = work[X + i] if work[X + i] > largest else largest
    if largest < epsilon or largest == _ZERO:
        return -_ONE
    if not by_search:
        work[_SUM_X] = largest
        return largest / highest
    positive(work[X : X + width].reshape(1, width), work[W : W + width].reshape(1, width), tries, i32(4), single, code)
    work[_SUM_X] = single[0] * f32(3)
    return single[0] if work[_SUM_X] > _ZERO else -_ONE


@compiled
def _prepare(work: Array, width: int, tries: int, numerators: Array) -> None:
    """Inverse scales and scales of the tries, roots of the error weights."""
    one, reach = splat(_ONE), splat(work[_SUM_X])
    for lane in range(0, tries, VECTOR):
        inverse = load(numerators, lane) / reach
        store(work, _ID + lane, inverse)
        store(work, _SCALE + lane, one / inverse)
    for i in range(0, width, VECTOR):
        store(work, A + i, root(load(work, W + i)))


@compiled
def _odd_levels(work: Array, levels: Array, base: int) -> Any:
    """2 * level + 1 of every level into ``work``; of every entry (entries, v)."""
    for level in range(base):
        work[LEVEL + level] = f32(2 * level + 1)
    odd = np.empty(levels.shape, f32)
    for entry in range(levels.shape[0]):
        for i in range(levels.shape[1]):
            odd[entry, i] = f32(2 * i32(levels[entry, i]) + 1)
    return odd


@compiled
def _choose(work: Array, k: int, scale: Any, point: int, starts: Array, lists: Array, offsets: Array, per: int) -> Any:
    """The neighbour of a point off the grid."""
    if per == 4:
        return i32(lists[_choose4(work, k, scale, point, starts, offsets)])
    return i32(lists[choose8(work, k, scale, point, starts, offsets)])


@compiled
def _terms(work: Array, k: int, lane: Any, per: int, base: int) -> None:
    """The error terms of group k under the tries ``lane`` …; with three levels also sums of the first four."""
    scale, to = load(work, _SCALE + lane), _TERMS
    for i in range(k * per, (k + 1) * per):
        v, a = splat(work[X + i]), splat(work[A + i])
        for level in range(base):
            diff = scale * splat(work[LEVEL + level]) - v
            store(work, to, a * diff * diff)
            to += VECTOR
    if base == 8:
        return
    to = _SUMS
    for m in range(27):
        first, second, third = _TERMS + m // 9 * VECTOR, _TERMS + (3 + m // 3 % 3) * VECTOR, _TERMS + (6 + m % 3) * VECTOR
        three = load(work, first) + load(work, second) + load(work, third)
        for level in range(3):
            store(work, to, three + load(work, _TERMS + (9 + level) * VECTOR))
            to += VECTOR


@compiled
def _compare4(work: Array, lane: Any, first: Any, last: Any, offsets: Array) -> None:
    """The nearest of the neighbours ``first`` … of the tries ``lane`` …, as if all had the same point: its number less ``first``."""
    best, place, number, one = splat(_HUGE), splat(_ZERO), splat(_ZERO), splat(_ONE)
    for j in range(first, last):
        error = load(work, _TERMS + i64(offsets[j, 0]) * VECTOR) + load(work, _TERMS + i64(offsets[j, 1]) * VECTOR)
        error = error + load(work, _TERMS + i64(offsets[j, 2]) * VECTOR) + load(work, _TERMS + i64(offsets[j, 3]) * VECTOR)
        better = error < best
        best, place, number = where(better, error, best), where(better, number, place), number + one
    store(work, _PLACE + lane, place)


@compiled
def _compare8(work: Array, lane: Any, first: Any, last: Any, offsets: Array) -> None:
    """As ``_compare4`` for eight weights."""
    best, place, number, one = splat(_HUGE), splat(_ZERO), splat(_ZERO), splat(_ONE)
    for j in range(first, last):
        error = load(work, _SUMS + i64(offsets[j, 0]) * VECTOR) + load(work, _TERMS + i64(offsets[j, 1]) * VECTOR)
        error = error + load(work, _TERMS + i64(offsets[j, 2]) * VECTOR) + load(work, _TERMS + i64(offsets[j, 3]) * VECTOR)
        error = error + load(work, _TERMS + i64(offsets[j, 4]) * VECTOR)
        better = error < best
        best, place, number = where(better, error, best), where(better, number, place), number + one
    store(work, _PLACE + lane, place)


@compiled
def _enter_tries(work: Array, whole: Array, tries: int, width: int, per: int, base: int, odd: Array, index: Array, starts: Array,
                 lists: Array, offsets: Array) -> None:  # fmt: skip
    """Entries for the points of every try; a neighbour is marked and its levels take the place of the point's.

    Tries of one point in one vector share its neighbours: they are compared once.
    """
    for k in range(width // per):
        made = before = i32(-1)
        for t in range(tries):
            point, lane = i32(work[_POINT + k * LANES + t]), i32(t & -VECTOR)
            entry = i32(index[point])
            if entry < 0:
                first: Any = u64(starts[point])
                if point != before or lane != made:
                    if lane != made:
                        _terms(work, k, lane, per, base)
                    before, made = point, lane
                    if per == 4:
                        _compare4(work, lane, first, u64(starts[point + 1]), offsets)
                    else:
                        _compare8(work, lane, first, u64(starts[point + 1]), offsets)
                entry = i32(lists[first + u64(work[_PLACE + t])])
                for i in range(per):
                    work[_Q + (k * per + i) * LANES + t] = odd[entry, i]
                entry = i32(entry | i32(_OFF))
            whole[k * LANES + t] = entry


@compiled
def _enter_again(work: Array, codes: Array, width: int, per: int, base: int, scale: Any, every: bool, index: Array, starts: Array,
                 lists: Array, offsets: Array) -> None:  # fmt: skip
    """Entries under the scale found, for ``every`` group or those marked."""
    inverse = _ONE / scale
    for k in range(width // per):
        if every or codes[k] >= _OFF:
            point = _point(work, k * per, per, base, inverse)
            entry = i32(index[point])
            codes[k] = entry if entry >= 0 else _choose(work, k, scale, point, starts, lists, offsets, per)


@compiled
def search(x: Array, q: Array, codes: Array, signs: Array, scales: Array, levels: Array, index: Array, starts: Array, lists: Array,
           offsets: Array, numerators: Array, tries: int, width: int, base: int, even: bool, redo: int, by_search: bool, epsilon: Any,
           mean: Any, plain: Any, more: Array) -> None:  # fmt: skip
    """``grid_search`` of super-blocks x (S, 256): codes int16 (S, 256 / v), signs uint8 (S, 32), scales float32 (S, 256 / width)."""
    work, whole = np.empty(WORKSPACE, f32), np.empty(8 * LANES, i32)
    single, code = np.empty(1, f32), np.empty((1, 32), i32)
    per = 4 if base == 8 else 8
    groups, bytes_of = width // per, width // 8
    odd = _odd_levels(work, levels, base)
    for s in range(x.shape[0]):
        sigma = mean_square(x, s, mean)
        for b in range(256 // width):
            own, own_signs = codes[s, b * groups : (b + 1) * groups], signs[s, b * bytes_of : (b + 1) * bytes_of]
            weigh(x, q, s, b * width, width, sigma, plain, work)
            for k in range(bytes_of):
                own_signs[k] = _take_signs(work, 8 * k, even)
            scale = _start(work, width, by_search, epsilon, f32(2 * base - 1), more, single, code)
            own[:] = 0
            if scale < _ZERO:
                own_signs[:] = 0
                scales[s, b] = _ZERO
                continue
            _prepare(work, width, tries, numerators)
            _round_tries(work, tries, width, per, base)
            _enter_tries(work, whole, tries, width, per, base, odd, index, starts, lists, offsets)
            _sum_tries(work, tries, width)
            winner, scale = _best_try(work, tries, scale)
            off = redo == 2 or (redo == 1 and winner < 0)
            if winner >= 0:
                for k in range(groups):
                    own[k] = whole[k * LANES + winner]
                    off = off or own[k] >= _OFF
            if off and scale > _ZERO:
                _enter_again(work, own, width, per, base, scale, redo > 0, index, starts, lists, offsets)
                scale = _fitted(work, own, width, per, odd, scale)
            for k in range(groups):
                own[k] &= _OFF - 1
            if scale < _ZERO:
                scale = -scale
                for k in range(bytes_of):
                    own_signs[k] ^= u8(255)
            scales[s, b] = scale
