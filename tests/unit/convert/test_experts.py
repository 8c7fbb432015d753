"""Stacked experts, and matrices with inputs as rows: codes and floats of one weight that differ in name and axes, in every direction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Tensors, array, converted, load, planned, store
from families import family
from walk import stripped

from converters.verify import verify
from qformats.checkpoint import open_checkpoint
from qformats.errors import Unsupported, WouldLose
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
    there = floats_of(tmp_path / "other") if plan.kinds.keys() <= {"copied", "dequantized"} else load(tmp_path / "other" / "model.safetensors")
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
