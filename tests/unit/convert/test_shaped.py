"""Re-encoding into scales of every form: tiles of rows, one for the tensor, reciprocals, factors, codes; float zero points and offsets.

Each case says what the search must find. Exact ones are proven on values that float64 holds exactly; codes-exact ones keep the codes
and stay near.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qformats.reencode import finish, fit
from qformats.rewrite import Refused
from qformats.scheme import Factor, Float, Integer, Storage, Table, Tile, whole
from qformats.tensor import Param, QuantizedTensor, constant

N, K = 256, 256
I8, I4, E4M3, E2M1 = Integer(8, signed=True), Integer(4), Float("e4m3fn"), Float("e2m1")
THIRD = 7.874015718698502e-3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(bits: int, signed: bool = False, seed: int = 1) -> Tensor:
    low = -(1 << (bits - 1)) if signed else 0
    made = torch.randint(low, low + (1 << bits), (N, K), generator=generator(seed))
    return made.to(torch.int8 if signed else torch.uint8)


def numbers(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 2) -> Tensor:
    return (torch.rand(shape, generator=generator(seed)) + 0.5).to(dtype)


def runs(width: int, dtype: torch.dtype = torch.float16, seed: int = 2) -> Param:
    return Param(numbers(N, K // width, dtype=dtype, seed=seed), Tile((1, width)))


def one(value: float, dtype: torch.dtype = torch.float32, inverse: bool = False) -> Param:
    return Param(torch.full((1, 1), value, dtype=dtype), whole((N, K)), inverse)


def int8(scale: Param, *more: Param) -> QuantizedTensor:
    return QuantizedTensor((N, K), codes(8, signed=True), I8, (scale, *more))


def fp8(scale: Param) -> QuantizedTensor:
    return QuantizedTensor((N, K), codes(8) & 0x77, E4M3, (scale,))


def nvfp4(scales: str, factor: Param) -> QuantizedTensor:
    held = QuantizedTensor((N, K // 16), codes(7)[:, : K // 16] & 0x7E, Float(scales))
    return QuantizedTensor((N, K), codes(4), E2M1, (Param(held, Tile((1, 16))), factor))


ROW32 = Storage("row", I8, None, 8, scale_dtypes=("float32",))
TENSOR = replace(ROW32, type="tensor", rows=None)
OUTLIERS = replace(ROW32, type="by 127", factor=Factor("float32", constant=THIRD))
DIVIDED = replace(TENSOR, type="divided", inverse=True)
FP8_BLOCK = Storage("fp8 block", E4M3, 128, 8, scale_dtypes=("float32",), rows=128)
FP8_ROW = Storage("fp8 row", E4M3, None, 8, scale_dtypes=("float32",))
FP8_BF16 = replace(FP8_ROW, type="fp8 bf16", scale_dtypes=("bfloat16",))
HALF_ZERO = Storage("float zero", I4, 64, 4.5, zero_dtype="float16")
OFFSET = Storage("offset", I4, 32, 5, offset="float16")
OFFSET_BF16 = replace(OFFSET, type="bf16 offset", scale_dtypes=("bfloat16",), offset="bfloat16")
NV_TIMES = Storage("nv times", E2M1, 16, 4.5, scale_grid=E4M3, factor=Factor("float32"))
NV_DIVIDES = replace(NV_TIMES, type="nv divides", factor=Factor("float32", inverse=True))
NV_GGML = replace(NV_TIMES, type="nv ggml", scale_grid=Float("ue4m3"))
NV_ALONE = replace(NV_TIMES, type="nv alone", factor=None)
NF4_FLAT = Storage("nf4", Table("nf4"), 64, 4.5, scale_dtypes=("float32",), flat=True)

HQQ = QuantizedTensor((N, K), codes(4), I4, (runs(64),), Param((numbers(N, K // 64) * 8).half(), Tile((1, 64))))
AWQ = QuantizedTensor((N, K), codes(4), I4, (runs(64),), Param(codes(4)[:, : K // 64], Tile((1, 64))))
Q4_1 = QuantizedTensor((N, K), codes(4), I4, (runs(32),), None, runs(32, seed=3))
TINY = QuantizedTensor((N, K), codes(4), I4, (runs(32, torch.bfloat16),), constant(8, (N, K)), runs(32, torch.bfloat16, seed=3))
SHIFTED = QuantizedTensor((N, K), codes(4, True), Integer(4, True), (runs(64),), Param(numbers(N, K // 64), Tile((1, 64))))
NF4 = QuantizedTensor((N, K), codes(4), Table("nf4"), (runs(64, torch.float32),))

CASES: list[tuple[str, QuantizedTensor, Storage, str]] = [
    ("row to row", int8(runs(K, torch.float32)), ROW32, "exact"),
    ("row to tensor", int8(runs(K, torch.float32)), TENSOR, "more than one scale"),
    ("tensor to tensor", int8(one(0.3)), TENSOR, "exact"),
    ("tensor to row", int8(one(0.3)), ROW32, "exact"),
    ("tensor to a divisor", int8(one(0.25)), DIVIDED, "exact"),
    ("tensor to a divisor that rounds", int8(one(0.3)), DIVIDED, "codes-exact"),
    ("a divisor to tensor", int8(one(4.0, inverse=True)), TENSOR, "exact"),
    ("row to SCB", int8(runs(K, torch.float32)), OUTLIERS, "codes-exact"),
    ("SCB to SCB", int8(runs(K, torch.float32), constant(THIRD, (N, K), torch.float32)), OUTLIERS, "exact"),
    ("SCB to row", int8(runs(K, torch.float32), constant(THIRD, (N, K), torch.float32)), ROW32, "codes-exact"),
    ("tiles to tiles", fp8(Param(numbers(2, 2, dtype=torch.float32), Tile((128, 128)))), FP8_BLOCK, "exact"),
    ("tiles to rows", fp8(Param(numbers(2, 2, dtype=torch.float32), Tile((128, 128)))), FP8_ROW, "differ"),
    ("rows to tiles", fp8(runs(K, torch.float32)), FP8_BLOCK, "differ"),
    ("one scale to tiles", fp8(one(0.3)), FP8_BLOCK, "exact"),
    ("rows to bf16 rows", fp8(runs(K, torch.float32)), FP8_BF16, "codes-exact"),
    ("bf16 rows to rows", fp8(runs(K, torch.bfloat16)), FP8_ROW, "exact"),
    ("float zeros", HQQ, HALF_ZERO, "exact"),
    ("float zeros, finer", HQQ, replace(HALF_ZERO, group=32), "exact"),
    ("float zeros to offsets", HQQ, OFFSET, "codes-exact"),
    ("integer zeros to float zeros", AWQ, HALF_ZERO, "exact"),
    ("offsets to float zeros", Q4_1, replace(HALF_ZERO, group=32), "codes-exact"),
    ("offsets to coarser float zeros", Q4_1, HALF_ZERO, "differ"),
    ("signed codes and float zeros", SHIFTED, OFFSET, "codes-exact"),
    ("signed codes and float zeros to unsigned", SHIFTED, HALF_ZERO, "codes-exact"),
    ("offsets of half precision to bf16", Q4_1, OFFSET_BF16, "codes-exact"),
    ("zero and offset at once", TINY, OFFSET, "codes-exact"),
    ("a factor that divides", nvfp4("e4m3fn", one(3.7, inverse=True)), NV_DIVIDES, "exact"),
    ("a factor that divides to one that multiplies", nvfp4("e4m3fn", one(3.7, inverse=True)), NV_TIMES, "codes-exact"),
    ("a power of two turns round", nvfp4("e4m3fn", one(4.0, inverse=True)), NV_TIMES, "exact"),
    ("scales of another small float", nvfp4("ue4m3", one(3.7)), NV_TIMES, "exact"),
    ("and back", nvfp4("e4m3fn", one(3.7)), NV_GGML, "exact"),
    ("a factor without a place", nvfp4("e4m3fn", one(3.7)), NV_ALONE, "no factor"),
    ("a factor of one", nvfp4("e4m3fn", one(1.0)), NV_ALONE, "exact"),
    ("flat runs", NF4, NF4_FLAT, "exact"),
    ("flat runs, finer", NF4, replace(NF4_FLAT, group=32), "exact"),
    ("flat runs, coarser", NF4, replace(NF4_FLAT, group=128), "differ"),
]


@pytest.mark.parametrize(("name", "tensor", "storage", "expected"), CASES, ids=[c[0] for c in CASES])
def test_what_the_search_finds(name: str, tensor: QuantizedTensor, storage: Storage, expected: str) -> None:
    if expected not in ("exact", "codes-exact"):
        with pytest.raises(Refused, match=expected):
            fit(tensor, storage, rounding=True)
        return
    if expected == "codes-exact":
        with pytest.raises(Refused):
            fit(tensor, storage)
    decision = fit(tensor, storage, rounding=expected == "codes-exact")
    made = finish(tensor, decision)
    assert decision.kind == expected and made.grid == storage.grid
    move = made.codes.to(torch.int16) - tensor.codes.to(torch.int16)
    assert bool((move == move[0, 0]).all())  # the same code, or all of them moved by one number
    before, after = tensor.dequantize(torch.float64), made.dequantize(torch.float64)
    if expected == "exact":
        assert torch.equal(after, before)
    else:
        assert "round" in decision.reason
        spread = float(before.abs().max())
        assert 0 < float((after - before).abs().max()) <= spread * 2**-7


@pytest.mark.parametrize(("name", "tensor", "storage", "expected"), [c for c in CASES if "exact" in c[3]])
def test_row_ranges_are_decided_alike(name: str, tensor: QuantizedTensor, storage: Storage, expected: str) -> None:
    from qformats import rewrite

    whole_made = finish(tensor, fit(tensor, storage, rounding=True))
    for start, stop in ((0, 128), (128, 256)):
        part = rewrite.select_rows(tensor, torch.arange(start, stop))
        made = finish(part, fit(part, storage, rounding=True))
        assert torch.equal(made.dequantize(torch.float64), whole_made.dequantize(torch.float64)[start:stop])


def test_runs_over_the_ends_of_rows() -> None:
    """Runs of 64 in rows of 96: the reader repeats their scales on runs of 32, and only such that repeat go back."""
    held = numbers(N * 96 // 64, dtype=torch.float32).repeat_interleave(2).reshape(N, 3)
    table = torch.randint(0, 16, (N, 96), generator=generator()).to(torch.uint8)
    t = QuantizedTensor((N, 96), table, Table("nf4"), (Param(held, Tile((1, 32))),))
    decision = fit(t, NF4_FLAT)
    assert decision.kind == "exact" and torch.equal(decision.scale.values, held)  # type: ignore[arg-type]
    broken = held.clone()
    broken[0, 1] += 1
    with pytest.raises(Refused, match="differ"):
        fit(t.replace(scales=(Param(broken, Tile((1, 32))),)), NF4_FLAT)


def test_what_its_writer_takes_stays_as_it_is() -> None:
    t = fp8(runs(K, torch.float32))
    decision = fit(t, FP8_BLOCK, own=lambda scheme: True)
    assert decision.kind == "exact" and finish(t, decision) is t


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_scale_that_divides_is_rounded_once(dtype: str) -> None:
    """BitNet's bitlinear: its reciprocal is no number of any dtype, so the codes are kept under the nearest one."""
    divisors = numbers(N, 1, dtype=torch.bfloat16)
    t, storage = int8(Param(divisors, Tile((1, K)), inverse=True)), replace(ROW32, scale_dtypes=(dtype,))
    with pytest.raises(Refused, match="product of the scale factors rounds"):
        fit(t, storage)
    found = fit(t, storage, rounding=True)
    assert found.kind == "codes-exact" and "round to" in found.reason
    exact = 1 / divisors.double().numpy()  # nearest to a quotient whose bits repeat: never on a tie of the narrower dtype
    assert torch.equal(torch.from_numpy(exact.astype(dtype)), found.scale.values)
    assert torch.equal(finish(t, found).codes, t.codes)
