"""Whether codes fit a storage as they are: claimed from headers, or proven by a scan of the parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from converters.claims import Ranges, cannot_overflow, check_rows, fractional, hint_rows, pessimist
from converters.facts import Facts
from converters.jobs import Job
from converters.sources import SCAN_WEIGHTS, Slab, first_rows, in_source_order, read_rows, slabs
from qformats import registry
from qformats.architectures.mapping import TensorMap
from qformats.errors import Unsupported
from qformats.reencode import KINDS, Fit, fit
from qformats.rewrite import Refused
from qformats.scheme import Integer, Storage

if TYPE_CHECKING:
    from qformats.tensor import QuantizedTensor

__all__ = ["best_fit", "savings"]


def best_fit(
    facts: Facts, tensor: TensorMap, storages: Sequence[Storage], format_name: str, roundings: Sequence[bool] = (False, True)
) -> tuple[Job | None, dict[str, str]]:
    """The job of the first storage, by size, that keeps the codes, at first without ``roundings``; why each other one does not, by type."""
    refusals: dict[str, str] = {}
    try:
        probe = None if facts.options.header_only else _probe(facts, tensor)
    except Refused as refusal:
        return None, {"stacked": str(refusal)}
    for rounding in roundings:
        for storage in sorted(storages, key=lambda s: s.bits_per_weight):
            try:
                check_rows(tensor.shape, storage)
                if probe is None:
                    found = _claim(facts, tensor, storage, rounding)
                else:
                    own = partial(registry.format_module(format_name).can_store, storage)
                    rows = probe[0].shape[0]
                    with _counting(tensor, 0, rows):
                        hint = facts.hint(tensor, rows)
                        seen = fit(probe[0], storage, probe[1], hint, rounding=rounding, own=own, codes=probe[1].codes)
                    seen = replace(seen, reason=_of_rows(seen.reason, tensor, 0, rows))
                    found = _scan(facts, tensor, storage, seen, rounding)
                return _codes_job(facts, tensor, storage, format_name, found, rounding), refusals
            except Refused as refusal:
                refusals[storage.type] = str(refusal)
            except Unsupported as error:
                refusals[storage.type] = error.message
    return None, refusals


def _probe(facts: Facts, tensor: TensorMap) -> tuple[QuantizedTensor, Ranges]:
    """The parameters of a few rows, to refuse on before whole ranges are read; their codes only if a rule asks."""
    job = Job(tensor, "codes", "", "", "", {}, False, orders=facts.orders_of(tensor))
    slab, rows = Slab(facts.checkpoint, ahead=False), first_rows(job)
    blank = read_rows(job, slab, facts.checkpoint, 0, rows, codes=False)
    return blank, Ranges(job, slab, facts.checkpoint, 0, rows)  # type: ignore[return-value]


def _codes_job(facts: Facts, tensor: TensorMap, storage: Storage, format_name: str, found: Fit, rounding: bool) -> Job:
    """The job that rewrites codes as ``found`` says."""
    parts = registry.format_module(format_name).layout(storage, tensor.shape)
    orders = facts.orders_of(tensor)
    notes = (*(["absorb act-order into the producing rows"] if orders else []), *found.rewrites, *facts.whole_in_memory(tensor))
    hints = {tensor.target: facts.hints[tensor.target]} if tensor.target in facts.hints else {}
    return Job(tensor, "codes", found.kind, found.reason, storage.type.upper() if facts.to_gguf else storage.type, parts,
               found.kind == "exact", None, storage, format_name, notes, rounding, (), orders, hints)  # fmt: skip


def _scan(facts: Facts, tensor: TensorMap, storage: Storage, worst: Fit, rounding: bool) -> Fit:
    """Fit every row range; the worst kind stands for the tensor. ``Refused`` at the first range that does not fit.

    Once rounding is known to be needed (``worst``, from the probe), codes have no say any more and are not read.
    """
    probe = Job(tensor, "codes", "", "", "", {}, False, storage=storage, orders=facts.orders_of(tensor))
    hint, slab = facts.hints.get(tensor.target), Slab(facts.checkpoint)
    if _in_its_own_form(facts, tensor, storage):  # the schemes say it all
        return worst
    if hint is None and worst.kind == "exact" and _fits_whatever_it_holds(facts, tensor, storage):
        return worst
    if hint is None or hint.zero_point is None:
        probe, _ = in_source_order(probe)  # no rule looks beyond a row
    for start, stop in slabs(probe, facts.checkpoint, SCAN_WEIGHTS):
        blank = read_rows(probe, slab, facts.checkpoint, start, stop, codes=False)
        if storage.offset is not None and worst.kind == "codes-exact" and cannot_overflow(blank):  # type: ignore[arg-type]
            continue
        ranges = Ranges(probe, slab, facts.checkpoint, start, stop)
        own = partial(registry.format_module(facts.options.target.format).can_store, storage)
        with _counting(tensor, start, stop):
            seen = hint_rows(hint, start, stop)
            found = fit(blank, storage, ranges, seen, rounding=rounding, own=own, codes=ranges.codes)  # type: ignore[arg-type]
        worse, all_of_it = KINDS.index(found.kind) - KINDS.index(worst.kind), stop - start == prod(tensor.shape[:-1])
        if worse > 0 or (worse == 0 and all_of_it):  # counts of all rows, where it was a count of the probe's
            worst = replace(found, reason=_of_rows(found.reason, tensor, start, stop))
    return worst


def _of_rows(text: str, tensor: TensorMap, start: int, stop: int) -> str:
    """A reason with how many rows its counts are of, where these are not all."""
    total = prod(tensor.shape[:-1])
    counts = stop - start < total and re.search(r"\b\d+ of \d+ ", text)
    return f"{text}, counted in {stop - start} of {total} rows" if counts else text


@contextmanager
def _counting(tensor: TensorMap, start: int, stop: int) -> Iterator[None]:
    """The same for what a refusal counts."""
    try:
        yield
    except Refused as refusal:
        raise Refused(_of_rows(str(refusal), tensor, start, stop)) from None


def _in_its_own_form(facts: Facts, tensor: TensorMap, storage: Storage) -> bool:
    """Whether codes of a table or a small float stand in the storage's very form already, scales included."""
    form = registry.format_module(facts.options.target.format)
    return not isinstance(storage.grid, Integer) and bool(form.can_store(storage, facts.scheme(tensor)))


def _fits_whatever_it_holds(facts: Facts, tensor: TensorMap, storage: Storage) -> bool:
    """Whether the schemes alone prove ``exact``: every code around every zero point the source can store fits, and no scale rounds."""
    if storage.offset is not None or storage.sub_scale is not None or facts.orders_of(tensor):
        return False
    for source in tensor.sources:
        scheme = facts.checkpoint.scheme(source.module)
        claimed = scheme.zero_point is not None and (scheme.zero_point.constant is not None or fractional(scheme.zero_point))
        if claimed or scheme.group_index or any(scale.dtype not in storage.scale_dtypes for scale in scheme.scales):
            return False
        try:
            if fit(pessimist(scheme, ordered=False), storage).kind != "exact":
                return False
        except Refused:
            return False
    return True


def _claim(facts: Facts, tensor: TensorMap, storage: Storage, rounding: bool) -> Fit:
    """What the header alone promises: the worst codes and zero points that the scheme allows."""
    scheme = facts.scheme(tensor)
    if _in_its_own_form(facts, tensor, storage):
        reason = "claimed from the header: the same codes under the same scales"
        return Fit("exact", reason, (), scheme.shape[-1], None, None, storage.grid, None, None, None)  # type: ignore[arg-type]
    ordered = scheme.group_index and bool(facts.checkpoint.match.config.get("desc_act"))
    found = fit(pessimist(scheme, ordered), storage, rounding=rounding)
    condition = ", if the group index is trivial" if scheme.group_index else ""
    if scheme.zero_point is not None and scheme.zero_point.constant is not None:
        condition += f", if every zero point is {scheme.zero_point.constant:g} as the config says"
    return replace(found, reason=f"claimed from the header: {found.reason}{condition}")


def savings(facts: Facts, tensor: TensorMap, best: Job, storages: Sequence[Storage]) -> tuple[str, ...]:
    """What a smaller type with a rounded offset would save."""
    if best.storage is None or not best.lossless or not facts.to_gguf:
        return ()
    notes = []
    for storage in storages:
        fits = storage.offset and storage.integers.bits >= getattr(facts.scheme(tensor).grid, "bits", 99)
        if fits and storage.bits_per_weight < best.storage.bits_per_weight:
            saved = int((best.storage.bits_per_weight - storage.bits_per_weight) * best.weights / 8)
            notes.append(f"{storage.type} would save {saved} bytes: codes kept, offsets rounded (relative 2^-11, absolute 2^-25)")
    return tuple(notes[:1])
