"""How far the weights of one checkpoint lie from those of another, of any formats: every tensor's kind of match and its error.

The first checkpoint's tensors are mapped to the names, rows and columns of the second's format (``mapping.map_tensors``) and the real
numbers of both compared in float64. What the numbers prove is a tensor's kind:

    copied       equal, and the stored bytes are too
    exact        equal
    dequantized  the second stores floats, each the first's number rounded once to that dtype
    codes-exact  codes on both sides, equal up to one shift or flip for every 16 of them, under other scales or offsets
    requantized  the second stores codes, and they are others (or the first stores floats)
    different    anything else; also another shape
    missing      the second has no such tensor (``extra``: the first has none)

Errors: ``error`` = sqrt(Σ(a − b)² / Σa²), ``max_abs`` = max |a − b|.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, isfinite, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.execute import worker_count
from converters.jobs import Job
from converters.mapping import map_tensors
from converters.provenance import tool_version
from converters.report import Report, TensorLine
from converters.sources import Slab, read_rows, slabs
from converters.stored import StoredWeights
from qformats import registry, rewrite
from qformats.checkpoint import Checkpoint, open_checkpoint
from qformats.errors import QFormatError, Unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.architectures.mapping import TensorMap

__all__ = ["agreement_report", "both_values", "compare", "float64", "measure", "pair_tensors", "verification_report"]

_RUN = 16  # codes: the finest group of any type
_READ_NBYTES = 8 << 20
_REASONS = {
    "copied": "the same bytes",
    "exact": "every value is equal",
    "codes-exact": "every code is kept, a scale or an offset differs",
    "requantized": "the codes are others than the first's",
}


@dataclass(frozen=True)
class Pairing:
    """Tensors that both have, that the second lacks (``missing``) or has alone (``extra``: module, leaf), and sources left out."""

    tensors: tuple[TensorMap, ...]
    missing: tuple[TensorMap, ...]
    extra: tuple[tuple[str, str], ...]
    dropped: dict[str, str]


@dataclass
class Measured:
    """What two checkpoints have in common: a line for each tensor of either, and source tensors with no place in the second's format."""

    tensors: tuple[TensorLine, ...]
    dropped: dict[str, str] = field(default_factory=dict)


def pair_tensors(first: Checkpoint, second: Checkpoint) -> Pairing:
    """The tensors of ``first`` as ``second`` stores them; errors are those of ``map_tensors``."""
    mapped = map_tensors(first, second.format, lambda stack: stack.target in second.modules)
    there: list[TensorMap] = []
    missing: list[TensorMap] = []
    for tensor in mapped.tensors:
        if tensor.floats is not None and not (tensor.target in second.modules and second.is_quantized(tensor.target)):
            tensor = tensor.floats
        (there if holds(second, tensor.target, tensor.leaf) else missing).append(tensor)
    known = {(tensor.target, tensor.leaf) for tensor in there}
    stored = [(module, leaf) for module, leaves in second.shapes().items() for leaf in leaves]
    return Pairing(tuple(there), tuple(missing), tuple(pair for pair in stored if pair not in known), dict(mapped.dropped))


def holds(checkpoint: Checkpoint, module: str, leaf: str) -> bool:
    """Whether a checkpoint has a tensor, as floats or as codes."""
    if module not in checkpoint.modules:
        return False
    return leaf in checkpoint.modules[module].parts or (leaf == "weight" and checkpoint.is_quantized(module))


def both_values(first: Checkpoint, second: Checkpoint, tensor: TensorMap) -> Iterator[tuple[Any, Any]]:
    """Rows of ``tensor`` from both sides, a few MiB at a time: canonical tensors (n, K) where they are codes, floats where not."""
    job = Job(tensor, "float", "", "", "", {}, False)
    if tensor.constant is not None:
        import torch

        values = torch.from_numpy(tensor.constant)
        yield values.reshape(-1, 1), rows_of(second, tensor.target, tensor.leaf, 0, values.numel())
        return
    slab = Slab(first)
    for start, stop in slabs(job, first):
        try:
            ours = read_rows(replace(job, action="codes"), slab, first, start, stop)
        except rewrite.Refused:  # pieces of codes that are no one tensor of codes
            ours = read_rows(job, slab, first, start, stop)
        yield ours, rows_of(second, tensor.target, tensor.leaf, start, stop)


def rows_of(checkpoint: Checkpoint, module: str, leaf: str, start: int, stop: int) -> Any:
    """Rows of a stored tensor, the elements of a vector being one each."""
    raw = checkpoint.modules[module].parts.get(leaf)
    if raw is not None and len(raw.shape) <= 1:
        value: Any = checkpoint.read(module, leaf=leaf)
        return value.reshape(-1, 1)[start:stop]
    return checkpoint.read(module, start, stop, leaf)


def float64(value: Any, tensor: TensorMap | None = None) -> Tensor:
    """The real numbers of rows; with ``tensor``, what it does to the values of its sources is done, as it is where they are written."""
    import torch

    values: Tensor = value.to(torch.float64) if isinstance(value, torch.Tensor) else value.dequantize(torch.float64)
    return values if tensor is None or not tensor.altered else tensor.alter(values.to(torch.float32)).to(torch.float64)


def measure(
    first: Checkpoint, second: Checkpoint, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> Measured:
    """Every tensor of both compared, ``workers`` at a time; ``progress`` counts the bytes of the second's tensors."""
    pairing = pair_tensors(first, second)
    ours, theirs = StoredWeights(first), StoredWeights(second)
    total = sum(theirs.label(t.target, t.leaf)[1] for t in pairing.tensors)
    lines: list[TensorLine] = []
    with ThreadPoolExecutor(workers, thread_name_prefix="qconvert") as pool:
        done = 0
        for line in pool.map(partial(_line, first, second, ours, theirs), pairing.tensors):
            lines.append(line)
            done += line.nbytes
            if progress is not None:
                progress(done, total)
    for tensor in pairing.missing:
        lines.append(_source_line(ours, tensor))
    for module, leaf in pairing.extra:
        label, nbytes = theirs.label(module, leaf)
        name = registry.join_name(second.format, module, leaf)
        lines.append(TensorLine(name, "extra", label, theirs.shapes[module][leaf], nbytes, False, "only the second has it"))
    return Measured(tuple(lines), pairing.dropped)


def compare(
    first: str | Path,
    second: str | Path,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    allow_pickle: bool = False,
) -> Report:
    """Measure how far every weight of ``second`` lies from ``first``'s, whatever formats they are in; nothing is run or written."""
    with open_checkpoint(first, allow_pickle) as one, open_checkpoint(second, allow_pickle) as other:
        found = measure(one, other, worker_count(workers), progress)
        return Report(
            one.shown, one.format, _file_nbytes(one), other.format, _file_nbytes(other), found.tensors, found.dropped,
            (*one.warnings, *other.warnings), tool=f"qformats {tool_version()}", destination=other.shown, subject="comparison",
        )  # fmt: skip


def verification_report(
    source: Path,
    destination: Path,
    verified: Mapping[str, Any],
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    allow_pickle: bool = False,
) -> Report:
    """What ``verify`` found (``VerifyResult.to_json``), and the weights measured; a damaged output that cannot be read has none."""
    try:
        found = compare(source, destination, workers=workers, progress=progress, allow_pickle=allow_pickle)
    except QFormatError as error:
        if verified["ok"]:
            raise
        found = _unread(source, destination, str(error), allow_pickle)
    return replace(found, subject="verification", verification=verified)


def agreement_report(
    first: Path, second: Path, agreement: Mapping[str, Any], *, quantized: str | None = None, allow_pickle: bool = False
) -> Report:
    """How two models that were run agree, and the weights of their files; these only where the second was not ``quantized`` on loading."""
    if quantized is not None:
        note = f"the second is the checkpoint quantized to {quantized} while it was loaded: its weights are in no file"
        return replace(_unread(first, second, note, allow_pickle), target=quantized, agreement=agreement)
    try:
        found = compare(first, second, allow_pickle=allow_pickle)
    except Unsupported as error:
        found = _unread(first, second, str(error), allow_pickle)
    return replace(found, agreement=agreement)


def _unread(first: Path, second: Path, why: str, allow_pickle: bool) -> Report:
    """A report without weights."""
    with open_checkpoint(first, allow_pickle) as one:
        files = [file for file in second.iterdir() if file.is_file()] if second.is_dir() else [second]
        nbytes = sum(file.stat().st_size for file in files if file.exists())
        said = (f"the weights were not compared: {why}",)
        return Report(
            one.shown, one.format, _file_nbytes(one), "", nbytes, (), warnings=said, tool=f"qformats {tool_version()}",
            destination=str(second), subject="comparison",
        )  # fmt: skip


def _file_nbytes(checkpoint: Checkpoint) -> int:
    return sum(source.size for source in checkpoint.sources())


def _source_line(ours: StoredWeights, tensor: TensorMap) -> TensorLine:
    label, nbytes = ours.source_of(tensor)
    shape = tuple(int(n) for n in tensor.shape)
    return TensorLine(
        tensor.name, "missing", "", shape, 0, False, "only the first has it", source_type=label, source_nbytes=nbytes
    )  # fmt: skip


def _line(first: Checkpoint, second: Checkpoint, ours: StoredWeights, theirs: StoredWeights, tensor: TensorMap) -> TensorLine:
    label, nbytes = theirs.label(tensor.target, tensor.leaf)
    source, source_nbytes = ours.source_of(tensor)
    shape = tuple(int(n) for n in theirs.shapes[tensor.target][tensor.leaf])
    coded = theirs.planes(tensor.target, tensor.leaf) and tensor.leaf == "weight" and second.is_quantized(tensor.target)
    sums = _Sums(None if coded else label)
    if prod(shape) != prod(tensor.shape) or shape[-1:] != tuple(tensor.shape)[-1:]:
        kind, reason = "different", f"its shape is {_by(shape)}, the source's {_by(tensor.shape)}"
    else:
        for one, other in both_values(first, second, tensor):
            sums.add(one, other, tensor)
        kind, reason = sums.kind(bool(coded), lambda: _same_bytes(ours, theirs, tensor))
    error, worst = (sums.relative, sums.max_abs) if "shape" not in reason else (None, None)
    return TensorLine(
        tensor.name, kind, label, shape, nbytes, kind in ("copied", "exact"), reason, error=error, source_type=source,
        source_nbytes=source_nbytes, max_abs=worst,
    )  # fmt: skip


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


class _Sums:
    """What is known of one tensor after the rows seen so far. ``dtype``: of the second's floats, None for codes."""

    def __init__(self, dtype: str | None) -> None:
        from qformats.formats.dense import FLOAT_DTYPES

        self._dtype = None if dtype is None else FLOAT_DTYPES.get(dtype)
        self._word = dtype or ""
        self._error = self._size = self._worst = 0.0
        self._rounds = self._dtype is not None
        self._codes, self._floats = dtype is None, False

    def add(self, one: Any, other: Any, tensor: TensorMap) -> None:
        """Count rows (n, K) of both sides."""
        import torch

        a, b = float64(one, tensor), float64(other)
        a, b = a.reshape(b.shape), b
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b)
        if a.numel():
            found = float(apart.abs().max())
            self._worst = found if found != found else max(self._worst, found)
        self._error += float((apart * apart).sum())
        self._size += float((a * a).sum())
        if self._rounds and self._worst:
            self._rounds = bool((a.to(getattr(torch, str(self._dtype))).to(torch.float64) == b).all())
        self._floats = self._floats or isinstance(one, torch.Tensor)
        self._codes = self._codes and not tensor.altered and _same_codes(one, other)

    @property
    def relative(self) -> float | None:
        """The relative RMS error; None where it is no number."""
        found = 0.0 if not self._error else sqrt(self._error / self._size) if self._size else inf
        return found if isfinite(found) else None

    @property
    def max_abs(self) -> float | None:
        """The largest absolute error; None where it is no number."""
        return self._worst if isfinite(self._worst) else None

    def kind(self, coded: bool, same_bytes: Callable[[], bool]) -> tuple[str, str]:
        """Kind and reason."""
        if self._worst == 0.0:
            kind = "copied" if same_bytes() else "exact"
        elif self._rounds:
            return "dequantized", f"each value is rounded once to {self._word}"
        else:
            kind = "codes-exact" if self._codes else "requantized" if coded else "different"
        if kind == "requantized" and self._floats:
            return kind, "codes of floats, rounded"
        if kind != "different":
            return kind, _REASONS[kind]
        return kind, "the values differ" if isfinite(self._worst) else "the values differ, and some are not finite"


def _same_codes(one: Any, other: Any) -> bool:
    """Whether the codes of two canonical tensors (n, K) are equal up to one shift or one flip for every run of ``_RUN``."""
    import torch

    from qformats.scheme import Integer

    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return False
    a, b = one.codes, other.codes
    if a.numel() != b.numel() or not isinstance(one.grid, Integer) or not isinstance(other.grid, Integer) or a.shape[-1] % _RUN:
        return a.shape == b.shape and one.grid == other.grid and bool((a == b).all())
    a, b = (codes.reshape(-1, _RUN).to(torch.int16) for codes in (a, b))
    shifted, flipped = a - b, a + b
    same = (shifted == shifted[:, :1]).all(1) | (flipped == flipped[:, :1]).all(1)
    return bool(same.all())


def _same_bytes(ours: StoredWeights, theirs: StoredWeights, tensor: TensorMap) -> bool:
    """Whether the stored bytes of a tensor whose values are equal are equal too."""
    if len(tensor.sources) != 1 or not tensor.sources[0].is_plain or tensor.weave or tensor.altered:
        return False
    source = tensor.sources[0]
    a, b = ours.planes(source.module, source.leaf), theirs.planes(tensor.target, tensor.leaf)
    if len(a) == len(b) == 1:
        (a,), (b,) = [{"": next(iter(a.values()))}], [{"": next(iter(b.values()))}]
    if a.keys() != b.keys():
        return False
    return all((a[k].dtype, a[k].nbytes, a[k].big_endian) == (b[k].dtype, b[k].nbytes, b[k].big_endian) and _equal(a[k], b[k]) for k in a)


def _equal(a: Any, b: Any) -> bool:
    ranges = range(0, a.nbytes, _READ_NBYTES)
    sizes = (min(_READ_NBYTES, a.nbytes - at) for at in ranges)
    return all(a.source.pread(a.offset + at, n) == b.source.pread(b.offset + at, n) for at, n in zip(ranges, sizes, strict=True))
