"""Adapters merged while converting: PEFT's own merged weights in every target, one error for each adapter that does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from converters import convert
from qformats.checkpoint import open_checkpoint

FIXTURES = Path(__file__).parents[3] / "fixtures"
LORA, DENSE = FIXTURES / "lora", FIXTURES / "dense"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"o_proj": 3},
            "use_rslora": True,
        },
    ),
    "dora": ("llama", {"target_modules": ["q_proj", "v_proj", "gate_proj", "embed_tokens"], "use_dora": True}),
    "saved": ("llama", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm", "input_layernorm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "bias-all": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias-lora-only": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "lora-bias": ("qwen2", {"target_modules": ["k_proj"], "lora_bias": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
}


def base_of(name: str) -> Path:
    return LORA / "gpt2" / "base" if name == "gpt2" else DENSE / name


def float_model(folder: Path) -> Any:
    """The model of a folder's config in float32, its weights those of the folder, as far as they are floats."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.float32)
    if not any(folder.glob("*.safetensors")):
        return model
    with open_checkpoint(folder) as checkpoint, torch.no_grad():
        for key, value in model.state_dict().items():
            if key in checkpoint.tensors:
                found = checkpoint.tensors[key]
                value.copy_(found if isinstance(found, torch.Tensor) else found.dequantize(torch.float32))
    return model


def saved(model: Any, folder: Path) -> Path:
    """A model as PEFT or transformers saves it, the fixture's tokenizer beside it."""
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DENSE / "llama" / file, folder)
    return folder


def adapter(model: Any, folder: Path, **options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random adapter on a model, saved, and the weights that PEFT merges it into."""
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    for key, weight in wrapped.named_parameters():
        if "lora_magnitude" in key:
            weight.data = weight.data * (1 + torch.rand_like(weight) * 0.5)
        elif "lora_" in key or weight.requires_grad:
            weight.data = weight.data + torch.randn_like(weight) * 0.1
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder, {k: v.clone() for k, v in wrapped.merge_and_unload().state_dict().items()}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        values = {name: checkpoint.tensors[name] for name in checkpoint.tensors}
    return {name: v.to(torch.float32) if isinstance(v, torch.Tensor) else v.dequantize(torch.float32) for name, v in values.items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == {name for name in wanted if name in found}
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_the_merged_weights_are_pefts(name: str, tmp_path: Path) -> None:
    base, options = CASES[name]
    folder = saved(float_model(base_of(base)), tmp_path / "base")
    where, wanted = adapter(float_model(folder), tmp_path / "adapter", **options)
    report = convert(folder, tmp_path / "merged", to="hf:f32", lora=[where])
    found = tensors_of(tmp_path / "merged")
    assert_same(found, wanted)
    before = tensors_of(folder)
    changed = {key for key in found if not torch.equal(found[key], before[key])}
    assert changed == {line.name for line in report.tensors if line.merged} != set()
