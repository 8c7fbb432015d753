"""ModelOpt's integers: four bits two rows a byte (``pack_int4_in_uint8``), and eight bits; a float scale for each group of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, UsageError
from qformats.formats import smallfloats
from qformats.formats.packed import FLOATS, blank_codes
from qformats.scheme import Integer, ParamSpec, Scheme, Storage, whole

if TYPE_CHECKING:
    import numpy as np

    from qformats.tensor import QuantizedTensor

    Array = np.ndarray[Any, Any]

__all__ = ["ZERO", "pack_rows", "read", "scheme_of", "shape_of", "storage_of"]

ZERO = 8  # two's complement of four bits, seen as unsigned codes


def _is_packed(raw: RawTensor) -> bool:
    return raw.dtype == "U8"


def shape_of(raw: RawTensor) -> tuple[int, int]:
    """N and K of the weight."""
    return raw.shape[0] * 2 if _is_packed(raw) else raw.shape[0], raw.shape[1]


def _scales(raw: RawTensor, scale: RawTensor, before: RawTensor | None) -> tuple[smallfloats.Scale, ...]:
    """The groups' scale and the columns' factor, checked; ``BadFile('wrong-shape')`` where they are not of this weight."""
    n, k = shape_of(raw)
    across = scale.shape[1] if len(scale.shape) == 2 else 1
    single = all(size == 1 for size in scale.shape)
    if not single and (scale.shape[0] != n or across == 0 or k % across):
        raise BadFile("wrong-shape", f"has shape {tuple(scale.shape)}, expected ({n}, groups) for {k} columns", tensor=scale.name)
    rows, group = (None, None) if single else (1, None if across == 1 else k // across)
    made = [smallfloats.tiles(scale, (n, k), rows, group)]
    if before is not None:
        made.append(smallfloats.tiles(before, (n, k), None, 1))
    return tuple(made)


def scheme_of(raw: RawTensor, scale: RawTensor, before: RawTensor | None) -> Scheme:
    """The scheme of a weight (N, K)."""
    shape = shape_of(raw)
    specs = tuple(s.spec(shape) for s in _scales(raw, scale, before))
    if _is_packed(raw):
        return Scheme(shape, Integer(4), specs, ParamSpec("int16", whole(shape), constant=float(ZERO)))
    return Scheme(shape, Integer(8, signed=True), specs)


def read(raw: RawTensor, scale: RawTensor, before: RawTensor | None, start: int, stop: int | None, *, codes: bool) -> QuantizedTensor:
    """Rows ``start:stop``: unsigned codes around 8 (four bits), or signed ones (eight)."""
    import torch

    from qformats.tensor import QuantizedTensor, constant

    n, k = shape_of(raw)
    stop = n if stop is None else stop
    if not 0 <= start < stop <= n:
        raise UsageError("row-range", f"rows {start}:{stop} of a weight of {n} rows", tensor=raw.name)
    shape = (stop - start, k)
    grid = Integer(4) if _is_packed(raw) else Integer(8, signed=True)
    scales = tuple(s.param((n, k), start, stop) for s in _scales(raw, scale, before))
    zero = constant(ZERO, shape) if _is_packed(raw) else None
    if not codes:
        blank = blank_codes(shape)
        return QuantizedTensor(shape, blank if _is_packed(raw) else blank.view(torch.int8), grid, scales, zero)
    if not _is_packed(raw):
        return QuantizedTensor(shape, torch.from_numpy(raw.row_range(start, stop)), grid, scales)
    pairs = torch.from_numpy(raw.row_range(start // 2, -(-stop // 2)))  # (n/2, K): row 2 i low, row 2 i + 1 high
    plane = torch.stack([pairs & 15, pairs >> 4], 1).reshape(-1, k) ^ ZERO
    return QuantizedTensor(shape, plane[start % 2 : start % 2 + shape[0]].contiguous(), grid, scales, zero)


def pack_rows(tensor: QuantizedTensor) -> Array:
    """Codes around 8, an even number of rows, as bytes (n/2, K)."""
    field = tensor.codes ^ ZERO
    array: Array = (field[0::2] | (field[1::2] << 4)).contiguous().numpy()
    return array


def storage_of(raw: RawTensor, scale: RawTensor, before: RawTensor | None, options: dict[str, object]) -> Storage:
    """The storage of a stored weight of integers."""
    first = _scales(raw, scale, before)[0]
    bits = 4 if _is_packed(raw) else 8
    each = 0.0 if first.group is None else 32 / first.group
    return Storage(f"int{bits}", Integer(bits, signed=bits == 8), first.group, bits + each, (FLOATS[scale.dtype],), rows=first.rows,
                   zero_point=ZERO if bits == 4 else None, n_multiple=2 if bits == 4 else 1, options=options)  # fmt: skip
