"""Rewrites of codes and zero points: signedness, width, relabelling, zero point to offset and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qformats.loops import find
from qformats.real import Real, round_once
from qformats.rewrite.forms import Refused, inexact, integer_grid, plain, single_row
from qformats.scheme import Integer, Tile
from qformats.tensor import Param, QuantizedTensor, constant

__all__ = [
    "block_loops",
    "block_range",
    "block_range_definition",
    "flip_and_shift",
    "offset_to_zero",
    "recentre",
    "relabel_definition",
    "to_signed",
    "to_unsigned",
    "widen",
    "zero_to_offset",
    "zero_values",
]


def to_signed(t: QuantizedTensor) -> QuantizedTensor:
    """Unsigned codes q with zero z become q − 2^(b−1) with zero z − 2^(b−1)."""
    grid = integer_grid(t)
    if grid.signed:
        return t
    half = 1 << (grid.bits - 1)
    zero = _shift_zero(t, -half)
    return t.replace(codes=_moved(t.codes, -half).view(torch.int8), grid=Integer(grid.bits, True), zero_point=zero)


def to_unsigned(t: QuantizedTensor) -> QuantizedTensor:
    """Signed codes become unsigned, the zero point moves along."""
    grid = integer_grid(t)
    if not grid.signed:
        return t
    half = 1 << (grid.bits - 1)
    zero = _shift_zero(t, half)
    return t.replace(codes=_moved(t.codes, half), grid=Integer(grid.bits), zero_point=zero)


def _moved(codes: Tensor, by: int) -> Tensor:
    """``codes + by`` as bytes, modulo 256; blank codes (of stride zero) stay so."""
    blank = codes.numel() and all(stride == 0 for stride in codes.stride())
    shape, codes = codes.shape, codes.as_strided((1,) * codes.ndim, (1,) * codes.ndim) if blank else codes
    moved = codes.to(torch.int8 if codes.dtype == torch.int16 else codes.dtype).view(torch.uint8) + (by & 0xFF)
    return moved.expand(shape)


def _shift_zero(t: QuantizedTensor, by: int) -> Param | None:
    if t.zero_point is None:
        return constant(by, t.shape)
    values = plain(t.zero_point, "zero point")
    if values.dtype.is_floating_point:
        moved = Real.of(values) + Real.of(torch.tensor(float(by)))
        rounded = round_once(moved, torch.float32)
        if inexact(moved, rounded):
            raise Refused("the float zero point cannot be moved without rounding")
        return t.zero_point.with_values(rounded)
    moved_int = values.to(torch.int16) + by
    if moved_int.numel() == 1 and int(moved_int.reshape(-1)[0]) == 0:
        return None
    return t.zero_point.with_values(moved_int)


def widen(t: QuantizedTensor, bits: int) -> QuantizedTensor:
    """The same codes on a grid of more bits."""
    grid = integer_grid(t)
    if bits < grid.bits:
        raise Refused(f"{grid.bits}-bit codes do not fit {bits} bits")
    return t.replace(grid=Integer(bits, grid.signed))


def zero_values(t: QuantizedTensor) -> Tensor:
    """The integer zero points as int16 on their own grid, shape (1, …, 1) where there is none; refuses fractional ones."""
    if t.zero_point is None:
        return torch.zeros((1,) * len(t.shape), dtype=torch.int16)
    values = plain(t.zero_point, "zero point")
    if values.dtype.is_floating_point and not bool(((values == values.round()) & (values.abs() <= 32767)).all()):
        raise Refused("the zero points are not integers")
    return values.to(torch.int16)


def block_range(t: QuantizedTensor, width: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest code of each run of ``width`` columns, int16 (…, ceil(K / width))."""
    integer_grid(t)
    if width == 1:
        return (only := t.codes.to(torch.int16)), only
    loops, k = block_loops(), t.codes.shape[-1]
    if loops is None or t.codes.device.type != "cpu" or k % width or t.codes.dtype not in (torch.uint8, torch.int8):
        return block_range_definition(t.codes, width)
    counts = (*t.codes.shape[:-1], k // width)
    low, high = (torch.empty(counts, dtype=torch.int16) for _ in range(2))
    loops.run_range(t.codes.contiguous().view(-1, width).numpy(), low.view(-1).numpy(), high.view(-1).numpy())
    return low, high


def block_range_definition(codes: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """``block_range`` in torch: what the compiled loop must equal."""
    k = codes.shape[-1]
    tail = k % width
    full = codes[..., : k - tail].unflatten(-1, (-1, width))
    low, high = full.amin(-1), full.amax(-1)
    if tail:
        rest = codes[..., k - tail :]
        low = torch.cat((low, rest.amin(-1, keepdim=True)), -1)
        high = torch.cat((high, rest.amax(-1, keepdim=True)), -1)
    return low.to(torch.int16), high.to(torch.int16)


def block_loops() -> Any:
    """``qformats.loops.blocks``, or None where numba cannot be imported."""
    return find("blocks")


def flip_and_shift(codes: Tensor, width: int, shift: Tensor, flip: Tensor | None, signed: bool, *, reuse: bool = False) -> Tensor:
    """``shift + codes`` (or ``shift - codes`` where ``flip``) for each run of ``width`` columns; all results must fit 8 bits.

    ``codes`` (…, K) uint8 or int8, ``shift`` int16 and ``flip`` bool (…, ceil(K / width)) or broadcastable to it. ``reuse`` lets the
    result take the place of contiguous ``codes``.
    """
    # wrap-around arithmetic on the bytes: the results fit, so what happens above bit 7 does not matter
    source, k, loops = codes.contiguous().view(torch.uint8), codes.shape[-1], block_loops()
    made = torch.int8 if signed else torch.uint8
    if loops is None or codes.device.type != "cpu" or k % width:
        return relabel_definition(source, width, shift, flip).view(made)
    out = source if reuse or source.data_ptr() != codes.data_ptr() else source.clone()
    counts = (*codes.shape[:-1], k // width)
    turns = torch.empty(0, dtype=torch.bool) if flip is None else flip.expand(counts).contiguous().view(-1)
    loops.relabel(out.view(-1, width).numpy(), shift.to(torch.int16).expand(counts).contiguous().view(-1).numpy(), turns.numpy())
    return out.view(made)


def relabel_definition(codes: Tensor, width: int, shift: Tensor, flip: Tensor | None) -> Tensor:
    """``shift ± codes`` in bytes, in torch: what the compiled loop must equal. Codes uint8 (…, K), planes as in ``flip_and_shift``."""
    add = (shift.to(torch.int32) & 0xFF).to(torch.uint8)
    mask = torch.zeros_like(add)
    if flip is not None:  # s - c = (s + 1) + ~c
        mask = torch.where(flip, 0xFF, 0).to(torch.uint8)
        add = add + flip.to(torch.uint8)
    k = codes.shape[-1]
    wide = codes if k % width == 0 else torch.nn.functional.pad(codes, (0, -k % width))
    runs = wide.unflatten(-1, (-1, width))
    counts = runs.shape[:-1]
    return torch.add(runs ^ mask.expand(counts).unsqueeze(-1), add.expand(counts).unsqueeze(-1)).flatten(-2)[..., :k].contiguous()


def recentre(t: QuantizedTensor, grid: Integer, zero: int) -> QuantizedTensor:
    """Move codes so that every zero point becomes the constant ``zero`` on ``grid``; refuses if a code leaves the grid."""
    source, z = integer_grid(t), zero_values(t)
    if t.offset is not None:
        raise Refused("there is an additive offset")
    width = t.zero_point.block.sizes[-1] if t.zero_point is not None and isinstance(t.zero_point.block, Tile) else t.shape[-1]
    if t.zero_point is not None and z.numel() > 1 and not single_row(t.zero_point.block):
        raise Refused("zero points do not belong to runs of one row")
    if t.group_index is not None and z.numel() > 1:
        raise Refused("act-order: zero points follow the group index")
    shift = zero - z
    lowest, highest = source.lowest + int(shift.min()), source.highest + int(shift.max())
    if lowest < grid.lowest or highest > grid.highest:
        low, high = block_range(t, min(width, t.shape[-1]))
        worst = max(grid.lowest - int((low + shift).min()), int((high + shift).max()) - grid.highest)
        if worst > 0:
            raise Refused(f"some code minus zero point lies {worst} outside the {grid.bits}-bit range")
    codes = flip_and_shift(t.codes, min(width, t.shape[-1]), shift, None, grid.signed)
    return t.replace(codes=codes, grid=grid, zero_point=constant(zero, t.shape) if zero else None)


def zero_to_offset(t: QuantizedTensor, dtype: torch.dtype, *, rounding: bool = False) -> QuantizedTensor:
    """Replace the zero point by ``offset = −scale · zero_point`` stored in ``dtype``; without ``rounding`` refuses if any rounds."""
    if t.offset is not None:
        raise Refused("there is an offset already")
    if t.signs is not None:
        raise Refused("a separate sign plane multiplies the zero point")
    if len(t.scales) != 1 or t.scales[0].inverse:
        raise Refused("more than one scale factor")
    scale = plain(t.scales[0], "scale")
    if t.zero_point is None:
        return t.replace(offset=Param(torch.zeros_like(scale, dtype=dtype), t.scales[0].block))
    zero = plain(t.zero_point, "zero point")
    if zero.numel() > 1 and t.zero_point.block != t.scales[0].block:
        raise Refused("scale and zero point have different blocks")
    product = -(Real.of(scale) * Real.of(zero))
    offset = round_once(product, dtype)
    wrong = inexact(product, offset)
    if wrong and not rounding:
        raise Refused(f"scale x zero point rounds in {wrong} of {offset.numel()} blocks")
    if not bool(torch.isfinite(offset).all()):
        raise Refused(f"scale x zero point overflows {str(dtype).removeprefix('torch.')}")
    return t.replace(zero_point=None, offset=Param(offset, t.scales[0].block))


def offset_to_zero(t: QuantizedTensor, *, rounding: bool = False) -> QuantizedTensor:
    """Replace the offset by an integer zero point −offset/scale; refuses unless it is an integer for every block.

    With ``rounding`` a quotient may be the integer whose product with the scale rounds to the stored offset (the inverse of
    ``zero_to_offset(rounding=True)``).
    """
    if t.offset is None:
        return t
    if t.zero_point is not None or t.signs is not None or len(t.scales) != 1 or t.scales[0].inverse:
        raise Refused("a zero point, a sign plane or more than one scale factor")
    if t.scales[0].block != t.offset.block:
        raise Refused("scale and offset have different blocks")
    scale, offset = plain(t.scales[0], "scale"), plain(t.offset, "offset")
    s64, m64 = scale.to(torch.float64), offset.to(torch.float64)
    zero = torch.where(s64 == 0, torch.zeros_like(s64), (-m64 / s64).round())
    back = -(Real.of(scale) * Real.of(zero))
    good = (back.high == m64) if not rounding else (round_once(back, offset.dtype) == offset)
    good &= zero.abs() <= 32000
    if not bool(good.all()):
        raise Refused(f"offset / scale is not an integer in {int((~good).sum())} of {good.numel()} blocks")
    return t.replace(offset=None, zero_point=Param(zero.to(torch.int16), t.scales[0].block))
