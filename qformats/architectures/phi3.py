"""Phi-3, Phi-3.5 mini and Phi-4: queries, keys and values in one matrix, gate and up in another, on both sides.

Facts: llama.cpp, ``conversion/phi.py`` ``Phi3MiniModel`` and ``src/models/phi3.cpp``, which switches the sliding window off; config
defaults: transformers 5, ``models/phi3/configuration_phi3.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import NORM, Field
from qformats.architectures.longrope import attention_keys
from qformats.architectures.mapping import Rule
from qformats.architectures.rope import full_rope, rope_parameters

__all__ = ["PHI3"]

LAYER = "model.layers.{i}."


def _derive(full: dict[str, Any]) -> None:
    """The original context out of either place; no window is a window of 0."""
    original = full_rope(rope_parameters(full)).get("original_max_position_embeddings")
    full["original_max_position_embeddings"] = original or full["original_max_position_embeddings"]
    full.setdefault("sliding_window", 0)


def _no_window(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    config["sliding_window"] = config.get("sliding_window") or None


PHI3 = Architecture(
    name="phi3",
    gguf="phi3",
    hf_classes=("Phi3ForCausalLM",),
    model_types=("phi3",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.qkv_proj", "blk.{i}.attn_qkv", "WH"),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ"),
        Rule(LAYER + "mlp.gate_up_proj", "blk.{i}.ffn_up", "UH"),
        Rule(LAYER + "mlp.down_proj", "blk.{i}.ffn_down", "HF"),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm"),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm"),
        Rule("model.norm", "output_norm", "H", "norm"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=(
        Field("context_length", "u32", "max_position_embeddings"),
        Field("rope.scaling.original_context_length", "u32", "original_max_position_embeddings"),
        Field("embedding_length", "u32", "hidden_size"), Field("feed_forward_length", "u32", "intermediate_size"),
        Field("block_count", "u32", "num_hidden_layers"), Field("attention.head_count", "u32", "num_attention_heads"),
        Field("attention.head_count_kv", "u32", "num_key_value_heads"), *NORM, Field("rope.dimension_count", "u32", "rotary_dim"),
        Field("rope.freq_base", "f32", "rope_theta"),
    ),
    first_own_key="attention.sliding_window",
    after=(Field("attention.sliding_window", "u32", "sliding_window"),),
    defaults={
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        "hidden_act": "silu", "partial_rotary_factor": 1.0,
    },
    rebuilt={"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu"},
    fixed={"hidden_act": ("silu", "swish")},
    ignored={"sliding_window": (0,)},
    free_heads=False,
    rope_factors="longrope",
    complete=_derive,
    adjust=_no_window,
    own_keys=attention_keys,
)  # fmt: skip
