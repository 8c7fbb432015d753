"""Quanto's own rounding: the largest magnitude of a row for 8 bits, the range of a group for 4 and 2.

Source: ``AbsmaxOptimizer``, ``MaxOptimizer``, ``library/quantize.py`` of optimum-quanto 0.2.7. Every step is rounded to the dtype of the
weights, so for weights in the storage's own dtype codes, scales and shifts are the owner's bit for bit; others are computed in float32
and the rounded scale and shift are those used.

- 8 bits: s = max|w| / qmax, q = w / s to the nearest code, clamped; floats are rounded to nearest even.
- 4 and 2 bits: s = (max - min) / (2^b - 1), shift = -min, q = round((w + shift) / s), clamped. With integer shifts the shift becomes
  round(shift / s) in 0 … 2^b - 1 and q = round(w / s) + shift.

Where s is zero, the codes are 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformats.quantize.affine import checked
from qformats.scheme import Float, Storage, Tile, whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qformats.tensor import Param, QuantizedTensor

__all__ = ["NEEDY", "TYPES", "WEIGHTED", "quantize"]

TYPES: frozenset[str] = frozenset({"qint8", "qint4", "qint2", "qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2"})
WEIGHTED: frozenset[str] = frozenset()
NEEDY: frozenset[str] = frozenset()


def quantize(weights: Tensor, storage: Storage, importance: Tensor | None = None) -> QuantizedTensor:
    """float (N, K) in the canonical form of ``storage``; ``BadFile('not-finite')``."""
    import torch

    single = checked(weights)
    dtype = getattr(torch, storage.scale_dtypes[0])
    w = weights if weights.dtype == dtype else single
    return _packed(w, storage, dtype) if storage.together else _bytes(w, storage, dtype)


def _bytes(w: Tensor, storage: Storage, dtype: torch.dtype) -> QuantizedTensor:
    import torch

    from qformats.tensor import Param, QuantizedTensor

    shape = (int(w.shape[0]), int(w.shape[1]))
    small = getattr(torch, f"float8_{storage.grid.name}") if isinstance(storage.grid, Float) else torch.int8
    info = torch.finfo(small) if small.is_floating_point else torch.iinfo(small)
    scale = (w.abs().amax(1, keepdim=True) / info.max).to(dtype)
    data = w / scale.to(w.dtype)
    data = data if small.is_floating_point else torch.round(data)
    codes = torch.where(scale == 0, 0.0, data).clamp(info.min, info.max).to(small)
    plane = codes.view(torch.uint8) if small.is_floating_point else codes
    block = whole(shape) if storage.rows is None else Tile((1, shape[1]))
    return QuantizedTensor(shape, plane, storage.grid, (Param(scale, block),))


def _packed(w: Tensor, storage: Storage, dtype: torch.dtype) -> QuantizedTensor:
    import torch

    from qformats.tensor import Param, QuantizedTensor

    shape, top = (int(w.shape[0]), int(w.shape[1])), storage.integers.highest
    group = storage.group or shape[1]
    groups, tile = w.reshape(-1, group), Tile((1, group))
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale, shift = ((high - low) / top).to(dtype), (-low).to(dtype)
    step = scale.to(w.dtype)
    zero: Param | None = None
    offset: Param | None = None
    counts = tile.counts(shape)
    if storage.offset is not None:
        data = torch.round((groups + shift.to(w.dtype)) / step)
        offset = Param(-shift.to(getattr(torch, storage.offset)).reshape(counts), tile)
    else:
        whole_shift = torch.nan_to_num(torch.round(shift.to(w.dtype) / step)).clamp(0, top)
        data = torch.round(groups / step) + whole_shift
        zero = Param(whole_shift.to(torch.uint8).reshape(counts), tile)
    codes = torch.where(scale == 0, 0.0, data).clamp(0, top).to(torch.uint8).reshape(shape)
    return QuantizedTensor(shape, codes, storage.grid, (Param(scale.reshape(counts), tile),), zero, offset)
