"""Compiled loops over the small ggml blocks: IQ4_NL MXFP4 NVFP4, Q1_0 Q2_0, TQ1_0 TQ2_0.

The definitions they equal bit for bit are in ``qformats.formats.ggml.tables`` and ``ternary``; arrays and habits are those of
``qformats.loops.ggml``, which lists these loops in its tables. A table of sixteen values is looked up by shifting words that hold it,
because a shift by a variable runs in SIMD lanes and a load does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qformats.loops.compiled import compiled
from qformats.loops.half import FILL, GATHER, ONES, PICK, half_of, word

__all__ = ["DEQUANTIZE", "PACK", "UNPACK"]

Array = np.ndarray[Any, Any]
u8, u16, u32, u64, i32, f32 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.float32

_EVEN = u64(0x00FF00FF00FF00FF)
_DOUBLED = u32(0xC8643210)  # nibble i is twice the e2m1 value of code i
_NL0, _NL1, _NL2, _NL3 = (  # kvalues_iq4nl, four signed bytes a word
    u32(int.from_bytes(bytes(v & 0xFF for v in four), "little"))
    for four in ((-127, -104, -83, -65), (-49, -35, -22, -10), (1, 13, 25, 38), (53, 69, 89, 113))
)
_E8M0 = np.ldexp(1.0, np.arange(256) - 128).astype(f32)  # half of 2^(e - 127)


def _ue4m3() -> Array:
    """Half of what each scale byte of NVFP4 stands for (llama.cpp, ``ggml_ue4m3_to_fp32``)."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    values = np.where(exponent == 0, np.ldexp(mantissa, -10), np.ldexp(8 + mantissa, exponent - 11))
    values[0x7F] = 0
    halves: Array = values.astype(f32)
    return halves


_UE4M3 = _ue4m3()


# ---------------------------------------------------------------- four bits from a table


@compiled
def _fp4(c: Any) -> Any:
    value = i32(u32(u32(_DOUBLED >> u32(u32(c & u8(7)) << u32(2))) & u32(15)))
    return f32(-value if c & u8(8) else value)


@compiled
def _nl(c: Any) -> Any:
    low, high = (_NL1 if c & u8(4) else _NL0), (_NL3 if c & u8(4) else _NL2)
    held = high if c & u8(8) else low
    return f32(i32(i32(u32(held << u32(u32(24) - u32(u32(c & u8(3)) << u32(3))))) >> i32(24)))


@compiled
def unpack_nl(blocks: Array, codes: Array, d: Array, half: int) -> None:
    """IQ4_NL: codes (B, 32), d uint16 (B,); ``half`` = 16."""
    for b in range(blocks.shape[0]):
        d[b] = word(blocks[b, 0], blocks[b, 1])
        for j in range(half):
            c = blocks[b, 2 + j]
            codes[b, j] = u8(c & u8(15))
            codes[b, half + j] = u8(c >> u8(4))


@compiled
def pack_nl(blocks: Array, codes: Array, d: Array, half: int) -> None:
    """The inverse of ``unpack_nl``."""
    for b in range(blocks.shape[0]):
        blocks[b, 0], blocks[b, 1] = u8(d[b]), u8(d[b] >> u16(8))
        for j in range(half):
            blocks[b, 2 + j] = u8(u8(codes[b, j] & u8(15)) | u8(codes[b, half + j] << u8(4)))


@compiled
def dequantize_nl(blocks: Array, out: Array, half: int) -> None:
    """IQ4_NL -> float32 (B, 32)."""
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 0], blocks[b, 1])
        for j in range(half):
            c = blocks[b, 2 + j]
            out[b, j] = d * _nl(u8(c & u8(15)))
            out[b, half + j] = d * _nl(u8(c >> u8(4)))


@compiled
def unpack_mx(blocks: Array, codes: Array, e: Array, half: int) -> None:
    """MXFP4: codes (B, 32), e uint8 (B,); ``half`` = 16."""
    for b in range(blocks.shape[0]):
        e[b] = blocks[b, 0]
        for j in range(half):
            c = blocks[b, 1 + j]
            codes[b, j] = u8(c & u8(15))
            codes[b, half + j] = u8(c >> u8(4))


@compiled
def pack_mx(blocks: Array, codes: Array, e: Array, half: int) -> None:
    """The inverse of ``unpack_mx``."""
    for b in range(blocks.shape[0]):
        blocks[b, 0] = e[b]
        for j in range(half):
            blocks[b, 1 + j] = u8(u8(codes[b, j] & u8(15)) | u8(codes[b, half + j] << u8(4)))


@compiled
def dequantize_mx(blocks: Array, out: Array, half: int) -> None:
    """MXFP4 -> float32 (B, 32)."""
    for b in range(blocks.shape[0]):
        d = _E8M0[blocks[b, 0]]
        for j in range(half):
            c = blocks[b, 1 + j]
            out[b, j] = _fp4(u8(c & u8(15))) * d
            out[b, half + j] = _fp4(u8(c >> u8(4))) * d


@compiled
def unpack_nv(blocks: Array, codes: Array, d: Array, half: int) -> None:
    """NVFP4: codes (B, 64), d uint8 (B, 4); ``half`` = 8."""
    for b in range(blocks.shape[0]):
        for s in range(4):
            d[b, s] = blocks[b, s]
            at, to = 4 + 8 * s, 16 * s
            for j in range(half):
                c = blocks[b, at + j]
                codes[b, to + j] = u8(c & u8(15))
                codes[b, to + 8 + j] = u8(c >> u8(4))


@compiled
def pack_nv(blocks: Array, codes: Array, d: Array, half: int) -> None:
    """The inverse of ``unpack_nv``."""
    for b in range(blocks.shape[0]):
        for s in range(4):
            blocks[b, s] = d[b, s]
            at, to = 4 + 8 * s, 16 * s
            for j in range(half):
                blocks[b, at + j] = u8(u8(codes[b, to + j] & u8(15)) | u8(codes[b, to + 8 + j] << u8(4)))


@compiled
def dequantize_nv(blocks: Array, out: Array, half: int) -> None:
    """NVFP4 -> float32 (B, 64), without the factor beside it."""
    for b in range(blocks.shape[0]):
        for s in range(4):
            d = _UE4M3[blocks[b, s]]
            at, to = 4 + 8 * s, 16 * s
            for j in range(half):
                c = blocks[b, at + j]
                out[b, to + j] = _fp4(u8(c & u8(15))) * d
                out[b, to + 8 + j] = _fp4(u8(c >> u8(4))) * d


# ---------------------------------------------------------------- one and two bits


@compiled
def _eight(byte: Any) -> Any:
    """The bits of a byte as eight bytes 0 or 1."""
    return u64(((((u64(byte) * ONES) & PICK) + FILL) >> u64(7)) & ONES)


@compiled
def _four(byte: Any) -> Any:
    """The two-bit fields of a byte as four bytes."""
    x = u32(byte)
    x = u32(u32(x | u32(x << u32(12))) & u32(0x000F000F))
    return u32(u32(x | u32(x << u32(6))) & u32(0x03030303))


@compiled
def unpack1(blocks: Array, words: Array, d: Array, width: int) -> None:
    """Q1_0: ``words`` is codes (B, 128) seen as uint64 (B, 16), d uint16 (B,); ``width`` = 16."""
    for b in range(blocks.shape[0]):
        d[b] = word(blocks[b, 0], blocks[b, 1])
        for j in range(width):
            words[b, j] = _eight(blocks[b, 2 + j])


@compiled
def pack1(blocks: Array, words: Array, d: Array, width: int) -> None:
    """The inverse of ``unpack1``."""
    for b in range(blocks.shape[0]):
        blocks[b, 0], blocks[b, 1] = u8(d[b]), u8(d[b] >> u16(8))
        for j in range(width):
            blocks[b, 2 + j] = u8(((words[b, j] & ONES) * GATHER) >> u64(56))


@compiled
def dequantize1(blocks: Array, out: Array, codes: Array, words: Array, width: int) -> None:
    """Q1_0 -> float32 (B, 128); ``codes`` is 128 bytes of workspace, ``words`` the same as uint64 (16,)."""
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 0], blocks[b, 1])
        for j in range(width):
            words[j] = _eight(blocks[b, 2 + j])
        for j in range(8 * width):
            out[b, j] = f32(i32(u32(codes[j]) << u32(1)) - i32(1)) * d


@compiled
def unpack2(blocks: Array, words: Array, d: Array, width: int) -> None:
    """Q2_0: ``words`` is codes (B, 64) seen as uint32 (B, 16), d uint16 (B,); ``width`` = 16."""
    for b in range(blocks.shape[0]):
        d[b] = word(blocks[b, 0], blocks[b, 1])
        for j in range(width):
            words[b, j] = _four(blocks[b, 2 + j])


@compiled
def pack2(blocks: Array, words: Array, d: Array, width: int) -> None:
    """The inverse of ``unpack2``."""
    for b in range(blocks.shape[0]):
        blocks[b, 0], blocks[b, 1] = u8(d[b]), u8(d[b] >> u16(8))
        for j in range(width):
            x = u32(words[b, j] & u32(0x03030303))
            x = u32(u32(x | u32(x >> u32(6))) & u32(0x000F000F))
            blocks[b, 2 + j] = u8(u32(x | u32(x >> u32(12))))


@compiled
def dequantize2(blocks: Array, out: Array, codes: Array, words: Array, width: int) -> None:
    """Q2_0 -> float32 (B, 64); ``codes`` is 64 bytes of workspace, ``words`` the same as uint32 (16,)."""
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 0], blocks[b, 1])
        for j in range(width):
            words[j] = _four(blocks[b, 2 + j])
        for j in range(4 * width):
            out[b, j] = (f32(codes[j]) - f32(1)) * d


# ---------------------------------------------------------------- ternary


@compiled
def unpack_t2(blocks: Array, codes: Array, d: Array, width: int) -> None:
    """TQ2_0: codes (B, 256), d uint16 (B,); ``width`` = 32."""
    for b in range(blocks.shape[0]):
        d[b] = word(blocks[b, 64], blocks[b, 65])
        for i in range(2):
            at, to = 32 * i, 128 * i
            for j in range(width):
                c = blocks[b, at + j]
                codes[b, to + j] = u8(c & u8(3))
                codes[b, to + 32 + j] = u8(u8(c >> u8(2)) & u8(3))
                codes[b, to + 64 + j] = u8(u8(c >> u8(4)) & u8(3))
                codes[b, to + 96 + j] = u8(c >> u8(6))


@compiled
def pack_t2(blocks: Array, codes: Array, d: Array, width: int) -> None:
    """The inverse of ``unpack_t2``."""
    for b in range(blocks.shape[0]):
        blocks[b, 64], blocks[b, 65] = u8(d[b]), u8(d[b] >> u16(8))
        for i in range(2):
            at, to = 32 * i, 128 * i
            for j in range(width):
                low = u8(codes[b, to + j] | u8(codes[b, to + 32 + j] << u8(2)))
                blocks[b, at + j] = u8(low | u8(u8(codes[b, to + 64 + j] << u8(4)) | u8(codes[b, to + 96 + j] << u8(6))))


@compiled
def dequantize_t2(blocks: Array, out: Array, width: int) -> None:
    """TQ2_0 -> float32 (B, 256)."""
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 64], blocks[b, 65])
        for i in range(8):
            at, to, low = 32 * (i // 4), 32 * i, u8(2 * (i % 4))
            for j in range(width):
                out[b, to + j] = f32(i32(u8(u8(blocks[b, at + j] >> low) & u8(3))) - i32(1)) * d


@compiled
def _trits(blocks: Array, b: int, held: Array, state: Array, words: Array, quads: Array, row: int, width: int) -> None:
    """The digits of block ``b`` into one row of codes, seen as uint64 (…, 32) ``words`` and uint32 (…, 64) ``quads``.

    ``held`` is 56 bytes of workspace, ``state`` the same as uint64 (7,); ``width`` = 52. Eight fractions advance at once, the even and the
    odd bytes apart: three times a byte has the digit in its high byte and the next fraction in its low one.
    """
    for j in range(width):
        held[j] = blocks[b, j]
    for w in range(7):
        even, odd = state[w] & _EVEN, (state[w] >> u64(8)) & _EVEN
        for n in range(5):
            even, odd = even * u64(3), odd * u64(3)
            digits = ((even >> u64(8)) & _EVEN) | (odd & (_EVEN << u64(8)))
            even, odd = even & _EVEN, odd & _EVEN
            if w < 4:
                words[row, 4 * n + w] = digits
            elif w < 6:
                words[row, 16 + 2 * n + w] = digits
            elif n < 4:
                quads[row, 60 + n] = u32(digits)


@compiled
def unpack_t1(blocks: Array, words: Array, quads: Array, d: Array, held: Array, state: Array, width: int) -> None:
    """TQ1_0: codes (B, 256) seen as ``words`` and ``quads``, d uint16 (B,); workspace and ``width`` as in ``_trits``."""
    for b in range(blocks.shape[0]):
        d[b] = word(blocks[b, 52], blocks[b, 53])
        _trits(blocks, b, held, state, words, quads, b, width)


@compiled
def _byte(codes: Array, b: int, at: int, width: int, last: int) -> Any:
    """The byte of five digits ``width`` apart: ceil(256 v / 243) = v + ceil(13 v / 243), the quotient by a reciprocal exact up to 35000."""
    v = u32(u32(u32(codes[b, at]) * u32(3)) + u32(codes[b, at + width]))
    v = u32(u32(v * u32(3)) + u32(codes[b, at + 2 * width]))
    v = u32(u32(u32(v * u32(3)) + u32(codes[b, at + 3 * width])) * u32(3))
    if last:
        v = u32(v + u32(codes[b, at + 4 * width]))
    return u8(u32(v + u32(u32(u32(u32(v * u32(13)) + u32(242)) * u32(17261)) >> u32(22))))


@compiled
def pack_t1(blocks: Array, codes: Array, d: Array, width: int) -> None:
    """The inverse of ``unpack_t1``, in the quantizer's spelling."""
    for b in range(blocks.shape[0]):
        blocks[b, 52], blocks[b, 53] = u8(d[b]), u8(d[b] >> u16(8))
        for j in range(width):
            blocks[b, j] = _byte(codes, b, j, 32, 1)
        for j in range(width // 2):
            blocks[b, 32 + j] = _byte(codes, b, 160 + j, 16, 1)
        for j in range(width // 8):
            blocks[b, 48 + j] = _byte(codes, b, 240 + j, 4, 0)


@compiled
def dequantize_t1(blocks: Array, out: Array, codes: Array, words: Array, quads: Array, held: Array, state: Array, width: int) -> None:
    """TQ1_0 -> float32 (B, 256); ``codes`` is (1, 256) bytes of workspace, the rest as in ``_trits``."""
    for b in range(blocks.shape[0]):
        d = half_of(blocks[b, 52], blocks[b, 53])
        _trits(blocks, b, held, state, words, quads, 0, width)
        for j in range(codes.shape[1]):
            out[b, j] = f32(i32(codes[0, j]) - i32(1)) * d


def _unpack_t1(blocks: Array, codes: Array, d: Array) -> None:
    held = np.zeros(56, u8)
    unpack_t1(blocks, codes.view(u64), codes.view(u32), d, held, held.view(u64), 52)


def _dequantize_t1(blocks: Array, out: Array) -> None:
    codes, held = np.empty((1, 256), u8), np.zeros(56, u8)
    dequantize_t1(blocks, out, codes, codes.view(u64), codes.view(u32), held, held.view(u64), 52)


def _dequantize1(blocks: Array, out: Array) -> None:
    codes = np.empty(128, u8)
    dequantize1(blocks, out, codes, codes.view(u64), 16)


def _dequantize2(blocks: Array, out: Array) -> None:
    codes = np.empty(64, u8)
    dequantize2(blocks, out, codes, codes.view(u32), 16)


UNPACK: dict[str, Callable[..., None]] = {
    "IQ4_NL": lambda blocks, codes, d: unpack_nl(blocks, codes, d, 16),
    "MXFP4": lambda blocks, codes, e: unpack_mx(blocks, codes, e, 16),
    "NVFP4": lambda blocks, codes, d: unpack_nv(blocks, codes, d, 8),
    "Q1_0": lambda blocks, codes, d: unpack1(blocks, codes.view(u64), d, 16),
    "Q2_0": lambda blocks, codes, d: unpack2(blocks, codes.view(u32), d, 16),
    "TQ1_0": _unpack_t1,
    "TQ2_0": lambda blocks, codes, d: unpack_t2(blocks, codes, d, 32),
}
PACK: dict[str, Callable[..., None]] = {
    "IQ4_NL": lambda blocks, codes, d: pack_nl(blocks, codes, d, 16),
    "MXFP4": lambda blocks, codes, e: pack_mx(blocks, codes, e, 16),
    "NVFP4": lambda blocks, codes, d: pack_nv(blocks, codes, d, 8),
    "Q1_0": lambda blocks, codes, d: pack1(blocks, codes.view(u64), d, 16),
    "Q2_0": lambda blocks, codes, d: pack2(blocks, codes.view(u32), d, 16),
    "TQ1_0": lambda blocks, codes, d: pack_t1(blocks, codes, d, 32),
    "TQ2_0": lambda blocks, codes, d: pack_t2(blocks, codes, d, 32),
}
DEQUANTIZE: dict[str, Callable[[Array, Array], None]] = {
    "IQ4_NL": lambda blocks, out: dequantize_nl(blocks, out, 16),
    "MXFP4": lambda blocks, out: dequantize_mx(blocks, out, 16),
    "NVFP4": lambda blocks, out: dequantize_nv(blocks, out, 8),
    "Q1_0": _dequantize1,
    "Q2_0": _dequantize2,
    "TQ1_0": _dequantize_t1,
    "TQ2_0": lambda blocks, out: dequantize_t2(blocks, out, 32),
}
