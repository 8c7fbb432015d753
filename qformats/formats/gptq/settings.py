"""A GPTQ quantization config read and written: detection, per-module settings (``dynamic``, ``extra_config``), and the config of an output.

Fields and defaults: gptqmodel 7.7.0 ``quantization/config.py``, auto-gptq 0.7.1 ``quantization/config.py``, auto-round 0.16.1.
Torch-free.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qformats.errors import BadFile, Unsupported
from qformats.formats import autoround
from qformats.formats.gptq.fused import with_fused
from qformats.formats.packed import bool_field, dynamic_rules, int_field, says_group, tool_version
from qformats.formats.protocol import Match, Target
from qformats.scheme import Storage

__all__ = ["Settings", "config_beside", "config_out", "detect", "harmonize", "module_settings", "reconcile", "side_files"]

LABELS = ("gptq", "gptq_v2", "gptq_p", "marlin")
_REFUSED = {
    "marlin_24": "2:4 sparse Marlin weights",
    "gptq_marlin_24": "2:4 sparse Marlin weights",
    "bitblas": "BitBLAS weights, whose layout depends on the compiler that made them",
    "qqq": "QQQ W4A8 weights",
}
_CHECKED = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "dynamic", "quant_method", "lm_head")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a config says of one module. ``bits`` and ``group`` may be None (unsaid); ``group`` -1 is the whole row.

    ``label``: ``gptq`` (zero points stored minus one), ``gptq_v2`` or ``gptq_p`` (stored as they are), ``marlin`` (none stored).
    ``rule_bits``: widths of every rule that matches, for configs whose rule order was lost. ``skipped``: a rule leaves the module dense.
    ``ordered``: ``desc_act``, columns were quantized in another order than they are stored in.
    """

    bits: int | None
    group: int | None
    sym: bool | None
    label: str
    rule_bits: tuple[int, ...] = ()
    skipped: bool = False
    ordered: bool = False


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A GPTQ checkpoint by its config, or without one by its ``g_idx`` tensors; ``Unsupported`` for 2:4 sparse Marlin, BitBLAS, QQQ."""
    method = str(config.get("quant_method") or config.get("method") or "").lower()
    if autoround.is_autoround(config):
        return Match("gptq", config, autoround.DIALECT) if autoround.packing(config) in LABELS else None
    if method in _REFUSED:
        raise Unsupported(f"gptq-{method}", f"the checkpoint holds {_REFUSED[method]}")
    if method in ("gptq", "marlin") or (not method and config and _is_old_config(config)):
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
    if config.get("is_marlin_format") or str(config.get("quant_method")).lower() == "marlin":
        return "marlin"
    first, second = config.get("checkpoint_format"), config.get("format")
    if first is not None and second is not None and first != second:
        raise BadFile("config-disagrees", f"checkpoint_format is {first!r} but format is {second!r}")
    label = str(first or second or "gptq").lower()
    if label in _REFUSED:
        raise Unsupported(f"gptq-{label}", f"the checkpoint holds {_REFUSED[label]}")
    if label not in LABELS:
        raise Unsupported("gptq-version", f"GPTQ checkpoint format {label!r} is not known", hint=f"known: {', '.join(LABELS)}")
    return label


def module_settings(config: Mapping[str, Any], name: str) -> Settings:
    """Resolve a config for module ``name``: the first matching rule of ``dynamic`` or AutoRound's ``extra_config`` wins."""
    rules = dynamic_rules(config, name)
    extra = autoround.override(config, name)
    rule: Mapping[str, Any] = rules[0] or {} if rules else extra
    bits = int_field(rule, ("bits",), 1, 32) or int_field(config, ("bits", "wbits", "w_bit"), 1, 32)
    group = int_field(rule, ("group_size",), -1, 1 << 31) or int_field(config, ("group_size", "q_group_size"), -1, 1 << 31)
    sym = bool_field(rule, "sym")
    if sym is None:
        sym = bool_field(config, "sym")
    if sym is None and bool_field(config, "zero_point") is not None:
        sym = not config["zero_point"]
    widths = tuple(r["bits"] for r in rules if r is not None and isinstance(r.get("bits"), int))
    skipped = (bool(rules) and rules[0] is None) or (isinstance(extra.get("bits"), int) and extra["bits"] >= 16)
    ordered = bool_field(rule, "desc_act")
    if ordered is None:
        ordered = bool_field(config, "desc_act")
    return Settings(bits, group, sym, _label(config), widths, skipped, bool(ordered))


def config_beside(
    config_json: Mapping[str, Any] | None, files: Mapping[str, Mapping[str, Any]]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """``reconcile`` with the first of ``files``; AutoRound's own config needs nothing beside it."""
    if config_json and str(config_json.get("quant_method", "gptq")).lower() != "gptq":
        return config_json, ()
    return reconcile(config_json, next(iter(files.values())))


def reconcile(
    config_json: Mapping[str, Any] | None, quantize_config: Mapping[str, Any] | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
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


def _describes(original: Mapping[str, Any], modules: Mapping[str, Storage], skipped: Sequence[str]) -> bool:
    """Whether ``original`` still says the truth of every module."""
    if detect(original, ()) is None:
        return False
    dialect = autoround.DIALECT if autoround.is_autoround(original) else ""
    for name, storage in modules.items():
        said = module_settings(original, name)
        if said.skipped or said.bits != storage.integers.bits or storage.options.get("dialect", "") != dialect:
            return False
        if (
            not says_group(said.group, storage)
            or said.label != storage.options.get("checkpoint_format")
            or (said.sym is True and not isinstance(storage.zero_point, int))
        ):
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
    ``dynamic`` rule for each other pair and one negative rule for the linears left dense, names escaped and joined, negatives first. A
    rule that holds for all parts of what vLLM fuses names that layer too.
    """
    if original is not None and _describes(original, modules, skipped):
        return dict(original)
    bits, group = _commonest(modules)
    labels = {str(s.options.get("checkpoint_format", "gptq")) for s in modules.values()} or {"gptq"}
    if len(labels) > 1:
        raise Unsupported("gptq-mixed-labels", f"one checkpoint cannot hold {' and '.join(sorted(labels))} zero points")
    label = labels.pop()
    dense = sorted(name for name in skipped if not _is_head(name))
    everything = {*modules, *dense}
    dynamic: dict[str, Any] = {f"-:{_alternation(with_fused(dense, everything))}": {}} if dense else {}
    others = _others(modules, bits, group)
    for (width, size), names in sorted(others.items()):
        dynamic[f"+:{_alternation(with_fused(names, everything))}"] = {"bits": width, "group_size": size}
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
        "meta": {"quantizer": [f"qformats:{tool_version()}"]},
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def _others(modules: Mapping[str, Storage], bits: int, group: int) -> dict[tuple[int, int], list[str]]:
    """Modules that the defaults do not describe, by (bits, group size); rows of one group go with others where that fits them."""
    found: dict[tuple[int, int], list[str]] = {}
    rest = [name for name, s in sorted(modules.items()) if s.integers.bits != bits or not says_group(group, s)]
    for name in sorted(rest, key=lambda name: modules[name].group is None):
        storage = modules[name]
        fitting = (pair for pair in found if pair[0] == storage.integers.bits and says_group(pair[1], storage))
        found.setdefault(next(fitting, (storage.integers.bits, storage.group or -1)), []).append(name)
    return {pair: sorted(names) for pair, names in found.items()}


def harmonize(modules: Mapping[str, Storage]) -> dict[str, Storage]:
    """Storages of one checkpoint under one label: if any needs ``gptq_p``, all get it, else if any needs ``gptq_v2``, all get that.

    That only widens what they hold, except for the v1 reading of z = 2^b: ``Unsupported('gptq-mixed-labels')``. Under ``gptq_p`` 3 bits
    are planar, too (gptqmodel 7.7.0 ``quantization/config.py``: one format for a whole checkpoint).
    """
    labels = {str(storage.options.get("checkpoint_format", "gptq")) for storage in modules.values()}
    if len(labels) < 2 or "marlin" in labels:
        return dict(modules)
    label = "gptq_p" if "gptq_p" in labels else "gptq_v2"
    return {name: _relabelled(name, storage, label) for name, storage in modules.items()}


def _relabelled(name: str, storage: Storage, label: str) -> Storage:
    top = (1 << storage.integers.bits) - 1
    zero = storage.zero_point
    if isinstance(zero, tuple):
        if zero[1] > top and storage.options.get("checkpoint_format") == "gptq":
            text = f"zero points of {top + 1} exist only in v1 files, zero points of 0 of other modules only in v2 files"
            raise Unsupported("gptq-mixed-labels", text, tensor=name)
        zero = (0, top)
    options = {**storage.options, "checkpoint_format": label, "zeros": "v2"}
    if label == "gptq_p" and storage.integers.bits in (3, 5, 6, 7):
        options["packing"] = "planar"
        return replace(storage, zero_point=zero, options=options, k_multiple=32, n_multiple=32)
    return replace(storage, zero_point=zero, options=options)


def _commonest(modules: Mapping[str, Storage]) -> tuple[int, int]:
    """The (bits, group size) of most modules; those of one group a row count only if there are no others, since they fit any size."""
    pairs = Counter((s.integers.bits, s.group or -1) for s in modules.values())
    ordered = sorted(pairs, key=lambda pair: (pair[1] == -1, -pairs[pair], pair))
    return ordered[0] if ordered else (4, 128)


def _alternation(names: Sequence[str]) -> str:
    return f"^(?:{'|'.join(re.escape(name) for name in names)})$"


def side_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Files beside config.json that hold the same config: ``quantize_config.json`` (AutoRound: ``quantization_config.json``)."""
    by_autoround = autoround.is_autoround(config) or "autoround_version" in config
    name = "quantization_config.json" if by_autoround else "quantize_config.json"
    return {name: json.dumps(config, indent=2, ensure_ascii=False).encode()}
