"""GLM-4 (0414): four norms a block, half of a head rotated in neighbouring pairs, gate and up kept as one matrix.

Facts: llama.cpp, ``conversion/glm.py`` ``Glm4Model`` and ``src/models/glm4.cpp``; config defaults: transformers 5,
``models/glm4/configuration_glm4.py``.
"""

from __future__ import annotations

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, HEAD_SIZES, NORM, Field
from qformats.architectures.mapping import Rule

__all__ = ["GLM4"]

LAYER = "model.layers.{i}."

GLM4 = Architecture(
    name="glm4",
    gguf="glm4",
    hf_classes=("Glm4ForCausalLM",),
    model_types=("glm4",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH", bias="attention_bias"),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH", bias="attention_bias"),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH", bias="attention_bias"),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ"),
        Rule(LAYER + "mlp.gate_up_proj", "blk.{i}.ffn_up", "UH"),
        Rule(LAYER + "mlp.down_proj", "blk.{i}.ffn_down", "HF"),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm"),
        Rule(LAYER + "post_self_attn_layernorm", "blk.{i}.post_attention_norm", "H", "norm"),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm"),
        Rule(LAYER + "post_mlp_layernorm", "blk.{i}.post_ffw_norm", "H", "norm"),
        Rule("model.norm", "output_norm", "H", "norm"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=ATTENTION,
    first_own_key="rope.dimension_count",
    after=(*NORM, *HEAD_SIZES, Field("rope.dimension_count", "u32", "rotary_dim")),
    defaults={
        "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0, "max_position_embeddings": 131072,
        "hidden_act": "silu", "partial_rotary_factor": 0.5, "attention_bias": True,
    },
    rebuilt={"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "hidden_act": "silu"},
    fixed={"hidden_act": ("silu", "swish")},
    token_ids={"eos": "<|endoftext|>", "eot": "<|user|>", "unk": "<|endoftext|>", "bos": "<|endoftext|>"},
)  # fmt: skip
