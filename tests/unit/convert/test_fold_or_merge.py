"""Sub-scales of a small float under a larger group: multiplied into the codes where that is exact, merged where only underflow is left."""

from __future__ import annotations

import pytest
import torch

from qformats.reencode import Fit, finish, fit
from qformats.rewrite import Refused
from qformats.scheme import Float, Integer, Storage, Tile, whole
from qformats.tensor import Param, QuantizedTensor

INT8 = Storage("int8", Integer(8, signed=True), 32, 8.5, ("float16",))


def weight(scales: tuple[int, int], factor: float, sub: str = "e4m3fn") -> QuantizedTensor:
    """NVFP4's form, one row of 32: e2m1 codes, a small float for each 16, one number for all."""
    codes = torch.tensor([[7, 1, 3, 15, 9, 0, 5, 12] * 4], dtype=torch.uint8)
    inner = QuantizedTensor((1, 2), torch.tensor([scales], dtype=torch.uint8), Float(sub))
    total = Param(torch.full((1, 1), factor, dtype=torch.float32), whole((1, 32)))
    return QuantizedTensor((1, 32), codes, Float("e2m1"), (Param(inner, Tile((1, 16))), total))


def error(t: QuantizedTensor, decision: Fit) -> float:
    exact = t.dequantize(torch.float64)
    return float((finish(t, decision).dequantize(torch.float64) - exact).norm() / exact.norm())


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("power", [0, -21])
def test_an_exact_fold_goes_first(power: int, rounding: bool) -> None:
    """Sub-scales 1 and 2: also where the step, 2^-22 (e2m1 has halves), is a float16 below its normal numbers."""
    t = weight((0x38, 0x40), 2.0**power)
    decision = fit(t, INT8, rounding=rounding)
    assert decision.kind == "exact" and decision.factor is not None and error(t, decision) == 0


def test_a_rounded_fold_of_normal_numbers_stands() -> None:
    t = weight((0x38, 0x40), 0.1)
    with pytest.raises(Refused, match="float16"):
        fit(t, INT8)
    decision = fit(t, INT8, rounding=True)
    assert decision.kind == "codes-exact" and decision.factor is not None and error(t, decision) < 2**-11


def test_one_scale_goes_before_a_step_that_underflows() -> None:
    """Sub-scales 7 and 8 under 2^-26: half of each rounds to 2^-24, float16's smallest number, their common step, 2^-27, to nothing."""
    t = weight((0x4E, 0x50), 2.0**-26)
    assert t.dequantize(torch.float64).abs().max() == 12 * 2.0**-24
    with pytest.raises(Refused):
        fit(t, INT8)
    decision = fit(t, INT8, rounding=True)
    assert decision.kind == "codes-exact" and decision.factor is None
    assert error(t, decision) < 0.125  # all of it where the step is nothing
