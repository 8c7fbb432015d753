"""What the loops over blocks share: two bytes as an fp16, and the constants that turn eight bits into eight bytes and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = ["FILL", "GATHER", "ONES", "PICK", "half_of", "word"]

u16, u32, u64, f32 = np.uint16, np.uint32, np.uint64, np.float32

ONES = u64(0x0101010101010101)
PICK = u64(0x8040201008040201)  # byte i keeps bit i
FILL = u64(0x7F7F7F7F7F7F7F7F)  # carries any set bit of a byte into its bit 7
GATHER = u64(0x0102040810204080)  # multiplying eight 0/1 bytes by it collects them in the top byte
_SUBNORMAL = f32(2.0**-24)


@compiled
def word(low: int, high: int) -> Any:
    return u16(u16(low) | u16(u16(high) << u16(8)))


@compiled
def half_of(low: int, high: int) -> Any:
    """The fp16 of two bytes as float32, exact; needs no subnormal float32 and no hardware conversion."""
    h = u32(word(low, high))
    sign, exponent, fraction = u32(u32(h & u32(0x8000)) << u32(16)), u32(u32(h >> u32(10)) & u32(31)), u32(h & u32(0x3FF))
    if exponent == u32(0):
        value = f32(fraction) * _SUBNORMAL
        return -value if sign else value
    exponent = u32(exponent + u32(112)) if exponent != u32(31) else u32(255)
    return u32(sign | u32(exponent << u32(23)) | u32(fraction << u32(13))).view(f32)
