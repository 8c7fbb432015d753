"""What torchao can hold as a target: storages, their parts, and which tensors fit them as they stand. Torch-free.

A storage's ``options``: ``kind`` the class, ``prefix`` of its leaves, ``order`` and ``block`` of its scales where they are not the
usual, ``zero`` the container dtype of zero points, ``entry`` the metadata entry of a tensor that is kept, under ``named`` where that is
another name, ``padded`` the sizes of tiles.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd, prod

from qformats.errors import Unsupported, UsageError
from qformats.formats.packed import CONTAINER_FLOATS, FLOATS, group_option, yes_no
from qformats.formats.protocol import Module, PartInfo, Target
from qformats.formats.torchao.names import entry_of, logical_name, prefix_of
from qformats.formats.torchao.shapes import Form, form_of, swizzled_shape, zero_is_absent
from qformats.scheme import Block, Factor, Float, Grid, Integer, No, Scheme, Storage, Tile, Yes, whole

__all__ = ["OPTIONS", "ROW_MULTIPLE", "TYPES", "can_store", "embeddings", "form_to_write", "layout", "stacks", "storage_of", "storages"]

ROW_MULTIPLE = 32  # row ranges for ``write`` start at multiples of this, of the rows under one scale, and of 128 where scales are swizzled
OPTIONS = ("group", "channel", "tensor", "block", "sym", "asym")
_MX = {"mxfp8": "e4m3fn", "mxfp8_e5m2": "e5m2", "mxfp6_e2m3": "e2m3", "mxfp6_e3m2": "e3m2", "mxfp4": "e2m1"}
TYPES = (*(f"int{bits}" for bits in range(1, 9)), "fp8", "fp8_e5m2", "nvfp4", *_MX)
_BLOCK = 128
_WORDS = {"e4m3fn": "F8_E4M3", "e5m2": "F8_E5M2"}


# ---------------------------------------------------------------- what a tensor is as a storage


def storage_of(module: Module) -> Storage:
    """The storage that reproduces ``module`` byte for byte when what ``read`` returns is written again."""
    form, entry = form_of(module), entry_of(module)
    options: dict[str, object] = {"kind": form.kind, "prefix": prefix_of(module), "entry": entry.text, "order": form.order}
    if entry.key != logical_name(module.name, prefix_of(module)):
        options["named"] = entry.key
    qdata = module.parts[prefix_of(module) + "qdata"]
    scale = module.parts.get(prefix_of(module) + "scale")
    if form.packing == "tiles":
        padded = 8 * qdata.shape[0], 32 * qdata.shape[1] * qdata.shape[3]
        stored = padded[1] // module.parts[prefix_of(module) + "scale_and_zero"].shape[0]
        options["padded"] = f"{padded[0]} {padded[1]} {2 * qdata.shape[3]} {stored}"
    options["qdata"] = qdata.dtype
    if scale is not None and (form.order == "swizzled" or form.block is None):
        options["scale_shape"] = " ".join(map(str, scale.shape))
    if form.factor is not None:
        options["factor_shape"] = " ".join(map(str, module.parts[prefix_of(module) + "per_tensor_scale"].shape))
    absent = zero_is_absent(module, form)
    return _storage(form, form.zero, absent, options)


def _storage(form: Form, zero: str | None, absent: bool, options: dict[str, object]) -> Storage:
    """A storage out of a form; ``absent``: all zero points are 0, whether stored or not."""
    rows, group = (None, None) if form.block is None else form.block
    if zero is not None:
        options["zero"] = zero
    columns = form.shape[-1]
    group = None if group is not None and group >= columns else group
    grid = form.grid
    integer = zero == "I8" and not absent and isinstance(grid, Integer)
    limits = (grid.lowest, grid.highest) if isinstance(grid, Integer) and form.kind != "Int8Tensor" else (-128, 127)
    scaled = Float("e8m0" if form.scale == "F8_E8M0" else "e4m3fn") if form.scale not in FLOATS else None
    unit = group or columns
    return Storage(
        _type_name(form), grid, group, _bits(form, zero, unit, rows or prod(form.shape[:-1])),
        (FLOATS.get(form.scale, "float32"),),
        negative_scale=scaled is None,
        zero_point=(max(limits[0], -128), limits[1]) if integer else None,
        offset=FLOATS[zero] if form.is_offset and zero is not None else None,
        k_multiple=unit if group is not None else 1,
        n_multiple=rows or 1,
        options=options,
        scale_grid=scaled,
        rows=rows,
        zero_dtype=FLOATS[zero] if zero in FLOATS and not form.is_offset and not absent else None,
        factor=None if form.factor is None else Factor("float32"),
        whole=form.factor is not None or form.order == "swizzled",  # tiles of 128 rows are written at once
    )  # fmt: skip


def _type_name(form: Form) -> str:
    if isinstance(form.grid, Integer):
        return f"int{form.grid.bits}"
    assert isinstance(form.grid, Float)
    if form.kind == "NVFP4Tensor":
        return "nvfp4"
    if form.kind == "MXTensor":
        return next(name for name, grid in _MX.items() if grid == form.grid.name)
    return "fp8" if form.grid.name == "e4m3fn" else "fp8_e5m2"


def _bits(form: Form, zero: str | None, columns: int, rows: int) -> float:
    widths = {"F32": 32, "F16": 16, "BF16": 16, "F64": 64, "I8": 8, "F8_E8M0": 8, "F8_E4M3": 8}
    code = 8 if form.packing == "bytes" else 4
    return code + (widths[form.scale] + (widths[zero] if zero else 0)) / (columns * rows)


# ---------------------------------------------------------------- targets


def embeddings(target: Target, scheme: Scheme) -> bool:
    """transformers takes them under ``include_input_output_embeddings``; the microscaled classes have no ``aten.embedding``."""
    kinds = [target.type] if target.type is not None else _likely(scheme)
    return not kinds[0].startswith(("mx", "nv"))


def stacks(target: Target, scheme: Scheme | None) -> bool:
    """Float8 alone: the class that torchao 0.18 multiplies expert by expert, as transformers 5.23 asks of experts in one parameter."""
    kinds = [target.type] if target.type is not None else [] if scheme is None else _likely(scheme)
    return bool(kinds) and kinds[0].startswith("fp8")


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """The types a weight like ``scheme`` could have: those that can keep its codes first.

    Options: ``group=N``, ``channel`` (one scale a row), ``tensor`` (one in all), ``block`` (128 x 128, float8 only), ``sym``, ``asym``.
    Integers below 8 bits are stored a byte each, as torchao does. ``UsageError``: ``type``, ``option``.
    """
    if target.type is not None and target.type not in TYPES:
        raise UsageError("type", f"torchao has no type {target.type!r}", hint=f"types: {', '.join(TYPES)}")
    unknown = sorted(set(target.options) - set(OPTIONS))
    if unknown:
        raise UsageError("option", f"torchao has no option {unknown[0]!r}", hint=f"options: {', '.join(OPTIONS)}")
    named = [key for key in ("group", "channel", "tensor", "block") if key in target.options]
    if len(named) > 1 or (yes_no(target, "sym") and yes_no(target, "asym")):
        raise UsageError("option", "group, channel, tensor and block exclude each other, and so do sym and asym")
    kinds = [target.type] if target.type is not None else _likely(scheme)
    return [storage for kind in kinds for storage in _of_type(kind, target, scheme)]


def _likely(scheme: Scheme) -> list[str]:
    """Types for a scheme when none is named: its own grid, then wider integers."""
    grid = scheme.grid
    if isinstance(grid, Integer):
        return [f"int{bits}" for bits in range(min(grid.bits, 8), 9)]
    nested = scheme.scales[0].nested if scheme.scales else None
    if isinstance(grid, Float) and nested is not None and nested.grid == Float("e8m0"):
        return [name for name, word in _MX.items() if word == grid.name] or ["int8"]
    if isinstance(grid, Float):
        return {"e2m1": ["nvfp4"], "e4m3fn": ["fp8"], "e5m2": ["fp8_e5m2"]}.get(grid.name, ["int8"])
    return ["int8"]


def _of_type(kind: str, target: Target, scheme: Scheme) -> list[Storage]:
    if kind.startswith("int"):
        return _integers(int(kind[3:]), target, scheme)
    if kind.startswith("fp8"):
        grid = Float("e4m3fn" if kind == "fp8" else "e5m2")
        forms = [_form("Float8Tensor", scheme, grid, block) for block in _fp8_blocks(target, scheme)]
        bare = {"prefix": "_"} if len(scheme.shape) > 2 else {}  # experts are a parameter of another name than weight
        return [_storage(form, None, True, {"kind": form.kind, **bare}) for form in forms]
    if set(target.options) - {"sym"}:
        raise UsageError("option", f"{kind} has no options", hint="name the type alone")
    if kind == "nvfp4":
        plain = _form("NVFP4Tensor", scheme, Float("e2m1"), (1, 16), "F8_E4M3")
        forms = [replace(plain, factor="tensor"), plain] if len(scheme.scales) != 1 else [plain, replace(plain, factor="tensor")]
        return [_in_blocks(form, 16) for form in forms]
    form = _form("MXTensor", scheme, Float(_MX[kind]), (1, 32), "F8_E8M0")
    return [_in_blocks(form, 32)]


def _in_blocks(form: Form, block: int) -> Storage:
    """Whole blocks of a row, be it no longer than one."""
    return replace(_storage(form, None, True, {"kind": form.kind}), group=block, k_multiple=block)


def _form(kind: str, scheme: Scheme, grid: Grid, block: tuple[int, int] | None, scale: str = "F32") -> Form:
    packing = "pairs" if grid == Float("e2m1") else "bytes"
    return Form(kind, scheme.shape, grid, packing, block, "rows", scale, "float32")


def _integers(bits: int, target: Target, scheme: Scheme) -> list[Storage]:
    """Symmetric, then with integer zero points, then with float ones where the source has such."""
    if "block" in target.options:
        raise UsageError("option", "block is for float8")
    kind = "Int8Tensor" if bits == 8 else "IntxUnpackedToInt8Tensor"
    scales = ["F32"]
    first = scheme.scales[0] if scheme.scales else None
    if bits < 8 and first is not None and first.nested is None and first.dtype in CONTAINER_FLOATS:
        scales = [CONTAINER_FLOATS[first.dtype]]
    zeros = [("I8", True)] if not yes_no(target, "asym") else []
    if not yes_no(target, "sym"):
        zeros.append(("I8", False))
        zero = scheme.zero_point
        if bits < 8 and zero is not None and zero.dtype in CONTAINER_FLOATS:
            zeros.append((CONTAINER_FLOATS[zero.dtype], False))
    made = []
    for scale in scales:
        for word, absent in zeros:
            form = _form(kind, scheme, Integer(bits, signed=True), _integer_block(bits, target, scheme), scale)
            made.append(_storage(form, word, absent, {"kind": kind}))
    return made


def _integer_block(bits: int, target: Target, scheme: Scheme) -> tuple[int, int] | None:
    """Rows and columns under one scale: as named, else the source's, else a row for 8 bits and 128, 64 or 32 columns for fewer."""
    columns = scheme.shape[-1]
    if yes_no(target, "tensor"):
        return None
    if yes_no(target, "channel"):
        return 1, columns
    if "group" in target.options or scheme.scales:
        return 1, group_option(target, scheme) or columns
    if bits == 8:
        return 1, columns
    return 1, next((size for size in (128, 64, 32) if columns % size == 0), columns)


def _fp8_blocks(target: Target, scheme: Scheme) -> list[tuple[int, int] | None]:
    columns = scheme.shape[-1]
    if "group" in target.options or yes_no(target, "asym"):
        raise UsageError("option", "float8 has channel, tensor or block scales")
    all_of_it = None if len(scheme.shape) == 2 else (scheme.shape[-2], columns)  # an expert of a stack is taken out with its own scales
    if yes_no(target, "tensor"):
        return [all_of_it]
    if yes_no(target, "block"):
        return [(min(_BLOCK, scheme.shape[-2]), _BLOCK)]
    known = isinstance(scheme.grid, Float) and bool(scheme.scales) and isinstance(scheme.scales[0].block, Tile)
    if yes_no(target, "channel") or not known:
        return [(1, columns)]
    tile = scheme.scales[0].block
    assert isinstance(tile, Tile)
    if tile == whole(scheme.shape):
        return [all_of_it, (1, columns)]
    high = tile.sizes[-2] if len(tile.sizes) > 1 else 1
    same = gcd(high, scheme.shape[-2]) if high < scheme.shape[-2] else scheme.shape[-2], gcd(min(tile.sizes[-1], columns), columns)
    return [same] if same == (1, columns) else [same, (1, columns)]


# ---------------------------------------------------------------- parts


def form_to_write(storage: Storage, shape: tuple[int, ...]) -> Form:
    """The form of a weight ``shape`` in ``storage``; ``Unsupported('block-size')`` where blocks do not divide it."""
    n, k = (1, *shape)[-2:]
    kind, options = str(storage.options.get("kind", "")), storage.options
    if storage.rows is None and storage.group is None:
        block = None
    else:
        block = (storage.rows or n, min(storage.group or k, k))
        if n % block[0] or (k % block[1] and "padded" not in options):
            raise Unsupported("block-size", f"blocks of {block[0]} x {block[1]} do not divide a weight of shape {shape}")
    scale = CONTAINER_FLOATS[storage.scale_dtypes[0]]
    if storage.scale_grid is not None:
        scale = "F8_E8M0" if storage.scale_grid == Float("e8m0") else "F8_E4M3"
    packing = {"Int4Tensor": "pairs", "Int4PlainInt32Tensor": "words", "Int4TilePackedTo4dTensor": "tiles"}.get(kind, "bytes")
    packing = "pairs" if storage.grid == Float("e2m1") else packing
    factor = None if storage.factor is None else "tensor"
    zero, order = options.get("zero"), str(options.get("order", "rows"))
    return Form(
        kind, shape, storage.grid, packing, block, order, scale, "float32", None if zero is None else str(zero), storage.offset is not None,
        factor,
    )  # fmt: skip


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (…, N, K); ``Unsupported('block-size')`` where blocks do not divide it."""
    form, options = form_to_write(storage, shape), storage.options
    prefix = str(options.get("prefix", "_weight_"))
    if form.packing == "tiles":
        n, k, inner, group = (int(word) for word in str(options["padded"]).split())
        codes = PartInfo("I32", (n // 8, k // (16 * inner), 32, inner // 2))
        return {prefix + "qdata": codes, prefix + "scale_and_zero": PartInfo("BF16", (k // group, n, 2))}
    lead, k = shape[:-1], shape[-1]
    wide = {"bytes": k, "pairs": k // 2, "words": k // 8}[form.packing]
    fallback = "I8" if isinstance(form.grid, Integer) else _WORDS.get(form.grid.name, "U8") if isinstance(form.grid, Float) else "U8"
    parts = {prefix + "qdata": PartInfo(str(options.get("qdata", fallback)), (*lead, wide))}
    counts = _scale_counts(form, shape)
    scale_shape = options.get("scale_shape")
    stored = tuple(int(word) for word in str(scale_shape).split()) if scale_shape is not None else counts
    parts[prefix + "scale"] = PartInfo(form.scale, stored)
    if form.zero is not None:
        parts[prefix + "zero_point"] = PartInfo(form.zero, counts)
    if form.factor is not None:
        parts[prefix + "per_tensor_scale"] = PartInfo("F32", tuple(int(word) for word in str(options.get("factor_shape", "")).split()))
    return parts


def _scale_counts(form: Form, shape: tuple[int, ...]) -> tuple[int, ...]:
    if form.block is None:
        return tuple(1 for _ in shape)
    counts = (*shape[:-2], shape[-2] // form.block[0], form.groups)
    if form.order == "columns":
        return (*counts[:-2], counts[-1], counts[-2])
    return swizzled_shape(counts) if form.order == "swizzled" else counts


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether ``write`` takes such a tensor as it stands (the values of its zero points aside)."""
    if len(scheme.shape) < 2:
        return No(f"it has {len(scheme.shape)} dimensions, not 2")
    if scheme.grid != storage.grid:
        return No(f"its codes are {scheme.grid}, not {storage.grid}")
    if scheme.signs or scheme.group_index or len(scheme.scales) != (1 if storage.factor is None else 2):
        return No("it has signs, an act-order index or another number of scales")
    tile = storage.scale_block(scheme.shape)
    scale = scheme.scales[0]
    if scale.block != tile or scale.inverse:
        return No(f"its scale is on {scale.block}, not {tile}")
    if storage.scale_grid is not None:
        nested = scale.nested
        if nested is None or nested.grid != storage.scale_grid or nested.scales or nested.zero_point is not None:
            return No(f"its scale is not {storage.scale_grid.name} codes")
    elif scale.dtype not in storage.scale_dtypes:
        return No(f"its scale is {scale.dtype}, not {' or '.join(storage.scale_dtypes)}")
    if storage.factor is not None:
        factor = scheme.scales[1]
        if factor.dtype != storage.factor.dtype or factor.inverse or factor.block != whole(scheme.shape):
            return No(f"its second scale is {factor.dtype} on {factor.block}, not one float32 in all")
    return _zeros_fit(storage, scheme, tile)


def _zeros_fit(storage: Storage, scheme: Scheme, tile: Block) -> Yes | No:
    zero, offset = scheme.zero_point, scheme.offset
    if (offset is None) != (storage.offset is None):
        return No("it has an offset" if offset is not None else "it has no offset")
    if offset is not None and (offset.dtype != storage.offset or offset.block != tile):
        return No(f"its offset is {offset.dtype} on {offset.block}, not {storage.offset} on {tile}")
    if zero is None:
        return Yes() if storage.zero_dtype is None else No("it has no zero points")
    if storage.zero_dtype is not None:
        fits = zero.dtype == storage.zero_dtype and zero.block == tile
        return Yes() if fits else No(f"its zero point is {zero.dtype} on {zero.block}, not {storage.zero_dtype} on {tile}")
    if zero.constant == 0 and storage.zero_point is None:
        return Yes()
    if not isinstance(storage.zero_point, tuple):
        return No("it has zero points")
    if zero.dtype not in ("uint8", "int8", "int16", "int32") or (zero.constant is None and zero.block != tile):
        return No("it has no integer zero point for each scale")
    return Yes()
