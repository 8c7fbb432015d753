"""Matrices that an engine puts into one: where its parts do not agree, or rules by name do not mean the same of whole and parts.

vLLM and SGLang load ``q_proj``, ``k_proj``, ``v_proj`` into one ``qkv_proj``, ``gate_proj`` and ``up_proj`` into one ``gate_up_proj``, and
so on: which, the engine's JSON says under ``fused``, by architecture (``*``: any). One such layer has one quantization.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qformats.checkpoint import Checkpoint
from qformats.formats.packed import dynamic_rules

__all__ = ["fused_layers"]


def fused_layers(checkpoint: Checkpoint, modules: list[dict[str, Any]], tables: list[dict[str, Any]], architecture: str | None
                 ) -> list[dict[str, Any]]:
    """Every fused layer with ``name``, ``parts``, ``differ`` (in codes or not, or in what), ``unruled`` (rules say something else of it).

    ``tables``: the engine's ``fused``; ``modules``: of the facts.
    """
    table: Mapping[str, list[str]] | None = next(
        (row["parts"] for row in tables if architecture in row["architectures"] or "*" in row["architectures"]), None
    )
    if table is None or checkpoint.gguf is not None:
        return []
    kinds = {m["name"]: (m.get("type"), m.get("bits"), m.get("group"), m.get("symmetric")) for m in modules}
    return list(_layers(checkpoint, kinds, table))


def _layers(checkpoint: Checkpoint, kinds: Mapping[str, Any], table: Mapping[str, list[str]]) -> Iterator[dict[str, Any]]:
    rules = checkpoint.match.config if isinstance(checkpoint.match.config.get("dynamic"), dict) else {}
    for whole, parts in table.items():
        first = parts[0]
        for name in checkpoint.modules:
            if name != first and not name.endswith(f".{first}"):
                continue
            base = name[: len(name) - len(first)]
            names = [f"{base}{part}" for part in parts if f"{base}{part}" in checkpoint.modules]
            if len(names) < 2:
                continue
            made: dict[str, Any] = {"name": f"{base}{whole}", "parts": names, "differ": _difference(names, kinds), "unruled": False}
            if rules and made["differ"] is None and ".experts." not in base:  # all experts are one layer, of their own module's name
                made["unruled"] = any(_meant(rules, made["name"]) != _meant(rules, part) for part in names)
            yield made


def _meant(config: Mapping[str, Any], name: str) -> object:
    """What the first rule of ``dynamic`` that matches says; None where none does."""
    return next(iter(dynamic_rules(config, name)), "none")


def _difference(names: list[str], kinds: Mapping[str, Any]) -> str | None:
    packed = [name for name in names if name in kinds]
    if not packed:
        return None
    if len(packed) < len(names):
        dense = next(name for name in names if name not in kinds)
        return f"{packed[0].rsplit('.', 1)[-1]} is in codes, {dense.rsplit('.', 1)[-1]} is not"
    other = next((name for name in names[1:] if kinds[name] != kinds[names[0]]), None)
    if other is None:
        return None
    return f"{names[0].rsplit('.', 1)[-1]} is {kinds[names[0]][0]}, {other.rsplit('.', 1)[-1]} is {kinds[other][0]}"
