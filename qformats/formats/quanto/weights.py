"""Quanto weights read and written: ``read`` and ``write`` mirror each other; the table of parts is in the package's docstring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.packed import CONTAINER_FLOATS, FLOATS, blank_codes, dtype_option, float_array, float_tensor, yes_no
from qformats.formats.protocol import Module, PartInfo, Piece, Target
from qformats.formats.quanto.settings import kind_said
from qformats.formats.slabs import Slabs
from qformats.scheme import Float, Integer, No, ParamSpec, Scheme, Storage, Tile, Yes, whole

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import Param, QuantizedTensor

__all__ = [
    "EXTRAS",
    "SUFFIXES",
    "WRITTEN",
    "can_store",
    "group_of",
    "layout",
    "module_warnings",
    "read",
    "scheme",
    "storage_of",
    "storages",
    "write",
]

DATA, PACKED, SCALE, SHIFT = "weight._data", "weight._data._data", "weight._scale", "weight._shift"
SUFFIXES: frozenset[str] = frozenset({DATA, PACKED, SCALE, SHIFT})
EXTRAS: frozenset[str] = frozenset({"input_scale", "output_scale"})
WRITTEN = EXTRAS  # beside every weight
BYTES = {"I8": "qint8", "F8_E4M3": "qfloat8_e4m3fn", "F8_E4M3FNUZ": "qfloat8_e4m3fnuz", "F8_E5M2": "qfloat8_e5m2"}
_WORDS = {kind: word for word, kind in BYTES.items()}
_BITS = {"qint4": 4, "qint2": 2}
KINDS = ("qint8", "qint4", "qint2", "qfloat8_e4m3fn", "qfloat8_e5m2", "qfloat8_e4m3fnuz")


def group_of(columns: int) -> int | None:
    """The columns of a group of 4- and 2-bit codes in rows of ``columns``; None where a row is one group (``nn/qmodule.py``)."""
    if columns <= 128:
        return None
    return next((group for group in (128, 96, 64, 32) if columns % group == 0), None)


@dataclass(frozen=True, slots=True)
class Geometry:
    """A layer's sizes. ``group``: columns under a scale, K where rows are not grouped; ``slabs`` of the packed kinds alone."""

    kind: str
    n: int
    k: int
    group: int
    scale: str
    shift: str | None
    single: bool
    slabs: Slabs | None


def _part(module: Module, leaf: str) -> RawTensor:
    raw = module.parts.get(leaf)
    if raw is None:
        name = leaf.rpartition("._")[2]
        raise BadFile(f"missing-{name}", f"there is no {module.name}.{leaf}", tensor=module.name, hint="fetch all shards")
    return raw


def _float_part(module: Module, leaf: str, others: tuple[str, ...] = ()) -> RawTensor:
    raw, known = _part(module, leaf), ("F16", "BF16", "F32", *others)
    if raw.dtype not in known:
        raise BadFile("wrong-dtype", f"is {raw.dtype}, expected {' or '.join(known)}", tensor=raw.name)
    return raw


def geometry(module: Module) -> Geometry:
    """The layer's sizes, from the headers of its parts; remembered."""
    return module.remember("geometry", _packed if PACKED in module.parts else _bytes)


def _bytes(module: Module) -> Geometry:
    data, scale = _part(module, DATA), _float_part(module, SCALE)
    if data.dtype not in BYTES:
        raise BadFile("wrong-dtype", f"is {data.dtype}, expected {' or '.join(BYTES)}", tensor=data.name)
    if len(data.shape) != 2:
        raise Unsupported("rank", f"has {len(data.shape)} dimensions: only linear layers are known", tensor=data.name)
    kind, (n, k) = BYTES[data.dtype], data.shape
    said = kind_said(module.match.config, module.name)
    if said is not None and said != kind:
        raise BadFile("config-disagrees", f"the map says {said}, the codes are {data.dtype}", tensor=data.name)
    single = scale.shape == ()
    if scale.shape not in ((), (n, 1)):
        raise BadFile("wrong-shape", f"has shape {scale.shape}, expected {(n, 1)}", tensor=scale.name)
    return Geometry(kind, n, k, k, scale.dtype, None, single, None)


def _packed(module: Module) -> Geometry:
    data, scale, shift = _part(module, PACKED), _float_part(module, SCALE), _float_part(module, SHIFT, ("U8",))
    if data.dtype != "U8":
        raise BadFile("wrong-dtype", f"is {data.dtype}, expected U8", tensor=data.name)
    single = scale.shape[:1] == (1,) and scale.shape == data.shape  # the owner's mistake with one group: a scale for each column
    if len(data.shape) != 2 or scale.shape != shift.shape or not (single or (len(scale.shape) == 2 and scale.shape[1] == 1)):
        text = f"has shape {data.shape} with scales {scale.shape} and shifts {shift.shape}, expected (rows, columns) and (groups, 1) twice"
        raise BadFile("wrong-shape", text, tensor=data.name)
    (packed_rows, columns), rows = data.shape, scale.shape[0]
    bits = _packed_bits(module, packed_rows, rows)
    slabs = Slabs(rows, columns, bits, tuple(range(0, 8, bits)))
    if slabs.packed_rows != packed_rows:
        raise BadFile("wrong-shape", f"has {packed_rows} rows, expected {slabs.packed_rows} for {rows} scales", tensor=data.name)
    k = _columns(module, rows, columns)
    return Geometry(f"qint{bits}", rows * columns // k, k, 1 if single else columns, scale.dtype, shift.dtype, False, slabs)


def _packed_bits(module: Module, packed_rows: int, rows: int) -> int:
    """4 or 2, from the number of scales, and from the map where that leaves it open."""
    fitting = [bits for kind, bits in _BITS.items() if -(-rows * bits // 8) == packed_rows]
    said = kind_said(module.match.config, module.name)
    if said is not None:
        if _BITS.get(said) not in fitting:
            raise BadFile("config-disagrees", f"the map says {said}, but {packed_rows} rows hold {rows} groups", tensor=module.name)
        return _BITS[said]
    if not fitting:
        raise BadFile("wrong-shape", f"{packed_rows} rows of bytes do not hold {rows} groups of 4 or 2 bits", tensor=module.name)
    return fitting[0]


def _columns(module: Module, rows: int, columns: int) -> int:
    """K: the model's word, else the bias's N, else the packed columns where they cannot be a group."""
    total, known = rows * columns, module.columns
    if known is None:
        bias = module.parts.get("bias")
        if bias is not None and len(bias.shape) == 1 and bias.shape[0] and total % bias.shape[0] == 0:
            known = total // bias.shape[0]
        elif columns not in (128, 96, 64, 32):
            known = columns
        else:
            text = f"{rows} groups of {columns} columns: how many a row has is said nowhere"
            raise Unsupported("shape-unknown", text, tensor=module.name, hint="add the model's config.json, of a known architecture")
    if known < 1 or total % known or (group_of(known) or known) != columns:
        text = f"rows of {known} columns have groups of {group_of(known) or known}, the codes have {columns} columns"
        raise BadFile("group-size", text, tensor=module.name, hint="config.json and tensors disagree; fetch both from the same place")
    return known


def _grid(kind: str) -> Integer | Float:
    if kind == "qint8":
        return Integer(8, signed=True)
    return Integer(_BITS[kind]) if kind in _BITS else Float(kind.removeprefix("qfloat8_"))


def scheme(module: Module) -> Scheme:
    """Shape, codes and parameters, from headers and, for one row, its one scale."""
    g = geometry(module)
    shape, tile = (g.n, g.k), Tile((1, g.group))
    only = _floats(_part(module, SCALE), 0, 1) if g.single or (g.n, g.group) == (1, g.k) else None
    value = None if only is None else float(only[0, 0])
    spec = ParamSpec(FLOATS[g.scale], whole(shape) if g.single else tile, constant=value)
    if g.shift is None:
        return Scheme(shape, _grid(g.kind), (spec,))
    moved = None if only is None else float(_shift_tensor(module, g, 0, 1)[0, 0])
    other = ParamSpec("uint8" if g.shift == "U8" else FLOATS[g.shift], tile, constant=moved)
    if g.shift == "U8":
        return Scheme(shape, _grid(g.kind), (spec,), other)
    return Scheme(shape, _grid(g.kind), (spec,), None, other)


def _floats(raw: RawTensor, start: int, stop: int) -> Tensor:
    """Rows of a plane (n, 1); ``BadFile('not-finite')`` where a number is NaN or infinite."""
    import torch

    array = raw.row_range(start, stop) if raw.shape[1:] == (1,) else raw.array().reshape(-1, 1)[start:stop]
    values = float_tensor(array, raw.dtype)
    if not bool(torch.isfinite(values).all()):
        raise BadFile("not-finite", "holds NaN or infinities", tensor=raw.name, hint="the file is damaged or overflowed")
    return values


def _shift_tensor(module: Module, g: Geometry, start: int, stop: int) -> Tensor:
    """The offsets -shift of groups ``start:stop`` (n, 1), or integer zero points."""
    import torch

    raw = _part(module, SHIFT)
    if g.shift == "U8":
        return torch.from_numpy(raw.array().reshape(-1, 1)[start:stop])
    return -_floats(raw, start, stop)


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop``: codes (n, K), int8, uint8 of a small float, or uint8 of 4 or 2 bits; one scale a row or group.

    A shift in floats is the offset -shift, one in integers the zero point.
    """
    import torch

    from qformats.tensor import Param, QuantizedTensor

    g = geometry(module)
    stop = g.n if stop is None else stop
    if not 0 <= start < stop <= g.n:
        raise UsageError("row-range", f"rows {start}:{stop} of a weight of {g.n} rows", tensor=module.name)
    shape, tile, grid = (stop - start, g.k), Tile((1, g.group)), _grid(g.kind)
    if not codes:
        plane = blank_codes(shape)
    elif g.slabs is None:
        plane = torch.from_numpy(_part(module, DATA).row_range(start, stop))
    else:
        plane = torch.from_numpy(g.slabs.unpack(_part(module, PACKED), start * g.k, stop * g.k)).reshape(shape)
    if g.slabs is None:
        block = whole(shape) if g.single else tile
        return QuantizedTensor(shape, plane, grid, (Param(_floats(_part(module, SCALE), start, stop), block),))
    across = g.k // g.group
    first, last = start * across, stop * across
    scale = Param(_floats(_part(module, SCALE), first, last).reshape(-1, across), tile)
    moved = Param(_shift_tensor(module, g, first, last).reshape(-1, across), tile)
    zero, offset = (moved, None) if g.shift == "U8" else (None, moved)
    return QuantizedTensor(shape, plane, grid, (scale,), zero, offset)


def module_warnings(module: Module) -> tuple[str, ...]:
    """What a user should know: activations of the module are quantized, which this weight's reader cannot keep elsewhere."""
    modules = module.match.config.get("modules")
    entry = modules.get(module.name) if isinstance(modules, dict) else None
    kind = entry.get("activations", "none") if isinstance(entry, dict) else "none"
    return () if kind == "none" else (f"its activations are quantized to {kind}, which only Quanto carries out",)


# ---------------------------------------------------------------- storages


def storage_of(module: Module) -> Storage:
    """The storage whose ``write`` makes these parts again."""
    g = geometry(module)
    made = _storage(g.kind, (g.n, g.k), FLOATS[g.scale], g.shift == "U8", None if g.shift in (None, "U8") else FLOATS[g.shift or ""])
    return made.with_group(1) if g.group == 1 else made


def _storage(kind: str, shape: tuple[int, ...], dtype: str, integer_shift: bool = False, offset: str | None = None) -> Storage:
    width = {"float16": 16, "bfloat16": 16, "float32": 32}
    if kind not in _BITS:
        rows = None if shape[0] == 1 else 1
        return Storage(kind, _grid(kind), None, 8 + width[dtype] / shape[-1], (dtype,), rows=rows)
    bits, group = _BITS[kind], group_of(shape[-1])
    shift = 8 if integer_shift else width[offset or dtype]
    return Storage(
        kind,
        Integer(bits),
        group,
        bits + (width[dtype] + shift) / (group or shape[-1]),
        (dtype,),
        zero_point=(0, (1 << bits) - 1) if integer_shift else None,
        offset=None if integer_shift else offset or dtype,
        together=True,
    )


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """Candidates for a weight shaped like ``scheme``, those that could hold its codes first; groups follow from K alone.

    Options: ``dtype=float16|bfloat16|float32`` of scales and shifts (default: the model's, where the target says it, else the source's
    scale's, else float16): Quanto multiplies in it (``library/qbytes_mm.py``) and hands the result to layers of the model's dtype. Also
    ``zeropoint`` for integer shifts of 4 and 2 bits (``no``: floats; default: as the source has them).
    """
    if target.type is not None and target.type not in KINDS:
        raise UsageError("type", f"quanto has no type {target.type!r}", hint=f"types: {', '.join(KINDS)}")
    unknown = sorted(set(target.options) - {"dtype", "zeropoint"})
    if unknown:
        raise UsageError("option", f"quanto has no option {unknown[0]!r}", hint="options: dtype, zeropoint")
    dtypes = _dtypes(target, scheme)
    whole_zero = scheme.zero_point is not None and scheme.zero_point.dtype in ("uint8", "int8", "int16", "int32")
    forms = [whole_zero, not whole_zero] if "zeropoint" not in target.options else [yes_no(target, "zeropoint")]
    found = []
    for kind in _kinds(target, scheme):
        for dtype in dtypes:
            if kind in _BITS and scheme.shape[0] * (scheme.shape[-1] // (group_of(scheme.shape[-1]) or scheme.shape[-1])) > 1:
                found += [_storage(kind, scheme.shape, dtype, form) for form in forms]
            elif kind not in _BITS:
                found.append(_storage(kind, scheme.shape, dtype))
    if not found:
        raise Unsupported("row-count", "Quanto cannot hold a single group of 4 or 2 bits", hint="choose qint8")
    return found


def _dtypes(target: Target, scheme: Scheme) -> list[str]:
    asked, known = dtype_option(target), ("float16", "bfloat16", "float32")
    if asked is not None:
        return [asked]
    if target.dtype in known:
        return [target.dtype]
    return list(dict.fromkeys([*[s.dtype for s in scheme.scales if s.dtype in known][:1], "float16"]))


def _kinds(target: Target, scheme: Scheme) -> list[str]:
    if target.type is not None:
        return [target.type]
    grid = scheme.grid
    if isinstance(grid, Float) and f"qfloat8_{grid.name}" in KINDS:
        return [f"qfloat8_{grid.name}"]
    narrow = isinstance(grid, Integer) and not grid.signed and grid.bits <= 4
    wide = ("qint4", "qint2", "qint8") if narrow and scheme.scales else ("qint8", "qint4", "qint2")
    return sorted(wide, key=lambda kind: kind != "qint2") if isinstance(grid, Integer) and grid.bits <= 2 and narrow else list(wide)


def _slabs(storage: Storage, shape: tuple[int, ...]) -> Slabs | None:
    if storage.type not in _BITS:
        return None
    n, k = shape
    group, bits = storage.group or k, _BITS[storage.type]
    if storage.group != group_of(k) and not (n == 1 and storage.group == 1):
        raise Unsupported("group-size", f"Quanto loads rows of {k} columns with groups of {group_of(k) or k} alone, not of {group}")
    group = k if group == 1 else group
    return Slabs(n * k // group, group, bits, tuple(range(0, 8, bits)))


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K)."""
    if len(shape) != 2:
        raise Unsupported("rank", f"quanto holds matrices, not weights of shape {shape}")
    slabs, dtype = _slabs(storage, shape), CONTAINER_FLOATS[storage.scale_dtypes[0]]
    scalars = {leaf: PartInfo(dtype, ()) for leaf in ("input_scale", "output_scale")}
    if slabs is None:
        scale = PartInfo(dtype, () if shape[0] == 1 else (shape[0], 1))
        return {DATA: PartInfo(_WORDS[storage.type], shape), SCALE: scale, **scalars}
    shift = "U8" if storage.offset is None else CONTAINER_FLOATS[storage.offset]
    plane = (1, slabs.columns) if storage.group == 1 else (slabs.rows, 1)
    planes = {SCALE: PartInfo(dtype, plane), SHIFT: PartInfo(shift, plane)}
    return {PACKED: PartInfo("U8", (slabs.packed_rows, slabs.columns)), **planes, **scalars}


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether ``write`` takes such a tensor as it stands."""
    if len(scheme.shape) != 2:
        return No(f"it has {len(scheme.shape)} dimensions, not 2")
    if scheme.grid != storage.grid:
        return No(f"its codes are {scheme.grid}, not {storage.grid}")
    if scheme.signs or scheme.group_index or len(scheme.scales) != 1:
        return No("it has signs, an act-order index or several scales")
    tile = Tile((1, min(storage.group or scheme.shape[1], scheme.shape[1])))
    scale, zero, offset = scheme.scales[0], scheme.zero_point, scheme.offset
    blocks = (tile, whole(scheme.shape)) if scheme.shape[0] == 1 or storage.rows is None else (tile,)
    if scale.inverse or scale.dtype != storage.scale_dtypes[0] or scale.block not in blocks:
        return No(f"its scale is {scale.dtype} on {scale.block}, not {storage.scale_dtypes[0]} on {tile}")
    if (offset is None) != (storage.offset is None) or (offset is not None and (offset.dtype != storage.offset or offset.block != tile)):
        return No(f"its offset is not {storage.offset} on {tile}")
    if storage.zero_point is None:
        return Yes() if zero is None else No("it has a zero point")
    if zero is None or zero.dtype not in ("uint8", "int8", "int16", "int32") or (zero.constant is None and zero.block != tile):
        return No("it has no integer zero point for each group")
    return Yes()


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n`` of the weight ``shape``; all rows at once for 4 and 2 bits."""
    n = tensor.shape[0]
    if storage.together and (start, n) != (0, shape[0]):
        raise Unsupported("row-range", f"rows {start} … {start + n} of {shape[0]}: quanto packs distant rows into one byte")
    answer = can_store(storage, tensor.scheme)
    if isinstance(answer, No):
        raise Unsupported("storage-form", f"cannot be written as quanto {storage.type}: {answer.reason}")
    slabs, codes = _slabs(storage, shape), tensor.codes.contiguous().numpy()
    scale = tensor.scales[0].values
    pieces = [Piece(SCALE, _column(scale), start)]
    if slabs is None:
        pieces.append(Piece(DATA, codes, start))
    else:
        groups = slabs.columns if storage.group == 1 else slabs.rows
        pieces += [Piece(PACKED, slabs.pack(codes)), Piece(SHIFT, _shift_column(storage, tensor, groups))]
        if storage.group == 1:
            pieces = [Piece(p.leaf, p.array.reshape(1, -1)) for p in pieces]
    if start:
        return pieces
    one = _column(scale.new_ones((1, 1)))  # type: ignore[union-attr]
    return [*pieces, Piece("input_scale", one), Piece("output_scale", one)]


def _column(values: Any) -> Any:
    return float_array(values.contiguous()).reshape(-1, 1)


def _shift_column(storage: Storage, tensor: QuantizedTensor, groups: int) -> Any:
    """The shifts (groups, 1): -offset, or integer zero points as uint8."""
    import numpy as np

    param: Param | None = tensor.offset if tensor.offset is not None else tensor.zero_point
    assert param is not None
    if storage.offset is not None:
        return _column(-param.values)  # type: ignore[operator]
    values = param.values.reshape(-1).numpy()  # type: ignore[union-attr]
    low, high = storage.zero_point if isinstance(storage.zero_point, tuple) else (0, 255)
    if values.size and (int(values.min()) < low or int(values.max()) > high):
        raise Unsupported("zero-point-range", f"zero points {int(values.min())} … {int(values.max())} are outside {low} … {high}")
    return np.broadcast_to(values.astype(np.uint8), (groups,)).reshape(-1, 1).copy()
