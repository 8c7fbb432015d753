"""Qwen3: no row operation, norms on q and k, heads of their own size.

Facts: llama.cpp, ``conversion/qwen.py`` ``Qwen3Model`` and ``src/models/qwen3.cpp``; config defaults: transformers 5,
``models/qwen3/configuration_qwen3.py``.
"""

from __future__ import annotations

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, HEAD_SIZES, NORM
from qformats.architectures.mapping import Rule

__all__ = ["QWEN3"]

LAYER = "model.layers.{i}."

QWEN3 = Architecture(
    name="qwen3",
    gguf="qwen3",
    hf_classes=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH"),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH"),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH"),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ"),
        Rule(LAYER + "self_attn.q_norm", "blk.{i}.attn_q_norm", "D", "norm"),
        Rule(LAYER + "self_attn.k_norm", "blk.{i}.attn_k_norm", "D", "norm"),
        Rule(LAYER + "mlp.gate_proj", "blk.{i}.ffn_gate", "FH"),
        Rule(LAYER + "mlp.up_proj", "blk.{i}.ffn_up", "FH"),
        Rule(LAYER + "mlp.down_proj", "blk.{i}.ffn_down", "HF"),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm"),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm"),
        Rule("model.norm", "output_norm", "H", "norm"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=ATTENTION,
    after=(*NORM, *HEAD_SIZES),
    defaults={
        "num_key_value_heads": 32, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 32768,
        "hidden_act": "silu",
    },
    rebuilt={
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": False,
        "attention_bias": False,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),  # the output projection's bias has no place in llama.cpp's qwen3
    },
    ignored={"use_sliding_window": (False,)},
)  # fmt: skip
