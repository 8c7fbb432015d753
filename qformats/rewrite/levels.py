"""Scales of two levels: an integer for each sub-block times one number for each super-block, read off a tensor and written into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qformats.loops import find
from qformats.real import Real, rounded
from qformats.rewrite.codes import zero_values
from qformats.rewrite.forms import Refused, plain, single_row
from qformats.rewrite.groups import split_param
from qformats.rewrite.whole import common_step
from qformats.scheme import Integer, SubScale, Tile
from qformats.tensor import Param, QuantizedTensor, constant

__all__ = ["Levels", "level_param", "levels_of", "nest_scale", "spread_runs", "stepped", "stepped_codes", "stepped_definition"]


@dataclass(frozen=True, slots=True)
class Levels:
    """A parameter as ``step * number``: ``step`` float64 (…, ceil(K / wide)), ``number`` int64 or int32 (…, ceil(K / narrow))."""

    step: Tensor
    number: Tensor
    wide: int
    narrow: int

    def on(self, wide: int, narrow: int, k: int) -> Levels:
        """The same on finer super-blocks, or on coarser sub-blocks whose numbers are equal; refuses others."""
        if wide != self.wide and self.wide % wide:
            raise Refused(f"super-blocks of {self.wide} columns are not a multiple of {wide}")
        step, number = spread_runs(self.step, self.wide, wide, k), self.number
        if narrow > self.narrow:
            number = merged(number, self.narrow, narrow)
        elif self.narrow % narrow:
            raise Refused(f"sub-blocks of {self.narrow} columns are not a multiple of {narrow}")
        return Levels(step, spread_runs(number, max(narrow, self.narrow), narrow, k), wide, narrow)


def spread_runs(values: Tensor, coarse: int, fine: int, k: int) -> Tensor:
    """A plane on runs of ``coarse`` columns for runs of ``fine``, which divide them or the row."""
    if coarse == fine:
        return values
    if coarse % fine == 0 and values.shape[-1] * coarse == k:
        return values.unsqueeze(-1).expand(*values.shape, coarse // fine).flatten(-2)
    return values.index_select(-1, torch.arange(-(-k // fine)) * fine // coarse)


def merged(number: Tensor, narrow: int, width: int) -> Tensor:
    """One number for ``width`` columns where all on finer runs of ``narrow`` are equal; refuses others."""
    count = width // narrow
    if width % narrow or number.shape[-1] % count:
        raise Refused(f"sub-blocks of {narrow} do not fill blocks of {width}")
    runs = number.unflatten(-1, (-1, count))
    differ = int((runs != runs[..., :1]).any(-1).sum())
    if differ:
        raise Refused(f"neighbouring sub-scales of {narrow} columns differ in {differ} blocks of {width}")
    first: Tensor = runs[..., 0].contiguous()
    return first


def levels_of(params: tuple[Param, ...], shape: tuple[int, ...]) -> Levels | None:
    """The two levels of a product of parameters: one stored as integers under a plain plane, all others constant; None for other forms."""
    nested = [p for p in params if isinstance(p.values, QuantizedTensor)]
    rest = [p for p in params if not isinstance(p.values, QuantizedTensor)]
    if len(nested) != 1 or any(p.inverse or p.rounded_to is not None for p in params) or not single_row(nested[0].block):
        return None
    inner = nested[0].values
    assert isinstance(inner, QuantizedTensor)
    constants = [p.values for p in rest if isinstance(p.values, Tensor) and p.values.numel() == 1]
    if not isinstance(inner.grid, Integer) or inner.offset is not None or inner.signs is not None or len(constants) != len(rest):
        return None
    if len(inner.scales) != 1 or isinstance(inner.scales[0].values, QuantizedTensor) or not single_row(inner.scales[0].block):
        return None
    zero = 0.0 if inner.zero_point is None else _single(inner.zero_point)
    if zero is None or zero * 2 != int(zero * 2) or inner.scales[0].inverse:
        return None
    halves = 1 if zero == int(zero) else 2
    number = inner.codes.to(torch.int64) * halves - int(zero * halves)
    step = inner.scales[0].values.to(torch.float64) / halves
    for value in constants:
        step = step * float(value.reshape(-1)[0])  # constants are short: 11 + a few bits
    narrow, per = _width(nested[0]), _width(inner.scales[0])
    return Levels(step, number, narrow * per, narrow)


def _single(param: Param) -> float | None:
    if isinstance(param.values, QuantizedTensor) or param.values.numel() != 1 or param.inverse:
        return None
    return float(param.values.reshape(-1)[0])


def _width(param: Param) -> int:
    assert isinstance(param.block, Tile)
    return param.block.sizes[-1]


def stepped(scale: Tensor, narrow: int, wide: int) -> Levels:
    """A plane on runs of ``narrow`` as whole multiples of one number for each ``wide`` columns; refuses numbers above 2^15.

    Where all are equal the multiple is 1, else the number is the largest that divides them all; it is negative where none is positive.
    """
    runs = scale.to(torch.float64).unflatten(-1, (-1, wide // narrow)).contiguous()  # (…, K / wide, count)
    loops = find("levels") if runs.device.type == "cpu" else None
    if loops is None:
        step, number, bad = stepped_definition(runs)
    else:
        step, number = torch.empty(runs.shape[:-1], dtype=torch.float64), torch.empty(runs.shape, dtype=torch.int64)
        bad = int(loops.stepped(runs.flatten(0, -2).numpy(), step.view(-1).numpy(), number.flatten(0, -2).numpy()))
    if bad:
        raise Refused(f"the scales in {bad} of {step.numel()} runs of {wide} columns are no small multiples of one number")
    return Levels(step, number.flatten(-2), wide, narrow)


def stepped_codes(codes: Tensor, book: Tensor, narrow: int, wide: int) -> Levels:
    """``stepped(book[codes])`` of codes uint8 (…, K / narrow) of the numbers ``book`` float64 (256,), with integers int32."""
    loops = find("levels") if codes.device.type == "cpu" else None
    if loops is None:
        return stepped(book[codes.to(torch.int64)], narrow, wide)
    runs = codes.unflatten(-1, (-1, wide // narrow)).contiguous()
    step, number = torch.empty(runs.shape[:-1], dtype=torch.float64), torch.empty(runs.shape, dtype=torch.int32)
    planes = (runs.flatten(0, -2).numpy(), book.numpy(), step.view(-1).numpy(), number.flatten(0, -2).numpy())
    bad = int(loops.stepped_codes(*planes))
    if bad:
        raise Refused(f"the scales in {bad} of {step.numel()} runs of {wide} columns are no small multiples of one number")
    return Levels(step, number.flatten(-2), wide, narrow)


def stepped_definition(runs: Tensor) -> tuple[Tensor, Tensor, int]:
    """Steps, numbers and the count of rows without, of ``runs`` float64 (…, count): what the compiled loop must equal."""
    first = runs[..., 0]
    step = torch.where((runs == first.unsqueeze(-1)).all(-1), first.abs(), common_step(runs))
    step = torch.where(step == 0, 1.0, step)
    step = torch.where((runs <= 0).all(-1) & (runs < 0).any(-1), -step, step)
    number = runs / step.unsqueeze(-1)
    bad = int((~(number.abs() <= 1 << 15)).any(-1).sum())
    zero = (runs == 0).all(-1)
    return torch.where(zero, 0.0, step), torch.where(zero.unsqueeze(-1), 1, number).to(torch.int64), bad


def level_param(step: Tensor, number: Tensor, sub: SubScale, wide: int, shape: tuple[int, ...]) -> Param:
    """``step * number`` as a parameter stored in codes on ``sub``'s grid: ``step`` in its dtype (…, K / wide), numbers int64."""
    lead = tuple(1 for _ in shape[:-1])
    low, high = (int(v) for v in number.aminmax()) if number.numel() else (0, 0)
    if low < sub.lowest or high > sub.highest:
        raise Refused(f"integers {low} … {high} do not fit sub-scales of {sub.lowest} … {sub.highest}")
    counts = tuple(number.shape)
    codes = (number + sub.zero).to(torch.int8 if sub.grid.signed else torch.uint8)
    zero = constant(sub.zero, counts) if sub.zero else None
    inner = QuantizedTensor(counts, codes, sub.grid, (Param(step, Tile((*lead, wide // sub.width))),), zero)
    return Param(inner, Tile((*lead, sub.width)))


def nest_scale(t: QuantizedTensor, super_size: int, sub: SubScale) -> QuantizedTensor:
    """Write the only scale in two levels, ``d * integer`` with a float16 d for each ``super_size`` columns.

    With a sub-offset, integer zero points become ``offset = (-d) * (integer * zero point)``. Refuses scales in a super-block that are
    no small multiples of one float16 number, and integers outside the sub-grid.
    """
    if len(t.scales) != 1 or t.scales[0].inverse or t.group_index is not None or t.signs is not None or t.offset is not None:
        raise Refused("only a single scale plane without act-order, signs or offset can be nested")
    if t.shape[-1] % super_size:
        raise Refused(f"{t.shape[-1]} columns are not whole super-blocks of {super_size}")
    plain(t.scales[0], "scale")
    counts = Tile((*(1 for _ in t.shape[:-1]), sub.width)).counts(t.shape)
    fine = split_param(t.scales[0], sub.width, t.shape)
    levels = stepped(plain(fine, "scale").expand(counts), sub.width, super_size)
    d = _half(levels.step)
    scale = level_param(d, levels.number, sub, super_size, t.shape)
    if not sub.offset:
        return t.replace(scales=(scale,))
    zero = zero_values(t)
    if t.zero_point is not None and zero.numel() > 1:
        zero = plain(split_param(t.zero_point.with_values(zero), sub.width, t.shape), "zero point")
    low = level_param(-d, levels.number * zero.expand(counts), sub, super_size, t.shape)
    return t.replace(scales=(scale,), zero_point=None, offset=low)


def _half(step: Tensor) -> Tensor:
    """Float64 numbers as float16; refuses if one rounds."""
    half, wrong = rounded(Real(step), torch.float16)
    if wrong:
        raise Refused(f"{wrong} of {step.numel()} super-block scales are not float16 numbers")
    return half
