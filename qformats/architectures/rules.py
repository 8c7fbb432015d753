"""One HF module or tensor and its GGUF tensor: names, shape, row order, and in which models and blocks they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qformats.architectures.parts import Shape
from qformats.architectures.splits import Split

__all__ = ["Rule"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One HF module ↔ one GGUF tensor.

    ``hf`` and ``gguf`` are names with ``{i}`` for the layer and ``{e}`` for the expert. ``shape`` spells the weight's shape in the
    letters of ``Binding.dims`` and digits. ``order`` is the letter of the head count when rows are permuted for rotary embedding,
    ``qkv`` where a fused projection is regrouped. ``bias``: whether there is one, or the config flag that says so. ``when`` and
    ``unless`` name the config flag with which, or without which, the tensor exists. ``transposed``: HF keeps the weight (K, N).
    ``fused`` names the leaf of ``….experts`` that holds all experts at once, and which of how many equal runs of rows is meant;
    ``stack`` is the owner of that leaf in transformers where it is not what ``hf`` has before ``{e}``.
    ``leaf`` and ``gguf_leaf``: the tensors' last words. ``split``: the HF tensor is several GGUF tensors; ``hf`` is its module.
    ``since`` and ``until``: letters of the first block that has the tensor, where that is not 0, and of the first that no longer has it,
    where that is not ``L``. ``optional``: the tensor may be missing. ``within``: config field that lists the blocks with this tensor,
    ``chosen`` once it is read. ``hf_shape``: HF's shape where it has another axis. ``copies``: modules that hold the same weights again.
    ``factor``: config field that a norm is multiplied by. ``function``: what GGUF has of each value (``parts.FUNCTIONS``).
    """

    hf: str
    gguf: str
    shape: str
    kind: str = "linear"
    order: str = ""
    shift: float = 0.0
    bias: bool | str = False
    when: str = ""
    unless: str = ""
    transposed: bool = False
    resizable: bool = False
    fused: tuple[str, int, int] | None = None
    stack: str = ""
    leaf: str = "weight"
    gguf_leaf: str = "weight"
    split: Split | None = None
    since: str = ""
    until: str = ""
    optional: bool = False
    copies: tuple[str, ...] = ()
    factor: str | float = 1.0
    within: str = ""
    chosen: frozenset[int] | None = None
    hf_shape: str = ""
    function: str = ""

    @property
    def experts(self) -> str:
        """The module of all experts that this one is of, by its own name; ``stack`` where that says nothing of one."""
        return self.hf.partition(".{e}")[0] if "{e}" in self.hf else self.stack

    def in_block(self, layer: int, dims: Mapping[str, int]) -> bool:
        """Whether block ``layer`` has it; ``until`` may lie beyond ``L``."""
        return dims.get(self.since, 0) <= layer < dims[self.until or "L"] and (self.chosen is None or layer in self.chosen)

    def blocks(self, dims: Mapping[str, int]) -> int:
        """In how many blocks it is."""
        return sum(self.in_block(layer, dims) for layer in range(dims[self.until or "L"]))

    def bound(self, config: Mapping[str, Any]) -> Rule:
        """The rule of one config: its factor a number, its blocks known."""
        made = replace(self, factor=float(config[self.factor])) if isinstance(self.factor, str) else self
        if self.split is not None:
            made = replace(made, split=self.split.bound(config))
        return replace(made, chosen=frozenset(config[self.within])) if self.within else made

    def sizes(self, dims: Mapping[str, int], *, hf: bool = False) -> Shape:
        """The shape in GGUF, or in HF."""
        letters = self.hf_shape if hf and self.hf_shape else self.shape
        return tuple(int(letter) if letter.isdecimal() else dims[letter] for letter in letters)

    def exists(self, config: Mapping[str, object]) -> bool:
        return not (self.when and not config.get(self.when)) and not (self.unless and config.get(self.unless))
