"""Qwen2 and Qwen2.5: no row operation, biases on q, k and v.

Facts: llama.cpp, ``conversion/qwen.py`` ``Qwen2Model``; config defaults: transformers 5, ``models/qwen2/configuration_qwen2.py``.
"""

from __future__ import annotations

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, HEAD_SIZES, NORM
from qformats.architectures.mapping import Rule

__all__ = ["QWEN2"]

LAYER = "model.layers.{i}."

QWEN2 = Architecture(
    name="qwen2",
    gguf="qwen2",
    hf_classes=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH", bias=True),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH", bias=True),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH", bias=True),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ"),
        Rule(LAYER + "mlp.gate_proj", "blk.{i}.ffn_gate", "FH"),
        Rule(LAYER + "mlp.up_proj", "blk.{i}.ffn_up", "FH"),
        Rule(LAYER + "mlp.down_proj", "blk.{i}.ffn_down", "HF"),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm"),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm"),
        Rule("model.norm", "output_norm", "H", "norm"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=ATTENTION,
    writes_head_dim=False,
    after=(*NORM, *HEAD_SIZES),
    defaults={
        "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 32768, "hidden_act": "silu",
    },
    rebuilt={"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False},
    fixed={"hidden_act": ("silu", "swish")},
    ignored={"use_sliding_window": (False,)},
)  # fmt: skip
