"""Gemma 2: norms stored as weight + 1, four a layer; every other layer slides; scores and logits are capped.

Facts: llama.cpp, ``conversion/gemma.py`` ``Gemma2Model`` and ``src/models/gemma2.cpp``, which always caps both and slides even where
the key of the window is missing; config defaults: transformers 5, ``models/gemma2/configuration_gemma2.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.architectures.binding import Architecture
from qformats.architectures.fields import HEAD_SIZES, NORM, SIZES, Field
from qformats.architectures.gemma3 import GEMMA3
from qformats.architectures.mapping import Rule
from qformats.architectures.sliding import check_score_width, layer_types, pattern_key, sliding_layers
from qformats.errors import Unsupported

__all__ = ["GEMMA2"]

NEEDED = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
PERIOD = 2  # llama.cpp, src/models/gemma2.cpp


def _score_width(full: Mapping[str, Any]) -> int:
    """What llama.cpp divides scores by the root of: the width of a head, with 46 layers (27B) hidden size over heads."""
    if full["num_hidden_layers"] == 46:
        return int(full["hidden_size"]) // int(full["num_attention_heads"])
    return int(full["head_dim"])


def _own_keys(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """The sliding layers where they are not every other one; refuse what llama.cpp would compute otherwise."""
    check_score_width(full, _score_width(full), "gemma2")
    for name in NEEDED:
        if full[name] is None:
            raise Unsupported("config-value", f"config field {name!r} is None; llama.cpp's 'gemma2' always computes with one")
    sliding = sliding_layers(full, PERIOD)
    if not any(sliding):
        raise Unsupported("config-value", "config field 'layer_types' names no sliding layer; llama.cpp's 'gemma2' always has some")
    return pattern_key(sliding, PERIOD)


def _implicit(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    config["layer_types"] = layer_types(values, int(config["num_hidden_layers"]), PERIOD, "gemma2")
    config["query_pre_attn_scalar"] = _score_width(config)


def _is_shared(rule: Rule) -> bool:
    return not rule.hf.endswith(("q_norm", "k_norm")) and rule.kind != "output"


GEMMA2 = Architecture(
    name="gemma2",
    gguf="gemma2",
    hf_classes=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    rules=tuple(rule for rule in GEMMA3.rules if _is_shared(rule)),
    before=SIZES,
    first_own_key="attn_logit_softcapping",
    after=(
        *NORM, *HEAD_SIZES, Field("attn_logit_softcapping", "f32", "attn_logit_softcapping"),
        Field("final_logit_softcapping", "f32", "final_logit_softcapping"),
        Field("attention.sliding_window", "u32", "sliding_window"),
    ),
    defaults={
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 8192, "vocab_size": 256000, "sliding_window": 4096, "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    rebuilt={
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
    },
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,), "use_bidirectional_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    nullable=NEEDED,
    plain_rope=False,
    spm_from_json=True,
    adjust=_implicit,
    own_keys=_own_keys,
)  # fmt: skip
