"""What a checkpoint stores for one weight: its planes, their bytes, and its type in a few words. Imports neither torch nor numpy."""

from __future__ import annotations

from functools import cached_property
from math import prod

from converters.inspect import scheme_label
from qformats import registry
from qformats.architectures.mapping import SourceRows, TensorMap
from qformats.checkpoint import Checkpoint
from qformats.containers.raw import RawTensor
from qformats.errors import Unsupported

__all__ = ["StoredWeights"]


class StoredWeights:
    """The tensors of one checkpoint as a user counts them: a weight in codes is one, with all of its planes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @cached_property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Logical shapes by module and leaf."""
        return self._checkpoint.shapes()

    def planes(self, module: str, leaf: str) -> dict[str, RawTensor]:
        """The stored tensors of ``module.leaf`` by leaf: one of floats, all planes of a weight in codes; empty where there is none."""
        modules = self._checkpoint.modules
        if module not in modules:
            return {}
        parts = modules[module].parts
        if leaf != "weight" or not self._checkpoint.is_quantized(module):
            return {leaf: parts[leaf]} if leaf in parts else {}
        suffixes = registry.format_module(modules[module].match.format).SUFFIXES
        return {name: raw for name, raw in parts.items() if name in ("weight", "", *suffixes)}

    def label(self, module: str, leaf: str) -> tuple[str, int]:
        """Type and bytes of ``module.leaf``; ``("", 0)`` where the checkpoint has no such tensor."""
        found = self.planes(module, leaf)
        nbytes = sum(raw.nbytes for raw in found.values())
        if not found:
            return "", 0
        if leaf in found and (self._checkpoint.gguf is not None or not self._checkpoint.is_quantized(module) or leaf != "weight"):
            return found[leaf].dtype, nbytes
        try:
            return scheme_label(self._checkpoint.scheme(module)), nbytes
        except Unsupported:  # planes that are not read have no scheme; they take their bytes all the same
            return self._checkpoint.format, nbytes

    def source_of(self, tensor: TensorMap) -> tuple[str, int]:
        """Types and bytes of what ``tensor`` is made of: its share of each source by rows; ``("computed", 0)`` where there is none."""
        types: dict[str, None] = {}
        nbytes = 0.0
        for source in tensor.sources:
            if not (source.module or source.leaf):
                types["zeros"] = None
                continue
            label, whole = self.label(source.module, source.leaf)
            types[label] = None
            nbytes += whole * self._share(source)
        return " + ".join(types) if types else "computed", round(nbytes)

    def _share(self, source: SourceRows) -> float:
        """The part of a source tensor that a piece takes."""
        shape = self.shapes.get(source.module, {}).get(source.leaf, ())
        rows = prod(shape[:-1]) if len(shape) > 1 else (shape[0] if shape else 1)
        taken = source.stop - source.start
        if source.transposed is not None:
            first, last = source.transposed
            return min(1.0, taken * (last - first) / max(1, rows * shape[-1]))
        return min(1.0, taken / source.columns[1] / max(1, rows))
