"""Compiled loops between tiled words of 4-bit codes and uint8 codes: Marlin's tiles and the 16-bit words of AWQ GEMV_FAST.

Serial, ``nogil``; numpy arrays in, output arrays as parameters. Each equals a definition named in its docstring.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = ["pack_fast", "pack_marlin", "unpack_fast", "unpack_marlin"]

Array = np.ndarray[Any, Any]


@compiled
def unpack_marlin(words: Array, out: Array) -> None:
    """uint32 (K / 16, 2 n) -> uint16 (n, K / 2), two codes each: ``qformats.formats.marlin.unpack_tiles_definition``."""
    for chunk in range(words.shape[1] // 128):
        for tall in range(words.shape[0]):
            for word in range(128):
                x = words[tall, 128 * chunk + word]
                column = 64 * chunk + 16 * (word & 3) + (word >> 4)
                pair = 8 * tall + (word >> 2 & 3)
                out[column, pair] = (x & np.uint32(15)) | (x >> np.uint32(8) & np.uint32(0x0F00))
                out[column, pair + 4] = (x >> np.uint32(4) & np.uint32(15)) | (x >> np.uint32(12) & np.uint32(0x0F00))
                out[column + 8, pair] = (x >> np.uint32(8) & np.uint32(15)) | (x >> np.uint32(16) & np.uint32(0x0F00))
                out[column + 8, pair + 4] = (x >> np.uint32(12) & np.uint32(15)) | (x >> np.uint32(20) & np.uint32(0x0F00))


@compiled
def pack_marlin(codes: Array, out: Array) -> None:
    """uint16 (n, K / 2), two codes each -> uint32 (K / 16, 2 n): ``qformats.formats.marlin.pack_tiles_definition``."""
    low, high = np.uint32(15), np.uint32(0x0F00)
    for chunk in range(out.shape[1] // 128):
        for tall in range(out.shape[0]):
            for word in range(128):
                column = 64 * chunk + 16 * (word & 3) + (word >> 4)
                pair = 8 * tall + (word >> 2 & 3)
                a, b = np.uint32(codes[column, pair]), np.uint32(codes[column, pair + 4])
                c, d = np.uint32(codes[column + 8, pair]), np.uint32(codes[column + 8, pair + 4])
                first = (a & low) | ((b & low) << np.uint32(4)) | ((c & low) << np.uint32(8)) | ((d & low) << np.uint32(12))
                second = ((a & high) << np.uint32(8)) | ((b & high) << np.uint32(12)) | ((c & high) << np.uint32(16))
                out[tall, 128 * chunk + word] = first | second | ((d & high) << np.uint32(20))


@compiled
def unpack_fast(words: Array, out: Array) -> None:
    """uint16 (n / 4, K) -> uint8 (n, K): ``qformats.formats.awq.fast.unpack_words_definition``."""
    for row in range(words.shape[0]):
        for at in range(0, words.shape[1], 8):
            start = at // 64 * 64 + (at & 8) * 4
            target = out[4 * row + (at >> 4 & 3)]
            for field in range(4):
                for j in range(8):
                    target[start + 8 * field + j] = words[row, at + j] >> np.uint16(4 * field) & np.uint16(15)


@compiled
def pack_fast(codes: Array, out: Array) -> None:
    """uint8 (n, K) -> uint16 (n / 4, K): ``qformats.formats.awq.fast.pack_words_definition``."""
    for row in range(out.shape[0]):
        for at in range(0, out.shape[1], 8):
            start = at // 64 * 64 + (at & 8) * 4
            source = codes[4 * row + (at >> 4 & 3)]
            for j in range(8):
                x = np.uint32(source[start + j] & np.uint8(15))
                x |= np.uint32(source[start + 8 + j] & np.uint8(15)) << np.uint32(4)
                x |= np.uint32(source[start + 16 + j] & np.uint8(15)) << np.uint32(8)
                out[row, at + j] = x | np.uint32(source[start + 24 + j] & np.uint8(15)) << np.uint32(12)
