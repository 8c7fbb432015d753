"""Two bytes of a block as an fp16, inside compiled loops."""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled

__all__ = ["half_of", "word"]

u16, u32, f32 = np.uint16, np.uint32, np.float32
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
