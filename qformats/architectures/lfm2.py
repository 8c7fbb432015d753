"""LFM2: short convolutions over the sequence in most blocks, attention with norms on q and k in the others.

Facts: llama.cpp, ``conversion/lfm2.py`` ``LFM2Model`` and ``src/models/lfm2.cpp``, where a block without key-value heads is a
convolution; config defaults: transformers 5, ``models/lfm2/configuration_lfm2.py``. The feed-forward size of a config is rounded unless
it says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, NORM, Field, number, positive
from qformats.architectures.mapping import Rule
from qformats.errors import BadFile

__all__ = ["LFM2"]

LAYER = "model.layers.{i}."


def _derive(full: dict[str, Any]) -> None:
    """Key-value heads layer by layer, which layers are of which kind, and the feed-forward size."""
    layers = positive(full, "num_hidden_layers")
    heads = full.get("layer_kv_heads") or _heads(full, layers)
    if isinstance(heads, int):
        heads = [heads] * layers
    if not isinstance(heads, (list, tuple)) or len(heads) < layers or len({count for count in heads if count}) != 1:
        raise BadFile("config-field", f"key-value heads {heads!r} are no one number or 0 for each of {layers} layers")
    full["layer_kv_heads"] = heads = list(heads[:layers])
    full["num_key_value_heads"] = max(heads)
    full["attention_layers"] = [layer for layer, count in enumerate(heads) if count]
    full["conv_layers"] = [layer for layer, count in enumerate(heads) if not count]
    width = full["intermediate_size"] = full.get("block_ff_dim", full["intermediate_size"])
    if full["block_auto_adjust_ff_dim"]:
        multiple = positive(full, "block_multiple_of")
        width = int(number(full, "block_ffn_dim_multiplier") * int(2 * positive(full, "intermediate_size") / 3))
        full.update(block_ff_dim=multiple * (-(-width // multiple)), block_auto_adjust_ff_dim=False)
        full["intermediate_size"] = full["block_ff_dim"]


def _heads(full: Mapping[str, Any], layers: int) -> list[int]:
    count, indices = positive(full, "num_key_value_heads"), full.get("full_attn_idxs", range(layers))
    types = full.get("layer_types") or ["full_attention" if layer in indices else "conv" for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not {*map(str, types)} <= {"full_attention", "conv"}:
        raise BadFile("config-field", f"config field 'layer_types' does not name full_attention or conv for {layers} layers")
    return [count if kind == "full_attention" else 0 for kind in types]


def _rebuild(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    heads = list(config.pop("layer_kv_heads"))
    config["layer_types"] = ["full_attention" if count else "conv" for count in heads]
    config.update(num_key_value_heads=max(heads), block_auto_adjust_ff_dim=False)


LFM2 = Architecture(
    name="lfm2",
    gguf="lfm2",
    hf_classes=("Lfm2ForCausalLM", "LFM2ForCausalLM"),
    model_types=("lfm2",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "conv.conv", "blk.{i}.shortconv.conv", "HC", "conv", hf_shape="H1C", within="conv_layers"),
        Rule(LAYER + "conv.in_proj", "blk.{i}.shortconv.in_proj", "NH", within="conv_layers"),
        Rule(LAYER + "conv.out_proj", "blk.{i}.shortconv.out_proj", "HH", within="conv_layers"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH", within="attention_layers"),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH", within="attention_layers"),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH", within="attention_layers"),
        Rule(LAYER + "self_attn.out_proj", "blk.{i}.attn_output", "HQ", within="attention_layers"),
        Rule(LAYER + "self_attn.q_layernorm", "blk.{i}.attn_q_norm", "D", "norm", within="attention_layers"),
        Rule(LAYER + "self_attn.k_layernorm", "blk.{i}.attn_k_norm", "D", "norm", within="attention_layers"),
        Rule(LAYER + "feed_forward.w1", "blk.{i}.ffn_gate", "FH"),
        Rule(LAYER + "feed_forward.w2", "blk.{i}.ffn_down", "HF"),
        Rule(LAYER + "feed_forward.w3", "blk.{i}.ffn_up", "FH"),
        Rule(LAYER + "operator_norm", "blk.{i}.attn_norm", "H", "norm"),
        Rule(LAYER + "ffn_norm", "blk.{i}.ffn_norm", "H", "norm"),
        Rule("model.embedding_norm", "token_embd_norm", "H", "norm"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=(*ATTENTION[:-1], Field("attention.head_count_kv", "[i32]", "layer_kv_heads")),
    first_own_key="vocab_size",
    after=(
        Field(NORM[0].key, "f32", "norm_eps"), Field("vocab_size", "u32", "vocab_size"),
        Field("shortconv.l_cache", "u32", "conv_L_cache"),
    ),
    defaults={
        "num_key_value_heads": 8, "intermediate_size": 12288, "norm_eps": 1e-5, "rope_theta": 1000000.0,
        "max_position_embeddings": 128000, "conv_L_cache": 3, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True, "tie_word_embeddings": True,
    },
    rebuilt={"architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "conv_bias": False, "block_auto_adjust_ff_dim": False},
    fixed={"conv_bias": (False,)},
    names={"tie_word_embeddings": "tie_embedding"},
    free_heads=False,
    complete=_derive,
    adjust=_rebuild,
    letters=lambda full: {"C": positive(full, "conv_L_cache"), "N": 3 * positive(full, "hidden_size")},
)  # fmt: skip
