"""How a module of a compressed-tensors checkpoint rounds its inputs, from the ``input_activations`` of its config group. Torch-free.

Source: compressed-tensors 0.20 ``quantization/lifecycle/forward.py`` (``fake_quantize``), ``forward_helpers.py``, ``utils/helpers.py``
(``calculate_qparams``, ``compute_dynamic_scales_and_zp``) and ``utils/mxfp_utils.py``: every step in the dtype of the inputs, integers
clamped and then rounded, a dynamic scale half the range wide. A scale for each token is one for each row of the inputs, whatever their
number of dimensions (the owner takes one for all rows of a matrix without a batch).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qformats.errors import Unsupported
from qformats.formats.compressed_tensors.config import candidates, inner, preset_inputs
from qformats.formats.packed import one_number
from qformats.formats.protocol import Activations, Inputs, Module

__all__ = ["inputs"]

_MX = {8: "e4m3fn", 6: "e2m3", 4: "e2m1"}
_HINT = 'activations="float" runs the weights alone'


def inputs(module: Module) -> Inputs | None:
    """The rule of the first group that may be the module's; None where it rounds no inputs. ``Unsupported('input-rule')`` for others."""
    group = next(candidates(module.match.config, module.name), None)
    value = None if group is None else (inner(module.match.config).get("config_groups") or {}).get(group.name)
    if group is None or value is None:
        return None
    if isinstance(value, list):
        known = preset_inputs(group.name)
        said: Any = None if known is None else _of_preset(known)
    else:
        said = value.get("input_activations")
    return None if said is None else _rule(module, said)


def _of_preset(known: Activations) -> dict[str, Any]:
    if known.kind == "nvfp4":
        return {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
    kind = "float" if known.kind == "fp8" else "int"
    size = {"group_size": 128} if known.per == "group" else {}
    return {"num_bits": 8, "type": kind, "strategy": known.per, "dynamic": known.dynamic, **size}


def _rule(module: Module, said: Mapping[str, Any]) -> Inputs:
    bits, group, floats = said.get("num_bits", 8), said.get("group_size"), str(said.get("type", "int")).lower() == "float"
    symmetric, dynamic = said.get("symmetric", True), said.get("dynamic", False)
    per = str(said.get("strategy") or ("tensor" if group is None else "group")).lower().replace("tensor_group", "group")
    if per not in ("tensor", "token", "group") or bits not in (range(2, 9) if not floats else (4, 6, 8)) or (floats and not symmetric):
        text = f"its inputs are rounded to {bits} bits of {'float' if floats else 'int'} per {per}, which is not known"
        raise Unsupported("input-rule", text, tensor=module.name, hint=_HINT)
    if floats and bits == 4 and group == 16:
        scale = _static(module, "input_global_scale")
        return Inputs("e2m1", "group", 16, scale, span=6.0, scale_grid="e4m3fn", inverse=True, steps="")
    if floats and group == 32 and (bits < 8 or "uint8" in str(said.get("scale_dtype"))):
        return Inputs(_MX[bits], "group", 32, scale_grid="even", steps="")
    if floats and bits != 8:
        raise Unsupported("input-rule", f"its inputs are rounded to {bits}-bit floats per {per}", tensor=module.name, hint=_HINT)
    highest = 2 ** (bits - 1) - 1
    span = 448.0 if floats else highest + 0.5 if symmetric else 2.0 * highest + 1
    grid, size = "e4m3fn" if floats else f"int{bits}", int(group or 0) if per == "group" else 0
    if dynamic:
        return Inputs(grid, per, size, symmetric=symmetric, span=span, highest=highest, steps="")
    zero = one_number(module.parts["input_zero_point"]) if "input_zero_point" in module.parts else 0.0
    return Inputs(grid, "tensor", 0, _static(module, "input_scale"), zero, highest=highest, steps="")


def _static(module: Module, leaf: str) -> float:
    if leaf not in module.parts:
        raise Unsupported("input-rule", f"its inputs have a static scale and there is no {leaf}", tensor=module.name, hint=_HINT)
    return one_number(module.parts[leaf])
