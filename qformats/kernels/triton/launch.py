"""From a lowered weight to kernel launches: pointers, grids and block sizes. Nothing here waits for the device.

Tensors that kernels need besides the planes are constant tables, made once a device, and float32 parts of split products, which come from
torch's caching allocator like any result.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from qformats import grids
from qformats.kernels.layout import Layout
from qformats.kernels.lower import Lowered
from qformats.kernels.triton import products, tuning
from qformats.kernels.triton.spec import Spec, spec_of
from qformats.scheme import Table

__all__ = ["FAILURES", "dequantize", "experts", "served", "tile_product", "vector_product"]

FAILURES = (triton.CompilationError, triton.OutOfResources)
"""What a launch raises where a kernel cannot be made for the device."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED = bool(triton.knobs.runtime.interpret)


def served(lowered: Lowered, dtype: torch.dtype) -> Spec | None:
    """The weight's constants if kernels serve it and results of ``dtype``."""
    spec = spec_of(lowered.layout)
    contiguous = all(plane.is_contiguous() for plane in lowered.planes.values())
    return spec if dtype in _DTYPES and contiguous else None


@lru_cache(maxsize=64)
def _table(name: str, device: torch.device) -> Tensor:
    """A grid's values at a multiple of 256 bytes: kernels put a code in the place of an address's lowest byte."""
    values = grids.table_values(name).to(torch.float32)
    room = torch.empty(values.numel() + 64, dtype=torch.float32, device=device)
    start = -(room.data_ptr() // 4) % 64
    return room[start : start + values.numel()].view(values.shape).copy_(values)


def pointers(lowered: Lowered) -> tuple[Tensor, ...]:
    """The planes in the order of ``Layout.names``, small floats as bytes, and the constant tables behind them."""
    planes = list(lowered.planes.values())
    device = planes[0].device
    made = [p.view(torch.uint8) if p.dtype.is_floating_point and p.dtype.itemsize == 1 else p for p in planes]
    layouts: list[Layout | None] = [lowered.layout, *(p.nested for p in lowered.layout.params)]
    made += [_table(part.grid.name, device) for part in layouts if part is not None and isinstance(part.grid, Table)]
    return tuple(made)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], block: tuning.Block) -> None:
    options: dict[str, Any] = {"num_warps": block.warps, "num_stages": block.stages}
    if not _INTERPRETED:
        options["enable_fp_fusion"] = False  # a parameter's own roundings stay; products use explicit fused operations
    kernel[grid](*arguments, **constants, **options)


def _splits(spec: Spec, block: tuning.Block) -> tuple[int, int]:
    """Steps of one part of K and the number of parts, none of them empty."""
    steps = -(-spec.units // block.units)
    each = -(-steps // max(1, min(block.splits, steps)))
    return each, -(-steps // each)


def _ordered(x: Tensor, lowered: Lowered) -> Tensor:
    """The rows of x, contiguous, in the order of the planes' columns, at an address that vectors of 16 bytes can be read from."""
    flat = x.reshape(-1, x.shape[-1])
    if lowered.layout.index == "order":
        return flat.index_select(1, lowered.planes["order"])
    flat = flat.contiguous()
    return flat if flat.data_ptr() % 16 == 0 else flat.clone()


def _reduced(parts: Tensor, out: Tensor, splits: int) -> Tensor:
    if splits > 1:
        block = tuning.Block(rows=1, units=1, warps=4)
        _launch(products.reduce, (triton.cdiv(out.numel(), 1024),), (parts, out, out.numel()), {"SPLITS": splits, "BLOCK": 1024}, block)
    return out


def _space(x: Tensor, height: int, splits: int) -> tuple[Tensor, Tensor]:
    """The result (n, height) in the dtype of x, and where a kernel writes: the same, or (splits, n, height) float32."""
    out = x.new_empty((len(x), height))
    return out, out if splits == 1 else x.new_empty((splits, len(x), height), dtype=torch.float32)


def vector_product(x: Tensor, lowered: Lowered, spec: Spec, start: int, stop: int) -> Tensor:
    """``x`` (n <= 4, K) times the transposed rows ``start:stop``, (n, stop - start), without tensor cores."""
    x = _ordered(x, lowered)
    most = triton.next_power_of_2(len(x))
    block = tuning.block("gemv", spec, x.device, most, stop - start)
    steps, splits = _splits(spec, block)
    out, parts = _space(x, stop - start, splits)
    grid = (triton.cdiv(stop - start, block.rows), splits)
    constants = {"S": spec, "MOST": most, "ROWS": block.rows, "UNITS": block.units, "STEPS": steps, "SPLITS": splits}
    constants["FULL"] = (stop - start) % block.rows == 0
    _launch(products.gemv, grid, (x, pointers(lowered), parts, len(x), start, stop), constants, block)
    return _reduced(parts, out, splits)


def tile_product(x: Tensor, lowered: Lowered, spec: Spec, start: int, stop: int) -> Tensor:
    """``x`` (n, K) times the transposed rows ``start:stop``, (n, stop - start), on tensor cores."""
    x = _ordered(x, lowered)
    block = tuning.block("tiles", spec, x.device, len(x), stop - start, single=x.dtype == torch.float32)
    steps, splits = _splits(spec, block)
    out, parts = _space(x, stop - start, splits)
    grid = (triton.cdiv(stop - start, block.rows) * triton.cdiv(len(x), block.batch), splits)
    arguments = (x, pointers(lowered), parts, x, x, x, len(x), start, stop)
    _launch(products.tiles, grid, arguments, _tile_constants(spec, block, steps, stop - start, False), block)
    return _reduced(parts, out, splits)


def _tile_constants(spec: Spec, block: tuning.Block, steps: int, height: int, grouped: bool) -> dict[str, Any]:
    sizes = {"ROWS": block.rows, "BATCH": block.batch, "UNITS": block.units, "STEPS": steps, "GROUP": 8}
    covered = -(-spec.units // (steps * block.units)) * steps * block.units * spec.unit
    return {"S": spec, **sizes, "GROUPED": grouped, "EVEN": covered == spec.columns, "FULL": height % block.rows == 0}


def experts(x: Tensor, lowered: Lowered, spec: Spec, offsets: Tensor, height: int) -> Tensor:
    """Each row of ``x`` (n, K) times its expert's matrix of ``height`` rows, (n, height).

    Rows are sorted by expert: those of expert e are ``offsets[e]:offsets[e + 1]``, ``offsets`` (E + 1,) integers on the device.
    """
    x = _ordered(x, lowered)
    many = len(offsets) - 1
    block = tuning.block("tiles", spec, x.device, -(-len(x) // many), height, single=x.dtype == torch.float32)
    block = tuning.unsplit(block)
    steps, _ = _splits(spec, block)
    out = x.new_zeros((len(x), height))
    tiles = min(len(x), triton.cdiv(len(x), block.batch) + many)
    expert, first, last = _tiles_of(offsets, tiles, block.batch)
    grid = (triton.cdiv(height, block.rows) * tiles, 1)
    arguments = (x, pointers(lowered), out, expert, first, last, len(x), 0, height)
    _launch(products.tiles, grid, arguments, _tile_constants(spec, block, steps, height, True), block)
    return out


def _tiles_of(offsets: Tensor, tiles: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each tile's expert, first and last row (int32), for tiles of ``batch`` rows of one expert; those too many have no rows."""
    offsets = offsets.to(torch.int32)
    counts = offsets.diff()
    ends = ((counts + (batch - 1)) // batch).cumsum(0, dtype=torch.int32)  # tiles up to each expert's last
    tile = torch.arange(tiles, dtype=torch.int32, device=offsets.device)
    expert = torch.searchsorted(ends, tile, right=True).to(torch.int32)
    some = expert.clamp(max=len(counts) - 1)
    before = torch.where(some > 0, ends[(some - 1).clamp(min=0)], 0)
    first = offsets[some] + (tile - before) * batch
    last = torch.minimum(first + batch, offsets[some + 1])
    return some, first, torch.where(expert < len(counts), last, first)


def dequantize(lowered: Lowered, spec: Spec, rows: slice | Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Some rows (n, K), a slice or int (n,) ids, each exact value rounded once to ``dtype``; columns as the weight has them.

    ``out``: where they go, (n, K) contiguous.
    """
    planes = pointers(lowered)
    ids = rows if isinstance(rows, Tensor) else None
    first, count = (0, len(rows)) if isinstance(rows, Tensor) else (rows.start, rows.stop - rows.start)
    out = torch.empty((count, spec.columns), dtype=dtype, device=planes[0].device) if out is None else out
    block = tuning.block("dequantize", spec, out.device, count, count)
    ordered = lowered.layout.index == "order"
    arguments = (planes, out, out if ids is None else ids, lowered.planes["order"] if ordered else out, count, first)
    grid = (triton.cdiv(count, block.rows), triton.cdiv(spec.units, block.units))
    constants = {"S": spec, "ROWS": block.rows, "UNITS": block.units, "CHOSEN": ids is not None, "ORDERED": ordered}
    _launch(products.dequantize, grid, arguments, constants, block)
    return out
