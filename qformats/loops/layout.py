"""Compiled loops between codes and the planes that hold them. Definitions: ``qformats.kernels.packing.split`` and ``join``."""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.loops.compiled import compiled
from qformats.loops.lanes import merge
from qformats.loops.rows import unpack_field

__all__ = ["pack", "unpack"]

Array = np.ndarray[Any, Any]


@compiled
def pack(codes: Array, shift: Any, width: Any, plane: Array) -> None:
    """Bits ``shift`` … of uint8 codes (R, C) to a plane of ``width`` bits (R, bytes) that holds zeros."""
    columns, held, mask = codes.shape[1], 8 // width, (1 << width) - 1
    padded = np.zeros((columns + 127) // 128 * 128, np.uint8)
    source = np.intp(padded.ctypes.data)
    for row in range(len(codes)):
        for i in range(columns):  # compiled in a tenth of the time that an assignment of arrays takes
            padded[i] = codes[row, i]
        target = np.intp(plane.ctypes.data) + row * plane.shape[1]
        for run in range(plane.shape[1] // 16):
            for i in range(held):
                merge(source + 16 * (run * held + i), shift, mask, width * i, target + 16 * run)


@compiled
def unpack(plane: Array, width: Any, shift: Any, codes: Array) -> None:
    """A plane's fields to bit ``shift`` … of uint8 codes (R, C), which are overwritten where ``shift`` is 0."""
    columns = codes.shape[1]
    padded = np.zeros((columns + 127) // 128 * 128, np.uint8)
    target = np.intp(padded.ctypes.data)
    for row in range(len(codes)):
        if shift:
            for i in range(columns):
                padded[i] = codes[row, i]
        unpack_field(np.intp(plane.ctypes.data) + row * plane.shape[1], width, shift, columns, target)
        for i in range(columns):
            codes[row, i] = padded[i]
