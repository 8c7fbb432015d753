"""State dicts by the source's names: a packed module's entries are the tensors that its format stores, under the model's module names.

``q_proj.qweight``, ``q_proj.weight.absmax``, ``experts.3.gate_proj.scales``; a GGUF's blocks are ``q_proj.weight``, bytes of each row. The
planes themselves bear the names of ``qformats.kernels.layout`` and are the entries while a model is being loaded or dispatched, and of
modules that come of no checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qformats import registry
from qformats.containers.raw import RawTensor
from qformats.containers.source import MemorySource
from qformats.containers.torch_zip import DTYPES
from qformats.errors import QFormatError, Unsupported

if TYPE_CHECKING:
    from qformats.formats.protocol import Module
    from qformats.kernels.lower import Lowered
    from qformats.runtime.packed import Packed
    from qformats.runtime.record import Record

__all__ = ["Source", "Span", "attach", "fill"]

_TORCH = {word: name for name, (word, _) in DTYPES.items()}


@dataclass(frozen=True)
class Span:
    """Rows ``start:stop`` of a packed module: the stored module ``stored``, which is ``own`` in the model.

    ``shape``: of the weight as floats.
    """

    stored: str
    own: str
    start: int
    stop: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """What a packed module called ``place`` is in the checkpoint."""

    record: Record
    place: str
    spans: tuple[Span, ...]

    def __deepcopy__(self, memo: object) -> Source:
        return self  # nothing in it changes

    def keys(self, prefix: str, span: Span) -> dict[str, str]:
        """Of a span, the leaf of each stored tensor → its name in a state dict where the module's own entries begin with ``prefix``."""
        kind = self.record.checkpoint.format
        leaves = self.leaves(span)
        if prefix == f"{self.place}." or prefix.endswith(f".{self.place}."):
            start = prefix[: len(prefix) - len(self.place) - 1]
            return {leaf: start + registry.join_name(kind, span.own, leaf) for leaf in leaves}
        inner = "" if len(self.spans) == 1 else f"{span.own}."
        return {leaf: f"{prefix}{inner}{leaf}" for leaf in leaves}

    def leaves(self, span: Span) -> Mapping[str, RawTensor]:
        """The stored tensors that make the weight, by leaf, with their dtypes and shapes."""
        if self.record.checkpoint.gguf is not None:
            return {"weight": self._blocks(span)}
        module = self.record.checkpoint.modules[span.stored]
        own = {*registry.format_module(module.match.format).SUFFIXES, "weight"}
        extras = self.record.checkpoint.extras
        return {leaf: raw for leaf, raw in module.parts.items() if leaf in own and (span.stored, leaf) not in extras}

    def _blocks(self, span: Span) -> RawTensor:
        """A GGUF tensor of the type that the span is stored in, with the span's rows in the model's order."""
        (first, *_) = self.record.rows_of[span.stored].sources
        stored = self.record.checkpoint.modules[first.module].parts["weight"]
        return replace(stored, shape=span.shape, nbytes=stored.row_nbytes * prod(span.shape[:-1]))

    # ------------------------------------------------------------ writing

    def tensors(self, packed: Packed, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The entries of a state dict."""
        for span in self.spans:
            parts = self._written(packed, span)
            for leaf, key in self.keys(prefix, span).items():
                raw = self.leaves(span)[leaf]
                yield key, _tensor(parts[leaf], raw)

    def _written(self, packed: Packed, span: Span) -> Mapping[str, bytes | memoryview]:
        from qformats.runtime.saving import written

        leaves, kept = self.leaves(span), self.record.kept
        if all(raw.name in kept for raw in leaves.values()):  # a layout that is only read
            return {leaf: kept[raw.name] for leaf, raw in leaves.items()}
        rows = packed.rows(span.start, span.stop)
        if self.record.checkpoint.gguf is not None:
            (first, *_) = self.record.rows_of[span.stored].sources
            sizes = {leaf: raw.nbytes for leaf, raw in leaves.items()}
            return written("gguf", self.record.storages[first.module], rows, span.shape, sizes)
        module = self.record.checkpoint.modules[span.stored]
        found = written(module.match.format, packed.storage_now(span.stored, self.record.storages[span.stored]), rows, span.shape)
        return {**{leaf: kept[raw.name] for leaf, raw in leaves.items() if raw.name in kept}, **found}

    # ------------------------------------------------------------ reading

    def lowered(self, entries: Mapping[str, Tensor], prefix: str) -> list[Lowered]:
        """The planes of what ``entries`` hold, which have every key. ``QFormatError`` for tensors of other dtypes or shapes."""
        from qformats.kernels.lower import lower
        from qformats.rewrite import Refused, concatenate_rows

        found = []
        for span in self.spans:
            leaves = self.leaves(span)
            parts = {leaf: _raw(entries[key], key, leaves[leaf]) for leaf, key in self.keys(prefix, span).items()}
            module = self._module(span, parts)
            found.append(registry.format_module(module.match.format).read(module, 0, None))
        try:
            return [lower(concatenate_rows(found))]
        except Refused:
            return [lower(tensor) for tensor in found]

    def _module(self, span: Span, parts: Mapping[str, RawTensor]) -> Module:
        if self.record.checkpoint.gguf is not None:
            (first, *_) = self.record.rows_of[span.stored].sources
            module = self.record.checkpoint.modules[first.module]
        else:
            module = self.record.checkpoint.modules[span.stored]
        return replace(module, parts={**module.parts, **parts}, memo={})


def attach(model: Any) -> None:
    """Let the state dict of a model that was loaded with a record bear the source's names."""
    from qformats.runtime.packed import Packed

    record: Record = model.qformats_record
    found: dict[str, list[Span]] = {}
    for stored, origin in record.packed.items():
        shape = tuple(record.rows_of[stored].shape)
        module = stored if record.checkpoint.gguf is not None else stored.removesuffix(".weight")
        own = record.renamed[stored].removesuffix(".weight")
        span = Span(module, own, origin.start, origin.start + prod(shape[:-1]), shape)
        found.setdefault(origin.module, []).append(span)
    for place, spans in found.items():
        module = model.get_submodule(place)
        if isinstance(module, Packed) and _is_one_each(record, spans):
            module.source = Source(record, place, tuple(spans))


def _is_one_each(record: Record, spans: list[Span]) -> bool:
    """Whether every span is of one type: rows of several GGUF tensors of different types have no tensor of their own."""
    if record.checkpoint.gguf is None:
        return True
    kinds = ({record.storages[source.module] for source in record.rows_of[span.stored].sources} for span in spans)
    return all(len(found) == 1 for found in kinds)


def _tensor(data: bytes | memoryview, raw: RawTensor) -> Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
    if raw.dtype not in _TORCH:  # blocks
        return flat.reshape(*raw.shape[:-1], -1)
    values = flat.view(getattr(torch, _TORCH[raw.dtype]))
    return values.reshape(raw.shape) if len(data) == raw.nbytes else values  # words of new codes may be longer


def _raw(value: Tensor, key: str, stored: RawTensor) -> RawTensor:
    """A tensor of a state dict as a stored one."""
    wanted = _tensor_kind(stored)
    if (value.dtype, tuple(value.shape)) != wanted:
        text = f"is {value.dtype} {tuple(value.shape)}, expected {wanted[0]} {wanted[1]}"
        raise Unsupported("state-dict", text, tensor=key, hint="load a state dict of the same checkpoint's format")
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return RawTensor(stored.name, stored.dtype, stored.shape, MemorySource(data.data, stored.name), 0, data.nbytes)


def _tensor_kind(raw: RawTensor) -> tuple[torch.dtype, tuple[int, ...]]:
    if raw.dtype not in _TORCH:
        return torch.uint8, (*raw.shape[:-1], raw.row_nbytes)
    return getattr(torch, _TORCH[raw.dtype]), tuple(raw.shape)


def fill(packed: Packed, source: Source, state: MutableMapping[str, Any], prefix: str, missing: list[str], errors: list[str]) -> None:
    """Take a module's entries out of a state dict; what is wrong is said as torch says it."""
    keys = [key for span in source.spans for key in source.keys(prefix, span).values()]
    absent = [key for key in keys if key not in state]
    if not absent:
        try:
            packed.hold_instead([_on(lowered, packed.plane_device) for lowered in source.lowered(state, prefix)])
        except QFormatError as error:
            errors.append(str(error))
    missing.extend(absent)
    for key in keys:
        state.pop(key, None)


def _on(lowered: Lowered, device: torch.device) -> Lowered:
    return replace(lowered, planes={name: plane.to(device) for name, plane in lowered.planes.items()})
