"""AutoRound's spelling of GPTQ and AWQ as a table: which packing a config names, and its per-layer overrides. Not a format itself.

auto-round 0.16.1 writes ``quant_method: "auto-round"`` with ``packing_format`` (``export/export_to_autoround/export.py``); its loader
(``inference/convert_model.py``, ``inference/backend.py``) takes a missing one as ``auto_round:auto_gptq``. Older files say
``intel/auto-round`` and put the value into ``backend``.

| packing | planes | zero points | g_idx |
|---|---|---|---|
| ``auto_round:auto_gptq`` (``auto_round:gptq``, ``auto``, missing) | GPTQ | stored z - 1 (0 stays 0) | absent |
| ``auto_round`` | GPTQ | stored z | absent |
| ``auto_round:gptqmodel`` | GPTQ | stored z | present |
| ``auto_round:auto_awq`` (``auto_round:awq``) | AWQ GEMM | stored z | absent |

``auto_round:llm_compressor`` (and ``…_nvfp4_e5m3``), ``auto_round:fp8_static`` and ``auto_round:fake`` are refused by name: their tensors
are compressed-tensors', 8-bit floats, and plain floats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qformats.errors import BadFile, Unsupported

__all__ = ["DIALECT", "is_autoround", "override", "packing"]

DIALECT = "auto-round"
_METHODS = {"auto-round", "auto_round", "autoround", "intel/auto-round"}
_PACKINGS = {
    "": "gptq", "auto": "gptq", "auto_gptq": "gptq", "auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq",
    "auto_round:gptq:exllamav2": "gptq", "auto_round:auto_gptq:exllamav2": "gptq",
    "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq", "auto_round:awq": "awq", "auto_round:awq:gemm": "awq", "auto_awq": "awq",
}  # fmt: skip

_REFUSED = {
    "auto_round:llm_compressor": "compressed-tensors planes",
    "auto_round:llm_compressor_nvfp4_e5m3": "compressed-tensors planes of NVFP4 with wide scales",
    "auto_round:fp8_static": "8-bit floats with static activation scales",
    "auto_round:fake": "floats that were rounded, not packed",
}


def is_autoround(config: Mapping[str, Any]) -> bool:
    """Whether a quantization config is AutoRound's own (not its plain GPTQ or AWQ export)."""
    return str(config.get("quant_method", "")).lower() in _METHODS


def packing(config: Mapping[str, Any]) -> str:
    """``"gptq"`` (v1 zeros), ``"gptq_v2"`` or ``"awq"``; ``Unsupported`` for float, activation-quantized and unknown packings."""
    named = str(config.get("packing_format") or config.get("backend") or "").lower()
    if named in _REFUSED:
        raise Unsupported("autoround-packing", f"AutoRound packing {named!r} holds {_REFUSED[named]}", hint="integer weights can be read")
    data_type = str(config.get("data_type", "int"))
    if not data_type.startswith("int"):
        raise Unsupported("autoround-data-type", f"AutoRound data type {data_type!r} is not an integer grid")
    act_bits = config.get("act_bits")
    if isinstance(act_bits, int) and act_bits < 16:
        raise Unsupported("activation-quantized", f"AutoRound model with {act_bits}-bit activations", hint="weight-only models can be read")
    if named in _PACKINGS:
        return _PACKINGS[named]
    if named in ("auto_round:exllamav2", "auto_round:tritonv2", "auto_round:marlin") and config.get("sym") is True:
        return "gptq_v2"  # kernel names of old releases: symmetric zero points tell their own convention
    raise Unsupported("autoround-packing", f"AutoRound packing {named!r} is not known", hint="known: " + ", ".join(sorted(_PACKINGS)[1:]))


def override(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """``extra_config``'s entry for module ``name``: its exact key, else the first regex that is found in the name, else nothing."""
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise BadFile("config-value", f"extra_config is {type(extra).__name__}, expected an object")
    found: Any = extra.get(name)
    if found is None:
        found = next((value for key, value in extra.items() if value and _search(str(key), name)), {})
    if not isinstance(found, Mapping):
        raise BadFile("config-value", f"extra_config of {name!r} is {type(found).__name__}, expected an object")
    return found


def _search(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:  # the library skips keys that are no regex, too: they are plain names of other modules
        return False
