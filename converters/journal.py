"""What is finished of a conversion that is not: a journal beside its partial output, so that the same command goes on after a kill.

``.NAME.journal`` holds one JSON object a line: first what is converted into what, then each finished tensor with the digest of its bytes
in the partial output and the sums its error is made of, and the digests of source chunks that need not be read again. A tensor whose
bytes no longer have their digest is made again, and a remote file that was held against its owner's digest need not be again. The
result has the bytes of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.jobs import Job
from converters.outputs import OutputPart
from qformats.containers.source import ByteSource, FileSource, is_remote
from qformats.errors import OutputError, QFormatError, RemoteError, UsageError

if TYPE_CHECKING:
    from converters.plan import Plan

__all__ = ["Journal", "Sums", "is_worth_it", "journal_path", "keeps", "may_resume"]

VERSION = 1
_STEP_NBYTES = 8 << 20
_WRONG_BYTES = ("hub-wrong-hash", "hub-changed")
Sums = Mapping[int, tuple[float, float]]  # by first row: squares of errors, squares of values


def journal_path(final: Path) -> Path:
    """The journal of the output ``final``."""
    return final.with_name(f".{final.name}.journal")


def is_worth_it(plan: Plan) -> bool:
    """Whether a plan takes long for its size: its source comes over a network, or codes are made anew."""
    return any(job.action == "quantize" for job in plan.jobs) or any(is_remote(source) for source in plan.checkpoint.sources())


def keeps(error: BaseException) -> bool:
    """Whether the same command may succeed after this error with what is finished; not if that was made of wrong bytes."""
    if isinstance(error, QFormatError) and error.code in _WRONG_BYTES:
        return False
    return isinstance(error, KeyboardInterrupt | RemoteError) or (isinstance(error, OutputError) and error.code == "no-space")


def _header(plan: Plan) -> dict[str, Any]:
    """What must be the same for a journal to be of use: the sources, and every byte of the output that is known beforehand."""
    digest = hashlib.sha256()
    for name, layout in sorted(plan.output.layouts.items()):
        digest.update(f"{name}\0{layout.size}\0{len(layout.header)}\0".encode() + layout.header)
    for name, data in sorted(plan.output.small.items()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return {"journal": VERSION, "output": digest.hexdigest(), "sources": [_stamp(source) for source in plan.checkpoint.sources()]}


def _stamp(source: ByteSource) -> list[Any]:
    name = source.identity()
    stamp: list[Any] = ["" if name.startswith("memory:") else name, source.size]
    with suppress(OSError, ValueError):
        stamp.append(os.stat(source.name).st_mtime_ns)
    return stamp


def may_resume(plan: Plan, final: Path) -> bool:
    """Whether there is a journal of this very conversion; ``UsageError('journal-changed')`` if it is one of another."""
    lines = _lines(journal_path(final))
    first = next(lines, None)
    if first is None:
        return False
    if first != _header(plan):
        hint = "leave --resume out to begin anew"
        raise UsageError("journal-changed", "the source, the options or the version changed since it was begun", path=final, hint=hint)
    return True


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal; the last one may have been cut."""
    try:
        data = path.read_bytes()
    except OSError:
        return
    for line in data.split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if not isinstance(entry, dict):
            return
        yield entry


class Journal:
    """The journal of ``plan`` into ``files`` (partial paths by file name of the output), read if ``resume``, else begun.

    ``done``: finished tensors by name, with their sums.
    """

    def __init__(self, plan: Plan, final: Path, files: Mapping[str, Path], resume: bool) -> None:
        self.path, self._plan = journal_path(final), plan
        self._files = {name: FileSource(path) for name, path in files.items()}
        self._sources = plan.checkpoint.sources()
        self._known: list[set[int]] = [set() for _ in self._sources]
        self._checked: set[int] = set()
        self.done: dict[str, Sums] = {}
        entries = list(_lines(self.path))[1:] if resume else []
        try:
            self._out = open(self.path, "wb")  # noqa: SIM115
        except OSError as error:
            raise OutputError("unwritable", f"cannot be written: {error.strerror}", path=self.path) from None
        self._write(_header(plan))
        jobs = {job.name: job for job in plan.jobs}
        for entry in entries:
            self._take(entry, jobs)

    def _take(self, entry: dict[str, Any], jobs: Mapping[str, Job]) -> None:
        """One line of an earlier run, if what it says is still so."""
        with suppress(KeyError, TypeError, ValueError, IndexError):
            if "checked" in entry:
                source = self._sources[int(entry["checked"])]
                if is_remote(source):
                    source.checked = True
            elif "chunks" in entry:
                for at, chunks in entry["chunks"].items():
                    digests: dict[int, bytes] = getattr(self._sources[int(at)], "digests", {})
                    digests.update({int(number): bytes.fromhex(text) for number, text in chunks.items()})
            else:
                job = jobs[entry["tensor"]]
                sums = {int(start): (float(error), float(size)) for start, error, size in entry["sums"]}
                if entry["xxh3"] == self._digest(job):
                    self.finish(job, sums)

    def finish(self, job: Job, sums: Sums) -> None:
        """Write down that every byte of ``job`` is in its place."""
        self.done[job.name] = sums
        chunks = {}
        for at, (source, known) in enumerate(zip(self._sources, self._known, strict=True)):
            fresh = {number: digest.hex() for number, digest in list(getattr(source, "digests", {}).items()) if number not in known}
            known.update(fresh)
            if fresh:
                chunks[str(at)] = fresh
        if chunks:
            self._write({"chunks": chunks})
        for at, source in enumerate(self._sources):
            if at not in self._checked and is_remote(source) and source.checked:
                self._checked.add(at)
                self._write({"checked": at})
        triples = [[start, error, size] for start, (error, size) in sorted(sums.items())]
        self._write({"tensor": job.name, "xxh3": self._digest(job), "sums": triples})

    def nbytes(self) -> int:
        """Of all finished tensors."""
        return sum(part.nbytes for job in self._plan.jobs if job.name in self.done for part in self._parts(job))

    def _parts(self, job: Job) -> list[OutputPart]:
        return [self._plan.output.parts[job.part_name(leaf)] for leaf in job.parts]

    def _digest(self, job: Job) -> str:
        import xxhash

        digest = xxhash.xxh3_128()
        for part in self._parts(job):
            for at in range(0, part.nbytes, _STEP_NBYTES):
                digest.update(self._files[part.file].pread(part.offset + at, min(_STEP_NBYTES, part.nbytes - at)))
        return digest.hexdigest()

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            self._out.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
            self._out.flush()
        except OSError as error:
            raise OutputError("write-failed", f"writing failed: {error.strerror}", path=self.path) from None

    def close(self, error: BaseException | None = None) -> None:
        """Keep the journal after an ``error`` that may pass, else remove it."""
        self._out.close()
        for source in self._files.values():
            source.close()
        if error is None or not keeps(error):
            self.path.unlink(missing_ok=True)
        elif isinstance(error, QFormatError):
            error.hint = self._advice()
            error.locate()
        else:
            error.add_note(self._advice())

    def _advice(self) -> str:
        name = self.path.name.removesuffix(".journal")
        return f"run the same command with --resume: what is finished stays in {name}.partial, which may be deleted with {self.path.name}"
