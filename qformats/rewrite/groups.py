"""Rewrites of blocks: split and merge groups, turn any block into blocks of one row."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from qformats.rewrite.forms import Refused, bit_view, map_params, plain, single_row
from qformats.scheme import Flat, Tile
from qformats.tensor import Param, QuantizedTensor, expand

__all__ = ["merge_groups", "row_block_param", "split_groups", "split_param", "to_row_blocks"]


def split_groups(t: QuantizedTensor, size: int) -> QuantizedTensor:
    """Repeat every grouped parameter so that one covers ``size`` columns of one row; needs groups that are multiples of ``size``."""
    if t.group_index is not None:
        raise Refused("act-order: a group's columns are not consecutive")
    return t.replace(**map_params(t, lambda p: split_param(p, size, t.shape)))


def split_param(param: Param, size: int, shape: tuple[int, ...]) -> Param:
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
    return Param(repeat_rows(values, param.block, shape), fine, param.inverse, param.rounded_to)


def repeat_rows(values: Tensor, block: Tile, shape: tuple[int, ...]) -> Tensor:
    for axis, (tile, length) in enumerate(zip(block.sizes[:-1], shape[:-1], strict=True)):
        if values.shape[axis] != length:
            values = values.repeat_interleave(tile, axis).narrow(axis, 0, length)
    return values


def merge_groups(t: QuantizedTensor, size: int) -> QuantizedTensor:
    """Inverse of ``split_groups``: one parameter for ``size`` columns, where all those merged are equal bit for bit."""
    if t.group_index is not None:
        raise Refused("act-order: a group's columns are not consecutive")
    return t.replace(**map_params(t, lambda p: _merge_param(p, size, t.shape)))


def _merge_param(param: Param, size: int, shape: tuple[int, ...]) -> Param:
    values = plain(param, "parameter")
    if values.numel() == 1:
        return param
    if not single_row(param.block) or not isinstance(param.block, Tile):
        raise Refused("only one-row groups can be merged")
    width, k = param.block.sizes[-1], shape[-1]
    size = min(size, k)
    if size == width:
        return param
    if size % width:
        raise Refused(f"groups of {width} do not fill a group of {size}")
    first = values[..., :: size // width]
    spread = first.repeat_interleave(size // width, -1)[..., : values.shape[-1]]
    if not torch.equal(bit_view(spread), bit_view(values)):
        raise Refused(f"neighbouring groups of {width} differ, so groups of {size} cannot hold them")
    return Param(first.contiguous(), Tile((*param.block.sizes[:-1], size)), param.inverse, param.rounded_to)


def to_row_blocks(t: QuantizedTensor) -> QuantizedTensor:
    """Turn tall tiles, flat runs and cyclic blocks into blocks of one row (width: gcd of K and the run)."""
    return t.replace(**map_params(t, lambda p: row_block_param(p, t.shape)))


def row_block_param(param: Param, shape: tuple[int, ...]) -> Param:
    if single_row(param.block):
        return param
    values, k = plain(param, "parameter"), shape[-1]
    if values.numel() == 1:
        return param
    if isinstance(param.block, Tile):
        row = Tile((*(1 for _ in shape[:-1]), param.block.sizes[-1]))
        return Param(repeat_rows(values, param.block, shape), row, param.inverse, param.rounded_to)
    width = gcd(k, param.block.n) if isinstance(param.block, Flat) else 1
    index = torch.arange(0, k, width)
    spread = expand(values, param.block, shape).index_select(-1, index)
    return Param(spread.contiguous(), Tile((*(1 for _ in shape[:-1]), width)), param.inverse, param.rounded_to)
