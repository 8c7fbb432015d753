"""Nemotron and Minitron: layer norms that HF keeps one lower, a squared ReLU without gate, a partial rotation.

Facts: llama.cpp, ``conversion/nemotron.py`` ``NemotronModel`` and ``src/models/nemotron.cpp``; config defaults: transformers 5,
``models/nemotron/configuration_nemotron.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, HEAD_SIZES, Field
from qformats.architectures.mapping import Rule
from qformats.architectures.rope import full_rope, rope_parameters

__all__ = ["NEMOTRON"]

LAYER = "model.layers.{i}."


def _own_keys(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """This family says it where nothing scales the rotation."""
    kind = full_rope(rope_parameters(full)).get("rope_type") or "default"
    return [("rope.scaling.type", "str", "none")] if kind == "default" else []


NEMOTRON = Architecture(
    name="nemotron",
    gguf="nemotron",
    hf_classes=("NemotronForCausalLM",),
    model_types=("nemotron",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH", bias="attention_bias"),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH", bias="attention_bias"),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH", bias="attention_bias"),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ", bias="attention_bias"),
        Rule(LAYER + "mlp.up_proj", "blk.{i}.ffn_up", "FH", bias="mlp_bias"),
        Rule(LAYER + "mlp.down_proj", "blk.{i}.ffn_down", "HF", bias="mlp_bias"),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm", shift=1.0, bias=True),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm", shift=1.0, bias=True),
        Rule("model.norm", "output_norm", "H", "norm", shift=1.0, bias=True),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=ATTENTION,
    first_own_key="vocab_size",
    after=(
        Field("attention.layer_norm_rms_epsilon", "f32", "norm_eps"), *HEAD_SIZES, Field("vocab_size", "u32", "vocab_size"),
        Field("attention.layer_norm_epsilon", "f32", "norm_eps"), Field("rope.dimension_count", "u32", "rotary_dim"),
    ),
    defaults={
        "norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "hidden_act": "relu2", "partial_rotary_factor": 0.5,
    },
    rebuilt={"architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "hidden_act": "relu2"},
    fixed={"hidden_act": ("relu2",), "tie_word_embeddings": (False,)},  # llama.cpp's nemotron needs an output matrix
    token_ids={"pad": 0, "unk": 1},
    free_heads=False,
    own_keys=_own_keys,
)  # fmt: skip
