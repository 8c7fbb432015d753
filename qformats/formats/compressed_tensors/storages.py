"""The types that compressed-tensors can hold, as ``Storage`` values: candidates for a target, the one that a module is in, and their parts.

Torch-free. ``options`` of a storage: ``format`` (the owner's word), ``packing`` (``stream``: releases from 0.18; ``words``: 0.17 and
before), ``strategy``, and of a stored module what its bytes need beside (``zero``, ``zero_dtype``, ``g_idx``, ``g_idx_dtype``,
``shape_dtype``, ``scale_rank``, ``scale_code``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qformats.bits import words_for
from qformats.errors import Unsupported, UsageError
from qformats.formats.compressed_tensors.shapes import MX, Geometry, geometry, packed_words
from qformats.formats.packed import CONTAINER_FLOATS, FLOATS, dtype_option, yes_no
from qformats.formats.protocol import Module, PartInfo, Target
from qformats.scheme import Factor, Float, Integer, No, Scheme, Storage, Tile, Yes, whole

__all__ = ["OPTIONS", "TYPES", "can_store", "layout", "storage_of", "storages"]

TYPES = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "fp8", "nvfp4", "mxfp4", "mxfp6", "mxfp8")
OPTIONS = ("group", "channel", "tensor", "block", "sym", "asym", "format", "scale", "packing", "act-order")
_SCALES = ("float16", "bfloat16", "float32")
_FORMATS = {"pack": "pack-quantized", "int": "int-quantized", "naive": "naive-quantized"}
_SMALL = {
    "nvfp4": (Float("e2m1"), 16, Float("e4m3fn"), "nvfp4-pack-quantized"),
    "mxfp4": (Float("e2m1"), 32, Float("e8m0"), "mxfp4-pack-quantized"),
    "mxfp6": (Float("e2m3"), 32, Float("e8m0"), "mxfp6-pack-quantized"),
    "mxfp8": (Float("e4m3fn"), 32, Float("e8m0"), "mxfp8-quantized"),
}
_WIDTH = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}


def _small(kind: str, scale_code: str = "") -> Storage:
    grid, block, scale, form = _SMALL[kind]
    bits = 4 if kind == "nvfp4" else MX[kind][1]
    factor = Factor("float32", inverse=True) if kind == "nvfp4" else None
    options: dict[str, object] = {"format": form, "strategy": "tensor_group" if factor else "group", "scale_code": scale_code or "U8"}
    return Storage(
        kind, grid, block, bits + 8 / block, (), k_multiple=block, scale_grid=scale, factor=factor, whole=bool(factor), options=options
    )


def _strategy(rows: int | None, group: int | None) -> str:
    return "tensor" if rows is None else "block" if rows > 1 else "group" if group else "channel"


def _affine(bits: int, form: str, rows: int | None, group: int | None, sym: bool, dtype: str, options: dict[str, object]) -> Storage:
    """Integers: packed ones are unsigned around 2^(b-1), bytes are signed."""
    signed = form != "pack-quantized"
    half = 1 << (bits - 1)
    zero: int | tuple[int, int] | None = (None if signed else half) if sym else (-half, half - 1) if signed else (0, 2 * half - 1)
    extra = (_WIDTH[dtype] + (0 if sym else 8 if signed else bits)) / ((group or 4096) * (rows or 4096))
    width = 8 if signed else 32 / (32 // bits) if options.get("packing") == "words" else bits
    at_once = not sym and not signed and options.get("packing") == "words" and 32 % bits > 0
    held = {"format": form, "strategy": _strategy(rows, group), "packing": "stream"} | options
    return Storage(
        f"int{bits}", Integer(bits, signed), group, width + extra, (dtype,), zero_point=zero, k_multiple=_whole_groups(group),
        rows=rows, options=held, whole=at_once,
    )  # fmt: skip


def _whole_groups(group: int | None) -> int:
    """Groups must divide a row: compressed-tensors refuses a short last one."""
    return group or 1


def _float8(rows: int | None, group: int | None, dtype: str, options: dict[str, object]) -> Storage:
    held = {"format": "float-quantized", "strategy": _strategy(rows, group)} | options
    extra = _WIDTH[dtype] / ((group or 4096) * (rows or 4096))
    multiple = _whole_groups(group) if rows == 1 else 1
    return Storage("fp8", Float("e4m3fn"), group, 8 + extra, (dtype,), k_multiple=multiple, rows=rows, options=held)


def storage_of(module: Module) -> Storage:
    """The storage whose ``write`` gives these very parts; for sparse, dense and stacked weights one that takes nothing."""
    g = geometry(module)
    if g.kind in ("dense", "sparse", "sparse24") or len(g.shape) != 2:
        word = "stacked" if len(g.shape) != 2 else {"sparse": "sparse-bitmask", "sparse24": "sparse-24-bitmask"}.get(g.kind, "dense")
        return Storage(word, Integer(1), 1, 16.0, options={"format": word, "read_only": True})
    if g.kind in _SMALL:
        return _small(g.kind, g.scale)
    options = _stored_options(module, g)
    group = None if g.strategy in ("tensor", "channel") else g.group
    dtype = FLOATS[g.scale]
    if g.kind == "float":
        return _float8(g.rows, group, dtype, options)
    form = "pack-quantized" if g.kind == "pack" else "int-quantized"
    made = _affine(g.bits, form, g.rows, group, g.zero in ("none", "zeros"), dtype, options)
    indexed = bool(options.get("g_idx"))
    return replace(made, group_index=indexed, full_groups=indexed)


def _stored_options(module: Module, g: Geometry) -> dict[str, object]:
    options: dict[str, object] = {"strategy": g.strategy}
    if g.kind == "pack":
        options["packing"] = "stream" if g.stream or 32 % g.bits == 0 else "words"
        shape = module.parts.get("weight_shape")
        options["shape_dtype"] = "" if shape is None else shape.dtype
    if g.zero in ("plain", "zeros"):
        options |= {"zero": g.zero, "zero_dtype": module.parts["weight_zero_point"].dtype}
    rank = len(module.parts["weight_scale"].shape)
    if rank != (1 if g.rows is None else 2):
        options["scale_rank"] = rank
    if "weight_g_idx" in module.parts:
        raw = module.parts["weight_g_idx"]
        stored = raw.array()
        kind = "unset" if (stored == -1).any() else "zeros" if not stored.any() else "index"
        options |= {"g_idx": kind, "g_idx_dtype": raw.dtype}
    return options


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """Candidates, those that could keep the codes of ``scheme`` first.

    Options: ``group=N|-1``, ``channel``, ``tensor``, ``block[=ROWSxCOLUMNS]``, ``sym``, ``asym``, ``format=pack|int|naive``,
    ``scale=f16|bf16|f32`` (default: the source's, for new codes bf16), ``packing=stream|words``, ``act-order=no`` (the columns of a
    group are consecutive, whatever the source's are). ``UsageError`` for others. The types of small floats under small floats have
    blocks of their own.
    """
    unknown = sorted(set(target.options) - set(OPTIONS))
    if unknown:
        raise UsageError("option", f"compressed-tensors has no option {unknown[0]!r}", hint=f"options: {', '.join(OPTIONS)}")
    if target.type is not None and target.type not in TYPES:
        raise UsageError("type", f"compressed-tensors has no type {target.type!r}", hint=f"types: {', '.join(TYPES)}")
    kinds = (target.type,) if target.type else _ordered(scheme)
    found: list[Storage] = []
    for kind in kinds:
        if kind in _SMALL:
            found += [_small(kind)] if target.type is None or not target.options.keys() - {"group"} else _refused(target)
        else:
            found += [s for dtype in _dtypes(target, scheme) for s in _of_type(kind, target, scheme, dtype)]
    return found


def _refused(target: Target) -> list[Storage]:
    raise UsageError("option", f"{target.type} has no options, not {', '.join(target.options)}")


def _ordered(scheme: Scheme) -> list[str]:
    """Types in the order in which they could keep the codes of ``scheme``: its own kind, then integers by width from its own up."""
    grid, nested = scheme.grid, scheme.scales[0].nested if scheme.scales else None
    if isinstance(grid, Float):
        first = {"e4m3fn": "fp8" if nested is None else "mxfp8", "e2m3": "mxfp6", "e2m1": "mxfp4"}.get(grid.name, "fp8")
        if grid.name == "e2m1" and nested is not None and nested.grid != Float("e8m0"):
            first = "nvfp4"
        return [first, *(t for t in TYPES if t != first)]
    bits = grid.bits if isinstance(grid, Integer) and grid.bits > 1 else 4
    integers = [t for t in TYPES if t.startswith("int")]
    return [t for t in integers if int(t[3:]) >= bits] + [t for t in reversed(integers) if int(t[3:]) < bits] + ["fp8"]


def _dtypes(target: Target, scheme: Scheme) -> list[str]:
    word = dtype_option(target, "scale")
    if word is not None:
        return [word]
    scales = [s.nested.scales[0] if s.nested is not None and s.nested.scales else s for s in scheme.scales[:1]]
    own = [s.dtype for s in scales if s.dtype in _SCALES]
    first = own[0] if own else "bfloat16"
    return [first, *(d for d in ("float16", "bfloat16", "float32") if d != first and own)]


def _tile(target: Target, scheme: Scheme, kind: str) -> tuple[int | None, int | None]:
    """Rows and columns under one scale: the options', else the source's, else a row (fp8) or 128 columns of one."""
    width, options = scheme.shape[-1], target.options
    words = [w for w in ("group", "channel", "tensor", "block") if w in options and (w == "group" or _meant(options[w]))]
    if len(words) > 1:
        raise UsageError("option", f"{' and '.join(words)} exclude each other")
    if words == ["group"]:
        text = options["group"]
        if not text.removeprefix("-").isdigit() or int(text) == 0 or int(text) < -1:
            raise UsageError("option", f"group={text} is not a number of columns or -1")
        return 1, None if int(text) in (-1, width) else int(text)
    if words == ["block"]:
        return _block(options["block"])
    if words:
        return (1 if words == ["channel"] else None), None
    block = scheme.scales[0].block if scheme.scales else None
    if isinstance(block, Tile) and block.sizes[-1] > 1:  # a scale for each weight says nothing
        rows = block.sizes[-2] if len(block.sizes) > 1 else 1
        group = None if block.sizes[-1] >= width else block.sizes[-1]
        if rows >= scheme.shape[-2] > 1 and group is None:
            return None, None
        return (rows, block.sizes[-1]) if rows > 1 else (1, group)
    return 1, None if kind == "fp8" or width <= 128 else 128


def _meant(text: str) -> bool:
    """Whether an option is meant: anything but a no."""
    return text.lower() not in ("0", "false", "no", "off")


def _block(text: str) -> tuple[int, int]:
    rows, _, columns = ("128x128" if text.lower() in ("", "1", "true", "yes", "on") else text).partition("x")
    if not rows.isdigit() or not columns.isdigit() or not int(rows) or not int(columns):
        raise UsageError("option", f"block={text} is not rows x columns", hint="as in block=128x128")
    if int(rows) % 32:
        raise UsageError("option", f"blocks of {rows} rows are not written", hint="use a multiple of 32 rows")
    return int(rows), int(columns)


def _of_type(kind: str, target: Target, scheme: Scheme, dtype: str) -> list[Storage]:
    rows, group = _tile(target, scheme, kind)
    if kind == "fp8":
        return [_float8(rows, group, dtype, {})]
    bits = int(kind[3:])
    sym, asym = yes_no(target, "sym"), yes_no(target, "asym")
    if sym and asym:
        raise UsageError("option", "sym and asym exclude each other")
    forms = _forms(target, bits)
    clash = forms == ("pack-quantized",) and rows not in (1, None)
    if clash and not target.options.keys() & {"group", "channel", "tensor", "block"}:  # the source's tiles, which nobody asked for
        rows, group = 1, None if scheme.shape[-1] <= 128 else 128
    elif clash:
        raise UsageError("option", "packed integers cannot have tiles of several rows", hint="use format=int or groups")
    packing = target.options.get("packing", "stream")
    if packing not in ("stream", "words"):
        raise UsageError("option", f"packing={packing} is not known", hint="use packing=stream or packing=words")
    options: dict[str, object] = {"packing": packing, "shape_dtype": "I64"}
    wanted = [s for s in (True, False) if not (sym and not s) and not (asym and s)]
    made = [
        _affine(bits, form, rows, group, symmetric, dtype, options if form == "pack-quantized" else {})
        for form in forms
        for symmetric in wanted
        if rows in (1, None) or form != "pack-quantized"
    ]
    ordered = scheme.group_index and rows == 1 and group is not None and yes_no(target, "act-order", True)
    return [*made, *(_with_index(s) for s in made if ordered and s.options["format"] == "pack-quantized")]


def _with_index(storage: Storage) -> Storage:
    """The same with ``weight_g_idx``: the group of each column, ``group`` columns in each (``actorder`` ``group``, releases up to 0.18)."""
    options = {**storage.options, "g_idx": "index", "g_idx_dtype": "I32"}
    width = storage.bits_per_weight + 32 / 4096
    return replace(storage, group_index=True, full_groups=True, bits_per_weight=width, options=options)


def _forms(target: Target, bits: int) -> tuple[str, ...]:
    """Packed words, and for 8 bits bytes too; packed ones first, as the owner does where activations are not quantized."""
    word = target.options.get("format")
    if word is None:
        return ("pack-quantized", "int-quantized") if bits == 8 else ("pack-quantized",)
    form = _FORMATS.get(word.removesuffix("-quantized"))
    if form is None:
        raise UsageError("option", f"format={word} is not known", hint=f"use one of {', '.join(_FORMATS)}")
    return (form,)


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K); ``Unsupported`` for another rank (``ct-experts``) or rows of no whole groups (``k-multiple``)."""
    if len(shape) != 2:
        raise Unsupported("ct-experts", f"a weight of {len(shape)} dimensions is not written as compressed-tensors")
    n, k = shape
    if k % storage.k_multiple and k > storage.k_multiple:
        raise Unsupported("k-multiple", f"rows of {k} weights are no multiple of {storage.k_multiple}, as {storage.type} needs")
    options = storage.options
    if storage.type in _SMALL:
        return _small_layout(storage, n, k)
    if options["format"] == "pack-quantized":
        stream = options.get("packing", "stream") == "stream"
        parts = {"weight_packed": PartInfo("I32", (n, packed_words(k, storage.integers.bits, stream)))}
    else:
        parts = {"weight": PartInfo("I8" if isinstance(storage.grid, Integer) else "F8_E4M3", (n, k))}
    scales = _scale_shape(storage, n, k)
    parts["weight_scale"] = PartInfo(CONTAINER_FLOATS[storage.scale_dtypes[0]], scales)
    if "zero" in options:
        parts["weight_zero_point"] = PartInfo(str(options["zero_dtype"]), scales)
    elif isinstance(storage.zero_point, tuple):
        parts["weight_zero_point"] = _zero_part(storage, n, scales)
    if options["format"] == "pack-quantized" and options.get("shape_dtype", "I64"):
        parts["weight_shape"] = PartInfo(str(options.get("shape_dtype", "I64")), (2,))
    if options.get("g_idx"):
        parts["weight_g_idx"] = PartInfo(str(options.get("g_idx_dtype", "I32")), (k,))
    return parts


def _small_layout(storage: Storage, n: int, k: int) -> dict[str, PartInfo]:
    block = storage.group or k
    if storage.type == "mxfp8":
        parts = {"weight": PartInfo("F8_E4M3", (n, k))}
    else:
        bits = 4 if storage.type == "nvfp4" else MX[storage.type][1]
        parts = {"weight_packed": PartInfo("U8", (n, words_for(k, bits, 8)))}
    scale = "F8_E4M3" if storage.type == "nvfp4" else str(storage.options.get("scale_code", "U8"))
    parts["weight_scale"] = PartInfo(scale, (n, -(-k // block)))
    return parts | ({"weight_global_scale": PartInfo("F32", (1,))} if storage.factor else {})


def _scale_shape(storage: Storage, n: int, k: int) -> tuple[int, ...]:
    group = min(storage.group or k, k)
    rank = storage.options.get("scale_rank")
    if storage.rows is None:
        return (1,) * rank if isinstance(rank, int) else (1,)
    return (n,) if rank == 1 else (-(-n // storage.rows), -(-k // group))


def _zero_part(storage: Storage, n: int, scales: tuple[int, ...]) -> PartInfo:
    if storage.options["format"] != "pack-quantized" or storage.rows != 1:
        return PartInfo("I8", scales)
    stream = storage.options.get("packing", "stream") == "stream"
    return PartInfo("I32", (packed_words(n, storage.integers.bits, stream), scales[-1]))


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether ``write`` takes such a tensor as it stands (the values of its zero points aside)."""
    shape = scheme.shape
    if len(shape) != 2:
        return No(f"it has {len(shape)} dimensions, not 2")
    if storage.options.get("read_only"):
        return No(f"{storage.type} weights are read, not written")
    if scheme.grid != storage.grid:
        return No(f"its codes are {scheme.grid}, not {storage.grid}")
    if shape[1] % storage.k_multiple and shape[1] > storage.k_multiple:
        return No(f"{shape[1]} columns are not a multiple of {storage.k_multiple}")
    if scheme.offset is not None or scheme.signs or len(scheme.scales) != (2 if storage.factor else 1):
        return No("it has an offset, signs or another number of scales")
    if scheme.group_index and not storage.options.get("g_idx"):
        return No("it has an act-order index")
    verdict = _scale_verdict(storage, scheme)
    return verdict if isinstance(verdict, No) else _zero_verdict(storage, scheme)


def _scale_verdict(storage: Storage, scheme: Scheme) -> Yes | No:
    scale, block, dtypes = scheme.scales[0], storage.scale_block(scheme.shape), storage.scale_dtypes
    if scale.block != block or scale.inverse:
        return No(f"its scale is on {scale.block}, not {block}")
    if storage.scale_grid is None:
        return Yes() if scale.dtype in dtypes else No(f"its scale is {scale.dtype}, not {' or '.join(dtypes)}")
    nested = Scheme((*scheme.shape[:-1], scheme.shape[-1] // (storage.group or 1)), storage.scale_grid)
    if scale.nested != nested:
        return No(f"its scale is not stored as {storage.scale_grid}")
    if storage.factor is not None:
        factor: Any = scheme.scales[1]
        if not factor.inverse or factor.dtype != "float32" or factor.block != whole(scheme.shape):
            return No("it has no float32 number that divides the whole tensor")
    return Yes()


def _zero_verdict(storage: Storage, scheme: Scheme) -> Yes | No:
    zero, wanted = scheme.zero_point, storage.zero_point
    if wanted is None:
        return Yes() if zero is None else No("it has zero points")
    if zero is None or zero.dtype not in ("uint8", "int8", "int16", "int32"):
        return No("it has no integer zero points")
    if isinstance(wanted, int):
        return Yes() if zero.constant == wanted else No(f"its zero points are not all {wanted}")
    if zero.block != storage.scale_block(scheme.shape) and zero.constant is None:
        return No(f"its zero points are on {zero.block}, not {storage.scale_block(scheme.shape)}")
    return Yes()
