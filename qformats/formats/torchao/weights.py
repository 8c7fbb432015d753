"""torchao tensors read and written. ``read`` and ``write`` mirror each other; the layout table is in the package's docstring."""

from __future__ import annotations

from dataclasses import replace
from math import lcm, prod
from typing import TYPE_CHECKING, Any

from qformats.bits import pack_pairs, unpack_pairs
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.packed import FLOATS, float_array, float_tensor
from qformats.formats.protocol import Module, Piece
from qformats.formats.torchao.names import prefix_of
from qformats.formats.torchao.shapes import Form, form_of, zero_is_absent
from qformats.formats.torchao.targets import ROW_MULTIPLE, can_store, form_to_write
from qformats.formats.torchao.tiles import pack_tiles, swizzle, unpack_tiles, unswizzle
from qformats.scheme import Float, Integer, No, Storage, Tile, whole

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.tensor import Param, QuantizedTensor

    Array = np.ndarray[Any, Any]

__all__ = ["read", "write"]


# ---------------------------------------------------------------- reading


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop``, counted over all dimensions but the last, as a tensor (stop - start, K).

    Integer codes come as int8 (unsigned ones of ``Int4PlainInt32Tensor`` as uint8), small floats as uint8 bit patterns. Raises what
    ``form_of`` does, ``BadFile('scale-not-finite')`` for a NaN or an infinity among the parameters, ``BadFile('codes-range')`` for an
    integer outside its type.
    """
    import torch

    from qformats.tensor import QuantizedTensor

    form = form_of(module)
    stop = form.rows if stop is None else stop
    if not 0 <= start < stop <= form.rows:
        raise UsageError("row-range", f"rows {start}:{stop} of a weight of {form.rows} rows", tensor=module.name)
    shape = (stop - start, form.shape[-1])
    signed = isinstance(form.grid, Integer) and form.grid.signed
    if codes:
        plane = torch.from_numpy(_codes(module, form, start, stop))
    else:
        plane = torch.zeros((1, 1), dtype=torch.int8 if signed else torch.uint8).expand(shape)
    scales = [_scale(module, form, start, stop)]
    if form.factor is not None:
        scales.append(_factor(module, form, start, stop))
    if form.pre_scale is not None:
        scales.append(_pre_scale(module, form, shape))
    zero = None if zero_is_absent(module, form) else _parameter(module, form, "zero_point", start, stop)
    return QuantizedTensor(
        shape, plane, form.grid, tuple(scales), None if form.is_offset else zero, zero if form.is_offset else None
    )


def _codes(module: Module, form: Form, start: int, stop: int) -> Array:
    """Codes (stop - start, K): int8 on a signed grid, else uint8."""
    import numpy as np

    raw, k = module.parts[prefix_of(module) + "qdata"], form.shape[-1]
    signed = isinstance(form.grid, Integer) and form.grid.signed
    if form.packing == "tiles":
        first, last = start // 8, -(-stop // 8)
        a_row = prod(raw.shape[1:3])
        words = raw.row_range(first * a_row, last * a_row).reshape(last - first, *raw.shape[1:])
        return (unpack_tiles(words)[start - 8 * first : stop - 8 * first, :k] - np.uint8(8)).view(np.int8)
    stored = raw.row_range(start, stop)
    if form.packing == "words":
        return unpack_pairs(stored.view(np.uint8))
    if form.packing == "pairs":
        fields = unpack_pairs(stored.view(np.uint8))
        return ((fields ^ np.uint8(8)) - np.uint8(8)).view(np.int8) if signed else fields
    if isinstance(form.grid, Integer) and form.grid.bits < 8:
        _check_range(stored, form.grid, raw.name)
    elif isinstance(form.grid, Float) and raw.dtype == "U8" and stored.size and int(stored.max()) > 63:  # six bits
        raise BadFile("codes-range", f"a code is {int(stored.max())}, expected 0 … 63", tensor=raw.name)
    return stored


def _check_range(codes: Array, grid: Integer, name: str) -> None:
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    if low < grid.lowest or high > grid.highest:
        raise BadFile("codes-range", f"codes run over {low} … {high}, expected {grid.lowest} … {grid.highest}", tensor=name)


def _scale(module: Module, form: Form, start: int, stop: int) -> Param:
    import torch

    from qformats.tensor import Param, QuantizedTensor

    if form.scale in FLOATS:
        return _parameter(module, form, "scale_and_zero" if form.order == "joint" else "scale", start, stop)
    raw, grid = module.parts[prefix_of(module) + "scale"], Float("e8m0" if form.scale == "F8_E8M0" else "e4m3fn")
    if form.order == "swizzled":
        first, last = start // 128, -(-stop // 128)
        per = 512 * -(-form.groups // 4)
        stored = replace(raw, shape=(raw.nbytes // per, per)).row_range(first, last)
        plane = unswizzle(stored, form.groups)[start - 128 * first : stop - 128 * first]
    else:
        stored = plane = raw.row_range(start, stop)
    worst = 255 if form.scale == "F8_E8M0" else 127
    if bool(((stored if worst == 255 else stored & 127) == worst).any()):
        raise BadFile("scale-not-finite", "a scale is NaN", tensor=raw.name, hint="the file is damaged; fetch it again")
    tile = form.tile(2)
    codes = QuantizedTensor(tuple(plane.shape), torch.from_numpy(plane), grid)
    return Param(codes, tile)


def _parameter(module: Module, form: Form, name: str, start: int, stop: int) -> Param:
    """Scales or zero points of rows ``start:stop``: (n, G), one number, or fewer rows where several share one and ``start`` fits."""
    import torch

    from qformats.tensor import Param

    joint = form.order == "joint"
    raw = module.parts[prefix_of(module) + ("scale_and_zero" if joint else name)]
    if form.block is None:
        values = _checked(_as_tensor(raw.array().reshape(1, 1), raw.dtype), raw.name)
        return Param(values, whole((stop - start, form.shape[-1])))
    if form.order != "rows":
        plane = _by_column(module, form, name, start, stop)
        return Param(_checked(plane, raw.name), form.tile(2))
    high, width = form.block
    first, last = start // high, -(-stop // high)
    flat = replace(raw, shape=(prod(raw.shape[:-1]), raw.shape[-1]))
    values = _checked(_as_tensor(flat.row_range(first, last), raw.dtype), raw.name)  # (rows / high, G)
    if high == 1 or start % high == 0:
        return Param(values, Tile((high, width)))
    each = torch.arange(start, stop) // high - first
    return Param(values.index_select(0, each), Tile((1, width)))


def _by_column(module: Module, form: Form, name: str, start: int, stop: int) -> Tensor:
    """Planes stored (…, G, N) or jointly (G, N, 2), as (n, G)."""
    import torch

    joint = form.order == "joint"
    raw = module.parts[prefix_of(module) + ("scale_and_zero" if joint else name)]
    if joint:
        wide = replace(raw, shape=(raw.shape[0], 2 * raw.shape[1]))
        both = _as_tensor(wide.column_range(2 * start, 2 * stop), raw.dtype).reshape(raw.shape[0], -1, 2)
        return both[: form.groups, :, 1 if name == "zero_point" else 0].T.contiguous()
    n, planes = form.shape[-2], []
    for expert in range(start // n, -(-stop // n)):
        nbytes = raw.nbytes * n // form.rows
        own = replace(raw, shape=(form.groups, n), offset=raw.offset + expert * nbytes, nbytes=nbytes)
        low, high = max(start, expert * n) - expert * n, min(stop, (expert + 1) * n) - expert * n
        planes.append(_as_tensor(own.column_range(low, high), raw.dtype).T)
    return torch.cat(planes).contiguous()


def _as_tensor(array: Array, dtype: str) -> Tensor:
    return float_tensor(array, dtype)


def _checked(values: Tensor, name: str) -> Tensor:
    import torch

    if values.dtype.is_floating_point and not bool(torch.isfinite(values).all()):
        raise BadFile("scale-not-finite", "a scale or zero point is NaN or infinite", tensor=name, hint="the file is damaged")
    return values


def _factor(module: Module, form: Form, start: int, stop: int) -> Param:
    import torch

    from qformats.tensor import Param

    raw, k = module.parts[prefix_of(module) + "per_tensor_scale"], form.shape[-1]
    values = _checked(torch.from_numpy(raw.array().reshape(-1)), raw.name)
    if form.factor == "tensor":
        return Param(values.reshape(1, 1), whole((stop - start, k)))
    expert = torch.arange(start, stop) // (form.rows // form.shape[0])
    return Param(values[expert].unsqueeze(1), Tile((1, k)))


def _pre_scale(module: Module, form: Form, shape: tuple[int, int]) -> Param:
    """The factor of each input, (1, K): ``y = W (a * x)`` is ``(W diag(a)) x``."""
    from qformats.tensor import Param

    raw = module.parts[prefix_of(module) + "act_pre_scale"]
    values = _checked(_as_tensor(raw.array().reshape(1, -1), raw.dtype), raw.name)
    return Param(values, whole(shape) if values.numel() == 1 else Tile((shape[0], 1)))


# ---------------------------------------------------------------- writing


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows from ``start`` (counted over all dimensions but the last) of a weight ``shape``.

    ``start`` is a multiple of ``ROW_MULTIPLE``, of the rows under one scale, and of 128 where scales are swizzled, and so is the end unless
    it is the last row. ``Unsupported``: ``row-range``, ``form``.
    """
    form, stop = form_to_write(storage, shape), start + tensor.shape[0]
    unit = lcm(128 if form.order == "swizzled" else ROW_MULTIPLE, 1 if form.block is None else form.block[0])
    if start % unit or (stop % unit and stop != form.rows):
        raise Unsupported("row-range", f"rows {start} … {stop} of {form.rows} do not fall on multiples of {unit}")
    verdict = can_store(storage, tensor.scheme)
    if isinstance(verdict, No):
        raise Unsupported("form", f"cannot be written as torchao {storage.type}: {verdict.reason}")
    prefix = str(storage.options.get("prefix", "_weight_"))
    if form.packing == "tiles":
        return _tile_pieces(form, tensor, start, prefix, str(storage.options["padded"]))
    pieces = [Piece(prefix + "qdata", _packed(tensor.codes, form), start)]
    pieces += _scale_pieces(form, tensor, start, prefix)
    zeros = _zero_pieces(form, tensor, start, prefix) if form.zero is not None else []
    return pieces + zeros


def _packed(codes: Tensor, form: Form) -> Array:
    """Codes (n, K) in their stored bytes; the inverse of ``_codes``."""
    import numpy as np

    array: Array = np.ascontiguousarray(codes.numpy())
    if form.packing == "bytes":
        return array
    pairs = pack_pairs(array)
    if form.packing == "words":
        return pairs.view(np.int32)
    return pairs.view(np.int8) if isinstance(form.grid, Integer) else pairs


def _scale_pieces(form: Form, tensor: QuantizedTensor, start: int, prefix: str) -> list[Piece]:
    from qformats.tensor import QuantizedTensor

    held = tensor.scales[0].values
    pieces = []
    if isinstance(held, QuantizedTensor):
        plane: Array = held.codes.contiguous().numpy()
        at = start
        if form.order == "swizzled":
            plane, at = swizzle(plane), start // 4
        pieces.append(Piece(prefix + "scale", plane, at))
    else:
        pieces.append(_plane_piece(form, held, tensor.shape[0], start, prefix + "scale"))
    if form.factor is not None and start == 0:
        factor = tensor.scales[1].values
        pieces.append(Piece(prefix + "per_tensor_scale", float_array(factor.reshape(1, 1)), 0))  # type: ignore[union-attr]
    return pieces


def _plane_piece(form: Form, values: Tensor, rows: int, start: int, leaf: str) -> Piece:
    """A plane of scales or zero points, (rows / high, G) or one number, where it is stored."""
    if form.block is None:
        return Piece(leaf, float_array(values.reshape(1, 1).contiguous()), 0)
    plane = values.expand(-(-rows // form.block[0]), form.groups).contiguous()
    if form.order == "columns":
        return Piece(leaf, float_array(plane.T.contiguous()), 0, start)
    return Piece(leaf, float_array(plane), start // form.block[0])


def _zero_pieces(form: Form, tensor: QuantizedTensor, start: int, prefix: str) -> list[Piece]:
    """Zero points as stored; zeros where the tensor has none but the class wants them."""
    import torch

    param = tensor.offset if form.is_offset else tensor.zero_point
    assert form.zero is not None
    if param is None:
        values = torch.zeros((1, 1), dtype=torch.int8)
    else:
        values = param.values  # type: ignore[assignment]
    if not values.dtype.is_floating_point:
        low, high = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
        if low < -128 or high > 127:
            raise Unsupported("zero-point-range", f"zero points {low} … {high} are outside -128 … 127")
        values = values.to(torch.int8)
    return [_plane_piece(form, values, tensor.shape[0], start, prefix + "zero_point")]


def _tile_pieces(form: Form, tensor: QuantizedTensor, start: int, prefix: str, padded: str) -> list[Piece]:
    """Tiles of rows a multiple of 8 and their scales beside their offsets.

    What fills up is what torchao 0.18.0 makes of zeros (``_choose_qparams_affine_tinygemm``, ``_quantize_affine_tinygemm``): a scale of
    2^-126, the smallest normal bfloat16, an offset of 8 times that, and the code nearest to zero.
    """
    import numpy as np
    import torch

    full_rows, full_columns, inner, group = (int(word) for word in padded.split())
    n, k = tensor.shape
    rows = min(-(-n // 8) * 8, full_rows - start)
    both = torch.empty((rows, full_columns // group, 2), dtype=torch.bfloat16)
    both[..., 0], both[..., 1] = 2.0**-126, 2.0**-123
    for index, param in enumerate((tensor.scales[0], tensor.offset)):
        assert param is not None
        both[:n, : form.groups, index] = param.values  # type: ignore[assignment]
    scale, zero = (both[..., index].repeat_interleave(group, 1) for index in (0, 1))  # (rows, columns)
    blank = torch.clamp(torch.round((0 - (zero - scale * 8)) / scale), 0, 15).to(torch.uint8)
    blank[:n, :k] = (tensor.codes + 8).to(torch.uint8)
    words = pack_tiles(blank.numpy(), inner)
    planes = float_array(both.transpose(0, 1).contiguous())  # (G, rows, 2)
    tiles = Piece(prefix + "qdata", np.ascontiguousarray(words.reshape(-1, inner // 2)), start // 8 * prod(words.shape[1:3]))
    return [tiles, *(Piece(prefix + "scale_and_zero", plane, g * full_rows + start) for g, plane in enumerate(planes))]
