"""The small tensors of an HQQ layer: what each says, how a value is spelled as a tensor, and the layer's sizes checked against each other.

Source: ``encode_safetensor_type`` in ``core/utils.py``, ``_META_TYPE`` and ``HQQLinear.state_dict`` in ``core/quantize.py`` of hqq 0.2.8.
A bool is a uint8, an int an int32, a float a float32, all without dimensions; a word or a dtype is uint8, one number a letter; the shape is
int64 (2,). What is None is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported
from qformats.formats.protocol import Module, PartInfo
from qformats.formats.slabs import Slabs

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DTYPES", "PACKINGS", "PLANES", "SCALARS", "Geometry", "Layer", "bits_of", "encode", "layer", "part_info", "state_of"]

SCALARS = {
    "nbits": "number", "group_size": "int", "shape": "shape", "axis": "int", "packing": "word", "unpack_view_dtype": "word",
    "view_as_float": "bool", "quant_scale": "bool", "quant_zero": "bool", "compute_dtype": "word", "offload_meta": "bool",
    "encoded_state_dict": "bool", "stores_quant_config": "bool", "channel_wise": "bool", "optimize": "bool", "round_zero": "bool",
}  # fmt: skip
PLANES = ("W_q", "scale", "zero", "scale_q", "zero_q", "zero_scale")
DTYPES = {"torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32", "torch.uint8": "U8", "torch.int32": "I32"}
FLOATS = ("torch.float16", "torch.bfloat16", "torch.float32")
# bits of a field, shifts of the slabs, bytes of a word (``core/bitpack.py``)
PACKINGS: dict[str, tuple[int, tuple[int, ...], int]] = {
    "8bit_u8": (8, (0,), 1),
    "4bit_u8": (4, (4, 0), 1),
    "3bit_32": (3, tuple(range(27, -1, -3)), 4),
    "2bit_u8": (2, (6, 4, 2, 0), 1),
    "1bit_u8": (1, tuple(range(7, -1, -1)), 1),
}
_WORDS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1.58: "2bit_u8", 1: "1bit_u8"}
_MOST_LETTERS = 64
_ITEM = {"F16": 2, "BF16": 2, "F32": 4, "U8": 1, "I32": 4}


def bits_of(nbits: float) -> tuple[int, int, str]:
    """Bits of a code, the largest code and the usual packing; ``Unsupported('bits')`` for other widths than HQQ's."""
    near = 1.58 if abs(nbits - 1.58) < 1e-3 else nbits
    if near not in _WORDS:
        raise Unsupported("bits", f"HQQ has no {nbits:g}-bit codes", hint=f"widths: {', '.join(f'{b:g}' for b in sorted(_WORDS))}")
    return (2, 2, _WORDS[near]) if near == 1.58 else (int(near), (1 << int(near)) - 1, _WORDS[near])


def encode(leaf: str, value: Any) -> np.ndarray[Any, Any]:
    """A value of the state as one row of the tensor that stands for it."""
    import numpy as np

    kind = SCALARS[leaf]
    if kind == "bool":
        return np.array([[int(value)]], np.uint8)
    if kind == "word":
        return np.frombuffer(str(value).encode("ascii"), np.uint8).reshape(1, -1).copy()
    if kind == "shape":
        return np.array([list(value)], np.int64)
    return np.array([[value]], np.float32 if isinstance(value, float) else np.int32)


def part_info(leaf: str, value: Any) -> PartInfo:
    """Dtype and shape of what ``encode`` makes."""
    array = encode(leaf, value)
    word = {"uint8": "U8", "int64": "I64", "int32": "I32", "float32": "F32"}[array.dtype.name]
    return PartInfo(word, array.shape[1:] if SCALARS[leaf] in ("word", "shape") else ())


def _bad(raw: RawTensor, expected: str) -> BadFile:
    return BadFile("wrong-dtype", f"is {raw.dtype} of shape {raw.shape}, expected {expected}", tensor=raw.name)


def _decode(leaf: str, raw: RawTensor) -> Any:
    """The value that a small tensor stands for."""
    kind, integers = SCALARS[leaf], ("I64", "I32", "U8", "BOOL", "I16", "I8")
    if kind == "word":
        if raw.dtype not in ("U8", "I32", "I64") or len(raw.shape) != 1 or not 0 < raw.shape[0] <= _MOST_LETTERS:
            raise _bad(raw, "a word, one number a letter")
        letters = [int(n) for n in raw.array()]
        if not all(32 <= n < 127 for n in letters):
            raise BadFile("state-value", "is no word of letters", tensor=raw.name)
        return "".join(map(chr, letters))
    if kind == "shape":
        if raw.dtype not in ("I64", "I32") or raw.shape != (2,):
            raise _bad(raw, "two integers")
        return tuple(int(n) for n in raw.array())
    if prod(raw.shape) != 1 or raw.dtype not in (*integers, *(("F32", "F64") if kind == "number" else ())):
        raise _bad(raw, "one number")
    number = raw.array().reshape(-1)[0]
    if kind == "bool":
        return bool(number)
    if not isfinite(float(number)):
        raise BadFile("state-value", f"is {float(number)}, expected a number", tensor=raw.name)
    return float(number) if raw.dtype in ("F32", "F64") and float(number) != int(number) else int(number)


def state_of(parts: Mapping[str, RawTensor], prefix: str = "") -> dict[str, Any]:
    """The values of all small tensors that are there under ``prefix``."""
    return {leaf: _decode(leaf, parts[prefix + leaf]) for leaf in SCALARS if prefix + leaf in parts}


@dataclass(frozen=True, slots=True)
class Geometry:
    """One packed matrix. ``count``: numbers of its scale; ``kind``: ``rows`` (whole runs of a row under each), ``flat`` (runs of the
    vector), ``cyclic`` (strided) or ``whole`` (one for all); ``group``: elements under each."""

    shape: tuple[int, ...]
    bits: int
    highest: int
    kind: str
    group: int
    count: int
    slabs: Slabs
    plane: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's geometry and its values; ``scale`` and ``zero`` are the stored planes, ``compute`` the container's word of their dtype."""

    geometry: Geometry
    state: Mapping[str, Any]
    compute: str
    scale: RawTensor
    zero: RawTensor


def layer(module: Module) -> Layer:
    """What ``module`` holds, checked; the numbers are read once."""
    return module.remember("layer", _layer)


def _need(module: Module, leaf: str) -> RawTensor:
    raw = module.parts.get(leaf)
    if raw is None:
        raise BadFile(f"missing-{leaf.replace('_', '-').lower()}", f"there is no {module.name}.{leaf}", hint="fetch all shards")
    return raw


def _layer(module: Module) -> Layer:
    state = state_of(module.parts)
    for leaf in ("W_q", "shape", "nbits", "axis"):
        _need(module, leaf)
    n, k = state["shape"]
    if n < 1 or k < 1:
        raise BadFile("wrong-shape", f"says that the weight has shape {(n, k)}", tensor=f"{module.name}.shape")
    compute = _float_word(module, state)
    geometry = geometry_of((n, k), state, module.name)
    _check_codes(module, geometry, state, compute)
    scale, zero = statistic(module, "scale", geometry, state), statistic(module, "zero", geometry, state)
    return Layer(geometry, state, compute, scale, zero)


def _float_word(module: Module, state: Mapping[str, Any]) -> str:
    word = state.get("compute_dtype", "torch.float16")
    if word not in FLOATS:
        raise BadFile("state-value", f"is {word!r}, expected {' or '.join(FLOATS)}", tensor=f"{module.name}.compute_dtype")
    return DTYPES[word]


def geometry_of(shape: tuple[int, ...], state: Mapping[str, Any], name: str) -> Geometry:
    """The packed matrix of a weight of ``shape``; ``BadFile`` where the state contradicts itself."""
    bits, highest, usual = bits_of(state["nbits"])
    packing, axis, total = state.get("packing", usual), state["axis"], prod(shape)
    if packing not in PACKINGS:
        raise BadFile("state-value", f"packing is {packing!r}, expected {', '.join(PACKINGS)}", tensor=name)
    field, shifts, word_nbytes = PACKINGS[packing]
    if axis not in (0, 1) or field < bits:
        raise BadFile("state-value", f"axis {axis} with {bits} bits in {packing}, expected axis 0 or 1 and room for the codes", tensor=name)
    group = state.get("group_size")
    if group is not None and (group < 1 or total % group):
        raise BadFile("group-size", f"groups of {group} do not divide the {total} weights", tensor=name)
    rows, columns = shape[0], total // shape[0]
    single = not state.get("channel_wise", True)
    if group is not None and not single:
        rows, columns = (total // group, group) if axis == 1 else (group, total // group)
    plane: tuple[int, ...] = () if single else (rows, 1) if axis == 1 else (1, columns)
    count = prod(plane)
    group, flat = total // count, "rows" if shape[-1] % (total // count) == 0 else "flat"
    kind = "whole" if count == 1 else flat if axis == 1 else "cyclic"
    slabs = Slabs(rows, columns, field, shifts, word_nbytes)
    if rows % len(shifts) and packing != "3bit_32":
        raise BadFile("group-size", f"{rows} rows of groups do not fill bytes of {len(shifts)} codes", tensor=name)
    return Geometry(shape, bits, highest, kind, group, count, slabs, plane)


def _check_codes(module: Module, g: Geometry, state: Mapping[str, Any], compute: str, leaf: str = "W_q") -> None:
    raw = _need(module, leaf)
    dtype = "U8" if g.slabs.word_nbytes == 1 else "I32"
    shape = (g.slabs.packed_rows, g.slabs.columns)
    if state.get("view_as_float", False):
        size = shape[1] * g.slabs.word_nbytes
        dtype, shape = compute, (shape[0], size // _ITEM[compute] if size % _ITEM[compute] == 0 else -1)
    if raw.dtype != dtype:
        raise BadFile("wrong-dtype", f"is {raw.dtype}, expected {dtype}", tensor=raw.name)
    if raw.shape != shape or raw.nbytes != g.slabs.nbytes:
        raise BadFile("wrong-shape", f"has shape {raw.shape}, expected {shape}", tensor=raw.name)


def statistic(module: Module, leaf: str, g: Geometry, state: Mapping[str, Any]) -> RawTensor:
    """The plane of ``scale`` or ``zero``: floats, or the codes of a quantized one (``scale_q``), or a half of ``zero_scale``."""
    quantized = bool(state.get(f"quant_{leaf}", False))
    name = f"{leaf}_q" if quantized else leaf
    raw = module.parts.get(name)
    if raw is None and "zero_scale" in module.parts:
        both = module.parts["zero_scale"]
        if not both.shape or both.shape[0] != 2:
            raise BadFile("wrong-shape", f"has shape {both.shape}, expected (2, …)", tensor=both.name)
        half = both.nbytes // 2
        raw = replace(both, shape=both.shape[1:], offset=both.offset + (half if leaf == "scale" else 0), nbytes=half)
    raw = _need(module, name) if raw is None else raw
    if quantized:
        return raw
    if raw.dtype not in ("F16", "BF16", "F32"):
        raise BadFile("wrong-dtype", f"is {raw.dtype}, expected F16, BF16 or F32", tensor=raw.name)
    if raw.shape != g.plane or raw.nbytes != g.count * _ITEM[raw.dtype]:
        raise BadFile("wrong-shape", f"has shape {raw.shape}, expected {g.plane}", tensor=raw.name)
    return raw
