"""GPT-2: learned positions, biases everywhere, and matrices that HF keeps with inputs as rows, transposed on the way.

Facts: llama.cpp, ``conversion/gpt2.py`` and ``src/models/gpt2.cpp``; config defaults: transformers 5,
``models/gpt2/configuration_gpt2.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import Field, positive
from qformats.architectures.mapping import Rule

__all__ = ["GPT2"]

LAYER = "transformer.h.{i}."


def _derive(full: dict[str, Any]) -> None:
    full["num_key_value_heads"] = full.get("num_attention_heads")
    full.setdefault("intermediate_size", 4 * positive(full, "hidden_size"))


def _no_rotation(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    del config["rope_parameters"]


GPT2 = Architecture(
    name="gpt2",
    gguf="gpt2",
    hf_classes=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    rules=(
        Rule("transformer.wte", "token_embd", "TH", "embedding"),
        Rule("transformer.wpe", "position_embd", "PH", "positions"),
        Rule(LAYER + "attn.c_attn", "blk.{i}.attn_qkv", "WH", bias=True, transposed=True),
        Rule(LAYER + "attn.c_proj", "blk.{i}.attn_output", "HQ", bias=True, transposed=True),
        Rule(LAYER + "mlp.c_fc", "blk.{i}.ffn_up", "FH", bias=True, transposed=True),
        Rule(LAYER + "mlp.c_proj", "blk.{i}.ffn_down", "HF", bias=True, transposed=True),
        Rule(LAYER + "ln_1", "blk.{i}.attn_norm", "H", "norm", bias=True),
        Rule(LAYER + "ln_2", "blk.{i}.ffn_norm", "H", "norm", bias=True),
        Rule("transformer.ln_f", "output_norm", "H", "norm", bias=True),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=(
        Field("block_count", "u32", "num_hidden_layers"), Field("context_length", "u32", "max_position_embeddings"),
        Field("embedding_length", "u32", "hidden_size"), Field("feed_forward_length", "u32", "intermediate_size"),
        Field("attention.head_count", "u32", "num_attention_heads"),
        Field("attention.layer_norm_epsilon", "f32", "layer_norm_epsilon"),
    ),
    after=(),
    defaults={
        "vocab_size": 50257, "max_position_embeddings": 1024, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "rope_theta": 10000.0, "tie_word_embeddings": True,
    },
    rebuilt={"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"},
    fixed={
        "activation_function": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    names={
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
    },
    free_heads=False,
    plain_rope=False,
    complete=_derive,
    adjust=_no_rotation,
)  # fmt: skip
