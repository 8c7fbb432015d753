"""The source of a re-encoding brought to one scale plane and integer zero points on runs of columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qformats import rewrite
from qformats.rewrite import Refused
from qformats.scheme import Integer, Storage, Tile
from qformats.tensor import Param, QuantizedTensor

__all__ = ["F16_BOUND", "Affine", "Ranges", "affine_form", "merge_range", "spread", "straighten"]

F16_BOUND = "relative 2^-11, absolute 2^-25 below 2^-14"

Ranges = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Affine:
    """The source with one scale plane and integer zero points on runs of ``width`` columns of one row."""

    shape: tuple[int, ...]
    grid: Integer
    scale: Tensor
    zero: Tensor
    width: int
    ranges: Ranges
    notes: list[str]
    rounded: list[str]
    flipped: Tensor | None = None

    @property
    def k(self) -> int:
        return self.shape[-1]

    def plane(self, values: Tensor, width: int) -> Tensor:
        """A plane on runs of ``self.width`` spread to runs of ``width`` (a divisor, or the same)."""
        return spread(values, self.width, width, self.k)


def spread(values: Tensor, coarse: int, fine: int, k: int) -> Tensor:
    """A plane on runs of ``coarse`` columns repeated for runs of ``fine``, which divide them; one value stands for the whole row."""
    count = -(-k // fine)
    if coarse == fine or values.shape[-1] == 1:
        return values if coarse == fine else values.expand(*values.shape[:-1], count)
    return values.unsqueeze(-1).expand(*values.shape, coarse // fine).flatten(-2)[..., :count]


def affine_form(t: QuantizedTensor, storage: Storage, ranges: Ranges, rounding: bool) -> tuple[Affine, Tensor | None]:
    """Bring parameters to one plane of the storage's dtype and integer zero points; a fractional offset is returned apart."""
    if "codes" in storage.options:
        raise Refused(f"the codes of {storage.type} are its own")
    if not isinstance(t.grid, Integer):
        raise Refused("the codes are not integers on a uniform grid")
    notes: list[str] = []
    rounded: list[str] = []
    t = _one_scale(t, storage, notes, rounded, rounding)
    t = rewrite.to_row_blocks(t)
    keep = t.offset is not None and storage.offset is not None
    if t.offset is not None and not keep:
        try:
            t = rewrite.offset_to_zero(t)
        except Refused:
            if not rounding:
                raise
            t = rewrite.offset_to_zero(t, rounding=True)
            rounded.append("the offset is the float16 rounding of scale x zero point")
        notes.append("offset to zero point")
    width, scale, zero, offset = _common_planes(t)
    assert isinstance(t.grid, Integer)
    return Affine(t.shape, t.grid, scale, zero, width, ranges, notes, rounded), offset


def _one_scale(t: QuantizedTensor, storage: Storage, notes: list[str], rounded: list[str], rounding: bool) -> QuantizedTensor:
    if len(t.scales) != 1 or t.scales[0].inverse or isinstance(t.scales[0].values, QuantizedTensor):
        t = rewrite.fold_scales(rewrite.unnest_scale(t) if isinstance(t.scales[0].values, QuantizedTensor) else t, torch.float32)
        notes.append("fold scale factors")
    values = t.scales[0].values
    assert isinstance(values, Tensor)
    name = str(values.dtype).removeprefix("torch.")
    if name not in storage.scale_dtypes:
        target = storage.scale_dtypes[0]
        t, wrong = rewrite.round_scale(t, getattr(torch, target), rounding=rounding)
        notes.append(f"scale {name} to {target}")
        if wrong:
            rounded.append(f"{wrong} of {values.numel()} scales round to {target} ({F16_BOUND})")
    return t


def _common_planes(t: QuantizedTensor) -> tuple[int, Tensor, Tensor, Tensor | None]:
    params = [p for _, p in t.params() if isinstance(p.values, Tensor) and p.values.numel() > 1]
    widths = [min(p.block.sizes[-1], t.shape[-1]) for p in params if isinstance(p.block, Tile)]
    width = min(widths, default=t.shape[-1])
    if t.group_index is None and any(w % width and w < t.shape[-1] for w in widths):
        raise Refused("scale and zero point are on groups that do not nest")

    def plane(param: Param | None, values: Tensor) -> Tensor:
        if param is None or values.numel() == 1 or not isinstance(param.block, Tile):
            return values
        if min(param.block.sizes[-1], t.shape[-1]) == width:
            return values
        return values.index_select(-1, torch.arange(-(-t.shape[-1] // width)) * width // param.block.sizes[-1])

    scale, zero = t.scales[0].values, rewrite.zero_values(t)
    assert isinstance(scale, Tensor)
    offset = t.offset.values if t.offset is not None else None
    if isinstance(offset, QuantizedTensor):
        raise Refused("the offset is itself stored as codes")
    scale = plane(t.scales[0], scale)
    if scale.numel() == 1:
        scale = scale.expand(*t.shape[:-1], -(-t.shape[-1] // width))
    return width, scale, plane(t.zero_point, zero), None if offset is None else plane(t.offset, offset)


def straighten(a: Affine) -> None:
    """Flip every run whose scale is negative: the codes as the record's producer had them."""
    negative = torch.signbit(a.scale)
    if not bool(negative.any()):
        return
    inner, low_high = a.ranges, a.grid.lowest + a.grid.highest
    if a.zero.numel() == 1:
        a.zero = a.zero.expand(a.scale.shape)
    a.zero = torch.where(negative, low_high - a.zero, a.zero)
    a.scale = torch.where(negative, -a.scale, a.scale)
    flipped, width = negative, a.width
    a.flipped = flipped
    a.notes.append("flip runs with a negative scale")

    def ranges(w: int) -> tuple[Tensor, Tensor]:
        if w > width:
            return merge_range(ranges(width), w // width)
        low, high = inner(w)
        mask = flipped if w == width else flipped.index_select(-1, torch.arange(low.shape[-1]) * w // width)
        return torch.where(mask, low_high - high, low), torch.where(mask, low_high - low, high)

    a.ranges = ranges


def merge_range(lows_highs: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    low, high = lows_highs
    pad = -low.shape[-1] % count
    if pad:
        low = torch.cat((low, low[..., -1:].expand(*low.shape[:-1], pad)), -1)
        high = torch.cat((high, high[..., -1:].expand(*high.shape[:-1], pad)), -1)
    return low.unflatten(-1, (-1, count)).amin(-1), high.unflatten(-1, (-1, count)).amax(-1)
