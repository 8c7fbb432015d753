"""Compiled loops for ggml's IQ2 and IQ3 quantizers: the entries, signs and scale of every sub-block, one after the other. No fastmath.

The definition they must equal, bit for bit, is ``grid_search`` in ``qformats.quantize.isearch``. All tries of a sub-block are rounded and
summed in SIMD lanes: position first, so that each lane adds in the reference's order. Off the grid, the error of a neighbour is a sum
over its weights of terms that depend only on position and level: those few terms are computed once for a try, the neighbours add them up.

``work`` (float32) and ``whole`` (int32) hold all state at constant offsets, where the compiler sees that nothing overlaps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled
from qformats.loops.positive import positive

__all__ = ["LANES", "LEVEL", "WORKSPACE", "A", "W", "X", "choose8", "mean_square", "nearest_bits", "search", "spread", "weigh"]

Array = np.ndarray[Any, Any]
u8, u64, i32, f32 = np.uint8, np.uint64, np.int32, np.float32

LANES = 32  # tries, at most
X, W, A, _ID, _SCALE, _SUM_X, _SUM_2 = (i * LANES for i in range(7))
_T, _PREFIX, LEVEL = 7 * LANES, 8 * LANES, 12 * LANES  # terms by position and level, sums of the first four, 2 * level + 1
_SPREAD_X, _SPREAD_A = 13 * LANES, 21 * LANES  # weights and roots, repeated for every level, of up to 8 entries
_Q = 29 * LANES  # 2 * level + 1 of position i, try t
_TERMS, _BEST = _Q + 32 * LANES, _Q + 64 * LANES  # error terms by position and level, least errors; of every try
_SUMS = _BEST + LANES  # of the first four terms
WORKSPACE = _SUMS + 81 * LANES
_PLACE = 8 * LANES  # in ``whole``, after the points
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
def _choose4(work: Array, k: int, scale: Any, point: int, starts: Array, offsets: Array) -> Any:
    """The place in ``lists`` of the nearest neighbour of four weights: the first of the least errors."""
    k &= 7  # so that indices are seen to stay in their planes
    for m in range(LANES):
        diff = scale * work[LEVEL + m] - work[_SPREAD_X + k * LANES + m]
        work[_T + m] = work[_SPREAD_A + k * LANES + m] * diff * diff
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
def choose8(work: Array, k: int, scale: Any, point: int, starts: Array, offsets: Array) -> Any:
    """As ``_choose4`` for eight weights of three levels; ``offsets`` name the sum of the first four terms, then the other terms."""
    k &= 7  # so that indices are seen to stay in their planes
    for m in range(LANES):
        diff = scale * work[LEVEL + m] - work[_SPREAD_X + k * LANES + m]
        work[_T + m] = work[_SPREAD_A + k * LANES + m] * diff * diff
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
def _round_tries(work: Array, whole: Array, width: int, per: int, base: int) -> None:
    """Levels of every weight under every try, and the points they make."""
    width, per, top = 16 if width == 16 else 32, 4 if per == 4 else 8, i32(base - 1)
    for k in range(width // per):
        for t in range(LANES):
            whole[k * LANES + t] = i32(0)
        power = i32(1)
        for e in range(per):
            i = k * per + e
            v = work[X + i]
            for t in range(LANES):
                level = nearest_bits(_HALF * (work[_ID + t] * v - _ONE))
                level = level if level > i32(0) else i32(0)
                level = level if level < top else top
                work[_Q + i * LANES + t] = f32(i32(level + level + i32(1)))
                whole[k * LANES + t] = i32(whole[k * LANES + t] + i32(level * power))
            power = i32(power * i32(base))


@compiled
def _sum_tries(work: Array, width: int) -> None:
    width = 16 if width == 16 else 32
    for t in range(LANES):
        work[_SUM_X + t] = _ZERO
        work[_SUM_2 + t] = _ZERO
    for i in range(width):
        w, wx = work[W + i], work[W + i] * work[X + i]
        for t in range(LANES):
            q = work[_Q + i * LANES + t]
            work[_SUM_X + t] += wx * q
            work[_SUM_2 + t] += w * q * q


@compiled
def spread(work: Array, width: int, per: int, base: int) -> None:
    """Each weight and its root of the error weight, once for every level; zeros where lanes are left over."""
    width, per, base = 16 if width == 16 else 32, 4 if per == 4 else 8, 8 if base == 8 else 3
    for k in range(width // per):
        for m in range(LANES):
            i = k * per + m // base
            inside = m < per * base
            i = i if inside else 0
            work[_SPREAD_X + k * LANES + m] = work[X + i]
            work[_SPREAD_A + k * LANES + m] = work[A + i] if inside else _ZERO


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
def _fitted(work: Array, entries: Array, at: int, width: int, per: int, levels: Array, scale: Any) -> Any:
    """Least squares of the scale under the entries at hand; ``scale`` where all error weights are zero."""
    sum_x, sum_2 = _ZERO, _ZERO
    for k in range(width // per):
        for i in range(per):
            w, q = work[W + k * per + i], f32(2 * i32(levels[entries[at + k], i]) + 1)
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
def _prepare(work: Array, width: int, per: int, base: int, numerators: Array) -> None:
    width, reach = 16 if width == 16 else 32, work[_SUM_X]
    for t in range(LANES):
        inverse = numerators[t] / reach
        work[_ID + t] = inverse
        work[_SCALE + t] = _ONE / inverse
    for i in range(width):
        work[A + i] = np.sqrt(work[W + i])
    spread(work, width, per, base)


@compiled
def _odd_levels(work: Array, per: int, base: int) -> None:
    for m in range(LANES):
        work[LEVEL + m] = f32(2 * (m % base) + 1) if m < per * base else _ZERO


@compiled
def _choose(work: Array, k: int, scale: Any, point: int, starts: Array, lists: Array, offsets: Array, per: int) -> Any:
    """The neighbour of a point off the grid."""
    if per == 4:
        return i32(lists[_choose4(work, k, scale, point, starts, offsets)])
    return i32(lists[choose8(work, k, scale, point, starts, offsets)])


@compiled
def _terms(work: Array, k: int, per: int, base: int) -> None:
    """The error terms of group k, by position and level, under every try's scale; with three levels also sums of the first four."""
    k &= 7  # so that indices are seen to stay in their planes
    per, base = 4 if per == 4 else 8, 8 if base == 8 else 3
    for m in range(per * base):
        v, a, value = work[_SPREAD_X + k * LANES + m], work[_SPREAD_A + k * LANES + m], work[LEVEL + m]
        for t in range(LANES):
            diff = work[_SCALE + t] * value - v
            work[_TERMS + m * LANES + t] = a * diff * diff
    if base == 8:
        return
    for m in range(81):
        first, second = _TERMS + m // 27 * LANES, _TERMS + (3 + m // 9 % 3) * LANES
        third, fourth = _TERMS + (6 + m // 3 % 3) * LANES, _TERMS + (9 + m % 3) * LANES
        for t in range(LANES):
            two = work[first + t] + work[second + t]
            work[_SUMS + m * LANES + t] = two + work[third + t] + work[fourth + t]


@compiled
def _compare4(work: Array, whole: Array, first: Any, last: Any, offsets: Array) -> None:
    """The nearest of the neighbours ``first`` … of every try, as if all had the same point: its number less ``first``."""
    for t in range(LANES):
        work[_BEST + t] = _HUGE
        whole[_PLACE + t] = i32(0)
    for j in range(first, last):
        a, b = _TERMS + offsets[j, 0] * LANES, _TERMS + offsets[j, 1] * LANES
        c, d, place = _TERMS + offsets[j, 2] * LANES, _TERMS + offsets[j, 3] * LANES, i32(j - first)
        for t in range(LANES):
            error = work[a + t] + work[b + t] + work[c + t] + work[d + t]
            best = work[_BEST + t]
            whole[_PLACE + t] = place if error < best else whole[_PLACE + t]
            work[_BEST + t] = error if error < best else best


@compiled
def _compare8(work: Array, whole: Array, first: Any, last: Any, offsets: Array) -> None:
    """As ``_compare4`` for eight weights."""
    for t in range(LANES):
        work[_BEST + t] = _HUGE
        whole[_PLACE + t] = i32(0)
    for j in range(first, last):
        a, b, c = _SUMS + offsets[j, 0] * LANES, _TERMS + offsets[j, 1] * LANES, _TERMS + offsets[j, 2] * LANES
        d, e, place = _TERMS + offsets[j, 3] * LANES, _TERMS + offsets[j, 4] * LANES, i32(j - first)
        for t in range(LANES):
            error = work[a + t] + work[b + t] + work[c + t] + work[d + t] + work[e + t]
            best = work[_BEST + t]
            whole[_PLACE + t] = place if error < best else whole[_PLACE + t]
            work[_BEST + t] = error if error < best else best


@compiled
def _enter_tries(work: Array, whole: Array, tries: int, width: int, per: int, base: int, levels: Array, index: Array, starts: Array,
                 lists: Array, offsets: Array) -> None:  # fmt: skip
    """Entries for the points of every try; a neighbour is marked and its levels take the place of the point's.

    Tries of one point share its neighbours: they are compared once, in lanes.
    """
    width, per = 16 if width == 16 else 32, 4 if per == 4 else 8
    for k in range(width // per):
        made, before = False, i32(-1)
        for t in range(tries):
            point = whole[k * LANES + t]
            entry = i32(index[point])
            if entry < 0:
                first: Any = u64(starts[point])
                if point != before:
                    before = point
                    if not made:
                        _terms(work, k, per, base)
                        made = True
                    if per == 4:
                        _compare4(work, whole, first, u64(starts[point + 1]), offsets)
                    else:
                        _compare8(work, whole, first, u64(starts[point + 1]), offsets)
                entry = i32(lists[first + u64(whole[_PLACE + t])])
                for i in range(per):
                    work[_Q + (k * per + i) * LANES + t] = f32(2 * i32(levels[entry, i]) + 1)
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
    work, whole = np.empty(WORKSPACE, f32), np.empty(9 * LANES, i32)
    single, code = np.empty(1, f32), np.empty((1, 32), i32)
    per = 4 if base == 8 else 8
    groups, bytes_of = width // per, width // 8
    _odd_levels(work, per, base)
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
            _prepare(work, width, per, base, numerators)
            _round_tries(work, whole, width, per, base)
            _enter_tries(work, whole, tries, width, per, base, levels, index, starts, lists, offsets)
            _sum_tries(work, width)
            winner, scale = _best_try(work, tries, scale)
            off = redo == 2 or (redo == 1 and winner < 0)
            if winner >= 0:
                for k in range(groups):
                    own[k] = whole[k * LANES + winner]
                    off = off or own[k] >= _OFF
            if off and scale > _ZERO:
                _enter_again(work, own, width, per, base, scale, redo > 0, index, starts, lists, offsets)
                scale = _fitted(work, own, 0, width, per, levels, scale)
            for k in range(groups):
                own[k] &= _OFF - 1
            if scale < _ZERO:
                scale = -scale
                for k in range(bytes_of):
                    own_signs[k] ^= u8(255)
            scales[s, b] = scale
