"""gpt-oss: experts with biases whose gate and up rows take turns, attention sinks, and layers that slide by turns.

Facts: llama.cpp, ``conversion/gpt_oss.py`` and ``src/models/openai-moe.cpp``; config defaults: transformers 5,
``models/gpt_oss/configuration_gpt_oss.py``. A checkpoint keeps the experts as MXFP4 codes (``qformats.formats.mxfp4``) or as floats with
inputs as rows (``splits``). transformers rounds YaRN's two corner dimensions only where ``truncate`` says so, llama.cpp always.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, EXPERTS, HEAD_SIZES, NORM, Field
from qformats.architectures.mapping import Rule
from qformats.architectures.rope import full_rope, rope_parameters
from qformats.architectures.sliding import layer_types, pattern_key, sliding_layers
from qformats.architectures.splits import Split

__all__ = ["GPT_OSS"]

LAYER = "model.layers.{i}."
EXPERTS_OF = LAYER + "mlp.experts"
_PERIOD = 2  # llama.cpp's, where a file does not name the layers
_YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def _derive(full: dict[str, Any]) -> None:
    if not rope_parameters(full).get("rope_type"):
        full["rope_parameters"] = dict(_YARN)
    rope = full_rope(rope_parameters(full))
    full["yarn_truncate"] = rope.get("rope_type") != "yarn" or rope.get("truncate", True)


def _own_keys(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    return pattern_key(sliding_layers(full, _PERIOD), _PERIOD)


def _rebuild(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    config["layer_types"] = layer_types(values, int(config["num_hidden_layers"]), _PERIOD, "gpt-oss")
    rope = config["rope_parameters"]
    if all(rope.get(name, wanted) == wanted for name, wanted in _YARN.items()):
        config["rope_parameters"] = {**rope, "truncate": False}  # OpenAI's own; a GGUF does not say


GPT_OSS = Architecture(
    name="gpt_oss",
    gguf="gpt-oss",
    hf_classes=("GptOssForCausalLM",),
    model_types=("gpt_oss",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm"),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.post_attention_norm", "H", "norm"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH", bias=True),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH", bias=True),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH", bias=True),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ", bias=True),
        Rule(LAYER + "self_attn", "blk.{i}.attn_sinks", "A", "norm", leaf="sinks"),
        Rule(LAYER + "mlp.router", "blk.{i}.ffn_gate_inp", "EH", "router", bias=True),
        Rule(EXPERTS_OF, "blk.{i}.ffn_gate_exps", "EFH", "experts", split=Split("alternate", "gate_up_proj", 0, 2)),
        Rule(EXPERTS_OF, "blk.{i}.ffn_up_exps", "EFH", "experts", split=Split("alternate", "gate_up_proj", 1, 2)),
        Rule(EXPERTS_OF, "blk.{i}.ffn_down_exps", "EHF", "experts", split=Split("alternate", "down_proj")),
        Rule(EXPERTS_OF, "blk.{i}.ffn_gate_exps", "EF", "bias", gguf_leaf="bias", split=Split("alternate", "gate_up_proj_bias", 0, 2)),
        Rule(EXPERTS_OF, "blk.{i}.ffn_up_exps", "EF", "bias", gguf_leaf="bias", split=Split("alternate", "gate_up_proj_bias", 1, 2)),
        Rule(EXPERTS_OF, "blk.{i}.ffn_down_exps", "EH", "bias", gguf_leaf="bias", split=Split("alternate", "down_proj_bias")),
        Rule("model.norm", "output_norm", "H", "norm"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=ATTENTION,
    first_own_key="attention.sliding_window",
    after=(
        *NORM, *EXPERTS, *HEAD_SIZES, Field("attention.sliding_window", "u32", "sliding_window"),
        Field("expert_feed_forward_length", "u32", "intermediate_size"),
    ),
    defaults={
        "num_hidden_layers": 36, "num_experts": 128, "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "num_experts_per_tok": 4, "hidden_act": "silu", "tie_word_embeddings": False,
        "attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
    },
    rebuilt={
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_act": "silu", "attention_bias": True,
        "swiglu_limit": 7.0,
    },
    fixed={
        "hidden_act": ("silu",), "attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,),
        "tie_word_embeddings": (False,),
    },
    ignored={"yarn_truncate": (True,)},
    names={"num_experts": "num_local_experts"},
    complete=_derive,
    adjust=_rebuild,
    own_keys=_own_keys,
)  # fmt: skip
