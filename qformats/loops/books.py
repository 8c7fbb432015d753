"""Compiled loops over four-bit codes of a table of floats, two a byte, the first in the high nibble: NF4 and FP4. No fastmath.

The definitions they equal bit for bit: ``pack_pairs`` and ``unpack_pairs`` the expressions beside their calls in
``qformats.formats.bitsandbytes.fourbit``, the loops of ``DEQUANTIZE`` ``QuantizedTensor.dequantize`` with ``like="bitsandbytes"``.
A scale's sixteen products are made first, in the output's dtype and side by side; every code then picks one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = ["DEQUANTIZE", "pack_pairs", "unpack_pairs"]

Array = np.ndarray[Any, Any]
u8, u16, u32, u64, i32, f32 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.float32
_HALF, _ONE = f32(0.5), u32(1)


@compiled
def unpack_pairs(packed: Array, codes: Array) -> None:
    """``codes`` uint8 (2 n,) of ``packed`` uint8 (n,)."""
    for i in range(len(packed)):
        codes[2 * i] = packed[i] >> u8(4)
        codes[2 * i + 1] = packed[i] & u8(15)


@compiled
def pack_pairs(codes: Array, packed: Array) -> None:
    """The inverse of ``unpack_pairs``, for codes up to 15."""
    for i in range(len(packed)):
        packed[i] = u8(u8(codes[2 * i] << u8(4)) | codes[2 * i + 1])


@compiled
def _to_bfloat16(table: Array, scale: Any, line: Array) -> None:
    """The bits of each table entry times ``scale``, rounded to float32 and then to bfloat16."""
    for c in range(16):
        bits = f32(table[c] * scale).view(u32)
        line[c] = u32(u32(bits + u32(0x7FFF)) + u32(u32(bits >> u32(16)) & _ONE)) >> u32(16)


@compiled
def _to_float16(table: Array, scale: Any, line: Array) -> None:
    """As ``_to_bfloat16``, to float16; the addition of one half leaves a subnormal's bits, rounded, at the end of the sum's."""
    for c in range(16):
        bits = f32(table[c] * scale).view(u32)
        size = u32(bits & u32(0x7FFFFFFF))
        small = u32(f32(size.view(f32) + _HALF).view(u32) - u32(0x3F000000))
        usual = u32(u32(u32(size + u32(0xC8000FFF)) + u32(u32(size >> u32(13)) & _ONE)) >> u32(13))
        half = small if size < u32(0x38800000) else usual
        half = half if size < u32(0x47800000) else u32(0x7C00)
        line[c] = u32(u32(u32(bits >> u32(16)) & u32(0x8000)) | half)


@compiled
def _four(line: Array, at: int) -> Any:
    """Four 16-bit numbers as one word, the first lowest."""
    low, high = u64(line[at]) | u64(u64(line[at + 1]) << u64(16)), u64(line[at + 2]) | u64(u64(line[at + 3]) << u64(16))
    return u64(low | u64(high << u64(32)))


@compiled
def _look(code: Any, w0: Any, w1: Any, w2: Any, w3: Any) -> Any:
    """The 16-bit number of ``code`` out of four words: a shift by a variable runs in SIMD lanes, a load does not."""
    low, high = (w1 if code & u64(4) else w0), (w3 if code & u64(4) else w2)
    held = high if code & u64(8) else low
    return u64(u64(held >> u64(u64(code & u64(3)) << u64(4))) & u64(0xFFFF))


@compiled
def _bfloat16(packed: Array, scale: Array, table: Array, out: Array, width: int) -> None:
    """``out`` uint32 (n,): both numbers of each of ``packed`` (n,); a scale is for ``width`` bytes, the last for what is left."""
    line = np.empty(16, u32)
    for b in range(len(scale)):
        _to_bfloat16(table, scale[b], line)
        w0, w1, w2, w3 = _four(line, 0), _four(line, 4), _four(line, 8), _four(line, 12)
        pairs, target = packed[b * width : (b + 1) * width], out[b * width : (b + 1) * width]
        for i in range(len(pairs)):
            byte = u64(pairs[i])
            even, odd = _look(u64(byte >> u64(4)), w0, w1, w2, w3), _look(u64(byte & u64(15)), w0, w1, w2, w3)
            target[i] = u32(even | u64(odd << u64(16)))


@compiled
def _float16(packed: Array, scale: Array, table: Array, out: Array, width: int) -> None:
    """As ``_bfloat16``."""
    line = np.empty(16, u32)
    for b in range(len(scale)):
        _to_float16(table, scale[b], line)
        w0, w1, w2, w3 = _four(line, 0), _four(line, 4), _four(line, 8), _four(line, 12)
        pairs, target = packed[b * width : (b + 1) * width], out[b * width : (b + 1) * width]
        for i in range(len(pairs)):
            byte = u64(pairs[i])
            even, odd = _look(u64(byte >> u64(4)), w0, w1, w2, w3), _look(u64(byte & u64(15)), w0, w1, w2, w3)
            target[i] = u32(even | u64(odd << u64(16)))


@compiled
def _float32(packed: Array, scale: Array, table: Array, out: Array, width: int) -> None:
    line = np.empty(16, f32)
    for b in range(len(scale)):
        for c in range(16):
            line[c] = table[c] * scale[b]
        for i in range(b * width, min((b + 1) * width, len(packed))):
            out[2 * i] = line[packed[i] >> u8(4)]
            out[2 * i + 1] = line[packed[i] & u8(15)]


def _in_pairs(loop: Callable[..., None]) -> Callable[[Array, Array, Array, Array, int], None]:
    def run(packed: Array, scale: Array, table: Array, out: Array, width: int) -> None:
        loop(packed, scale, table, out.view(u32), width)

    return run


DEQUANTIZE: dict[str, Callable[[Array, Array, Array, Array, int], None]] = {
    "float32": _float32,
    "bfloat16": _in_pairs(_bfloat16),
    "float16": _in_pairs(_float16),
}
"""By dtype: packed uint8 (n,), scales float32, table float32 (16,), out (2 n,) uint16 or float32, bytes under one scale."""
