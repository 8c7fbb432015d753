"""Integer codes under a float scale and a float zero point, found by half-quadratic splitting, as HQQ does it without any data.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), and the constants of ``core/optimize.py`` of
hqq 0.2.8. With codes q = round(w / s + z), the scale s stays that of the range of a group, and the zero point z is moved by turns:

    e = shrink(w - s (q - z)),  shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta),  p = 0.7
    z = mean(q - (w - e) / s)

beta starts at 10 and grows by 1 % a turn. Each group keeps the best of its turns, judged by the (weighted) squared error of what is stored,
with s and z rounded to the storage's dtypes; the first is the range itself, so that no group is worse than plain min-max. The owner judges
all groups of a weight together, by the mean of |w - w'|, and goes on from rounded zero points at 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qformats.errors import UsageError, WouldLose
from qformats.quantize.affine import checked
from qformats.scheme import Cyclic, Flat, Storage, whole

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["NEEDY", "TYPES", "WEIGHTED", "fits", "quantize"]

TYPES: frozenset[str] = frozenset(f"int{bits}" for bits in ("1", "1.58", "2", "3", "4", "5", "6", "8"))
WEIGHTED = TYPES
NEEDY: frozenset[str] = frozenset()
TURNS = 20
_POWER, _BETA, _GROWTH = 0.7, 10.0, 1.01
_FLAT_RANGE, _STEEPEST = 1e-4, 2e4  # a range below the first counts as none; 1 / s is at most the second
_PATIENCE = 3  # turns without gain after which a group is done
_RUN = 1 << 19  # weights searched at once


def fits(storage: Storage) -> bool:
    """Whether ``quantize`` is for ``storage``: unsigned integers with a zero point that may be any float."""
    return storage.zero_dtype is not None and storage.type in TYPES and not storage.integers.signed


@dataclass(frozen=True, slots=True)
class _Form:
    """What is asked for: the largest code and the dtypes in which scale and zero point are stored."""

    top: int
    scale: str
    zero: str

    def stored(self, inverse: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point rounded to their dtypes, as float32."""
        import torch

        scale = (1 / inverse).to(getattr(torch, self.scale)).float()
        return scale, zero.to(getattr(torch, self.zero)).float()


def quantize(weights: Tensor, storage: Storage, importance: Tensor | None = None, *, turns: int = TURNS) -> QuantizedTensor:
    """float (N, K) in the canonical form of ``storage``, on the device of ``weights``; ``turns`` 0: plain min-max.

    Each group goes by itself. Errors: ``BadFile('not-finite')``, ``UsageError('importance')``, ``WouldLose('f16-overflow')``.
    """
    import torch

    from qformats.tensor import Param, QuantizedTensor

    w = checked(weights)
    shape = (int(w.shape[0]), int(w.shape[1]))
    weight = None
    if importance is not None:
        if importance.numel() != shape[1]:
            raise UsageError("importance", f"{importance.numel()} importances for rows of {shape[1]} weights")
        weight = importance.to(w).reshape(1, -1).expand(shape)
    form = _Form(storage.top, storage.scale_dtypes[0], storage.zero_dtype or storage.scale_dtypes[0])
    groups, weight_groups = _grouped(w, storage), None if weight is None else _grouped(weight, storage)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=w.device)
    scale, zero = (torch.empty(len(groups), 1, device=w.device) for _ in range(2))
    step = max(1, _RUN // groups.shape[1])
    for at in range(0, len(groups), step):
        part = slice(at, at + step)
        found = _solve(groups[part], None if weight_groups is None else weight_groups[part], form, turns)
        codes[part], scale[part], zero[part] = found
    block = whole(shape) if storage.rows is None else storage.scale_block(shape)
    counts = block.counts(shape)
    plane = codes.T if storage.cyclic else codes
    stored = [v.reshape(counts).to(getattr(torch, name)) for v, name in ((scale, form.scale), (zero, form.zero))]
    if not all(bool(torch.isfinite(v).all()) for v in stored):
        raise WouldLose("f16-overflow", "a scale or zero point exceeds the storage's dtype", hint="write dtype=float32 instead")
    params = [Param(v, block) for v in stored]
    return QuantizedTensor(shape, plane.reshape(shape).contiguous(), storage.grid, (params[0],), params[1])


def _grouped(w: Tensor, storage: Storage) -> Tensor:
    """The weights as (groups, weights a group)."""
    shape = (int(w.shape[0]), int(w.shape[1]))
    block = whole(shape) if storage.rows is None else storage.scale_block(shape)
    if isinstance(block, Cyclic):
        return w.reshape(-1, block.count).T
    width = block.n if isinstance(block, Flat) else w.numel() if storage.rows is None else block.sizes[-1]
    if w.numel() % width or (not isinstance(block, Flat) and storage.rows is not None and shape[1] % width):
        raise UsageError("group-size", f"groups of {width} do not divide a weight of shape {shape}")
    return w.reshape(-1, width)


def _solve(w: Tensor, weight: Tensor | None, form: _Form, turns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (G, width), scales (G, 1) and zero points (G, 1) of groups ``w``."""
    import torch

    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    width = high - low
    inverse = torch.where(width <= _FLAT_RANGE, 1.0, form.top / width).clamp(max=_STEEPEST)
    zero = -low * inverse
    best = _judged(w, weight, inverse, zero, form)
    beta, going, idle = _BETA, torch.ones_like(low, dtype=torch.bool), torch.zeros_like(low, dtype=torch.int32)
    for _ in range(turns):
        zero = torch.where(going, _moved(w, inverse, zero, beta, form.top), zero)
        tried = _judged(w, weight, inverse, zero, form)
        better = (tried[0] < best[0]) & going
        best = tuple(torch.where(better, new, old) for new, old in zip(tried, best, strict=True))
        idle = torch.where(better, 0, idle + 1)
        going, beta = idle < _PATIENCE, beta * _GROWTH
        if not bool(going.any()):
            break
    return best[1], best[2], best[3]


def _moved(w: Tensor, inverse: Tensor, zero: Tensor, beta: float, top: int) -> Tensor:
    """The zero point of the next turn."""
    codes = (w * inverse + zero).round_().clamp_(0, top)
    rest = w - (codes - zero) / inverse
    size = rest.abs()
    shrunk = (size - size.clamp(min=1e-20).pow(_POWER - 1) / beta).clamp_(min=0) * rest.sign()
    return (codes - (w - shrunk) * inverse).mean(1, keepdim=True)


def _judged(w: Tensor, weight: Tensor | None, inverse: Tensor, zero: Tensor, form: _Form) -> tuple[Tensor, ...]:
    """Error (G, 1), codes, scale and zero point with what would be stored."""
    import torch

    scale, offset = form.stored(inverse, zero)
    codes = torch.nan_to_num(w / scale + offset).round_().clamp_(0, form.top)
    error = ((codes - offset) * scale - w).square_()
    total = (error if weight is None else error * weight).sum(1, keepdim=True)
    return torch.nan_to_num(total, nan=float("inf")), codes.to(torch.uint8), scale, offset
