"""Command R and R+ (Cohere): one norm a block, attention and feed forward side by side, scaled logits; q and k norms in R+.

Facts: llama.cpp, ``conversion/command_r.py`` ``CommandR2Model`` and ``src/models/command-r.cpp``, which has norms on q and k in models of
64 layers and more, and in no others; config defaults: transformers 5, ``models/cohere/configuration_cohere.py``. Both rotate
neighbouring pairs, so no row moves. The output matrix is the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qformats.architectures.cohere2 import COHERE2
from qformats.architectures.fields import ATTENTION, Field, positive
from qformats.architectures.mapping import Rule
from qformats.architectures.rope import full_rope, rope_parameters
from qformats.errors import Unsupported

__all__ = ["COMMAND_R"]

LAYER = "model.layers.{i}."
_DEEP = 64  # llama.cpp, src/models/command-r.cpp


def _derive(full: dict[str, Any]) -> None:
    """The context that the model was trained on, where the config says it; refuse norms that llama.cpp would not read."""
    full["max_position_embeddings"] = full.get("model_max_length", full["max_position_embeddings"])
    layers = positive(full, "num_hidden_layers")
    if bool(full["use_qk_norm"]) != (layers >= _DEEP):
        raise Unsupported(
            "config-value", f"config field 'use_qk_norm' is {full['use_qk_norm']!r} in a model of {layers} layers; "
            f"llama.cpp's 'command-r' has norms on q and k from {_DEEP} layers on",
        )  # fmt: skip


def _own_keys(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Nothing; refuse a scaled rotation, which llama.cpp would not compute."""
    kind = full_rope(rope_parameters(full)).get("rope_type") or "default"
    if kind != "default":
        raise Unsupported("rope", f"rope type {kind!r} cannot be written to GGUF for this architecture")
    return []


COMMAND_R = replace(
    COHERE2,
    name="command_r",
    gguf="command-r",
    hf_classes=("CohereForCausalLM",),
    model_types=("cohere",),
    rules=(
        *COHERE2.rules[:-1],
        Rule(LAYER + "self_attn.q_norm", "blk.{i}.attn_q_norm", "AD", "norm", when="use_qk_norm"),
        Rule(LAYER + "self_attn.k_norm", "blk.{i}.attn_k_norm", "GD", "norm", when="use_qk_norm"),
        COHERE2.rules[-1],
    ),
    before=ATTENTION,
    first_own_key="logit_scale",
    after=(
        Field("attention.layer_norm_epsilon", "f32", "layer_norm_eps"), Field("logit_scale", "f32", "logit_scale"),
        Field("rope.scaling.type", "str", constant="none"),
    ),
    defaults={
        "layer_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192, "hidden_act": "silu", "logit_scale": 0.0625,
        "tie_word_embeddings": True, "use_qk_norm": False,
    },
    rebuilt={"architectures": ["CohereForCausalLM"], "model_type": "cohere", "hidden_act": "silu", "attention_bias": False},
    fixed={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "tie_word_embeddings": (True,)},
    nullable=(),
    adjust=None,
    complete=_derive,
    own_keys=_own_keys,
)  # fmt: skip
