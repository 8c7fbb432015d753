"""Ternary codes of BitNet b1.58: the scale is the mean of the absolute values, codes are the nearest of -1, 0 and 1 times it.

Source: "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits" (arXiv 2402.17764, equations 1-3), ``WeightQuant`` in
``integrations/bitnet.py`` of transformers 5.23, where the mean is at least 1e-5. The scale is rounded to the storage's dtype first (or its
reciprocal, where it divides), and codes are the nearest to what will be decoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformats.quantize.affine import checked
from qformats.scheme import whole

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.scheme import Storage
    from qformats.tensor import QuantizedTensor

__all__ = ["NEEDY", "TYPES", "WEIGHTED", "quantize"]

TYPES = frozenset({"ternary"})
WEIGHTED: frozenset[str] = frozenset()
NEEDY: frozenset[str] = frozenset()
_SMALLEST = 1e-5


def quantize(weights: Tensor, storage: Storage, importance: Tensor | None = None) -> QuantizedTensor:
    """float (N, K), all rows of a weight -> codes uint8 0, 1, 2 around the zero point 1 under one scale."""
    import torch

    from qformats.tensor import Param, QuantizedTensor, constant

    w = checked(weights)
    mean = w.abs().mean(dtype=torch.float64).to(torch.float32).clamp(min=_SMALLEST)
    stored = (1 / mean if storage.inverse else mean).to(getattr(torch, storage.scale_dtypes[0])).reshape(1, 1)
    ratio = w * stored.to(torch.float32) if storage.inverse else w / stored.to(torch.float32)
    codes = (torch.round(ratio).clamp(-1, 1) + 1).to(torch.uint8)
    shape = (int(w.shape[0]), int(w.shape[1]))
    return QuantizedTensor(shape, codes, storage.grid, (Param(stored, whole(shape), storage.inverse),), constant(1, shape))
