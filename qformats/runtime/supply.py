"""A checkpoint's tensors under the names that transformers has for a model's parameters, each as rows of stored modules.

A GGUF is mapped by its architecture, a Hugging Face checkpoint has its own names; transformers then renames some of them when it
loads (``conversion_mapping``), which is done here with its own table, so that no name is written down twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from qformats import assemble, registry
from qformats.architectures.mapping import SourceRows, TensorMap
from qformats.checkpoint import Checkpoint
from qformats.scheme import Tile

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["CheckpointReader", "Supply"]


class CheckpointReader:
    """A checkpoint's modules for ``assemble.read_rows``."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def codes(self, module: str, start: int, stop: int, *, codes: bool = True) -> QuantizedTensor | None:
        if not self._checkpoint.is_quantized(module):
            return None
        found = self._checkpoint.modules[module]
        tensor: QuantizedTensor = registry.format_module(found.match.format).read(found, start, stop, codes=codes)
        return tensor

    def floats(self, module: str, leaf: str, start: int | None, stop: int | None) -> Tensor:
        from qformats.formats.dense import read_float

        raw = self._checkpoint.modules[module].parts[leaf]
        return read_float(raw) if start is None else read_float(raw, start, stop)

    def shape(self, module: str, leaf: str) -> tuple[int, ...]:
        return self._checkpoint.modules[module].parts[leaf].shape


class _Remembering(CheckpointReader):
    """The same, which reads nothing twice: codes that are made when they are read cost more than reading them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._found: dict[tuple[str, int, int], QuantizedTensor | None] = {}

    def codes(self, module: str, start: int, stop: int, *, codes: bool = True) -> QuantizedTensor | None:
        key = (module, start, stop)
        if key not in self._found:
            self._found[key] = super().codes(module, start, stop)
        return self._found[key]


@dataclass(frozen=True)
class Supply:
    """What each parameter of the model is made of.

    ``tensors``: by the parameter's name in a Hugging Face checkpoint after transformers' renaming. ``stored``: that name → the one in the
    checkpoint. ``unused``: stored tensors that are no parameters, with the reason.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorMap]
    stored: Mapping[str, str]
    unused: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(checkpoint: Checkpoint, renaming: Any) -> Supply:
        """``renaming``: a function from a name in the checkpoint to transformers' own."""
        tensors, unused = _mapped(checkpoint)
        named = {renaming(tensor.name): tensor for tensor in tensors}
        return Supply(checkpoint, named, {new: tensor.name for new, tensor in named.items()}, unused)

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is rows of codes alone, unaltered."""
        tensor = self.tensors[name]
        if tensor.leaf != "weight" or tensor.altered or tensor.weave in ("columns", "beside") or not tensor.sources:
            return False
        plain = all(s.module and s.transposed is None and s.columns == (0, 1) for s in tensor.sources)
        return plain and all(s.leaf == "weight" and self._is_compact(s.module) for s in tensor.sources)

    def _is_compact(self, module: str) -> bool:
        """Whether a module is codes under shared scales; sparse weights, one number for each, are better off as floats."""
        if not self.checkpoint.is_quantized(module):
            return False
        scheme = self.checkpoint.scheme(module)
        return not any(isinstance(s.block, Tile) and set(s.block.sizes) == {1} and max(scheme.shape) > 1 for s in scheme.scales)

    def segments(self, name: str) -> list[QuantizedTensor]:
        """A packed tensor's rows: one tensor where its pieces are of one scheme, else one for each run of such."""
        from qformats.rewrite import Refused

        tensor, reader = self.tensors[name], _Remembering(self.checkpoint)
        try:
            whole = assemble.read_rows(tensor, reader, 0, tensor.rows)
            return [whole]  # type: ignore[list-item]
        except Refused:
            if tensor.weave:
                raise
        pieces = (replace(tensor, sources=(source,)) for source in tensor.sources)
        return [assemble.read_rows(piece, reader, 0, piece.rows) for piece in pieces]  # type: ignore[misc]

    def floats(self, name: str) -> Tensor:
        """A tensor as floats of the dtype it is stored in (float32 where it was codes), in its own shape."""
        import torch

        tensor = self.tensors[name]
        if tensor.constant is not None:
            return torch.from_numpy(tensor.constant).reshape(tensor.shape)
        if len(tensor.sources) == 1 and tensor.sources[0].is_plain and not tensor.altered and not tensor.weave:
            (source,) = tensor.sources
            found = CheckpointReader(self.checkpoint)
            if source.leaf != "weight" or not self.checkpoint.is_quantized(source.module):
                whole = found.floats(source.module, source.leaf, None, None)
                if tuple(whole.shape) == tensor.shape:
                    return whole
        rows = assemble.read_rows(tensor, CheckpointReader(self.checkpoint), 0, tensor.rows, joined=False)
        values: Tensor = tensor.alter(rows if isinstance(rows, torch.Tensor) else rows.dequantize(torch.float32))
        return values.reshape(tensor.shape)


def _mapped(checkpoint: Checkpoint) -> tuple[list[TensorMap], dict[str, str]]:
    if checkpoint.gguf is not None:
        mapped = checkpoint.binding.to_hf(checkpoint.shapes())
        return list(mapped.tensors), dict(mapped.dropped)
    found = []
    for module, leaves in checkpoint.shapes().items():
        for leaf, shape in leaves.items():
            rows = prod(shape[:-1] if len(shape) > 1 else shape)
            found.append(TensorMap(module, leaf, shape, (SourceRows(module, leaf, 0, rows),)))
    return found, {}
