"""The compiled loops over runs of codes equal their torch definitions, and everything works without numba."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qformats import grids, reencode, rewrite
from qformats.real import Real, all_finite, inexact, round_once, rounded
from qformats.reencode import offsets
from qformats.reencode.levels import folded_range_definition
from qformats.rewrite.levels import stepped_codes, stepped_definition
from qformats.rewrite.whole import common_step, common_step_definition
from qformats.scheme import Float, Integer, Tile
from qformats.tensor import Param, QuantizedTensor

pytest.importorskip("numba")
from qformats.loops import blocks, levels, steps

RUNS = settings(max_examples=60, deadline=None)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 130), st.sampled_from((1, 7, 16, 32, 64, 200)))
seeds = st.integers(0, 2**32 - 1)


def _codes(seed: int, rows: int, columns: int, signed: bool) -> Tensor:
    low, high = (-128, 128) if signed else (0, 256)
    codes = np.random.default_rng(seed).integers(low, high, (rows, columns))
    return torch.from_numpy(codes.astype(np.int8 if signed else np.uint8))


@RUNS
@given(shapes, seeds, st.booleans())
def test_ranges_equal_the_definition(shape: tuple[int, int, int], seed: int, signed: bool) -> None:
    rows, runs, width = shape
    codes = _codes(seed, rows * runs, width, signed)
    low, high = (np.empty(rows * runs, np.int16) for _ in range(2))

    blocks.run_range(codes.numpy(), low, high)

    wanted = rewrite.block_range_definition(codes.view(rows, runs * width), width)
    assert torch.equal(torch.from_numpy(low).view(rows, runs), wanted[0])
    assert torch.equal(torch.from_numpy(high).view(rows, runs), wanted[1])


@RUNS
@given(shapes, seeds, st.sampled_from((None, 0.0, 0.5, 1.0)))
def test_relabelling_equals_the_definition(shape: tuple[int, int, int], seed: int, flips: float | None) -> None:
    rows, runs, width = shape
    rng = np.random.default_rng(seed + 1)
    codes = _codes(seed, rows * runs, width, signed=False)
    shift = torch.from_numpy(rng.integers(-300, 300, (rows, runs)).astype(np.int16))
    flip = None if flips is None else torch.from_numpy(rng.random((rows, runs)) < flips)
    wanted = rewrite.relabel_definition(codes.view(rows, runs * width), width, shift, flip)

    blocks.relabel(codes.numpy(), shift.view(-1).numpy(), np.empty(0, np.bool_) if flip is None else flip.view(-1).numpy())

    assert torch.equal(codes.view(rows, runs * width), wanted)


@pytest.mark.parametrize("columns", [96, 100])
def test_codes_are_only_overwritten_where_they_were_given_up(columns: int) -> None:
    codes = _codes(3, 4, columns, signed=False)
    before, shift = codes.clone(), torch.arange(4, dtype=torch.int16).unsqueeze(1)

    kept = rewrite.flip_and_shift(codes, 32, shift, None, False)

    assert torch.equal(codes, before) and torch.equal(kept, before + shift.to(torch.uint8))
    assert torch.equal(rewrite.flip_and_shift(codes, 32, shift, None, False, reuse=True), kept)


@RUNS
@given(seeds, st.integers(1, 200), st.sampled_from((15, 31)), st.sampled_from((1.0, 2.0**-20, 2.0**-24, 60000.0, -0.01)))
def test_the_search_equals_the_definition(seed: int, count: int, top: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    scale = torch.from_numpy((rng.random(count) * size).astype(np.float16))
    low = torch.from_numpy(rng.integers(-20, 8, count).astype(np.int16))
    high = low + torch.from_numpy(rng.integers(0, top + 3, count).astype(np.int16))  # some blocks do not fit at all
    chosen = torch.from_numpy(rng.integers(-15, 1, count).astype(np.int16))
    flip, found = (torch.from_numpy(rng.random(count) < 0.3) for _ in range(2))

    ours = offsets.search_offset(scale, low, high, chosen, flip, found, top, torch.float16)
    wanted = offsets.search_offset_definition(scale, low, high, chosen, flip, found, top, torch.float16)

    for mine, theirs in zip(ours, wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "value", [0.0, 1.0, 65504.0, 65536.0, 2.0**-24, 2049 * 2.0**-24, 2050 * 2.0**-24, 2049.0, 2050.0, 1 + 2.0**-11, -6.5, 3 * 2.0**-14]
)
def test_what_fits_half_precision(value: float) -> None:
    with np.errstate(over="ignore"):
        assert bool(blocks._fits_half(value)) == (float(np.float16(value)) == value)


def test_the_search_sees_products_beyond_float32() -> None:
    scale = torch.tensor([1.9990234375], dtype=torch.float16)  # 11 significant bits
    low = high = torch.tensor([16385], dtype=torch.int16)  # 15 bits: the product's last bits are lost in float32
    state = (torch.zeros(1, dtype=torch.int16), torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool))

    ours = offsets.search_offset(scale, low, high, *state, 15, torch.float16)

    wanted = offsets.search_offset_definition(scale, low, high, *state, 15, torch.float16)
    assert [p.tolist() for p in ours] == [p.tolist() for p in wanted]


def _tensor() -> QuantizedTensor:
    rng = np.random.default_rng(5)
    tile = Tile((1, 64))
    scale = Param(torch.from_numpy((rng.random((8, 2)) * 0.01).astype(np.float16)), tile)
    zero = Param(torch.from_numpy(rng.integers(0, 16, (8, 2)).astype(np.uint8)), tile)
    return QuantizedTensor((8, 128), torch.from_numpy(rng.integers(0, 16, (8, 128)).astype(np.uint8)), Integer(4), (scale,), zero)


def test_a_fit_is_the_same_without_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    from qformats.formats.ggml.legacy import LEGACY

    storage, tensor = LEGACY["Q4_1"].storage, _tensor()
    with_loops = reencode.finish(tensor, reencode.fit(tensor, storage, rounding=True))
    monkeypatch.setattr("qformats.rewrite.block_loops", lambda: None)
    monkeypatch.setattr("qformats.rewrite.codes.block_loops", lambda: None)

    without = reencode.finish(tensor, reencode.fit(tensor, storage, rounding=True))

    assert torch.equal(with_loops.codes, without.codes)
    assert with_loops.offset is not None and without.offset is not None
    for one, other in ((with_loops.scales[0], without.scales[0]), (with_loops.offset, without.offset)):
        assert isinstance(one.values, Tensor) and isinstance(other.values, Tensor)
        assert torch.equal(one.values.view(torch.int16), other.values.view(torch.int16))


def test_rewrites_work_where_numba_cannot_be_imported() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch\n"
        "from qformats import rewrite\n"
        "assert rewrite.block_loops() is None\n"
        "codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)\n"
        "moved = rewrite.flip_and_shift(codes, 4, torch.full((2, 2), 3, dtype=torch.int16), None, False)\n"
        "assert torch.equal(moved, codes + 3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr == ""


STEPS = [0.0, 1.0, -1.0, 3.0, 0.75, -6.0, 2.0**-149, 2.0**-90 * 5, 2.0**60, 2.0**61 + 2.0**40, 1e30, float("inf"), float("nan"), 1.1]


@RUNS
@given(st.lists(st.lists(st.sampled_from(STEPS), min_size=4, max_size=4), min_size=1, max_size=20))
def test_common_steps_equal_the_definition(rows: list[list[float]]) -> None:
    values = torch.tensor(rows, dtype=torch.float64)
    assert torch.equal(common_step(values).nan_to_num(-1.0), common_step_definition(values).nan_to_num(-1.0))


@RUNS
@given(st.lists(st.lists(st.integers(-(2**40), 2**40), min_size=3, max_size=3), min_size=1, max_size=20))
def test_common_divisors_equal_the_definition(rows: list[list[int]]) -> None:
    assert rewrite.common_divisor(torch.tensor(rows)).tolist() == [math.gcd(*row) for row in rows]


@RUNS
@given(shapes, seeds)
def test_codes_are_translated_and_multiplied_as_by_torch(shape: tuple[int, int, int], seed: int) -> None:
    rows, runs, width = shape
    codes, table = _codes(seed, rows, runs * width, False), _codes(seed + 1, 1, 256, True)[0]
    found = rewrite.looked_up(codes, table)
    assert found is not None and torch.equal(found, table[codes.to(torch.int64)])
    factor = _codes(seed + 2, rows, runs, False)
    once = codes.clone()
    blocks.multiply(once.view(-1, width).numpy(), factor.view(-1).numpy())
    assert torch.equal(once, (codes.unflatten(-1, (-1, width)) * factor.unsqueeze(-1)).flatten(-2))


def _rows_of_scales(rng: np.random.Generator, count: int) -> np.ndarray:
    """Small floats under a constant, integers of any size, subnormals, any bits, and rows of one number or none."""
    small = grids.float_values("e4m3fn").numpy()
    small = small[np.isfinite(small)]
    rows = [rng.choice(small, (200, count)), rng.choice(small[56:100], (200, count)) * np.float32(0.0123),
            2.0 ** rng.integers(-9, 9, (50, count)), rng.integers(-40000, 40000, (50, count)) * 5e-324,
            rng.integers(1, 1 << 15, (50, count)) * (2.0**39 + 1), -1.0 * rng.integers(0, 40, (50, count)),
            rng.standard_normal((50, 1)) * np.ones(count), np.zeros((2, count)),
            rng.integers(-(2**63), 2**63, (300, count)).view(np.float64), np.full((1, count), np.inf)]  # fmt: skip
    return np.concatenate(rows)


@pytest.mark.parametrize("count", [1, 2, 8, 33])
def test_steps_of_scales_equal_the_definition(count: int) -> None:
    runs = _rows_of_scales(np.random.default_rng(count), count)
    step, number = np.empty(len(runs)), np.empty(runs.shape, np.int64)

    bad = levels.stepped(runs, step, number)

    wanted = stepped_definition(torch.from_numpy(runs))
    good = ((torch.from_numpy(runs) / wanted[0].unsqueeze(-1)).abs() <= 1 << 15).all(-1) | (torch.from_numpy(runs) == 0).all(-1)
    assert bad == wanted[2] == int((~good).sum())
    assert torch.equal(torch.from_numpy(step).view(torch.int64)[good], wanted[0].view(torch.int64)[good])
    assert torch.equal(torch.from_numpy(number)[good], wanted[1][good])


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e8m0", "ue4m3"])
@pytest.mark.parametrize("count", [1, 8, 32])
def test_steps_of_codes_are_those_of_their_numbers(name: str, count: int) -> None:
    rng, book = np.random.default_rng(count), grids.float_values(name)
    finite = torch.isfinite(book).nonzero().reshape(-1).numpy().astype(np.uint8)
    near = finite[(rng.integers(0, len(finite), (200, 1)) + rng.integers(0, 9, (200, count))) % len(finite)]
    equal, zeros = np.broadcast_to(finite[rng.integers(0, len(finite), (40, 1))], (40, count)), np.zeros((2, count), np.uint8)
    for codes in (near, equal, zeros, rng.choice(finite[:96], (200, count))):
        for row in torch.from_numpy(codes.copy()).split(1):
            step, number, bad = stepped_definition(book[row.to(torch.int64)])
            if bad:
                with pytest.raises(rewrite.Refused):
                    stepped_codes(row, book, 16, 16 * count)
                continue
            made = stepped_codes(row, book, 16, 16 * count)
            assert torch.equal(made.step[0].view(torch.int64), step.view(torch.int64)) and torch.equal(made.number.to(torch.int64), number)


@RUNS
@given(shapes, seeds)
def test_ranges_times_factors_equal_the_definition(shape: tuple[int, int, int], seed: int) -> None:
    rows, runs, count = shape
    rng = np.random.default_rng(seed)
    low, high, factor = (torch.from_numpy(rng.integers(-127, 128, (rows, runs * count)).astype(np.int16)) for _ in range(3))
    found = [np.empty(rows * runs, np.int16) for _ in range(2)]

    levels.folded_range(*(p.view(-1, count).numpy() for p in (low, torch.maximum(low, high), factor)), *found)

    wanted = folded_range_definition(low, torch.maximum(low, high), factor, count)
    assert all(torch.equal(torch.from_numpy(f).view(rows, runs), w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_a_plane_equals_rounding_once(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    halves = torch.arange(1 << 16).to(torch.int16)
    held = torch.cat([halves.view(torch.float16).double(), halves.view(torch.bfloat16).double()])
    held = held[torch.isfinite(held)]
    ties = (held[:-1] + held[1:]) / 2
    bits = torch.from_numpy(rng.integers(-(2**63), 2**63, 50000).view(np.float64))
    for values in (torch.cat([held, ties, torch.nextafter(ties, torch.full_like(ties, 1e300))]), bits[torch.isfinite(bits)], bits):
        stored, wrong = rounded(Real(values), dtype)
        wanted = round_once(Real(values), dtype)
        word = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(stored.view(word), wanted.view(word)) and wrong == inexact(Real(values), wanted)
    assert steps.round_line(np.array([np.nan, 1.0, 0.1]), 2, np.empty(3, np.uint16)) == (2, 1)


def test_finite_numbers_are_known_by_their_bits() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(1 << 16).to(torch.int16).view(dtype)
        assert all(all_finite(number) == bool(torch.isfinite(number)) for number in every.reshape(-1, 1)[::97])
        assert all_finite(every[torch.isfinite(every)]) and not all_finite(every)


@RUNS
@given(
    st.sampled_from((16, 32)), seeds, st.sampled_from((torch.uint8, torch.int8)), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from((("e2m1", 16), ("e2m3", 64))),
)  # fmt: skip
def test_codes_of_a_table_in_one_pass_equal_the_definition(
    width: int, seed: int, dtype: torch.dtype, flips: bool, folds: bool, single: bool, grid: tuple[str, int]
) -> None:
    rng = np.random.default_rng(seed)
    name, entries = grid
    t = QuantizedTensor((3, 256), torch.from_numpy(rng.integers(0, entries, (3, 256)).astype(np.uint8)).view(dtype), Float(name),
                        (Param(torch.ones(3, 1), Tile((1, 256))),))  # fmt: skip
    shift = torch.from_numpy(rng.integers(0, 100, (3, 256 // width)).astype(np.int16))
    shift = shift[:1, :1].expand(shift.shape) if single and flips else shift[:1, :1] if single else shift
    flip = torch.from_numpy(rng.random(shift.shape) < 0.5) if flips else None
    factor = torch.from_numpy(rng.integers(1, 5, (3, 16)).astype(np.int16)) if folds else None
    decision = reencode.Fit("exact", "", (), width, shift, flip, Integer(8), t.scales[0], None, None, factor, 16)

    whole = rewrite.whole_codes(t).codes.to(torch.int64)
    each = whole if factor is None else whole * factor.repeat_interleave(16, -1)
    turned = each if flip is None else torch.where(flip.repeat_interleave(width, -1), -each, each)
    moved = turned + (shift if shift.numel() == 1 else shift.repeat_interleave(width, -1))
    assert torch.equal(reencode.finish(t, decision).codes, moved.to(torch.uint8))
    wanted = rewrite.block_range(rewrite.whole_codes(t), width)
    assert all(torch.equal(a, b) for a, b in zip(rewrite.whole_range(t, width), wanted, strict=True))


@RUNS
@given(shapes, seeds)
def test_two_numbers_in_a_block_equal_the_definition(shape: tuple[int, int, int], seed: int) -> None:
    rows, runs, width = shape
    rng = np.random.default_rng(seed)
    zero, most = (torch.from_numpy(rng.integers(0, 3, (rows * runs,)).astype(np.int16)) for _ in range(2))
    signs = torch.from_numpy(rng.choice([-1, 1, 1, 1], (rows * runs, width)).astype(np.int16))
    codes = zero.unsqueeze(-1) + signs * most.unsqueeze(-1) + torch.from_numpy((rng.random((rows * runs, width)) < 0.01).astype(np.int16))
    wanted = int(((codes - zero.unsqueeze(-1)).abs() != most.unsqueeze(-1)).any(-1).sum())
    assert blocks.beside(codes.numpy(), zero.numpy(), most.numpy()) == wanted
