"""From every block type to every other through the search: exact is equal in every bit of the value, codes-exact within the bound.

Blocks are random bits under scales of ordinary size, and the fixtures' own, which have zero, subnormal and huge ones. The judges are the
canonical tensor's exact value in float64, and ggml's own dequantizer of the blocks that were written.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from qformats.formats import ggml, gptq
from qformats.formats.protocol import Target
from qformats.reencode import Fit, finish, fit
from qformats.rewrite import Refused
from qformats.scheme import Integer, Storage, SubScale, Tile
from qformats.tensor import Param, QuantizedTensor, constant

FIXTURES = Path(__file__).parents[3] / "fixtures" / "ggml"
NAMES = tuple(ggml.BLOCK_TYPES)
# Kinds of the pairs that keep codes, for random blocks of scales around 0.02; all others among block types are refused.
LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
EXACT = {
    "Q4_0": ("Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1"),
    "Q4_1": ("Q4_1", "Q5_1"),
    "Q5_0": ("Q5_0", "Q8_0", "Q5_1"),
    "Q5_1": ("Q5_1",),
    "Q8_0": ("Q8_0",),
    "Q2_K": ("Q2_K",),
    "Q3_K": ("Q3_K", "Q6_K", "Q8_0"),
    "Q4_K": ("Q4_K", "Q5_K"),
    "Q5_K": ("Q5_K",),
    "Q6_K": ("Q6_K",),
    "IQ3_XXS": ("Q6_K",),
    "IQ3_S": ("Q6_K",),
    "IQ1_M": ("Q6_K",),
    "IQ1_S": ("Q6_K",),
    "IQ4_NL": ("IQ4_NL", "Q8_0"),
    "IQ4_XS": ("IQ4_XS",),
    "MXFP4": ("MXFP4", "Q5_0", "Q5_1", "Q8_0"),
    "NVFP4": ("NVFP4",),
    "Q1_0": ("Q1_0", "Q2_0", *LEGACY),
    "Q2_0": ("Q2_0", *LEGACY),
    "TQ1_0": ("TQ1_0", "TQ2_0", "Q2_0", *LEGACY, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    "TQ2_0": ("Q2_0", *LEGACY, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),  # random blocks hold a code 3, which TQ1_0 lacks
}
CODES_EXACT = {
    "Q4_K": ("Q4_1", "Q5_1"),
    "Q5_K": ("Q5_1",),
    "IQ2_XXS": ("Q8_0",),
    "IQ3_XXS": ("Q8_0",),
    "IQ3_S": ("Q5_0", "Q5_1", "Q8_0"),
    "IQ1_S": ("Q5_0", "Q5_1", "Q8_0"),
    "IQ4_XS": ("IQ4_NL", "Q8_0"),
}


@cache
def ordinary(name: str) -> QuantizedTensor:
    """Random bits under fp16 scales of 1/32 … 1/16 (so that a subnormal never comes), four rows of 512."""
    kind, rng = ggml.BLOCK_TYPES[name], np.random.default_rng(NAMES.index(name))
    count = 4 * 512 // kind.block
    blocks = rng.integers(0, 256, (count, kind.nbytes), dtype=np.uint8)
    halves = rng.uniform(2.0**-5, 2.0**-4, (count, 2)).astype(np.float16) * rng.choice([-1, 1], (count, 2)).astype(np.float16)
    for i, at in enumerate(kind.halves):
        blocks[:, at : at + 2] = halves[:, i : i + 1].view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(110, 140, count)
    if name == "NVFP4":
        blocks[:, :4] = rng.integers(20, 100, (count, 4))
    if name == "IQ1_M":
        bits = halves[:, 0].view(np.uint16)
        for i in range(4):
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | ((bits >> 4 * i & 15) << 4).astype(np.uint8)
    return read(name, blocks.reshape(4, -1))


def read(name: str, blocks: np.ndarray) -> QuantizedTensor:  # type: ignore[type-arg]
    return ggml._from_blocks(ggml.BLOCK_TYPES[name], np.ascontiguousarray(blocks))


def attempt(t: QuantizedTensor, storage: Storage, *, rounding: bool = True) -> Fit | None:
    for allowed in (False, True)[: 1 + rounding]:
        try:
            return fit(t, storage, rounding=allowed)
        except Refused as refusal:
            assert str(refusal)
    return None


def check(t: QuantizedTensor, storage: Storage, found: Fit) -> QuantizedTensor:
    """The written form is accepted; exact is equal in float64 and in ggml's floats, codes-exact within relative 2^-11 of each parameter."""
    made = finish(t, found)
    assert ggml.can_store(storage, made.scheme), ggml.can_store(storage, made.scheme)
    before, after = t.dequantize(torch.float64).numpy(), made.dequantize(torch.float64).numpy()
    (piece,) = ggml.write(storage, made, 0, t.shape)
    out = np.empty(t.shape, np.float32)
    ggml.dequantize(storage.type.upper(), piece.array, out)
    if found.kind == "exact":
        assert np.array_equal(before, after, equal_nan=True)
        assert np.array_equal(out, before.astype(np.float32), equal_nan=True)
    else:
        assert found.kind == "codes-exact" and "2^-11" in found.reason
        assert (np.abs(before - after) <= reach(t, made)).all()
    return made


def reach(t: QuantizedTensor, made: QuantizedTensor) -> np.ndarray:  # type: ignore[type-arg]
    """What rounding scale and offset once can move each weight: the bound of the reason, times the code for the scale."""
    codes = made.replace(scales=(), offset=None).dequantize(torch.float64).abs()
    parts = made.replace(offset=None).dequantize(torch.float64).abs() * 2.0**-11 + codes * 2.0**-25
    if len(made.scales) == 1 and isinstance(made.scales[0].values, QuantizedTensor):
        parts = parts + codes * 2.0**-25 * 255
    if made.offset is not None:
        parts = parts + made._spread(made.offset).high.abs() * 2.0**-11 + 2.0**-25
    return (parts * 1.001).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_kinds_of_every_pair_of_block_types(name: str) -> None:
    t, found = ordinary(name), {}
    for other, kind in ggml.BLOCK_TYPES.items():
        decision = attempt(t, kind.storage)
        if decision is not None:
            found[other] = decision.kind
            check(t, kind.storage, decision)
    wanted = dict.fromkeys(EXACT.get(name, ()), "exact") | dict.fromkeys(CODES_EXACT.get(name, ()), "codes-exact")
    assert found == wanted


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_extreme_scales_stay_exact_or_within_the_bound(name: str) -> None:
    blocks = np.load(FIXTURES / f"{name.lower()}.npz")["blocks"]
    for row in blocks[:2]:
        t = read(name, row[None])
        for kind in (ggml.BLOCK_TYPES[other] for other in ("Q4_1", "Q5_0", "Q6_K", "Q8_0")):
            if t.shape[-1] % kind.block == 0 and (decision := attempt(t, kind.storage)) is not None:
                check(t, kind.storage, decision)


def test_a_type_of_one_bit_takes_plus_and_minus_of_any_block() -> None:
    codes = torch.tensor([[0, 2] * 64 + [1] * 128], dtype=torch.uint8)
    scale = Param(torch.tensor([[0.5, -0.25]], dtype=torch.float16), Tile((1, 128)))
    t = QuantizedTensor((1, 256), codes, Integer(2), (scale,), constant(1, (1, 256)))
    storage = ggml.BLOCK_TYPES["Q1_0"].storage
    made = check(t, storage, fit(t, storage))
    assert made.scales[0].values.tolist() == [[0.5, 0.0]]  # type: ignore[union-attr]
    with pytest.raises(Refused, match="plus and minus"):
        fit(t.replace(codes=codes.clone().fill_(1).index_fill(1, torch.tensor([3]), 2)), storage)


# ---------------------------------------------------------------- integers of any width into the narrow and the two-level types


@st.composite
def integers(draw: st.DrawFn) -> QuantizedTensor:
    """(2, 512) codes of 2, 3, 4, 5, 6 or 8 bits on groups of 16 … 512, scales often multiples of one another."""
    bits, group = draw(st.sampled_from([2, 3, 4, 6, 8])), draw(st.sampled_from([16, 32, 64, 128, 256, 512]))
    seed = draw(st.integers(0, 1 << 20))
    rng = torch.Generator().manual_seed(seed)
    top, shape, counts = (1 << bits) - 1, (2, 512), (2, 512 // group)
    low = draw(st.integers(0, top))
    codes = torch.randint(low, draw(st.integers(low, top)) + 1, shape, generator=rng).to(torch.uint8)
    base = draw(st.sampled_from([1.0, -0.0517578125, 2.0**-24, 2.0**-20 * 3, 0.0999755859375, 1000.0]))
    pool = torch.tensor(draw(st.sampled_from([[1.0], [1.0, 2.0], [1.0, -1.0], [1.0, 2.0, 4.0, 0.0], [3.0, 6.0], [1.0, 1.3]])))
    scale = (base * pool[torch.randint(0, len(pool), counts, generator=rng)]).to(torch.float16)
    tile = Tile((1, group))
    form = draw(st.sampled_from(["middle", "zero", "mixed"]))
    fixed = {"middle": (top + 1) // 2, "zero": draw(st.integers(0, top + 1))}.get(form)
    mixed = torch.randint(0, top + 2, counts, generator=rng).to(torch.int16)
    zero = Param(mixed, tile) if fixed is None else constant(fixed, shape)
    return QuantizedTensor(shape, codes, Integer(bits), (Param(scale, tile),), zero)


@given(integers(), st.sampled_from([n for n in NAMES if isinstance(ggml.BLOCK_TYPES[n].storage.grid, Integer)]))
@settings(max_examples=60, deadline=None)
def test_integers_into_any_type_are_exact_or_refused(t: QuantizedTensor, name: str) -> None:
    storage = ggml.BLOCK_TYPES[name].storage
    decision = attempt(t, storage, rounding=False)
    if decision is not None:
        assert decision.kind == "exact"
        check(t, storage, decision)


def affine(bits: int, zero: int, group: int, low: int = 0, high: int | None = None, scales: tuple[float, ...] = (0.1,)) -> QuantizedTensor:
    top = (1 << bits) - 1 if high is None else high
    codes = (torch.arange(512) % (top - low + 1) + low).to(torch.uint8).reshape(1, 512)
    plane = torch.tensor([scales * (512 // group // len(scales))], dtype=torch.float16)
    return QuantizedTensor((1, 512), codes, Integer(bits), (Param(plane, Tile((1, group))),), constant(zero, (1, 512)))


PATHS = [
    ("2-bit zero 1", affine(2, 1, 64), "Q2_0", True),
    ("2-bit zero 2, flipped", affine(2, 2, 64), "Q2_0", True),
    ("2-bit zero 0", affine(2, 0, 64), "Q2_0", False),
    ("2-bit groups of 32 of one scale", affine(2, 1, 32), "Q2_0", True),
    ("2-bit groups of 32 of two scales, flipped codes of twice the size", affine(2, 1, 32, scales=(0.1, 0.3)), "Q2_0", False),
    ("2-bit zero 3 a channel", affine(2, 3, 512), "Q2_K", True),
    ("2-bit zero 4 a channel", affine(2, 4, 512), "Q2_K", True),
    ("2-bit zero 15 under scales of 2 and 1", affine(2, 15, 16, scales=(0.5, 0.25)), "Q2_K", False),
    ("2-bit zero 3 under scales of 2 and 1", affine(2, 3, 16, scales=(0.5, 0.25)), "Q2_K", True),
    ("2-bit groups of 128 of two odd scales", affine(2, 1, 128, scales=(0.1, 0.3)), "Q2_K", False),
    ("3-bit symmetric a channel", affine(3, 4, 512), "Q3_K", True),
    ("3-bit zero 3, flipped", affine(3, 3, 256), "Q3_K", True),
    ("3-bit zero 2", affine(3, 2, 256), "Q3_K", False),
    ("3-bit scales of both signs", affine(3, 4, 16, scales=(0.5, -0.25)), "Q3_K", True),
    ("6-bit a channel", affine(6, 32, 512), "Q6_K", True),
    ("4-bit of any zero", affine(4, 16, 256), "Q6_K", True),
    ("8-bit codes of 6 bits", affine(8, 128, 256, 96, 159), "Q6_K", True),
    ("8-bit codes of 7 bits", affine(8, 128, 256, 64, 191), "Q6_K", False),
    ("6-bit powers of two", affine(6, 32, 32, scales=(1.0, 0.5, 2.0**-6, 0.125)), "Q6_K", True),
    ("6-bit powers too far apart", affine(6, 32, 32, scales=(1.0, 2.0**-8)), "Q6_K", False),
    ("ternary", affine(2, 1, 256, 0, 2), "TQ1_0", True),
    ("ternary", affine(2, 1, 256, 0, 2), "TQ2_0", True),
    ("four values", affine(2, 1, 256), "TQ2_0", False),
    ("ternary in 4 bits", affine(4, 8, 256, 7, 9), "TQ1_0", True),
    ("plus and minus", affine(1, 0, 128), "Q1_0", False),
    ("4-bit a channel", affine(4, 11, 512), "Q5_K", True),
]  # fmt: skip


@pytest.mark.parametrize(("t", "name", "fits"), [p[1:] for p in PATHS], ids=[f"{p[0]} to {p[2]}" for p in PATHS])
def test_table_of_integers(t: QuantizedTensor, name: str, fits: bool) -> None:
    storage = ggml.BLOCK_TYPES[name].storage
    decision = attempt(t, storage, rounding=False)
    assert (decision is not None) == fits
    if decision is not None:
        check(t, storage, decision)


def test_unit_sub_scales_are_33_in_q3_k() -> None:
    t, storage = affine(3, 4, 512), ggml.BLOCK_TYPES["Q3_K"].storage
    held = finish(t, fit(t, storage)).scales[0].values
    assert isinstance(held, QuantizedTensor) and bool((held.codes == 33).all())


@pytest.mark.parametrize("name", ["TQ1_0", "Q2_0", "Q1_0"])
def test_narrow_types_become_two_bit_integers_around_one(name: str) -> None:
    t = ordinary(name)
    group = str(ggml.BLOCK_TYPES[name].block)
    found = [s for s in gptq.storages(Target("gptq", "int2", {"group": group}), t.scheme) if attempt(t, s, rounding=False)]
    assert found
    made = finish(t, fit(t, found[0]))
    assert torch.equal(made.dequantize(torch.float64), t.dequantize(torch.float64))


def test_bf16_scales_of_super_blocks_round_within_the_bound() -> None:
    t = affine(3, 4, 512)
    bf16 = t.replace(scales=(Param(torch.tensor([[1.2345e-6]], dtype=torch.bfloat16), Tile((1, 512))),))
    storage = ggml.BLOCK_TYPES["Q3_K"].storage
    with pytest.raises(Refused, match="float16"):
        fit(bf16, storage)
    check(bf16, storage, fit(bf16, storage, rounding=True))


def test_default_candidates_of_narrow_codes_come_smallest_first_and_leave_int4_alone() -> None:
    target = Target("gguf", None)
    assert {s.type for s in ggml.storages(target, affine(2, 1, 64).scheme)} > {"q1_0", "tq1_0", "tq2_0", "q2_0", "q2_k", "q3_k"}
    wide = {s.type for s in ggml.storages(target, affine(4, 8, 64).scheme)}
    assert wide == {"q4_0", "q4_k", "q4_1", "q5_0", "q5_k", "q5_1", "q6_k", "q8_0"}


def test_sub_scales_say_their_range() -> None:
    assert (SubScale(16, Integer(6), 32).lowest, SubScale(16, Integer(6), 32).highest) == (-32, 31)
