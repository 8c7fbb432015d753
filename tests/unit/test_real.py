"""Real against fractions.Fraction: exact sums, products and quotients, and one rounding to every float dtype."""

from __future__ import annotations

from fractions import Fraction
from math import copysign, inf, isnan, ldexp, nan

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rationals import DTYPES, LIMITS, assert_rounded_once, round_fraction

from qformats.errors import Unsupported
from qformats.real import _EXTENTS, Extent, Real, product, round_once
from qformats.rewrite import fold_scales
from qformats.scheme import Integer, whole
from qformats.tensor import Param, QuantizedTensor

torch.set_num_threads(1)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)  # includes subnormals and signed zeros
NORMAL32 = st.floats(width=32, min_value=2.0**-126, allow_nan=False, allow_infinity=False)
CODES = st.integers(-255, 255)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _real(*values: float) -> Real:
    return Real.of(torch.tensor(values, dtype=torch.float64))


def _exact(value: Real) -> list[Fraction]:
    low = torch.zeros_like(value.high) if value.low is None else value.low
    return [Fraction(h) + Fraction(e) for h, e in zip(value.high.tolist(), low.tolist())]


@given(st.lists(st.tuples(FLOAT32, FLOAT32, CODES, FLOAT32), min_size=1, max_size=8))
def test_two_float32_factors_times_a_code_are_exact(rows: list[tuple[float, float, int, float]]) -> None:
    a, b, code, _ = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows))
    found = Real.of(code) * Real.of(a) * Real.of(b)
    assert _exact(found) == [Fraction(x) * Fraction(y) * c for x, y, c, _ in rows]


@given(st.lists(st.tuples(FLOAT32, FLOAT32, CODES, FLOAT32), min_size=1, max_size=8))
def test_product_plus_offset_rounds_once_to_every_dtype(rows: list[tuple[float, float, int, float]]) -> None:
    a, b, code, offset = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows))
    found = Real.of(code) * Real.of(a) * Real.of(b) + Real.of(offset)
    exact = [Fraction(x) * Fraction(y) * c + Fraction(o) for x, y, c, o in rows]
    for dtype in DTYPES:
        assert_rounded_once(round_once(found, dtype), exact, dtype)


@given(st.lists(st.tuples(CODES, FLOAT32, FLOAT32, FLOAT32), min_size=1, max_size=8))
def test_float_zero_point_of_any_size_rounds_once(rows: list[tuple[int, float, float, float]]) -> None:
    code, zero, scale, offset = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows))
    found = (Real.of(code) + -Real.of(zero)) * Real.of(scale) + Real.of(offset)
    exact = [(c - Fraction(z)) * Fraction(s) + Fraction(o) for c, z, s, o in rows]
    for dtype in DTYPES:
        assert_rounded_once(round_once(found, dtype), exact, dtype)


@given(st.lists(st.tuples(FLOAT32, CODES, NORMAL32, NORMAL32), min_size=1, max_size=8))
@example([(25.0, 11, 0.46875, 0.46875)])  # 275 = 586.66… x 0.46875 is a tie in bfloat16
def test_quotients_round_once(rows: list[tuple[float, int, float, float]]) -> None:
    a, code, divisor, factor = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows))
    found = product(Real.of(code), [(Real.of(a), False), (Real.of(divisor), True), (Real.of(factor), False)])
    quotient = (Real.of(code) * Real.of(a)).divide(Real.of(divisor))
    for dtype in DTYPES:
        assert_rounded_once(round_once(quotient, dtype), [Fraction(x) * c / Fraction(d) for x, c, d, _ in rows], dtype)
    exact = [Fraction(x) * c / Fraction(d) * Fraction(f) for x, c, d, f in rows]
    for dtype in DTYPES[1:]:
        assert_rounded_once(round_once(found, dtype), exact, dtype)


@dtypes
@given(data=st.data())
def test_neighbourhood_of_every_tie(dtype: torch.dtype, data: st.DataObject) -> None:
    precision, lowest, highest = LIMITS[dtype]
    steps = data.draw(st.integers(0, 2**precision - 1))
    low = data.draw(st.integers(max(lowest, -300) - precision + 1, min(highest, 300) - precision + 1), label="exponent of the last bit")
    nearby = data.draw(st.sampled_from([-1, 0, 1])) * ldexp(1.0, low - 1 - data.draw(st.integers(1, 500 if low > -400 else 0)))
    sign = data.draw(st.sampled_from([-1, 1]))
    tie = Real.of(torch.tensor([sign * float(steps)], dtype=torch.float64)) * _real(ldexp(1.0, low)) + _real(sign * ldexp(1.0, low - 1))
    value = tie + _real(sign * nearby)
    exact = sign * ((steps + Fraction(1, 2)) * Fraction(2) ** low + Fraction(nearby))
    assert_rounded_once(round_once(value, dtype), [exact], dtype)


@dtypes
def test_subnormals_and_underflow(dtype: torch.dtype) -> None:
    precision, lowest, _ = LIMITS[dtype]
    if dtype == torch.float64:
        lowest = -800  # products further down are outside the stated range
    smallest = Fraction(2) ** (lowest - precision + 1)
    numbers = [smallest * Fraction(n, 8) * sign for n in range(1, 40) for sign in (1, -1)]
    found = round_once(Real.of(torch.tensor([float(x) for x in numbers], dtype=torch.float64)), dtype)
    assert_rounded_once(found, numbers, dtype)


@dtypes
def test_overflow_goes_to_infinity_from_half_a_step_above_the_largest(dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        return
    precision, _, highest = LIMITS[dtype]
    limit = Fraction(2) ** (highest + 1) - Fraction(2) ** (highest - precision)
    exact = [limit, -limit, limit - Fraction(2) ** -20]
    value = Real.of(torch.tensor([float(limit)] * 3, dtype=torch.float64) * torch.tensor([1.0, -1.0, 1.0]).double())
    value = value + _real(0.0, 0.0, -(2.0**-20))
    found = round_once(value, dtype)
    assert_rounded_once(found, exact, dtype)
    assert found[:2].tolist() == [inf, -inf] and bool(torch.isfinite(found[2]))


def test_sign_of_zero_follows_ieee() -> None:
    minus = _real(-0.0)
    for value, negative in [
        (minus * _real(3.0), True), (minus * _real(-3.0), False), (_real(0.0) * _real(-0.1), True), (minus + minus, True),
        (minus + _real(0.0), False), (_real(0.1) + _real(-0.1), False), (minus.divide(_real(7.0)), True), (minus + _real(-0.0), True),
    ]:  # fmt: skip
        for dtype in DTYPES:
            assert copysign(1.0, round_once(value, dtype).item()) == (-1.0 if negative else 1.0)


@dtypes
def test_infinities_and_nan_pass_through(dtype: torch.dtype) -> None:
    products = round_once(_real(inf, -inf, inf, nan, inf) * _real(0.1, 0.1, -3.0, 1.0, 0.0), dtype).tolist()
    assert products[:3] == [inf, -inf, -inf] and isnan(products[3]) and isnan(products[4])
    sums = round_once(_real(inf, inf, nan) * _real(0.1, 0.1, 1.0) + _real(0.3, -inf, 0.1), dtype).tolist()
    assert sums[0] == inf and isnan(sums[1]) and isnan(sums[2])
    assert round_once(_real(inf, 1.0, 0.1).divide(_real(3.0, 0.0, inf)), dtype).tolist() == [inf, inf, 0.0]


def test_low_is_none_where_the_product_is_exact_in_float64() -> None:
    assert (Real.of(torch.arange(16)) * Real.of(torch.tensor(0.1))).low is None
    assert (_real(0.1) * _real(0.1)).low is not None


def test_dtypes_that_are_no_target_are_refused() -> None:
    with pytest.raises(Unsupported) as refusal:
        round_once(_real(1.0), torch.float8_e4m3fn)
    assert refusal.value.code == "dtype"


@settings(max_examples=50)
@given(st.integers(-(2**70), 2**70), st.integers(-200, 60))
def test_the_evaluator_itself_rounds_as_python_does(numerator: int, exponent: int) -> None:
    x = numerator * Fraction(2) ** exponent
    assert round_fraction(x, torch.float64) == float(x)
    assert round_fraction(Fraction(float(x)), torch.float32) == torch.tensor(float(x), dtype=torch.float64).float().item()


def test_a_weight_divides_once_and_last() -> None:
    """An inverse factor stored before a plain one: 275 / d x d is 275, not a quotient of 106 bits multiplied back."""
    shape, tie = (1, 1), torch.tensor([[0.46875]])
    for order in ((True, False), (False, True)):
        scales = (Param(torch.tensor([[25.0]]), whole(shape)), *(Param(tie, whole(shape), inverse=inverse) for inverse in order))
        t = QuantizedTensor(shape, torch.tensor([[11]], dtype=torch.uint8), Integer(4), scales)
        assert t.dequantize(torch.bfloat16).item() == 276.0 and t.dequantize(torch.float64).item() == 275.0
        folded = fold_scales(t, torch.float32)
        assert folded.scales[0].values.item() == 25.0


SMALL = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_extent_of_a_dtype_holds_for_its_every_pattern(dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 8 * dtype.itemsize).to(torch.uint8 if dtype.itemsize == 1 else torch.int16).view(dtype).to(torch.float64)
    patterns = patterns[patterns.isfinite()]
    found = [Real.of(part).extent for part in patterns.split(1 << 14)]  # small enough to be looked at
    assert all(e is not None for e in found)
    worst = Extent(max(e.bits for e in found if e), min(e.unit for e in found if e), max(e.top for e in found if e))
    assert worst == _EXTENTS[dtype]


@given(st.lists(FLOAT32, max_size=6), st.lists(CODES, max_size=6))
def test_extent_of_a_small_tensor_is_measured(floats: list[float], codes: list[int]) -> None:
    for values in (torch.tensor([*floats, inf, nan], dtype=torch.float64), torch.tensor(codes, dtype=torch.int16)):
        extent = Real.of(values).extent
        assert extent is not None
        for value in map(Fraction, values[values.isfinite()].tolist()):
            scaled = abs(value) / Fraction(2) ** extent.unit
            assert scaled.denominator == 1 and abs(value) <= Fraction(2) ** extent.top
            assert scaled == 0 or (scaled.numerator // (scaled.numerator & -scaled.numerator)).bit_length() <= extent.bits


@pytest.mark.parametrize("dtype", [*SMALL, torch.float32], ids=str)
@pytest.mark.parametrize("codes", [torch.uint8, torch.int8, torch.int16, torch.uint16], ids=str)
def test_plain_arithmetic_equals_the_error_free_kind(dtype: torch.dtype, codes: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    size, low, high = 20000, 0 if codes in (torch.uint8, torch.uint16) else -100, 100
    q = torch.randint(low, high, (size,), generator=generator).to(codes)
    scale, offset = ((torch.randn(size, generator=generator) * 8).to(dtype) for _ in range(2))
    zero, half = torch.tensor([7.5]), torch.tensor([0.25], dtype=torch.float16)
    planes = [Real.of(values) for values in (q, zero, scale, half, offset)]

    def evaluated(q: Real, zero: Real, scale: Real, half: Real, offset: Real) -> Real:
        return (q + -zero) * scale * half + offset

    plain, careful = evaluated(*planes), evaluated(*(Real(p.high, p.low) for p in planes))
    assert careful.extent is None and (plain.extent is not None or dtype == torch.float32)
    for wanted in DTYPES:
        assert torch.equal(round_once(plain, wanted), round_once(careful, wanted))
