"""LongRoPE: one list of factors for short and one for long texts, as config fields ↔ two GGUF tensors and a key.

Facts: llama.cpp, ``conversion/phi.py`` ``Phi3MiniModel.generate_extra_tensors`` and ``src/llama-model.cpp`` ``get_rope_factors``, which
takes the long list when the *context* is longer than the original one, where transformers goes by the text; transformers 5,
``modeling_rope_utils.py`` ``_compute_longrope_parameters``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qformats.architectures.fields import as_float32, number, positive
from qformats.architectures.rope import full_rope, rope_parameters
from qformats.errors import BadFile, Unsupported

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FACTOR_TENSORS", "attention_keys", "long_factors", "recover_longrope"]

FACTOR_TENSORS = {"rope_factors_long": "long_factor", "rope_factors_short": "short_factor"}
_NAMES = ("longrope", "su", "yarn")  # transformers 5, models/phi3/configuration_phi3.py: three words for the same


def _longrope(full: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rotary parameters if they are LongRoPE's, None if there is nothing but a base frequency; ``Unsupported('rope')`` else."""
    rope = full_rope(rope_parameters(full))
    kind = str(rope.get("rope_type") or "default").lower()
    if kind in ("default", "none"):
        return None
    if kind not in _NAMES:
        raise Unsupported("rope", f"rope type {kind!r} cannot be written to GGUF for this architecture")
    return rope


def long_factors(full: Mapping[str, Any], rotated: int) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors, (rotated / 2,) float32 by base name; none without LongRoPE. ``BadFile('config-field')`` for lists that do not fit."""
    import numpy as np

    rope = _longrope(full)
    if rope is None:
        return {}
    made = {}
    for tensor, name in FACTOR_TENSORS.items():
        listed = rope.get(name)
        if not isinstance(listed, list) or len(listed) != rotated // 2:
            raise BadFile("config-field", f"rope parameters have no list {name!r} of {rotated // 2} factors")
        made[tensor] = np.array([number({name: value}, name) for value in listed], np.float32)
    return made


def attention_keys(full: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """The key for the factor of the scores, which grows with the ratio of the context to the original one."""
    rope = _longrope(full)
    if rope is None:
        return []
    original = positive(full, "original_max_position_embeddings")
    ratio = number(rope, "factor", positive(full, "max_position_embeddings") / original)
    computed = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1.0 else 1.0
    return [("rope.scaling.attn_factor", "f32", as_float32(number(rope, "attention_factor", computed)))]


def recover_longrope(values: Mapping[str, Any], tensors: Mapping[str, Any], theta: float) -> dict[str, Any] | None:
    """The rotary parameters a file's factor tensors stand for, None where there are none."""
    stored = {name: tensors.get(f"{tensor}.weight") for tensor, name in FACTOR_TENSORS.items()}
    if all(tensor is None for tensor in stored.values()):
        return None
    if not all(hasattr(tensor, "array") for tensor in stored.values()):
        raise BadFile("rope-factors", "the values of both rotary factor tensors are needed to rebuild the config")
    lists = {name: [float(value) for value in tensor.array().reshape(-1)] for name, tensor in stored.items() if tensor is not None}
    return {
        "rope_type": "longrope", "rope_theta": number(values, "rope.freq_base", theta), **lists,
        "attention_factor": number(values, "rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": values.get("rope.scaling.original_context_length"),
    }  # fmt: skip
