"""Stacked experts, and matrices with inputs as rows: codes and floats of one weight that differ in name and axes, in every direction."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Tensors, array, converted, load, planned, store
from families import family
from walk import stripped

from converters.claims import float_scheme
from converters.jobs import storage_from_json, storage_to_json
from converters.verify import verify
from qformats import registry
from qformats.checkpoint import open_checkpoint
from qformats.errors import Unsupported, WouldLose
from qformats.formats.protocol import Target
from qformats.scheme import Storage
from qformats.tensor import QuantizedTensor

Array = np.ndarray[Any, Any]
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64).numpy()
_SMALL: dict[str, dict[str, Any]] = {
    "llama4": {"num_hidden_layers": 2, "no_rope_layers": [1, 1], "layer_types": ["chunked_attention"] * 2, "moe_layers": [1]},
    "gpt_oss": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
    "qwen3_moe": {"num_hidden_layers": 1, "hidden_size": 64, "moe_intermediate_size": 64, "num_local_experts": 3},
    "gpt2": {"n_layer": 1},
}  # fmt: skip


def small(name: str, directory: Path, **changes: Any) -> Path:
    return family(name, directory, **{**_SMALL.get(name, {}), **changes})


def floats_of(path: Path) -> dict[str, Array]:
    """Every tensor of a plain checkpoint in float64."""
    tensors = load(path / "model.safetensors")
    return {name: array(tensors, name).astype(np.float64) for name in tensors}


def gguf_values(path: Path, name: str) -> Array:
    with open_checkpoint(path) as opened:
        found = opened.read(name)
        values = found.dequantize(torch.float64) if isinstance(found, QuantizedTensor) else found.to(torch.float64)
        return values.reshape(opened.raw[f"{name}.weight"].shape).numpy()


def coded(folder: Path, kind: str) -> dict[str, Array]:
    """Random codes in place of every stack of experts, as ``kind``'s owner has them; the values that it computes, where floats are."""
    tensors, rng, values = load(folder / "model.safetensors"), np.random.default_rng(5), {}
    made, metadata = Tensors(), {"format": "pt"}
    for name, entry in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[name] = entry
            continue
        shape = tuple(entry[1])
        values[name] = _coded(kind, name, shape, rng, made, metadata)
    if kind == "torchao":
        metadata |= {name: '{"_type": "Tensor"}' for name in tensors if name not in values}
        metadata["tensor_names"] = json.dumps(list(tensors))
    store(folder / "model.safetensors", made, metadata)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": kind, **({"weight_block_size": [16, 32]} if kind == "fp8" else {})}
    (folder / "config.json").write_text(json.dumps(config))
    return values


def _coded(kind: str, name: str, shape: tuple[int, ...], rng: np.random.Generator, made: Tensors, metadata: dict[str, str]) -> Array:
    """One stack of float ``shape`` as e4m3fn codes: by columns (FBGEMM), by rows as they stand (torchao), in blocks by outputs (FP8)."""
    turned = kind == "fp8" and ".feed_forward." in name  # Llama 4: inputs as rows
    stored = (shape[0], shape[2], shape[1]) if turned else shape
    codes = rng.integers(0, 126, stored, dtype=np.uint8)
    down = name.endswith("down_proj")
    if kind == "fbgemm_fp8":
        scale = (rng.random((shape[0], 1, shape[2])) + 0.5).astype("<f4")
        spread, kept, suffix = scale, scale.reshape(shape[0], -1, 1) if down else scale, "_scale"
    elif kind == "torchao":
        scale = (rng.random((*shape[:2], 1)) + 0.5).astype("<f4")
        spread, kept, suffix = scale, scale, "_scale"
        metadata[name] = json.dumps({
            "_type": "Float8Tensor", "_tensor_data_names": ["qdata", "scale"],
            "_data": {"block_size": [1, 1, shape[2]], "mm_config": None, "act_quant_kwargs": None,
                      "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
                      "dtype": {"_type": "torch.dtype", "_data": "float32"}},
        })  # fmt: skip
    else:
        kept = (rng.random((stored[0], stored[1] // 16, stored[2] // 32)) + 0.5).astype("<f4")
        spread, suffix = kept.repeat(16, 1).repeat(32, 2), "_scale_inv"
    owner, _, leaf = name.rpartition(".")
    stem = f"{owner}._{leaf}" if kind == "torchao" else name
    made[stem + "_qdata" if kind == "torchao" else stem] = ("F8_E4M3", list(stored), codes.tobytes())
    made[stem + suffix] = ("F32", list(kept.shape), kept.tobytes())
    values: Array = E4M3[codes] * spread.astype(np.float64)
    return values.swapaxes(1, 2) if turned else values


def fuse(folder: Path) -> Path:
    """The experts of a Qwen 3 MoE as transformers 5 holds them: gate above up, all in one tensor."""
    tensors = load(folder / "model.safetensors")
    base, count = "model.layers.0.mlp.experts", _SMALL["qwen3_moe"]["num_local_experts"]
    taken = {leaf: [array(tensors, f"{base}.{e}.{leaf}_proj.weight") for e in range(count)] for leaf in ("gate", "up", "down")}
    rest = {name: entry for name, entry in tensors.items() if ".experts." not in name}
    both = [np.concatenate(pair) for pair in zip(taken["gate"], taken["up"], strict=True)]
    for leaf, stack in (("gate_up_proj", both), ("down_proj", taken["down"])):
        values = np.stack(stack)
        rest[f"{base}.{leaf}"] = ("F32", list(values.shape), values.astype("<f4").tobytes())
    store(folder / "model.safetensors", rest, {"format": "pt"})
    return folder


STACKS = [("fbgemm_fp8", "llama4"), ("torchao", "llama4"), ("fp8", "llama4"), ("torchao", "gpt_oss"), ("torchao", "qwen3_moe"),
          ("fp8", "qwen3_moe")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), STACKS)
def test_stacks_of_codes_become_floats_under_their_own_name(kind: str, name: str, tmp_path: Path) -> None:
    source = small(name, tmp_path / "source")
    source = fuse(source) if name == "qwen3_moe" else source
    wanted = {**floats_of(source), **coded(source, kind)}
    converted(source, tmp_path / "floats", "hf:f32")
    found = floats_of(tmp_path / "floats")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[n], wanted[n].astype(np.float32)) for n in wanted)
    plan = converted(source, tmp_path / "other", "compressed-tensors:int8")
    assert {job.dtype for job in plan.jobs if job.name.endswith(("gate_up_proj", "down_proj")) and "experts" in job.name} == {"F32"}
    assert any("compressed-tensors has no codes" in job.reason or "change places" in job.reason for job in plan.jobs)
    there = load(tmp_path / "other" / "model.safetensors")
    assert not any(n.endswith(("gate_up_proj.weight", "experts.down_proj.weight")) for n in there)
    again = converted(source, tmp_path / "again", kind)
    assert set(again.kinds) == {"copied"}
    assert load(tmp_path / "again" / "model.safetensors") == load(source / "model.safetensors")
    converted(source, tmp_path / "a.gguf", "gguf:f32")
    converted(tmp_path / "floats", tmp_path / "b.gguf", "gguf:f32")
    with open_checkpoint(tmp_path / "a.gguf") as a, open_checkpoint(tmp_path / "b.gguf") as b:
        assert {n: t.read() for n, t in a.raw.items()} == {n: t.read() for n, t in b.raw.items()}
    for made in ("floats", "other", "a.gguf"):
        assert verify(source, tmp_path / made, replay=True).ok


# ---------------------------------------------------------------- one module an expert


def apart(folder: Path) -> Path:
    """Llama 4's or gpt-oss's stacks as linear layers, one for each expert."""
    tensors, made = load(folder / "model.safetensors"), Tensors()
    for name, entry in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if not owner.endswith("experts"):
            made[name] = entry
            continue
        bias, values = leaf.endswith("_bias"), array(tensors, name)
        alternate = ".mlp." in name
        for expert, matrix in enumerate(values):
            halves = {"down_proj": matrix}
            if leaf.startswith("gate_up"):
                pair = (matrix[..., ::2], matrix[..., 1::2]) if alternate else np.split(matrix, 2, -1)
                halves = dict(zip(("gate_proj", "up_proj"), pair, strict=True))
            for one, part in halves.items():
                kept = np.ascontiguousarray(part.T, "<f4")
                made[f"{owner}.{expert}.{one}.{'bias' if bias else 'weight'}"] = ("F32", list(kept.shape), kept.tobytes())
    store(folder / "model.safetensors", made, {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["llama4", "gpt_oss"])
def test_stacks_that_were_taken_apart_keep_their_codes(name: str, tmp_path: Path) -> None:
    """``experts.0.gate_proj`` of llm-compressor: float values as from the stack, codes exactly."""
    source = small(name, tmp_path / "source")
    converted(source, tmp_path / "a.gguf", "gguf")
    one = apart(source)
    converted(one, tmp_path / "b.gguf", "gguf")
    with open_checkpoint(tmp_path / "a.gguf") as a, open_checkpoint(tmp_path / "b.gguf") as b:
        assert {n: (t.shape, t.read()) for n, t in a.raw.items()} == {n: (t.shape, t.read()) for n, t in b.raw.items()}
    converted(one, tmp_path / "int8", "compressed-tensors:int8,group=32", allow_requantize=True)
    plan = converted(tmp_path / "int8", tmp_path / "c.gguf", "gguf")
    assert {(j.type, j.kind) for j in plan.jobs if j.map.kind == "experts"} == {("Q8_0", "exact")}
    assert verify(tmp_path / "int8", tmp_path / "c.gguf", replay=True).ok


EXPERTS_KEPT = {
    "compressed-tensors:int8,group=32": ("Q8_0", "exact"), "compressed-tensors:nvfp4": ("NVFP4", "codes-exact"),
    "compressed-tensors:mxfp4": ("MXFP4", "exact"), "torchao:nvfp4": ("NVFP4", "exact"), "modelopt:nvfp4": ("NVFP4", "exact"),
    "bitsandbytes:int8": ("Q8_0", "codes-exact"), "quanto:qint8": ("Q8_0", "codes-exact"), "gptq:int4,group=32": ("Q4_0", "exact"),
}  # fmt: skip


@pytest.mark.parametrize("target", EXPERTS_KEPT)
def test_experts_one_by_one_and_stacked(target: str, tmp_path: Path) -> None:
    """Codes of single experts into GGUF's stack, each with its own factor, and back to the same codes; from a stranger's GGUF too."""
    source = small("qwen3_moe", tmp_path / "source")
    converted(source, tmp_path / "codes", target, allow_requantize=True)
    plan = converted(tmp_path / "codes", tmp_path / "a.gguf", "gguf")
    assert {(j.type, j.kind) for j in plan.jobs if j.map.kind == "experts"} == {EXPERTS_KEPT[target]}
    name = target.partition(":")[0]
    converted(tmp_path / "a.gguf", tmp_path / "back", name)
    other = converted(stripped(tmp_path / "a.gguf", tmp_path / "b.gguf"), tmp_path / "strange", "compressed-tensors")
    assert {j.kind for j in other.jobs if ".experts." in j.name} <= {"exact", "codes-exact"}
    with open_checkpoint(tmp_path / "codes") as before, open_checkpoint(tmp_path / "back") as after:
        for module in (m for m in before.modules if ".experts." in m):
            ours, theirs = after.read(module), before.read(module)
            assert isinstance(ours, QuantizedTensor) and isinstance(theirs, QuantizedTensor)
            assert torch.equal(ours.codes, theirs.codes)
            assert torch.allclose(ours.dequantize(torch.float64), theirs.dequantize(torch.float64), rtol=2**-10, atol=0)
    assert verify(tmp_path / "codes", tmp_path / "a.gguf").ok and verify(tmp_path / "a.gguf", tmp_path / "back").ok


# ---------------------------------------------------------------- float8 stacks of torchao


STACKED = {"granitemoe": "block_sparse_moe", "mixtral": "mlp", "qwen3_moe": "mlp"}  # where transformers has the experts


@pytest.mark.parametrize("name", STACKED)
def test_experts_become_one_float8_tensor_for_torchao(name: str, tmp_path: Path) -> None:
    """Whatever a checkpoint has them in; the names and entries are those that transformers saves, the values those of a way without."""
    source = small(name, tmp_path / "source")
    plan = converted(source, tmp_path / "codes", "torchao:fp8")
    stacks = {job.map.target: job for job in plan.jobs if len(job.map.shape) == 3}
    bases = {f"model.layers.{i}.{STACKED[name]}.experts" for i in range(_SMALL.get(name, {}).get("num_hidden_layers", 2))}
    assert set(stacks) == {f"{base}.{leaf}" for base in bases for leaf in ("gate_up_proj", "down_proj")}
    assert not any("one by one" in text or "stay in floats" in text for text in plan.warnings)
    stored, base = load(tmp_path / "codes" / "model.safetensors"), min(bases)
    shape = stacks[f"{base}.gate_up_proj"].map.shape
    assert stored[f"{base}._gate_up_proj_qdata"][:2] == ("F8_E4M3", list(shape))
    assert stored[f"{base}._gate_up_proj_scale"][:2] == ("F32", [*shape[:2], 1])
    with open_checkpoint(tmp_path / "codes") as opened:
        entry = json.loads(opened.match.metadata[f"{base}.gate_up_proj"])
        assert entry["_type"] == "Float8Tensor" and entry["_data"]["block_size"] == [1, 1, shape[2]]
        assert f"{base}.gate_up_proj" in json.loads(opened.match.metadata["tensor_names"])
    converted(source, tmp_path / "floats.gguf", "gguf:f32")
    converted(stripped(tmp_path / "floats.gguf", tmp_path / "b.gguf"), tmp_path / "two", "torchao:fp8")
    assert all(load(tmp_path / "two" / "model.safetensors")[n] == entry for n, entry in stored.items() if "experts" in n)
    converted(tmp_path / "codes", tmp_path / "codes.gguf", "gguf:f32")
    for kind in ("gate", "up", "down"):
        found, wanted = (gguf_values(tmp_path / f"{f}.gguf", f"blk.0.ffn_{kind}_exps") for f in ("codes", "floats"))
        assert np.linalg.norm(found - wanted) < 0.04 * np.linalg.norm(wanted)
    converted(tmp_path / "codes", tmp_path / "again", "hf:f32")
    assert verify(source, tmp_path / "codes", replay=True).ok and verify(tmp_path / "codes", tmp_path / "again", replay=True).ok
    assert {job.type for job in planned(source, "torchao:int8").jobs if len(job.map.shape) == 3} <= {"F32", "F16", "BF16"}


@pytest.mark.parametrize(("target", "block"), [("fp8", [1, 64, 64]), ("compressed-tensors:fp8", [1, 1, 64])])
def test_single_float8_experts_are_stacked_and_taken_apart_again(target: str, block: list[int], tmp_path: Path) -> None:
    """The same codes and scales in one tensor, exactly, and back to the same bytes under the same config."""
    source = small("qwen3_moe", tmp_path / "source")
    converted(source, tmp_path / "codes", target, allow_requantize=True)
    plan = converted(tmp_path / "codes", tmp_path / "stacks", "torchao")
    assert {job.kind for job in plan.jobs if len(job.map.shape) == 3} == {"exact"}
    with open_checkpoint(tmp_path / "stacks") as opened:
        assert json.loads(opened.match.metadata["model.layers.0.mlp.experts.down_proj"])["_data"]["block_size"] == block
    converted(tmp_path / "stacks", tmp_path / "back", target.partition(":")[0])
    assert load(tmp_path / "back" / "model.safetensors") == load(tmp_path / "codes" / "model.safetensors")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "codes" / "config.json").read_bytes()


def test_stacks_under_transformers_own_names(tmp_path: Path) -> None:
    """Granite's as torchao saves them, ``experts.gate_up_proj``, not ``input_linear``; a whole stack under one scale gets one an expert."""
    source = small("granitemoe", tmp_path / "source")
    tensors = load(source / "model.safetensors")
    words = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}
    renamed = {n.replace(a, b): e for n, e in tensors.items() for a, b in [next((w for w in words.items() if w[0] in n), ("", ""))]}
    converted(source, tmp_path / "a.gguf", "gguf:f32")
    store(source / "model.safetensors", renamed, {"format": "pt"})
    converted(source, tmp_path / "b.gguf", "gguf:f32")
    with open_checkpoint(tmp_path / "a.gguf") as a, open_checkpoint(tmp_path / "b.gguf") as b:
        assert {n: t.read() for n, t in a.raw.items()} == {n: t.read() for n, t in b.raw.items()}
    converted(source, tmp_path / "one", "torchao:fp8,tensor")
    stored = load(tmp_path / "one" / "model.safetensors")
    assert stored["model.layers.0.block_sparse_moe.experts._down_proj_scale"][1] == [4, 1, 1]


# ---------------------------------------------------------------- MXFP4 as a target


def test_mxfp4_from_floats_and_blocks(tmp_path: Path) -> None:
    """New codes from floats by consent; the same from a GGUF of floats; a GGUF's own blocks exactly; their errors are small."""
    source = small("gpt_oss", tmp_path / "source", hidden_size=64, intermediate_size=96)
    with pytest.raises(WouldLose):
        converted(source, tmp_path / "asks", "mxfp4")
    plan = converted(source, tmp_path / "one", "mxfp4", allow_requantize=True)
    assert {(j.kind, j.type) for j in plan.jobs if j.storage is not None} == {("requantized", "mxfp4")}
    assert {j.kind for j in plan.jobs if j.storage is None} == {"copied"}
    assert verify(source, tmp_path / "one", replay=True).ok
    converted(source, tmp_path / "floats.gguf", "gguf")
    converted(stripped(tmp_path / "floats.gguf", tmp_path / "b.gguf"), tmp_path / "two", "mxfp4", allow_requantize=True)
    assert experts_in(tmp_path / "one") == experts_in(tmp_path / "two")
    plan = converted(tmp_path / "one", tmp_path / "blocks.gguf", "gguf")
    plan = converted(stripped(tmp_path / "blocks.gguf", tmp_path / "c.gguf"), tmp_path / "three", "mxfp4")
    assert {j.kind for j in plan.jobs if j.storage is not None} == {"exact"}
    assert experts_in(tmp_path / "one") == experts_in(tmp_path / "three")
    converted(tmp_path / "one", tmp_path / "back", "hf:f32")
    before, after = floats_of(source), floats_of(tmp_path / "back")
    for name in (n for n in before if n.endswith("experts.gate_up_proj")):
        assert np.square(before[name] - after[name]).sum() < 0.02 * np.square(before[name]).sum()


def experts_in(folder: Path) -> dict[str, Any]:
    return {n: entry for n, entry in load(folder / "model.safetensors").items() if "experts" in n and "bias" not in n}


@pytest.mark.parametrize("name", ["llama4", "qwen3_moe", "gpt2"])
def test_mxfp4_is_gpt_oss_alone(name: str, tmp_path: Path) -> None:
    source = small(name, tmp_path / "source")
    with pytest.raises(Unsupported, match="gpt-oss"):
        converted(source, tmp_path / "out", "mxfp4", allow_requantize=True)
    converted(source, tmp_path / "a.gguf", "gguf")
    with pytest.raises(Unsupported):
        converted(tmp_path / "a.gguf", tmp_path / "out", "mxfp4", allow_requantize=True)


# ---------------------------------------------------------------- GPT-2


def matrices(folder: Path) -> dict[str, Array]:
    """GPT-2's matrices (N, K) in float64, whatever they are stored as."""
    found = {}
    with open_checkpoint(folder) as opened:
        for module in (m for m in opened.modules if ".c_" in m):
            value = opened.read(module)
            exact = value.dequantize(torch.float64) if isinstance(value, QuantizedTensor) else value.to(torch.float64).T
            found[module] = exact.numpy()
    return found


@pytest.mark.parametrize(
    ("target", "why"),
    [("bitsandbytes:nf4", "linear layers alone"), ("torchao:int8", "outputs as rows"), ("hqq:int4", "no codes for experts in one tensor")],
)
def test_a_plan_says_why_stacks_stay_in_floats(target: str, why: str, tmp_path: Path) -> None:
    for name, count in (("llama4", 2), ("gpt_oss", 2), ("granitemoe", 4)):
        plan = planned(small(name, tmp_path / name), target, allow_requantize=True)
        with plan.checkpoint:
            said = [text for text in plan.warnings if "stay in floats" in text]
            assert len(said) == 1 and said[0].startswith(f"{count} stacks of experts") and why in said[0]
            assert {job.action for job in plan.jobs if job.map.kind == "experts" and len(job.map.shape) == 3} == {"copy"}


@pytest.mark.parametrize("target", ["gptq:int8,group=32", "bitsandbytes:int8", "bitsandbytes:nf4"])
def test_conv1d_is_quantized_by_outputs(target: str, tmp_path: Path) -> None:
    """Floats (K, N) become codes (N, K) with groups along the inputs, and floats (K, N) again; GGUF gets the codes as they are."""
    source, name = small("gpt2", tmp_path / "source"), target.partition(":")[0]
    converted(source, tmp_path / "codes", target, allow_requantize=True)
    floats, codes = matrices(source), matrices(tmp_path / "codes")
    assert all(codes[m].shape == floats[m].shape for m in floats)
    limit = 0.15 if target.endswith("nf4") else 0.01
    assert all(np.linalg.norm(codes[m] - floats[m]) < limit * np.linalg.norm(floats[m]) for m in floats)
    plan = converted(tmp_path / "codes", tmp_path / "floats", "hf:f32")
    assert {j.map.kind for j in plan.jobs if ".c_" in j.name and j.map.leaf == "weight"} == {"conv1d"}
    again = matrices(tmp_path / "floats")
    assert all(np.array_equal(again[m], codes[m].astype(np.float32)) for m in codes)
    assert {t.shape for n, t in load_shapes(tmp_path / "floats")} == {t.shape for n, t in load_shapes(source)}
    to = "gguf" if "int8" in target else "gguf:f32"
    plan = converted(tmp_path / "codes", tmp_path / "a.gguf", to)
    if "int8" in target:
        assert {(j.type, j.kind) for j in plan.jobs if j.storage} <= {("Q8_0", "exact"), ("Q8_0", "codes-exact")}
        converted(stripped(tmp_path / "a.gguf", tmp_path / "b.gguf"), tmp_path / "back", "gptq")
        back = matrices(tmp_path / "back")
        assert all(np.allclose(back[m], codes[m], rtol=2**-10) for m in codes)
    assert np.allclose(gguf_values(tmp_path / "a.gguf", "blk.0.attn_qkv"), codes["transformer.h.0.attn.c_attn"], rtol=2**-10, atol=1e-9)
    assert verify(source, tmp_path / "codes", replay=True).ok and verify(tmp_path / "codes", tmp_path / "floats", replay=True).ok
    same = converted(tmp_path / "codes", tmp_path / "same", name)
    assert set(same.kinds) == {"copied"}


def load_shapes(folder: Path) -> list[tuple[str, Any]]:
    with open_checkpoint(folder) as opened:
        return list(opened.raw.items())


@pytest.mark.parametrize("target", ["compressed-tensors", "torchao", "hqq", "fp8", "modelopt", "quanto", "awq", "fbgemm_fp8"])
def test_conv1d_has_no_place_elsewhere(target: str, tmp_path: Path) -> None:
    source = small("gpt2", tmp_path / "source")
    converted(source, tmp_path / "a.gguf", "gguf:q8_0")
    for origin in (source, tmp_path / "a.gguf"):
        with pytest.raises(Unsupported) as caught:
            planned(origin, target, allow_requantize=True)
        assert caught.value.code == "conv1d"


def test_conv1d_in_a_gguf_is_requantized_like_any_matrix(tmp_path: Path) -> None:
    converted(small("gpt2", tmp_path / "source"), tmp_path / "a.gguf", "gguf:f16")
    plan = converted(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf:q4_0")
    assert {j.type for j in plan.jobs if "attn_" in j.name and j.map.leaf == "weight" and len(j.map.shape) == 2} == {"Q4_0"}


def test_every_storage_of_every_format_survives_a_record() -> None:
    """What a record says of a type is read again as it was, or the way back is lost."""
    for row in (row for row in registry.ROWS if row.writes and row.name != "hf"):
        form = registry.format_module(row.name)
        for kind in (kind for kind in row.types or (None,) if kind not in ("f32", "f16", "bf16")):
            storages: list[Storage] = []
            with suppress(Unsupported):  # a format without new codes
                storages = form.storages(Target(row.name, kind), float_scheme((256, 512)))
            for storage in storages:
                assert storage_from_json(json.loads(json.dumps(storage_to_json(storage)))) == storage, (row.name, kind)


def test_small_groups_where_rows_are_no_whole_large_ones(tmp_path: Path) -> None:
    """Rows of 64 in a GGUF have no groups of 128: they keep their codes in groups of 32, and are not floats."""
    source = small("qwen3_moe", tmp_path / "source")
    converted(source, tmp_path / "a.gguf", "gguf:q8_0")
    plan = planned(stripped(tmp_path / "a.gguf", tmp_path / "b.gguf"), "compressed-tensors")
    plan.checkpoint.close()
    assert {j.kind for j in plan.jobs if ".experts." in j.name} == {"exact"}


FUSED = [("phi3", "fp8,block=16x32"), ("bloom", "compressed-tensors:int8"), ("gpt_neox", "bitsandbytes:nf4"),
         ("falcon", "modelopt:fp8,scale=tensor")]  # fmt: skip


@pytest.mark.parametrize(("name", "target"), FUSED)
def test_fused_projections_are_taken_apart_with_their_codes(name: str, target: str, tmp_path: Path) -> None:
    """Tiles, runs and single scales under rows that GGUF has elsewhere: the values of the floats that are converted the same way."""
    source = family(name, tmp_path / "source")
    converted(source, tmp_path / "codes", target, allow_requantize=True)
    converted(tmp_path / "codes", tmp_path / "floats", "hf:f32")
    converted(tmp_path / "codes", tmp_path / "a.gguf", "gguf:f32")
    converted(tmp_path / "floats", tmp_path / "b.gguf", "gguf:f32")
    with open_checkpoint(tmp_path / "a.gguf") as a, open_checkpoint(tmp_path / "b.gguf") as b:
        assert {n: t.read() for n, t in a.raw.items()} == {n: t.read() for n, t in b.raw.items()}
