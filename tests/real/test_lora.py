"""LoRA adapters: PEFT's logits in llama.cpp with the converted adapter, and in PEFT again after the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop
from running import assert_same_logits, ids_of
from test_dense import tiny_model
from text import evaluation_text

from converters.lora import gguf_to_lora, lora_to_gguf

pytestmark = pytest.mark.real
# model -> (layers that are adapted, what departs from a plain adapter)
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "llama-untied-wide-heads": (
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"], {},
    ),
    "llama": (
        ["q_proj", "v_proj"], {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.v_proj": 3}},
    ),
    "qwen2": (["q_proj", "k_proj", "down_proj"], {"use_rslora": True}),
    "gpt2": (["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
    "falcon-new": (["query_key_value", "dense"], {}),
    "phi3": (["qkv_proj", "gate_up_proj"], {}),
}  # fmt: skip


def logits_of(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float().numpy()


@pytest.mark.parametrize("name", CASES)
def test_adapter_there_and_back(name: str, tmp_path: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    import torch
    from transformers import AutoModelForCausalLM

    layers, options = CASES[name]
    folder = tiny_model(name, tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers, **options))
    torch.manual_seed(1)
    for key, weight in model.named_parameters():
        if "lora_" in key:
            weight.data = torch.randn_like(weight) * 0.1
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    file, _ = workshop.convert(folder, "gguf:f32")
    lora_to_gguf(tmp_path / "adapter", folder, tmp_path / "lora.gguf")
    gguf_to_lora(tmp_path / "lora.gguf", file, tmp_path / "back")

    ids = ids_of(file, evaluation_text(), 96)
    wanted = logits_of(model, ids)
    with llama.Llama(file) as running:
        plain = running.logits(ids)
        running.set_adapter(tmp_path / "lora.gguf")
        figure(assert_same_logits(running.logits(ids), wanted))
    assert abs(plain[:, : wanted.shape[1]] - wanted).max() > 0.02 * (wanted.max() - wanted.min())  # the adapter does something
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert_same_logits(logits_of(peft.PeftModel.from_pretrained(again, tmp_path / "back"), ids), wanted)
