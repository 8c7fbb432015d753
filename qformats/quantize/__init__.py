"""New codes from floats: the only place in the library that rounds weights.

Map: ``ggml`` and ``kquants`` (its searches: ``ksearch``) hold the block quantizers whose bytes equal llama.cpp's, ``affine`` min-max
round-to-nearest for GPTQ- and AWQ-like integer types. ``rtn`` picks one by the storage. All refuse NaN and infinities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformats.errors import Unsupported
from qformats.quantize import affine, ggml, kquants

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.scheme import Storage
    from qformats.tensor import QuantizedTensor

__all__ = ["can_quantize", "rtn"]


def can_quantize(storage: Storage) -> bool:
    """Whether ``rtn`` knows a quantizer for ``storage``."""
    blocks = storage.type in ggml.QUANTIZERS or storage.type in kquants.RECIPES
    return blocks or (storage.sub_scale is None and storage.offset is None and "float" not in storage.options)


def rtn(weights: Tensor, storage: Storage, importance: Tensor | None = None) -> QuantizedTensor:
    """Round ``weights`` (float, (N, K)) in ``storage``'s own form; ``importance`` (float, (K,)) weighs the errors of K-quants.

    Each row and group goes by itself, so any row range gives the same codes.
    For q4_0, q4_1, q5_0, q5_1, q8_0 and q2_k … q6_k the written bytes equal llama.cpp's; for affine integer types see
    ``affine.quantize``. Raises ``BadFile('not-finite')``, ``WouldLose('f16-overflow')`` where a scale exceeds fp16,
    ``UsageError('importance')`` for importances of another shape, ``Unsupported`` with ``no-quantizer`` for other types, with
    ``no-importance`` where importances would be ignored and with ``k-multiple`` for rows that are not whole blocks.

    >>> import torch
    >>> from qformats.formats.ggml.legacy import LEGACY
    >>> t = rtn(torch.linspace(-1, 1, 32).reshape(1, 32), LEGACY["Q8_0"].storage)
    >>> t.codes[0, 0].item(), t.codes[0, -1].item()
    (-127, 127)
    """
    if not can_quantize(storage):
        known = ", ".join(sorted((*ggml.QUANTIZERS, *kquants.RECIPES)))
        raise Unsupported("no-quantizer", f"there is no quantizer for {storage.type}", hint=f"choose one of {known}, or an integer type")
    if weights.shape[-1] % storage.k_multiple:
        raise Unsupported("k-multiple", f"rows of {weights.shape[-1]} weights are not a multiple of {storage.k_multiple}")
    if storage.type in kquants.RECIPES:
        return kquants.quantize(weights, storage, importance)
    if importance is not None:
        known = ", ".join(sorted(kquants.RECIPES))
        raise Unsupported(
            "no-importance", f"{storage.type} is rounded without importances", hint=f"leave them out, or choose one of {known}"
        )
    return ggml.quantize(weights, storage) if storage.type in ggml.QUANTIZERS else affine.quantize(weights, storage)
