"""LoRA adapters PEFT ↔ GGUF: the same added matrix in both, every byte back, one error for each thing a GGUF cannot say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from converters import convert
from converters.cli import qconvert
from converters.lora import gguf_to_lora, lora_to_gguf
from qformats.checkpoint import open_checkpoint
from qformats.containers.gguf import TensorInfo, Value, layout_gguf, open_gguf
from qformats.errors import QFormatError

FIXTURES = Path(__file__).parents[3] / "fixtures"
LORA, LLAMA = FIXTURES / "lora", FIXTURES / "dense" / "llama"
BASES = {"llama": LLAMA, "rslora": LLAMA, "gpt2": LORA / "gpt2" / "base"}
SCALES = {"llama": 8 / 4, "rslora": 8 / 3**0.5, "gpt2": 4 / 4}
OWN = {"layers.1.self_attn.q_proj": 8 / 2, "layers.0.self_attn.v_proj": 3 / 4, "o_proj": 16 / 4}


def peft_delta(name: str) -> dict[str, torch.Tensor]:
    """What the adapter adds to each HF weight as stored, float64: scale · B A, transposed for embeddings and GPT-2."""
    weights = {key: value.to(torch.float64) for key, value in load_file(LORA / name / "adapter_model.safetensors").items()}
    found = {}
    for key, a in weights.items():
        if "_A" not in key:
            continue
        module = key.removeprefix("base_model.model.").replace(".lora_A.weight", "").replace(".lora_embedding_A", "")
        scale = SCALES[name]
        if name == "llama":
            scale = next((own for end, own in OWN.items() if module.endswith(end)), scale)
        delta = scale * (weights[key.replace("_A", "_B")] @ a)
        found[f"{module}.weight"] = delta.T if name == "gpt2" or "embed" in module else delta
    return found


def gguf_delta(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What llama.cpp adds to each tensor: alpha / r · B A, for the embedding A B^T."""
    file = open_gguf(path)
    alpha = file.metadata["adapter.lora.alpha"].value
    found = {}
    for name in file.tensors:
        if name.endswith(".lora_a"):
            target = name.removesuffix(".lora_a")
            a, b = (torch.tensor(np.asarray(_read(file.tensors[f"{target}.lora_{side}"]))) for side in "ab")
            product = a @ b.T if target == "token_embd.weight" else b @ a
            found[target] = (alpha / b.shape[-1] * product).numpy()
    return found


def _read(raw: Any) -> Any:
    from qformats.formats.dense import read_float

    return read_float(raw).to(torch.float64).numpy()


def base_with(delta: dict[str, torch.Tensor], name: str, out: Path) -> Path:
    """The base model with float32 weights that are the delta alone, zeros elsewhere: its GGUF is the delta in GGUF's order."""
    config = json.loads((BASES[name] / "config.json").read_text())
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = config.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.float32)
    for key, value in model.state_dict().items():
        value.copy_(delta[key]) if key in delta else value.zero_()
    model.save_pretrained(out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LLAMA / file, out)
    return out


@pytest.mark.parametrize("name", ["llama", "rslora", "gpt2"])
def test_the_added_matrix_is_the_same_in_the_order_of_a_converted_model(name: str, tmp_path: Path) -> None:
    wanted = peft_delta(name)
    result = lora_to_gguf(LORA / name, BASES[name], tmp_path / "lora.gguf")
    assert result.pairs == len(wanted)
    convert(base_with(wanted, name, tmp_path / "delta"), tmp_path / "delta.gguf", to="gguf:f32")
    found = gguf_delta(tmp_path / "lora.gguf")
    assert len(found) == len(wanted)
    with open_checkpoint(tmp_path / "delta.gguf") as model:
        for target, delta in found.items():
            assert np.abs(delta).max() > 0.01
            np.testing.assert_allclose(delta, model.tensors[target].numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["rslora", "gpt2"])
def test_every_byte_comes_back(name: str, tmp_path: Path) -> None:
    result = lora_to_gguf(LORA / name, BASES[name], tmp_path / "lora.gguf")
    assert result.lossless
    gguf_to_lora(tmp_path / "lora.gguf", BASES[name], tmp_path / "back")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (LORA / name / file).read_bytes()


def test_scales_of_their_own_go_into_lora_b(tmp_path: Path) -> None:
    result = lora_to_gguf(LORA / "llama", LLAMA, tmp_path / "lora.gguf")
    assert not result.lossless  # 3 / 8 is no power of two
    assert result.ranks == (2, 4)
    gguf_to_lora(tmp_path / "lora.gguf", LLAMA, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 8 and config["r"] == 4
    assert config["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 2}
    assert config["target_modules"] == ["down_proj", "embed_tokens", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]
    theirs, ours = (load_file(where / "adapter_model.safetensors") for where in (LORA / "llama", tmp_path / "back"))
    assert theirs.keys() == ours.keys()
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    assert torch.equal(ours[key], (theirs[key].double() * (3 / 8)).float())
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs if "v_proj.lora_B" not in k and "o_proj.lora_B" not in k)


def test_a_named_dtype_rounds(tmp_path: Path) -> None:
    assert not lora_to_gguf(LORA / "gpt2", BASES["gpt2"], tmp_path / "half.gguf", dtype="f16").lossless
    assert {t.dtype for t in open_gguf(tmp_path / "half.gguf").tensors.values()} == {"F16"}
    assert lora_to_gguf(LORA / "rslora", LLAMA, tmp_path / "wide.gguf", dtype="f32").lossless


def test_experts_are_stacked_and_missing_ones_are_zero(tmp_path: Path) -> None:
    base = FIXTURES / "architectures" / "mixtral"
    config = json.loads((base / "config.json").read_text())
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = {}
    for expert in range(experts - 1):
        stem = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.w1.lora_"
        weights[f"{stem}A.weight"] = torch.randn(2, hidden)
        weights[f"{stem}B.weight"] = torch.randn(inner, 2)
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, "r": 2, "target_modules": ["w1"]}))
    lora_to_gguf(adapter, base, tmp_path / "lora.gguf")
    found = open_gguf(tmp_path / "lora.gguf").tensors
    assert found["blk.0.ffn_gate_exps.weight.lora_a"].shape == (experts, 2, hidden)
    b = _read(found["blk.0.ffn_gate_exps.weight.lora_b"]).reshape(experts, inner, 2)
    assert not b[-1].any()
    gguf_to_lora(tmp_path / "lora.gguf", base, tmp_path / "back")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert all(torch.equal(back[key], value) for key, value in weights.items())


def edited(out: Path, config: dict[str, Any] | None = None, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    shutil.copytree(LORA / "rslora", out)
    if config is not None:
        given = json.loads((out / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps({**given, **config}))
    if change is not None:
        weights = load_file(out / "adapter_model.safetensors")
        change(weights)
        save_file(weights, out / "adapter_model.safetensors")
    return out


STEM = "base_model.model.model.layers.0.self_attn.q_proj."
BAD: dict[str, tuple[dict[str, Any] | None, Callable[[dict[str, Any]], Any] | None, str]] = {
    "DoRA": ({"use_dora": True}, None, "lora-config"),
    "trained biases": ({"bias": "all"}, None, "lora-config"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, None, "lora-config"),
    "another kind": ({"peft_type": "IA3"}, None, "lora-config"),
    "alpha zero": ({"lora_alpha": 0}, None, "lora-config"),
    "alpha a word": ({"lora_alpha": "x"}, None, "lora-config"),
    "pattern no regex": ({"alpha_pattern": {"(": 1}}, None, "lora-config"),
    "half a pair": (None, lambda w: w.pop(STEM + "lora_A.weight"), "lora-pair"),
    "nothing": (None, lambda w: w.clear(), "lora-pair"),
    "a foreign tensor": (None, lambda w: w.update({STEM + "weight": torch.zeros(2, 2)}), "lora-tensor"),
    "another model's layer": (
        None, lambda w: w.update({STEM.replace(".0.", ".9.") + "lora_A.weight": torch.zeros(3, 64)}), "unmapped-tensor"),
    "another model's size": (None, lambda w: w.update({STEM + "lora_A.weight": torch.zeros(3, 32)}), "tensor-shape"),
    "integers": (None, lambda w: w.update({STEM + "lora_A.weight": torch.zeros(3, 64, dtype=torch.int32)}), "not-float"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_adapters_are_one_error(name: str, tmp_path: Path) -> None:
    config, change, code = BAD[name]
    adapter = edited(tmp_path / "adapter", config, change)
    with pytest.raises(QFormatError) as caught:
        lora_to_gguf(adapter, LLAMA, tmp_path / "lora.gguf")
    assert caught.value.code == code
    assert not (tmp_path / "lora.gguf").exists()


def test_a_shared_embedding_cannot_be_adapted(tmp_path: Path) -> None:
    with pytest.raises(QFormatError) as caught:
        lora_to_gguf(LORA / "llama", FIXTURES / "dense" / "llama-tied", tmp_path / "lora.gguf")
    assert caught.value.code == "lora-tied"


def write_gguf(path: Path, changes: dict[str, Value], tensors: dict[str, tuple[int, ...]]) -> Path:
    metadata = {
        "general.architecture": Value("str", "llama"), "general.type": Value("str", "adapter"), "adapter.type": Value("str", "lora"),
        "adapter.lora.alpha": Value("f32", 0.0), **changes,
    }  # fmt: skip
    planned = layout_gguf(metadata, [TensorInfo(name, "F32", shape) for name, shape in tensors.items()])
    path.write_bytes(planned.header + np.ones((planned.size - len(planned.header)) // 4, "<f4").tobytes())
    return path


Q = "blk.0.attn_q.weight.lora_"
FOREIGN: dict[str, tuple[dict[str, Value], dict[str, tuple[int, ...]], str]] = {
    "a model": ({"general.type": Value("str", "model")}, {}, "lora-metadata"),
    "another architecture": ({"general.architecture": Value("str", "gpt2")}, {}, "lora-metadata"),
    "half a pair": ({}, {Q + "a": (2, 64)}, "lora-pair"),
    "nothing": ({}, {}, "lora-pair"),
    "a foreign tensor": ({}, {"blk.0.attn_q.weight": (64, 64)}, "unmapped-tensor"),
    "another model's layer": ({}, {"blk.7.attn_q.weight.lora_a": (2, 64)}, "unmapped-tensor"),
    "another model's size": ({}, {Q + "a": (2, 32), Q + "b": (64, 2)}, "tensor-shape"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_bad_gguf_adapters_are_one_error(name: str, tmp_path: Path) -> None:
    changes, tensors, code = FOREIGN[name]
    with pytest.raises(QFormatError) as caught:
        gguf_to_lora(write_gguf(tmp_path / "lora.gguf", changes, tensors), LLAMA, tmp_path / "back")
    assert caught.value.code == code
    assert not (tmp_path / "back").exists()


def test_an_adapter_of_another_producer_without_alpha_has_scale_one(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "lora.gguf", {}, {Q + "a": (2, 64), Q + "b": (64, 2)})
    gguf_to_lora(file, LLAMA, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["r"], config["target_modules"]) == (2, 2, ["model.layers.0.self_attn.q_proj"])


def run(*words: object) -> Any:
    return CliRunner().invoke(qconvert, [str(word) for word in words], prog_name="qconvert")


def test_the_commands(tmp_path: Path) -> None:
    found = run("lora-to-gguf", LORA / "rslora", tmp_path / "lora.gguf", "--base", LLAMA, "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["kind"] == "exact"
    again = run("lora-to-gguf", LORA / "rslora", tmp_path / "lora.gguf", "--base", LLAMA)
    assert again.exit_code == 4 and "exists" in again.stderr
    back = run("gguf-to-lora", tmp_path / "lora.gguf", tmp_path / "back", "--base", LLAMA)
    assert back.exit_code == 0 and "low-rank pairs of rank 3" in back.stdout
    for source, to in ((tmp_path / "lora.gguf", "hf"), (LORA / "rslora", "gguf")):
        refused = run("convert", source, tmp_path / "x", "--to", to, "--json")
        assert json.loads(refused.stdout)["error"]["code"] == "adapter", refused.stdout
