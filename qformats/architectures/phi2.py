"""Phi-1, Phi-1.5 and Phi-2: one layer norm a block, biases everywhere, the output matrix included.

Facts: llama.cpp, ``conversion/phi.py`` ``Phi2Model``, which takes key-value heads and feed-forward size for granted, and
``src/models/phi2.cpp``; config defaults: transformers 5, ``models/phi/configuration_phi.py``.
"""

from __future__ import annotations

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import Field
from qformats.architectures.mapping import Rule

__all__ = ["PHI2"]

LAYER = "model.layers.{i}."

PHI2 = Architecture(
    name="phi2",
    gguf="phi2",
    hf_classes=("PhiForCausalLM",),
    model_types=("phi",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH", bias=True),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH", bias=True),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH", bias=True),
        Rule(LAYER + "self_attn.dense", "blk.{i}.attn_output", "HQ", bias=True),
        Rule(LAYER + "mlp.fc1", "blk.{i}.ffn_up", "FH", bias=True),
        Rule(LAYER + "mlp.fc2", "blk.{i}.ffn_down", "HF", bias=True),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm", bias=True),
        Rule("model.final_layernorm", "output_norm", "H", "norm", bias=True),
        Rule("lm_head", "output", "TH", "output", bias=True),
    ),
    before=(
        Field("context_length", "u32", "max_position_embeddings"), Field("embedding_length", "u32", "hidden_size"),
        Field("feed_forward_length", "u32", "intermediate_size"), Field("block_count", "u32", "num_hidden_layers"),
        Field("attention.head_count", "u32", "num_attention_heads"), Field("attention.head_count_kv", "u32", "num_key_value_heads"),
        Field("attention.layer_norm_epsilon", "f32", "layer_norm_eps"), Field("rope.dimension_count", "u32", "rotary_dim"),
    ),
    after=(),
    defaults={
        "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048, "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5, "qk_layernorm": False,
    },
    rebuilt={"architectures": ["PhiForCausalLM"], "model_type": "phi", "hidden_act": "gelu_new", "qk_layernorm": False},
    fixed={
        "hidden_act": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "qk_layernorm": (False,),
        "tie_word_embeddings": (False,),  # llama.cpp's phi2 needs an output matrix
    },
    free_heads=False,
    plain_rope=False,
    adds_bos=False,
)  # fmt: skip
