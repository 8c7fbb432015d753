"""Llama 4's text model: experts with inputs as rows, gate and up in one tensor; blocks with experts by turns; chunks and NoPE every fourth.

Facts: llama.cpp, ``conversion/llama.py`` ``Llama4Model`` and ``src/models/llama4.cpp``, which tells the models with a norm on q and k by
the number of experts and knows one chunk, one temperature and one period of blocks without rotation; config defaults: transformers 5,
``models/llama4/configuration_llama4.py``, whose ``intermediate_size`` is that of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, EXPERTS, HEAD_SIZES, NORM, Field, positive
from qformats.architectures.mapping import Rule
from qformats.architectures.splits import Split
from qformats.errors import BadFile, Unsupported

__all__ = ["LLAMA4"]

LAYER = "model.layers.{i}."
FEED = LAYER + "feed_forward."
_PERIOD = 4  # every such block has no rotation and sees everything
_NO_NORM = 128  # llama.cpp computes no norm on q and k with as many experts
_COLUMNS = "runs of columns"


def _derive(full: dict[str, Any]) -> None:
    """Which blocks have experts, and the size of a dense block's feed-forward part."""
    full["intermediate_size"] = full.get("intermediate_size_mlp", 16384)
    full["attn_temperature_tuning"] = bool(full.get("attn_temperature_tuning", True))
    layers = positive(full, "num_hidden_layers")
    step, sparse = positive(full, "interleave_moe_layer_step"), full.get("moe_layers")
    if sparse is not None:
        if not isinstance(sparse, list) or not all(type(layer) is int and 0 <= layer < layers for layer in sparse):
            raise BadFile("config-field", f"config field 'moe_layers' is {sparse!r}, expected numbers of blocks below {layers}")
        step = min(sparse, default=layers) + 1
    full["moe_layers"] = list(range(step - 1, layers, step))
    full["dense_layers"] = [layer for layer in range(layers) if layer not in full["moe_layers"]]
    full["interleave_moe_layer_step"] = step
    if sparse is not None and sorted(sparse) != full["moe_layers"]:
        raise Unsupported("config-value", f"config field 'moe_layers' is {sparse}; llama.cpp's 'llama4' only knows every n-th block")


def _own_keys(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Nothing; refuses what no key can say."""
    layers, experts = positive(full, "num_hidden_layers"), positive(full, "num_experts")
    rotated = [int((layer + 1) % full["no_rope_layer_interval"] != 0) for layer in range(layers)]
    rotated = [int(bool(flag)) for flag in full.get("no_rope_layers") or rotated][:layers]
    kinds = full.get("layer_types") or ["chunked_attention" if flag else "full_attention" for flag in rotated]
    wanted = [int((layer + 1) % _PERIOD != 0) for layer in range(layers)]
    if rotated != wanted or [int(kind == "chunked_attention") for kind in kinds] != wanted:
        raise Unsupported("config-value", f"llama.cpp's 'llama4' rotates and chunks all but every {_PERIOD}th block, this model others")
    if bool(full["use_qk_norm"]) != (experts != _NO_NORM):
        word = "without" if full["use_qk_norm"] else "with"
        raise Unsupported("config-value", f"use_qk_norm is {full['use_qk_norm']!r}; llama.cpp computes {experts} experts {word} that norm")
    return []


def _rebuild(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    config["use_qk_norm"] = config.get("num_experts") != _NO_NORM


LLAMA4 = Architecture(
    name="llama4",
    gguf="llama4",
    hf_classes=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    model_types=("llama4_text", "llama4"),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH"),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH"),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH"),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ"),
        Rule(FEED + "gate_proj", "blk.{i}.ffn_gate", "FH", within="dense_layers"),
        Rule(FEED + "up_proj", "blk.{i}.ffn_up", "FH", within="dense_layers"),
        Rule(FEED + "down_proj", "blk.{i}.ffn_down", "HF", within="dense_layers"),
        Rule(FEED + "router", "blk.{i}.ffn_gate_inp", "EH", "router", within="moe_layers"),
        Rule(FEED + "experts", "blk.{i}.ffn_gate_exps", "EXH", "experts", split=Split(_COLUMNS, "gate_up_proj", 0, 2), within="moe_layers"),
        Rule(FEED + "experts", "blk.{i}.ffn_up_exps", "EXH", "experts", split=Split(_COLUMNS, "gate_up_proj", 1, 2), within="moe_layers"),
        Rule(FEED + "experts", "blk.{i}.ffn_down_exps", "EHX", "experts", split=Split(_COLUMNS, "down_proj"), within="moe_layers"),
        Rule(FEED + "shared_expert.gate_proj", "blk.{i}.ffn_gate_shexp", "XH", within="moe_layers"),
        Rule(FEED + "shared_expert.up_proj", "blk.{i}.ffn_up_shexp", "XH", within="moe_layers"),
        Rule(FEED + "shared_expert.down_proj", "blk.{i}.ffn_down_shexp", "HX", within="moe_layers"),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm"),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm"),
        Rule("model.norm", "output_norm", "H", "norm"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=ATTENTION,
    first_own_key="vocab_size",
    after=(
        *NORM, *EXPERTS, *HEAD_SIZES, Field("vocab_size", "u32", "vocab_size"), Field("rope.dimension_count", "u32", "rotary_dim"),
        Field("interleave_moe_layer_step", "u32", "interleave_moe_layer_step"),
        Field("expert_feed_forward_length", "u32", "moe_intermediate_size"),
    ),
    defaults={
        "vocab_size": 202048, "hidden_size": 5120, "moe_intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "num_experts_per_tok": 1, "num_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True,
        "no_rope_layer_interval": _PERIOD, "rope_theta": 500000.0,
    },
    rebuilt={"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "hidden_act": "silu", "attention_bias": False},
    fixed={
        "hidden_act": ("silu",), "attention_bias": (False,), "attention_chunk_size": (8192,), "attn_temperature_tuning": (True,),
        "floor_scale": (8192,), "attn_scale": (0.1,),
    },
    names={
        "num_experts": "num_local_experts", "intermediate_size": "intermediate_size_mlp", "moe_intermediate_size": "intermediate_size",
    },
    rope_factors="llama3",
    complete=_derive,
    adjust=_rebuild,
    own_keys=_own_keys,
    lacks=("only the text model of a Llama 4 is converted",),
)  # fmt: skip
