"""LoRA layers over packed weights: PEFT's own, which merge by making new codes and unmerge by putting the kept planes back.

A merge is PEFT's, done on a copy of the layer in float32 (so that every variant of LoRA, DoRA among them, and every bias merges as PEFT
merges it), whose result is rounded once, however many adapters are in it. This module imports PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from qformats.errors import Unsupported
from qformats.runtime.linear import TiedHead
from qformats.runtime.packed import Packed

__all__ = ["PackedEmbeddingLora", "PackedLora"]


class _Merging:
    """What both layers have before PEFT's own methods. ``_kept``: planes and bias of before the first merge; ``_apart``: during one."""

    base_layer: Any
    merged_adapters: list[str]
    _caches: dict[str, Any]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into new codes of the checkpoint's own type; ``safe_merge``: ``ValueError`` where an adapter is not finite.

        Raises what ``Packed.requantize`` does, and ``Unsupported('lora-tied')`` for a matrix that is embedding and output layer; nothing
        has changed then.
        """
        if self.__dict__.get("_apart"):
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            return
        names: list[str] = check_adapters_to_merge(self, adapter_names)  # type: ignore[arg-type]
        before = list(self.merged_adapters)
        if not names:
            return
        packed = _mergeable(self.base_layer)
        kept = self.__dict__.get("_kept")
        with self._floats(packed, kept) as dense:
            try:
                self.merged_adapters = []
                super().merge(safe_merge, [*before, *names])  # type: ignore[misc]
                if self.merged_adapters != before:
                    planes = packed.requantize(dense.weight.data, keep=True)
                    self.__dict__["_kept"] = kept or (planes, _bias(packed))
            except BaseException:
                self.merged_adapters = before
                raise
        if isinstance(dense, nn.Linear) and isinstance(packed, nn.Linear) and packed.bias is not None:
            packed.bias.data = dense.bias.data.to(packed.bias.dtype)

    def unmerge(self) -> None:
        """Put back what was there before the first merge, bit for bit."""
        kept = self.__dict__.get("_kept")
        if self.__dict__.get("_apart") or kept is None:
            super().unmerge()  # type: ignore[misc]
            return
        planes, bias = kept
        self.base_layer.restore(planes)
        if bias is not None:
            self.base_layer.bias.data = bias.to(self.base_layer.plane_device)
        for name in self.merged_adapters:
            self._caches.pop(f"{name}-weight_norm", None)
        self.merged_adapters.clear()
        del self.__dict__["_kept"]

    @contextmanager
    def _floats(self, packed: Packed, kept: Any) -> Iterator[nn.Linear | nn.Embedding]:
        """A plain layer in float32 instead of the packed one, of what it was before the first merge."""
        with torch.no_grad():
            weight = packed.dequantize(torch.float32) if kept is None else _dequantized(kept[0])
            bias = _bias(packed) if kept is None else kept[1]
            dense = _plain(packed, weight.to(packed.plane_device), bias)
            modules: dict[str, nn.Module] = self._modules  # type: ignore[attr-defined]
            modules["base_layer"], self.__dict__["_apart"] = dense, True
            try:
                yield dense
            finally:
                modules["base_layer"] = packed
                del self.__dict__["_apart"]


class PackedLora(_Merging, Linear):  # type: ignore[misc]
    """LoRA on a ``QuantLinear``, or on a ``TiedHead``, which trains and does not merge."""


class PackedEmbeddingLora(_Merging, Embedding):  # type: ignore[misc]
    """LoRA on a ``QuantEmbedding``."""


def _mergeable(base: nn.Module) -> Packed:
    if isinstance(base, TiedHead) or (isinstance(base, Packed) and base.shared):
        why = "one packed matrix is embedding and output layer, and the adapter changes only one of the two uses"
        hint = "save the adapter alone, or call dequantize() on the model before the adapter is attached"
        raise Unsupported("lora-tied", why, hint=hint)
    assert isinstance(base, Packed)
    return base


def _bias(packed: Packed) -> Tensor | None:
    bias = getattr(packed, "bias", None)
    return None if bias is None else bias.detach().clone()


def _dequantized(planes: Any) -> Tensor:
    return torch.cat([segment.dequantize(slice(None), torch.float32) for segment in planes.segments])


def _plain(packed: Packed, weight: Tensor, bias: Tensor | None) -> nn.Linear | nn.Embedding:
    made: nn.Linear | nn.Embedding
    if isinstance(packed, nn.Embedding):
        made = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        if bias is not None:
            made.bias = nn.Parameter(bias.float(), requires_grad=False)
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return made
