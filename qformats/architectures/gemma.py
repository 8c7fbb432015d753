"""Gemma: norms stored as weight + 1, two a layer.

Facts: llama.cpp, ``conversion/gemma.py`` ``GemmaModel``, which writes Gemma's end of turn for any vocabulary, and
``src/models/gemma.cpp``; config defaults: transformers 5, ``models/gemma/configuration_gemma.py``, which reads the activation
``gelu`` of old configs as its approximation too.
"""

from __future__ import annotations

from dataclasses import replace

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import HEAD_SIZES, NORM, SIZES
from qformats.architectures.llama import LLAMA

__all__ = ["GEMMA"]

GEMMA = Architecture(
    name="gemma",
    gguf="gemma",
    hf_classes=("GemmaForCausalLM",),
    model_types=("gemma",),
    rules=tuple(
        replace(rule, order="", bias=False, shift=1.0 if rule.kind == "norm" else 0.0) for rule in LLAMA.rules if rule.kind != "output"
    ),
    before=SIZES,
    after=(*NORM, *HEAD_SIZES),
    defaults={
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 8192, "vocab_size": 256000, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh",
    },
    rebuilt={
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "attention_bias": False,
    },
    fixed={
        "hidden_act": ("gelu_pytorch_tanh", "gelu"), "attention_bias": (False,), "use_bidirectional_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    token_ids={"eot": 107},
    plain_rope=False,
    spm_from_json=True,
)  # fmt: skip
