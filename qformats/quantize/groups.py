"""Weights by the scale that they stand under: rows of groups, and sums over a group that do not depend on the groups beside it."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from qformats.scheme import Block, Cyclic, Flat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["grouped", "halved", "is_ragged", "ungrouped"]


def is_ragged(block: Block, shape: tuple[int, int]) -> bool:
    """Whether some group of ``block`` is short, so that ``grouped`` fills it up."""
    if isinstance(block, Cyclic):
        return prod(shape) % block.count != 0
    if isinstance(block, Flat):
        return prod(shape) % block.n != 0
    return any(n % min(size, n) for n, size in zip(shape, block.sizes, strict=True) if n)


def grouped(plane: Tensor, block: Block, *, zeros: bool = False) -> Tensor:
    """(N, K) -> (groups, width), groups in the order of ``block.counts``; short ones are filled up with last numbers, or ``zeros``."""
    import torch

    n, k = int(plane.shape[0]), int(plane.shape[1])
    if isinstance(block, Cyclic | Flat):
        run = -(-(n * k) // block.count) if isinstance(block, Cyclic) else block.n
        total = run * block.count if isinstance(block, Cyclic) else -(-(n * k) // run) * run
        flat = plane.reshape(-1)
        if total > n * k:
            last = flat[-1:].expand(total - n * k)
            flat = torch.cat((flat, torch.zeros_like(last) if zeros else last))
        return flat.reshape(-1, block.count).T.contiguous() if isinstance(block, Cyclic) else flat.reshape(-1, run)
    rows, columns = (max(1, min(size, length)) for size, length in zip(block.sizes, (n, k), strict=True))
    if n % rows or k % columns:
        below, beside = plane[-1:].expand(-n % rows, k), (-n % rows + n, -k % columns)
        plane = torch.cat((plane, torch.zeros_like(below) if zeros else below))
        right = plane[:, -1:].expand(beside)
        plane = torch.cat((plane, torch.zeros_like(right) if zeros else right), 1)
    tiles = plane.reshape(-(-n // rows), rows, -(-k // columns), columns).transpose(1, 2)
    return tiles.reshape(-1, rows * columns)


def ungrouped(groups: Tensor, block: Block, shape: tuple[int, int]) -> Tensor:
    """The inverse of ``grouped``: (groups, width) -> (N, K)."""
    n, k = shape
    if isinstance(block, Cyclic | Flat):
        flat = groups.T.reshape(-1) if isinstance(block, Cyclic) else groups.reshape(-1)
        return flat[: n * k].reshape(n, k)
    rows, columns = (max(1, min(size, length)) for size, length in zip(block.sizes, shape, strict=True))
    tiles = groups.reshape(-(-n // rows), -(-k // columns), rows, columns).transpose(1, 2)
    return tiles.reshape(-(-n // rows) * rows, -(-k // columns) * columns)[:n, :k].contiguous()


def halved(terms: Tensor, axis: int = -1) -> Tensor:
    """The sum over ``axis``: its second half is added to the first until one is left, a middle one waits; in the place of ``terms``."""
    width = int(terms.shape[axis])
    while width > 1:
        half = width // 2
        terms.narrow(axis, 0, half).add_(terms.narrow(axis, width - half, half))
        width -= half
    return terms.select(axis, 0) if width else terms.sum(axis)
