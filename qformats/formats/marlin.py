"""Marlin's arrangement of 4-bit codes and scales, which GPTQ and AWQ checkpoints share. Not a format itself. Numpy only.

Source: auto-gptq 0.7.1 ``nn_modules/qlinear/qlinear_marlin.py`` (``_get_perms``, ``pack``), equal to autoawq 0.2.9
``modules/linear/marlin.py``. Codes (K, N) are cut into tiles of 16 x 16; four tiles beside each other, 16 rows of 64 columns, are 1024
values, which ``_get_perms`` puts in the order of 128 words of 8 values, the first in the low bits. In closed form: word 4 i + j of a
row of tiles, i = 0 … 31, belongs to tile j and holds, with a = 2 (i mod 4) and c = i div 4,

| bits | 0-3 | 4-7 | 8-11 | 12-15 | 16-19 | 20-23 | 24-27 | 28-31 |
|---|---|---|---|---|---|---|---|---|
| row | a | a + 8 | a | a + 8 | a + 1 | a + 9 | a + 1 | a + 9 |
| column | c | c | c + 8 | c + 8 | c | c | c + 8 | c + 8 |

Scales (G, N) keep their rows; inside each 64 columns, column 8 j + i goes to place 8 i + j. With one group a row of K, inside each 32
columns, place 8 i + (0 … 7) holds column 2 i + (0 1 8 9 16 17 24 25). Zero points are 8 and not stored.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from qformats.errors import Unsupported, UsageError

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

__all__ = ["COLUMNS", "ROWS", "check_kernel", "pack_tiles", "permute_scales", "restore_scales", "unpack_tiles"]

COLUMNS = 64  # output columns of one run of 128 words
ROWS = 16  # input rows of one row of words
_GROUPED = [i + 8 * j for i in range(8) for j in range(8)]
_SINGLE = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def check_kernel(shape: tuple[int, ...], group: int | None) -> None:
    """What the kernel takes (auto-gptq 0.7.1 ``QuantLinear.__init__``): ``UsageError('option')`` for other groups than 128 or a whole row,
    ``Unsupported('marlin-shape')`` for other sizes."""
    if group not in (None, 128):
        raise UsageError("option", f"Marlin has no groups of {group}", hint="add group=128 or group=-1")
    if shape[-1] % 128 or shape[-2] % 256:
        text = f"Marlin takes inputs in multiples of 128 and outputs in multiples of 256, not {shape[-1]} and {shape[-2]}"
        raise Unsupported("marlin-shape", text, hint="plain GPTQ or AWQ words hold them")


def _order() -> Array:
    """Place p of 1024 packed values -> index 64 row + column of the 16 x 64 codes."""
    i, j, field = np.meshgrid(np.arange(32), np.arange(4), np.arange(8), indexing="ij")
    row = 2 * (i % 4) + 8 * (field % 2) + field // 4
    column = 16 * j + i // 4 + 8 * (field // 2 % 2)
    flat: Array = (64 * row + column).reshape(-1)
    return flat


def _loops() -> ModuleType | None:
    try:
        from qformats.loops import tiles
    except ImportError:
        return None
    return tiles


def unpack_tiles(words: Array) -> Array:
    """int32 words (K / 16, 2 n), n a multiple of 64 -> uint8 codes (n, K)."""
    loops = _loops()
    if loops is None:
        return unpack_tiles_definition(words)
    out = np.empty((words.shape[1] // 2, words.shape[0] * ROWS), np.uint8)
    loops.unpack_marlin(np.ascontiguousarray(words).view(np.uint32), out.view(np.uint16))
    return out


def unpack_tiles_definition(words: Array) -> Array:
    """``unpack_tiles`` in whole-array steps: what the compiled loop must equal."""
    tall, wide = words.shape[0], words.shape[1] // 128
    fields = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    values = np.empty((tall, wide, 1024), np.uint8)
    values[..., _order()] = fields.reshape(tall, wide, 1024)
    return np.ascontiguousarray(values.reshape(tall, wide, ROWS, COLUMNS).transpose(1, 3, 0, 2)).reshape(wide * COLUMNS, tall * ROWS)


def pack_tiles(codes: Array) -> Array:
    """uint8 codes (n, K), n a multiple of 64 and K of 16 -> int32 words (K / 16, 2 n)."""
    loops = _loops()
    if loops is None:
        return pack_tiles_definition(codes)
    out = np.empty((codes.shape[1] // ROWS, codes.shape[0] * 2), np.uint32)
    loops.pack_marlin(np.ascontiguousarray(codes).view(np.uint16), out)
    return out.view(np.int32)


def pack_tiles_definition(codes: Array) -> Array:
    """``pack_tiles`` in whole-array steps: what the compiled loop must equal."""
    wide, tall = codes.shape[0] // COLUMNS, codes.shape[1] // ROWS
    values = codes.reshape(wide, COLUMNS, tall, ROWS).transpose(2, 0, 3, 1).reshape(tall, wide, 1024)
    fields = values[..., _order()].reshape(tall, wide * 128, 8).astype(np.uint32)
    words: Array = np.bitwise_or.reduce(fields << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
    return words.astype(np.uint32).view(np.int32)


def _places(groups: int) -> list[int]:
    return _GROUPED if groups > 1 else _SINGLE


def permute_scales(scales: Array) -> Array:
    """Scales (G, n), n a multiple of 64 -> the same shape in Marlin's order."""
    places = _places(len(scales))
    return np.ascontiguousarray(scales.reshape(len(scales), -1, len(places))[..., places]).reshape(scales.shape)


def restore_scales(stored: Array) -> Array:
    """The inverse of ``permute_scales``."""
    places = _places(len(stored))
    runs = stored.reshape(len(stored), -1, len(places))
    plain = np.empty_like(runs)
    plain[..., places] = runs
    return plain.reshape(stored.shape)
