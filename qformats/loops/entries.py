"""Compiled loop for sums of codebook entries under one scale a row of codes. Serial, ``nogil``; the output array is a parameter."""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = ["decode"]

Array = np.ndarray[Any, Any]


@compiled
def decode(codes: Array, books: Array, scales: Array, high: int, odd: bool, out: Array) -> None:
    """Codes (R, G, C), books float32 (C, entries, high * wide), scales float64 (R,) -> out float32 (R * high, G * wide).

    Equals ``QuantizedTensor._from_entries`` in float64, rounded once to float32, or with ``odd`` to the neighbour whose last bit is set, so
    that a second rounding to a shorter float gives what one would.
    """
    rows, groups, count = codes.shape
    entries, width = books.shape[1], books.shape[2]
    wide = width // high
    total = np.empty(width, np.float64)
    near = np.empty(width, np.float32)
    bits = near.view(np.uint32)
    for r in range(rows):
        scale = scales[r]
        for g in range(groups):
            total[:] = 0.0
            for c in range(count):
                u = np.int64(codes[r, g, c])
                entry = books[c, u + entries if u < 0 else u]
                for j in range(width):
                    total[j] += np.float64(entry[j])
            for j in range(width):
                total[j] *= scale
                near[j] = np.float32(total[j])
            if odd:
                for j in range(width):
                    back = np.float64(near[j])
                    over = np.uint32(1) if abs(back) > abs(total[j]) else np.uint32(0)
                    off = np.uint32(1) if back != total[j] else np.uint32(0)
                    bits[j] = (bits[j] - over) | off
            for p in range(high):
                out[r * high + p, g * wide : (g + 1) * wide] = near[p * wide : (p + 1) * wide]
