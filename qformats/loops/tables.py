"""Compiled loops for ggml's four-bit tables: the search of IQ4_NL and IQ4_XS with 64 blocks in SIMD lanes, MXFP4, NVFP4. No fastmath.

The definitions they must equal, bit for bit: ``best_level_scale``, ``level_codes``, ``power_scales``, ``small_scales`` and ``float_codes``
in ``qformats.quantize.tables``, ``weighed`` in ``qformats.quantize.weighing``. In the search every block is one lane: the outer loop runs
over the position in the block, the inner one over lanes, so that each lane adds in the reference's order and every line of arithmetic
vectorizes. A last group that does not fill the lanes repeats its last block.

All middles between IQ4_NL's levels are multiples of one half, so floor(2 x) decides the nearest one: a table of 512 entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qformats import grids
from qformats.loops.compiled import compiled
from qformats.loops.quantize import largest_bits

__all__ = ["FLOATS", "codes", "search", "weigh"]

Array = np.ndarray[Any, Any]
u8, u32, i32, i64, f32 = np.uint8, np.uint32, np.int32, np.int64, np.float32

LANES = 64
_X, _W = 0, 32 * LANES  # weight i of lane j at i * LANES + j, the weights of errors likewise, then one number a lane each
_ISCALE, _EXTREME, _SIZE, _SCALE, _BEST, _SXL, _SL2 = (64 * LANES + i * LANES for i in range(7))
_WORKSPACE = 71 * LANES
_ZERO, _ONE, _TWO, _LOW, _HIGH, _EPSILON = f32(0), f32(1), f32(2), f32(-256), f32(255), f32(1e-15)

_levels = grids.table_values("iq4_nl").numpy().astype(np.float32)
_CODES = np.searchsorted((_levels[:-1] + _levels[1:]) / 2, np.arange(-256, 256) / 2, side="right").astype(np.uint8)
_VALUES = _levels[_CODES]


@compiled
def weigh(x: Array, q: Array, out: Array, run: int, factor: Any) -> None:
    """``out = q * sqrt(factor * mean square of the run + x^2)`` for x (n, K), q (K,)."""
    for n in range(x.shape[0]):
        for start in range(0, x.shape[1], run):
            total = _ZERO
            for i in range(start, start + run):
                total += x[n, i] * x[n, i]
            mean = f32(total * factor) / f32(run)
            for i in range(start, start + run):
                out[n, i] = q[i] * np.sqrt(mean + x[n, i] * x[n, i])


@compiled
def _load(x: Array, w: Array, work: Array, first: int) -> None:
    last = x.shape[0] - 1
    for j in range(LANES):
        b = min(first + j, last)
        for i in range(32):
            work[_X + i * LANES + j] = x[b, i]
        if w.shape[0]:
            for i in range(32):
                work[_W + i * LANES + j] = w[b, i]
    if not w.shape[0]:
        for i in range(32 * LANES):
            work[_W + i] = work[_X + i] * work[_X + i]


@compiled
def _find_extremes(work: Array) -> None:
    """The first weight of largest magnitude of each lane, and that magnitude."""
    for j in range(LANES):
        work[_EXTREME + j] = _ZERO
        work[_SIZE + j] = _ZERO
    for i in range(32):
        for j in range(LANES):
            v = work[_X + i * LANES + j]
            size, largest, extreme = abs(v), work[_SIZE + j], work[_EXTREME + j]
            work[_EXTREME + j] = v if size > largest else extreme
            work[_SIZE + j] = size if size > largest else largest


@compiled
def _sums(work: Array) -> None:
    """The sums of least squares of every lane under its inverse scale."""
    for j in range(LANES):
        work[_SXL + j] = _ZERO
        work[_SL2 + j] = _ZERO
    for i in range(32):
        for j in range(LANES):
            v = work[_X + i * LANES + j]
            twice = np.floor(work[_ISCALE + j] * v * _TWO)
            twice = _LOW if twice < _LOW else twice
            twice = twice if twice < _HIGH else _HIGH
            value = _VALUES[i64(i32(twice) + i32(256)) & 511]
            wl = work[_W + i * LANES + j] * value
            work[_SXL + j] += wl * v
            work[_SL2 + j] += wl * value


@compiled
def search(x: Array, w: Array, scale: Array, tries: Array) -> None:
    """``best_level_scale`` of x (B, 32) with weights w (B, 32), x^2 where w is (0, 32), into ``scale`` float32 (B,)."""
    work = np.empty(_WORKSPACE, f32)
    for first in range(0, x.shape[0], LANES):
        _load(x, w, work, first)
        _find_extremes(work)
        for j in range(LANES):
            work[_ISCALE + j] = _ONE / (work[_EXTREME + j] / f32(127))
        _sums(work)
        for j in range(LANES):
            lx, l2 = work[_SXL + j], work[_SL2 + j]
            found = lx / l2
            found = found if l2 > _ZERO else _ZERO
            work[_SCALE + j] = found
            work[_BEST + j] = found * lx
        for t in range(len(tries)):
            numerator = tries[t]
            for j in range(LANES):
                work[_ISCALE + j] = numerator / work[_EXTREME + j]
            _sums(work)
            for j in range(LANES):
                lx, l2 = work[_SXL + j], work[_SL2 + j]
                found = lx / l2
                better = (l2 > _ZERO) & (lx * lx > work[_BEST + j] * l2)
                work[_SCALE + j] = found if better else work[_SCALE + j]
                work[_BEST + j] = found * lx if better else work[_BEST + j]
        for j in range(min(LANES, x.shape[0] - first)):
            scale[first + j] = _ZERO if work[_SIZE + j] < _EPSILON else work[_SCALE + j]


@compiled
def _codes(x: Array, scale: Array, out: Array, width: int) -> None:
    for b in range(x.shape[0]):
        inverse = _ONE / scale[b] if scale[b] != _ZERO else _ZERO
        for i in range(width):
            twice = np.floor(inverse * x[b, i] * _TWO)
            twice = _LOW if twice < _LOW else twice
            twice = twice if twice < _HIGH else _HIGH  # of a NaN too
            out[b, i] = _CODES[i64(i32(twice) + i32(256)) & 511]


def codes(x: Array, scale: Array, out: Array) -> None:
    """``level_codes`` of x (B, 32) into ``out`` uint8."""
    _codes(x, scale, out, 32)


@compiled
def _round(x: Array, b: int, out: Array, scale: Any, width: int) -> None:
    """``float_codes`` of one block."""
    m0, m1, m2, m3 = f32(0.25) * scale, f32(0.75) * scale, f32(1.25) * scale, f32(1.75) * scale
    m4, m5, m6 = f32(2.5) * scale, f32(3.5) * scale, f32(5) * scale
    for j in range(width):
        v = x[b, j]
        size = abs(v)
        code = i32(size > m0) + i32(size > m1) + i32(size > m2) + i32(size > m3) + i32(size > m4) + i32(size > m5) + i32(size > m6)
        minus = i32(8) if v < -m0 else i32(0)
        out[b, j] = u8(code + minus)


@compiled
def _powers(x: Array, bits: Array, out: Array, scales: Array, width: int) -> None:
    for b in range(x.shape[0]):
        largest = f32(u32(largest_bits(bits, b, width)).view(f32))
        power = i32(-125)
        if largest > _ZERO:
            power = i32(np.floor(f32(np.log2(np.float64(largest)))))
        byte = i32(power + i32(125))
        if byte < i32(0):
            scales[b] = u8(0) if byte == i32(-1) else u8(byte & 255)
            for j in range(width):
                out[b, j] = u8(0)
        else:
            scales[b] = u8(byte)
            power_of_two = u32(byte << 23) if byte else u32(0x00400000)
            _round(x, b, out, u32(power_of_two).view(f32), width)


@compiled
def _smalls(x: Array, bits: Array, out: Array, scales: Array, values: Array, width: int) -> None:
    for b in range(x.shape[0]):
        sixth = u32(largest_bits(bits, b, width)).view(f32) / f32(6)
        sixth = sixth if sixth < f32(448) else f32(448)
        if sixth < f32(2.0**-6):
            byte = min(i32(sixth * f32(512) + f32(0.5)), i32(7))
        else:
            byte = i32(i32(i32(f32(sixth).view(i32) >> i32(19)) - i32(1919)) >> i32(1))
            byte = i32(0x7E) if byte >= i32(120) else byte
        scales[b] = u8(byte)
        if byte:
            _round(x, b, out, values[byte & 127], width)
        else:
            for j in range(width):
                out[b, j] = u8(0)


def _small_values() -> Array:
    return grids.float_values("ue4m3").numpy()[:128].astype(np.float32)


# type name -> loop over (x (B, run), codes uint8 (B, run), scale bytes (B,))
FLOATS: dict[str, Callable[[Array, Array, Array], None]] = {
    "mxfp4": lambda x, out, scales: _powers(x, x.view(u32), out, scales, 32),
    "nvfp4": lambda x, out, scales: _smalls(x, x.view(u32), out, scales, _small_values(), 16),
}
