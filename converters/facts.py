"""What every choice for a target tensor is made from: the source, the target, a provenance record, and the jobs of plain floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from converters.claims import hint_rows
from converters.jobs import Job
from converters.kept_planes import Extra
from converters.merging import merged_into
from converters.mixing import NO_MIX, Mix
from converters.options import PlanOptions
from converters.planes import Kept
from qformats import registry
from qformats.architectures.mapping import TensorMap
from qformats.architectures.stacks import Stacks
from qformats.checkpoint import Checkpoint
from qformats.errors import QFormatError
from qformats.formats.protocol import PartInfo
from qformats.reencode import Hint
from qformats.scheme import Scheme, Storage

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MATRIX_KINDS", "Facts"]

MATRIX_KINDS = ("linear", "experts", "embedding", "output")


@dataclass
class Facts:
    """One checkpoint and one target, and what a provenance record and the options say of both.

    ``storages_of``: storages from a provenance record by target module, ``hints`` likewise; ``dtypes``: float dtypes by target
    tensor name. ``blocks``: block types of target modules whose floats are such blocks, as a record says. ``float_default``: the
    2-byte dtype to prefer where the record is silent. ``orders``: absorbed act-orders. ``mix``: types by llama.cpp's rules.
    ``orders_before``: act-orders that would be absorbed if no adapter were merged. ``kept``: parameters
    that a record gives back, ``extras`` its tensors that are no weights by module and leaf. ``model_dtype``: of the output's
    floats (torch's word), where the target asks. ``new_type``: the type of new codes where none is named, if not the
    format's own default. ``new_groups``: a type's group where its default one does not divide every width of the model.
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
    model_dtype: str | None = None
    schemes: dict[str, Scheme] = field(default_factory=dict)
    new_type: str = ""
    new_groups: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def has_codes(self) -> bool:
        """Whether any weight of the source is codes."""
        return self.checkpoint.has_codes

    @property
    def to_gguf(self) -> bool:
        """Whether the target is a GGUF."""
        return registry.row(self.options.target.format).container == "gguf"

    def scheme(self, tensor: TensorMap) -> Scheme:
        """The scheme of the source's codes in the target's shape."""
        module = tensor.sources[0].module
        if module not in self.schemes:
            self.schemes[module] = self.checkpoint.scheme(module)
        return replace(self.schemes[module], shape=tensor.shape)

    def orders_of(self, tensor: TensorMap) -> dict[str, np.ndarray[Any, Any]]:
        """The absorbed act-orders of a tensor's sources."""
        return {s.module: self.orders[s.module] for s in tensor.sources if s.module in self.orders}

    def job(self, tensor: TensorMap, action: str, kind: str, reason: str, dtype: str) -> Job:
        """A job that makes a tensor of floats."""
        part = {tensor.leaf: PartInfo(dtype, tensor.shape)}
        lossless = kind in ("copied", "exact")
        return Job(tensor, action, kind, reason, dtype, part, lossless, dtype, format="hf", orders=self.orders_of(tensor))

    def float_job(self, tensor: TensorMap, dtype: str, kind: str, reason: str, lossless: bool = False) -> Job:
        """The same from values that are floats once they are read."""
        return replace(self.job(tensor, "float", kind, reason, dtype), lossless=lossless)

    def is_stack(self, tensor: TensorMap, named: str | None = None) -> bool:
        """Experts in one tensor, which the target, in the type ``named``, has no codes for."""
        if self.to_gguf or len(tensor.shape) <= 2:
            return False
        packs = getattr(registry.format_module(self.options.target.format), "PACKED_EXPERTS", False)
        return not packs and not self.holds_stack(tensor, named)

    def holds_stack(self, tensor: TensorMap, named: str | None = None) -> bool:
        """Whether the target has codes for a stack with outputs as rows, in the type ``named``, else that of the source's codes."""
        target = self.options.target
        takes = getattr(registry.format_module(target.format), "stacks", None)
        if takes is None or len(tensor.shape) != 3 or tensor.target not in self._stack_names:
            return False
        kind = named or target.type or (None if self.is_code_source(tensor) else registry.row(target.format).default_type)
        return bool(takes(replace(target, type=kind), self.scheme(tensor) if kind is None else None))

    @cached_property
    def _stack_names(self) -> frozenset[str]:
        """Names of stacks with outputs as rows."""
        try:
            names = Stacks(self.checkpoint.binding).names
        except QFormatError:  # an architecture that is not known
            return frozenset()
        return frozenset(start + name for both in names.items() for name in both for start in ("", "language_model."))

    def is_code_source(self, tensor: TensorMap) -> bool:
        """Whether the numbers come from codes as they are stored."""
        coded = any(s.leaf == "weight" and self.checkpoint.is_quantized(s.module) for s in tensor.sources)
        return coded and not merged_into(self.checkpoint, tensor)

    def whole_in_memory(self, tensor: TensorMap) -> tuple[str, ...]:
        """What a plan says of the one step that holds a whole tensor: rows that move anywhere, into planes that are written by columns."""
        scattered = not self.to_gguf and any(s.period == 0 for s in tensor.sources)
        return ("the whole tensor is held in memory: its rows move throughout",) if scattered else ()

    def hint(self, tensor: TensorMap, rows: int) -> Hint | None:
        """What a record says of a tensor's first ``rows``."""
        return hint_rows(self.hints.get(tensor.target), 0, rows)
