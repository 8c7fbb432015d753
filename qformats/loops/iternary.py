"""Compiled loops for ggml's IQ1 quantizers: sixteen sub-blocks at a time, one in each lane of a vector. No fastmath.

The definition they must equal, bit for bit, is ``ternary_search`` in ``qformats.quantize.iternary``. Ranks, sums and all splits are made
in lanes, each in the reference's order; then each lane gets its entries by itself. A last group that does not fill the lanes repeats its
last sub-block.

``work`` holds one sub-block as in ``iquantize``, ``lanes`` the group: rows of one number for each lane.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled
from qformats.loops.iquantize import LEVEL, WORKSPACE, A, W, X, choose8, mean_square, weigh
from qformats.loops.vectors import LANES, any_lane, load, magnitude, splat, store, where

__all__ = ["refit", "search"]

Array = np.ndarray[Any, Any]
i32, i64, f32 = np.int32, np.int64, np.float32

# Rows of ``lanes``: weights, error weights, ranks; sums before each place (of a second half beside those of the first), their products
# that every split needs again; of each sub-block the split (i1, i2, choice), scale and points.
_X, _W, _RANK = (32 * i * LANES for i in range(3))
_SX, _SW, _SX2, _SW2 = ((96 + 33 * i) * LANES for i in range(4))
_LAST = tuple((228 + 33 * i) * LANES for i in range(4))
_I1, _I2, _CHOICE, _SCALE, _POINT = ((360 + i) * LANES for i in range(5))
_LANES_ROOM = 368 * LANES
_ZERO, _ONE, _LOWEST = f32(0), f32(1), f32(-3.4028235e38)
_EIGHTH, _P0, _P2 = f32(0.125), f32(-0.875), f32(1.125)
_BETWEEN, _OVER = f32(0.75), f32(1.25)


@compiled
def _take(x: Array, q: Array, first: int, last: int, width: int, mean: Any, work: Array, lanes: Array) -> None:
    """Sub-blocks ``first`` …, at most ``last``, with their error weights into lanes."""
    sigma, before, subs = _ZERO, -1, 256 // width
    for j in range(LANES):
        n = min(first + j, last)
        s = n // subs
        if s != before:
            sigma, before = mean_square(x, s, mean), s
        weigh(x, q, s, n % subs * width, width, sigma, _ZERO, work)
        for i in range(width):
            lanes[_X + i * LANES + j] = work[X + i]
            lanes[_W + i * LANES + j] = work[W + i]


@compiled
def _rank(lanes: Array, width: int) -> None:
    """The place of every weight in ascending order, equal ones as they stand."""
    zero, one = splat(_ZERO), splat(_ONE)
    for i in range(width):
        v, rank = load(lanes, _X + i * LANES), zero
        for k in range(i):
            rank = rank + where(load(lanes, _X + k * LANES) <= v, one, zero)
        for k in range(i + 1, width):
            rank = rank + where(load(lanes, _X + k * LANES) < v, one, zero)
        store(lanes, _RANK + i * LANES, rank)


@compiled
def _sum_up(lanes: Array, width: int, halves: bool) -> None:
    """Sums of w x and w before each place; of the two halves where they have bits of their own."""
    for i in range(width):
        second = halves and i >= width // 2
        for j in range(LANES):
            w = lanes[_W + i * LANES + j]
            wx = w * lanes[_X + i * LANES + j]
            to = (i64(lanes[_RANK + i * LANES + j]) + 1) * LANES + j
            lanes[_SX + to] = _ZERO if second else wx
            lanes[_SW + to] = _ZERO if second else w
            if halves:
                lanes[_SX2 + to] = wx if second else _ZERO
                lanes[_SW2 + to] = w if second else _ZERO
    for plane in range(4 if halves else 2):
        start, total = _SX + plane * 33 * LANES, splat(_ZERO)
        store(lanes, start, total)
        for i in range(1, width + 1):
            total = total + load(lanes, start + i * LANES)
            store(lanes, start + i * LANES, total)


@compiled
def _is_better(sum_x: Any, sum_2: Any, best: Any) -> Any:
    return (sum_2 > splat(_ZERO)) & (sum_x * sum_x > best * sum_2)


@compiled
def _keep(lanes: Array, i1: int, i2: int, choice: int, sum_x: Any, sum_2: Any, best: Any) -> Any:
    """The best score after one candidate, which is kept in the lanes where it is better."""
    better = _is_better(sum_x, sum_2, best)
    scale = sum_x / sum_2
    store(lanes, _SCALE, where(better, scale, load(lanes, _SCALE)))
    store(lanes, _I1, where(better, splat(f32(i1)), load(lanes, _I1)))
    store(lanes, _I2, where(better, splat(f32(i2)), load(lanes, _I2)))
    store(lanes, _CHOICE, where(better, splat(f32(choice)), load(lanes, _CHOICE)))
    return where(better, scale * sum_x, best)


@compiled
def _split_whole(lanes: Array) -> None:
    """The best split of 32 weights under one bit."""
    p0, p2, eighth, best = splat(_P0), splat(_P2), splat(_EIGHTH), splat(_LOWEST)
    all_x, all_w = load(lanes, _SX + 32 * LANES), load(lanes, _SW + 32 * LANES)
    for i2 in range(33):
        last_x, last_w = all_x - load(lanes, _SX + i2 * LANES), all_w - load(lanes, _SW + i2 * LANES)
        store(lanes, _LAST[0] + i2 * LANES, last_x * p2)
        store(lanes, _LAST[1] + i2 * LANES, last_x * splat(-_P0))
        store(lanes, _LAST[2] + i2 * LANES, last_w * p2 * p2)
        store(lanes, _LAST[3] + i2 * LANES, last_w * p0 * p0)
    for i1 in range(33):
        sx, sw = load(lanes, _SX + i1 * LANES), load(lanes, _SW + i1 * LANES)
        x_plus, x_minus, w_plus, w_minus = sx * p0, sx * splat(-_P2), sw * p0 * p0, sw * p2 * p2
        for i2 in range(i1, 33):
            at = i2 * LANES
            middle, centre = (load(lanes, _SX + at) - sx) * eighth, (load(lanes, _SW + at) - sw) * eighth * eighth
            plus_x, plus_2 = x_plus + middle + load(lanes, _LAST[0] + at), w_plus + centre + load(lanes, _LAST[2] + at)
            minus_x, minus_2 = x_minus - middle + load(lanes, _LAST[1] + at), w_minus + centre + load(lanes, _LAST[3] + at)
            if any_lane(_is_better(plus_x, plus_2, best) | _is_better(minus_x, minus_2, best)):
                best = _keep(lanes, i1, i2, 0, plus_x, plus_2, best)
                best = _keep(lanes, i1, i2, 1, minus_x, minus_2, best)


@compiled
def _split_halves(lanes: Array) -> None:
    """The best split of 16 weights under the bits of either half."""
    p0, p2, between, over, best = splat(_P0), splat(_P2), splat(_BETWEEN), splat(_OVER), splat(_LOWEST)
    all_x1, all_w1 = load(lanes, _SX + 16 * LANES), load(lanes, _SW + 16 * LANES)
    all_x2, all_w2 = load(lanes, _SX2 + 16 * LANES), load(lanes, _SW2 + 16 * LANES)
    x_plus1, x_minus1, x_plus2, x_minus2 = all_x1 * p2, all_x1 * splat(-_P0), all_x2 * p2, all_x2 * splat(-_P0)
    for i2 in range(17):
        w1, w2 = load(lanes, _SW + i2 * LANES), load(lanes, _SW2 + i2 * LANES)
        store(lanes, _LAST[0] + i2 * LANES, w1 * over)
        store(lanes, _LAST[1] + i2 * LANES, w1 * between)
        store(lanes, _LAST[2] + i2 * LANES, w2 * over)
        store(lanes, _LAST[3] + i2 * LANES, w2 * between)
    for i1 in range(17):
        x1, w1 = load(lanes, _SX + i1 * LANES), load(lanes, _SW + i1 * LANES)
        x2, w2 = load(lanes, _SX2 + i1 * LANES), load(lanes, _SW2 + i1 * LANES)
        w_plus1, w_minus1 = all_w1 * p2 * p2 + w1 * between, all_w1 * p0 * p0 + w1 * over
        w_plus2, w_minus2 = all_w2 * p2 * p2 + w2 * between, all_w2 * p0 * p0 + w2 * over
        for i2 in range(i1, 17):
            at = i2 * LANES
            between1, between2 = x1 + load(lanes, _SX + at), x2 + load(lanes, _SX2 + at)
            px1, mx1, px2, mx2 = x_plus1 - between1, x_minus1 - between1, x_plus2 - between2, x_minus2 - between2
            pw1, mw1 = w_plus1 - load(lanes, _LAST[0] + at), w_minus1 - load(lanes, _LAST[1] + at)
            pw2, mw2 = w_plus2 - load(lanes, _LAST[2] + at), w_minus2 - load(lanes, _LAST[3] + at)
            first = _is_better(px1 + px2, pw1 + pw2, best) | _is_better(px1 + mx2, pw1 + mw2, best)
            if any_lane(first | _is_better(mx1 + px2, mw1 + pw2, best) | _is_better(mx1 + mx2, mw1 + mw2, best)):
                best = _keep(lanes, i1, i2, 0, px1 + px2, pw1 + pw2, best)
                best = _keep(lanes, i1, i2, 1, px1 + mx2, pw1 + mw2, best)
                best = _keep(lanes, i1, i2, 2, mx1 + px2, mw1 + pw2, best)
                best = _keep(lanes, i1, i2, 3, mx1 + mx2, mw1 + mw2, best)


@compiled
def _split(lanes: Array, width: int, halves: bool, epsilon: Any) -> None:
    """Splits with i1 = -1 where a sub-block is all zeros or has none, scales that are not negative, and points."""
    zero, one, two, largest = splat(_ZERO), splat(_ONE), splat(f32(2)), splat(_ZERO)
    for i in range(width):
        size = magnitude(load(lanes, _X + i * LANES))
        largest = where(size > largest, size, largest)
    store(lanes, _I1, zero - one)
    for row in (_I2, _CHOICE, _SCALE):
        store(lanes, row, zero)
    if halves:
        _split_halves(lanes)
    else:
        _split_whole(lanes)
    i1, i2, scale, choice = load(lanes, _I1), load(lanes, _I2), load(lanes, _SCALE), load(lanes, _CHOICE)
    negative = scale < zero
    store(lanes, _SCALE, magnitude(scale))
    store(lanes, _CHOICE, where(negative, splat(f32(3 if halves else 1)) - choice, choice))
    store(lanes, _I1, where(largest < splat(epsilon), zero - one, i1))
    for k in range(width // 8):
        point, power = zero, _ONE
        for i in range(8 * k, 8 * k + 8):
            rank = load(lanes, _RANK + i * LANES)
            level = where(rank < i1, zero, where(rank < i2, one, two))
            point = point + where(negative, two - level, level) * splat(power)
            power *= f32(3)
        store(lanes, _POINT + k * LANES, point)


@compiled
def _value_levels(work: Array, bit: int) -> None:
    """The values of three levels under a bit."""
    add = -_EIGHTH if bit else _EIGHTH
    for level in range(3):
        work[LEVEL + level] = f32(level - 1) + add


@compiled
def _fitted(work: Array, codes: Array, bits: Array, groups: int, levels: Array, scale: Any) -> Any:
    sum_x, sum_2 = _ZERO, _ZERO
    for k in range(groups):
        add = -_EIGHTH if bits[k % len(bits)] else _EIGHTH
        for i in range(8):
            w, q = work[W + 8 * k + i], f32(i32(levels[codes[k], i]) - 1) + add
            sum_x += w * q * work[X + 8 * k + i]
            sum_2 += w * q * q
    return sum_x / sum_2 if sum_x > _ZERO and sum_2 > _ZERO else scale


@compiled
def _enter(work: Array, lanes: Array, j: int, codes: Array, bits: Array, width: int, levels: Array, index: Array, starts: Array,
           lists: Array, offsets: Array) -> Any:  # fmt: skip
    """Entries of the points of lane ``j``, and the scale fitted to them where one is a neighbour."""
    off, scale = False, lanes[_SCALE + j]
    for k in range(width // 8):
        point = i32(lanes[_POINT + k * LANES + j])
        entry = i32(index[point])
        if entry < 0:
            if not off:
                for i in range(width):
                    work[X + i], work[W + i] = lanes[_X + i * LANES + j], lanes[_W + i * LANES + j]
                    work[A + i] = work[W + i]
                off = True
            _value_levels(work, bits[k % len(bits)])
            entry = i32(lists[choose8(work, k, scale, point, starts, offsets)])
        codes[k] = entry
    return _fitted(work, codes, bits, width // 8, levels, scale) if off else scale


@compiled
def search(x: Array, q: Array, codes: Array, bits: Array, scales: Array, levels: Array, index: Array, starts: Array, lists: Array,
           offsets: Array, width: int, halves: bool, epsilon: Any, mean: Any) -> None:  # fmt: skip
    """``ternary_search`` of super-blocks x (S, 256): codes int16 (S, 32), bits uint8 (S, 8 or 32), scales float32 (S, 256 / width)."""
    work, lanes = np.zeros(WORKSPACE, f32), np.zeros(_LANES_ROOM, f32)
    groups, flags, subs = width // 8, 2 if halves else 1, 256 // width
    count = x.shape[0] * subs
    codes[:] = 0
    bits[:] = 0
    scales[:] = _ZERO
    for first in range(0, count, LANES):
        _take(x, q, first, count - 1, width, mean, work, lanes)
        _rank(lanes, width)
        _sum_up(lanes, width, halves)
        _split(lanes, width, halves, epsilon)
        for j in range(min(LANES, count - first)):
            if lanes[_I1 + j] < _ZERO:
                continue
            s, b, choice = (first + j) // subs, (first + j) % subs, i32(lanes[_CHOICE + j])
            own, own_bits = codes[s, b * groups : (b + 1) * groups], bits[s, b * flags : (b + 1) * flags]
            own_bits[0] = choice >> 1 if halves else choice
            if halves:
                own_bits[1] = choice & 1
            scales[s, b] = _enter(work, lanes, j, own, own_bits, width, levels, index, starts, lists, offsets)


@compiled
def refit(x: Array, q: Array, codes: Array, bits: Array, small: Array, d: Array, levels: Array, mean: Any) -> None:
    """``refitted`` of ``qformats.quantize.iquants``: d float32 (S,) in place, from codes (S, 32), bits (S, 32) and s uint8 (S, 16)."""
    work = np.empty(WORKSPACE, f32)
    for s in range(x.shape[0]):
        sigma, sum_x, sum_2 = mean_square(x, s, mean), _ZERO, _ZERO
        for b in range(16):
            weigh(x, q, s, 16 * b, 16, sigma, _ZERO, work)
            step = f32(2 * i32(small[s, b]) + 1)
            for k in range(2):
                add = -_EIGHTH if bits[s, 2 * b + k] else _EIGHTH
                for i in range(8):
                    w, q_ = work[W + 8 * k + i], (f32(i32(levels[codes[s, 2 * b + k], i]) - 1) + add) * step
                    sum_x += w * q_ * work[X + 8 * k + i]
                    sum_2 += w * q_ * q_
        if sum_2 > _ZERO:
            d[s] = sum_x / sum_2
