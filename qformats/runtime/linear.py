"""``QuantLinear``: an ``nn.Linear`` whose weight stays packed; ``TiedHead``: one whose weight is that of a packed embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qformats.kernels.lower import Lowered
from qformats.runtime.inputs import round_inputs
from qformats.runtime.packed import Packed, PackedWeight, present, refuse_another
from qformats.runtime.peft import watch

__all__ = ["QuantLinear", "TiedHead"]

watch()


class QuantLinear(Packed, nn.Linear):
    """``y = x Wᵀ + bias`` with W as planes. ``weight`` is a ``PackedWeight``: shape, dtype and device of the floats it stands for."""

    def __init__(
        self, segments: Sequence[Lowered], bias: Tensor | None = None, compute_dtype: torch.dtype = torch.float32, compute: str = "exact"
    ) -> None:
        nn.Module.__init__(self)
        self.hold(segments, compute_dtype, compute)
        self.out_features, self.in_features = self.weight_shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        return PackedWeight(self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        refuse_another(self, value)

    def forward(self, x: Tensor) -> Tensor:
        y, bias = self.multiply(x), self._parameters["bias"]
        y = y if bias is None else y + bias.to(y.dtype)
        if not self.output_rules:
            return y
        parts = [(y[..., start:stop], rule) for start, stop, rule in self.output_rules]
        return torch.cat([round_inputs(part, rule).to(y.dtype) if rule else part for part, rule in parts], -1)

    def extra_repr(self) -> str:
        kinds = ", ".join(dict.fromkeys(f"{layout.grid}" for layout in self.layouts))
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kinds}"


class TiedHead(nn.Linear):
    """An output layer that multiplies with the planes of the embedding; it has none of its own."""

    def __init__(self, embedding: Packed, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.__dict__["_embedding"] = embedding
        self.out_features, self.in_features = embedding.weight_shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._is_hf_initialized = True

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        return PackedWeight(self.__dict__["_embedding"])

    @weight.setter
    def weight(self, value: Tensor) -> None:
        refuse_another(self.__dict__["_embedding"], value)

    def forward(self, x: Tensor) -> Tensor:
        embedding: Packed = self.__dict__["_embedding"]
        if "_hf_hook" in embedding.__dict__:  # it may be on another device, or offloaded
            with present(embedding):
                y = embedding.multiply(x.to(embedding.plane_device)).to(x.device)
        else:
            y = embedding.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> TiedHead:
        from copy import deepcopy

        bias = None if self.bias is None else deepcopy(self.bias.data, memo)
        return TiedHead(deepcopy(self.__dict__["_embedding"], memo), bias)
