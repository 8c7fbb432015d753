"""Min-max round-to-nearest for affine integer types: 2, 3, 4 or 8 bits, symmetric or with zero points, any group or per channel.

For each group, lo = min(0, w) and hi = max(0, w), so that zero is always representable exactly:

- constant zero point 2^(b-1): s = 2 max|w| / (2^b - 1), so that max|w| and -max|w| lie half a step from the nearest code;
- zero points in a range [a, b]: s = max((hi - lo) / (high - low), hi / (high - low - a), -lo / b), then z = round(-lo / s) within [a, b].

s is rounded to the storage's scale dtype first and everything after uses the rounded one, so codes are the nearest to what will be decoded.
Error: |w - w'| <= s * (1/2 + (2^b - 1) * u), u = 2^-11 for float16 scales of at least 2^-14; below, s is a multiple of
2^-24 and at least that, which adds at most (2^b - 1) * 2^-25. A group of zeros gets s = 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformats.errors import BadFile, WouldLose
from qformats.scheme import Storage, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["bounded", "checked", "finite", "fits", "half", "quantize"]


def finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    import torch

    return not values.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(values))  # both ends are NaN if any value is


def checked(weights: Tensor) -> Tensor:
    """``weights`` as float32; ``BadFile('not-finite')`` with the first place of a NaN or an infinity."""
    import torch

    if not finite(weights):
        good = torch.isfinite(weights)
        row, column = (~good).reshape(-1, weights.shape[-1]).nonzero()[0].tolist()
        value = float(weights.reshape(-1, weights.shape[-1])[row, column])
        raise BadFile(
            "not-finite",
            f"{int((~good).sum())} weights are NaN or infinite, the first at row {row}, column {column} ({value})",
            hint="the source is damaged or overflowed; nothing finite stands for it",
        )
    return weights.to(torch.float32)


def fits(storage: Storage) -> bool:
    """Whether ``quantize`` is for ``storage``: integers with one scale a group, which formats name ``int`` and their width."""
    return storage.type.startswith("int") and storage.sub_scale is None and storage.offset is None


def bounded(weights: Tensor, largest: float, name: str) -> Tensor:
    """float32 weights; as ``checked``, and ``WouldLose('f16-overflow')`` where one is beyond ``largest``, the most ``name`` can hold."""
    import torch

    x = weights.to(torch.float32).contiguous()
    ends = [abs(float(end)) for end in torch.aminmax(x)] if x.numel() else []
    if not all(end <= largest for end in ends):  # a NaN is not
        checked(weights)
        raise WouldLose("f16-overflow", f"a weight of {max(ends):g} is beyond {name}", hint="write bf16 or f32 instead")
    return x


def half(scale: Tensor, what: str) -> Tensor:
    """Round float32 to float16, to nearest even; ``WouldLose('f16-overflow')`` instead of an infinity."""
    import torch

    ends = [float(end) for end in torch.aminmax(scale)] if scale.numel() else []
    if not all(abs(end) < 65520 for end in ends):  # half way to what would come next; a NaN is not below it
        raise WouldLose(
            "f16-overflow", f"a {what} of {float(scale.abs().max()):g} exceeds 65504, the largest float16", hint="write bf16 or f32 instead"
        )
    return scale.to(torch.float16)


def quantize(weights: Tensor, storage: Storage) -> QuantizedTensor:
    """float (N, K) -> codes (N, K) with scales (N, G) and a constant or (N, G) zero point, in the canonical form of ``storage``."""
    import torch

    from qformats.tensor import Param, QuantizedTensor, constant

    w = checked(weights)
    n, k = int(w.shape[0]), int(w.shape[1])
    group = min(storage.group or k, k)
    blocks = torch.nn.functional.pad(w, (0, -k % group)).reshape(n, -1, group)  # (N, G, group); zeros change no range
    lo, hi = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    low, high = storage.integers.lowest, storage.integers.highest
    between = storage.zero_point
    if isinstance(between, tuple):
        scale = _scale(torch.maximum((hi - lo) / (high - low), _limit(lo, hi, between[1] - low, high - between[0])), storage)
        zero = (torch.round(-lo / scale.to(torch.float32)) + low).clamp(*between)  # (N, G)
        stored: Param | None = Param(zero.to(torch.uint8 if between[1] < 256 else torch.int16), Tile((1, group)))
    else:
        scale = _scale(_limit(lo, hi, (between or 0) - low, high - (between or 0), symmetric=True), storage)
        zero = torch.full_like(lo, between or 0)
        stored = constant(between, (n, k)) if between is not None else None
    codes = torch.round(blocks / scale.to(torch.float32).unsqueeze(-1)) + zero.unsqueeze(-1)
    codes = codes.clamp(low, high).flatten(1)[:, :k].to(torch.int8 if storage.integers.signed else torch.uint8)
    return QuantizedTensor((n, k), codes.contiguous(), storage.grid, (Param(scale, Tile((1, group))),), stored)


def _limit(lo: Tensor, hi: Tensor, below: int, above: int, *, symmetric: bool = False) -> Tensor:
    """The smallest scale under which lo and hi fit ``below`` and ``above`` steps from zero.

    Symmetric: steps are counted as (below + above) / 2 on both sides, so that ±max|w| round into the grid's two ends.
    """
    import torch

    if symmetric:
        return torch.maximum(-lo, hi) * 2 / (below + above)
    return torch.maximum(-lo / max(below, 1), hi / max(above, 1))


def _scale(scale: Tensor, storage: Storage) -> Tensor:
    """Round to the stored dtype; 1 for groups of zeros, the smallest positive number where rounding would give zero."""
    import torch

    name = storage.scale_dtypes[0]
    rounded = half(scale, "scale") if name == "float16" else scale.to(getattr(torch, name))
    tiny = 2.0**-24 if name == "float16" else torch.finfo(rounded.dtype).tiny
    rounded = torch.where(rounded == 0, torch.tensor(tiny, dtype=rounded.dtype), rounded)
    return torch.where(scale == 0, torch.ones((), dtype=rounded.dtype), rounded)
