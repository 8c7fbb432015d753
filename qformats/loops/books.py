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
from qformats.loops.lookups import LANES, look_up

__all__ = ["DEQUANTIZE", "pack_pairs", "unpack_pairs"]

Array = np.ndarray[Any, Any]
u8, u32, f32 = np.uint8, np.uint32, np.float32
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
    for c in range(len(line)):  # not the number 16: the loop would be unrolled and then not vectorized
        bits = f32(table[c] * scale).view(u32)
        even = u32(u32(bits >> u32(16)) & _ONE)
        line[c] = u32(u32(u32(bits + u32(0x7FFF)) + even) >> u32(16))


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
def _pairs(packed: Array, first: int, last: int, line: Array, out: Array) -> None:
    """Both numbers of each of the bytes ``first:last`` under one scale, ``line`` uint32 (16,), as one word: the first in the low half."""
    i = first
    while i + LANES <= last:
        look_up(packed, i, line, out)
        i += LANES
    while i < last:
        out[i] = line[packed[i] >> u8(4)] | u32(line[packed[i] & u8(15)] << u32(16))
        i += 1


@compiled
def _bfloat16(packed: Array, scale: Array, table: Array, out: Array, width: int) -> None:
    """``out`` uint32 (n,): both numbers of each of ``packed`` (n,); a scale is for ``width`` bytes, the last for what is left."""
    line = np.empty(16, u32)
    for b in range(len(scale)):
        _to_bfloat16(table, scale[b], line)
        _pairs(packed, b * width, min((b + 1) * width, len(packed)), line, out)


@compiled
def _float16(packed: Array, scale: Array, table: Array, out: Array, width: int) -> None:
    """As ``_bfloat16``."""
    line = np.empty(16, u32)
    for b in range(len(scale)):
        _to_float16(table, scale[b], line)
        _pairs(packed, b * width, min((b + 1) * width, len(packed)), line, out)


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
