"""GPTQ planes built by hand: zero-point policies, word widths, scale dtypes, g_idx in all its states, ragged sizes, AutoRound's widths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_checkpoint import assembled, same_tensor

from qformats.bits import pack_stream
from qformats.containers.raw import RawTensor
from qformats.containers.source import MemorySource
from qformats.errors import Unsupported, UsageError
from qformats.formats import gptq
from qformats.formats.gptq.zeros import POLICIES, decide, decode, encode, zero_range
from qformats.formats.protocol import Match, Module, Target
from qformats.scheme import Integer, Storage, Tile
from qformats.tensor import Param, QuantizedTensor, constant

torch.set_num_threads(1)
CONFIG: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}


def tensor_of(
    n: int,
    k: int,
    bits: int,
    group: int,
    *,
    zeros: tuple[int, int] | int,
    dtype: torch.dtype = torch.float16,
    order: bool = False,
    seed: int = 0,
) -> QuantizedTensor:
    rng = np.random.default_rng(seed)
    groups, tile = -(-k // group), Tile((1, group))
    codes = torch.from_numpy(rng.integers(0, 1 << bits, (n, k), dtype=np.uint8))
    scale = torch.from_numpy(rng.normal(0, 0.1, (n, groups)).astype("f4")).to(dtype)
    if isinstance(zeros, int):
        zero = constant(zeros, (n, k))
    else:
        plane = rng.integers(zeros[0], zeros[1] + 1, (n, groups))
        plane[0, 0], plane[-1, -1] = zeros
        zero = Param(torch.from_numpy(plane).to(torch.uint8 if bits < 8 else torch.int16), tile)
    index = torch.from_numpy(rng.permutation(np.arange(k) // group).astype(np.int32)) if order else None
    return QuantizedTensor((n, k), codes, Integer(bits), (Param(scale, tile),), zero, group_index=index)


def written(storage: Storage, tensor: QuantizedTensor, config: dict[str, Any], dialect: str = "", step: int | None = None) -> Module:
    n, k = tensor.shape
    layout = gptq.layout(storage, (n, k))
    pieces = []
    for start in range(0, n, step or n):
        stop = min(n, start + (step or n))
        pieces += gptq.write(storage, rows(tensor, start, stop), start, (n, k))
    raw = assembled(layout, pieces)
    parts = {
        leaf: RawTensor(f"m.{leaf}", info.dtype, info.shape, MemorySource(raw[leaf]), 0, len(raw[leaf])) for leaf, info in layout.items()
    }
    return Module("m", parts, Match("gptq", config, dialect))


def rows(t: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    def cut(param: Param) -> Param:
        assert isinstance(param.values, torch.Tensor)
        if param.values.numel() == 1:
            return constant(int(param.values), (stop - start, t.shape[1]))
        return param.with_values(param.values[start:stop])

    zero = None if t.zero_point is None else cut(t.zero_point)
    return QuantizedTensor((stop - start, t.shape[1]), t.codes[start:stop], t.grid, (cut(t.scales[0]),), zero, group_index=t.group_index)


def storage_for(tensor: QuantizedTensor, bits: int, group: int, policy: str = "v2", label: str = "gptq_v2", **options: object) -> Storage:
    base = gptq.storages(Target("gptq", f"int{bits if bits in (2, 3, 4, 8) else 4}", {"group": str(group)}), tensor.scheme)[0]
    scale = str(tensor.scales[0].values.dtype).removeprefix("torch.")  # type: ignore[union-attr]
    merged = {**base.options, "checkpoint_format": label, "zeros": policy, **options}
    return replace(base, grid=Integer(bits), zero_point=zero_range(policy, bits), scale_dtypes=(scale,), options=merged, group=group)


# ---- zero points


@settings(max_examples=120, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]), policy=st.sampled_from(POLICIES), count=st.integers(1, 70), groups=st.integers(1, 4),
       word=st.sampled_from([8, 16, 32, 64]), seed=st.integers(0, 999))  # fmt: skip
def test_decode_undoes_encode(bits: int, policy: str, count: int, groups: int, word: int, seed: int) -> None:
    if bits in (3, 5, 6, 7) and (word != 32 or policy == "v1-word"):
        return
    low, high = zero_range(policy, bits)
    zeros = np.random.default_rng(seed).integers(low, high + 1, (count, groups)).astype(np.int16)
    words = encode(zeros, bits, word, policy)
    assert words.itemsize * 8 == word
    assert np.array_equal(decode(words, bits, count, policy), zeros)


def test_worked_example_of_the_borrow() -> None:
    zeros = np.array([[8, 0, 5, 3, 15, 1, 0, 7]], np.int16).T
    fields = decode(encode(zeros, 4, 32, "v1-word"), 4, 8, "v2")[:, 0].tolist()
    assert fields == [7, 15, 3, 2, 14, 0, 15, 5]


@pytest.mark.parametrize(
    ("field", "label", "sym", "gptqmodel", "policy", "constant_zero", "warns"),
    [
        (7, "gptq", True, False, "v1", 8, False),
        (7, "gptq", True, True, "v1-word", 8, False),
        (8, "gptq", True, False, "v2", 8, True),
        (8, "gptq", None, False, "v2", 8, True),
        (8, "gptq", False, False, "v1", 9, False),
        (8, "gptq_v2", True, True, "v2", 8, False),
        (7, "gptq_v2", True, True, "v1", 8, True),
        (7, "gptq_v2", None, True, "v2", 7, False),
        (0, "gptq", True, False, "unset", 8, True),
        (0, "gptq", False, False, "v1", 1, False),
        (5, "gptq", True, False, "v1", 6, True),
        (15, "gptq", False, False, "v1", 16, False),
        (15, "gptq", False, True, "v1-word", None, False),
    ],
)
def test_which_policy_one_constant_field_means(
    field: int, label: str, sym: bool | None, gptqmodel: bool, policy: str, constant_zero: int | None, warns: bool
) -> None:
    words = pack_stream(torch.full((3, 40), field), 4).numpy()
    found = decide(words, 4, 40, label, sym, gptqmodel)
    assert (found.policy, found.constant, bool(found.warnings)) == (policy, constant_zero, warns)


def test_symmetric_config_with_differing_zeros_is_read_as_stored_with_a_warning() -> None:
    tensor = tensor_of(40, 64, 4, 32, zeros=(1, 15))
    module = written(storage_for(tensor, 4, 32, "v1", "gptq"), tensor, CONFIG | {"sym": True})
    assert same_tensor(gptq.read(module), tensor)
    assert any("sym is true" in text for text in gptq.module_warnings(module))


def test_forced_policy() -> None:
    tensor = tensor_of(40, 64, 4, 32, zeros=(0, 15))
    module = written(storage_for(tensor, 4, 32), tensor, CONFIG)
    assert same_tensor(gptq.read(module, zero_policy="v2"), tensor)
    with pytest.raises(UsageError, match="zero-policy"):
        gptq.read(module, zero_policy="v7")


def test_zero_points_that_a_label_cannot_hold_are_refused() -> None:
    tensor = tensor_of(32, 64, 4, 32, zeros=(0, 15))
    with pytest.raises(Unsupported, match="zero-point-range"):
        gptq.write(storage_for(tensor, 4, 32, "v1", "gptq"), tensor, 0, tensor.shape)


# ---- planes


def check(tensor: QuantizedTensor, storage: Storage, config: dict[str, Any], dialect: str = "") -> None:
    """What was written is read back, ranges write the same bytes, and the derived storage reproduces them."""
    module = written(storage, tensor, config, dialect)
    assert same_tensor(gptq.read(module), tensor)
    again = written(gptq.storage_of(module), gptq.read(module), config, dialect, step=32)
    assert {leaf: raw.read() for leaf, raw in again.parts.items()} == {leaf: raw.read() for leaf, raw in module.parts.items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [(64, 96, 32), (40, 80, 32), (37, 84, 32), (33, 70, 32), (8, 64, 64), (64, 128, 128)])
def test_all_sizes(bits: int, n: int, k: int, group: int) -> None:
    tensor = tensor_of(n, k, bits, group, zeros=(0, (1 << bits) - 1))
    config = CONFIG | {"bits": bits, "group_size": group, "checkpoint_format": "gptq_v2"}
    check(tensor, storage_for(tensor, bits, group), config)


@pytest.mark.parametrize(("word", "dtype"), [(8, "I8"), (16, "I16"), (64, "I64"), (32, "U32")])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("policy", ["v1-word", "v2"])
def test_other_words(bits: int, word: int, dtype: str, policy: str) -> None:
    tensor = tensor_of(40, 64, bits, 32, zeros=(0, (1 << bits) - 1))
    config = CONFIG | {"bits": bits, "checkpoint_format": "gptq_v2" if policy == "v2" else "gptq", "meta": {"quantizer": "gptqmodel:4.0"}}
    storage = storage_for(tensor, bits, 32, policy, str(config["checkpoint_format"]), word_bits=word, word_dtype=dtype)
    check(tensor, storage, config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(dtype: torch.dtype) -> None:
    tensor = tensor_of(40, 64, 4, 32, zeros=8, dtype=dtype)
    check(tensor, storage_for(tensor, 4, 32), CONFIG | {"sym": True, "format": "gptq_v2"})


@pytest.mark.parametrize("kind", ["absent", "empty", "zeros", "trivial"])
def test_trivial_group_index(kind: str) -> None:
    tensor = tensor_of(40, 64, 4, 32, zeros=(1, 15))
    storage = storage_for(tensor, 4, 32, "v1", "gptq", g_idx=kind)
    check(tensor, storage, CONFIG)
    module = written(storage, tensor, CONFIG)
    assert gptq.scheme(module).group_index == (kind in ("zeros", "trivial"))
    assert any("all zero" in text for text in gptq.module_warnings(module)) == (kind == "zeros")


@pytest.mark.parametrize("dtype", ["I32", "I64"])
def test_act_order(dtype: str) -> None:
    tensor = tensor_of(40, 96, 4, 32, zeros=(1, 15), order=True)
    storage = replace(storage_for(tensor, 4, 32, "v1", "gptq", g_idx="act-order", g_idx_dtype=dtype), group_index=True)
    check(tensor, storage, CONFIG)
    assert gptq.storage_of(written(storage, tensor, CONFIG)).options["act_order"] is True


def test_uneven_act_order_groups_warn() -> None:
    tensor = tensor_of(8, 96, 4, 32, zeros=(1, 15), order=True)
    assert tensor.group_index is not None
    uneven = tensor.replace(group_index=torch.clamp(tensor.group_index, max=1))
    storage = replace(storage_for(tensor, 4, 32, "v1", "gptq"), group_index=True)
    assert any("not all of 32 columns" in text for text in gptq.module_warnings(written(storage, uneven, CONFIG)))


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_autoround_odd_widths(bits: int) -> None:
    tensor = tensor_of(64, 96, bits, 32, zeros=(0, (1 << bits) - 1))
    config = {"quant_method": "auto-round", "bits": bits, "group_size": 32, "sym": False, "packing_format": "auto_round"}
    check(tensor, storage_for(tensor, bits, 32, g_idx="absent"), config, "auto-round")


@pytest.mark.parametrize(("bits", "label"), [(4, "gptq_p"), (8, "gptq_p"), (2, "gptq_p")])
def test_planar_label_with_whole_planes_is_the_stream(bits: int, label: str) -> None:
    tensor = tensor_of(64, 96, bits, 32, zeros=(0, (1 << bits) - 1))
    check(tensor, storage_for(tensor, bits, 32, label=label), CONFIG | {"bits": bits, "checkpoint_format": label})


def test_without_a_config_shapes_tell_bits_and_group() -> None:
    tensor = tensor_of(64, 96, 3, 32, zeros=(1, 7))
    module = written(storage_for(tensor, 3, 32, "v1", "gptq"), tensor, {})
    assert same_tensor(gptq.read(module), tensor)


def test_a_lost_rule_order_is_put_right_by_the_shapes() -> None:
    tensor = tensor_of(64, 96, 8, 32, zeros=128)
    config = CONFIG | {"sym": True, "checkpoint_format": "gptq_v2", "dynamic": {"+:.*": {"bits": 2}, "+:m": {"bits": 8}}}
    module = written(storage_for(tensor, 8, 32), tensor, config)
    assert gptq.read(module).grid == Integer(8)
    assert any("first matching rule" in text for text in gptq.module_warnings(module))


def test_ranges_that_cut_a_word_are_refused() -> None:
    tensor = tensor_of(64, 64, 4, 32, zeros=(1, 15))
    with pytest.raises(Unsupported, match="row-range"):
        gptq.write(storage_for(tensor, 4, 32, "v1", "gptq"), rows(tensor, 0, 20), 0, (64, 64))
    with pytest.raises(Unsupported, match="storage-form"):
        gptq.write(storage_for(tensor, 4, 64, "v1", "gptq"), tensor, 0, (64, 64))
