"""Compiled passes of the search for better integer codes: errors and moments of groups under given steps and origins.

The definitions they must equal, bit for bit, are ``define_error`` and ``define_moments`` of ``qformats.quantize.affine_search.Search``.
``x`` is (groups, width), ``w`` its weights or (0, width) for none, ``step`` and ``origin`` (groups,). ``kind``: 0 where the origin is a
whole zero point, 1 where it is any zero point, 2 where it is an offset. Terms go into a workspace and are added in halves. No fastmath.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = ["errors", "moments"]

Array = np.ndarray[Any, Any]
f32, i64 = np.float32, np.int64

_MAGIC = f32(12582912.0)  # adding 1.5 * 2^23 leaves the nearest integer, ties to even


@compiled
def _halved(work: Array, width: Any) -> Any:
    """The sum of the first ``width`` numbers of the workspace, which are used up."""
    while width > 1:
        half = width // 2
        for i in range(half):
            work[i] = work[i] + work[width - half + i]
        width -= half
    return work[0]


@compiled
def _levels(x: Array, g: Any, step: Any, origin: Any, low: Any, top: Any, kind: Any, out: Array) -> None:
    """What a step is multiplied by to give each weight of a group: code - zero point, or the code beside an offset."""
    magic = f32(_MAGIC)
    if kind == 0:
        least, most = low - origin, top - origin
        for i in range(out.size):
            t = x[g, i] / step
            t = least if t < least else t
            t = most if t > most else t
            out[i] = (t + magic) - magic
    elif kind == 1:
        for i in range(out.size):
            t = x[g, i] / step + origin
            t = low if t < low else t
            t = top if t > top else t
            out[i] = ((t + magic) - magic) - origin
    else:
        for i in range(out.size):
            t = (x[g, i] - origin) / step
            t = low if t < low else t
            t = top if t > top else t
            out[i] = (t + magic) - magic


@compiled
def _errors(x: Array, w: Array, step: Array, origin: Array, low: Any, top: Any, kind: Any, out: Array, work: Array) -> None:
    for g in range(step.size):
        s, o = step[g], origin[g]
        _levels(x, g, s, o, low, top, kind, work)
        base = o if kind == 2 else f32(0)
        for i in range(work.size):
            r = work[i] * s + base if kind == 2 else work[i] * s
            r = r - x[g, i]
            work[i] = r * r
        if w.shape[0]:
            for i in range(work.size):
                work[i] = work[i] * w[g, i]
        out[g] = _halved(work, work.size)


@compiled
def _moments(x: Array, w: Array, step: Array, origin: Array, low: Any, top: Any, kind: Any, out: Array, work: Array) -> None:
    one, two, three = work[0], work[1], work[2]
    for g in range(step.size):
        o = origin[g]
        _levels(x, g, step[g], o, low, top, kind, one)
        for i in range(one.size):
            level = one[i]
            weighted = level * w[g, i] if w.shape[0] else level
            one[i], two[i], three[i] = weighted * x[g, i], weighted * level, weighted
        out[0, g], out[1, g], out[2, g] = _halved(one, one.size), _halved(two, two.size), _halved(three, three.size)


def errors(x: Array, w: Array, step: Array, origin: Array, low: int, top: int, kind: int) -> Array:
    """float32 (groups,): the weighted squared errors."""
    out, work = np.empty(len(x), f32), np.empty(x.shape[1], f32)
    _errors(x, w, step, origin, f32(low), f32(top), i64(kind), out, work)
    return out


def moments(x: Array, w: Array, step: Array, origin: Array, low: int, top: int, kind: int) -> Array:
    """float32 (3, groups): the sums of w level x, w level^2 and w level."""
    out, work = np.empty((3, len(x)), f32), np.empty((3, x.shape[1]), f32)
    _moments(x, w, step, origin, f32(low), f32(top), i64(kind), out, work)
    return out
