"""tinygemm's tiles of int4 codes, and block scales swizzled for tensor cores: both are permutations, given here with their inverses.

Tiles: ``matrix_to_m16n8k16_Bint4_layout`` in ATen ``native/cuda/int4mm.cu`` (torch 2.13): qdata[a, b, t, i] of shape
(N / 8, K / (16 I), 32, I / 2) holds the row n = 8 a + t / 4 and eight columns from 32 (b I / 2 + i): with c = 2 (t mod 4), the four-bit
fields of the word, lowest first, are the columns c, c + 8, c + 16, c + 24, then each of these + 1.

Swizzle: ``to_blocked`` in ``prototype/mx_formats/utils.py`` of torchao 0.18.0: scales (R, G) padded to multiples of 128 and 4 with zeros;
scale (128 a + 32 q + r, 4 b + c) stands at ((a G / 4 + b), r, q, c) of blocks (…, 32, 4, 4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["pack_tiles", "swizzle", "unpack_tiles", "unswizzle"]

_SHIFTS = (0, 4, 8, 12, 16, 20, 24, 28)


def unpack_tiles(words: Array) -> Array:
    """int32 (a, b, 32, i) -> codes uint8 (8 a, 32 b i), 0 … 15."""
    import numpy as np

    a, b, _, i = words.shape
    fields = (words.view(np.uint32)[..., None] >> np.array(_SHIFTS, np.uint32)) & 15  # (a, b, 32, i, 8)
    split = fields.astype(np.uint8).reshape(a, b, 8, 4, i, 2, 4)  # row, column pair, word, odd column, eight columns on
    return np.ascontiguousarray(split.transpose(0, 2, 1, 4, 6, 3, 5)).reshape(8 * a, 32 * b * i)


def pack_tiles(codes: Array, inner: int) -> Array:
    """The inverse: codes (8 a, 32 b i) -> int32 (a, b, 32, i) with i = ``inner`` / 2."""
    import numpy as np

    n, k = codes.shape
    i = inner // 2
    split = codes.reshape(n // 8, 8, k // (32 * i), i, 4, 4, 2).transpose(0, 2, 1, 5, 3, 6, 4)
    fields = np.ascontiguousarray(split).reshape(n // 8, k // (32 * i), 32, i, 8).astype(np.uint32)
    words: Array = np.bitwise_or.reduce(fields << np.array(_SHIFTS, np.uint32), -1).view(np.int32)
    return words


def unswizzle(blocks: Array, groups: int) -> Array:
    """Whole tiles of scales, in order as stored, of rows a multiple of 128 -> (rows, ``groups``)."""
    import numpy as np

    across = -(-groups // 4)
    tiles = blocks.reshape(-1, across, 32, 4, 4).transpose(0, 3, 2, 1, 4)  # (a, q, r, b, c)
    return np.ascontiguousarray(tiles.reshape(-1, 4 * across)[:, :groups])


def swizzle(scales: Array) -> Array:
    """Scales (n, G) -> the tiles of their rows, (32 ceil(n / 128), 16 ceil(G / 4)); what fills up is zero."""
    import numpy as np

    n, groups = scales.shape
    across = -(-groups // 4)
    padded = np.zeros((-(-n // 128) * 128, 4 * across), scales.dtype)
    padded[:n, :groups] = scales
    tiles = padded.reshape(-1, 4, 32, across, 4).transpose(0, 3, 2, 1, 4)  # (a, b, r, q, c)
    return np.ascontiguousarray(tiles).reshape(len(padded) // 4, 16 * across)
