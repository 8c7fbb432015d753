"""BLOOM: positions by ALiBi, a norm behind the embedding, biases everywhere; the fused projection, head by head in HF, becomes
queries, keys, values.

Facts: llama.cpp, ``conversion/bloom.py`` and ``src/models/bloom.cpp``; config defaults: transformers 5,
``models/bloom/configuration_bloom.py``. ALiBi has no longest context; the key holds the training length, else the hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import SIZES, Field, positive
from qformats.architectures.mapping import Rule

__all__ = ["BLOOM"]

LAYER = "transformer.h.{i}."


def _derive(full: dict[str, Any]) -> None:
    full["hidden_size"] = full.get("n_embed", full["hidden_size"])  # the older word
    hidden = positive(full, "hidden_size")
    full["num_key_value_heads"] = full.get("num_attention_heads")
    full["intermediate_size"] = 4 * hidden
    full["max_position_embeddings"] = full.get("seq_length", hidden)


def _no_rotation(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name in ("rope_parameters", "intermediate_size", "num_key_value_heads"):
        config.pop(name, None)


BLOOM = Architecture(
    name="bloom",
    gguf="bloom",
    hf_classes=("BloomForCausalLM", "BloomModel"),
    model_types=("bloom",),
    rules=(
        Rule("transformer.word_embeddings", "token_embd", "TH", "embedding"),
        Rule("transformer.word_embeddings_layernorm", "token_embd_norm", "H", "norm", bias=True),
        Rule(LAYER + "self_attention.query_key_value", "blk.{i}.attn_qkv", "WH", order="qkv", bias=True),
        Rule(LAYER + "self_attention.dense", "blk.{i}.attn_output", "HQ", bias=True),
        Rule(LAYER + "mlp.dense_h_to_4h", "blk.{i}.ffn_up", "FH", bias=True),
        Rule(LAYER + "mlp.dense_4h_to_h", "blk.{i}.ffn_down", "HF", bias=True),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm", bias=True),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm", bias=True),
        Rule("transformer.ln_f", "output_norm", "H", "norm", bias=True),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=(
        SIZES[0], SIZES[1], SIZES[3], SIZES[2], *SIZES[4:], Field("attention.layer_norm_epsilon", "f32", "layer_norm_epsilon"),
    ),
    after=(),
    defaults={
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "rope_theta": 10000.0,
    },
    rebuilt={"architectures": ["BloomForCausalLM"], "model_type": "bloom"},
    fixed={"apply_residual_connection_post_layernorm": (False,)},
    names={"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "max_position_embeddings": "seq_length"},
    free_heads=False,
    plain_rope=False,
    complete=_derive,
    adjust=_no_rotation,
)  # fmt: skip
