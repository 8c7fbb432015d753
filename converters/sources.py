"""Reading the rows of a target tensor out of its source modules: permuted, stacked, padded, act-order absorbed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any

from converters.jobs import Job
from qformats import rewrite
from qformats.architectures.mapping import SourceRows
from qformats.checkpoint import Checkpoint
from qformats.containers.raw import ReadAhead
from qformats.formats.protocol import Module

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["SCAN_WEIGHTS", "Slab", "first_rows", "in_source_order", "overlaps", "read_ahead", "read_rows", "slabs", "tasks"]

_SLAB_NBYTES = 32 << 20  # of a module whose rows are columns of its planes, this much is held at a time
_CHUNK_WEIGHTS = 4 << 20  # one step's codes: small beside the memory bound, large beside the cost of a step
_PROBE_ROWS = 64  # whole tiles of every type that has tiles of rows
SCAN_WEIGHTS = 16 << 20  # one step of a scan, which reads codes only where a rule asks


class Slab:
    """Source modules for one thread, the last one read held in memory as far as ``read_ahead`` allows; streamed without ``ahead``."""

    def __init__(self, checkpoint: Checkpoint, *, ahead: bool = True) -> None:
        self._checkpoint, self._ahead = checkpoint, ahead
        self._held: Module | None = None

    def module(self, name: str) -> Module:
        """The module with parts that read ahead."""
        if self._held is None or self._held.name != name:
            module = self._checkpoint.modules[name]
            self._held = read_ahead(module) if self._ahead else module
        return self._held


def read_ahead(module: Module) -> Module:
    """The module with its column ranges read in wide pieces, ``_SLAB_NBYTES`` at a time in all its planes together."""
    share = min(1.0, _SLAB_NBYTES / max(1, sum(raw.nbytes for raw in module.parts.values())))
    parts = {leaf: ReadAhead.of(raw, int(raw.nbytes * share)) for leaf, raw in module.parts.items()}
    # nothing remembered: the file may have changed since the plan was made
    return Module(module.name, parts, module.match, columns=module.columns)


def overlaps(job: Job, start: int, stop: int) -> Iterator[tuple[SourceRows, int, int]]:
    """The source pieces under flattened target rows ``start:stop``, with the row range inside each piece."""
    at = 0
    for source in job.map.sources:
        length = source.stop - source.start
        low, high = max(start, at), min(stop, at + length)
        if low < high:
            yield source, low - at, high - at
        at += length


def row_step(job: Job, weights: int = 0) -> int:
    """How many rows one step of ``weights`` takes: whole periods of the row order, whole words of every packing, whole groups of rows."""
    columns = job.map.shape[-1] if len(job.map.shape) > 1 else 1
    weights = weights or _CHUNK_WEIGHTS
    unit = 64  # whole words of every packing, whole tiles of the tiled ones
    if job.storage is not None:
        together = job.storage.row_unit(job.map.shape)
        if job.storage.together or (together == 0 and job.action == "quantize"):
            return job.map.rows
        unit = lcm(unit, together or 1)
    for source in job.map.sources:
        if source.period == 0:
            return job.map.rows
        unit = lcm(unit, source.period)
    return max(unit, weights // max(1, columns) // unit * unit)


def _module_nbytes(checkpoint: Checkpoint, name: str) -> int:
    return sum(raw.nbytes for raw in checkpoint.modules[name].parts.values())


def slabs(job: Job, checkpoint: Checkpoint, weights: int = 0) -> Iterator[tuple[int, int]]:
    """Row ranges of the job's flattened target, in order; ``weights`` overrides how many weights one holds."""
    total, step = job.map.rows, row_step(job, weights)
    for start in range(0, total, step):
        yield start, min(total, start + step)


def tasks(job: Job, checkpoint: Checkpoint) -> list[list[tuple[int, int]]]:
    """The ranges of ``slabs`` in runs for one worker each: what one filling of a ``Slab`` serves, so that big tensors are shared out."""
    ranges = list(slabs(job, checkpoint))
    nbytes = max((_module_nbytes(checkpoint, s.module) for s in job.map.sources if s.module), default=0)
    fills = -(-nbytes // _SLAB_NBYTES)
    count = max(1, len(ranges) // max(1, fills))
    return [ranges[at : at + count] for at in range(0, len(ranges), count)]


def in_source_order(job: Job) -> tuple[Job, np.ndarray[Any, Any] | None]:
    """The job with its reordered rows left as the sources have them, and the target row of each; None where no row moves.

    Rows then need no neighbours, however far the order throws them: whoever writes them puts each where it belongs.
    """
    import numpy as np

    if len(job.map.shape) < 2 or job.map.weave or all(s.index is None for s in job.map.sources):
        return job, None
    placed, sources, at = [], [], 0
    for source in job.map.sources:
        length = source.stop - source.start
        place = np.arange(length)
        if source.index is not None:
            if int(source.index.max()) >= length:
                return job, None  # a choice of rows, not an order
            place[source.index] = np.arange(length)
            if not np.array_equal(place[source.index], np.arange(length)):
                return job, None  # rows taken twice
        placed.append(at + place)
        sources.append(replace(source, index=None, period=1))
        at += length
    return replace(job, map=replace(job.map, sources=tuple(sources))), np.concatenate(placed)


def first_rows(job: Job) -> int:
    """How many of the target's first rows make a cheap probe: whole periods of the row order, whole tiles."""
    return min(job.map.rows, lcm(_PROBE_ROWS, *(s.period or 1 for s in job.map.sources)))


def read_rows(
    job: Job, slab: Slab, checkpoint: Checkpoint, start: int, stop: int, *, codes: bool = True
) -> QuantizedTensor | Tensor:
    """Target rows ``start:stop`` before any rewrite: a canonical tensor when the sources are codes, else floats (n, K).

    Vectors come back as (n, 1). ``codes=False`` reads parameters only, all codes are then 0. ``rewrite.Refused`` if the pieces
    cannot be one tensor.
    """
    import torch

    if job.map.weave:
        return _read_woven(job, slab, checkpoint, start, stop, codes)
    pieces = [_read_piece(job, slab, checkpoint, source, low, high, codes) for source, low, high in overlaps(job, start, stop)]
    if all(not isinstance(p, torch.Tensor) for p in pieces) and (job.action == "codes" or len(pieces) == 1):
        return rewrite.concatenate_rows(pieces)
    floats = _as_floats(pieces)
    return floats[0] if len(floats) == 1 else torch.cat(floats)


def _as_floats(pieces: Sequence[Any]) -> list[Tensor]:
    import torch

    return [p if isinstance(p, torch.Tensor) else p.dequantize(torch.float32) for p in pieces]


def _read_woven(job: Job, slab: Slab, checkpoint: Checkpoint, start: int, stop: int, codes: bool) -> QuantizedTensor | Tensor:
    """Target rows ``start:stop`` of sources that come in pairs, the rows or columns of which take turns."""
    import torch

    by_rows, at = job.map.weave == "rows", 0
    pieces: list[Any] = []
    for pair in zip(job.map.sources[::2], job.map.sources[1::2], strict=True):
        length = (pair[0].stop - pair[0].start) * (2 if by_rows else 1)
        low, high = max(start, at) - at, min(stop, at + length) - at
        at += length
        if low >= high:
            continue
        if not by_rows:
            both = _as_floats([_read_piece(job, slab, checkpoint, source, low, high, codes) for source in pair])
            pieces.append(torch.cat(both, -1) if job.map.weave == "beside" else torch.stack(both, -1).flatten(-2))
            continue
        ranges = [((low + 1 - side) // 2, (high + 1 - side) // 2) for side in (0, 1)]
        found = [_read_piece(job, slab, checkpoint, s, a, b, codes) for s, (a, b) in zip(pair, ranges, strict=True) if a < b]
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


def _read_piece(job: Job, slab: Slab, checkpoint: Checkpoint, source: SourceRows, low: int, high: int, codes: bool) -> Any:
    import torch

    if not (source.module or source.leaf):
        return torch.zeros(high - low, job.map.shape[-1])
    first, last, local = _source_range(source, low, high)
    value = _read_module(slab, checkpoint, source, first, last, job, codes)
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


def _read_columns(module: Module, checkpoint: Checkpoint, leaf: str, rows: tuple[int, int], first: int, last: int) -> Tensor:
    """Columns ``first:last`` of rows ``rows`` of a weight as rows, in floats; those rows are read whole."""
    import torch

    from qformats import registry
    from qformats.formats.dense import read_float

    if checkpoint.is_quantized(module.name):
        whole = registry.format_module(module.match.format).read(module, *rows).dequantize(torch.float32)
    else:
        whole = read_float(module.parts[leaf], *rows)
    columns: Tensor = whole.t()[first:last].contiguous()
    return columns


def _read_module(slab: Slab, checkpoint: Checkpoint, source: SourceRows, first: int, last: int, job: Job, codes: bool) -> Any:
    import torch

    from qformats import registry
    from qformats.formats.dense import read_float

    module = slab.module(source.module)
    if source.transposed is not None:
        return _read_columns(module, checkpoint, source.leaf, source.transposed, first, last)
    if source.leaf == "weight" and checkpoint.is_quantized(source.module):
        tensor = registry.format_module(module.match.format).read(module, first, last, codes=codes)
        order = job.orders.get(source.module)
        if order is not None:
            tensor, _ = rewrite.absorb_group_index(tensor, torch.from_numpy(order))
        return tensor
    raw = module.parts[source.leaf]
    if source.columns != (0, 1):
        start, step = source.columns
        return read_float(raw, first, last)[:, start::step]
    width = job.map.shape[-1] if len(job.map.shape) > 1 else 1
    if min(len(raw.shape), len(job.map.shape)) <= 1:  # a vector on either side: its rows are the target's
        return read_float(raw).reshape(-1, width)[first:last]
    return read_float(raw, first, last)
