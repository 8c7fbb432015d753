"""What a lowered weight's planes are: a value that fits in a string, so that it travels through operators and compiled graphs. Torch-free.

A weight is seen as ``rows`` x ``columns``: (N, K), a stack of experts (E, N, K) as E N rows. Its planes by name:

- ``codes0 codes1 …``: uint8 (R, bytes), see ``qformats.kernels.packing``; the codes made unsigned: a signed code of less than 8 bits plus
  2^(bits - 1), of 8 bits as it stands, a 16-bit one by its bits. A learned grid's row of codes is (K / v_in) columns of each book, one
  book after the other.
- ``scale scale1 … zero_point offset``: the parameters in their stored dtypes, flattened to two dimensions where they lie on tiles. A
  parameter that is itself codes has the planes of its own layout, ``scale_codes0`` and so on.
- ``signs``: uint8 (R, ceil(K / 8)). ``order``: int32 (K,), column j of the planes is column ``order[j]`` of the weight; then group
  ``j // g`` is its group. ``group_index``: int32 (K,) where the groups are uneven and columns stay. ``codebook``: as in the tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from qformats.grids import TABLE_BITS
from qformats.scheme import Block, Cyclic, Flat, Float, Grid, Integer, Learned, Table, Tile

__all__ = ["Layout", "ParamLayout", "bits_of", "widths"]


@dataclass(frozen=True, slots=True)
class ParamLayout:
    """One parameter. ``block``: on the rows and columns of the layout. ``shape``: of the stored plane, of ``dtype`` (``""`` if nested)."""

    role: str
    block: Block
    dtype: str
    shape: tuple[int, ...]
    inverse: bool = False
    rounded_to: str = ""
    nested: Layout | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The planes of a weight of ``shape`` (1 to 3 dimensions, K last).

    ``index``: ``""`` (none), ``"order"`` or ``"group_index"``, see above. ``codes_dtype``: that of the canonical codes; ``wrapped``: those
    of a learned grid in the upper half are negative there.
    """

    shape: tuple[int, ...]
    grid: Grid
    codes_dtype: str
    params: tuple[ParamLayout, ...]
    signs: bool = False
    index: str = ""
    wrapped: bool = False

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def bits(self) -> int:
        return bits_of(self.grid)

    def param(self, role: str) -> ParamLayout | None:
        """The parameter of that role."""
        return next((p for p in self.params if p.role == role), None)

    @property
    def names(self) -> tuple[str, ...]:
        """The planes' names, in the order in which operators take them."""
        return _names(self)

    @property
    def text(self) -> str:
        """The layout as JSON; ``Layout.parse`` reads it."""
        return _text(self)

    @staticmethod
    def parse(text: str) -> Layout:
        return _parse(text)


@lru_cache(maxsize=32)
def widths(bits: int) -> tuple[int, ...]:
    """The planes of codes of ``bits`` bits, low bits first: 3 -> (2, 1), 5 -> (4, 1), 6 -> (4, 2), 7 -> (4, 2, 1), 11 -> (8, 2, 1)."""
    found, left = [], bits
    for width in (8, 8, 4, 2, 1):
        if left >= width:
            found.append(width)
            left -= width
    return tuple(found)


def bits_of(grid: Grid) -> int:
    """Bits of a code."""
    if isinstance(grid, Integer):
        return grid.bits
    if isinstance(grid, Float):
        return {"e2m1": 4, "e2m3": 6, "e3m2": 6}.get(grid.name, 8)
    return TABLE_BITS[grid.name] if isinstance(grid, Table) else max(1, (grid.entries - 1).bit_length())


@lru_cache(maxsize=4096)
def _names(layout: Layout) -> tuple[str, ...]:
    params = [f"{p.role}_{name}" if p.nested else p.role for p in layout.params for name in (p.nested.names if p.nested else ("",))]
    head = [f"codes{i}" for i in range(len(widths(layout.bits)))]
    rest = [layout.index, "signs" if layout.signs else "", "codebook" if isinstance(layout.grid, Learned) else ""]
    return (*head, *params, *(name for name in rest if name))


@lru_cache(maxsize=4096)
def _text(layout: Layout) -> str:
    return json.dumps(_plain(layout), separators=(",", ":"))


@lru_cache(maxsize=4096)
def _parse(text: str) -> Layout:
    return _layout(json.loads(text))


def _plain(layout: Layout) -> list[object]:
    params = [
        [p.role, _block(p.block), p.dtype, list(p.shape), p.inverse, p.rounded_to, None if p.nested is None else _plain(p.nested)]
        for p in layout.params
    ]
    return [list(layout.shape), _grid(layout.grid), layout.codes_dtype, params, layout.signs, layout.index, layout.wrapped]


def _layout(data: Any) -> Layout:
    shape, grid, codes_dtype, params, signs, index, wrapped = data
    made = tuple(
        ParamLayout(role, _block_of(block), dtype, tuple(sizes), inverse, rounded, None if nested is None else _layout(nested))
        for role, block, dtype, sizes, inverse, rounded, nested in params
    )
    return Layout(tuple(shape), _grid_of(grid), str(codes_dtype), made, bool(signs), str(index), bool(wrapped))


def _block(block: Block) -> list[object]:
    if isinstance(block, Tile):
        return ["tile", *block.sizes]
    return ["flat", block.n] if isinstance(block, Flat) else ["cyclic", block.count]


def _block_of(data: list[int]) -> Block:
    word, *numbers = data
    if str(word) == "tile":
        return Tile(tuple(numbers))
    return Flat(numbers[0]) if str(word) == "flat" else Cyclic(numbers[0])


def _grid(grid: Grid) -> list[object]:
    if isinstance(grid, Integer):
        return ["integer", grid.bits, grid.signed]
    if isinstance(grid, Float):
        return ["float", grid.name]
    if isinstance(grid, Table):
        return ["table", grid.name, grid.v_in]
    return ["learned", grid.entries, grid.v_out, grid.v_in, grid.books]


def _grid_of(data: Any) -> Grid:
    kinds: dict[str, type[Grid]] = {"integer": Integer, "float": Float, "table": Table, "learned": Learned}
    return kinds[data[0]](*data[1:])
