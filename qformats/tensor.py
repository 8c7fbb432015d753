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
from qformats.loops import find
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
            return Real.of(self.values.evaluate_in(self.rounded_to))
        return self.values.real()

    def spec(self) -> ParamSpec:
        if isinstance(self.values, QuantizedTensor):
            return ParamSpec("codes", self.block, self.inverse, nested=self.values.scheme)
        only = float(self.values.reshape(-1)[0]) if self.values.numel() == 1 else None
        return ParamSpec(str(self.values.dtype).removeprefix("torch."), self.block, self.inverse, constant=only)

    def with_values(self, values: Tensor | QuantizedTensor) -> Param:
        return replace(self, values=values)


_STEP = 1 << 17  # weights evaluated at once: they stay in a core's cache


def _run_plane(param: Param, shape: tuple[int, ...]) -> tuple[Tensor, int] | None:
    """A plain plane on runs of one row and the runs' width; None for any other block."""
    if isinstance(param.values, QuantizedTensor) or not isinstance(param.block, Tile):
        return None
    width = min(param.block.sizes[-1], shape[-1])
    single = param.values.numel() == 1
    if single or (all(size == 1 for size in param.block.sizes[:-1]) and shape[-1] % width == 0):
        return param.values, shape[-1] if single else width
    return None


def _spread_runs(plane: Tensor, width: int, shape: tuple[int, ...]) -> Tensor:
    return plane if plane.numel() == 1 else plane.repeat_interleave(width, -1) if width > 1 else plane


_CACHED = 1 << 17  # weights that are worked on at a time


def _each_run(w: Tensor, plane: tuple[Tensor, int], start: int, change: Any) -> None:
    """``change`` the rows ``w`` from ``start`` on in place by a plane of one number a run."""
    values, width = plane
    if values.numel() > 1:
        values = values[start : start + len(w)].to(w.dtype)
        change(w.view(len(w), -1, width), values.unsqueeze(-1))
    else:
        change(w, values.reshape(()).to(w.dtype))


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
    "mlx": Order(None),
    "aqlm": Order(None),
    "quanto": Order(None),
    "torchao": Order(None),
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
            return Real.of(values).map(lambda v: v[_index(self.codes, len(values), wrap=256)])
        entries = grids.table_values(self.grid.name).to(self.codes.device)  # (entries,) or (entries, v_in)
        return Real.of(entries).map(lambda v: v[_index(self.codes, len(entries), wrap=0)].reshape(self.shape))

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
            made = self._decoded(dtype)
            if made is not None:
                return made
            plain = self._from_entries(torch.float64) if self._half_entries() else self._affine_in_float64()
            return round_once(self.real() if plain is None else Real(plain), dtype)
        order = ORDERS.get(like)
        if order is None:
            raise Unsupported("like", f"no rounding order is known for {like!r}", hint=f"use one of {', '.join(sorted(ORDERS))}")
        step = self._scale_dtype() if order.dtype is None else order.dtype
        plain = self._runs_in(step, dtype)
        if plain is not None:
            return plain
        return self.evaluate_in(step, by_factor=order.by_factor).to(dtype)

    def _runs_in(self, step: torch.dtype, dtype: torch.dtype) -> Tensor | None:
        """``evaluate_in(step).to(dtype)`` of bytes under one scale for each run of a row, a few rows at a time so that they stay in cache.

        None for any other form. Differences of two bytes are exact in every ``step``.
        """
        scale = _run_plane(self.scales[0], self.shape) if len(self.scales) == 1 and not self.scales[0].inverse else None
        zero = None if self.zero_point is None else _run_plane(self.zero_point, self.shape)
        small = isinstance(self.grid, Float) and step == torch.float32 and self.codes.dtype == torch.uint8
        float8 = self.grid.name if small and isinstance(self.grid, Float) and self.grid.name in ("e4m3fn", "e5m2") else None
        bytes_ = isinstance(self.grid, Integer) and self.codes.dtype in (torch.int8, torch.uint8)
        plain = self.signs is None and self.group_index is None and self.offset is None and len(self.shape) == 2
        if scale is None or not plain or not (bytes_ or float8) or (self.zero_point is not None and (zero is None or bool(float8))):
            return None
        if zero is not None and zero[0].dtype not in (torch.int8, torch.uint8):
            return None
        codes, out = self.codes, torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        table = None if float8 is None else grids.float_values(float8).to(codes.device, torch.float32)
        wide = torch.float64 if step == torch.float64 else torch.float32  # products of a byte and a half are exact in float32
        rows = max(1, _CACHED // max(1, self.shape[1]))
        for start in range(0, self.shape[0], rows):
            part = codes[start : start + rows]
            w = part.to(wide) if table is None else table.index_select(0, part.reshape(-1).to(torch.int32)).view(part.shape)
            if zero is not None:
                _each_run(w, zero, start, torch.Tensor.sub_)
            _each_run(w, scale, start, torch.Tensor.mul_)
            out[start : start + rows] = w if dtype == step or step == wide else w.to(step)
        return out

    def _scale_dtype(self) -> torch.dtype:
        """The dtype in which the owner multiplies: the widest of the scales, float32 where one is codes and rounded to no dtype."""
        plain = [s.values.dtype for s in self.scales if isinstance(s.values, Tensor) and s.values.dtype.is_floating_point]
        plain += [s.rounded_to for s in self.scales if s.rounded_to is not None]
        nested = any(isinstance(s.values, QuantizedTensor) and s.rounded_to is None for s in self.scales)
        return torch.float32 if nested or not plain else max(plain, key=lambda d: torch.finfo(d).bits)

    def _affine_in_float64(self) -> Tensor | None:
        """Every weight in float64 where that is known to be exact: codes, integer zero points and half-precision scales on runs of a row.

        A product has at most 9 + 11 significant bits down to 2^-24, an offset 11 bits, so their sum fits 53 bits.
        """
        if not isinstance(self.grid, Integer) or self.signs is not None or self.group_index is not None or len(self.scales) != 1:
            return None
        planes = [_run_plane(p, self.shape) for _, p in self.params()]
        if any(plane is None for plane in planes) or self.scales[0].inverse:
            return None
        half = (torch.float16,)
        if self.scales[0].values.dtype not in half or (self.offset is not None and self.offset.values.dtype not in half):  # type: ignore[union-attr]
            return None
        if self.zero_point is not None and self.zero_point.values.dtype.is_floating_point:  # type: ignore[union-attr]
            return None
        spread = [_spread_runs(plane, width, self.shape) for plane, width in planes]  # type: ignore[misc]
        scale, rest = spread[0], spread[1:]
        w = self.codes.to(torch.float32)
        if self.zero_point is not None:
            w = w - rest.pop(0).to(torch.float32)
        w = (w * scale.to(torch.float32)).to(torch.float64)  # 20 significant bits: exact in float32 too
        return w if self.offset is None else w + rest.pop(0).to(torch.float64)

    def _in_steps(self, dtype: torch.dtype) -> Tensor | None:
        """``evaluate_in`` by torch's own operations, which round as it does: integer codes and parameters of ``dtype`` on runs of a row.

        Whole zero points are at most 256, so that their difference to a code is exact in any float type. None for every other form.
        """
        if not isinstance(self.grid, Integer) or self.signs is not None or self.group_index is not None or len(self.scales) != 1:
            return None
        planes = {name: _run_plane(param, self.shape) for name, param in self.params()}
        if len(self.shape) != 2 or self.scales[0].inverse or dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return None
        for name, plane in planes.items():
            whole_zero = plane is not None and name == "zero_point" and not plane[0].is_floating_point()
            if plane is None or not (plane[0].dtype == dtype or (whole_zero and int(plane[0].abs().max()) <= 256)):
                return None
        widths = {plane[1] for plane in planes.values() if plane is not None and plane[0].numel() > 1}
        width = widths.pop() if widths else self.shape[-1]
        if widths or self.grid.bits > 8:
            return None
        values = {name: plane[0].to(dtype).unsqueeze(-1) for name, plane in planes.items() if plane is not None}
        if 2 << self.grid.bits < width and self.codes.dtype == torch.uint8 and self.codes.is_contiguous():
            table = self._group_table(values, width, dtype)
            if (spelled := _spelled(self.codes.reshape(-1, width), table)) is not None:
                return spelled.reshape(self.shape)
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        step = max(1, _STEP // self.shape[-1])
        for at in range(0, self.shape[0], step):
            rows = slice(at, at + step)
            w = out[rows].unflatten(-1, (-1, width))
            w.copy_(self.codes[rows].unflatten(-1, (-1, width)))
            for name, apply in (("zero_point", w.sub_), ("scale", w.mul_), ("offset", w.add_)):
                if name in values:
                    apply(values[name] if values[name].shape[0] == 1 else values[name][rows])
        return out

    def _group_table(self, values: dict[str, Tensor], width: int, dtype: torch.dtype) -> Tensor:
        """What each code stands for in each group of ``width`` columns, (groups, codes): in float32, each step rounded to ``dtype``."""
        assert isinstance(self.grid, Integer)
        groups, step = self.codes.numel() // width, _STEP >> self.grid.bits
        entries = torch.arange(1 << self.grid.bits, device=self.codes.device).to(torch.float32)
        columns = {name: plane.reshape(-1, 1).to(torch.float32).expand(groups, 1) for name, plane in values.items()}
        table = torch.empty(groups, len(entries), dtype=dtype, device=self.codes.device)
        for at in range(0, groups, step):
            rows = slice(at, at + step)
            part = entries.expand(len(table[rows]), -1).clone()
            for name, apply in (("zero_point", part.sub_), ("scale", part.mul_), ("offset", part.add_)):
                if name in columns:
                    apply(columns[name][rows])
                    part.copy_(part.to(dtype))
            table[rows] = part
        return table
    def _in_runs(self, dtype: torch.dtype) -> Tensor | None:
        """``evaluate_in`` without float64 where each step is one operation of ``dtype``: one plain scale of that dtype on runs of a row.

        Codes of up to eight bits, e4m3fn values and differences of integers of up to 256 are exact in every float dtype.
        """
        integers = isinstance(self.grid, Integer) and self.grid.bits <= 8 and self.codes.dtype != torch.int16
        if not integers and not (self.grid == Float("e4m3fn") and self.codes.dtype == torch.uint8 and self.zero_point is None):
            return None
        if self.signs is not None or self.group_index is not None or self.offset is not None or len(self.scales) != 1:
            return None
        planes = [_run_plane(param, self.shape) for _, param in self.params()]
        if self.scales[0].inverse or any(plane is None for plane in planes) or self.scales[0].values.dtype != dtype:  # type: ignore[union-attr]
            return None
        if self.zero_point is not None and self.zero_point.values.dtype not in (torch.uint8, torch.int8, torch.int16):  # type: ignore[union-attr]
            return None
        w = (self.codes if integers else self.codes.contiguous().view(torch.float8_e4m3fn)).to(dtype)
        for at, (plane, width) in reversed(list(enumerate(planes))):  # type: ignore[misc]
            values = plane.to(dtype)
            if at and int(plane.to(torch.int32).abs().max()) > 256:
                return None
            if plane.numel() == 1:
                w = w - values if at else w * values
            else:
                runs = w.unflatten(-1, (-1, width))
                w = (runs - values.unsqueeze(-1) if at else runs * values.unsqueeze(-1)).flatten(-2)
        return w

    def _half_entries(self) -> bool:
        """Whether float64 holds every weight exactly: up to four half-precision entries under half-precision scales of rows.

        Entries and their sums are multiples of 2^-24 below 2^18, 42 bits, and a scale has 11.
        """
        return self._plain_entries(torch.float16) and isinstance(self.grid, Learned) and self.grid.books <= 4

    def _plain_entries(self, dtype: torch.dtype) -> bool:
        """Whether it is entries of ``dtype`` under one scale of that dtype for each row of codes, and nothing else."""
        if not isinstance(self.grid, Learned) or self.codebook is None or len(self.scales) != 1 or len(self.shape) != 2:
            return False
        scale, rest = self.scales[0], (self.zero_point, self.offset, self.signs, self.group_index)
        rows = isinstance(scale.block, Tile) and scale.block.sizes == (self.grid.v_out, self.shape[-1]) and not scale.inverse
        held = isinstance(scale.values, Tensor) and scale.values.dtype == self.codebook.dtype == dtype
        return rows and held and all(part is None for part in rest)

    def _from_entries(self, dtype: torch.dtype) -> Tensor:
        """Sum and product in ``dtype``, of a tensor of ``_plain_entries``."""
        grid, book, scale = self.grid, self.codebook, self.scales[0].values
        assert isinstance(grid, Learned) and book is not None and isinstance(scale, Tensor)
        flat = book.to(dtype).reshape(grid.books, grid.entries, -1)
        total: Tensor | None = None
        for number in range(grid.books):
            index = _index(self.codes[..., number], grid.entries, wrap=grid.entries)
            picked = flat[number].index_select(0, index.reshape(-1))  # (N/vo * K/vi, vo * vi)
            total = picked if total is None else total.add_(picked)
        assert total is not None
        total = total.reshape(len(self.codes), -1).mul_(scale.to(dtype))  # (N/vo, K * vo)
        return total.reshape(len(self.codes), -1, grid.v_out, grid.v_in).transpose(1, 2).reshape(self.shape)

    def _decoded(self, dtype: torch.dtype) -> Tensor | None:
        """``_from_entries`` in float64, rounded once to a shorter dtype by the compiled loop; None where that is not for it."""
        loops, short = find("entries"), dtype in (torch.float32, torch.float16, torch.bfloat16)
        if loops is None or not short or self.codes.device.type != "cpu" or not self._half_entries():
            return None
        grid, book, scale = self.grid, self.codebook, self.scales[0].values
        assert isinstance(grid, Learned) and book is not None and isinstance(scale, Tensor)
        _check_index(self.codes, grid.entries, wrap=grid.entries)
        books = book.to(torch.float32).reshape(grid.books, grid.entries, -1).contiguous().numpy()
        out = torch.empty(self.shape, dtype=torch.float32)
        factors, odd = scale.to(torch.float64).reshape(-1).numpy(), dtype != torch.float32
        loops.decode(self.codes.contiguous().numpy(), books, factors, grid.v_out, odd, out.numpy())
        return out.to(dtype)

    def evaluate_in(self, dtype: torch.dtype, *, by_factor: bool = False) -> Tensor:
        """The formula step by step in ``dtype``: the difference, the factors' product, their product and the sum are each rounded.

        With ``by_factor`` the factors are applied one after the other, each product rounded.
        """
        if by_factor:
            w = round_once(self._centred(), dtype)
            for factor in self.scales:
                w = round_once(product(Real.of(w), ((self._spread(factor), factor.inverse),)), dtype)
            return w if self.offset is None else w + round_once(self._spread(self.offset), dtype)
        stepped = self._in_steps(dtype)
        if stepped is not None:
            return stepped
        quick = self._in_runs(dtype)
        if quick is not None:
            return quick
        if isinstance(self.grid, Learned) and self.grid.books <= 2 and self._plain_entries(dtype):
            return self._from_entries(dtype)  # a sum of two is rounded once
        one = Real.of(torch.ones((), dtype=torch.float64, device=self.codes.device))
        scale = product(one, ((self._spread(factor), factor.inverse) for factor in self.scales))
        w = round_once(self._centred(), dtype) * round_once(scale, dtype)
        return w if self.offset is None else w + round_once(self._spread(self.offset), dtype)


def _spelled(codes: Tensor, table: Tensor) -> Tensor | None:
    """``table.gather(1, codes)`` by the compiled loop; None where there is no numba, or the tensors are not on a CPU."""
    try:
        from qformats.loops.lookup import spell
    except ImportError:
        return None
    if codes.device.type != "cpu":
        return None
    word = torch.int16 if table.element_size() == 2 else torch.int32
    out = torch.empty(codes.shape, dtype=table.dtype)
    spell(codes.numpy(), table.view(word).numpy(), out.view(word).numpy())
    return out


def _codes_shape(shape: tuple[int, ...], grid: Grid) -> tuple[int, ...]:
    v_in = grid.v_in if isinstance(grid, Table | Learned) else 1
    v_out = grid.v_out if isinstance(grid, Learned) else 1
    *lead, n, k = (1, *shape)
    if n % v_out or k % v_in:
        raise BadFile("codes-shape", f"a weight of shape {shape} is not made of whole {v_out} x {v_in} codebook entries")
    rows = (*lead, n // v_out)[1:]
    return (*rows, k // v_in, grid.books) if isinstance(grid, Learned) else (*rows, k // v_in)


def _check_index(codes: Tensor, entries: int, wrap: int) -> None:
    """``BadFile('codes-range')`` where a code, a negative one plus ``wrap``, names no entry."""
    if codes.numel():
        low, high = int(codes.min()), int(codes.max())
        if high >= entries or (low < 0 and not 0 <= low + wrap < entries):
            raise BadFile("codes-range", f"codes run over {low} … {high} but the grid has {entries} entries")


def _index(codes: Tensor, entries: int, wrap: int) -> Tensor:
    """Codes as int64 indices, negative ones plus ``wrap``; ``BadFile('codes-range')`` where one names no entry."""
    _check_index(codes, entries, wrap)
    index = codes.to(torch.int64)
    return torch.where(index < 0, index + wrap, index) if codes.dtype != torch.uint8 else index


def _book_values(codes: Tensor, codebook: Tensor | None, grid: Learned, shape: tuple[int, ...]) -> Real:
    if codebook is None:
        raise BadFile("codebook", "a learned grid needs its codebook")
    total: Real | None = None
    for book in range(grid.books):
        index = _index(codes[..., book], grid.entries, wrap=grid.entries)
        picked = codebook[book].to(torch.float64)[index]  # (..., N/vo, K/vi, vo, vi)
        spread = Real(picked.transpose(-2, -3).reshape(shape))
        total = spread if total is None else total + spread
    assert total is not None
    return total


def _unpack_signs(signs: Tensor, k: int) -> Tensor:
    bits = (signs.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=signs.device)) & 1
    return bits.flatten(-2)[..., :k].bool()
