"""The compiled loops of the CPU against the definition: the same weights to the bit, products within a float32 sum's error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import ALL, ready
from test_gallery import GALLERY

import qformats
from qformats import loops
from qformats.kernels import cpu, cpu_matrix, cpu_plan, reference
from qformats.kernels.dispatch import embed, matmul, multiply
from qformats.kernels.lower import Lowered, lower
from qformats.scheme import Float, Grid, Integer, Table, Tile
from qformats.tensor import Param, QuantizedTensor, constant

torch.set_num_threads(1)

SERVED = [name for name in GALLERY if cpu_plan.plan_of(lower(GALLERY[name]())) is not None]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(grid: Grid, bits: int, rows: int, columns: int, group: int, scale: torch.dtype, zero: str = "") -> QuantizedTensor:
    """Random codes under a scale of each group of columns; ``zero``: ``constant``, ``codes``, ``half`` or ``offset``."""
    shape, groups = (rows, columns), -(-columns // group)
    signed = isinstance(grid, Integer) and grid.signed
    codes = torch.randint(0, 1 << bits, shape, generator=rng(bits))
    codes = (codes - (1 << (bits - 1))).to(torch.int8) if signed else codes.to(torch.uint8)
    numbers = torch.rand((rows, groups), generator=rng(columns)) * 0.02 - 0.004
    block = Tile((1, group))
    offset = Param((numbers * 7).to(scale), block) if zero == "offset" else None
    point = {
        "constant": constant(1 << (bits - 1), shape),
        "codes": Param(torch.randint(0, 1 << bits, (rows, groups), generator=rng(3)).to(torch.uint8), block),
        "half": Param((torch.rand((rows, groups), generator=rng(4)) * (1 << bits)).to(torch.float16), block),
    }.get(zero)
    return QuantizedTensor(shape, codes, grid, (Param(numbers.to(scale), block),), point, offset)


CASES = {
    f"{name}_{rows}x{columns}_g{group}": (grid, bits, rows, columns, group, scale, zero)
    for name, grid, bits, scale, zero in (
        ("int2", Integer(2), 2, torch.float16, "constant"),
        ("int3_offset", Integer(3), 3, torch.bfloat16, "offset"),
        ("int4_codes", Integer(4), 4, torch.float16, "codes"),
        ("int4_half", Integer(4), 4, torch.float16, "half"),
        ("int5_signed", Integer(5, True), 5, torch.float32, ""),
        ("int6", Integer(6), 6, torch.float32, "offset"),
        ("int7", Integer(7), 7, torch.float8_e5m2, "codes"),
        ("int8_signed", Integer(8, True), 8, torch.float16, "offset"),
        ("int8", Integer(8), 8, torch.float16, "half"),
        ("nf4", Table("nf4"), 4, torch.float32, ""),
        ("iq4_nl", Table("iq4_nl"), 4, torch.float16, ""),
        ("e2m1", Float("e2m1"), 4, torch.bfloat16, ""),
        ("e2m3", Float("e2m3"), 6, torch.float32, ""),
        ("e5m2fnuz", Float("e5m2fnuz"), 8, torch.float32, ""),
    )
    for rows, columns, group in ((5, 48, 16), (3, 131, 20), (1, 33, 64))
}


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool(((found.view(torch.int32) == wanted.view(torch.int32)) | (found.isnan() & wanted.isnan())).all())


def check_product(lowered: Lowered, w: torch.Tensor, inputs: int, rows: tuple[int, int]) -> None:
    x = torch.randn(inputs, w.shape[1], generator=rng(inputs))
    found = cpu.matmul(x, lowered, *rows, "exact")
    assert found is not None and found.shape == (inputs, rows[1] - rows[0])
    part = w[slice(*rows)].double()
    bound = 2.0**-20 * (x.double().abs() @ part.abs().t())
    assert bool(((found.double() - x.double() @ part.t()).abs() <= bound + 1e-30).all())


@pytest.fixture(params=[True, False], ids=["", "without_the_matrix_unit"])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's matrix unit, if there is one, and without."""
    if not request.param:
        if not cpu_matrix.available():
            pytest.skip("this CPU has none")
        monkeypatch.setattr(cpu_matrix, "available", lambda: False)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("case", CASES)
def test_a_class_of_schemes_at_an_odd_shape(case: str) -> None:
    lowered = lower(weight(*CASES[case]))
    w = lowered.dequantize()
    found = cpu.dequantize(lowered, slice(0, len(w)))
    assert found is not None and same_bits(found, w)
    finite = torch.where(w.isfinite(), w, torch.zeros(()))
    if bool((finite == w).all()):
        for inputs in (0, 1, 3, 17):
            check_product(lowered, w, inputs, (len(w) // 2, len(w)))


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("case", CASES)
def test_products_of_bytes_are_those_of_the_rounded_inputs(case: str) -> None:
    lowered = lower(weight(*CASES[case]))
    plan, w = cpu_plan.plan_of(lowered), lowered.dequantize()
    if plan is None or plan.integers is None:
        return
    for inputs in (0, 1, 3, 6):
        x = torch.randn(inputs, w.shape[1], generator=rng(inputs)) * torch.rand(inputs, 1, generator=rng(8))
        found = cpu.matmul(x, lowered, 0, len(w), "int8")
        wanted = cpu.rounded_inputs(x).double() @ w.double().t()
        assert found is not None and found.shape == wanted.shape
        size = x.double().abs() @ w.double().abs().t()
        if inputs < 4 or not cpu_matrix.available():
            assert bool(((found.double() - wanted).abs() <= 1e-5 * size).all())
        step = torch.nn.functional.pad(x, (0, -w.shape[1] % 128)).view(inputs, -(-w.shape[1] // 128), 128).abs().amax(-1) / 127
        bound = 0.5 * step.double().repeat_interleave(128, 1)[:, : w.shape[1]] @ w.double().abs().t()
        assert bool(((found.double() - x.double() @ w.double().t()).abs() <= bound + 1e-5 * size).all())


@pytest.mark.parametrize("inputs", [2, 5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, 1e-40])
def test_bytes_of_extreme_inputs(value: float, inputs: int) -> None:
    lowered = lower(weight(Integer(4), 4, 5, 48, 16, torch.float16, "codes"))
    x = torch.zeros(inputs, 48)
    x[0, 3] = value
    found = cpu.matmul(x, lowered, 0, 5, "int8")
    assert found is not None and bool(found[1].eq(0).all())
    assert bool(found[0].isnan().all()) if value != value or value > 1 else bool((found[0].abs() <= 1e-30).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -3e38, 1e-40])
def test_extreme_inputs_are_multiplied_like_floats(value: float) -> None:
    lowered = lower(weight(Integer(4), 4, 5, 48, 16, torch.float16, "constant"))
    x = torch.randn(5, 48, generator=rng(2))
    x[1, 3] = value
    found, wanted = cpu.matmul(x, lowered, 0, 5, "exact"), x @ lowered.dequantize().t()
    assert found is not None and torch.equal(found.isnan(), wanted.isnan())
    finite = wanted.isfinite()
    assert torch.equal(found[~finite].nan_to_num(0), wanted[~finite].nan_to_num(0))
    assert torch.allclose(found[finite], wanted[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid, bits, zero", [(Integer(4), 4, "half"), (Integer(8, True), 8, ""), (Table("nf4"), 4, "")])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, 384])
def test_the_matrix_unit_takes_bfloat16_inputs_as_they_are(grid: Grid, bits: int, zero: str, group: int) -> None:
    lowered = lower(weight(grid, bits, 67, 384 if group == 384 else 512, group, torch.float16, zero))
    w = lowered.dequantize()
    x = torch.randn(19, w.shape[1], generator=rng(3)).to(torch.bfloat16)
    found, wanted = cpu.matmul(x, lowered, 0, 67, "exact"), x.double() @ w.double().t()
    assert found is not None and found.dtype == torch.bfloat16
    assert bool(((found.double() - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-5 * (x.double().abs() @ w.double().abs().t())).all())
    check_product(lowered, w, 19, (0, 67))


def test_bytes_that_serve_no_scheme_are_warned_of_once(recwarn: pytest.WarningsRecorder) -> None:
    cpu._warn.cache_clear()
    lowered = lower(weight(Table("nf4"), 4, 5, 48, 16, torch.float32))
    x = torch.randn(2, 48, generator=rng(9))
    for _ in range(2):
        assert torch.equal(multiply(x, lowered, 0, 5, "int8"), multiply(x, lowered, 0, 5, "exact"))
    assert [str(warning.message) for warning in recwarn] == [
        "weights on Table(name='nf4', v_in=1) are multiplied exactly: there is no product of bytes for them"
    ]


@pytest.mark.parametrize("name", GALLERY)
def test_every_kind_of_quantization_has_the_definitions_weights(name: str) -> None:
    lowered = lower(GALLERY[name]())
    wanted = lowered.dequantize()
    for rows in (slice(0, len(wanted)), slice(len(wanted) // 3, len(wanted)), torch.tensor([len(wanted) - 1, 0])):
        found = cpu.dequantize(lowered, rows)
        assert (found is None) == (name not in SERVED)
        assert found is None or same_bits(found, wanted[rows])


@pytest.mark.parametrize("case", ALL)
def test_every_fixture_has_the_definitions_weights(case: str, tmp_path: Path) -> None:
    with qformats.open(ready(case, tmp_path)) as checkpoint:
        for name in [name for name in checkpoint.modules if checkpoint.is_quantized(name)][:2]:
            t = checkpoint.read(name)
            assert isinstance(t, QuantizedTensor)
            lowered = lower(t)
            found = cpu.dequantize(lowered, slice(0, lowered.layout.rows))
            assert found is None or same_bits(found, lowered.dequantize())


def test_most_kinds_are_served() -> None:
    missed = {"int8_two_factors", "factor_for_each_column", "experts_with_their_own_factor", "nf4_nested", "hqq_3_bit_float_zero"}
    assert set(GALLERY) - set(SERVED) <= missed | {"aqlm_two_books", "aqlm_tall_entries", "a_hair_from_every_tie"}


@pytest.mark.parametrize("inputs", [1, 22, 30])
def test_results_do_not_depend_on_the_number_of_threads(inputs: int) -> None:
    lowered = lower(weight(Integer(4), 4, 1100, 512, 32, torch.float16, "constant"))
    x = torch.randn(inputs, 512, generator=rng(5))
    alone = cpu.matmul(x, lowered, 0, 1100, "exact")
    decoded, rounded = cpu.dequantize(lowered, slice(0, 1100)), cpu.matmul(x, lowered, 0, 1100, "int8")
    torch.set_num_threads(3)
    try:
        together, again = cpu.matmul(x, lowered, 0, 1100, "exact"), cpu.dequantize(lowered, slice(0, 1100))
        rounded_again = cpu.matmul(x, lowered, 0, 1100, "int8")
    finally:
        torch.set_num_threads(1)
    assert alone is not None and together is not None and decoded is not None and again is not None
    assert rounded is not None and rounded_again is not None and torch.equal(rounded, rounded_again)
    assert torch.equal(decoded, again)
    if inputs <= 24:  # beyond, torch multiplies
        assert torch.equal(alone, together)


def test_what_was_written_to_the_planes_is_seen() -> None:
    lowered = lower(weight(Float("e2m1"), 4, 4, 32, 16, torch.bfloat16))
    first = cpu.dequantize(lowered, slice(0, 4))
    lowered.planes["scale"].mul_(2)
    again = cpu.dequantize(lowered, slice(0, 4))
    assert first is not None and again is not None and torch.equal(again, 2 * first)


def test_without_compiled_loops_the_definition_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = lower(weight(Integer(4), 4, 6, 40, 20, torch.float16, "codes"))
    x = torch.randn(2, 40, generator=rng(6))
    for module in (loops, cpu, cpu_plan):
        monkeypatch.setattr(module, "find", lambda name: None)
    monkeypatch.setattr(cpu_plan, "_MADE", {})
    assert cpu.matmul(x, lowered, 0, 6, "exact") is None
    assert torch.equal(multiply(x, lowered, 0, 6, "exact"), reference.matmul(x, lowered, 0, 6))


def test_the_operators_gradient_and_rows_come_from_the_loops() -> None:
    lowered = lower(GALLERY["int4_act_order"]())
    w = lowered.dequantize()
    x = torch.randn(3, w.shape[1], generator=rng(7), requires_grad=True)
    made: torch.Tensor = matmul(x, list(lowered.planes.values()), lowered.layout.text, 0, len(w), "exact")
    made.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, w.sum(0).expand_as(x), rtol=1e-5, atol=1e-6)
    ids = torch.tensor([[1, 0]])
    assert torch.equal(embed(ids, list(lowered.planes.values()), lowered.layout.text, torch.float32), w[ids])
