"""Products with lowered weights in plain torch: the definition of every kernel, and what runs where there is none.

A few rows of the weight at a time are dequantized, each exact value rounded once to float32, and multiplied in float32, so that a tile
stays in cache and no dequantized copy of the weight exists. Results are rounded once to the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qformats.kernels.lower import Lowered
from qformats.scheme import Learned

__all__ = ["embed", "matmul", "matmul_back"]

_TILE_WEIGHTS = 1 << 20  # 4 MiB of float32


def _tiles(lowered: Lowered, start: int, stop: int) -> Iterator[slice]:
    """Row ranges of about ``_TILE_WEIGHTS``; whole entries where one spans several rows."""
    grid = lowered.layout.grid
    unit = grid.v_out if isinstance(grid, Learned) else 1
    step = max(64, _TILE_WEIGHTS // max(1, lowered.layout.columns)) // unit * unit or unit
    for at in range(start, stop, step):
        yield slice(at, min(stop, at + step))


def matmul(x: Tensor, lowered: Lowered, start: int, stop: int) -> Tensor:
    """``x`` (..., K) times the transposed rows ``start:stop`` of the weight, (..., stop - start), in the dtype of ``x``."""
    flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
    out = flat.new_empty((len(flat), stop - start))
    for rows in _tiles(lowered, start, stop):
        torch.mm(flat, lowered.dequantize(rows).t(), out=out[:, rows.start - start : rows.stop - start])
    return out.to(x.dtype).reshape(*x.shape[:-1], stop - start)


def matmul_back(grad: Tensor, lowered: Lowered, start: int, stop: int) -> Tensor:
    """``grad`` (..., stop - start) times the rows ``start:stop`` of the weight, (..., K), in the dtype of ``grad``."""
    flat = grad.reshape(-1, grad.shape[-1]).to(torch.float32)
    out = flat.new_zeros((len(flat), lowered.layout.columns))
    for rows in _tiles(lowered, start, stop):
        out.addmm_(flat[:, rows.start - start : rows.stop - start], lowered.dequantize(rows))
    return out.to(grad.dtype).reshape(*grad.shape[:-1], lowered.layout.columns)


def embed(ids: Tensor, lowered: Lowered, dtype: torch.dtype) -> Tensor:
    """The rows ``ids`` of the weight, (*ids.shape, K), each exact value rounded once to ``dtype``; IndexError for others."""
    flat = ids.reshape(-1)
    if not len(flat):
        return torch.empty((*ids.shape, lowered.layout.columns), dtype=dtype, device=ids.device)
    if ids.device.type == "cpu" and (int(flat.min()) < 0 or int(flat.max()) >= lowered.layout.rows):
        raise IndexError(f"there is no row {int(flat.min())} or {int(flat.max())} in a matrix of {lowered.layout.rows}")
    return lowered.dequantize(flat, dtype).reshape(*ids.shape, -1)
