"""The experts of a block as the one tensor that transformers 5 computes with, whatever a checkpoint keeps them in.

``gate_up_proj`` (E, 2F, H), each expert's gate rows before its up rows, and ``down_proj`` (E, H, F) are parameters of ``….experts``
(transformers 5.23, ``conversion_mapping.py``). ``Rule.fused`` says which leaf a matrix is part of, ``Rule.stack`` what the owner of the
leaves is called where that is not the name of a checkpoint's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from qformats.architectures.parts import TensorMap
from qformats.architectures.rules import Rule

if TYPE_CHECKING:
    from qformats.architectures.binding import Binding

__all__ = ["Stacks"]


@dataclass(frozen=True)
class Stacks:
    """The stacks with outputs as rows of one model."""

    binding: Binding

    @cached_property
    def names(self) -> dict[str, str]:
        """Every name a stack may have as a module of its own, to the one that transformers gives it."""
        return {f"{either}.{leaf}": f"{owner}.{leaf}" for base, owner, leaf, _ in self._all() for either in (base, owner)}

    @cached_property
    def _members(self) -> dict[str, tuple[str, int, int, int]]:
        """Modules of one matrix each: their stack, the place in it, how many experts it has, and matrices of each; 0, 1, 1 for it all."""
        found = {}
        for base, owner, leaf, rule in self._all():
            assert rule.fused is not None
            _, part, parts = rule.fused
            each, layer = "{e}" in rule.hf, _layer_of(base)
            count = rule.sizes(self.binding.dims)[0] if each else 1
            for expert in range(count):
                place = (expert * parts + part, count, parts) if each else (0, 1, 1)
                found[rule.hf.format(i=layer, e=expert)] = (f"{owner}.{leaf}", *place)
        return found

    def _all(self) -> Iterator[tuple[str, str, str, Rule]]:
        """The base of a checkpoint's names, that of transformers', the leaf and the rule, for every block."""
        for rule in self.binding.rules:
            if rule.fused is None:
                continue
            for layer in range(self.binding.dims[rule.until or "L"]):
                if rule.in_block(layer, self.binding.dims):
                    base = rule.experts.format(i=layer)
                    yield base, (rule.stack or rule.experts).format(i=layer), rule.fused[0], rule

    def gather(self, tensors: Iterable[TensorMap], wanted: Callable[[TensorMap], bool]) -> tuple[TensorMap, ...]:
        """``tensors`` of a checkpoint with each stack that is ``wanted`` in place of the first of its matrices.

        A stack bears the name of its parameter with the leaf ``weight``, as codes; ``floats`` is that parameter as such. A stack of which
        a matrix is missing or unlike the others stays apart.
        """
        tensors = tuple(tensors)
        groups: dict[str, dict[int, TensorMap]] = {}
        for tensor in tensors:
            if (found := self._find(tensor)) is not None:
                groups.setdefault(found[0], {})[found[1]] = tensor
        made = {name: stack for name, group in groups.items() if (stack := self._stack(name, group)) is not None and wanted(stack)}
        return tuple(self._replaced(tensors, made))

    def spread(self, tensors: Iterable[TensorMap], known: Container[str]) -> tuple[TensorMap, ...]:
        """``tensors`` with each stack of one source in its matrices again, where all of these are ``known`` modules."""
        made: list[TensorMap] = []
        for tensor in tensors:
            name = tensor.target if tensor.leaf == "weight" else f"{tensor.target}.{tensor.leaf}"
            start = "language_model." if name.startswith("language_model.") else ""
            own = self.names.get(name.removeprefix(start))
            members = sorted((place, start + m) for m, (stack, place, count, _) in self._members.items() if stack == own and count > 1)
            apart = len(tensor.shape) == 3 and bool(members) and all(member in known for _, member in members)
            made += self._matrices(tensor, [member for _, member in members]) if apart and tensor.sources[0].is_plain else [tensor]
        return tuple(made)

    @staticmethod
    def _matrices(tensor: TensorMap, members: list[str]) -> list[TensorMap]:
        (source,) = tensor.sources
        rows = tensor.shape[0] * tensor.shape[1] // len(members)
        return [
            TensorMap(member, "weight", (rows, tensor.shape[2]), (replace(source, start=at * rows, stop=(at + 1) * rows),), kind="linear")
            for at, member in enumerate(members)
        ]

    def _replaced(self, tensors: tuple[TensorMap, ...], made: dict[str, TensorMap]) -> Iterator[TensorMap]:
        left = dict(made)
        for tensor in tensors:
            found = self._find(tensor)
            if found is None or found[0] not in made:
                yield tensor
            elif found[0] in left:
                yield left.pop(found[0])

    def _find(self, tensor: TensorMap) -> tuple[str, int, int, int] | None:
        """The stack that a tensor belongs to, under the checkpoint's own first words; None for any other, and for a stack of codes."""
        plain = f"{tensor.target}.{tensor.leaf}"
        for start in ("", "language_model."):
            bare = plain.removeprefix(start)
            if start and bare == plain:
                continue
            if bare in self.names:
                return start + self.names[bare], 0, 1, 1
            if tensor.leaf == "weight" and (member := self._members.get(bare.removesuffix(".weight"))) is not None:
                return start + member[0], *member[1:]
        return None

    def _stack(self, name: str, group: dict[int, TensorMap]) -> TensorMap | None:
        first = self._find(group[min(group)])
        assert first is not None
        parts = [group[place] for place in sorted(group)]
        shapes, plain = {part.shape for part in parts}, all(not p.altered and not p.weave and p.constant is None for p in parts)
        _, _, experts, each = first
        if len(parts) != experts * each or len(shapes) > 1 or not plain:
            return None
        shape = shapes.pop()
        if len(shape) == 2:
            shape = experts, shape[0] * each, shape[1]
        base, _, leaf = name.rpartition(".")
        sources = tuple(source for part in parts for source in part.sources)
        floats = TensorMap(base, leaf, shape, sources, kind="experts")
        return replace(floats, target=name, leaf="weight", floats=floats)


def _layer_of(base: str) -> int:
    return int(next(word for word in base.split(".") if word.isdecimal()))
