"""Llama, Mistral (HF naming), SmolLM2: rotary rows of q and k are interleaved for ggml; Llama 3's factors become a tensor.

Facts: llama.cpp, ``conversion/llama.py``; config defaults: transformers 5, ``models/llama/configuration_llama.py``.
"""

from __future__ import annotations

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, HEAD_SIZES, NORM, Field
from qformats.architectures.mapping import Rule

__all__ = ["LLAMA"]

LAYER = "model.layers.{i}."

LLAMA = Architecture(
    name="llama",
    gguf="llama",
    hf_classes=("LlamaForCausalLM", "MistralForCausalLM"),
    model_types=("llama", "mistral"),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH", order="A", bias="attention_bias"),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH", order="G", bias="attention_bias"),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH", bias="attention_bias"),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ", bias="attention_bias"),
        Rule(LAYER + "mlp.gate_proj", "blk.{i}.ffn_gate", "FH", bias="mlp_bias"),
        Rule(LAYER + "mlp.up_proj", "blk.{i}.ffn_up", "FH", bias="mlp_bias"),
        Rule(LAYER + "mlp.down_proj", "blk.{i}.ffn_down", "HF", bias="mlp_bias"),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm"),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm"),
        Rule("model.norm", "output_norm", "H", "norm"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=ATTENTION,
    first_own_key="vocab_size",
    after=(*NORM, *HEAD_SIZES, Field("vocab_size", "u32", "vocab_size"), Field("rope.dimension_count", "u32", "head_dim")),
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048, "hidden_act": "silu"},
    rebuilt={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
    fixed={"hidden_act": ("silu", "swish")},
    ignored={"sliding_window": (None,)},
    rope_factors="llama3",
    llama_vocabulary=True,
)
