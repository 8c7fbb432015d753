"""Compiled loops over ggml blocks: unpack, pack and dequantize Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K, one pass over the bytes each.

The tables at the end list those of ``kblocks`` (Q2_K Q3_K), ``codebooks`` and ``ggml_small`` too.

The definition each loop must equal bit for bit is the torch function of the same purpose in ``qformats.formats.ggml.legacy`` and
``kquants`` (``unpack_blocks``, ``pack_blocks``, ``dequantize_blocks``), where the byte layouts stand. Everything is serial, releases the
GIL and takes contiguous numpy arrays: blocks uint8 (B, block bytes), codes uint8 (B, 32) or (B, 256), fp16 fields as uint16 (B,).

Two habits of LLVM shape the code. A loop over a constant 16 or 32 is unrolled before the vectorizer sees it and runs at half speed or
less, so trip counts are arguments (``half``, ``width``); offsets within a block must be constants, so they are closed over.
Mixed integer types widen to 64 bits, so every step is cast back.
No fastmath: bit equality needs each product and sum rounded where ggml rounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qformats.loops import codebooks, ggml_small, kblocks
from qformats.loops.compiled import compiled
from qformats.loops.half import FILL, GATHER, ONES, PICK, half_of, word

__all__ = ["DEQUANTIZE", "PACK", "UNPACK"]

Array = np.ndarray[Any, Any]
u8, u16, u32, u64, i8, f32 = np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.float32

_FIFTH = u64(0x1010101010101010)


def _nibbles(head: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """unpack and pack for Q4_0 (``head`` = 2 bytes before ``qs``) and Q4_1 (4), called with ``half`` = 16."""

    @compiled
    def unpack(blocks: Array, codes: Array, d: Array, m: Array, half: int) -> None:
        for b in range(blocks.shape[0]):
            d[b] = word(blocks[b, 0], blocks[b, 1])
            if head == 4:
                m[b] = word(blocks[b, 2], blocks[b, 3])
            for j in range(half):
                c = blocks[b, head + j]
                codes[b, j] = u8(c & u8(15))
                codes[b, half + j] = u8(c >> u8(4))

    @compiled
    def pack(blocks: Array, codes: Array, d: Array, m: Array, half: int) -> None:
        for b in range(blocks.shape[0]):
            blocks[b, 0], blocks[b, 1] = u8(d[b]), u8(d[b] >> u16(8))
            if head == 4:
                blocks[b, 2], blocks[b, 3] = u8(m[b]), u8(m[b] >> u16(8))
            for j in range(half):
                blocks[b, head + j] = u8(u8(codes[b, j] & u8(15)) | u8(codes[b, half + j] << u8(4)))

    return unpack, pack


def _fives(head: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """unpack and pack for Q5_0 (``head`` = 2 bytes before ``qh``) and Q5_1 (4); ``words`` is ``codes`` seen as uint64 (B, 4)."""

    @compiled
    def unpack(blocks: Array, codes: Array, words: Array, d: Array, m: Array, half: int) -> None:
        for b in range(blocks.shape[0]):
            d[b] = word(blocks[b, 0], blocks[b, 1])
            if head == 4:
                m[b] = word(blocks[b, 2], blocks[b, 3])
            for i in range(4):
                words[b, i] = ((((u64(blocks[b, head + i]) * ONES) & PICK) + FILL) >> u64(3)) & _FIFTH
            for j in range(half):
                c = blocks[b, head + 4 + j]
                codes[b, j] |= u8(c & u8(15))
                codes[b, half + j] |= u8(c >> u8(4))

    @compiled
    def pack(blocks: Array, codes: Array, words: Array, d: Array, m: Array, half: int) -> None:
        for b in range(blocks.shape[0]):
            blocks[b, 0], blocks[b, 1] = u8(d[b]), u8(d[b] >> u16(8))
            if head == 4:
                blocks[b, 2], blocks[b, 3] = u8(m[b]), u8(m[b] >> u16(8))
            for i in range(4):
                blocks[b, head + i] = u8((((words[b, i] >> u64(4)) & ONES) * GATHER) >> u64(56))
            for j in range(half):
                blocks[b, head + 4 + j] = u8(u8(codes[b, j] & u8(15)) | u8(codes[b, half + j] << u8(4)))

    return unpack, pack


@compiled
def unpack8(blocks: Array, codes: Array, d: Array, width: int) -> None:
    """Q8_0; ``codes`` are the int8 bytes seen as uint8, ``width`` = 32."""
    for b in range(blocks.shape[0]):
        d[b] = word(blocks[b, 0], blocks[b, 1])
        for j in range(width):
            codes[b, j] = blocks[b, 2 + j]


@compiled
def pack8(blocks: Array, codes: Array, d: Array, width: int) -> None:
    """The inverse of ``unpack8``."""
    for b in range(blocks.shape[0]):
        blocks[b, 0], blocks[b, 1] = u8(d[b]), u8(d[b] >> u16(8))
        for j in range(width):
            blocks[b, 2 + j] = codes[b, j]


@compiled
def _scale_min(blocks: Array, b: int, j: int) -> Any:
    """sc[j] and m[j] of a Q4_K or Q5_K super-block."""
    if j < 4:
        return u8(blocks[b, 4 + j] & u8(63)), u8(blocks[b, 8 + j] & u8(63))
    high = blocks[b, 8 + j]
    sc = u8(u8(high & u8(15)) | u8(u8(blocks[b, j] >> u8(6)) << u8(4)))
    return sc, u8(u8(high >> u8(4)) | u8(u8(blocks[b, 4 + j] >> u8(6)) << u8(4)))


@compiled
def _unpack_head(blocks: Array, sc: Array, m: Array, d: Array, dmin: Array, b: int) -> None:
    """The first 16 bytes of a Q4_K or Q5_K super-block."""
    d[b], dmin[b] = word(blocks[b, 0], blocks[b, 1]), word(blocks[b, 2], blocks[b, 3])
    for j in range(8):
        sc[b, j], m[b, j] = _scale_min(blocks, b, j)


@compiled
def _pack_head(blocks: Array, sc: Array, m: Array, d: Array, dmin: Array, b: int) -> None:
    blocks[b, 0], blocks[b, 1] = u8(d[b]), u8(d[b] >> u16(8))
    blocks[b, 2], blocks[b, 3] = u8(dmin[b]), u8(dmin[b] >> u16(8))
    for j in range(4):
        s, o = sc[b, j + 4], m[b, j + 4]
        blocks[b, 4 + j] = u8(sc[b, j] | u8(u8(s >> u8(4)) << u8(6)))
        blocks[b, 8 + j] = u8(m[b, j] | u8(u8(o >> u8(4)) << u8(6)))
        blocks[b, 12 + j] = u8(u8(s & u8(15)) | u8(u8(o & u8(15)) << u8(4)))


@compiled
def unpack4k(blocks: Array, codes: Array, sc: Array, m: Array, d: Array, dmin: Array, width: int) -> None:
    """Q4_K: codes (S, 256), ``sc`` and ``m`` (S, 8), ``d`` and ``dmin`` (S,); ``width`` = 32."""
    for b in range(blocks.shape[0]):
        _unpack_head(blocks, sc, m, d, dmin, b)
        for i in range(4):
            at, to = 16 + width * i, 2 * width * i
            for j in range(width):
                c = blocks[b, at + j]
                codes[b, to + j] = u8(c & u8(15))
                codes[b, to + width + j] = u8(c >> u8(4))


@compiled
def pack4k(blocks: Array, codes: Array, sc: Array, m: Array, d: Array, dmin: Array, width: int) -> None:
    """The inverse of ``unpack4k``."""
    for b in range(blocks.shape[0]):
        _pack_head(blocks, sc, m, d, dmin, b)
        for i in range(4):
            at, to = 16 + width * i, 2 * width * i
            for j in range(width):
                blocks[b, at + j] = u8(u8(codes[b, to + j] & u8(15)) | u8(codes[b, to + width + j] << u8(4)))


@compiled
def unpack5k(blocks: Array, codes: Array, sc: Array, m: Array, d: Array, dmin: Array, width: int) -> None:
    """Q5_K, planes as in ``unpack4k``."""
    for b in range(blocks.shape[0]):
        _unpack_head(blocks, sc, m, d, dmin, b)
        for i in range(4):
            at, to, low = 48 + width * i, 2 * width * i, u8(2 * i)
            for j in range(width):
                c, h = blocks[b, at + j], u8(blocks[b, 16 + j] >> low)
                codes[b, to + j] = u8(u8(c & u8(15)) | u8(u8(h & u8(1)) << u8(4)))
                codes[b, to + width + j] = u8(u8(c >> u8(4)) | u8(u8(h & u8(2)) << u8(3)))


@compiled
def pack5k(blocks: Array, codes: Array, sc: Array, m: Array, d: Array, dmin: Array, width: int) -> None:
    """The inverse of ``unpack5k``."""
    for b in range(blocks.shape[0]):
        _pack_head(blocks, sc, m, d, dmin, b)
        for j in range(width):
            blocks[b, 16 + j] = u8(0)
        for i in range(4):
            at, to, low = 48 + width * i, 2 * width * i, u8(2 * i)
            for j in range(width):
                c0, c1 = codes[b, to + j], codes[b, to + width + j]
                blocks[b, at + j] = u8(u8(c0 & u8(15)) | u8(c1 << u8(4)))
                blocks[b, 16 + j] |= u8(u8(u8(c0 >> u8(4)) | u8(u8(c1 >> u8(4)) << u8(1))) << low)


@compiled
def unpack6k(blocks: Array, codes: Array, sc: Array, d: Array, width: int) -> None:
    """Q6_K: codes (S, 256), ``sc`` the int8 bytes as uint8 (S, 16), ``d`` (S,); ``width`` = 32."""
    for b in range(blocks.shape[0]):
        d[b] = word(blocks[b, 208], blocks[b, 209])
        for j in range(16):
            sc[b, j] = blocks[b, 192 + j]
        for i in range(2):
            low, high, to = 64 * i, 128 + 32 * i, 128 * i
            for j in range(width):
                c0, c1, h = blocks[b, low + j], blocks[b, low + 32 + j], blocks[b, high + j]
                codes[b, to + j] = u8(u8(c0 & u8(15)) | u8(u8(h & u8(3)) << u8(4)))
                codes[b, to + 32 + j] = u8(u8(c1 & u8(15)) | u8(u8(h & u8(12)) << u8(2)))
                codes[b, to + 64 + j] = u8(u8(c0 >> u8(4)) | u8(h & u8(48)))
                codes[b, to + 96 + j] = u8(u8(c1 >> u8(4)) | u8(u8(h & u8(192)) >> u8(2)))


@compiled
def pack6k(blocks: Array, codes: Array, sc: Array, d: Array, width: int) -> None:
    """The inverse of ``unpack6k``."""
    for b in range(blocks.shape[0]):
        blocks[b, 208], blocks[b, 209] = u8(d[b]), u8(d[b] >> u16(8))
        for j in range(16):
            blocks[b, 192 + j] = sc[b, j]
        for i in range(2):
            low, high, to = 64 * i, 128 + 32 * i, 128 * i
            for j in range(width):
                c0, c1 = codes[b, to + j], codes[b, to + 32 + j]
                c2, c3 = codes[b, to + 64 + j], codes[b, to + 96 + j]
                blocks[b, low + j] = u8(u8(c0 & u8(15)) | u8(c2 << u8(4)))
                blocks[b, low + 32 + j] = u8(u8(c1 & u8(15)) | u8(c3 << u8(4)))
                near, far = u8(u8(c0 >> u8(4)) | u8(u8(c1 >> u8(4)) << u8(2))), u8(u8(c2 & u8(48)) | u8(u8(c3 & u8(48)) << u8(2)))
                blocks[b, high + j] = u8(near | far)


@compiled
def dequantize4(blocks: Array, out: Array, half: int) -> None:
    """Q4_0 -> float32 (B, 32)."""
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 0], blocks[b, 1])
        for j in range(half):
            c = blocks[b, 2 + j]
            out[b, j] = (f32(u8(c & u8(15))) - f32(8)) * d
            out[b, half + j] = (f32(u8(c >> u8(4))) - f32(8)) * d


@compiled
def dequantize4m(blocks: Array, out: Array, half: int) -> None:
    """Q4_1 -> float32 (B, 32)."""
    for b in range(blocks.shape[0]):
        d, m = half_of(blocks[b, 0], blocks[b, 1]), half_of(blocks[b, 2], blocks[b, 3])
        for j in range(half):
            c = blocks[b, 4 + j]
            out[b, j] = f32(u8(c & u8(15))) * d + m
            out[b, half + j] = f32(u8(c >> u8(4))) * d + m


@compiled
def dequantize5(blocks: Array, out: Array, fifth: Array, words: Array, half: int) -> None:
    """Q5_0 -> float32 (B, 32); ``fifth`` is 32 bytes of workspace and ``words`` the same bytes as uint64 (4,)."""
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 0], blocks[b, 1])
        for i in range(4):
            words[i] = ((((u64(blocks[b, 2 + i]) * ONES) & PICK) + FILL) >> u64(3)) & _FIFTH
        for j in range(half):
            c = blocks[b, 6 + j]
            out[b, j] = (f32(u8(u8(c & u8(15)) | fifth[j])) - f32(16)) * d
            out[b, half + j] = (f32(u8(u8(c >> u8(4)) | fifth[half + j])) - f32(16)) * d


@compiled
def dequantize5m(blocks: Array, out: Array, fifth: Array, words: Array, half: int) -> None:
    """Q5_1 -> float32 (B, 32); workspace as in ``dequantize5``."""
    for b in range(blocks.shape[0]):
        d, m = half_of(blocks[b, 0], blocks[b, 1]), half_of(blocks[b, 2], blocks[b, 3])
        for i in range(4):
            words[i] = ((((u64(blocks[b, 4 + i]) * ONES) & PICK) + FILL) >> u64(3)) & _FIFTH
        for j in range(half):
            c = blocks[b, 8 + j]
            out[b, j] = f32(u8(u8(c & u8(15)) | fifth[j])) * d + m
            out[b, half + j] = f32(u8(u8(c >> u8(4)) | fifth[half + j])) * d + m


@compiled
def dequantize8(blocks: Array, out: Array, width: int) -> None:
    """Q8_0 -> float32 (B, 32)."""
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 0], blocks[b, 1])
        for j in range(width):
            out[b, j] = f32(i8(blocks[b, 2 + j])) * d


@compiled
def dequantize4k(blocks: Array, out: Array, width: int) -> None:
    """Q4_K -> float32 (S, 256): ``(d * sc) * q - (dmin * m)``."""
    for b in range(blocks.shape[0]):
        d, dmin = half_of(blocks[b, 0], blocks[b, 1]), half_of(blocks[b, 2], blocks[b, 3])
        for i in range(4):
            (s0, m0), (s1, m1) = _scale_min(blocks, b, 2 * i), _scale_min(blocks, b, 2 * i + 1)
            d0, d1, o0, o1 = d * f32(s0), d * f32(s1), dmin * f32(m0), dmin * f32(m1)
            at, to = 16 + width * i, 2 * width * i
            for j in range(width):
                c = blocks[b, at + j]
                out[b, to + j] = d0 * f32(u8(c & u8(15))) - o0
                out[b, to + width + j] = d1 * f32(u8(c >> u8(4))) - o1


@compiled
def dequantize5k(blocks: Array, out: Array, width: int) -> None:
    """Q5_K -> float32 (S, 256)."""
    for b in range(blocks.shape[0]):
        d, dmin = half_of(blocks[b, 0], blocks[b, 1]), half_of(blocks[b, 2], blocks[b, 3])
        for i in range(4):
            (s0, m0), (s1, m1) = _scale_min(blocks, b, 2 * i), _scale_min(blocks, b, 2 * i + 1)
            d0, d1, o0, o1 = d * f32(s0), d * f32(s1), dmin * f32(m0), dmin * f32(m1)
            at, to, low = 48 + width * i, 2 * width * i, u8(2 * i)
            for j in range(width):
                c, h = blocks[b, at + j], u8(blocks[b, 16 + j] >> low)
                out[b, to + j] = d0 * f32(u8(u8(c & u8(15)) | u8(u8(h & u8(1)) << u8(4)))) - o0
                out[b, to + width + j] = d1 * f32(u8(u8(c >> u8(4)) | u8(u8(h & u8(2)) << u8(3)))) - o1


@compiled
def dequantize6k(blocks: Array, out: Array, half: int) -> None:
    """Q6_K -> float32 (S, 256): ``(d * sc) * (q - 32)``, scales on 16 weights; ``half`` = 16."""
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 208], blocks[b, 209])
        for i in range(4):  # quarter i: weights 16 (i % 2) + 0 … 15 of each 32 in half i // 2
            c, k = i // 2, 16 * (i % 2)
            low, high, to, s = 64 * c + k, 128 + 32 * c + k, 128 * c + k, 192 + 8 * c + i % 2
            d0, d1 = d * f32(i8(blocks[b, s])), d * f32(i8(blocks[b, s + 2]))
            d2, d3 = d * f32(i8(blocks[b, s + 4])), d * f32(i8(blocks[b, s + 6]))
            for j in range(half):
                c0, c1, h = blocks[b, low + j], blocks[b, low + 32 + j], blocks[b, high + j]
                out[b, to + j] = d0 * (f32(u8(u8(c0 & u8(15)) | u8(u8(h & u8(3)) << u8(4)))) - f32(32))
                out[b, to + 32 + j] = d1 * (f32(u8(u8(c1 & u8(15)) | u8(u8(h & u8(12)) << u8(2)))) - f32(32))
                out[b, to + 64 + j] = d2 * (f32(u8(u8(c0 >> u8(4)) | u8(h & u8(48)))) - f32(32))
                out[b, to + 96 + j] = d3 * (f32(u8(u8(c1 >> u8(4)) | u8(u8(h & u8(192)) >> u8(2)))) - f32(32))


def _dequantize5(loop: Callable[..., None]) -> Callable[[Array, Array], None]:
    def run(blocks: Array, out: Array) -> None:
        fifth = np.empty(32, u8)
        loop(blocks, out, fifth, fifth.view(u64), 16)

    return run


def _with_half(loop: Callable[..., None]) -> Callable[..., None]:
    return lambda blocks, codes, d, m: loop(blocks, codes, d, m, 16)


def _with_words(loop: Callable[..., None]) -> Callable[..., None]:
    return lambda blocks, codes, d, m: loop(blocks, codes, codes.view(u64), d, m, 16)


(_unpack40, _pack40), (_unpack41, _pack41) = _nibbles(2), _nibbles(4)
(_unpack50, _pack50), (_unpack51, _pack51) = _fives(2), _fives(4)

# type name -> loop over (blocks, codes, d, m) or, for K-quants, (blocks, codes, sc, m, d, dmin); unused planes are ignored
UNPACK: dict[str, Callable[..., None]] = {
    "Q4_0": _with_half(_unpack40),
    "Q4_1": _with_half(_unpack41),
    "Q5_0": _with_words(_unpack50),
    "Q5_1": _with_words(_unpack51),
    "Q8_0": lambda blocks, codes, d, m: unpack8(blocks, codes, d, 32),
    "Q4_K": lambda blocks, codes, sc, m, d, dmin: unpack4k(blocks, codes, sc, m, d, dmin, 32),
    "Q5_K": lambda blocks, codes, sc, m, d, dmin: unpack5k(blocks, codes, sc, m, d, dmin, 32),
    "Q6_K": lambda blocks, codes, sc, m, d, dmin: unpack6k(blocks, codes, sc, d, 32),
    **ggml_small.UNPACK,
    **kblocks.UNPACK,
    **codebooks.UNPACK,
}
PACK: dict[str, Callable[..., None]] = {
    "Q4_0": _with_half(_pack40),
    "Q4_1": _with_half(_pack41),
    "Q5_0": _with_words(_pack50),
    "Q5_1": _with_words(_pack51),
    "Q8_0": lambda blocks, codes, d, m: pack8(blocks, codes, d, 32),
    "Q4_K": lambda blocks, codes, sc, m, d, dmin: pack4k(blocks, codes, sc, m, d, dmin, 32),
    "Q5_K": lambda blocks, codes, sc, m, d, dmin: pack5k(blocks, codes, sc, m, d, dmin, 32),
    "Q6_K": lambda blocks, codes, sc, m, d, dmin: pack6k(blocks, codes, sc, d, 32),
    **ggml_small.PACK,
    **kblocks.PACK,
    **codebooks.PACK,
}
# type name -> loop over (blocks, out)
DEQUANTIZE: dict[str, Callable[[Array, Array], None]] = {
    "Q4_0": lambda blocks, out: dequantize4(blocks, out, 16),
    "Q4_1": lambda blocks, out: dequantize4m(blocks, out, 16),
    "Q5_0": _dequantize5(dequantize5),
    "Q5_1": _dequantize5(dequantize5m),
    "Q8_0": lambda blocks, out: dequantize8(blocks, out, 32),
    "Q4_K": lambda blocks, out: dequantize4k(blocks, out, 32),
    "Q5_K": lambda blocks, out: dequantize5k(blocks, out, 32),
    "Q6_K": lambda blocks, out: dequantize6k(blocks, out, 16),
    **codebooks.DEQUANTIZE,
    **ggml_small.DEQUANTIZE,
    **kblocks.DEQUANTIZE,
}
