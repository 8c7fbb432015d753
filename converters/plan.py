"""The plan of a conversion: every target tensor's sources, rewrites, type, kind, reason, size and place. Data, JSON in and out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters import absorb, activations, budget, files, provenance
from converters.choose import IGNORED, Chooser
from converters.facts import Facts
from converters.importances import with_importances
from converters.jobs import Job, storage_to_json
from converters.kept_planes import Extra, with_extras
from converters.mapping import map_tensors
from converters.merging import MergedCheckpoint, merge
from converters.mixing import Mix, meant, mix_of
from converters.options import NEEDS_CONSENT, PlanOptions
from converters.outputs import Output
from qformats import registry
from qformats.architectures.mapping import TensorMap
from qformats.checkpoint import Checkpoint, open_checkpoint
from qformats.errors import QFormatError, Unsupported, UsageError, WouldLose
from qformats.formats.ggml import mixes
from qformats.formats.protocol import Target
from qformats.reencode import KINDS, Hint
from qformats.scheme import Storage

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Plan", "make_plan", "refuse_losses"]

# formats whose loaders in transformers 5.23 dequantize single experts into the stack, and those that transformers does not load
_FROM_SINGLE_EXPERTS = ("gguf", "hf", "fp8", "mxfp4", "compressed-tensors", "mlx")


@dataclass(frozen=True)
class Plan:
    """``jobs`` in file order, ``output`` with every part's place, ``dropped`` source tensors with reasons, ``warnings``."""

    checkpoint: Checkpoint
    options: PlanOptions
    jobs: tuple[Job, ...]
    output: Output
    dropped: Mapping[str, str]
    warnings: tuple[str, ...]
    scanned: bool = True
    unsorted: Mapping[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, int]:
        """Number of tensors of each kind."""
        return {kind: count for kind in KINDS if (count := sum(j.kind == kind for j in self.jobs))}

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data: what ``qconvert plan --json`` prints and ``convert --plan`` takes."""
        return {
            "version": 1,
            "source": {"format": self.checkpoint.format, "container": self.checkpoint.container},
            "options": self.options.to_json(),
            "depth": "scan" if self.scanned else "header",
            "kinds": self.kinds,
            "nbytes": self.output.nbytes,
            "digest": provenance.plan_digest(self.jobs),
            "tensors": [self._tensor_json(job) for job in self.jobs],
            "dropped": dict(self.dropped),
            "warnings": list(self.warnings),
        }

    def _tensor_json(self, job: Job) -> dict[str, Any]:
        parts = {job.part_name(leaf): self.output.parts[job.part_name(leaf)] for leaf in job.parts}
        return {
            "name": job.name,
            "kind": job.kind,
            "lossless": job.lossless,
            "type": job.type,
            "reason": job.reason,
            "notes": list(job.notes),
            **({"merged": list(job.merged)} if job.merged else {}),
            "rewrites": list(job.rewrites),
            "shape": list(job.map.shape),
            "sources": [[s.module, s.leaf, s.start, s.stop] for s in job.map.sources],
            "storage": None if job.storage is None else storage_to_json(job.storage),
            "nbytes": sum(p.nbytes for p in parts.values()),
            "parts": {
                name: {"file": p.file, "offset": p.offset, "nbytes": p.nbytes, "dtype": p.info.dtype, "shape": list(p.info.shape)}
                for name, p in parts.items()
            },
        }


def make_plan(source: str | Path | Checkpoint, options: PlanOptions, *, allow_pickle: bool = False) -> Plan:
    """Plan a conversion; ``WouldLose`` is not raised here (see ``refuse_losses``), broken sources are."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, allow_pickle)
    try:
        checkpoint = checkpoint.read_as(dict(options.source_options)) if options.source_options else checkpoint
        return _plan(merge(checkpoint, options.lora), options)
    except QFormatError as error:
        if not isinstance(error, UsageError):
            error.locate(path=checkpoint.path)
        raise


def _plan(checkpoint: Checkpoint, options: PlanOptions) -> Plan:
    target = registry.row(options.target.format)
    if not target.writes:
        raise Unsupported("write", f"{target.name} cannot be written")
    if checkpoint.gguf is not None and not options.header_only:
        checkpoint.gguf.settle()
    restore = _restorable(checkpoint, options)
    recorded = {} if restore is None else restore.storages
    mapped = map_tensors(checkpoint, target.name, _stacking(checkpoint, options, recorded), recorded)
    if not options.header_only:
        checkpoint.check_extras()
    warnings = [*checkpoint.warnings, *([] if options.header_only else _module_warnings(checkpoint))]
    dropped = dict(mapped.dropped)
    warnings.extend(f"{name.removeprefix('config:')} {why}" for name, why in dropped.items() if name.startswith("config:"))
    indexed = restore is not None and any(storage.group_index for storage in restore.storages.values())
    orders, row_orders = ({}, {}) if indexed else _absorb(checkpoint, options, warnings)
    tensors = [absorb.apply_row_orders(t, row_orders) for t in mapped.tensors]
    unsorted: dict[str, Any] = {}
    extras: Sequence[Extra] = ()
    if restore is not None:
        tensors, unsorted = _restore_orders(tensors, restore)
        tensors, gone = with_extras(tensors, restore.extras, target.name)
        dropped, extras = {**dropped, **gone}, restore.extras or ()
    chooser = Chooser(
        checkpoint,
        options,
        _float_default(checkpoint, restore),
        storages_of={} if restore is None else restore.storages,
        hints={} if restore is None else _sorted_hints(restore.hints, unsorted),
        dtypes={} if restore is None else restore.dtypes,
        blocks={} if restore is None else restore.blocks,
        kept={} if restore is None else restore.kept,
        extras={(extra.module, extra.leaf): extra for extra in extras},
        orders=orders,
        orders_before=_orders_before(checkpoint, options),
        mix=mix_of(checkpoint, options, tensors, with_imatrix=options.imatrix is not None),
    )
    chooser = chooser.with_model_dtype(tensors).with_group(tensors)
    rest = _Rest(tensors, {**orders, **{f"rows:{name}": order for name, order in row_orders.items()}}, restore, dropped, warnings, unsorted)
    if options.max_error is not None:
        matrices = [tensor for tensor in tensors if budget.takes_part(chooser, tensor)]
        chooser = _in_types(chooser, budget.under_error(chooser, matrices, options.max_error))
    if options.target_size is not None:
        return _within(chooser, options.target_size, rest)
    return _assembled(chooser, rest)


def _stacking(
    checkpoint: Checkpoint, options: PlanOptions, recorded: Mapping[str, Storage]
) -> Callable[[TensorMap], bool] | None:
    """Which stacks of experts a target holds in codes, None where it holds none."""
    if not hasattr(registry.format_module(options.target.format), "stacks"):
        return None
    facts = Facts(checkpoint, options)
    return lambda stack: stack.target in recorded or facts.holds_stack(stack)


@dataclass(frozen=True)
class _Rest:
    """What a plan is made of beside the chooser."""

    tensors: Sequence[TensorMap]
    orders: Mapping[str, Any]
    restore: provenance.Restore | None
    dropped: Mapping[str, str]
    warnings: Sequence[str]
    unsorted: Mapping[str, Any]


def _assembled(chooser: Chooser, rest: _Rest) -> Plan:
    """Decide every tensor and lay the output out."""
    checkpoint, options = chooser.checkpoint, chooser.options
    jobs, told = with_importances(_decide_alike(chooser, rest.tensors), options, checkpoint)
    jobs = _harmonize(options.target.format, jobs)
    _, carried = files.quantization_config(checkpoint, options, jobs, rest.restore)
    jobs, gone, unsaid = activations.settled(checkpoint, options.target.format, jobs, carried)
    small = files.side_files(checkpoint, options, jobs, rest.restore)
    kept, lost = ({}, {}) if options.header_only else provenance.collect(checkpoint, jobs, rest.orders, small)
    jobs = [_with_lost(job, lost) for job in jobs]
    record = provenance.build(checkpoint, jobs, options.to_json(), kept)
    output = files.build_output(checkpoint, options, jobs, record, rest.restore, small)
    ignored = [f"{job.name} {IGNORED}" for job in jobs if IGNORED in job.notes]
    loaders = (*_single_experts(options.target.format, jobs), *_stacks(chooser, jobs), *_loading_warnings(options.target.format, jobs))
    warnings = (*rest.warnings, *told, *ignored, *unsaid, *_not_back(lost), *loaders)
    return Plan(checkpoint, options, tuple(jobs), output, {**rest.dropped, **gone}, warnings, not options.header_only, rest.unsorted)


def _single_experts(format_name: str, jobs: Sequence[Job]) -> list[str]:
    """transformers 5 keeps a layer's experts in one parameter; what fills it from single experts in codes is ``_FROM_SINGLE_EXPERTS``."""
    if format_name in _FROM_SINGLE_EXPERTS:
        return []
    singles = [job for job in jobs if ".experts." in job.name and job.map.leaf == "weight" and len(job.map.shape) == 2]
    found = [job.name for job in singles if job.storage or job.action == "parts"]
    if not found:
        return []
    text = f"{len(found)} experts, the first is {found[0]!r}, are written in codes one by one, as vLLM reads them"
    return [f"{text}; transformers 5 leaves such experts out and says so in its log only: load the model with qformats.load_model"]


def _stacks(chooser: Chooser, jobs: Sequence[Job]) -> list[str]:
    """Experts in one tensor that stay in floats beside codes, with the format's reason."""
    name = chooser.options.target.format
    found = [job.name for job in jobs if job.map.kind == "experts" and job.action in ("copy", "float") and chooser.is_stack(job.map)]
    if name == "hf" or not found:
        return []
    why = getattr(registry.format_module(name), "STACKS", f"{name} has no codes for experts in one tensor")
    return [f"{len(found)} stacks of experts, the first is {found[0]!r}, stay in floats: {why}"]


def _loading_warnings(format_name: str, jobs: Sequence[Job]) -> list[str]:
    """What a format has to say of the loaders of new weights."""
    say = getattr(registry.format_module(format_name), "loading_warnings", None)
    storages = {job.map.target: job.storage for job in jobs if job.storage is not None}
    return [] if say is None or not storages else list(say(storages))


def _with_lost(job: Job, lost: Mapping[str, str]) -> Job:
    """The job with a note where a conversion back would not give its source's bytes again."""
    names = [s.module for s in job.map.sources if s.leaf == "weight" and s.module in lost]
    why = lost[names[0]] if names and job.action == "codes" else None
    return job if why is None else replace(job, notes=(*job.notes, f"will not come back bit for bit: {why}"))


def _not_back(lost: Mapping[str, str]) -> list[str]:
    """One line for all weights that share a reason."""
    by_why: dict[str, list[str]] = {}
    for name, why in lost.items():
        by_why.setdefault(why, []).append(name)
    return [f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} will not come back bit for bit: {why}"
            for why, names in by_why.items()]  # fmt: skip


def _in_types(chooser: Chooser, types: Mapping[str, str]) -> Chooser:
    return replace(chooser, mix=Mix(types={**chooser.mix.types, **types}))


def _within(chooser: Chooser, nbytes: int, rest: _Rest) -> Plan:
    """The plan with the best types for a file of at most ``nbytes``: what is left for the matrices is known once the rest is laid out."""
    matrices = [tensor for tensor in rest.tensors if budget.takes_part(chooser, tensor)]
    frontiers = budget.Frontiers.of(chooser, matrices)
    points = {name: hull[0] for name, hull in frontiers.hulls.items()}
    for _ in range(8):  # padding depends on the types, by a few bytes a tensor
        plan = _assembled(_in_types(chooser, {name: point.type for name, point in points.items()}), rest)
        left = nbytes - plan.output.nbytes + sum(point.nbytes for point in points.values())
        chosen = frontiers.within(left)
        if chosen == points and plan.output.nbytes <= nbytes:
            return plan
        points = chosen
    while plan.output.nbytes > nbytes:
        left -= plan.output.nbytes - nbytes
        points = frontiers.within(left)
        plan = _assembled(_in_types(chooser, {name: point.type for name, point in points.items()}), rest)
    return plan


def _module_warnings(checkpoint: Checkpoint) -> list[str]:
    """What a format has to say of single modules, one line for all that share a story."""
    told: dict[str, list[str]] = {}
    for name, module in checkpoint.modules.items():
        say = getattr(registry.format_module(module.match.format), "module_warnings", None) if checkpoint.is_quantized(name) else None
        for text in () if say is None else say(module):
            told.setdefault(text, []).append(name)
    return [f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {text}" for text, names in told.items()]


def _restorable(checkpoint: Checkpoint, options: PlanOptions) -> provenance.Restore | None:
    """The record's help, where the target is the format it speaks of and nothing else was asked for."""
    named = options.target.options or options.target.type or options.output_tensor_type or options.token_embedding_type
    if named or not provenance.speaks_of(checkpoint, options.target.format):
        return None
    return provenance.read_restore(checkpoint)


def _absorb(checkpoint: Checkpoint, options: PlanOptions, warnings: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Act-order modules that the target cannot hold: absorb what can be, name the rest."""
    if checkpoint.format != "hf" and checkpoint.gguf is None and not options.header_only:
        modules = absorb.act_order_modules(checkpoint)
        if modules and not _keeps_index(checkpoint, options, next(iter(modules))):
            columns, rows, refused = absorb.find_orders(checkpoint, modules)
            warnings.extend(f"{name}: {why}" for name, why in refused.items())
            return columns, rows
    return {}, {}


def _orders_before(checkpoint: Checkpoint, options: PlanOptions) -> dict[str, Any]:
    """The act-orders that would be absorbed without the adapters that are merged in."""
    if not isinstance(checkpoint, MergedCheckpoint) or checkpoint.base is None:
        return {}
    columns, _ = _absorb(checkpoint.base, options, [])
    return columns


def _keeps_index(checkpoint: Checkpoint, options: PlanOptions, module: str) -> bool:
    row = registry.row(options.target.format)
    if row.name == "hf":
        return True  # weights are dequantized in their own column order
    kind = options.target.type if options.target.type in row.types else None  # a file type is none of a tensor
    target = Target(row.name, None if kind in ("f32", "f16", "bf16") else kind, options.target.options)
    return any(s.group_index for s in registry.format_module(row.name).storages(target, checkpoint.scheme(module)))


def _restore_orders(tensors: Sequence[Any], restore: provenance.Restore) -> tuple[list[Any], dict[str, Any]]:
    """Undo the absorption a record speaks of: producers' rows back, consumers' columns back under their group index."""
    import numpy as np

    rows = {name.removeprefix("rows:"): order for name, order in restore.orders.items() if name.startswith("rows:")}
    columns = {name: order for name, order in restore.orders.items() if not name.startswith("rows:")}
    groups = {name: np.asarray(index) for name, index in restore.group_indices.items()}
    return [absorb.invert_rows(t, rows) for t in tensors], {name: (columns[name], groups[name]) for name in columns if name in groups}


def _sorted_hints(hints: Mapping[str, Hint], unsorted: Mapping[str, Any]) -> dict[str, Hint]:
    """Zero points of an absorbed module in the order its groups have now."""
    import torch

    result = dict(hints)
    for name, (order, index) in unsorted.items():
        hint = hints.get(name)
        if hint is None or hint.zero_point is None:
            continue
        size = -(-len(order) // hint.zero_point.shape[1])
        result[name] = Hint(hint.zero_point[:, torch.from_numpy(index[order][::size]).long()], hint.positive)
    return result


def _float_default(checkpoint: Checkpoint, restore: provenance.Restore | None) -> str:
    config: Mapping[str, Any] = checkpoint.config
    if restore is not None and "config.json" in restore.files:
        try:
            config = json.loads(restore.files["config.json"])
        except ValueError:
            config = {}
    word = str(config.get("dtype") or config.get("torch_dtype") or "")
    return "BF16" if word == "bfloat16" else "F16"


def _harmonize(format_name: str, jobs: list[Job]) -> list[Job]:
    """Let a format settle what is stated once for a whole checkpoint (GPTQ's zero-point label)."""
    settle = getattr(registry.format_module(format_name), "harmonize", None)
    storages = {j.map.target: j.storage for j in jobs if j.storage is not None}
    if settle is None or not storages:
        return jobs
    settled = settle(storages)
    return [j if j.storage is None else _settled(j, settled[j.map.target]) for j in jobs]


def _settled(job: Job, storage: Storage) -> Job:
    if storage == job.storage:
        return job
    parts = registry.format_module(job.format).layout(storage, job.map.shape)
    return replace(job, storage=storage, parts=parts, type=storage.type)


def _decide_alike(chooser: Chooser, tensors: Sequence[Any]) -> list[Job]:
    """Decide all jobs; where a checkpoint has one type alone, new codes are like those of the other weights, that were kept if any were."""
    jobs, target = _decide(chooser, tensors), chooser.options.target
    if not getattr(registry.format_module(target.format), "ONE_TYPE", False):
        return jobs
    kept = [job for job in jobs if job.storage is not None and job.kind != "requantized"]
    types = {job.type for job in kept} | {job.type for job in jobs if job.action == "parts" and job.map.leaf == "weight"}
    made = {job.type for job in jobs if job.kind == "requantized"}
    other_type = target.type is None and len(types) == 1 and bool(made - types)
    groups = {job.storage.group for job in jobs if job.storage is not None}
    sizes = [job.storage.group for job in kept or jobs if job.storage is not None and job.storage.group]
    other_group = "group" in registry.row(target.format).options and "group" not in target.options and len(groups) > 1 and bool(sizes)
    if not other_type and not other_group:
        return jobs
    options = _with_option(chooser.options, "group", str(min(sizes))) if other_group else chooser.options
    return _decide(replace(chooser, options=options, new_type=next(iter(types)) if other_type else ""), tensors)


_GROUPS = ("128", "64", "32")


def _decide(chooser: Chooser, tensors: Sequence[Any]) -> list[Job]:
    """Decide all jobs; for an integer target without a group size, the largest group that keeps every tensor."""
    target = chooser.options.target
    row = registry.row(target.format)
    free = "group" in row.options and "group" not in target.options and not chooser.storages_of
    if not free or chooser.checkpoint.gguf is None:
        return _decide_together(chooser, tensors)
    asked = chooser.options
    for group in (*_GROUPS, ""):  # the last: whatever the format offers
        chooser.options = _with_option(asked, "group", group) if group else asked
        jobs = _kept(chooser, tensors)
        if jobs is not None:
            return jobs
    chooser.options = _with_option(asked, "group", _GROUPS[-1])
    try:
        return _decide_together(chooser, tensors)
    except UsageError:  # a type that has one group alone
        chooser.options = asked
        return _decide_together(chooser, tensors)


def _kept(chooser: Chooser, tensors: Sequence[Any]) -> list[Job] | None:
    """All jobs, or None as soon as one needs new codes or the format does not take the option."""
    jobs: list[Job] = []
    try:
        for tensor in tensors:
            jobs.append(chooser.decide(tensor))
            if _is_kept_badly(jobs[-1], chooser.options):
                return None
    except (Unsupported, UsageError):
        return None
    return jobs


def _is_kept_badly(job: Job, options: PlanOptions) -> bool:
    """Whether a smaller group may do better: new codes, or none because rows are no whole groups."""
    matrix = job.map.kind == "linear" and job.map.leaf == "weight" and len(job.map.shape) == 2
    return job.kind == "requantized" or (matrix and job.kind == "dequantized" and not options.tensor_types)


def _decide_together(chooser: Chooser, tensors: Sequence[Any]) -> list[Job]:
    """Decide tensors of codes side by side, which do not depend on each other; floats in order, which may follow the first matrix."""
    import torch

    coded = [t for t in tensors if t.leaf == "weight" and any(s.module and chooser.checkpoint.is_quantized(s.module) for s in t.sources)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            started = {t.name: pool.submit(chooser.decide, t) for t in coded}
            return [started[t.name].result() if t.name in started else chooser.decide(t) for t in tensors]
    finally:
        torch.set_num_threads(threads)


def _with_option(options: PlanOptions, key: str, value: str) -> PlanOptions:
    return replace(options, target=Target(options.target.format, options.target.type, {**options.target.options, key: value}))


def refuse_losses(plan: Plan) -> None:
    """Stop before anything is written: ``--exact`` allows no loss, and new codes need consent (``WouldLose``).

    ``Unsupported('importance-needed')`` for types that cannot be made as planned without an importance matrix.
    """
    _refuse_blind(plan)
    if plan.options.exact:
        offenders = [j for j in plan.jobs if not j.lossless]
        if offenders:
            raise _loss("not-exact", "cannot be kept exactly", offenders, "drop --exact, or see `qconvert plan` for what would fit")
    asking = [j for j in plan.jobs if NEEDS_CONSENT in j.notes]
    if asking:
        raise _loss("requantize", "would need new codes", asking, "add --allow-requantize, or name a type such as gguf:q8_0 or gguf:f16")


def _refuse_blind(plan: Plan) -> None:
    """File types with so few bits that llama.cpp does not make them blindly."""
    kind = meant(plan.checkpoint, plan.options)
    blind = [job for job in plan.jobs if job.action == "quantize" and job.kind == "requantized" and job.importance is None]
    needy = [job for job in blind if kind is not None and mixes.requires_imatrix(job.name, job.type.lower(), kind)]
    if needy:
        names = ", ".join(f"{job.name} ({job.type})" for job in needy[:5]) + (f" and {len(needy) - 5} more" if len(needy) > 5 else "")
        hint = "give an importance matrix (`qconvert imatrix` computes one), or choose a larger type"
        raise Unsupported("importance-needed", f"{len(needy)} tensors cannot be made without an importance matrix: {names}", hint=hint)


def _loss(code: str, what: str, jobs: Sequence[Job], hint: str) -> QFormatError:
    table = "; ".join(f"{j.name} ({j.kind}): {j.reason}" for j in jobs[:20])
    more = f"; and {len(jobs) - 20} more" if len(jobs) > 20 else ""
    return WouldLose(code, f"{len(jobs)} tensors {what}: {table}{more}", hint=hint)
