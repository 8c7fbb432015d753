"""Types by budget: the smallest whose measured error stays under a bound, or the best mix under a file size.

A tensor's error is what a report prints: rms(w - w') / rms(w) over its weights, measured by making the codes. ``under_error`` first
measures a few rows, to leave out what is far too coarse, then whole tensors, so its bound holds for the file that is written.
``Frontiers`` measures a few rows of every tensor in every type; ``within`` then minimises the sum over all tensors of weights times
squared relative error: along the lower convex hull of each tensor's (bytes, error) points, the steps that gain most a byte come first.

Types that need an importance matrix take part where the tensor has importances.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

from converters.importances import with_importances
from converters.jobs import Job
from converters.mixing import Mix, is_named
from converters.options import FLOAT_WORDS
from converters.rounding import new_codes
from converters.sources import Slab, read_rows, row_step, slabs
from qformats import registry
from qformats.architectures.mapping import TensorMap
from qformats.containers.ggml_types import tensor_nbytes
from qformats.errors import Unsupported, WouldLose
from qformats.formats.ggml import mixes
from qformats.reencode import finish, fit

if TYPE_CHECKING:
    from torch import Tensor

    from converters.choose import Chooser

__all__ = ["Frontiers", "Point", "takes_part", "under_error"]

MATRICES = ("linear", "experts", "embedding", "output")
_SAMPLES = 8  # runs of rows that stand for a tensor …
_SAMPLE_WEIGHTS = 1 << 14  # … and the weights of one
_SLACK = 1.25  # how far a sample may lie above the bound before its type is left out
T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Point:
    """One tensor in one type: bytes, relative squared error, the type's name."""

    nbytes: int
    error: float
    type: str


def takes_part(chooser: Chooser, tensor: TensorMap) -> bool:
    """Whether a tensor's type is chosen by budget: a matrix of weights of which nothing else was said."""
    matrix = tensor.kind in MATRICES and len(tensor.shape) > 1 and tensor.leaf == "weight"
    return matrix and tensor.name not in chooser.mix.types and not is_named(tensor.name, chooser.options)


def under_error(chooser: Chooser, tensors: Sequence[TensorMap], limit: float) -> dict[str, str]:
    """Target tensor name → the smallest type whose measured relative error is at most ``limit``."""
    return dict(_each(tensors, lambda tensor: _smallest(chooser, tensor, limit)))


@dataclass(frozen=True)
class Frontiers:
    """Each tensor's points that no mixture of two others beats, smallest first, and its number of weights."""

    hulls: Mapping[str, Sequence[Point]]
    weights: Mapping[str, int]

    @classmethod
    def of(cls, chooser: Chooser, tensors: Sequence[TensorMap]) -> Frontiers:
        """Measure a few rows of every tensor in every type."""
        hulls = dict(_each(tensors, lambda tensor: _hull(_points(chooser, tensor))))
        return cls(hulls, {tensor.name: prod(tensor.shape) for tensor in tensors})

    def within(self, nbytes: int) -> dict[str, Point]:
        """The point of every tensor, together at most ``nbytes``, with the least error; ``WouldLose('target-size')`` if there is none."""
        at = dict.fromkeys(self.hulls, 0)
        used = sum(hull[0].nbytes for hull in self.hulls.values())
        if used > nbytes:
            message = f"the tensors take {used} bytes in their smallest types, {max(0, nbytes)} are left for them"
            raise WouldLose("target-size", message, hint="ask for a larger size, or give --imatrix, which opens smaller types")
        steps = [step for name in self.hulls for step in self._step(name, 0)]
        heapq.heapify(steps)
        while steps:
            _, name = heapq.heappop(steps)
            more = self.hulls[name][at[name] + 1].nbytes - self.hulls[name][at[name]].nbytes
            if used + more <= nbytes:
                used, at[name] = used + more, at[name] + 1
                for step in self._step(name, at[name]):
                    heapq.heappush(steps, step)
        return {name: self.hulls[name][place] for name, place in at.items()}

    def _step(self, name: str, here: int) -> list[tuple[float, str]]:
        """(minus the error saved a byte, tensor) of the next step, if there is one."""
        hull = self.hulls[name]
        return [(-self.weights[name] * _slope(hull[here], hull[here + 1]), name)] if here + 1 < len(hull) else []


def _each(tensors: Sequence[TensorMap], work: Callable[[TensorMap], T]) -> Iterator[tuple[str, T]]:
    """``work`` of every tensor, by several threads, in order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            started = [(tensor.name, pool.submit(work, tensor)) for tensor in tensors]
            yield from [(name, future.result()) for name, future in started]
    finally:
        torch.set_num_threads(threads)


def nbytes_of(job: Job) -> int:
    """Bytes of a job's parts in a GGUF."""
    return sum(tensor_nbytes(info.dtype, info.shape) for info in job.parts.values())


def _candidates(chooser: Chooser, tensor: TensorMap) -> list[Job]:
    """The tensor in every type it can have, smallest first; of jobs that come out in the same type the first."""
    found: dict[str, Job] = {}
    for kind in registry.row(chooser.options.target.format).types:
        try:
            job = replace(chooser, mix=Mix(types={tensor.name: kind})).decide(tensor)
            (job,), _ = with_importances([job], chooser.options, chooser.checkpoint)
        except Unsupported:
            continue  # no quantizer, or an importance matrix that the tensor lacks
        if job.action == "quantize" and job.importance is None and _is_blind(kind):
            continue
        if job.type.lower() == kind or job.type in FLOAT_WORDS.values():
            found.setdefault(job.type, job)
    return sorted(found.values(), key=lambda job: (nbytes_of(job), job.type))


def _is_blind(kind: str) -> bool:
    """Whether llama.cpp makes no such file without an importance matrix."""
    found = mixes.file_type(kind)
    return found is not None and mixes.requires_imatrix("blk.0.ffn_up.weight", kind, found)


def _smallest(chooser: Chooser, tensor: TensorMap, limit: float) -> str:
    jobs = _candidates(chooser, tensor)
    for job in jobs:
        try:
            coarse = measured(chooser, job, sample=True) > (_SLACK * limit) ** 2
            if not coarse and measured(chooser, job) <= limit**2:
                return job.type.lower()
        except WouldLose:
            continue  # a number that the type cannot hold
    return jobs[-1].type.lower()


def _points(chooser: Chooser, tensor: TensorMap) -> list[Point]:
    points = []
    for job in _candidates(chooser, tensor):
        try:
            points.append(Point(nbytes_of(job), measured(chooser, job, sample=True), job.type.lower()))
        except WouldLose:
            continue
    return points


def _hull(points: Sequence[Point]) -> list[Point]:
    """The points that no mixture of two others beats, by bytes; errors fall along it.

    >>> [p.type for p in _hull([Point(1, 9.0, "a"), Point(2, 8.0, "b"), Point(3, 1.0, "c"), Point(4, 2.0, "d")])]
    ['a', 'c']
    """
    hull: list[Point] = []
    for point in sorted(points):
        if hull and (point.error >= hull[-1].error or point.nbytes == hull[-1].nbytes):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    return (a.error - b.error) / (b.nbytes - a.nbytes)


def measured(chooser: Chooser, job: Job, *, sample: bool = False) -> float:
    """The relative squared error of a job: over all rows, or over a few runs of rows spread over the tensor."""
    import torch

    if job.lossless:
        return 0.0
    error = total = 0.0
    slab = Slab(chooser.checkpoint, ahead=not sample)
    for start, stop in _runs(job) if sample else slabs(job, chooser.checkpoint):
        for before, after in _both(job, read_rows(job, slab, chooser.checkpoint, start, stop), start, stop):
            before = before.to(torch.float64)
            error += float(((before - after.to(torch.float64)) ** 2).sum())
            total += float((before**2).sum())
    return error / total if total else 0.0


def _runs(job: Job) -> list[tuple[int, int]]:
    """A few runs of rows, spread evenly, that start where the row order lets them."""
    rows, step = job.map.rows, row_step(job, _SAMPLE_WEIGHTS)
    count = -(-rows // step)
    places = sorted({index * (count - 1) // max(1, _SAMPLES - 1) for index in range(_SAMPLES)})
    return [(place * step, min(rows, (place + 1) * step)) for place in places]


def _both(job: Job, value: Any, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights before and after."""
    import torch

    if job.action == "quantize":
        for _, run, made in new_codes(job, value, start, stop):
            yield run, made.dequantize(torch.float32)
        return
    if job.action == "codes":
        assert job.storage is not None
        decision = fit(value, job.storage, rounding=job.rounding)
        before = value.dequantize(torch.float64)
        yield before, finish(value, decision).dequantize(torch.float64)
        return
    plain = value if isinstance(value, torch.Tensor) else value.dequantize(torch.float64)
    values = job.map.alter(plain.to(torch.float64))
    yield values, values.to({"F16": torch.float16, "BF16": torch.bfloat16}.get(job.dtype or "", torch.float32))
