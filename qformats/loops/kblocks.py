"""Compiled loops over Q2_K and Q3_K blocks: unpack, pack and dequantize. Definitions: ``qformats.formats.ggml.kquants``.

Arrays and habits are those of ``qformats.loops.ggml``, which lists these loops in its tables; sub-scales and minima are uint8 (S, 16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qformats.loops.compiled import compiled
from qformats.loops.half import half_of, word

__all__ = ["DEQUANTIZE", "PACK", "UNPACK"]

Array = np.ndarray[Any, Any]
u8, u16, f32 = np.uint8, np.uint16, np.float32


@compiled
def unpack2k(blocks: Array, codes: Array, sc: Array, m: Array, d: Array, dmin: Array, width: int) -> None:
    """Q2_K: codes (S, 256), sc and m (S, 16), d and dmin uint16 (S,); ``width`` = 32."""
    for b in range(blocks.shape[0]):
        d[b], dmin[b] = word(blocks[b, 80], blocks[b, 81]), word(blocks[b, 82], blocks[b, 83])
        for j in range(16):
            sc[b, j], m[b, j] = u8(blocks[b, j] & u8(15)), u8(blocks[b, j] >> u8(4))
        for i in range(2):
            at, to = 16 + 32 * i, 128 * i
            for j in range(width):
                c = blocks[b, at + j]
                codes[b, to + j] = u8(c & u8(3))
                codes[b, to + 32 + j] = u8(u8(c >> u8(2)) & u8(3))
                codes[b, to + 64 + j] = u8(u8(c >> u8(4)) & u8(3))
                codes[b, to + 96 + j] = u8(c >> u8(6))


@compiled
def pack2k(blocks: Array, codes: Array, sc: Array, m: Array, d: Array, dmin: Array, width: int) -> None:
    """The inverse of ``unpack2k``."""
    for b in range(blocks.shape[0]):
        blocks[b, 80], blocks[b, 81] = u8(d[b]), u8(d[b] >> u16(8))
        blocks[b, 82], blocks[b, 83] = u8(dmin[b]), u8(dmin[b] >> u16(8))
        for j in range(16):
            blocks[b, j] = u8(sc[b, j] | u8(m[b, j] << u8(4)))
        for i in range(2):
            at, to = 16 + 32 * i, 128 * i
            for j in range(width):
                low = u8(codes[b, to + j] | u8(codes[b, to + 32 + j] << u8(2)))
                blocks[b, at + j] = u8(low | u8(u8(codes[b, to + 64 + j] << u8(4)) | u8(codes[b, to + 96 + j] << u8(6))))


@compiled
def _scale3(blocks: Array, b: int, j: int) -> Any:
    """Sub-scale ``j`` of a Q3_K super-block, 0 … 63."""
    low = u8(blocks[b, 96 + j] & u8(15)) if j < 8 else u8(blocks[b, 88 + j] >> u8(4))
    return u8(low | u8(u8(u8(blocks[b, 104 + (j & 3)] >> u8(2 * (j >> 2))) & u8(3)) << u8(4)))


@compiled
def unpack3k(blocks: Array, codes: Array, sc: Array, d: Array, width: int) -> None:
    """Q3_K: codes (S, 256), sc (S, 16), d uint16 (S,); ``width`` = 32."""
    for b in range(blocks.shape[0]):
        d[b] = word(blocks[b, 108], blocks[b, 109])
        for j in range(16):
            sc[b, j] = _scale3(blocks, b, j)
        for i in range(2):
            at, to, bit = 32 + 32 * i, 128 * i, u8(4 * i)
            for j in range(width):
                c, h = blocks[b, at + j], u8(blocks[b, j] >> bit)
                codes[b, to + j] = u8(u8(c & u8(3)) | u8(u8(h & u8(1)) << u8(2)))
                codes[b, to + 32 + j] = u8(u8(u8(c >> u8(2)) & u8(3)) | u8(u8(h & u8(2)) << u8(1)))
                codes[b, to + 64 + j] = u8(u8(u8(c >> u8(4)) & u8(3)) | u8(h & u8(4)))
                codes[b, to + 96 + j] = u8(u8(c >> u8(6)) | u8(u8(h & u8(8)) >> u8(1)))


@compiled
def pack3k(blocks: Array, codes: Array, sc: Array, d: Array, width: int) -> None:
    """The inverse of ``unpack3k``."""
    for b in range(blocks.shape[0]):
        blocks[b, 108], blocks[b, 109] = u8(d[b]), u8(d[b] >> u16(8))
        for j in range(8):
            blocks[b, 96 + j] = u8(u8(sc[b, j] & u8(15)) | u8(sc[b, j + 8] << u8(4)))
        for j in range(4):
            low = u8(u8(sc[b, j] >> u8(4)) | u8(u8(sc[b, j + 4] >> u8(4)) << u8(2)))
            blocks[b, 104 + j] = u8(low | u8(u8(u8(sc[b, j + 8] >> u8(4)) << u8(4)) | u8(u8(sc[b, j + 12] >> u8(4)) << u8(6))))
        for j in range(width):
            blocks[b, j] = u8(0)
        for i in range(2):
            at, to, bit = 32 + 32 * i, 128 * i, u8(4 * i)
            for j in range(width):
                c0, c1, c2, c3 = codes[b, to + j], codes[b, to + 32 + j], codes[b, to + 64 + j], codes[b, to + 96 + j]
                low = u8(u8(c0 & u8(3)) | u8(u8(c1 & u8(3)) << u8(2)))
                blocks[b, at + j] = u8(low | u8(u8(u8(c2 & u8(3)) << u8(4)) | u8(c3 << u8(6))))
                high = u8(u8(u8(c0 >> u8(2)) | u8(u8(c1 & u8(4)) >> u8(1))) | u8(u8(c2 & u8(4)) | u8(u8(c3 & u8(4)) << u8(1))))
                blocks[b, j] |= u8(high << bit)


@compiled
def dequantize2k(blocks: Array, out: Array, half: int) -> None:
    """Q2_K -> float32 (S, 256): ``(d * sc) * q - (dmin * m)``, scales on 16 weights; ``half`` = 16."""
    for b in range(blocks.shape[0]):
        d, dmin = half_of(blocks[b, 80], blocks[b, 81]), half_of(blocks[b, 82], blocks[b, 83])
        for i in range(4):  # weights 16 (i % 2) + 0 … 15 of each 32 in half i // 2
            at, to, s = 16 + 32 * (i // 2) + 16 * (i % 2), 128 * (i // 2) + 16 * (i % 2), 8 * (i // 2) + i % 2
            s0, s1, s2, s3 = blocks[b, s], blocks[b, s + 2], blocks[b, s + 4], blocks[b, s + 6]
            d0, d1, d2, d3 = d * f32(s0 & u8(15)), d * f32(s1 & u8(15)), d * f32(s2 & u8(15)), d * f32(s3 & u8(15))
            o0, o1, o2, o3 = dmin * f32(s0 >> u8(4)), dmin * f32(s1 >> u8(4)), dmin * f32(s2 >> u8(4)), dmin * f32(s3 >> u8(4))
            for j in range(half):
                c = blocks[b, at + j]
                out[b, to + j] = d0 * f32(u8(c & u8(3))) - o0
                out[b, to + 32 + j] = d1 * f32(u8(u8(c >> u8(2)) & u8(3))) - o1
                out[b, to + 64 + j] = d2 * f32(u8(u8(c >> u8(4)) & u8(3))) - o2
                out[b, to + 96 + j] = d3 * f32(u8(c >> u8(6))) - o3


@compiled
def dequantize3k(blocks: Array, out: Array, half: int) -> None:
    """Q3_K -> float32 (S, 256): ``(d * (sc - 32)) * (q - 4)``, scales on 16 weights; ``half`` = 16."""
    four, centre = f32(4), f32(32)
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 108], blocks[b, 109])
        for i in range(4):  # weights 16 (i % 2) + 0 … 15 of each 32 in half i // 2
            k, s, bit = 16 * (i % 2), 8 * (i // 2) + i % 2, u8(4 * (i // 2))
            at, to = 32 + 32 * (i // 2) + k, 128 * (i // 2) + k
            d0, d1 = d * (f32(_scale3(blocks, b, s)) - centre), d * (f32(_scale3(blocks, b, s + 2)) - centre)
            d2, d3 = d * (f32(_scale3(blocks, b, s + 4)) - centre), d * (f32(_scale3(blocks, b, s + 6)) - centre)
            for j in range(half):
                c, h = blocks[b, at + j], u8(blocks[b, k + j] >> bit)
                out[b, to + j] = d0 * (f32(u8(u8(c & u8(3)) | u8(u8(h & u8(1)) << u8(2)))) - four)
                out[b, to + 32 + j] = d1 * (f32(u8(u8(u8(c >> u8(2)) & u8(3)) | u8(u8(h & u8(2)) << u8(1)))) - four)
                out[b, to + 64 + j] = d2 * (f32(u8(u8(u8(c >> u8(4)) & u8(3)) | u8(h & u8(4)))) - four)
                out[b, to + 96 + j] = d3 * (f32(u8(u8(c >> u8(6)) | u8(u8(h & u8(8)) >> u8(1)))) - four)


# type name -> loop over (blocks, codes, sc, m, d, dmin), (blocks, out)
UNPACK: dict[str, Callable[..., None]] = {
    "Q2_K": lambda blocks, codes, sc, m, d, dmin: unpack2k(blocks, codes, sc, m, d, dmin, 32),
    "Q3_K": lambda blocks, codes, sc, m, d, dmin: unpack3k(blocks, codes, sc, d, 32),
}
PACK: dict[str, Callable[..., None]] = {
    "Q2_K": lambda blocks, codes, sc, m, d, dmin: pack2k(blocks, codes, sc, m, d, dmin, 32),
    "Q3_K": lambda blocks, codes, sc, m, d, dmin: pack3k(blocks, codes, sc, d, 32),
}
DEQUANTIZE: dict[str, Callable[[Array, Array], None]] = {
    "Q2_K": lambda blocks, out: dequantize2k(blocks, out, 16),
    "Q3_K": lambda blocks, out: dequantize3k(blocks, out, 16),
}
