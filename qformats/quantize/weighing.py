"""Error weights that ggml makes of importances: importance * sqrt(mean square of a run of weights + x^2), for its searches.

Source: ``quantize_row_q4_0_impl`` (and 4_1, 5_0, 5_1), ``quantize_row_iq4_nl_impl`` in ``ggml/src/ggml-quants.c`` of llama.cpp v0.5.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformats.loops import find
from qformats.quantize.ksearch import ordered_sum, root

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["error_weights"]


def weighed(x: Tensor, importance: Tensor, run: int, factor: float) -> Tensor:
    """The definition of ``error_weights``: each run's squares are added from the first to the last, each sum rounded."""
    import torch

    runs = x.reshape(-1, run)
    sums = ordered_sum((runs * runs).T)
    mean = (sums * factor) / torch.full_like(sums, run)
    spread = importance.expand(x.shape).reshape(-1, run)
    return (spread * root(mean.unsqueeze(1) + runs * runs)).reshape(x.shape)


def _loops() -> Any:
    return find("tables")


def error_weights(x: Tensor, importance: Tensor, run: int, factor: float = 1.0) -> Tensor:
    """float32 (n, K): ``importance * sqrt(factor * mean + x^2)`` of x (n, K), the mean over each ``run`` columns; importance (K,)."""
    import numpy as np
    import torch

    loops = _loops() if x.device.type == "cpu" else None
    if loops is None:
        return weighed(x, importance, run, factor)
    out = np.empty(tuple(x.shape), np.float32)
    loops.weigh(x.contiguous().numpy(), importance.contiguous().numpy(), out, run, np.float32(factor))
    return torch.from_numpy(out)
