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
from qformats.checkpoint import fetched_file
from qformats.containers.gguf import Metadata, Value
from qformats.errors import QFormatError, Unsupported, UsageError
from qformats.quantize.imatrix import ImportanceMatrix, read_imatrix

if TYPE_CHECKING:
    import numpy as np

    from converters.options import PlanOptions
    from qformats.checkpoint import Checkpoint

__all__ = ["WEIGHTED", "expert_runs", "metadata_keys", "open_imatrix", "recorded_imatrix", "same_imatrix", "with_importances"]

WEIGHTED = "errors weighed by importances"
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
EXEMPT = (*EMBEDDINGS, "output.weight")
FILE_KEY, DATASET_KEY = "quantize.imatrix.file", "quantize.imatrix.dataset"
ENTRIES_KEY, CHUNKS_KEY = "quantize.imatrix.entries_count", "quantize.imatrix.chunks_count"


def with_importances(jobs: Sequence[Job], options: PlanOptions, checkpoint: Checkpoint) -> tuple[list[Job], list[str]]:
    """The jobs with their importances, and warnings.

    Raises ``UsageError`` (``imatrix-target``: a model whose tensors have no GGUF names that are known; ``imatrix-size``),
    ``Unsupported('importance-needed')`` for a type that cannot do without.
    """
    matrix = options.imatrix
    if matrix is None:
        return [_with_importance(job, None, None) for job in jobs], []
    places = None if registry.row(options.target.format).container == "gguf" else _places(checkpoint)
    given: list[Job] = []
    missing: list[str] = []
    for job in jobs:
        given.append(_with_importance(job, matrix, places))
        uncovered = given[-1].importance is None and _uses(job) and job.name not in EXEMPT
        missing += [job.name] if uncovered else []
    return given, _warnings(matrix, given, missing)


Places = Mapping[str, Sequence[tuple[str, int]]]  # a source module → (GGUF tensor, expert) of its rows


def _places(checkpoint: Checkpoint) -> Places:
    """Under which names of a GGUF the columns of each source module were measured, as the architecture has it.

    A module whose columns are moved or whose inputs and outputs change places has none.
    """
    if checkpoint.gguf is not None:
        return {module: [(f"{module}.weight", 0)] for module in checkpoint.modules}
    try:
        mapped = checkpoint.binding.to_gguf(checkpoint.shapes())
    except QFormatError as error:
        message = f"the entries of an importance matrix bear the names of a GGUF, and this model has none: {error.message}"
        raise UsageError("imatrix-target", message, hint="leave --imatrix out") from None
    found: dict[str, list[tuple[str, int]]] = {}
    for tensor in mapped.tensors:
        plain = tensor.leaf == "weight" and not tensor.weave and len(tensor.shape) > 1
        at, height = 0, tensor.shape[-2] if len(tensor.shape) > 2 else tensor.rows
        for source in tensor.sources if plain else ():
            if source.module and source.columns == (0, 1) and source.transposed is None:
                found.setdefault(source.module, []).append((tensor.name, at // height))
            at += source.stop - source.start
    return found


def _uses(job: Job) -> bool:
    from qformats.quantize import uses_importance

    return job.action == "quantize" and job.kind == "requantized" and job.storage is not None and uses_importance(job.storage, job.search)


def _with_importance(job: Job, matrix: ImportanceMatrix | None, places: Places | None) -> Job:
    from qformats.quantize import needs_importance

    found = None
    if matrix is not None and _uses(job):
        found = _importance(job, matrix) if places is None else _by_sources(job, matrix, places)
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


def _by_sources(job: Job, matrix: ImportanceMatrix, places: Places) -> np.ndarray[Any, Any] | None:
    """As ``_importance``, from the entries of the GGUF tensors that the sources' rows go to, or come from.

    Sources that share a matrix share its inputs: the mean of their importances counts.
    """
    import numpy as np

    columns, found = job.map.shape[-1], []
    for source in job.map.sources:
        if source.columns != (0, 1) or source.transposed is not None or job.map.weave or len(job.map.shape) > 2:
            return None
        for name, expert in places.get(source.module, ()):
            if (entry := matrix.entries.get(name)) is not None:
                values = entry.importance()
                expert = source.start // job.map.rows if len(values) > 1 and expert == 0 else expert
                if values.size % columns or expert >= values.size // columns:
                    message = f"{matrix.name} has {values.size} importances for {name}, expected those of {columns} columns"
                    raise UsageError("imatrix-size", message, tensor=job.name, hint="the importance matrix belongs to another model")
                found.append(values.reshape(-1, columns)[expert])
    return np.mean(found, axis=0, dtype=np.float64).astype(np.float32).reshape(1, columns) if found else None


def _warnings(matrix: ImportanceMatrix, jobs: Sequence[Job], missing: Sequence[str]) -> list[str]:
    used = sum(job.importance is not None for job in jobs)
    told = [] if used else [f"{matrix.name} changes nothing: no tensor gets new codes under its importances"]
    rounded = [job for job in jobs if job.action == "quantize" and job.kind == "requantized" and job.name not in EXEMPT]
    if used and (deaf := sorted({job.type for job in rounded if not _uses(job)})):
        told.append(f"rounded without importances: {', '.join(deaf)}; see --search best")
    if missing and used:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        told.append(f"{matrix.name} has no entry for {missing[0]}{more}: rounded without importances")
    return told


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


def open_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read an importance matrix, a file here or on the hub; raises as ``read_imatrix``, and ``RemoteError``."""
    return read_imatrix(fetched_file(path))


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
    matrix = open_imatrix(given)
    if matrix.digest != wanted[1]:
        message = f"was made with {wanted[0]!r} of SHA-256 {wanted[1][:16]}…, {matrix.name} has {matrix.digest[:16]}…"
        raise UsageError("imatrix-other", message, path=where, hint="give the same file with --imatrix")
    return matrix
