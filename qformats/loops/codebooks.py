"""Compiled loops over ggml's codebook super-blocks: dequantize IQ1_S … IQ3_S and IQ4_XS, unpack and pack IQ4_XS, one pass each.

The definitions, bit for bit, are ``IQuant.dequantize_blocks``, ``unpack_blocks`` and ``pack_blocks`` in ``qformats.formats.ggml.iquants``,
where the byte layouts stand. Blocks are uint8 (S, block bytes), ``out`` float32 (S, 256); everything is serial and releases the GIL.

Every weight is a small integer times a scale, and each such product is exact in float32. So the first half of a loop puts the 256 integers
of a block into ``line`` (int8), eight at a time through ``words`` (the same bytes as uint64): an entry of the book, its signs applied to
all bytes at once. The second half multiplies; its trip count is an argument because LLVM unrolls a constant one before it vectorizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from qformats.grids import table_values
from qformats.loops.compiled import compiled
from qformats.loops.half import half_of, word

__all__ = ["DEQUANTIZE", "PACK", "UNPACK"]

Array = np.ndarray[Any, Any]
u8, u16, u32, u64, i8, f32 = np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.float32

_ONES = u64(0x0101010101010101)


@compiled
def _signed(entry: Any, minus: Any) -> Any:
    """The eight non-zero bytes of ``entry``, negated where those of ``minus`` are 255."""
    return u64((u64(entry) ^ u64(minus)) + (u64(minus) & _ONES))


@compiled
def _u32(blocks: Array, b: int, at: int) -> Any:
    return u32(u32(word(blocks[b, at], blocks[b, at + 1])) | u32(u32(word(blocks[b, at + 2], blocks[b, at + 3])) << u32(16)))


@compiled
def _multiply(line: Array, scales: Array, out: Array, b: int, width: int) -> None:
    """``out[b]`` = the line, ``width`` integers under each scale."""
    for i in range(256 // width):
        s, to = scales[i], width * i
        for j in range(width):
            out[b, to + j] = s * f32(line[to + j])


@compiled
def _nibble_scales(blocks: Array, b: int, at: int, count: int, d: float, scales: Array) -> None:
    for i in range(count):
        c = blocks[b, at + i]
        scales[2 * i] = d * (f32(u8(c & u8(15))) + f32(0.5))
        scales[2 * i + 1] = d * (f32(u8(c >> u8(4))) + f32(0.5))


@compiled
def iq2xxs(blocks: Array, out: Array, book: Array, minus: Array, line: Array, words: Array, scales: Array, width: int) -> None:
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 0], blocks[b, 1]) * f32(0.25)
        for i in range(8):
            aux = _u32(blocks, b, 6 + 8 * i)
            scales[i] = d * (f32(aux >> u32(28)) + f32(0.5))
            for e in range(4):
                words[4 * i + e] = _signed(book[blocks[b, 2 + 8 * i + e]], minus[(aux >> u32(7 * e)) & u32(127)])
        _multiply(line, scales, out, b, width)


@compiled
def iq2xs(blocks: Array, out: Array, book: Array, minus: Array, line: Array, words: Array, scales: Array, width: int) -> None:
    for b in range(blocks.shape[0]):
        _nibble_scales(blocks, b, 66, 8, half_of(blocks[b, 0], blocks[b, 1]) * f32(0.25), scales)
        for g in range(32):
            w = word(blocks[b, 2 + 2 * g], blocks[b, 3 + 2 * g])
            words[g] = _signed(book[w & u16(511)], minus[w >> u16(9)])
        _multiply(line, scales, out, b, width)


@compiled
def iq2s(blocks: Array, out: Array, book: Array, minus: Array, line: Array, words: Array, scales: Array, width: int) -> None:
    for b in range(blocks.shape[0]):
        _nibble_scales(blocks, b, 74, 8, half_of(blocks[b, 0], blocks[b, 1]) * f32(0.25), scales)
        for i in range(8):
            high = u32(blocks[b, 66 + i])
            for e in range(4):
                g = 4 * i + e
                code = u32(blocks[b, 2 + g]) | u32(u32(u32(high >> u32(2 * e)) & u32(3)) << u32(8))
                words[g] = _signed(book[code], minus[blocks[b, 34 + g]])
        _multiply(line, scales, out, b, width)


@compiled
def iq3xxs(blocks: Array, out: Array, book: Array, minus: Array, line: Array, words: Array, scales: Array, width: int) -> None:
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 0], blocks[b, 1]) * f32(0.5)
        for i in range(8):
            aux = _u32(blocks, b, 66 + 4 * i)
            scales[i] = d * (f32(aux >> u32(28)) + f32(0.5))
            for e in range(4):
                g = 2 + 8 * i + 2 * e
                entry = u64(book[blocks[b, g]] | u64(book[blocks[b, g + 1]] << u64(32)))
                words[4 * i + e] = _signed(entry, minus[(aux >> u32(7 * e)) & u32(127)])
        _multiply(line, scales, out, b, width)


@compiled
def iq3s(blocks: Array, out: Array, book: Array, minus: Array, line: Array, words: Array, scales: Array, width: int) -> None:
    for b in range(blocks.shape[0]):
        _nibble_scales(blocks, b, 106, 4, half_of(blocks[b, 0], blocks[b, 1]) * f32(2), scales)
        for i in range(8):
            high = u32(u32(blocks[b, 66 + i]) << u32(8))
            for e in range(4):
                g = 2 + 8 * i + 2 * e
                near = u32(blocks[b, g]) | u32(u32(high >> u32(2 * e)) & u32(256))
                far = u32(blocks[b, g + 1]) | u32(u32(high >> u32(2 * e + 1)) & u32(256))
                entry = u64(book[near] | u64(book[far] << u64(32)))
                words[4 * i + e] = _signed(entry, minus[blocks[b, 74 + 4 * i + e]])
        _multiply(line, scales, out, b, width)


@compiled
def iq1s(blocks: Array, out: Array, book: Array, minus: Array, line: Array, words: Array, scales: Array, width: int) -> None:
    """``book`` holds 8 (entry - z), z = -1/8 in its first and z = 1/8 in its second half; ``minus`` is not used."""
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 0], blocks[b, 1]) * f32(0.25)
        for i in range(8):
            w = u32(word(blocks[b, 34 + 2 * i], blocks[b, 35 + 2 * i]))
            scales[i] = d * (f32(u32(w >> u32(12)) & u32(7)) + f32(0.5))
            shift = u32(u32(w >> u32(15)) << u32(11))
            for e in range(4):
                code = u32(blocks[b, 2 + 4 * i + e]) | u32(u32(u32(w >> u32(3 * e)) & u32(7)) << u32(8))
                words[4 * i + e] = book[code | shift]
        _multiply(line, scales, out, b, width)


@compiled
def iq1m(blocks: Array, out: Array, book: Array, minus: Array, line: Array, words: Array, scales: Array, width: int) -> None:
    """``book`` as in ``iq1s``: the bit above a code says which half."""
    for b in range(blocks.shape[0]):
        low: Any = u8(u8(blocks[b, 49] >> u8(4)) | u8(blocks[b, 51] & u8(0xF0)))
        high: Any = u8(u8(blocks[b, 53] >> u8(4)) | u8(blocks[b, 55] & u8(0xF0)))
        d = half_of(low, high) * f32(0.25)
        for i in range(4):
            w = u32(word(blocks[b, 48 + 2 * i], blocks[b, 49 + 2 * i]))
            for e in range(4):
                scales[4 * i + e] = d * (f32(u32(w >> u32(3 * e)) & u32(7)) + f32(0.5))
        for i in range(16):
            c = u32(blocks[b, 32 + i])
            words[2 * i] = book[u32(blocks[b, 2 * i]) | u32(u32(c & u32(15)) << u32(8))]
            words[2 * i + 1] = book[u32(blocks[b, 2 * i + 1]) | u32(u32(c >> u32(4)) << u32(8))]
        _multiply(line, scales, out, b, width)


@compiled
def iq4xs(blocks: Array, out: Array, pairs: Array, line: Array, width: int) -> None:
    """``pairs`` holds the two values of a byte, the low nibble's in the low half; ``line`` is uint16 (128,); ``width`` = 16."""
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 0], blocks[b, 1])
        high = u32(word(blocks[b, 2], blocks[b, 3]))
        for j in range(128):
            line[j] = pairs[blocks[b, 8 + j]]
        for i in range(8):
            low = u32(u32(blocks[b, 4 + i // 2] >> u8(4 * (i % 2))) & u32(15))
            s = d * (f32(u32(low | u32(u32(u32(high >> u32(2 * i)) & u32(3)) << u32(4)))) - f32(32))
            at, to = width * i, 2 * width * i
            for j in range(width):
                c = line[at + j]
                out[b, to + j] = s * f32(i8(c))
                out[b, to + width + j] = s * f32(i8(c >> u16(8)))


@compiled
def unpack4xs(blocks: Array, codes: Array, s: Array, d: Array, width: int) -> None:
    """IQ4_XS: codes (S, 256), s (S, 8), d uint16 (S,); ``width`` = 16."""
    for b in range(blocks.shape[0]):
        d[b], high = word(blocks[b, 0], blocks[b, 1]), word(blocks[b, 2], blocks[b, 3])
        for i in range(8):
            low = u8(u8(blocks[b, 4 + i // 2] >> u8(4 * (i % 2))) & u8(15))
            s[b, i] = u8(low | u8(u8(u8(high >> u16(2 * i)) & u8(3)) << u8(4)))
            at, to = 8 + width * i, 2 * width * i
            for j in range(width):
                c = blocks[b, at + j]
                codes[b, to + j] = u8(c & u8(15))
                codes[b, to + width + j] = u8(c >> u8(4))


@compiled
def pack4xs(blocks: Array, codes: Array, s: Array, d: Array, width: int) -> None:
    """The inverse of ``unpack4xs``."""
    for b in range(blocks.shape[0]):
        high = u16(0)
        for i in range(8):
            high = u16(high | u16(u16(s[b, i] >> u8(4)) << u16(2 * i)))
        blocks[b, 0], blocks[b, 1] = u8(d[b]), u8(d[b] >> u16(8))
        blocks[b, 2], blocks[b, 3] = u8(high), u8(high >> u16(8))
        for i in range(4):
            blocks[b, 4 + i] = u8(u8(s[b, 2 * i] & u8(15)) | u8(s[b, 2 * i + 1] << u8(4)))
        for i in range(8):
            at, to = 8 + width * i, 2 * width * i
            for j in range(width):
                blocks[b, at + j] = u8(codes[b, to + j] | u8(codes[b, to + width + j] << u8(4)))


@cache
def _book(name: str) -> Array:
    """A book's entries as the low bytes of uint64 words; for IQ1 eight times the entry minus z, for either z."""
    values = table_values(name).numpy()
    if name == "iq1_s":
        values = np.concatenate([8 * values + 1, 8 * values - 1])
    entries = np.zeros((len(values), 8), i8)
    entries[:, : values.shape[1]] = values
    return entries.view("<u8").astype(u64).reshape(-1)


@cache
def _minus(seven: bool) -> Array:
    """For every sign byte, or every seven bits of an even one, a word with a byte of 255 where the sign is minus."""
    bits = np.arange(128 if seven else 256)[:, None] >> np.arange(8) & 1
    if seven:
        bits[:, 7] = bits.sum(1) & 1
    masks = (255 * bits).astype(u8)
    return masks.view("<u8").astype(u64).reshape(-1)


@cache
def _pairs() -> Array:
    values = table_values("iq4_nl").numpy().astype(i8).view(u8).astype(u16)
    return (values[None, :] | (values[:, None] << 8)).reshape(-1)  # [high nibble, low nibble]


def _run(loop: Callable[..., None], book: str, width: int, seven: bool) -> Callable[[Array, Array], None]:
    def run(blocks: Array, out: Array) -> None:
        line = np.empty(256, i8)
        loop(blocks, out, _book(book), _minus(seven), line, line.view(u64), np.empty(16, f32), width)

    return run


# type name -> loop over (blocks, out)
DEQUANTIZE: dict[str, Callable[[Array, Array], None]] = {
    "IQ2_XXS": _run(iq2xxs, "iq2_xxs", 32, seven=True),
    "IQ2_XS": _run(iq2xs, "iq2_xs", 16, seven=True),
    "IQ2_S": _run(iq2s, "iq2_s", 16, seven=False),
    "IQ3_XXS": _run(iq3xxs, "iq3_xxs", 32, seven=True),
    "IQ3_S": _run(iq3s, "iq3_s", 32, seven=False),
    "IQ1_S": _run(iq1s, "iq1_s", 32, seven=False),
    "IQ1_M": _run(iq1m, "iq1_s", 16, seven=False),
    "IQ4_XS": lambda blocks, out: iq4xs(blocks, out, _pairs(), np.empty(128, u16), 16),
}
# type name -> loop over (blocks, codes, signs, s, shift, d); planes that a type lacks are empty
UNPACK: dict[str, Callable[..., None]] = {
    "IQ4_XS": lambda blocks, codes, signs, s, shift, d: unpack4xs(blocks, codes, s, d, 16),
}
PACK: dict[str, Callable[..., None]] = {
    "IQ4_XS": lambda blocks, codes, signs, s, shift, d: pack4xs(blocks, codes, s, d, 16),
}
