"""ModelOpt's configuration in its two spellings: ``quantization_config`` of config.json, and ``hf_quant_config.json``.

Source: ``get_quant_config`` and ``process_layer_quant_config`` in ``export/quant_utils.py``, ``convert_hf_quant_config_format`` in
``export/convert_hf_config.py`` of NVIDIA Model-Optimizer 0.47. ``ignore`` and ``exclude_modules`` hold globs (``lm_head``,
``model.layers.0*``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from qformats.errors import BadFile, Unsupported
from qformats.formats.packed import tool_version
from qformats.formats.protocol import Activations, Match, Target
from qformats.scheme import Storage

__all__ = [
    "ALGORITHMS", "FILE", "activations", "config_beside", "config_out", "detect", "has_static_inputs", "layer_of", "side_files",
    "with_activations",
]  # fmt: skip

FILE = "hf_quant_config.json"
METHODS = ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
ALGORITHMS = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8",
    "MXFP4", "W4A16_AWQ", "W4A8_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL", "MIXED_PRECISION",
)  # fmt: skip
# what compressed-tensors' words say of an algorithm: weights, then inputs
_GROUPS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "FP8": ({"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "float"}),
    "FP8_PER_CHANNEL_PER_TOKEN": ({"num_bits": 8, "type": "float", "strategy": "channel"}, {"num_bits": 8, "type": "float"}),
    "NVFP4": ({"num_bits": 4, "type": "float", "group_size": 16}, {"num_bits": 4, "type": "float", "group_size": 16}),
    "W4A16_NVFP4": ({"num_bits": 4, "type": "float", "group_size": 16}, None),
    "MXFP8": ({"num_bits": 8, "type": "float", "group_size": 32}, {"num_bits": 8, "type": "float", "group_size": 32}),
    "W4A16_AWQ": ({"num_bits": 4, "type": "int"}, None),
    "W8A16": ({"num_bits": 8, "type": "int"}, None),
}


def _details(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The algorithm's own object: ``quantization`` where the file's spelling is used, else the config itself."""
    inner = config.get("quantization", config)
    if not isinstance(inner, Mapping):
        raise BadFile("config-value", f"quantization is {type(inner).__name__}, expected an object")
    return inner


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A quantization config whose method is ``modelopt``; ``Unsupported`` for an algorithm that is not known, and for stacked experts."""
    producer = config.get("producer")
    by_modelopt = isinstance(producer, Mapping) and producer.get("name") == "modelopt" and "quantization" in config
    method = str(config.get("quant_method") or ("modelopt" if by_modelopt else "")).lower()
    if method not in METHODS:
        return None
    details = _details(config)
    layers = details.get("quantized_layers") or {}
    if not isinstance(layers, Mapping) or not all(isinstance(layer, Mapping) for layer in layers.values()):
        raise BadFile("config-value", "quantized_layers is not an object of objects")
    for algorithm in (details.get("quant_algo"), *(layer.get("quant_algo") for layer in layers.values())):
        if algorithm is not None and str(algorithm).upper() not in ALGORITHMS:
            raise Unsupported("quant-algo", f"algorithm {algorithm!r} is not known", hint=f"known: {', '.join(ALGORITHMS)}")
    stacked = next((name for name in names if name.endswith("_proj_weight_scale")), None)
    if stacked is not None:
        hint = "export the experts one by one"
        raise Unsupported("stacked-experts", "is the scale of experts in one tensor with inputs as rows", tensor=stacked, hint=hint)
    return Match("modelopt", config, str(details.get("quant_algo") or ""))


def layer_of(config: Mapping[str, Any], name: str) -> tuple[str | None, int | None]:
    """The algorithm and the group size that the config gives module ``name``, None where it says neither."""
    details = _details(config)
    layer = (details.get("quantized_layers") or {}).get(name) or details
    algorithm, group = layer.get("quant_algo"), layer.get("group_size")
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise BadFile("config-value", f"group_size is {group!r}, expected a number of columns", tensor=name)
    word = str(algorithm or "").upper()
    return (None if word in ("", "MIXED_PRECISION") else word), group


def config_beside(
    config_json: Mapping[str, Any] | None, files: Mapping[str, Mapping[str, Any]]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """config.json's own config where there is one, else the file's under ``quant_method``; a warning where the algorithms differ."""
    beside = files.get(FILE, {})
    if not config_json:
        return {"quant_method": "modelopt", **beside}, ()
    said, also = _details(config_json).get("quant_algo"), _details(beside).get("quant_algo")
    if said is None or also is None or said == also:
        return config_json, ()
    return config_json, (f"config.json says quant_algo = {said!r}, {FILE} says {also!r}; the former is used",)


def _describes(original: Mapping[str, Any], modules: Mapping[str, Storage], skipped: Iterable[str]) -> bool:
    """Whether ``original`` still says the truth of every module."""
    if detect(original, ()) is None:
        return False
    details = _details(original)
    layers, algorithm = details.get("quantized_layers") or {}, details.get("quant_algo")
    left = details.get("exclude_modules", details.get("ignore")) or []
    if not isinstance(left, list):
        return False
    if any(fnmatchcase(name, str(glob)) for name in modules for glob in left):
        return False
    if algorithm == "MIXED_PRECISION":
        return all(layers.get(name, {}).get("quant_algo") == storage.options.get("algo") for name, storage in modules.items())
    covered = all(any(fnmatchcase(name, str(glob)) for glob in left) for name in skipped)
    return covered and all(storage.options.get("algo") == algorithm for storage in modules.values())


def _layer(storage: Storage) -> dict[str, Any]:
    """What ``quantized_layers`` says of a module."""
    algorithm = str(storage.options.get("algo", "FP8"))
    made: dict[str, Any] = {"quant_algo": algorithm}
    if storage.group is not None and algorithm != "FP8_PB_WO":
        made["group_size"] = storage.group
    if algorithm.endswith("AWQ"):
        made.update(has_zero_point=False, pre_quant_scale=bool(storage.options.get("pre_quant")))
    return made


def _group(layer: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    """A ``config_groups`` entry of an algorithm, as far as ModelOpt has words for it."""
    weights, inputs = _GROUPS.get(str(layer["quant_algo"]), ({}, None))
    made: dict[str, Any] = {"targets": targets}
    if weights:
        size = {"group_size": layer["group_size"]} if "group_size" in layer else {}
        made["weights"] = {"dynamic": False, **weights, **size}
    if inputs is not None:
        made["input_activations"] = {"dynamic": False, **inputs}
    return made


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Iterable[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The original config where it still says the truth, else config.json's spelling: one algorithm, or each layer's own."""
    left = sorted(skipped)
    if original is not None and _describes(original, modules, left):
        return dict(original)
    layers = {name: _layer(storage) for name, storage in modules.items()}
    kinds = Counter(json.dumps(layer, sort_keys=True) for layer in layers.values())
    mixed = len(kinds) > 1
    groups: dict[str, Any] = {}
    for number, kind in enumerate(sorted(kinds)):
        layer = json.loads(kind)
        named = sorted(name for name, mine in layers.items() if mine == layer) if mixed else ["Linear"]
        groups[f"group_{number}"] = _group(layer, named)
    first = json.loads(next(iter(kinds), "{}"))
    made: dict[str, Any] = {"config_groups": groups, "ignore": left}
    made["quant_algo"] = "MIXED_PRECISION" if mixed else first.get("quant_algo")
    if mixed:
        made["quantized_layers"] = layers
    else:
        made.update({key: value for key, value in first.items() if key != "quant_algo"})
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        if original is not None and key in _details(original):
            made[key] = _details(original)[key]
    return {**made, "producer": {"name": "qformats", "version": tool_version()}, "quant_method": "modelopt"}


_INPUTS = {
    "FP8": Activations("fp8", False), "FP8_PER_CHANNEL_PER_TOKEN": Activations("fp8", True, "token"), "W4A8_AWQ": Activations("fp8", False),
    "W4A8_NVFP4_FP8": Activations("fp8", False), "W4A8_MXFP4_FP8": Activations("fp8", False), "NVFP4": Activations("nvfp4", False),
    "NVFP4_AWQ": Activations("nvfp4", False), "MXFP8": Activations("mxfp8", True, "group"),
    "W8A8_SQ_PER_CHANNEL": Activations("int8", False),
}  # fmt: skip


def activations(config: Mapping[str, Any]) -> Activations | None:
    """Those of the algorithm, of a mixture the first layer's that has any."""
    details = _details(config)
    words = [details.get("quant_algo"), *(layer.get("quant_algo") for layer in (details.get("quantized_layers") or {}).values())]
    return next((_INPUTS[word] for word in (str(w).upper() for w in words) if word in _INPUTS), None)


def has_static_inputs(activations: Activations | None) -> bool:
    """Whether inputs have the one scale for each layer that the algorithm FP8 wants of a checkpoint.

    vLLM's ``ModelOptFp8LinearMethod`` multiplies by ``input_scale``; FP8_PER_CHANNEL_PER_TOKEN measures its inputs while it runs.
    """
    return activations == _INPUTS["FP8"]


def with_activations(config: Mapping[str, Any], activations: Activations | None, cache: bool) -> dict[str, Any] | None:
    """The config under the algorithm with these activations; None where its algorithm has others."""
    made, algorithm = dict(config), config.get("quant_algo")
    if cache and not made.get("kv_cache_scheme"):
        made["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    if algorithm == "FP8" and not has_static_inputs(activations):
        made["config_groups"] = {name: {key: value for key, value in group.items() if key != "input_activations"}
                                 for name, group in config.get("config_groups", {}).items()}  # fmt: skip
    if activations is None or _INPUTS.get(str(algorithm)) == activations:
        return made
    if (algorithm, activations.kind) != ("W4A16_NVFP4", "nvfp4"):
        return None
    group = _group({"quant_algo": "NVFP4", "group_size": 16}, ["Linear"])
    return {**made, "quant_algo": "NVFP4", "config_groups": {"group_0": group}}


def side_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """``hf_quant_config.json``, the same config in its other spelling."""
    details = dict(_details(config))
    if "quantization" not in config:
        cache = details.get("kv_cache_quant_algo", "FP8" if details.get("kv_cache_scheme") else None)
        kept = ("quant_algo", "group_size", "has_zero_point", "pre_quant_scale", "quantized_layers")
        details = {**{key: details[key] for key in kept if key in details}, "kv_cache_quant_algo": cache,
                   "exclude_modules": config.get("ignore") or []}  # fmt: skip
    made = {"producer": config.get("producer", {"name": "modelopt"}), "quantization": details}
    return {FILE: (json.dumps(made, indent=4, ensure_ascii=False) + "\n").encode()}
