"""A compressed-tensors quantization config read: schemes, targets, presets, old spellings; which scheme is a module's. Torch-free.

Source: compressed-tensors 0.20 ``quantization/quant_config.py``, ``quant_scheme.py``, ``quant_args.py``, ``utils/match.py``; 0.3.3 and
0.9.4 for the old spellings (``quant_method`` ``sparseml``, ``compression_config``, a config inside the config).

A module's scheme is that of the first target that matches: an exact name, then ``re:`` and a regular expression from the start of its
name, then a class name; among equals in the order of the strings. Two groups with the same target string: the later one counts.
Classes are not known here: ``Linear`` is taken to match, and where several schemes remain the tensors decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qformats.errors import BadFile, Unsupported
from qformats.formats.protocol import Activations, Match

__all__ = [
    "METHODS", "NAME", "Args", "Group", "activations", "candidates", "dense_packing", "detect", "inner", "is_ignored", "preset_inputs",
]  # fmt: skip

NAME = "compressed-tensors"
METHODS = (NAME, "compressed_tensors", "sparseml")
_ARGS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype", "zp_dtype",
    "observer", "observer_kwargs",
}  # fmt: skip
_SCHEME = {"targets", "weights", "input_activations", "output_activations", "format"}
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_FORMATS = (
    "dense", "fakequant", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "mixed-precision", "sparse-bitmask", "sparse-24-bitmask",
    "marlin-24",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Args:
    """How weights are quantized. ``group``: columns a group or None; ``block``: (rows, columns) of the strategy ``block``.

    ``ordered``: groups were formed in the order of the activations (``actorder`` ``group``), so that a ``weight_g_idx`` is stored;
    ``weight`` orders the calibration alone.
    """

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group: int | None = None
    block: tuple[int, int] | None = None
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """One of ``config_groups``: targets, weights (None: activations alone) and the format of its tensors, if it says one."""

    name: str
    targets: tuple[str, ...]
    weights: Args | None
    format: str | None


def inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config itself where it is nested (transformers before 4.48 wrote quantization and sparsity side by side)."""
    nested = config.get("quantization_config")
    if not isinstance(nested, Mapping):
        return config
    merged = dict(nested)
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            merged.setdefault(key, config[key])
    return merged


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A config of compressed-tensors; ``Unsupported`` for Marlin's 2:4 repacking and for transforms that run with the model."""
    method = str(config.get("quant_method") or "").lower()
    held = inner(config)
    if method not in METHODS and (method or not ("config_groups" in held or "sparsity_config" in held)):
        return None
    words = {str(f).lower() for f in (held.get("format"), *(g.format for g in _groups(held)), _sparse_format(held)) if f}
    if "marlin-24" in words:
        raise Unsupported("marlin-24", "the checkpoint holds 2:4 sparse weights repacked for Marlin, which nothing reads back")
    unknown = sorted(words - set(_FORMATS))
    if unknown:
        raise Unsupported("ct-format", f"compressed-tensors format {unknown[0]!r} is not known", hint=f"known: {', '.join(_FORMATS)}")
    _refuse_online(held)
    return Match(NAME, config, "" if method == NAME else method)


def _sparse_format(config: Mapping[str, Any]) -> str | None:
    sparse = config.get("sparsity_config")
    return None if not isinstance(sparse, Mapping) else str(sparse.get("format") or "").replace("dense-sparsity", "dense") or None


def _refuse_online(config: Mapping[str, Any]) -> None:
    """Transforms fused into the weights are part of them; one of an input, an output or the cache is not."""
    transforms = config.get("transform_config")
    groups = transforms.get("config_groups") if isinstance(transforms, Mapping) else None
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        for apply in group.get("apply") or () if isinstance(group, Mapping) else ():
            location = str(apply.get("location") if isinstance(apply, Mapping) else apply).lower()
            if location not in ("weight_input", "weight_output"):
                what = f"transform {name!r} ({group.get('type', 'hadamard')}) runs on the {location} of modules while the model runs"
                raise Unsupported("online-transform", f"{what}; the weights alone are not the model")


def dense_packing(config: Mapping[str, Any]) -> bool:
    """Whether 3, 5, 6 and 7 bits are packed as one stream (releases from 0.18) by the ``version`` of the writer; no version: not."""
    found = re.match(r"(\d+)\.(\d+)", str(inner(config).get("version") or ""))
    return found is not None and (int(found[1]), int(found[2])) >= (0, 18)


_PRESET_INPUTS = {
    "W8A8": Activations("int8", True, "token"), "INT8": Activations("int8", True, "token"), "W4A8": Activations("int8", True, "token"),
    "FP8": Activations("fp8", False), "FP8_DYNAMIC": Activations("fp8", True, "token"), "FP8_BLOCK": Activations("fp8", True, "group"),
    "W4AFP8": Activations("fp8", True, "token"), "NVFP4": Activations("nvfp4", False),
}  # fmt: skip


def preset_inputs(name: str) -> Activations | None:
    """How the preset scheme ``name`` rounds inputs."""
    return _PRESET_INPUTS.get(name.upper())


def activations(config: Mapping[str, Any]) -> Activations | None:
    """Those of the first group that has ``input_activations``; the ``local`` scales of NVFP4 stand under a static one for the tensor."""
    groups = inner(config).get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        said = group.get("input_activations") if isinstance(group, Mapping) else None
        if isinstance(group, list) and name.upper() in _PRESET_INPUTS:
            return _PRESET_INPUTS[name.upper()]
        if isinstance(said, Mapping):
            bits, size, floats = said.get("num_bits", 8), said.get("group_size"), str(said.get("type", "int")).lower() == "float"
            words = {(8, None): "fp8", (8, 32): "mxfp8", (4, 16): "nvfp4", (4, 32): "mxfp4", (8, 128): "fp8"}
            kind = words.get((bits, size), f"float{bits}") if floats else f"int{bits}"
            per = str(said.get("strategy") or ("tensor" if size is None else "group"))
            return Activations(kind, said.get("dynamic") is True, "tensor" if kind == "nvfp4" else per)
    return None


def _groups(config: Mapping[str, Any]) -> list[Group]:
    groups = config.get("config_groups")
    if groups is None:
        return []
    if not isinstance(groups, Mapping):
        raise BadFile("config-value", f"config_groups is {type(groups).__name__}, expected an object")
    return [_group(str(name), value) for name, value in groups.items()]


def _group(name: str, value: Any) -> Group:
    if isinstance(value, list):
        return Group(name, _strings(name, value), _preset(name), None)
    if not isinstance(value, Mapping):
        raise BadFile("config-value", f"config group {name!r} is {type(value).__name__}, expected an object")
    unknown = sorted(set(value) - _SCHEME)
    if unknown:
        raise BadFile("config-key", f"config group {name!r} has a key {unknown[0]!r} that compressed-tensors does not know")
    weights, word = value.get("weights"), value.get("format")
    if str(word).lower() == "mixed-precision":
        raise BadFile("config-value", f"config group {name!r} has the format mixed-precision, which only a whole config can have")
    args = None if weights is None else _args(f"weights of {name!r}", weights)
    return Group(name, _strings(name, value.get("targets")), args, None if word is None else str(word).lower())


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise BadFile("config-value", f"targets of config group {name!r} are {value!r}, expected a list of strings")
    return tuple(value)


def _preset(name: str) -> Args | None:
    """The weights of a preset scheme (compressed-tensors 0.20 ``PRESET_SCHEMES``); ``BadFile('config-preset')`` for another name."""
    word = name.upper()
    if word == "UNQUANTIZED":
        return None
    if word in ("W8A8", "INT8"):
        return Args(8, "int", True, "channel")
    if word == "W4A16_ASYM":
        return Args(4, "int", False, "group", 128)
    floats = {
        "FP8": Args(8, "float", True, "tensor"),
        "FP8_DYNAMIC": Args(8, "float", True, "channel"),
        "FP8_BLOCK": Args(8, "float", True, "block", None, (128, 128)),
    }
    if word in floats:
        return floats[word]
    if word in ("NVFP4", "NVFP4A16"):
        return Args(4, "float", True, "tensor_group", 16)
    mx = re.fullmatch(r"MXFP([468])(A16|A8|XFP8)?", word)
    if mx:
        return Args(int(mx[1]), "float", True, "group", 32)
    integers = re.fullmatch(r"W([2-8])A(4|8|16|FP8)", word)
    if integers:
        return Args(int(integers[1]), "int", True, "group", 128)
    raise BadFile("config-preset", f"config group {name!r} lists targets, but no preset scheme has this name")


def _args(what: str, value: Any) -> Args:
    if not isinstance(value, Mapping):
        raise BadFile("config-value", f"{what} are {type(value).__name__}, expected an object")
    unknown = sorted(set(value) - _ARGS)
    if unknown:
        raise BadFile("config-key", f"{what} have a key {unknown[0]!r} that compressed-tensors does not know")
    bits, kind, symmetric = value.get("num_bits", 8), str(value.get("type", "int")).lower(), value.get("symmetric", True)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16 or kind not in ("int", "float"):
        raise BadFile("config-value", f"{what} are {bits!r} bits of {kind!r}, expected 1 … 16 bits of int or float")
    if not isinstance(symmetric, bool):
        raise BadFile("config-value", f"symmetric of {what} is {symmetric!r}, expected true or false")
    group, block = value.get("group_size"), _block(what, value.get("block_structure"))
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < -1 or group == 0):
        raise BadFile("config-value", f"group_size of {what} is {group!r}, expected -1 or a number of columns")
    strategy = str(value.get("strategy") or ("tensor" if group is None else "channel" if group == -1 else "group")).lower()
    grouped = strategy in ("group", "tensor_group")
    if strategy not in _STRATEGIES or (grouped and (group is None or group < 0)) or ((strategy == "block") != (block is not None)):
        raise BadFile("config-value", f"{what}: strategy {strategy!r} with group_size {group!r} and block_structure {block!r}")
    return Args(bits, kind, symmetric, strategy, group if grouped else None, block, _ordered(what, value.get("actorder")))


def _ordered(what: str, value: Any) -> bool:
    """``actorder``: only ``group`` (``dynamic``, true) stores an index (``initialize.py`` of releases up to 0.18, vLLM's ``has_g_idx``)."""
    word = value.lower() if isinstance(value, str) else value
    if word in (None, False, "weight", "static"):
        return False
    if word in (True, "group", "dynamic"):
        return True
    raise BadFile("config-value", f"actorder of {what} is {value!r}, expected group, weight, static, dynamic, a boolean or null")


def _block(what: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sizes = [int(s) if s.isdigit() else 0 for s in value.split("x")] if isinstance(value, str) else value
    if not isinstance(sizes, list | tuple) or len(sizes) != 2 or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise BadFile("config-value", f"block_structure of {what} is {value!r}, expected [rows, columns]")
    return int(sizes[0]), int(sizes[1])


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise BadFile("config-value", f"target {pattern!r} is not a regular expression: {error}") from None


def is_ignored(config: Mapping[str, Any], name: str) -> bool:
    """Whether ``ignore`` names the module (classes aside)."""
    ignore = inner(config).get("ignore") or ()
    if not isinstance(ignore, list | tuple) or not all(isinstance(v, str) for v in ignore):
        raise BadFile("config-value", f"ignore is {ignore!r}, expected a list of strings")
    return any(word == name or (word.startswith("re:") and _matches(word, name)) for word in ignore)


def candidates(config: Mapping[str, Any], name: str) -> Iterator[Group]:
    """The groups with weights whose targets may match module ``name``, the best match first; groups have their format filled in."""
    held = inner(config)
    whole = str(held.get("format") or "fakequant").lower()
    targets: dict[str, Group] = {}
    for group in _groups(held):
        if group.format is None and whole != "mixed-precision":
            group = Group(group.name, group.targets, group.weights, whole)
        targets.update(dict.fromkeys(group.targets, group))
    words = sorted(targets, key=lambda t: ("re:" in t, t))
    named = [t for t in words if t == name or (t.startswith("re:") and _matches(t, name))]
    classes = sorted((t for t in words if t not in named and not t.startswith("re:") and "." not in t), key=lambda t: t != _class_of(name))
    seen: set[str] = set()
    for target in (*named, *classes):
        group = targets[target]
        if group.weights is not None and group.name not in seen:
            seen.add(group.name)
            yield group


def _class_of(name: str) -> str:
    last = name.rpartition(".")[2]
    return "Embedding" if "embed" in last or last in ("wte", "wpe") else "Linear"
