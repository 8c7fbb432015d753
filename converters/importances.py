"""Which tensors are rounded under an importance matrix, what is said of those it does not cover, and the keys that tell of it.

The rules are llama.cpp's (``src/llama-quant.cpp`` of v0.5.0): a tensor without an entry is rounded without importances and named in a
warning; of a type that cannot do without it is refused; an entry of another size is refused, that of ``token_embd.weight`` ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from converters.jobs import Job
from qformats import registry
from qformats.containers.gguf import Metadata, Value
from qformats.errors import Unsupported, UsageError
from qformats.quantize.imatrix import ImportanceMatrix, read_imatrix

if TYPE_CHECKING:
    import numpy as np

    from converters.options import PlanOptions

__all__ = ["WEIGHTED", "expert_runs", "metadata_keys", "recorded_imatrix", "same_imatrix", "with_importances"]

WEIGHTED = "errors weighed by importances"
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
EXEMPT = (*EMBEDDINGS, "output.weight")
FILE_KEY, DATASET_KEY = "quantize.imatrix.file", "quantize.imatrix.dataset"
ENTRIES_KEY, CHUNKS_KEY = "quantize.imatrix.entries_count", "quantize.imatrix.chunks_count"


def with_importances(jobs: Sequence[Job], options: PlanOptions) -> tuple[list[Job], list[str]]:
    """The jobs with their importances, and warnings.

    Raises ``UsageError`` (``imatrix-target``: the target is no GGUF; ``imatrix-size``), ``Unsupported('importance-needed')`` for a
    type that cannot do without.
    """
    matrix = options.imatrix
    if matrix is not None and registry.row(options.target.format).container != "gguf":
        message = f"importance matrices weigh the types of GGUF, not those of {options.target.format}"
        raise UsageError("imatrix-target", message, hint="leave --imatrix out, or name a target such as gguf:q4_k")
    given: list[Job] = []
    missing: list[str] = []
    for job in jobs:
        given.append(_with_importance(job, matrix))
        uncovered = given[-1].importance is None and _uses(job) and job.name not in EXEMPT
        missing += [job.name] if matrix is not None and uncovered else []
    return given, [] if matrix is None else _warnings(matrix, given, missing)


def _uses(job: Job) -> bool:
    from qformats.quantize import uses_importance

    return job.action == "quantize" and job.kind == "requantized" and job.storage is not None and uses_importance(job.storage, job.search)


def _with_importance(job: Job, matrix: ImportanceMatrix | None) -> Job:
    from qformats.quantize import needs_importance

    found = None if matrix is None or not _uses(job) else _importance(job, matrix)
    if found is not None:
        return replace(job, importance=found, rewrites=(*job.rewrites, WEIGHTED))
    if job.action == "quantize" and job.storage is not None and needs_importance(job.storage):
        if matrix is None:
            message = f"{job.storage.type} cannot be made without an importance matrix"
            hint = "give one with --imatrix (`qconvert imatrix` computes one), or choose a larger type"
        else:
            message = f"{matrix.name} has no entry for it, and {job.storage.type} cannot be made without"
            hint = f"give it another type, such as --tensor-type '{job.name}=q4_k'"
        raise Unsupported("importance-needed", message, tensor=job.name, hint=hint)
    return job


def _importance(job: Job, matrix: ImportanceMatrix) -> np.ndarray[Any, Any] | None:
    """float32 (1, K), (E, K) of experts, or None where there is no entry."""
    entry = matrix.entries.get(job.name)
    if entry is None:
        return None
    columns, experts = job.map.shape[-1], job.map.shape[0] if len(job.map.shape) > 2 else 1
    if entry.sums.size != columns * experts:
        if job.name in EMBEDDINGS:
            return None
        message = f"{matrix.name} has {entry.sums.size} importances for it, expected {experts} x {columns}"
        raise UsageError("imatrix-size", message, tensor=job.name, hint="the importance matrix belongs to another model")
    return entry.importance().reshape(experts, columns)


def _warnings(matrix: ImportanceMatrix, jobs: Sequence[Job], missing: Sequence[str]) -> list[str]:
    used = sum(job.importance is not None for job in jobs)
    if not used:
        return [f"{matrix.name} changes nothing: no tensor gets new codes under its importances"]
    if not missing:
        return []
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return [f"{matrix.name} has no entry for {missing[0]}{more}: rounded without importances"]


def expert_runs(job: Job, start: int, stop: int, rows: np.ndarray[Any, Any] | None) -> Iterator[tuple[int, int, int]]:
    """Runs ``(start, stop, expert)`` of rows that share importances; ``rows`` is the target row of each where they are out of order."""
    import numpy as np

    height = job.map.shape[-2]
    if job.importance is None or len(job.importance) == 1:
        yield start, stop, 0
        return
    experts = (np.arange(start, stop) if rows is None else rows[start:stop]) // height
    ends = [*(np.flatnonzero(np.diff(experts)) + 1).tolist(), stop - start]
    for first, last in zip([0, *ends], ends, strict=False):
        yield start + first, start + last, int(experts[first])


def metadata_keys(matrix: ImportanceMatrix | None) -> Metadata:
    """What llama-quantize writes of an importance matrix (``tools/quantize/quantize.cpp``); names of files only, no places."""
    if matrix is None:
        return {}
    keys: Metadata = {FILE_KEY: Value("str", matrix.name)}
    if matrix.datasets:
        keys[DATASET_KEY] = Value("str", PurePosixPath(matrix.datasets[0].replace("\\", "/")).name)
    keys[ENTRIES_KEY] = Value("u32", len(matrix.entries))
    if matrix.chunk_count > 0:
        keys[CHUNKS_KEY] = Value("u32", matrix.chunk_count)
    return keys


def recorded_imatrix(options: Mapping[str, Any]) -> tuple[str, str] | None:
    """File name and SHA-256 of the importance matrix that recorded options name; ``KeyError`` or ``TypeError`` if they are damaged."""
    found = options.get("imatrix")
    return None if found is None else (str(found["file"]), str(found["sha256"]))


def same_imatrix(wanted: tuple[str, str] | None, given: str | Path | None, where: object) -> ImportanceMatrix | None:
    """The given importance matrix if it is the one that was recorded.

    Raises ``UsageError``: ``imatrix-missing`` where one is needed, ``imatrix-other`` where it is not this one or none belongs there.
    """
    if wanted is None and given is None:
        return None
    if wanted is None:
        raise UsageError("imatrix-other", "was made without an importance matrix", path=where, hint="leave --imatrix out")
    if given is None:
        message = f"was made with the importance matrix {wanted[0]!r}, which is needed to do it again"
        raise UsageError("imatrix-missing", message, path=where, hint="give it with --imatrix")
    matrix = read_imatrix(given)
    if matrix.digest != wanted[1]:
        message = f"was made with {wanted[0]!r} of SHA-256 {wanted[1][:16]}…, {matrix.name} has {matrix.digest[:16]}…"
        raise UsageError("imatrix-other", message, path=where, hint="give the same file with --imatrix")
    return matrix
