"""Adapters merged while converting: the file at work in llama.cpp against PEFT's model with the adapter beside the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop
from reference import Reference
from running import assert_same_logits, ids_of
from test_dense import tiny_model
from test_lora import CASES, logits_of
from text import evaluation_text

from converters import convert, verify

pytestmark = pytest.mark.real
SOURCES = ["awq-gemm-g64-slice", "gptq-4-act-g64-slice"]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
POSITIONS, WINDOW, MAX_NLL_SHARE = 96, 256, 0.015


def with_adapter(model: Any, folder: Path, spread: float = 0.1, **options: Any) -> Any:
    """PEFT's model with a random adapter, which is saved."""
    import peft
    import torch

    found = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    torch.manual_seed(1)
    for key, weight in found.named_parameters():
        if "lora_" in key and "magnitude" not in key:
            weight.data = torch.randn_like(weight) * spread
    found.save_pretrained(str(folder), save_embedding_layers=False)
    return found


def owners_floats(source: Path) -> Any:
    """The checkpoint's model in float32, its codes dequantized by the tests' own reading of them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.float32, attn_implementation="eager"
    )
    reference = Reference(source)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            module = key.removesuffix(".weight")
            if reference.is_quantized(module):
                value.copy_(torch.from_numpy(reference.weight(module)))
            elif key in reference.tensors:
                value.copy_(torch.from_numpy(reference.values(key)))
            else:
                assert key == "lm_head.weight" and config["tie_word_embeddings"]
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_adapter_of_a_quantized_checkpoint(name: str, dora: bool, tmp_path: Path, checkpoint: Any, llama: Any, figure: Any) -> None:
    source = checkpoint(name)
    model = with_adapter(owners_floats(source), tmp_path / "adapter", 0.06, r=8, target_modules=LAYERS, use_dora=dora)
    lora = [tmp_path / "adapter"]
    files = {to: tmp_path / f"{to}.gguf" for to in ("f32", "f16", "q8_0")}
    for to, file in files.items():
        report = convert(source, file, to=f"gguf:{to}", lora=lora, allow_requantize=True)
    assert sum(bool(line.merged) for line in report.tensors) == len(LAYERS) * model.config.num_hidden_layers
    ids = ids_of(files["f32"], evaluation_text(), WINDOW)
    wanted = logits_of(model, ids[:POSITIONS])
    found = {}
    for to, file in files.items():
        with llama.Llama(file) as running:
            found[to] = running.logits(ids[:POSITIONS]), running.nll(ids, WINDOW)
    for to in ("f32", "f16"):
        figure(f"{to}: {assert_same_logits(found[to][0], wanted)}")
    figure(f"q8_0: NLL {found['q8_0'][1]:.4f}, in float32 {found['f32'][1]:.4f}")
    assert abs(found["q8_0"][1] - found["f32"][1]) <= MAX_NLL_SHARE * found["f32"][1]
    assert verify(source, files["q8_0"], lora=lora).method == "replay"
    convert(source, tmp_path / "plain.gguf", to="gguf:f32")
    with llama.Llama(tmp_path / "plain.gguf") as running:
        plain = running.logits(ids[:POSITIONS])[:, : wanted.shape[1]]
    assert abs(plain - wanted).max() > 0.02 * (wanted.max() - wanted.min())  # the adapter does something


@pytest.mark.parametrize("name", CASES)
def test_rows_go_where_the_weights_rows_go(name: str, tmp_path: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    """Random models whose rows are permuted, split and stacked on their way into a GGUF; merged before, and into the GGUF itself."""
    import torch
    from transformers import AutoModelForCausalLM

    layers, options = CASES[name]
    folder = tiny_model(name, tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = with_adapter(base, tmp_path / "adapter", target_modules=layers, **options)
    convert(folder, tmp_path / "merged.gguf", to="gguf:f32", lora=[tmp_path / "adapter"])
    file, _ = workshop.convert(folder, "gguf:f32")
    convert(file, tmp_path / "again.gguf", to="gguf:f32", lora=[tmp_path / "adapter"])
    ids = ids_of(file, evaluation_text(), POSITIONS)
    wanted = logits_of(model, ids)
    for path in (tmp_path / "merged.gguf", tmp_path / "again.gguf"):
        with llama.Llama(path) as running:
            figure(assert_same_logits(running.logits(ids), wanted))
