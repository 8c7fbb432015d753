"""Act-order absorbed into producing rows computes the same layer, exactly; where it cannot be absorbed it is named and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builder import Llama
from checkpoints import converted, load, planned, ready
from reference import gguf_tensors

from converters.execute import execute
from converters.verify import verify
from qformats.errors import WouldLose

Array = np.ndarray[Any, Any]


def shuffled(k: int, group: int, seed: int = 3) -> Array:
    """A group index of whole groups in random order, as act-order leaves it."""
    index: Array = np.random.default_rng(seed).permutation(np.arange(k) // group)
    return index


def per_head(model: Llama, pattern: Array) -> Array:
    """``pattern`` (head_dim,) of local groups repeated for every query head."""
    groups = model.head_dim // model.group
    return np.concatenate([pattern + head * groups for head in range(model.heads)])


def mlp(gate: Array, up: Array, down: Array, x: Array) -> Array:
    """Any element-wise activation does; the squared ReLU keeps integers exact."""
    out: Array = down @ (np.maximum(gate @ x, 0) ** 2 * (up @ x))
    return out


def attention(model: Llama, value: Array, output: Array, x: Array, mix: Array) -> Array:
    """o_proj of value heads mixed over positions with given weights (heads, T, T); query head h reads value head h // (heads / kv)."""
    v = (value @ x).reshape(model.kv, model.head_dim, -1)
    heads = [v[h * model.kv // model.heads] @ mix[h] for h in range(model.heads)]
    out: Array = output @ np.concatenate(heads)
    return out


def inputs(rows: int) -> Array:
    return np.random.default_rng(9).integers(-3, 4, (rows, 5)).astype(np.float64)


@pytest.mark.parametrize(("to", "zero"), [("gguf", 8), ("gguf", "mixed"), ("gguf:q8_0", "mixed"), ("gguf:q4_1", 8)])
def test_down_proj_is_absorbed_into_gate_and_up(to: str, zero: int | str, tmp_path: Path) -> None:
    model = Llama(zero=zero)
    model.indices["down_proj"] = shuffled(model.inner, model.group)
    source = model.write(tmp_path / "source")
    plan = converted(source, tmp_path / "out.gguf", to, exact=True)
    assert not plan.warnings
    down = next(j for j in plan.jobs if j.name == "blk.0.ffn_down.weight")
    assert down.kind == "exact" and any("act-order" in note for note in (*down.notes, *down.rewrites))
    found = {name: values for name, (_, values) in gguf_tensors(tmp_path / "out.gguf").items()}
    x = inputs(model.hidden)
    ours = mlp(found["blk.0.ffn_gate.weight"], found["blk.0.ffn_up.weight"], found["blk.0.ffn_down.weight"], x)
    theirs = mlp(model.weight("gate_proj"), model.weight("up_proj"), model.weight("down_proj"), x)
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(found["blk.0.ffn_down.weight"], model.weight("down_proj"))
    assert verify(source, tmp_path / "out.gguf", replay=True).ok


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_o_proj_is_absorbed_inside_heads(kv: int, tmp_path: Path) -> None:
    model = Llama(head_dim=64, group=32, heads=4, kv=kv)
    model.indices["o_proj"] = per_head(model, shuffled(64, 32))
    source = model.write(tmp_path / "source")
    plan = converted(source, tmp_path / "out.gguf", "gguf", exact=True)
    assert not plan.warnings
    found = {name: values for name, (_, values) in gguf_tensors(tmp_path / "out.gguf").items()}
    x, mix = inputs(model.hidden), np.random.default_rng(2).integers(0, 3, (4, 5, 5)).astype(np.float64)
    ours = attention(model, found["blk.0.attn_v.weight"], found["blk.0.attn_output.weight"], x, mix)
    theirs = attention(model, model.weight("v_proj"), model.weight("o_proj"), x, mix)
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(found["blk.0.attn_v.weight"], model.weight("v_proj"))


def test_the_numbers_of_a_head_s_groups_do_not_matter(tmp_path: Path) -> None:
    model = Llama(head_dim=64, group=32, heads=4, kv=2)
    pattern = shuffled(64, 32)
    model.indices["o_proj"] = np.concatenate([pattern, 3 - pattern, 4 + pattern, 7 - pattern])
    plan = converted(model.write(tmp_path / "source"), tmp_path / "out.gguf", "gguf", exact=True)
    assert not plan.warnings
    found = {name: values for name, (_, values) in gguf_tensors(tmp_path / "out.gguf").items()}
    x, mix = inputs(model.hidden), np.random.default_rng(2).integers(0, 3, (4, 5, 5)).astype(np.float64)
    ours = attention(model, found["blk.0.attn_v.weight"], found["blk.0.attn_output.weight"], x, mix)
    assert np.array_equal(ours, attention(model, model.weight("v_proj"), model.weight("o_proj"), x, mix))
    converted(tmp_path / "out.gguf", tmp_path / "back", "gptq", exact=True)
    assert load(tmp_path / "back" / "model.safetensors") == load(tmp_path / "source" / "model.safetensors")


def test_heads_of_one_value_head_that_disagree_are_refused(tmp_path: Path) -> None:
    model = Llama(head_dim=64, group=32, heads=4, kv=2)
    model.indices["o_proj"] = np.concatenate([shuffled(64, 32, seed) + 2 * seed for seed in range(4)])
    source = model.write(tmp_path / "source")
    plan = planned(source, "gguf")
    with plan.checkpoint:
        assert [w for w in plan.warnings if "o_proj" in w and "heads" in w]
        assert {j.name for j in plan.jobs if j.kind == "requantized"} == {"blk.0.attn_output.weight"}
    with pytest.raises(WouldLose) as caught:
        converted(source, tmp_path / "out.gguf", "gguf")
    assert caught.value.code == "requantize" and "blk.0.attn_output.weight" in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


def test_groups_that_cross_heads_are_refused(tmp_path: Path) -> None:
    model = Llama(head_dim=64, group=32, heads=4, kv=2)
    model.indices["o_proj"] = shuffled(256, 32)
    plan = planned(model.write(tmp_path / "source"), "gguf")
    with plan.checkpoint:
        assert len(plan.warnings) == 1 and "o_proj" in plan.warnings[0] and "cross" in plan.warnings[0]


@pytest.mark.parametrize("leaf", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
def test_layers_that_share_an_input_are_refused_by_name(leaf: str, tmp_path: Path) -> None:
    model = Llama(hidden=64)
    model.indices[leaf] = shuffled(64, 32)
    plan = planned(model.write(tmp_path / "source"), "gguf")
    with plan.checkpoint:
        assert len(plan.warnings) == 1 and leaf in plan.warnings[0] and "share" in plan.warnings[0]


def test_all_at_once_and_back(tmp_path: Path) -> None:
    model = Llama(head_dim=64, group=32, heads=4, kv=2, zero="mixed")
    model.indices |= {"down_proj": shuffled(128, 32), "o_proj": per_head(model, shuffled(64, 32))}
    source = model.write(tmp_path / "source")
    converted(source, tmp_path / "out.gguf", "gguf", exact=True)
    converted(tmp_path / "out.gguf", tmp_path / "back", "gptq", exact=True)
    assert load(tmp_path / "back" / "model.safetensors") == load(source / "model.safetensors")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert verify(tmp_path / "out.gguf", tmp_path / "back", replay=True).ok


def test_an_index_of_sorted_groups_is_no_act_order(tmp_path: Path) -> None:
    plan = planned(Llama().write(tmp_path / "source"), "gguf")
    with plan.checkpoint:
        assert not any(job.orders for job in plan.jobs) and not plan.warnings


def test_gptq_keeps_its_index(tmp_path: Path) -> None:
    source = ready("gptq/4b-g32-act", tmp_path)
    plan = converted(source, tmp_path / "out", "gptq", exact=True)
    assert not plan.warnings
    before, after = load(source / "model.safetensors"), load(tmp_path / "out" / "model.safetensors")
    assert before == after


def test_awq_has_no_place_for_an_index(tmp_path: Path) -> None:
    plan = planned(ready("gptq/4b-g32-act", tmp_path), "awq", allow_requantize=True)
    with plan.checkpoint:
        assert any("share" in w for w in plan.warnings)
        assert any(job.kind == "requantized" for job in plan.jobs)
        execute(plan, tmp_path / "out")
    assert verify(ready("gptq/4b-g32-act", tmp_path), tmp_path / "out", replay=True).ok


def test_floats_need_no_order(tmp_path: Path) -> None:
    model = Llama()
    model.indices |= {"q_proj": shuffled(64, 32), "down_proj": shuffled(128, 32)}
    source = model.write(tmp_path / "source")
    plan = converted(source, tmp_path / "out", "hf:f32", exact=True)
    assert not plan.warnings
    found = load(tmp_path / "out" / "model.safetensors")
    for leaf in ("q_proj", "down_proj", "o_proj"):
        dtype, shape, data = found[f"{model.name(leaf)}.weight"]
        assert dtype == "F32" and np.array_equal(np.frombuffer(data, "<f4").reshape(shape), model.weight(leaf))


def test_a_step_that_holds_a_whole_tensor_is_named(tmp_path: Path) -> None:
    """Rows of gate and up move throughout; a GGUF is written row by row, AWQ in words across rows."""
    model = Llama()
    model.indices["down_proj"] = shuffled(model.inner, model.group)
    source = model.write(tmp_path / "source")
    for to, named in (("awq", {"gate_proj", "up_proj"}), ("gguf", set())):
        plan = planned(source, to)
        with plan.checkpoint:
            found = {name.split(".")[-2] for name in (j.name for j in plan.jobs if any("whole tensor" in n for n in j.rewrites))}
            assert found == named
            assert all(job.kind in ("exact", "copied") for job in plan.jobs)


def test_compressed_tensors_keeps_the_index(tmp_path: Path) -> None:
    """Nothing is absorbed and nothing rounded; the plan says who reads it, ``act-order=no`` absorbs and asks as before."""
    model = Llama()
    model.indices.update(down_proj=shuffled(model.inner, model.group), q_proj=shuffled(model.hidden, model.group, 4))
    source = model.write(tmp_path / "source")
    plan = converted(source, tmp_path / "out", "compressed-tensors", exact=True)
    assert len(plan.warnings) == 1 and "2 weights" in plan.warnings[0] and "weight_g_idx" in plan.warnings[0]
    assert {job.kind for job in plan.jobs} <= {"copied", "exact"}
    tensors = load(tmp_path / "out" / "model.safetensors")
    stored = tensors["model.layers.0.mlp.down_proj.weight_g_idx"]
    assert stored[0] == "I32" and np.array_equal(np.frombuffer(stored[2], "<i4"), model.indices["down_proj"])
    assert "model.layers.0.mlp.up_proj.weight_g_idx" not in tensors
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(g["weights"].get("actorder") or "" for g in groups.values()) == ["", "group"]
    assert verify(source, tmp_path / "out", replay=True).ok
    converted(tmp_path / "out", tmp_path / "back", "gptq", exact=True)
    assert load(tmp_path / "back" / "model.safetensors") == load(source / "model.safetensors")
    without = planned(source, "compressed-tensors:int4,act-order=no")
    with without.checkpoint:
        assert {j.name for j in without.jobs if j.kind == "requantized"} == {"model.layers.0.self_attn.q_proj.weight"}


def test_groups_of_other_sizes_are_no_compressed_tensors(tmp_path: Path) -> None:
    """Its owner sorts the columns and cuts them into groups of one size."""
    model = Llama()
    index = shuffled(model.hidden, model.group)
    index[np.argmax(index == 0)] = 1
    model.indices["q_proj"] = index
    plan = planned(model.write(tmp_path / "source"), "compressed-tensors")
    with plan.checkpoint:
        (job,) = (j for j in plan.jobs if "q_proj" in j.name)
        assert job.kind == "requantized" and "columns" in job.reason
