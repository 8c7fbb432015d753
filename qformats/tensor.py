"""The canonical quantized tensor: an immutable value whose meaning is real arithmetic, with no rounding anywhere.

    w = offset + prod_j scale_j * sign * (sum_c value_c(codes[..., c]) - zero_point)

Readers make it, exact rewrites (``qformats.rewrite``) change its form and keep its meaning, writers take it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from qformats import grids
from qformats.errors import BadFile, Unsupported
from qformats.real import Real, round_once
from qformats.scheme import Block, Cyclic, Flat, Float, Grid, Integer, Learned, ParamSpec, Scheme, Table, Tile, whole

__all__ = ["ActivationScheme", "Param", "QuantizedTensor", "constant"]


@dataclass(frozen=True, eq=False)
class Param:
    """One parameter plane.

    ``values``: a tensor (stored dtype kept bit for bit) or a ``QuantizedTensor`` where the parameter itself is stored as codes,
    of shape ``block.counts(shape)``. ``inverse``: the stored number divides. ``rounded_to``: the owner defines the parameter as
    that dtype's rounding of the nested value.
    """

    values: Tensor | QuantizedTensor
    block: Block
    inverse: bool = False
    rounded_to: torch.dtype | None = None

    def real(self) -> Real:
        """The stored numbers (not yet inverted), on the parameter's own grid."""
        if not isinstance(self.values, QuantizedTensor):
            return Real.of(self.values)
        if self.rounded_to is not None:
            return Real.of(self.values.dequantize(self.rounded_to))
        return self.values.real()

    def spec(self) -> ParamSpec:
        if isinstance(self.values, QuantizedTensor):
            return ParamSpec("codes", self.block, self.inverse, nested=self.values.scheme)
        only = float(self.values.reshape(-1)[0]) if self.values.numel() == 1 else None
        return ParamSpec(str(self.values.dtype).removeprefix("torch."), self.block, self.inverse, constant=only)

    def with_values(self, values: Tensor | QuantizedTensor) -> Param:
        return replace(self, values=values)


def constant(value: int | float, shape: tuple[int, ...], dtype: torch.dtype = torch.int16) -> Param:
    """A parameter that is one number for the whole tensor of ``shape``."""
    return Param(torch.full((1,) * len(shape), value, dtype=dtype), whole(shape))


def expand(values: Tensor, block: Block, shape: tuple[int, ...], group_index: Tensor | None = None) -> Tensor:
    """Spread a parameter's values over every element of ``shape``; ``group_index`` (K,) or (E, K) replaces the last tile size."""
    if isinstance(block, Flat):
        return values.reshape(-1).repeat_interleave(block.n)[: prod(shape)].reshape(shape)
    if isinstance(block, Cyclic):
        return values.reshape(-1).repeat(-(-prod(shape) // block.count))[: prod(shape)].reshape(shape)
    for axis, (size, length) in enumerate(zip(block.sizes, shape, strict=True)):
        if axis == len(shape) - 1 and group_index is not None and values.shape[axis] > 1:
            values = _gather_groups(values, group_index)
        elif values.shape[axis] == 1:
            values = values.expand(*values.shape[:axis], length, *values.shape[axis + 1 :])
        elif size > 1:
            values = values.repeat_interleave(size, axis).narrow(axis, 0, length)
    return values


def _gather_groups(values: Tensor, group_index: Tensor) -> Tensor:
    index = group_index.to(torch.int64)
    if index.ndim == 1:
        return values.index_select(-1, index)
    return torch.stack([values[min(e, len(values) - 1)].index_select(-1, row) for e, row in enumerate(index)])


@dataclass(frozen=True, eq=False)
class ActivationScheme:
    """How a module's input is quantized: grid, per ``"token" | "tensor" | "group"``, static scales in the module's extras or dynamic."""

    grid: Grid
    granularity: str
    dynamic: bool
    group_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Codes and parameters of one weight.

    - ``shape``: (K,), (N, K) or (E, N, K), K = in_features last.
    - ``codes``: uint8, int8 or int16 in logical order, shape (..., N / v_out, K / v_in[, books]).
    - ``grid``: what a code stands for; ``codebook``: (books, entries, v_out, v_in) where the grid is ``Learned``.
    - ``scales``: factors, each a ``Param``. ``zero_point``: in code units. ``offset``: in weight units.
    - ``signs``: uint8 (..., ceil(K / 8)), bit i of byte j set where element 8 j + i is negative.
    - ``group_index``: int32 (K,) or (E, K); replaces the last tile size of every grouped parameter (act-order).
    - ``source_bytes``: the owner's bytes, valid until the first rewrite.
    """

    shape: tuple[int, ...]
    codes: Tensor
    grid: Grid
    scales: tuple[Param, ...] = ()
    zero_point: Param | None = None
    offset: Param | None = None
    signs: Tensor | None = None
    group_index: Tensor | None = None
    codebook: Tensor | None = None
    source_bytes: Any = None

    def __post_init__(self) -> None:
        expected = _codes_shape(self.shape, self.grid)
        if tuple(self.codes.shape) != expected:
            raise BadFile("codes-shape", f"codes have shape {tuple(self.codes.shape)}, expected {expected}")
        if self.codes.dtype not in (torch.uint8, torch.int8, torch.int16):
            raise BadFile("codes-dtype", f"codes are {self.codes.dtype}, expected uint8, int8 or int16")
        for name, param in self.params():
            self._check_param(name, param)

    def _check_param(self, name: str, param: Param) -> None:
        counts = param.block.counts(self.shape)
        found = tuple(param.values.shape)
        if self.group_index is not None and isinstance(param.block, Tile) and len(found) == len(counts):
            counts = (*counts[:-1], found[-1])
        if found != counts:
            raise BadFile("param-shape", f"{name} has shape {found}, expected {counts} for {param.block} on {self.shape}")

    def params(self) -> list[tuple[str, Param]]:
        """(name, parameter) of all that are there, in formula order."""
        named: list[tuple[str, Param]] = [(f"scale{i}" if i else "scale", s) for i, s in enumerate(self.scales)]
        if self.zero_point is not None:
            named.append(("zero_point", self.zero_point))
        if self.offset is not None:
            named.append(("offset", self.offset))
        return named

    @property
    def scheme(self) -> Scheme:
        return Scheme(
            self.shape,
            self.grid,
            tuple(s.spec() for s in self.scales),
            None if self.zero_point is None else self.zero_point.spec(),
            None if self.offset is None else self.offset.spec(),
            self.signs is not None,
            self.group_index is not None,
        )

    def replace(self, **changes: Any) -> QuantizedTensor:
        """A copy with ``changes``; the owner's bytes are dropped because they no longer describe it."""
        changes.setdefault("source_bytes", None)
        return replace(self, **changes)

    def _spread(self, param: Param) -> Real:
        return param.real().map(lambda v: expand(v, param.block, self.shape, self.group_index))

    def grid_values(self) -> Real:
        """The codes' values before any parameter, shape ``shape``."""
        if isinstance(self.grid, Integer):
            return Real.of(self.codes)
        if isinstance(self.grid, Learned):
            return _book_values(self.codes, self.codebook, self.grid, self.shape)
        index = self.codes.to(torch.int64)
        if isinstance(self.grid, Float):
            return Real.of(grids.float_values(self.grid.name)[index & 0xFF])
        entries = grids.table_values(self.grid.name)  # (entries,) or (entries, v_in)
        return Real.of(entries[index].reshape(self.shape))

    def real(self) -> Real:
        """Every weight as an exact double-double value, shape ``shape``."""
        w = self.grid_values()
        if self.zero_point is not None:
            w = w + -self._spread(self.zero_point)
        if self.signs is not None:
            negative = _unpack_signs(self.signs, self.shape[-1])
            w = w.map(lambda v: torch.where(negative, -v, v))
        for scale in self.scales:
            spread = self._spread(scale)
            w = w.divide(spread) if scale.inverse else w * spread
        return w if self.offset is None else w + self._spread(self.offset)

    def dequantize(self, dtype: torch.dtype = torch.float32, *, like: str | None = None) -> Tensor:
        """The exact value rounded once to ``dtype``, shape ``shape``.

        ``like="ggml"`` instead reproduces ggml's own order of rounding (float32 product, then float32 sum; ggml-quants.c), and
        ``like="gptqmodel"``/``"autoawq"`` the half-precision product ``scale * (q - z)`` of GPTQModel 7.7 ``TorchLinear`` and
        AutoAWQ 0.2.9 ``dequantize_gemm``. ``Unsupported('like')`` for other names.
        """
        if like is None:
            return round_once(self.real(), dtype)
        if like == "ggml":
            return self._product_in(torch.float32).to(dtype)
        if like in ("gptqmodel", "autoawq"):
            return self._product_in(torch.float16).to(dtype)
        raise Unsupported("like", f"no rounding order is known for {like!r}", hint="use ggml, gptqmodel or autoawq")

    def _product_in(self, dtype: torch.dtype) -> Tensor:
        centred = self.grid_values()
        if self.zero_point is not None:
            centred = centred + -self._spread(self.zero_point)
        scale = Real.of(torch.ones((), dtype=torch.float64))
        for factor in self.scales:
            scale = scale * self._spread(factor)
        w = round_once(centred, dtype) * round_once(scale, dtype)
        if self.offset is not None:
            w = w + round_once(self._spread(self.offset), dtype)
        return w


def _codes_shape(shape: tuple[int, ...], grid: Grid) -> tuple[int, ...]:
    if isinstance(grid, Learned):
        *lead, n, k = shape
        return (*lead, n // grid.v_out, k // grid.v_in, grid.books)
    v_in = grid.v_in if isinstance(grid, Table) else 1
    return (*shape[:-1], shape[-1] // v_in)


def _book_values(codes: Tensor, codebook: Tensor | None, grid: Learned, shape: tuple[int, ...]) -> Real:
    if codebook is None:
        raise BadFile("codebook", "a learned grid needs its codebook")
    total: Real | None = None
    for book in range(grid.books):
        picked = codebook[book].to(torch.float64)[codes[..., book].to(torch.int64) & 0xFFFF]  # (..., N/vo, K/vi, vo, vi)
        spread = Real(picked.transpose(-2, -3).reshape(shape))
        total = spread if total is None else total + spread
    assert total is not None
    return total


def _unpack_signs(signs: Tensor, k: int) -> Tensor:
    bits = (signs.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(-2)[..., :k].bool()
