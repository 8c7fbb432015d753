"""Falcon: layer norms, no biases; the fused projection, key-value head by head in HF, becomes queries, keys, values.

Facts: llama.cpp, ``conversion/falcon.py`` and ``src/models/falcon.cpp``, which approximates GELU with tanh while
the models of this family have it exactly; config defaults:
transformers 5, ``models/falcon/configuration_falcon.py``. 7B has one norm a block and one key-value head, 40B and 180B (the new
decoder architecture) two norms, 11B the new one with a single norm. Positions by ALiBi, biases and blocks one after the other are
not llama.cpp's falcon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import Field, positive
from qformats.architectures.mapping import Rule
from qformats.errors import Unsupported

__all__ = ["FALCON"]

LAYER = "transformer.h.{i}."


def _derive(full: dict[str, Any]) -> None:
    """Key-value heads, feed-forward size and the number of norms, as transformers derives them; ``Unsupported('config-value')``."""
    if not full["new_decoder_architecture"] and not full["parallel_attn"]:
        raise Unsupported("config-value", "config field 'parallel_attn' is False; llama.cpp's 'falcon' always computes as with True")
    heads = positive(full, "num_attention_heads")
    if not full["new_decoder_architecture"]:
        full["num_key_value_heads"] = 1 if full["multi_query"] else heads
    full.setdefault("num_key_value_heads", heads)
    full["intermediate_size"] = full.get("ffn_hidden_size", 4 * positive(full, "hidden_size"))
    full["two_norms"] = bool(full["new_decoder_architecture"]) and full.get("num_ln_in_parallel_attn", 2) == 2


def _rebuild(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    two = config.pop("two_norms")
    new = two or config["num_key_value_heads"] > 1
    config.update(new_decoder_architecture=new, multi_query=True, num_ln_in_parallel_attn=2 if two else 1)
    config["ffn_hidden_size"] = config.pop("intermediate_size")


FALCON = Architecture(
    name="falcon",
    gguf="falcon",
    hf_classes=("FalconForCausalLM", "RWForCausalLM"),
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    rules=(
        Rule("transformer.word_embeddings", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attention.query_key_value", "blk.{i}.attn_qkv", "WH", order="qkv"),
        Rule(LAYER + "self_attention.dense", "blk.{i}.attn_output", "HQ"),
        Rule(LAYER + "mlp.dense_h_to_4h", "blk.{i}.ffn_up", "FH"),
        Rule(LAYER + "mlp.dense_4h_to_h", "blk.{i}.ffn_down", "HF"),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm", bias=True, unless="two_norms"),
        Rule(LAYER + "ln_mlp", "blk.{i}.attn_norm", "H", "norm", bias=True, when="two_norms"),
        Rule(LAYER + "ln_attn", "blk.{i}.attn_norm_2", "H", "norm", bias=True, when="two_norms"),
        Rule("transformer.ln_f", "output_norm", "H", "norm", bias=True),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=(
        Field("context_length", "u32", "max_position_embeddings", constant=2048),
        Field("tensor_data_layout", "str", constant="jploski"), Field("embedding_length", "u32", "hidden_size"),
        Field("feed_forward_length", "u32", "intermediate_size"), Field("block_count", "u32", "num_hidden_layers"),
        Field("attention.head_count", "u32", "num_attention_heads"), Field("attention.head_count_kv", "u32", "num_key_value_heads"),
        Field("attention.layer_norm_epsilon", "f32", "layer_norm_epsilon"),
    ),
    after=(),
    defaults={
        "layer_norm_epsilon": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048, "activation": "gelu",
        "tie_word_embeddings": True, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "alibi": False,
    },
    rebuilt={
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "activation": "gelu", "alibi": False, "bias": False,
        "parallel_attn": True,
    },
    fixed={"activation": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu"), "alibi": (False,), "bias": (False,)},
    ignored={"activation": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")},
    names={"num_key_value_heads": "num_kv_heads"},
    free_heads=False,
    plain_rope=False,
    complete=_derive,
    adjust=_rebuild,
)  # fmt: skip
