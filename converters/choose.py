"""Which type each target tensor gets: the one default rule (best kind, then smallest type), named types, and the scan that proves it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from converters.gguf_record import block_storage
from converters.jobs import Job
from converters.sources import SCAN_WEIGHTS, Slab, first_rows, in_source_order, read_rows, slabs
from qformats import registry
from qformats.architectures.mapping import TensorMap
from qformats.checkpoint import INTEGER_TYPES, Checkpoint
from qformats.errors import Unsupported, UsageError
from qformats.formats.protocol import PartInfo, Target
from qformats.reencode import KINDS, Fit, Hint, fit
from qformats.rewrite import Refused, block_range
from qformats.scheme import ParamSpec, Scheme, Storage

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["FLOAT_WORDS", "Chooser", "PlanOptions", "hint_rows"]

FLOAT_WORDS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_TORCH_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_MATRIX_KINDS = ("linear", "experts", "embedding", "output")
NEEDS_CONSENT = "needs --allow-requantize or a named type"
# llama.cpp's choices where a row is not whole super-blocks (src/llama-quant.cpp)
_FALLBACKS = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_SAFE_TYPE = "q8_0"  # where codes cannot be kept: relative error about 0.4 % of a block's largest weight


@dataclass(frozen=True)
class PlanOptions:
    """What the user asked for. ``tensor_types``: (regex, type name) pairs, the first that matches a target name wins."""

    target: Target
    exact: bool = False
    allow_requantize: bool = False
    tensor_types: tuple[tuple[str, str], ...] = ()
    pre_tokenizer: str | None = None
    header_only: bool = False

    def __post_init__(self) -> None:
        for pattern, _ in self.tensor_types:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError("tensor-type", f"{pattern!r} is not a regular expression: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """What a provenance record keeps."""
        return {
            "to": str(self.target),
            "exact": self.exact,
            "allow_requantize": self.allow_requantize,
            "tensor_types": [list(pair) for pair in self.tensor_types],
            "pre_tokenizer": self.pre_tokenizer,
        }


@dataclass
class Chooser:
    """Decides jobs for one checkpoint and target.

    ``storages_of``: storages from a provenance record by target module, ``hints`` likewise; ``dtypes``: float dtypes by target
    tensor name. ``blocks``: block types of target modules whose floats are such blocks, as a record says. ``float_default``: the
    2-byte dtype to prefer where the record is silent. ``orders``: absorbed act-orders.
    """

    checkpoint: Checkpoint
    options: PlanOptions
    float_default: str = "F16"
    storages_of: Mapping[str, Storage] = field(default_factory=dict)
    hints: Mapping[str, Hint] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)

    @cached_property
    def _has_codes(self) -> bool:
        return any(self.checkpoint.is_quantized(name) for name in self.checkpoint.modules)

    @property
    def _gguf(self) -> bool:
        return registry.row(self.options.target.format).container == "gguf"

    def decide(self, tensor: TensorMap) -> Job:
        """The job of one target tensor."""
        modules = [s.module for s in tensor.sources if s.module]
        quantized = [m for m in modules if self.checkpoint.is_quantized(m)]
        if quantized and any(s.transposed for s in tensor.sources):
            return self._transposed(tensor, quantized[0])
        if tensor.leaf == "weight" and quantized and len(quantized) == len(modules):
            return self._from_codes(tensor)
        if tensor.leaf == "weight" and quantized:
            return self._float(tensor, "F32", "dequantized", "its parts are stored in different ways")
        return self._from_floats(tensor)

    def _transposed(self, tensor: TensorMap, module: str) -> Job:
        """Codes whose inputs and outputs change places: no scale fits them any more."""
        named = self._named(tensor, dense=False)
        if self._gguf and named is not None and named not in FLOAT_WORDS:
            return self._quantize(tensor, named, "new codes: inputs and outputs change places")
        dtype, alike = FLOAT_WORDS.get(named or "", "F32"), all(self.checkpoint.is_quantized(s.module) for s in tensor.sources if s.module)
        lossless = alike and dtype == "F32" and _float32_exact(self.checkpoint.scheme(module))
        what = "every weight is a float32 number" if lossless else f"rounded once to {dtype}"
        return self._float(tensor, dtype, "dequantized", f"inputs and outputs change places; {what}", lossless)

    # ------------------------------------------------------------ named types

    def _named(self, tensor: TensorMap, dense: bool) -> str | None:
        """The type the user named for this tensor, or None for the default rule."""
        for pattern, name in self.options.tensor_types:
            if re.search(pattern, tensor.name) and (len(tensor.shape) > 1 or name.lower() in FLOAT_WORDS):
                return name.lower()
        kind = self.options.target.type
        if kind is None or tensor.kind not in _MATRIX_KINDS or len(tensor.shape) < 2:
            return None
        if not dense or kind in FLOAT_WORDS:
            return kind
        if self._has_codes and (self.checkpoint.gguf is None or not self._gguf):
            return None  # the dense rest of a quantized checkpoint stays dense
        if tensor.kind in ("embedding", "output"):
            return _SAFE_TYPE if self._gguf else None
        return kind

    def _target(self, kind: str | None) -> Target:
        target = self.options.target
        found = registry.row(target.format)
        if kind is not None and kind not in found.types and kind not in FLOAT_WORDS:
            raise UsageError("target-type", f"{target.format} has no type {kind!r}", hint=f"types: {', '.join(found.types)}")
        return replace(target, type=kind)

    # ------------------------------------------------------------ floats

    def _from_floats(self, tensor: TensorMap) -> Job:
        found = {self.checkpoint.modules[s.module].parts[s.leaf].dtype for s in tensor.sources if s.module} or {"F32"}
        kept = self._verbatim(tensor, found)
        if kept is not None:
            return kept
        named = self._named(tensor, dense=True)
        if named is not None and named not in FLOAT_WORDS:
            return self._quantize(tensor, named, "new codes from floats, as named")
        if self.options.target.format not in ("gguf", "hf") and named is None and self._quantize_by_default(tensor):
            job = self._quantize(tensor, self.options.target.type or "int4", "new codes from floats")
            ask = not self.options.allow_requantize and job.kind == "requantized"
            return replace(job, notes=(NEEDS_CONSENT,)) if ask else job
        again = self._blocks_again(tensor) if named is None else None
        if again is not None:
            return again
        dtype = self._float_dtype(tensor, found, named)
        if found == {dtype} and tensor.constant is None:
            plain = all(s.is_plain for s in tensor.sources) and len(tensor.sources) == 1 and not tensor.altered
            kind, why = ("copied", "the same bytes") if plain else ("exact", "rows in a new order")
            if tensor.altered:
                kind, why = self._float_kind(tensor, dtype)
            return self._job(tensor, "float" if tensor.altered else "copy", kind, why, dtype)
        if tensor.constant is not None:
            return self._job(tensor, "float", "exact", "computed from the configuration", dtype)
        kind, why = self._float_kind(tensor, dtype)
        return self._job(tensor, "float", kind, why, dtype)

    def _blocks_again(self, tensor: TensorMap) -> Job | None:
        """Floats that a record says were blocks, and that still are: every value is met again by rounding to nearest."""
        storage = block_storage(self.blocks[tensor.target]) if tensor.leaf == "weight" and tensor.target in self.blocks else None
        if storage is None or self.options.header_only or tensor.altered or self._misfit(tensor, storage):
            return None
        import torch

        from qformats.quantize import rtn

        probe, slab = self._job(tensor, "float", "exact", "", "F32"), Slab(self.checkpoint)
        for start, stop in slabs(probe, self.checkpoint):
            values = read_rows(probe, slab, self.checkpoint, start, stop)
            assert isinstance(values, torch.Tensor)
            if not torch.equal(rtn(values.to(torch.float32), storage).dequantize(), values.to(torch.float32)):
                return None
        parts = registry.format_module("gguf").layout(storage, tensor.shape)
        return Job(tensor, "quantize", "exact", "its floats are these blocks, as the record says", storage.type.upper(), parts, True, None,
                   storage, "gguf", orders=self._orders(tensor))  # fmt: skip

    def _verbatim(self, tensor: TensorMap, found: set[str]) -> Job | None:
        """Integers of a GGUF, and its F64 for another GGUF unless a type is named, copied byte by byte; None for any other tensor."""
        dtype = next(iter(found)) if len(found) == 1 else ""
        stays = dtype in INTEGER_TYPES or (dtype == "F64" and self._gguf and self._named(tensor, dense=True) is None)
        if self.checkpoint.gguf is None or not stays:
            return None
        source = tensor.sources[0]
        raw = self.checkpoint.modules[source.module].parts[source.leaf]
        if len(tensor.sources) > 1 or source.index is not None or raw.big_endian or raw.shape != tensor.shape or tensor.altered:
            return None
        return Job(tensor, "parts", "copied", "the same bytes", dtype, {tensor.leaf: PartInfo(dtype, tensor.shape)}, True, format="hf")

    def _quantize_by_default(self, tensor: TensorMap) -> bool:
        """A float checkpoint turned into an integer format: its linear layers."""
        is_matrix = tensor.kind in ("linear", "experts") and tensor.leaf == "weight" and len(tensor.shape) == 2
        return is_matrix and not self._has_codes

    def _float_dtype(self, tensor: TensorMap, found: set[str], named: str | None) -> str:
        if named is not None:
            return FLOAT_WORDS[named]
        source = next(iter(found)) if len(found) == 1 else "F32"
        if self._gguf:
            matrix = len(tensor.shape) >= 2 and tensor.kind in _MATRIX_KINDS
            return (source if source in ("F16", "BF16") else "F32") if matrix else "F32"
        wanted = self.dtypes.get(tensor.name)
        if wanted is not None:
            return wanted
        if self.options.target.type in FLOAT_WORDS:
            return FLOAT_WORDS[self.options.target.type]
        if source in ("F16", "BF16") and self.checkpoint.gguf is None and not tensor.altered:
            return source
        return self._smallest_exact(tensor, source)

    def _smallest_exact(self, tensor: TensorMap, source: str) -> str:
        order = [self.float_default, *(d for d in ("F16", "BF16") if d != self.float_default)]
        if source in order and not tensor.altered:
            return source
        if self.options.header_only:
            return "F32"
        for dtype in order:
            if self._is_exact(tensor, dtype):
                if len(tensor.shape) > 1:
                    self.float_default = dtype  # the rest of the model follows its first matrix where it can
                return dtype
        return "F32"

    def _is_exact(self, tensor: TensorMap, dtype: str) -> bool:
        import torch

        target = getattr(torch, _TORCH_WORDS[dtype])
        probe = self._job(tensor, "float", "exact", "", dtype)
        slab = Slab(self.checkpoint)
        for start, stop in slabs(probe, self.checkpoint):
            values = read_rows(probe, slab, self.checkpoint, start, stop)
            assert isinstance(values, torch.Tensor)
            exact = tensor.alter(values.to(torch.float64))
            if bool(((exact.to(torch.float32).to(target).to(torch.float64) != exact) & ~torch.isnan(exact)).any()):
                return False
        return True

    def _float_kind(self, tensor: TensorMap, dtype: str) -> tuple[str, str]:
        found = {self.checkpoint.modules[s.module].parts[s.leaf].dtype for s in tensor.sources if s.module}
        widening = all((a, dtype) in {("F16", "F32"), ("BF16", "F32")} or a == dtype for a in found)
        if widening and not tensor.altered:
            return "exact", f"{'/'.join(sorted(found))} values are {dtype} values"
        if not self.options.header_only and self._is_exact(tensor, dtype):
            return "exact", f"every value is a {dtype} number" + (f" after {tensor.altered}" if tensor.altered else "")
        return "dequantized", f"rounded once to {dtype}" + (f" after {tensor.altered}" if tensor.altered else "")

    def _float(self, tensor: TensorMap, dtype: str, kind: str, reason: str, lossless: bool = False) -> Job:
        return replace(self._job(tensor, "float", kind, reason, dtype), lossless=lossless)

    def _job(self, tensor: TensorMap, action: str, kind: str, reason: str, dtype: str) -> Job:
        part = {tensor.leaf: PartInfo(dtype, tensor.shape)}
        lossless = kind in ("copied", "exact")
        return Job(tensor, action, kind, reason, dtype, part, lossless, dtype, format="hf", orders=self._orders(tensor))

    def _orders(self, tensor: TensorMap) -> dict[str, np.ndarray[Any, Any]]:
        return {s.module: self.orders[s.module] for s in tensor.sources if s.module in self.orders}

    # ------------------------------------------------------------ codes

    def _scheme(self, tensor: TensorMap) -> Scheme:
        module = tensor.sources[0].module
        if module not in self.schemes:
            self.schemes[module] = self.checkpoint.scheme(module)
        return replace(self.schemes[module], shape=tensor.shape)

    def _from_codes(self, tensor: TensorMap) -> Job:
        named = self._named(tensor, dense=False)
        copied = self._same_bytes(tensor, named)
        if copied is not None:
            return copied
        target = self._target(named)
        row = registry.row(target.format)
        if row.name == "hf" or named in FLOAT_WORDS or self._must_be_float(tensor):
            return self._dequantize(tensor, named)
        module = registry.format_module(row.name)
        if getattr(module, "PACKED_EXPERTS", False) and tensor.kind != "experts":
            return self._dequantize(tensor, named)
        recorded = self.storages_of.get(tensor.target)
        storages = [recorded] if recorded is not None else module.storages(target, self._scheme(tensor))
        if named is not None and all(self._misfit(tensor, s) for s in storages):
            storages = module.storages(replace(target, type=None), self._scheme(tensor))  # whatever fits this shape best
        best, refusals = self._best(tensor, storages, row.name)
        if best is not None:
            return replace(best, notes=self._savings(tensor, best, storages))
        reason = "; ".join(f"{name}: {why}" for name, why in refusals.items())
        if named is not None or self.options.allow_requantize:
            return self._quantize(tensor, named or (_SAFE_TYPE if self._gguf else "int4"), reason)
        job = self._quantize(tensor, _SAFE_TYPE if self._gguf else "int4", reason)
        return replace(job, notes=(NEEDS_CONSENT,)) if job.kind == "requantized" else job

    def _same_bytes(self, tensor: TensorMap, named: str | None) -> Job | None:
        """A tensor that stays in its format, type and row order is copied part by part, unread."""
        source, target = tensor.sources[0], self.options.target
        module = self.checkpoint.modules[source.module]
        whole = len(tensor.sources) == 1 and source.is_plain and not self._orders(tensor) and tensor.leaf == "weight"
        if not whole or target.format != self.checkpoint.format or target.options or tensor.target in self.storages_of:
            return None
        own = {"weight", *registry.format_module(target.format).SUFFIXES}
        kept = {leaf: raw for leaf, raw in module.parts.items() if leaf in own}
        if any(raw.big_endian for raw in kept.values()) or (source.start, source.stop) != (0, _rows(tensor.shape)):
            return None
        if self._gguf:
            kind = module.parts["weight"].dtype
        else:
            kind = registry.format_module(target.format).storage_of(module).type
        if named is not None and named != kind.lower():
            return None
        parts = {leaf: PartInfo(raw.dtype, raw.shape) for leaf, raw in kept.items()}
        return Job(tensor, "parts", "copied", "the same bytes", kind, parts, True, format=target.format)

    @staticmethod
    def _misfit(tensor: TensorMap, storage: Storage) -> bool:
        return bool(tensor.shape[-1] % storage.k_multiple or tensor.shape[-2] % storage.n_multiple)

    def _must_be_float(self, tensor: TensorMap) -> bool:
        """Embedding and output of integer checkpoint formats stay floats unless the record says otherwise."""
        return not self._gguf and tensor.kind in ("embedding", "output") and tensor.target not in self.storages_of \
            and self.checkpoint.gguf is not None  # fmt: skip

    def _best(self, tensor: TensorMap, storages: Sequence[Storage], format_name: str) -> tuple[Job | None, dict[str, str]]:
        refusals: dict[str, str] = {}
        try:
            probe = None if self.options.header_only else self._probe(tensor)
        except Refused as refusal:
            return None, {"stacked": str(refusal)}
        for rounding in (False, True):
            for storage in sorted(storages, key=lambda s: s.bits_per_weight):
                try:
                    if probe is None:
                        found = self._claim(tensor, storage, rounding)
                    else:
                        seen = fit(probe[0], storage, probe[1], self._hint(tensor, probe[0].shape[0]), rounding=rounding)
                        found = self._scan(tensor, storage, seen, rounding)
                except Refused as refusal:
                    refusals[storage.type] = str(refusal)
                    continue
                except Unsupported as error:
                    refusals[storage.type] = error.message
                    continue
                return self._codes_job(tensor, storage, format_name, found, rounding), refusals
        return None, refusals

    def _probe(self, tensor: TensorMap) -> tuple[QuantizedTensor, _Ranges]:
        """The parameters of a few rows, to refuse on before whole ranges are read; their codes only if a rule asks."""
        job = Job(tensor, "codes", "", "", "", {}, False, orders=self._orders(tensor))
        slab, rows = Slab(self.checkpoint, ahead=False), first_rows(job)
        blank = read_rows(job, slab, self.checkpoint, 0, rows, codes=False)
        return blank, _Ranges(job, slab, self.checkpoint, 0, rows)  # type: ignore[return-value]

    def _hint(self, tensor: TensorMap, rows: int) -> Hint | None:
        return hint_rows(self.hints.get(tensor.target), 0, rows)

    def _codes_job(self, tensor: TensorMap, storage: Storage, format_name: str, found: Fit, rounding: bool) -> Job:
        parts = registry.format_module(format_name).layout(storage, tensor.shape)
        orders = self._orders(tensor)
        notes = (*(["absorb act-order into the producing rows"] if orders else []), *found.rewrites, *self._whole(tensor))
        hints = {tensor.target: self.hints[tensor.target]} if tensor.target in self.hints else {}
        return Job(tensor, "codes", found.kind, found.reason, storage.type.upper() if self._gguf else storage.type, parts,
                   found.kind == "exact", None, storage, format_name, notes, rounding, (), orders, hints)  # fmt: skip

    def _scan(self, tensor: TensorMap, storage: Storage, worst: Fit, rounding: bool) -> Fit:
        """Fit every row range; the worst kind stands for the tensor. ``Refused`` at the first range that does not fit.

        Once rounding is known to be needed (``worst``, from the probe), codes have no say any more and are not read.
        """
        probe = Job(tensor, "codes", "", "", "", {}, False, storage=storage, orders=self._orders(tensor))
        hint, slab = self.hints.get(tensor.target), Slab(self.checkpoint)
        if "values" in storage.options:  # the schemes said it all
            return worst
        if hint is None and worst.kind == "exact" and self._fits_whatever_it_holds(tensor, storage):
            return worst
        if hint is None or hint.zero_point is None:
            probe, _ = in_source_order(probe)  # no rule looks beyond a row
        for start, stop in slabs(probe, self.checkpoint, SCAN_WEIGHTS):
            blank = read_rows(probe, slab, self.checkpoint, start, stop, codes=False)
            if storage.offset is not None and worst.kind == "codes-exact" and _cannot_overflow(blank):  # type: ignore[arg-type]
                continue
            ranges = _Ranges(probe, slab, self.checkpoint, start, stop)
            found = fit(blank, storage, ranges, hint_rows(hint, start, stop), rounding=rounding)  # type: ignore[arg-type]
            if KINDS.index(found.kind) > KINDS.index(worst.kind):
                worst = found
        return worst

    def _fits_whatever_it_holds(self, tensor: TensorMap, storage: Storage) -> bool:
        """Whether the schemes alone prove ``exact``: every code around every zero point the source can store fits, and no scale rounds."""
        if storage.offset is not None or storage.sub_scale is not None or self._orders(tensor):
            return False
        for source in tensor.sources:
            scheme = self.checkpoint.scheme(source.module)
            claimed = scheme.zero_point is not None and scheme.zero_point.constant is not None
            if claimed or scheme.group_index or any(scale.dtype not in storage.scale_dtypes for scale in scheme.scales):
                return False
            try:
                if fit(_pessimist(scheme, ordered=False), storage).kind != "exact":
                    return False
            except Refused:
                return False
        return True

    def _claim(self, tensor: TensorMap, storage: Storage, rounding: bool) -> Fit:
        """What the header alone promises: the worst codes and zero points that the scheme allows."""
        scheme = self._scheme(tensor)
        if "values" in storage.options and registry.format_module(self.options.target.format).can_store(storage, scheme):
            reason = "claimed from the header: the same codes under the same scales"
            return Fit("exact", reason, (), scheme.shape[-1], None, None, storage.grid, None, None, None)  # type: ignore[arg-type]
        ordered = scheme.group_index and bool(self.checkpoint.match.config.get("desc_act"))
        found = fit(_pessimist(scheme, ordered), storage, rounding=rounding)
        condition = ", if the group index is trivial" if scheme.group_index else ""
        if scheme.zero_point is not None and scheme.zero_point.constant is not None:
            condition += f", if every zero point is {scheme.zero_point.constant:g} as the config says"
        return replace(found, reason=f"claimed from the header: {found.reason}{condition}")

    def _savings(self, tensor: TensorMap, best: Job, storages: Sequence[Storage]) -> tuple[str, ...]:
        """What a smaller type with a rounded offset would save."""
        if best.storage is None or not best.lossless or not self._gguf:
            return ()
        notes = []
        for storage in storages:
            fits = storage.offset and storage.grid.bits >= getattr(self._scheme(tensor).grid, "bits", 99)
            if fits and storage.bits_per_weight < best.storage.bits_per_weight:
                saved = int((best.storage.bits_per_weight - storage.bits_per_weight) * best.weights / 8)
                notes.append(f"{storage.type} would save {saved} bytes: codes kept, offsets rounded (relative 2^-11, absolute 2^-25)")
        return tuple(notes[:1])

    def _dequantize(self, tensor: TensorMap, named: str | None) -> Job:
        scheme = self._scheme(tensor)
        exact32 = _float32_exact(scheme)
        dtype = FLOAT_WORDS.get(named or "", "F32")
        exact = exact32 and dtype == "F32"
        reason = "every weight is a float32 number" if exact else f"rounded once to {dtype}"
        return self._float(tensor, dtype, "dequantized", reason, exact)

    # ------------------------------------------------------------ new codes

    def _quantize(self, tensor: TensorMap, kind: str, reason: str) -> Job:
        target = self._target(kind)
        module = registry.format_module(target.format)
        scheme = self._scheme(tensor) if self._is_code_source(tensor) else _float_scheme(tensor.shape)
        storage = module.storages(target, scheme)[0]
        if self._misfit(tensor, storage) and self._gguf and kind != _SAFE_TYPE:
            return self._quantize(tensor, _FALLBACKS.get(kind, _SAFE_TYPE), f"{tensor.shape[-1]} columns do not divide into {kind} blocks")
        if self._misfit(tensor, storage):
            codes = self._is_code_source(tensor)
            dtype = "F32" if codes else self._float_dtype(tensor, {"F16"}, None)
            lossless = codes and _float32_exact(self._scheme(tensor))
            why = f"{tensor.shape[-2]} x {tensor.shape[-1]} does not divide into blocks of {storage.type}"
            return self._float(tensor, dtype, "dequantized", why, lossless)
        parts = module.layout(storage, tensor.shape)
        name = storage.type.upper() if self._gguf else storage.type
        return Job(tensor, "quantize", "requantized", reason, name, parts, False, None, storage, target.format,
                   ("round to nearest", *self._whole(tensor)), orders=self._orders(tensor))  # fmt: skip

    def _whole(self, tensor: TensorMap) -> tuple[str, ...]:
        """What a plan says of the one step that holds a whole tensor: rows that move anywhere, into planes that are written by columns."""
        scattered = not self._gguf and any(s.period == 0 for s in tensor.sources)
        return ("the whole tensor is held in memory: its rows move throughout",) if scattered else ()

    def _is_code_source(self, tensor: TensorMap) -> bool:
        return any(s.module and self.checkpoint.is_quantized(s.module) for s in tensor.sources) and tensor.leaf == "weight"


class _Ranges:
    """Smallest and largest codes of runs, read from the file only when a rule asks."""

    def __init__(self, job: Job, slab: Slab, checkpoint: Checkpoint, start: int, stop: int) -> None:
        self._args = (job, slab, checkpoint, start, stop)
        self._tensor: QuantizedTensor | None = None
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, width: int) -> tuple[Tensor, Tensor]:
        if self._tensor is None:
            value = read_rows(*self._args)
            self._tensor = value  # type: ignore[assignment]
        if width not in self._known:
            assert self._tensor is not None
            self._known[width] = block_range(self._tensor, width)
        return self._known[width]


def _cannot_overflow(t: QuantizedTensor) -> bool:
    """Whether scale x (any integer a relabelling may use) stays below the largest fp16, and the form is plain."""
    import torch

    if len(t.scales) != 1 or not isinstance(t.scales[0].values, torch.Tensor) or t.scales[0].values.dtype != torch.float16:
        return False
    zero = t.zero_point
    if t.offset is not None or (zero is not None and (not isinstance(zero.values, torch.Tensor) or zero.values.dtype.is_floating_point)):
        return False
    return bool((t.scales[0].values.to(torch.float32).abs() <= 65504 / 512).all())


def hint_rows(hint: Hint | None, start: int, stop: int) -> Hint | None:
    if hint is None or hint.zero_point is None or len(hint.zero_point) == 1:
        return hint
    return Hint(hint.zero_point[start:stop], hint.positive)


def _float32_exact(scheme: Scheme) -> bool:
    """Whether scale x (code − zero point) always fits 24 significant bits and nothing is added."""
    bits = {"float16": 11, "bfloat16": 8, "float32": 24, "int8": 8, "uint8": 8, "int16": 16}
    total = getattr(scheme.grid, "bits", 9) + 1
    for scale in scheme.scales:
        spec: ParamSpec | None = scale
        while spec is not None and spec.nested is not None:
            total += getattr(spec.nested.grid, "bits", 8)
            spec = next(iter(spec.nested.scales), None)
        if spec is not None and not _power_of_two(spec.constant):
            total += bits.get(spec.dtype, 24)
    return scheme.offset is None and total <= 24


def _power_of_two(value: float | None) -> bool:
    from math import frexp

    return value is not None and abs(frexp(value)[0]) == 0.5


def _rows(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape[:-1]) if len(shape) > 1 else 1


def _float_scheme(shape: tuple[int, ...]) -> Scheme:
    from qformats.scheme import Integer

    return Scheme(shape, Integer(16, signed=True))


def _pessimist(scheme: Scheme, ordered: bool) -> QuantizedTensor:
    """A row for every zero point the grid can hold, each with the widest code range in every group."""
    import torch

    from qformats.scheme import Integer, Tile
    from qformats.tensor import Param, QuantizedTensor, constant

    if not isinstance(scheme.grid, Integer) or any(not isinstance(s.block, Tile) or s.nested for s in scheme.scales):
        raise Refused("the header does not tell")
    if ordered:
        raise Refused("the config speaks of act-order")
    k, group = scheme.shape[-1], scheme.group_size or scheme.shape[-1]
    known = None if scheme.zero_point is None else scheme.zero_point.constant
    rows = 1 if scheme.zero_point is None or known is not None else scheme.grid.highest + 2
    shape = (rows, k)
    codes = torch.full(shape, scheme.grid.highest, dtype=torch.int8 if scheme.grid.signed else torch.uint8)
    codes[:, ::2] = scheme.grid.lowest
    counts = (rows, -(-k // group))
    zero = None
    if scheme.zero_point is not None:
        plane = torch.arange(rows, dtype=torch.int16).unsqueeze(1).expand(counts).contiguous()
        zero = constant(int(known), shape) if known is not None else Param(plane, Tile((1, group)))
    dtype = getattr(torch, scheme.scales[0].dtype)
    scale = Param(torch.full(counts, 1.0009765625, dtype=dtype), Tile((1, group)))
    offset = None if scheme.offset is None else Param(torch.full(counts, 0.333, dtype=dtype), Tile((1, group)))
    return QuantizedTensor(shape, codes, scheme.grid, (scale,), zero, offset)


