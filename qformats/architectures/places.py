"""Where each HF module lives in a GGUF: the names and rules of one model in both directions, without its tensors.

What only knows a weight by name (a low-rank adapter, an importance matrix) is mapped through this table. Rules: ``mapping``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from qformats.architectures.parts import Shape
from qformats.architectures.rules import Rule

if TYPE_CHECKING:
    from qformats.architectures.binding import Binding

__all__ = ["Place", "Places"]


@dataclass(frozen=True, slots=True)
class Place:
    """HF module ``hf`` ↔ GGUF tensor ``gguf + ".weight"``, or its slice ``expert``; ``shape`` is the module's own (N, K)."""

    hf: str
    gguf: str
    rule: Rule
    shape: Shape
    expert: int | None = None


@dataclass(frozen=True)
class Places:
    """All places of one model, by either name; the order is that of a GGUF."""

    binding: Binding

    @cached_property
    def by_hf(self) -> dict[str, Place]:
        """Canonical HF module name → place."""
        return {place.hf: place for place in self._all()}

    @cached_property
    def by_gguf(self) -> dict[str, tuple[Place, ...]]:
        """GGUF name without ``.weight`` → its place, or one place for each expert."""
        found: dict[str, list[Place]] = {}
        for place in self._all():
            found.setdefault(place.gguf, []).append(place)
        return {name: tuple(places) for name, places in found.items()}

    def find(self, name: str) -> Place | None:
        """The place of an HF module as a checkpoint spells it: under ``language_model``, or without the base model's first word."""
        plain = name.removeprefix("language_model.")
        if plain.startswith("model.language_model."):
            plain = "model." + plain.removeprefix("model.language_model.")
        first = next(iter(self.by_hf)).partition(".")[0] + "."
        return self.by_hf.get(plain) or self.by_hf.get(first + plain)

    def _all(self) -> Iterator[Place]:
        rules, dims = self.binding.rules, self.binding.dims
        for rule in rules:
            shape = rule.sizes(dims)
            if rule.split is not None or rule.hf_shape or (rule.leaf, rule.gguf_leaf) != ("weight", "weight"):
                continue  # one of its tensors is no weight of one module
            layers = [i for i in range(dims[rule.until or "L"]) if rule.in_block(i, dims)] if "{i}" in rule.hf else [0]
            for layer in layers:
                gguf = rule.gguf.format(i=layer)
                if "{e}" not in rule.hf:
                    yield Place(rule.hf.format(i=layer), gguf, rule, shape)
                    continue
                for expert in range(shape[0]):
                    yield Place(rule.hf.format(i=layer, e=expert), gguf, rule, shape[1:], expert)
