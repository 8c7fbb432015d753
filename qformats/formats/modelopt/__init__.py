"""NVIDIA ModelOpt: FP8 for tensors, rows and blocks, NVFP4, MXFP4, MXFP8, INT8, and four-bit AWQ.

Source: ``modelopt/torch/export/{quant_utils,unified_export_hf,convert_hf_config}.py`` and ``modelopt/torch/quantization/qtensor`` of
NVIDIA Model-Optimizer 0.47 (commit a2fbac7).

| quant_algo                       | weight            | weight_scale                             | weight_scale_2 | group |
|----------------------------------|-------------------|------------------------------------------|----------------|-------|
| FP8                              | F8_E4M3 (N, K)    | F32 ()                                   |                | all   |
| FP8_PER_CHANNEL_PER_TOKEN        | F8_E4M3 (N, K)    | F32 (N,)                                 |                | K     |
| FP8_PB_WO                        | F8_E4M3 (N, K)    | F32 (N/128, 1, K/128, 1) or (N/128, K/128) |                | 128   |
| MXFP8                            | F8_E4M3 (N, K)    | U8 (N, K/32), exponents                  |                | 32    |
| NVFP4, NVFP4_AWQ, W4A16_NVFP4, … | U8 (N, K/2)       | F8_E4M3 (N, K/16)                        | F32 ()         | 16    |
| W4A8_MXFP4_FP8                   | U8 (N, K/2)       | U8 (N, K/32), exponents                  |                | 32    |
| W4A16_AWQ, W4A8_AWQ              | U8 (N/2, K)       | float (N, K/group)                       | F32 (), W4A8   | 128   |
| W8A16, W8A8_SQ_PER_CHANNEL       | I8 (N, K)         | float (N,)                               |                | K     |

Two e2m1 codes share a byte along K, the even column low: 10 32 54 76 are the codes 0 … 7. Four-bit integers share one along N, the even
row low, in two's complement. All scales multiply. ``pre_quant_scale`` (K,) multiplies the *input*; as y = W (p x) = (W p) x it is one more
scale of the weight here, one for each column. ``weight_scale_2`` of W4A8_AWQ belongs to the FP8 step of a kernel, not to the weight.
The config is ``quantization_config`` of config.json, or ``hf_quant_config.json`` beside it, or both.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats import smallfloats
from qformats.formats.modelopt import integers
from qformats.formats.modelopt.settings import (
    INPUTS,
    activations,
    config_beside,
    config_out,
    detect,
    has_static_inputs,
    layer_of,
    side_files,
    with_activations,
)
from qformats.formats.packed import FLOATS, float_array, group_option, one_number
from qformats.formats.protocol import Inputs, Module, PartInfo, Piece, Target
from qformats.scheme import Factor, Float, Integer, No, ParamSpec, Scheme, Storage, Tile, Yes

if TYPE_CHECKING:
    from qformats.tensor import QuantizedTensor

__all__ = [
    "EXTRAS",
    "INPUT_SCALES",
    "INPUT_SCALE_SHAPE",
    "NAME",
    "SUFFIXES",
    "activations",
    "can_store",
    "config_beside",
    "config_out",
    "detect",
    "holds_codes",
    "inputs",
    "layout",
    "module_warnings",
    "read",
    "scheme",
    "side_files",
    "storage_of",
    "storages",
    "with_activations",
    "write",
]

NAME = "modelopt"
SUFFIXES: frozenset[str] = frozenset({"weight_scale", "weight_scale_2", "pre_quant_scale"})
EXTRAS = frozenset({"input_scale", "output_scale", "k_scale", "v_scale", "k_bias", "v_bias"})
INPUT_SCALES = dict.fromkeys(("fp8", "int8", "nvfp4"), (("input_scale",), False))
INPUT_SCALE_SHAPE: tuple[int, ...] = ()
PB_BLOCK = 128
_FLOATS = tuple(FLOATS)
_CODES = ("F8_E4M3", "U8", "I8")
_EXPONENTS = ("U8", "F8_E8M0")
_EIGHT, _NV, _MX = (("F8_E4M3",), _FLOATS), (("U8",), ("F8_E4M3",)), (("U8",), _EXPONENTS)
_DTYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # of codes and of scales
    "FP8": _EIGHT, "FP8_PER_CHANNEL_PER_TOKEN": _EIGHT, "FP8_PB_WO": _EIGHT, "MXFP8": (("F8_E4M3",), _EXPONENTS),
    "NVFP4": _NV, "NVFP4_AWQ": _NV, "W4A16_NVFP4": _NV, "W4A8_NVFP4_FP8": _NV, "W4A8_MXFP4_FP8": _MX, "MXFP4": _MX,
    "W4A16_AWQ": (("U8",), _FLOATS), "W4A8_AWQ": (("U8",), _FLOATS), "W8A16": (("I8",), _FLOATS),
    "W8A8_SQ_PER_CHANNEL": (("I8",), _FLOATS),
}  # fmt: skip


def holds_codes(parts: Mapping[str, RawTensor]) -> bool:
    """Whether these are the parts of a weight in codes, whole or not."""
    raw = parts.get("weight")
    return bool(SUFFIXES & parts.keys()) or (raw is not None and raw.dtype in _CODES)


def _parts(module: Module) -> tuple[RawTensor, RawTensor, RawTensor | None]:
    """``weight``, ``weight_scale`` and ``pre_quant_scale``."""
    if any(leaf.startswith("svdquant_lora") for leaf in module.parts):
        raise Unsupported(
            "svdquant", "has a low-rank part beside its codes (NVFP4_SVD)", tensor=module.name, hint="export it without SVDQuant"
        )
    raw = smallfloats.part_of(module, "weight", _CODES)
    scale = smallfloats.part_of(module, "weight_scale", (*_FLOATS, "U8", "F8_E8M0", "F8_E4M3"))
    before = module.parts.get("pre_quant_scale")
    if before is not None and before.dtype not in _FLOATS:
        raise BadFile("wrong-dtype", f"is {before.dtype}, expected {' or '.join(_FLOATS)}", tensor=before.name)
    if len(raw.shape) != 2 or not raw.nbytes:
        raise BadFile("wrong-shape", f"has shape {tuple(raw.shape)}, expected two dimensions", tensor=raw.name)
    _check_algorithm(module, raw, scale)
    return raw, scale, before


def _check_algorithm(module: Module, raw: RawTensor, scale: RawTensor) -> None:
    """``BadFile('config-disagrees')`` for planes of other dtypes than the config's algorithm has, ``wrong-shape`` for other groups."""
    algorithm, group = layer_of(module.match.config, module.name)
    if algorithm is None:
        return
    codes, scales = _DTYPES[algorithm]
    if raw.dtype not in codes or scale.dtype not in scales:
        text = f"the config says {algorithm}, but weight is {raw.dtype} under scales in {scale.dtype}"
        raise BadFile("config-disagrees", text, tensor=module.name, hint="check quant_algo in config.json")
    if not _is_integers(raw, scale):
        return
    n, k = integers.shape_of(raw)
    width = k if raw.dtype == "I8" else group
    if width is not None and tuple(scale.shape) not in ((n, -(-k // width)), *(((n,),) if width >= k else ())):
        expected = f"{(n, -(-k // width))} for {algorithm} in groups of {width}"
        raise BadFile("wrong-shape", f"has shape {tuple(scale.shape)}, expected {expected}", tensor=scale.name)


def _is_integers(raw: RawTensor, scale: RawTensor) -> bool:
    return raw.dtype == "I8" or (raw.dtype == "U8" and scale.dtype in _FLOATS)


def _weight(module: Module) -> smallfloats.Weight:
    """A stored weight of small floats, checked, the column factor last; ``BadFile`` where its planes disagree."""
    raw, scale, before = _parts(module)
    packed = raw.dtype == "U8"
    shape = smallfloats.unpacked_shape(raw) if packed else tuple(raw.shape)
    down, across = smallfloats.counts(shape, PB_BLOCK, PB_BLOCK)
    also = ((down, 1, across, 1),) if scale.dtype in _FLOATS and scale.shape[:1] == (down,) else ()
    scales = [smallfloats.tiles(scale, shape, *_tile(module, raw, scale, shape), *also)]
    if packed and scale.dtype == "F8_E4M3":
        scales.append(smallfloats.tiles(smallfloats.part_of(module, "weight_scale_2", ("F32",)), shape, None, None))
    if before is not None:
        scales.append(smallfloats.tiles(before, shape, None, 1))
    return smallfloats.Weight(raw, Float("e2m1" if packed else "e4m3fn"), shape, tuple(scales))


def _tile(module: Module, raw: RawTensor, scale: RawTensor, shape: tuple[int, ...]) -> tuple[int | None, int | None]:
    """Rows and columns under one scale: by the algorithm of the config, else by the dtypes and the shape of the scale."""
    if raw.dtype == "U8" or scale.dtype in ("U8", "F8_E8M0"):
        return 1, 16 if scale.dtype == "F8_E4M3" else 32
    algorithm = layer_of(module.match.config, module.name)[0]
    if algorithm == "FP8_PB_WO":
        return PB_BLOCK, PB_BLOCK
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return 1, None
    across = [n for n in scale.shape if n != 1]
    if not across:
        return None, None
    blocks = smallfloats.counts(shape, PB_BLOCK, PB_BLOCK)
    if algorithm is None and across == [n for n in blocks if n != 1] and len(scale.shape) > 1:
        return PB_BLOCK, PB_BLOCK
    return 1, None


def scheme(module: Module) -> Scheme:
    """The scheme of the weight from the headers."""
    raw, scale, before = _parts(module)
    return integers.scheme_of(raw, scale, before) if _is_integers(raw, scale) else smallfloats.scheme_of(_weight(module))


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop`` as a tensor (stop - start, K); ``BadFile('not-finite')`` for a scale that is no number."""
    raw, scale, before = _parts(module)
    if _is_integers(raw, scale):
        return integers.read(raw, scale, before, start, stop, codes=codes)
    return smallfloats.read(_weight(module), start, stop, codes=codes)


def inputs(module: Module) -> Inputs | None:
    """The rule of the layer's algorithm; None where it rounds no inputs, has no static scale, or multiplies inputs by column first.

    ModelOpt's ``input_scale`` is amax over the grid's largest number, for NVFP4 over 6 * 448; MXFP8's scales are not below amax / 448.
    """
    word = layer_of(module.match.config, module.name)[0]
    said = None if word is None else INPUTS.get(word)
    if said is None:
        return None
    if "pre_quant_scale" in module.parts:
        _say_once(f"{word}: inputs that pre_quant_scale multiplies first are not rounded; the weights are as published")
        return None
    if said.kind == "mxfp8":
        return Inputs("e4m3fn", "group", 32, scale_grid="ceil")
    if said.dynamic:
        return Inputs("e4m3fn", said.per, span=448.0)
    if "input_scale" not in module.parts:
        return None
    scale = one_number(module.parts["input_scale"])
    if said.kind == "nvfp4":
        return Inputs("e2m1", "group", 16, scale, span=6.0, scale_grid="e4m3fn")
    return Inputs("int8" if said.kind == "int8" else "e4m3fn", "tensor", scale=scale)


@cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def module_warnings(module: Module) -> list[str]:
    """What its weight alone does not tell: factors of the input, and a second rounding inside a kernel."""
    told = []
    if "pre_quant_scale" in module.parts:
        told.append("pre_quant_scale multiplies the input; it is taken as a factor of the weight's columns")
    raw, scale, _ = _parts(module)
    if _is_integers(raw, scale) and "weight_scale_2" in module.parts:
        told.append("weight_scale_2 of W4A8_AWQ belongs to a kernel's FP8 step, which is not applied to the weight")
    return told


# ---------------------------------------------------------------- storages


def storage_of(module: Module) -> Storage:
    """The storage of a stored weight; its algorithm is that of the config where it fits, else the plainest of such planes."""
    raw, scale, before = _parts(module)
    options: dict[str, object] = {"scale_shape": list(scale.shape), "codes": raw.dtype}
    if before is not None:
        options["pre_quant"] = FLOATS[before.dtype]
    if _is_integers(raw, scale):
        made = integers.storage_of(raw, scale, before, options)
        fitting: tuple[str, ...] = ("W4A16_AWQ", "W4A8_AWQ") if raw.dtype == "U8" else ("W8A16", "W8A8_SQ_PER_CHANNEL")
    else:
        weight = _weight(module)
        if before is not None:
            weight = replace(weight, scales=weight.scales[:-1])
        name, fits = _kind(weight)
        fitting, multiple = fits, (weight.scales[0].group or 1) if weight.packed else 1
        made = smallfloats.storage_of(weight, name, _bits(weight), options, multiple)
    options["algo"] = _algorithm(module, fitting)
    return made


def _kind(weight: smallfloats.Weight) -> tuple[str, tuple[str, ...]]:
    """The type's name and the algorithms that such planes belong to."""
    first = weight.scales[0]
    if weight.packed:
        if first.grid == Float("e8m0"):
            return "mxfp4", ("W4A8_MXFP4_FP8", "MXFP4")
        return "nvfp4", ("W4A16_NVFP4", "NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8")
    if first.grid is not None:
        return "mxfp8", ("MXFP8",)
    if first.rows == PB_BLOCK:
        return "fp8", ("FP8_PB_WO",)
    return "fp8", ("FP8",) if first.rows is None else ("FP8_PER_CHANNEL_PER_TOKEN", "FP8")


def _bits(weight: smallfloats.Weight) -> float:
    first = weight.scales[0]
    each = 0.0 if first.group is None else (8 if first.grid is not None else 32) / (first.group * (first.rows or 1))
    return (4.0 if weight.packed else 8.0) + each


def _algorithm(module: Module, fitting: tuple[str, ...]) -> str:
    said = layer_of(module.match.config, module.name)[0]
    return said if said in fitting else fitting[0]


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """fp8 (``scale=tensor|channel|block``), mxfp8, mxfp4, nvfp4, int4 (``group=N``), int8; without a type those of the source's grid."""
    named = {"fp8": _eights, "mxfp8": _exponents, "mxfp4": _exponents, "nvfp4": _nvfp4, "int4": _integers, "int8": _integers}
    if target.type is not None and target.type not in named:
        raise UsageError("target-type", f"modelopt has no type {target.type!r}", hint=f"types: {', '.join(named)}")
    kinds = [target.type] if target.type else _likely(scheme)
    return [storage for kind in kinds for storage in named[kind](kind, target, scheme)]


def _likely(scheme: Scheme) -> list[str]:
    if isinstance(scheme.grid, Integer):
        return ["int4"] if scheme.grid.bits <= 4 else ["int8"]
    small = scheme.scales[0].nested is not None if scheme.scales else False
    if scheme.grid == Float("e2m1"):
        return ["nvfp4", "mxfp4"]
    return ["mxfp8", "fp8"] if small else ["fp8"]


def _eights(kind: str, target: Target, scheme: Scheme) -> list[Storage]:
    shapes: dict[str, tuple[str, int | None, int | None, float]] = {
        "channel": ("FP8_PER_CHANNEL_PER_TOKEN", 1, None, 8.0),
        "tensor": ("FP8", None, None, 8.0),
        "block": ("FP8_PB_WO", PB_BLOCK, PB_BLOCK, 8.0 + 32 / PB_BLOCK**2),
    }
    word = target.options.get("scale")
    if word is not None and word not in shapes:
        raise UsageError("option", f"scale={word} is not tensor, channel or block")
    order = [word] if word is not None else sorted(shapes, key=lambda name: not _has_tiles(scheme, shapes[name][1], shapes[name][2]))
    if word is None and not has_static_inputs(target.inputs):
        order.remove("tensor")  # its loaders want a static scale of the inputs; a row's scale comes with inputs that are measured
    return [Storage("fp8", Float("e4m3fn"), group, bits, ("float32",), rows=rows, options={"algo": algo})
            for algo, rows, group, bits in (shapes[name] for name in order)]  # fmt: skip


def _has_tiles(scheme: Scheme, rows: int | None, group: int | None) -> bool:
    """Whether the source's first scale is on these tiles already."""
    block = scheme.scales[0].block if scheme.scales and isinstance(scheme.grid, Float) else None
    n, k = scheme.shape[-2:]
    return isinstance(block, Tile) and (min(block.sizes[-2], n), min(block.sizes[-1], k)) == (min(rows or n, n), min(group or k, k))


def _exponents(kind: str, target: Target, scheme: Scheme) -> list[Storage]:
    four = kind == "mxfp4"
    grid, algo = Float("e2m1" if four else "e4m3fn"), "W4A8_MXFP4_FP8" if four else "MXFP8"
    return [
        Storage(kind, grid, 32, (4 if four else 8) + 0.25, ("float32",), k_multiple=32, scale_grid=Float("e8m0"), options={"algo": algo})
    ]


def _nvfp4(kind: str, target: Target, scheme: Scheme) -> list[Storage]:
    return [Storage("nvfp4", Float("e2m1"), 16, 4.5, ("float32",), k_multiple=16, scale_grid=Float("e4m3fn"),
                    factor=Factor("float32"), whole=True, options={"algo": "W4A16_NVFP4"})]  # fmt: skip


def _integers(kind: str, target: Target, scheme: Scheme) -> list[Storage]:
    if kind == "int8":
        return [Storage("int8", Integer(8, signed=True), None, 8.0, (dtype,), options={"algo": "W8A16"}) for dtype in _dtypes(scheme)]
    group = group_option(target, scheme)
    bits = 4 + 32 / (group or scheme.shape[-1])
    return [Storage("int4", Integer(4), group, bits, (dtype,), zero_point=integers.ZERO, n_multiple=2, options={"algo": "W4A16_AWQ"})
            for dtype in _dtypes(scheme)]  # fmt: skip


def _dtypes(scheme: Scheme) -> list[str]:
    """float32, after the source's own dtype of scales."""
    own = scheme.scales[0].dtype if scheme.scales else "float32"
    return [own, "float32"] if own in ("float16", "bfloat16") else ["float32"]


# ---------------------------------------------------------------- writing


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K); ``Unsupported('n-multiple')`` where four-bit rows do not pair up."""
    from qformats.formats.packed import CONTAINER_FLOATS

    n, k = shape
    counts = smallfloats.counts(shape, storage.rows, storage.group)
    if isinstance(storage.grid, Integer):
        if n % storage.n_multiple:
            raise Unsupported("n-multiple", f"{n} rows are not a multiple of {storage.n_multiple}, as {storage.type} needs")
        codes = PartInfo("U8", (n // 2, k)) if storage.grid.bits == 4 else PartInfo("I8", (n, k))
        scale = PartInfo(CONTAINER_FLOATS[storage.scale_dtypes[0]], counts)
    else:
        codes, scale = smallfloats.code_part(storage, shape), smallfloats.scale_part(storage, shape)
    stored = storage.options.get("scale_shape")
    if isinstance(stored, list) and [x for x in stored if x != 1] == [x for x in counts if x != 1]:
        scale = PartInfo(scale.dtype, tuple(stored))
    else:
        scale = PartInfo(scale.dtype, () if storage.rows is None else counts[:1] if storage.group is None else counts)
    parts = {"weight": codes, "weight_scale": scale}
    if storage.factor is not None:
        parts["weight_scale_2"] = PartInfo("F32", ())
    if "pre_quant" in storage.options:
        parts["pre_quant_scale"] = PartInfo(CONTAINER_FLOATS[str(storage.options["pre_quant"])], (k,))
    return parts


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """A tensor in the storage's form, with a factor for each column last where the storage has ``pre_quant``."""
    if "pre_quant" in storage.options:
        if len(scheme.scales) < 2 or not _is_columns(scheme.scales[-1], scheme.shape, str(storage.options["pre_quant"])):
            return No("it has no factor for each column")
        scheme = replace(scheme, scales=scheme.scales[:-1])
    if not isinstance(storage.grid, Integer):
        return smallfloats.can_store(storage, scheme)
    zero = scheme.zero_point
    if storage.zero_point is not None and (zero is None or zero.constant != storage.zero_point):
        return No(f"its zero point is not {storage.zero_point}")
    if storage.zero_point is None and zero is not None:
        return No("it has a zero point")
    return smallfloats.can_store(storage, replace(scheme, zero_point=None))


def _is_columns(spec: ParamSpec, shape: tuple[int, ...], dtype: str) -> bool:
    block = spec.block
    tiled = isinstance(block, Tile) and block.sizes[-1] == 1 and block.sizes[-2] >= shape[-2]
    return tiled and spec.dtype == dtype and not spec.inverse


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows from ``start`` of the weight (N, K); ``Unsupported('storage-form')`` for another form, ``row-range`` for half a byte."""
    answer = can_store(storage, tensor.scheme)
    if isinstance(answer, No):
        raise Unsupported("storage-form", f"cannot be written as modelopt {storage.type}: {answer.reason}")
    if isinstance(storage.grid, Integer) and storage.grid.bits == 4:
        if start % 2 or tensor.shape[0] % 2:
            raise Unsupported("row-range", f"rows {start} … {start + tensor.shape[0]} are not whole pairs")
        pieces = [Piece("weight", integers.pack_rows(tensor), start // 2)]
    elif isinstance(storage.grid, Integer):
        pieces = [Piece("weight", tensor.codes.contiguous().numpy(), start)]
    else:
        pieces = [Piece("weight", smallfloats.write_codes(storage, tensor), start)]
    flat = len(layout(storage, shape)["weight_scale"].shape) == 1 and storage.rows is not None  # (N,): one row of the plane
    for piece in smallfloats.scale_pieces(storage, tensor, "weight_scale", start, shape):
        pieces.append(Piece(piece.leaf, piece.array.reshape(1, -1), 0, piece.row) if flat else _folded(piece, storage, shape))
    if storage.factor is not None:
        pieces += smallfloats.factor_pieces(tensor, "weight_scale_2", start, shape)
    if "pre_quant" in storage.options and start == 0:
        values: Any = tensor.scales[-1].values
        pieces.append(Piece("pre_quant_scale", float_array(values.contiguous())))
    return pieces


def _folded(piece: Piece, storage: Storage, shape: tuple[int, ...]) -> Piece:
    """Rows of a plane (rows, groups) in a part of more dimensions, of which only the last counts as columns: (N/128, 1, K/128, 1)."""
    stored = layout(storage, shape)["weight_scale"].shape
    if len(stored) < 3:
        return piece
    width = stored[-1]
    return Piece(piece.leaf, piece.array.reshape(-1, width), piece.row * piece.array.shape[1] // width)
