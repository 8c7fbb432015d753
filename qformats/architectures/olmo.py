"""OLMo: Llama's names and row order without any norm weights; queries, keys and values clipped in some models.

Facts: llama.cpp, ``conversion/olmo.py`` ``OlmoModel`` and ``src/models/olmo.cpp``; config defaults: transformers 5,
``models/olmo/configuration_olmo.py``, whose norm has this one epsilon.
"""

from __future__ import annotations

from dataclasses import replace

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, Field
from qformats.architectures.llama import LLAMA

__all__ = ["OLMO"]

OLMO = Architecture(
    name="olmo",
    gguf="olmo",
    hf_classes=("OlmoForCausalLM",),
    model_types=("olmo",),
    rules=tuple(replace(rule, bias=False) for rule in LLAMA.rules if rule.kind != "norm"),
    before=ATTENTION,
    first_own_key="attention.layer_norm_epsilon",
    after=(Field("attention.layer_norm_epsilon", "f32", constant=1e-5), Field("attention.clamp_kqv", "f32", "clip_qkv")),
    defaults={"rope_theta": 10000.0, "max_position_embeddings": 2048, "hidden_act": "silu"},
    rebuilt={"architectures": ["OlmoForCausalLM"], "model_type": "olmo", "hidden_act": "silu", "attention_bias": False},
    fixed={"hidden_act": ("silu", "swish"), "attention_bias": (False,)},  # the output projection's bias has no place in llama.cpp's olmo
    free_heads=False,
)
