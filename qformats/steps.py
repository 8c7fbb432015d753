"""Weights evaluated with plain float arithmetic, wherever that gives the numbers of the definition.

The definition is ``QuantizedTensor``'s: ``real`` rounded once, or ``evaluate_in`` with one rounding for each step. Here the same is done
for every tensor whose parameters stand for runs of a row (single rows and tiles of rows, groups, whole rows, whole tensors, runs of the
row-major vector; plain numbers and codes alike) under integers of a byte or a table of up to 256 floats:

- ``rounded``: each step is one float32 operation whose result is rounded to the step's dtype. That is the definition's rounding because
  the operands are numbers of that dtype: float32 has more than twice its digits and two (Figueroa, "When is double rounding innocuous?",
  1995), and torch's own half-precision operations are made so.
- ``exact``: each step is exact in float32 or float64, which the operands' ``Extent`` tells, or the last one is the only one to round.

Both answer None for every tensor that they do not serve. The compiled loops are ``qformats.loops.steps``; without numba, or off the CPU,
torch does the same a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import gcd, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qformats import grids
from qformats.loops import find
from qformats.real import Extent, Real, product, round_once
from qformats.scheme import Block, Flat, Float, Integer, Table, Tile

if TYPE_CHECKING:
    from qformats.tensor import Param, QuantizedTensor

__all__ = ["exact", "rounded", "single"]

_CACHED = 1 << 17  # weights that torch works on at a time
_NARROWEST = 8  # columns under one number: with fewer the planes are as large as the weights
_PLACES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # as in qformats.loops.steps
_DIGITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}


@dataclass(frozen=True, slots=True)
class _Runs:
    """A tensor's planes on runs of ``width`` columns: each (rows, K / width). ``table``: float64, None for integers."""

    codes: Tensor
    table: Tensor | None
    width: int
    scales: tuple[tuple[Real, bool], ...]
    zero: Real | None
    offset: Real | None

    @property
    def ends(self) -> tuple[int, int]:
        """Between which numbers the integers of a byte lie."""
        return (-128, 127) if self.codes.dtype == torch.int8 else (0, 255)

    def extent(self) -> Extent | None:
        return Extent(8, 0, 8) if self.table is None else Real.of(self.table).extent


# ---------------------------------------------------------------- planes


def _runs(t: QuantizedTensor) -> _Runs | None:
    """The tensor's planes on runs of its rows; None for another form, and for codes that the grid does not have."""
    if t.signs is not None or t.group_index is not None or t.codes.dtype == torch.int16 or not prod(t.shape):
        return None
    if isinstance(t.grid, Integer):
        table = None
    elif isinstance(t.grid, Float | Table) and getattr(t.grid, "v_in", 1) == 1:
        table = (grids.float_values if isinstance(t.grid, Float) else grids.table_values)(t.grid.name).to(t.codes.device)
    else:
        return None
    codes = t.codes.reshape(-1, t.shape[-1]).contiguous()
    if table is not None:
        codes = codes.view(torch.uint8)
        if len(table) > 256 or len(table) & (len(table) - 1) or (len(table) < 256 and int(codes.max()) >= len(table)):
            return None
        if t.codes.dtype == torch.int8 and isinstance(t.grid, Table):
            return None
    width = _width([param for _, param in t.params()], t.shape)
    if width is None:
        return None
    scales = tuple((_plane(scale, t.shape, width), scale.inverse) for scale in t.scales)
    zero, offset = (None if param is None else _plane(param, t.shape, width) for param in (t.zero_point, t.offset))
    return _Runs(codes, table, width, scales, zero, offset)


def _width(params: list[Param], shape: tuple[int, ...]) -> int | None:
    """The columns that every number of every parameter covers some whole multiple of; None for blocks that are not runs."""
    k, found = shape[-1], [shape[-1]]
    for param in params:
        if isinstance(param.block, Tile):
            found.append(k if param.values.shape[-1] == 1 and param.block.sizes[-1] >= k else param.block.sizes[-1])
        elif isinstance(param.block, Flat):
            found.append(param.block.n)
        else:
            return None
    width = reduce(gcd, found)
    return width if width >= min(_NARROWEST, k) else None


def _plane(param: Param, shape: tuple[int, ...], width: int) -> Real:
    return param.real().map(lambda v: _on_runs(v, param.block, shape, width))


def _on_runs(values: Tensor, block: Block, shape: tuple[int, ...], width: int) -> Tensor:
    """Values of a parameter on ``block`` as (rows, K / width)."""
    rows, across = prod(shape[:-1]), shape[-1] // width
    if isinstance(block, Flat):
        return values.reshape(-1).repeat_interleave(block.n // width)[: rows * across].reshape(rows, across)
    assert isinstance(block, Tile)
    for axis, (size, length) in enumerate(zip(block.sizes[:-1], shape[:-1], strict=True)):
        if values.shape[axis] == 1:
            values = values.expand(*values.shape[:axis], length, *values.shape[axis + 1 :])
        elif size > 1:
            values = values.repeat_interleave(size, axis).narrow(axis, 0, length)
    values = values.reshape(rows, -1)
    if values.shape[1] == 1:
        return values.expand(rows, across)
    return values if block.sizes[-1] == width else values.repeat_interleave(block.sizes[-1] // width, 1)[:, :across]


def _single(real: Real | None) -> Tensor | None:
    """The numbers as float32, None where one is no float32."""
    if real is None or real.low is not None:
        return None
    single = real.high.to(torch.float32)
    return single if _same(single, real.high) else None


def _same(narrow: Tensor, wide: Tensor) -> bool:
    back = narrow.to(wide.dtype)
    return torch.equal(back, wide) or bool(((back == wide) | (wide != wide)).all())


def _rounded_plane(real: Real, step: torch.dtype) -> Tensor:
    """A plane rounded to ``step``, as float32."""
    single = _single(real)
    if single is not None and (step == torch.float32 or _same(single.to(step), single)):
        return single
    return round_once(real, step).to(torch.float32)


def _quotient(factors: list[Real], divisors: list[Real]) -> Real | None:
    """One float64 quotient, where it is as good as the exact one: of numbers of 24 bits, none is nearer than 2^-50 to a tie of 25 bits."""
    top = reduce(Real.__mul__, factors) if factors else Real.of(torch.ones(1, dtype=torch.float64, device=divisors[0].high.device))
    few = top.low is None and top.extent is not None and top.extent.bits <= 24 and top.extent.fits
    return Real(top.high / divisors[0].high) if few and len(divisors) == 1 and _single(divisors[0]) is not None else None


# ---------------------------------------------------------------- a rounding for each step


def rounded(t: QuantizedTensor, step: torch.dtype, dtype: torch.dtype, *, by_factor: bool = False) -> Tensor | None:
    """``t.evaluate_in(step, by_factor=by_factor).to(dtype)``, or None."""
    if step not in _DIGITS or dtype not in _DIGITS or (by_factor and step != torch.float32):
        return None
    runs = _runs(t)
    if runs is None:
        return None
    table = runs.table
    if table is not None:
        table = round_once(Real(table), step).to(torch.float32)
        if runs.zero is not None and not _same(table, runs.table):  # type: ignore[arg-type]
            return None
    centred = _centring(runs, step)
    factors = _factors(runs, step, by_factor, t.codes.device)
    if centred is None or factors is None:
        return None
    zero = None if runs.zero is None else runs.zero.high.to(torch.float32)
    offset = None if runs.offset is None else _rounded_plane(runs.offset, step)
    return _rounded_rows(runs, (table, zero, factors, offset), centred, step, dtype).reshape(t.shape)


def _centring(runs: _Runs, step: torch.dtype) -> bool | None:
    """Whether differences to the zero points need rounding; None where a float32 operation might round them otherwise."""
    if runs.zero is None:
        return False
    zero = _single(runs.zero)
    if zero is None:
        return None
    if step == torch.float32:
        return False
    low, high = runs.ends
    most = 1 << _DIGITS[step]
    least, largest = (float(end) for end in zero.aminmax())
    if runs.table is None and high - least <= most and largest - low <= most and bool((zero == zero.round()).all()):
        return False
    return True if _same(zero.to(step), zero) else None


def _factors(runs: _Runs, step: torch.dtype, by_factor: bool, device: torch.device) -> list[Tensor] | None:
    if by_factor:
        found = [None if inverse else _single(scale) for scale, inverse in runs.scales]
        return None if any(plane is None for plane in found) else [plane for plane in found if plane is not None]
    if not runs.scales:
        return []
    factors, divisors = ([scale for scale, inverse in runs.scales if inverse == divides] for divides in (False, True))
    if not divisors:
        return [_rounded_plane(reduce(Real.__mul__, factors), step)]
    one = Real.of(torch.ones((), dtype=torch.float64, device=device))
    quick = _quotient(factors, divisors)
    return [_rounded_plane(product(one, runs.scales) if quick is None else quick, step)]


_Planes = tuple[Tensor | None, Tensor | None, list[Tensor], Tensor | None]


def _rounded_rows(runs: _Runs, planes: _Planes, centred: bool, step: torch.dtype, dtype: torch.dtype) -> Tensor:
    loops = _loops(runs.codes)
    if loops is not None:
        table, zero, factors, offset = _arrays(runs, planes, torch.float32)
        place = _PLACES[step], _PLACES[dtype]
        return _filled(runs, dtype, lambda c, out: loops.rounded_rows(c, table, zero, factors, offset, runs.width, centred, *place, out))
    table_, zero_, factors_, offset_ = planes

    def some(rows: slice) -> Tensor:
        def keep(w: Tensor) -> Tensor:
            return w if step == torch.float32 else w.to(step).to(torch.float32)

        w = _spelled(runs, rows, table_, torch.float32)
        if zero_ is not None:
            w = keep(w - zero_[rows].unsqueeze(-1))
        for factor in factors_:
            w = keep(w * factor[rows].unsqueeze(-1))
        return w if offset_ is None else keep(w + offset_[rows].unsqueeze(-1))

    return _in_pieces(runs, dtype, lambda rows: some(rows).to(dtype))


# ---------------------------------------------------------------- no rounding but the last


def exact(t: QuantizedTensor, dtype: torch.dtype) -> Tensor | None:
    """``round_once(t.real(), dtype)``, or None."""
    runs = _runs(t) if dtype in _PLACES else None
    if runs is None:
        return None
    divisors = [scale for scale, inverse in runs.scales if inverse]
    factors = [scale for scale, inverse in runs.scales if not inverse]
    planes = [p for p in (runs.zero, *factors, *divisors, runs.offset) if p is not None]
    if len(divisors) > 1 or (divisors and (runs.offset is not None or dtype == torch.float64)) or any(p.low is not None for p in planes):
        return None
    extents = _extents(runs, factors)
    if extents is None:
        return None
    highs = (runs.table, None if runs.zero is None else runs.zero.high, [f.high for f in factors])
    offset = None if runs.offset is None else runs.offset.high
    if divisors:  # of numbers of 24 bits: no quotient is nearer than 2^-50 to a tie that it is not
        if extents[-1].bits > 24 or not extents[-1].fits or _single(divisors[0]) is None:
            return None
        return _exact_rows(runs, (*highs, None), divisors[0].high, dtype).reshape(t.shape)
    certain = extents[:-1] if dtype == torch.float32 else extents  # the last may round, if that is the only rounding
    if dtype != torch.float64 and all(_in_single(extent) for extent in certain) and all(_single(p) is not None for p in planes):
        table, zero, scales, added = (*highs, offset)
        singles = (_to_single(table), _to_single(zero), [s.to(torch.float32) for s in scales], _to_single(added))
        return _rounded_rows(runs, singles, False, torch.float32, dtype).reshape(t.shape)
    if not all(extent.fits for extent in extents):
        return None
    return _exact_rows(runs, (*highs, offset), None, dtype).reshape(t.shape)


def single(t: QuantizedTensor) -> Tensor | None:
    """Every weight as a float32 that it is by the extents of what it is made of; None for other tensors."""
    runs = _runs(t)
    if runs is None or any(inverse for _, inverse in runs.scales):
        return None
    factors = [scale for scale, _ in runs.scales]
    singles = [_single(p) for p in (runs.zero, *factors, runs.offset) if p is not None]
    table = None if runs.table is None else _single(Real.of(runs.table))
    if any(plane is None for plane in singles) or (table is None and runs.table is not None):
        return None
    if singles:
        extents = _extents(runs, factors)
        if extents is None or not all(_in_single(extent) for extent in extents):
            return None
    zero, offset = (None if p is None else _single(p) for p in (runs.zero, runs.offset))
    planes = (table, zero, [f.high.to(torch.float32) for f in factors], offset)
    return _rounded_rows(runs, planes, False, torch.float32, torch.float32).reshape(t.shape)


def _to_single(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(torch.float32)


def _in_single(extent: Extent) -> bool:
    return extent.bits <= 24 and extent.unit >= -149 and extent.top <= 127


def _extents(runs: _Runs, factors: list[Real]) -> list[Extent] | None:
    """The extents of the values and of the result after each step, measured unless all are in float32; None where one is not known."""
    extent = runs.extent()
    steps = [(runs.zero, Extent.plus), *((factor, Extent.times) for factor in factors), (runs.offset, Extent.plus)]
    planes = [(real, grow) for real, grow in steps if real is not None]
    if extent is None or any(real.extent is None for real, _ in planes):
        return None

    def grown(others: list[Extent | None]) -> list[Extent]:
        found = [extent]
        for other, (_, grow) in zip(others, planes, strict=True):
            assert other is not None
            found.append(grow(found[-1], other))
        return found

    quick = grown([real.extent for real, _ in planes])
    return quick if all(_in_single(e) for e in quick) else grown([real.measured().extent for real, _ in planes])


def _exact_rows(runs: _Runs, planes: _Planes, divisor: Tensor | None, dtype: torch.dtype) -> Tensor:
    loops = _loops(runs.codes)
    if loops is not None:
        table, zero, factors, offset = _arrays(runs, planes, torch.float64)
        by = _array(divisor, torch.float64)
        return _filled(runs, dtype, lambda c, out: loops.exact_rows(c, table, zero, factors, by, offset, runs.width, _PLACES[dtype], out))
    table_, zero_, factors_, offset_ = planes

    def some(rows: slice) -> Tensor:
        w = _spelled(runs, rows, table_, torch.float64)
        w = w if zero_ is None else w - zero_[rows].unsqueeze(-1)
        for factor in factors_:
            w = w * factor[rows].unsqueeze(-1)
        w = w if divisor is None else w / divisor[rows].unsqueeze(-1)
        return w if offset_ is None else w + offset_[rows].unsqueeze(-1)

    return _in_pieces(runs, dtype, lambda rows: round_once(Real(some(rows)), dtype))


# ---------------------------------------------------------------- rows by a loop, or by torch


def _loops(codes: Tensor) -> Any:
    return find("steps") if codes.device.type == "cpu" else None


def _array(plane: Tensor | None, dtype: torch.dtype) -> Any:
    """A plane for the loops, NaN with the usual bits; one of no rows stands for none."""
    if plane is None:
        return torch.empty((0, 1), dtype=dtype).numpy()
    values = plane.to(dtype)
    return torch.where(values == values, values, torch.nan).contiguous().numpy()


def _arrays(runs: _Runs, planes: _Planes, dtype: torch.dtype) -> tuple[Any, Any, Any, Any]:
    table, zero, factors, offset = planes
    entries = torch.empty(0, dtype=dtype) if table is None else table.to(dtype)
    stacked = torch.stack(factors) if factors else torch.empty((0, 1, 1))
    return entries.numpy(), _array(zero, dtype), _array(stacked, dtype), _array(offset, dtype)


def _filled(runs: _Runs, dtype: torch.dtype, loop: Callable[[Any, Any], None]) -> Tensor:
    """(rows, K) of ``dtype`` filled by a loop; numpy's memory is on huge pages, unlike torch's."""
    import numpy as np

    word = {2: np.uint16, 4: np.uint32, 8: np.float64}[dtype.itemsize]
    out = np.empty(tuple(runs.codes.shape), word)
    loop(runs.codes.numpy(), out)
    words = torch.from_numpy(out if dtype == torch.float64 else out.view(f"i{dtype.itemsize}"))
    made: Tensor = words.view(dtype)
    return made


def _spelled(runs: _Runs, rows: slice, table: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values of some rows, (n, K / width, width)."""
    codes = runs.codes[rows]
    values = codes.to(dtype) if table is None else table.to(dtype).index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
    made: Tensor = values.unflatten(-1, (-1, runs.width))
    return made


def _in_pieces(runs: _Runs, dtype: torch.dtype, some: Callable[[slice], Tensor]) -> Tensor:
    """(rows, K) of ``dtype``, a few rows at a time so that they stay in a core's cache."""
    rows, k = runs.codes.shape
    out = torch.empty((rows, k), dtype=dtype, device=runs.codes.device)
    step = max(1, _CACHED // k)
    for at in range(0, rows, step):
        out[at : at + step] = some(slice(at, at + step)).flatten(-2)
    return out
