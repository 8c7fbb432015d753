"""What all rewrites share: the refusal, and looks at a tensor's parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from qformats.real import inexact
from qformats.scheme import Integer, Tile
from qformats.tensor import Param, QuantizedTensor

__all__ = ["Refused", "bit_view", "inexact", "integer_grid", "map_params", "plain", "single_row"]


class Refused(Exception):
    """An exact rewrite does not apply; ``str()`` is the reason as the plan prints it."""


def integer_grid(t: QuantizedTensor) -> Integer:
    if not isinstance(t.grid, Integer):
        raise Refused(f"codes of a {type(t.grid).__name__.lower()} grid are not integers")
    return t.grid


def plain(param: Param, what: str) -> Tensor:
    if isinstance(param.values, QuantizedTensor):
        raise Refused(f"the {what} is itself stored as codes")
    return param.values


def map_params(t: QuantizedTensor, change: object) -> dict[str, object]:
    assert callable(change)
    return {
        "scales": tuple(change(s) for s in t.scales),
        "zero_point": None if t.zero_point is None else change(t.zero_point),
        "offset": None if t.offset is None else change(t.offset),
    }


def single_row(block: object) -> bool:
    return isinstance(block, Tile) and all(size == 1 for size in block.sizes[:-1])


def bit_view(values: Tensor) -> Tensor:
    """Floats as integers, so that comparison is bit for bit (-0.0 is not 0.0, NaN equals itself)."""
    if not values.dtype.is_floating_point:
        return values
    return values.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[values.element_size()])
