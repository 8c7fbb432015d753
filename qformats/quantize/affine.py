"""Min-max round-to-nearest for affine integer types: symmetric or with zero points, any group, per channel, tile or tensor.

For each group, lo = min(0, w) and hi = max(0, w), so that zero is always representable exactly:

- constant zero point 2^(b-1): s = 2 max|w| / (2^b - 1), so that max|w| and -max|w| lie half a step from the nearest code;
- an offset or a float zero point: s = (max w - min w) / (2^b - 1), offset = min w, without the zero that the others must hold;
- zero points in a range [a, b]: s = max((hi - lo) / (high - low), hi / (high - low - a), -lo / b), then z = round(-lo / s) within [a, b].

s is rounded to the storage's scale dtype first and everything after uses the rounded one, so codes are the nearest to what will be decoded.
Error: |w - w'| <= s * (1/2 + (2^b - 1) * u), u = 2^-11 for float16 scales of at least 2^-14; below, s is a multiple of
2^-24 and at least that, which adds at most (2^b - 1) * 2^-25. A group of zeros gets s = 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformats.errors import BadFile, Unsupported, WouldLose
from qformats.scheme import Block, Integer, Storage, Tile, whole

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
    """Whether ``quantize`` is for ``storage``: integers under one plain scale for a run of columns, a tile or the whole tensor."""
    one = storage.sub_scale is None and storage.scale_grid is None and storage.factor is None and not storage.doubled
    few = isinstance(storage.grid, Integer) and storage.grid.bits <= 8 and bool(storage.scale_dtypes)
    return few and one and not (storage.offset is not None and storage.zero_point is not None)


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
    """float (N, K) -> codes (N, K) with their scales, zero points or offsets in the canonical form of ``storage``.

    The rows are whole tiles of the storage (``Storage.row_unit``), or the last ones of the tensor.
    """
    import torch

    from qformats.tensor import Param, QuantizedTensor, constant

    w = checked(weights)
    n, k = int(w.shape[0]), int(w.shape[1])
    blocks, block = _blocks(w, storage)  # (A, B, weights under one scale)
    lo, hi = blocks.amin(-1), blocks.amax(-1)
    low, high = storage.integers.lowest, storage.top
    between, zero, param, offset = storage.zero_point, None, None, None
    if storage.offset is not None:
        scale = _scale((hi - lo) / (high - low), storage)
        least = half(lo, "minimum") if storage.offset == "float16" else _bounded_scale(lo, storage.offset)
        zero, offset = -least.to(torch.float32) / _step(scale, storage) + low, Param(least, block)
    elif storage.zero_dtype is not None:
        scale, stored = _free(lo, hi, storage)
        zero, param = stored.to(torch.float32), Param(stored, block)
    elif isinstance(between, tuple):
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        scale = _scale(torch.maximum((hi - lo) / (high - low), _limit(lo, hi, between[1] - low, high - between[0])), storage)
        zero = (torch.round(-lo / _step(scale, storage)) + low).clamp(*between)  # (A, B)
        param = Param(zero.to(torch.uint8 if between[0] >= 0 and between[1] < 256 else torch.int16), block)
    else:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        scale = _scale(_limit(lo, hi, (between or 0) - low, high - (between or 0), symmetric=True), storage)
        zero = torch.full_like(lo, between or 0)
        param = constant(between, (n, k)) if between is not None else None
    ratio = blocks / _step(scale, storage).unsqueeze(-1)
    apart = storage.offset is None and storage.zero_dtype is None
    codes = torch.round(ratio) + zero.unsqueeze(-1) if apart else torch.round(ratio + zero.unsqueeze(-1))
    codes = _unblocked(codes.clamp(low, high), storage, n, k).to(torch.int8 if storage.integers.signed else torch.uint8)
    return QuantizedTensor((n, k), codes.contiguous(), storage.grid, (Param(scale, block, storage.inverse),), param, offset)


def _free(lo: Tensor, hi: Tensor, storage: Storage) -> tuple[Tensor, Tensor]:
    """Scales and float zero points; of a narrow range far from zero, whose own no dtype holds, those of the range with zero in it."""
    import torch

    assert storage.zero_dtype is not None
    low, high, dtype = storage.integers.lowest, storage.top, getattr(torch, storage.zero_dtype)
    for _ in range(2):
        scale = _scale((hi - lo) / (high - low), storage)
        stored = (-lo / _step(scale, storage) + low).to(dtype)
        good = torch.isfinite(stored)
        if bool(good.all()):
            break
        lo, hi = torch.where(good, lo, lo.clamp(max=0)), torch.where(good, hi, hi.clamp(min=0))
    return scale, stored


def _tile(storage: Storage, n: int, k: int) -> tuple[int, int]:
    """Rows and columns under one scale."""
    return n if storage.rows is None else min(storage.rows, n), min(storage.group or k, k)


def _blocks(w: Tensor, storage: Storage) -> tuple[Tensor, Block]:
    """The weights (A, B, size) by the scale they stand under, and the scale's block; what fills up a last tile changes no range."""
    import torch

    n, k = w.shape
    rows, group = _tile(storage, n, k)
    if storage.flat and storage.group is not None and k % storage.group:
        raise Unsupported("k-multiple", f"rows of {k} weights are not a multiple of {storage.group}")
    if rows == 1:
        padded = w if k % group == 0 else torch.cat((w, w[:, -1:].expand(n, -k % group)), 1)
        return padded.reshape(n, -1, group), Tile((1, group))
    grown = torch.nn.functional.pad(w.unsqueeze(0), (0, -k % group, 0, -n % rows), mode="replicate").squeeze(0)
    tiles = grown.reshape(-(-n // rows), rows, -1, group).transpose(1, 2)
    block = whole((n, k)) if storage.rows is None and group == k else Tile((rows, group))
    return tiles.flatten(-2), block


def _unblocked(blocks: Tensor, storage: Storage, n: int, k: int) -> Tensor:
    rows, group = _tile(storage, n, k)
    if rows == 1:
        return blocks.flatten(1)[:, :k]
    tiles: Tensor = blocks.unflatten(-1, (rows, group)).transpose(1, 2)
    return tiles.flatten(2).flatten(0, 1)[:n, :k]


def _step(scale: Tensor, storage: Storage) -> Tensor:
    """float32: what one code more adds, of the scale as stored."""
    import torch

    return 1 / scale.to(torch.float32) if storage.inverse else scale.to(torch.float32)


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
    dtype = getattr(torch, name)
    ends = torch.finfo(dtype)
    if storage.inverse:
        return (1 / torch.where(scale == 0, 1, scale)).clamp(ends.tiny, ends.max).to(dtype)
    rounded = half(scale, "scale") if name == "float16" else _bounded_scale(scale, name)
    tiny = 2.0**-24 if name == "float16" else ends.tiny
    rounded = torch.where(rounded == 0, torch.tensor(tiny, dtype=rounded.dtype, device=scale.device), rounded)
    return torch.where(scale == 0, torch.ones((), dtype=rounded.dtype, device=scale.device), rounded)


def _bounded_scale(scale: Tensor, name: str) -> Tensor:
    """Round to a dtype; ``WouldLose('f16-overflow')`` instead of an infinity."""
    import torch

    rounded = scale.to(getattr(torch, name))
    if not finite(rounded):
        message = f"the range of a group exceeds the largest {name}"
        raise WouldLose("f16-overflow", message, hint="write bf16 or f32 instead")
    return rounded
