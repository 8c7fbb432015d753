"""Compiled loops for outputs whose bytes take turns, inputs in the order of a GPU's registers (``formats.eetq``). Serial, ``nogil``.

Sixteen bytes of a tile are two uint64. The even bytes become inputs 0 … 7, the odd ones inputs 8 … 15: three shift-and-mask steps each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from qformats.loops.compiled import compiled

__all__ = ["pack", "unpack"]

Array = np.ndarray[Any, Any]

_FLIP = np.uint64(0x8080808080808080)
_BYTES, _PAIRS, _FOURS = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00000000FFFFFFFF)
_8, _16, _32 = np.uint64(8), np.uint64(16), np.uint64(32)


def _inline(function: Any) -> Any:
    return njit(inline="always", nogil=True, error_model="numpy")(function)


@_inline
def _evens(x: Any) -> Any:
    """Bytes 0, 2, 4, 6 in the low half."""
    x = x & _BYTES
    x = (x | (x >> _8)) & _PAIRS
    return (x | (x >> _16)) & _FOURS


@_inline
def _apart(x: Any) -> Any:
    """The inverse of ``_evens``."""
    x = (x | (x << _16)) & _PAIRS
    return (x | (x << _8)) & _BYTES


@compiled
def unpack(stored: Array, codes: Array) -> None:
    """uint64 (P, T, 2, 8), eight words a tile of 64, -> uint64 (P, 2, 8 T); equals ``eetq.unpack_definition``."""
    for p in range(stored.shape[0]):
        for side in range(2):
            for t in range(stored.shape[1]):
                for i in range(0, 8, 2):
                    a, b = stored[p, t, side, i], stored[p, t, side, i + 1]
                    codes[p, side, 8 * t + i] = (_evens(a) | (_evens(b) << _32)) ^ _FLIP
                    codes[p, side, 8 * t + i + 1] = (_evens(a >> _8) | (_evens(b >> _8) << _32)) ^ _FLIP


@compiled
def pack(codes: Array, stored: Array) -> None:
    """The inverse of ``unpack``; equals ``eetq.pack_definition``."""
    for p in range(stored.shape[0]):
        for side in range(2):
            for t in range(stored.shape[1]):
                for i in range(0, 8, 2):
                    low, high = codes[p, side, 8 * t + i] ^ _FLIP, codes[p, side, 8 * t + i + 1] ^ _FLIP
                    stored[p, t, side, i] = _apart(low & _FOURS) | (_apart(high & _FOURS) << _8)
                    stored[p, t, side, i + 1] = _apart(low >> _32) | (_apart(high >> _32) << _8)
