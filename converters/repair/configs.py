"""config.json: the quantization config in it at all, ``quant_method``, sizes as the tensors have them, fields that loaders need.

Which fields: vllm 0.33.0 ``auto_gptq.py`` and ``auto_awq.py`` ``from_config``, sglang 0.5.23 ``gptq.py``, transformers 5.23.0
``quantizers/auto.py``. Rules of ``dynamic`` for fused layers: vllm 0.33.0 ``utils/gptq_utils.py get_dynamic_override``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from converters.lint.facts import facts_of
from converters.lint.fused import fused_layers
from converters.lint.rules import engine_lists
from converters.repair.mending import Mending
from qformats import registry
from qformats.checkpoint import Checkpoint
from qformats.errors import QFormatError
from qformats.formats.packed import dynamic_rules

__all__ = ["mend_fields", "mend_fused_rules", "mend_sizes", "mend_statement"]

FORMATS = ("gptq", "awq")
_NAMELESS = ("mlx", "modelopt", "hf")  # formats whose config has no quant_method
_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)


def mend_statement(mending: Mending) -> None:
    """The quantization config in config.json, and the method in it, by the names that loaders know."""
    checkpoint, stated = mending.checkpoint, mending.stated
    if checkpoint is None or checkpoint.gguf is not None:
        return
    if stated is None and checkpoint.format in FORMATS and checkpoint.match.config and mending.config:
        mending.config["quantization_config"] = stated = {"quant_method": checkpoint.format, **checkpoint.match.config}
        mending.keep_config()
        mending.mend("quantization-config", "quantization_config written into config.json", "it was only in a file beside it")
    if stated is None:
        return
    said = stated.get("quant_method")
    if not said and checkpoint.format not in _NAMELESS:
        stated["quant_method"] = registry.row(checkpoint.format).methods[0]
        _keep(mending, "quant-method", f"quant_method set to {stated['quant_method']}", "the quantization config names no method")
    elif str(said) == "compressed_tensors":
        stated["quant_method"] = "compressed-tensors"
        _keep(mending, "quant-method", "quant_method set to compressed-tensors", "transformers knows only this spelling")


def _keep(mending: Mending, kind: str, what: str, why: str) -> None:
    mending.keep_config()
    mending.mend(kind, what, why)


def mend_sizes(mending: Mending) -> None:
    """``bits`` and ``group_size`` where every weight contradicts what the config says and all agree among themselves."""
    checkpoint, stated = mending.checkpoint, mending.stated
    if checkpoint is None or stated is None or checkpoint.format not in FORMATS or stated.get("dynamic") or stated.get("extra_config"):
        return
    if not _refuses(checkpoint, {}):
        return
    names = {key: next((k for k in keys if k in stated), keys[0]) for key, keys in _KEYS.items()}
    for wish in _wishes(stated, names):
        if not _refuses(checkpoint, wish):
            before = {key: stated.get(key) for key in wish}
            stated.update(wish)
            words = ", ".join(f"{key} set to {value} (was {before[key]})" for key, value in wish.items() if before[key] != value)
            _keep(mending, "sizes", words, "no weight has the size that the config said, all have this one")
            return


_KEYS = {"bits": ("bits", "w_bit", "wbits"), "group": ("group_size", "q_group_size")}


def _wishes(stated: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Other sizes, first with one of the two kept."""
    bits, group = stated.get(names["bits"]), stated.get(names["group"])
    yield from ({names["bits"]: width, names["group"]: group} for width in range(2, 9) if group is not None)
    yield from ({names["bits"]: bits, names["group"]: size} for size in _GROUPS if bits is not None)
    yield from ({names["bits"]: width, names["group"]: size} for width in range(2, 9) for size in _GROUPS)


def _refuses(checkpoint: Checkpoint, wish: Mapping[str, Any]) -> bool:
    """Whether any weight contradicts the config with ``wish`` in it."""
    config = {**checkpoint.match.config, **wish}
    form = registry.format_module(checkpoint.format)
    try:
        for name, module in checkpoint.modules.items():
            if checkpoint.is_quantized(name):
                form.scheme(replace(module, match=replace(module.match, config=config), memo={}))
    except QFormatError as error:
        return error.code in ("bits-disagree", "group-size", "wrong-shape", "config-disagrees", "config-value")
    return False


def mend_fields(mending: Mending) -> None:
    """``sym``, ``desc_act``, ``bits`` and ``group_size`` (GPTQ), ``zero_point`` (AWQ) where the config leaves them out."""
    checkpoint, stated = mending.checkpoint, mending.stated
    if checkpoint is None or stated is None or stated.get("quant_method") not in FORMATS:
        return
    facts = facts_of(mending.found)
    known = [m for m in facts["modules"] if "problem" not in m]
    if not known or len(known) != len(facts["modules"]):
        return
    added: dict[str, Any] = {}
    if checkpoint.format == "gptq":
        added = {"sym": not facts["asymmetric"], "desc_act": facts["act_order"]}
        added |= {"bits": facts["bits"][0]} if len(facts["bits"]) == 1 else {}
        added |= {"group_size": facts["groups"][0]} if len(facts["groups"]) == 1 else {}
    elif checkpoint.format == "awq":
        added = {"zero_point": all("qzeros" in m["leaves"] for m in known)}
    aliases = {"bits": ("bits",), "group_size": ("group_size",)}
    missing = {key: value for key, value in added.items() if not any(name in stated for name in aliases.get(key, (key,)))}
    if missing:
        stated.update(missing)
        words = ", ".join(f"{key} set to {str(value).lower()}" for key, value in missing.items())
        _keep(mending, "config-fields", words, "loaders ask for them; the tensors have it so")


def mend_fused_rules(mending: Mending) -> None:
    """Rules of ``dynamic`` under the names of layers that vLLM fuses, where the parts agree and no rule means them."""
    checkpoint, stated = mending.checkpoint, mending.stated
    dynamic = stated.get("dynamic") if stated else None
    if checkpoint is None or checkpoint.format != "gptq" or not isinstance(dynamic, dict):
        return
    facts = facts_of(mending.found)
    layers = fused_layers(checkpoint, facts["modules"], engine_lists("vllm")["fused"], facts["architecture"])
    added: dict[str, list[str]] = {}
    rules: dict[str, Any] = {}
    for layer in layers:
        meant = [next(iter(dynamic_rules(stated or {}, part)), "none") for part in layer["parts"]]
        agreed = meant[0] != "none" and all(rule == meant[0] for rule in meant)
        if layer["unruled"] and agreed and not dynamic_rules(stated or {}, layer["name"]):
            key = repr(meant[0])
            added.setdefault(key, []).append(layer["name"])
            rules[key] = meant[0]
    for key, names in added.items():
        pattern = f"^(?:{'|'.join(re.escape(name) for name in names)})$"
        dynamic[f"-:{pattern}" if rules[key] is None else f"+:{pattern}"] = {} if rules[key] is None else dict(rules[key])
    if added:
        every = tuple(name for names in added.values() for name in names)
        mending.keep_config()
        mending.mend("fused-rules", "rules of dynamic written for fused layers too", "vLLM applies them to these names", every)
