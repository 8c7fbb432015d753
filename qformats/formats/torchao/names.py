"""Stored names of torchao's tensor parts, and the one JSON text a tensor has in ``__metadata__``. Torch-free.

Source: torchao 0.18.0 ``prototype/safetensors/safetensors_support.py`` and ``safetensors_utils.py``. The part ``qdata`` of the parameter
``M.weight`` is stored as ``M._weight_qdata``, that of ``M.gate_up_proj`` (experts, whose parameters are no modules) as
``M._gate_up_proj_qdata``. Here a parameter ``weight`` belongs to module ``M`` with leaves ``_weight_qdata``, any other parameter is a
module of its own, ``M.gate_up_proj``, with leaves ``_qdata``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported
from qformats.formats.protocol import Module

__all__ = [
    "EXTRAS",
    "KINDS",
    "SUFFIXES",
    "Entry",
    "dtype_of",
    "entry_of",
    "join_name",
    "logical_name",
    "part_of",
    "prefix_of",
    "split_name",
]

_WEIGHTS = ("qdata", "scale", "zero_point", "scale_and_zero", "per_tensor_scale", "act_pre_scale")
_ACTIVATIONS = ("act_quant_scale", "act_quant_zero_point", "act_per_tensor_scale")
_BY_LENGTH = sorted((*_WEIGHTS, *_ACTIVATIONS), key=len, reverse=True)
SUFFIXES: frozenset[str] = frozenset(f"{prefix}{part}" for prefix in ("_weight_", "_") for part in _WEIGHTS)
EXTRAS: frozenset[str] = frozenset(f"{prefix}{part}" for prefix in ("_weight_", "_") for part in _ACTIVATIONS)
# classes torchao can save as safetensors (``ALLOWED_TENSORS_SUBCLASSES``)
KINDS = (
    "Float8Tensor", "Int4Tensor", "Int4TilePackedTo4dTensor", "IntxUnpackedToInt8Tensor", "Int8Tensor", "Int4PlainInt32Tensor",
    "MXTensor", "NVFP4Tensor",
)  # fmt: skip
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def split_name(stored: str) -> tuple[str, str]:
    """The module and the leaf of a stored tensor."""
    module, _, last = stored.rpartition(".")
    if module and last.startswith("_"):
        for part in _BY_LENGTH:
            parameter = last[1 : -len(part) - 1]
            if last.endswith(f"_{part}") and parameter:
                return (module, last) if parameter == "weight" else (f"{module}.{parameter}", f"_{part}")
    return module, last


def join_name(module: str, leaf: str) -> str:
    """The inverse of ``split_name``."""
    if leaf.startswith("_") and not leaf.startswith("_weight_") and leaf in SUFFIXES | EXTRAS:
        owner, _, parameter = module.rpartition(".")
        return f"{owner}._{parameter}{leaf}"
    return f"{module}.{leaf}" if module else leaf


def prefix_of(module: Module) -> str:
    """``_weight_`` for the weight of a module, ``_`` for a parameter of another name."""
    return "_weight_" if any(leaf.startswith("_weight_") for leaf in module.parts) else "_"


def logical_name(name: str, prefix: str) -> str:
    """The parameter's name, as the metadata has it."""
    return f"{name}.weight" if prefix == "_weight_" else name


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the metadata: its class, its attributes, and its parts that are stored; ``text``: the JSON verbatim, under ``key``."""

    type: str
    attributes: Mapping[str, Any]
    parts: tuple[str, ...]
    text: str
    key: str = ""


def entry_of(module: Module) -> Entry:
    """What ``__metadata__`` says of ``module``'s weight.

    ``BadFile('torchao-metadata')`` where it says nothing, no JSON of the right shape, or names other parts than are stored;
    ``Unsupported('torchao-type')`` for a class that is not known.
    """
    found = module.memo.get("entry")
    if found is None:
        found = module.memo["entry"] = _find_entry(module)
    assert isinstance(found, Entry)
    return found


def _find_entry(module: Module) -> Entry:
    metadata, prefix = module.match.metadata, prefix_of(module)
    name = logical_name(module.name, prefix)
    hint = "the file was saved without torchao's metadata; save it again with transformers"
    if not isinstance(metadata.get("tensor_names"), str) or not _is_list_of_names(metadata["tensor_names"]):
        raise BadFile("torchao-metadata", "the metadata has no list of tensor_names", tensor=name, hint=hint)
    key = name if name in metadata else _renamed(name, metadata) or ""
    text = metadata.get(key)
    if not isinstance(text, str):
        raise BadFile("torchao-metadata", "the metadata does not say what this tensor is", tensor=name, hint=hint)
    entry = replace(_parsed(text, name), key=key)
    stored = {leaf.removeprefix(prefix) for leaf in module.parts if leaf in SUFFIXES | EXTRAS}
    if stored != set(entry.parts):
        missing, extra = sorted(set(entry.parts) - stored), sorted(stored - set(entry.parts))
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]} beside them"
        message = f"the metadata names the parts {', '.join(entry.parts)}, the file {what}"
        raise BadFile("torchao-parts", message, tensor=name, hint="fetch all shards")
    return entry


def _renamed(name: str, metadata: Mapping[str, Any]) -> str | None:
    """The one entry whose name is ``name`` with another word in one place, None where there is none or more.

    transformers 5.23 saves tensors under their names in the checkpoint (``block_sparse_moe.experts.down_proj``) and the metadata under
    the model's own (``mlp.experts.down_proj``).
    """
    words = name.split(".")
    spans = [key.split(".") for key in metadata]
    others = [key for key in spans if len(key) == len(words) and sum(a != b for a, b in zip(key, words)) == 1]
    near = [key for key in others if key[-2:] == words[-2:] and not any(a != b and (a + b).isdigit() for a, b in zip(key, words))]
    return ".".join(near[0]) if len(near) == 1 else None


def _parsed(text: str, name: str) -> Entry:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BadFile("torchao-metadata", "the metadata entry is not JSON", tensor=name) from None
    kind = value.get("_type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise BadFile("torchao-metadata", "the metadata entry names no class", tensor=name)
    if kind not in KINDS:
        raise Unsupported("torchao-type", f"is a {kind}", tensor=name, hint=f"known: {', '.join(KINDS)}")
    attributes, parts = value.get("_data"), value.get("_tensor_data_names")
    if not isinstance(attributes, dict) or not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise BadFile("torchao-metadata", f"the metadata entry of a {kind} has no _data or no _tensor_data_names", tensor=name)
    return Entry(kind, attributes, tuple(parts), text)


@lru_cache(maxsize=8)
def _is_list_of_names(text: str) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def dtype_of(entry: Entry, key: str, name: str, allowed: tuple[str, ...] = _FLOATS) -> str:
    """An attribute that is a dtype, as torch's word; ``BadFile('torchao-attribute')`` for anything else."""
    value = entry.attributes.get(key)
    word = value.get("_data") if isinstance(value, dict) and value.get("_type") == "torch.dtype" else value
    if not isinstance(word, str) or word not in allowed:
        raise BadFile("torchao-attribute", f"{key} is {word!r}, expected {' or '.join(allowed)}", tensor=name)
    return word


def part_of(module: Module, name: str, allowed: tuple[str, ...]) -> RawTensor | None:
    """The stored part ``name`` with one of the container dtypes ``allowed``, or None; ``BadFile('wrong-dtype')`` for others."""
    raw = module.parts.get(prefix_of(module) + name)
    if raw is not None and raw.dtype not in allowed:
        raise BadFile("wrong-dtype", f"is {raw.dtype}, expected {' or '.join(allowed)}", tensor=raw.name)
    return raw
