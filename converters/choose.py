"""Which type each target tensor gets: the one default rule (best kind, then smallest type), named types, and the scan that proves it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from converters.claims import Ranges, cannot_overflow, float32_exact, float_scheme, fractional, hint_rows, pessimist, row_count
from converters.gguf_record import block_storage
from converters.jobs import Job
from converters.kept_planes import Extra, find_earlier
from converters.merging import MergedCheckpoint, merged_into
from converters.mixing import NO_MIX, Mix
from converters.options import FLOAT_WORDS, NEEDS_CONSENT, REFERENCE, PlanOptions
from converters.planes import Kept
from converters.sources import SCAN_WEIGHTS, Slab, first_rows, in_source_order, read_rows, slabs
from qformats import registry
from qformats.architectures.mapping import TensorMap
from qformats.checkpoint import FLOAT_TYPES, INTEGER_TYPES, Checkpoint
from qformats.errors import Unsupported, UsageError
from qformats.formats.ggml import mixes
from qformats.formats.protocol import PartInfo, Target
from qformats.reencode import KINDS, Fit, Hint, fit
from qformats.rewrite import Refused
from qformats.scheme import Integer, Scheme, Storage

if TYPE_CHECKING:
    import numpy as np

    from qformats.tensor import QuantizedTensor

__all__ = ["IGNORED", "Chooser"]

_TORCH_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_MATRIX_KINDS = ("linear", "experts", "embedding", "output")
IGNORED = "is not what the parameters in its provenance record became: they are ignored"
BETTER = "rounded with the least error found"
HALF_QUADRATIC = "zero points by half-quadratic splitting"
_SAFE_TYPE = "q8_0"  # where codes cannot be kept: relative error about 0.4 % of a block's largest weight


@dataclass
class Chooser:
    """Decides jobs for one checkpoint and target.

    ``storages_of``: storages from a provenance record by target module, ``hints`` likewise; ``dtypes``: float dtypes by target
    tensor name. ``blocks``: block types of target modules whose floats are such blocks, as a record says. ``float_default``: the
    2-byte dtype to prefer where the record is silent. ``orders``: absorbed act-orders. ``mix``: types by llama.cpp's rules.
    ``orders_before``: act-orders that would be absorbed if no adapter were merged. ``kept``: parameters
    that a record gives back, ``extras`` its tensors that are no weights by module and leaf. ``new_type``: the type of new codes where
    none is named, if not the format's own default.
    """

    checkpoint: Checkpoint
    options: PlanOptions
    float_default: str = "F16"
    storages_of: Mapping[str, Storage] = field(default_factory=dict)
    hints: Mapping[str, Hint] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    mix: Mix = NO_MIX
    orders_before: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    kept: Mapping[str, Kept] = field(default_factory=dict)
    extras: Mapping[tuple[str, str], Extra] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    new_type: str = ""

    @cached_property
    def _has_codes(self) -> bool:
        return self.checkpoint.has_codes

    @property
    def _gguf(self) -> bool:
        return registry.row(self.options.target.format).container == "gguf"

    def decide(self, tensor: TensorMap) -> Job:
        """The job of one target tensor."""
        job = self._decide(tensor)
        if tensor.floats is None or job.storage is not None or job.action == "parts":
            return job
        return self._decide(tensor.floats)

    def _decide(self, tensor: TensorMap) -> Job:
        if tensor.kind == "extra" and not tensor.sources:
            extra = self.extras[tensor.target, tensor.leaf]
            why, content = "kept in the provenance record", {tensor.leaf: extra.data or b""}
            form = self.options.target.format
            return Job(tensor, "parts", "exact", why, extra.info.dtype, {tensor.leaf: extra.info}, True, format=form, content=content)
        if tensor.kind == "extra":
            raw = self.checkpoint.modules[tensor.target].parts[tensor.leaf]
            part = {tensor.leaf: PartInfo(raw.dtype, raw.shape)}
            return Job(tensor, "parts", "copied", "the same bytes", raw.dtype, part, True, format=self.checkpoint.format)
        if isinstance(self.checkpoint, MergedCheckpoint) and (names := merged_into(self.checkpoint, tensor)):
            return self._merged(tensor, self.checkpoint, names)
        modules = [s.module for s in tensor.sources if s.module]
        quantized = [m for m in modules if self.checkpoint.is_quantized(m)]
        if quantized and any(s.transposed for s in tensor.sources):
            return self._transposed(tensor, quantized[0])
        weight = all(s.leaf == "weight" for s in tensor.sources if s.module)
        if weight and quantized and len(quantized) == len(modules):
            return self._with_content(self._from_codes(tensor))
        if weight and quantized:
            return self._float(tensor, "F32", "dequantized", "its parts are stored in different ways")
        return self._from_floats(tensor)

    def _with_content(self, job: Job) -> Job:
        """What a record holds of the parts that the format writes beside every weight."""
        written = getattr(registry.format_module(job.format), "WRITTEN", ()) if job.action == "codes" else ()
        known = {leaf: self.extras.get((job.map.target, leaf)) for leaf in written if leaf in job.parts}
        content = {leaf: e.data for leaf, e in known.items() if e is not None and e.data is not None and e.info == job.parts[leaf]}
        return replace(job, content=content) if content else job

    def _merged(self, tensor: TensorMap, checkpoint: MergedCheckpoint, names: tuple[str, ...]) -> Job:
        """New numbers, in the type that the tensor would have without the adapters."""
        assert checkpoint.base is not None
        plain = replace(self, checkpoint=checkpoint.base, orders=self.orders_before).decide(tensor)
        why = f"merged adapter{'s' if len(names) > 1 else ''} {', '.join(names)}"
        storage = plain.storage
        if plain.action == "parts" and plain.format == self.options.target.format and not self._gguf:
            storage = registry.format_module(plain.format).storage_of(checkpoint.base.modules[tensor.sources[0].module])
        if self._gguf and plain.dtype is None and plain.type not in (*FLOAT_TYPES, *INTEGER_TYPES):
            made = self._quantize(tensor, plain.type.lower(), why)
            return replace(made, reason=why if made.reason == why else f"{why}; {made.reason}", merged=names)
        if storage is not None:
            parts = registry.format_module(plain.format).layout(storage, tensor.shape)
            how, search = self._how(storage)
            return Job(tensor, "quantize", "requantized", why, storage.type, parts, False, None, storage, plain.format,
                       (how, *self._whole(tensor)), orders=self._orders(tensor), merged=names, search=search)  # fmt: skip
        dtype = plain.type if plain.type in FLOAT_WORDS.values() else "F32"
        return replace(self._float(tensor, dtype, "dequantized", why), merged=names)

    def _transposed(self, tensor: TensorMap, module: str) -> Job:
        """Codes whose inputs and outputs change places: no scale fits them any more."""
        named = self._named(tensor, dense=False)
        if self._gguf and named is not None and named not in FLOAT_WORDS:
            return self._quantize(tensor, named, "new codes: inputs and outputs change places")
        dtype, alike = FLOAT_WORDS.get(named or "", "F32"), all(self.checkpoint.is_quantized(s.module) for s in tensor.sources if s.module)
        lossless = alike and dtype == "F32" and float32_exact(self.checkpoint.scheme(module))
        what = "every weight is a float32 number" if lossless else f"rounded once to {dtype}"
        return self._float(tensor, dtype, "dequantized", f"inputs and outputs change places; {what}", lossless)

    # ------------------------------------------------------------ named types

    def _named(self, tensor: TensorMap, dense: bool) -> str | None:
        """The type the user named for this tensor, or None for the default rule."""
        if tensor.name in self.mix.types:
            return self.mix.types[tensor.name]
        mixed = self.mix.file_type is not None
        for pattern, name in self.options.tensor_types:
            matrix = len(tensor.shape) > 1 and not self._is_stack(tensor)
            if re.search(pattern, tensor.name) and ((matrix and not mixed) or name.lower() in FLOAT_WORDS):
                return name.lower()
        kind = None if mixed else self.options.target.type
        if kind is None or tensor.kind not in _MATRIX_KINDS or len(tensor.shape) < 2:
            return None
        if kind not in FLOAT_WORDS and self._is_stack(tensor):
            return None
        if not dense or kind in FLOAT_WORDS:
            return kind
        if self._has_codes and (self.checkpoint.gguf is None or not self._gguf):
            return None  # the dense rest of a quantized checkpoint stays dense
        if tensor.kind in ("embedding", "output"):
            return _SAFE_TYPE if self._gguf else None
        return kind

    def _whose_choice(self) -> str:
        if self.options.max_error is not None:
            return f"in the smallest type with at most {self.options.max_error:g} of error"
        if self.options.target_size is not None:
            return f"in the best types for {self.options.target_size} bytes"
        return "as named" if self.mix.file_type is None else f"as {self.mix.file_type.name.upper()} has them"

    def _target(self, kind: str | None) -> Target:
        target = self.options.target
        found = registry.row(target.format)
        if kind is not None and kind not in found.types and self._gguf and mixes.is_block_type(kind):
            raise Unsupported("no-quantizer", f"there is no quantizer for {kind}", hint=f"types: {', '.join(found.types)}")
        if kind is not None and kind not in found.types and kind not in FLOAT_WORDS:
            raise UsageError("target-type", f"{target.format} has no type {kind!r}", hint=f"types: {', '.join(found.types)}")
        return replace(target, type=kind)

    # ------------------------------------------------------------ floats

    def _from_floats(self, tensor: TensorMap) -> Job:
        found = {self.checkpoint.modules[s.module].parts[s.leaf].dtype for s in tensor.sources if s.leaf} or {"F32"}
        kept = self._verbatim(tensor, found)
        if kept is not None:
            return kept
        named = self._named(tensor, dense=True)
        if named is not None and named not in FLOAT_WORDS:
            return self._quantize(tensor, named, f"new codes from floats, {self._whose_choice()}")
        if self.options.target.format not in ("gguf", "hf") and named is None and self._quantize_by_default(tensor):
            job = self._quantize(tensor, self.options.target.type or self._default_type(), "new codes from floats")
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
        if getattr(registry.format_module(self.options.target.format), "PACKED_EXPERTS", False):
            return tensor.kind == "experts" and tensor.leaf == "weight" and len(tensor.shape) == 3
        is_matrix = tensor.kind in ("linear", "experts") and tensor.leaf == "weight" and len(tensor.shape) == 2
        return is_matrix and not self._has_codes

    def _float_dtype(self, tensor: TensorMap, found: set[str], named: str | None) -> str:
        if named is not None:
            return FLOAT_WORDS[named]
        source = next(iter(found)) if len(found) == 1 else "F32"
        if self._gguf and named is None and self.mix.file_type is not None and self.checkpoint.gguf is not None and not tensor.altered:
            return source  # what llama.cpp does not quantize, it copies
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
        found = {self.checkpoint.modules[s.module].parts[s.leaf].dtype for s in tensor.sources if s.leaf}
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
        kept = self._same_bytes(tensor, named) or self._in_the_type_that_was_named(tensor)
        if kept is not None:
            return kept
        row = registry.row(self._target(named).format)
        if row.name == "hf" or named in FLOAT_WORDS or self._must_be_float(tensor):
            return self._dequantize(tensor, named)
        if getattr(registry.format_module(row.name), "PACKED_EXPERTS", False) and tensor.kind != "experts":
            return self._dequantize(tensor, named)
        again = self._as_it_was(tensor, row.name)
        if again is not None:
            return again
        storages = self._storages(tensor, named)
        best, refusals = self._best(tensor, storages, row.name)
        if best is None and tensor.target in self.storages_of:
            storages = registry.format_module(row.name).storages(self._target(named), self._scheme(tensor))
            best, refusals = self._best(tensor, storages, row.name)
        if best is not None:
            ignored = (IGNORED,) if tensor.target in self.kept and not self.options.header_only else ()
            return replace(best, notes=(*self._savings(tensor, best, storages), *ignored))
        reason = "; ".join(f"{name}: {why}" for name, why in refusals.items())
        if (named is not None and not self.mix.asks) or self.options.allow_requantize:
            return self._quantize(tensor, named or self._default_type(), reason)
        job = self._quantize(tensor, named or self._default_type(), reason)
        return replace(job, notes=(NEEDS_CONSENT,)) if job.kind == "requantized" else job

    def _as_it_was(self, tensor: TensorMap, format_name: str) -> Job | None:
        """The codes under the parameters that a record has kept, where these are proven to have become the source's."""
        storage, kept = self.storages_of.get(tensor.target), self.kept.get(tensor.target)
        if storage is None or kept is None or self.options.header_only or len(tensor.shape) != 2 or self._orders(tensor):
            return None
        parts = registry.format_module(format_name).layout(storage, tensor.shape)
        kind = storage.type.upper() if self._gguf else storage.type
        reason = "codes kept; the parameters are those of the record, which the source's are the rounding of"
        job = Job(tensor, "codes", "codes-exact", reason, kind, parts, False, None, storage, format_name)
        earlier = find_earlier(kept, job, self.checkpoint)
        return None if earlier is None else replace(job, earlier=(earlier, kept.held))

    def _storages(self, tensor: TensorMap, named: str | None) -> list[Storage]:
        """The recorded storage, else those of the named type, else whatever fits this shape."""
        target, scheme = self._target(named), self._scheme(tensor)
        module = registry.format_module(target.format)
        recorded = self.storages_of.get(tensor.target)
        storages: list[Storage] = [recorded] if recorded is not None else module.storages(target, scheme)
        if named is not None and all(self._misfit(tensor, s) for s in storages):
            storages = module.storages(replace(target, type=None), scheme)
        return storages

    def _in_the_type_that_was_named(self, tensor: TensorMap) -> Job | None:
        """Codes that the named block type holds exactly, whatever the file type of its name would make of the tensor."""
        name = self.mix.kept
        if name is None or name in FLOAT_WORDS or tensor.name not in self.mix.types or tensor.name in self.mix.overridden:
            return None
        found = self._same_bytes(tensor, name) or self._best(tensor, self._storages(tensor, name), "gguf", (False,))[0]
        return found if found is not None and found.kind in ("copied", "exact") else None

    def _same_bytes(self, tensor: TensorMap, named: str | None) -> Job | None:
        """A tensor that stays in its format, type and row order is copied part by part, unread."""
        source, target = tensor.sources[0], self.options.target
        module = self.checkpoint.modules[source.module]
        whole = len(tensor.sources) == 1 and source.is_plain and not self._orders(tensor) and tensor.leaf == "weight"
        as_it_is = not (target.options or self.checkpoint.match.options)  # read otherwise than labelled, bytes would be mislabelled again
        if not whole or target.format != self.checkpoint.format or not as_it_is or tensor.target in self.storages_of:
            return None
        form = registry.format_module(target.format)
        own = {"weight", *form.SUFFIXES, *getattr(form, "WRITTEN", ())}
        kept = {leaf: raw for leaf, raw in module.parts.items() if leaf in own}
        if any(raw.big_endian for raw in kept.values()) or (source.start, source.stop) != (0, row_count(tensor.shape)):
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
        """Stacks, and unless the record says otherwise embedding and output, are floats in integer checkpoint formats.

        From another checkpoint the output stays in codes, and the embedding where the format's owner has codes for one.
        """
        ends = tensor.kind in ("embedding", "output") and self.checkpoint.gguf is not None
        ends |= tensor.kind == "embedding" and not getattr(registry.format_module(self.options.target.format), "EMBEDDINGS", False)
        return self._is_stack(tensor) or (not self._gguf and ends and tensor.target not in self.storages_of)

    def _is_stack(self, tensor: TensorMap) -> bool:
        """Experts in one tensor, which no integer checkpoint format has codes for."""
        packs = getattr(registry.format_module(self.options.target.format), "PACKED_EXPERTS", False)
        return not self._gguf and not packs and len(tensor.shape) > 2

    def _best(
        self, tensor: TensorMap, storages: Sequence[Storage], format_name: str, roundings: Sequence[bool] = (False, True)
    ) -> tuple[Job | None, dict[str, str]]:
        refusals: dict[str, str] = {}
        try:
            probe = None if self.options.header_only else self._probe(tensor)
        except Refused as refusal:
            return None, {"stacked": str(refusal)}
        for rounding in roundings:
            for storage in sorted(storages, key=lambda s: s.bits_per_weight):
                try:
                    if probe is None:
                        found = self._claim(tensor, storage, rounding)
                    else:
                        own = partial(registry.format_module(format_name).can_store, storage)
                        seen = fit(probe[0], storage, probe[1], self._hint(tensor, probe[0].shape[0]), rounding=rounding, own=own)
                        found = self._scan(tensor, storage, seen, rounding)
                except Refused as refusal:
                    refusals[storage.type] = str(refusal)
                    continue
                except Unsupported as error:
                    refusals[storage.type] = error.message
                    continue
                return self._codes_job(tensor, storage, format_name, found, rounding), refusals
        return None, refusals

    def _probe(self, tensor: TensorMap) -> tuple[QuantizedTensor, Ranges]:
        """The parameters of a few rows, to refuse on before whole ranges are read; their codes only if a rule asks."""
        job = Job(tensor, "codes", "", "", "", {}, False, orders=self._orders(tensor))
        slab, rows = Slab(self.checkpoint, ahead=False), first_rows(job)
        blank = read_rows(job, slab, self.checkpoint, 0, rows, codes=False)
        return blank, Ranges(job, slab, self.checkpoint, 0, rows)  # type: ignore[return-value]

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
        if self._in_its_own_form(tensor, storage):  # the schemes say it all
            return worst
        if hint is None and worst.kind == "exact" and self._fits_whatever_it_holds(tensor, storage):
            return worst
        if hint is None or hint.zero_point is None:
            probe, _ = in_source_order(probe)  # no rule looks beyond a row
        for start, stop in slabs(probe, self.checkpoint, SCAN_WEIGHTS):
            blank = read_rows(probe, slab, self.checkpoint, start, stop, codes=False)
            if storage.offset is not None and worst.kind == "codes-exact" and cannot_overflow(blank):  # type: ignore[arg-type]
                continue
            ranges = Ranges(probe, slab, self.checkpoint, start, stop)
            own = partial(registry.format_module(self.options.target.format).can_store, storage)
            found = fit(blank, storage, ranges, hint_rows(hint, start, stop), rounding=rounding, own=own)  # type: ignore[arg-type]
            if KINDS.index(found.kind) > KINDS.index(worst.kind):
                worst = found
        return worst

    def _in_its_own_form(self, tensor: TensorMap, storage: Storage) -> bool:
        """Whether codes of a table or a small float stand in the storage's very form already, scales included."""
        form = registry.format_module(self.options.target.format)
        return not isinstance(storage.grid, Integer) and bool(form.can_store(storage, self._scheme(tensor)))

    def _fits_whatever_it_holds(self, tensor: TensorMap, storage: Storage) -> bool:
        """Whether the schemes alone prove ``exact``: every code around every zero point the source can store fits, and no scale rounds."""
        if storage.offset is not None or storage.sub_scale is not None or self._orders(tensor):
            return False
        for source in tensor.sources:
            scheme = self.checkpoint.scheme(source.module)
            claimed = scheme.zero_point is not None and (scheme.zero_point.constant is not None or fractional(scheme.zero_point))
            if claimed or scheme.group_index or any(scale.dtype not in storage.scale_dtypes for scale in scheme.scales):
                return False
            try:
                if fit(pessimist(scheme, ordered=False), storage).kind != "exact":
                    return False
            except Refused:
                return False
        return True

    def _claim(self, tensor: TensorMap, storage: Storage, rounding: bool) -> Fit:
        """What the header alone promises: the worst codes and zero points that the scheme allows."""
        scheme = self._scheme(tensor)
        if self._in_its_own_form(tensor, storage):
            reason = "claimed from the header: the same codes under the same scales"
            return Fit("exact", reason, (), scheme.shape[-1], None, None, storage.grid, None, None, None)  # type: ignore[arg-type]
        ordered = scheme.group_index and bool(self.checkpoint.match.config.get("desc_act"))
        found = fit(pessimist(scheme, ordered), storage, rounding=rounding)
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
            fits = storage.offset and storage.integers.bits >= getattr(self._scheme(tensor).grid, "bits", 99)
            if fits and storage.bits_per_weight < best.storage.bits_per_weight:
                saved = int((best.storage.bits_per_weight - storage.bits_per_weight) * best.weights / 8)
                notes.append(f"{storage.type} would save {saved} bytes: codes kept, offsets rounded (relative 2^-11, absolute 2^-25)")
        return tuple(notes[:1])

    def _dequantize(self, tensor: TensorMap, named: str | None) -> Job:
        scheme = self._scheme(tensor)
        exact32 = float32_exact(scheme)
        dtype = FLOAT_WORDS.get(named or "", "F32")
        exact = exact32 and dtype == "F32"
        reason = "every weight is a float32 number" if exact else f"rounded once to {dtype}"
        if self._is_stack(tensor) and self.options.target.format != "hf":
            reason = f"stacked in one tensor, for which {self.options.target.format} has no codes; {reason}"
        return self._float(tensor, dtype, "dequantized", reason, exact)

    # ------------------------------------------------------------ new codes

    def _quantize(self, tensor: TensorMap, kind: str, reason: str) -> Job:
        target = self._target(kind or None)
        module = registry.format_module(target.format)
        scheme = self._scheme(tensor) if self._is_code_source(tensor) else float_scheme(tensor.shape)
        storage = self._searchable(module.storages(target, scheme))
        smaller = mixes.fallback(kind, tensor.shape[-1]) if self._gguf else kind
        if smaller != kind and smaller not in FLOAT_WORDS:
            return self._quantize(tensor, smaller, f"{tensor.shape[-1]} columns do not divide into {kind} blocks")
        if self._misfit(tensor, storage):
            codes = self._is_code_source(tensor)
            dtype = "F32" if codes else self._float_dtype(tensor, {"F16"}, None)
            lossless = codes and float32_exact(self._scheme(tensor))
            why = f"{tensor.shape[-2]} x {tensor.shape[-1]} does not divide into blocks of {storage.type}"
            return self._float(tensor, dtype, "dequantized", why, lossless)
        parts = module.layout(storage, tensor.shape)
        name = storage.type.upper() if self._gguf else storage.type
        how, search = self._how(storage)
        return Job(tensor, "quantize", "requantized", reason, name, parts, False, None, storage, target.format,
                   (how, *self._whole(tensor)), orders=self._orders(tensor), search=search)  # fmt: skip

    def _searchable(self, storages: Sequence[Storage]) -> Storage:
        """The first storage; for HQQ's solver the first with an origin that it can move, where there is one."""
        from qformats.quantize import half_quadratic

        fitting = [storage for storage in storages if half_quadratic.fits(storage)] if self.options.search == "hqq" else []
        return (fitting or list(storages))[0]

    def _how(self, storage: Storage) -> tuple[str, str]:
        """What a plan says of how new codes are found, and the search that a job carries."""
        from qformats.quantize import improves

        search = self.options.search
        if not improves(storage, search):
            return "round to nearest", REFERENCE
        return BETTER if search == "best" else HALF_QUADRATIC, search

    def _whole(self, tensor: TensorMap) -> tuple[str, ...]:
        """What a plan says of the one step that holds a whole tensor: rows that move anywhere, into planes that are written by columns."""
        scattered = not self._gguf and any(s.period == 0 for s in tensor.sources)
        return ("the whole tensor is held in memory: its rows move throughout",) if scattered else ()

    def _default_type(self) -> str:
        """The type for new codes where none is named: one of eight bits in a GGUF, the format's own default elsewhere."""
        return self.new_type or (_SAFE_TYPE if self._gguf else registry.row(self.options.target.format).default_type)

    def _is_code_source(self, tensor: TensorMap) -> bool:
        coded = any(s.leaf == "weight" and self.checkpoint.is_quantized(s.module) for s in tensor.sources)
        return coded and not merged_into(self.checkpoint, tensor)
