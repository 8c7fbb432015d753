"""Codes of a table or a small float for a storage of the same values: what changes is the form of their scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from qformats import rewrite
from qformats.reencode.affine import affine_form, one_plane
from qformats.reencode.decision import Fit
from qformats.reencode.floats import spelling
from qformats.reencode.levels import sub_levels, super_scale
from qformats.reencode.shaped import coded_scale, is_shaped, row_storage, shaped_scale
from qformats.rewrite import Refused
from qformats.scheme import Float, Integer, Learned, Storage, Table, Tile
from qformats.tensor import Param, QuantizedTensor

__all__ = ["same_codes"]


def same_codes(t: QuantizedTensor, storage: Storage, rounding: bool, codes: Callable[[], Tensor] | None = None) -> Fit:
    """Keep the codes of a table or a small float under the scale that the storage asks for; ``Refused`` for other codes.

    Numbers of one small float that are all numbers of the storage's are spelled as these: ``codes()`` gives the codes where ``t`` is blank.
    """
    plain = t.signs is None and t.zero_point is None and t.offset is None
    if isinstance(t.grid, Float) and isinstance(storage.grid, Float) and t.grid != storage.grid and plain:
        same, how = spelling(t, storage, codes)
        found = same_codes(same, storage, rounding)
        reason = how.reason if found.kind == "exact" else f"{found.reason}; {how.reason}"
        return replace(found, reason=reason, rewrites=(*found.rewrites, "spell codes as another float"), spelling=how)
    if t.grid != storage.grid or isinstance(t.grid, Learned) or t.signs is not None or t.zero_point is not None or t.offset is not None:
        raise Refused(f"its codes do not stand for the values of {storage.type}")
    if isinstance(storage.grid, Table) and storage.grid.v_in > 1:
        raise Refused(f"the entries of {storage.type} stand under signs and scales of their own")
    if storage.scale_grid is not None:
        scale, extra, rounded = coded_scale(t, storage, rounding)
        return _fit(t, storage, scale, [], rounded, extra)
    if storage.sub_scale is not None:
        return _levels(t, storage, rounding)
    rows = row_storage(storage, t.shape[-1]) if is_shaped(storage) else storage
    scale, notes, rounded = _row_scale(t, rows, rounding)
    if rows is storage:
        return _fit(t, storage, scale, notes, rounded)
    shaped, extra, more = shaped_scale(t, scale, storage, rounding)
    return _fit(t, storage, shaped, notes, [*rounded, *more], extra)


def _fit(
    t: QuantizedTensor, storage: Storage, scale: Param, notes: list[str], rounded: list[str], extra: tuple[Param, ...] = ()
) -> Fit:
    kind, reason = "codes-exact" if rounded else "exact", "; ".join(rounded) or "codes and scales are kept"
    return Fit(kind, reason, tuple(notes), t.shape[-1], None, None, storage.grid, scale, None, None, extra=extra)


def _row_scale(t: QuantizedTensor, storage: Storage, rounding: bool) -> tuple[Param, list[str], list[str]]:
    """All factors as one plane on the storage's groups of single rows."""
    notes: list[str] = []
    rounded: list[str] = []
    group, k, lead = storage.group or t.shape[-1], t.shape[-1], tuple(1 for _ in t.shape[:-1])
    one = rewrite.to_row_blocks(one_plane(t, storage, notes, rounded, rounding))
    width = one.scales[0].block.sizes[-1] if isinstance(one.scales[0].block, Tile) else k
    found = (rewrite.merge_groups(one, group) if width < group else rewrite.split_groups(one, group)).scales[0].values
    assert isinstance(found, Tensor)
    tile = Tile((*lead, min(group, k)))
    return Param(found.expand(tile.counts(t.shape)).contiguous(), tile), notes, rounded


def _levels(t: QuantizedTensor, storage: Storage, rounding: bool) -> Fit:
    """The scale as integers times one number of each super-block."""
    assert storage.sub_scale is not None

    def no_ranges(width: int) -> tuple[Tensor, Tensor]:
        raise Refused("codes of a table have no range")

    form, _ = affine_form(replace(t, grid=Integer(8), codes=t.codes), storage, no_ranges, rounding)
    levels = sub_levels(form, storage)
    d = super_scale(levels.step, storage, rounding, form.rounded)
    scale = rewrite.level_param(d, levels.number, storage.sub_scale, storage.group or t.shape[-1], t.shape)
    reason = "; ".join(form.rounded) or "codes are kept, scales are small multiples of one number"
    return Fit("codes-exact" if form.rounded else "exact", reason, tuple(form.notes), t.shape[-1], None, None, storage.grid, scale,
               None, None)  # fmt: skip
