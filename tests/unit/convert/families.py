"""Random checkpoints of any architecture in floats, from the rules of its family alone: the names and shapes that its config means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import FIXTURES, TOKENIZER, Tensors, store

from qformats.architectures import find

__all__ = ["family"]

_SIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def family(name: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """``directory`` with the config of ``fixtures/architectures/NAME`` under ``changes``, its tokenizer and float32 weights."""
    origin = FIXTURES / "architectures" / name
    config = {**json.loads((origin / "config.json").read_text()), **changes}
    config.pop("quantization_config", None)
    directory.mkdir(parents=True)
    for side in _SIDE:
        place = origin if (origin / side).exists() else TOKENIZER
        if (place / side).exists():
            shutil.copy(place / side, directory / side)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    rng, tensors = np.random.default_rng(seed), Tensors()
    for full, shape in shapes(config).items():
        values = (rng.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype("<f4")
        tensors[full] = ("F32", list(shape), values.tobytes())
    store(directory / "model.safetensors", tensors, {"format": "pt"})
    return directory


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes in HF."""
    binding = find(config).bind(config)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for rule in binding.rules:
        if rule.kind == "output" and binding.tied:
            continue
        for layer in filter(lambda n: rule.in_block(n, binding.dims), range(binding.dims["L"] if "{i}" in rule.gguf else 1)):
            leaves = parts.setdefault(rule.gguf.format(i=layer), {})
            leaves[rule.gguf_leaf] = rule.sizes(binding.dims)
            if rule.bias is True or (rule.bias and binding.full.get(rule.bias)):
                leaves["bias"] = rule.sizes(binding.dims)[:1]
    return {tensor.name: tensor.shape for tensor in binding.to_hf(parts).tensors}
