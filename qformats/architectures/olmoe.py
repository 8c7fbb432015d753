"""OLMoE: Qwen3-MoE's tensors, with norms over all of q and of k as OLMo 2 has them.

Facts: llama.cpp, ``conversion/olmo.py`` ``OlmoeModel`` and ``src/models/olmoe.cpp``, which never rescales the chosen experts' weights,
clips nothing and has as many key-value heads as heads; config defaults: transformers 5, ``models/olmoe/configuration_olmoe.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, EXPERTS, NORM
from qformats.architectures.qwen3_moe import QWEN3_MOE
from qformats.errors import Unsupported

__all__ = ["OLMOE"]

_WIDE = {"q_norm": "Q", "k_norm": "V"}


def _whole_heads(full: dict[str, Any]) -> None:
    """Refuse key-value heads shared by heads; ``Unsupported('config-value')``."""
    heads = full.get("num_attention_heads")
    if full.get("num_key_value_heads", heads) != heads:
        raise Unsupported(
            "config-value",
            f"config field 'num_key_value_heads' is {full['num_key_value_heads']!r}; llama.cpp's 'olmoe' has as many as heads, {heads!r}",
        )


OLMOE = Architecture(
    name="olmoe",
    gguf="olmoe",
    hf_classes=("OlmoeForCausalLM",),
    model_types=("olmoe",),
    rules=tuple(
        replace(rule, bias=False, shape=_WIDE.get(rule.hf.rpartition(".")[2], rule.shape.replace("X", "F"))) for rule in QWEN3_MOE.rules
    ),
    before=ATTENTION,
    after=(*NORM, *EXPERTS),
    defaults={
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "hidden_act": "silu", "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    rebuilt={
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_act": "silu", "attention_bias": False,
        "norm_topk_prob": False, "clip_qkv": None,
    },
    fixed={
        "hidden_act": ("silu", "swish"), "attention_bias": (False,), "norm_topk_prob": (False,), "clip_qkv": (None,),
        "tie_word_embeddings": (False,),  # llama.cpp's olmoe needs an output matrix
    },
    free_heads=False,
    complete=_whole_heads,
)  # fmt: skip
