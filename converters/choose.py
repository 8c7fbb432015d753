"""Which type each target tensor gets: the one default rule (best kind, then smallest type), and named types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from converters.activations import extra_job, scheme_of
from converters.choose_floats import float_dtype, float_kind
from converters.claims import float32_exact, float_scheme, row_count
from converters.facts import MATRIX_KINDS, Facts
from converters.fitting import best_fit, savings
from converters.gguf_record import block_storage
from converters.jobs import Job
from converters.kept_planes import find_earlier
from converters.merging import MergedCheckpoint, merged_into
from converters.options import FLOAT_WORDS, NEEDS_CONSENT, REFERENCE
from converters.sources import Slab, read_rows, slabs
from qformats import registry
from qformats.architectures.mapping import TensorMap
from qformats.checkpoint import FLOAT_TYPES, INTEGER_TYPES
from qformats.errors import QFormatError, Unsupported, UsageError
from qformats.formats.dense import FLOAT_DTYPES
from qformats.formats.ggml import mixes
from qformats.formats.protocol import PartInfo, Target
from qformats.scheme import Scheme, Storage

__all__ = ["IGNORED", "Chooser"]

IGNORED = "is not what the parameters in its provenance record became: they are ignored"
BETTER = "rounded with the least error found"
HALF_QUADRATIC = "zero points by half-quadratic splitting"
_SAFE_TYPE = "q8_0"  # where codes cannot be kept: relative error about 0.4 % of a block's largest weight


@dataclass
class Chooser(Facts):
    """Decides jobs for one checkpoint and target."""

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
            return extra_job(self.checkpoint, tensor, self.options.target.format)
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
            return self.float_job(tensor, "F32", "dequantized", "its parts are stored in different ways")
        return self._from_floats(tensor)

    def _with_content(self, job: Job) -> Job:
        """What a record holds of the parts that the format writes beside every weight."""
        written = getattr(registry.format_module(job.format), "WRITTEN", ()) if job.action in ("codes", "quantize") else ()
        known = {leaf: self.extras.get((job.map.target, leaf)) for leaf in written if leaf in job.parts}
        content = {leaf: e.data for leaf, e in known.items() if e is not None and e.data is not None and e.info == job.parts[leaf]}
        return replace(job, content=content) if content else job

    def _merged(self, tensor: TensorMap, checkpoint: MergedCheckpoint, names: tuple[str, ...]) -> Job:
        """New numbers, in the type that the tensor would have without the adapters."""
        assert checkpoint.base is not None
        plain = replace(self, checkpoint=checkpoint.base, orders=self.orders_before).decide(tensor)
        why = f"merged adapter{'s' if len(names) > 1 else ''} {', '.join(names)}"
        storage = plain.storage
        if plain.action == "parts" and plain.format == self.options.target.format and not self.to_gguf:
            storage = registry.format_module(plain.format).storage_of(checkpoint.base.modules[tensor.sources[0].module])
        if self.to_gguf and plain.dtype is None and plain.type not in (*FLOAT_TYPES, *INTEGER_TYPES):
            made = self._quantize(tensor, plain.type.lower(), why)
            return replace(made, reason=why if made.reason == why else f"{why}; {made.reason}", merged=names)
        if storage is not None:
            form = registry.format_module(plain.format)
            storage = form.renewed(storage) if hasattr(form, "renewed") else storage
            parts = form.layout(storage, tensor.shape)
            how, search = self._how(storage)
            return Job(tensor, "quantize", "requantized", why, storage.type, parts, False, None, storage, plain.format,
                       (how, *self.whole_in_memory(tensor)), orders=self.orders_of(tensor), merged=names, search=search)  # fmt: skip
        dtype = plain.type if plain.type in FLOAT_WORDS.values() else "F32"
        return replace(self.float_job(tensor, dtype, "dequantized", why), merged=names)

    def _transposed(self, tensor: TensorMap, module: str) -> Job:
        """Codes whose inputs and outputs change places: no scale fits them any more."""
        named = self._named(tensor, dense=False)
        if self.to_gguf and named is not None and named not in FLOAT_WORDS:
            return self._quantize(tensor, named, "new codes: inputs and outputs change places")
        dtype, alike = FLOAT_WORDS.get(named or "", "F32"), all(self.checkpoint.is_quantized(s.module) for s in tensor.sources if s.module)
        lossless = alike and dtype == "F32" and float32_exact(self.checkpoint.scheme(module))
        what = "every weight is a float32 number" if lossless else f"rounded once to {dtype}"
        return self.float_job(tensor, dtype, "dequantized", f"inputs and outputs change places; {what}", lossless)

    def with_model_dtype(self, tensors: Sequence[TensorMap]) -> Chooser:
        """The same with the dtype of the model's floats, told by its embedding, for a target that asks."""
        embedding = next((tensor for tensor in tensors if tensor.kind == "embedding" and tensor.leaf == "weight"), None)
        if embedding is None or not getattr(registry.format_module(self.options.target.format), "NEEDS_DTYPE", False):
            return self
        return replace(self, model_dtype=FLOAT_DTYPES.get(self.decide(embedding).type))

    def with_group(self, tensors: Sequence[TensorMap]) -> Chooser:
        """The same with the largest group that divides every linear layer, for a format whose own group does not and that has others."""
        target, module = self.options.target, registry.format_module(self.options.target.format)
        groups: Sequence[int] = getattr(module, "GROUPS", ())
        matrices = [t for t in tensors if t.kind in ("linear", "experts") and t.leaf == "weight" and len(t.shape) == 2]
        kind = target.type or self._default_type()
        if not groups or not matrices or kind in FLOAT_WORDS or target.options.keys() & {"group", "channel", "tensor", "block"}:
            return self

        def fits(wanted: Target) -> bool:
            try:
                return not any(self._misfit(t, module.storages(wanted, self._scheme_before(t))[0]) for t in matrices)
            except QFormatError:  # it is raised again where the tensor is decided
                return False

        asked = self._target(kind)
        if fits(asked):
            return self
        size = next((size for size in groups if fits(replace(asked, options={**asked.options, "group": str(size)}))), None)
        return self if size is None else replace(self, new_groups={kind: size})

    def _named(self, tensor: TensorMap, dense: bool) -> str | None:
        """The type the user named for this tensor, or None for the default rule."""
        if tensor.name in self.mix.types:
            return self.mix.types[tensor.name]
        mixed = self.mix.file_type is not None
        for pattern, name in self.options.tensor_types:
            matrix = len(tensor.shape) > 1 and not self.is_stack(tensor, name.lower())
            if re.search(pattern, tensor.name) and ((matrix and not mixed) or name.lower() in FLOAT_WORDS):
                return name.lower()
        kind = None if mixed else self.options.target.type
        if kind is None or tensor.kind not in MATRIX_KINDS or len(tensor.shape) < 2:
            return None
        if kind not in FLOAT_WORDS and self.is_stack(tensor, kind):
            return None
        if not dense or kind in FLOAT_WORDS:
            return kind
        if self.has_codes and (self.checkpoint.gguf is None or not self.to_gguf):
            return None  # the dense rest of a quantized checkpoint stays dense
        if tensor.kind in ("embedding", "output"):
            return _SAFE_TYPE if self.to_gguf else None
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
        if kind is not None and kind not in found.types and self.to_gguf and mixes.is_block_type(kind):
            raise Unsupported("no-quantizer", f"there is no quantizer for {kind}", hint=f"types: {', '.join(found.types)}")
        if kind is not None and kind not in found.types and kind not in FLOAT_WORDS:
            raise UsageError("target-type", f"{target.format} has no type {kind!r}", hint=f"types: {', '.join(found.types)}")
        return replace(target, type=kind, dtype=self.model_dtype, inputs=scheme_of(self.checkpoint))

    def _from_floats(self, tensor: TensorMap) -> Job:
        kept = self._verbatim(tensor, self._float_dtypes(tensor))
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
        return self._as_floats(tensor, named)

    def _float_dtypes(self, tensor: TensorMap) -> set[str]:
        return {self.checkpoint.modules[s.module].parts[s.leaf].dtype for s in tensor.sources if s.leaf} or {"F32"}

    def _as_floats(self, tensor: TensorMap, named: str | None) -> Job:
        """Floats that stay floats, in the dtype that is named or in the one they have."""
        found = self._float_dtypes(tensor)
        dtype = float_dtype(self, tensor, found, named)
        if found == {dtype} and tensor.constant is None:
            plain = all(s.is_plain for s in tensor.sources) and len(tensor.sources) == 1 and not tensor.altered
            kind, why = ("copied", "the same bytes") if plain else ("exact", "rows in a new order")
            if tensor.altered:
                kind, why = float_kind(self, tensor, dtype)
            return self.job(tensor, "float" if tensor.altered else "copy", kind, why, dtype)
        if tensor.constant is not None:
            return self.job(tensor, "float", "exact", "computed from the configuration", dtype)
        kind, why = float_kind(self, tensor, dtype)
        return self.job(tensor, "float", kind, why, dtype)

    def _blocks_again(self, tensor: TensorMap) -> Job | None:
        """Floats that a record says were blocks, and that still are: every value is met again by rounding to nearest."""
        storage = block_storage(self.blocks[tensor.target]) if tensor.leaf == "weight" and tensor.target in self.blocks else None
        if storage is None or self.options.header_only or tensor.altered or self._misfit(tensor, storage):
            return None
        import torch

        from qformats.quantize import rtn

        probe, slab = self.job(tensor, "float", "exact", "", "F32"), Slab(self.checkpoint)
        for start, stop in slabs(probe, self.checkpoint):
            values = read_rows(probe, slab, self.checkpoint, start, stop)
            assert isinstance(values, torch.Tensor)
            if not torch.equal(rtn(values.to(torch.float32), storage).dequantize(), values.to(torch.float32)):
                return None
        parts = registry.format_module("gguf").layout(storage, tensor.shape)
        return Job(tensor, "quantize", "exact", "its floats are these blocks, as the record says", storage.type.upper(), parts, True, None,
                   storage, "gguf", orders=self.orders_of(tensor))  # fmt: skip

    def _verbatim(self, tensor: TensorMap, found: set[str]) -> Job | None:
        """Integers of a GGUF, and its F64 for another GGUF unless a type is named, copied byte by byte; None for any other tensor."""
        dtype = next(iter(found)) if len(found) == 1 else ""
        stays = dtype in INTEGER_TYPES or (dtype == "F64" and self.to_gguf and self._named(tensor, dense=True) is None)
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
        return is_matrix and not self.has_codes

    def _from_codes(self, tensor: TensorMap) -> Job:
        named = self._named(tensor, dense=False)
        kept = self._same_bytes(tensor, named) or self._in_the_type_that_was_named(tensor)
        if kept is not None:
            return kept
        row = registry.row(self._target(named).format)
        if row.name == "hf" or named in FLOAT_WORDS or self._must_be_float(tensor, named):
            return self._dequantize(tensor, named)
        if getattr(registry.format_module(row.name), "PACKED_EXPERTS", False) and tensor.kind != "experts":
            return self._dequantize(tensor, named)
        again = self._as_it_was(tensor, row.name)
        if again is not None:
            return again
        storages = self._storages(tensor, named)
        found, refusals = best_fit(self, tensor, storages, row.name)
        if found is None and tensor.target in self.storages_of:
            storages = registry.format_module(row.name).storages(self._target(named), self.scheme(tensor))
            found, refusals = best_fit(self, tensor, storages, row.name)
        if found is not None:
            ignored = (IGNORED,) if tensor.target in self.kept and not self.options.header_only else ()
            return replace(found, notes=(*savings(self, tensor, found, storages), *ignored))
        reason = "; ".join(f"{name}: {why}" for name, why in refusals.items())
        job = self._quantize(tensor, named or self._new_type(), reason)
        if (named is not None and not self.mix.asks) or self.options.allow_requantize:
            return job
        return replace(job, notes=(NEEDS_CONSENT,)) if job.kind == "requantized" else job

    def _as_it_was(self, tensor: TensorMap, format_name: str) -> Job | None:
        """The codes under the parameters that a record has kept, where these are proven to have become the source's."""
        storage, kept = self.storages_of.get(tensor.target), self.kept.get(tensor.target)
        if storage is None or kept is None or self.options.header_only or len(tensor.shape) != 2 or self.orders_of(tensor):
            return None
        parts = registry.format_module(format_name).layout(storage, tensor.shape)
        kind = storage.type.upper() if self.to_gguf else storage.type
        reason = "codes kept; the parameters are those of the record, which the source's are the rounding of"
        job = Job(tensor, "codes", "codes-exact", reason, kind, parts, False, None, storage, format_name)
        earlier = find_earlier(kept, job, self.checkpoint)
        return None if earlier is None else replace(job, earlier=earlier)

    def _storages(self, tensor: TensorMap, named: str | None) -> list[Storage]:
        """The recorded storage, else those of the named type, else whatever fits this shape."""
        target, scheme = self._target(named), self.scheme(tensor)
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
        found = self._same_bytes(tensor, name) or best_fit(self, tensor, self._storages(tensor, name), "gguf", (False,))[0]
        return found if found is not None and found.kind in ("copied", "exact") else None

    def _same_bytes(self, tensor: TensorMap, named: str | None) -> Job | None:
        """A tensor that stays in its format, type and row order is copied part by part, unread."""
        source, target = tensor.sources[0], self.options.target
        module = self.checkpoint.modules[source.module]
        whole = len(tensor.sources) == 1 and source.is_plain and not self.orders_of(tensor) and tensor.leaf == "weight"
        as_it_is = not (target.options or self.checkpoint.match.options)  # read otherwise than labelled, bytes would be mislabelled again
        if not whole or target.format != self.checkpoint.format or not as_it_is or tensor.target in self.storages_of:
            return None
        form = registry.format_module(target.format)
        own = {"weight", *form.SUFFIXES, *getattr(form, "WRITTEN", ())}
        kept = {leaf: raw for leaf, raw in module.parts.items() if leaf in own}
        if any(raw.big_endian for raw in kept.values()) or (source.start, source.stop) != (0, row_count(tensor.shape)):
            return None
        if self.to_gguf:
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

    def _must_be_float(self, tensor: TensorMap, named: str | None) -> bool:
        """Stacks, and unless the record says otherwise embedding and output, are floats in integer checkpoint formats.

        From another checkpoint the output stays in codes, and the embedding where the loaders of the format take one.
        """
        ends = tensor.kind in ("embedding", "output") and self.checkpoint.gguf is not None
        ends |= self._is_embedding_of_floats(tensor)
        return self.is_stack(tensor, named) or (not self.to_gguf and ends and tensor.target not in self.storages_of)

    def _is_embedding_of_floats(self, tensor: TensorMap) -> bool:
        """An embedding that the target's loaders do not take in codes."""
        if tensor.kind != "embedding" or self.to_gguf or self.options.target.format == "hf":
            return False
        takes = getattr(registry.format_module(self.options.target.format), "embeddings", None)
        return takes is None or not takes(self.options.target, self.scheme(tensor))

    def _dequantize(self, tensor: TensorMap, named: str | None) -> Job:
        scheme = self.scheme(tensor)
        exact32 = float32_exact(scheme)
        dtype = FLOAT_WORDS.get(named or "", "F32")
        exact = exact32 and dtype == "F32"
        reason = "every weight is a float32 number" if exact else f"rounded once to {dtype}"
        if self._is_embedding_of_floats(tensor) and not named:
            reason = f"the loaders of {self.options.target.format} take no embedding in such codes; {reason}"
        if self.is_stack(tensor, named) and self.options.target.format != "hf":
            reason = f"stacked in one tensor, for which {self.options.target.format} has no codes; {reason}"
        return self.float_job(tensor, dtype, "dequantized", reason, exact)

    def _quantize(self, tensor: TensorMap, kind: str, reason: str) -> Job:
        target = self._target(kind or None)
        module = registry.format_module(target.format)
        scheme = self._scheme_before(tensor)
        if target.type is not None and target.type in self.new_groups:
            target = replace(target, options={**target.options, "group": str(self.new_groups[target.type])})
            reason += f"; groups of {target.options['group']}, which divide every width"
        try:
            storage = self._searchable(module.storages(target, scheme))
        except Unsupported as error:
            if error.code != "group-size" or "group" in target.options:
                raise
            return self._too_odd(tensor, error.message)
        before = self.storages_of.get(tensor.target)
        if before is not None and self.options.target.type is None and not self.options.target.options and before.type == storage.type:
            storage = before  # the group and the layout that the record says
        smaller = mixes.fallback(kind, tensor.shape[-1]) if self.to_gguf else kind
        if smaller != kind and smaller not in FLOAT_WORDS:
            return self._quantize(tensor, smaller, f"{tensor.shape[-1]} columns do not divide into {kind} blocks")
        if self._misfit(tensor, storage):
            return self._too_odd(tensor, f"{tensor.shape[-2]} x {tensor.shape[-1]} does not divide into blocks of {storage.type}")
        parts = module.layout(storage, tensor.shape)
        name = storage.type.upper() if self.to_gguf else storage.type
        how, search = self._how(storage)
        return Job(tensor, "quantize", "requantized", reason, name, parts, False, None, storage, target.format,
                   (how, *self.whole_in_memory(tensor)), orders=self.orders_of(tensor), search=search)  # fmt: skip

    def _too_odd(self, tensor: TensorMap, why: str) -> Job:
        """Floats where a type has no blocks for a weight's sizes."""
        if self.is_code_source(tensor):
            return self.float_job(tensor, "F32", "dequantized", why, float32_exact(self.scheme(tensor)))
        if self.to_gguf:
            return self.float_job(tensor, float_dtype(self, tensor, {"F16"}, None), "dequantized", why)
        job = self._as_floats(tensor, None)
        return replace(job, reason=f"{why}; {job.reason}")

    def _scheme_before(self, tensor: TensorMap) -> Scheme:
        return self.scheme(tensor) if self.is_code_source(tensor) else float_scheme(tensor.shape)

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

    def _new_type(self) -> str:
        """The type for new codes of a weight that no name is meant for, such as a router that the source has in codes."""
        asked = self.options.target.type
        return self._default_type() if self.to_gguf or asked is None or asked in FLOAT_WORDS else asked

    def _default_type(self) -> str:
        """The type for new codes where none is named: one of eight bits in a GGUF, the format's own default elsewhere."""
        return self.new_type or (_SAFE_TYPE if self.to_gguf else registry.row(self.options.target.format).default_type)
