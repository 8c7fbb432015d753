"""StableLM: layer norms, a partial rotation, sequential or parallel blocks, and one norm a head stacked into a matrix.

Facts: llama.cpp, ``conversion/stablelm.py`` and ``src/models/stablelm.cpp``, which tells a parallel block by the missing second norm;
config defaults: transformers 5, ``models/stablelm/configuration_stablelm.py``.
"""

from __future__ import annotations

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import Field
from qformats.architectures.mapping import Rule

__all__ = ["STABLELM"]

LAYER = "model.layers.{i}."

STABLELM = Architecture(
    name="stablelm",
    gguf="stablelm",
    hf_classes=("StableLmForCausalLM",),
    model_types=("stablelm",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH", bias="use_qkv_bias"),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH", bias="use_qkv_bias"),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH", bias="use_qkv_bias"),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ"),
        Rule(LAYER + "self_attn.q_layernorm.norms.{e}", "blk.{i}.attn_q_norm", "AD", "norm", when="qk_layernorm"),
        Rule(LAYER + "self_attn.k_layernorm.norms.{e}", "blk.{i}.attn_k_norm", "GD", "norm", when="qk_layernorm"),
        Rule(LAYER + "mlp.gate_proj", "blk.{i}.ffn_gate", "FH"),
        Rule(LAYER + "mlp.up_proj", "blk.{i}.ffn_up", "FH"),
        Rule(LAYER + "mlp.down_proj", "blk.{i}.ffn_down", "HF"),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm", bias=True),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm", bias=True, unless="use_parallel_residual"),
        Rule("model.norm", "output_norm", "H", "norm", bias=True),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=(
        Field("context_length", "u32", "max_position_embeddings"), Field("embedding_length", "u32", "hidden_size"),
        Field("block_count", "u32", "num_hidden_layers"), Field("feed_forward_length", "u32", "intermediate_size"),
        Field("rope.dimension_count", "u32", "rotary_dim"), Field("attention.head_count", "u32", "num_attention_heads"),
        Field("attention.head_count_kv", "u32", "num_key_value_heads"), Field("use_parallel_residual", "bool", "use_parallel_residual"),
        Field("attention.layer_norm_epsilon", "f32", "layer_norm_eps"),
    ),
    after=(),
    defaults={
        "num_key_value_heads": 32, "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "hidden_act": "silu",
        "partial_rotary_factor": 0.25, "use_parallel_residual": False, "qk_layernorm": False, "use_qkv_bias": False,
    },
    rebuilt={"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "hidden_act": "silu"},
    fixed={"hidden_act": ("silu", "swish"), "tie_word_embeddings": (False,)},  # llama.cpp's stablelm needs an output matrix
    free_heads=False,
    plain_rope=False,
)  # fmt: skip
