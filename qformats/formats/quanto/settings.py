"""Quanto's map of quantized layers: read beside the weights, and written there.

Source: ``quantization_map`` in ``quantize.py`` and ``QuantizedTransformersModel`` in ``models/transformers_models.py`` of optimum-quanto
0.2.7. The map is ``{layer: {"weights": "qint4", "activations": "none"}}``; here it is ``{"quant_method": "quanto", "modules": map}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from qformats.errors import BadFile
from qformats.formats.protocol import Match, Target
from qformats.scheme import Storage

__all__ = ["CONFIG_INSIDE", "config_beside", "config_out", "detect", "kind_said", "side_files"]

CONFIG_INSIDE = False
MAP_FILE = "quanto_qmap.json"
QTYPES = ("qint2", "qint4", "qint8", "qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2")


def config_beside(inner: Mapping[str, Any] | None, files: Mapping[str, Mapping[str, Any]]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The config out of the maps; ``BadFile('config-value')`` for a map that is none. The first of two that differ counts."""
    for name, found in files.items():
        for module, entry in found.items():
            if not isinstance(entry, Mapping):
                raise BadFile("config-value", f"{name} says {entry!r} of {module!r}, expected weights and activations")
    maps = [dict(found) for found in files.values()]
    warnings = () if all(found == maps[0] for found in maps) else (f"{' and '.join(files)} differ; the first counts",)
    return {"quant_method": "quanto", "modules": maps[0]}, warnings


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A config whose method is ``quanto``, or none and tensors with Quanto's names."""
    method = str(config.get("quant_method") or "").lower()
    if method:
        return Match("quanto", config) if method == "quanto" else None
    known = set(names)
    scales = {name.removesuffix("_scale") for name in known if name.endswith(".weight._scale")}
    named = any(f"{base}_data" in known or f"{base}_data._data" in known for base in scales)
    return Match("quanto", config) if named and not config else None


def kind_said(config: Mapping[str, Any], module: str) -> str | None:
    """The type that the map gives the weights of ``module``, None where it says nothing."""
    modules = config.get("modules")
    entry = modules.get(module) if isinstance(modules, Mapping) else None
    kind = entry.get("weights") if isinstance(entry, Mapping) else None
    if kind is None or kind == "none":
        return None
    named = "qfloat8_e4m3fn" if kind == "qfloat8" else kind
    if named not in QTYPES:
        raise BadFile("config-value", f"the map says {kind!r} of {module}, expected {', '.join(QTYPES)}", tensor=module)
    return str(named)


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The map of ``modules``; entries of ``original`` that are of other layers (norms with quantized activations) are kept."""
    before = original.get("modules") if original is not None else None
    made = {name: {"weights": "none", **entry} for name, entry in (before or {}).items() if entry.get("weights") == "none"}
    for name, storage in modules.items():
        entry = (before or {}).get(name) or {}
        made[name] = {"weights": storage.type, "activations": entry.get("activations", "none")}
    return {"quant_method": "quanto", "modules": made}


def side_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """The map as its owner writes it."""
    return {MAP_FILE: json.dumps(config.get("modules", {}), indent=4).encode()}
