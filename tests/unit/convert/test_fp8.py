"""FP8 fixtures through whole conversions: experts fused into one tensor, and what stands beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from checkpoints import FIXTURES, converted, load, ready, store

from qformats.checkpoint import open_checkpoint
from qformats.tensor import QuantizedTensor


def test_fused_experts_into_gguf(tmp_path: Path) -> None:
    """``gate_up_proj`` and its ``_scale_inv`` are one weight: GGUF's gate and up are its halves."""
    source = ready("dense/qwen3_moe", tmp_path)
    tensors = load(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    experts, width, hidden = config["num_local_experts"], config["moe_intermediate_size"], config["hidden_size"]
    base, rng = "model.layers.0.mlp.experts", np.random.default_rng(0)
    for name in [name for name in tensors if name.startswith(base)]:
        del tensors[name]
    for leaf, shape in (("gate_up_proj", (experts, 2 * width, hidden)), ("down_proj", (experts, hidden, width))):
        scale = rng.random((experts, shape[1] // 32, shape[2] // 32)).astype("<f4")
        tensors[f"{base}.{leaf}"] = ("F8_E4M3", list(shape), rng.integers(0, 126, shape, dtype=np.uint8).tobytes())
        tensors[f"{base}.{leaf}_scale_inv"] = ("F32", list(scale.shape), scale.tobytes())
    store(source / "model.safetensors", tensors, {"format": "pt"})
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (source / "config.json").write_text(json.dumps(config))
    converted(source, tmp_path / "out.gguf", "gguf:f32")
    with open_checkpoint(source) as mine, open_checkpoint(tmp_path / "out.gguf") as gguf:
        fused = mine.read(f"{base}.gate_up_proj")
        assert isinstance(fused, QuantizedTensor)
        halves = fused.dequantize().reshape(experts, 2, width, hidden)
        for number, name in enumerate(("ffn_gate_exps", "ffn_up_exps")):
            found = gguf.read(f"blk.0.{name}")
            assert isinstance(found, torch.Tensor) and torch.equal(found.reshape(experts, width, hidden), halves[:, number])


def test_static_scales_stay_in_the_same_format(tmp_path: Path) -> None:
    source = ready("modelopt/fp8", tmp_path)
    plan = converted(source, tmp_path / "again", "modelopt")
    assert set(plan.kinds) == {"copied"}
    assert load(tmp_path / "again" / "model.safetensors") == load(source / "model.safetensors")
    for name in ("config.json", "hf_quant_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (FIXTURES / "modelopt/fp8" / name).read_bytes()


def test_static_scales_that_another_kind_has_too(tmp_path: Path) -> None:
    """ModelOpt's ``input_scale`` is a leaf of vLLM's FP8 too; the weights keep their codes."""
    plan = converted(ready("modelopt/fp8", tmp_path), tmp_path / "out", "fp8")
    assert set(plan.kinds) <= {"copied", "exact"}
    with open_checkpoint(tmp_path / "out") as out, open_checkpoint(FIXTURES / "modelopt/fp8") as source:
        assert not (tmp_path / "out" / "hf_quant_config.json").exists()
        for name in (name for name in source.modules if source.is_quantized(name)):
            mine, theirs = out.read(name), source.read(name)
            assert isinstance(mine, QuantizedTensor) and isinstance(theirs, QuantizedTensor)
            assert torch.equal(mine.dequantize(torch.float64), theirs.dequantize(torch.float64))


def test_blocks_of_several_sizes_become_one(tmp_path: Path) -> None:
    """A config says one block: scales of tensors, rows and blocks are repeated until all are on the largest that fits them."""
    source = ready("modelopt/mixed", tmp_path)
    plan = converted(source, tmp_path / "out", "fp8", allow_requantize=True)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["weight_block_size"]
    assert {(j.storage.rows, j.storage.group) for j in plan.jobs if j.storage is not None and j.type == "fp8"} == {tuple(said)}
    with open_checkpoint(source) as before, open_checkpoint(tmp_path / "out") as after:
        for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj"):
            weights = [opened.tensors[f"model.layers.0.{name}.weight"].dequantize(torch.float64) for opened in (before, after)]
            assert torch.equal(*weights), name
