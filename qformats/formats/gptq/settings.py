"""A GPTQ quantization config read and written: detection, per-module settings (``dynamic``, ``extra_config``), and the config of an output.

Fields and defaults: gptqmodel 7.7.0 ``quantization/config.py``, auto-gptq 0.7.1 ``quantization/config.py``, auto-round 0.16.1.
Torch-free.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qformats.errors import BadFile, Unsupported
from qformats.formats import autoround
from qformats.formats.protocol import Match, Target
from qformats.scheme import Storage

__all__ = ["Settings", "config_out", "detect", "module_settings", "reconcile", "side_files"]

LABELS = ("gptq", "gptq_v2", "gptq_p")
_REFUSED = {
    "marlin": "Marlin-repacked weights; convert them back with the library that wrote them",
    "marlin_24": "2:4 sparse Marlin weights",
    "bitblas": "BitBLAS weights, whose layout depends on the compiler that made them",
    "qqq": "QQQ W4A8 weights",
}
_CHECKED = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "dynamic", "quant_method", "lm_head")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a config says of one module. ``bits`` and ``group`` may be None (unsaid); ``group`` -1 is the whole row.

    ``label``: ``gptq`` (zero points stored minus one), ``gptq_v2`` or ``gptq_p`` (stored as they are). ``rule_bits``: widths of every rule
    that matches, for configs whose rule order was lost. ``skipped``: a rule leaves the module dense.
    """

    bits: int | None
    group: int | None
    sym: bool | None
    label: str
    rule_bits: tuple[int, ...] = ()
    skipped: bool = False


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A GPTQ checkpoint by its config, or without one by its ``g_idx`` tensors; ``Unsupported`` for Marlin, BitBLAS and QQQ."""
    method = str(config.get("quant_method") or config.get("method") or "").lower()
    if autoround.is_autoround(config):
        return Match("gptq", config, autoround.DIALECT) if autoround.packing(config) in LABELS else None
    if method in _REFUSED:
        raise Unsupported(f"gptq-{method}", f"the checkpoint holds {_REFUSED[method]}")
    if method == "gptq" or (not method and config and _is_old_config(config)):
        _label(config)
        return Match("gptq", config)
    if not config and any(name.endswith(".g_idx") for name in names):
        return Match("gptq", config, warnings=("no quantization config: bits and groups are taken from the tensors' shapes",))
    return None


def _is_old_config(config: Mapping[str, Any]) -> bool:
    """AutoGPTQ before 0.6 wrote ``quantize_config.json`` without a method name."""
    return "desc_act" in config and ("bits" in config or "wbits" in config) and "version" not in config


def _label(config: Mapping[str, Any]) -> str:
    if autoround.is_autoround(config):
        return autoround.packing(config)
    if config.get("is_marlin_format"):
        raise Unsupported("gptq-marlin", f"the checkpoint holds {_REFUSED['marlin']}")
    first, second = config.get("checkpoint_format"), config.get("format")
    if first is not None and second is not None and first != second:
        raise BadFile("config-disagrees", f"checkpoint_format is {first!r} but format is {second!r}")
    label = str(first or second or "gptq").lower()
    if label in _REFUSED:
        raise Unsupported(f"gptq-{label}", f"the checkpoint holds {_REFUSED[label]}")
    if label not in LABELS:
        raise Unsupported("gptq-version", f"GPTQ checkpoint format {label!r} is not known", hint=f"known: {', '.join(LABELS)}")
    return label


def _integer(config: Mapping[str, Any], keys: Sequence[str], lowest: int, highest: int) -> int | None:
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not (lowest <= value <= highest) or value == 0:
            raise BadFile("config-value", f"{key} is {value!r}, expected an integer {lowest} … {highest} other than 0")
        return value
    return None


def _truth(config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadFile("config-value", f"{key} is {value!r}, expected true or false")
    return value


def _rules(config: Mapping[str, Any], name: str) -> list[Mapping[str, Any] | None]:
    """Every entry of ``dynamic`` that matches ``name``, in the file's order; None for a negative rule (``-:``)."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise BadFile("config-value", f"dynamic is {type(dynamic).__name__}, expected an object")
    found: list[Mapping[str, Any] | None] = []
    for key, value in dynamic.items():
        negative = key.startswith("-:")
        pattern = key[2:] if key[:2] in ("-:", "+:") else key
        try:
            matches = pattern == name or re.match(pattern, name) is not None
        except re.error as error:
            raise BadFile("config-value", f"dynamic rule {key!r} is not a regular expression: {error}") from None
        if matches:
            if not negative and not isinstance(value, Mapping):
                raise BadFile("config-value", f"dynamic rule {key!r} is {type(value).__name__}, expected an object")
            found.append(None if negative else value)
    return found


def module_settings(config: Mapping[str, Any], name: str) -> Settings:
    """Resolve a config for module ``name``: the first matching rule of ``dynamic`` or AutoRound's ``extra_config`` wins."""
    rules = _rules(config, name)
    extra = autoround.override(config, name)
    rule: Mapping[str, Any] = rules[0] or {} if rules else extra
    bits = _integer(rule, ("bits",), 1, 32) or _integer(config, ("bits", "wbits", "w_bit"), 1, 32)
    group = _integer(rule, ("group_size",), -1, 1 << 31) or _integer(config, ("group_size", "q_group_size"), -1, 1 << 31)
    sym = _truth(rule, "sym")
    if sym is None:
        sym = _truth(config, "sym")
    if sym is None and _truth(config, "zero_point") is not None:
        sym = not config["zero_point"]
    widths = tuple(r["bits"] for r in rules if r is not None and isinstance(r.get("bits"), int))
    skipped = (bool(rules) and rules[0] is None) or (isinstance(extra.get("bits"), int) and extra["bits"] >= 16)
    return Settings(bits, group, sym, _label(config), widths, skipped)


def producer_is_gptqmodel(config: Mapping[str, Any]) -> bool:
    """Whether ``meta.quantizer`` names GPTQModel, whose zero-point arithmetic works on whole words."""
    meta = config.get("meta")
    named = meta.get("quantizer") if isinstance(meta, Mapping) else None
    entries = named if isinstance(named, list | tuple) else [named]
    return any(str(entry).lower().startswith("gptqmodel") for entry in entries if entry)


def reconcile(config_json: Mapping[str, Any] | None, quantize_config: Mapping[str, Any] | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """One config out of ``config.json``'s ``quantization_config`` and ``quantize_config.json``, and warnings where they differ.

    ``quantize_config.json`` wins, because its ``dynamic`` keeps the order of its rules, and the first rule that matches counts
    (transformers sorts nested keys when it writes config.json). Keys that only one of them has are kept.
    """
    if not config_json or not quantize_config:
        return dict(quantize_config or config_json or {}), ()
    both = [key for key in _CHECKED if key in config_json and key in quantize_config]
    warnings = tuple(
        f"config.json says {key} = {config_json[key]!r}, quantize_config.json says {quantize_config[key]!r}; the latter is used"
        for key in both
        if config_json[key] != quantize_config[key]
    )
    merged = dict(quantize_config)
    merged.update({key: value for key, value in config_json.items() if key not in merged})
    return merged, warnings


def _version() -> str:
    try:
        return version("qformats")
    except PackageNotFoundError:
        return "0"


def _describes(original: Mapping[str, Any], modules: Mapping[str, Storage], skipped: Sequence[str]) -> bool:
    """Whether ``original`` still says the truth of every module."""
    if detect(original, ()) is None:
        return False
    dialect = autoround.DIALECT if autoround.is_autoround(original) else ""
    for name, storage in modules.items():
        said = module_settings(original, name)
        group = -1 if storage.group is None else storage.group
        if said.skipped or said.bits != storage.grid.bits or storage.options.get("dialect", "") != dialect:
            return False
        if said.group != group and not (group == -1 and storage.options.get("one_group")):
            return False
        if said.label != storage.options.get("checkpoint_format") or (said.sym is True and not isinstance(storage.zero_point, int)):
            return False
    head = bool(original.get("lm_head"))
    return head == any(_is_head(name) for name in modules) or bool(dialect) or _head_by_rule(original, skipped)


def _is_head(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == "lm_head"


def _head_by_rule(original: Mapping[str, Any], skipped: Sequence[str]) -> bool:
    """``lm_head: true`` beside a negative rule for it."""
    heads = [name for name in skipped if _is_head(name)]
    return bool(heads) and all(module_settings(original, name).skipped for name in heads)


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Sequence[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The ``quantization_config`` of an output.

    ``original`` is returned as it was if it still describes every module. Otherwise: the commonest (bits, group) become the defaults, one
    ``dynamic`` rule for each other pair and one negative rule for the linears left dense, names escaped and joined, negatives first.
    """
    if original is not None and _describes(original, modules, skipped):
        return dict(original)
    pairs = Counter((s.grid.bits, -1 if s.group is None else s.group) for s in modules.values())
    ordered = sorted(pairs, key=lambda pair: (-pairs[pair], pair))
    bits, group = ordered[0] if ordered else (4, 128)
    labels = {str(s.options.get("checkpoint_format", "gptq")) for s in modules.values()} or {"gptq"}
    if len(labels) > 1:
        raise Unsupported("gptq-mixed-labels", f"one checkpoint cannot hold {' and '.join(sorted(labels))} zero points")
    label = labels.pop()
    dense = sorted(name for name in skipped if not _is_head(name))
    dynamic: dict[str, Any] = {f"-:{_alternation(dense)}": {}} if dense else {}
    for other in ordered[1:]:
        names = sorted(n for n, s in modules.items() if (s.grid.bits, -1 if s.group is None else s.group) == other)
        dynamic[f"+:{_alternation(names)}"] = {"bits": other[0], "group_size": other[1]}
    config = {
        "bits": bits,
        "group_size": group,
        "desc_act": any(bool(s.options.get("act_order")) for s in modules.values()),
        "sym": all(isinstance(s.zero_point, int) for s in modules.values()),
        "lm_head": any(_is_head(name) for name in modules),
        "quant_method": "gptq",
        "checkpoint_format": label,
        "format": label,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"qformats:{_version()}"]},
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def _alternation(names: Sequence[str]) -> str:
    return f"^(?:{'|'.join(re.escape(name) for name in names)})$"


def side_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Files beside config.json that hold the same config: ``quantize_config.json`` (AutoRound: ``quantization_config.json``)."""
    name = "quantization_config.json" if autoround.is_autoround(config) else "quantize_config.json"
    return {name: json.dumps(config, indent=2, ensure_ascii=False).encode()}
