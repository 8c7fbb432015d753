"""SmolLM3: Llama's names and row order; every fourth layer leaves positions out.

Facts: llama.cpp, ``conversion/llama.py`` ``SmolLM3Model`` and ``src/models/smollm3.cpp``, which has no key for the layers without
positions and reads no rotary factors; config defaults: transformers 5, ``models/smollm3/configuration_smollm3.py``. The row order is
that of all layers, with positions or without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import ATTENTION, HEAD_SIZES, NORM, Field
from qformats.architectures.llama import LLAMA
from qformats.errors import Unsupported

__all__ = ["SMOLLM3"]

STEP = 4  # llama.cpp, src/models/smollm3.cpp n_no_rope_layer_step


def _check_positions(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Refuse layers with positions other than three of four, and sliding windows."""
    layers = int(full["num_hidden_layers"])
    wanted = [int((layer + 1) % STEP != 0) for layer in range(layers)]
    if full.get("no_rope_layers", wanted)[:layers] != wanted or full.get("no_rope_layer_interval", STEP) != STEP:
        raise Unsupported("config-value", f"config field 'no_rope_layers' is not every {STEP}th layer, as llama.cpp's 'smollm3' computes")
    return []


SMOLLM3 = Architecture(
    name="smollm3",
    gguf="smollm3",
    hf_classes=("SmolLM3ForCausalLM",),
    model_types=("smollm3",),
    rules=tuple(replace(rule, bias=False) for rule in LLAMA.rules),
    before=ATTENTION,
    first_own_key="vocab_size",
    after=(*NORM, *HEAD_SIZES, Field("vocab_size", "u32", "vocab_size"), Field("rope.dimension_count", "u32", "rotary_dim")),
    defaults={
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 2000000.0, "max_position_embeddings": 32768, "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
    rebuilt={
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "use_sliding_window": False,
    },
    fixed={
        "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),  # llama.cpp has no place for most of them
        "use_sliding_window": (False,),
    },
    writes_head_dim=False,
    llama_vocabulary=True,
    own_keys=_check_positions,
)  # fmt: skip
