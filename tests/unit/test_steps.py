"""``qformats.steps`` against the definition, in random forms; the tests of each format do it on fixtures."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from qformats import steps
from qformats.real import round_once
from qformats.scheme import Flat, Float, Integer, Table, Tile, whole
from qformats.tensor import Param, QuantizedTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SMALL = {"e4m3fn": 256, "e5m2": 256, "e2m3": 64, "e2m1": 16, "nf4": 16, "fp4": 16, "iq4_nl": 16, "e8m0": 256}
INTEGERS = (Integer(4), Integer(3), Integer(8), Integer(8, signed=True))
SPECIAL = (0.0, -0.0, float("inf"), float("nan"), 1e-7, 65504.0, 3e38)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, but any NaN equals any other."""
    numbers = a == a
    return a.dtype == b.dtype and torch.equal(numbers, b == b) and torch.equal(a[numbers], b[numbers]) and torch.equal(
        torch.signbit(a[numbers]), torch.signbit(b[numbers])
    )  # fmt: skip


class Forms:
    """Random tensors of a few rows in every form that ``steps`` serves, and some that it does not."""

    def __init__(self, seed: int) -> None:
        self.chance, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def whole_numbers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator).to(dtype)

    def floats(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = torch.randn(shape, generator=self.generator)
        if self.chance.random() < 0.4:
            x = x * torch.exp2(self.whole_numbers(-20, 20, shape, torch.float32))
        if self.chance.random() < 0.15:
            x.view(-1)[self.chance.randrange(x.numel())] = self.chance.choice(SPECIAL)
        return x.to(dtype)

    def block(self, shape: tuple[int, int]) -> Tile | Flat:
        n, k = shape
        blocks: list[Tile | Flat] = [Tile((1, 16)), Tile((1, 32)), Tile((2, 16)), Tile((1, k)), whole(shape), Tile((1, 20)), Tile((1, 2))]
        return self.chance.choice([*blocks, Tile((128, 32)), *(Flat(size) for size in (8, 16) if n * k % size == 0)])

    def param(self, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], inverse: bool = False) -> Param:
        block, kind = self.block(shape), self.chance.random()
        counts = block.counts(shape)
        if kind < 0.2:
            return Param(QuantizedTensor(counts, self.whole_numbers(0, 126, counts, torch.uint8), Float("e4m3fn")), block, inverse)
        if kind < 0.35 and len(counts) == 2:
            factor, moved = (Param(self.floats((1, 1), torch.float32), whole(counts)) for _ in range(2))
            codes = self.whole_numbers(0, 255, counts, torch.uint8)
            rounded_to = self.chance.choice([None, torch.float32, torch.bfloat16])
            return Param(QuantizedTensor(counts, codes, Integer(8), (factor,), None, moved), block, inverse, rounded_to)
        dtype = self.chance.choice(dtypes)
        if dtype.is_floating_point:
            return Param(self.floats(counts, dtype), block, inverse)
        low, high = (0, 200) if dtype == torch.uint8 else (-20, 20)
        return Param(self.whole_numbers(low, high, counts, dtype), block)

    def tensor(self) -> QuantizedTensor:
        pick, shape = self.chance.choice, (self.chance.choice((1, 2, 4, 6)), self.chance.choice((32, 48, 64, 96)))
        name: Any = pick((*INTEGERS, *SMALL))
        if isinstance(name, Integer):
            grid: Any = name
            codes = self.whole_numbers(grid.lowest, grid.highest, shape, torch.int8 if grid.signed else torch.uint8)
        else:
            grid = Table(name) if name in ("nf4", "fp4", "iq4_nl") else Float(name)
            codes = self.whole_numbers(0, SMALL[name] - 1, shape, torch.uint8)
        scales = tuple(self.param(shape, FLOATS, self.chance.random() < 0.2) for _ in range(pick((0, 1, 1, 1, 2))))
        zero = pick((None, None, self.param(shape, (*FLOATS, torch.uint8, torch.int8, torch.int16))))
        return QuantizedTensor(shape, codes, grid, scales, zero, pick((None, None, self.param(shape, FLOATS))))


@pytest.mark.parametrize("compiled", [True, False])
def test_values_are_those_of_the_definition(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(steps, "_loops", lambda codes: None)
    forms, served = Forms(4), {"rounded": 0, "exact": 0}
    for _ in range(250):
        t = forms.tensor()
        step, dtype, by_factor = forms.chance.choice(FLOATS), forms.chance.choice(FLOATS), forms.chance.random() < 0.2
        made = steps.rounded(t, step, dtype, by_factor=by_factor)
        if made is not None:
            served["rounded"] += 1
            assert same(made, t.evaluate_in(step, by_factor=by_factor).to(dtype)), (t.scheme, step, dtype, by_factor)
        dtype = forms.chance.choice((*FLOATS, torch.float64))
        made = steps.exact(t, dtype)
        if made is not None:
            served["exact"] += 1
            assert same(made, round_once(t.real(), dtype)), (t.scheme, dtype)
    assert min(served.values()) > 100


def test_every_rounding_of_a_product_to_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops' own rounding against torch's, from the largest to the subnormal, ties and NaN included."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    patterns = torch.randint(-(1 << 31), 1 << 31, (64, 16), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    patterns[:8] = (torch.arange(128, dtype=torch.int32) * (1 << 24) + 0x1000).reshape(8, 16)  # ties of float16 at every magnitude
    patterns[8:16] = patterns[:8] + 0x7000  # and of bfloat16
    t = QuantizedTensor((64, 256), codes, Float("e5m2"), (Param(patterns.view(torch.float32), Tile((1, 16))),))
    for dtype in (torch.float16, torch.bfloat16):
        made = steps.rounded(t, torch.float32, dtype)
        monkeypatch.setattr(steps, "_loops", lambda codes: None)
        wanted = steps.rounded(t, torch.float32, dtype)
        monkeypatch.undo()
        assert made is not None and wanted is not None and same(made, wanted)
        assert same(made, t.evaluate_in(torch.float32).to(dtype))


def test_codes_that_the_grid_lacks_are_left_to_the_definition() -> None:
    codes = torch.full((2, 32), 16, dtype=torch.uint8)
    assert steps.rounded(QuantizedTensor((2, 32), codes, Float("e2m1")), torch.float32, torch.float32) is None


def test_other_forms_are_left_to_the_definition() -> None:
    codes = torch.ones((4, 32), dtype=torch.uint8)
    scale = Param(torch.ones((1, 32)), Tile((4, 1)))
    signs = torch.zeros((4, 4), dtype=torch.uint8)
    for t in (
        QuantizedTensor((4, 32), codes, Integer(4), (scale,)),
        QuantizedTensor((4, 32), codes, Integer(4), signs=signs),
        QuantizedTensor((4, 32), codes.to(torch.int16), Integer(9)),
    ):
        assert steps.exact(t, torch.float32) is None and steps.rounded(t, torch.float32, torch.float32) is None
