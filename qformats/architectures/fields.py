"""Hyper-parameters, config.json ↔ GGUF keys, as one table read in both directions.

Facts: llama.cpp, ``conversion/base.py`` ``TextModel.set_gguf_parameters`` and the family modules; value types:
``gguf-py/gguf/gguf_writer.py``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qformats.errors import BadFile

if TYPE_CHECKING:
    from qformats.containers.gguf import Metadata

__all__ = [
    "ATTENTION", "EXPERTS", "HEAD_SIZES", "NORM", "SIZES", "Field", "as_float32", "number", "partial_rotary",
    "positive", "read_fields", "rotary_dim", "shortest_float", "text_config",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Field:
    """GGUF key (after the architecture's name), its type, and the config field it is, or the one value it always has.

    ``rotary_dim`` as field is the number of rotated dimensions of a head, ``rope_theta`` the base frequency.
    """

    key: str
    type: str
    config: str = ""
    constant: Any = None


ATTENTION = (
    Field("block_count", "u32", "num_hidden_layers"),
    Field("context_length", "u32", "max_position_embeddings"),
    Field("embedding_length", "u32", "hidden_size"),
    Field("feed_forward_length", "u32", "intermediate_size"),
    Field("attention.head_count", "u32", "num_attention_heads"),
    Field("attention.head_count_kv", "u32", "num_key_value_heads"),
)
SIZES = (  # the same as ATTENTION, in the order of families that do not start from the common keys
    Field("context_length", "u32", "max_position_embeddings"), Field("embedding_length", "u32", "hidden_size"),
    Field("block_count", "u32", "num_hidden_layers"), Field("feed_forward_length", "u32", "intermediate_size"),
    Field("attention.head_count", "u32", "num_attention_heads"), Field("attention.head_count_kv", "u32", "num_key_value_heads"),
)  # fmt: skip
NORM = (Field("attention.layer_norm_rms_epsilon", "f32", "rms_norm_eps"),)
EXPERTS = (Field("expert_count", "u32", "num_experts"), Field("expert_used_count", "u32", "num_experts_per_tok"))
HEAD_SIZES = (Field("attention.key_length", "u32", "head_dim"), Field("attention.value_length", "u32", "head_dim"))


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's fields: those of ``text_config`` over those at the top; ``num_local_experts`` is ``num_experts``."""
    inner = config.get("text_config")
    fields = {**config, **inner} if isinstance(inner, Mapping) else dict(config)
    if fields.get("num_experts") is None and "num_local_experts" in fields:  # transformers 5 saves Qwen3-MoE's under this name
        fields["num_experts"] = fields["num_local_experts"]
    return fields


def positive(config: Mapping[str, Any], name: str) -> int:
    """Give a config field that must be a whole number above zero, else raise ``BadFile('config-field')``."""
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise BadFile(
            "config-field",
            f"config field {name!r} is {value!r}, expected a whole number above zero",
            hint="config.json is incomplete or not that of this checkpoint",
        )
    return value


def number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Give a config field that must be a number above zero, ``default`` where it is absent, else ``BadFile('config-field')``."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise BadFile("config-field", f"config field {name!r} is {value!r}, expected a number above zero")
    return float(value)


def rotary_dim(config: Mapping[str, Any], head_dim: int) -> int:
    """How many dimensions of a head are rotated: ``partial_rotary_factor`` in either spelling, all where there is none."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    stored = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    factor = number({"partial_rotary_factor": stored} if stored is not None else config, "partial_rotary_factor", 1.0)
    made = int(factor * head_dim)
    if not 0 < made <= head_dim or made % 2:
        raise BadFile("config-field", f"partial_rotary_factor {factor} of a head of {head_dim} is no even number of dimensions")
    return made


def partial_rotary(rotated: Any, head_dim: int) -> float:
    """The factor of which ``rotary_dim`` makes ``rotated`` again."""
    if not isinstance(rotated, int) or not 0 < rotated <= head_dim:
        raise BadFile("metadata-value", f"{rotated!r} rotated dimensions do not fit a head of {head_dim}")
    factor = rotated / head_dim
    return factor if int(factor * head_dim) == rotated else math.nextafter(factor, 2.0)


def as_float32(value: float) -> float:
    """Round to float32, as a GGUF stores it."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def shortest_float(value: float) -> float:
    """Give the float with the fewest digits whose float32 is ``value``: what the config said before it was rounded.

    >>> shortest_float(9.999999747378752e-06)
    1e-05
    """
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if as_float32(candidate) == value:
            return candidate
    return value


def read_fields(metadata: Metadata, arch: str) -> dict[str, Any]:
    """Collect the keys of architecture ``arch`` without its prefix, floats in their shortest form."""
    values: dict[str, Any] = {}
    for key, stored in metadata.items():
        if key.startswith(arch + "."):
            value = stored.value
            values[key[len(arch) + 1 :]] = shortest_float(value) if stored.type == "f32" and isinstance(value, float) else value
    return values
