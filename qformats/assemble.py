"""The rows of a target tensor out of the modules that its ``TensorMap`` names: permuted, stacked, woven, padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from qformats import rewrite
from qformats.architectures.mapping import SourceRows, TensorMap

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["Reader", "overlaps", "read_rows"]


class Reader(Protocol):
    """Where modules come from: a checkpoint, or a model."""

    def codes(self, module: str, start: int, stop: int, *, codes: bool = True) -> QuantizedTensor | None:
        """Rows of a module's weight (flattened to two dimensions), None where it is floats; without ``codes`` all codes are 0."""
        ...

    def floats(self, module: str, leaf: str, start: int | None, stop: int | None) -> Tensor:
        """Rows of floats as they are stored, flattened to two dimensions; without a range the whole tensor in its shape."""
        ...

    def shape(self, module: str, leaf: str) -> tuple[int, ...]:
        """The stored shape of floats."""
        ...


def overlaps(tensor: TensorMap, start: int, stop: int) -> Iterator[tuple[SourceRows, int, int]]:
    """The source pieces under flattened target rows ``start:stop``, with the row range inside each piece."""
    at = 0
    for source in tensor.sources:
        length = source.stop - source.start
        low, high = max(start, at), min(stop, at + length)
        if low < high:
            yield source, low - at, high - at
        at += length


def read_rows(
    tensor: TensorMap, reader: Reader, start: int, stop: int, *, joined: bool = True, codes: bool = True
) -> QuantizedTensor | Tensor:
    """Target rows ``start:stop`` before any rewrite: a canonical tensor when the sources are codes, else floats (n, K).

    Vectors come back as (n, 1). ``joined``: several pieces of codes become one tensor, ``rewrite.Refused`` if they cannot be; else
    floats. ``codes=False`` reads parameters only, all codes are then 0.
    """
    import torch

    if tensor.weave:
        return _read_woven(tensor, reader, start, stop, codes)
    pieces = [_read_piece(tensor, reader, source, low, high, codes) for source, low, high in overlaps(tensor, start, stop)]
    if all(not isinstance(p, torch.Tensor) for p in pieces) and (joined or len(pieces) == 1):
        return rewrite.concatenate_rows(pieces)
    floats = _as_floats(pieces)
    return floats[0] if len(floats) == 1 else torch.cat(floats)


def _as_floats(pieces: Sequence[Any]) -> list[Tensor]:
    import torch

    return [p if isinstance(p, torch.Tensor) else p.dequantize(torch.float32) for p in pieces]


def _read_woven(tensor: TensorMap, reader: Reader, start: int, stop: int, codes: bool) -> QuantizedTensor | Tensor:
    """Target rows ``start:stop`` of sources that come in pairs, the rows or columns of which take turns."""
    import torch

    by_rows, at = tensor.weave == "rows", 0
    pieces: list[Any] = []
    for pair in zip(tensor.sources[::2], tensor.sources[1::2], strict=True):
        length = (pair[0].stop - pair[0].start) * (2 if by_rows else 1)
        low, high = max(start, at) - at, min(stop, at + length) - at
        at += length
        if low >= high:
            continue
        if not by_rows:
            both = _as_floats([_read_piece(tensor, reader, source, low, high, codes) for source in pair])
            pieces.append(torch.cat(both, -1) if tensor.weave == "beside" else torch.stack(both, -1).flatten(-2))
            continue
        ranges = [((low + 1 - side) // 2, (high + 1 - side) // 2) for side in (0, 1)]
        found = [_read_piece(tensor, reader, s, a, b, codes) for s, (a, b) in zip(pair, ranges, strict=True) if a < b]
        pieces.append(_alternate(found, ranges, low, high))
    whole = all(not isinstance(p, torch.Tensor) for p in pieces)
    return rewrite.concatenate_rows(pieces) if whole else torch.cat(_as_floats(pieces))


def _alternate(found: list[Any], ranges: list[tuple[int, int]], low: int, high: int) -> Any:
    """Rows ``low:high`` of two pieces taking turns; ``ranges`` says which rows of each were read."""
    import torch

    first = ranges[0][1] - ranges[0][0]
    target = torch.arange(low, high)
    index = torch.where(target % 2 == 0, target // 2 - ranges[0][0], target // 2 - ranges[1][0] + first)
    if any(isinstance(p, torch.Tensor) for p in found):
        return torch.cat(_as_floats(found)).index_select(0, index)
    return rewrite.select_rows(rewrite.concatenate_rows(found), index)


def _read_piece(tensor: TensorMap, reader: Reader, source: SourceRows, low: int, high: int, codes: bool) -> Any:
    import torch

    if not (source.module or source.leaf):
        return torch.zeros(high - low, tensor.shape[-1])
    first, last, local = _source_range(source, low, high)
    value = _read_source(reader, source, first, last, tensor.shape, codes)
    if local is None:
        return value
    index = torch.from_numpy(local)
    return value.index_select(0, index) if isinstance(value, torch.Tensor) else rewrite.select_rows(value, index)


def _source_range(source: SourceRows, low: int, high: int) -> tuple[int, int, np.ndarray[Any, Any] | None]:
    if source.index is None:
        return source.start + low, source.start + high, None
    wanted = source.index[low:high] + source.start
    first, last = int(wanted.min()), int(wanted.max()) + 1
    return first, last, wanted - first


def _read_source(reader: Reader, source: SourceRows, first: int, last: int, shape: tuple[int, ...], codes: bool) -> Any:
    import torch

    module, leaf = source.module, source.leaf
    if source.transposed is not None:  # columns as rows, in floats; the rows are read whole
        found = reader.codes(module, *source.transposed)
        whole = reader.floats(module, leaf, *source.transposed) if found is None else found.dequantize(torch.float32)
        return whole.t()[first:last].contiguous()
    found = reader.codes(module, first, last, codes=codes) if leaf == "weight" else None
    if found is not None:
        return found
    if source.columns != (0, 1):
        start, step = source.columns
        return reader.floats(module, leaf, first, last)[:, start::step]
    width = shape[-1] if len(shape) > 1 else 1
    if min(len(reader.shape(module, leaf)), len(shape)) <= 1:  # a vector on either side: its rows are the target's
        return reader.floats(module, leaf, None, None).reshape(-1, width)[first:last]
    return reader.floats(module, leaf, first, last)
