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

from qformats import entries as learned
from qformats import grids, steps
from qformats.entries import index_of
from qformats.errors import BadFile, Unsupported
from qformats.real import Real, product, round_once
from qformats.scheme import Block, Cyclic, Flat, Float, Grid, Integer, Learned, ParamSpec, Scheme, Table, Tile, whole

__all__ = ["ORDERS", "ActivationScheme", "Order", "Param", "QuantizedTensor", "constant"]


@dataclass(frozen=True, eq=False)
class Param:
    """One parameter plane.

    ``values``: a tensor (stored dtype kept bit for bit) or a ``QuantizedTensor`` where the parameter itself is stored as codes,
    of shape ``block.counts(shape)``. ``inverse``: the stored number divides. ``rounded_to``: the owner defines the parameter as
    the nested value evaluated in that dtype, each product and sum rounded (bitsandbytes 0.50 ``dequantize_blockwise`` then
    ``+ offset`` in float32; hqq 0.2.8 ``Quantizer.dequantize`` of a quantized scale in its compute dtype).
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
            return Real.of(self.values.stepped(self.rounded_to))
        return self.values.real()

    def spec(self) -> ParamSpec:
        if isinstance(self.values, QuantizedTensor):
            return ParamSpec("codes", self.block, self.inverse, nested=self.values.scheme)
        only = float(self.values.reshape(-1)[0]) if self.values.numel() == 1 else None
        return ParamSpec(str(self.values.dtype).removeprefix("torch."), self.block, self.inverse, constant=only)

    def with_values(self, values: Tensor | QuantizedTensor) -> Param:
        return replace(self, values=values)


@dataclass(frozen=True, slots=True)
class Order:
    """How an owner rounds: every step in ``dtype`` (None: in that of the scales), the factors one after the other if ``by_factor``."""

    dtype: torch.dtype | None
    by_factor: bool = False


# Sources: ggml-quants.c (float32 product, then float32 sum); GPTQModel 7.7 ``TorchLinear`` and AutoAWQ 0.2.9 ``dequantize_gemm`` (half);
# bitsandbytes 0.50.2 ``dequantize_4bit`` and ``int8_vectorwise_dequant``; hqq 0.2.8 ``Quantizer.dequantize``; optimum-quanto 0.2.7
# ``QBytesTensor`` and ``QBitsTensor``; compressed-tensors 0.20 ``lifecycle/forward_helpers``; torchao 0.18 ``dequantize`` of its tensors;
# transformers 5.23 ``Fp8Dequantize``; ModelOpt 0.47 ``NVFP4QTensor.dequantize``; mlx 0.32 ``dequantize``; aqlm 1.1.7
# ``_dequantize_weight``
ORDERS = {
    "ggml": Order(torch.float32),
    "gptqmodel": Order(torch.float16),
    "autoawq": Order(torch.float16),
    "bitsandbytes": Order(torch.float32, by_factor=True),
    "compressed-tensors": Order(None),
    "hqq": Order(None),
    "quanto": Order(None),
    "torchao": Order(None),
    "mlx": Order(None),
    "aqlm": Order(None),
    "transformers": Order(torch.float32),
    "modelopt": Order(torch.float32),
}


def constant(value: int | float, shape: tuple[int, ...], dtype: torch.dtype = torch.int16) -> Param:
    """A parameter that is one number for the whole tensor of ``shape``."""
    return Param(torch.full((1,) * len(shape), value, dtype=dtype), whole(shape))


def expand(values: Tensor, block: Block, shape: tuple[int, ...], group_index: Tensor | None = None) -> Tensor:
    """Spread a parameter's values over every element of ``shape``.

    ``group_index`` (K,) or (E, K) replaces the last tile size, except where that size is 1 (a factor for each column).
    """
    if isinstance(block, Flat):
        return values.reshape(-1).repeat_interleave(block.n)[: prod(shape)].reshape(shape)
    if isinstance(block, Cyclic):
        return values.reshape(-1).repeat(-(-prod(shape) // block.count))[: prod(shape)].reshape(shape)
    for axis, (size, length) in enumerate(zip(block.sizes, shape, strict=True)):
        if axis == len(shape) - 1 and group_index is not None and values.shape[axis] > 1 and size > 1:
            values = _gather_groups(values, group_index)
        elif values.shape[axis] == 1:
            values = values.expand(*values.shape[:axis], length, *values.shape[axis + 1 :])
        elif size > 1:
            values = values.repeat_interleave(size, axis).narrow(axis, 0, length)
    return values


def _gather_groups(values: Tensor, group_index: Tensor) -> Tensor:
    index = group_index.to(torch.int64)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < values.shape[-1]:
        found = f"{int(index.min())} … {int(index.max())}"
        raise BadFile("group-index", f"group indices run over {found}, expected 0 … {values.shape[-1] - 1}")
    if index.ndim == 1:
        return values.index_select(-1, index)
    return torch.stack([plane.index_select(-1, row) for plane, row in zip(values, index, strict=True)])


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
    - ``codes``: uint8, int8 or int16 in logical order, shape (..., N / v_out, K / v_in[, books]). A negative code of a ``Float`` or
      ``Learned`` grid is the stored bit pattern read as signed.
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
        self._check_planes()
        for name, param in self.params():
            self._check_param(name, param)

    def _check_planes(self) -> None:
        k = self.shape[-1]
        if self.signs is not None and tuple(self.signs.shape) != (*self.shape[:-1], -(-k // 8)):
            raise BadFile("signs-shape", f"signs have shape {tuple(self.signs.shape)}, expected {(*self.shape[:-1], -(-k // 8))}")
        if self.group_index is not None and tuple(self.group_index.shape) not in ((k,), (*self.shape[:-2], k)):
            raise BadFile("group-index", f"the group index has shape {tuple(self.group_index.shape)}, expected {(k,)}")
        if isinstance(self.grid, Learned):
            book = (self.grid.books, self.grid.entries, self.grid.v_out, self.grid.v_in)
            if self.codebook is None or tuple(self.codebook.shape) != book:
                found = None if self.codebook is None else tuple(self.codebook.shape)
                raise BadFile("codebook", f"the codebook has shape {found}, expected {book}")

    def _check_param(self, name: str, param: Param) -> None:
        counts = param.block.counts(self.shape)
        found = tuple(param.values.shape)
        grouped = isinstance(param.block, Tile) and len(found) == len(counts) and param.block.sizes[-1] > 1
        if self.group_index is not None and grouped:
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
        if isinstance(self.grid, Float):
            values = grids.float_values(self.grid.name).to(self.codes.device)
            return Real.of(values).map(lambda v: v[index_of(self.codes, len(values), wrap=256)])
        entries = grids.table_values(self.grid.name).to(self.codes.device)  # (entries,) or (entries, v_in)
        return Real.of(entries).map(lambda v: v[index_of(self.codes, len(entries), wrap=0)].reshape(self.shape))

    def _centred(self) -> Real:
        """sign * (sum of the codes' values - zero_point), shape ``shape``."""
        w = self.grid_values()
        if self.zero_point is not None:
            w = w + -self._spread(self.zero_point)
        if self.signs is not None:
            negative = _unpack_signs(self.signs, self.shape[-1])
            w = w.map(lambda v: torch.where(negative, -v, v))
        return w

    def real(self) -> Real:
        """Every weight as an exact double-double value, shape ``shape``."""
        w = product(self._centred(), ((self._spread(scale), scale.inverse) for scale in self.scales))
        return w if self.offset is None else w + self._spread(self.offset)

    def dequantize(self, dtype: torch.dtype = torch.float32, *, like: str | None = None) -> Tensor:
        """The exact value rounded once to ``dtype``, shape ``shape``.

        ``like`` instead reproduces an owner's own order of rounding (``ORDERS``); ``Unsupported('like')`` for other names.
        """
        if like is None:
            made = (learned.exact if isinstance(self.grid, Learned) else steps.exact)(self, dtype)
            return round_once(self.real(), dtype) if made is None else made
        order = ORDERS.get(like)
        if order is None:
            raise Unsupported("like", f"no rounding order is known for {like!r}", hint=f"use one of {', '.join(sorted(ORDERS))}")
        step = self._scale_dtype() if order.dtype is None else order.dtype
        return self.stepped(step, by_factor=order.by_factor, dtype=dtype)

    def stepped(self, step: torch.dtype, *, by_factor: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """``evaluate_in(step, by_factor=by_factor)``, then rounded to ``dtype``; without float64 where that gives the same."""
        if isinstance(self.grid, Learned) and (found := learned.rounded(self, step)) is not None:
            return found.to(dtype or step)
        made = steps.rounded(self, step, dtype or step, by_factor=by_factor)
        return self.evaluate_in(step, by_factor=by_factor).to(dtype or step) if made is None else made

    def _scale_dtype(self) -> torch.dtype:
        """The dtype in which the owner multiplies: the widest of the scales, float32 where one is codes and rounded to no dtype."""
        plain = [s.values.dtype for s in self.scales if isinstance(s.values, Tensor) and s.values.dtype.is_floating_point]
        plain += [s.rounded_to for s in self.scales if s.rounded_to is not None]
        nested = any(isinstance(s.values, QuantizedTensor) and s.rounded_to is None for s in self.scales)
        return torch.float32 if nested or not plain else max(plain, key=lambda d: torch.finfo(d).bits)

    def evaluate_in(self, dtype: torch.dtype, *, by_factor: bool = False) -> Tensor:
        """The formula step by step in ``dtype``: the difference, the factors' product, their product and the sum are each rounded.

        With ``by_factor`` the factors are applied one after the other, each product rounded.
        """
        if by_factor:
            w = round_once(self._centred(), dtype)
            for factor in self.scales:
                w = round_once(product(Real.of(w), ((self._spread(factor), factor.inverse),)), dtype)
            return w if self.offset is None else w + round_once(self._spread(self.offset), dtype)
        one = Real.of(torch.ones((), dtype=torch.float64, device=self.codes.device))
        scale = product(one, ((self._spread(factor), factor.inverse) for factor in self.scales))
        w = round_once(self._centred(), dtype) * round_once(scale, dtype)
        return w if self.offset is None else w + round_once(self._spread(self.offset), dtype)


def _codes_shape(shape: tuple[int, ...], grid: Grid) -> tuple[int, ...]:
    v_in = grid.v_in if isinstance(grid, Table | Learned) else 1
    v_out = grid.v_out if isinstance(grid, Learned) else 1
    *lead, n, k = (1, *shape)
    if n % v_out or k % v_in:
        raise BadFile("codes-shape", f"a weight of shape {shape} is not made of whole {v_out} x {v_in} codebook entries")
    rows = (*lead, n // v_out)[1:]
    return (*rows, k // v_in, grid.books) if isinstance(grid, Learned) else (*rows, k // v_in)


def _book_values(codes: Tensor, codebook: Tensor | None, grid: Learned, shape: tuple[int, ...]) -> Real:
    if codebook is None:
        raise BadFile("codebook", "a learned grid needs its codebook")
    total: Real | None = None
    for book in range(grid.books):
        index = index_of(codes[..., book], grid.entries, wrap=grid.entries)
        picked = codebook[book].to(torch.float64)[index]  # (..., N/vo, K/vi, vo, vi)
        spread = Real(picked.transpose(-2, -3).reshape(shape))
        total = spread if total is None else total + spread
    assert total is not None
    return total


def _unpack_signs(signs: Tensor, k: int) -> Tensor:
    bits = (signs.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=signs.device)) & 1
    return bits.flatten(-2)[..., :k].bool()
