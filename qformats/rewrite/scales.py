"""Rewrites of scales: fold factors, store in another dtype, expand those that are stored as codes."""

from __future__ import annotations

import torch
from torch import Tensor

from qformats import steps
from qformats.real import Real, all_finite, inexact, product, round_to_odd, rounded
from qformats.rewrite.forms import Refused, map_params, plain
from qformats.scheme import Tile
from qformats.tensor import Param, QuantizedTensor, constant

__all__ = ["fold_scales", "fold_wide", "round_scale", "unnest_scale"]


def fold_scales(t: QuantizedTensor, dtype: torch.dtype, *, odd: bool = False) -> QuantizedTensor:
    """Multiply all scale factors into one plane of ``dtype`` on the finest block; refuses if a product is not representable.

    With ``odd`` the plane is float64 and what needs more bits is rounded to odd: for a caller who rounds it to a narrower dtype next.
    """
    if _is_one(t):
        values = t.scales[0].values
        return t if isinstance(values, Tensor) and values.dtype == dtype else round_scale(t, dtype, rounding=False)[0]
    if not t.scales:
        return t.replace(scales=(constant(1, t.shape, dtype),))
    total, fine = _product(t)
    folded, wrong = (round_to_odd(total), 0) if odd else rounded(total, dtype)
    if wrong:
        raise Refused(f"the product of the scale factors rounds in {wrong} of {folded.numel()} groups")
    return t.replace(scales=(Param(folded, fine),))


def fold_wide(t: QuantizedTensor, *, odd: bool = False) -> tuple[QuantizedTensor, bool]:
    """``fold_scales`` in float32, or float64 where the product needs it; and whether it is the product.

    It is not only with ``odd``, where a product of more bits or a quotient without an end is rounded to odd.
    """
    if _is_one(t) or not t.scales:
        return (t if t.scales else fold_scales(t, torch.float32)), True
    quick = _quotient(t) if odd else None
    if quick is not None:
        return quick, False
    total, fine = _product(t)
    folded, wrong = rounded(total, torch.float32)
    if wrong:
        folded, wrong = total.high, inexact(total, total.high)
    if wrong and not odd:
        raise Refused(f"the product of the scale factors rounds in {wrong} of {folded.numel()} groups")
    return t.replace(scales=(Param(round_to_odd(total) if wrong else folded, fine),)), not wrong


def _quotient(t: QuantizedTensor) -> QuantizedTensor | None:
    """A plane (times powers of two) divided by one number, both of at most 24 bits, as one float64 quotient: as good as one rounded to odd.

    It is no nearer than 2^-50 to a number or a tie of 25 bits that it is not. None for other factors.
    """
    divisors = [s for s in t.scales if s.inverse]
    units = [s for s in t.scales if not s.inverse and isinstance(s.values, Tensor) and s.values.numel() == 1]
    planes = [s for s in t.scales if not s.inverse and not any(s is unit for unit in units)]
    if len(divisors) != 1 or len(planes) != 1 or any(isinstance(s.values, QuantizedTensor) for s in t.scales):
        return None
    (divisor,), (plane,) = divisors, planes
    short = (torch.float32, torch.float16, torch.bfloat16)
    if divisor.values.numel() != 1 or any(s.values.dtype not in short for s in t.scales):  # type: ignore[union-attr]
        return None
    by = divisor.real().high.reshape(())
    if not bool(torch.isfinite(by)) or not bool(by != 0):
        return None
    for unit in units:
        value = unit.real().high.reshape(())
        if float(torch.frexp(value).mantissa.abs()) != 0.5 or not 2.0**-60 < abs(float(value)) < 2.0**60:
            return None
        by = by / value  # powers of two: nothing rounds
    exact = Real(plane.real().high / by)
    single, wrong = rounded(exact, torch.float32)
    return t.replace(scales=(Param(exact.high if wrong else single, plane.block),))


def _is_one(t: QuantizedTensor) -> bool:
    return len(t.scales) == 1 and not t.scales[0].inverse and not isinstance(t.scales[0].values, QuantizedTensor)


def _product(t: QuantizedTensor) -> tuple[Real, Tile]:
    """The exact product of the scale factors on their finest block."""
    blocks = [s.block for s in t.scales]
    if not all(isinstance(b, Tile) for b in blocks):
        raise Refused("scale factors on flat or cyclic blocks")
    fine = Tile(tuple(min(b.sizes[a] for b in blocks if isinstance(b, Tile)) for a in range(len(t.shape))))
    counts = fine.counts(t.shape)
    if t.group_index is not None and any(s.values.shape[-1] not in (1, counts[-1]) or fine.sizes[-1] == 1 for s in t.scales):
        raise Refused("act-order: the scale factors follow different columns")
    spread = [(scale.real().map(lambda v, s=scale: _regrid(v, s.block, fine, t.shape)), scale.inverse) for scale in t.scales]
    first = Real.of(torch.ones((), dtype=torch.float64)) if spread[0][1] else spread.pop(0)[0]
    return product(first, spread).map(lambda v: v.expand(counts)), fine


def _regrid(values: Tensor, block: Tile, fine: Tile, shape: tuple[int, ...]) -> Tensor:
    for axis, (coarse, small, length) in enumerate(zip(block.sizes, fine.sizes, shape, strict=True)):
        if coarse % small and coarse < length:
            raise Refused(f"tiles of {coarse} and {small} do not nest")
        if coarse == small or values.shape[axis] == 1:
            continue
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
    stored, wrong = rounded(exact, dtype)
    name = str(dtype).removeprefix("torch.")
    if not all_finite(stored) and all_finite(scale):
        raise Refused(f"a scale overflows {name}")
    if wrong and not rounding:
        raise Refused(f"{wrong} of {scale.numel()} scales are not {name} numbers")
    return t.replace(scales=(t.scales[0].with_values(stored),)), wrong


def unnest_scale(t: QuantizedTensor, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    """Expand scale and offset that are stored as codes to plain planes of ``dtype``; refuses if a product rounds."""

    def expanded(param: Param) -> Param:
        if not isinstance(param.values, QuantizedTensor):
            return param
        single = steps.single(param.values) if dtype == torch.float32 and param.rounded_to is None else None
        if single is not None:
            return Param(single, param.block, param.inverse)
        plain, wrong = rounded(param.real(), dtype)
        if wrong:
            raise Refused(f"{wrong} of {plain.numel()} nested parameters are not {str(dtype).removeprefix('torch.')} numbers")
        return Param(plain, param.block, param.inverse)

    return t.replace(**map_params(t, expanded))
