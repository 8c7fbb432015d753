"""One HF tensor that is several GGUF tensors: which rows and columns each is made of, in both directions.

A ``Split`` on a ``Rule`` names the leaf of the HF module and the part of it that the rule's GGUF tensor is.

- ``alternate``: gpt-oss's experts. HF keeps floats with inputs as rows, (E, K, parts · N), the parts' columns taking turns, and packed
  weights with outputs as rows, (E, parts · N, K), their rows taking turns; a vector for each expert is (E, parts · N). GGUF has one
  tensor for each part (llama.cpp, ``conversion/gpt_oss.py``).
- ``heads``: DeepSeek's ``kv_b_proj``, (A · (n + v), r): for each head n rows of keys, then v rows of values. GGUF has (A, r, n), each
  head's keys with inputs and outputs exchanged, and (A, v, r) (llama.cpp, ``conversion/deepseek.py``).
- ``runs``: Granite's experts and its shared expert. HF keeps outputs as rows, (E, parts · N, K) or (parts · N, K), the parts' rows one
  run after another (llama.cpp, ``conversion/granite.py``).
- ``runs of columns``: Llama 4's experts, the same with inputs as rows: (E, K, parts · N) (llama.cpp, ``conversion/llama.py``).
- ``groups``: Qwen3-Next's ``in_proj_qkvz``: for each key head its rows of queries, of keys, of values and of gates. GGUF has all
  queries, all keys, all values in one tensor, all gates in another (llama.cpp, ``conversion/qwen.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from qformats.architectures.fields import positive
from qformats.architectures.parts import Shape, SourceRows, TensorMap

if TYPE_CHECKING:
    import numpy as np

__all__ = ["INPUTS_AS_ROWS", "Split", "join", "joined_shape", "take_apart"]

INPUTS_AS_ROWS = ("alternate", "runs of columns")  # layouts whose floats are (E, K, N)


@dataclass(frozen=True, slots=True)
class Split:
    """``leaf`` of the HF module, of which a GGUF tensor is ``part`` of ``parts``.

    ``heads``: config field of how many groups of heads there are, that number once it is read.
    """

    layout: str
    leaf: str
    part: int = 0
    parts: int = 1
    heads: str | int = 0

    def bound(self, config: Mapping[str, Any]) -> Split:
        """That of one config: its heads a number."""
        return replace(self, heads=positive(config, self.heads)) if isinstance(self.heads, str) else self


def joined_shape(split: Split, shapes: list[Shape], packed: bool) -> Shape:
    """The shape of the HF tensor whose parts have the GGUF ``shapes``."""
    if split.layout == "heads":
        (heads, inputs, keys), (_, values, _) = shapes
        return heads * (keys + values), inputs
    shape = shapes[0]
    if split.layout == "groups":
        return shape[0] + shapes[1][0], shape[1]
    if split.layout == "runs":
        return *shape[:-2], shape[-2] * split.parts, shape[-1]
    if len(shape) == 2:
        return shape[0], shape[1] * split.parts
    experts, rows, columns = shape
    return (experts, rows * split.parts, columns) if packed else (experts, columns, rows * split.parts)


def take_apart(split: Split, module: str, leaf: str, shapes: list[Shape], packed: bool) -> tuple[SourceRows, ...]:
    """The rows of the HF tensor ``module.leaf`` that make GGUF part ``split.part``."""
    if split.layout == "heads":
        return _one_of_heads(split.part, module, leaf, shapes)
    if split.layout == "groups":
        return _one_of_groups(split, module, leaf, shapes)
    shape = shapes[split.part]
    if split.layout.startswith("runs"):
        return _one_of_runs(split, module, leaf, shape, packed)
    if len(shape) == 2:
        return (SourceRows(module, leaf, 0, shape[0], columns=(split.part, split.parts)),)
    experts, rows, columns = shape
    index = _every(rows, split.part, split.parts)
    if packed and index is None:
        return (SourceRows(module, leaf, 0, experts * rows),)
    if packed:
        starts = [expert * rows * split.parts for expert in range(experts)]
        return tuple(SourceRows(module, leaf, start, start + rows, index) for start in starts)
    slices = [(expert * columns, (expert + 1) * columns) for expert in range(experts)]
    return tuple(SourceRows(module, leaf, 0, rows, index, transposed=rows_of) for rows_of in slices)


def _every(count: int, first: int, step: int) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    import numpy as np

    return None if step == 1 else np.arange(count, dtype=np.int64) * step + first


def _one_of_heads(part: int, module: str, leaf: str, shapes: list[Shape]) -> tuple[SourceRows, ...]:
    (heads, inputs, keys), (_, values, _) = shapes
    starts = [head * (keys + values) for head in range(heads)]
    if part == 0:
        return tuple(SourceRows(module, leaf, 0, inputs, transposed=(start, start + keys)) for start in starts)
    return tuple(SourceRows(module, leaf, start + keys, start + keys + values) for start in starts)


def _one_of_runs(split: Split, module: str, leaf: str, shape: Shape, packed: bool) -> tuple[SourceRows, ...]:
    experts, rows, columns = prod(shape[:-2]), *shape[-2:]
    if split.layout == "runs of columns" and not packed:
        own = split.part * rows, (split.part + 1) * rows
        return tuple(SourceRows(module, leaf, *own, transposed=(e * columns, (e + 1) * columns)) for e in range(experts))
    if split.parts == 1:
        return (SourceRows(module, leaf, 0, experts * rows),)
    starts = [(expert * split.parts + split.part) * rows for expert in range(experts)]
    return tuple(SourceRows(module, leaf, start, start + rows) for start in starts)


def join(split: Split, target: str, leaf: str, names: list[tuple[str, str]], shapes: list[Shape], packed: bool, kind: str) -> TensorMap:
    """The HF tensor ``target.leaf`` out of the GGUF tensors (base, leaf) ``names`` of ``shapes``: the inverse of ``take_apart``."""
    shape = joined_shape(split, shapes, packed)
    if split.layout == "heads":
        return TensorMap(target, leaf, shape, _heads_together(names, shapes), kind=kind)
    if split.layout == "groups":
        return TensorMap(target, leaf, shape, _groups_together(split, names, shapes), kind=kind)
    if split.layout.startswith("runs"):
        return _runs_together(split, target, leaf, names, shapes, kind)
    if len(shape) == 2:
        vectors = tuple(SourceRows(base, own, 0, shape[0]) for base, own in names)
        return TensorMap(target, leaf, shape, vectors, kind=kind, weave="columns" if split.parts > 1 else "")
    experts, rows, columns = shapes[0]
    if packed and split.parts == 1:
        return TensorMap(target, leaf, shape, (SourceRows(*names[0], 0, prod(shape[:-1])),), kind=kind)
    slices = [(expert * rows, (expert + 1) * rows) for expert in range(experts)]
    if packed:
        pieces = tuple(SourceRows(base, own, first, last) for first, last in slices for base, own in names)
    else:
        pieces = tuple(SourceRows(base, own, 0, columns, transposed=rows_of) for rows_of in slices for base, own in names)
    return TensorMap(target, leaf, shape, pieces, kind=kind, weave=("rows" if packed else "columns") if split.parts > 1 else "")


def _group_sizes(split: Split, shapes: list[Shape]) -> tuple[int, int, int]:
    """(groups, rows of queries or keys of one, rows of values or gates of one)."""
    groups, inner = int(split.heads), shapes[1][0]
    return groups, (shapes[0][0] - inner) // 2 // groups, inner // groups


def _one_of_groups(split: Split, module: str, leaf: str, shapes: list[Shape]) -> tuple[SourceRows, ...]:
    groups, key, value = _group_sizes(split, shapes)
    runs = ((0, key), (key, key), (2 * key, value)) if split.part == 0 else ((2 * key + value, value),)
    starts = [(group * 2 * (key + value) + first, length) for first, length in runs for group in range(groups)]
    return tuple(SourceRows(module, leaf, start, start + length) for start, length in starts)


def _groups_together(split: Split, names: list[tuple[str, str]], shapes: list[Shape]) -> tuple[SourceRows, ...]:
    groups, key, value = _group_sizes(split, shapes)
    (joint, gates), both = names, groups * key
    pieces: list[SourceRows] = []
    for g in range(groups):
        pieces += [SourceRows(*joint, first + g * key, first + (g + 1) * key) for first in (0, both)]
        pieces.append(SourceRows(*joint, 2 * both + g * value, 2 * both + (g + 1) * value))
        pieces.append(SourceRows(*gates, g * value, (g + 1) * value))
    return tuple(pieces)


def _runs_together(split: Split, target: str, leaf: str, names: list[tuple[str, str]], shapes: list[Shape], kind: str) -> TensorMap:
    shape = joined_shape(split, shapes, False)
    experts, rows, columns = prod(shapes[0][:-2]), *shapes[0][-2:]
    slices = [(expert * rows, (expert + 1) * rows) for expert in range(experts)]
    if split.layout == "runs of columns":
        across = tuple(SourceRows(base, own, 0, columns, transposed=rows_of) for rows_of in slices for base, own in names)
        return TensorMap(target, leaf, shape, across, kind=kind, weave="beside" if split.parts > 1 else "")
    if split.parts == 1:
        return TensorMap(target, leaf, shape, (SourceRows(*names[0], 0, experts * rows),), kind=kind)
    return TensorMap(target, leaf, shape, tuple(SourceRows(*name, *rows_of) for rows_of in slices for name in names), kind=kind)


def _heads_together(names: list[tuple[str, str]], shapes: list[Shape]) -> tuple[SourceRows, ...]:
    (heads, inputs, keys), (_, values, _) = shapes
    pieces: list[SourceRows] = []
    for head in range(heads):
        pieces.append(SourceRows(*names[0], 0, keys, transposed=(head * inputs, (head + 1) * inputs)))
        pieces.append(SourceRows(*names[1], head * values, (head + 1) * values))
    return tuple(pieces)
