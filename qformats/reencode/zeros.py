"""Float zero points for storages that have them: integers, fractions and offsets as one number of code units a group."""

from __future__ import annotations

import torch
from torch import Tensor

from qformats import rewrite
from qformats.real import Real, round_once
from qformats.real import rounded as rounded_to
from qformats.reencode.affine import bound, one_plane, spread
from qformats.reencode.decision import Fit
from qformats.rewrite import Refused
from qformats.rewrite.forms import bit_view
from qformats.scheme import Integer, Learned, Storage, Tile
from qformats.tensor import Param, QuantizedTensor

__all__ = ["to_float_zero"]


def to_float_zero(t: QuantizedTensor, storage: Storage, rounding: bool) -> Fit:
    """Codes under ``scale * (code - zero)`` with a float zero; an offset is zero = -offset / scale. ``Refused`` if codes do not fit."""
    notes: list[str] = []
    rounded: list[str] = []
    own = isinstance(t.grid, Integer) and t.signs is None
    if not isinstance(t.grid, Learned):  # codes are looked at when they are written
        t = t.replace(codes=torch.zeros((), dtype=t.codes.dtype).expand(t.codes.shape))
    if not own:
        t = rewrite.whole_codes(t)
        notes.append("values to integer codes")
    t = rewrite.to_row_blocks(one_plane(t, storage, notes, rounded, rounding))
    grid, move = storage.integers, 0
    assert isinstance(t.grid, Integer)
    if t.grid.signed != grid.signed:
        move = -t.grid.lowest if t.grid.signed else grid.lowest
    if t.grid.lowest + move < grid.lowest or t.grid.highest + move > storage.top:
        raise Refused(f"{t.grid.bits}-bit codes do not fit {storage.type}")
    width, planes = _planes(t)
    scale, zero = planes[0], _zeros(*planes, move, getattr(torch, storage.zero_dtype or "float32"), rounded, rounding)
    group = min(storage.group or t.shape[-1], t.shape[-1])
    if width > group and width % group:
        raise Refused(f"groups of {width} columns are not a multiple of {group}")
    scale, zero = (_on_groups(plane, width, group, t.shape[-1]) for plane in (scale, zero))
    tile = Tile((*(1 for _ in t.shape[:-1]), group))
    reason = "; ".join(rounded) or "codes, scales and zero points are kept"
    shift = torch.full((1,), move, dtype=torch.int16) if move else None
    return Fit("codes-exact" if rounded else "exact", reason, tuple(notes), t.shape[-1], shift, None, grid, Param(scale, tile),
               Param(zero, tile), None, own_codes=own)  # fmt: skip


def _planes(t: QuantizedTensor) -> tuple[int, tuple[Tensor, Tensor | None, Tensor | None]]:
    """Scale, zero point and offset on the finest of their groups, and its width."""
    params, k = [t.scales[0], t.zero_point, t.offset], t.shape[-1]
    widths = [min(p.block.sizes[-1], k) for p in params if p is not None and isinstance(p.block, Tile)]
    width = min(widths)
    if any(w % width and w < k for w in widths):
        raise Refused("scale and zero point are on groups that do not nest")
    counts = Tile((*(1 for _ in t.shape[:-1]), width)).counts(t.shape)

    def plane(param: Param | None) -> Tensor | None:
        if param is None:
            return None
        if isinstance(param.values, QuantizedTensor) or not isinstance(param.block, Tile):
            raise Refused("a parameter is itself stored as codes")
        return spread(param.values, min(param.block.sizes[-1], k), width, k).expand(counts)

    scale = plane(params[0])
    assert scale is not None
    return width, (scale, plane(params[1]), plane(params[2]))


def _zeros(
    scale: Tensor, zero: Tensor | None, offset: Tensor | None, move: int, dtype: torch.dtype, rounded: list[str], rounding: bool
) -> Tensor:
    """zero - offset / scale + ``move`` in ``dtype``; rounded once where allowed."""
    exact = Real.of(torch.full((1,) * scale.ndim, float(move), dtype=torch.float64))
    if zero is not None:
        exact = exact + Real.of(zero)
    if offset is None:
        stored, wrong = rounded_to(exact, dtype)
        if not wrong and bool(torch.isfinite(stored).all()) and bool(torch.isfinite(scale).all()):
            return stored.expand(scale.shape)
    s = scale.to(torch.float64)
    wanted = round_once(exact, torch.float64).expand(scale.shape)
    if offset is not None:
        if bool(((s == 0) & (offset != 0)).any()):
            raise Refused("an offset under a scale of zero is no zero point")
        wanted = wanted - torch.where(s == 0, 0, offset.to(torch.float64) / torch.where(s == 0, 1, s))
    stored, _ = rounded_to(Real(wanted), dtype)
    held = Real.of(stored)
    means = (held + -exact) * Real.of(scale)  # what the stored zero point takes away beyond the old one: must be -offset
    goal = torch.zeros_like(s) if offset is None else -offset.to(torch.float64)
    different = (means.high != goal) if means.low is None else (means.high != goal) | (means.low != 0)
    wrong, name = int(different.sum()), str(dtype).removeprefix("torch.")
    if not bool(torch.isfinite(stored).all()):
        raise Refused(f"a zero point overflows {name}")
    if wrong and not rounding:
        raise Refused(f"{wrong} of {stored.numel()} zero points are not {name} numbers")
    if wrong:
        rounded.append(f"{wrong} of {stored.numel()} zero points round to {name} ({bound(name)} of the zero point)")
    return stored


def _on_groups(values: Tensor, width: int, group: int, k: int) -> Tensor:
    """A plane on runs of ``width`` split into, or merged to, groups of ``group``."""
    if width >= group:
        return spread(values, width, group, k).contiguous()
    if group % width:
        raise Refused(f"groups of {width} do not fill groups of {group}")
    first = values[..., :: group // width]
    again = first.repeat_interleave(group // width, -1)[..., : values.shape[-1]]
    if not torch.equal(bit_view(again.contiguous()), bit_view(values.contiguous())):
        raise Refused(f"neighbouring groups of {width} differ, so groups of {group} cannot hold them")
    return first.contiguous()
