"""torchao's quantization config and the metadata of its safetensors files, read and written. Torch-free.

Source: ``TorchAoConfig`` in ``utils/quantization_config.py`` and ``quantizers/quantizer_torchao.py`` of transformers 5.23.0,
``core/config.py``, ``quantization/quant_api.py`` and ``prototype/safetensors`` of torchao 0.18.0.

``quant_type`` is ``{"default": C}``; C is ``{"_type", "_version", "_data"}`` of one config class, of ``FqnToConfig`` (once
``ModuleFqnToConfig``) a map from module names, ``re:`` patterns and ``_default`` to such. Until 2025 it was a string,
``"int4_weight_only"``, with ``quant_type_kwargs`` beside it. What a tensor is, its own metadata says, never the config: where a class
refuses a granularity that its tensors may have (``__post_init__``: float8 blocks, one scale for a tensor of fewer than 8 bits), it is
written with its default.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qformats.errors import BadFile, Unsupported
from qformats.formats.packed import FLOATS
from qformats.formats.protocol import Match, Module, Target
from qformats.formats.torchao.names import EXTRAS, SUFFIXES, entry_of, logical_name, split_name
from qformats.scheme import Float, Integer, Storage

__all__ = ["config_out", "detect", "metadata_out", "module_warnings"]

_NAME = "torchao"
_ELEMENTS = {"e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m3": "fp6_e2m3", "e3m2": "fp6_e3m2", "e2m1": "float4_e2m1fn_x2"}


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Match | None:
    """A config whose method is ``torchao``, or without a config tensors named as torchao names them.

    ``BadFile('config-value')`` for a ``quant_type`` of no known form, ``Unsupported('torchao-layout')`` for tiles as ROCm packs them.
    """
    method = str(config.get("quant_method") or "").lower()
    if method == _NAME:
        found = _configs(config)
        if any(_data(entry).get("int4_tile_packed_ntile") == 16 for entry in found):
            raise Unsupported("torchao-layout", "holds int4 tiles of 16 rows, as ROCm packs them", hint="save it again on another device")
        return Match(_NAME, config)
    if not config and any(leaf in SUFFIXES and leaf.endswith("_qdata") for _, leaf in map(split_name, names)):
        return Match(_NAME, config, warnings=("no quantization config: the files' metadata says what the tensors are",))
    return None


def _data(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    data = entry.get("_data")
    return data if isinstance(data, Mapping) else {}


def _configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every config class in ``quant_type``; none for the strings of 2024."""
    value = config.get("quant_type")
    if value is None or isinstance(value, str):
        return []
    default = value.get("default") if isinstance(value, Mapping) else None
    if not isinstance(default, Mapping) or not isinstance(default.get("_type"), str):
        raise BadFile("config-value", f"quant_type is {value!r}, expected a string or {{'default': {{'_type': …}}}}")
    if default["_type"] not in ("FqnToConfig", "ModuleFqnToConfig"):
        return [default]
    data = _data(default)
    inner = data.get("fqn_to_config") or data.get("module_fqn_to_config") or {}
    if not isinstance(inner, Mapping) or not all(entry is None or isinstance(entry, Mapping) for entry in inner.values()):
        raise BadFile("config-value", f"{default['_type']} holds no map from names to configs")
    return [entry for entry in inner.values() if entry is not None]


def module_warnings(module: Module) -> tuple[str, ...]:
    """What is said of a module's activations, which belong to the weight's class here and to no other format's."""
    entry = entry_of(module)
    said = entry.attributes.get("act_quant_kwargs") or entry.attributes.get("activation_quantization")
    warnings = []
    if said is not None:
        warnings.append("its activations are quantized at run time; other formats get the weights alone")
    elif '"_activations"' in entry.text:
        warnings.append("its activations were quantized at run time; its weights alone are carried")
    if "act_pre_scale" in entry.parts:
        warnings.append("its activations are scaled column by column; other formats get that factor in the weights")
    return tuple(warnings)


# ---------------------------------------------------------------- metadata


def metadata_out(modules: Mapping[str, tuple[Storage, tuple[int, ...]]], tensors: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """``tensor_names`` and one entry for each tensor. ``tensors`` maps the names of all others to their dtypes.

    The owner's dequantized dtype is that of most dense tensors, float32 where there are none.
    """
    words = Counter(FLOATS[word] for word in tensors.values() if word in FLOATS) if isinstance(tensors, Mapping) else Counter()
    dtype = words.most_common(1)[0][0] if words else "float32"
    found = {}
    for name, (storage, shape) in modules.items():
        text = storage.options.get("entry")
        prefix = str(storage.options.get("prefix", "_weight_"))
        own = str(storage.options.get("named") or logical_name(name, prefix))
        found[own] = str(text) if text is not None else json.dumps(_entry(storage, shape, dtype))
    found |= {name: json.dumps({"_type": "Tensor"}) for name in tensors if split_name(name)[1] not in EXTRAS}
    return {**found, "tensor_names": json.dumps(list(found))}


def _dtype(word: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": word}


def _block_size(storage: Storage, shape: tuple[int, ...]) -> list[int]:
    if storage.rows is None and storage.group is None:
        return list(shape)
    return [*(1 for _ in shape[:-2]), storage.rows or shape[-2], min(storage.group or shape[-1], shape[-1])]


def _entry(storage: Storage, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """The metadata of a new tensor."""
    kind, block = str(storage.options["kind"]), _block_size(storage, shape)
    auto, emulated = ({"_type": "KernelPreference", "_data": word} for word in ("AUTO", "EMULATED"))
    data: dict[str, Any]
    parts = ["qdata", "scale"]
    if kind == "Int8Tensor":
        data = {"act_quant_kwargs": None, "reduce_range": False, "block_size": block, "dtype": _dtype(dtype)}
        parts += ["zero_point"] if storage.options.get("zero") else []
    elif kind == "IntxUnpackedToInt8Tensor":
        target = _dtype(f"int{storage.integers.bits}")
        data = {"target_dtype": target, "block_size": block, "dtype": _dtype(dtype), "activation_quantization": None}
        parts += ["zero_point"]
    elif kind == "Float8Tensor":
        data = {"block_size": block, "mm_config": None, "act_quant_kwargs": None, "kernel_preference": auto, "dtype": _dtype(dtype)}
    elif kind == "MXTensor":
        assert isinstance(storage.grid, Float)
        word = _ELEMENTS[storage.grid.name]
        element: Any = word if word.startswith("fp6") else _dtype(word)
        data = {"elem_dtype": element, "block_size": storage.group, "orig_dtype": _dtype(_brain(dtype)),
                "kernel_preference": emulated, "act_quant_kwargs": {"_type": "QuantizeTensorToMXKwargs", "_data": {
                    "elem_dtype": _dtype("float8_e4m3fn"), "block_size": storage.group, "is_swizzled_scales": False,
                    "scaling_mode": {"_type": "ScaleCalculationMode", "_data": "RCEIL"}, "kernel_preference": emulated}},
                "is_swizzled_scales": False}  # fmt: skip
    elif kind == "NVFP4Tensor":
        data = {"is_swizzled_scales": False, "use_triton_kernel": False, "act_quant_kwargs": None, "block_size": storage.group,
                "orig_dtype": _dtype(_brain(dtype))}  # fmt: skip
        parts += ["per_tensor_scale"] if storage.factor is not None else []
    else:
        raise Unsupported("torchao-type", f"a {kind} is written only where it was read", hint="name a type, as in torchao:int4")
    return {"_type": kind, "_data": data, "_tensor_data_names": parts}


def _brain(dtype: str) -> str:
    """The formats of tensor cores know bfloat16 and float32; float16 becomes float32."""
    return "float32" if dtype == "float16" else dtype


# ---------------------------------------------------------------- config


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Sequence[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The ``quantization_config`` of an output: the original where every module is still what it was, else one config class, or one for
    each name where modules differ. Linears left dense are ``modules_to_not_convert``.
    """
    kept = all("entry" in storage.options for storage in modules.values())
    if original is not None and kept and _is_current(original):
        return dict(original)
    if not modules:
        return dict(original) if original is not None else {"quant_method": _NAME}
    texts = {name: json.dumps(_config(storage), sort_keys=True) for name, storage in modules.items()}
    common = Counter(texts.values()).most_common(1)[0][0]
    quant_type = json.loads(common)
    if len(set(texts.values())) > 1:
        named: dict[str, Any] = {"_default": quant_type}
        named |= {name: json.loads(text) for name, text in texts.items() if text != common}
        named |= dict.fromkeys(sorted(skipped))
        quant_type = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": named, "module_fqn_to_config": named}}
    ends = any("embed" in name or name.rpartition(".")[2] == "lm_head" for name in modules)
    return {
        "quant_method": _NAME,
        "quant_type": {"default": quant_type},
        "modules_to_not_convert": sorted(skipped) or None,
        "include_input_output_embeddings": ends,
        "untie_embedding_weights": False,
    }


def _is_current(config: Mapping[str, Any]) -> bool:
    """Whether torchao 0.18 takes it: strings and the first versions of these classes are gone."""
    if config.get("quant_method") != _NAME or not isinstance(config.get("quant_type"), Mapping):
        return False
    return not any(entry.get("_version", 1) == 1 and str(entry.get("_type")).startswith(("Int", "Float8")) for entry in _configs(config))


def _granularity(storage: Storage, per_row: dict[str, Any], per_tensor: bool = True) -> dict[str, Any]:
    """Of those that the config classes take: a row, a group in one, or where ``per_tensor`` a tensor."""
    if storage.rows is None and per_tensor:
        return {"_type": "PerTensor", "_version": 1, "_data": {}}
    if storage.rows != 1 or storage.group is None:
        return per_row
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": storage.group}}


def _config(storage: Storage) -> dict[str, Any]:
    """The config class that would make tensors like those of ``storage``."""
    kind = str(storage.options["kind"])
    rows: dict[str, Any] = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    if kind == "Int8Tensor":
        granularity = _granularity(storage, rows)
        return _class("Int8WeightOnlyConfig", 2, group_size=None, granularity=granularity, set_inductor_config=True)
    if kind == "IntxUnpackedToInt8Tensor":
        symmetric = storage.zero_point is None and storage.zero_dtype is None
        return _class(
            "IntxWeightOnlyConfig", 2,
            weight_dtype=_dtype(f"int{storage.integers.bits}"),
            granularity=_granularity(storage, {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}, per_tensor=False),
            mapping_type={"_type": "MappingType", "_data": "SYMMETRIC" if symmetric else "ASYMMETRIC"},
            scale_dtype=None,
            intx_packing_format={"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
            intx_choose_qparams_algorithm={"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
        )  # fmt: skip
    if kind == "Float8Tensor":
        assert isinstance(storage.grid, Float)
        dtype = _dtype(_ELEMENTS[storage.grid.name])
        return _class("Float8WeightOnlyConfig", 2, weight_dtype=dtype, set_inductor_config=True, granularity=_granularity(storage, rows))
    if kind == "NVFP4Tensor":
        return _class("NVFP4WeightOnlyConfig", 1, use_dynamic_per_tensor_scale=storage.factor is not None)
    if kind == "MXTensor":
        return _mx_config(storage)
    packing = {"Int4Tensor": "PLAIN", "Int4PlainInt32Tensor": "PLAIN_INT32"}.get(kind, "TILE_PACKED_TO_4D")
    assert isinstance(storage.grid, Integer)
    return _class(
        "Int4WeightOnlyConfig", 2, group_size=storage.group, set_inductor_config=True,
        int4_packing_format={"_type": "Int4PackingFormat", "_data": packing},
        int4_choose_qparams_algorithm={"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"}, int4_tile_packed_ntile=8,
    )  # fmt: skip


def _mx_config(storage: Storage) -> dict[str, Any]:
    """torchao has no product of MX weights with float activations: the tensors say that these become float8."""
    assert isinstance(storage.grid, Float)
    word = _ELEMENTS[storage.grid.name]
    element = word if word.startswith("fp6") else _dtype(word)
    return _class(
        "MXDynamicActivationMXWeightConfig", 1, block_size=storage.group, activation_dtype=element, weight_dtype=element,
        kernel_preference={"_type": "KernelPreference", "_data": "EMULATED"},
        scaling_mode={"_type": "ScaleCalculationMode", "_data": "RCEIL"},
    )  # fmt: skip


def _class(name: str, version: int, **data: Any) -> dict[str, Any]:
    return {"_type": name, "_version": version, "_data": data}
