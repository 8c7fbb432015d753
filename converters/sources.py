"""Reading the rows of a job's tensor: in which steps, through what memory, act-order absorbed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any

from converters.jobs import Job
from qformats import assemble, rewrite
from qformats.checkpoint import Checkpoint
from qformats.containers.raw import ReadAhead
from qformats.formats.protocol import Module

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["SCAN_WEIGHTS", "Slab", "first_rows", "in_source_order", "read_ahead", "read_rows", "slabs", "tasks"]

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


class _Rows:
    """The modules of a job's sources for ``assemble.read_rows``: read through a slab, act-order absorbed where the plan says so."""

    def __init__(self, job: Job, slab: Slab, checkpoint: Checkpoint) -> None:
        self._job, self._slab, self._checkpoint = job, slab, checkpoint

    def codes(self, module: str, start: int, stop: int, *, codes: bool = True) -> QuantizedTensor | None:
        if not self._checkpoint.is_quantized(module):
            return None
        import torch

        from qformats import registry

        found = self._slab.module(module)
        tensor: QuantizedTensor = registry.format_module(found.match.format).read(found, start, stop, codes=codes)
        order = self._job.orders.get(module)
        return tensor if order is None else rewrite.absorb_group_index(tensor, torch.from_numpy(order))[0]

    def floats(self, module: str, leaf: str, start: int | None, stop: int | None) -> Tensor:
        from qformats.formats.dense import read_float

        raw = self._slab.module(module).parts[leaf]
        return read_float(raw) if start is None else read_float(raw, start, stop)

    def shape(self, module: str, leaf: str) -> tuple[int, ...]:
        return self._slab.module(module).parts[leaf].shape


def read_rows(
    job: Job, slab: Slab, checkpoint: Checkpoint, start: int, stop: int, *, codes: bool = True
) -> QuantizedTensor | Tensor:
    """``assemble.read_rows`` of the job's tensor; pieces of codes are joined where the job keeps codes."""
    return assemble.read_rows(job.map, _Rows(job, slab, checkpoint), start, stop, joined=job.action == "codes", codes=codes)
