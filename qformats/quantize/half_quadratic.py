"""HQQ's half-quadratic splitting for any affine integer type whose origin is free: float or integer zero points, or offsets.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), and the constants of ``core/optimize.py`` of
hqq 0.2.8. The step s stays that of the group's range. With codes q and the code z of weight 0, by turns

    e = shrink(w - s (q - z)),  shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta),  p = 0.7
    z = mean(q - (w - e) / s)

beta starts at 10 and grows by 1 % a turn. At every turn z is rounded to what the storage can hold (a float, an integer of its range, or the
offset -s z), all codes are rounded anew and the error is measured; the best turn is kept, and min-max rounding where none is better. The
turns themselves go on from the unrounded z. Importances weigh the errors that decide, and the mean. Whole zero points seldom gain: the mean
moves by less than a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformats.quantize.affine_search import Search, improved
from qformats.quantize.affine_search import fits as is_affine
from qformats.quantize.groups import halved

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.scheme import Storage
    from qformats.tensor import QuantizedTensor

__all__ = ["fits", "solved"]

TURNS = 20
_POWER, _BETA, _GROWTH = 0.7, 10.0, 1.01
_PATIENCE = 4  # turns without gain in any group after which all are done


def fits(storage: Storage) -> bool:
    """Whether ``solved`` is for ``storage``: one plain scale, and an origin that is not one number for all."""
    return is_affine(storage) and (storage.offset is not None or storage.zero_dtype is not None or isinstance(storage.zero_point, tuple))


def solved(weights: Tensor, start: QuantizedTensor, storage: Storage, importance: Tensor | None = None) -> QuantizedTensor:
    """``start``, min-max codes of ``weights`` (N, K) in ``storage``, with the origins of less error; as ``affine_search.improved``."""
    return improved(weights, start, storage, importance, _turns)


def _turns(search: Search) -> None:
    """Offer the origin of every turn."""
    import torch

    form = search.form
    step = search.step(search.scale).contiguous()
    zero = -search.origin / step if form.offset is not None else search.origin
    beta, idle, unit = _BETA, 0, search.unit
    for _ in range(TURNS):
        before = search.error
        total, count = torch.zeros_like(zero), torch.zeros_like(zero)
        for x, w in search.pieces:
            codes = (x / step).add_(zero).round_().clamp_(form.low, form.top)
            rest = (x - (codes - zero) * step) * unit  # in the weights' own size, which beta is meant for
            size = rest.abs()
            shrunk = (size - size.clamp(min=1e-20).pow(_POWER - 1) / beta).clamp_(min=0) * rest.sign() / unit
            moved = codes - (x - shrunk) / step
            total += halved(moved if w is None else moved * w).unsqueeze(1)
            count += x.shape[1] if w is None else halved(w.clone()).unsqueeze(1)
        zero = torch.where(torch.isfinite(total) & (count > 0), total / count, zero)
        search.offer(step, -zero * step if form.offset is not None else zero)
        beta *= _GROWTH
        idle = 0 if bool((search.error < before).any()) else idle + 1
        if idle == _PATIENCE:
            return
