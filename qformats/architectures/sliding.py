"""Which layers attend to a sliding window: config fields ↔ GGUF keys, for families with layers of both kinds.

Facts: llama.cpp, ``src/llama-model.cpp`` ``load_swa_pattern``: the key holds one bool a layer or a period; without it every family has
a period of its own, whose last layer attends to everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.errors import BadFile, Unsupported

__all__ = ["PATTERN_KEY", "check_score_width", "layer_types", "pattern_key", "sliding_layers"]

PATTERN_KEY = "attention.sliding_window_pattern"


def _periodic(period: int, layers: int) -> list[bool]:
    return [bool(period == 0 or (layer + 1) % period) for layer in range(layers)]


def sliding_layers(full: Mapping[str, Any], period: int) -> list[bool]:
    """Which layers slide by ``layer_types``, else by a period in the config, else by ``period``; ``BadFile('config-field')``."""
    layers, types = int(full["num_hidden_layers"]), full.get("layer_types")
    if types is None:
        found = full.get("sliding_window_pattern", full.get("_sliding_window_pattern", period))
        return _periodic(found if isinstance(found, int) else period, layers)
    if isinstance(types, list) and len(types) == layers and all(kind in ("sliding_attention", "full_attention") for kind in types):
        return [kind == "sliding_attention" for kind in types]
    raise BadFile("config-field", f"config field 'layer_types' does not name sliding or full attention for {layers} layers")


def pattern_key(sliding: list[bool], period: int) -> list[tuple[str, str, Any]]:
    """The key for layers that do not follow the family's ``period``, nothing for those that do."""
    return [] if sliding == _periodic(period, len(sliding)) else [(PATTERN_KEY, "[bool]", sliding)]


def layer_types(values: Mapping[str, Any], layers: int, period: int, family: str) -> list[str]:
    """``layer_types`` of a config by the GGUF's values; ``BadFile('metadata-value')`` if they are too few."""
    pattern = values.get(PATTERN_KEY, period)
    sliding = _periodic(pattern, layers) if isinstance(pattern, int) else [bool(flag) for flag in pattern]
    if len(sliding) < layers:
        raise BadFile("metadata-value", f"{family}.{PATTERN_KEY} has {len(sliding)} values for {layers} layers")
    return ["sliding_attention" if flag else "full_attention" for flag in sliding[:layers]]


def check_score_width(full: Mapping[str, Any], width: int, family: str) -> None:
    """Refuse a score scale other than the root of ``width``, the one that llama.cpp computes."""
    wanted = full.get("query_pre_attn_scalar", 256)
    if wanted != width:
        raise Unsupported(
            "config-value", f"config field 'query_pre_attn_scalar' is {wanted!r}; llama.cpp's {family!r} always computes with {width}"
        )
