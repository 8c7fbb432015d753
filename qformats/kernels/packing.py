"""Codes of 1 to 16 bits in planes of 8, 4, 2 and 1 bits, 16 bytes at a time: the arrangement that all kernels read.

A code of b bits is cut into fields of the widths ``widths(b)``, the low bits first; each field has a plane of its own, so that none
crosses a byte. In a plane of w bits each run of 16 bytes holds 128 / w columns of one row: bits [w i, w i + w) of byte j are column
16 i + j of the run. Sixteen neighbouring columns are then one vector of 16 bytes, shifted and masked once for all of them, and a row is
a whole number of 16-byte words. Columns past the last are zeros.

Example, w = 4: byte 0 of a row holds column 0 in its low and column 16 in its high half.

These functions are the definition; ``qformats.loops.layout`` has the compiled ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qformats.kernels.layout import widths
from qformats.loops import find

__all__ = ["join", "pack", "row_nbytes", "split", "unpack"]

RUN = 16  # bytes


def row_nbytes(columns: int, width: int) -> int:
    """Bytes of one row of a plane of ``width`` bits."""
    return -(-columns * width // (8 * RUN)) * RUN


def pack(field: Tensor, width: int) -> Tensor:
    """``field`` (R, C) uint8 below 2^width as a plane (R, row_nbytes)."""
    if width == 8 and field.shape[1] % RUN == 0:
        return field.contiguous()
    rows, columns = field.shape
    held = 8 // width
    padded = torch.nn.functional.pad(field, (0, row_nbytes(columns, width) * held - columns))
    parts = padded.view(rows, -1, held, RUN)
    plane = parts[:, :, 0].clone()
    for i in range(1, held):
        plane |= parts[:, :, i] << (width * i)
    return plane.view(rows, -1)


def unpack(plane: Tensor, width: int, columns: int) -> Tensor:
    """The (R, columns) uint8 field that ``plane`` holds."""
    if width == 8:
        return plane[:, :columns]
    rows, mask = plane.shape[0], (1 << width) - 1
    words = plane.view(rows, -1, 1, RUN)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device).view(-1, 1)
    return ((words >> shifts) & mask).view(rows, -1)[:, :columns]


def split(codes: Tensor, bits: int) -> list[Tensor]:
    """Planes of ``codes`` (R, C): uint8, or int32 where ``bits`` > 8; values below 2^bits."""
    if bits > 8 and codes.device.type == "cpu" and find("layout"):
        return [*split((codes & 255).to(torch.uint8), 8), *split((codes >> 8).to(torch.uint8), bits - 8)]
    planes, at = [], 0
    for width in widths(bits):
        quick = _packed(codes, at, width) if width < 8 else None
        if quick is None:
            field = codes if at == 0 and bits == width else (codes >> at) & ((1 << width) - 1)
            quick = pack(field.to(torch.uint8), width)
        planes.append(quick)
        at += width
    return planes


def _packed(codes: Tensor, at: int, width: int) -> Tensor | None:
    """The plane of bits ``at`` … of uint8 codes by a loop; None where none runs."""
    loops = find("layout") if codes.device.type == "cpu" and codes.dtype == torch.uint8 else None
    if loops is None:
        return None
    plane = torch.zeros((codes.shape[0], row_nbytes(codes.shape[1], width)), dtype=torch.uint8)
    loops.pack(codes.contiguous().numpy(), at, width, plane.numpy())
    return plane


def join(planes: list[Tensor], bits: int, columns: int) -> Tensor:
    """The codes (R, columns) in ``planes``: uint8, or int32 where ``bits`` > 8."""
    quick = _joined(planes, bits, columns)
    if quick is not None:
        return quick
    codes, at = None, 0
    for plane, width in zip(planes, widths(bits), strict=True):
        field = unpack(plane, width, columns)
        field = field.to(torch.int32) if bits > 8 else field
        codes = field if codes is None else codes | (field << at)
        at += width
    assert codes is not None
    return codes


def _joined(planes: list[Tensor], bits: int, columns: int) -> Tensor | None:
    """``join`` of at most 8 bits by loops; None where none runs."""
    loops = find("layout") if bits < 8 and planes[0].device.type == "cpu" else None
    if loops is None:
        return None
    codes, at = torch.empty((planes[0].shape[0], columns), dtype=torch.uint8), 0
    for plane, width in zip(planes, widths(bits), strict=True):
        loops.unpack(plane.contiguous().numpy(), width, at, codes.numpy())
        at += width
    return codes
