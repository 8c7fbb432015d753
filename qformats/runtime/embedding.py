"""``QuantEmbedding``: an ``nn.Embedding`` whose rows are dequantized when they are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qformats.kernels import dispatch
from qformats.kernels.lower import Lowered
from qformats.runtime.packed import Packed, PackedWeight

__all__ = ["QuantEmbedding"]


class QuantEmbedding(Packed, nn.Embedding):
    """Rows of a packed matrix by number. ``factor``: what each is multiplied with (Gemma), as the model has it."""

    def __init__(
        self,
        segments: Sequence[Lowered],
        padding_idx: int | None = None,
        compute_dtype: torch.dtype = torch.float32,
        compute: str = "exact",
        factor: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        self.hold(segments, compute_dtype, compute)
        self.num_embeddings, self.embedding_dim = self.weight_shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.factor = factor

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        return PackedWeight(self)

    def forward(self, ids: Tensor) -> Tensor:
        (lowered,) = (self.segment(0),)
        rows: Tensor = dispatch.embed(ids, list(lowered.planes.values()), lowered.layout.text, self.compute_dtype)
        if self.factor is None:
            return rows
        factor = self.factor.to(rows) if isinstance(self.factor, Tensor) else torch.tensor(self.factor).to(rows)
        return rows * factor

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.layouts[0].grid}"
