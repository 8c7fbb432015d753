"""Scales of two levels in a re-encoding: written into super-blocks, kept from one type to another, or folded into the codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qformats import rewrite
from qformats.loops import find
from qformats.real import Real, rounded
from qformats.reencode.affine import F16_BOUND, Affine
from qformats.rewrite import Levels, Refused
from qformats.scheme import Float, Integer, Storage, SubScale, Tile
from qformats.tensor import Param, QuantizedTensor

__all__ = [
    "choose_sub_zero", "folded_form", "folded_range_definition", "keep_levels", "may_fold", "must_fold", "sub_levels", "super_scale",
    "underflows",
]  # fmt: skip

_LARGEST = 127  # factor of a code: their products and those with zero points stay in int16


def sub_levels(a: Affine, storage: Storage) -> Levels:
    """The source's scale as integers on the storage's sub-blocks times a number for each super-block; refuses other scales."""
    sub, group = storage.sub_scale, storage.group
    assert sub is not None and group is not None
    if a.levels is not None and a.levels.wide % group == 0:
        return _in_range(a.levels.on(group, sub.width, a.k), sub)
    if a.width < sub.width:
        scale = rewrite.merge_groups(a.plain(), sub.width).scales[0].values
        assert isinstance(scale, Tensor)
    elif a.width % sub.width and a.width < a.k:
        raise Refused(f"groups of {a.width} columns are not a multiple of {sub.width}")
    else:
        scale = a.plane(a.scale, sub.width)
    return _in_range(rewrite.stepped(scale, sub.width, group), sub)


def _in_range(levels: Levels, sub: SubScale) -> Levels:
    """The same with the sign of a super-block moved to its step where the integers have none; refuses integers off the grid."""
    number, step, count = levels.number, levels.step, levels.wide // levels.narrow
    runs = number.unflatten(-1, (-1, count))
    if sub.lowest == 0:
        turn = (runs <= 0).all(-1) & (runs < 0).any(-1)
        step, runs = torch.where(turn, -step, step), torch.where(turn.unsqueeze(-1), -runs, runs)
    bad = int(((runs < sub.lowest) | (runs > sub.highest)).any(-1).sum())
    if bad:
        raise Refused(f"the scales in {bad} of {step.numel()} super-blocks are no multiples {sub.lowest} … {sub.highest} of one number")
    return Levels(step, runs.flatten(-2), levels.wide, levels.narrow)


def super_scale(step: Tensor, storage: Storage, rounding: bool, notes: list[str], what: str = "super-block scales") -> Tensor:
    """Float64 ``step`` in the storage's scale dtype; rounded once and said so with ``rounding``, else refused if it must be."""
    dtype = storage.scale_dtypes[0]
    stored, wrong = rounded(Real(step), getattr(torch, dtype))
    if not bool(torch.isfinite(stored).all()):
        raise Refused(f"{what} overflow {dtype}")
    if wrong and not rounding:
        raise Refused(f"{wrong} of {step.numel()} {what} are not {dtype} numbers")
    if wrong:
        notes.append(f"{wrong} of {step.numel()} {what} round to {dtype} ({F16_BOUND})")
    return stored


def choose_sub_zero(a: Affine, storage: Storage, number: Tensor) -> Tensor:
    """An integer zero point for each sub-block that the sub-offset can hold, int16: the source's, the middle, or the smallest."""
    sub = storage.sub_scale
    assert sub is not None
    width, source = min(sub.width, a.width), a.plane(a.zero, min(sub.width, a.width))
    many = 0 if number.numel() == 0 else sub.highest
    cap = torch.where(number == 0, many, many // number.clamp(min=1)).to(torch.int16)
    if a.width >= sub.width:
        kept = source.expand(cap.shape)
        grids = a.grid.lowest >= storage.integers.lowest and a.grid.highest <= storage.top
        if grids and bool(((kept >= 0) & (kept <= cap)).all()):
            return kept
    low, high = a.ranges(sub.width) if a.width >= sub.width else a.ranges(width)
    zero = source
    smallest, largest = low - zero, high - zero
    if a.width < sub.width:
        smallest, largest = (p.unflatten(-1, (-1, sub.width // width)) for p in (smallest, largest))
        smallest, largest = smallest.amin(-1), largest.amax(-1)
    floor, ceiling = torch.clamp(-smallest, min=0), torch.minimum(storage.top - largest, cap)
    bad = int((floor > ceiling).sum())
    if bad:
        raise Refused(f"{bad} of {floor.numel()} sub-blocks have no zero point that {storage.type} holds")
    half = 1 << (storage.integers.bits - 1)
    middle = (floor <= half) & (half <= ceiling)
    if a.width >= sub.width:
        kept = zero.expand(floor.shape)
        if bool(((kept >= floor) & (kept <= ceiling)).all()):
            return kept
    return torch.full_like(floor, half) if bool(middle.all()) else floor


def keep_levels(t: QuantizedTensor, storage: Storage, rounding: bool) -> tuple[Param, Param, list[str]]:
    """Scale and offset of a two-level source as they are, for a two-level storage of as many code bits; refuses others."""
    sub, group = storage.sub_scale, storage.group
    assert sub is not None and group is not None
    if not sub.offset or t.offset is None or t.zero_point is not None:
        raise Refused("it has no sub-offsets")
    if not isinstance(t.grid, Integer) or t.grid.lowest < storage.integers.lowest or t.grid.highest > storage.top:
        raise Refused(f"its codes do not fit {storage.integers.bits} bits")
    planes: list[Param] = []
    rounded: list[str] = []
    for params, what in ((t.scales, "super-block scales"), ((t.offset,), "super-block offsets")):
        levels = rewrite.levels_of(params, t.shape)
        if levels is None:
            raise Refused("its scale or offset is not in two levels")
        levels = _in_range(levels.on(group, sub.width, t.shape[-1]), sub)
        step = super_scale(levels.step, storage, rounding, rounded, what)
        planes.append(rewrite.level_param(step, levels.number, sub, group, t.shape))
    return planes[0], planes[1], rounded


def may_fold(t: QuantizedTensor, storage: Storage) -> bool:
    """Whether there can be integer sub-scales to multiply into codes: a nested scale, or groups finer than the storage's."""
    if storage.sub_scale is not None or storage.offset is not None or t.offset is not None or t.group_index is not None:
        return False
    nested = any(isinstance(p.values, QuantizedTensor) for p in t.scales)
    finer = t.scheme.group_size
    return nested or (finer is not None and finer < min(storage.group or t.shape[-1], t.shape[-1]))


def folded_form(a: Affine, storage: Storage, rounding: bool) -> Affine:
    """The source with its sub-scales multiplied into the codes: one scale for each group, codes, zeros and ranges times an integer."""
    group = min(storage.group or a.k, a.k)
    if a.k % group or max(group, a.width) % min(group, a.width):
        raise Refused(f"groups of {a.width} do not fill groups of {group}")
    wide = max(group, a.width)
    if a.levels is not None and a.levels.wide % wide == 0:
        step, number = _largest_step(a.levels.on(wide, a.width, a.k))
    else:
        levels = rewrite.stepped(a.scale, a.width, wide) if a.coded is None else rewrite.stepped_codes(*a.coded, a.width, wide)
        step, number = levels.step * a.unit, levels.number  # of no common divisor
    low, high = (int(end) for end in number.aminmax())
    bad = int((number.abs() > _LARGEST).sum()) if max(-low, high) > _LARGEST else 0
    if bad:
        raise Refused(f"the scales of {bad} runs of {a.width} columns are no small multiples of their group's")
    scale = super_scale(step, storage, rounding, a.rounded, "scales")
    factor = number.to(torch.int16)
    inner, width = a.ranges, a.width

    def ranges(w: int) -> tuple[Tensor, Tensor]:
        low, high = inner(min(w, width))
        f = rewrite.spread_runs(factor, width, min(w, width), a.k)
        return _folded_range(low, high, f.expand(low.shape), max(1, w // width))

    times = max(1, -low, high)
    most = times * max(abs(a.grid.lowest), a.grid.highest)
    single = a.zero.numel() == 1 and not int(a.zero)
    reach = times * max(abs(end) for end in a.ends) if single and a.ends is not None else None
    merged = scale if wide == group else None
    note = "multiply sub-scales into codes"
    zero = a.zero if single else a.zero.expand(factor.shape) * factor
    return replace(a, scale=rewrite.spread_runs(scale, wide, width, a.k), zero=zero, ranges=ranges, merged=merged, reach=reach,
                   grid=Integer(most.bit_length() + 1, True), notes=[*a.notes, note], factor=factor, levels=None)  # fmt: skip


def _folded_range(low: Tensor, high: Tensor, factor: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The range of codes times ``factor`` over runs of ``count``, int16."""
    loops = find("levels") if low.device.type == "cpu" and low.shape[-1] % count == 0 else None
    planes = [plane.unflatten(-1, (-1, count)) if loops is not None else plane for plane in (low, high, factor)]
    if loops is None:
        return folded_range_definition(low, high, factor, count)
    out = [torch.empty(planes[0].shape[:-1], dtype=torch.int16) for _ in range(2)]
    loops.folded_range(*(p.reshape(-1, count).contiguous().numpy() for p in planes), *(p.view(-1).numpy() for p in out))
    return out[0], out[1]


def folded_range_definition(low: Tensor, high: Tensor, factor: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``_folded_range`` in torch: what the compiled loop must equal."""
    low, high = low * factor, high * factor
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    return low.unflatten(-1, (-1, count)).amin(-1), high.unflatten(-1, (-1, count)).amax(-1)


def must_fold(t: QuantizedTensor, storage: Storage) -> bool:
    """Whether its sub-scales, codes of a small float under constants, differ within a group of the storage: no one scale is exact.

    Folding is tried first then: it alone can be. Where it rounds and ``underflows``, one scale for the group goes before it.
    """
    k, nested = t.shape[-1], [p for p in t.scales if isinstance(p.values, QuantizedTensor)]
    if not may_fold(t, storage) or len(nested) != 1:
        return False
    inner, block, group = nested[0].values, nested[0].block, min(storage.group or k, k)
    plain = isinstance(inner, QuantizedTensor) and isinstance(inner.grid, Float) and not inner.params() and isinstance(block, Tile)
    if not plain or block.sizes[-1] >= group or group % block.sizes[-1] or k % group:  # type: ignore[union-attr]
        return False
    if any(isinstance(p.values, Tensor) and (p.values.shape[-1] != 1 or not bool((p.values != 0).all())) for p in t.scales):
        return False
    runs = inner.codes.unflatten(-1, (-1, group // block.sizes[-1])).flatten(0, -2)  # type: ignore[union-attr]
    parts = runs.split(max(1, len(runs) // 16))  # most weights say it in the first
    return any(bool((part != part[:, :1]).any()) for part in parts)


def underflows(scale: Param) -> bool:
    """Whether a scale lies below its dtype's normal numbers.

    Only there can sub-scales that differ become one number, since they are a fifteenth apart or more and every dtype has eight digits or
    more; and there that number is nearer: what the step of folded sub-scales is rounded by counts as often as a sub-scale has it.
    """
    values = scale.values
    assert isinstance(values, Tensor)
    return bool((values.abs() < torch.finfo(values.dtype).tiny).any())


def _largest_step(levels: Levels) -> tuple[Tensor, Tensor]:
    """Step times the integers' common divisor where that is a float16 number, else the step itself; and the integers left."""
    count = levels.wide // levels.narrow
    runs = levels.number.unflatten(-1, (-1, count))
    common = rewrite.common_divisor(runs).clamp(min=1)
    larger = levels.step * common
    fine = larger.to(torch.float32).to(torch.float16).to(torch.float64) == larger
    common = torch.where(fine, common, 1)
    return levels.step * common, (runs // common.unsqueeze(-1)).flatten(-2)
