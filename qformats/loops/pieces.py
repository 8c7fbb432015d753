"""Where pieces of a vocabulary are two others in a row; equals ``qformats.architectures.spm._cuts_of`` in plain Python."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformats.loops.compiled import compiled

__all__ = ["cuts"]

_BASIS, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)  # FNV-1a of 64 bits, Fowler, Noll and Vo


@compiled
def _find(text: NDArray[np.uint8], starts: NDArray[np.int64], table: NDArray[np.int64], a: int, b: int, mark: np.uint64) -> int:
    """The slot of ``text[a:b]`` with the hash ``mark``: where it is, or the empty one where it would be."""
    last = len(table) - 1
    at = np.int64(mark ^ (mark >> np.uint64(32))) & last
    while True:
        held = table[at]
        if held < 0:
            return int(at)
        first = starts[held]
        if starts[held + 1] - first == b - a:
            same = True
            for i in range(b - a):
                if text[first + i] != text[a + i]:
                    same = False
                    break
            if same:
                return int(at)
        at = (at + 1) & last


@compiled
def _mark(text: NDArray[np.uint8], a: int, b: int) -> np.uint64:
    mark = _BASIS
    for i in range(a, b):
        mark = (mark ^ np.uint64(text[i])) * _PRIME
    return mark


@compiled
def cuts(text: NDArray[np.uint8], starts: NDArray[np.int64], table: NDArray[np.int64], found: NDArray[np.int32]) -> int:
    """Write (piece, left, right) into ``found`` (m, 3) as far as it reaches; how many there are.

    ``text``: the distinct pieces in UTF-8, one after the other, piece i from ``starts[i]`` to ``starts[i + 1]``. ``table``: filled with
    −1, its length a power of two above the number of pieces.
    """
    for piece in range(len(starts) - 1):
        a, b = starts[piece], starts[piece + 1]
        table[_find(text, starts, table, a, b, _mark(text, a, b))] = piece
    count = 0
    for piece in range(len(starts) - 1):
        a, b = starts[piece], starts[piece + 1]
        mark = _BASIS
        for cut in range(a + 1, b):
            mark = (mark ^ np.uint64(text[cut - 1])) * _PRIME
            if text[cut] & np.uint8(0xC0) == np.uint8(0x80):  # inside a character
                continue
            left = table[_find(text, starts, table, a, cut, mark)]
            if left < 0:
                continue
            right = table[_find(text, starts, table, cut, b, _mark(text, cut, b))]
            if right < 0:
                continue
            if count < len(found):
                found[count, 0], found[count, 1], found[count, 2] = piece, left, right
            count += 1
    return count
