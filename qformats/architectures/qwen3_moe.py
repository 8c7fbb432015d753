"""Qwen3 mixture of experts: the experts' matrices stacked into three-dimensional tensors, norms on q and k, a float router.

Facts: llama.cpp, ``conversion/qwen.py`` ``Qwen2MoeModel`` / ``Qwen3MoeModel``; config defaults: transformers 5,
``models/qwen3_moe/configuration_qwen3_moe.py``. A checkpoint holds one module an expert (``mlp.experts.3.up_proj``) or, as
transformers 5 keeps them in memory, ``mlp.experts.gate_up_proj`` (E, 2F, H) with the gate's rows first and
``mlp.experts.down_proj`` (E, H, F).
"""

from __future__ import annotations

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, EXPERTS, HEAD_SIZES, NORM, Field
from qformats.architectures.mapping import Rule

__all__ = ["QWEN3_MOE"]

LAYER = "model.layers.{i}."
EXPERT = LAYER + "mlp.experts.{e}."

QWEN3_MOE = Architecture(
    name="qwen3_moe",
    gguf="qwen3moe",
    hf_classes=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH", bias="attention_bias"),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH", bias="attention_bias"),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH", bias="attention_bias"),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ", bias="attention_bias"),
        Rule(LAYER + "self_attn.q_norm", "blk.{i}.attn_q_norm", "D", "norm"),
        Rule(LAYER + "self_attn.k_norm", "blk.{i}.attn_k_norm", "D", "norm"),
        Rule(LAYER + "mlp.gate", "blk.{i}.ffn_gate_inp", "EH", "router"),
        Rule(EXPERT + "gate_proj", "blk.{i}.ffn_gate_exps", "EXH", "experts", fused=("gate_up_proj", 0, 2)),
        Rule(EXPERT + "up_proj", "blk.{i}.ffn_up_exps", "EXH", "experts", fused=("gate_up_proj", 1, 2)),
        Rule(EXPERT + "down_proj", "blk.{i}.ffn_down_exps", "EHX", "experts", fused=("down_proj", 0, 1)),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm"),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm"),
        Rule("model.norm", "output_norm", "H", "norm"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=ATTENTION,
    first_own_key="expert_feed_forward_length",
    after=(*NORM, *EXPERTS, *HEAD_SIZES, Field("expert_feed_forward_length", "u32", "moe_intermediate_size")),
    defaults={
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 32768, "hidden_act": "silu",
        "norm_topk_prob": False,  # transformers leaves defaults out of config.json
    },
    rebuilt={
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
    },
    fixed={
        "hidden_act": ("silu", "swish"), "mlp_only_layers": ([],), "decoder_sparse_step": (1,),
        "norm_topk_prob": (True,),  # llama.cpp always rescales the chosen experts' weights to one
        "attention_bias": (False,),  # the output projection's bias has no place in llama.cpp's qwen3moe
    },
    ignored={"use_sliding_window": (False,)},
)  # fmt: skip
