"""How a torchao weight rounds the inputs that it meets: what its own attributes say. Torch-free.

Source: torchao 0.18.0 ``Int8Tensor.from_hp`` and ``choose_qparams_affine`` (int8: half the range wide, at least float32's eps),
``_choose_scale_float8`` and ``_quantize_affine_float8``, ``to_mx``, ``nvfp4_quantize``, ``IntxUnpackedToInt8Tensor``
(``int8_asym_per_token``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.errors import Unsupported
from qformats.formats.packed import one_number
from qformats.formats.protocol import Inputs, Module
from qformats.formats.torchao.names import entry_of, prefix_of

__all__ = ["inputs"]

_EPS = 2.0**-23
_GRIDS = {"float8_e4m3fn": "e4m3fn", "float8_e5m2": "e5m2", "float4_e2m1fn_x2": "e2m1", "fp6_e2m3": "e2m3", "fp6_e3m2": "e3m2"}
_LARGEST = {"e4m3fn": 448.0, "e5m2": 57344.0}


def inputs(module: Module) -> Inputs | None:
    """None for weights alone, and where inputs are multiplied column by column first; ``Unsupported('input-rule')`` for unknown words."""
    entry = entry_of(module)
    said = entry.attributes.get("act_quant_kwargs")
    if "act_pre_scale" in entry.parts:
        return None
    if entry.attributes.get("activation_quantization") is not None:
        if _word(entry.attributes["activation_quantization"]) != "int8_asym_per_token":
            raise _unknown(module, entry.attributes["activation_quantization"])
        return Inputs("int8", symmetric=False, span=255.0, least=_EPS, reciprocal=True)
    if not isinstance(said, Mapping):
        return None
    data = said.get("_data")
    kind, held = str(said.get("_type")), data if isinstance(data, Mapping) else {}
    known = {"QuantizeTensorToInt8Kwargs": _int8, "QuantizeTensorToFloat8Kwargs": _float8, "QuantizeTensorToMXKwargs": _mx,
             "QuantizeTensorToNVFP4Kwargs": _nvfp4}.get(kind)  # fmt: skip
    if known is None:
        raise _unknown(module, kind)
    return known(module, held)


def _word(value: Any) -> str:
    """A plain value, or one wrapped as ``{"_type", "_data"}``."""
    return str(value.get("_data") if isinstance(value, Mapping) else value)


def _unknown(module: Module, what: Any) -> Unsupported:
    text = f"its inputs are rounded by {what!r}, which is not known"
    return Unsupported("input-rule", text, tensor=module.name, hint='activations="float" runs the weights alone')


def _per(module: Module, held: Mapping[str, Any]) -> str:
    word = held.get("granularity")
    found = {"PerRow": "token", "PerToken": "token", "PerTensor": "tensor"}.get(str(word.get("_type")) if isinstance(word, Mapping) else "")
    if found is None:
        raise _unknown(module, word)
    return found


def _static(module: Module, part: str) -> float | None:
    raw = module.parts.get(prefix_of(module) + part)
    return None if raw is None else one_number(raw)


def _int8(module: Module, held: Mapping[str, Any]) -> Inputs:
    per, scale = _per(module, held), _static(module, "act_quant_scale")
    highest = 63 if held.get("reduce_range") else 127
    if scale is not None:
        return Inputs("int8", "tensor", 0, scale, _static(module, "act_quant_zero_point") or 0.0, highest=highest, reciprocal=True)
    symmetric = _word(held.get("mapping_type") or "SYMMETRIC") == "SYMMETRIC"
    span = (highest + 0.5) * (1 if symmetric else 2)
    return Inputs("int8", per, symmetric=symmetric, span=span, least=_EPS, highest=highest, reciprocal=True)


def _float8(module: Module, held: Mapping[str, Any]) -> Inputs:
    grid, scale = _GRIDS.get(_word(held.get("float8_dtype") or "float8_e4m3fn")), _static(module, "act_quant_scale")
    if grid not in _LARGEST:
        raise _unknown(module, held.get("float8_dtype"))
    if scale is not None:
        return Inputs(grid, "tensor", scale=scale)
    lowest, most, span = held.get("hp_value_lb"), held.get("hp_value_ub"), _LARGEST[grid]
    return Inputs(grid, _per(module, held), span=span, least=float(lowest or 0.0) / span, most=None if most is None else float(most))


def _mx(module: Module, held: Mapping[str, Any]) -> Inputs:
    grid = _GRIDS.get(_word(held.get("elem_dtype") or "float8_e4m3fn"))
    mode = {"FLOOR": "floor", "RCEIL": "ceil"}.get(_word(held.get("scaling_mode") or "FLOOR").rpartition(".")[2].upper())
    if grid is None or mode is None:
        raise _unknown(module, dict(held))
    return Inputs(grid, "group", int(held.get("block_size") or 32), scale_grid=mode)


def _nvfp4(module: Module, held: Mapping[str, Any]) -> Inputs:
    if held.get("use_dynamic_per_tensor_scale"):
        return Inputs("e2m1", "group", 16, span=6.0, scale_grid="e4m3fn", least=2.0**-6, factored=True)
    return Inputs("e2m1", "group", 16, _static(module, "act_per_tensor_scale"), span=6.0, scale_grid="e4m3fn", least=2.0**-6)
