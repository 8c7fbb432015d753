"""Rewrites of scales: fold factors, store in another dtype, expand those that are stored as codes."""

from __future__ import annotations

import torch
from torch import Tensor

from qformats.real import Real, product, round_once
from qformats.rewrite.forms import Refused, inexact, map_params, plain
from qformats.scheme import Tile
from qformats.tensor import Param, QuantizedTensor, constant

__all__ = ["fold_scales", "round_scale", "unnest_scale"]


def fold_scales(t: QuantizedTensor, dtype: torch.dtype, *, rounding: bool = False) -> QuantizedTensor:
    """Multiply all scale factors into one plane of ``dtype`` on the finest block; a product that is no such number is refused, or rounded
    once with ``rounding``.
    """
    if len(t.scales) == 1 and not t.scales[0].inverse and not isinstance(t.scales[0].values, QuantizedTensor):
        return t if t.scales[0].values.dtype == dtype else round_scale(t, dtype, rounding=False)[0]
    if not t.scales:
        return t.replace(scales=(constant(1, t.shape, dtype),))
    blocks = [s.block for s in t.scales]
    if not all(isinstance(b, Tile) for b in blocks):
        raise Refused("scale factors on flat or cyclic blocks")
    sizes = tuple(min(b.sizes[a] for b in blocks if isinstance(b, Tile)) for a in range(len(t.shape)))
    fine = Tile(sizes)
    counts = fine.counts(t.shape)
    if t.group_index is not None and any(s.values.shape[-1] not in (1, counts[-1]) or sizes[-1] == 1 for s in t.scales):
        raise Refused("act-order: the scale factors follow different columns")
    spread = ((scale.real().map(lambda v, s=scale: _regrid(v, s.block, fine, t.shape)), scale.inverse) for scale in t.scales)
    total = product(Real.of(torch.ones(counts, dtype=torch.float64)), spread)
    folded = round_once(total, dtype)
    wrong = 0 if rounding else inexact(total, folded)
    if wrong:
        raise Refused(f"the product of the scale factors rounds in {wrong} of {folded.numel()} groups")
    return t.replace(scales=(Param(folded, fine),))


def _regrid(values: Tensor, block: Tile, fine: Tile, shape: tuple[int, ...]) -> Tensor:
    for axis, (coarse, small, length) in enumerate(zip(block.sizes, fine.sizes, shape, strict=True)):
        if coarse % small and coarse < length:
            raise Refused(f"tiles of {coarse} and {small} do not nest")
        values = values.index_select(axis, torch.arange(-(-length // small)) * small // coarse)
    return values


def round_scale(t: QuantizedTensor, dtype: torch.dtype, *, rounding: bool = True) -> tuple[QuantizedTensor, int]:
    """Store the only scale plane in ``dtype``; returns how many entries rounded (0 = exact). Refuses overflow to infinity."""
    if len(t.scales) != 1:
        raise Refused("more than one scale factor")
    scale = plain(t.scales[0], "scale")
    if scale.dtype == dtype:
        return t, 0
    exact = Real.of(scale)
    stored = round_once(exact, dtype)
    wrong = inexact(exact, stored)
    name = str(dtype).removeprefix("torch.")
    if not bool(torch.isfinite(stored).all()) and bool(torch.isfinite(scale).all()):
        raise Refused(f"a scale overflows {name}")
    if wrong and not rounding:
        raise Refused(f"{wrong} of {scale.numel()} scales are not {name} numbers")
    return t.replace(scales=(t.scales[0].with_values(stored),)), wrong


def unnest_scale(t: QuantizedTensor, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    """Expand scale and offset that are stored as codes to plain planes of ``dtype``; refuses if a product rounds."""

    def expanded(param: Param) -> Param:
        if not isinstance(param.values, QuantizedTensor):
            return param
        exact = param.real()
        plain = round_once(exact, dtype)
        wrong = inexact(exact, plain)
        if wrong:
            raise Refused(f"{wrong} of {plain.numel()} nested parameters are not {str(dtype).removeprefix('torch.')} numbers")
        return Param(plain, param.block, param.inverse)

    return t.replace(**map_params(t, expanded))
