"""Qwen2 mixture of experts: Qwen3-MoE's tensors without norms on q and k, and a shared expert behind a gate of its own.

Facts: llama.cpp, ``conversion/qwen.py`` ``Qwen2MoeModel`` and ``src/models/qwen2moe.cpp``, which never rescales the chosen experts'
weights; config defaults: transformers 5, ``models/qwen2_moe/configuration_qwen2_moe.py``.
"""

from __future__ import annotations

from dataclasses import replace

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, EXPERTS, HEAD_SIZES, NORM, Field
from qformats.architectures.mapping import Rule
from qformats.architectures.qwen3_moe import QWEN3_MOE

__all__ = ["QWEN2_MOE"]

MLP = "model.layers.{i}.mlp."
_QKV = ("q_proj", "k_proj", "v_proj")
_SHARED = tuple(
    replace(rule, bias="qkv_bias" if rule.hf.endswith(_QKV) else False)
    for rule in QWEN3_MOE.rules
    if not rule.hf.endswith(("q_norm", "k_norm"))
)

QWEN2_MOE = Architecture(
    name="qwen2_moe",
    gguf="qwen2moe",
    hf_classes=("Qwen2MoeForCausalLM",),
    model_types=("qwen2_moe",),
    rules=(
        _SHARED[0],
        Rule(MLP + "shared_expert.gate_proj", "blk.{i}.ffn_gate_shexp", "SH"),
        Rule(MLP + "shared_expert.up_proj", "blk.{i}.ffn_up_shexp", "SH"),
        Rule(MLP + "shared_expert.down_proj", "blk.{i}.ffn_down_shexp", "HS"),
        Rule(MLP + "shared_expert_gate", "blk.{i}.ffn_gate_inp_shexp", "1H", "router"),
        *_SHARED[1:],
    ),
    before=ATTENTION,
    writes_head_dim=False,
    first_own_key="expert_feed_forward_length",
    after=(
        *NORM, *EXPERTS, *HEAD_SIZES, Field("expert_feed_forward_length", "u32", "moe_intermediate_size"),
        Field("expert_shared_feed_forward_length", "u32", "shared_expert_intermediate_size"),
    ),
    defaults={
        "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 32768, "hidden_act": "silu",
        "intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "norm_topk_prob": False, "qkv_bias": True,
    },
    rebuilt={
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_act": "silu", "norm_topk_prob": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
    },
    fixed={"hidden_act": ("silu", "swish"), "mlp_only_layers": ([],), "decoder_sparse_step": (1,), "norm_topk_prob": (False,)},
    ignored={"use_sliding_window": (False,)},
)  # fmt: skip
