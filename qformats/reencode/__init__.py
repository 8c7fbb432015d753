"""Can these codes be kept? The search for the rewrites that bring a tensor into a target type's form, and the kind of the result.

``fit`` decides from the parameters (and from the range of the codes in a block only where a rule asks for it) how every block is
relabelled; ``finish`` applies the decision to the codes. Both see any row range of a tensor and decide block by block, so a plan
made on row ranges holds for the whole. Names no format: targets are ``Storage`` values.

The relabellings are invertible: shift (q + n), flip (n − q, with the scale's sign changed), a choice of zero point, and the
split or merge of groups. What rounds is only ever a scale or an offset, and then the kind is ``codes-exact``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qformats import rewrite
from qformats.reencode.affine import F16_BOUND, Affine, Folded, Ranges, affine_form, merge_range, spread, straighten
from qformats.reencode.decision import KINDS, Fit, Hint
from qformats.reencode.floats import spelled
from qformats.reencode.levels import choose_sub_zero, folded_form, keep_levels, may_fold, must_fold, sub_levels, super_scale, underflows
from qformats.reencode.offsets import narrow_offset, offset_blocks
from qformats.reencode.shaped import is_shaped, row_storage, shaped_scale
from qformats.reencode.values import same_codes
from qformats.reencode.zeros import to_float_zero
from qformats.rewrite import Refused
from qformats.scheme import Integer, Scheme, Storage, Tile
from qformats.tensor import Param, QuantizedTensor, constant

__all__ = ["KINDS", "Fit", "Hint", "finish", "fit"]

def fit(
    t: QuantizedTensor,
    storage: Storage,
    ranges: Ranges | None = None,
    hint: Hint | None = None,
    *,
    rounding: bool = False,
    own: Callable[[Scheme], object] | None = None,
    codes: Callable[[], Tensor] | None = None,
) -> Fit:
    """Decide how ``t`` is written as ``storage``; ``Refused`` with the reason if it cannot be (exactly, unless ``rounding``).

    ``ranges(width)`` gives the smallest and largest of the ``rewrite.whole_codes`` of each run of ``width`` columns; by default they
    are computed from ``t``, which may be a range of rows: ``n_multiple`` is for the caller to check. With ``rounding`` a scale or an
    offset may be rounded once to the storage's dtype. ``own(scheme)``: whether the storage's writer takes such a tensor as it stands.
    ``codes()``: the codes where ``t`` has none, for the rules that look at single ones.
    """
    _check_shape(t.shape, storage)
    _check_index(t, storage)
    if own is not None and not _plain(storage) and own(t.scheme):
        return _as_it_stands(t, storage)
    if storage.cyclic:
        raise Refused(f"the groups of {storage.type} are strided over the weight, those of the source are not")
    if not isinstance(storage.grid, Integer):
        return same_codes(t, storage, rounding, codes)
    if ranges is None:
        ranges = _lazy_ranges(t)
    if is_shaped(storage):
        return _shaped(t, storage, fit(t, row_storage(storage, t.shape[-1]), ranges, hint, rounding=rounding), rounding)
    if storage.zero_dtype is not None:
        return to_float_zero(t, storage, rounding)
    if storage.sub_scale is not None and t.offset is not None and isinstance(t.offset.values, QuantizedTensor):
        kept = _keep_levels(t, storage, rounding)
        if kept is not None:
            return kept
    known: Folded = []
    folded = _folded_first(t, storage, ranges, hint, rounding, known)
    if folded is not None and (folded.kind == "exact" or not underflows(folded.scale)):
        return folded
    try:
        return _into(*affine_form(t, storage, ranges, rounding, known=known), storage, hint, rounding)
    except Refused as refusal:
        if folded is not None:
            return folded
        if not may_fold(t, storage):
            raise
        try:
            return _fold(t, storage, ranges, hint, rounding, known)
        except Refused as second:
            raise Refused(f"{refusal}; sub-scales in codes: {second}") from None


def _folded_first(
    t: QuantizedTensor, storage: Storage, ranges: Ranges, hint: Hint | None, rounding: bool, known: Folded
) -> Fit | None:
    """``_fold`` where sub-scales differ so that no one scale is exact; None for other tensors and where it is refused."""
    try:
        return _fold(t, storage, ranges, hint, rounding, known) if must_fold(t, storage) else None
    except Refused:
        return None  # the reason will be that of both ways


def _fold(t: QuantizedTensor, storage: Storage, ranges: Ranges, hint: Hint | None, rounding: bool, known: Folded) -> Fit:
    """The decision with sub-scales multiplied into the codes."""
    form, _ = affine_form(t, storage, ranges, rounding, True, known)
    return _into(folded_form(form, storage, rounding), None, storage, hint, rounding)


def _into(affine: Affine, offset: Tensor | None, storage: Storage, hint: Hint | None, rounding: bool) -> Fit:
    """The decision for a source in affine form."""
    if offset is not None:
        return _keep_offset(affine, offset, storage, rounding)
    group = storage.group or affine.k
    if storage.group_index and affine.indexed and affine.width != min(group, affine.k) and affine.scale.shape[-1] > 1:
        raise Refused(f"act-order groups of {affine.width} cannot become groups of {group}")
    if hint is not None and hint.positive:
        straighten(affine)
    if storage.sub_scale is not None:
        return _two_level(affine, storage, rounding)
    if storage.offset is not None:
        return _to_offset(affine, storage, rounding)
    if storage.doubled:
        return _to_doubled(affine, storage)
    if isinstance(storage.zero_point, tuple):
        return _to_zero_range(affine, storage, hint)
    return _to_constant(affine, storage)


def finish(t: QuantizedTensor, decision: Fit, *, reuse: bool = False) -> QuantizedTensor:
    """Apply ``decision`` to the codes of ``t`` (the tensor it was made for), in their own memory if ``reuse`` gives ``t`` up."""
    if decision.as_it_stands:
        return t
    if not isinstance(decision.grid, Integer):
        codes = t.codes if decision.spelling is None else spelled(t.codes, decision.spelling)
        return t.replace(codes=codes, grid=decision.grid, scales=(decision.scale, *decision.extra))
    recoded = _recoded(t, decision, reuse)
    if recoded is not None:
        return QuantizedTensor(t.shape, recoded, decision.grid, (decision.scale, *decision.extra), decision.zero_point, decision.offset,
                               None, t.group_index)  # fmt: skip
    codes = t.codes if decision.own_codes else rewrite.whole_codes(t).codes
    if decision.factor is not None:
        codes = _multiplied(codes, decision.factor_width, decision.factor)
    if decision.shift is not None or decision.grid.signed != (codes.dtype == torch.int8):
        shift = torch.zeros(1, dtype=torch.int16) if decision.shift is None else decision.shift
        codes = rewrite.flip_and_shift(codes, decision.width, shift, decision.flip, decision.grid.signed, reuse=reuse)
    if decision.half is not None:
        codes = (codes != 0).view(torch.uint8)  # 0 or twice the number
    scales = (decision.scale, *decision.extra, *((constant(2, t.shape),) if decision.half is not None else ()))
    return QuantizedTensor(t.shape, codes, decision.grid, scales, decision.zero_point, decision.offset, None, t.group_index)


def _recoded(t: QuantizedTensor, decision: Fit, reuse: bool) -> Tensor | None:
    """The codes of ``finish`` out of bytes of a table in one pass; None where a loop does not serve them."""
    k, wide = t.codes.shape[-1], decision.width
    width = min(k if decision.factor is None else decision.factor_width, k if decision.shift is None else wide)
    nested = not (k % width or wide % width or (decision.factor is not None and decision.factor_width % width))
    table = rewrite.code_table(t) if nested and not decision.own_codes and decision.half is None else None
    if table is None:
        return None
    counts = (*t.codes.shape[:-1], k // width)

    def spread(plane: Tensor, coarse: int) -> Tensor:
        return (rewrite.spread_runs(plane, coarse, width, k) if plane.shape[-1] > 1 else plane).expand(counts)

    add = torch.zeros(1, dtype=torch.int16) if decision.shift is None else decision.shift
    factor = None if decision.factor is None else spread(decision.factor, decision.factor_width)
    planes = [add.to(torch.int16) if add.numel() == 1 else spread(add.to(torch.int16), wide)]
    if decision.flip is not None:
        one = torch.ones((), dtype=torch.int16) if factor is None else factor
        factor = torch.where(spread(decision.flip, wide), -one, one)
    planes.append(torch.empty(0, dtype=torch.int16) if factor is None else factor)
    plus, times = ((plane & 0xFF).to(torch.uint8).contiguous().view(-1).numpy() for plane in planes)
    codes = t.codes.contiguous().view(torch.uint8)
    out = codes if reuse or codes.data_ptr() != t.codes.data_ptr() else torch.empty_like(codes)
    rewrite.block_loops().recode(codes.view(-1).numpy(), table.view(torch.uint8).numpy(), times, plus, width, out.view(-1).numpy())
    return out.view(torch.int8 if decision.grid.signed else torch.uint8)  # type: ignore[union-attr]


def _multiplied(codes: Tensor, width: int, factor: Tensor) -> Tensor:
    """Codes times ``factor`` on runs of ``width`` columns, modulo 256: what is added after brings them into 8 bits."""
    loops, small = rewrite.block_loops(), (factor.to(torch.int32) & 0xFF).to(torch.uint8)
    held = codes.contiguous().view(torch.uint8)
    if loops is None or codes.device.type != "cpu":
        made: Tensor = (held.unflatten(-1, (-1, width)) * small.unsqueeze(-1)).flatten(-2)
        return made
    own = held.clone() if held.data_ptr() == codes.data_ptr() else held
    loops.multiply(own.view(-1, width).numpy(), small.contiguous().view(-1).numpy())
    return own


def _plain(storage: Storage) -> bool:
    """Whether its form is integers under one plain scale a group: ``fit`` then decides in full, zero points and signs too."""
    own = storage.sub_scale is None and storage.zero_dtype is None and not is_shaped(storage) and not storage.whole
    return isinstance(storage.grid, Integer) and own


def _as_it_stands(t: QuantizedTensor, storage: Storage) -> Fit:
    reason = "codes and parameters are kept as they are"
    return Fit("exact", reason, (), t.shape[-1], None, None, storage.grid, t.scales[0], t.zero_point, t.offset, None, 1, None,
               t.scales[1:], True)  # fmt: skip


def _shaped(t: QuantizedTensor, storage: Storage, found: Fit, rounding: bool) -> Fit:
    """A decision for groups of rows with its exact scale in the storage's own form."""
    scale, extra, rounded = shaped_scale(t, found.scale, storage, rounding)
    kind = "codes-exact" if rounded or found.kind == "codes-exact" else "exact"
    return replace(found, kind=kind, reason="; ".join([*rounded, found.reason]) if rounded else found.reason, scale=scale, extra=extra)


def _check_shape(shape: tuple[int, ...], storage: Storage) -> None:
    if shape[-1] % storage.k_multiple:
        raise Refused(f"{shape[-1]} columns are not a multiple of {storage.k_multiple}")


def _check_index(t: QuantizedTensor, storage: Storage) -> None:
    if t.group_index is not None and not storage.group_index:
        raise Refused("act-order: the columns of a group are not consecutive")
    if t.group_index is not None and storage.full_groups:
        group, counts = storage.group or t.shape[-1], torch.bincount(t.group_index.reshape(-1).to(torch.int64))
        if bool((counts != group).any()):
            raise Refused(f"act-order: a group has {int(counts.min())} … {int(counts.max())} columns, {storage.type} has {group} in each")


def _lazy_ranges(t: QuantizedTensor) -> Ranges:
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def ranges(width: int) -> tuple[Tensor, Tensor]:
        if width not in known:
            known[width] = rewrite.whole_range(t, width)
        return known[width]

    return ranges


# ---------------------------------------------------------------- the target's forms


def _param(values: Tensor, shape: tuple[int, ...], width: int) -> Param:
    return Param(values.contiguous(), Tile((*(1 for _ in shape[:-1]), width)))


def _done(
    a: Affine, storage: Storage, width: int, shift: Tensor, flip: Tensor | None, scale: Tensor, reason: str, **params: object
) -> Fit:
    group = min(storage.group or a.k, a.k)
    if scale.shape[-1] == -(-a.k // width) and width > group:
        scale = spread(scale, width, group, a.k)
    if width > group:
        a.notes.append(f"split groups of {width} into {group}")
    zero, offset = params.get("zero_point"), params.get("offset")
    if a.flipped is not None:
        flip, shift = _compose_flip(a, width, shift, flip)
    if a.moved:
        shift = shift + a.moved if flip is None else torch.where(flip, shift - a.moved, shift + a.moved)
    trivial = flip is None and bool((shift == 0).all())
    if a.rounded:
        reason = "; ".join((*a.rounded, reason)) if reason else "; ".join(a.rounded)
    return Fit(
        "codes-exact" if a.rounded else "exact",
        reason,
        tuple(a.notes),
        min(width, a.k),
        None if trivial else shift,
        flip,
        storage.grid,
        _param(scale, a.shape, group),
        zero if isinstance(zero, Param) else None,
        offset if isinstance(offset, Param) else None,
        a.factor,
        a.width,
        own_codes=a.moved is not None,
    )


def _compose_flip(a: Affine, width: int, shift: Tensor, flip: Tensor | None) -> tuple[Tensor, Tensor]:
    """The relabelling of flipped codes as one of the stored codes: n ± (c − q) is a flip or a plain shift again."""
    assert a.flipped is not None
    turned, around = a.plane(a.flipped, width), a.grid.lowest + a.grid.highest
    again = torch.zeros_like(turned) if flip is None else flip
    moved = torch.where(again, shift - around, shift + around)
    return torch.where(turned, ~again, again), torch.where(turned, moved, shift.expand(turned.shape))


def _merged_scale(a: Affine, scale: Tensor, group: int) -> Tensor:
    """One scale for each ``group`` columns out of finer runs that must be equal bit for bit."""
    if group <= a.width or scale.shape[-1] == 1:
        return scale
    if group % a.width and group < a.k:
        raise Refused(f"groups of {a.width} do not fill groups of {group}")
    merged = a.merged if scale is a.scale else None
    if merged is None:
        made = rewrite.merge_groups(replace(a, scale=scale).plain(), group).scales[0].values
        assert isinstance(made, Tensor)
        merged = made
    a.notes.append(f"merge groups of {a.width} into {group}")
    return merged


def _working_width(a: Affine, group: int) -> int:
    """Runs on which a block decision is made: the target's group, or the source's run where that is finer."""
    if a.width > group and (a.width % group and a.width < a.k):
        raise Refused(f"groups of {a.width} columns are not a multiple of {group}")
    return min(group, a.width)


def _to_constant(a: Affine, storage: Storage) -> Fit:
    """Codes around one constant zero point (Q4_0, Q5_0, Q8_0, symmetric integers): shift, flip single blocks if they must be."""
    centre = storage.zero_point if isinstance(storage.zero_point, int) else 0
    group = min(storage.group or a.k, a.k)
    lo, hi = storage.integers.lowest - centre, storage.top - centre
    params = {"zero_point": constant(centre, a.shape) if centre else None}
    if not storage.negative_scale:
        straighten(a)
    width = _working_width(a, group)
    if a.grid.lowest - int(a.zero.max()) >= lo and a.grid.highest - int(a.zero.min()) <= hi:
        scale = _merged_scale(a, a.scale, group)
        shift = centre - a.zero
        if a.zero.numel() > 1 or int(shift.reshape(-1)[0]):
            a.notes.append(f"recentre to zero point {centre}")
        reason = f"every code minus its zero point fits {storage.type}"
        return _done(a, storage, a.width, shift, None, scale, reason, **params)
    scale, per = a.plane(a.scale, width), max(1, group // width)
    if per > 1:
        scale = _merged_scale(a, scale, group)
    if a.reach is not None and a.flipped is None and lo <= -a.reach and a.reach <= hi:
        a.notes.append(f"recentre to zero point {centre}")
        return _done(a, storage, width, centre - a.zero, None, scale, f"every block fits {storage.type}", **params)
    low, high = a.ranges(width)
    zero = a.plane(a.zero, width)
    smallest, largest = merge_range((low - zero, high - zero), per)
    direct = (smallest >= lo) & (largest <= hi)
    shift, flip = (centre - zero).expand(low.shape), None
    if not bool(direct.all()):
        flipped = ~direct & (-largest >= lo) & (-smallest <= hi)
        bad = int((~direct & ~flipped).sum())
        if bad or not storage.negative_scale:
            bad = bad or int(flipped.sum())
            raise Refused(f"{bad} of {direct.numel()} blocks have code minus zero point outside {lo} … {hi}")
        flip = flipped if per == 1 else flipped.repeat_interleave(per, -1)[..., : low.shape[-1]]
        shift = torch.where(flip, centre + zero, centre - zero)
        scale = torch.where(flipped, -scale, scale)
        a.notes.append(f"flip {int(flipped.sum())} blocks")
    a.notes.append(f"recentre to zero point {centre}")
    return _done(a, storage, width, shift, flip, scale, f"every block fits {storage.type}", **params)


def _to_offset(a: Affine, storage: Storage, rounding: bool) -> Fit:
    """Codes with a float offset a block (Q4_1, Q5_1): offset = scale x integer must be representable; else flip or shift the block."""
    group = min(storage.group or a.k, a.k)
    dtype = getattr(torch, storage.offset or "float16")
    top = storage.top
    width = _working_width(a, group)
    if group > width:
        raise Refused(f"groups of {width} are finer than the target's {group}")
    unsigned, low = _unsigned(a)
    fits = unsigned.grid.highest <= top
    scale, offset, shift, flip, (left, wrong, moved, flipped) = offset_blocks(unsigned, width, top, dtype)
    if low:
        shift = torch.where(flip, shift + low, shift - low)
    if left and (not rounding or not fits):
        raise Refused(f"scale x zero point is not {storage.offset} in {left} of {flip.numel()} blocks, in any flip or shift")
    if wrong:
        raise Refused(f"scale x zero point overflows {storage.offset}")
    if left:
        a.rounded.append(f"the offset of {left} of {flip.numel()} blocks rounds to {storage.offset} ({F16_BOUND})")
    a.notes.append(f"zero point to offset, {moved} blocks flipped or shifted" if moved else "zero point to offset")
    reason = "" if left else "scale x zero point is representable in every block"
    return _done(a, storage, width, shift, flip if flipped else None, scale, reason, offset=_param(offset, a.shape, group))


def _unsigned(a: Affine) -> tuple[Affine, int]:
    """The same on the unsigned grid, and the lowest of the codes it had, which is to be subtracted from them."""
    low, ranges = a.grid.lowest, a.ranges
    if not low:
        return a, 0

    def moved(width: int) -> tuple[Tensor, Tensor]:
        least, most = ranges(width)
        return least.to(torch.int16) - low, most.to(torch.int16) - low

    return replace(a, grid=Integer(a.grid.bits), zero=a.zero.to(torch.int16) - low, ranges=moved), low


def _to_zero_range(a: Affine, storage: Storage, hint: Hint | None) -> Fit:
    """Integer zero points a group (GPTQ, AWQ): keep them, take the record's, or choose ones that bring all codes into the grid."""
    assert isinstance(storage.zero_point, tuple)
    zlo, zhi = storage.zero_point
    group = min(storage.group or a.k, a.k)
    if not storage.negative_scale:
        straighten(a)
    width = _working_width(a, group)
    wanted = None if hint is None else hint.zero_point
    grid = storage.integers
    move = grid.lowest - a.grid.lowest  # 2^(b-1) from signed to unsigned codes, else 0
    zero = a.zero.to(torch.int32) + move
    in_range = zlo <= int(zero.min()) and int(zero.max()) <= zhi and a.grid.highest + move <= grid.highest
    zero = zero.to(torch.int16) if in_range else a.zero
    if wanted is None and group <= a.width and in_range:
        reason = "codes, scales and zero points are kept"
        return _done(a, storage, a.width, torch.full_like(zero, move), None, a.scale, reason, zero_point=_zero_param(zero, a, group))
    scale = _merged_scale(a, a.plane(a.scale, width), group)
    low, high = a.ranges(width)
    source_zero = a.plane(a.zero, width)
    smallest, largest = merge_range((low - source_zero, high - source_zero), max(1, -(-min(group, a.k) // width)))
    floor = torch.clamp(grid.lowest - smallest, min=zlo)
    ceiling = torch.clamp(grid.highest - largest, max=zhi)
    chosen = _choose_zero(floor, ceiling, source_zero, wanted, 1 << (grid.bits - 1), group <= width)
    bad = int(((chosen < floor) | (chosen > ceiling)).sum())
    if bad:
        raise Refused(f"{bad} of {chosen.numel()} groups span more codes than {grid.bits} bits with zero points {zlo} … {zhi}")
    spread = chosen if group <= width else chosen.index_select(-1, torch.arange(low.shape[-1]) * width // group)
    a.notes.append("choose zero points")
    shift = (spread - source_zero).expand(low.shape)
    reason = "every group fits with an integer zero point"
    return _done(a, storage, width, shift, None, scale, reason, zero_point=_zero_param(chosen, a, group))


def _choose_zero(floor: Tensor, ceiling: Tensor, source: Tensor, wanted: Tensor | None, half: int, same: bool) -> Tensor:
    if wanted is not None:
        wanted = wanted.to(torch.int16)
        if wanted.shape == floor.shape:
            return torch.where((wanted >= floor) & (wanted <= ceiling), wanted, floor)
    if same:
        kept = source.expand(floor.shape)
        if bool(((kept >= floor) & (kept <= ceiling)).all()):
            return kept
    if bool(((half >= floor) & (half <= ceiling)).all()):
        return torch.full_like(floor, half)
    return floor


def _zero_param(zero: Tensor, a: Affine, group: int) -> Param:
    if zero.numel() == 1 or bool((zero == zero.reshape(-1)[0]).all()):
        return constant(int(zero.reshape(-1)[0]), a.shape)
    counts = (*a.shape[:-1], -(-a.k // group))
    if tuple(zero.shape) != counts and a.width > group:
        zero = a.plane(zero, group)
    return _param(zero.expand(counts), a.shape, group)


def _two_level(a: Affine, storage: Storage, rounding: bool) -> Fit:
    """Super-blocks: the scale as small integers times one number, the zero point constant or as integer sub-offset."""
    sub, group = storage.sub_scale, storage.group
    assert sub is not None and group is not None
    levels = sub_levels(a, storage)
    d = super_scale(levels.step, storage, rounding, a.rounded)
    if not sub.offset:
        return _two_level_centred(a, storage, levels.number, d)
    zero = choose_sub_zero(a, storage, levels.number)
    scale = rewrite.level_param(d, levels.number, sub, group, a.shape)
    low = rewrite.level_param(-d, levels.number * zero, sub, group, a.shape)
    width = min(sub.width, a.width)
    shift = (zero if width == sub.width else zero.repeat_interleave(sub.width // width, -1)) - a.plane(a.zero, width)
    unit = bool((levels.number == 1).all())
    a.notes.append("unit sub-scales, zero point as sub-offset" if unit else "integer sub-scales, zero point as sub-offset")
    reason = "one scale spans every super-block" if unit else "the scales of every super-block are small multiples of one number"
    made = _done(a, storage, width, shift, None, a.plane(a.scale, width), reason)
    return replace(made, scale=scale, offset=low)


def _two_level_centred(a: Affine, storage: Storage, number: Tensor, d: Tensor) -> Fit:
    """Codes around a constant zero point; a flipped sub-block turns the sign of its integer."""
    sub, group = storage.sub_scale, storage.group
    assert sub is not None and group is not None
    if a.width < sub.width:
        raise Refused(f"groups of {a.width} are finer than the target's {sub.width}")
    made = _to_constant(a, replace(storage, group=sub.width, sub_scale=None))
    if made.flip is not None:
        number = torch.where(made.flip.expand(number.shape), -number, number)
    notes = (*made.rewrites, "unit sub-scales" if bool((number.abs() == 1).all()) else "integer sub-scales")
    return replace(made, rewrites=notes, scale=rewrite.level_param(d, number, sub, group, a.shape))


def _keep_levels(t: QuantizedTensor, storage: Storage, rounding: bool) -> Fit | None:
    """The two levels of a source with sub-offsets, as they are; None where they have no place in the storage."""
    try:
        scale, offset, rounded = keep_levels(t, storage, rounding)
    except Refused:
        return None
    reason = "; ".join(rounded) or "codes, sub-scales and sub-offsets are kept"
    return Fit("codes-exact" if rounded else "exact", reason, (), t.shape[-1], None, None, storage.grid, scale, None, offset)


def _to_doubled(a: Affine, storage: Storage) -> Fit:
    """Codes that are plus or minus one number in each block (Q1_0): q = (n + m) / 2 m under the scale d = s * m."""
    width = _working_width(a, min(storage.group or a.k, a.k))
    zero = a.plane(a.zero, width)
    low, high = a.ranges(width)
    most = torch.maximum(high - zero, zero - low)
    bad = _beside(a.ranges(1)[0].unflatten(-1, (-1, width)), zero.expand(most.shape), most)
    if bad:
        raise Refused(f"{bad} of {most.numel()} blocks hold more than plus and minus one number")
    exact = a.plane(a.scale, width).to(torch.float64) * most
    scale = _merged_scale(replace(a, width=width), super_scale(exact, storage, False, a.rounded, "scales"), storage.group or a.k)
    a.notes.append("two values to one bit")
    made = _done(a, storage, width, most - zero, None, scale, "every block holds plus and minus one number")
    half = constant(0.5, a.shape, torch.float32)
    return replace(made, shift=(most - zero).expand(most.shape), zero_point=half, half=most.clamp(min=1))


def _beside(codes: Tensor, zero: Tensor, most: Tensor) -> int:
    """How many runs of ``codes`` (…, B, width) hold another number than ``zero ± most`` (…, B)."""
    loops = rewrite.block_loops()
    if loops is None or codes.device.type != "cpu":
        return int(((codes - zero.unsqueeze(-1)).abs() != most.unsqueeze(-1)).any(-1).sum())
    planes = [plane.to(torch.int16).contiguous().view(-1).numpy() for plane in (zero, most)]
    return int(loops.beside(codes.to(torch.int16).contiguous().flatten(0, -2).numpy(), *planes))


def _keep_offset(a: Affine, offset: Tensor, storage: Storage, rounding: bool) -> Fit:
    """A source that has an offset already, for a storage that has one: codes stay, or move in blocks where a narrower grid asks."""
    if a.zero.numel() > 1 or int(a.zero.reshape(-1)[0]):
        raise Refused("both a zero point and an offset")
    group = min(storage.group or a.k, a.k)
    grid, dtype = storage.integers, getattr(torch, storage.offset or "float16")
    stored = offset.to(torch.float32).to(dtype)
    left = int((stored.to(torch.float64) != offset.to(torch.float64)).sum())
    keeps = a.grid.lowest >= grid.lowest and a.grid.highest <= grid.highest
    if left and not (rounding and keeps):
        raise Refused(f"an offset is not a {storage.offset} number")
    if left and bool((torch.isinf(stored) & torch.isfinite(offset)).any()):
        raise Refused(f"an offset overflows {storage.offset}")
    if left:
        a.rounded.append(f"{left} of {stored.numel()} offsets round to {storage.offset} ({F16_BOUND})")
    scale, width = a.scale, _working_width(a, group)
    if group > width:
        scale, stored, width = _merged_scale(a, scale, group), _merged_scale(a, stored, group), group
    else:
        scale, stored = a.plane(scale, width), a.plane(stored, width)
    if keeps:
        reason, shift = "codes are kept" if a.rounded else "codes, scales and offsets are kept", torch.zeros(1, dtype=torch.int16)
        return _done(a, storage, width, shift, None, scale, reason, offset=_param(stored, a.shape, group))
    shift_plane, flip, moved = narrow_offset(a, scale, stored, width, grid, dtype)
    a.notes.append("move codes into the narrower grid")
    any_flip = flip if bool(flip.any()) else None
    scale = torch.where(flip, -scale, scale)
    plane = _param(moved, a.shape, group)
    return _done(a, storage, width, shift_plane, any_flip, scale, "every block fits the narrower grid", offset=plane)
