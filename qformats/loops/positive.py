"""A compiled search for positive weights, one run after the other: what ``iquantize`` needs of it. No fastmath.

The definition it must equal, bit for bit, is ``best_positive`` in ``qformats.quantize.ksearch``. ``kquantize`` has the same search with
runs in SIMD lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = ["positive"]

Array = np.ndarray[Any, Any]
i32, f32 = np.int32, np.float32
_MAGIC, _ZERO, _ONE, _EPSILON = f32(12582912.0), f32(0), f32(1), f32(1e-15)


@compiled
def _nearest(v: Any) -> Any:
    """``ksearch.nearest`` by the bits; a NaN that arithmetic made has only its top mantissa bit set and gives 0."""
    return i32(i32(f32(v + _MAGIC).view(i32) & i32(0x007FFFFF)) - i32(0x00400000))


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
