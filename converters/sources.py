"""Reading the rows of a target tensor out of its source modules: permuted, stacked, padded, act-order absorbed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from converters.jobs import Job
from qformats import rewrite
from qformats.architectures.mapping import SourceRows
from qformats.checkpoint import Checkpoint
from qformats.containers.raw import RawTensor
from qformats.containers.source import MemorySource
from qformats.formats.protocol import Module

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["Slab", "first_rows", "overlaps", "read_rows", "slabs"]

_SLAB_NBYTES = 32 << 20  # parts of a module up to this size are read in one go
_CHUNK_WEIGHTS = 2 << 20  # one step's codes: cache-sized
_PROBE_ROWS = 32
_BIG_CHUNK_WEIGHTS = 8 << 20  # one step of a module too big for one slab


class Slab:
    """Source modules of one job, each either in memory (read once, with ``load``) or streamed from its file."""

    def __init__(self, checkpoint: Checkpoint, job: Job, *, load: bool = True) -> None:
        self._checkpoint = checkpoint
        self._loaded: dict[str, Module] = {}
        for source in job.map.sources:
            if source.module and source.module not in self._loaded:
                module = checkpoint.modules[source.module]
                nbytes = sum(raw.nbytes for raw in module.parts.values())
                self._loaded[source.module] = _in_memory(module) if load and nbytes <= _SLAB_NBYTES else module

    def module(self, name: str) -> Module:
        """The module, in memory where it was small enough."""
        return self._loaded[name]


def _in_memory(module: Module) -> Module:
    parts = {}
    for leaf, raw in module.parts.items():
        buffer = bytearray(raw.nbytes)
        raw.source.pread_into(raw.offset, memoryview(buffer))
        parts[leaf] = RawTensor(raw.name, raw.dtype, raw.shape, MemorySource(buffer, raw.source.name), 0, raw.nbytes, raw.big_endian)
    return replace(module, parts=parts)


def overlaps(job: Job, start: int, stop: int) -> Iterator[tuple[SourceRows, int, int]]:
    """The source pieces under flattened target rows ``start:stop``, with the row range inside each piece."""
    at = 0
    for source in job.map.sources:
        length = source.stop - source.start
        low, high = max(start, at), min(stop, at + length)
        if low < high:
            yield source, low - at, high - at
        at += length


def row_step(job: Job, checkpoint: Checkpoint) -> int:
    """How many rows one step takes: cache-sized, whole periods of the row order, whole words of every packing."""
    columns = job.map.shape[-1] if len(job.map.shape) > 1 else 1
    nbytes = max((_module_nbytes(checkpoint, s.module) for s in job.map.sources if s.module), default=0)
    weights = _CHUNK_WEIGHTS if nbytes <= _SLAB_NBYTES else _BIG_CHUNK_WEIGHTS
    unit = 32
    for source in job.map.sources:
        if source.period == 0:
            return sum(s.stop - s.start for s in job.map.sources)
        unit = max(unit, source.period) if max(unit, source.period) % min(unit, source.period) == 0 else unit * source.period
    return max(unit, weights // max(1, columns) // unit * unit)


def _module_nbytes(checkpoint: Checkpoint, name: str) -> int:
    return sum(raw.nbytes for raw in checkpoint.modules[name].parts.values())


def slabs(job: Job, checkpoint: Checkpoint) -> Iterator[tuple[int, int]]:
    """Row ranges of the job's flattened target, in order."""
    total = sum(s.stop - s.start for s in job.map.sources)
    step = row_step(job, checkpoint)
    for start in range(0, total, step):
        yield start, min(total, start + step)


def first_rows(job: Job) -> int:
    """How many of the target's first rows make a cheap probe: whole periods of the row order."""
    total = sum(s.stop - s.start for s in job.map.sources)
    return min(total, max(_PROBE_ROWS, *(s.period for s in job.map.sources)))


def read_rows(
    job: Job, slab: Slab, checkpoint: Checkpoint, start: int, stop: int, *, codes: bool = True
) -> QuantizedTensor | Tensor:
    """Target rows ``start:stop`` before any rewrite: a canonical tensor when the sources are codes, else floats (n, K).

    Vectors come back as (n, 1). ``codes=False`` reads parameters only, all codes are then 0. ``rewrite.Refused`` if the pieces
    cannot be one tensor.
    """
    import torch

    pieces = [_read_piece(job, slab, checkpoint, source, low, high, codes) for source, low, high in overlaps(job, start, stop)]
    if all(not isinstance(p, torch.Tensor) for p in pieces):
        return rewrite.concatenate_rows(pieces)
    floats = [p if isinstance(p, torch.Tensor) else p.dequantize(torch.float32) for p in pieces]
    return floats[0] if len(floats) == 1 else torch.cat(floats)


def _read_piece(job: Job, slab: Slab, checkpoint: Checkpoint, source: SourceRows, low: int, high: int, codes: bool) -> Any:
    import torch

    if not source.module:
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


def _read_module(slab: Slab, checkpoint: Checkpoint, source: SourceRows, first: int, last: int, job: Job, codes: bool) -> Any:
    import torch

    from qformats import registry
    from qformats.formats.dense import read_float

    module = slab.module(source.module)
    if source.leaf == "weight" and checkpoint.is_quantized(source.module):
        tensor = registry.format_module(module.match.format).read(module, first, last, codes=codes)
        order = job.orders.get(source.module)
        if order is not None:
            tensor, _ = rewrite.absorb_group_index(tensor, torch.from_numpy(order))
        return tensor
    raw = module.parts[source.leaf]
    if len(raw.shape) <= 1:
        return read_float(raw).reshape(-1, 1)[first:last]
    return read_float(raw, first, last)
