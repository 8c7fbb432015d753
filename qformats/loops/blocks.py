"""Compiled loops over runs of codes in a row: their range, their relabelling, and the search for offsets that fp16 can hold.

The definitions each must equal are in ``qformats.rewrite`` (``block_range``, ``flip_and_shift``) and ``qformats.reencode``
(``search_offset``). Arrays are contiguous; codes uint8 (n, K), or int8 viewed as uint8 where only wrap-around matters.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = ["offset_blocks", "relabel", "run_range", "search_offset"]

u8, i16, i32, f32, u64, f64 = np.uint8, np.int16, np.int32, np.float32, np.uint64, np.float64
_BELOW_HALF = u64((1 << 42) - 1)  # the 52 - 10 bits of a float64's fraction that fp16 lacks
_MAX_HALF = f64(65504.0)
_STEPS_PER_ONE = f64(16777216.0)  # 2^24: the smallest fp16 subnormal is 2^-24


@compiled
def run_range(codes: Any, width: int, low: Any, high: Any) -> None:
    """Smallest and largest of each run of ``width`` columns of ``codes`` (n, K) into int16 (n, ceil(K / width))."""
    n, k = codes.shape
    for r in range(n):
        for b in range(low.shape[1]):
            run = codes[r, b * width : min(b * width + width, k)]
            smallest = run[0]
            largest = run[0]
            for i in range(run.shape[0]):
                c = run[i]
                smallest = c if c < smallest else smallest
                largest = c if c > largest else largest
            low[r, b] = i16(smallest)
            high[r, b] = i16(largest)


@compiled
def relabel(codes: Any, width: int, add: Any, mask: Any, out: Any) -> None:
    """``out = (codes ^ mask) + add`` in bytes, for each run of ``width`` columns; ``add`` and ``mask`` uint8 (n, runs)."""
    n, k = codes.shape
    for r in range(n):
        for b in range(add.shape[1]):
            run = codes[r, b * width : min(b * width + width, k)]
            made = out[r, b * width : min(b * width + width, k)]
            a, m = add[r, b], mask[r, b]
            for i in range(run.shape[0]):
                made[i] = u8(u8(run[i] ^ m) + a)


@compiled
def _fits_half(value: Any) -> Any:
    """Whether a float64 is a finite fp16 number: at most 11 significant bits, a multiple of 2^-24, no larger than 65504."""
    steps = value * _STEPS_PER_ONE
    return (f64(value).view(u64) & _BELOW_HALF) == u64(0) and np.floor(steps) == steps and abs(value) <= _MAX_HALF


@compiled
def search_offset(scale: Any, smallest: Any, largest: Any, top: int, chosen: Any, flip: Any, found: Any) -> None:
    """For each block with ``found`` unset, the first step and direction whose ``scale x integer`` fp16 holds.

    ``scale`` float32 holding fp16 values, ``smallest``/``largest`` int16: range of code minus zero point. In order of step 0, 1, …:
    shift (integer ``smallest - step``, legal if >= ``largest - top``), then flip (``largest + step``, legal if <= ``smallest + top``).
    Writes the integer to ``chosen`` (int16), the direction to ``flip`` and sets ``found``.
    """
    for b in range(scale.shape[0]):
        if found[b]:
            continue
        s, low, high = f64(scale[b]), i32(smallest[b]), i32(largest[b])
        for step in range(top - (high - low) + 1):  # beyond, both directions leave the grid
            if _fits_half(s * f64(low - step)):
                chosen[b] = i16(low - step)
                flip[b] = False
                found[b] = True
                break
            if _fits_half(s * f64(high + step)):
                chosen[b] = i16(high + step)
                flip[b] = True
                found[b] = True
                break


@compiled
def offset_blocks(
    scale: Any, zero: Any, low: Any, high: Any, ratio: int, top: int, fits: bool, shift: Any, flip: Any, offset: Any, signed: Any
) -> Any:
    """Relabelling and offset of every block, ``ratio`` blocks a group; returns how many blocks round.

    ``scale`` float32 (n, G) holding fp16 values, ``zero`` int16 (n, G), ``low``/``high`` int16 (n, B) or (n, 0) where code ranges are
    not known. Per group the plain offset, else the mirrored one (both only if all codes ``fits``); per block the search of
    ``search_offset``; else the plain one, which rounds. Writes ``shift`` int16, ``flip`` bool, ``offset`` and ``signed`` (the scale
    with the flip's sign) float32, all (n, B).
    """
    n, blocks = shift.shape
    left = 0
    for r in range(n):
        for g in range(scale.shape[1]):
            s, z = f64(scale[r, g]), i32(zero[r, g])
            k, mirrored, good = -z, False, fits and _fits_half(s * f64(-z))
            if fits and not good and _fits_half(s * f64(top - z)):
                k, mirrored, good = top - z, True, True
            for b in range(g * ratio, min(blocks, g * ratio + ratio)):
                code, turned, found = k, mirrored, good
                if not found and low.shape[1] > 0:
                    smallest, largest = i32(low[r, b]) - z, i32(high[r, b]) - z
                    for step in range(top - (largest - smallest) + 1):
                        if _fits_half(s * f64(smallest - step)):
                            code, turned, found = smallest - step, False, True
                            break
                        if _fits_half(s * f64(largest + step)):
                            code, turned, found = largest + step, True, True
                            break
                if not found:
                    left += 1
                    code, turned = -z, False
                shift[r, b] = i16(code + z) if turned else i16(-code - z)
                flip[r, b] = turned
                offset[r, b] = f32(s * f64(code))
                signed[r, b] = f32(-s) if turned else f32(s)
    return left
