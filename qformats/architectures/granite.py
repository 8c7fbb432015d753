"""Granite 3 dense: Llama's names and row order, with four multipliers in the metadata.

Facts: llama.cpp, ``conversion/granite.py`` ``GraniteModel`` and ``src/models/granite.cpp``; config defaults: transformers 5,
``models/granite/configuration_granite.py``. Both divide logits by ``logits_scaling`` and multiply scores by ``attention_multiplier``.
"""

from __future__ import annotations

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, NORM, Field
from qformats.architectures.llama import LLAMA

__all__ = ["GRANITE"]

GRANITE = Architecture(
    name="granite",
    gguf="granite",
    hf_classes=("GraniteForCausalLM",),
    model_types=("granite",),
    rules=LLAMA.rules,
    before=ATTENTION,
    first_own_key="vocab_size",
    after=(
        *NORM, Field("vocab_size", "u32", "vocab_size"), Field("rope.dimension_count", "u32", "rotary_dim"),
        Field("attention.scale", "f32", "attention_multiplier"), Field("embedding_scale", "f32", "embedding_multiplier"),
        Field("residual_scale", "f32", "residual_multiplier"), Field("logit_scale", "f32", "logits_scaling"),
    ),
    defaults={
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048, "hidden_act": "silu", "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
    },
    rebuilt={"architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_act": "silu"},
    fixed={"hidden_act": ("silu", "swish")},
    free_heads=False,
    rope_factors="llama3",
    llama_vocabulary=True,
)  # fmt: skip
