"""``QuantEmbedding``: an ``nn.Embedding`` whose rows are dequantized when they are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from qformats.kernels import cpu, dispatch
from qformats.kernels.lower import Lowered
from qformats.runtime.packed import Packed, PackedWeight, refuse_another

__all__ = ["QuantEmbedding"]


class QuantEmbedding(Packed, nn.Embedding):
    """Rows of a packed matrix by number. ``plain``: the model's own module, whose factor (Gemma has one) each row is multiplied with."""

    def __init__(
        self, segments: Sequence[Lowered], plain: nn.Embedding, compute_dtype: torch.dtype = torch.float32, compute: str = "exact"
    ) -> None:
        nn.Module.__init__(self)
        self.hold(segments, compute_dtype, compute)
        self.num_embeddings, self.embedding_dim = self.weight_shape
        self.padding_idx, self.max_norm, self.norm_type = plain.padding_idx, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        plain._parameters["weight"] = None
        self.factor: float | None = getattr(plain, "scalar_embed_scale", getattr(plain, "embed_scale", None))
        if "embed_scale" in plain._buffers:
            plain._buffers["embed_scale"] = torch.tensor(self.factor)
        self.__dict__["plain"] = plain

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        return PackedWeight(self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        refuse_another(self, value)

    @property
    def embed_scale(self) -> Tensor:
        """The factor, where PEFT looks for it: it multiplies what an adapter adds. ``AttributeError`` where there is none."""
        if self.factor is None:
            raise AttributeError("embed_scale")
        return torch.tensor(self.factor, device=self.plane_device)

    def forward(self, ids: Tensor) -> Tensor:
        if is_compiling():
            planes = [self._buffers[name] for name in self._names[0]]
            rows: Tensor = dispatch.embed(ids, planes, self._texts[0], self.compute_dtype)
            return rows if self.factor is None else rows * torch.tensor(self.factor, device=rows.device).to(rows.dtype)
        rows = self._looked_up(ids)
        return rows if self.factor is None else rows * _scalar(self.factor, rows.dtype)

    def _looked_up(self, ids: Tensor) -> Tensor:
        known = self.straight(0) if ids.is_cpu else None
        made = None if known is None else cpu.embed(ids, self.segment(0), self.compute_dtype, known.plan)
        return dispatch.look_up(ids, self.segment(0), self.compute_dtype) if made is None else made

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.layouts[0].grid}"


@cache
def _scalar(value: float, dtype: torch.dtype) -> float:
    """``value`` as a number of ``dtype``."""
    return torch.tensor(value).to(dtype).item()
