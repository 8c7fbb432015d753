"""Compiled quantizers for ggml's K-quants: sixteen super-blocks at a time, one in each lane of a vector. Serial, no fastmath.

The definition they must equal, bit for bit, is ``defined`` in ``qformats.quantize.kquants`` (with the searches of
``qformats.quantize.ksearch``). Each lane adds in the reference's order, one position after the other; sums stay in registers. A group's
weights lie transposed in a float32 workspace whose rows have one number for each lane; a last group that does not fill the lanes
repeats its last super-block. Codes under the stored scales are rounded along the rows again.

Counts and offsets are passed as int64, for numba compiles a function again for every literal integer.

Rounding adds and takes away 1.5 * 2^23 where the quotient is bounded, and follows the bits (``nearest``) where it is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled
from qformats.loops.vectors import LANES, any_lane, bytes_of, half, load, magnitude, nearest, root, splat, store, store_bytes, where

__all__ = ["affine", "affine_blocks", "centred", "centred_blocks"]

Array = np.ndarray[Any, Any]
u8, i32, i64, f32 = np.uint8, np.int32, np.int64, np.float32

SUPER = 256
# Rows of the workspace: the weights, then of one sub-block error weights and codes, then numbers of each sub-block, of each super-block.
_X, _W, _L = 0, SUPER * LANES, (SUPER + 32) * LANES
_SCALE, _LOW, _ISCALE, _ORIGIN, _TOTAL, _SC, _M = ((SUPER + 64 + 16 * i) * LANES for i in range(7))
_D, _DMIN = (SUPER + 176) * LANES, (SUPER + 177) * LANES
WORKSPACE = (SUPER + 178) * LANES
_MAGIC, _ZERO, _ONE, _HUGE = f32(12582912.0), f32(0), f32(1), f32(3.4028235e38)
_EPSILON, _MINUS_ZERO = f32(1e-15), f32(-0.0)


# ---------------------------------------------------------------- weights in lanes


@compiled
def _transpose(rows: Array, work: Array, to: Any, first: Any, last: Any, at: Any, width: Any) -> None:
    """Columns ``at`` … of row ``first + j``, at most ``last`` and modulo their number, into lane j of rows ``to`` …."""
    for j in range(LANES):
        s = min(first + j, last) % rows.shape[0]
        for i in range(width):
            work[to + i * LANES + j] = rows[s, at + i]


@compiled
def _squares(work: Array, at: Any, width: Any) -> Any:
    """The sum of squares."""
    total = splat(_ZERO)
    for i in range(width):
        v = load(work, at + i * LANES)
        total = total + v * v
    return total


@compiled
def _weigh(work: Array, at: Any, width: Any, mode: int, sigma: Any) -> None:
    """Error weights of the sub-block whose first row is ``at``; modes 3 and 4 find its importances there.

    0: x^2, 1: |x|, 2: rms of the sub-block + |x|, 3: the importances q, 4: q * sqrt(sigma + x^2).
    """
    base = root(_squares(work, at, width) / splat(f32(32))) if mode == 2 else sigma
    for i in range(width):
        v, w = load(work, at + i * LANES), _W + i * LANES
        if mode == 0:
            store(work, w, v * v)
        elif mode == 1:
            store(work, w, magnitude(v))
        elif mode == 2:
            store(work, w, base + magnitude(v))
        elif mode == 4:
            store(work, w, load(work, w) * root(base + v * v))


# ---------------------------------------------------------------- searches: one sub-block of every lane


@compiled
def _round_affine(work: Array, at: Any, width: Any, iscale: Any, low: Any, top: Any) -> Any:
    """Codes into ``_L``; the weighted sums of code, code^2, code * x."""
    zero = splat(_ZERO)
    sum_l, sum_l2, sum_xl = zero, zero, zero
    for i in range(width):
        v, w = load(work, at + i * LANES), load(work, _W + i * LANES)
        code = nearest(iscale * (v - low))
        code = where(code > zero, code, zero)
        code = where(code < top, code, top)
        store(work, _L + i * LANES, code)
        wl = w * code
        sum_l, sum_l2, sum_xl = sum_l + wl, sum_l2 + wl * code, sum_xl + wl * v
    return sum_l, sum_l2, sum_xl


@compiled
def _error(work: Array, at: Any, width: Any, scale: Any, low: Any, absolute: bool) -> Any:
    """The weighted error of the codes in ``_L``."""
    total = splat(_ZERO)
    for i in range(width):
        diff = scale * load(work, _L + i * LANES) + low - load(work, at + i * LANES)
        total = total + load(work, _W + i * LANES) * (magnitude(diff) if absolute else diff * diff)
    return total


@compiled
def _best_affine(work: Array, at: Any, k: Any, width: Any, tries: Array, numerator: Any, absolute: bool) -> None:
    """``best_affine`` into row ``k`` of ``_SCALE``, ``_LOW``, ``_ISCALE``, ``_ORIGIN``, ``_TOTAL``."""
    zero, one, huge, top = splat(_ZERO), splat(_ONE), splat(_HUGE), splat(numerator)
    low = high = load(work, at)
    total = load(work, _W)
    sum_x = total * low
    for i in range(1, width):
        v, w = load(work, at + i * LANES), load(work, _W + i * LANES)
        low, high = where(v < low, v, low), where(v > high, v, high)
        total, sum_x = total + w, sum_x + w * v
    low = where(low > zero, zero, low)
    first, scale, new_low, best = zero == zero, one / (top / (high - low)), low, zero
    kept = origin = new_scale = scale
    for t in range(-1, len(tries)):  # -1: the scale of the range, not solved for
        iscale = (top if t < 0 else splat(tries[t])) / (high - low)
        iscale = where(iscale <= huge, iscale, zero)
        sum_l, sum_l2, sum_xl = _round_affine(work, at, width, iscale, low, top)
        det = total * sum_l2 - sum_l * sum_l
        if t >= 0:
            new_scale, new_low = (total * sum_xl - sum_x * sum_l) / det, (sum_l2 * sum_x - sum_l * sum_xl) / det
            positive = new_low > zero
            new_scale, new_low = where(positive, sum_xl / sum_l2, new_scale), where(positive, zero, new_low)
        error = _error(work, at, width, new_scale, new_low, absolute)
        better = first | ((det > zero) & (error < best))
        best, scale, kept = where(better, error, best), where(better, new_scale, scale), where(better, iscale, kept)
        origin, low = where(better, low, origin), where(better, new_low, low)
        first = zero != zero
    row = k * LANES
    store(work, _SCALE + row, scale)
    store(work, _LOW + row, splat(_MINUS_ZERO) - low)  # the sign of a zero turns too
    store(work, _ISCALE + row, kept)
    store(work, _ORIGIN + row, origin)
    store(work, _TOTAL + row, total)


@compiled
def _extreme(work: Array, at: Any, width: Any) -> Any:
    """The first number of largest magnitude in rows ``at`` …, and that magnitude."""
    value = size = splat(_ZERO)
    for i in range(width):
        v = load(work, at + i * LANES)
        larger = magnitude(v) > size
        value, size = where(larger, v, value), where(larger, magnitude(v), size)
    return value, size


@compiled
def _sums_centred(work: Array, at: Any, weights: Any, width: Any, iscale: Any, lowest: Any, highest: Any) -> Any:
    """The weighted sums of x * code and code^2."""
    magic = splat(_MAGIC)
    sum_lx = sum_l2 = splat(_ZERO)
    for i in range(width):
        v, w = load(work, at + i * LANES), load(work, weights + i * LANES)
        code = (iscale * v + magic) - magic
        code = where(code > lowest, code, lowest)
        code = where(code < highest, code, highest)
        sum_lx, sum_l2 = sum_lx + w * v * code, sum_l2 + w * code * code
    return sum_lx, sum_l2


@compiled
def _best_centred(work: Array, at: Any, weights: Any, width: Any, tries: Array, top: Any) -> Any:
    """``best_centred``: scale and inverse scale."""
    zero, lowest, highest = splat(_ZERO), splat(-top), splat(top - _ONE)
    extreme, size = _extreme(work, at, width)
    first, scale, kept, best = zero == zero, zero, zero, zero
    for t in range(-1, len(tries)):
        iscale = (lowest if t < 0 else splat(tries[t])) / extreme
        sum_lx, sum_l2 = _sums_centred(work, at, weights, width, iscale, lowest, highest)
        better = first | ((sum_l2 > zero) & (sum_lx * sum_lx > best * sum_l2))
        scale, kept = where(better, where(sum_l2 != zero, sum_lx / sum_l2, zero), scale), where(better, iscale, kept)
        best, first = where(better, scale * sum_lx, best), zero != zero
    empty = size < splat(_EPSILON)
    return where(empty, zero, scale), where(empty, zero, kept)


@compiled
def _start_codes(work: Array, at: Any, own: Any, width: Any, top: Any) -> Any:
    """Codes by the largest weight of every lane into rows ``own`` … of ``_L``, their sums, and which lanes are empty."""
    sum_lx = sum_l2 = splat(_ZERO)
    lowest, highest = splat(-top), splat(top - _ONE)
    extreme, size = _extreme(work, at, width)
    iscale = lowest / extreme
    for i in range(width):
        v, w = load(work, at + i * LANES), load(work, _W + own + i * LANES)
        code = nearest(iscale * v)
        code = where(code > lowest, code, lowest)
        code = where(code < highest, code, highest)
        store(work, _L + own + i * LANES, code)
        sum_lx, sum_l2 = sum_lx + w * v * code, sum_l2 + w * code * code
    return sum_lx, sum_l2, size < splat(_EPSILON)


@compiled
def _move_code(work: Array, at: Any, own: Any, sum_lx: Any, sum_l2: Any, lowest: Any, highest: Any) -> Any:
    """One step of a pass: the sums after each lane's code moved where that lowers the error, and where it did."""
    v, w, old, zero = load(work, at), load(work, _W + own), load(work, _L + own), splat(_ZERO)
    wx = w * v
    lx, l2 = sum_lx - wx * old, sum_l2 - w * old * old
    code = nearest(v * l2 / lx)
    code = where(code > lowest, code, lowest)
    code = where(code < highest, code, highest)
    new_lx, new_l2 = lx + wx * code, l2 + w * code * code
    better = (lx > zero) & (code != old) & (new_l2 > zero) & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
    store(work, _L + own, where(better, code, old))
    return where(better, new_lx, sum_lx), where(better, new_l2, sum_l2), better


@compiled
def _descend(work: Array, kept: Array, at: Any, k: Any, width: Any, top: Any) -> None:
    """``descend`` into rows ``k`` and ``k + 1`` of ``_SCALE``; codes into ``kept`` uint8 (256 * lanes,).

    Every step waits for the one before, so two sub-blocks go side by side.
    """
    zero, lowest, highest, far = splat(_ZERO), splat(-top), splat(top - _ONE), width * LANES
    lx0, l20, empty0 = _start_codes(work, at, far - far, width, top)
    lx1, l21, empty1 = _start_codes(work, at + far, far, width, top)
    for _ in range(5):
        moved = zero != zero
        for i in range(width):
            own = i * LANES
            lx0, l20, one = _move_code(work, at + own, own, lx0, l20, lowest, highest)
            lx1, l21, other = _move_code(work, at + far + own, far + own, lx1, l21, lowest, highest)
            moved = moved | one | other
        if not any_lane(moved):
            break
    store(work, _SCALE + k * LANES, where(empty0, zero, where(l20 > zero, lx0 / l20, zero)))
    store(work, _SCALE + (k + 1) * LANES, where(empty1, zero, where(l21 > zero, lx1 / l21, zero)))
    for i in range(width * 2):
        code = load(work, _L + i * LANES) + splat(top)
        store_bytes(kept, at + i * LANES, where(empty0 if i < width else empty1, zero, code))


# ---------------------------------------------------------------- sub-scales as codes: every super-block in its lane


@compiled
def _largest(work: Array, values: Any, subs: Any) -> Any:
    largest = splat(_ZERO)
    for k in range(subs):
        v = load(work, values + k * LANES)
        largest = where(v > largest, v, largest)
    return largest


@compiled
def _to_largest(work: Array, values: Any, codes: Any, subs: Any, levels: Any, limit: Any) -> Any:
    """``_to_largest`` into rows ``codes`` …; the scales."""
    zero, highest = splat(_ZERO), splat(limit)
    largest = _largest(work, values, subs)
    inverse = where(largest > zero, splat(levels) / largest, zero)
    for k in range(subs):
        code = bytes_of(nearest(inverse * load(work, values + k * LANES)))
        store(work, codes + k * LANES, where(code < highest, code, highest))
    return largest / splat(levels)


@compiled
def _error_positive(work: Array, values: Any, subs: Any, iscale: Any, top: Any, wrapped: bool) -> Any:
    """The weighted error of one inverse scale; codes are bytes if ``wrapped``, else bounded above by ``top``."""
    scale, total = splat(_ONE) / iscale, splat(_ZERO)
    for k in range(subs):
        v = load(work, values + k * LANES)
        code = nearest(iscale * v)
        code = bytes_of(code) if wrapped else where(code < top, code, top)
        diff = v - scale * code
        total = total + load(work, _TOTAL + k * LANES) * diff * diff
    return total


@compiled
def _positive(work: Array, values: Any, codes: Any, subs: Any, tries: Array, levels: Any) -> Any:
    """``best_positive`` into rows ``codes`` …, weighted with ``_TOTAL``; the scales."""
    zero, top = splat(_ZERO), splat(levels)
    largest = _largest(work, values, subs)
    first, iscale, best = zero == zero, zero, zero
    for t in range(-1, len(tries)):
        attempt = (top if t < 0 else splat(tries[t])) / largest
        error = _error_positive(work, values, subs, attempt, top, t < 0)
        better, first = first | (error < best), zero != zero
        best, iscale = where(better, error, best), where(better, attempt, iscale)
    sum_lx = sum_l2 = zero
    for k in range(subs):
        v, w = load(work, values + k * LANES), load(work, _TOTAL + k * LANES)
        code = nearest(iscale * v)
        code = where(code < top, code, top)
        store(work, codes + k * LANES, bytes_of(code))
        sum_lx, sum_l2 = sum_lx + w * v * code, sum_l2 + w * code * code
    for _ in range(5):
        moved = zero != zero
        for k in range(subs):
            v, w, old = load(work, values + k * LANES), load(work, _TOTAL + k * LANES), load(work, codes + k * LANES)
            wx = w * v
            lx, l2 = sum_lx - wx * old, sum_l2 - w * old * old
            code = nearest(v * l2 / lx)
            code = where(code < top, code, top)
            new_lx, new_l2 = lx + wx * code, l2 + w * code * code
            better = (lx > zero) & (l2 > zero) & (code != old) & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            store(work, codes + k * LANES, where(better, bytes_of(code), old))
            sum_lx, sum_l2 = where(better, new_lx, sum_lx), where(better, new_l2, sum_l2)
            moved = moved | better
        if not any_lane(moved):
            break
    full = largest >= splat(_EPSILON)
    for k in range(subs):
        store(work, codes + k * LANES, where(full, load(work, codes + k * LANES), zero))
    return where(full & (sum_l2 > zero), sum_lx / sum_l2, zero)


@compiled
def _recentred(work: Array, tries: Array) -> None:
    """Q3_K with importances: the sub-scales by another search into ``_SC``, d into ``_D``."""
    zero, magic, lowest, highest = splat(_ZERO), splat(_MAGIC), splat(f32(-32)), splat(f32(31))
    scale, iscale = _best_centred(work, i64(_SCALE), i64(_TOTAL), i64(16), tries, f32(32))
    for k in range(16):
        code = (iscale * load(work, _SCALE + k * LANES) + magic) - magic
        code = where(code > lowest, code, lowest)
        code = where(code < highest, code, highest)
        store(work, _SC + k * LANES, where(iscale != zero, code + splat(f32(32)), zero))
    store(work, _D, scale)


@compiled
def _by_extreme(work: Array, top: Any) -> None:
    """The sub-scales under the largest of them into ``_SC``, d into ``_D``; Q3_K where ``top`` is 4, Q6_K where it is 32."""
    zero, byte = splat(_ZERO), splat(f32(128))
    extreme, size = _extreme(work, i64(_SCALE), i64(16))
    iscale = splat(f32(-32) if top == f32(4) else f32(-128)) / extreme
    full = extreme != zero if top == f32(4) else size >= splat(_EPSILON)
    for k in range(16):
        code = nearest(iscale * load(work, _SCALE + k * LANES))
        if top == f32(4):
            lowest, highest = splat(f32(-32)), splat(f32(31))
            code = bytes_of(code + byte) - byte
            code = where(code > lowest, code, lowest)
            code = where(code < highest, code, highest) + splat(f32(32))
        else:
            code = where(code < splat(f32(127)), code, splat(f32(127)))
            kept = load(work, _ISCALE + k * LANES)
            store(work, _ISCALE + k * LANES, where(full, kept, zero))
        store(work, _SC + k * LANES, where(full, code, zero))
    store(work, _D, where(full, splat(_ONE) / iscale, zero))


# ---------------------------------------------------------------- codes under the stored scales


@compiled
def _code(flat: Array, codes: Array, start: int, width: Any, d: Any, m: Any, bottom: Any, highest: Any, add: Any) -> None:
    """Codes of one sub-block for a scale that is not zero."""
    scale, low, least, most, more = splat(d), splat(m), splat(bottom), splat(highest), splat(add)
    for i in range(0, width, LANES):
        code = nearest((load(flat, start + i) + low) / scale)
        code = where(code > least, code, least)
        code = where(code < most, code, most)
        store_bytes(codes, start + i, code + more)


@compiled
def _rebuild(flat: Array, codes: Array, start: int, width: Any, iscale: Any, origin: Any, bottom: Any, highest: Any, add: Any) -> None:
    """The search's own codes of one sub-block; zeros where it was empty."""
    inverse, low, least, most, more = splat(iscale), splat(origin), splat(bottom), splat(highest), splat(add)
    for i in range(0, width, LANES):
        code = nearest(inverse * (load(flat, start + i) - low))
        code = where(code > least, code, least)
        code = where(code < most, code, most) + more
        store_bytes(codes, start + i, code if iscale != _ZERO else splat(_ZERO))


@compiled
def _spill(work: Array, sc: Array, m: Array, s: int, j: int) -> None:
    """Sub-scales and minima of lane ``j`` as they are read back from the bytes: codes beyond the grid spill over as in ggml."""
    if sc.shape[1] == 16:
        for k in range(16):
            packed = i32(i32(work[_SC + k * LANES + j]) | i32(i32(work[_M + k * LANES + j]) << i32(4)))
            sc[s, k], m[s, k] = u8(packed & i32(15)), u8(i32(packed >> i32(4)) & i32(15))
        return
    for k in range(4):
        low, high = i32(work[_SC + k * LANES + j]), i32(work[_SC + (k + 4) * LANES + j])
        sc[s, k] = u8(low & i32(63))
        sc[s, k + 4] = u8(i32(high & i32(15)) | i32(i32(i32(low >> i32(6)) | i32(high >> i32(4))) & i32(3)) << i32(4))
        low, high = i32(work[_M + k * LANES + j]), i32(work[_M + (k + 4) * LANES + j])
        m[s, k] = u8(low & i32(63))
        m[s, k + 4] = u8(i32(high & i32(15)) | i32(i32(i32(low >> i32(6)) | i32(high >> i32(4))) & i32(3)) << i32(4))


@compiled
def affine(
    x: Array, q: Array, codes: Array, sc: Array, m: Array, d: Array, dmin: Array, tries: Array, again: Array, mode: int, mean: Any, top: Any
) -> None:
    """Q2_K, Q4_K, Q5_K: x (S, 256) and q (columns / 256 or 0, 256) -> uint8 codes (S, 256), sc and m (S, subs), float32 d, dmin (S,).

    ``tries`` and ``again``: the numerators of both searches; ``mode``: see ``_weigh``; ``mean``: how often sigma is the mean square.
    """
    work, subs, last, flat, coded = np.empty(WORKSPACE, f32), sc.shape[1], x.shape[0] - 1, x.reshape(-1), codes.reshape(-1)
    width, sigma, levels = SUPER // subs, splat(_ZERO), f32(15) if subs == 16 else f32(63)
    limit = f32(255) if subs == 16 else f32(63)
    for first in range(0, x.shape[0], LANES):
        _transpose(x, work, i64(_X), first, last, i64(0), i64(SUPER))
        if mode == 4:
            sigma = splat(mean) * _squares(work, i64(_X), i64(SUPER)) / splat(f32(SUPER))
        for k in range(subs):
            at = _X + k * width * LANES
            if mode >= 3:
                _transpose(q, work, i64(_W), first, last, k * width, width)
            _weigh(work, at, width, mode, sigma)
            _best_affine(work, at, k, width, tries, top, mode == 1)
        for low in range(2):
            values, to, scale_at = (_SCALE, _SC, _D) if low == 0 else (_LOW, _M, _DMIN)
            if mode >= 3:
                scale = _positive(work, values, to, subs, again, levels)
                if top == f32(31):
                    for k in range(subs):
                        code = load(work, to + k * LANES)
                        store(work, to + k * LANES, where(code < splat(levels), code, splat(levels)))
            else:
                scale = _to_largest(work, values, to, subs, levels, limit)
            store(work, scale_at, half(scale))
        for j in range(min(LANES, x.shape[0] - first)):
            s = first + j
            d[s], dmin[s] = work[_D + j], work[_DMIN + j]
            _spill(work, sc, m, s, j)
            for k in range(subs):
                start, one = s * SUPER + k * width, d[s] * f32(sc[s, k])
                if one != _ZERO:
                    _code(flat, coded, start, width, one, dmin[s] * f32(m[s, k]), _ZERO, top, _ZERO)
                else:
                    at = k * LANES + j
                    _rebuild(flat, coded, start, width, work[_ISCALE + at], work[_ORIGIN + at], _ZERO, top, _ZERO)


@compiled
def centred(x: Array, q: Array, codes: Array, sc: Array, d: Array, tries: Array, again: Array, mode: int, mean: Any, top: Any) -> None:
    """Q3_K (``top`` 4) and Q6_K (32), arguments as of ``affine``; without ``tries`` Q3_K's passes that move one code at a time."""
    work, kept, last, flat, coded = np.empty(WORKSPACE, f32), np.empty(SUPER * LANES, u8), x.shape[0] - 1, x.reshape(-1), codes.reshape(-1)
    width, sigma, highest, zero = SUPER // sc.shape[1], splat(_ZERO), top - _ONE, f32(32) if top == f32(4) else _ZERO
    for first in range(0, x.shape[0], LANES):
        _transpose(x, work, i64(_X), first, last, i64(0), i64(SUPER))
        if mode == 4:
            sigma = splat(mean) * _squares(work, i64(_X), i64(SUPER)) / splat(f32(SUPER))
        for k in range(16):
            at = _X + k * width * LANES
            if mode >= 3:
                _transpose(q, work, i64(_W), first, last, k * width, width)
            _weigh(work, at, width, mode, sigma)
            if len(tries):
                scale, iscale = _best_centred(work, at, i64(_W), width, tries, top)
                store(work, _SCALE + k * LANES, scale)
                store(work, _ISCALE + k * LANES, iscale)
                total = load(work, _W)
                for i in range(1, width):
                    total = total + load(work, _W + i * LANES)
                store(work, _TOTAL + k * LANES, total)
            elif k % 2 == 0:
                _weigh(work, at, width * 2, mode, sigma)
                _descend(work, kept, at, k, width, top)
        if len(again):
            _recentred(work, again)
        else:
            _by_extreme(work, top)
        store(work, _D, half(load(work, _D)))
        for j in range(min(LANES, x.shape[0] - first)):
            s = first + j
            d[s] = work[_D + j]
            for k in range(16):
                start, at = s * SUPER + k * width, k * LANES + j
                step = work[_SC + at]
                sc[s, k] = u8(i32(step))
                one = d[s] * (step - zero)
                if one != _ZERO:
                    _code(flat, coded, start, width, one, _ZERO, -top, highest, top)
                elif len(tries):
                    _rebuild(flat, coded, start, width, work[_ISCALE + at], _ZERO, -top, highest, top)
                else:
                    for i in range(width):
                        coded[start + i] = kept[(k * width + i) * LANES + j]


# ---------------------------------------------------------------- legacy blocks: one search, its own codes


@compiled
def affine_blocks(x: Array, w: Array, codes: Array, scale: Array, low: Array, tries: Array, top: Any) -> None:
    """Q4_1, Q5_1 with importances: x and its error weights w (B, 32) -> uint8 codes (B, 32), float32 scale and -minimum (B,)."""
    work, last, flat, coded = np.empty(WORKSPACE, f32), x.shape[0] - 1, x.reshape(-1), codes.reshape(-1)
    for first in range(0, x.shape[0], LANES):
        _transpose(x, work, i64(_X), first, last, i64(0), i64(32))
        _transpose(w, work, i64(_W), first, last, i64(0), i64(32))
        _best_affine(work, i64(_X), i64(0), i64(32), tries, top, False)
        for j in range(min(LANES, x.shape[0] - first)):
            s = first + j
            scale[s], low[s] = work[_SCALE + j], work[_LOW + j]
            _rebuild(flat, coded, s * 32, i64(32), work[_ISCALE + j], work[_ORIGIN + j], _ZERO, top, _ZERO)


@compiled
def centred_blocks(x: Array, w: Array, codes: Array, scale: Array, tries: Array, top: Any) -> None:
    """Q4_0 (``top`` 8), Q5_0 (16) with importances, arguments as of ``affine_blocks``."""
    work, last, flat, coded = np.empty(WORKSPACE, f32), x.shape[0] - 1, x.reshape(-1), codes.reshape(-1)
    for first in range(0, x.shape[0], LANES):
        _transpose(x, work, i64(_X), first, last, i64(0), i64(32))
        _transpose(w, work, i64(_W), first, last, i64(0), i64(32))
        found, kept = _best_centred(work, i64(_X), i64(_W), i64(32), tries, top)
        store(work, _SCALE, found)
        store(work, _ISCALE, kept)
        for j in range(min(LANES, x.shape[0] - first)):
            s = first + j
            scale[s] = work[_SCALE + j]
            _rebuild(flat, coded, s * 32, i64(32), work[_ISCALE + j], _ZERO, -top, top - _ONE, top)
