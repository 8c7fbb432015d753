"""Which parameters a record keeps (those that the way back would not find), and the tensors that get theirs back.

Kept where the parameters were rounded, or where converting the first rows there and back does not give them again, and only where they
are small beside the weight itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from converters.claims import Ranges, hint_rows
from converters.jobs import Job
from converters.planes import Kept, describe, grid_from_json, grid_to_json, guess, pack, restored, revive, same_params, unpack
from converters.sources import SCAN_WEIGHTS, Slab, read_rows, slabs
from qformats import registry
from qformats.architectures.mapping import SourceRows, TensorMap
from qformats.checkpoint import Checkpoint
from qformats.containers.safetensors import tensor_nbytes
from qformats.errors import BadFile, QFormatError
from qformats.formats.protocol import PartInfo, Target
from qformats.scheme import Learned, Storage

__all__ = [
    "Extra", "collect_extras", "earlier_rows", "find_earlier", "kept_planes", "parse_extras", "parse_kept", "source_storage", "with_extras",
]  # fmt: skip

_PROBE_ROWS = 128
_SMALL_NBYTES = 1 << 12
_SHARE = 16  # planes may take one sixteenth of what the weight takes


@dataclass(frozen=True)
class Extra:
    """A stored tensor that is no weight; ``data`` is None where the other format kept it too."""

    module: str
    leaf: str
    info: PartInfo
    data: bytes | None = None


def collect_extras(checkpoint: Checkpoint, jobs: Sequence[Job]) -> list[list[Any]]:
    """The source's tensors that are no weights (``Checkpoint.extras``), with the bytes of those that the target has no place for."""
    kept = {(job.map.target, job.map.leaf) for job in jobs if job.map.kind == "extra"}
    found: list[list[Any]] = []
    for module, leaf in checkpoint.extras:
        raw = checkpoint.modules[module].parts[leaf]
        entry: list[Any] = [module, leaf, raw.dtype, list(raw.shape)]
        if (module, leaf) in kept:
            found.append(entry)
        elif raw.nbytes <= max(_SMALL_NBYTES, sum(r.nbytes for r in checkpoint.modules[module].parts.values()) // _SHARE):
            found.append([*entry, pack(bytes(raw.read()))])
    return found


def parse_extras(entries: Any) -> tuple[Extra, ...] | None:
    """The inverse of ``collect_extras``, None for a record without them; ``ValueError`` or ``TypeError`` for what is none."""
    if entries is None:
        return None
    found = []
    for module, leaf, dtype, shape, *text in entries:
        if not all(isinstance(word, str) for word in (module, leaf, dtype)) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("no tensor")
        info = PartInfo(dtype, tuple(shape))
        found.append(Extra(module, leaf, info, unpack(text[0], tensor_nbytes(dtype, info.shape)) if text else None))
    return tuple(found)


def with_extras(tensors: Sequence[TensorMap], extras: Sequence[Extra] | None) -> tuple[list[TensorMap], dict[str, str]]:
    """The tensors with those that only the record has; and what the conversion itself wrote beside the weights, which goes again."""
    if extras is None:
        return list(tensors), {}
    known = {(extra.module, extra.leaf) for extra in extras}
    gone = {t.name: "was not there before it was converted" for t in tensors if t.kind == "extra" and (t.target, t.leaf) not in known}
    stay = [t for t in tensors if t.name not in gone or t.kind != "extra"]
    there = {(t.target, t.leaf) for t in stay}
    back = [TensorMap(e.module, e.leaf, e.info.shape, (), kind="extra") for e in extras if e.data is not None]
    return [*stay, *(t for t in back if (t.target, t.leaf) not in there)], gone


def source_storage(checkpoint: Checkpoint, name: str) -> Storage | None:
    """The storage whose writer makes the parts of a quantized module, or None where its format cannot tell."""
    form, module = registry.format_module(checkpoint.format), checkpoint.modules[name]
    if hasattr(form, "storage_of"):
        found: Storage = form.storage_of(module)
        return found
    if checkpoint.gguf is None:
        return None
    try:
        storages: list[Storage] = form.storages(Target(checkpoint.format, module.parts["weight"].dtype.lower(), {}), form.scheme(module))
    except QFormatError:
        return None
    return storages[0]


def kept_planes(checkpoint: Checkpoint, name: str, job: Job, storage: Storage, zeros: Any, positive: bool) -> dict[str, Any] | None:
    """The parameters of a source module as JSON data, None where the way back needs none or they are too large."""
    from qformats.reencode import Hint
    from qformats.rewrite import Refused
    from qformats.tensor import QuantizedTensor

    module, form = checkpoint.modules[name], registry.format_module(checkpoint.format)
    blank = form.read(module, codes=False)
    assert isinstance(blank, QuantizedTensor)
    if job.storage is None or name in job.orders or len(blank.shape) != 2 or isinstance(blank.grid, Learned):
        return None
    try:
        hint = Hint(zeros, positive)
        if job.kind == "exact" and _comes_back(checkpoint, name, job, storage, hint):
            return None
        data = describe(blank, _guesses(checkpoint, name, job, blank))
    except Refused:
        return None
    nbytes = sum(raw.nbytes for raw in module.parts.values())
    if data is None or _text_nbytes(data) > max(_SMALL_NBYTES, nbytes // _SHARE):
        return None
    return {"grid": grid_to_json(blank.grid), "params": data}


def _text_nbytes(data: Any) -> int:
    if isinstance(data, Mapping):
        return sum(map(_text_nbytes, data.values()))
    return len(data) if isinstance(data, str) else 0


def _own(format_name: str, storage: Storage) -> Any:
    return partial(registry.format_module(format_name).can_store, storage)


def _comes_back(checkpoint: Checkpoint, name: str, job: Job, storage: Storage, hint: Any) -> bool:
    """Whether the first rows, converted and converted back, are the same again."""
    import torch

    from qformats.reencode import finish, fit
    from qformats.rewrite import Refused

    assert job.storage is not None
    module = checkpoint.modules[name]
    rows = registry.format_module(checkpoint.format).read(module, 0, min(_PROBE_ROWS, checkpoint.scheme(name).shape[0]))
    here = hint_rows(job.hints.get(job.map.target), 0, rows.shape[0])
    try:
        there = finish(rows, fit(rows, job.storage, hint=here, rounding=job.rounding, own=_own(job.format, job.storage)))
        seen = hint_rows(hint, 0, rows.shape[0])
        back = finish(there, fit(there, storage, hint=seen, own=_own(checkpoint.format, storage)))
    except Refused:
        return False
    return back.grid == rows.grid and torch.equal(back.codes, rows.codes) and same_params(back, rows)


def _guesses(checkpoint: Checkpoint, name: str, job: Job, blank: Any) -> dict[str, Any]:
    """What the target's parameters will tell of the source's, on all rows."""
    from qformats.reencode import fit

    assert job.storage is not None
    n = blank.shape[0]
    rows_of = TensorMap(name, "weight", blank.shape, (SourceRows(name, "weight", 0, n),))
    own = Job(rows_of, "codes", "", "", "", {}, False, storage=job.storage)
    slab, hint, held = Slab(checkpoint), job.hints.get(job.map.target), job.storage

    def found(start: int, stop: int) -> Any:
        rows = read_rows(own, slab, checkpoint, start, stop, codes=False)
        ranges, seen = Ranges(own, slab, checkpoint, start, stop), hint_rows(hint, start, stop)
        made = fit(rows, held, ranges, seen, rounding=job.rounding, own=_own(job.format, held))  # type: ignore[arg-type]
        return rows, (rows if made.as_it_stands else made)

    return _joined([guess(*found(start, stop)) for start, stop in slabs(own, checkpoint, SCAN_WEIGHTS)])


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import torch

    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ---------------------------------------------------------------- the way back


def parse_kept(data: Mapping[str, Any], storages: Sequence[Storage]) -> Kept:
    """A record's entry; ``ValueError``, ``KeyError``, ``TypeError`` or ``IndexError`` for what is none."""
    if not isinstance(data["params"], dict) or type(data["held"]) is not int:
        raise ValueError("no planes")
    return Kept(data["params"], grid_from_json(data["grid"]), storages[data["held"]])


def find_earlier(kept: Kept, job: Job, checkpoint: Checkpoint) -> Any:
    """The weight's earlier parameters, if what ``job`` reads is in every row what these became; else None.

    ``BadFile('provenance')`` for planes that are damaged.
    """
    from qformats.tensor import QuantizedTensor

    assert job.storage is not None
    slab, ranges, shape = Slab(checkpoint), list(slabs(job, checkpoint, SCAN_WEIGHTS)), job.map.shape
    blank = [read_rows(job, slab, checkpoint, start, stop, codes=False) for start, stop in ranges]
    try:
        guesses = _joined([guess(_shaped(kept, rows.shape), rows) for rows in blank if isinstance(rows, QuantizedTensor)])
        earlier = revive(kept.params, shape, kept.grid, guesses)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, QFormatError):
        hint = "name a type, as in awq:int4, to convert without it"
        raise BadFile("provenance", "the planes of the provenance record are damaged", hint=hint) from None
    for start, stop in ranges:
        rows = read_rows(job, slab, checkpoint, start, stop)
        if earlier_rows(job, (earlier, kept.held), rows, start, stop, checkpoint.format) is None:
            return None
    return earlier


def _shaped(kept: Kept, shape: tuple[int, ...]) -> Any:
    """Empty planes of the recorded form for some rows of a weight: what a guess needs to know of them."""
    import torch

    from qformats.scheme import Tile
    from qformats.tensor import Param, QuantizedTensor

    params = {}
    for name, data in kept.params.items():
        kind, *sizes = data["block"]
        plain = "grid" not in data and kind == "tile" and sizes[0] == 1 and len(sizes) == len(shape)
        if plain and prod(data["size"]) and data["dtype"] in ("float16", "bfloat16", "float32", "float64"):
            block = Tile(tuple(sizes))
            values = torch.zeros(block.counts(shape), dtype=getattr(torch, data["dtype"]))
            params[name] = Param(values, block, bool(data.get("inverse")))
    scales = tuple(params[name] for name in sorted(params) if name.startswith("scale"))
    codes = torch.zeros((1, 1), dtype=torch.uint8).expand(shape)
    made = QuantizedTensor(shape, codes, kept.grid, scales, params.get("zero_point"), params.get("offset"))
    if {name for name, _ in made.params()} != set(params):
        raise ValueError("planes of another form")
    return made


def earlier_rows(job: Job, earlier: tuple[Any, Storage], rows: Any, start: int, stop: int, source_format: str) -> Any:
    """Rows ``start:stop`` under the parameters they had, or None unless these become the very rows again."""
    from qformats.rewrite import Refused, select_rows

    assert job.storage is not None
    whole, held = earlier
    try:
        mine = whole if (start, stop) == (0, whole.shape[0]) else select_rows(whole, slice(start, stop))
    except Refused:
        return None

    def own(storage: Storage, scheme: Any) -> object:
        return registry.format_module(job.format if storage is job.storage else source_format).can_store(storage, scheme)

    return restored(rows, mine, job.storage, held, own, own)
