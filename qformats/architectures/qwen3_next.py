"""Qwen3-Next: gated delta nets in most blocks, gated attention in the others, experts everywhere.

Facts: llama.cpp, ``conversion/qwen.py`` ``Qwen3NextModel`` and ``src/models/qwen3next.cpp``; config defaults: transformers 5,
``models/qwen3_next``. Norms but that inside of a delta net are stored with one less than they mean. The head that predicts further
tokens is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, EXPERTS, HEAD_SIZES, NORM, Field, positive
from qformats.architectures.mapping import Rule
from qformats.architectures.qwen2_moe import QWEN2_MOE
from qformats.architectures.splits import Split
from qformats.errors import BadFile, Unsupported

__all__ = ["QWEN3_NEXT"]

LAYER = "model.layers.{i}."
ATTENTION_OF = LAYER + "self_attn."
NET = LAYER + "linear_attn"
_PATTERN_KEY = "attention.recurrent_layers"
_KINDS = ("linear_attention", "full_attention")
_MLP = tuple(rule for rule in QWEN2_MOE.rules if ".mlp." in rule.hf)


def _derive(full: dict[str, Any]) -> None:
    """Which blocks are of which kind, and the size inside of a delta net."""
    layers, interval = positive(full, "num_hidden_layers"), positive(full, "full_attention_interval")
    types = full.get("layer_types") or [_KINDS[(layer + 1) % interval == 0] for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not {*map(str, types)} <= {*_KINDS}:
        raise BadFile("config-field", f"config field 'layer_types' does not name linear or full attention for {layers} layers")
    full["layer_types"], full["recurrent_layers"] = types, [kind == _KINDS[0] for kind in types]
    full["net_layers"] = [layer for layer in range(layers) if types[layer] == _KINDS[0]]
    full["attention_layers"] = [layer for layer in range(layers) if types[layer] == _KINDS[1]]
    full["linear_inner_size"] = positive(full, "linear_value_head_dim") * positive(full, "linear_num_value_heads")


def _letters(full: Mapping[str, Any]) -> dict[str, int]:
    """p queries and their gates, v heads of a net, n a head's size, i all heads, c what goes through the convolution, C its width."""
    keys, values = positive(full, "linear_num_key_heads"), positive(full, "linear_num_value_heads")
    if values % keys:
        raise BadFile("config-field", f"linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}")
    inner = full["linear_inner_size"]
    return {
        "p": 2 * positive(full, "num_attention_heads") * positive(full, "head_dim"), "v": values, "b": 2 * values, "i": inner,
        "n": positive(full, "linear_value_head_dim"), "c": 2 * keys * positive(full, "linear_key_head_dim") + inner,
        "C": positive(full, "linear_conv_kernel_dim"),
    }  # fmt: skip


def _own_keys(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Nothing; refuses what no key can say."""
    key, value = full["linear_key_head_dim"], full["linear_value_head_dim"]
    if key != value:
        raise Unsupported("config-value", f"linear heads of {key} and {value}; llama.cpp's 'qwen3next' only knows one size for both")
    return []


def _rebuild(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    layers, interval = positive(config, "num_hidden_layers"), config.pop("full_attention_interval")
    pattern = values.get(_PATTERN_KEY) or [(layer + 1) % interval != 0 for layer in range(layers)]
    config["layer_types"] = [_KINDS[not recurrent] for recurrent in pattern]
    config["linear_value_head_dim"] = config["linear_key_head_dim"]
    for name in ("linear_inner_size", "recurrent_layers"):
        config.pop(name, None)


QWEN3_NEXT = Architecture(
    name="qwen3_next",
    gguf="qwen3next",
    hf_classes=("Qwen3NextForCausalLM",),
    model_types=("qwen3_next",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(ATTENTION_OF + "q_proj", "blk.{i}.attn_q", "pH", within="attention_layers"),
        Rule(ATTENTION_OF + "k_proj", "blk.{i}.attn_k", "VH", within="attention_layers"),
        Rule(ATTENTION_OF + "v_proj", "blk.{i}.attn_v", "VH", within="attention_layers"),
        Rule(ATTENTION_OF + "o_proj", "blk.{i}.attn_output", "HQ", within="attention_layers"),
        Rule(ATTENTION_OF + "q_norm", "blk.{i}.attn_q_norm", "D", "norm", shift=1.0, within="attention_layers"),
        Rule(ATTENTION_OF + "k_norm", "blk.{i}.attn_k_norm", "D", "norm", shift=1.0, within="attention_layers"),
        Rule(NET, "blk.{i}", "v", "state", leaf="A_log", gguf_leaf="ssm_a", function="-exp(x)", within="net_layers"),
        Rule(NET, "blk.{i}.ssm_dt", "v", "state", leaf="dt_bias", gguf_leaf="bias", within="net_layers"),
        Rule(NET + ".conv1d", "blk.{i}.ssm_conv1d", "cC", "conv", hf_shape="c1C", within="net_layers"),
        Rule(NET + ".in_proj_qkvz", "blk.{i}.attn_qkv", "cH", within="net_layers",
             split=Split("groups", "weight", 0, 2, "linear_num_key_heads")),
        Rule(NET + ".in_proj_qkvz", "blk.{i}.attn_gate", "iH", within="net_layers",
             split=Split("groups", "weight", 1, 2, "linear_num_key_heads")),
        Rule(NET + ".in_proj_ba", "blk.{i}.ssm_ba", "bH", within="net_layers"),
        Rule(NET + ".norm", "blk.{i}.ssm_norm", "n", "norm", within="net_layers"),
        Rule(NET + ".out_proj", "blk.{i}.ssm_out", "Hi", within="net_layers"),
        *(replace(rule, bias=False) for rule in _MLP),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm", shift=1.0),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.post_attention_norm", "H", "norm", shift=1.0),
        Rule("model.norm", "output_norm", "H", "norm", shift=1.0),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=ATTENTION,
    first_own_key="expert_feed_forward_length",
    after=(
        *NORM, *EXPERTS, *HEAD_SIZES, Field("expert_feed_forward_length", "u32", "moe_intermediate_size"),
        Field("expert_shared_feed_forward_length", "u32", "shared_expert_intermediate_size"),
        Field("ssm.conv_kernel", "u32", "linear_conv_kernel_dim"), Field("ssm.state_size", "u32", "linear_key_head_dim"),
        Field("ssm.group_count", "u32", "linear_num_key_heads"), Field("ssm.time_step_rank", "u32", "linear_num_value_heads"),
        Field("ssm.inner_size", "u32", "linear_inner_size"), Field(_PATTERN_KEY, "[bool]", "recurrent_layers"),
        Field("full_attention_interval", "u32", "full_attention_interval"), Field("rope.dimension_count", "u32", "rotary_dim"),
    ),
    defaults={
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "head_dim": 256,
        "tie_word_embeddings": False, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 10, "num_experts": 512, "norm_topk_prob": True, "rope_theta": 10000.0, "full_attention_interval": 4,
        "partial_rotary_factor": 0.25,
    },
    rebuilt={
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_act": "silu", "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False, "full_attention_interval": 4,
    },
    fixed={
        "hidden_act": ("silu", "swish"), "mlp_only_layers": ([],), "decoder_sparse_step": (1,), "norm_topk_prob": (True,),
        "attention_bias": (False,),
    },
    left_out={"mtp.": "predicts further tokens; such a head is not converted"},
    complete=_derive,
    letters=_letters,
    adjust=_rebuild,
    own_keys=_own_keys,
)  # fmt: skip
