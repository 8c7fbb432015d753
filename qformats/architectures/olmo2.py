"""OLMo 2: norms behind attention and feed forward instead of before them, and over all of q and of k.

Facts: llama.cpp, ``conversion/olmo.py`` ``Olmo2Model`` and ``src/models/olmo2.cpp``; config defaults: transformers 5,
``models/olmo2/configuration_olmo2.py``. A GGUF of this name with a sliding window is OLMo 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, NORM
from qformats.architectures.mapping import Rule
from qformats.errors import Unsupported

__all__ = ["OLMO2"]

LAYER = "model.layers.{i}."


def _refuse_olmo3(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    if values.get("attention.sliding_window"):
        raise Unsupported("architecture", "GGUF architecture 'olmo2' with a sliding window is OLMo 3, which is not supported")


OLMO2 = Architecture(
    name="olmo2",
    gguf="olmo2",
    hf_classes=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    rules=(
        Rule("model.embed_tokens", "token_embd", "TH", "embedding"),
        Rule(LAYER + "self_attn.q_proj", "blk.{i}.attn_q", "QH"),
        Rule(LAYER + "self_attn.k_proj", "blk.{i}.attn_k", "VH"),
        Rule(LAYER + "self_attn.v_proj", "blk.{i}.attn_v", "VH"),
        Rule(LAYER + "self_attn.o_proj", "blk.{i}.attn_output", "HQ"),
        Rule(LAYER + "self_attn.q_norm", "blk.{i}.attn_q_norm", "Q", "norm"),
        Rule(LAYER + "self_attn.k_norm", "blk.{i}.attn_k_norm", "V", "norm"),
        Rule(LAYER + "mlp.gate_proj", "blk.{i}.ffn_gate", "FH"),
        Rule(LAYER + "mlp.up_proj", "blk.{i}.ffn_up", "FH"),
        Rule(LAYER + "mlp.down_proj", "blk.{i}.ffn_down", "HF"),
        Rule(LAYER + "post_attention_layernorm", "blk.{i}.post_attention_norm", "H", "norm"),
        Rule(LAYER + "post_feedforward_layernorm", "blk.{i}.post_ffw_norm", "H", "norm"),
        Rule("model.norm", "output_norm", "H", "norm"),
        Rule("lm_head", "output", "TH", "output"),
    ),
    before=ATTENTION,
    after=NORM,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048, "hidden_act": "silu"},
    rebuilt={"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "hidden_act": "silu", "attention_bias": False},
    fixed={
        "hidden_act": ("silu", "swish"), "attention_bias": (False,),  # the output projection's bias has no place in llama.cpp's olmo2
        "tie_word_embeddings": (False,),  # llama.cpp's olmo2 needs an output matrix
    },
    free_heads=False,
    adjust=_refuse_olmo3,
)  # fmt: skip
