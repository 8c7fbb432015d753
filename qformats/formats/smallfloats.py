"""What the formats of small floats share (FP8, FP4 under scales for rows, tiles or tensors): planes in, planes out. Not a format itself.

A weight (N, K), or (E, N, K) for stacked experts, is a plane of bit patterns, one byte each or two e2m1 codes a byte with the even column
in the low nibble, and up to two planes of scales: one number for each tile of ``rows`` x ``group`` weights, and one for a whole tensor.
A scale is a float of its own dtype, or a byte that is the bit pattern of a small float: ``U8`` and ``F8_E8M0`` hold exponents
(2^(b - 127)), never numbers; ``F8_E4M3`` holds e4m3fn. Torch-free at import.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from qformats.bits import pack_pairs, unpack_pairs
from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.packed import CONTAINER_FLOATS, FLOATS, blank_codes, float_array, float_tensor
from qformats.formats.protocol import Module, PartInfo, Piece
from qformats.grids import not_finite
from qformats.scheme import Factor, Float, No, ParamSpec, Scheme, Storage, Tile, Yes, whole

if TYPE_CHECKING:
    import numpy as np

    from qformats.tensor import Param, QuantizedTensor

    Array = np.ndarray[Any, Any]

__all__ = [
    "GRIDS",
    "Scale",
    "Weight",
    "can_store",
    "code_part",
    "counts",
    "factor_pieces",
    "part_of",
    "read",
    "scale_part",
    "scale_pieces",
    "scheme_of",
    "storage_of",
    "tiles",
    "unpacked_shape",
    "verdict",
    "write_codes",
]

GRIDS = {"F8_E4M3": "e4m3fn", "F8_E5M2": "e5m2", "F8_E4M3FNUZ": "e4m3fnuz", "F8_E5M2FNUZ": "e5m2fnuz"}
_WORDS = {grid: word for word, grid in GRIDS.items()}
_SCALE_GRIDS = {"U8": "e8m0", "F8_E8M0": "e8m0", "F8_E4M3": "e4m3fn"}


@dataclass(frozen=True)
class Scale:
    """A stored plane of scales: one for each tile of ``rows`` x ``group`` weights of an (E,) N x K weight, None = all of them.

    ``inverse``: the stored number divides.
    """

    raw: RawTensor
    rows: int | None
    group: int | None
    inverse: bool = False

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return self.rows or shape[-2], min(self.group or shape[-1], shape[-1])

    @property
    def grid(self) -> Float | None:
        """The small float whose bit patterns are stored; None for plain numbers."""
        return Float(_SCALE_GRIDS[self.raw.dtype]) if self.raw.dtype in _SCALE_GRIDS else None

    def spec(self, shape: tuple[int, ...]) -> ParamSpec:
        """The scale in the scheme of a weight ``shape``."""
        single = prod(self.raw.shape) == 1
        tile = Tile((*(1 for _ in shape[:-2]), *self._sizes(shape))) if not single else whole(shape)
        if self.grid is not None:
            return ParamSpec("codes", tile, self.inverse, nested=Scheme(tile.counts(shape), self.grid))
        return ParamSpec(FLOATS[self.raw.dtype], tile, self.inverse)

    def param(self, shape: tuple[int, ...], start: int, stop: int) -> Param:
        """The scales of rows ``start:stop``, counted over all experts, on the tiles of a weight (stop - start, K)."""
        import numpy as np

        n, k, count = shape[-2], shape[-1], stop - start
        rows, width = self._sizes(shape)
        across, down = -(-k // width), -(-n // rows)
        if prod(self.raw.shape) == 1:
            return self._param(self._plane(0, 1, 1), whole((count, k)))
        if start % rows == 0 and (len(shape) == 2 or n % rows == 0):
            return self._param(self._plane(start // rows, -(-stop // rows), across), Tile((rows, width)))
        row = np.arange(start, stop)
        tile_row = row // n * down + row % n // rows
        first = int(tile_row[0])
        return self._param(self._plane(first, int(tile_row[-1]) + 1, across)[tile_row - first], Tile((1, width)))

    def _plane(self, first: int, last: int, across: int) -> Array:
        """Rows of the plane seen as (tiles down over all experts, ``across``)."""
        raw = self.raw
        if len(raw.shape) > 1 and raw.shape[-1] == across:
            return raw.row_range(first, last)
        return raw.array().reshape(-1, across)[first:last]

    def _param(self, values: Array, tile: Tile) -> Param:
        import torch

        from qformats.tensor import Param, QuantizedTensor

        if self.grid is None:
            plane = float_tensor(values, self.raw.dtype)
            good = bool(torch.isfinite(plane).all()) and not (self.inverse and bool((plane == 0).any()))
            held: Any = plane
        else:
            patterns = values.view(np_uint8())
            good, codes = not any(bool((patterns == bad).any()) for bad in not_finite(self.grid.name)), torch.from_numpy(patterns)
            held = QuantizedTensor((int(codes.shape[0]), int(codes.shape[1])), codes, self.grid)
        if not good:
            raise BadFile("not-finite", "a scale is NaN or infinite", tensor=self.raw.name, hint="the file is damaged")
        return Param(held, tile, self.inverse)


def np_uint8() -> Any:
    """numpy's uint8, imported when needed."""
    import numpy as np

    return np.uint8


@dataclass(frozen=True)
class Weight:
    """A stored weight: its plane of codes, what they stand for, its shape (K last), its scales with that of the whole tensor last."""

    raw: RawTensor
    grid: Float
    shape: tuple[int, ...]
    scales: tuple[Scale, ...]

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.grid.name == "e2m1"


def part_of(module: Module, leaf: str, dtypes: tuple[str, ...]) -> RawTensor:
    """A part that must be there with one of ``dtypes``; ``BadFile`` with ``missing-<leaf>``, ``wrong-dtype`` or ``size``."""
    raw = module.parts.get(leaf)
    shown = leaf.removeprefix("_") or "weight"
    if raw is None:
        raise BadFile(
            f"missing-{shown.replace('_', '-')}", f"there is no {shown} of {module.name}", tensor=module.name, hint="fetch all shards"
        )
    if raw.dtype not in dtypes:
        raise BadFile("wrong-dtype", f"is {raw.dtype}, expected {' or '.join(dtypes)}", tensor=raw.name)
    return raw


def unpacked_shape(raw: RawTensor) -> tuple[int, ...]:
    """The shape of the weight whose e2m1 codes lie two a byte in ``raw`` (U8, I8), or one an element by its own count (F4)."""
    return tuple(raw.shape) if raw.dtype == "F4" else (*raw.shape[:-1], raw.shape[-1] * 2)


def counts(shape: tuple[int, ...], rows: int | None, group: int | None) -> tuple[int, ...]:
    """How many tiles of ``rows`` x ``group`` (None = all) a weight ``shape`` has, (E,) down and across."""
    return (*shape[:-2], -(-shape[-2] // (rows or shape[-2])), -(-shape[-1] // (group or shape[-1])))


def tiles(raw: RawTensor, shape: tuple[int, ...], rows: int | None, group: int | None, *also: tuple[int, ...]) -> Scale:
    """``raw`` as the scales of tiles of ``rows`` x ``group`` (None = all); ``BadFile('wrong-shape')`` for another shape of them.

    A last dimension of 1 may be left out, a first one of a matrix's scales too, and one number may have any number of dimensions.
    ``also``: other shapes that the format knows.
    """
    expected = counts(shape, rows, group)
    known = [expected, *also]
    if expected[-1] == 1:
        known.append(expected[:-1])
    if len(expected) == 2 and expected[0] == 1:
        known.append(expected[1:])
    if raw.shape not in known and (prod(expected) != 1 or prod(raw.shape) != 1):
        raise BadFile("wrong-shape", f"has shape {tuple(raw.shape)}, expected {expected} for a weight of shape {shape}", tensor=raw.name)
    return Scale(raw, rows, group)


def scheme_of(weight: Weight) -> Scheme:
    """The scheme of a stored weight."""
    return Scheme(weight.shape, weight.grid, tuple(scale.spec(weight.shape) for scale in weight.scales))


def storage_of(weight: Weight, name: str, bits: float, options: dict[str, object], k_multiple: int = 1) -> Storage:
    """The storage that holds such a weight: the first scale's tiles and kind, the last one as factor if there are two."""
    first = weight.scales[0]
    factor = Factor("float32", inverse=weight.scales[1].inverse) if len(weight.scales) > 1 else None
    dtypes = ("float32",) if first.grid is not None else (FLOATS[first.raw.dtype],)
    return Storage(name, weight.grid, first.group, bits, dtypes, k_multiple=k_multiple, scale_grid=first.grid, options=options,
                   rows=first.rows, inverse=first.inverse, factor=factor, whole=factor is not None)  # fmt: skip


def read(weight: Weight, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop``, counted over all experts, as a tensor (stop - start, K)."""
    import torch

    from qformats.tensor import QuantizedTensor

    raw, k, total = weight.raw, weight.shape[-1], prod(weight.shape[:-1])
    stop = total if stop is None else stop
    if not 0 <= start < stop <= total:
        raise UsageError("row-range", f"rows {start}:{stop} of a weight of {total} rows", tensor=raw.name)
    shape = (stop - start, k)
    scales = tuple(scale.param(weight.shape, start, stop) for scale in weight.scales)
    if not codes:
        return QuantizedTensor(shape, blank_codes(shape), weight.grid, scales)
    stored = raw.row_range(start, stop).view(np_uint8())
    plane = unpack_pairs(stored) if weight.packed else stored  # (n, K/2) -> (n, K)
    return QuantizedTensor(shape, torch.from_numpy(plane), weight.grid, scales)


# ---------------------------------------------------------------- writing


def code_part(storage: Storage, shape: tuple[int, ...]) -> PartInfo:
    """The plane of codes of a weight ``shape``; ``Unsupported('k-multiple')`` where rows are not whole groups."""
    assert isinstance(storage.grid, Float)
    if shape[-1] % storage.k_multiple:
        message = f"rows of {shape[-1]} weights are not a multiple of {storage.k_multiple}, as {storage.type} needs"
        raise Unsupported("k-multiple", message)
    if storage.grid.name == "e2m1":
        return PartInfo("U8", (*shape[:-1], shape[-1] // 2))
    return PartInfo(_WORDS[storage.grid.name], shape)


def scale_part(storage: Storage, shape: tuple[int, ...], word: str = "") -> PartInfo:
    """The plane of the first scale; ``word``: the container's dtype where a small float has several."""
    block = storage.scale_block(shape)
    if storage.scale_grid is not None:
        word = word or {"e8m0": "U8", "e4m3fn": "F8_E4M3"}[storage.scale_grid.name]
    else:
        word = CONTAINER_FLOATS[storage.scale_dtypes[0]]
    return PartInfo(word, block.counts(shape))


def write_codes(storage: Storage, tensor: QuantizedTensor) -> Array:
    """The codes of some rows as bytes (n, K) or (n, K/2)."""
    import torch

    assert isinstance(storage.grid, Float)
    codes: Array = tensor.codes.view(torch.uint8).contiguous().numpy()
    return pack_pairs(codes) if storage.grid.name == "e2m1" else codes


def scale_pieces(storage: Storage, tensor: QuantizedTensor, leaf: str, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """The first scale of rows from ``start`` of the weight ``shape``; that of a whole tensor comes with its first row.

    ``Unsupported('row-range')`` where ``start`` is inside a tile of several rows.
    """
    n = shape[-2]
    rows = n if storage.rows is None else min(storage.rows, n)
    single = storage.rows is None and storage.group is None
    if single and start % n:
        return []
    if start % rows or (len(shape) > 2 and n % rows):
        raise Unsupported("row-range", f"row {start} is inside a tile of {rows} rows")
    return [Piece(leaf, _numbers(tensor.scales[0]), start // rows)]


def factor_pieces(tensor: QuantizedTensor, leaf: str, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """The second scale, one number of the whole weight ``shape`` or of each of its experts, with the first row of it."""
    return [] if start % shape[-2] else [Piece(leaf, _numbers(tensor.scales[1])[:1, :1], start // shape[-2])]


def _numbers(param: Param) -> Array:
    from qformats.tensor import QuantizedTensor

    if isinstance(param.values, QuantizedTensor):
        codes: Array = param.values.codes.contiguous().numpy()
        return codes
    return float_array(param.values.contiguous())


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether a tensor is in the storage's form: its grid, one scale on its tiles, and its factor."""
    if scheme.grid != storage.grid:
        return No(f"its codes are {scheme.grid}, not {storage.grid}")
    if scheme.shape[-1] % storage.k_multiple:
        return No(f"{scheme.shape[-1]} columns are not a multiple of {storage.k_multiple}")
    if scheme.zero_point is not None or scheme.offset is not None or scheme.signs or scheme.group_index:
        return No("it has a zero point, an offset, signs or an act-order index")
    count = 1 if storage.factor is None else 2
    if len(scheme.scales) != count:
        return No(f"it has {len(scheme.scales)} scales, not {count}")
    block = storage.scale_block(scheme.shape)
    if not isinstance(block, Tile) or not _is_scale(scheme.scales[0], storage, block, scheme.shape):
        kind = storage.scale_grid.name if storage.scale_grid is not None else " or ".join(storage.scale_dtypes)
        return No(f"its scale is {scheme.scales[0].dtype} on {scheme.scales[0].block}, not {kind} on {block}")
    if storage.factor is not None:
        last = scheme.scales[1]
        if last.nested is not None or last.dtype != storage.factor.dtype or last.inverse != storage.factor.inverse:
            return No("its second scale is of another kind")
        if not _same_tiles(last.block, whole(scheme.shape), scheme.shape) and last.constant is None:
            return No("its second scale is not one number")
    return Yes()


def _is_scale(spec: ParamSpec, storage: Storage, block: Tile, shape: tuple[int, ...]) -> bool:
    if spec.inverse != storage.inverse or not _same_tiles(spec.block, block, shape):
        return False
    if storage.scale_grid is None:
        return spec.nested is None and spec.dtype in storage.scale_dtypes
    nested = spec.nested
    plain = nested is not None and not nested.scales and nested.zero_point is None and nested.offset is None
    return plain and nested is not None and nested.grid == storage.scale_grid


def _same_tiles(block: object, other: Tile, shape: tuple[int, ...]) -> bool:
    """Whether two tilings cut ``shape`` alike, however far their last tiles would reach."""
    if not isinstance(block, Tile):
        return False
    return all(min(a, n) == min(b, n) for a, b, n in zip(block.sizes, other.sizes, shape, strict=True))


def verdict(storage: Storage, tensor: QuantizedTensor, shape: tuple[int, ...]) -> None:
    """``Unsupported('storage-form')`` for rows of a weight ``shape`` in another form."""
    if len(shape) > 2 and storage.rows is None:
        storage = replace(storage, rows=shape[-2])  # of each expert
    answer = can_store(storage, tensor.scheme)
    if isinstance(answer, No):
        raise Unsupported("storage-form", f"cannot be written as {storage.type}: {answer.reason}")
