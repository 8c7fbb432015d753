"""ggml's quantizers of one and two bits: Q1_0 Q2_0 TQ1_0 TQ2_0 from floats, the same bytes as llama.cpp writes. Importances change nothing.

Source: ``quantize_row_q1_0_ref``, ``quantize_row_q2_0_ref``, ``quantize_row_tq1_0_ref`` and ``quantize_row_tq2_0_ref`` in
``ggml/src/ggml-quants.c`` of llama.cpp v0.5.0 (what ``ggml_quantize_chunk`` calls, with importances too), compiled for x86-64. For each
block of float32 weights x:

| type         | weights | d (rounded to fp16 when stored)  | code                                                  |
|--------------|---------|----------------------------------|-------------------------------------------------------|
| Q1_0         | 128     | mean of abs(x), summed in order  | 1 where x >= 0, else 0                                |
| Q2_0         | 64      | max of abs(x)                    | round half away from zero (x * (1 / d)) + 1: 0, 1, 2  |
| TQ1_0, TQ2_0 | 256     | max of abs(x)                    | the same                                              |

Nothing is fitted: these types are for models trained in one bit or in three values, whose every weight is near 0 or ±d. Where d is so
small that 1 / d overflows float32, C converts infinities: Q2_0's codes come out as 0 and TQ's as 1, and d itself is stored as zero.
The torch functions are the definition, ``qformats.loops.lowbits`` does the same in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qformats.formats.ggml.ternary import TERNARY
from qformats.loops import find
from qformats.quantize.affine import checked, finite, half
from qformats.quantize.ksearch import ordered_sum, over

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.scheme import Storage
    from qformats.tensor import QuantizedTensor

__all__ = ["NEEDY", "QUANTIZERS", "TYPES", "WEIGHTED", "quantize"]


def _signs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q1_0: x (n, B) -> codes uint8 (n, B), d float32 (B,)."""
    import torch

    return (x >= 0).to(torch.uint8), ordered_sum(x.abs()) / len(x)


def _thirds(x: Tensor, overflow: int) -> tuple[Tensor, Tensor]:
    """Q2_0, TQ1_0, TQ2_0: as ``_signs``; ``overflow`` is every code of a block where 1 / d is infinite."""
    import torch

    d = x.abs().amax(0)
    inverse = torch.where(d > 0, over(1.0, d), 0.0)
    scaled = x * inverse
    whole = torch.trunc(scaled)
    codes = whole + torch.where((scaled - whole).abs() >= 0.5, torch.sign(scaled), 0.0) + 1
    return torch.where(torch.isinf(inverse), float(overflow), codes).to(torch.uint8), d


QUANTIZERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "q1_0": _signs,
    "q2_0": lambda x: _thirds(x, 0),
    "tq1_0": lambda x: _thirds(x, 1),
    "tq2_0": lambda x: _thirds(x, 1),
}
TYPES = frozenset(QUANTIZERS)
WEIGHTED: frozenset[str] = frozenset()
NEEDY: frozenset[str] = frozenset()


def _loops() -> Any:
    return find("lowbits")


def _rounded(name: str, blocks: Tensor, loops: Any) -> tuple[Tensor, Tensor]:
    """Codes uint8 (B, n) and d float32 (B,) of blocks (B, n), by ``loops`` or by their definition."""
    import numpy as np
    import torch

    if loops is None:
        codes, d = QUANTIZERS[name](blocks.T.contiguous())
        return codes.T.contiguous(), d
    made, scale = np.empty(tuple(blocks.shape), np.uint8), np.empty(len(blocks), np.float32)
    loops.QUANTIZE[name](blocks.numpy(), made, scale)
    return torch.from_numpy(made), torch.from_numpy(scale)


def quantize(weights: Tensor, storage: Storage, importance: Tensor | None = None) -> QuantizedTensor:
    """float (N, K), K whole blocks -> the canonical tensor of the type; ``BadFile('not-finite')``, ``WouldLose('f16-overflow')``."""
    import torch

    kind = TERNARY[storage.type.upper()]
    x = weights.to(torch.float32).contiguous()
    n, k = int(x.shape[0]), int(x.shape[1])
    codes, d = _rounded(storage.type, x.reshape(-1, kind.block), _loops() if x.device.type == "cpu" else None)
    if not finite(d):  # as it is for every block with a NaN or an infinity
        checked(x)
    return kind.to_tensor(codes.reshape(n, k), half(d, "scale").reshape(n, k // kind.block))
