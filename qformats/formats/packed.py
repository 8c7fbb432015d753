"""What the two packed integer formats (GPTQ, AWQ) share: config fields, rule matching, target options, float planes. Not a format itself.

Torch-free at import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import TYPE_CHECKING, Any

from qformats.errors import BadFile, UsageError
from qformats.formats.protocol import Module, Target
from qformats.scheme import No, Scheme, Storage, Tile, Yes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, Any]

__all__ = [
    "CONTAINER_FLOATS",
    "FLOATS",
    "affine_verdict",
    "blank_codes",
    "bool_field",
    "check_dtype",
    "dtype_option",
    "dtype_word",
    "dynamic_rules",
    "float_array",
    "float_tensor",
    "group_option",
    "int_field",
    "int_option",
    "made_by",
    "says_group",
    "tool_version",
    "wrong_shape",
    "yes_no",
]

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
CONTAINER_FLOATS = {word: code for code, word in FLOATS.items()}


def int_field(config: Mapping[str, Any], keys: Sequence[str], lowest: int, highest: int) -> int | None:
    """The first of ``keys`` that is there as an integer ``lowest … highest`` other than 0; ``BadFile('config-value')`` otherwise."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not (lowest <= value <= highest) or value == 0:
            raise BadFile("config-value", f"{key} is {value!r}, expected an integer {lowest} … {highest} other than 0")
        return value
    return None


def bool_field(config: Mapping[str, Any], key: str) -> bool | None:
    """``config[key]`` as true, false or None (absent); ``BadFile('config-value')`` for anything else."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadFile("config-value", f"{key} is {value!r}, expected true or false")
    return value


def dynamic_rules(config: Mapping[str, Any], name: str) -> list[Mapping[str, Any] | None]:
    """Every entry of ``dynamic`` that matches module ``name``, in the file's order; None for a negative rule (``-:``).

    The first one counts; a key equal to the name competes like a regex, which must match from the start of the name
    (gptqmodel 7.7.0 ``quantization/config.py _resolve_dynamic_override``).
    """
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise BadFile("config-value", f"dynamic is {type(dynamic).__name__}, expected an object")
    found: list[Mapping[str, Any] | None] = []
    for key, value in dynamic.items():
        pattern = key[2:] if key[:2] in ("-:", "+:") else key
        try:
            matches = pattern == name or re.match(pattern, name) is not None
        except re.error as error:
            raise BadFile("config-value", f"dynamic rule {key!r} is not a regular expression: {error}") from None
        if matches and not key.startswith("-:") and not isinstance(value, Mapping):
            raise BadFile("config-value", f"dynamic rule {key!r} is {type(value).__name__}, expected an object")
        if matches:
            found.append(None if key.startswith("-:") else value)
    return found


def made_by(config: Mapping[str, Any], producer: str) -> bool:
    """Whether ``meta.quantizer`` (``"name:version"`` or a list of them) names ``producer``."""
    meta = config.get("meta")
    named = meta.get("quantizer") if isinstance(meta, Mapping) else None
    entries = named if isinstance(named, list | tuple) else [named]
    return any(str(entry).lower().startswith(producer) for entry in entries if entry)


def tool_version() -> str:
    """The installed version of this library, ``"0"`` where it runs uninstalled."""
    try:
        return installed("qformats")
    except PackageNotFoundError:
        return "0"


def says_group(said: int | None, storage: Storage) -> bool:
    """Whether a config's ``group_size`` describes ``storage``: equal, or one group a row on both sides."""
    width = int_option(storage.options, "in_features", 0)
    one_group = storage.group is None or (width > 0 and storage.group >= width)
    if said is None or not one_group:
        return said == storage.group
    return said == -1 or said == storage.group or said >= width > 0


def wrong_shape(module: Module, leaf: str, expected: str) -> BadFile:
    """The error for a part whose shape contradicts the others."""
    found = tuple(module.parts[leaf].shape)
    return BadFile("wrong-shape", f"{leaf} has shape {found}, expected {expected}", tensor=f"{module.name}.{leaf}")


def check_dtype(module: Module, leaf: str, allowed: Sequence[str]) -> None:
    """``BadFile('wrong-dtype')`` if part ``leaf`` is there with a dtype that is not ``allowed``."""
    part = module.parts.get(leaf)
    if part is not None and part.dtype not in allowed:
        raise BadFile("wrong-dtype", f"{leaf} is {part.dtype}, expected {' or '.join(allowed)}", tensor=f"{module.name}.{leaf}")


def yes_no(target: Target, key: str, default: bool = False) -> bool:
    """A target option as a yes or no; the bare key means yes."""
    value = target.options.get(key)
    if value is None:
        return default
    if value.lower() in ("", "1", "true", "yes", "on"):
        return True
    if value.lower() in ("0", "false", "no", "off"):
        return False
    raise UsageError("option", f"{key}={value} is not a yes or no")


def dtype_word(word: str) -> str:
    """Torch's word of a dtype that a user names: ``f16`` and ``float16`` are one."""
    known = word.lower()
    return {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}.get(known, known)


def dtype_option(target: Target, key: str = "dtype") -> str | None:
    """A float dtype among the options as torch's word; ``UsageError('option')`` for any other."""
    value = target.options.get(key)
    if value is None:
        return None
    if dtype_word(value) not in ("float16", "bfloat16", "float32"):
        raise UsageError("option", f"{key}={value} is not known", hint="use f16, bf16 or f32, or float16, bfloat16 or float32")
    return dtype_word(value)


def group_option(target: Target, scheme: Scheme) -> int | None:
    """Columns a group, None for the whole row: ``group=N|-1``, else the source's group, else 128."""
    value, width = target.options.get("group"), scheme.shape[-1]
    if value is None:
        size = (scheme.group_size or 128) if scheme.scales else 128
        return None if size >= width else size
    if not value.removeprefix("-").isdigit() or int(value) == 0 or int(value) < -1:
        raise UsageError("option", f"group={value} is not a number of columns or -1")
    return None if int(value) == -1 or int(value) >= width else int(value)


def int_option(options: Mapping[str, object], key: str, default: int) -> int:
    """An integer among a storage's options."""
    value = options.get(key, default)
    return value if isinstance(value, int) else default


def blank_codes(shape: tuple[int, int]) -> Tensor:
    """Codes that were not read: a zero-stride plane of zeros."""
    import torch

    return torch.zeros((1, 1), dtype=torch.uint8).expand(shape)


def float_tensor(array: Array, dtype: str) -> Tensor:
    """A container's float plane as a tensor of its own dtype; bfloat16 arrives as uint16."""
    import torch

    return torch.from_numpy(array.view("<i2")).view(torch.bfloat16) if dtype == "BF16" else torch.from_numpy(array)


def float_array(values: Tensor) -> Array:
    """The inverse of ``float_tensor``: the values' own bytes."""
    import torch

    array: Array = values.view(torch.int16).numpy().view("<u2") if values.dtype == torch.bfloat16 else values.numpy()
    return array


def affine_verdict(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether a tensor is in the form that both formats write: integer codes, one scale and one integer zero point for each group."""
    if len(scheme.shape) != 2:
        return No(f"it has {len(scheme.shape)} dimensions, not 2")
    if scheme.grid != storage.grid:
        return No(f"its codes are {scheme.grid}, not {storage.grid}")
    if (scheme.offset is None) != (storage.offset is None) or scheme.signs or len(scheme.scales) != 1:
        return No(f"it has {'an' if storage.offset is None else 'no'} offset, or signs, or several scales")
    tile = Tile((1, min(storage.group or scheme.shape[1], scheme.shape[1])))
    scale, zero = scheme.scales[0], scheme.zero_point
    if scale.block != tile or scale.inverse or scale.dtype not in storage.scale_dtypes:
        return No(f"its scale is {scale.dtype} on {scale.block}, not {' or '.join(storage.scale_dtypes)} on {tile}")
    if storage.offset is not None:
        offset = scheme.offset
        if zero is not None or offset is None or offset.block != tile or offset.dtype != storage.offset:
            return No(f"it has a zero point, or no offset in {storage.offset} on {tile}")
    elif zero is None or zero.dtype not in ("uint8", "int8", "int16", "int32") or (zero.constant is None and zero.block != tile):
        return No("it has no integer zero point for each group")
    if scheme.group_index and not storage.group_index:
        return No("it has an act-order index")
    return Yes()
