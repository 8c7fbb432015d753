"""torchao weights in files of ``torch.save``, those that torchao itself no longer reads among them, as the parts of today's classes.

Source: torchao 0.13.0 ``dtypes/affine_quantized_tensor.py``, ``dtypes/uintx``, ``dtypes/floatx/float8_layout.py`` and
``quantization/linear_activation_quantized_tensor.py``; torchao 0.18.0 has only stubs of them. A pickled tensor is a record of its class
with its attributes as state, its dtype and size among the arguments:

| class | state | becomes |
|---|---|---|
| AffineQuantizedTensor | tensor_impl, block_size, quant_min, quant_max, zero_point_domain (1 int, 2 float, 3 none) | by its tensor_impl |
| … PlainAQTTensorImpl | int_data I8 (N, K), scale, zero_point or None, of the blocks' number of elements | Int8Tensor, Intx… below 8 bits |
| … TensorCoreTiledAQTTensorImpl | packed_weight, scale_and_zero (float domain) | Int4TilePackedTo4dTensor |
| … Float8AQTTensorImpl | float8_data, scale, transposed false | Float8Tensor |
| LinearActivationQuantizedTensor, WeightTensorWith… | original_weight_tensor | that, with a word on activations |
| Int8Tensor, Float8Tensor, … | their own parts and attributes | themselves |

Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from qformats.containers.raw import RawTensor
from qformats.containers.torch_zip import encode
from qformats.containers.unpickle import Record, Symbol
from qformats.errors import BadFile, Unsupported
from qformats.formats.torchao.names import KINDS

__all__ = ["PICKLED_CLASSES", "flatten"]

_AQT, _IMPLS = "AffineQuantizedTensor", ("PlainAQTTensorImpl", "TensorCoreTiledAQTTensorImpl", "Float8AQTTensorImpl")
_WRAPPERS = ("LinearActivationQuantizedTensor", "WeightTensorWithLinearActivationQuantizationMetadata")
_QUANTIZERS = (
    "_int8_symm_per_token_reduced_range_quant", "_int8_symm_per_token_reduced_range_quant_noop_decode", "_int8_asymm_per_token_quant",
    "_int8_symm_cutlass_quant", "_int4_symm_cutlass_quant", "_float8_cutlass_quant", "_input_activation_quant_func_fp8",
    "_fp8_mm_compat",
)  # fmt: skip
PICKLED_CLASSES: frozenset[str] = frozenset(
    [
        *(f"torchao.dtypes.affine_quantized_tensor.{name}" for name in (_AQT, *_IMPLS)),
        "torchao.dtypes.AffineQuantizedTensor",
        *(f"torchao.dtypes.uintx.plain_layout.{name}" for name in ("PlainAQTTensorImpl", "PlainLayout")),
        *(f"torchao.dtypes.uintx.tensor_core_tiled_layout.{n}" for n in ("TensorCoreTiledAQTTensorImpl", "TensorCoreTiledLayout")),
        *(f"torchao.dtypes.floatx.float8_layout.{name}" for name in ("Float8AQTTensorImpl", "Float8Layout")),
        *(f"torchao.dtypes.utils.{name}" for name in ("PlainLayout", "Layout", "TensorCoreTiledLayout")),
        *(f"torchao.quantization.linear_activation_quantized_tensor.{name}" for name in _WRAPPERS),
        *(f"torchao.quantization.weight_tensor_linear_activation_quantization.{name}" for name in _WRAPPERS),
        *(f"torchao.quantization.quant_api.{name}" for name in _QUANTIZERS),
        *(f"torchao.quantization.quant_primitives.{name}" for name in ("ZeroPointDomain", "MappingType")),
        *(f"torchao.quantization.granularity.{name}" for name in ("PerRow", "PerTensor", "PerGroup", "PerAxis", "PerBlock", "PerToken")),
        "torchao.float8.inference.Float8MMConfig",
        "torchao.quantization.quantize_.common.kernel_preference.KernelPreference",
        "torchao.quantization.quantize_.workflows.float8.float8_tensor.QuantizeTensorToFloat8Kwargs",
        "torchao.quantization.quantize_.workflows.int8.int8_tensor.QuantizeTensorToInt8Kwargs",
        *(f"torchao.quantization.{name}" for name in KINDS),
        "torchao.prototype.mx_formats.mx_tensor.MXTensor",
        "torchao.prototype.mx_formats.nvfp4_tensor.NVFP4Tensor",
    ]
)
# torchao 0.18.0: what its classes are made of beside their parts
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "Int8Tensor": ("block_size", "dtype"), "IntxUnpackedToInt8Tensor": ("target_dtype", "block_size", "dtype", "activation_quantization"),
    "Float8Tensor": ("block_size", "dtype"), "Int4TilePackedTo4dTensor": ("block_size", "shape"), "Int4Tensor": ("block_size", "shape"),
    "Int4PlainInt32Tensor": ("block_size", "shape"), "NVFP4Tensor": ("block_size", "orig_dtype", "is_swizzled_scales"),
    "MXTensor": ("elem_dtype", "block_size", "orig_dtype", "kernel_preference", "act_quant_kwargs", "is_swizzled_scales"),
}  # fmt: skip
_PARTS = {"int_data": "qdata", "packed_weight": "qdata", "float8_data": "qdata"}


def flatten(value: Any, config: Mapping[str, Any]) -> tuple[dict[str, RawTensor], dict[str, str]] | None:
    """The tensors of a state dict that holds torchao's classes, and the metadata that says what they are; None if it holds none.

    ``Unsupported('torchao-type')`` for a class or a variant that is not known, ``BadFile('torchao-pickle')`` for one that lacks a part.
    """
    if type(value) is not dict or not any(isinstance(item, Record) and item.class_name in PICKLED_CLASSES for item in value.values()):
        return None
    tensors: dict[str, RawTensor] = {}
    entries: dict[str, str] = {}
    for name, item in value.items():
        if isinstance(item, Record) and type(name) is str:
            module, _, parameter = name.rpartition(".")
            entry, parts = _tensor(item, name)
            entries[name] = json.dumps(entry)
            stored = {f"{module}._{parameter}_{part}": raw for part, raw in parts.items()}
            tensors |= {full: replace(raw, name=full) for full, raw in stored.items()}
        elif item is not None:
            tensors[str(name)] = encode(str(name), item)
            entries[str(name)] = json.dumps({"_type": "Tensor"})
    return tensors, {**entries, "tensor_names": json.dumps(list(entries))}


def _tensor(record: Record, name: str) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """The metadata entry and the parts of one weight."""
    kind, state = record.class_name.rpartition(".")[2], record.state
    if not isinstance(state, dict):
        raise BadFile("torchao-pickle", f"a {kind} has no attributes", tensor=name)
    if kind in _WRAPPERS:
        inner = state.get("original_weight_tensor")
        if not isinstance(inner, Record):
            raise BadFile("torchao-pickle", f"a {kind} holds no weight of a known class", tensor=name)
        entry, parts = _tensor(inner, name)
        _add_activations(entry, state.get("input_quant_func"))
        return entry, parts
    if kind == _AQT:
        return _affine(record, state, name)
    if kind not in KINDS:
        raise Unsupported("torchao-type", f"is a pickled {kind}", tensor=name, hint=f"known: {_AQT}, {', '.join(KINDS)}")
    parts = {str(key): raw for key, raw in state.items() if isinstance(raw, RawTensor)}
    found = {"dtype": _dtype(record), "orig_dtype": _dtype(record), "shape": _size(record)}
    found |= {str(key): _plain(item) for key, item in state.items() if not isinstance(item, RawTensor)}
    return _entry(kind, found, parts), parts


def _add_activations(entry: dict[str, Any], function: Any) -> None:
    """What today's class says of activations that are quantized at run time, else a note that they were."""
    word = function.path.rpartition(".")[2] if isinstance(function, Symbol) else "a function"
    if entry["_type"] == "Int8Tensor" and word.startswith("_int8_symm_per_token"):
        rows = {"_type": "PerRow", "_data": {"dim": -1}}
        data = {"granularity": rows, "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}, "reduce_range": False}
        entry["_data"]["act_quant_kwargs"] = {"_type": "QuantizeTensorToInt8Kwargs", "_data": data}
    elif entry["_type"] == "IntxUnpackedToInt8Tensor" and word == "_int8_asymm_per_token_quant":
        entry["_data"]["activation_quantization"] = "int8_asym_per_token"
    else:
        entry["_activations"] = word


def _affine(record: Record, state: Mapping[str, Any], name: str) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    impl, block = state.get("tensor_impl"), state.get("block_size")
    inner = impl.state if isinstance(impl, Record) else None
    if not isinstance(impl, Record) or not isinstance(inner, dict):
        raise BadFile("torchao-pickle", "an AffineQuantizedTensor has no tensor_impl", tensor=name)
    kind, shape = impl.class_name.rpartition(".")[2], _size(record)
    if not isinstance(block, tuple | list) or len(block) != len(shape) or not all(type(n) is int and n > 0 for n in block):
        raise BadFile("torchao-pickle", f"block_size is {block!r}, expected {len(shape)} positive integers", tensor=name)
    sizes = [min(size, length) for size, length in zip(block, shape, strict=True)]
    parts = {_PARTS.get(str(key), str(key)): raw for key, raw in inner.items() if isinstance(raw, RawTensor)}
    data: dict[str, Any] = {"block_size": sizes, "dtype": _dtype(record), "shape": shape}
    domain = state.get("zero_point_domain")
    number = domain.args[0] if isinstance(domain, Record) and domain.args else None
    if kind == "TensorCoreTiledAQTTensorImpl" and number == 2:
        return _entry("Int4TilePackedTo4dTensor", {**data, "block_size": list(block)}, parts), parts
    if kind == "Float8AQTTensorImpl" and not inner.get("transposed"):
        parts["scale"] = _reshaped(parts, "scale", shape, sizes, name)
        return _entry("Float8Tensor", data, parts), parts
    if kind == "PlainAQTTensorImpl" and number in (1, 3) and "qdata" in parts and parts["qdata"].dtype == "I8":
        return _whole_numbers(state, data, parts, number, name)
    raise Unsupported("torchao-type", f"is a pickled AffineQuantizedTensor of {kind} in the zero point domain {number}", tensor=name)


def _whole_numbers(
    state: Mapping[str, Any], data: dict[str, Any], parts: dict[str, RawTensor], domain: int, name: str
) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """Integers of one byte with integer zero points or none."""
    shape, sizes = data["shape"], data["block_size"]
    parts["scale"] = _reshaped(parts, "scale", shape, sizes, name)
    if domain == 3:
        parts.pop("zero_point", None)
    if "zero_point" in parts:
        parts["zero_point"] = _one_byte(_reshaped(parts, "zero_point", shape, sizes, name), name)
    low, high = state.get("quant_min"), state.get("quant_max")
    bits = next((b for b in range(1, 8) if (low, high) in ((-(1 << (b - 1)), (1 << (b - 1)) - 1),)), 8)
    if "zero_point" not in parts or (bits == 8 and parts["zero_point"].dtype == "I8"):
        return _entry("Int8Tensor", data, parts), parts
    data |= {"target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"}, "activation_quantization": None}
    return _entry("IntxUnpackedToInt8Tensor", data, parts), parts


def _entry(kind: str, data: Mapping[str, Any], parts: Mapping[str, RawTensor]) -> dict[str, Any]:
    """A metadata entry that today's class takes: its own attributes and no others."""
    return {"_type": kind, "_data": {key: data[key] for key in _ATTRIBUTES[kind] if key in data}, "_tensor_data_names": list(parts)}


def _reshaped(parts: Mapping[str, RawTensor], part: str, shape: list[int], sizes: list[int], name: str) -> RawTensor:
    """A plane of one number a block in the shape of the blocks; older classes leave out dimensions of one."""
    raw, counts = parts.get(part), tuple(-(-n // size) for n, size in zip(shape, sizes, strict=True))
    if raw is None:
        raise BadFile("torchao-pickle", f"there is no {part}", tensor=name)
    if prod(raw.shape) != prod(counts):
        raise BadFile("torchao-pickle", f"{part} has shape {tuple(raw.shape)}, expected {counts}", tensor=name)
    return replace(raw, shape=counts)


def _one_byte(raw: RawTensor, name: str) -> RawTensor:
    """Integer zero points as today's classes store them."""
    import numpy as np

    if raw.dtype in ("I8", "F16", "BF16", "F32"):  # numbers of the scale's dtype are integers all the same
        return raw
    if raw.dtype not in ("I16", "I32", "I64"):
        raise Unsupported("torchao-type", f"its zero points are {raw.dtype} in the integer domain", tensor=name)
    values = raw.array()
    if values.size and (int(values.min()) < -128 or int(values.max()) > 127):
        raise BadFile("torchao-pickle", f"zero points run over {values.min()} … {values.max()}, expected -128 … 127", tensor=name)
    return RawTensor.from_array(raw.name, "I8", np.ascontiguousarray(values.astype(np.int8)))


def _size(record: Record) -> list[int]:
    """The size among the arguments of a tensor subclass: (dtype, size, strides, …)."""
    size = record.args[1] if len(record.args) > 1 else None
    return [n for n in size if type(n) is int] if isinstance(size, tuple) else []


def _dtype(record: Record) -> dict[str, str]:
    first = record.args[0] if record.args else None
    return {"_type": "torch.dtype", "_data": first.path.removeprefix("torch.") if isinstance(first, Symbol) else ""}


def _plain(value: Any) -> Any:
    """An attribute as JSON, dtypes and kernels as the metadata has them; of other records nothing."""
    if isinstance(value, Symbol):
        return {"_type": "torch.dtype", "_data": value.path.removeprefix("torch.")}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Record) and value.class_name.endswith(".KernelPreference") and value.args:
        return {"_type": "KernelPreference", "_data": str(value.args[0]).upper()}
    return None if isinstance(value, Record) else value
