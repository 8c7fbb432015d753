"""Dense models as GGUF: the real ones in every float type, and one tiny random model of every architecture, in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop
from running import assert_same_logits, ids_of, transformers_logits
from text import evaluation_text

from qformats.errors import Unsupported

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "dense"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json")
TYPES = {"f16": 0.005, "bf16": 0.015, "q8_0": 0.015}  # how far the mean NLL may lie from float32's
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 64,
}  # fmt: skip
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-tied", {"tie_word_embeddings": True}),
    "llama-wide": ("llama", {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 9}),
    "llama-untied-wide-heads": ("llama", {"tie_word_embeddings": False, "head_dim": 32}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("llama", {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma3": ("gemma3", {"num_hidden_layers": 7, "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]}),
    "gemma3-all-sliding": ("gemma3", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 32}),
    "gemma3-last-full": ("gemma3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}),
    "gemma3-all-full": ("gemma3", {"layer_types": ["full_attention"] * 2}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3-score-scale": ("gemma3", {"query_pre_attn_scalar": 64}),
    "qwen3_moe-biases": ("qwen3_moe", {"attention_bias": True}),
    "qwen3_moe-dense-layer": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-dynamic-rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
}
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "max_position_embeddings": 256,
}  # fmt: skip
MULTIPLIERS = {"attention_multiplier": 0.125, "embedding_multiplier": 6.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
NO_HEADS = {"num_key_value_heads": None, "num_attention_heads": None, "intermediate_size": None, "max_position_embeddings": None}
CHUNKED = {"num_local_experts": 4, "head_dim": 16}
NETS = {
    "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 40,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 20, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_shared_experts": 2,
}  # fmt: skip
GEMMA2 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}
# families without a fixture of their own: whose tokenizer, model type, what departs from SHAPE and transformers' defaults
BARE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("qwen2", "qwen3", {"head_dim": 32}),
    "granite": ("llama-tied", "granite", {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True}),
    "granite-llama3-rope": ("llama", "granite", {**MULTIPLIERS, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "smollm3": ("llama", "smollm3", {"num_hidden_layers": 5}),
    "olmo2": ("llama-tied", "olmo2", {}),
    "gemma2": ("gemma3", "gemma2", {**GEMMA2, "num_hidden_layers": 3}),
    "gemma2-last-full": (
        "gemma3", "gemma2", {**GEMMA2, "layer_types": ["full_attention", "sliding_attention"], "rope_parameters": {"rope_theta": 5000.0}},
    ),
    "gemma": ("gemma3", "gemma", {"head_dim": 32}),
    "qwen2_moe": (
        "qwen2", "qwen2_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "starcoder2": ("llama-tied", "starcoder2", {}),
    "stablelm": ("qwen2", "stablelm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("qwen2", "stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "cohere2": ("llama-tied", "cohere2", {"sliding_window": 32, "num_hidden_layers": 5, "logit_scale": 0.25}),
    "cohere2-first-full": (
        "llama-tied", "cohere2", {"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "glm4": ("llama", "glm4", {"head_dim": 32}),
    "mixtral": ("llama-tied", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-wide-heads": ("llama", "mixtral", {"head_dim": 32, "num_local_experts": 4, "rope_parameters": LLAMA3}),
    "gpt_neox": ("llama-tied", "gpt_neox", {"num_key_value_heads": None}),
    "gpt_neox-sequential": (
        "llama-tied", "gpt_neox",
        {"use_parallel_residual": False, "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}},
    ),
    "falcon": ("llama-tied", "falcon", {"num_key_value_heads": None}),
    "falcon-new": ("llama-tied", "falcon", {"num_key_value_heads": None, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-one-norm": (
        "llama-tied", "falcon",
        {"num_key_value_heads": None, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1,
         "tie_word_embeddings": False},
    ),
    "phi2": ("llama-tied", "phi", {"num_key_value_heads": 4, "intermediate_size": 256}),
    "gpt2": ("llama-tied", "gpt2", {"num_key_value_heads": None, "intermediate_size": None}),
    "gpt2-untied-wide": (
        "llama-tied", "gpt2", {"num_key_value_heads": None, "intermediate_size": None, "n_inner": 96, "tie_word_embeddings": False},
    ),
    "phi3": ("llama-tied", "phi3", {}),
    "phi3-window": ("llama", "phi3", {"sliding_window": 512, "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.75}}),
    "phi3-longrope": ("llama-tied", "phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "phi2-grouped": ("llama-tied", "phi", {}),
    "phi4": ("llama", "phi3", {"sliding_window": None, "rope_parameters": {"rope_theta": 250000.0}}),
    "olmo": ("llama-tied", "olmo", {}),
    "olmo-clipped": ("llama-tied", "olmo", {"clip_qkv": 0.5, "tie_word_embeddings": True}),
    "olmoe": ("llama-tied", "olmoe", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
    "nemotron": ("llama", "nemotron", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "nemotron-linear-rope": (
        "llama-tied", "nemotron",
        {"head_dim": 16, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0, "partial_rotary_factor": 1.0}},
    ),
    "bloom": ("llama-tied", "bloom", {"num_key_value_heads": None, "intermediate_size": None}),
    "bloom-untied-odd-heads": (
        "llama-tied", "bloom",
        {"num_key_value_heads": None, "intermediate_size": None, "hidden_size": 96, "num_attention_heads": 6, "tie_word_embeddings": False},
    ),
    "command-r": ("llama-tied", "cohere", {"logit_scale": 0.25}),
    "lfm2": ("llama", "lfm2", {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "lfm2-rounded": (
        "llama-tied", "lfm2",
        {"num_hidden_layers": 3, "full_attn_idxs": [1], "block_multiple_of": 16, "conv_L_cache": 4, "tie_word_embeddings": False},
    ),
    "mamba": ("llama-tied", "mamba", {**NO_HEADS, "tie_word_embeddings": True}),
    "mamba-untied": ("llama-tied", "mamba", {**NO_HEADS, "state_size": 8, "time_step_rank": 6, "tie_word_embeddings": False}),
    "falcon_mamba": ("llama-tied", "falcon_mamba", {**NO_HEADS, "mixer_rms_eps": 1e-5}),
    "granitemoe": ("llama-tied", "granitemoe", {**EXPERTS, **MULTIPLIERS}),
    "granitemoe-shared": (
        "llama-tied", "granitemoeshared",
        {**EXPERTS, **MULTIPLIERS, "shared_intermediate_size": 48, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama4": ("llama-tied", "llama4_text", {**CHUNKED, "num_hidden_layers": 5, "rope_parameters": LLAMA3}),
    "llama4-interleaved": (
        "llama", "llama4_text",
        {**CHUNKED, "num_hidden_layers": 4, "interleave_moe_layer_step": 2, "num_experts_per_tok": 2, "intermediate_size_mlp": 80},
    ),
    "qwen3_next": ("qwen2", "qwen3_next", {**NETS, "num_hidden_layers": 4}),
    "qwen3_next-odd-blocks": (
        "qwen2", "qwen3_next",
        {**NETS, "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
         "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}},
    ),
    "command-r-plus": ("llama-tied", "cohere", {"num_hidden_layers": 64, "use_qk_norm": True}),
    "gpt_oss": (
        "llama-tied", "gpt_oss", {**EXPERTS, "head_dim": 32, "sliding_window": 32, "num_hidden_layers": 3, "rope_parameters": YARN},
    ),
    "gpt_oss-plain-rope": (
        "llama-tied", "gpt_oss",
        {**EXPERTS, "sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"],
         "rope_parameters": {"rope_theta": 5000.0}},
    ),
    "gpt_oss-yarn": (
        "llama-tied", "gpt_oss", {**EXPERTS, "head_dim": 64, "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0}},
    ),
}  # fmt: skip
BARE.update(
    {
        "deepseek_v3": ("llama-tied", "deepseek_v3", {**LATENT, "n_group": 2, "topk_group": 1}),
        "deepseek_v3-yarn": (
            "llama", "deepseek_v3",
            {**LATENT, "n_group": 1, "topk_group": 1, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        ),
        "deepseek_v2": ("llama-tied", "deepseek_v2", {**LATENT, "routed_scaling_factor": 2.0}),
        "deepseek_v2-lite": (
            "llama-tied", "deepseek_v2", {**LATENT, "q_lora_rank": None, "num_hidden_layers": 27, "hidden_size": 32},
        ),
    }
)  # fmt: skip
LOOSE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt_oss-published": ("llama-tied", "gpt_oss", {**EXPERTS, "head_dim": 64}),
    "gpt_oss-packed": ("llama-tied", "gpt_oss", {**EXPERTS, "head_dim": 32, "rope_parameters": YARN}),
}
BARE_REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3-biases": ("qwen2", "qwen3", {"attention_bias": True}),
    "qwen2-llama3-rope": ("qwen2", "qwen2", {"rope_parameters": LLAMA3}),
    "granite-wide-heads": ("llama", "granite", {"head_dim": 32}),
    "smollm3-positions": ("llama", "smollm3", {"no_rope_layers": [1, 0]}),
    "olmo2-tied": ("llama", "olmo2", {"tie_word_embeddings": True}),
    "gemma2-score-scale": ("gemma3", "gemma2", {**GEMMA2, "query_pre_attn_scalar": 64}),
    "gemma2-no-cap": ("gemma3", "gemma2", {**GEMMA2, "attn_logit_softcapping": None}),
    "gemma2-all-full": ("gemma3", "gemma2", {**GEMMA2, "layer_types": ["full_attention"] * 2}),
    "qwen2_moe-rescaled": ("qwen2", "qwen2_moe", {"norm_topk_prob": True}),
    "starcoder2-no-biases": ("llama-tied", "starcoder2", {"use_bias": False}),
    "stablelm-tied": ("qwen2", "stablelm", {"tie_word_embeddings": True}),
    "cohere2-all-full": ("llama-tied", "cohere2", {"layer_types": ["full_attention"] * 2}),
    "gpt_neox-relu": ("llama-tied", "gpt_neox", {"hidden_act": "relu"}),
    "gpt_neox-no-biases": ("llama-tied", "gpt_neox", {"attention_bias": False}),
    "falcon-alibi": ("llama-tied", "falcon", {"alibi": True}),
    "falcon-sequential": ("llama-tied", "falcon", {"parallel_attn": False}),
    "gpt2-inverse-layer": ("llama-tied", "gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "phi2-norms": ("llama-tied", "phi", {"qk_layernorm": True}),
    "llama4-short-chunks": ("llama-tied", "llama4_text", {**CHUNKED, "attention_chunk_size": 32}),
    "llama4-all-rotated": ("llama-tied", "llama4_text", {**CHUNKED, "no_rope_layers": [1] * 4, "num_hidden_layers": 4}),
    "llama4-no-norm": ("llama-tied", "llama4_text", {**CHUNKED, "use_qk_norm": False}),
    "llama4-odd-experts": ("llama-tied", "llama4_text", {**CHUNKED, "num_hidden_layers": 4, "moe_layers": [0, 3]}),
    "qwen3_next-two-sizes": ("qwen2", "qwen3_next", {**NETS, "linear_value_head_dim": 32}),
    "mamba-biases": ("llama-tied", "mamba", {**NO_HEADS, "use_bias": True}),
    "mamba-wide": ("llama-tied", "mamba", {**NO_HEADS, "expand": 3}),
    "olmo-biases": ("llama-tied", "olmo", {"attention_bias": True}),
    "olmoe-clipped": ("llama-tied", "olmoe", {"num_key_value_heads": 4, "num_experts": 4, "clip_qkv": 0.5}),
    "olmoe-rescaled": ("llama-tied", "olmoe", {"num_key_value_heads": 4, "num_experts": 4, "norm_topk_prob": True}),
    "olmoe-grouped": ("llama-tied", "olmoe", {"num_experts": 4}),
    "nemotron-tied": ("llama", "nemotron", {"head_dim": 16, "tie_word_embeddings": True}),
    "bloom-residual": (
        "llama-tied", "bloom",
        {"num_key_value_heads": None, "intermediate_size": None, "apply_residual_connection_post_layernorm": True},
    ),
    "command-r-norms": ("llama-tied", "cohere", {"use_qk_norm": True}),
    "command-r-linear-rope": (
        "llama-tied", "cohere", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "deepseek_v3-two-scales": ("llama", "deepseek_v3", {**LATENT, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}}),
    "deepseek_v2-short-lite": ("llama", "deepseek_v2", {**LATENT, "q_lora_rank": None}),
    "gpt_oss-no-biases": ("llama-tied", "gpt_oss", {**EXPERTS, "attention_bias": False}),
    "gpt_oss-limit": ("llama-tied", "gpt_oss", {**EXPERTS, "swiglu_limit": 5.0}),
    "gemma-untied": ("gemma3", "gemma", {"head_dim": 32, "tie_word_embeddings": False}),
}
pytestmark = pytest.mark.real


def assert_runs_alike(folder: Path, workshop: Workshop, llama: Any, figure: Any, positions: int) -> Path:
    """Float32 GGUF of a directory in llama.cpp against the directory in transformers; the GGUF."""
    from transformers import AutoTokenizer

    file, report = workshop.convert(folder, "gguf:f32")
    shifted = [line for line in report.tensors if line.kind not in ("copied", "exact")]  # Gemma's norms are stored with one added
    assert all(
        (line.name.endswith("norm.weight") and "after adding 1" in line.reason) or (line.name.endswith("ssm_a") and "-exp" in line.reason)
        for line in shifted
    )
    text = evaluation_text()
    ids = ids_of(file, text, positions)
    assert AutoTokenizer.from_pretrained(folder).encode(text)[:positions] == ids
    with llama.Llama(file) as model:
        mine = model.logits(ids)
    figure(assert_same_logits(mine, transformers_logits(folder, ids, attn_implementation="eager")))  # the only one that caps scores
    return file


@pytest.mark.parametrize(("name", "stage"), [("smollm2-135m", "smollm"), ("gemma3-270m", "gemma")])
def test_a_real_model_in_float32(name: str, stage: str, lab_model: Any, workshop: Workshop, llama: Any, figure: Any) -> None:
    assert_runs_alike(lab_model(name, stage), workshop, llama, figure, 128)


@pytest.mark.parametrize("kind", TYPES)
def test_smollm2_in_every_float_type(kind: str, lab_model: Any, workshop: Workshop, llama: Any, figure: Any) -> None:
    """Mean NLL on 256 tokens beside that of float32."""
    folder = lab_model("smollm2-135m", "smollm")
    plain, _ = workshop.convert(folder, "gguf:f32")
    file, report = workshop.convert(folder, f"gguf:{kind}")
    assert {line.type for line in report.tensors} == {kind.upper(), "F32"}
    ids = ids_of(plain, evaluation_text(), 256)
    figures = []
    for path in (file, plain):
        with llama.Llama(path) as model:
            figures.append(model.nll(ids, 256))
    figure(f"NLL {figures[0]:.4f}, in float32 {figures[1]:.4f}")
    assert abs(figures[0] - figures[1]) <= TYPES[kind]


def tiny_config(name: str) -> tuple[str, dict[str, Any]]:
    """(the fixture that gives the tokenizer, the config's fields)."""
    if name in TINY or name in REFUSED:
        fixture, changes = {**TINY, **REFUSED}[name]
        return fixture, {**json.loads((FIXTURES / fixture / "config.json").read_text()), "dtype": "float32", **changes}
    fixture, kind, changes = {**BARE, **LOOSE, **BARE_REFUSED}[name]
    given = json.loads((FIXTURES / fixture / "config.json").read_text())
    tokens = {key: given.get(key) for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = {**SHAPE, **tokens, "model_type": kind, **changes}
    return fixture, {key: value for key, value in config.items() if value is not None or key not in SHAPE}


def tiny_model(name: str, out: Path) -> Path:
    """A random model of a fixture's shape, norms and biases random too, saved in float32 with the fixture's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fixture, config = tiny_config(name)
    kind = config.pop("model_type")
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.float32)
    with torch.no_grad():
        for key, weight in (*model.named_parameters(), *((k, b) for k, b in model.named_buffers() if k.endswith("_correction_bias"))):
            if weight.dim() > 1:
                weight.normal_(0, 2.0 if "embed" in key else 1.5 * weight.shape[-1] ** -0.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(out)
    for file in TOKENIZER_FILES:
        if (FIXTURES / fixture / file).exists():
            shutil.copy(FIXTURES / fixture / file, out)
    return out


@pytest.mark.parametrize("name", [*TINY, *BARE])
def test_every_architecture(name: str, tmp_path: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    """Random weights leave no slip in a permutation, a norm, a bias, an expert or a rotary factor unseen; there and back again."""
    folder = tiny_model(name, tmp_path / name)
    file = assert_runs_alike(folder, workshop, llama, figure, 128)
    back, _ = workshop.convert(file, "hf:f32")
    ids = ids_of(file, evaluation_text(), 128)
    assert_same_logits(transformers_logits(back, ids), transformers_logits(folder, ids))


def test_openais_yarn_is_not_rounded_by_transformers(tmp_path: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    """gpt-oss as published: llama.cpp rounds YaRN's corner dimensions, which the plan says; the way back restores the config."""
    folder = tiny_model("gpt_oss-published", tmp_path / "gpt_oss")
    file, report = workshop.convert(folder, "gguf:f32")
    assert any("yarn_truncate" in warning for warning in report.warnings)
    ids = ids_of(file, evaluation_text(), 128)
    theirs = transformers_logits(folder, ids, attn_implementation="eager")
    with llama.Llama(file) as model:
        apart = abs(model.logits(ids) - theirs).max() / (theirs.max() - theirs.min())
    figure(f"unrounded YaRN: logits {apart:.1e} of their range apart")
    assert apart < 0.02
    back, _ = workshop.convert(file, "hf:f32")
    assert_same_logits(transformers_logits(back, ids), transformers_logits(folder, ids))


def test_a_quantized_gpt2_comes_back_transposed(tmp_path: Path, workshop: Workshop) -> None:
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    file, _ = workshop.convert(tiny_model("gpt2", tmp_path / "gpt2"), "gguf:q8_0")
    back, _ = workshop.convert(file, "hf:f32")
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors}
    found = load_file(back / "model.safetensors")
    for theirs, ours in (("attn_qkv", "attn.c_attn"), ("attn_output", "attn.c_proj"), ("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")):
        assert np.array_equal(found[f"transformer.h.1.{ours}.weight"], stored[f"blk.1.{theirs}.weight"].T), ours


@pytest.mark.parametrize("name", ["granitemoe", "llama4", "gpt_oss", "qwen3_next", "mamba"])
def test_what_is_no_matrix_of_one_module_stays_float(name: str, tmp_path: Path, workshop: Workshop, llama: Any) -> None:
    """Codes of GPTQ are for two dimensions: stacked experts, convolutions and states are floats beside them, out of both worlds."""
    from converters import convert

    folder = tiny_model(name, tmp_path / name)
    file = tmp_path / f"{name}.gguf"
    convert(folder, file, to="gguf:q8_0", tensor_types=(("ffn_gate", "q5_0"), ("attn_qkv", "q4_0")))
    for source in (folder, file):
        packed, report = workshop.convert(source, "gptq:int4", allow_requantize=True)
        assert {len(line.shape) for line in report.tensors if line.type == "int4"} == {2}
        again, _ = workshop.convert(packed, "gguf")
        with llama.Llama(again) as model:
            model.logits(ids_of(again, evaluation_text(), 32))


@pytest.mark.parametrize("name", [*REFUSED, *BARE_REFUSED])
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, tmp_path: Path, workshop: Workshop) -> None:
    with pytest.raises(Unsupported):
        workshop.convert(tiny_model(name, tmp_path / name), "gguf:f32")
