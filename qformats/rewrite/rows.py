"""Rewrites of rows and columns: select, stack, reorder, pad, and act-order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qformats.rewrite.codes import zero_values
from qformats.rewrite.forms import Refused, bit_view, integer_grid, map_params, plain, single_row
from qformats.rewrite.groups import row_block_param, split_param
from qformats.scheme import Learned, Table, Tile, whole
from qformats.tensor import Param, QuantizedTensor

__all__ = [
    "absorb_group_index",
    "concatenate_rows",
    "drop_trivial_group_index",
    "pad_columns",
    "permute_column_groups",
    "select_rows",
    "single_row_entries",
]


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
        values = plain(param, "parameter")
        return param if values.shape[-1] == 1 else param.with_values(values.index_select(-1, first))

    return t.replace(codes=t.codes.index_select(-1, order), group_index=None, **map_params(t, change)), order


def select_rows(t: QuantizedTensor, rows: Tensor | slice) -> QuantizedTensor:
    """Take rows of a two-dimensional tensor in any order; parameters on tiles follow, tall ones row by row."""

    def take(values: Tensor) -> Tensor:
        return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)

    t = single_row_entries(t)
    codes = take(t.codes)
    if len(t.shape) < 2 or not len(codes):
        raise Refused("a vector has no rows" if len(codes) else "no rows are selected")

    def change(param: Param) -> Param:
        if isinstance(param.block, Tile) and 1 != param.block.sizes[0] >= t.shape[0]:
            return replace(param, block=Tile((max(param.block.sizes[0], len(codes)), *param.block.sizes[1:])))
        if isinstance(param.block, Tile) and param.block.sizes[0] != 1:
            param = row_block_param(param, t.shape)
        if not isinstance(param.block, Tile):
            raise Refused(f"parameters on {param.block} do not follow single rows")
        if isinstance(param.values, QuantizedTensor):
            return replace(param, values=select_rows(param.values, rows))
        return param.with_values(take(param.values))

    signs = None if t.signs is None else take(t.signs)
    index = take(t.group_index) if t.group_index is not None and t.group_index.ndim == 2 else t.group_index
    return t.replace(shape=(codes.shape[0], *t.shape[1:]), codes=codes, signs=signs, group_index=index, **map_params(t, change))


def single_row_entries(t: QuantizedTensor) -> QuantizedTensor:
    """A learned grid of entries of one row: row p of entry e becomes entry p * entries + e. ``Refused`` where 16 bits do not count them."""
    if not isinstance(t.grid, Learned) or t.grid.v_out == 1:
        return t
    high, entries = t.grid.v_out, t.grid.entries
    count = high * entries
    if t.codebook is None or (count > 1 << 15 and count != 1 << 16):
        raise Refused(f"codebook entries span {high} rows, and {count} entries of one row are too many")
    index = t.codes.to(torch.int32)
    index = torch.where(index < 0, index + entries, index).repeat_interleave(high, 0)
    place = (torch.arange(len(index), dtype=torch.int32) % high * entries).reshape(-1, *(1 for _ in index.shape[1:]))
    book = t.codebook.transpose(1, 2).reshape(t.grid.books, count, 1, t.grid.v_in)
    return t.replace(codes=(index + place).to(torch.int16), grid=replace(t.grid, entries=count, v_out=1), codebook=book)


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
        if not all(isinstance(p.values, QuantizedTensor) and p.block == first.block and single_row(p.block) for p in params):
            raise Refused("nested parameters on different blocks")
        return replace(first, values=concatenate_rows([p.values for p in params if isinstance(p.values, QuantizedTensor)]))
    planes = [plain(p, "parameter") for p in params]
    if all(v.numel() == 1 for v in planes) and all(torch.equal(bit_view(v), bit_view(planes[0])) for v in planes):
        return Param(planes[0], whole(shape), first.inverse, first.rounded_to)
    if not all(isinstance(p.block, Tile) for p in params):
        raise Refused("flat or cyclic blocks do not follow rows")
    width = min(p.block.sizes[-1] for p in params if isinstance(p.block, Tile))
    rows = []
    dtype = planes[0].dtype
    for param, plane, size in zip(params, planes, shapes, strict=True):
        fine = split_param(param, width, size) if plane.numel() > 1 else param
        values = plain(fine, "parameter").expand(size[0], -(-size[-1] // width)) if plane.numel() == 1 else plain(fine, "parameter")
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
        runs = plain(param, "parameter").unflatten(-1, (-1, width // param.block.sizes[-1]))
        return param.with_values(runs.index_select(-2, order).flatten(-2))

    codes = t.codes.unflatten(-1, (-1, width)).index_select(-2, order).flatten(-2)
    return t.replace(codes=codes, **map_params(t, change))


def pad_columns(t: QuantizedTensor, k: int) -> QuantizedTensor:
    """Append columns whose weight is exactly zero up to in_features ``k``; the last group must be full or can absorb them."""
    grid = integer_grid(t)
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
        values = plain(param, "parameter")
        width = param.block.sizes[-1]
        if values.shape[-1] == 1:
            return replace(param, block=Tile((*param.block.sizes[:-1], max(width, k))))
        missing = -(-k // width) - values.shape[-1]
        return param.with_values(torch.cat((values, values[..., -1:].expand(*values.shape[:-1], missing)), -1))

    codes = torch.nn.functional.pad(t.codes, (0, extra), value=code)
    return t.replace(shape=(*t.shape[:-1], k), codes=codes, **map_params(t, change))
