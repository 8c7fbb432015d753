"""The source of a re-encoding brought to one scale plane and integer zero points on runs of columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qformats import grids, rewrite
from qformats.real import Real, product
from qformats.real import rounded as rounded_to
from qformats.rewrite import Levels, Refused
from qformats.scheme import Float, Integer, Learned, Storage, Tile
from qformats.tensor import Param, QuantizedTensor

__all__ = ["F16_BOUND", "Affine", "Folded", "Ranges", "affine_form", "bound", "merge_range", "one_plane", "spread", "straighten"]

F16_BOUND = "relative 2^-11, absolute 2^-25 below 2^-14"
_BOUNDS = {"float16": F16_BOUND, "bfloat16": "relative 2^-8", "float32": "relative 2^-24", "float64": "relative 2^-53"}


def bound(dtype: str) -> str:
    """How far rounding once to ``dtype`` can go, in words."""
    return _BOUNDS.get(dtype, f"one rounding to {dtype}")

Ranges = Callable[[int], tuple[Tensor, Tensor]]
Folded = list[QuantizedTensor]
"""Nothing, or a tensor with its scale factors multiplied without rounding."""


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
    indexed: bool = False
    levels: Levels | None = None
    factor: Tensor | None = None  # int16 on runs of ``width``: codes, zeros and ranges here are the stored times it
    unit: float = 1.0  # scales are the tensor's divided by it: a factor of all, which two-level forms leave out
    ends: tuple[int, int] | None = None  # the smallest and largest of the codes its grid really has, where they are not the grid's
    coded: tuple[Tensor, Tensor] | None = None  # codes uint8 on runs of ``width`` and their numbers (256,), where ``scale`` is blank
    reach: int | None = None  # no code minus its zero point is larger, where it is a stored one times ``factor``
    merged: Tensor | None = None  # ``scale`` is this, one number for each group of the storage
    moved: int | None = None  # codes and ranges here are the tensor's own codes (not ``rewrite.whole_codes``) plus it

    @property
    def k(self) -> int:
        return self.shape[-1]

    def plain(self) -> QuantizedTensor:
        """A tensor of the scale alone, its codes blank."""
        blank, tile = torch.zeros(1, dtype=torch.uint8).expand(self.shape), Tile((*(1 for _ in self.shape[:-1]), self.width))
        return QuantizedTensor(self.shape, blank, self.grid, (Param(self.scale.contiguous(), tile),))

    def plane(self, values: Tensor, width: int) -> Tensor:
        """A plane on runs of ``self.width`` spread to runs of ``width`` (a divisor, or the same)."""
        return spread(values, self.width, width, self.k)


def spread(values: Tensor, coarse: int, fine: int, k: int) -> Tensor:
    """A plane on runs of ``coarse`` columns repeated for runs of ``fine``, which divide them; one value stands for the whole row."""
    count = -(-k // fine)
    if coarse == fine or values.shape[-1] == 1:
        return values if coarse == fine else values.expand(*values.shape[:-1], count)
    return values.unsqueeze(-1).expand(*values.shape, coarse // fine).flatten(-2)[..., :count]


def affine_form(
    t: QuantizedTensor, storage: Storage, ranges: Ranges, rounding: bool, exact: bool = False, known: Folded | None = None
) -> tuple[Affine, Tensor | None]:
    """Bring parameters to one plane of the storage's dtype and integer zero points; a fractional offset is returned apart.

    With ``exact``, or two levels on both sides, the scale keeps its value in float32 or float64 whatever the storage's dtype. ``known``
    is for a caller who asks twice about one tensor: its product of scale factors is kept there.
    """
    notes: list[str] = []
    rounded: list[str] = []
    moved: int | None = None
    if not isinstance(t.grid, Learned):  # parameters are what is decided from here on; codes are looked at through ``ranges``
        t = t.replace(codes=torch.zeros((), dtype=t.codes.dtype).expand(t.codes.shape))
    if storage.offset is not None and _needs_offset(t):
        assert isinstance(t.grid, Integer)
        moved = -t.grid.lowest
        ranges = _unknown
        t = _zero_in_offset(one_plane(t, storage, notes, rounded, rounding), storage.offset, notes, rounded, rounding)
    ends = None
    if not rewrite.is_whole(t):
        ends = rewrite.code_ends(t)
        t = rewrite.whole_codes(t)
        notes.append("values to integer codes")
    levels = rewrite.levels_of(t.scales, t.shape)
    plain = not exact and (storage.sub_scale is None or levels is None)
    t, unit = _apart(t) if exact and levels is None else (t, 1.0)
    known = known if unit == 1.0 else None  # what is kept there has all factors
    t, coded = _blank_scale(t) if exact and levels is None else (t, None)
    if coded is not None:
        notes.append("fold scale factors")
    else:
        t = one_plane(t, storage, notes, rounded, rounding, known) if plain else _folded(t, notes, known=known)
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
    return Affine(t.shape, t.grid, scale, zero, width, ranges, notes, rounded, indexed=t.group_index is not None, levels=levels,
                  unit=unit, ends=ends, coded=coded, moved=moved), offset  # fmt: skip


def _blank_scale(t: QuantizedTensor) -> tuple[QuantizedTensor, tuple[Tensor, Tensor] | None]:
    """The tensor with a blank scale in place of its only one, codes of a small float; and ``Affine.coded``, None for other tensors."""
    inner, block = (t.scales[0].values, t.scales[0].block) if len(t.scales) == 1 else (None, None)
    if not isinstance(inner, QuantizedTensor) or not isinstance(inner.grid, Float) or inner.params() or t.offset is not None:
        return t, None
    book = grids.float_values(inner.grid.name)
    single = isinstance(block, Tile) and all(size == 1 for size in block.sizes[:-1]) and t.shape[-1] % block.sizes[-1] == 0
    if not single or t.scales[0].inverse or t.group_index is not None or t.zero_point is not None or len(book) != 256:
        return t, None
    codes = inner.codes.contiguous().view(torch.uint8)
    blank = torch.ones((), dtype=torch.float32).expand(codes.shape)
    return t.replace(scales=(t.scales[0].with_values(blank),)), (codes, book)


def _apart(t: QuantizedTensor) -> tuple[QuantizedTensor, float]:
    """The tensor without its constant factors, and their product, where the other is the codes of a small float: its scales stay short."""
    ones = [p for p in t.scales if isinstance(p.values, Tensor) and p.values.numel() == 1 and not p.inverse]
    rest = [p for p in t.scales if not any(p is one for one in ones)]
    inner = rest[0].values if len(rest) == 1 else None
    if not ones or not isinstance(inner, QuantizedTensor) or not isinstance(inner.grid, Float) or inner.params():
        return t, 1.0
    total = product(Real.of(torch.ones((), dtype=torch.float64)), ((p.real().map(lambda v: v.reshape(())), False) for p in ones))
    extent = total.measured().extent
    if total.low is not None or extent is None or extent.bits > 29 or not -200 < extent.unit <= extent.top < 200 or not total.high > 0:
        return t, 1.0
    return t.replace(scales=tuple(rest)), float(total.high)


def _needs_offset(t: QuantizedTensor) -> bool:
    """Whether its integers stand around zero points that only a float offset can replace: fractions, or with an offset beside."""
    if t.zero_point is None or t.signs is not None or not isinstance(t.grid, Integer) or t.group_index is not None:
        return False
    if t.offset is not None:
        return True
    values = t.zero_point.values
    if not isinstance(values, Tensor) or values.numel() == 1 or not values.dtype.is_floating_point:
        return False
    return not bool((values == values.round()).all())


def _unknown(width: int) -> tuple[Tensor, Tensor]:
    """Ranges of codes around fractions: asked for only where the grid is too narrow for all codes."""
    raise Refused("codes around zero points that are no integers do not move into a narrower grid")


def _zero_in_offset(
    t: QuantizedTensor, dtype: str, notes: list[str], rounded: list[str], rounding: bool
) -> QuantizedTensor:
    """The zero point as ``offset - scale x zero point`` in ``dtype`` on the finer of the groups; codes on the unsigned grid."""
    t = rewrite.to_unsigned(rewrite.to_row_blocks(t))
    scale, zero, lead = t.scales[0], t.zero_point, tuple(1 for _ in t.shape[:-1])
    assert isinstance(scale.values, Tensor)
    params = [p for p in (scale, zero, t.offset) if p is not None]
    widths = [min(p.block.sizes[-1], t.shape[-1]) if isinstance(p.block, Tile) else 0 for p in params]
    if any(isinstance(p.values, QuantizedTensor) for p in params) or min(widths) == 0:
        raise Refused("the zero point is itself stored as codes, or not on runs of a row")
    if any(w % min(widths) and w < t.shape[-1] for w in widths):
        raise Refused("scale and zero point are on groups that do not nest")
    width = min(widths)
    counts = Tile((*lead, width)).counts(t.shape)

    def plane(param: Param | None) -> Real:
        if param is None or not isinstance(param.block, Tile):
            return Real.of(torch.zeros((1,) * len(t.shape)))
        values = param.values
        assert isinstance(values, Tensor)
        return Real.of(spread(values, min(param.block.sizes[-1], t.shape[-1]), width, t.shape[-1]).expand(counts))

    exact = plane(t.offset) + -(plane(scale) * plane(zero))
    stored, wrong = rounded_to(exact, getattr(torch, dtype))
    if not bool(torch.isfinite(stored).all()):
        raise Refused(f"scale x zero point overflows {dtype}")
    if wrong and not rounding:
        raise Refused(f"scale x zero point is not {dtype} in {wrong} of {stored.numel()} groups")
    notes.append("zero point to offset")
    if wrong:
        rounded.append(f"the offset of {wrong} of {stored.numel()} groups rounds to {dtype} ({bound(dtype)})")
    return t.replace(zero_point=None, offset=Param(stored, Tile((*lead, width))))


def _folded(t: QuantizedTensor, notes: list[str], rounding: bool = False, known: Folded | None = None) -> QuantizedTensor:
    """One plain scale plane: in float32, or float64 where the product of the factors needs it.

    With ``rounding`` a quotient that has no end is there too, rounded to odd, for the one rounding that follows.
    """
    if len(t.scales) == 1 and not t.scales[0].inverse and not isinstance(t.scales[0].values, QuantizedTensor):
        return t
    notes.append("fold scale factors")
    if known:
        return known[0]
    nested = any(isinstance(p.values, QuantizedTensor) for _, p in t.params())
    folded, certain = rewrite.fold_wide(rewrite.unnest_scale(t) if nested else t, odd=rounding)
    if known is not None and certain:
        known.append(folded)
    return folded


def one_plane(
    t: QuantizedTensor, storage: Storage, notes: list[str], rounded: list[str], rounding: bool, known: Folded | None = None
) -> QuantizedTensor:
    """All factors in one plane of one of the storage's dtypes."""
    return _one_dtype(_folded(t, notes, rounding, known), storage, notes, rounded, rounding)


def _one_dtype(t: QuantizedTensor, storage: Storage, notes: list[str], rounded: list[str], rounding: bool) -> QuantizedTensor:
    """The scale in a dtype of the storage: exactly, or with ``rounding`` rounded once."""
    values = t.scales[0].values
    assert isinstance(values, Tensor)
    name = str(values.dtype).removeprefix("torch.")
    if name not in storage.scale_dtypes:
        target = storage.scale_dtypes[0]
        t, wrong = rewrite.round_scale(t, getattr(torch, target), rounding=rounding)
        notes.append(f"scale {name} to {target}")
        if wrong:
            rounded.append(f"{wrong} of {values.numel()} scales round to {target} ({bound(target)})")
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
    negative = torch.signbit(a.scale if a.merged is None else a.merged)
    if not bool(negative.any()):
        return
    negative, a.merged = torch.signbit(a.scale), None
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
