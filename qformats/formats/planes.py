"""What the small formats share: a module's parts checked against what they should be. Not a format itself; torch-free at import."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from qformats.containers.raw import NUMPY_DTYPES, RawTensor
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.packed import float_tensor
from qformats.formats.protocol import Module, Piece
from qformats.scheme import No, Scheme, Storage, Yes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, Any]

__all__ = ["check_extra", "finite", "flat_pieces", "integer_verdict", "own_form", "part", "row_range"]


def part(module: Module, leaf: str, dtypes: Sequence[str], *shapes: tuple[int | None, ...]) -> RawTensor:
    """The part ``leaf`` in one of ``dtypes`` and ``shapes``, where None is any size.

    ``BadFile`` with ``missing-LEAF``, ``wrong-dtype``, ``wrong-shape`` or ``size`` otherwise.
    """
    raw = module.parts.get(leaf)
    if raw is None:
        raise BadFile(f"missing-{leaf.replace('_', '-')}", f"there is no {leaf}", tensor=module.name, hint="fetch all shards")
    if raw.dtype not in dtypes:
        raise BadFile("wrong-dtype", f"{leaf} is {raw.dtype}, expected {' or '.join(dtypes)}", tensor=raw.name)
    if not any(_is_of(raw.shape, shape) for shape in shapes):
        expected = " or ".join(str(tuple("any" if n is None else n for n in shape)).replace("'", "") for shape in shapes)
        raise BadFile("wrong-shape", f"{leaf} has shape {raw.shape}, expected {expected}", tensor=raw.name)
    nbytes = prod(raw.shape) * int(NUMPY_DTYPES[raw.dtype][-1])
    if raw.nbytes != nbytes:
        raise BadFile("size", f"{raw.nbytes} bytes, expected {nbytes}", tensor=raw.name)
    return raw


def _is_of(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(n is None or n == m for m, n in zip(shape, wanted, strict=True)) and all(shape)


def row_range(module: Module, start: int, stop: int | None, rows: int) -> int:
    """``stop``, or ``rows`` where it is None; ``UsageError('row-range')`` for a range that is not inside."""
    end = rows if stop is None else stop
    if not 0 <= start < end <= rows:
        raise UsageError("row-range", f"rows {start}:{end} of a weight of {rows} rows", tensor=module.name)
    return end


def finite(values: Tensor, raw: RawTensor) -> Tensor:
    """``values``; ``BadFile('not-finite')`` where one is NaN or infinite."""
    import torch

    if not bool(torch.isfinite(values).all()):
        raise BadFile("not-finite", "holds NaN or infinite numbers", tensor=raw.name, hint="the file is damaged, or overflowed when made")
    return values


_EXTRA_FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E8M0")


def check_extra(raw: RawTensor, leaf: str) -> None:
    """A scale of activations or of the cache: finite floats, at least one; of what stands beside it the floats.

    ``BadFile`` with ``wrong-dtype``, ``wrong-shape`` or ``not-finite`` otherwise.
    """
    import torch

    if "scale" in leaf and raw.dtype not in _EXTRA_FLOATS:
        raise BadFile("wrong-dtype", f"{leaf} is {raw.dtype}, expected a float", tensor=raw.name)
    if "scale" in leaf and not prod(raw.shape):
        raise BadFile("wrong-shape", f"{leaf} has shape {raw.shape}, expected at least one number", tensor=raw.name)
    if raw.dtype not in _EXTRA_FLOATS:
        return
    values = raw.array().reshape(-1)
    if raw.dtype == "F8_E8M0":
        bad = bool((values == 0xFF).any())
    elif raw.dtype == "F8_E4M3":
        bad = bool(((values & 0x7F) == 0x7F).any())
    else:
        bad = not bool(torch.isfinite(float_tensor(values, raw.dtype)).all())
    if bad:
        raise BadFile("not-finite", f"{leaf} holds NaN or infinite numbers", tensor=raw.name, hint="calibrate the activations again")


def flat_pieces(leaf: str, data: Array, first: int, width: int) -> Iterator[Piece]:
    """A run of a part's elements from the flat position ``first`` on, as rectangles of the part seen with rows of ``width``."""
    at, end = first, first + data.size
    while at < end:
        row, column = divmod(at, width)
        rows = max(1, (end - at) // width) if column == 0 else 1
        count = min(end - at, rows * width - column)
        block = data[at - first : at - first + count]
        yield Piece(leaf, block.reshape(-1, width) if column == 0 and count % width == 0 else block.reshape(1, -1), row, column)
        at += count


def integer_verdict(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether a tensor is integer codes on the storage's grid, with its one scale and its constant zero point or none."""
    if len(scheme.shape) != 2 or scheme.grid != storage.grid:
        return No(f"its codes are {scheme.grid} in {len(scheme.shape)} dimensions, not {storage.grid} in 2")
    if scheme.offset is not None or scheme.signs or scheme.group_index or len(scheme.scales) != 1:
        return No("it has an offset, signs, an act-order index, or several scales")
    held = None if scheme.zero_point is None else scheme.zero_point.constant
    if (scheme.zero_point is not None) != (storage.zero_point is not None) or held != storage.zero_point:
        return No(f"its zero point is not {'absent' if storage.zero_point is None else storage.zero_point}")
    scale, block = scheme.scales[0], storage.scale_block(scheme.shape)
    if scale.block != block or scale.inverse != storage.inverse or scale.dtype not in storage.scale_dtypes:
        return No(f"its scale is {scale.dtype} on {scale.block}, not {' or '.join(storage.scale_dtypes)} on {block}")
    return Yes()


def own_form(storage: Storage, verdict: Yes | No, name: str) -> None:
    """``Unsupported('storage-form')`` unless ``verdict`` is a yes."""
    if isinstance(verdict, No):
        raise Unsupported("storage-form", f"cannot be written as {name} {storage.type}: {verdict.reason}")
