"""Checking an output against its source: by the digests it carries, else by replaying its record, else by values where it has none."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from converters import digests
from converters.adapters import LoraWord, recorded_adapters, same_adapters
from converters.comparing import both_values, float64, pair_tensors
from converters.execute import Progress, run_jobs, worker_count
from converters.importances import recorded_imatrix, same_imatrix
from converters.options import PlanOptions, recorded_words
from converters.output import count
from converters.outputs import OutputPart
from converters.plan import Plan, make_plan
from converters.provenance import is_intact, tool_version
from qformats import registry
from qformats.checkpoint import Checkpoint, open_checkpoint
from qformats.containers.source import FileSource, check_remote
from qformats.errors import BadFile, Mismatch, QFormatError, UsageError

__all__ = ["VerifyResult", "verify"]

_MAX_LISTED = 100
_RUN_NBYTES = 1 << 20


@dataclass
class VerifyResult:
    """``ok``; ``mismatches`` (tensor or file, part, offset_bytes, detail); ``method``; ``unseen`` limits; ``compared_nbytes``.

    ``method`` is ``digests`` (both sides are, byte for byte, what the conversion read and wrote), ``replay`` (the conversion done
    again gives these bytes) or ``values`` (there is no record; every weight has the source's value).
    """

    ok: bool
    method: str
    mismatches: list[dict[str, Any]] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    compared_nbytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """The result as JSON data."""
        return {
            "ok": self.ok,
            "method": self.method,
            "mismatches": self.mismatches,
            "unseen": self.unseen,
            "compared_nbytes": self.compared_nbytes,
        }

    def raise_if_different(self, path: object) -> None:
        """``Mismatch`` (exit code 3) unless everything agreed."""
        if not self.ok:
            first = self.mismatches[0]
            where = ", ".join(f"{k} {v}" for k, v in first.items() if v is not None)
            text = f"{count(len(self.mismatches), 'difference')}, the first: {where}"
            raise Mismatch("verify", text, path=path, hint="convert again")


def verify(
    source: str | Path,
    destination: str | Path,
    *,
    replay: bool = False,
    imatrix: str | Path | None = None,
    lora: Iterable[LoraWord] = (),
    workers: int | None = None,
    progress: Progress | None = None,
    allow_pickle: bool = False,
) -> VerifyResult:
    """Compare ``destination`` with what its record says was made of ``source``; every flipped bit is found.

    Equal digests of both sides settle it at the speed of reading them. Where one differs, or with ``replay``, the conversion is done
    again in memory and every byte compared, so that differences have a place; that takes the ``imatrix`` it was made with, if any:
    ``UsageError`` (``imatrix-missing``, ``imatrix-other``). ``lora``, the adapters that were merged in, mean a replay, and one needs
    them (``lora-missing``, ``lora-other``).
    """
    adapters = list(lora)
    where, count = Path(destination), worker_count(workers)
    with open_checkpoint(source, allow_pickle) as checkpoint:
        try:
            found = open_checkpoint(where)
            record = found.provenance
        except QFormatError as error:
            if isinstance(error, BadFile) and error.code in ("not-found", "unreadable"):
                raise
            return VerifyResult(False, "replay", [{"file": where.name, "offset_bytes": error.offset_bytes, "detail": error.message}])
        with found:
            if (record is not None and not is_intact(record)) or (record is None and _has_lost_record(found)):
                return VerifyResult(False, "replay", [{"tensor": "metadata", "file": None, "detail": "the provenance record is damaged"}])
            options = None if record is None else _recorded_options(record)
            if options is None:
                return _compare_values(checkpoint, found)
            if found.gguf is not None and found.gguf.shards > 1:
                message = "was written as one file and is split now, so its record does not speak of these bytes"
                raise UsageError("verify-shards", message, path=where, hint="merge it first: qconvert merge")
            if not replay and not adapters and _same_digests(checkpoint, found, count):
                nbytes = sum(s.size for s in (*checkpoint.sources(), *found.sources()))
                unseen = [*_unseen(record or {}), *_unseen_adapters(record or {})]
                return VerifyResult(True, "digests", unseen=unseen, compared_nbytes=nbytes)
            if record is not None and imatrix is None and not replay and recorded_imatrix(record["options"]) is not None:
                return _without_imatrix(record)
            merged = recorded_adapters((record or {})["options"])
            if merged and not adapters and not replay:
                return _without_adapters(record or {})
            matrix = same_imatrix(recorded_imatrix((record or {})["options"]), imatrix, where)
            options = replace(options, imatrix=matrix, lora=same_adapters(merged, adapters, where))
            return _compare_bytes(make_plan(checkpoint, options), found, record or {}, count, progress)


def _same_digests(checkpoint: Checkpoint, found: Checkpoint, workers: int) -> bool:
    """Whether both sides are what the output's digests say."""
    said = digests.read_digests(found)
    if said is not None and said.output == digests.of_found(found, said, workers) and said.source == digests.of_source(checkpoint, workers):
        return True
    check_remote((*checkpoint.sources(), *found.sources()))  # before a difference is said to be theirs
    return False


def _without_imatrix(record: Mapping[str, Any]) -> VerifyResult:
    """The digests differ, and the conversion cannot be done again to say where."""
    name, _ = recorded_imatrix(record["options"]) or ("", "")
    unseen = f"where: made with the importance matrix {name!r}, which a replay needs; give it with --imatrix"
    entry = {"tensor": None, "file": None, "offset_bytes": None, "detail": "source or output is not what the digests say"}
    return VerifyResult(False, "digests", [entry], [unseen, *_unseen(record)])


def _unseen_adapters(record: Mapping[str, Any]) -> list[str]:
    names = [entry["name"] for entry in recorded_adapters(record["options"])] if "options" in record else []
    text = "whether the weights are those of the source and the adapter {}, merged again: give it with --lora"
    return [text.format(", ".join(map(repr, names)))] if names else []


def _without_adapters(record: Mapping[str, Any]) -> VerifyResult:
    """The digests differ, and the conversion cannot be done again to say where."""
    entry = {"tensor": None, "file": None, "offset_bytes": None, "detail": "source or output is not what the digests say"}
    names = ", ".join(repr(entry["name"]) for entry in recorded_adapters(record["options"]))
    unseen = f"where: made with the adapter {names} merged in, which a replay needs; give it with --lora"
    return VerifyResult(False, "digests", [entry], [unseen, *_unseen(record)])


def _has_lost_record(found: Checkpoint) -> bool:
    """Whether a record stands under another key: its own key was damaged."""
    values = [getattr(v, "value", v) for v in found.metadata.values()]
    return any(isinstance(v, str) and ('"restore":' in v or '"digest":' in v) and '"plan":' in v for v in values)


def _recorded_options(record: Mapping[str, Any]) -> PlanOptions | None:
    """The options a record names, or None where it is too damaged to replay."""
    try:
        words = recorded_words(record["options"])
        recorded_imatrix(record["options"])
        recorded_adapters(record["options"])
        return PlanOptions(registry.parse_target(words.pop("to")), **words)
    except (KeyError, TypeError, ValueError, QFormatError):
        return None


# ---------------------------------------------------------------- replay


class _Comparer:
    """A sink that compares instead of writing."""

    def __init__(self, plan: Plan, files: Mapping[str, FileSource]) -> None:
        self._files = files
        self._names = {(p.file, p.offset): name for name, p in plan.output.parts.items()}
        self._lock = threading.Lock()
        self._buffers = threading.local()
        self.mismatches: list[dict[str, Any]] = []
        self.nbytes = 0

    def put(self, part: OutputPart, offset: int, data: memoryview) -> None:
        """Compare one run of bytes."""
        self.compare(part.file, part.offset + offset, data, self._names[part.file, part.offset], offset)

    def compare(self, file: str, at: int, data: memoryview, name: str, offset: int) -> None:
        """Compare ``data`` with the file's bytes at ``at``; the first difference of a run is listed."""
        place = self._first_difference(self._files[file], at, data)
        with self._lock:
            self.nbytes += len(data)
        if place is None:
            return
        with self._lock:
            if len(self.mismatches) < _MAX_LISTED:
                entry = {"tensor": name, "file": file or None, "offset_bytes": at + place, "detail": f"byte {offset + place}"}
                self.mismatches.append(entry)

    def _first_difference(self, source: FileSource, at: int, data: memoryview) -> int | None:
        """Where ``data`` first differs from the bytes at ``at``, read a cache-sized run at a time into one buffer a thread."""
        import numpy as np

        if not hasattr(self._buffers, "run"):
            self._buffers.run = np.empty(_RUN_NBYTES, np.uint8)
        mine = np.frombuffer(data, np.uint8)
        there = min(len(mine), max(0, source.size - at))
        for done in range(0, there, _RUN_NBYTES):
            run = self._buffers.run[: min(_RUN_NBYTES, there - done)]
            source.pread_into(at + done, run.data)
            if not np.array_equal(run, mine[done : done + len(run)]):
                return done + int(np.argmax(run != mine[done : done + len(run)]))
        return None if there == len(mine) else there


def _compare_bytes(
    plan: Plan, found: Checkpoint, record: Mapping[str, Any], workers: int, progress: Progress | None
) -> VerifyResult:
    said = digests.read_digests(found)
    output, missing = plan.output if said is None else digests.with_digests(plan.output, said), []
    base = found.path
    files: dict[str, FileSource] = {}
    for name, layout in output.layouts.items():
        path = base / name if output.directory else base
        if not path.is_file():
            missing.append({"file": name, "offset_bytes": None, "detail": "is missing"})
            continue
        files[name] = FileSource(path)
        if files[name].size != layout.size:
            missing.append({"file": path.name, "offset_bytes": None, "detail": f"has {files[name].size} bytes, expected {layout.size}"})
    if missing:
        return VerifyResult(False, "replay", missing, _unseen(record))
    comparer = _Comparer(plan, files)
    try:
        for name, layout in output.layouts.items():
            comparer.compare(name, 0, memoryview(layout.header), "header", 0)
            _compare_padding(comparer, plan, name, layout.size, len(layout.header))
        for name, data in output.small.items():
            _compare_small(comparer, base / name, data)
        if not comparer.mismatches or len(comparer.mismatches) < _MAX_LISTED:
            run_jobs(plan, comparer, workers, progress)
        if not comparer.mismatches and (said is None or said.output != digests.of_found(found, said, workers)):
            comparer.mismatches.append({"tensor": "metadata", "file": None, "offset_bytes": None, "detail": "the digests are damaged"})
    finally:
        for source in files.values():
            source.close()
    comparer.mismatches.sort(key=lambda m: (m["file"] or "", m["offset_bytes"] or 0))
    return VerifyResult(not comparer.mismatches, "replay", comparer.mismatches, _unseen(record), comparer.nbytes)


def _compare_padding(comparer: _Comparer, plan: Plan, file: str, size: int, header_nbytes: int) -> None:
    """The bytes between tensors are zero."""
    spans = sorted((p.offset, p.offset + p.nbytes) for p in plan.output.parts.values() if p.file == file)
    at = header_nbytes
    for start, stop in [*spans, (size, size)]:
        if start > at:
            comparer.compare(file, at, memoryview(bytes(start - at)), "padding", 0)
        at = max(at, stop)


def _compare_small(comparer: _Comparer, path: Path, data: bytes) -> None:
    there = path.read_bytes() if path.is_file() else None
    if there != data:
        detail = "is missing" if there is None else "differs"
        comparer.mismatches.append({"tensor": None, "file": path.name, "offset_bytes": None, "detail": detail})
    comparer.nbytes += len(data)


def _unseen(record: Mapping[str, Any]) -> list[str]:
    made = str(record.get("tool", ""))
    mine = f"qformats {tool_version()}"
    return [] if made == mine else [f"the record was made by {made!r}, this is {mine!r}"]


# ---------------------------------------------------------------- values


def _compare_values(checkpoint: Checkpoint, found: Checkpoint) -> VerifyResult:
    """Without a record: every mapped tensor's real values, in float64."""
    unseen = "no provenance record: metadata, side files, padding and unmapped tensors are not compared"
    result = VerifyResult(True, "values", unseen=[unseen])
    pairing = pair_tensors(checkpoint, found)
    for tensor in pairing.missing:
        if tensor.constant is None:
            result.mismatches.append({"tensor": tensor.name, "file": None, "offset_bytes": None, "detail": "is missing"})
    for tensor in pairing.tensors:
        if tensor.constant is not None:
            continue
        for one, other in both_values(checkpoint, found, tensor):
            ours, theirs = float64(one, tensor).numpy(), float64(other).numpy()
            result.compared_nbytes += ours.nbytes
            if ours.shape != theirs.shape or not (ours == theirs).all():
                worst = float(abs(ours - theirs).max()) if ours.shape == theirs.shape else float("nan")
                detail = f"values differ by up to {worst:g}"
                result.mismatches.append({"tensor": tensor.name, "file": None, "offset_bytes": None, "detail": detail})
                break
    result.ok = not result.mismatches
    return result
