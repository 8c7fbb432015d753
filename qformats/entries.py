"""Weights of a learned codebook evaluated with plain float arithmetic, wherever that gives the numbers of the definition.

The forms: entries under one scale for each row of codes, all of one dtype (AQLM). ``exact``: float64 holds every weight, because up to four
half-precision entries are multiples of 2^-24 below 2^18, 42 bits, and a scale has 11. ``rounded``: a sum of two entries is rounded once, so
that torch's own steps in their dtype are the definition's. Both answer None for every tensor that they do not serve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qformats.errors import BadFile
from qformats.loops import find
from qformats.real import Real, round_once
from qformats.scheme import Learned, Tile

if TYPE_CHECKING:
    from qformats.tensor import QuantizedTensor

__all__ = ["check_index", "exact", "index_of", "rounded"]


def check_index(codes: Tensor, entries: int, wrap: int) -> None:
    """``BadFile('codes-range')`` where a code, a negative one plus ``wrap``, names no entry."""
    if codes.numel():
        low, high = int(codes.min()), int(codes.max())
        if high >= entries or (low < 0 and not 0 <= low + wrap < entries):
            raise BadFile("codes-range", f"codes run over {low} … {high} but the grid has {entries} entries")


def index_of(codes: Tensor, entries: int, wrap: int) -> Tensor:
    """Codes as int64 indices, negative ones plus ``wrap``; ``BadFile('codes-range')`` where one names no entry."""
    check_index(codes, entries, wrap)
    index = codes.to(torch.int64)
    return torch.where(index < 0, index + wrap, index) if codes.dtype != torch.uint8 else index


def exact(t: QuantizedTensor, dtype: torch.dtype) -> Tensor | None:
    """The exact weights rounded once to ``dtype``."""
    if not _plain(t, torch.float16) or not isinstance(t.grid, Learned) or t.grid.books > 4:
        return None
    loops = find("entries")
    if loops is None or dtype not in (torch.float32, torch.float16, torch.bfloat16) or t.codes.device.type != "cpu":
        return round_once(Real(_summed(t, torch.float64)), dtype)
    scale, book = t.scales[0].values, t.codebook
    assert book is not None and isinstance(scale, Tensor)
    check_index(t.codes, t.grid.entries, wrap=t.grid.entries)
    books = book.to(torch.float32).reshape(t.grid.books, t.grid.entries, -1).contiguous().numpy()
    out = torch.empty(t.shape, dtype=torch.float32)
    factors = scale.to(torch.float64).reshape(-1).numpy()
    loops.decode(t.codes.contiguous().numpy(), books, factors, t.grid.v_out, dtype != torch.float32, out.numpy())
    return out.to(dtype)


def rounded(t: QuantizedTensor, dtype: torch.dtype) -> Tensor | None:
    """The sum of the entries and its product with the scale, each rounded to ``dtype``."""
    if not isinstance(t.grid, Learned) or t.grid.books > 2 or not _plain(t, dtype):
        return None
    return _summed(t, dtype)


def _plain(t: QuantizedTensor, dtype: torch.dtype) -> bool:
    """Whether it is entries of ``dtype`` under one scale of that dtype for each row of codes, and nothing else."""
    if not isinstance(t.grid, Learned) or t.codebook is None or len(t.scales) != 1 or len(t.shape) != 2:
        return False
    scale, rest = t.scales[0], (t.zero_point, t.offset, t.signs, t.group_index)
    rows = isinstance(scale.block, Tile) and scale.block.sizes == (t.grid.v_out, t.shape[-1]) and not scale.inverse
    held = isinstance(scale.values, Tensor) and scale.values.dtype == t.codebook.dtype == dtype
    return rows and held and all(part is None for part in rest)


def _summed(t: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Sum and product in ``dtype``, of a tensor of ``_plain`` form."""
    grid, book, scale = t.grid, t.codebook, t.scales[0].values
    assert isinstance(grid, Learned) and book is not None and isinstance(scale, Tensor)
    flat = book.to(dtype).reshape(grid.books, grid.entries, -1)
    total: Tensor | None = None
    for number in range(grid.books):
        index = index_of(t.codes[..., number], grid.entries, wrap=grid.entries)
        picked = flat[number].index_select(0, index.reshape(-1))  # (N/vo * K/vi, vo * vi)
        total = picked if total is None else total.add_(picked)
    assert total is not None
    total = total.reshape(len(t.codes), -1).mul_(scale.to(dtype))  # (N/vo, K * vo)
    return total.reshape(len(t.codes), -1, grid.v_out, grid.v_in).transpose(1, 2).reshape(t.shape)
