"""Codes of one small float as another's: every weight is the same number, group by group, or the search says which groups refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import converted, load, planned, ready

from qformats.checkpoint import open_checkpoint
from qformats.reencode import Fit, finish, fit
from qformats.rewrite import Refused
from qformats.scheme import Float, Storage, Tile
from qformats.tensor import Param, QuantizedTensor

FN, FNUZ = "e4m3fn", "e4m3fnuz"
ODD, LARGEST, NAN = 0x03, 0x7F, 0x80  # of e4m3fnuz: 3 x 2^-10, 240, NaN


def storage(name: str, rows: int | None = 1) -> Storage:
    return Storage("fp8", Float(name), None, 8.0, ("float16",), rows=rows)


def weight(name: str, codes: torch.Tensor, scale: float = 0.375) -> QuantizedTensor:
    scales = torch.full((len(codes), 1), scale, dtype=torch.float16)
    return QuantizedTensor(tuple(codes.shape), codes.to(torch.uint8), Float(name), (Param(scales, Tile((1, codes.shape[1]))),))


def same_numbers(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    a, b = one.dequantize(torch.float64), other.dequantize(torch.float64)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def moved(t: QuantizedTensor, to: Storage) -> tuple[Fit, QuantizedTensor]:
    decision = fit(t, to)
    return decision, finish(t, decision)


def test_every_code_of_e4m3fn_has_a_twin_under_twice_the_scale() -> None:
    t = weight(FN, torch.arange(256).reshape(2, 128))
    decision, made = moved(t, storage(FNUZ))
    assert decision.kind == "exact" and decision.reason == "every number of e4m3fn halved is one of e4m3fnuz"
    assert same_numbers(t, made) and made.grid == Float(FNUZ) and bool((made.scales[0].values == 0.75).all())
    same = made.codes == t.codes
    assert t.codes[~same].tolist() == [0x7F, 0x80, 0xFF] and made.codes[~same].tolist() == [NAN, 0, NAN]  # NaN, minus zero, NaN


@pytest.mark.parametrize(
    ("code", "scale", "kept"), [(ODD, 0.1875, True), (LARGEST, 0.375, False), (0x38, 0.1875, True)], ids=["odd", "240", "one"]
)
def test_a_group_of_e4m3fnuz_halves_its_scale_or_keeps_it(code: int, scale: float, kept: bool) -> None:
    codes = torch.full((3, 32), 0x40)
    codes[1, 5] = code
    t = weight(FNUZ, codes)
    decision, made = moved(t, storage(FN))
    assert decision.kind == "exact" and same_numbers(t, made)
    assert made.scales[0].values[:, 0].tolist() == [0.1875, scale, 0.1875]  # type: ignore[union-attr]
    assert bool((made.codes[1] == codes[1]).all()) == kept


def test_a_group_with_both_is_refused_by_count() -> None:
    codes = torch.full((3, 32), 0x40)
    codes[1, 5], codes[1, 6] = ODD, LARGEST
    with pytest.raises(Refused, match="1 of 3 groups hold numbers of e4m3fnuz that are none of e4m3fn, neither doubled nor as they are"):
        fit(weight(FNUZ, codes), storage(FN))


def test_half_of_a_scale_that_is_no_number_is_refused() -> None:
    t = weight(FNUZ, torch.full((2, 32), ODD), scale=3 * 2.0**-24)
    with pytest.raises(Refused, match="float16"):
        fit(t, storage(FN))


def test_rows_under_one_scale_keep_it() -> None:
    """Which groups would double is not known of the rows to come: a scale of several rows stays."""
    t = weight(FNUZ, torch.full((1, 32), LARGEST))
    assert moved(t, storage(FN, None))[0].reason == "all numbers are e4m3fn numbers: 1 of 1 groups as they are"
    with pytest.raises(Refused, match="as they are"):
        fit(weight(FNUZ, torch.full((1, 32), ODD)), storage(FN, None))


def test_codes_are_asked_for_only_where_they_matter() -> None:
    blank = torch.zeros((1, 1), dtype=torch.uint8).expand(2, 64)

    def codes() -> torch.Tensor:
        raise AssertionError("read")

    assert fit(weight(FN, blank), storage(FNUZ), codes=codes).kind == "exact"
    assert fit(weight("e2m1", blank), storage(FN), codes=codes).reason == "every number of e2m1 is one of e4m3fn"
    with pytest.raises(AssertionError):
        fit(weight(FNUZ, blank), storage(FN), codes=codes)


@pytest.mark.parametrize(("to", "dtype"), [("compressed-tensors:fp8", "bf16"), ("fbgemm_fp8", "f32")])
def test_there_and_back(to: str, dtype: str, tmp_path: Path) -> None:
    """FP8 with minus zeros in it to Quanto's e4m3fnuz and back, bit for bit; nothing asks for new codes."""
    first = tmp_path / "first"
    converted(ready("dense/llama", tmp_path), first, to, allow_requantize=True)
    quanto = converted(first, tmp_path / "quanto", f"quanto:qfloat8_e4m3fnuz,dtype={dtype}", exact=True)
    assert {job.kind for job in quanto.jobs if job.storage is not None} == {"exact"}
    with open_checkpoint(first) as before, open_checkpoint(tmp_path / "quanto") as after:
        names = [name for name in before.modules if before.is_quantized(name)]
        assert names
        for name in names:
            assert same_numbers(before.read(name), after.read(name)), name  # type: ignore[arg-type]
    converted(tmp_path / "quanto", tmp_path / "back", to.partition(":")[0])  # minus zeros are the record's
    assert load(tmp_path / "back" / "model.safetensors") == load(first / "model.safetensors")


def test_a_plan_says_which_groups_refuse(tmp_path: Path) -> None:
    """New codes of Quanto's reach 240 in every row, so that a small odd number refuses it."""
    made = tmp_path / "quanto"
    converted(ready("dense/llama", tmp_path), made, "quanto:qfloat8_e4m3fnuz", allow_requantize=True)
    plan = planned(made, "compressed-tensors:fp8,channel")
    with plan.checkpoint:
        reasons = [job.reason for job in plan.jobs if job.storage is not None]
    assert reasons and all("e4m3fn" in reason for reason in reasons), reasons
