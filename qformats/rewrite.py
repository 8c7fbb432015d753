"""Exact rewrites of a canonical tensor: each changes its form and keeps every weight's real value, or refuses with a reason.

All are pure functions on ``QuantizedTensor``. A refusal is ``Refused`` (never a silent approximation); the search in
``qformats.reencode`` and the planner quote its reason. Rounding of parameters, which keeps codes only, is in ``round_scale``
and ``zero_to_offset(..., rounding=True)`` and reports the largest error it made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from qformats.real import Real, round_once
from qformats.scheme import Flat, Integer, Learned, Table, Tile, whole
from qformats.tensor import Param, QuantizedTensor, constant, expand

__all__ = [
    "Refused",
    "absorb_group_index",
    "block_range",
    "concatenate_rows",
    "drop_trivial_group_index",
    "flip_and_shift",
    "fold_scales",
    "merge_groups",
    "nest_scale",
    "offset_to_zero",
    "pad_columns",
    "permute_column_groups",
    "recentre",
    "round_scale",
    "select_rows",
    "split_groups",
    "to_row_blocks",
    "to_signed",
    "to_unsigned",
    "unnest_scale",
    "widen",
    "zero_to_offset",
]


class Refused(Exception):
    """An exact rewrite does not apply; ``str()`` is the reason as the plan prints it."""


def _integer(t: QuantizedTensor) -> Integer:
    if not isinstance(t.grid, Integer):
        raise Refused(f"codes of a {type(t.grid).__name__.lower()} grid are not integers")
    return t.grid


def _plain(param: Param, what: str) -> Tensor:
    if isinstance(param.values, QuantizedTensor):
        raise Refused(f"the {what} is itself stored as codes")
    return param.values


def _map_params(t: QuantizedTensor, change: object) -> dict[str, object]:
    assert callable(change)
    return {
        "scales": tuple(change(s) for s in t.scales),
        "zero_point": None if t.zero_point is None else change(t.zero_point),
        "offset": None if t.offset is None else change(t.offset),
    }


# ---------------------------------------------------------------- groups and blocks


def _single_row(block: object) -> bool:
    return isinstance(block, Tile) and all(size == 1 for size in block.sizes[:-1])


def split_groups(t: QuantizedTensor, size: int) -> QuantizedTensor:
    """Repeat every grouped parameter so that one covers ``size`` columns of one row; needs groups that are multiples of ``size``."""
    if t.group_index is not None:
        raise Refused("act-order: a group's columns are not consecutive")
    return t.replace(**_map_params(t, lambda p: _split_param(p, size, t.shape)))


def _split_param(param: Param, size: int, shape: tuple[int, ...]) -> Param:
    if not isinstance(param.block, Tile):
        raise Refused(f"{param.block} blocks are not runs of a row")
    if not isinstance(param.values, QuantizedTensor) and param.values.numel() == 1:
        return param
    width, k = param.block.sizes[-1], shape[-1]
    if width % size and width < k:
        raise Refused(f"groups of {width} columns are not a multiple of {size}")
    fine = Tile((*(1 for _ in shape[:-1]), min(size, k)))
    if param.block == fine:
        return param
    if isinstance(param.values, QuantizedTensor):
        raise Refused("a parameter stored as codes cannot be split")
    starts = torch.arange(-(-k // size)) * size // width
    values = param.values.index_select(-1, starts)
    return Param(_repeat_rows(values, param.block, shape), fine, param.inverse, param.rounded_to)


def _repeat_rows(values: Tensor, block: Tile, shape: tuple[int, ...]) -> Tensor:
    for axis, (tile, length) in enumerate(zip(block.sizes[:-1], shape[:-1], strict=True)):
        if values.shape[axis] != length:
            values = values.repeat_interleave(tile, axis).narrow(axis, 0, length)
    return values


def merge_groups(t: QuantizedTensor, size: int) -> QuantizedTensor:
    """Inverse of ``split_groups``: one parameter for ``size`` columns, where all those merged are equal bit for bit."""
    if t.group_index is not None:
        raise Refused("act-order: a group's columns are not consecutive")
    return t.replace(**_map_params(t, lambda p: _merge_param(p, size, t.shape)))


def _merge_param(param: Param, size: int, shape: tuple[int, ...]) -> Param:
    values = _plain(param, "parameter")
    if values.numel() == 1:
        return param
    if not _single_row(param.block) or not isinstance(param.block, Tile):
        raise Refused("only one-row groups can be merged")
    width, k = param.block.sizes[-1], shape[-1]
    size = min(size, k)
    if size == width:
        return param
    if size % width:
        raise Refused(f"groups of {width} do not fill a group of {size}")
    first = values[..., :: size // width]
    spread = first.repeat_interleave(size // width, -1)[..., : values.shape[-1]]
    if not torch.equal(_bits(spread), _bits(values)):
        raise Refused(f"neighbouring groups of {width} differ, so groups of {size} cannot hold them")
    return Param(first.contiguous(), Tile((*param.block.sizes[:-1], size)), param.inverse, param.rounded_to)


def _bits(values: Tensor) -> Tensor:
    """Floats as integers, so that comparison is bit for bit (-0.0 is not 0.0, NaN equals itself)."""
    if not values.dtype.is_floating_point:
        return values
    return values.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[values.element_size()])


def to_row_blocks(t: QuantizedTensor) -> QuantizedTensor:
    """Turn tall tiles, flat runs and cyclic blocks into blocks of one row (width: gcd of K and the run)."""
    return t.replace(**_map_params(t, lambda p: _row_block_param(p, t.shape)))


def _row_block_param(param: Param, shape: tuple[int, ...]) -> Param:
    if _single_row(param.block):
        return param
    values, k = _plain(param, "parameter"), shape[-1]
    if values.numel() == 1:
        return param
    if isinstance(param.block, Tile):
        row = Tile((*(1 for _ in shape[:-1]), param.block.sizes[-1]))
        return Param(_repeat_rows(values, param.block, shape), row, param.inverse, param.rounded_to)
    width = gcd(k, param.block.n) if isinstance(param.block, Flat) else 1
    index = torch.arange(0, k, width)
    spread = expand(values, param.block, shape).index_select(-1, index)
    return Param(spread.contiguous(), Tile((*(1 for _ in shape[:-1]), width)), param.inverse, param.rounded_to)


# ---------------------------------------------------------------- codes and zero points


def to_signed(t: QuantizedTensor) -> QuantizedTensor:
    """Unsigned codes q with zero z become q − 2^(b−1) with zero z − 2^(b−1)."""
    grid = _integer(t)
    if grid.signed:
        return t
    half = 1 << (grid.bits - 1)
    zero = _shift_zero(t, -half)
    return t.replace(codes=(t.codes.to(torch.int16) - half).to(torch.int8), grid=Integer(grid.bits, True), zero_point=zero)


def to_unsigned(t: QuantizedTensor) -> QuantizedTensor:
    """Signed codes become unsigned, the zero point moves along."""
    grid = _integer(t)
    if not grid.signed:
        return t
    half = 1 << (grid.bits - 1)
    zero = _shift_zero(t, half)
    return t.replace(codes=(t.codes.to(torch.int16) + half).to(torch.uint8), grid=Integer(grid.bits), zero_point=zero)


def _shift_zero(t: QuantizedTensor, by: int) -> Param | None:
    if t.zero_point is None:
        return constant(by, t.shape)
    values = _plain(t.zero_point, "zero point")
    if values.dtype.is_floating_point:
        moved = Real.of(values) + Real.of(torch.tensor(float(by)))
        rounded = round_once(moved, torch.float32)
        if _inexact(moved, rounded):
            raise Refused("the float zero point cannot be moved without rounding")
        return t.zero_point.with_values(rounded)
    moved_int = values.to(torch.int16) + by
    if moved_int.numel() == 1 and int(moved_int.reshape(-1)[0]) == 0:
        return None
    return t.zero_point.with_values(moved_int)


def widen(t: QuantizedTensor, bits: int) -> QuantizedTensor:
    """The same codes on a grid of more bits."""
    grid = _integer(t)
    if bits < grid.bits:
        raise Refused(f"{grid.bits}-bit codes do not fit {bits} bits")
    return t.replace(grid=Integer(bits, grid.signed))


def zero_values(t: QuantizedTensor) -> Tensor:
    """The integer zero points as int16 on their own grid, shape (1, …, 1) where there is none; refuses fractional ones."""
    if t.zero_point is None:
        return torch.zeros((1,) * len(t.shape), dtype=torch.int16)
    values = _plain(t.zero_point, "zero point")
    if values.dtype.is_floating_point and not bool(((values == values.round()) & (values.abs() <= 32767)).all()):
        raise Refused("the zero points are not integers")
    return values.to(torch.int16)


def block_range(t: QuantizedTensor, width: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest code of each run of ``width`` columns, int16 (…, ceil(K / width))."""
    _integer(t)
    full, rest = t.codes.split((t.shape[-1] // width * width, t.shape[-1] % width), -1)
    runs = full.unflatten(-1, (-1, width))
    low, high = runs.amin(-1), runs.amax(-1)
    if rest.shape[-1]:
        low = torch.cat((low, rest.amin(-1, keepdim=True)), -1)
        high = torch.cat((high, rest.amax(-1, keepdim=True)), -1)
    return low.to(torch.int16), high.to(torch.int16)


def flip_and_shift(codes: Tensor, width: int, shift: Tensor, flip: Tensor | None, signed: bool) -> Tensor:
    """``shift + codes`` (or ``shift - codes`` where ``flip``) for each run of ``width`` columns; all results must fit 8 bits.

    ``codes`` (…, K) uint8 or int8, ``shift`` int16 and ``flip`` bool (…, ceil(K / width)) or broadcastable to it.
    """
    out_dtype, k = (torch.int8 if signed else torch.uint8), codes.shape[-1]
    wide = codes if k % width == 0 else torch.nn.functional.pad(codes, (0, -k % width))
    # wrap-around arithmetic on the bytes: the results fit, so what happens above bit 7 does not matter
    runs = wide.view(torch.uint8).unflatten(-1, (-1, width))
    add = (shift.to(torch.int32) & 0xFF).to(torch.uint8)
    if flip is not None and bool(flip.any()):
        mask = torch.where(flip, 0xFF, 0).to(torch.uint8)  # s - c = (s + 1) + ~c
        add = add + flip.to(torch.uint8)
        runs = runs ^ mask.unsqueeze(-1)
    if add.ndim == runs.ndim - 1:
        add = add.unsqueeze(-1)
    out = torch.add(runs, add).flatten(-2)[..., :k]
    return out.contiguous().view(out_dtype)


def recentre(t: QuantizedTensor, grid: Integer, zero: int) -> QuantizedTensor:
    """Move codes so that every zero point becomes the constant ``zero`` on ``grid``; refuses if a code leaves the grid."""
    source, z = _integer(t), zero_values(t)
    if t.offset is not None:
        raise Refused("there is an additive offset")
    width = t.zero_point.block.sizes[-1] if t.zero_point is not None and isinstance(t.zero_point.block, Tile) else t.shape[-1]
    if t.zero_point is not None and z.numel() > 1 and not _single_row(t.zero_point.block):
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
    scale = _plain(t.scales[0], "scale")
    if t.zero_point is None:
        return t.replace(offset=Param(torch.zeros_like(scale, dtype=dtype), t.scales[0].block))
    zero = _plain(t.zero_point, "zero point")
    if zero.numel() > 1 and t.zero_point.block != t.scales[0].block:
        raise Refused("scale and zero point have different blocks")
    product = -(Real.of(scale) * Real.of(zero))
    offset = round_once(product, dtype)
    wrong = _inexact(product, offset)
    if wrong and not rounding:
        raise Refused(f"scale x zero point rounds in {wrong} of {offset.numel()} blocks")
    if not bool(torch.isfinite(offset).all()):
        raise Refused(f"scale x zero point overflows {str(dtype).removeprefix('torch.')}")
    return t.replace(zero_point=None, offset=Param(offset, t.scales[0].block))


def _inexact(exact: Real, rounded: Tensor) -> int:
    differs = rounded.to(torch.float64) != exact.high
    if exact.low is not None:
        differs |= exact.low != 0
    return int(differs.sum())


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
    scale, offset = _plain(t.scales[0], "scale"), _plain(t.offset, "offset")
    s64, m64 = scale.to(torch.float64), offset.to(torch.float64)
    zero = torch.where(s64 == 0, torch.zeros_like(s64), (-m64 / s64).round())
    back = -(Real.of(scale) * Real.of(zero))
    good = (back.high == m64) if not rounding else (round_once(back, offset.dtype) == offset)
    good &= zero.abs() <= 32000
    if not bool(good.all()):
        raise Refused(f"offset / scale is not an integer in {int((~good).sum())} of {good.numel()} blocks")
    return t.replace(offset=None, zero_point=Param(zero.to(torch.int16), t.scales[0].block))


# ---------------------------------------------------------------- scales


def fold_scales(t: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """Multiply all scale factors into one plane of ``dtype`` on the finest block; refuses if a product is not representable."""
    if len(t.scales) == 1 and not t.scales[0].inverse and not isinstance(t.scales[0].values, QuantizedTensor):
        return t if t.scales[0].values.dtype == dtype else round_scale(t, dtype, rounding=False)[0]
    if not t.scales:
        return t.replace(scales=(constant(1, t.shape, dtype),))
    blocks = [s.block for s in t.scales]
    if not all(isinstance(b, Tile) for b in blocks):
        raise Refused("scale factors on flat or cyclic blocks")
    sizes = tuple(min(b.sizes[a] for b in blocks if isinstance(b, Tile)) for a in range(len(t.shape)))
    fine = Tile(sizes)
    counts = fine.counts(t.shape)
    if t.group_index is not None and any(s.values.shape[-1] not in (1, counts[-1]) or sizes[-1] == 1 for s in t.scales):
        raise Refused("act-order: the scale factors follow different columns")
    total = Real.of(torch.ones(counts, dtype=torch.float64))
    for scale in t.scales:
        spread = scale.real().map(lambda v, s=scale: _regrid(v, s.block, fine, t.shape))
        total = total.divide(spread) if scale.inverse else total * spread
    folded = round_once(total, dtype)
    wrong = _inexact(total, folded)
    if wrong:
        raise Refused(f"the product of the scale factors rounds in {wrong} of {folded.numel()} groups")
    return t.replace(scales=(Param(folded, fine),))


def _regrid(values: Tensor, block: Tile, fine: Tile, shape: tuple[int, ...]) -> Tensor:
    for axis, (coarse, small, length) in enumerate(zip(block.sizes, fine.sizes, shape, strict=True)):
        if coarse % small and coarse < length:
            raise Refused(f"tiles of {coarse} and {small} do not nest")
        values = values.index_select(axis, torch.arange(-(-length // small)) * small // coarse)
    return values


def round_scale(t: QuantizedTensor, dtype: torch.dtype, *, rounding: bool = True) -> tuple[QuantizedTensor, int]:
    """Store the only scale plane in ``dtype``; returns how many entries rounded (0 = exact). Refuses overflow to infinity."""
    if len(t.scales) != 1:
        raise Refused("more than one scale factor")
    scale = _plain(t.scales[0], "scale")
    if scale.dtype == dtype:
        return t, 0
    exact = Real.of(scale)
    stored = round_once(exact, dtype)
    wrong = _inexact(exact, stored)
    name = str(dtype).removeprefix("torch.")
    if not bool(torch.isfinite(stored).all()) and bool(torch.isfinite(scale).all()):
        raise Refused(f"a scale overflows {name}")
    if wrong and not rounding:
        raise Refused(f"{wrong} of {scale.numel()} scales are not {name} numbers")
    return t.replace(scales=(t.scales[0].with_values(stored),)), wrong


def nest_scale(t: QuantizedTensor, super_size: int, bits: int) -> QuantizedTensor:
    """Write scale and zero point in the two-level K-quant form with unit sub-scales: scale = d · 1, offset = (−d) · zero_point.

    Needs one scale per multiple of ``super_size`` columns and integer zero points in 0 … 2^bits − 1 on blocks of 32 (or coarser).
    """
    if len(t.scales) != 1 or t.scales[0].inverse or t.group_index is not None or t.signs is not None:
        raise Refused("only a single scale plane without act-order or signs can be nested")
    scale, block = _plain(t.scales[0], "scale"), t.scales[0].block
    sub = Tile((*(1 for _ in t.shape[:-1]), 32))
    spans = isinstance(block, Tile) and (block.sizes[-1] % super_size == 0 or block.sizes[-1] >= t.shape[-1])
    if not spans or not (_single_row(block) or scale.numel() == 1):
        raise Refused(f"one scale does not span {super_size} columns")
    coarse = _split_param(t.scales[0], super_size, t.shape)
    d = _plain(coarse, "scale").expand(Tile((*(1 for _ in t.shape[:-1]), super_size)).counts(t.shape))
    if scale.dtype != torch.float16:
        raise Refused("the scale is not float16")
    zero = zero_values(t)
    if t.offset is not None or int(zero.min()) < 0 or int(zero.max()) >= 1 << bits:
        raise Refused(f"zero points outside 0 … {(1 << bits) - 1}")
    if t.zero_point is not None and zero.numel() > 1:
        zero = _plain(_split_param(t.zero_point.with_values(zero), 32, t.shape), "zero point")
    counts = sub.counts(t.shape)
    zero = zero.expand(counts)
    per = Tile((*(1 for _ in t.shape[:-1]), super_size // 32))
    ones = torch.ones(counts, dtype=torch.uint8)
    level = QuantizedTensor(counts, ones, Integer(bits), (Param(d, per),))
    low = QuantizedTensor(counts, zero.to(torch.uint8).contiguous(), Integer(bits), (Param(-d, per),))
    return t.replace(scales=(Param(level, sub),), zero_point=None, offset=Param(low, sub))


def unnest_scale(t: QuantizedTensor, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    """Expand scale and offset that are stored as codes to plain planes of ``dtype``; refuses if a product rounds."""

    def expanded(param: Param) -> Param:
        if not isinstance(param.values, QuantizedTensor):
            return param
        exact = param.real()
        plain = round_once(exact, dtype)
        wrong = _inexact(exact, plain)
        if wrong:
            raise Refused(f"{wrong} of {plain.numel()} nested parameters are not {str(dtype).removeprefix('torch.')} numbers")
        return Param(plain, param.block, param.inverse)

    return t.replace(**_map_params(t, expanded))


# ---------------------------------------------------------------- act-order


def drop_trivial_group_index(t: QuantizedTensor) -> QuantizedTensor:
    """Remove a group index that says nothing: column k belongs to group k // g."""
    if t.group_index is None:
        return t
    trivial = torch.arange(t.shape[-1]) // _group_size(t)
    return replace(t, group_index=None) if bool((t.group_index == trivial).all()) else t


def _group_size(t: QuantizedTensor) -> int:
    sizes = [p.block.sizes[-1] for _, p in t.params() if isinstance(p.block, Tile) and p.values.shape[-1] > 1 and p.block.sizes[-1] > 1]
    return min(sizes, default=t.shape[-1])


def absorb_group_index(t: QuantizedTensor, order: Tensor | None = None) -> tuple[QuantizedTensor, Tensor]:
    """Reorder columns so that groups are consecutive; returns the tensor and ``order`` with new column j = old order[j].

    By default columns are sorted by group (stable); a given ``order`` must make every group consecutive and aligned.
    Exact for the product only if the producer's rows are permuted by the same ``order``. Refuses uneven groups.
    """
    if t.group_index is None:
        return t, torch.arange(t.shape[-1])
    if t.group_index.ndim != 1:
        raise Refused("every expert has its own group index")
    by_column = any(isinstance(p.block, Tile) and p.block.sizes[-1] == 1 and p.values.shape[-1] > 1 for _, p in t.params())
    if by_column or t.signs is not None or isinstance(t.grid, Table | Learned):
        raise Refused("only plain codes without a factor for each column can be sorted by group")
    if order is None:
        order = torch.argsort(t.group_index.to(torch.int64), stable=True)
    size, k = _group_size(t), t.shape[-1]
    sorted_index = t.group_index[order].to(torch.int64)
    first = sorted_index[torch.arange(0, k, size)]
    if not torch.equal(sorted_index, first.repeat_interleave(size)[:k]) or len(torch.unique(first)) != len(first):
        raise Refused(f"groups do not have {size} columns each")

    def change(param: Param) -> Param:
        values = _plain(param, "parameter")
        return param if values.shape[-1] == 1 else param.with_values(values.index_select(-1, first))

    return t.replace(codes=t.codes.index_select(-1, order), group_index=None, **_map_params(t, change)), order


# ---------------------------------------------------------------- rows and columns


def select_rows(t: QuantizedTensor, rows: Tensor | slice) -> QuantizedTensor:
    """Take rows of a two-dimensional tensor in any order; parameters on one-row tiles follow, wider tiles only with whole tiles."""

    def take(values: Tensor) -> Tensor:
        return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)

    codes = take(t.codes)
    if len(t.shape) < 2 or not len(codes):
        raise Refused("a vector has no rows" if len(codes) else "no rows are selected")

    def change(param: Param) -> Param:
        if isinstance(param.block, Tile) and 1 != param.block.sizes[0] >= t.shape[0]:
            return replace(param, block=Tile((max(param.block.sizes[0], len(codes)), *param.block.sizes[1:])))
        if not isinstance(param.block, Tile) or param.block.sizes[0] != 1:
            raise Refused(f"parameters on {param.block} do not follow single rows")
        if isinstance(param.values, QuantizedTensor):
            return replace(param, values=select_rows(param.values, rows))
        return param.with_values(take(param.values))

    if isinstance(t.grid, Learned) and t.grid.v_out != 1:
        raise Refused("codebook entries span several rows")
    signs = None if t.signs is None else take(t.signs)
    index = take(t.group_index) if t.group_index is not None and t.group_index.ndim == 2 else t.group_index
    return t.replace(shape=(codes.shape[0], *t.shape[1:]), codes=codes, signs=signs, group_index=index, **_map_params(t, change))


def concatenate_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Stack two-dimensional tensors of one scheme along rows; parameters that are one number must be equal everywhere."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        if other.grid != first.grid or other.shape[1:] != first.shape[1:] or _form(other) != _form(first):
            raise Refused("the parts have different grids or parameters")
        if not _same_index(first.group_index, other.group_index) or not _same_index(first.codebook, other.codebook):
            raise Refused("the parts have different group indices or codebooks")
    shape = (sum(p.shape[0] for p in parts), *first.shape[1:])
    names = [name for name, _ in first.params()]
    joined = {name: _join([dict(p.params())[name] for p in parts], [p.shape for p in parts], shape) for name in names}
    return first.replace(
        shape=shape,
        codes=torch.cat([p.codes for p in parts]),
        signs=None if first.signs is None else torch.cat([p.signs for p in parts if p.signs is not None]),
        scales=tuple(v for k, v in joined.items() if k.startswith("scale")),
        zero_point=joined.get("zero_point"),
        offset=joined.get("offset"),
    )


def _form(t: QuantizedTensor) -> tuple[object, ...]:
    return (*((name, p.inverse, p.rounded_to) for name, p in t.params()), t.signs is not None)


def _same_index(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None) == (b is None) and (a is None or (b is not None and torch.equal(a, b)))


def _join(params: Sequence[Param], shapes: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> Param:
    first = params[0]
    if any(isinstance(p.values, QuantizedTensor) for p in params):
        if not all(isinstance(p.values, QuantizedTensor) and p.block == first.block and _single_row(p.block) for p in params):
            raise Refused("nested parameters on different blocks")
        return replace(first, values=concatenate_rows([p.values for p in params if isinstance(p.values, QuantizedTensor)]))
    planes = [_plain(p, "parameter") for p in params]
    if all(v.numel() == 1 for v in planes) and all(torch.equal(_bits(v), _bits(planes[0])) for v in planes):
        return Param(planes[0], whole(shape), first.inverse, first.rounded_to)
    if not all(isinstance(p.block, Tile) for p in params):
        raise Refused("flat or cyclic blocks do not follow rows")
    width = min(p.block.sizes[-1] for p in params if isinstance(p.block, Tile))
    rows = []
    dtype = planes[0].dtype
    for param, plane, size in zip(params, planes, shapes, strict=True):
        fine = _split_param(param, width, size) if plane.numel() > 1 else param
        values = _plain(fine, "parameter").expand(size[0], -(-size[-1] // width)) if plane.numel() == 1 else _plain(fine, "parameter")
        if values.dtype != dtype:
            raise Refused("the parts store a parameter in different dtypes")
        rows.append(values)
    return Param(torch.cat(rows), Tile((*(1 for _ in shape[:-1]), width)), first.inverse, first.rounded_to)


def permute_column_groups(t: QuantizedTensor, order: Tensor, width: int) -> QuantizedTensor:
    """Reorder whole runs of ``width`` columns (new run j = old run ``order[j]``); every grouped parameter must be on divisors of it."""
    if t.group_index is not None or isinstance(t.grid, Table | Learned) or t.signs is not None:
        raise Refused("only plain codes with consecutive groups can be reordered by columns")
    if t.shape[-1] % width:
        raise Refused(f"{t.shape[-1]} columns are not whole runs of {width}")

    def change(param: Param) -> Param:
        if param.values.shape[-1] == 1:
            return param
        if not isinstance(param.block, Tile) or width % param.block.sizes[-1]:
            raise Refused(f"a run of {width} columns cuts through a group")
        runs = _plain(param, "parameter").unflatten(-1, (-1, width // param.block.sizes[-1]))
        return param.with_values(runs.index_select(-2, order).flatten(-2))

    codes = t.codes.unflatten(-1, (-1, width)).index_select(-2, order).flatten(-2)
    return t.replace(codes=codes, **_map_params(t, change))


def pad_columns(t: QuantizedTensor, k: int) -> QuantizedTensor:
    """Append columns whose weight is exactly zero up to in_features ``k``; the last group must be full or can absorb them."""
    grid = _integer(t)
    if t.offset is not None or t.group_index is not None:
        raise Refused("an offset or act-order leaves no code for zero")
    extra = k - t.shape[-1]
    if extra < 0 or t.signs is not None:
        raise Refused(f"{t.shape[-1]} columns cannot be padded to {k}" if extra < 0 else "a separate sign plane")
    zero = zero_values(t)
    if zero.numel() != 1:
        raise Refused("zero points differ, so one padding code does not mean zero everywhere")
    code = int(zero.reshape(-1)[0])
    if not grid.lowest <= code <= grid.highest:
        raise Refused("the zero point is not a code")

    def change(param: Param) -> Param:
        if not isinstance(param.block, Tile):
            raise Refused("flat or cyclic blocks cannot be padded by columns")
        values = _plain(param, "parameter")
        width = param.block.sizes[-1]
        if values.shape[-1] == 1:
            return replace(param, block=Tile((*param.block.sizes[:-1], max(width, k))))
        missing = -(-k // width) - values.shape[-1]
        return param.with_values(torch.cat((values, values[..., -1:].expand(*values.shape[:-1], missing)), -1))

    codes = torch.nn.functional.pad(t.codes, (0, extra), value=code)
    return t.replace(shape=(*t.shape[:-1], k), codes=codes, **_map_params(t, change))
