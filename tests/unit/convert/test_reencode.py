"""The search for relabellings: what it calls exact is exact, what it rounds stays within the bound, what it refuses has no relabelling.

The judge is brute force in rational arithmetic over every flip, shift and zero point of a small tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rationals import round_fraction, weights

from qformats.formats import awq, ggml, gptq
from qformats.formats.protocol import Target
from qformats.reencode import finish, fit
from qformats.rewrite import Refused
from qformats.scheme import Integer, Storage, Tile, Yes
from qformats.tensor import Param, QuantizedTensor, constant

GGML = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k")
INTEGER_TARGETS = (
    Target("gptq", "int4"), Target("gptq", "int4", {"group": "64"}), Target("gptq", "int4", {"group": "-1"}), Target("gptq", "int8"),
    Target("gptq", "int2"), Target("gptq", "int3", {"format": "v2"}), Target("awq", "int4"), Target("awq", "int4", {"group": "64"}),
    Target("awq", "int4", {"version": "gemv"}), Target("awq", "int4", {"sym": ""}),
)  # fmt: skip
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Source:
    """One-row-block integer tensor: ``codes`` (N, K); ``scales`` and ``zeros`` or ``offsets`` (N, G) on groups of ``group``."""

    bits: int
    group: int
    codes: list[list[int]]
    scales: list[list[float]]
    zeros: list[list[int]] | None = None
    offsets: list[list[float]] | None = None
    dtype: str = "float16"
    signed: bool = False

    def tensor(self) -> QuantizedTensor:
        codes = torch.tensor(self.codes, dtype=torch.int8 if self.signed else torch.uint8)
        tile, shape = Tile((1, self.group)), tuple(codes.shape)
        zero = None
        if self.zeros is not None:
            plane = torch.tensor(self.zeros, dtype=torch.int16)
            single = bool((plane == plane[0, 0]).all())
            zero = constant(int(plane[0, 0]), shape) if single else Param(plane, tile)
        offset = None if self.offsets is None else Param(torch.tensor(self.offsets, dtype=torch.float16), tile)
        scale = Param(torch.tensor(self.scales, dtype=DTYPES[self.dtype]), tile)
        return QuantizedTensor(shape, codes, Integer(self.bits, self.signed), (scale,), zero, offset)


HALF_SCALES = st.sampled_from([1.0, -1.0, 0.125, 0.0517578125, -0.0029296875, 0.01305389404296875, 3.0, 0.0999755859375, 65504.0, 2.0**-24])
OTHER_SCALES = st.sampled_from([1.0, -0.5, 2.0**-17, 2.0**-18 * 1.0078125, 2.0**-24, 1e-3, 65280.0, 65536.0, 3.1415927, -0.1, 2.0**-30])


@st.composite
def sources(
    draw: st.DrawFn, bits: tuple[int, ...] = (2, 3, 4, 8), columns: tuple[int, ...] = (32, 64), sizes: tuple[int, ...] = (32, 64)
) -> Source:
    width, k, n = draw(st.sampled_from(bits)), draw(st.sampled_from(columns)), draw(st.sampled_from([1, 2]))
    group = draw(st.sampled_from([g for g in sizes if g <= k]))
    top, groups = (1 << width) - 1, k // group
    blocks = [draw(_block(top, k // 32)) for _ in range(n)]
    form = draw(st.sampled_from(["zeros", "zeros", "constant", "offset", "signed"]))
    dtype = draw(st.sampled_from(["float16", "float16", "float16", "bfloat16", "float32"]))
    pool = HALF_SCALES if dtype == "float16" else OTHER_SCALES
    same = draw(st.booleans())
    one = draw(pool)
    scales = [[one if same else draw(pool) for _ in range(groups)] for _ in range(n)]
    if form == "signed":
        return Source(width, group, [[q - (top + 1) // 2 for q in row] for row in blocks], scales, dtype=dtype, signed=True)
    if form == "offset":
        multiples = st.sampled_from([0.0, -8.0, -4.0, 2.0, 0.25, -0.3330078125])
        offsets = [[_half(Fraction(s) * Fraction(draw(multiples))) for s in row] for row in scales]
        return Source(width, group, blocks, scales, None, offsets, dtype)
    zero = st.integers(0, top + 1)
    fixed = draw(zero)
    zeros = [[fixed if form == "constant" else draw(zero) for _ in range(groups)] for _ in range(n)]
    return Source(width, group, blocks, scales, zeros, None, dtype)


@st.composite
def _block(draw: st.DrawFn, top: int, count: int) -> list[int]:
    """Codes of ``count`` blocks of 32, each in a range of its own so that narrow and full blocks both occur."""
    row: list[int] = []
    for _ in range(count):
        low = draw(st.integers(0, top))
        high = draw(st.sampled_from([low, top, min(top, low + 7), min(top, low + 15)]))
        inner = [draw(st.integers(low, high)) for _ in range(3)]
        row += ([low, high, *inner] * 7)[:32]
    return row


def _half(value: Fraction) -> float:
    rounded = round_fraction(value, torch.float16)
    return rounded if abs(rounded) < float("inf") else 1.0


def storages(target: Target, t: QuantizedTensor) -> list[Storage]:
    module = {"gguf": ggml, "gptq": gptq, "awq": awq}[target.format]
    found: list[Storage] = module.storages(target, t.scheme)
    return found


def verdict(storage: Storage, t: QuantizedTensor) -> Any:
    module = ggml if storage.type in GGML or storage.type.lower() in GGML else (awq if "order" in storage.options else gptq)
    return module.can_store(storage, t.scheme)


# ---------------------------------------------------------------- the judge


def is_half(value: Fraction) -> bool:
    rounded = round_fraction(value, torch.float16)
    return bool(abs(rounded) < float("inf") and Fraction(rounded) == value)


def runs(source: Source, width: int) -> list[list[tuple[Fraction, Fraction | None, list[int]]]]:
    """For each row, (scale, zero, codes) of runs of ``width`` columns; zero None where the offset is no multiple of the scale."""
    result = []
    for n, row in enumerate(source.codes):
        line = []
        for at in range(0, len(row), width):
            g = at // source.group
            scale = Fraction(torch.tensor(source.scales[n][g], dtype=DTYPES[source.dtype]).item())
            zero: Fraction | None = Fraction(0)
            if source.zeros is not None:
                zero = Fraction(source.zeros[n][g])
            if source.offsets is not None:
                quotient = -Fraction(source.offsets[n][g]) / scale
                zero = quotient if quotient.denominator == 1 else None
            line.append((scale, zero, row[at : at + width]))
        result.append(line)
    return result


def possible(source: Source, storage: Storage) -> bool:
    """Whether any shift, flip or zero point writes ``source`` as ``storage`` with the same real numbers."""
    k = len(source.codes[0])
    group = min(storage.group or k, k)
    if k % storage.k_multiple:
        return False
    width = min(group, source.group)
    low, high = storage.grid.lowest, storage.grid.highest
    rows = runs(source, width)
    if not all(is_half(scale) for row in rows for scale, _, _ in row):
        return False
    if storage.offset is not None and storage.sub_scale is None:
        return all(_offset_possible(source, run, i, n, width, high) for n, row in enumerate(rows) for i, run in enumerate(row))
    grouped = [row[i : i + group // width] for row in rows for i in range(0, len(row), group // width)]
    if isinstance(storage.zero_point, int) or (storage.zero_point is None and storage.sub_scale is None):
        centre = storage.zero_point if isinstance(storage.zero_point, int) else 0
        return all(_constant_possible(members, low - centre, high - centre) for members in grouped)
    zeros = storage.zero_point if isinstance(storage.zero_point, tuple) else (0, storage.sub_scale.highest)  # type: ignore[index]
    return all(_zero_possible(members, low, high, zeros) for members in grouped)


def _same_scale(members: list[tuple[Fraction, Fraction | None, list[int]]]) -> bool:
    return len({scale for scale, _, _ in members}) == 1


def _constant_possible(members: list[Any], low: int, high: int) -> bool:
    """Code minus zero, or its negative with a negative scale, in ``low … high``; one scale for all members."""
    for sign in (1, -1):
        target = members[0][0] * sign
        for scale, zero, codes in members:
            if zero is None:
                return False
            turn = 1 if scale == target else -1 if scale == -target else 0
            if not turn or not all(low <= turn * (q - zero) <= high for q in codes):
                break
        else:
            return True
    return False


def _zero_possible(members: list[Any], low: int, high: int, zeros: tuple[int, int]) -> bool:
    if any(zero is None for _, zero, _ in members) or not _same_scale(members):
        return False
    return any(all(low <= q - zero + z <= high for _, zero, codes in members for q in codes) for z in range(zeros[0], zeros[1] + 1))


def _offset_possible(source: Source, run: Any, i: int, n: int, width: int, top: int) -> bool:
    scale, zero, codes = run
    if source.offsets is not None:  # its codes and offsets are kept as they are
        return bool(max(codes) <= top)
    for shift in range(-300, 301):
        if all(0 <= q + shift <= top for q in codes) and is_half(scale * (-zero - shift)):
            return True
        if all(0 <= shift - q <= top for q in codes) and is_half(scale * (shift - zero)):
            return True
    return False


# ---------------------------------------------------------------- properties


def check_form(storage: Storage, out: QuantizedTensor) -> None:
    assert isinstance(verdict(storage, out), Yes), verdict(storage, out)
    assert storage.grid.lowest <= int(out.codes.min()) and int(out.codes.max()) <= storage.grid.highest
    if isinstance(storage.zero_point, tuple):
        assert out.zero_point is not None and isinstance(out.zero_point.values, torch.Tensor)
        assert storage.zero_point[0] <= float(out.zero_point.values.min()) and float(out.zero_point.values.max()) <= storage.zero_point[1]


def repeated(source: Source, times: int) -> Source:
    """The rows of ``source`` over and over, as many as a packing needs."""
    zeros, offsets = (None if plane is None else plane * times for plane in (source.zeros, source.offsets))
    return replace(source, codes=source.codes * times, scales=source.scales * times, zeros=zeros, offsets=offsets)


def check_exact(source: Source, storage: Storage) -> bool:
    """Fit without rounding: equal rationals, or a refusal that brute force confirms. True if it fitted."""
    source = repeated(source, storage.n_multiple // gcd(len(source.codes), storage.n_multiple))
    t = source.tensor()
    try:
        decision = fit(t, storage)
    except Refused as refusal:
        assert not possible(source, storage), f"refused, but a relabelling exists: {refusal}"
        return False
    assert decision.kind == "exact"
    out = finish(t, decision)
    check_form(storage, out)
    assert weights(out) == weights(t)
    return True


@given(st.data())
@settings(max_examples=250)
def test_exact_into_ggml_blocks_is_exact_and_refusals_are_right(data: st.DataObject) -> None:
    source = data.draw(sources())
    kind = data.draw(st.sampled_from(GGML[:5]))
    (storage,) = storages(Target("gguf", kind), source.tensor())
    if source.signed and storage.offset:
        return  # signed codes into an offset type are refused by rule, not by search
    check_exact(source, storage)


@given(sources(columns=(256,), sizes=(256,)))
@settings(max_examples=30)
def test_exact_into_super_blocks(source: Source) -> None:
    (storage,) = storages(Target("gguf", "q4_k"), source.tensor())
    check_exact(source, storage)


@given(st.data())
@settings(max_examples=250)
def test_exact_into_gptq_and_awq_is_exact_and_refusals_are_right(data: st.DataObject) -> None:
    source = data.draw(sources(columns=(64,)))
    target = data.draw(st.sampled_from(INTEGER_TARGETS))
    t = source.tensor()
    storage = data.draw(st.sampled_from(storages(target, t)))
    check_exact(source, storage)


def bound(value: Fraction) -> Fraction:
    return max(abs(value) / 2**11, Fraction(1, 2**25))


def relabelled(before: list[int], after: list[int]) -> bool:
    """One shift, or one flip, for the whole block."""
    return len({a - b for a, b in zip(after, before)}) == 1 or len({a + b for a, b in zip(after, before)}) == 1


@given(st.data())
@settings(max_examples=200)
def test_rounding_keeps_codes_and_the_stated_bound(data: st.DataObject) -> None:
    source = data.draw(sources(bits=(2, 3, 4)))
    kind = data.draw(st.sampled_from(["q4_1", "q5_1", "q4_0", "q5_0", "q8_0"]))
    t = source.tensor()
    (storage,) = storages(Target("gguf", kind), t)
    try:
        decision = fit(t, storage, rounding=True)
    except Refused:
        return
    out = finish(t, decision)
    check_form(storage, out)
    if decision.kind == "exact":
        assert weights(out) == weights(t)
        return
    assert decision.kind == "codes-exact" and "round" in decision.reason
    before, after = weights(t), weights(out)
    k = t.shape[1]
    for at in range(0, t.codes.numel(), 32):
        n, column = divmod(at, k)
        olds, news = t.codes[n, column : column + 32].tolist(), out.codes[n, column : column + 32].tolist()
        assert relabelled(olds, news)
        s = Fraction(t.scales[0].values[n, column // source.group].item())  # type: ignore[index]
        step = bound(s) if source.dtype != "float16" else Fraction(0)
        for old, new, a, b, code in zip(olds, news, before[at : at + 32], after[at : at + 32], news):
            m = b - Fraction(out.scales[0].values[n, column // 32].item()) * code if storage.offset else Fraction(0)  # type: ignore[index]
            reach = 2 * abs(new) + 2 * abs(old) + 64
            assert abs(a - b) <= reach * step + bound(m)


# ---------------------------------------------------------------- the table of re-encodings, each condition met and missed


def block(bits: int, low: int = 0, high: int | None = None, k: int = 256) -> list[list[int]]:
    top = (1 << bits) - 1 if high is None else high
    return [[low + i % (top - low + 1) for i in range(k)]]


def one(bits: int, zero: int | list[int], *, group: int = 128, scale: float = 0.0517578125, low: int = 0, high: int | None = None,
        k: int = 256, dtype: str = "float16") -> Source:  # fmt: skip
    groups = k // group
    zeros = zero if isinstance(zero, list) else [zero] * groups
    return Source(bits, group, block(bits, low, high, k), [[scale] * groups], [zeros], None, dtype)


def offsets(multiple: float, *, k: int = 64, scale: float = 0.5) -> Source:
    return Source(4, 32, block(4, k=k), [[scale] * (k // 32)], None, [[scale * multiple] * (k // 32)])


BIASED = 0.0517578125  # eleven significant bits: times 3, 5, 6, 7 … it needs twelve or more
CASES: list[tuple[str, Source, str, bool]] = [
    ("int4 zero 8", one(4, 8), "gguf:q4_0", True),
    ("int4 zero 7, by flipping", one(4, 7), "gguf:q4_0", True),
    ("int4 zero 6, full range", one(4, 6), "gguf:q4_0", False),
    ("int4 zero 9, full range", one(4, 9), "gguf:q4_0", False),
    ("int4 zero 6, codes to 13", one(4, 6, high=13), "gguf:q4_0", True),
    ("int4 zero 9, codes from 1", one(4, 9, low=1), "gguf:q4_0", True),
    ("int4 zero 0", one(4, 0), "gguf:q5_0", True),
    ("int4 zero 16", one(4, 16), "gguf:q5_0", True),
    ("int4 mixed zeros", one(4, [0, 16]), "gguf:q5_0", True),
    ("int8 full range", one(8, 128), "gguf:q5_0", False),
    ("int4 zero 16 in q8_0", one(4, 16), "gguf:q8_0", True),
    ("int4 zero 0 in q4_1", one(4, 0, scale=BIASED), "gguf:q4_1", True),
    ("int4 zero 4 in q4_1", one(4, 4, scale=BIASED), "gguf:q4_1", True),
    ("int4 zero 16 in q4_1", one(4, 16, scale=BIASED), "gguf:q4_1", True),
    ("int4 zero 7 in q4_1, flipped to 8", one(4, 7, scale=BIASED), "gguf:q4_1", True),
    ("int4 zero 13 in q4_1, flipped to 2", one(4, 13, scale=BIASED), "gguf:q4_1", True),
    ("int4 zero 5 in q4_1, long scale", one(4, 5, scale=0.0999755859375), "gguf:q4_1", False),
    ("int4 zero 5 in q4_1, short scale", one(4, 5, scale=0.125), "gguf:q4_1", True),
    ("int4 zero 5 in q4_1, shifted by one", one(4, 5, scale=0.0999755859375, low=1), "gguf:q4_1", True),
    ("int4 zero 5 in q5_1, more room to shift", one(4, 5, scale=0.0999755859375), "gguf:q5_1", True),
    ("int8 zero 128 in q4_1", one(8, 128), "gguf:q4_1", False),
    ("int4 per channel", one(4, 11, group=256), "gguf:q4_k", True),
    ("int4 groups of 128 with unequal scales", Source(4, 128, block(4), [[0.5, 0.3]], [[8, 8]]), "gguf:q4_k", False),
    ("int4 groups of 128, one scale twice the other", Source(4, 128, block(4), [[0.5, 0.25]], [[8, 8]]), "gguf:q4_k", True),
    ("int4 groups of 128, zero 32 under a scale of 2", Source(4, 128, block(4), [[0.5, 0.25]], [[32, 8]]), "gguf:q4_k", False),
    ("int4 per channel, 288 columns", one(4, 8, group=288, k=288), "gguf:q4_k", False),
    ("int4 per channel, 288 columns in q4_0", one(4, 8, group=288, k=288), "gguf:q4_0", True),
    ("int3 per channel", one(3, 2, group=256), "gguf:q4_k", True),
    ("int8 zero 128", one(8, 128), "gguf:q8_0", True),
    ("int8 zero 127, by flipping", one(8, 127), "gguf:q8_0", True),
    ("int8 zero 120, full range", one(8, 120), "gguf:q8_0", False),
    ("int8 zero 120, codes to 247", one(8, 120, high=247), "gguf:q8_0", True),
    ("int3 zero 0", one(3, 0), "gguf:q4_0", True),
    ("int3 zero 8", one(3, 8), "gguf:q4_0", True),
    ("int2 zero 0", one(2, 0), "gguf:q4_0", True),
    ("int2 zero 4", one(2, 4), "gguf:q4_0", True),
    ("groups of 16 of one scale", one(4, 8, group=16), "gguf:q4_0", True),
    ("groups of 16 of two scales", Source(4, 16, block(4, k=32), [[0.5, 0.25]], [[8, 8]]), "gguf:q4_0", False),
    ("40 columns", one(4, 8, group=40, k=40), "gguf:q4_0", False),
    ("bf16 scale 2^-17", one(4, 8, scale=2.0**-17 * 1.5, dtype="bfloat16"), "gguf:q4_0", True),
    ("bf16 scale of 8 bits below 2^-17", one(4, 8, scale=2.0**-18 * 1.0078125, dtype="bfloat16"), "gguf:q4_0", False),
    ("bf16 scale above 65504", one(4, 8, scale=2.0**17, dtype="bfloat16"), "gguf:q4_0", False),
    ("f32 scale of few bits", one(4, 8, scale=0.75, dtype="float32"), "gguf:q4_0", True),
    ("f32 scale of many bits", one(4, 8, scale=0.1, dtype="float32"), "gguf:q4_0", False),
    ("z = 0, codes to 15, to awq", one(4, 0), "awq:int4", True),
    ("z = 16, codes to 15, to awq", one(4, 16), "awq:int4", False),
    ("z = 16, codes from 1, to awq", one(4, 16, low=1), "awq:int4", True),
    ("z = 0, codes to 15, to gptq v1", one(4, 0), "gptq:int4,format=v1", False),
    ("z = 0, codes to 14, to gptq v1", one(4, 0, high=14), "gptq:int4,format=v1", True),
    ("z = 0, codes to 15, to gptq v2", one(4, 0), "gptq:int4,format=v2", True),
    ("z = 16, codes to 15, to gptq v2", one(4, 16), "gptq:int4,format=v2", False),
    ("z = 16, codes to 15, to v1 as kernels read it", one(4, 16), "gptq:int4", True),
    ("asym to sym", one(4, 6), "gptq:int4,sym", False),
    ("asym of narrow codes to sym", one(4, 6, high=13), "gptq:int4,sym", True),
    ("int3 widened to awq", one(3, 4), "awq:int4", True),
    ("int8 to awq", one(8, 128), "awq:int4", False),
    ("8-bit of 16 codes to awq", one(8, 128, low=120, high=135), "awq:int4", True),
    ("groups of 32 merged to 64", one(4, 8, group=32), "gptq:int4,group=64", True),
    ("q4_1 of zero 8 to gptq", offsets(-8.0), "gptq:int4", True),
    ("q4_1 of zero 7.5 to gptq", offsets(-7.5), "gptq:int4", False),
    ("q4_1 of zero -3 to gptq", offsets(3.0), "gptq:int4", False),
    ("q8_0 to gptq int8", Source(8, 32, [[i % 256 - 128 for i in range(64)]], [[0.5, 0.25]], signed=True), "gptq:int8", True),
]  # fmt: skip


@pytest.mark.parametrize(("source", "to", "fits"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_table_of_re_encodings(source: Source, to: str, fits: bool) -> None:
    from qformats.registry import parse_target

    target = parse_target(to)
    rows = 8 if target.format != "gguf" else 1  # whole words of outputs
    wide = Source(source.bits, source.group, source.codes * rows, source.scales * rows, source.zeros and source.zeros * rows,
                  source.offsets and source.offsets * rows, source.dtype, source.signed)  # fmt: skip
    if target.format != "gguf" and "group" not in target.options:
        target = Target(target.format, target.type, {**target.options, "group": str(source.group)})
    fitted = [check_exact(wide, storage) for storage in storages(target, wide.tensor())]
    assert any(fitted) == fits


