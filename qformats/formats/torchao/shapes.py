"""What a torchao tensor's headers and metadata entry say: sizes, grid, packing, blocks; every check that needs no weights. Torch-free.

Classes: torchao 0.18.0 ``quantization/quantize_/workflows`` and ``prototype/mx_formats``; the table is in the package's docstring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported
from qformats.formats.packed import FLOATS
from qformats.formats.protocol import Module
from qformats.formats.torchao.names import Entry, dtype_of, entry_of, logical_name, part_of, prefix_of
from qformats.scheme import Float, Grid, Integer, ParamSpec, Scheme, Tile, whole

__all__ = ["Form", "form_of", "scheme", "swizzled_shape", "zero_is_absent"]

_FLOAT_WORDS = tuple(FLOATS)
_ELEMENTS = {
    "float8_e4m3fn": ("e4m3fn", "F8_E4M3"), "float8_e5m2": ("e5m2", "F8_E5M2"), "fp6_e2m3": ("e2m3", "U8"), "fp6_e3m2": ("e3m2", "U8"),
    "float4_e2m1fn_x2": ("e2m1", "U8"),
}  # fmt: skip
TILE_INNER = (2, 4, 8)  # k-tiles of 16 side by side, ``innerKTiles``


@dataclass(frozen=True, slots=True)
class Form:
    """One tensor as it is stored.

    ``shape`` (…, N, K); ``rows``: all but K, multiplied. ``packing`` of qdata: ``bytes``, ``pairs`` (two codes a byte, the first in the low
    bits), ``words`` (eight an int32, likewise), ``tiles`` (tinygemm). ``block``: rows and columns under one scale, None for one scale in
    all. ``order`` of the scales: ``rows`` (…, N, G), ``columns`` (…, G, N), ``joint`` (G, N, 2) with the offset, ``swizzled``. ``zero``:
    container dtype of the zero points, None without; ``is_offset``: they are in weight units. ``dtype``: of the owner's dequantized values.
    """

    kind: str
    shape: tuple[int, ...]
    grid: Grid
    packing: str
    block: tuple[int, int] | None
    order: str
    scale: str
    dtype: str
    zero: str | None = None
    is_offset: bool = False
    factor: str | None = None
    pre_scale: str | None = None

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def groups(self) -> int:
        """Scales of one row."""
        return 1 if self.block is None else -(-self.shape[-1] // self.block[1])

    def tile(self, rank: int) -> Tile:
        """The block of a scale in a weight of ``rank`` dimensions."""
        if self.block is None:
            return whole(self.shape if rank == len(self.shape) else (self.rows, self.shape[-1]))
        return Tile((*(1 for _ in range(rank - 2)), *self.block))


def form_of(module: Module) -> Form:
    """The stored form of ``module``'s weight.

    Raises ``BadFile``: ``torchao-metadata``, ``torchao-parts``, ``torchao-attribute``, ``block-size``, ``wrong-dtype``, ``wrong-shape``;
    ``Unsupported``: ``torchao-type``, ``torchao-layout``.
    """
    found = module.memo.get("form")
    if found is None:
        entry = entry_of(module)
        found = module.memo["form"] = _with_activation(_BUILDERS[entry.type](module, entry), module)
    assert isinstance(found, Form)
    return found


# ---------------------------------------------------------------- checks


def _name(module: Module) -> str:
    return logical_name(module.name, prefix_of(module))


def _part(module: Module, name: str, *allowed: str) -> RawTensor:
    raw = part_of(module, name, allowed)
    if raw is None:
        raise BadFile("torchao-parts", f"there is no {name}", tensor=_name(module), hint="fetch all shards")
    return raw


def _expect(raw: RawTensor, shape: tuple[int, ...]) -> None:
    if tuple(raw.shape) != shape:
        raise BadFile("wrong-shape", f"has shape {tuple(raw.shape)}, expected {shape}", tensor=raw.name)


def _matrix(raw: RawTensor) -> tuple[int, ...]:
    shape = tuple(raw.shape)
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadFile("wrong-shape", f"has shape {shape}, expected two or three dimensions", tensor=raw.name)
    return shape


def _sizes(entry: Entry, key: str, name: str, rank: int) -> tuple[int, ...]:
    value = entry.attributes.get(key)
    if not isinstance(value, list) or len(value) != rank or not all(type(n) is int and n > 0 for n in value):
        raise BadFile("torchao-attribute", f"{key} is {value!r}, expected {rank} positive integers", tensor=name)
    return tuple(value)


def _block(entry: Entry, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``block_size``, which divides ``shape`` and spans no more than one of its leading dimensions unless it spans all."""
    sizes = _sizes(entry, "block_size", name, len(shape))
    divides = all(size <= length and length % size == 0 for size, length in zip(sizes, shape, strict=True))
    if not divides or (sizes != shape and any(size != 1 for size in sizes[:-2])):
        raise BadFile("block-size", f"block_size {list(sizes)} does not divide a weight of shape {shape}", tensor=name)
    return sizes


def _counts(shape: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length // size for length, size in zip(shape, sizes, strict=True))


def _pair(shape: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, int] | None:
    return None if sizes == shape else (sizes[-2], sizes[-1])


def _group(entry: Entry, name: str, shape: tuple[int, ...]) -> int:
    """``block_size`` of a class that has groups of one row only; a last group may be short."""
    sizes = _sizes(entry, "block_size", name, len(shape))
    if any(size != 1 for size in sizes[:-1]):
        raise BadFile("block-size", f"block_size {list(sizes)} is not a group of one row", tensor=name)
    return sizes[-1]


def swizzled_shape(counts: tuple[int, ...]) -> tuple[int, ...]:
    """The plane of ``to_blocked`` for scales ``counts`` (…, N, G): tiles of 128 x 4 as 32 x 16.

    torchao 0.18.0 ``prototype/mx_formats/utils.py``: ``hp_data_dims_to_swizzled_scale_dims_nvfp4`` and ``…_mx``.
    """
    return *counts[:-2], -(-counts[-2] // 128) * 32, -(-counts[-1] // 4) * 16


# ---------------------------------------------------------------- the classes


def _int8(module: Module, entry: Entry) -> Form:
    return _plain(module, entry, Integer(8, signed=True), ("I8",))


def _intx(module: Module, entry: Entry) -> Form:
    words = tuple(f"int{bits}" for bits in range(1, 9))
    bits = int(dtype_of(entry, "target_dtype", _name(module), words).removeprefix("int"))
    if part_of(module, "zero_point", ("I8", *_FLOAT_WORDS)) is None:
        raise BadFile("torchao-parts", "there is no zero_point", tensor=_name(module))
    return _plain(module, entry, Integer(bits, signed=True), ("I8", *_FLOAT_WORDS))


def _plain(module: Module, entry: Entry, grid: Grid, zeros: tuple[str, ...]) -> Form:
    name, qdata, scale = _name(module), _part(module, "qdata", "I8"), _part(module, "scale", *_FLOAT_WORDS)
    shape = _matrix(qdata)
    sizes = _block(entry, name, shape)
    _expect(scale, _counts(shape, sizes))
    zero = part_of(module, "zero_point", zeros)
    if zero is not None:
        _expect(zero, _counts(shape, sizes))
    dtype = dtype_of(entry, "dtype", name)
    return Form(entry.type, shape, grid, "bytes", _pair(shape, sizes), "rows", scale.dtype, dtype, None if zero is None else zero.dtype)


def _float8(module: Module, entry: Entry) -> Form:
    name, qdata, scale = _name(module), _part(module, "qdata", "F8_E4M3", "F8_E5M2"), _part(module, "scale", "F32")
    shape, stored = _matrix(qdata), entry.attributes.get("block_size")
    if not stored:  # the scale's shape says it: the owner looks at nothing else
        counts = tuple(scale.shape)
        fits = prod(counts) == 1 or (len(counts) == len(shape) and all(c and n % c == 0 for n, c in zip(shape, counts, strict=True)))
        if not fits:
            raise BadFile("wrong-shape", f"has shape {counts}, which does not divide {shape}", tensor=scale.name)
        sizes = shape if prod(counts) == 1 else _counts(shape, counts)
        if sizes != shape and any(size != 1 for size in sizes[:-2]):
            raise BadFile("wrong-shape", f"has shape {counts}, expected one scale or more for each matrix", tensor=scale.name)
    else:
        sizes = _block(entry, name, shape)
        if prod(scale.shape) != 1 or sizes != shape:
            _expect(scale, _counts(shape, sizes))
    grid = Float("e4m3fn" if qdata.dtype == "F8_E4M3" else "e5m2")
    return Form(entry.type, shape, grid, "bytes", _pair(shape, sizes), "rows", "F32", dtype_of(entry, "dtype", name))


def _scaled_blocks(module: Module, entry: Entry, shape: tuple[int, ...], word: str) -> tuple[int, str]:
    """The block and the order of scales that are small floats, plain (…, N, K / block) or swizzled."""
    name, scale, block = _name(module), _part(module, "scale", word), entry.attributes.get("block_size")
    if type(block) is not int or block < 1 or shape[-1] % block:
        raise BadFile("block-size", f"block_size {block!r} does not divide rows of {shape[-1]}", tensor=name)
    counts = (*shape[:-1], shape[-1] // block)
    swizzled = entry.attributes.get("is_swizzled_scales", False)
    if not isinstance(swizzled, bool):
        raise BadFile("torchao-attribute", f"is_swizzled_scales is {swizzled!r}, expected true or false", tensor=name)
    if not swizzled:
        _expect(scale, counts)
        return block, "rows"
    if prod(shape[:-2]) > 1 and shape[-2] % 128:
        raise BadFile("swizzle-size", f"matrices of {shape[-2]} rows do not fill tiles of 128, as swizzled scales need", tensor=scale.name)
    _expect(scale, swizzled_shape(counts))
    return block, "swizzled"


def _mx(module: Module, entry: Entry) -> Form:
    name = _name(module)
    element = dtype_of(entry, "elem_dtype", name, tuple(_ELEMENTS))
    grid, word = _ELEMENTS[element]
    qdata = _part(module, "qdata", word)
    shape, packing = _matrix(qdata), "bytes"
    if grid == "e2m1":
        shape, packing = (*shape[:-1], 2 * shape[-1]), "pairs"
    block, order = _scaled_blocks(module, entry, shape, "F8_E8M0")
    return Form(entry.type, shape, Float(grid), packing, (1, block), order, "F8_E8M0", dtype_of(entry, "orig_dtype", name))


def _nvfp4(module: Module, entry: Entry) -> Form:
    name, packed = _name(module), _matrix(_part(module, "qdata", "U8"))
    shape = (*packed[:-1], 2 * packed[-1])
    block, order = _scaled_blocks(module, entry, shape, "F8_E4M3")
    factor = part_of(module, "per_tensor_scale", ("F32",))
    each = (shape[0], 1, 1)
    if factor is not None and prod(factor.shape) != 1 and (len(shape) < 3 or tuple(factor.shape) != each):
        raise BadFile("wrong-shape", f"has shape {tuple(factor.shape)}, expected one number or one for each expert", tensor=factor.name)
    spread = None if factor is None else ("tensor" if prod(factor.shape) == 1 else "expert")
    return Form(
        entry.type, shape, Float("e2m1"), "pairs", (1, block), order, "F8_E4M3", dtype_of(entry, "orig_dtype", name), factor=spread
    )


def _int4(module: Module, entry: Entry) -> Form:
    name, qdata, scale = _name(module), _part(module, "qdata", "I8", "U8"), _part(module, "scale", *_FLOAT_WORDS)
    zero = _part(module, "zero_point", scale.dtype)
    packed = _matrix(qdata)
    shape = _sizes(entry, "shape", name, len(packed))
    _expect(qdata, (*shape[:-1], shape[-1] // 2))
    group = _group(entry, name, shape)
    if shape[-1] % 2 or (shape[-1] % group and group < shape[-1]):
        raise BadFile("block-size", f"groups of {group} do not divide rows of {shape[-1]}", tensor=name)
    counts = (*shape[:-2], -(-shape[-1] // group), shape[-2])
    _expect(scale, counts)
    _expect(zero, counts)
    grid, width = Integer(4, signed=True), min(group, shape[-1])
    return Form(entry.type, shape, grid, "pairs", (1, width), "columns", scale.dtype, FLOATS[scale.dtype], zero.dtype, True)


def _two_dimensions(entry: Entry, name: str) -> tuple[int, int]:
    value = entry.attributes.get("shape")
    if isinstance(value, list) and len(value) == 3:
        raise Unsupported("torchao-layout", f"a stack of {entry.type} is not known", tensor=name)
    n, k = _sizes(entry, "shape", name, 2)
    return n, k


def _int4_words(module: Module, entry: Entry) -> Form:
    name, qdata = _name(module), _part(module, "qdata", "I32")
    n, k = _two_dimensions(entry, name)
    zero, scale = _part(module, "zero_point", "I8", *_FLOAT_WORDS), _part(module, "scale", *_FLOAT_WORDS)
    if zero.dtype != "I8" or len(qdata.shape) != 2:
        what = "packed by the NPU library" if zero.dtype != "I8" else f"packed as {tuple(qdata.shape)}"
        raise Unsupported("torchao-layout", f"is an Int4PlainInt32Tensor {what}, a layout that is not public", tensor=name)
    group = _group(entry, name, (n, k))
    if k % 8 or k % group:
        raise BadFile("block-size", f"groups of {group} and words of 8 do not divide rows of {k}", tensor=name)
    _expect(qdata, (n, k // 8))
    _expect(scale, (k // group, n))
    _expect(zero, (k // group, n))
    return Form(entry.type, (n, k), Integer(4), "words", (1, group), "columns", scale.dtype, FLOATS[scale.dtype], "I8")


def _int4_tiles(module: Module, entry: Entry) -> Form:
    name, qdata, joint = _name(module), _part(module, "qdata", "I32"), _part(module, "scale_and_zero", "BF16")
    n, k = _two_dimensions(entry, name)
    group = _group(entry, name, (n, k))
    packed = tuple(qdata.shape)
    if len(packed) != 4 or packed[2] != 32 or 2 * packed[3] not in TILE_INNER:
        raise BadFile("wrong-shape", f"has shape {packed}, expected (N/8, K/(16 i), 32, i/2) with i 2, 4 or 8", tensor=qdata.name)
    padded = 8 * packed[0], 32 * packed[1] * packed[3]
    if not n <= padded[0] < n + 16 or not k <= padded[1] < k + 1024 or padded[1] % group:
        what = f"holds {padded[0]} x {padded[1]} weights in groups of {group} for a shape {(n, k)}"
        raise BadFile("wrong-shape", what, tensor=qdata.name)
    _expect(joint, (padded[1] // group, padded[0], 2))
    return Form(entry.type, (n, k), Integer(4, signed=True), "tiles", (1, min(group, k)), "joint", "BF16", "bfloat16", "BF16", True)


def _with_activation(form: Form, module: Module) -> Form:
    """The form with the factor that the activations are multiplied by, one for each input."""
    raw = part_of(module, "act_pre_scale", _FLOAT_WORDS)
    if raw is None:
        return form
    if prod(raw.shape) not in (1, form.shape[-1]):
        raise BadFile("wrong-shape", f"has shape {tuple(raw.shape)}, expected ({form.shape[-1]},)", tensor=raw.name)
    return replace(form, pre_scale=raw.dtype)


_BUILDERS: dict[str, Callable[[Module, Entry], Form]] = {
    "Int8Tensor": _int8, "IntxUnpackedToInt8Tensor": _intx, "Float8Tensor": _float8, "MXTensor": _mx, "NVFP4Tensor": _nvfp4,
    "Int4Tensor": _int4, "Int4PlainInt32Tensor": _int4_words, "Int4TilePackedTo4dTensor": _int4_tiles,
}  # fmt: skip


# ---------------------------------------------------------------- the scheme


def zero_is_absent(module: Module, form: Form) -> bool:
    """Whether there are no zero points, or all of them are stored and 0, as torchao writes symmetric weights."""
    if form.zero is None:
        return True
    if form.is_offset or form.kind not in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        return False
    if "zero" not in module.memo:
        raw = part_of(module, "zero_point", ("I8", *_FLOAT_WORDS))
        assert raw is not None
        data: Any = raw.read()
        module.memo["zero"] = not any(data)  # -0.0 counts as a number
    return bool(module.memo["zero"])


def scheme(module: Module) -> Scheme:
    """The scheme of a weight (…, N, K) from headers and metadata; of the zero points of int8 and intx it reads whether all are 0."""
    form = form_of(module)
    shape = form.shape
    tile = form.tile(len(shape))
    if form.scale in FLOATS:
        scales = [ParamSpec(FLOATS[form.scale], tile)]
    else:
        grid = Float("e8m0" if form.scale == "F8_E8M0" else "e4m3fn")
        scales = [ParamSpec("codes", tile, nested=Scheme(tile.counts(shape), grid))]
    if form.factor is not None:
        scales.append(ParamSpec("float32", whole(shape) if form.factor == "tensor" else Tile((1, *shape[1:]))))
    if form.pre_scale is not None:
        scales.append(ParamSpec(FLOATS[form.pre_scale], Tile((*shape[:-1], 1))))
    if zero_is_absent(module, form):
        return Scheme(shape, form.grid, tuple(scales))
    assert form.zero is not None
    spec = ParamSpec(FLOATS.get(form.zero, "int8"), tile)
    if form.is_offset:
        return Scheme(shape, form.grid, tuple(scales), offset=spec)
    return Scheme(shape, form.grid, tuple(scales), zero_point=spec)
