"""ggml's legacy blocks with importances: Q4_0 Q4_1 Q5_0 Q5_1, the same bytes as llama.cpp writes with an importance matrix.

Source: ``quantize_row_q4_0_impl``, ``quantize_row_q4_1_impl``, ``quantize_row_q5_0_impl``, ``quantize_row_q5_1_impl`` in
``ggml/src/ggml-quants.c`` of llama.cpp v0.5.0, compiled without contraction to fused multiply-adds. Errors are weighted by
q sqrt(mean x^2 of the whole row + x^2); Q4_0 and Q5_0 search by ``best_centred``, Q4_1 and Q5_1 by ``best_affine`` over 37 tries. The
codes are the search's own, under the scale before it is rounded to fp16; blocks of zeros get code 0. (Q8_0 takes no importances.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformats.loops import find
from qformats.quantize.ksearch import best_affine, best_centred, centred_tries, rebuilt, steps
from qformats.quantize.weighing import error_weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TOPS", "searched"]

BLOCK = 32
CHUNK = 1 << 18  # weights in one go: what lies between the steps stays in the cache
TOPS = {"q4_0": 8, "q5_0": 16, "q4_1": 15, "q5_1": 31}  # the zero point, or the highest code of types with a minimum


def _loops() -> Any:
    return find("kquantize")


def _tries(top: int, affine: bool) -> tuple[float, ...]:
    return steps(-0.9, 0.05, 36, top) if affine else centred_tries(top)


def defined(x: Tensor, w: Tensor, top: int, affine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: blocks x and their weights w (B, 32) -> codes uint8 (B, 32), scale and minimum float32 (B,)."""
    import torch

    columns = x.T.contiguous()
    if affine:
        found = best_affine(columns, w.T.contiguous(), top, _tries(top, True), False)
    else:
        found = best_centred(columns, w.T.contiguous(), top)
    low, high, add = (0, top, 0) if affine else (-top, top - 1, top)
    codes = torch.where(found.iscale != 0, rebuilt(columns, found.iscale, found.origin, low, high) + add, 0)
    return codes.T.contiguous().to(torch.uint8), found.scale, -found.low


def compiled(x: Tensor, w: Tensor, top: int, affine: bool, loops: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What ``defined`` says."""
    import numpy as np
    import torch

    codes, scale, low = np.empty(tuple(x.shape), np.uint8), np.empty(len(x), np.float32), np.zeros(len(x), np.float32)
    tries, highest, rows = np.array(_tries(top, affine), np.float32), np.float32(top), (x.contiguous().numpy(), w.contiguous().numpy())
    if affine:
        loops.affine_blocks(*rows, codes, scale, low, tries, highest)
    else:
        loops.centred_blocks(*rows, codes, scale, tries, highest)
    return torch.from_numpy(codes), torch.from_numpy(scale), -torch.from_numpy(low)


def searched(name: str, x: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 x (N, K), importances (K,) -> codes uint8 (N, K), scales and minima float32 (N, K / 32) of the type ``name``."""
    import torch

    top, affine, k = TOPS[name], name.endswith("_1"), int(x.shape[1])
    loops, rows = _loops() if x.device.type == "cpu" else None, max(1, CHUNK // max(k, 1))
    parts = []
    for part in x.split(rows):
        blocks, w = part.reshape(-1, BLOCK), error_weights(part, importance, k).reshape(-1, BLOCK)
        parts.append(defined(blocks, w, top, affine) if loops is None else compiled(blocks, w, top, affine, loops))
    codes, scale, low = (torch.cat(plane) for plane in zip(*parts, strict=True))
    return codes.reshape(x.shape), scale.reshape(-1, k // BLOCK), low.reshape(-1, k // BLOCK)
