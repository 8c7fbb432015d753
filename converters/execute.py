"""Carrying out a plan: row ranges through the rewrites into their planned places, by any number of workers, and nothing half-written.

The same work serves two sinks: one writes, one compares (``converters.verify``). Bytes depend on the plan only, never on the number
of workers or the order in which they finish.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converters import digests
from converters.jobs import Job
from converters.journal import Journal, Sums, is_worth_it, keeps, may_resume
from converters.kept_planes import earlier_rows
from converters.outputs import OutputPart
from converters.plan import Plan
from converters.rounding import new_codes
from converters.sources import Slab, in_source_order, read_rows, tasks
from qformats import registry
from qformats.containers.atomic import OutputDirectory, OutputFile, check_not_same
from qformats.containers.source import FileSource, check_remote, is_remote
from qformats.errors import BadFile, QFormatError, UsageError, WouldLose
from qformats.formats.protocol import Piece
from qformats.reencode import Hint, finish, fit
from qformats.rewrite import Refused
from qformats.scheme import Integer

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["Outcome", "Progress", "Sink", "execute", "make_parts", "run_jobs", "worker_count"]

_COPY_NBYTES = 8 << 20
_FLUSH_NBYTES = 128 << 20
Progress = Callable[[int, int], None]


@dataclass
class Outcome:
    """``errors``: relative RMS error of each tensor with new codes or rounded floats; sizes in bytes, time in seconds."""

    errors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    nbytes_read: int = 0
    nbytes_written: int = 0


class Sink(Protocol):
    """Where the bytes of a part go; called from several threads, never twice for the same byte."""

    def put(self, part: OutputPart, offset: int, data: memoryview) -> None: ...


def execute(
    plan: Plan,
    destination: str | Path,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> Outcome:
    """Write the planned output; it appears under its final name only when every byte is on disk.

    What takes long keeps a journal (``converters.journal``); with ``resume`` the tensors that it names are not made again.
    Raises ``OutputError`` for the destination, ``BadFile`` if the source changes or breaks meanwhile.
    """
    if not plan.scanned:
        raise UsageError("plan-depth", "a header plan cannot be carried out", hint="plan again without --header")
    final = Path(destination)
    check_not_same([plan.checkpoint.path, *plan.checkpoint.sources()], final)
    started = time.perf_counter()
    with_journal = resume or is_worth_it(plan)
    again = resume and may_resume(plan, final)
    if plan.output.directory:
        with OutputDirectory(final, plan.output.nbytes, overwrite, again) as directory:
            files = {name: directory.file(name, layout.size) for name, layout in plan.output.layouts.items()}
            journal = _journal(plan, final, files, again) if with_journal else None
            with _kept(directory, journal):
                outcome = _write(plan, files, workers, progress, journal)
                for name, data in plan.output.small.items():
                    folder, _, last = name.rpartition("/")
                    directory.write_bytes(last, data, folder=folder)
                directory.commit()
    else:
        with OutputFile(final, plan.output.nbytes, overwrite, again) as out:
            journal = _journal(plan, final, {"": out}, again) if with_journal else None
            with _kept(out, journal):
                outcome = _write(plan, {"": out}, workers, progress, journal)
                out.commit()
    outcome.seconds = time.perf_counter() - started
    outcome.nbytes_written = plan.output.nbytes
    return outcome


def _journal(plan: Plan, final: Path, files: Mapping[str, OutputFile], again: bool) -> Journal:
    return Journal(plan, final, {name: file.partial for name, file in files.items()}, again)


@contextmanager
def _kept(out: OutputFile | OutputDirectory, journal: Journal | None) -> Iterator[None]:
    """Leave the partial output and its journal behind where the same command may go on with them."""
    try:
        yield
    except BaseException as error:
        if journal is not None:
            if keeps(error):
                out.keep()
            journal.close(error)
        raise
    if journal is not None:
        journal.close()


class _Writer:
    """Writes runs of bytes, and sends what is written to the disk meanwhile, so that little is left to wait for at the end."""

    def __init__(self, files: dict[str, OutputFile]) -> None:
        self._files = files
        self._lock, self._flusher = threading.Lock(), ThreadPoolExecutor(1, thread_name_prefix="qconvert-flush")
        self._unsent = 0
        self._sending: Future[None] | None = None

    def put(self, part: OutputPart, offset: int, data: memoryview) -> None:
        """Write one run of bytes."""
        file = self._files[part.file]
        file.pwrite(part.offset + offset, data)
        with self._lock:
            self._unsent += len(data)
            if self._unsent < _FLUSH_NBYTES or not (self._sending is None or self._sending.done()):
                return
            if self._sending is not None:
                self._sending.result()  # raises what the last flush met
            self._unsent, self._sending = 0, self._flusher.submit(file.flush)

    def finish(self, plan: Plan, workers: int) -> None:
        """Hash both sides while the rest goes to the disk, and write the headers, which hold the digests."""
        sent = [self._flusher.submit(file.flush) for file in self._files.values()]
        source = digests.of_source(plan.checkpoint, workers)
        check_remote(plan.checkpoint.sources())
        for read in plan.checkpoint.sources():
            if read.changed():
                raise BadFile("changed", "was written to while it was converted", path=read.name, hint="convert again")
        output = digests.with_digests(plan.output, digests.Digests(source))
        partials = {name: FileSource(file.partial) for name, file in self._files.items()}
        try:
            found = digests.Digests(source, digests.of_written(output, partials, workers))
        finally:
            for partial in partials.values():
                partial.close()
        for name, layout in digests.with_digests(plan.output, found).layouts.items():
            self._files[name].pwrite(0, layout.header)
        for future in sent:
            future.result()

    def close(self) -> None:
        """Wait for the flushes under way; files may then be closed."""
        self._flusher.shutdown(cancel_futures=True)


def _write(
    plan: Plan, files: dict[str, OutputFile], workers: int | None, progress: Progress | None, journal: Journal | None
) -> Outcome:
    count, writer = worker_count(workers), _Writer(files)
    try:
        outcome = run_jobs(plan, writer, count, progress, journal)
        writer.finish(plan, count)
    finally:
        writer.close()
    return outcome


def worker_count(workers: int | None) -> int:
    """The number asked for, else one a core, up to eight."""
    return workers or min(8, os.cpu_count() or 1)


# ---------------------------------------------------------------- the work


def run_jobs(
    plan: Plan, sink: Sink, workers: int | None = None, progress: Progress | None = None, journal: Journal | None = None
) -> Outcome:
    """Produce every part of every job into ``sink``, but for those that the ``journal`` has as finished."""
    import torch

    count = worker_count(workers)
    total = sum(p.nbytes for p in plan.output.parts.values())
    outcome, errors = Outcome(), _Errors()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, thread_name_prefix="qconvert") as pool:
            _Drive(pool, count, plan, sink, errors, progress, total, journal).run()
    finally:
        torch.set_num_threads(threads)
    outcome.errors = errors.relative()
    outcome.nbytes_read = sum(raw.nbytes for raw in plan.checkpoint.raw.values())
    return outcome


def make_parts(plan: Plan, job: Job) -> dict[str, bytearray]:
    """The parts of one job by their stored names, made here and now; what rounding costs is not measured."""
    sink = _Memory({job.part_name(leaf): bytearray(plan.output.parts[job.part_name(leaf)].nbytes) for leaf in job.parts}, plan)
    for task in _tasks(plan, job):
        _run_task(plan, task, sink, None)
    return sink.made


class _Memory:
    """Keeps the parts that it is told of."""

    def __init__(self, made: dict[str, bytearray], plan: Plan) -> None:
        self.made = made
        self._names = {id(plan.output.parts[name]): name for name in made}

    def put(self, part: OutputPart, offset: int, data: memoryview) -> None:
        self.made[self._names[id(part)]][offset : offset + len(data)] = data


@dataclass
class _Drive:
    """Keeps at most twice as many tasks in flight as there are workers; stops at the first error."""

    pool: ThreadPoolExecutor
    count: int
    plan: Plan
    sink: Sink
    errors: _Errors
    progress: Progress | None
    total: int
    journal: Journal | None
    pending: dict[Future[int], Job] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    done: int = 0

    def run(self) -> None:
        """Every task of every job."""
        finished = {} if self.journal is None else self.journal.done
        for name, sums in finished.items():
            self.errors.put(name, sums)
        self.done = 0 if self.journal is None else self.journal.nbytes()
        try:
            for job in (job for job in _queue(self.plan, self.count) if job.name not in finished):
                tasks = _tasks(self.plan, job)
                self.left[job.name] = len(tasks)
                for task in tasks:
                    self.pending[self.pool.submit(_run_task, self.plan, task, self.sink, self.errors)] = job
                    if len(self.pending) >= 2 * self.count:
                        self._collect()
            while self.pending:
                self._collect()
        except BaseException:
            for future in self.pending:
                future.cancel()
            wait(self.pending)
            raise

    def _collect(self) -> None:
        finished, _ = wait(self.pending, return_when="FIRST_COMPLETED")
        for future in finished:
            job = self.pending.pop(future)
            self.done += future.result()
            self.left[job.name] -= 1
            if self.left[job.name] == 0 and self.journal is not None:
                self.journal.finish(job, self.errors.of(job.name))
        if self.progress is not None:
            self.progress(self.done, self.total)


def _queue(plan: Plan, count: int) -> Sequence[Job]:
    """The big tensors first, so that no worker is left alone with one; what comes over a network in the order it lies there."""
    sources = plan.checkpoint.sources()
    if not any(is_remote(source) for source in sources):
        return sorted(plan.jobs, key=lambda j: -j.weights) if count > 1 else plan.jobs
    number = {id(source): at for at, source in enumerate(sources)}

    def place(job: Job) -> tuple[int, int]:
        modules = [plan.checkpoint.modules[s.module] for s in job.map.sources if s.module]
        parts = [raw for module in modules for raw in module.parts.values()]
        return min(((number.get(id(raw.source), 0), raw.offset) for raw in parts), default=(0, 0))

    return sorted(plan.jobs, key=place)


@dataclass(frozen=True)
class _Task:
    """Row ranges of one tensor for one worker. ``rows``: the target row of each row where they do not follow one another."""

    job: Job
    ranges: list[tuple[int, int]]
    rows: np.ndarray[Any, Any] | None = None


def _tasks(plan: Plan, job: Job) -> list[_Task]:
    if job.action == "parts" or job.map.constant is not None:
        return [_Task(job, [])]
    rows = None
    if job.earlier is None and (job.action in ("copy", "float") or registry.row(plan.options.target.format).container == "gguf"):
        job, rows = in_source_order(job)
    return [_Task(job, ranges, rows) for ranges in tasks(job, plan.checkpoint)]


def _run_task(plan: Plan, task: _Task, sink: Sink, errors: _Errors | None) -> int:
    """Some row ranges of one tensor; returns the bytes produced. ``errors`` is None where nobody asks for them."""
    job = task.job
    try:
        if job.action == "parts":
            return _copy_parts(plan, job, sink)
        nbytes = 0
        for leaf, data in job.content.items() if task.ranges and task.ranges[0][0] == 0 else ():
            nbytes += len(data)
            sink.put(plan.output.parts[job.part_name(leaf)], 0, memoryview(data))
        for piece in _pieces(plan, task, errors):
            if piece.leaf in job.content:
                continue
            part = plan.output.parts[job.part_name(piece.leaf)]
            nbytes += _put(part, piece, sink) if task.rows is None else _put_rows(part, piece, task.rows, sink)
        return nbytes
    except Refused as refusal:
        raise WouldLose("plan-changed", f"no longer fits the plan: {refusal}", tensor=job.name, hint="plan again") from None
    except QFormatError as error:
        error.locate(tensor=job.name)
        raise


def _copy_parts(plan: Plan, job: Job, sink: Sink) -> int:
    """Stored planes byte by byte."""
    if job.content:
        for leaf, data in job.content.items():
            sink.put(plan.output.parts[job.part_name(leaf)], 0, memoryview(data))
        return sum(map(len, job.content.values()))
    module, total = plan.checkpoint.modules[job.map.sources[0].module], 0
    for leaf in job.parts:
        raw, part = module.parts[leaf], plan.output.parts[job.part_name(leaf)]
        for at in range(0, raw.nbytes, _COPY_NBYTES):
            buffer = memoryview(bytearray(min(_COPY_NBYTES, raw.nbytes - at)))
            raw.source.pread_into(raw.offset + at, buffer)
            sink.put(part, at, buffer)
        total += raw.nbytes
    return total


def _pieces(plan: Plan, task: _Task, errors: _Errors | None) -> Iterator[Piece]:
    job = task.job
    if job.map.constant is not None:
        yield Piece(job.map.leaf, _float_bytes(_constant(job), job))
        return
    slab = Slab(plan.checkpoint)
    for start, stop in task.ranges:
        value = read_rows(job, slab, plan.checkpoint, start, stop)
        if job.action in ("copy", "float"):
            yield _float_piece(job, value, start, errors)
        else:
            yield from _code_pieces(plan, task, value, start, stop, errors)


def _constant(job: Job) -> Tensor:
    import torch

    return torch.from_numpy(job.map.constant).reshape(-1, 1)


def _put(part: OutputPart, piece: Piece, sink: Sink) -> int:
    """Hand a rectangle over as runs of bytes."""
    import numpy as np

    array = np.ascontiguousarray(piece.array)
    width = array.dtype.itemsize * (array.shape[1] if array.ndim > 1 else 1)
    flat = array.reshape(-1).view("u1").data
    row_nbytes = part.row_nbytes if array.ndim > 1 and len(part.info.shape) > 1 else width
    if width == row_nbytes:
        sink.put(part, piece.row * row_nbytes, flat)
        return len(flat)
    first = piece.row * row_nbytes + piece.column * array.dtype.itemsize
    for row in range(array.shape[0]):
        sink.put(part, first + row * row_nbytes, flat[row * width : (row + 1) * width])
    return len(flat)


def _put_rows(part: OutputPart, piece: Piece, rows: np.ndarray[Any, Any], sink: Sink) -> int:
    """Hand whole rows over, each to its place: rows that become neighbours as one run."""
    import numpy as np

    wanted = rows[piece.row : piece.row + len(piece.array)]
    order = np.argsort(wanted)
    array = np.ascontiguousarray(piece.array[order])
    flat, width = array.reshape(-1).view("u1").data, part.row_nbytes
    ends = [*(np.flatnonzero(np.diff(wanted[order]) != 1) + 1).tolist(), len(wanted)]
    for first, last in zip([0, *ends], ends, strict=False):
        sink.put(part, int(wanted[order[first]]) * width, flat[first * width : last * width])
    return len(flat)


# ---------------------------------------------------------------- floats


def _float_piece(job: Job, value: Any, start: int, errors: _Errors | None) -> Piece:
    import torch

    values = _as_float(job, value)
    array = _float_bytes(values, job)
    if errors is not None and isinstance(value, torch.Tensor) and not job.lossless and job.action == "float":
        errors.add(job, start, values, array)
    return Piece(job.map.leaf, array, start)


def _as_float(job: Job, value: Any) -> Tensor:
    """The exact values as float64 when codes are dequantized or a constant is added, else the tensor as it is."""
    import torch

    if not isinstance(value, torch.Tensor):
        plain = job.dtype == "F32" and isinstance(value.grid, Integer)
        exact = torch.float32 if plain else torch.float64  # the writer rounds float64 once, and sees an overflow
        return value.dequantize(exact)  # type: ignore[no-any-return]
    return job.map.alter(value.to(torch.float32)) if job.map.altered else value  # type: ignore[no-any-return]


def _float_bytes(values: Tensor, job: Job) -> np.ndarray[Any, Any]:
    from qformats.formats.dense import write_float

    array = write_float(values, job.dtype or "F32", name=job.name)
    return array.reshape(len(array), -1)


# ---------------------------------------------------------------- codes


def _code_pieces(plan: Plan, task: _Task, value: Any, start: int, stop: int, errors: _Errors | None) -> Iterator[Piece]:
    job = task.job
    form = registry.format_module(job.format)
    assert job.storage is not None
    if job.action == "quantize":
        yield from _new_codes(task, value, start, stop, errors)
        return
    if job.earlier is not None:
        tensor = earlier_rows(job, job.earlier, value, start, stop, plan.checkpoint.format)
        if tensor is None:
            raise Refused("it is not what the recorded parameters became")
        yield from form.write(job.storage, tensor, start, job.map.shape)
        return
    decision = fit(value, job.storage, hint=_hint(job, start, stop), rounding=job.rounding, own=partial(form.can_store, job.storage))
    tensor = finish(value, decision, reuse=True)
    if job.map.target in plan.unsorted:
        tensor = _unsort(tensor, *plan.unsorted[job.map.target])
    yield from form.write(job.storage, tensor, start, job.map.shape)


def _new_codes(task: _Task, value: Any, start: int, stop: int, errors: _Errors | None) -> Iterator[Piece]:
    import torch

    job = task.job
    assert job.storage is not None
    form = registry.format_module(job.format)
    for first, run, tensor in new_codes(job, value, start, stop, task.rows):
        pieces = form.write(job.storage, tensor, first, job.map.shape)
        if errors is not None:
            errors.add_tensor(job, first, run, tensor.dequantize(torch.float32) if job.format != "gguf" else _read_back(form, job, pieces))
        yield from pieces


def _read_back(form: Any, job: Job, pieces: Sequence[Piece]) -> Tensor:
    """The float32 values of rows of blocks, by the loops that are made for it."""
    import numpy as np
    import torch

    (blocks,) = (piece.array for piece in pieces)
    out = np.empty((len(blocks), job.map.shape[-1]), np.float32)
    form.dequantize(job.type, blocks, out)
    return torch.from_numpy(out)


def _hint(job: Job, start: int, stop: int) -> Hint | None:
    from converters.claims import hint_rows

    return hint_rows(job.hints.get(job.map.target), start, stop)


def _unsort(t: QuantizedTensor, order: np.ndarray[Any, Any], index: np.ndarray[Any, Any]) -> QuantizedTensor:
    """Give columns their recorded order and group index back: the inverse of absorbing act-order."""
    import numpy as np
    import torch

    inverse = np.empty(len(order), np.int64)
    inverse[order] = np.arange(len(order))
    groups = t.scales[0].values.shape[-1]
    assert isinstance(t.scales[0].values, torch.Tensor)
    size = -(-len(order) // groups)
    place = torch.from_numpy(np.argsort(index[order][::size], kind="stable"))

    def change(param: Any) -> Any:
        return param if param is None or param.values.shape[-1] == 1 else param.with_values(param.values.index_select(-1, place))

    codes = t.codes.index_select(-1, torch.from_numpy(inverse))
    group_index = torch.from_numpy(index.astype(np.int32))
    scales = tuple(change(s) for s in t.scales)
    zero_point, offset = change(t.zero_point), change(t.offset)
    return t.replace(codes=codes, group_index=group_index, scales=scales, zero_point=zero_point, offset=offset)


class _Errors:
    """Sums of squares of what rounding cost, by tensor and row range: added up in one order, whoever came first."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], tuple[float, float]] = {}

    def add(self, job: Job, start: int, before: Tensor, array: np.ndarray[Any, Any]) -> None:
        import torch

        from qformats.formats.dense import FLOAT_DTYPES

        bits = torch.from_numpy(array.view("<i2") if job.dtype == "BF16" else array)
        stored = bits.view(getattr(torch, FLOAT_DTYPES[job.dtype or "F32"]))
        self.add_tensor(job, start, before.to(torch.float64).reshape(stored.shape), stored.to(torch.float64))

    def add_tensor(self, job: Job, start: int, before: Tensor, after: Tensor) -> None:
        """Two tensors (rows, K) in one dtype."""
        import torch

        apart = before - after
        error, size = ((values * values).sum(-1).sum(dtype=torch.float64) for values in (apart, before))  # rows in their own dtype
        self._sums[job.name, start] = float(error), float(size)

    def put(self, name: str, sums: Sums) -> None:
        """The sums of a tensor that an earlier run made."""
        self._sums.update({(name, start): pair for start, pair in sums.items()})

    def of(self, name: str) -> Sums:
        """The sums of one tensor by first row."""
        return {start: pair for (owner, start), pair in list(self._sums.items()) if owner == name}

    def relative(self) -> dict[str, float]:
        totals: dict[str, tuple[float, float]] = {}
        for (name, _), (error, size) in sorted(self._sums.items()):
            before = totals.get(name, (0.0, 0.0))
            totals[name] = before[0] + error, before[1] + size
        return {name: (error / size) ** 0.5 if size else 0.0 for name, (error, size) in totals.items()}


