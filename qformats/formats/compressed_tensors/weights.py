"""compressed-tensors weights read and written. ``read`` and ``write`` mirror each other; the layout table is in the package's docstring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from qformats.bits import pack_columns, pack_rows, pack_words, unpack_columns, unpack_rows, unpack_words
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.compressed_tensors.shapes import MX, Geometry, geometry, grid_of
from qformats.formats.compressed_tensors.storages import can_store, layout
from qformats.formats.packed import FLOATS, float_array, float_tensor
from qformats.formats.protocol import Module, Piece
from qformats.scheme import Float, Integer, No, Storage, Tile, whole

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.tensor import Param, QuantizedTensor

    Array = np.ndarray[Any, Any]

__all__ = ["ROW_MULTIPLE", "loading_warnings", "module_warnings", "read", "write"]

ROW_MULTIPLE = 32  # row ranges for ``write`` start at multiples of this, so that zero points packed along the rows end on words


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop``, counted over all experts, as a tensor (stop - start, K).

    Codes: uint8 0 … 2^b - 1 (packed integers, zero point 2^(b-1) or one for each scale), int8 (``weight`` int8), uint8 bit patterns of
    small floats. With ``codes=False`` they are a zero-stride plane of zeros. ``BadFile('scale-value')`` for a NaN or infinite scale.
    """
    import torch

    from qformats.tensor import QuantizedTensor

    g = geometry(module)
    stop = g.height if stop is None else stop
    if not 0 <= start < stop <= g.height:
        raise UsageError("row-range", f"rows {start}:{stop} of a weight of {g.height} rows", tensor=module.name)
    if g.stored in FLOATS:
        from qformats.formats.compressed_tensors.sparse import read_floats

        return read_floats(module, g, start, stop, codes)
    shape = (stop - start, g.k)
    grid = Float("e4m3fn") if g.stored == "F8_E4M3" else Integer(8, signed=True) if g.stored == "I8" else grid_of(g)
    signed = isinstance(grid, Integer) and grid.signed
    if codes:
        plane = _codes(module, g, start, stop, signed)
    else:
        plane = torch.zeros((1, 1), dtype=torch.int8 if signed else torch.uint8).expand(shape)
    if g.kind == "nvfp4" or g.kind in MX:
        return QuantizedTensor(shape, plane, grid, _small_scales(module, g, start, stop))
    scale = _tiled(g, _scale_rows(module, g, start, stop), start, shape)
    return QuantizedTensor(shape, plane, grid, (scale,), _zero_point(module, g, start, shape), group_index=_index(module, g))


def _codes(module: Module, g: Geometry, start: int, stop: int, signed: bool) -> Tensor:
    """Rows of codes (n, K)."""
    import torch

    if g.stored:
        from qformats.formats.compressed_tensors.sparse import dense_plane

        return torch.from_numpy(dense_plane(module, g, start, stop))
    if g.kind in ("int", "float", "mxfp8"):
        plane = torch.from_numpy(module.parts["weight"].row_range(start, stop))
        if signed and g.bits < 8:
            _check_range(module, plane, -(1 << (g.bits - 1)), (1 << (g.bits - 1)) - 1)
        return plane
    words = module.parts["weight_packed"].row_range(start, stop)
    if words.dtype.itemsize == 1 and words.shape[1] % 4 == 0:
        words = words.view("<i4")  # the same stream of bits
    return torch.from_numpy(unpack_rows(words, g.bits, g.k) if g.stream else unpack_words(words, g.bits, g.k))


def _check_range(module: Module, plane: Tensor, lowest: int, highest: int) -> None:
    low, high = (int(end) for end in plane.aminmax())
    if low < lowest or high > highest:
        raise BadFile("codes-range", f"weights run over {low} … {high}, expected {lowest} … {highest}", tensor=f"{module.name}.weight")


def _scale_rows(module: Module, g: Geometry, start: int, stop: int) -> Tensor:
    """The scales of rows ``start:stop``: (n, G), (1, 1), or one row for each block of rows that they touch."""
    import torch

    raw = module.parts["weight_scale"]
    if g.rows is None:
        rows = raw.array().reshape(1, 1)
    elif raw.rows * g.rows == g.height and len(raw.shape) > 1 and g.rows == 1:
        rows = raw.row_range(start, stop)
    else:
        rows = raw.array().reshape(-1, g.groups)[start // g.rows : -(-stop // g.rows)]
    scale = float_tensor(rows, raw.dtype)
    if not bool(torch.isfinite(scale).all()):
        raise BadFile("scale-value", "a scale is NaN or infinite", tensor=raw.name, hint="the file is damaged or overflowed when made")
    return scale


def _tiled(g: Geometry, values: Tensor, start: int, shape: tuple[int, int]) -> Param:
    """A plane of parameters as rows ``start : start + n`` see it: tiles of several rows only where the range starts with one."""
    import torch

    from qformats.tensor import Param

    if g.rows is None:
        return Param(values, whole(shape))
    if g.rows > 1 and start % g.rows:
        at = torch.arange(start, start + shape[0]) // g.rows - start // g.rows
        return Param(values[at], Tile((1, g.columns)))
    return Param(values.contiguous(), Tile((g.rows, g.columns)))


def _small_scales(module: Module, g: Geometry, start: int, stop: int) -> tuple[Param, ...]:
    """Scales that are codes themselves, and for nvfp4 the number for the whole tensor, which divides."""
    import torch

    from qformats.tensor import Param, QuantizedTensor

    raw = module.parts["weight_scale"]
    stored = raw.row_range(start, stop)
    bad = (stored & 0x7F) == 0x7F if g.kind == "nvfp4" else stored == 0xFF
    if bad.any():
        raise BadFile("scale-value", "a scale is NaN", tensor=raw.name, hint="the file is damaged")
    grid = Float("e4m3fn" if g.kind == "nvfp4" else "e8m0")
    nested = Param(QuantizedTensor((stop - start, g.groups), torch.from_numpy(stored), grid), Tile((1, g.group)))
    if g.kind != "nvfp4":
        return (nested,)
    factor = torch.from_numpy(module.parts["weight_global_scale"].array().reshape(1, 1))
    if not bool(torch.isfinite(factor).all()) or not float(factor):
        raise BadFile("scale-value", f"is {float(factor)}, which cannot divide", tensor=f"{module.name}.weight_global_scale")
    return nested, Param(factor, whole((stop - start, g.k)), inverse=True)


def _zero_point(module: Module, g: Geometry, start: int, shape: tuple[int, int]) -> Param | None:
    """Zero points in the codes' own numbering, or the constant 2^(b-1) of symmetric packed codes."""
    import torch

    from qformats.tensor import constant

    if g.zero == "zeros":
        _check_zeros(module)
    half = 1 << (g.bits - 1)
    if g.zero in ("none", "zeros"):
        return constant(half, shape) if g.kind == "pack" else None
    if g.zero == "packed":
        return _tiled(g, torch.from_numpy(_packed_zeros(module, g, start, start + shape[0])), start, shape)
    raw = module.parts["weight_zero_point"]
    height = raw.array().reshape(-1, g.groups if g.rows else 1)
    values = torch.from_numpy(height if g.rows is None else height[start // g.rows : -(-(start + shape[0]) // g.rows)])
    if g.kind == "pack":
        values = (values.to(torch.int16) + half).to(torch.int16 if g.bits == 8 else torch.uint8)
    return _tiled(g, values, start, shape)


def _check_zeros(module: Module) -> None:
    raw = module.parts["weight_zero_point"]
    if (raw.array() != 0).any():
        raise BadFile("config-disagrees", "the config says symmetric, but there are zero points other than 0", tensor=raw.name)


def _packed_zeros(module: Module, g: Geometry, start: int, stop: int) -> Array:
    """Unsigned zero points (n, G) out of words packed along the rows of each expert."""
    import numpy as np

    raw = module.parts["weight_zero_point"]
    n, height = g.shape[-2], raw.shape[-2]
    dtype = np.int16 if g.bits == 8 else np.uint8
    found = []
    for expert in range(start // n, -(-stop // n)):
        first, last = max(start - expert * n, 0), min(stop - expert * n, n)
        if g.stream and 32 % g.bits:
            words, skip = raw.row_range(expert * height, (expert + 1) * height), first
        else:  # a word holds whole values
            each = 32 // g.bits
            words, skip = raw.row_range(expert * height + first // each, expert * height + -(-last // each)), first % each
        fields = unpack_columns(words, g.bits, skip + last - first) if g.stream else unpack_words(words.T, g.bits, skip + last - first)
        found.append(fields[:, skip:].T.astype(dtype))  # (G, rows) -> (rows, G)
    return np.ascontiguousarray(np.concatenate(found))


def _index(module: Module, g: Geometry) -> Tensor | None:
    """The act-order index (K,) where it is there and says something."""
    import torch

    if not g.indexed:
        return None
    if "index" not in module.memo:
        module.memo["index"] = _find_index(module, g)
    index: Array | None = module.memo["index"]
    return None if index is None else torch.from_numpy(index)


def _find_index(module: Module, g: Geometry) -> Array | None:
    import numpy as np

    stored = module.parts["weight_g_idx"].array()
    if (stored == -1).any() or not stored.any():  # never filled in
        return None
    low, high = int(stored.min()), int(stored.max())
    if low < 0 or high >= g.groups:
        text = f"weight_g_idx holds {low if low < 0 else high}, expected 0 … {g.groups - 1}"
        raise BadFile("g-idx-range", text, tensor=f"{module.name}.weight_g_idx")
    counts = np.bincount(stored, minlength=g.groups)
    if (counts != g.group).any():  # the owner sorts the columns and cuts them into groups of this size
        text = f"weight_g_idx gives {counts.min()} … {counts.max()} columns to a group, expected {g.group} to each"
        raise BadFile("g-idx-groups", text, tensor=f"{module.name}.weight_g_idx")
    trivial = np.array_equal(stored, np.arange(g.k, dtype=stored.dtype) // g.group)
    return None if trivial else stored.astype(np.int32)


def module_warnings(module: Module) -> tuple[str, ...]:
    """What a user should know of how ``module`` was understood."""
    from qformats.formats.compressed_tensors.config import is_ignored

    g = geometry(module)
    said = []
    if g.kind == "dense":
        said.append("its weights are floats that were to be rounded later: read as they are, the scales beside them are not used")
    if is_ignored(module.match.config, module.name):
        said.append("the config's ignore list names it, but it has quantized weights: read as quantized")
    return tuple(said)


def loading_warnings(storages: Mapping[str, Storage]) -> list[str]:
    """What compressed-tensors 0.20 in transformers 5.23 does not load of weights that it knows how to write.

    Packed zero points: ``PackedQuantizationCompressor.compress`` makes the module that is to be filled without packing them.
    ``weight_g_idx``: ``QuantizationArgs`` refuses ``actorder`` ``group`` since the index went in 0.19.
    """
    packed = [name for name, s in storages.items() if _zeros_packed(s)]
    ordered = [name for name, s in storages.items() if s.options.get("g_idx") == "index"]
    said = []
    if packed:
        said.append(f"{_first(packed)}: their zero points are packed, and compressed-tensors 0.20 has no place for such in the model that"
                    " transformers fills: load it with CompressedTensorsConfig(dequantize=True), or write format=int or sym")  # fmt: skip
    if ordered:
        said.append(f"{_first(ordered)}: their act-order is kept in weight_g_idx, which compressed-tensors reads up to 0.18 and refuses"
                    " from 0.20 on: act-order=no writes new codes that it loads")  # fmt: skip
    return said


def _zeros_packed(storage: Storage) -> bool:
    own = storage.options.get("format") == "pack-quantized" and isinstance(storage.zero_point, tuple)
    return own and storage.rows == 1 and "zero" not in storage.options


def _first(names: Sequence[str]) -> str:
    return f"{len(names)} weights, the first is {names[0]!r}" if len(names) > 1 else f"{names[0]!r}"


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n`` of the weight ``shape``; ``start`` is a multiple of ``ROW_MULTIPLE``, and so is the end unless it is N.

    ``Unsupported('storage-form')`` for a tensor in another form.
    """
    import numpy as np

    verdict = can_store(storage, tensor.scheme)
    if isinstance(verdict, No):
        raise Unsupported("storage-form", f"cannot be written as compressed-tensors {storage.type}: {verdict.reason}")
    unit = max(ROW_MULTIPLE, storage.rows or 1)
    if start % unit or ((start + tensor.shape[0]) % unit and start + tensor.shape[0] != shape[0]):
        raise Unsupported("row-range", f"rows {start} … {start + tensor.shape[0]} of {shape[0]} do not fall on multiples of {unit}")
    parts = layout(storage, shape)
    pieces = [_weight_piece(storage, tensor, start), *_scale_pieces(storage, tensor, start)]
    if "weight_zero_point" in parts:
        pieces += _zero_pieces(storage, tensor, start, parts["weight_zero_point"].dtype)
    if start == 0 and "weight_shape" in parts:
        dtype = np.int32 if parts["weight_shape"].dtype == "I32" else np.int64
        pieces.append(Piece("weight_shape", np.array([shape], dtype)))
    if start == 0 and "weight_g_idx" in parts:
        pieces.append(Piece("weight_g_idx", _written_index(storage, tensor, shape[1], parts["weight_g_idx"].dtype)))
    return pieces


def _stream(storage: Storage) -> bool:
    return storage.options.get("packing", "stream") == "stream"


def _weight_piece(storage: Storage, tensor: QuantizedTensor, start: int) -> Piece:
    import numpy as np

    form, codes = storage.options["format"], tensor.codes.contiguous().numpy()
    if form in ("int-quantized", "naive-quantized", "float-quantized", "mxfp8-quantized"):
        return Piece("weight", codes.view(np.uint8) if storage.grid == Float("e4m3fn") else codes, start)
    bits = storage.grid.bits if isinstance(storage.grid, Integer) else MX["mxfp4" if storage.type == "nvfp4" else storage.type][1]
    if form == "pack-quantized":
        return Piece("weight_packed", pack_rows(codes, bits) if _stream(storage) else pack_words(codes, bits), start)
    word = 32 if codes.shape[1] * bits % 32 == 0 else 8  # the same bytes
    return Piece("weight_packed", pack_rows(codes, bits, word).view(np.uint8), start)


def _scale_pieces(storage: Storage, tensor: QuantizedTensor, start: int) -> list[Piece]:
    from qformats.tensor import QuantizedTensor

    values = tensor.scales[0].values
    if isinstance(values, QuantizedTensor):
        pieces = [Piece("weight_scale", values.codes.contiguous().numpy(), start)]
        if storage.factor is not None and start == 0:
            pieces.append(Piece("weight_global_scale", tensor.scales[1].values.numpy()))  # type: ignore[union-attr]
        return pieces
    if storage.rows is None:
        return [Piece("weight_scale", float_array(values.contiguous()))] if start == 0 else []
    plane = float_array(values.contiguous())
    if storage.options.get("scale_rank") == 1:
        return [Piece("weight_scale", plane.reshape(1, -1), 0, start)]
    return [Piece("weight_scale", plane, start // storage.rows)]


def _zero_pieces(storage: Storage, tensor: QuantizedTensor, start: int, dtype: str) -> list[Piece]:
    import numpy as np

    rows, columns = (1, 1) if storage.rows is None else (-(-tensor.shape[0] // storage.rows), prod(tensor.scales[0].values.shape[1:]))
    if storage.rows is None and start:
        return []
    if storage.options.get("zero") == "zeros":
        width = {"I8": 1, "F8_E4M3": 1, "F32": 4, "I32": 4}.get(dtype, 2)
        return [Piece("weight_zero_point", np.zeros((rows, columns), f"u{width}"), start // (storage.rows or 1))]
    assert tensor.zero_point is not None
    values = np.broadcast_to(tensor.zero_point.values.numpy(), (rows, columns)).astype(np.int16)  # type: ignore[union-attr]
    low, high = storage.zero_point if isinstance(storage.zero_point, tuple) else (-128, 255)
    if values.size and not low <= values.min() <= values.max() <= high:
        raise Unsupported("zero-point-range", f"zero points {values.min()} … {values.max()} are outside {low} … {high}")
    if dtype == "I8":
        half = 1 << (storage.integers.bits - 1) if not storage.integers.signed else 0
        return [Piece("weight_zero_point", (values - half).astype(np.int8), start // (storage.rows or 1))]
    bits, fields = storage.integers.bits, np.ascontiguousarray(values.T.astype(np.uint8))  # (G, n)
    words = pack_columns(fields, bits) if _stream(storage) else np.ascontiguousarray(pack_words(fields, bits).T)
    return [Piece("weight_zero_point", words, start * bits // 32 if _stream(storage) else start // (32 // bits))]


def _written_index(storage: Storage, tensor: QuantizedTensor, k: int, dtype: str) -> Array:
    import numpy as np

    kind = storage.options.get("g_idx")
    if tensor.group_index is not None:
        index = tensor.group_index.numpy()
    elif kind == "unset":
        index = np.full(k, -1)
    else:
        index = np.zeros(k) if kind == "zeros" else np.arange(k) // (storage.group or k)
    return index.astype(np.int64 if dtype == "I64" else np.int32).reshape(1, k)
