"""Compiled loops for ggml's K-quantizers: searches with 64 sub-blocks in SIMD lanes, then the final codes. Serial, no fastmath.

The definitions they must equal, bit for bit, are ``search`` and ``code`` in ``qformats.quantize.kquants`` (with ``best_affine``,
``best_centred`` and ``descend`` in ``qformats.quantize.ksearch``). Every sub-block is one lane: the outer loop runs over the position
in the sub-block, the inner one over lanes, so that each lane adds in the reference's order and every line of arithmetic vectorizes.
All of a search's state lies in one float32 array at constant offsets, where the compiler sees that nothing overlaps: weight i of lane
j at ``i * 64 + j`` of its plane. A last group that does not fill the lanes repeats its last super-block.

Rounding adds and takes away 1.5 * 2^23 where the quotient is bounded, and follows the bits where it is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = ["affine", "centred", "codes", "descend", "positive", "to_largest"]

Array = np.ndarray[Any, Any]
u8, i32, f32 = np.uint8, np.int32, np.float32

LANES = 64
_PLANE = 32 * LANES
_V, _X, _W, _L = 0, 16 * LANES, 16 * LANES + _PLANE, 16 * LANES + 2 * _PLANE  # one number a lane each, then weights, error weights, codes
WORKSPACE = _L + _PLANE
_LOW, _EXTREME, _ISCALE, _BEST, _SCALE, _KEPT, _ORIGIN, _TOTAL, _SUM_X, _SL, _SL2, _SXL, _HIGH, _DET = (_V + i * LANES for i in range(14))
_MAGIC, _ZERO, _ONE, _HUGE = f32(12582912.0), f32(0), f32(1), f32(3.4028235e38)
_EPSILON = f32(1e-15)


@compiled
def _nearest(v: Any) -> Any:
    """``ksearch.nearest`` by the bits; a NaN that arithmetic made has only its top mantissa bit set and gives 0."""
    return i32(i32(f32(v + _MAGIC).view(i32) & i32(0x007FFFFF)) - i32(0x00400000))


@compiled
def _rms(work: Array, width: int) -> None:
    """The root of the mean square of every lane's 32 weights into ``_SL``."""
    width = 16 if width == 16 else 32
    for j in range(LANES):
        work[_SL + j] = _ZERO
    for i in range(width):
        for j in range(LANES):
            v = work[_X + i * LANES + j]
            work[_SL + j] += v * v
    for j in range(LANES):
        work[_SL + j] = np.sqrt(work[_SL + j] / f32(32))


@compiled
def _weigh(work: Array, width: int, mode: int) -> None:
    """Error weights by ``mode``, see ``_load``; modes 3 and 4 find the importances there, mode 4 a mean square in ``_SL``."""
    width = 16 if width == 16 else 32
    if mode == 4:
        for i in range(width):
            for j in range(LANES):
                v = work[_X + i * LANES + j]
                work[_W + i * LANES + j] = work[_W + i * LANES + j] * np.sqrt(work[_SL + j] + v * v)
    elif mode == 0:
        for i in range(width * LANES):
            work[_W + i] = work[_X + i] * work[_X + i]
    elif mode == 1:
        for i in range(width * LANES):
            work[_W + i] = abs(work[_X + i])
    elif mode == 2:
        _rms(work, width)
        for i in range(width):
            for j in range(LANES):
                work[_W + i * LANES + j] = work[_SL + j] + abs(work[_X + i * LANES + j])


@compiled
def _load(x: Array, q: Array, work: Array, first: int, width: int, mode: int, mean: Any) -> None:
    """Put sub-blocks ``first`` … into the lanes, with error weights by ``mode``.

    0: x^2, 1: |x|, 2: rms of the sub-block + |x|, 3: the importances q, 4: q * sqrt(mean * mean square of the super-block + x^2).
    """
    last, across, subs = x.shape[0] - 1, max(len(q) // width, 1), 256 // width
    sigma = _ZERO
    for j in range(LANES):
        b = first + j
        while b > last:
            b -= subs
        for i in range(width):
            work[_X + i * LANES + j] = x[b, i]
        if mode >= 3:
            at = (b % across) * width
            for i in range(width):
                work[_W + i * LANES + j] = q[at + i]
        if mode == 4:
            if j % subs == 0:
                sigma = _ZERO
                start = b - b % subs
                for s in range(subs):
                    for i in range(width):
                        sigma += x[start + s, i] * x[start + s, i]
                sigma = mean * sigma / f32(256)
            work[_SL + j] = sigma
    _weigh(work, width, mode)


@compiled
def _range_and_sums(work: Array, width: int) -> None:
    width = 16 if width == 16 else 32  # so that indices are seen to stay in their planes
    for j in range(LANES):
        v, w = work[_X + j], work[_W + j]
        work[_LOW + j] = v
        work[_HIGH + j] = v
        work[_TOTAL + j] = w
        work[_SUM_X + j] = w * v
    for i in range(1, width):
        for j in range(LANES):
            v, w = work[_X + i * LANES + j], work[_W + i * LANES + j]
            low, high = work[_LOW + j], work[_HIGH + j]
            work[_LOW + j] = v if v < low else low
            work[_HIGH + j] = v if v > high else high
            work[_TOTAL + j] += w
            work[_SUM_X + j] += w * v


@compiled
def _round_affine(work: Array, width: int, top: Any) -> None:
    """Codes of the inverse scales at hand, and their weighted sums."""
    width = 16 if width == 16 else 32  # so that indices are seen to stay in their planes
    for j in range(LANES):
        work[_SL + j] = _ZERO
        work[_SL2 + j] = _ZERO
        work[_SXL + j] = _ZERO
    for i in range(width):
        for j in range(LANES):
            v = work[_X + i * LANES + j]
            code = f32(_nearest(work[_ISCALE + j] * (v - work[_LOW + j])))
            code = code if code > _ZERO else _ZERO
            code = code if code < top else top
            work[_L + i * LANES + j] = code
            wl = work[_W + i * LANES + j] * code
            work[_SL + j] += wl
            work[_SL2 + j] += wl * code
            work[_SXL + j] += wl * v


@compiled
def _errors(work: Array, width: int, absolute: bool) -> None:
    """Into ``_SXL``: the weighted error of scale ``_SL``, minimum ``_SL2`` and the codes at hand."""
    width = 16 if width == 16 else 32  # so that indices are seen to stay in their planes
    for j in range(LANES):
        work[_SXL + j] = _ZERO
    if absolute:
        for i in range(width):
            for j in range(LANES):
                diff = work[_SL + j] * work[_L + i * LANES + j] + work[_SL2 + j] - work[_X + i * LANES + j]
                work[_SXL + j] += work[_W + i * LANES + j] * abs(diff)
    else:
        for i in range(width):
            for j in range(LANES):
                diff = work[_SL + j] * work[_L + i * LANES + j] + work[_SL2 + j] - work[_X + i * LANES + j]
                work[_SXL + j] += work[_W + i * LANES + j] * (diff * diff)


@compiled
def _store(work: Array, found: Array, first: int, largest: Array) -> None:
    """Scale, low, iscale, origin and total of the lanes; no scale where ``largest`` is below the smallest that counts."""
    for j in range(min(LANES, found.shape[1] - first)):
        empty = largest[j] < _EPSILON
        found[0, first + j] = _ZERO if empty else work[_SCALE + j]
        found[1, first + j] = -work[_LOW + j]
        found[2, first + j] = _ZERO if empty else work[_KEPT + j]
        found[3, first + j] = work[_ORIGIN + j]
        found[4, first + j] = work[_TOTAL + j]


@compiled
def _start_affine(work: Array, top: Any) -> None:
    """The first scale and inverse scale of every lane, out of its range."""
    for j in range(LANES):
        low = work[_LOW + j]
        low = _ZERO if low > _ZERO else low
        iscale = top / (work[_HIGH + j] - low)
        scale = _ONE / iscale
        iscale = iscale if iscale <= _HUGE else _ZERO
        work[_ISCALE + j] = iscale
        work[_KEPT + j] = iscale
        work[_LOW + j] = low
        work[_ORIGIN + j] = low
        work[_SCALE + j] = scale


@compiled
def _solve(work: Array) -> None:
    """Least squares of every lane from its sums: scale into ``_SL``, minimum into ``_SL2``, the determinant beside them."""
    for j in range(LANES):
        total, sum_x = work[_TOTAL + j], work[_SUM_X + j]
        sl, sl2, sxl = work[_SL + j], work[_SL2 + j], work[_SXL + j]
        det = total * sl2 - sl * sl
        scale = (total * sxl - sum_x * sl) / det
        low = (sl2 * sum_x - sl * sxl) / det
        alone = sxl / sl2
        work[_DET + j] = det
        work[_SL + j] = alone if low > _ZERO else scale
        work[_SL2 + j] = _ZERO if low > _ZERO else low


@compiled
def _keep_affine(work: Array) -> None:
    for j in range(LANES):
        error, best, low = work[_SXL + j], work[_BEST + j], work[_LOW + j]
        better = (work[_DET + j] > _ZERO) & (error < best)
        work[_BEST + j] = error if better else best
        work[_SCALE + j] = work[_SL + j] if better else work[_SCALE + j]
        work[_KEPT + j] = work[_ISCALE + j] if better else work[_KEPT + j]
        work[_ORIGIN + j] = low if better else work[_ORIGIN + j]
        work[_LOW + j] = work[_SL2 + j] if better else low


@compiled
def affine(x: Array, q: Array, found: Array, tries: Array, top: Any, mode: int, mean: Any, absolute: bool, width: int) -> None:
    """``best_affine`` of x (B, width); ``found`` float32 (5, B): scale, low, iscale, origin, total."""
    work, ones = np.empty(WORKSPACE, f32), np.ones(LANES, f32)
    for first in range(0, x.shape[0], LANES):
        _load(x, q, work, first, width, mode, mean)
        _range_and_sums(work, width)
        _start_affine(work, top)
        _round_affine(work, width, top)
        for j in range(LANES):
            work[_SL + j] = work[_SCALE + j]
            work[_SL2 + j] = work[_LOW + j]
        _errors(work, width, absolute)
        for j in range(LANES):
            work[_BEST + j] = work[_SXL + j]
        for t in range(len(tries)):
            numerator = tries[t]
            for j in range(LANES):
                iscale = numerator / (work[_HIGH + j] - work[_LOW + j])
                work[_ISCALE + j] = iscale if iscale <= _HUGE else _ZERO
            _round_affine(work, width, top)
            _solve(work)
            _errors(work, width, absolute)
            _keep_affine(work)
        _store(work, found, first, ones)


@compiled
def _find_extremes(work: Array, width: int) -> None:
    """The first weight of largest magnitude of each lane."""
    width = 16 if width == 16 else 32  # so that indices are seen to stay in their planes
    for j in range(LANES):
        work[_EXTREME + j] = _ZERO
        work[_BEST + j] = _ZERO
    for i in range(width):
        for j in range(LANES):
            v = work[_X + i * LANES + j]
            size, largest, extreme = abs(v), work[_BEST + j], work[_EXTREME + j]
            work[_EXTREME + j] = v if size > largest else extreme
            work[_BEST + j] = size if size > largest else largest


@compiled
def _round_centred(work: Array, width: int, top: Any) -> None:
    width = 16 if width == 16 else 32  # so that indices are seen to stay in their planes
    for j in range(LANES):
        work[_SXL + j] = _ZERO
        work[_SL2 + j] = _ZERO
    highest = top - _ONE
    for i in range(width):
        for j in range(LANES):
            v, w = work[_X + i * LANES + j], work[_W + i * LANES + j]
            code = (work[_ISCALE + j] * v + _MAGIC) - _MAGIC
            code = code if code > -top else -top
            code = code if code < highest else highest
            work[_SXL + j] += w * v * code
            work[_SL2 + j] += w * code * code


@compiled
def centred(x: Array, q: Array, found: Array, tries: Array, top: Any, mode: int, mean: Any, width: int) -> None:
    """``best_centred`` of x (B, width); ``found`` as in ``affine``."""
    work, largest = np.empty(WORKSPACE, f32), np.empty(LANES, f32)
    for first in range(0, x.shape[0], LANES):
        _load(x, q, work, first, width, mode, mean)
        _range_and_sums(work, width)
        _find_extremes(work, width)
        for j in range(LANES):
            largest[j] = work[_BEST + j]
            iscale = -top / work[_EXTREME + j]
            work[_ISCALE + j] = iscale
            work[_KEPT + j] = iscale
        _round_centred(work, width, top)
        for j in range(LANES):
            lx, l2 = work[_SXL + j], work[_SL2 + j]
            scale = lx / l2
            scale = scale if l2 != _ZERO else _ZERO
            work[_SCALE + j] = scale
            work[_BEST + j] = scale * lx
        for t in range(len(tries)):
            numerator = tries[t]
            for j in range(LANES):
                work[_ISCALE + j] = numerator / work[_EXTREME + j]
            _round_centred(work, width, top)
            for j in range(LANES):
                lx, l2 = work[_SXL + j], work[_SL2 + j]
                scale = lx / l2
                better = (l2 > _ZERO) & (lx * lx > work[_BEST + j] * l2)
                work[_SCALE + j] = scale if better else work[_SCALE + j]
                work[_BEST + j] = scale * lx if better else work[_BEST + j]
                work[_KEPT + j] = work[_ISCALE + j] if better else work[_KEPT + j]
        for j in range(LANES):
            work[_LOW + j] = _ZERO
            work[_ORIGIN + j] = _ZERO
        _store(work, found, first, largest)


@compiled
def _start_codes(work: Array, width: int, top: Any) -> None:
    """Codes by the largest weight of every lane, and their sums."""
    width = 16 if width == 16 else 32
    highest = top - _ONE
    for j in range(LANES):
        work[_ISCALE + j] = -top / work[_EXTREME + j]
        work[_SXL + j] = _ZERO
        work[_SL2 + j] = _ZERO
    for i in range(width):
        for j in range(LANES):
            v, w = work[_X + i * LANES + j], work[_W + i * LANES + j]
            value = f32(_nearest(work[_ISCALE + j] * v))
            value = value if value > -top else -top
            value = value if value < highest else highest
            work[_L + i * LANES + j] = value
            work[_SXL + j] += w * v * value
            work[_SL2 + j] += w * value * value


@compiled
def _move_codes(work: Array, width: int, top: Any) -> None:
    """One pass over the positions: each lane's code moves where that lowers the error."""
    width = 16 if width == 16 else 32
    highest = top - _ONE
    for i in range(width):
        for j in range(LANES):
            v, w, old = work[_X + i * LANES + j], work[_W + i * LANES + j], work[_L + i * LANES + j]
            sum_lx, sum_l2, wx = work[_SXL + j], work[_SL2 + j], w * v
            lx, l2 = sum_lx - wx * old, sum_l2 - w * old * old
            value = f32(_nearest(v * l2 / lx))
            value = value if value > -top else -top
            value = value if value < highest else highest
            new_lx, new_l2 = lx + wx * value, l2 + w * value * value
            better = (lx > _ZERO) & (value != old) & (new_l2 > _ZERO)
            better = better & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            work[_L + i * LANES + j] = value if better else old
            work[_SXL + j] = new_lx if better else sum_lx
            work[_SL2 + j] = new_l2 if better else sum_l2


@compiled
def descend(x: Array, found: Array, kept: Array, top: Any, width: int) -> None:
    """``descend`` of x (B, width); ``found`` as in ``affine``, ``kept`` uint8 (B, width)."""
    work = np.empty(WORKSPACE, f32)
    for first in range(0, x.shape[0], LANES):
        _load(x, x[0, :0], work, first, width, 0, _ZERO)
        _find_extremes(work, width)
        _start_codes(work, width, top)
        for _ in range(5):
            _move_codes(work, width, top)
        for j in range(min(LANES, x.shape[0] - first)):
            b, empty = first + j, work[_BEST + j] < _EPSILON
            l2 = work[_SL2 + j]
            found[0, b] = work[_SXL + j] / l2 if not empty and l2 > _ZERO else _ZERO
            for r in range(1, 5):
                found[r, b] = _ZERO
            for i in range(width):
                kept[b, i] = u8(0) if empty else u8(i32(work[_L + i * LANES + j] + top))


@compiled
def to_largest(x: Array, top: Any, limit: Any, scale: Array, code: Array) -> None:
    """``_to_largest`` of x (S, n): ``scale`` float32 (S,), ``code`` int32 (S, n) bytes of at most ``limit``."""
    for s in range(x.shape[0]):
        largest = _ZERO
        for i in range(x.shape[1]):
            largest = x[s, i] if x[s, i] > largest else largest
        inverse = f32(top) / largest if largest > _ZERO else _ZERO
        scale[s] = largest / f32(top)
        for i in range(x.shape[1]):
            code[s, i] = min(_nearest(inverse * x[s, i]) & 255, limit)


@compiled
def _try_positive(x: Array, w: Array, iscale: Any, top: Any) -> Any:
    """The weighted error of one inverse scale; codes are bounded above by ``top``, or are bytes where that is negative."""
    scale, error = _ONE / iscale, _ZERO
    for i in range(len(x)):
        code = _nearest(iscale * x[i])
        code = i32(code & 255) if top < 0 else min(code, top)
        diff = x[i] - scale * f32(code)
        error += w[i] * diff * diff
    return error


@compiled
def _move_positive(x: Array, w: Array, code: Array, sums: Array, top: Any) -> Any:
    """One pass over the codes of a super-block; whether any moved."""
    moved = False
    for i in range(len(x)):
        old, wx = f32(code[i]), w[i] * x[i]
        lx, l2 = sums[0] - wx * old, sums[1] - w[i] * old * old
        if lx > _ZERO and l2 > _ZERO:
            new = min(_nearest(x[i] * l2 / lx), top)
            if new != code[i]:
                value = f32(new)
                lx, l2 = lx + wx * value, l2 + w[i] * value * value
                if lx * lx * sums[1] > sums[0] * sums[0] * l2:
                    code[i] = new & 255
                    sums[0], sums[1] = lx, l2
                    moved = True
    return moved


@compiled
def positive(x: Array, w: Array, tries: Array, top: Any, scale: Array, code: Array) -> None:
    """``best_positive`` of x (S, n) with weights w; ``scale`` float32 (S,), ``code`` int32 (S, n)."""
    sums = np.empty(2, f32)
    for s in range(x.shape[0]):
        largest = _ZERO
        for i in range(x.shape[1]):
            largest = x[s, i] if x[s, i] > largest else largest
        scale[s] = _ZERO
        code[s, :] = 0
        if not largest >= _EPSILON:
            continue
        iscale = f32(top) / largest
        best = _try_positive(x[s], w[s], iscale, i32(-1))
        for t in range(len(tries)):
            attempt = tries[t] / largest
            error = _try_positive(x[s], w[s], attempt, top)
            if error < best:
                best, iscale = error, attempt
        sums[0] = sums[1] = _ZERO
        for i in range(x.shape[1]):
            whole = min(_nearest(iscale * x[s, i]), top)
            code[s, i] = whole & 255
            value = f32(whole)
            sums[0] += w[s, i] * x[s, i] * value
            sums[1] += w[s, i] * value * value
        for _ in range(5):
            if not _move_positive(x[s], w[s], code[s], sums, top):
                break
        scale[s] = sums[0] / sums[1] if sums[1] > _ZERO else _ZERO


@compiled
def codes(
    x: Array,
    scale: Array,
    low: Array,
    iscale: Array,
    origin: Array,
    kept: Array,
    out: Array,
    bottom: Any,
    highest: Any,
    add: Any,
    width: int,
) -> None:
    """``code`` of x (B, width) into ``out`` uint8; ``kept`` uint8 (B, width), or (0, width) where ``iscale`` rebuilds the codes."""
    for b in range(x.shape[0]):
        d, m = scale[b], low[b]
        if d != _ZERO:
            for i in range(width):
                value = f32(_nearest((x[b, i] + m) / d))
                value = value if value > bottom else bottom
                value = value if value < highest else highest
                out[b, i] = u8(i32(value + add))
        elif kept.shape[0]:
            for i in range(width):
                out[b, i] = kept[b, i]
        elif iscale[b] == _ZERO:
            for i in range(width):
                out[b, i] = u8(0)
        else:
            for i in range(width):
                value = f32(_nearest(iscale[b] * (x[b, i] - origin[b])))
                value = value if value > bottom else bottom
                value = value if value < highest else highest
                out[b, i] = u8(i32(value + add))
