"""StarCoder2: layer norms and biases everywhere, two matrices a feed forward.

Facts: llama.cpp, ``src/models/starcoder2.cpp``, which needs every bias and knows no sliding window; config defaults: transformers 5,
``models/starcoder2/configuration_starcoder2.py``.
"""

from __future__ import annotations

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, Field
from qformats.architectures.mapping import Rule

__all__ = ["STARCODER2"]

LAYER = "model.layers.{i}."

STARCODER2 = Architecture(
    name="starcoder2",
    gguf="starcoder2",
    hf_classes=("Starcoder2ForCausalLM",),
    model_types=("starcoder2",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH", bias=True),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH", bias=True),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH", bias=True),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ", bias=True),
        Rule(LAYER + "mlp.c_fc", "blk.{i}.ffn_up", "FH", bias=True),
        Rule(LAYER + "mlp.c_proj", "blk.{i}.ffn_down", "HF", bias=True),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm", bias=True),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm", bias=True),
        Rule("model.norm", "output_norm", "H", "norm", bias=True),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=ATTENTION,
    after=(Field("attention.layer_norm_epsilon", "f32", "norm_epsilon"),),
    defaults={
        "num_key_value_heads": 2, "norm_epsilon": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
        "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "use_bias": True,
    },
    rebuilt={
        "architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh", "use_bias": True,
        "sliding_window": None,
    },
    fixed={"hidden_act": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "use_bias": (True,)},
    ignored={"sliding_window": (None,)},
    free_heads=False,
)  # fmt: skip
