"""Compiled loops for ggml's IQ1 quantizers: entries, bits and scale of every sub-block, one after the other. No fastmath.

The definition they must equal, bit for bit, is ``ternary_search`` in ``qformats.quantize.iternary``. For each i1 the scores of all i2 are
made in SIMD lanes; only where one of them beats the best so far are they looked at in order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled
from qformats.loops.iquantize import LEVEL, WORKSPACE, A, W, X, choose8, mean_square, weigh

__all__ = ["refit", "search"]

Array = np.ndarray[Any, Any]
i32, f32 = np.int32, np.float32

_ROOM, _FEW = 48, 32  # for 33 sums, for 17
_SX, _SW, _SX2, _SW2 = (i * _ROOM for i in range(4))  # sums before each place; of the second half beside those of the first

_SUM_X, _SUM_2 = 6 * _ROOM, 10 * _ROOM  # scores of one row, up to four choices
_SPLIT_ROOM = 14 * _ROOM
_ZERO, _ONE, _LOWEST = f32(0), f32(1), f32(-3.4028235e38)
_EIGHTH, _P0, _P2 = f32(0.125), f32(-0.875), f32(1.125)
_BETWEEN, _OVER = f32(0.75), f32(1.25)


@compiled
def _sort(work: Array, order: Array, width: int) -> None:
    """The places of the weights in ascending order, equal ones as they stand."""
    for i in range(width):
        v, j = work[X + i], i
        while j > 0 and work[X + order[j - 1]] > v:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i


@compiled
def _sum_up(work: Array, sums: Array, order: Array, width: int, halves: bool) -> None:
    for h in range(2):
        sums[2 * h * _ROOM] = _ZERO
        sums[(2 * h + 1) * _ROOM] = _ZERO
    for j in range(width):
        i = order[j]
        second = halves and i >= width // 2
        w = work[W + i]
        wx = w * work[X + i]
        sums[_SX + j + 1] = sums[_SX + j] + (_ZERO if second else wx)
        sums[_SW + j + 1] = sums[_SW + j] + (_ZERO if second else w)
        sums[_SX2 + j + 1] = sums[_SX2 + j] + (wx if second else _ZERO)
        sums[_SW2 + j + 1] = sums[_SW2 + j] + (w if second else _ZERO)


@compiled
def _row_whole(sums: Array, i1: int) -> None:
    """The scores of all i2 (those below i1 do not count) under either bit, of 32 weights."""
    i1 &= 63  # so that indices are seen to stay in their planes
    sx, sw, all_x, all_w = sums[_SX + i1], sums[_SW + i1], sums[_SX + 32], sums[_SW + 32]
    x_plus, x_minus, w_plus, w_minus = sx * _P0, sx * -_P2, sw * _P0 * _P0, sw * _P2 * _P2
    for i2 in range(_ROOM):
        middle, last = sums[_SX + i2] - sx, all_x - sums[_SX + i2]
        sums[_SUM_X + i2] = x_plus + middle * _EIGHTH + last * _P2
        sums[_SUM_X + _ROOM + i2] = x_minus + middle * -_EIGHTH + last * -_P0
    for i2 in range(_ROOM):
        middle, last = sums[_SW + i2] - sw, all_w - sums[_SW + i2]
        centre = middle * _EIGHTH * _EIGHTH
        sums[_SUM_2 + i2] = w_plus + centre + last * _P2 * _P2
        sums[_SUM_2 + _ROOM + i2] = w_minus + centre + last * _P0 * _P0


@compiled
def _row_halves(sums: Array, i1: int) -> None:
    """The scores of all i2 (those below i1 do not count) under the bits of either half, of 16 weights."""
    i1 &= 31
    x1, w1, x2, w2 = sums[_SX + i1], sums[_SW + i1], sums[_SX2 + i1], sums[_SW2 + i1]
    tx1, tw1, tx2, tw2 = sums[_SX + 16], sums[_SW + 16], sums[_SX2 + 16], sums[_SW2 + 16]
    plus1, minus1, plus2, minus2 = tx1 * _P2, tx1 * -_P0, tx2 * _P2, tx2 * -_P0
    for i2 in range(_FEW):
        between1, between2 = x1 + sums[_SX + i2], x2 + sums[_SX2 + i2]
        p1, m1, p2, m2 = plus1 - between1, minus1 - between1, plus2 - between2, minus2 - between2
        sums[_SUM_X + i2] = p1 + p2
        sums[_SUM_X + _ROOM + i2] = p1 + m2
        sums[_SUM_X + 2 * _ROOM + i2] = m1 + p2
        sums[_SUM_X + 3 * _ROOM + i2] = m1 + m2
    plus1, minus1 = tw1 * _P2 * _P2 + w1 * _BETWEEN, tw1 * _P0 * _P0 + w1 * _OVER
    plus2, minus2 = tw2 * _P2 * _P2 + w2 * _BETWEEN, tw2 * _P0 * _P0 + w2 * _OVER
    for i2 in range(_FEW):
        v1, v2 = sums[_SW + i2], sums[_SW2 + i2]
        p1, m1, p2, m2 = plus1 - v1 * _OVER, minus1 - v1 * _BETWEEN, plus2 - v2 * _OVER, minus2 - v2 * _BETWEEN
        sums[_SUM_2 + i2] = p1 + p2
        sums[_SUM_2 + _ROOM + i2] = p1 + m2
        sums[_SUM_2 + 2 * _ROOM + i2] = m1 + p2
        sums[_SUM_2 + 3 * _ROOM + i2] = m1 + m2


@compiled
def _beaten(sums: Array, i1: int, halves: bool, best: Any) -> bool:
    """Whether a score of the row from ``i1`` on is better than ``best``."""
    found, first, last = i32(0), i32(i1), i32(16 if halves else 32)
    choices, lanes = 4 if halves else 2, _FEW if halves else _ROOM
    for c in range(choices):
        for i2 in range(lanes):
            sum_x, sum_2 = sums[_SUM_X + c * _ROOM + i2], sums[_SUM_2 + c * _ROOM + i2]
            found |= i32((sum_2 > _ZERO) & (sum_x * sum_x > best * sum_2) & (i32(i2) >= first) & (i32(i2) <= last))
    return bool(found > 0)


@compiled
def _split(sums: Array, width: int, halves: bool, scale: Any) -> tuple[int, int, int, Any]:
    """i1, i2, choice of the best split (i1 = -1 where there is none) and its scale."""
    best, at1, at2, choice, choices = _LOWEST, -1, -1, 0, 4 if halves else 2
    for i1 in range(width + 1):
        if halves:
            _row_halves(sums, i1)
        else:
            _row_whole(sums, i1)
        if not _beaten(sums, i1, halves, best):
            continue
        for i2 in range(i1, width + 1):
            for c in range(choices):
                sum_x, sum_2 = sums[_SUM_X + c * _ROOM + i2], sums[_SUM_2 + c * _ROOM + i2]
                if sum_2 > _ZERO and sum_x * sum_x > best * sum_2:
                    scale = sum_x / sum_2
                    best = scale * sum_x
                    at1, at2, choice = i1, i2, c
    return at1, at2, choice, scale


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
def _enter(work: Array, order: Array, at1: int, at2: int, negative: bool, codes: Array, bits: Array, groups: int, scale: Any,
           levels: Array, index: Array, starts: Array, lists: Array, offsets: Array) -> Any:  # fmt: skip
    """Entries of the levels that a split gives, and the scale fitted to them where one is a neighbour."""
    points = np.zeros(4, i32)
    for j in range(8 * groups):
        level = 0 if j < at1 else (1 if j < at2 else 2)
        level = 2 - level if negative else level
        i = order[j]
        power = 1
        for _ in range(i % 8):
            power *= 3
        points[i // 8] += level * power
    off = False
    for k in range(groups):
        entry = i32(index[points[k]])
        if entry < 0:
            if not off:
                for i in range(8 * groups):
                    work[A + i] = work[W + i]
                off = True
            _value_levels(work, bits[k % len(bits)])
            entry = i32(lists[choose8(work, k, scale, points[k], starts, offsets)])
        codes[k] = entry
    return _fitted(work, codes, bits, groups, levels, scale) if off else scale


@compiled
def search(x: Array, q: Array, codes: Array, bits: Array, scales: Array, levels: Array, index: Array, starts: Array, lists: Array,
           offsets: Array, width: int, halves: bool, epsilon: Any, mean: Any) -> None:  # fmt: skip
    """``ternary_search`` of super-blocks x (S, 256): codes int16 (S, 32), bits uint8 (S, 8 or 32), scales float32 (S, 256 / width)."""
    work, sums, order = np.zeros(WORKSPACE, f32), np.zeros(_SPLIT_ROOM, f32), np.zeros(32, i32)
    groups, flags = width // 8, 2 if halves else 1
    for s in range(x.shape[0]):
        sigma = mean_square(x, s, mean)
        for b in range(256 // width):
            own, own_bits = codes[s, b * groups : (b + 1) * groups], bits[s, b * flags : (b + 1) * flags]
            own[:] = 0
            own_bits[:] = 0
            scales[s, b] = _ZERO
            weigh(x, q, s, b * width, width, sigma, _ZERO, work)
            largest = _ZERO
            for i in range(width):
                size = abs(work[X + i])
                largest = size if size > largest else largest
            if largest < epsilon:
                continue
            _sort(work, order, width)
            _sum_up(work, sums, order, width, halves)
            at1, at2, choice, scale = _split(sums, width, halves, largest)
            if at1 < 0:
                continue
            negative = scale < _ZERO
            if negative:
                scale, choice = -scale, (3 if halves else 1) - choice
            own_bits[0] = choice >> 1 if halves else choice
            if halves:
                own_bits[1] = choice & 1
            scales[s, b] = _enter(work, order, at1, at2, negative, own, own_bits, groups, scale, levels, index, starts, lists, offsets)


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
