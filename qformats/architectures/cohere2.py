"""Command R7B (Cohere 2): one norm a block, three of four layers slide and only those have positions; scaled logits.

Facts: llama.cpp, ``conversion/command_r.py`` ``Cohere2Model`` and ``src/models/cohere2.cpp``; config defaults: transformers 5,
``models/cohere2/configuration_cohere2.py``. Both rotate neighbouring pairs, so no row moves. The output matrix is the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, HEAD_SIZES, Field
from qformats.architectures.mapping import Rule
from qformats.architectures.rope import full_rope, rope_parameters
from qformats.architectures.sliding import layer_types, pattern_key, sliding_layers
from qformats.errors import Unsupported

__all__ = ["COHERE2"]

LAYER = "model.layers.{i}."
PERIOD = 4  # llama.cpp, src/models/cohere2.cpp


def _own_keys(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """The sliding layers where they are not three of four; refuse what llama.cpp would compute otherwise."""
    sliding = sliding_layers(full, PERIOD)
    if full["sliding_window"] is None or not any(sliding):
        raise Unsupported("config-value", "no layer slides; llama.cpp's 'cohere2' always has some that do")
    kind = full_rope(rope_parameters(full)).get("rope_type", "default")
    if kind != "default":
        raise Unsupported("rope", f"rope type {kind!r} cannot be written to GGUF for this architecture")
    return pattern_key(sliding, PERIOD)


def _implicit(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    config["layer_types"] = layer_types(values, int(config["num_hidden_layers"]), PERIOD, "cohere2")


COHERE2 = Architecture(
    name="cohere2",
    gguf="cohere2",
    hf_classes=("Cohere2ForCausalLM",),
    model_types=("cohere2",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH"),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH"),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH"),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ"),
        Rule(LAYER + "mlp.gate_proj", "blk.{i}.ffn_gate", "FH"),
        Rule(LAYER + "mlp.up_proj", "blk.{i}.ffn_up", "FH"),
        Rule(LAYER + "mlp.down_proj", "blk.{i}.ffn_down", "HF"),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm"),
        Rule("model.norm", "output_norm", "H", "norm"),
    ),
    before=ATTENTION,
    first_own_key="logit_scale",
    after=(
        Field("attention.layer_norm_epsilon", "f32", "layer_norm_eps"), *HEAD_SIZES, Field("logit_scale", "f32", "logit_scale"),
        Field("attention.sliding_window", "u32", "sliding_window"), Field("vocab_size", "u32", "vocab_size"),
        Field("rope.dimension_count", "u32", "rotary_dim"), Field("rope.scaling.type", "str", constant="none"),
    ),
    defaults={
        "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 8192, "hidden_act": "silu", "logit_scale": 0.0625,
        "sliding_window": 4096, "tie_word_embeddings": True,
    },
    rebuilt={"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "hidden_act": "silu", "attention_bias": False},
    fixed={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "tie_word_embeddings": (True,), "rotary_pct": (1.0,)},
    nullable=("sliding_window",),
    free_heads=False,
    adjust=_implicit,
    own_keys=_own_keys,
)  # fmt: skip
