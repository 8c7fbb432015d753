"""Scales in the form a storage asks for: on tiles of rows, on runs of the row-major vector, as reciprocals, beside a factor, as codes."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from qformats import grids, rewrite
from qformats.real import Real, round_once
from qformats.reencode.affine import bound
from qformats.rewrite import Refused
from qformats.rewrite.forms import bit_view, inexact
from qformats.scheme import Factor, Storage, Table, Tile, whole
from qformats.tensor import Param, QuantizedTensor, constant

__all__ = ["coded_scale", "is_shaped", "row_storage", "shaped_scale"]


def is_shaped(storage: Storage) -> bool:
    """Whether the scale has another form than one number of a row's group."""
    return storage.rows != 1 or storage.flat or storage.inverse or storage.factor is not None


def row_storage(storage: Storage, k: int) -> Storage:
    """The same codes under one exact number for each group of a row: what is decided first."""
    group = storage.group
    if storage.flat and group is not None and k % group:
        group = gcd(k, group)
    return replace(storage, group=group, rows=1, flat=False, inverse=False, factor=None, scale_dtypes=("float64",))


def shaped_scale(t: QuantizedTensor, scale: Param, storage: Storage, rounding: bool) -> tuple[Param, tuple[Param, ...], list[str]]:
    """The exact float64 ``scale`` on groups of rows of ``t`` as the storage has it: (scale, further factors, what was rounded)."""
    exact, rounded = scale.values, list[str]()
    assert isinstance(exact, Tensor)
    extra: tuple[Param, ...] = ()
    factor = storage.factor
    if factor is not None and factor.constant is None:
        raise Refused(f"its scales have no factor of the whole tensor, as {storage.type} needs")
    wanted = exact
    if factor is not None and factor.constant is not None:
        extra = (constant(factor.constant, t.shape, getattr(torch, factor.dtype)),)
        wanted = exact / factor.constant
    if storage.inverse:
        if factor is not None or bool((exact == 0).any()):
            raise Refused("a scale of zero has no reciprocal")
        wanted = 1 / wanted
    stored, wrong, name = _stored(wanted, exact, storage)
    if wrong and not rounding:
        raise Refused(f"{wrong} of {stored.numel()} scales are not {name} numbers{' as reciprocals' if storage.inverse else ''}")
    if wrong:
        rounded.append(f"{wrong} of {stored.numel()} scales round to {name} ({bound(name)})")
    return _on_blocks(t, stored, scale, storage), extra, rounded


def _stored(wanted: Tensor, exact: Tensor, storage: Storage) -> tuple[Tensor, int, str]:
    """``wanted`` in the first dtype that keeps all of it, else in the first; how many numbers do not mean ``exact`` any more."""
    found: list[tuple[Tensor, int, str]] = []
    times = Real.of(torch.tensor(1.0 if storage.factor is None else storage.factor.constant, dtype=torch.float64))
    for name in storage.scale_dtypes:
        stored = round_once(Real(wanted), getattr(torch, name))
        if not bool(torch.isfinite(stored).all()):
            continue
        means = Real.of(stored) * times
        wrong = inexact(means * Real.of(exact), torch.ones_like(exact)) if storage.inverse else inexact(means, exact)
        found.append((stored, wrong, name))
        if not wrong:
            return found[-1]
    if not found:
        raise Refused(f"a scale overflows {storage.scale_dtypes[0]}")
    return found[0]


def _on_blocks(t: QuantizedTensor, values: Tensor, scale: Param, storage: Storage) -> Param:
    """A plane on groups of single rows on the storage's own blocks, where all that share one are equal bit for bit."""
    n, k = values.shape[0] if values.ndim > 1 else 1, t.shape[-1]
    if storage.flat:
        if storage.group is None or k % storage.group == 0:
            return Param(values, scale.block, storage.inverse)
        _check_equal(values.reshape(1, -1), 1, storage.group // gcd(k, storage.group), "runs")
        return Param(values, scale.block, storage.inverse)
    if storage.rows == 1:
        return Param(values, scale.block, storage.inverse)
    if storage.rows is None:
        single = all(isinstance(p.values, Tensor) and p.values.numel() == 1 for p in t.scales)
        if not single or storage.group is not None:
            raise Refused("it has more than one scale")
        return Param(values.reshape(-1)[:1].reshape((1,) * len(t.shape)), whole(t.shape), storage.inverse)
    if values.ndim != 2:
        raise Refused("stacked tensors have no tiles of rows")
    _check_equal(values, storage.rows, 1, f"{storage.rows} rows")
    merged = values[:: storage.rows].contiguous()
    assert isinstance(scale.block, Tile) and len(merged) == -(-n // storage.rows)
    return Param(merged, Tile((storage.rows, scale.block.sizes[-1])), storage.inverse)


def _check_equal(values: Tensor, rows: int, columns: int, what: str) -> None:
    """``Refused`` unless all values of a tile ``rows`` x ``columns`` of the plane are the same."""
    first = values[::rows, ::columns].repeat_interleave(rows, 0)[: values.shape[0]].repeat_interleave(columns, 1)[:, : values.shape[1]]
    if not torch.equal(bit_view(first), bit_view(values)):
        raise Refused(f"the scales of {what} that would share one differ")


# ---------------------------------------------------------------- scales that are codes


def coded_scale(t: QuantizedTensor, storage: Storage, rounding: bool) -> tuple[Param, tuple[Param, ...], list[str]]:
    """A scale that is stored as codes of a small float, for a storage that has such codes; with the factor of the whole tensor beside."""
    held, grid = t.scales[0].values if t.scales else None, storage.scale_grid
    assert grid is not None
    group, lead = storage.group or t.shape[-1], tuple(1 for _ in t.shape[:-1])
    plain = isinstance(held, QuantizedTensor) and not held.params() and t.scales[0].block == Tile((*lead, group))
    if not isinstance(held, QuantizedTensor) or not plain or t.scales[0].inverse or isinstance(grid, Table):
        raise Refused(f"its scale is not {grid.name} codes for each {group} columns")
    codes = held.codes if held.grid == grid else _same_values(held, grid.name)
    scale = Param(QuantizedTensor(held.shape, codes, grid), t.scales[0].block)
    rest, rounded = t.scales[1:], list[str]()
    if storage.factor is None:
        if any(not bool((p.real().high == 1).all()) for p in rest):
            raise Refused(f"{storage.type} has no factor of the whole tensor")
        return scale, (), rounded
    return scale, (_factor(rest, t, storage.factor, rounding, rounded),), rounded


def _same_values(held: QuantizedTensor, name: str) -> Tensor:
    """Codes of one small float as those of another; ``Refused`` where a value is not there."""
    mine, theirs = grids.float_values(held.grid.name), grids.float_values(name)  # type: ignore[union-attr]
    order = torch.argsort(torch.where(torch.isfinite(theirs), theirs, torch.inf), stable=True)
    ordered = theirs[order]
    place = torch.searchsorted(ordered[: int(torch.isfinite(theirs).sum())].contiguous(), mine.contiguous()).clamp(max=len(theirs) - 1)
    found = order[place]
    used = torch.bincount(held.codes.reshape(-1), minlength=len(mine)) > 0
    if not torch.equal(theirs[found[used]], mine[used]):
        raise Refused(f"a scale is not a number of {name}")
    table = found.to(torch.uint8)
    by_loop = rewrite.looked_up(held.codes, table.view(torch.int8))
    return table[held.codes.to(torch.int64)] if by_loop is None else by_loop.view(torch.uint8)


def _factor(rest: tuple[Param, ...], t: QuantizedTensor, form: Factor, rounding: bool, rounded: list[str]) -> Param:
    """The scales after the first as one number in ``form``."""
    dtype, rest = getattr(torch, form.dtype), tuple(_one_number(p, t) for p in rest)
    if len(rest) == 1 and isinstance(rest[0].values, Tensor) and rest[0].values.dtype == dtype and rest[0].inverse == form.inverse:
        return rest[0]
    single = all(p.values.shape == (1,) * len(t.shape) for p in rest)
    each_row = len(rest) == 1 and rest[0].values.shape == (t.shape[0], 1)  # that of each expert, along its rows
    if len(rest) > 1 or not (single or each_row):
        raise Refused("its factor is not one number for the tensor")
    known = rest[0].real() if rest else Real.of(torch.ones((1,) * len(t.shape), dtype=torch.float64))
    turned = bool(rest) and rest[0].inverse != form.inverse
    stored = round_once(Real(1 / known.high) if turned else known, dtype)
    if not bool(torch.isfinite(stored).all()):
        raise Refused(f"the factor overflows {form.dtype}")
    wrong = inexact(Real.of(stored) * known, torch.ones_like(stored)) if turned else inexact(known, stored)
    if wrong and not rounding:
        raise Refused(f"the factor of the tensor is no {form.dtype} number{' as a reciprocal' if turned else ''}")
    if wrong:
        rounded.append(f"the factor of the tensor rounds to {form.dtype} ({bound(form.dtype)})")
    return Param(stored, whole(t.shape) if single else rest[0].block, form.inverse)


def _one_number(param: Param, t: QuantizedTensor) -> Param:
    """The factor of each row as that of the tensor, where all rows (those of one expert of a stack) have the same."""
    values = param.values
    if not isinstance(values, Tensor) or values.shape != (t.shape[0], 1):
        return param
    bits = bit_view(values.contiguous())
    if not bool((bits == bits[:1]).all()):
        return param
    return Param(values[:1], whole(t.shape), param.inverse)
