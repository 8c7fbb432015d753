"""An AWQ quantization config read and written: detection, per-module settings, and the config of an output. Torch-free.

Fields: autoawq 0.2.9 ``models/_config.py``, gptqmodel 7.7.0 ``quantization/config.py``, auto-round 0.16.1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qformats.errors import BadFile, Unsupported
from qformats.formats import autoround
from qformats.formats.packed import bool_field, dynamic_rules, int_field, made_by, says_group
from qformats.formats.protocol import Match, Target
from qformats.scheme import Storage

__all__ = ["FAST", "Settings", "config_out", "detect", "module_settings", "side_files"]

_REFUSED = {"bitblas": "BitBLAS weights, whose layout depends on the compiler that made them"}
FAST = ("gemv_fast", "llm-awq")  # 16-bit words, zero points as floats
_VERSIONS = ("gemm", "gemv", *FAST, "marlin")
_RUNTIME = (
    "exllama",
    "exllamav2",
    "exllama_v2",
    "ipex",
)  # kernels that take GEMM files (autoawq 0.2.9 ``models/base.py``, ``gemm_ipex.py``)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a config says of one module; ``zero_point`` false claims that every zero point is the middle code."""

    bits: int | None
    group: int | None
    zero_point: bool
    version: str
    skipped: bool


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """An AWQ checkpoint by its config; ``Unsupported`` for the layouts that are not read."""
    method = str(config.get("quant_method") or config.get("method") or "").lower()
    if autoround.is_autoround(config):
        return Match("awq", config, autoround.DIALECT) if autoround.packing(config) == "awq" else None
    old = not method and "version" in config and ("w_bit" in config or "q_group_size" in config)
    if not config and any(name.endswith(".scaled_zeros") for name in names):
        said = "no quantization config: an llm-awq state, groups are taken from the tensors"
        return Match("awq", config, warnings=(said,))
    if method != "awq" and not old:
        return None
    _disk_version(config)
    return Match("awq", config)


def _disk_version(config: Mapping[str, Any]) -> str:
    """One of ``_VERSIONS``; ``Unsupported`` for every other. ``backend: llm-awq`` decides alone (gptqmodel 7.7.0 ``from_quant_config``)."""
    if autoround.is_autoround(config):
        return "gemm"
    if str(config.get("backend", "")).lower() == "llm-awq":
        return "llm-awq"
    named = {str(config[key]).lower() for key in ("version", "format", "checkpoint_format") if config.get(key)}
    named = {"gemm" if version in _RUNTIME else version for version in named}
    if len(named) > 1:
        raise BadFile("config-disagrees", f"version, format and checkpoint_format differ: {', '.join(sorted(named))}")
    version = named.pop() if named else "gemm"
    if version in _REFUSED:
        raise Unsupported(f"awq-{version}", f"the checkpoint holds {_REFUSED[version]}")
    if version not in _VERSIONS:
        raise Unsupported("awq-version", f"AWQ version {version!r} is not known", hint=f"known: {', '.join(_VERSIONS)}")
    return version


def module_settings(config: Mapping[str, Any], name: str) -> Settings:
    """Resolve a config for module ``name``; the first matching rule of ``dynamic`` or ``extra_config`` wins.

    ``modules_to_not_convert`` counts by whole components of the name: consumers differ (AutoAWQ and vLLM take any substring), and lists
    that hold ``gate`` beside packed ``gate_proj`` modules exist, so the tensors decide what is packed.
    """
    rules = dynamic_rules(config, name)
    rule: Mapping[str, Any] = rules[0] or {} if rules else autoround.override(config, name)
    bits = int_field(rule, ("bits",), 1, 32) or int_field(config, ("bits", "w_bit"), 1, 32)
    group = int_field(rule, ("group_size",), -1, 1 << 31) or int_field(config, ("group_size", "q_group_size"), -1, 1 << 31)
    zero_point, sym = bool_field(config, "zero_point"), bool_field(config, "sym")
    listed = config.get("modules_to_not_convert") or []
    if not isinstance(listed, list) or not all(isinstance(key, str) for key in listed):
        raise BadFile("config-value", "modules_to_not_convert is not a list of names")
    skipped = (bool(rules) and rules[0] is None) or any(f".{key}." in f".{name}." for key in listed)
    return Settings(bits, group, zero_point if zero_point is not None else not sym, _disk_version(config), skipped)


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Sequence[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The ``quantization_config`` of an output; ``original`` is returned as it was if it still describes every module.

    ``Unsupported('awq-mixed')`` if the modules do not share width, group size and version: AWQ has one of each for a whole checkpoint.
    """
    if original is not None and _describes(original, modules):
        return dict(original)
    groups = Counter(storage.group or -1 for storage in modules.values())
    group = min(groups, key=lambda size: (size == -1, -groups[size], size), default=128)
    kinds = {(s.integers.bits, str(s.options.get("version", "gemm"))) for s in modules.values()} or {(4, "gemm")}
    odd = [name for name, storage in modules.items() if not says_group(group, storage)]
    if len(kinds) > 1 or odd:
        raise Unsupported("awq-mixed", "one AWQ checkpoint has one width, group size and version", tensor=odd[0] if odd else None)
    bits, version = kinds.pop()
    dense = sorted({*skipped, *(() if any(_is_head(name) for name in modules) else ("lm_head",))})
    clash = next((f"{key} is part of {name}" for key in dense for name in modules if key in name), None)
    if clash:
        raise Unsupported("awq-skip-name", f"modules_to_not_convert matches parts of names, and {clash}")
    return {
        "quant_method": "awq",
        **({"backend": "llm-awq"} if version == "llm-awq" else {}),
        "bits": bits,
        "group_size": group,
        "zero_point": not all(storage.zero_point == 1 << (bits - 1) for storage in modules.values()),
        "version": version,
        "modules_to_not_convert": dense,
    }


def _is_head(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == "lm_head"


def _describes(original: Mapping[str, Any], modules: Mapping[str, Storage]) -> bool:
    """Whether ``original`` still says the truth of every module."""
    if detect(original, ()) is None:
        return False
    dialect = autoround.DIALECT if autoround.is_autoround(original) else ""
    for name, storage in modules.items():
        said = module_settings(original, name)
        half = 1 << (storage.integers.bits - 1)
        if said.skipped or said.bits != storage.integers.bits or not says_group(said.group, storage):
            return False
        if said.version != storage.options.get("version") or storage.options.get("dialect", "") != dialect:
            return False
        if storage.zero_point != half and not said.zero_point:
            return False
        if said.zero_point and storage.options.get("qzeros") == "absent":
            return False
    return True


def side_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Files beside config.json that hold the same config: GPTQModel's and AutoRound's; AutoAWQ writes none."""
    if autoround.is_autoround(config) or "autoround_version" in config:
        return {"quantization_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode()}
    if made_by(config, "gptqmodel"):
        return {"quantize_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode()}
    return {}
