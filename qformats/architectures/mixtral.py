"""Mixtral: Llama's GGUF name, attention and row order, with experts stacked into three-dimensional tensors.

Facts: llama.cpp, ``conversion/llama.py`` (``block_sparse_moe``) and ``src/models/llama.cpp``, which rescales the chosen experts'
weights to one as Mixtral does; config defaults: transformers 5, ``models/mixtral/configuration_mixtral.py``.
"""

from __future__ import annotations

from dataclasses import replace

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, EXPERTS, HEAD_SIZES, NORM, Field
from qformats.architectures.llama import LLAMA
from qformats.architectures.mapping import Rule

__all__ = ["MIXTRAL"]

MOE = "model.layers.{i}.block_sparse_moe."
STACK = "model.layers.{i}.mlp.experts"  # in transformers 5, which saves it under the name above
_SHARED = tuple(replace(rule, bias=False) for rule in LLAMA.rules if ".mlp." not in rule.hf)

MIXTRAL = Architecture(
    name="mixtral",
    gguf="llama",
    hf_classes=("MixtralForCausalLM",),
    model_types=("mixtral",),
    told_by="expert_count",
    rules=(
        _SHARED[0],
        Rule(MOE + "gate", "blk.{i}.ffn_gate_inp", "EH", "router"),
        Rule(MOE + "experts.{e}.w1", "blk.{i}.ffn_gate_exps", "EFH", "experts", fused=("gate_up_proj", 0, 2), stack=STACK),
        Rule(MOE + "experts.{e}.w2", "blk.{i}.ffn_down_exps", "EHF", "experts", fused=("down_proj", 0, 1), stack=STACK),
        Rule(MOE + "experts.{e}.w3", "blk.{i}.ffn_up_exps", "EFH", "experts", fused=("gate_up_proj", 1, 2), stack=STACK),
        *_SHARED[1:],
    ),
    before=ATTENTION,
    first_own_key="vocab_size",
    after=(
        *NORM, *EXPERTS, *HEAD_SIZES, Field("vocab_size", "u32", "vocab_size"), Field("rope.dimension_count", "u32", "rotary_dim"),
    ),
    defaults={
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "max_position_embeddings": 131072, "hidden_act": "silu",
        "num_experts": 8, "num_experts_per_tok": 2,
    },
    rebuilt={"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "sliding_window": None},
    fixed={"hidden_act": ("silu", "swish")},
    ignored={"sliding_window": (None,)},
    names={"num_experts": "num_local_experts"},
    writes_head_dim=False,
    rope_factors="llama3",
    llama_vocabulary=True,
)  # fmt: skip
