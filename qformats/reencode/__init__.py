"""Can these codes be kept? The search for the rewrites that bring a tensor into a target type's form, and the kind of the result.

``fit`` decides from the parameters (and from the range of the codes in a block only where a rule asks for it) how every block is
relabelled; ``finish`` applies the decision to the codes. Both see any row range of a tensor and decide block by block, so a plan
made on row ranges holds for the whole. Names no format: targets are ``Storage`` values.

The relabellings are invertible: shift (q + n), flip (n − q, with the scale's sign changed), a choice of zero point, and the
split or merge of groups. What rounds is only ever a scale or an offset, and then the kind is ``codes-exact``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qformats import rewrite
from qformats.reencode.affine import F16_BOUND, Affine, Ranges, affine_form, merge_range, spread, straighten
from qformats.reencode.offsets import narrow_offset, offset_blocks
from qformats.rewrite import Refused
from qformats.scheme import Integer, Storage, Tile
from qformats.tensor import Param, QuantizedTensor, constant

__all__ = ["KINDS", "Fit", "Hint", "finish", "fit"]

KINDS = ("copied", "exact", "codes-exact", "dequantized", "requantized")


@dataclass(frozen=True, slots=True)
class Hint:
    """What a provenance record knows of the tensor to be restored: its zero points (N, G) and whether all scales were positive."""

    zero_point: Tensor | None = None
    positive: bool = False


@dataclass(frozen=True, slots=True)
class Fit:
    """How a tensor is relabelled for a storage: ``new code = shift ± code`` on runs of ``width`` columns, and the new parameters."""

    kind: str
    reason: str
    rewrites: tuple[str, ...]
    width: int
    shift: Tensor | None
    flip: Tensor | None
    grid: Integer
    scale: Param
    zero_point: Param | None
    offset: Param | None
    nested: bool = False
    as_it_is: bool = False


def fit(t: QuantizedTensor, storage: Storage, ranges: Ranges | None = None, hint: Hint | None = None, *, rounding: bool = False) -> Fit:
    """Decide how ``t`` is written as ``storage``; ``Refused`` with the reason if it cannot be (exactly, unless ``rounding``).

    ``ranges(width)`` gives the smallest and largest code of each run of ``width`` columns; by default they are computed from
    ``t.codes``. With ``rounding`` a scale or an offset may be rounded once to the storage's dtype.
    """
    _check_shape(t.shape, storage)
    if "values" in storage.options:
        return _same_values(t, storage)
    keep_index = _check_index(t, storage)
    if ranges is None:
        ranges = _lazy_ranges(t)
    affine, offset = affine_form(t, storage, ranges, rounding)
    if offset is not None:
        return _keep_offset(affine, offset, storage)
    group = storage.group or affine.k
    if keep_index and affine.width != min(group, affine.k) and affine.scale.shape[-1] > 1:
        raise Refused(f"act-order groups of {affine.width} cannot become groups of {group}")
    if hint is not None and hint.positive:
        straighten(affine)
    if storage.sub_scale is not None:
        return _two_level(affine, storage)
    if storage.offset is not None:
        return _to_offset(affine, storage, rounding)
    if isinstance(storage.zero_point, tuple):
        return _to_zero_range(affine, storage, hint)
    return _to_constant(affine, storage)


def finish(t: QuantizedTensor, decision: Fit, *, reuse: bool = False) -> QuantizedTensor:
    """Apply ``decision`` to the codes of ``t`` (the tensor it was made for), in their own memory if ``reuse`` gives ``t`` up."""
    if decision.as_it_is:
        return t
    codes = t.codes
    if decision.shift is not None or decision.grid.signed != (codes.dtype == torch.int8):
        shift = torch.zeros(1, dtype=torch.int16) if decision.shift is None else decision.shift
        codes = rewrite.flip_and_shift(codes, decision.width, shift, decision.flip, decision.grid.signed, reuse=reuse)
    out = QuantizedTensor(t.shape, codes, decision.grid, (decision.scale,), decision.zero_point, decision.offset, None, t.group_index)
    return out


def _same_values(t: QuantizedTensor, storage: Storage) -> Fit:
    """A storage whose codes stand for a table of values takes only codes of that very table, under scales of its own kind."""
    scale = t.scales[0] if len(t.scales) == 1 else None
    held = None if scale is None else scale.values
    kind = held.grid if isinstance(held, QuantizedTensor) else str(getattr(held, "dtype", "")).removeprefix("torch.")
    found = (getattr(t.grid, "name", ""), getattr(kind, "name", kind))
    wanted = (storage.options["values"], storage.options["scales"])
    tile = Tile((*(1,) * (len(t.shape) - 1), storage.group or t.shape[-1]))
    plain = t.zero_point is None and t.offset is None and t.signs is None and t.group_index is None
    if scale is None or found != wanted or scale.block != tile or scale.inverse or not plain:
        raise Refused(f"its codes are not {wanted[0]} values under {wanted[1]} scales for each {storage.group} columns")
    return Fit("exact", "the same codes under the same scales", (), t.shape[-1], None, None, storage.grid, scale, None, None, as_it_is=True)


def _check_shape(shape: tuple[int, ...], storage: Storage) -> None:
    n, k = (shape[-2] if len(shape) > 1 else 1), shape[-1]
    if k % storage.k_multiple:
        raise Refused(f"{k} columns are not a multiple of {storage.k_multiple}")
    if n % storage.n_multiple:
        raise Refused(f"{n} rows are not a multiple of {storage.n_multiple}")


def _check_index(t: QuantizedTensor, storage: Storage) -> bool:
    if t.group_index is None:
        return False
    if not storage.group_index:
        raise Refused("act-order: the columns of a group are not consecutive")
    return True


def _lazy_ranges(t: QuantizedTensor) -> Ranges:
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def ranges(width: int) -> tuple[Tensor, Tensor]:
        if width not in known:
            known[width] = rewrite.block_range(t, width)
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
    holder = QuantizedTensor(a.shape, torch.zeros(1, dtype=torch.uint8).expand(a.shape), a.grid, (_param(scale, a.shape, a.width),))
    merged = rewrite.merge_groups(holder, group).scales[0].values
    assert isinstance(merged, Tensor)
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
    lo, hi = storage.grid.lowest - centre, storage.grid.highest - centre
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
    low, high = a.ranges(width)
    zero = a.plane(a.zero, width)
    smallest, largest = low - zero, high - zero
    direct = (smallest >= lo) & (largest <= hi)
    shift, flip, scale = (centre - zero).expand(direct.shape), None, a.plane(a.scale, width)
    if not bool(direct.all()):
        flipped = ~direct & (-largest >= lo) & (-smallest <= hi)
        bad = int((~direct & ~flipped).sum())
        if bad or not storage.negative_scale:
            bad = bad or int(flipped.sum())
            raise Refused(f"{bad} of {direct.numel()} blocks have code minus zero point outside {lo} … {hi}")
        flip = flipped
        shift = torch.where(flipped, centre + zero, centre - zero)
        scale = torch.where(flipped, -scale, scale)
        a.notes.append(f"flip {int(flipped.sum())} blocks")
    if group > width:
        scale = _merged_scale(a, scale, group)
    a.notes.append(f"recentre to zero point {centre}")
    return _done(a, storage, width, shift, flip, scale, f"every block fits {storage.type}", **params)


def _to_offset(a: Affine, storage: Storage, rounding: bool) -> Fit:
    """Codes with a float offset a block (Q4_1, Q5_1): offset = scale x integer must be representable; else flip or shift the block."""
    group = min(storage.group or a.k, a.k)
    dtype = getattr(torch, storage.offset or "float16")
    top = storage.grid.highest
    if a.grid.signed:
        raise Refused("signed codes have no place in an unsigned grid with offset")
    width = _working_width(a, group)
    if group > width:
        raise Refused(f"groups of {width} are finer than the target's {group}")
    fits = a.grid.highest <= top
    scale, offset, shift, flip, (left, wrong, moved, flipped) = offset_blocks(a, width, top, dtype)
    if left and (not rounding or not fits):
        raise Refused(f"scale x zero point is not {storage.offset} in {left} of {flip.numel()} blocks, in any flip or shift")
    if wrong:
        raise Refused(f"scale x zero point overflows {storage.offset}")
    if left:
        a.rounded.append(f"the offset of {left} of {flip.numel()} blocks rounds to {storage.offset} ({F16_BOUND})")
    a.notes.append(f"zero point to offset, {moved} blocks flipped or shifted" if moved else "zero point to offset")
    reason = "" if left else "scale x zero point is representable in every block"
    return _done(a, storage, width, shift, flip if flipped else None, scale, reason, offset=_param(offset, a.shape, group))


def _to_zero_range(a: Affine, storage: Storage, hint: Hint | None) -> Fit:
    """Integer zero points a group (GPTQ, AWQ): keep them, take the record's, or choose ones that bring all codes into the grid."""
    assert isinstance(storage.zero_point, tuple)
    zlo, zhi = storage.zero_point
    group = min(storage.group or a.k, a.k)
    if not storage.negative_scale:
        straighten(a)
    width = _working_width(a, group)
    wanted = None if hint is None else hint.zero_point
    move = storage.grid.lowest - a.grid.lowest  # 2^(b-1) from signed to unsigned codes, else 0
    zero = a.zero + move
    in_range = zlo <= int(zero.min()) and int(zero.max()) <= zhi and a.grid.highest + move <= storage.grid.highest
    if wanted is None and group <= a.width and in_range:
        reason = "codes, scales and zero points are kept"
        return _done(a, storage, a.width, torch.full_like(zero, move), None, a.scale, reason, zero_point=_zero_param(zero, a, group))
    scale = _merged_scale(a, a.plane(a.scale, width), group)
    low, high = a.ranges(width)
    source_zero = a.plane(a.zero, width)
    smallest, largest = merge_range((low - source_zero, high - source_zero), max(1, -(-min(group, a.k) // width)))
    floor = torch.clamp(storage.grid.lowest - smallest, min=zlo)
    ceiling = torch.clamp(storage.grid.highest - largest, max=zhi)
    chosen = _choose_zero(floor, ceiling, source_zero, wanted, 1 << (storage.grid.bits - 1), group <= width)
    bad = int(((chosen < floor) | (chosen > ceiling)).sum())
    if bad:
        raise Refused(f"{bad} of {chosen.numel()} groups span more codes than {storage.grid.bits} bits with zero points {zlo} … {zhi}")
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


def _two_level(a: Affine, storage: Storage) -> Fit:
    """K-quants from sources with one scale over whole super-blocks: unit sub-scales, the zero point as integer sub-offset."""
    assert storage.sub_scale is not None and storage.group is not None
    sub, _, highest = storage.sub_scale
    if sub != 32:  # Q2_K, Q3_K, Q6_K
        raise Refused("its sub-scales would need a search")
    inner = Storage(storage.type, storage.grid, storage.group, storage.bits_per_weight, storage.scale_dtypes, True, (0, highest))
    if a.width % storage.group and a.width < a.k:
        raise Refused(f"one scale spans {a.width} columns, not {storage.group}")
    decision = _to_zero_range(a, inner, None)
    blank = torch.zeros(1, dtype=torch.uint8).expand(a.shape)
    holder = QuantizedTensor(a.shape, blank, storage.grid, (decision.scale,), decision.zero_point)
    bits = highest.bit_length()
    nested = rewrite.nest_scale(holder, storage.group, bits)
    notes = (*decision.rewrites, "unit sub-scales, zero point as sub-offset")
    return Fit(decision.kind, decision.reason or "one scale spans every super-block", notes, decision.width, decision.shift, decision.flip,
               storage.grid, nested.scales[0], None, nested.offset, True)  # fmt: skip


def _keep_offset(a: Affine, offset: Tensor, storage: Storage) -> Fit:
    """A source that has an offset already, for a storage that has one: codes stay, or move in blocks where a narrower grid asks."""
    if storage.sub_scale is not None:
        raise Refused("sub-scales would need a search")
    if a.zero.numel() > 1 or int(a.zero.reshape(-1)[0]):
        raise Refused("both a zero point and an offset")
    group = min(storage.group or a.k, a.k)
    dtype = getattr(torch, storage.offset or "float16")
    stored = offset.to(torch.float32).to(dtype)
    if bool((stored.to(torch.float64) != offset.to(torch.float64)).any()):
        raise Refused(f"an offset is not a {storage.offset} number")
    width = _working_width(a, group)
    if group > width:
        raise Refused(f"groups of {width} are finer than the target's {group}")
    scale, stored = a.plane(a.scale, width), a.plane(stored, width)
    if a.grid.lowest >= storage.grid.lowest and a.grid.highest <= storage.grid.highest:
        reason, shift = "codes, scales and offsets are kept", torch.zeros(1, dtype=torch.int16)
        return _done(a, storage, width, shift, None, scale, reason, offset=_param(stored, a.shape, group))
    shift_plane, flip, moved = narrow_offset(a, scale, stored, width, storage.grid, dtype)
    a.notes.append("move codes into the narrower grid")
    any_flip = flip if bool(flip.any()) else None
    scale = torch.where(flip, -scale, scale)
    plane = _param(moved, a.shape, group)
    return _done(a, storage, width, shift_plane, any_flip, scale, "every block fits the narrower grid", offset=plane)
