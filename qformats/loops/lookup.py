"""Compiled loop that spells codes as the values of their group's own table. Serial, ``nogil``, no fastmath.

The definition it must equal: ``table.gather(1, codes.to(int64))`` of torch, in ``qformats.tensor``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = ["spell"]

Array = np.ndarray[Any, Any]


@compiled
def spell(codes: Array, table: Array, out: Array) -> None:
    """``codes`` uint8 (G, width), each below E; ``table`` and ``out`` words of one width, (G, E) and (G, width)."""
    mask = table.shape[1] - 1  # E is a power of two: no code leads out of its row
    for group in range(codes.shape[0]):
        values = table[group]
        for i in range(codes.shape[1]):
            out[group, i] = values[codes[group, i] & mask]
