"""A planned output that is read as a checkpoint and never written: its files make their bytes when they are asked for.

Whoever reads one gets the very bytes that ``execute`` would write, weight by weight, so that a model can be filled with them. A weight's
planes are made together when the first of them is read, and dropped when the thread that read its codes reads others.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from converters import digests
from converters.execute import make_parts, worker_count
from converters.jobs import Job
from converters.outputs import Output
from converters.plan import Plan
from qformats.checkpoint import Checkpoint, Unwritten, open_unwritten
from qformats.containers.layout import Layout
from qformats.containers.source import ByteSource
from qformats.errors import BadFile

__all__ = ["PlannedSource", "checkpoint_of"]

_SMALL_NBYTES = 256


def checkpoint_of(plan: Plan, name: str) -> Checkpoint:
    """The output of ``plan`` as an opened checkpoint; a GGUF bears the ``name``. The source must stay open as long as weights are read."""
    source = digests.of_source(plan.checkpoint, worker_count(None))
    output = digests.with_digests(plan.output, digests.Digests(source))
    maker = _Maker(plan)
    files = {file: PlannedSource(file or name, layout) for file, layout in output.layouts.items()}
    made = open_unwritten(plan.checkpoint.path, dict(files), Unwritten(output.small, _Seal(output, source).headers))
    for file in files.values():
        file.start(maker)
    with ThreadPoolExecutor(worker_count(None)) as pool:  # formats that keep what they are in small tensors have to make them
        list(pool.map(made.scheme, filter(made.is_quantized, made.modules)))
    return made


@dataclass(frozen=True)
class _Seal:
    """What gives the headers of written files their digests; see ``converters.digests``."""

    output: Output
    source: str

    def headers(self, files: Mapping[str, ByteSource]) -> dict[str, bytes]:
        """The final header of every file of ``files``."""
        found = digests.Digests(self.source, digests.of_written(self.output, files, worker_count(None)))
        before, after = digests.Digests(self.source).digits, found.digits
        return {name: layout.header.replace(before, after) for name, layout in self.output.layouts.items()}


# ---------------------------------------------------------------- making parts


@dataclass(eq=False)
class _Made:
    """The parts of one job while they are held; ``codes`` is the name of the largest."""

    job: Job
    codes: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    parts: dict[str, bytearray] = field(default_factory=dict)


class _Maker:
    """Makes the parts of a plan's jobs, and holds them until a thread has read the codes among them and goes on to others.

    What was made for a look at its small parts is so made once, and small parts stay for later looks; all that is held and all that the
    rest has become is together never more than the output.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._mine = plan, threading.local()
        self._of: dict[str, _Made] = {}
        for job in plan.jobs:
            names = [job.part_name(leaf) for leaf in job.parts]
            self._of.update(dict.fromkeys(names, _Made(job, max(names, key=lambda name: plan.output.parts[name].nbytes))))

    def read(self, name: str, start: int, buffer: memoryview) -> None:
        """Bytes of the part ``name`` from ``start`` on."""
        made = self._of[name]
        if name == made.codes:
            last: _Made | None = getattr(self._mine, "last", None)
            if last is not None and last is not made:
                with last.lock:
                    last.parts = {key: part for key, part in last.parts.items() if len(part) <= _SMALL_NBYTES}
            self._mine.last = made
        with made.lock:
            if name not in made.parts:
                made.parts = make_parts(self._plan, made.job)
            buffer[:] = memoryview(made.parts[name])[start : start + len(buffer)]


class PlannedSource:
    """A file that does not exist: its header is planned, its tensors are made when they are read, what lies between them is zeros.

    Thread-safe. Tensors are zeros too until ``start``: opening a file looks at its header, and may read more than that.
    """

    def __init__(self, name: str, layout: Layout) -> None:
        self.name, self.size, self._header = name, layout.size, layout.header
        parts = sorted((offset, stored) for stored, offset in layout.offsets.items() if layout.nbytes[stored])
        self._offsets, self._names = [offset for offset, _ in parts], [stored for _, stored in parts]
        self._nbytes = [layout.nbytes[stored] for stored in self._names]
        self._maker: _Maker | None = None
        self._is_open = True

    def start(self, maker: _Maker) -> None:
        """Make tensors from now on."""
        self._maker = maker

    def pread(self, offset: int, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        end = offset + len(view)
        if not self._is_open:
            raise BadFile("closed", "was closed: its weights cannot be made again", path=self.name, offset_bytes=offset)
        if offset < 0 or end > self.size:
            raise BadFile("truncated", f"{len(view)} bytes are asked for, the file has {self.size}", path=self.name, offset_bytes=offset)
        head = self._header[offset:end]
        view[: len(head)] = head
        done = offset + len(head)
        for number in range(max(0, bisect_right(self._offsets, done) - 1), bisect_left(self._offsets, end) if self._maker else 0):
            begin = self._offsets[number]
            first, last = max(done, begin), min(end, begin + self._nbytes[number])
            if first < last:
                view[done - offset : first - offset] = bytes(first - done)
                self._make(number, first - begin, view[first - offset : last - offset])
                done = last
        view[done - offset :] = bytes(end - done)

    def _make(self, number: int, start: int, buffer: memoryview) -> None:
        assert self._maker is not None
        self._maker.read(self._names[number], start, buffer)

    def identity(self) -> str:
        return f"planned:{id(self)}"

    def changed(self) -> bool:
        return False

    def close(self) -> None:
        """Forget the plan."""
        self._maker, self._is_open = None, False

    def __repr__(self) -> str:
        return f"PlannedSource({Path(self.name).name!r}, {self.size} bytes)"
