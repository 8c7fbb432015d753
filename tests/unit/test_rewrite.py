"""Every rewrite keeps every weight's exact real value (in fractions.Fraction), or refuses with ``Refused`` and a reason."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rationals import weight, weights
from torch import Tensor

from qformats import rewrite
from qformats.rewrite import Refused
from qformats.scheme import Cyclic, Flat, Float, Integer, Learned, SubScale, Tile, whole
from qformats.tensor import Param, QuantizedTensor, constant

torch.set_num_threads(1)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF, SINGLE = torch.float16, torch.float32
SIX = SubScale(32, Integer(6), offset=True)


# ---------------------------------------------------------------- tensors to rewrite


def _generator(draw: st.DrawFn) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))


def _scale_values(shape: tuple[int, ...], dtype: torch.dtype, simple: bool, generator: torch.Generator) -> Tensor:
    """Random scales of both signs; ``simple`` ones have one significant bit, so that products with them are exact."""
    powers = torch.randint(-12, 3, shape, generator=generator).to(torch.float64)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    fraction = 1.0 if simple else torch.rand(shape, generator=generator, dtype=torch.float64)
    return (sign * fraction * 2.0**powers).to(dtype)


@st.composite
def affine(draw: st.DrawFn, zeros: str = "none constant group float", offsets: bool = False, act_order: bool = False) -> QuantizedTensor:
    """(N, K) codes of 1 to 8 bits, ragged groups, every scale dtype; ``zeros`` names the kinds of zero point."""
    bits, signed = draw(st.integers(1, 8)), draw(st.booleans())
    n, k = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    group = draw(st.integers(1, k) if not act_order else st.integers(2, max(2, k)))
    generator, grid = _generator(draw), Integer(bits, signed)
    shape, block = (n, k), Tile((1, group))
    counts = block.counts(shape)
    codes = torch.randint(grid.lowest, grid.highest + 1, shape, generator=generator).to(torch.int8 if signed else torch.uint8)
    scale = Param(_scale_values(counts, draw(st.sampled_from(DTYPES)), draw(st.booleans()), generator), block)
    kind, zero, offset = draw(st.sampled_from(zeros.split())), None, None
    if kind == "constant":
        zero = constant(draw(st.integers(grid.lowest - 2, grid.highest + 2)), shape)
    elif kind == "group":
        zero = Param(torch.randint(grid.lowest, grid.highest + 2, counts, generator=generator).to(torch.int16), block)
    elif kind == "float":
        zero = Param((torch.rand(counts, generator=generator) * grid.highest).to(draw(st.sampled_from(DTYPES))), block)
    if offsets and draw(st.booleans()):
        offset = Param(_scale_values(counts, draw(st.sampled_from(DTYPES)), False, generator), block)
    index = torch.randint(0, counts[-1], (k,), generator=generator).to(torch.int32) if act_order else None
    return QuantizedTensor(shape, codes, grid, (scale,), zero, offset, group_index=index)


@st.composite
def two_factors(draw: st.DrawFn) -> QuantizedTensor:
    """A group scale times one more factor: for the tensor, each row, each column, a tall tile; sometimes the factor divides."""
    t = draw(affine(zeros="none group"))
    n, k = t.shape
    group = t.scales[0].block.sizes[-1]  # type: ignore[union-attr]
    block = draw(st.sampled_from([whole(t.shape), Tile((1, k)), Tile((n, 1)), Tile((2, group)), Tile((1, 3))]))
    values = _scale_values(block.counts(t.shape), draw(st.sampled_from(DTYPES)), draw(st.booleans()), _generator(draw))
    values = torch.where(values == 0, torch.ones_like(values), values)
    return t.replace(scales=(*t.scales, Param(values, block, inverse=draw(st.booleans()))))


@st.composite
def odd_blocks(draw: st.DrawFn) -> QuantizedTensor:
    """Scale and zero point on tall tiles, runs that straddle rows, or cyclic blocks."""
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 24)))
    generator = _generator(draw)
    params = []
    for _ in range(2):
        numel = shape[0] * shape[1]
        kind = draw(st.sampled_from(["tile", "flat", "cyclic"]))
        size = draw(st.integers(1, numel))
        tall = Tile((draw(st.integers(1, 6)), draw(st.integers(1, 24))))
        block = {"tile": tall, "flat": Flat(size), "cyclic": Cyclic(size)}[kind]
        params.append(Param(_scale_values(block.counts(shape), HALF, False, generator), block))  # type: ignore[attr-defined]
    codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
    return QuantizedTensor(shape, codes, Integer(4), (params[0],), params[1])


def attempt(function: Callable[[], Any]) -> Any:
    """The result, or None after a refusal that gives a reason. Any other exception fails the test."""
    try:
        return function()
    except Refused as refusal:
        assert str(refusal)
        return None


def refused(function: Callable[[], Any]) -> str:
    with pytest.raises(Refused) as refusal:
        function()
    return str(refusal.value)


def same_planes(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Codes and parameters equal bit for bit, blocks included."""
    pairs = list(zip(a.params(), b.params(), strict=True))
    return (
        torch.equal(a.codes, b.codes)
        and a.codes.dtype == b.codes.dtype
        and a.grid == b.grid
        and all(x == y and p.block == q.block and p.inverse == q.inverse for (x, p), (y, q) in pairs)
        and all(torch.equal(p.values.double(), q.values.double()) for (_, p), (_, q) in pairs)  # type: ignore[union-attr]
    )


def column(t: QuantizedTensor, k: int) -> list[Fraction]:
    return [weight(t, (n, k)) for n in range(t.shape[0])]


# ---------------------------------------------------------------- groups and blocks


@given(affine(offsets=True), st.integers(1, 45))
def test_split_groups_keeps_every_weight_and_merge_undoes_it(t: QuantizedTensor, size: int) -> None:
    split = attempt(lambda: rewrite.split_groups(t, size))
    group = t.scales[0].block.sizes[-1]  # type: ignore[union-attr]
    assert (split is not None) == (group % size == 0 or group == t.shape[-1] or all(p.values.numel() == 1 for _, p in t.params()))
    if split is None:
        return
    assert weights(split) == weights(t)
    if group % size == 0:
        merged = attempt(lambda: rewrite.merge_groups(split, group))
        assert merged is None or weights(merged) == weights(t)
        assert merged is not None or t.shape[-1] % size, "a split that leaves no ragged group can be undone"


@given(affine(zeros="none group constant"), st.integers(1, 45), st.booleans())
def test_merge_groups_only_where_neighbours_are_equal(t: QuantizedTensor, size: int, equal: bool) -> None:
    if equal:
        values = t.scales[0].values
        assert isinstance(values, Tensor)
        t = t.replace(scales=(t.scales[0].with_values(values[..., :1].expand_as(values).contiguous()),), zero_point=None)
    merged = attempt(lambda: rewrite.merge_groups(t, size))
    if merged is not None:
        assert weights(merged) == weights(t)


@given(odd_blocks())
def test_to_row_blocks_spreads_tall_flat_and_cyclic_blocks(t: QuantizedTensor) -> None:
    rows = rewrite.to_row_blocks(t)
    assert weights(rows) == weights(t)
    assert all(p.values.numel() == 1 or (isinstance(p.block, Tile) and p.block.sizes[0] == 1) for _, p in rows.params())


def test_flat_runs_become_runs_of_the_greatest_common_divisor() -> None:
    t = QuantizedTensor((3, 36), torch.zeros((3, 36), dtype=torch.uint8), Integer(4), (Param(torch.arange(5.0), Flat(24)),))
    assert rewrite.to_row_blocks(t).scales[0].block == Tile((1, 12))


# ---------------------------------------------------------------- codes and zero points


@given(affine(offsets=True))
def test_signed_and_unsigned_restore_each_other(t: QuantizedTensor) -> None:
    there, back = (rewrite.to_unsigned, rewrite.to_signed) if t.grid.signed else (rewrite.to_signed, rewrite.to_unsigned)  # type: ignore[union-attr]
    moved = attempt(lambda: there(t))
    if moved is None:
        assert t.zero_point is not None and t.zero_point.values.dtype.is_floating_point  # type: ignore[union-attr]
        return
    assert moved.grid.signed != t.grid.signed and weights(moved) == weights(t)  # type: ignore[union-attr]
    home = attempt(lambda: back(moved))
    assert home is not None and torch.equal(home.codes, t.codes) and weights(home) == weights(t)


@given(affine(), st.integers(1, 8))
def test_widen(t: QuantizedTensor, bits: int) -> None:
    wide = attempt(lambda: rewrite.widen(t, bits))
    assert (wide is None) == (bits < t.grid.bits)  # type: ignore[union-attr]
    assert wide is None or (weights(wide) == weights(t) and wide.grid.bits == bits)


@given(affine(zeros="none constant group"), st.integers(1, 8), st.booleans(), st.integers(-130, 257))
def test_recentre_moves_every_zero_point_or_names_the_overflow(t: QuantizedTensor, bits: int, signed: bool, zero: int) -> None:
    grid = Integer(bits, signed)
    moved = attempt(lambda: rewrite.recentre(t, grid, zero))
    zeros = rewrite.zero_values(t)
    spread = zeros if zeros.shape[-1] == 1 else zeros.repeat_interleave(t.scales[0].block.sizes[-1], -1)[:, : t.shape[-1]]  # type: ignore[union-attr]
    wanted = t.codes.to(torch.int32) - spread + zero
    fits = bool((wanted >= grid.lowest).all()) and bool((wanted <= grid.highest).all())
    assert (moved is not None) == fits
    if moved is not None:
        assert weights(moved) == weights(t) and torch.equal(moved.codes.to(torch.int32), wanted.to(torch.int32))
        assert int(rewrite.zero_values(moved)) == zero and moved.grid == grid


@given(affine(), st.integers(1, 45))
def test_block_range_is_the_smallest_and_largest_code_of_each_run(t: QuantizedTensor, width: int) -> None:
    low, high = rewrite.block_range(t, width)
    for n, row in enumerate(t.codes.tolist()):
        runs = [row[at : at + width] for at in range(0, len(row), width)]
        assert low[n].tolist() == [min(run) for run in runs] and high[n].tolist() == [max(run) for run in runs]


@given(affine(), st.integers(1, 45), st.booleans(), st.data())
def test_flip_and_shift_is_wrapping_byte_arithmetic(t: QuantizedTensor, width: int, flips: bool, data: st.DataObject) -> None:
    counts = (t.shape[0], -(-t.shape[-1] // width))
    low, high = rewrite.block_range(t, width)
    flip = torch.randint(0, 2, counts, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))).bool() if flips else None
    flipped = torch.zeros(counts, dtype=torch.bool) if flip is None else flip
    signed = data.draw(st.booleans())
    bottom, top = (-128, 127) if signed else (0, 255)
    shift = torch.where(flipped, bottom + high, bottom - low).to(torch.int16)  # every run starts at the lowest value
    found = rewrite.flip_and_shift(t.codes, width, shift, flip, signed)
    for n, row in enumerate(t.codes.tolist()):
        for k, code in enumerate(row):
            s, f = int(shift[n, k // width]), bool(flipped[n, k // width])
            assert bottom <= int(found[n, k]) <= top and int(found[n, k]) == (s - code if f else s + code)


@given(affine(zeros="none constant group float"), st.sampled_from(DTYPES))
def test_zero_to_offset_is_exact_or_refused(t: QuantizedTensor, dtype: torch.dtype) -> None:
    moved = attempt(lambda: rewrite.zero_to_offset(t, dtype))
    if moved is None:
        return
    assert weights(moved) == weights(t) and moved.zero_point is None and moved.offset is not None
    integers = t.zero_point is None or not t.zero_point.values.dtype.is_floating_point  # type: ignore[union-attr]
    back = attempt(lambda: rewrite.offset_to_zero(moved))
    if integers:
        assert back is not None
    assert back is None or (weights(back) == weights(t) and back.offset is None)


@given(affine(zeros="constant group"), st.sampled_from(DTYPES))
def test_rounded_offsets_keep_codes_within_half_a_unit(t: QuantizedTensor, dtype: torch.dtype) -> None:
    moved = attempt(lambda: rewrite.zero_to_offset(t, dtype, rounding=True))
    assume(moved is not None)
    assert torch.equal(moved.codes, t.codes)
    relative, absolute = {HALF: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 0.0), SINGLE: (2.0**-24, 0.0)}[dtype]
    for found, exact, code in zip(weights(moved), weights(t), moved.codes.flatten().tolist()):
        zero_part = abs(exact) + abs(code) * 8  # |m| <= |w| + |s q|, |s| <= 8
        assert abs(found - exact) <= max(Fraction(relative) * zero_part, Fraction(absolute))


@given(affine(zeros="none", offsets=True))
def test_offset_to_zero_is_exact_or_refused(t: QuantizedTensor) -> None:
    moved = attempt(lambda: rewrite.offset_to_zero(t))
    assert moved is None or (weights(moved) == weights(t) and moved.offset is None)


# ---------------------------------------------------------------- scales


@given(two_factors(), st.sampled_from(DTYPES))
def test_fold_scales_is_exact_or_refused(t: QuantizedTensor, dtype: torch.dtype) -> None:
    folded = attempt(lambda: rewrite.fold_scales(t, dtype))
    assert folded is None or (weights(folded) == weights(t) and len(folded.scales) == 1 and folded.scales[0].values.dtype == dtype)


@given(affine(), st.sampled_from(DTYPES), st.booleans())
def test_round_scale_counts_what_it_rounded(t: QuantizedTensor, dtype: torch.dtype, rounding: bool) -> None:
    values = t.scales[0].values
    assert isinstance(values, Tensor)
    wrong = int((values.to(dtype).double() != values.double()).sum())
    done = attempt(lambda: rewrite.round_scale(t, dtype, rounding=rounding))
    assert (done is None) == (wrong > 0 and not rounding)
    if done is not None:
        assert done[1] == wrong and torch.equal(done[0].codes, t.codes)
        assert wrong > 0 or weights(done[0]) == weights(t)


def test_a_scale_that_overflows_is_refused_even_when_rounding() -> None:
    t = QuantizedTensor((1, 1), torch.ones((1, 1), dtype=torch.uint8), Integer(4), (Param(torch.tensor([[65520.0]]), Tile((1, 1))),))
    assert "overflow" in refused(lambda: rewrite.round_scale(t, HALF))


@st.composite
def wide_groups(draw: st.DrawFn) -> QuantizedTensor:
    """Rows of 64, 100 or 512 with a scale for 64, 256 or all columns or the whole tensor, float16 or not, zeros on any group."""
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([64, 100, 256, 512])))
    generator = _generator(draw)
    block = draw(st.sampled_from([Tile((1, 64)), Tile((1, 256)), Tile((1, shape[1])), whole(shape), Tile((2, 256))]))
    scale = Param(_scale_values(block.counts(shape), draw(st.sampled_from([HALF, HALF, SINGLE])), False, generator), block)
    z_block = draw(st.sampled_from([Tile((1, 16)), Tile((1, 32)), Tile((1, 64)), Tile((1, shape[1])), whole(shape), Flat(32)]))
    high = draw(st.sampled_from([15, 63, 64]))
    zero = Param(torch.randint(0, high + 1, z_block.counts(shape), generator=generator).to(torch.int16), z_block)
    codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
    return QuantizedTensor(shape, codes, Integer(4), (scale,), draw(st.sampled_from([zero, zero, None])))


@given(wide_groups(), st.sampled_from([4, 6]))
def test_nest_scale_is_exact_or_refused_and_unnest_expands_it(t: QuantizedTensor, bits: int) -> None:
    nested = attempt(lambda: rewrite.nest_scale(t, 256, SubScale(32, Integer(bits), offset=True)))
    if nested is None:
        return
    shape = t.shape
    sample = [(n, k) for n in range(shape[0]) for k in {0, 31, 32, 63, shape[1] // 2, shape[1] - 1}]
    assert [weight(nested, at) for at in sample] == [weight(t, at) for at in sample]
    plain = rewrite.unnest_scale(nested)
    assert [weight(plain, at) for at in sample] == [weight(t, at) for at in sample]
    assert not any(isinstance(p.values, QuantizedTensor) for _, p in plain.params())


def test_nest_scale_takes_a_scale_for_the_whole_tensor() -> None:
    shape = (3, 512)
    t = QuantizedTensor(shape, torch.ones(shape, dtype=torch.uint8), Integer(4), (constant(0.5, shape, HALF),), constant(8, shape))
    nested = rewrite.nest_scale(t, 256, SIX)
    assert torch.equal(nested.dequantize(), t.dequantize())


def test_unnest_respects_the_owners_rounding() -> None:
    shape = (2, 64)
    inner = QuantizedTensor(
        (4,), torch.tensor([3, 77, 255, 128], dtype=torch.uint8), Integer(8),
        (constant(0.0123, (4,), SINGLE),), offset=constant(2.635, (4,), SINGLE),
    )  # fmt: skip
    t = QuantizedTensor(shape, torch.ones(shape, dtype=torch.uint8), Integer(4), (Param(inner, Flat(32), rounded_to=SINGLE),))
    assert weights(rewrite.unnest_scale(t)) == weights(t)
    exact = t.replace(scales=(Param(inner, Flat(32)),))
    assert "nested" in refused(lambda: rewrite.unnest_scale(exact))


# ---------------------------------------------------------------- act-order


@given(affine(act_order=True, offsets=True))
def test_absorb_group_index_sorts_columns_by_group(t: QuantizedTensor) -> None:
    done = attempt(lambda: rewrite.absorb_group_index(t))
    if done is None:
        return
    sorted_t, order = done
    assert sorted_t.group_index is None and sorted(order.tolist()) == list(range(t.shape[-1]))
    assert all(column(sorted_t, j) == column(t, int(old)) for j, old in enumerate(order))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 9), st.integers(0, 2**31), st.booleans())
def test_even_groups_are_absorbed_and_trivial_ones_dropped(n: int, groups: int, size: int, seed: int, trivial: bool) -> None:
    generator, k = torch.Generator().manual_seed(seed), groups * size
    order = torch.arange(k) if trivial else torch.randperm(k, generator=generator)
    index = (order // size).to(torch.int32)
    codes = torch.randint(0, 16, (n, k), generator=generator).to(torch.uint8)
    scales = (Param(_scale_values((n, groups), HALF, False, generator), Tile((1, size))),)
    t = QuantizedTensor((n, k), codes, Integer(4), scales, group_index=index)
    sorted_t, _ = rewrite.absorb_group_index(t)
    assert sorted(weights(sorted_t)) == sorted(weights(t))
    dropped = rewrite.drop_trivial_group_index(t)
    assert weights(dropped) == weights(t)
    assert (dropped.group_index is None) == torch.equal(index.long(), torch.arange(k) // size)


@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 2**31))
def test_a_given_order_may_put_groups_in_any_sequence(groups: int, size: int, seed: int) -> None:
    generator, k = torch.Generator().manual_seed(seed), groups * size
    index = (torch.randperm(k, generator=generator) // size).to(torch.int32)
    codes = torch.randint(0, 16, (2, k), generator=generator).to(torch.uint8)
    scales = (Param(_scale_values((2, groups), HALF, False, generator), Tile((1, size))),)
    t = QuantizedTensor((2, k), codes, Integer(4), scales, group_index=index)
    sequence = torch.randperm(groups, generator=generator).tolist()
    order = torch.cat([(index == group).nonzero().flatten() for group in sequence])
    absorbed, used = rewrite.absorb_group_index(t, order)
    assert torch.equal(used, order) and all(column(absorbed, j) == column(t, int(old)) for j, old in enumerate(order))
    torn = torch.cat((order[1:], order[:1]))
    assert "groups" in refused(lambda: rewrite.absorb_group_index(t, torn))


@given(affine(act_order=True, zeros="none constant group float", offsets=True), st.integers(1, 45))
def test_no_rewrite_ignores_act_order(t: QuantizedTensor, size: int) -> None:
    """Each of these refuses or keeps every weight although groups are not runs."""
    for function in (
        lambda: rewrite.split_groups(t, size), lambda: rewrite.merge_groups(t, size), lambda: rewrite.to_row_blocks(t),
        lambda: rewrite.recentre(t, Integer(8, True), 0), lambda: rewrite.zero_to_offset(t, SINGLE),
        lambda: rewrite.offset_to_zero(t), lambda: rewrite.fold_scales(t, SINGLE), lambda: rewrite.nest_scale(t, 256, SIX),
        lambda: rewrite.drop_trivial_group_index(t), lambda: rewrite.select_rows(t, slice(None)),
        lambda: rewrite.to_signed(t), lambda: rewrite.to_unsigned(t),
    ):  # fmt: skip
        done = attempt(function)
        assert done is None or weights(done) == weights(t)


# ---------------------------------------------------------------- rows and columns


@given(st.one_of(affine(offsets=True), affine(act_order=True), two_factors()), st.data())
def test_select_rows(t: QuantizedTensor, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, t.shape[0] - 1), min_size=1, max_size=9))
    taken = attempt(lambda: rewrite.select_rows(t, torch.tensor(rows)))
    if taken is None:
        assert any(isinstance(p.block, Tile) and 1 < p.block.sizes[0] < t.shape[0] for _, p in t.params())
        return
    k = t.shape[1]
    assert taken.shape == (len(rows), k)
    every = weights(t)
    assert weights(taken) == [w for row in rows for w in every[row * k : (row + 1) * k]]
    start, stop = min(rows), max(rows) + 1
    assert same_planes(rewrite.select_rows(t, slice(start, stop)), rewrite.select_rows(t, torch.arange(start, stop)))


@given(st.one_of(affine(offsets=True), affine(act_order=True)), st.data())
def test_concatenate_rows_joins_what_select_rows_took_apart(t: QuantizedTensor, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, t.shape[0]))
    assume(0 < cut < t.shape[0])
    joined = rewrite.concatenate_rows([rewrite.select_rows(t, slice(0, cut)), rewrite.select_rows(t, slice(cut, None))])
    assert weights(joined) == weights(t) and torch.equal(joined.codes, t.codes)
    assert same_planes(joined, t) or cut in (1, t.shape[0] - 1), "single equal numbers may become one constant"


@given(affine(offsets=True), affine(offsets=True))
def test_concatenate_rows_of_strangers_is_exact_or_refused(a: QuantizedTensor, b: QuantizedTensor) -> None:
    joined = attempt(lambda: rewrite.concatenate_rows([a, b]))
    assert joined is None or weights(joined) == weights(a) + weights(b)


@given(st.integers(1, 4), st.integers(1, 30), st.data())
def test_concatenate_rows_refines_groups_and_constants(n: int, k: int, data: st.DataObject) -> None:
    parts = []
    for _ in range(2):
        size = data.draw(st.sampled_from([1, 2, 4, 8, 40]))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
        scale = Param(_scale_values((n, -(-k // size)), HALF, False, generator), Tile((1, size)))
        codes = torch.randint(0, 16, (n, k), generator=generator).to(torch.uint8)
        zero = constant(data.draw(st.integers(7, 8)), (n, k))
        parts.append(QuantizedTensor((n, k), codes, Integer(4), (scale,), zero))
    joined = attempt(lambda: rewrite.concatenate_rows(parts))
    assert joined is None or weights(joined) == weights(parts[0]) + weights(parts[1])


@given(affine(offsets=True), st.integers(1, 12), st.data())
def test_permute_column_groups(t: QuantizedTensor, width: int, data: st.DataObject) -> None:
    k = t.shape[-1]
    runs = k // width if k % width == 0 else 1
    order = torch.tensor(data.draw(st.permutations(range(runs))))
    moved = attempt(lambda: rewrite.permute_column_groups(t, order, width))
    if moved is None:
        return
    for j, old in enumerate(order.tolist()):
        assert all(column(moved, j * width + i) == column(t, old * width + i) for i in range(width))
    back = rewrite.permute_column_groups(moved, torch.argsort(order), width)
    assert same_planes(back, t)


@given(affine(), st.integers(0, 60))
def test_pad_columns_appends_exact_zeros(t: QuantizedTensor, k: int) -> None:
    padded = attempt(lambda: rewrite.pad_columns(t, k))
    if padded is None:
        return
    old = t.shape[-1]
    assert padded.shape == (t.shape[0], k) and k >= old
    assert all(column(padded, i) == column(t, i) for i in range(old))
    assert all(w == 0 for i in range(old, k) for w in column(padded, i))


# ---------------------------------------------------------------- what no rewrite may overlook


def _signed_plane() -> QuantizedTensor:
    """Codes with a separate sign plane: sign * (q - zero) * scale."""
    codes = torch.tensor([[1, 2, 3, 0, 1, 2, 3, 0]] * 2, dtype=torch.uint8)
    scale = Param(torch.tensor([[0.5], [2.0]], dtype=HALF), Tile((1, 8)))
    signs = torch.tensor([[0x5A], [0x0F]], dtype=torch.uint8)
    return QuantizedTensor((2, 8), codes, Integer(2), (scale,), constant(1, (2, 8)), signs=signs)


def _inverse_scale() -> QuantizedTensor:
    return _signed_plane().replace(signs=None, scales=(Param(torch.tensor([[4.0], [2.0]], dtype=HALF), Tile((1, 8)), inverse=True),))


def _second_scale() -> QuantizedTensor:
    t = _signed_plane().replace(signs=None)
    return t.replace(scales=(*t.scales, constant(0.25, t.shape, HALF)))


def _act_order_and_columns() -> QuantizedTensor:
    """A group scale under act-order beside a factor for each column."""
    t = _signed_plane().replace(signs=None)
    scales = (
        Param(torch.tensor([[1.0, 2.0], [4.0, 8.0]], dtype=HALF), Tile((1, 4))),
        Param(torch.arange(1.0, 9.0, dtype=HALF).reshape(1, 8), Tile((2, 1))),
    )
    return t.replace(scales=scales, group_index=torch.tensor([1, 0, 1, 0, 0, 1, 1, 0], dtype=torch.int32))


def _with_offset(t: QuantizedTensor) -> QuantizedTensor:
    return t.replace(zero_point=None, offset=Param(torch.tensor([[1.0], [4.0]], dtype=HALF), Tile((1, 8))))


REWRITES: dict[str, Callable[[QuantizedTensor], Any]] = {
    "split_groups": lambda t: rewrite.split_groups(t, 2),
    "merge_groups": lambda t: rewrite.merge_groups(t, 8),
    "to_row_blocks": rewrite.to_row_blocks,
    "to_signed": rewrite.to_signed,
    "to_unsigned": rewrite.to_unsigned,
    "widen": lambda t: rewrite.widen(t, 8),
    "recentre": lambda t: rewrite.recentre(t, Integer(8, True), 5),
    "zero_to_offset": lambda t: rewrite.zero_to_offset(t, SINGLE),
    "offset_to_zero": rewrite.offset_to_zero,
    "fold_scales": lambda t: rewrite.fold_scales(t, SINGLE),
    "round_scale": lambda t: rewrite.round_scale(t, SINGLE)[0],
    "nest_scale": lambda t: rewrite.nest_scale(t, 256, SIX),
    "unnest_scale": rewrite.unnest_scale,
    "drop_trivial_group_index": rewrite.drop_trivial_group_index,
    "absorb_group_index": lambda t: rewrite.absorb_group_index(t)[0] if t.group_index is None else None,
    "select_rows": lambda t: rewrite.select_rows(t, slice(None)),
    "concatenate_rows": lambda t: rewrite.concatenate_rows([rewrite.select_rows(t, slice(0, 1)), rewrite.select_rows(t, slice(1, 2))]),
    "permute_column_groups": lambda t: rewrite.permute_column_groups(t, torch.arange(2), 4),
    "pad_columns": lambda t: rewrite.pad_columns(t, 8),
}
ODDITIES = {
    "signs": _signed_plane,
    "signs and offset": lambda: _with_offset(_signed_plane()),
    "inverse scale": _inverse_scale,
    "inverse scale and offset": lambda: _with_offset(_inverse_scale()),
    "two scales": _second_scale,
    "two scales and offset": lambda: _with_offset(_second_scale()),
    "no scale": lambda: _signed_plane().replace(signs=None, scales=()),
    "act-order beside a factor for each column": _act_order_and_columns,
}


@pytest.mark.parametrize("oddity", ODDITIES)
@pytest.mark.parametrize("name", REWRITES)
def test_every_rewrite_sees_signs_inverses_second_factors_and_act_order(name: str, oddity: str) -> None:
    t = ODDITIES[oddity]()
    done = attempt(lambda: REWRITES[name](t))
    assert done is None or weights(done) == weights(t)


def test_absorbing_act_order_moves_everything_that_belongs_to_a_column() -> None:
    t = _act_order_and_columns()
    done = attempt(lambda: rewrite.absorb_group_index(t))
    if done is not None:
        assert all(column(done[0], j) == column(t, int(old)) for j, old in enumerate(done[1]))
    signed = _signed_plane().replace(group_index=torch.zeros(8, dtype=torch.int32))
    done = attempt(lambda: rewrite.absorb_group_index(signed))
    assert done is None or weights(done[0]) == weights(signed)


def test_concatenation_sees_every_difference() -> None:
    learned = QuantizedTensor(
        (1, 4), torch.zeros((1, 4, 1), dtype=torch.uint8), Learned(2), (constant(1, (1, 4)),), codebook=torch.ones(1, 2, 1, 1)
    )
    other_book = learned.replace(codebook=torch.zeros(1, 2, 1, 1))
    joined = attempt(lambda: rewrite.concatenate_rows([learned, other_book]))
    assert joined is None or weights(joined) == weights(learned) + weights(other_book)
    t = _signed_plane()
    for a, b in [(t, t.replace(signs=None)), (t.replace(signs=None), t), (_inverse_scale(), t.replace(signs=None)),
                 (t.replace(signs=None), _with_offset(t.replace(signs=None)))]:  # fmt: skip
        both = attempt(lambda a=a, b=b: rewrite.concatenate_rows([a, b]))
        assert both is None or weights(both) == weights(a) + weights(b)


def test_concatenation_of_flat_blocks_is_refused() -> None:
    t = QuantizedTensor((1, 4), torch.zeros((1, 4), dtype=torch.uint8), Integer(4), (Param(torch.ones(2), Flat(2)),))
    refused(lambda: rewrite.concatenate_rows([t, t]))


def test_experts_keep_their_own_group_index_when_selected() -> None:
    index = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.int32)
    scale = Param(torch.arange(1.0, 13.0).reshape(3, 2, 2), Tile((1, 1, 2)))
    t = QuantizedTensor((3, 2, 4), torch.ones((3, 2, 4), dtype=torch.uint8), Integer(4), (scale,), group_index=index)
    taken = attempt(lambda: rewrite.select_rows(t, torch.tensor([2, 0])))
    assert taken is None or weights(taken) == weights(t)[16:] + weights(t)[:8]


def test_vectors_have_no_rows() -> None:
    t = QuantizedTensor((6,), torch.arange(6, dtype=torch.uint8), Integer(4), (constant(0.5, (6,), HALF),))
    refused(lambda: rewrite.select_rows(t, slice(0, 3)))


def test_integer_rewrites_refuse_other_grids() -> None:
    t = QuantizedTensor((1, 8), torch.ones((1, 8), dtype=torch.uint8), Float("e2m1"), (constant(1, (1, 8)),))
    for name in ("to_signed", "to_unsigned", "widen", "recentre", "pad_columns"):
        assert "float" in refused(lambda name=name: REWRITES[name](t))


def test_padding_to_fewer_columns_is_refused() -> None:
    t = _signed_plane().replace(signs=None)
    refused(lambda: rewrite.pad_columns(t, 7))


def test_selecting_no_rows_is_refused() -> None:
    refused(lambda: rewrite.select_rows(_second_scale(), slice(1, 1)))
