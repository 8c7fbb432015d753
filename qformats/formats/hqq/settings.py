"""The configuration of HQQ checkpoints: how one is recognised, and what is written.

Source: ``HqqConfig`` in ``utils/quantization_config.py`` of transformers 5.23, ``name_to_linear_tag`` in ``models/base.py`` of hqq 0.2.8.
The layers' own tensors say all there is; the config is for their owner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from qformats.formats.hqq.state import PLANES, SCALARS
from qformats.formats.protocol import Match, Module, Target
from qformats.scheme import Storage

__all__ = ["SUFFIXES", "config_out", "detect", "linear_tag", "module_warnings"]

_NESTED = ("scale", "zero", *SCALARS)
SUFFIXES: frozenset[str] = frozenset({*PLANES, *SCALARS, *(f"meta_{leaf}.{inner}" for leaf in ("scale", "zero") for inner in _NESTED)})
_KEYS = ("nbits", "channel_wise", "group_size", "optimize", "round_zero", "axis", "view_as_float")


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A config whose method is ``hqq``, or no config and layers that hold ``W_q`` and ``nbits``."""
    method = str(config.get("quant_method") or "").lower()
    if method:
        return Match("hqq", config) if method == "hqq" else None
    if config:
        return None
    known = set(names)
    codes = [name for name in known if name.endswith(".W_q")]
    return Match("hqq", config) if any(name.removesuffix("W_q") + "nbits" in known for name in codes) else None


def linear_tag(module: str) -> str:
    """The name under which HQQ configures a layer: its path without ``model``, ``layers`` and numbers."""
    return ".".join(word for word in module.split(".") if word not in ("model", "layers") and not word.isnumeric())


def module_warnings(module: Module) -> tuple[str, ...]:
    """What a user should know of how ``module`` was understood."""
    from qformats.formats.hqq.state import layer

    found = layer(module)
    stored = {raw.dtype for raw in (found.scale, found.zero) if raw.dtype.startswith(("F", "B"))}
    if stored - {found.compute}:
        return (f"scales stored as {', '.join(sorted(stored))} are read as {found.compute}, the layer's compute dtype",)
    return ()


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The original config where there is one; else one setting for all layers, or one for each linear tag where they differ."""
    if original is not None:
        return dict(original)
    tags: dict[str, Counter[tuple[Any, ...]]] = {}
    for name, storage in sorted(modules.items()):
        state = storage.options.get("state")
        values = state if isinstance(state, Mapping) else {}
        tags.setdefault(linear_tag(name), Counter())[tuple(values.get(key) for key in _KEYS)] += 1
    chosen = {tag: _settings(found.most_common(1)[0][0]) for tag, found in tags.items()}
    distinct = {str(value) for value in chosen.values()}
    return {
        "quant_config": next(iter(chosen.values())) if len(distinct) == 1 else chosen,
        "quant_method": "hqq",
        "skip_modules": sorted({linear_tag(name) if "layers" in name else name for name in skipped}) or ["lm_head"],
    }


def _settings(values: tuple[Any, ...]) -> dict[str, Any]:
    weights = dict(zip(_KEYS, values, strict=True))
    return {"weight_quant_params": weights, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
