"""gpt-oss with MXFP4 experts as OpenAI stores them, from a model with float experts: blocks packed here, float values by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["dequantized", "pack_experts"]


def _random_blocks(shape: tuple[int, int, int], rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Random codes and scales of a weight (E, N, K)."""
    experts, rows, columns = shape
    blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)
    return blocks, rng.integers(118, 122, (experts, rows, columns // 32), dtype=np.uint8)


def pack_experts(folder: Path, out: Path) -> Path:
    """The checkpoint ``folder`` with random MXFP4 experts in place of its float ones."""
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, out)
    weights, rng = load_file(out / "model.safetensors"), np.random.default_rng(11)
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = weights.pop(name).shape
        weights[f"{name}_blocks"], weights[f"{name}_scales"] = _random_blocks((experts, rows, columns), rng)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out


def dequantized(folder: Path, out: Path) -> Path:
    """The same checkpoint in floats, the experts dequantized by transformers' own function in float32."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in weights if name.endswith("_blocks")]:
        blocks, scales = weights.pop(f"{name}_blocks"), weights.pop(f"{name}_scales")
        weights[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out
