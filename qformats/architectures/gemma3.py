"""Gemma 3, text model: llama.cpp stores each norm as weight + 1; four norms a layer; sliding-window layers with their own base.

Facts: llama.cpp, ``conversion/gemma.py`` ``Gemma3Model``; config defaults: transformers 5, ``models/gemma3/configuration_gemma3.py``.
The output matrix is always the embedding. Embedding rows beyond the vocabulary are cut off and come back as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, HEAD_SIZES, NORM, Field
from qformats.architectures.mapping import Rule
from qformats.architectures.sliding import check_score_width, layer_types, pattern_key, sliding_layers

__all__ = ["GEMMA3"]

LAYER = "model.layers.{i}."
PATTERN = 6  # every sixth layer attends to everything (llama.cpp, src/models/gemma3.cpp) unless a key says otherwise


def _score_width(full: Mapping[str, Any]) -> int:
    """What llama.cpp divides scores by the root of: the width of a head, with 62 layers (27B) hidden size over heads."""
    if full["num_hidden_layers"] == 62:
        return int(full["hidden_size"]) // int(full["num_attention_heads"])
    return int(full["head_dim"])


def _own_keys(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """The sliding layers where they are not five of six; refuse a score scale that llama.cpp would not use."""
    check_score_width(full, _score_width(full), "gemma3")
    sliding = sliding_layers(full, PATTERN)
    if not any(sliding):  # llama.cpp aborts on a window that no layer uses
        return [("attention.sliding_window", "u32", None)]
    return pattern_key(sliding, PATTERN)


def _layer_types(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Fill in what the file leaves implicit: which layers slide, and the score scale (27B: by width, else by head)."""
    layers = int(config["num_hidden_layers"])
    config["layer_types"] = layer_types(values, layers, PATTERN, "gemma3")
    if "attention.sliding_window" not in values:
        config["layer_types"] = ["full_attention"] * layers
    config["query_pre_attn_scalar"] = _score_width(config)
    rope = config["rope_parameters"]
    if "full_attention" not in rope:
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}}


def _norm(hf: str, gguf: str, shape: str) -> Rule:
    return Rule(hf, gguf, shape, "norm", shift=1.0)


GEMMA3 = Architecture(
    name="gemma3",
    gguf="gemma3",
    hf_classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_types=("gemma3_text", "gemma3"),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding", resizable=True),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH"),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH"),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH"),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ"),
        _norm(LAYER + "self_attn.q_norm", "blk.{i}.attn_q_norm", "D"),
        _norm(LAYER + "self_attn.k_norm", "blk.{i}.attn_k_norm", "D"),
        Rule(LAYER + "mlp.gate_proj", "blk.{i}.ffn_gate", "FH"),
        Rule(LAYER + "mlp.up_proj", "blk.{i}.ffn_up", "FH"),
        Rule(LAYER + "mlp.down_proj", "blk.{i}.ffn_down", "HF"),
        _norm(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H"),
        _norm(LAYER + "post_attention_layernorm", "blk.{i}.post_attention_norm", "H"),
        _norm(LAYER + "pre_feedforward_layernorm", "blk.{i}.ffn_norm", "H"),
        _norm(LAYER + "post_feedforward_layernorm", "blk.{i}.post_ffw_norm", "H"),
        _norm("model.norm", "output_norm", "H"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=ATTENTION,
    first_own_key="final_logit_softcapping",
    after=(
        *NORM, *HEAD_SIZES, Field("final_logit_softcapping", "f32", "final_logit_softcapping"),
        Field("attention.sliding_window", "u32", "sliding_window"),
    ),
    defaults={
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0, "max_position_embeddings": 131072, "vocab_size": 262208, "sliding_window": 4096,
        "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
    },
    rebuilt={
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    },
    fixed={"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,), "use_bidirectional_attention": (False,)},
    spm_from_json=True,
    adjust=_layer_types,
    own_keys=_own_keys,
)  # fmt: skip
