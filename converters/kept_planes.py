"""Which parameters a record keeps (those that the way back would not find), and the tensors that get theirs back.

Kept where the parameters were rounded, or where converting the first rows there and back does not give them again, and only where they
are small beside the weight itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from converters.claims import Ranges, hint_rows
from converters.jobs import Job
from converters.packing import pack, unpack
from converters.planes import Kept, Stale, describe, grid_from_json, grid_to_json, guess, restored, revive, same_params
from converters.sources import SCAN_WEIGHTS, Slab, read_rows, slabs
from converters.zero_signs import ZeroSigns, collect_zeros, loses_signs, two_zeros, zero_counts
from qformats import registry
from qformats.architectures.mapping import SourceRows, TensorMap
from qformats.checkpoint import Checkpoint
from qformats.containers.safetensors import tensor_nbytes
from qformats.errors import BadFile, QFormatError
from qformats.formats.protocol import PartInfo, Target
from qformats.scheme import Float, Integer, Learned, Storage

if TYPE_CHECKING:
    from qformats.tensor import QuantizedTensor

__all__ = [
    "TOO_LARGE", "Earlier", "Extra", "collect_extras", "earlier_rows", "find_earlier", "kept_planes", "parse_extras", "parse_kept",
    "source_storage", "with_extras",
]  # fmt: skip

_PROBE_ROWS = 128
_SMALL_NBYTES = 1 << 12
_SHARE = 12  # planes may take one twelfth of what the weight takes
UNWRITABLE = "the form it is stored in is read, not written"
TOO_LARGE = "what it would have to keep is too large for the record"


@dataclass(frozen=True)
class Earlier:
    """The parameters that a weight had before it was converted to the storage ``held``, with codes of zeros; its minus zeros."""

    weight: QuantizedTensor
    held: Storage
    zeros: ZeroSigns | None = None


@dataclass(frozen=True)
class Extra:
    """A stored tensor that is no weight; ``data`` is None where the other format kept it too."""

    module: str
    leaf: str
    info: PartInfo
    data: bytes | None = None


def collect_extras(checkpoint: Checkpoint, jobs: Sequence[Job]) -> list[list[Any]]:
    """The source's tensors that are no weights (``Checkpoint.extras``), with the bytes of those that the target has no place for."""
    written = getattr(registry.format_module(checkpoint.format), "WRITTEN", ())
    kept = {(job.map.target, job.map.leaf) for job in jobs if job.map.kind == "extra" and job.map.leaf not in written}
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


def with_extras(tensors: Sequence[TensorMap], extras: Sequence[Extra] | None, target: str) -> tuple[list[TensorMap], dict[str, str]]:
    """The tensors with those that only the record has; and what the conversion itself wrote beside the weights, which goes again.

    Parts that the format ``target`` writes beside every weight come with the weights.
    """
    if extras is None:
        return list(tensors), {}
    known = {(extra.module, extra.leaf) for extra in extras}
    gone = {t.name: "was not there before it was converted" for t in tensors if t.kind == "extra" and (t.target, t.leaf) not in known}
    back = {(e.module, e.leaf): TensorMap(e.module, e.leaf, e.info.shape, (), kind="extra") for e in extras if e.data is not None}
    written = getattr(registry.format_module(target), "WRITTEN", ())
    stay = [t for t in tensors if t.kind != "extra" or (t.name not in gone and (t.target, t.leaf) not in back)]
    back = {key: tensor for key, tensor in back.items() if tensor.leaf not in written}
    return [*stay, *back.values()], gone


def source_storage(checkpoint: Checkpoint, name: str) -> Storage | None:
    """The storage whose writer makes the parts of a quantized module, or None where its format cannot tell or has no such writer."""
    form, module = registry.format_module(checkpoint.format), checkpoint.modules[name]
    if hasattr(form, "storage_of"):
        found: Storage = form.storage_of(module)
        return None if found.options.get("read_only") else found
    if checkpoint.gguf is None:
        return None
    try:
        storages: list[Storage] = form.storages(Target(checkpoint.format, module.parts["weight"].dtype.lower(), {}), form.scheme(module))
    except QFormatError:
        return None
    return storages[0]


def kept_planes(
    checkpoint: Checkpoint, name: str, job: Job, storage: Storage | None, zeros: Any, positive: bool
) -> tuple[dict[str, Any] | None, str | None]:
    """The parameters of a source module as JSON data, None where the way back needs none; and why it will not find them all, or None."""
    from qformats.reencode import Hint
    from qformats.rewrite import Refused
    from qformats.tensor import QuantizedTensor

    module, form = checkpoint.modules[name], registry.format_module(checkpoint.format)
    if job.earlier is not None:
        return None, None  # what it was read as is what it becomes again
    if storage is None or job.storage is None:
        return None, UNWRITABLE
    if job.kind == "exact" and _plain(storage) and _plain(job.storage):
        return None, None  # zero points and signs are all that such a target may lack
    blank = form.read(module, codes=False)
    assert isinstance(blank, QuantizedTensor)
    hint = Hint(zeros, positive)
    if name in job.orders or len(blank.shape) != 2 or isinstance(blank.grid, Learned):
        return None, None if job.kind == "exact" else "the record keeps no parameters of such a weight"
    try:
        if job.kind == "exact" and _comes_back(checkpoint, name, job, storage, hint):
            return None, None
        data = describe(blank, _guesses(checkpoint, name, job, blank))
    except Refused as refusal:
        return None, str(refusal)
    if data is None:
        return None, "the record keeps no parameters of such a weight"
    signs = collect_zeros(_all_rows(checkpoint, name, blank)) if loses_signs(blank.grid, job.storage) else None
    nbytes = max(sum(raw.nbytes for raw in module.parts.values()), int(prod(blank.shape) * job.storage.bits_per_weight / 8))
    if _text_nbytes(data) + _text_nbytes(signs) > max(_SMALL_NBYTES, nbytes // _SHARE):
        return None, TOO_LARGE
    return {"grid": grid_to_json(blank.grid), "params": data, **({} if signs is None else {"zeros": signs})}, None


def _all_rows(checkpoint: Checkpoint, name: str, blank: Any) -> Iterator[Any]:
    """The whole module in row ranges, codes included."""
    rows_of, slab = TensorMap(name, "weight", blank.shape, (SourceRows(name, "weight", 0, blank.shape[0]),)), Slab(checkpoint)
    job = Job(rows_of, "codes", "", "", "", {}, False)
    for start, stop in slabs(job, checkpoint, SCAN_WEIGHTS):
        yield read_rows(job, slab, checkpoint, start, stop)


def _plain(storage: Storage) -> bool:
    """Integers under one scale a run of a row, and at most integer zero points."""
    single = storage.sub_scale is None and storage.scale_grid is None and storage.factor is None and storage.zero_dtype is None
    shape = storage.rows == 1 and not (storage.flat or storage.cyclic or storage.inverse or storage.doubled)
    return isinstance(storage.grid, Integer) and single and shape and storage.offset is None


def _text_nbytes(data: Any) -> int:
    if isinstance(data, Mapping | list):
        return sum(map(_text_nbytes, data.values() if isinstance(data, Mapping) else data))
    return len(data) if isinstance(data, str) else 0


def _own(format_name: str, storage: Storage) -> Any:
    return partial(registry.format_module(format_name).can_store, storage)


def _comes_back(checkpoint: Checkpoint, name: str, job: Job, storage: Storage, hint: Any) -> bool:
    """Whether the first rows, converted and converted back, are the same again; all rows where each of them may find its own way."""
    module, form, grid = checkpoint.modules[name], registry.format_module(checkpoint.format), checkpoint.scheme(name).grid
    assert job.storage is not None
    if isinstance(grid, Float) and isinstance(job.storage.grid, Float) and grid != job.storage.grid:
        every = _all_rows(checkpoint, name, form.read(module, codes=False))
        return all(_same_again(checkpoint, job, storage, hint, rows) for rows in every)
    rows = form.read(module, 0, min(_PROBE_ROWS, checkpoint.scheme(name).shape[0]))
    return _same_again(checkpoint, job, storage, hint, rows)


def _same_again(checkpoint: Checkpoint, job: Job, storage: Storage, hint: Any, rows: Any) -> bool:
    import torch

    from qformats.reencode import finish, fit
    from qformats.rewrite import Refused

    assert job.storage is not None
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
        own_form = _own(job.format, held)
        made = fit(rows, held, ranges, seen, rounding=job.rounding, own=own_form, codes=ranges.codes)  # type: ignore[arg-type]
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
    grid, zeros = grid_from_json(data["grid"]), ZeroSigns.parse(data.get("zeros"))
    if zeros is not None and two_zeros(grid) is None:
        raise ValueError("no minus zeros")
    return Kept(data["params"], grid, storages[data["held"]], zeros)


def find_earlier(kept: Kept, job: Job, checkpoint: Checkpoint) -> Earlier | None:
    """The weight's earlier parameters, if what ``job`` reads is in every row what these became; else None. No signs for other zeros.

    ``BadFile('provenance')`` for planes that are damaged.
    """
    from qformats.tensor import QuantizedTensor

    assert job.storage is not None
    slab, ranges, shape = Slab(checkpoint), list(slabs(job, checkpoint, SCAN_WEIGHTS)), job.map.shape
    blank = [read_rows(job, slab, checkpoint, start, stop, codes=False) for start, stop in ranges]
    try:
        guesses = _joined([guess(_shaped(kept, rows.shape), rows) for rows in blank if isinstance(rows, QuantizedTensor)])
        earlier = revive(kept.params, shape, kept.grid, guesses)
    except Stale:
        return None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, QFormatError):
        hint = "name a type, as in awq:int4, to convert without it"
        raise BadFile("provenance", "the planes of the provenance record are damaged", hint=hint) from None
    plain, found = Earlier(earlier, kept.held), []
    for start, stop in ranges:
        rows = earlier_rows(job, plain, read_rows(job, slab, checkpoint, start, stop), start, stop, checkpoint.format)
        if rows is None:
            return None
        found.extend([] if kept.zeros is None else [zero_counts(rows)])
    if kept.zeros is None:
        return plain
    return replace(plain, zeros=kept.zeros.placed(found))


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
        if "grid" in data and not data["params"] and kind == "tile" and sizes[0] == 1 and len(sizes) == len(shape):
            block = Tile(tuple(sizes))
            codes = torch.zeros(block.counts(shape), dtype=torch.uint8)
            params[name] = Param(QuantizedTensor(block.counts(shape), codes, grid_from_json(data["grid"])), block)
    scales = tuple(params[name] for name in sorted(params) if name.startswith("scale"))
    codes = torch.zeros((1, 1), dtype=torch.uint8).expand(shape)
    made = QuantizedTensor(shape, codes, kept.grid, scales, params.get("zero_point"), params.get("offset"))
    if {name for name, _ in made.params()} != set(params):
        raise ValueError("planes of another form")
    return made


def _rows_of(t: Any, start: int, stop: int) -> Any:
    """Rows of a weight whose tall tiles stay tall where they begin with the rows."""
    import torch

    from qformats.rewrite import select_rows
    from qformats.scheme import Tile
    from qformats.tensor import Param

    def tall(param: Param | None) -> Param | None:
        if param is None or not isinstance(param.block, Tile) or not isinstance(param.values, torch.Tensor):
            return None
        rows = param.block.sizes[0]
        if not 1 < rows < t.shape[0] or start % rows:
            return None
        return replace(param, values=param.values[start // rows : -(-stop // rows)])

    found = select_rows(t, slice(start, stop))
    scales = tuple(tall(before) or after for before, after in zip(t.scales, found.scales, strict=True))
    return found.replace(scales=scales, zero_point=tall(t.zero_point) or found.zero_point, offset=tall(t.offset) or found.offset)


def earlier_rows(job: Job, earlier: Earlier, rows: Any, start: int, stop: int, source_format: str) -> Any:
    """Rows ``start:stop`` under the parameters they had, or None unless these become the very rows again."""
    from qformats.rewrite import Refused

    assert job.storage is not None
    whole, held = earlier.weight, earlier.held
    try:
        mine = whole if (start, stop) == (0, whole.shape[0]) else _rows_of(whole, start, stop)
    except Refused:
        return None

    def own(storage: Storage, scheme: Any) -> object:
        return registry.format_module(job.format if storage is job.storage else source_format).can_store(storage, scheme)

    found = restored(rows, mine, job.storage, held, own, own)
    return found if found is None or earlier.zeros is None else earlier.zeros.given_back(found, start)
