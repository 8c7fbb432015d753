"""From a canonical tensor to the planes that kernels read, and back, without losing a bit; and any rows of it as a canonical tensor.

What the planes are is said in ``qformats.kernels.layout``; they hold what the checkpoint holds, rearranged: no scale is folded or cast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod

import torch
from torch import Tensor

from qformats.errors import Unsupported
from qformats.kernels import packing
from qformats.kernels.layout import Layout, ParamLayout, widths
from qformats.scheme import Block, Flat, Grid, Integer, Learned, Table, Tile, whole
from qformats.tensor import Param, QuantizedTensor

__all__ = ["Lowered", "evaluated", "lower", "nested", "raised"]


@dataclass(frozen=True)
class Lowered:
    """A weight as planes. ``planes``: by the names of ``Layout``, in a fixed order, all on one device."""

    layout: Layout
    planes: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes.values())

    @cached_property
    def _codes(self) -> list[Tensor]:
        return [self.planes[f"codes{i}"] for i in range(len(widths(self.layout.bits)))]

    def tensor(self, rows: slice | Tensor = slice(None)) -> QuantizedTensor:
        """Some rows, (n, K), as a canonical tensor: a slice of step 1, or any rows by an int64 index (n,)."""
        layout, k = self.layout, self.layout.columns
        at = torch.arange(layout.rows, device=self._codes[0].device)[rows] if isinstance(rows, slice) else rows
        shape = (len(at), k)
        codes, grid, book = self._rows_of_codes(rows, at)
        params = {p.role: _some_rows(p, self.planes, rows, at, layout.shape) for p in layout.params}
        signs = self.planes["signs"][rows] if layout.signs else None
        index = self.planes["group_index"] if layout.index == "group_index" else None
        if index is not None and index.ndim == 2:  # every expert has its own
            by_row = index.to(torch.int64)[at // layout.shape[-2]]
            params, index = {role: _by_column(param, by_row) for role, param in params.items()}, None
        made = QuantizedTensor(
            shape,
            codes,
            grid,
            tuple(p for role, p in params.items() if role.startswith("scale")),
            params.get("zero_point"),
            params.get("offset"),
            signs,
            index,
            book,
        )
        return made if layout.index != "order" else _unsorted(made, self.planes["order"])

    def _rows_of_codes(self, rows: slice | Tensor, at: Tensor) -> tuple[Tensor, Grid, Tensor | None]:
        """Canonical codes, grid and codebook of some rows; an entry of several rows is looked up as entries of one."""
        grid, bits, columns = self.layout.grid, self.layout.bits, _code_columns(self.layout.grid, self.layout.columns)
        book = self.planes.get("codebook")
        if not isinstance(grid, Learned) or grid.v_out == 1 or book is None:
            return _canonical(packing.join([plane[rows] for plane in self._codes], bits, columns), self.layout), grid, book
        first = at // grid.v_out
        height = int(first[-1] - first[0]) + 1 if len(at) and isinstance(rows, slice) else 0
        if height and len(at) == height * grid.v_out:  # whole entries
            held = slice(int(first[0]), int(first[0]) + height)
            return _canonical(packing.join([plane[held] for plane in self._codes], bits, columns), self.layout), grid, book
        count = grid.v_out * grid.entries
        if count > 1 << 15 and count != 1 << 16:
            raise Unsupported("entry-rows", f"entries of {grid.v_out} rows, {grid.entries} of them, cannot be taken apart")
        index = _canonical(packing.join([plane[first] for plane in self._codes], bits, columns), self.layout).to(torch.int32)
        index = torch.where(index < 0, index + grid.entries, index) + ((at % grid.v_out) * grid.entries).to(torch.int32).view(-1, 1, 1)
        single = book.transpose(1, 2).reshape(grid.books, count, 1, grid.v_in)
        return index.to(torch.int16), dataclasses.replace(grid, entries=count, v_out=1), single

    def dequantize(self, rows: slice | Tensor = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        """Some rows, (n, K), each exact value rounded once."""
        return self.tensor(rows).dequantize(dtype)


def lower(t: QuantizedTensor) -> Lowered:
    """The planes of ``t``, on its device; a group index that says nothing is left out."""
    from qformats.rewrite import drop_trivial_group_index

    t = drop_trivial_group_index(t)
    planes: dict[str, Tensor] = {}
    rows, k = prod(t.shape[:-1]), t.shape[-1]
    index, order = _index(t)
    if order is not None:
        planes["order"] = order.to(torch.int32)
    elif t.group_index is not None:
        planes["group_index"] = t.group_index.to(torch.int32)
    params = tuple(_lower_param(role, p, t, order, planes) for role, p in t.params())
    wrapped = isinstance(t.grid, Learned) and bool((t.codes < 0).any())
    layout = Layout(t.shape, t.grid, _word(t.codes.dtype), params, t.signs is not None, index, wrapped)
    codes = t.codes if order is None else t.codes.index_select(-1, order)
    made = packing.split(_unsigned(codes, layout).reshape(-1, _code_columns(t.grid, k)), layout.bits)
    head = {f"codes{i}": plane for i, plane in enumerate(made)}
    if t.signs is not None:
        planes["signs"] = t.signs.reshape(rows, -1)
    if t.codebook is not None:
        planes["codebook"] = t.codebook
    held = {**head, **planes}
    return Lowered(layout, {name: held[name] for name in layout.names})


def raised(lowered: Lowered) -> QuantizedTensor:
    """The whole tensor in its own shape."""
    layout, planes = lowered.layout, lowered.planes
    k = layout.columns
    codes = packing.join(lowered._codes, layout.bits, _code_columns(layout.grid, k))
    shape = _row_shape(layout) + _code_shape(layout.grid, k)
    index = planes["group_index"] if layout.index == "group_index" else None
    params = {p.role: _whole_param(p, planes) for p in layout.params}
    t = QuantizedTensor(
        layout.shape,
        _canonical(codes, layout).reshape(shape),
        layout.grid,
        tuple(p for role, p in params.items() if role.startswith("scale")),
        params.get("zero_point"),
        params.get("offset"),
        planes["signs"].reshape(*layout.shape[:-1], -1) if layout.signs else None,
        index,
        planes.get("codebook"),
    )
    return t if layout.index != "order" else _unsorted(t, planes["order"])


# ---------------------------------------------------------------- codes


def _code_columns(grid: Grid, k: int) -> int:
    return prod(_code_shape(grid, k))


def _code_shape(grid: Grid, k: int) -> tuple[int, ...]:
    if isinstance(grid, Learned):
        return (k // grid.v_in, grid.books)
    return (k // grid.v_in,) if isinstance(grid, Table) else (k,)


def _row_shape(layout: Layout) -> tuple[int, ...]:
    *lead, n = (1, *layout.shape[:-1])
    high = layout.grid.v_out if isinstance(layout.grid, Learned) else 1
    return (*lead, n // high)[1:]


def _biased(layout: Layout) -> bool:
    return isinstance(layout.grid, Integer) and layout.grid.signed and layout.grid.bits < 8


def _unsigned(codes: Tensor, layout: Layout) -> Tensor:
    """Canonical codes as uint8, or int32 where they need more than 8 bits; a learned grid's books one after the other."""
    if isinstance(layout.grid, Learned):
        codes = codes.transpose(-1, -2)
    if _biased(layout):
        return (codes + (1 << (layout.bits - 1))).to(torch.uint8)
    if layout.bits > 8:
        return codes.to(torch.int32) & ((1 << layout.bits) - 1)
    return codes.view(torch.uint8) if codes.dtype == torch.int8 else codes.to(torch.uint8)


def _canonical(codes: Tensor, layout: Layout) -> Tensor:
    """What ``_unsigned`` undid, for codes (n, columns)."""
    dtype: torch.dtype = getattr(torch, layout.codes_dtype)
    grid = layout.grid
    if isinstance(grid, Learned):
        codes = codes.view(len(codes), grid.books, -1).transpose(-1, -2)
        if layout.wrapped:
            half = 1 << (layout.bits - 1)
            codes = torch.where(codes.to(torch.int32) >= half, codes.to(torch.int32) - 2 * half, codes)
    if _biased(layout):
        return (codes.view(torch.int8) - (1 << (layout.bits - 1))).to(dtype)
    if dtype == torch.int8:
        return codes.contiguous().view(torch.int8) if codes.dtype == torch.uint8 else codes.to(dtype)
    return codes.to(dtype)


# ---------------------------------------------------------------- act-order


def _group_columns(t: QuantizedTensor) -> int:
    sizes = [p.block.sizes[-1] for _, p in t.params() if isinstance(p.block, Tile) and p.values.shape[-1] > 1]
    return min(sizes, default=t.shape[-1])


def _index(t: QuantizedTensor) -> tuple[str, Tensor | None]:
    """How the group index is kept, and the order of the columns if they are sorted by group."""
    if t.group_index is None:
        return "", None
    size = _group_columns(t)
    plain = t.group_index.ndim == 1 and size > 1 and t.signs is None and not isinstance(t.grid, Table | Learned)
    if plain and t.shape[-1] % size == 0:
        order = torch.argsort(t.group_index.to(torch.int64), stable=True)
        groups = torch.arange(t.shape[-1], device=order.device) // size
        if torch.equal(t.group_index.to(torch.int64)[order], groups):
            return "order", order
    return "group_index", None


def _unsorted(t: QuantizedTensor, order: Tensor) -> QuantizedTensor:
    """Columns as the weight has them; the groups in an index."""
    place = order.to(torch.int64)
    back = torch.empty_like(place)
    back[place] = torch.arange(len(place), device=place.device)
    index = (back // _group_columns(t)).to(torch.int32)
    return t.replace(codes=t.codes.index_select(-1, back), group_index=index)


# ---------------------------------------------------------------- parameters


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _lower_param(role: str, param: Param, t: QuantizedTensor, order: Tensor | None, planes: dict[str, Tensor]) -> ParamLayout:
    block, values = param.block, param.values
    if order is not None and isinstance(block, Tile) and block.sizes[-1] == 1 and values.shape[-1] > 1:
        raise ValueError("a factor for each column beside an act-order index")
    rounded = "" if param.rounded_to is None else _word(param.rounded_to)
    if isinstance(values, QuantizedTensor):
        inner = lower(_in_rows(values, block, t.shape))
        planes.update({f"{role}_{name}": plane for name, plane in inner.planes.items()})
        return ParamLayout(role, block, "", tuple(values.shape), param.inverse, rounded, inner.layout)
    planes[role] = values.contiguous()
    return ParamLayout(role, block, _word(values.dtype), tuple(values.shape), param.inverse, rounded)


def _in_rows(values: QuantizedTensor, block: Block, shape: tuple[int, ...]) -> QuantizedTensor:
    """Codes of runs of the row-major vector as rows of runs, where no run crosses the end of a row."""
    runs = isinstance(block, Flat) and shape[-1] % block.n == 0 and len(values.shape) == 1
    if not runs or getattr(values.grid, "v_in", 1) > 1:
        return values
    if any(isinstance(p.block, Tile) and p.values.shape != (1,) for _, p in values.params()):
        return values
    assert isinstance(block, Flat)
    across = shape[-1] // block.n
    return _reshaped(values, (values.shape[0] // across, across))


def _reshaped(values: QuantizedTensor, shape: tuple[int, ...]) -> QuantizedTensor:
    """The same row-major vector of plain codes in another shape; parameters are runs of it or one number."""

    def change(param: Param) -> Param:
        if isinstance(param.block, Tile):
            return Param(_reshape(param.values, (1,) * len(shape)), whole(shape), param.inverse, param.rounded_to)
        return param

    zero, offset = (None if p is None else change(p) for p in (values.zero_point, values.offset))
    scales = tuple(change(p) for p in values.scales)
    return values.replace(shape=shape, codes=values.codes.reshape(shape), scales=scales, zero_point=zero, offset=offset)


def _reshape(values: Tensor | QuantizedTensor, shape: tuple[int, ...]) -> Tensor | QuantizedTensor:
    return values.reshape(shape) if isinstance(values, Tensor) else _reshaped(values, shape)


def nested(p: ParamLayout, planes: Mapping[str, Tensor]) -> Lowered:
    assert p.nested is not None
    start = f"{p.role}_"
    return Lowered(p.nested, {name.removeprefix(start): plane for name, plane in planes.items() if name.startswith(start)})


def _dtype(word: str) -> torch.dtype | None:
    return getattr(torch, word) if word else None


def _whole_param(p: ParamLayout, planes: Mapping[str, Tensor]) -> Param:
    values: Tensor | QuantizedTensor
    if p.nested is None:
        values = planes[p.role]
    else:
        values = raised(nested(p, planes))
        values = values if tuple(values.shape) == p.shape else _reshaped(values, p.shape)
    return Param(values, p.block, p.inverse, _dtype(p.rounded_to))


def _some_rows(p: ParamLayout, planes: Mapping[str, Tensor], rows: slice | Tensor, at: Tensor, shape: tuple[int, ...]) -> Param:
    """The parameter on rows ``at`` of a weight that is (R, K) when flattened from ``shape``; ``rows`` says the same where it can."""
    block, k = p.block, shape[-1]
    if not isinstance(block, Tile):
        return _of_vector(p, planes, at, k)
    sizes, width = block.sizes, block.sizes[-1]
    lead = p.shape[:-1]
    if prod(lead) == 1:
        tile = Tile((max(len(at), 1), max(width, k) if p.shape[-1] == 1 else width))
        return Param(_plane_rows(p, planes, slice(None)), tile, p.inverse, _dtype(p.rounded_to))
    if len(lead) == 2:
        expert, row = at // shape[-2], at % shape[-2]
        place: slice | Tensor = expert // sizes[0] * lead[1] + row // sizes[1]
        place = rows if sizes[0] == sizes[1] == 1 else place
    elif sizes[0] > 1 and (whole_tiles := _tiles(rows, sizes[0], shape[0])) is not None:
        return Param(_plane_rows(p, planes, whole_tiles), block, p.inverse, _dtype(p.rounded_to))
    else:
        place = rows if sizes[0] == 1 else at // sizes[0]
    tile = Tile((1, max(width, k) if p.shape[-1] == 1 else width))
    return Param(_plane_rows(p, planes, place), tile, p.inverse, _dtype(p.rounded_to))


def _tiles(rows: slice | Tensor, height: int, total: int) -> slice | None:
    """The tiles of ``height`` rows that ``rows`` are made of, None where they cut one."""
    if not isinstance(rows, slice):
        return None
    start, stop, _ = rows.indices(total)
    if start % height or (stop % height and stop != total):
        return None
    return slice(start // height, -(-stop // height))


def _by_column(param: Param, index: Tensor) -> Param:
    """A parameter of groups as one of columns; ``index``: the group of each column in each row, (n, K)."""
    if param.values.shape[-1] == 1:
        return param
    if not isinstance(param.values, Tensor):
        raise Unsupported("expert-index", "codes of parameters under a group index of each expert have no rows")
    return Param(param.values.expand(len(index), -1).gather(1, index), Tile((1, 1)), param.inverse, param.rounded_to)


def _plane_rows(p: ParamLayout, planes: Mapping[str, Tensor], place: slice | Tensor) -> Tensor | QuantizedTensor:
    if p.nested is not None:
        return nested(p, planes).tensor(place)
    return planes[p.role].reshape(-1, p.shape[-1])[place]


def _of_vector(p: ParamLayout, planes: Mapping[str, Tensor], at: Tensor, k: int) -> Param:
    """A parameter on runs of the row-major vector, or in turns along it, on tiles of one row."""
    block = p.block
    if isinstance(block, Flat) and k % block.n == 0:
        across = k // block.n
        if p.nested is not None and len(p.nested.shape) == 2:
            return Param(nested(p, planes).tensor(at), Tile((1, block.n)), p.inverse, _dtype(p.rounded_to))
        values = evaluated(p, planes)[: len(evaluated(p, planes)) // across * across].view(-1, across)[at]
        return Param(values, Tile((1, block.n)), p.inverse)
    width = gcd(k, block.n) if isinstance(block, Flat) else 1
    element = at.unsqueeze(1) * k + torch.arange(0, k, width, device=at.device)
    index = element // block.n if isinstance(block, Flat) else element % block.count  # type: ignore[union-attr]
    return Param(evaluated(p, planes)[index], Tile((1, width)), p.inverse)


def evaluated(p: ParamLayout, planes: Mapping[str, Tensor]) -> Tensor:
    """A parameter's numbers as a vector; its owner's rounding, where it has one, is done."""
    if p.nested is None:
        return planes[p.role].reshape(-1)
    values = raised(nested(p, planes))
    rounded = _dtype(p.rounded_to)
    made = values.dequantize(torch.float64) if rounded is None else values.stepped(rounded)
    return made.reshape(-1)
