"""Compiled passes of the better search: errors and moments of blocks under given scales, sixteen blocks in the lanes of a vector.

The definitions they must equal, bit for bit, are ``_error`` of ``nearest`` levels and ``_moments`` in ``qformats.quantize.best``. Blocks
come in groups of ``LANES``: ``x`` is (groups, n, LANES), and so is ``w``. Terms go into a workspace and are added in halves, as the
definition does. No fastmath.

Counts are passed as int64, for numba compiles a function again for every literal integer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled
from qformats.loops.vectors import LANES, load, splat, store, where

__all__ = ["LANES", "errors", "moments"]

Array = np.ndarray[Any, Any]
f32, i64 = np.float32, np.int64

_MAGIC, _ZERO, _ONE = f32(12582912.0), f32(0), f32(1)  # adding 1.5 * 2^23 leaves the nearest integer, ties to even


@compiled
def _level(t: Any, middles: Array, levels: Array) -> Any:
    """The level nearest to each lane; without ``middles`` the integer, between the two ``levels``."""
    if middles.size:
        found = splat(levels[0])
        for k in range(middles.size):
            found = where(t >= splat(middles[k]), splat(levels[k + 1]), found)
        return found
    low, high, magic = splat(levels[0]), splat(levels[1]), splat(_MAGIC)
    t = where(t < low, low, t)
    t = where(t > high, high, t)
    return (t + magic) - magic


@compiled
def _inverse(scale: Any) -> Any:
    zero = splat(_ZERO)
    return where(scale != zero, splat(_ONE) / scale, zero)


@compiled
def _halved(work: Array, at: Any, width: Any) -> Any:
    """The sum of ``width`` rows of the workspace from row ``at``, which are used up."""
    while width > 1:
        width //= 2
        for i in range(width):
            store(work, (at + i) * LANES, load(work, (at + i) * LANES) + load(work, (at + width + i) * LANES))
    return load(work, at * LANES)


@compiled
def _errors(x: Array, w: Array, scale: Array, low: Array, middles: Array, levels: Array, out: Array, work: Array, width: Any) -> None:
    blocks = scale.size
    for first in range(0, blocks, LANES):
        each = load(scale, first)
        inverse, least = _inverse(each), splat(_ZERO)
        if low.size:
            least = load(low, first)
        for i in range(width):
            v = load(x, first * width + i * LANES)
            t = (v - least) * inverse if low.size else v * inverse
            r = _level(t, middles, levels) * each - v
            if low.size:
                r = r + least
            r = r * r
            if w.size:
                r = r * load(w, first * width + i * LANES)
            store(work, i * LANES, r)
        store(out, first, _halved(work, i64(0), width))


@compiled
def _moments(x: Array, w: Array, scale: Array, low: Array, middles: Array, levels: Array, out: Array, work: Array, width: Any) -> None:
    blocks = scale.size
    for first in range(0, blocks, LANES):
        inverse, least = _inverse(load(scale, first)), splat(_ZERO)
        if low.size:
            least = load(low, first)
        for i in range(width):
            v = load(x, first * width + i * LANES)
            t = (v - least) * inverse if low.size else v * inverse
            level = _level(t, middles, levels)
            weighted = level * load(w, first * width + i * LANES) if w.size else level
            store(work, i * LANES, weighted * v)
            store(work, (width + i) * LANES, weighted * level)
            store(work, (2 * width + i) * LANES, weighted)
        store(out, first, _halved(work, i64(0), width))
        store(out, blocks + first, _halved(work, width, width))
        store(out, 2 * blocks + first, _halved(work, 2 * width, width))


def errors(x: Array, w: Array, scale: Array, low: Array, middles: Array, levels: Array) -> Array:
    """float32 (B,): the weighted squared errors of x under ``scale`` and ``low`` (B,); ``w`` or ``low`` empty where there is none."""
    out, work = np.empty(scale.size, f32), np.empty(x.shape[1] * LANES, f32)
    _errors(x, w, scale, low, middles, levels, out, work, i64(x.shape[1]))
    return out


def moments(x: Array, w: Array, scale: Array, low: Array, middles: Array, levels: Array) -> Array:
    """float32 (3, B): the sums of w level x, w level^2 and w level, of the levels nearest under ``scale`` and ``low``."""
    out, work = np.empty((3, scale.size), f32), np.empty(3 * x.shape[1] * LANES, f32)
    _moments(x, w, scale, low, middles, levels, out, work, i64(x.shape[1]))
    return out
