"""GPT-NeoX and Pythia: layer norms and biases everywhere; the fused projection, head by head in HF, becomes queries, keys, values.

Facts: llama.cpp, ``conversion/gptneox.py`` and ``src/models/gptneox.cpp``, which approximates GELU with tanh while
the models of this family have it exactly; config defaults:
transformers 5, ``models/gpt_neox/configuration_gpt_neox.py``.
"""

from __future__ import annotations

from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import Field
from qformats.architectures.mapping import Rule

__all__ = ["GPT_NEOX"]

LAYER = "gpt_neox.layers.{i}."

def _whole_heads(full: dict[str, Any]) -> None:
    """Every head has a key and a value of its own, whatever a config says."""
    full["num_key_value_heads"] = full.get("num_attention_heads")


GPT_NEOX = Architecture(
    name="gpt_neox",
    gguf="gptneox",
    hf_classes=("GPTNeoXForCausalLM",),
    model_types=("gpt_neox",),
    rules=(
        Rule("gpt_neox.embed_in", "token_embd", "TH", "embedding"),
        Rule(LAYER + "attention.query_key_value", "blk.{i}.attn_qkv", "WH", order="qkv", bias=True),
        Rule(LAYER + "attention.dense", "blk.{i}.attn_output", "HQ", bias=True),
        Rule(LAYER + "mlp.dense_h_to_4h", "blk.{i}.ffn_up", "FH", bias=True),
        Rule(LAYER + "mlp.dense_4h_to_h", "blk.{i}.ffn_down", "HF", bias=True),
        Rule(LAYER + "input_layernorm", "blk.{i}.attn_norm", "H", "norm", bias=True),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm", "H", "norm", bias=True),
        Rule("gpt_neox.final_layer_norm", "output_norm", "H", "norm", bias=True),
        Rule("embed_out", "output", "TH", "output"),
    ),
    before=(
        Field("context_length", "u32", "max_position_embeddings"), Field("embedding_length", "u32", "hidden_size"),
        Field("block_count", "u32", "num_hidden_layers"), Field("feed_forward_length", "u32", "intermediate_size"),
        Field("rope.dimension_count", "u32", "rotary_dim"), Field("attention.head_count", "u32", "num_attention_heads"),
        Field("use_parallel_residual", "bool", "use_parallel_residual"),
        Field("attention.layer_norm_epsilon", "f32", "layer_norm_eps"),
    ),
    after=(),
    defaults={
        "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048, "hidden_act": "gelu",
        "partial_rotary_factor": 0.25, "use_parallel_residual": True, "attention_bias": True,
    },
    rebuilt={
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu", "attention_bias": True,
    },
    fixed={
        "hidden_act": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu"), "attention_bias": (True,),
        "tie_word_embeddings": (False,),  # llama.cpp's gptneox needs an output matrix
    },
    ignored={"hidden_act": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")},
    names={"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
    free_heads=False,
    plain_rope=False,
    complete=_whole_heads,
)  # fmt: skip
