"""Names and row operations, HF modules ↔ GGUF tensors, as one list of invertible rules for each family.

A ``Rule`` pairs an HF module with a GGUF tensor; ``map_to_gguf`` and ``map_to_hf`` read the same rules in the two directions.
What a rule can do to a tensor acts on whole rows (rotary permutation, expert stacking, vocabulary trimming) or adds a constant to
a norm, so it applies to packed codes and to their parameters alike. Facts: llama.cpp, ``conversion/{llama,qwen,gemma}.py`` and
``gguf-py/gguf/tensor_mapping.py``.

Rows: a tensor (N, K) has N rows, (E, N, K) has E·N rows, and each element of a vector (N,) is one row. Between tensors of different
rank the rows are the target's: of E vectors stacked to (E, K) each is one row, and a vector that becomes (1, K) is one row too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qformats.architectures.rows import inverse_order, row_order
from qformats.errors import BadFile

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Mapped", "Parts", "Rule", "SourceRows", "TensorMap", "map_to_gguf", "map_to_hf"]

Shape = tuple[int, ...]
Parts = Mapping[str, Mapping[str, Shape]]

# never weights (llama.cpp, conversion/base.py prepare_tensors skips them too)
_BUFFERS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias", ".attn.masked_bias", ".attn.bias")
_FACTORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
# the other halves of a multimodal checkpoint; only the text model is converted
_OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True, slots=True)
class SourceRows:
    """Rows ``start:stop`` of source tensor ``module.leaf`` flattened to rows; row ``r`` of the piece is row ``start + index[r]``.

    ``index``: (stop - start,) int64 or None for "in order". ``period``: rows ``k·period:(k+1)·period`` of the piece come only from
    the same rows of the source (1 for "in order", head_dim for a rotary permutation, 0 when the whole piece is needed).
    ``transposed``: the rows meant are the source's columns. An empty ``module`` stands for ``stop - start`` rows of zeros (padding of
    an embedding).
    """

    module: str
    leaf: str
    start: int
    stop: int
    index: np.ndarray[Any, np.dtype[np.int64]] | None = None
    period: int = 1
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class TensorMap:
    """One target tensor: ``sources`` concatenated along rows, then each value multiplied by ``factor`` and ``shift`` added in float32.

    ``target`` is the base name without leaf, ``shape`` the logical one: (N, K), (E, N, K) or (K,). ``kind`` is one of ``linear``,
    ``experts``, ``embedding``, ``output``, ``norm``, ``router``, ``positions``, ``bias``, ``rope``, ``conv``, ``conv1d`` (inputs as
    rows). ``constant``: the float32 values of a
    computed tensor, which has no sources.
    """

    target: str
    leaf: str
    shape: Shape
    sources: tuple[SourceRows, ...]
    shift: float = 0.0
    kind: str = "linear"
    constant: np.ndarray[Any, np.dtype[np.float32]] | None = None
    factor: float = 1.0

    @property
    def name(self) -> str:
        """The full tensor name, ``target.leaf``."""
        return f"{self.target}.{self.leaf}"

    @property
    def altered(self) -> str:
        """What is done to every value, in words; empty for nothing."""
        times = f"multiplying by {self.factor:g}" if self.factor != 1.0 else ""
        return " and ".join(word for word in (times, f"adding {self.shift:g}" if self.shift else "") if word)

    def alter(self, values: Any) -> Any:
        """The values of the target by those of the sources: a torch tensor in its own dtype, the same object where nothing is done."""
        times = values * self.factor if self.factor != 1.0 else values
        return times + self.shift if self.shift else times


@dataclass(frozen=True, slots=True)
class Mapped:
    """All target tensors in a fixed order, and every source tensor (or config field, as ``config:NAME``) left out, with the reason."""

    tensors: tuple[TensorMap, ...]
    dropped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rule:
    """One HF module ↔ one GGUF tensor.

    ``hf`` and ``gguf`` are names with ``{i}`` for the layer and ``{e}`` for the expert. ``shape`` spells the weight's shape in the
    letters of ``Binding.dims`` and digits. ``order`` is the letter of the head count when rows are permuted for rotary embedding,
    ``qkv`` where a fused projection is regrouped. ``bias``: whether there is one, or the config flag that says so. ``when`` and
    ``unless`` name the config flag with which, or without which, the tensor exists. ``transposed``: HF keeps the weight (K, N).
    ``fused`` names the leaf of ``….mlp.experts`` that holds all experts at once, and which of how many equal runs of rows is meant.
    ``until``: letter of the first block that no longer has the tensor, where that is not ``L``. ``optional``: the tensor may be
    missing. ``within``: config field that lists the blocks with this tensor, ``chosen`` once it is read. ``hf_shape``: HF's shape where it
    has another axis. ``copies``: modules that hold the same weights again. ``factor``: config field that a norm is multiplied by.
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
    until: str = ""
    optional: bool = False
    copies: tuple[str, ...] = ()
    factor: str | float = 1.0
    within: str = ""
    chosen: frozenset[int] | None = None
    hf_shape: str = ""

    def blocks(self, dims: Mapping[str, int]) -> int:
        """In how many blocks it is."""
        return dims[self.until or "L"] if self.chosen is None else len(self.chosen)

    def in_block(self, layer: int, dims: Mapping[str, int]) -> bool:
        """Whether block ``layer`` has it."""
        return layer < dims[self.until or "L"] and (self.chosen is None or layer in self.chosen)

    def bound(self, config: Mapping[str, Any]) -> Rule:
        """The rule of one config: its factor a number, its blocks known."""
        made = replace(self, factor=float(config[self.factor])) if isinstance(self.factor, str) else self
        return replace(made, chosen=frozenset(config[self.within])) if self.within else made

    def sizes(self, dims: Mapping[str, int], *, hf: bool = False) -> Shape:
        letters = self.hf_shape if hf and self.hf_shape else self.shape
        return tuple(int(letter) if letter.isdecimal() else dims[letter] for letter in letters)

    def exists(self, config: Mapping[str, object]) -> bool:
        return not (self.when and not config.get(self.when)) and not (self.unless and config.get(self.unless))


def _layers(rules: tuple[Rule, ...], dims: Mapping[str, int], block_order: bool) -> Iterator[tuple[Rule, int]]:
    """Yield (rule, layer): the rules before the blocks, all blocks, the rules after; within a block by HF name if ``block_order``."""
    first = next(k for k, rule in enumerate(rules) if "{i}" in rule.hf)
    last = max(k for k, rule in enumerate(rules) if "{i}" in rule.hf) + 1
    block = sorted(rules[first:last], key=lambda rule: rule.hf) if block_order else rules[first:last]
    for rule in rules[:first]:
        yield rule, 0
    for layer in range(max(dims[rule.until or "L"] for rule in block)):
        for rule in block:
            if rule.in_block(layer, dims):
                yield rule, layer
    for rule in rules[last:]:
        yield rule, 0


class _Sources:
    """The source tensors not yet used, looked up by canonical module name."""

    def __init__(self, parts: Parts, canonical: Mapping[str, str]) -> None:
        self._parts = parts
        self._module = canonical
        self._left = {(module, leaf) for module, leaves in parts.items() for leaf in leaves}
        self._dropped: set[str] = set()

    def take(self, name: str, leaf: str) -> tuple[str, Shape] | None:
        """Give (module as stored, shape) and mark it used, or None where it does not exist."""
        module = self._module.get(name)
        if module is None or name in self._dropped or leaf not in self._parts[module]:
            return None
        self._left.discard((module, leaf))
        return module, tuple(self._parts[module][leaf])

    def drop(self, name: str, reason: str, dropped: dict[str, str]) -> None:
        for leaf in ("weight", "bias"):
            if (found := self.take(name, leaf)) is not None:
                dropped[f"{found[0]}.{leaf}"] = reason
        self._dropped.add(name)

    def drop_leaf(self, name: str, leaf: str, reason: str, dropped: dict[str, str]) -> None:
        if (found := self.take(name, leaf)) is not None:
            dropped[f"{found[0]}.{leaf}"] = reason

    def finish(self, side: str) -> None:
        if self._left:
            names = sorted(f"{module}.{leaf}" for module, leaf in self._left)
            raise BadFile(
                "unmapped-tensor",
                f"{len(names)} tensors have no {side} name, the first is {names[0]!r}",
                tensor=names[0],
                hint="the checkpoint does not fit the architecture its config names",
            )


def _check_shape(name: str, shape: Shape, expected: Shape) -> None:
    if shape != expected:
        raise BadFile(
            "tensor-shape",
            f"has shape {shape}, the config means {expected}",
            tensor=name,
            hint="config and tensors disagree; fetch both from the same place",
        )


def _missing(names: list[str]) -> None:
    if names:
        raise BadFile(
            "missing-tensor",
            f"{len(names)} tensors that the architecture needs are missing, the first is {names[0]!r}",
            tensor=names[0],
            hint="the checkpoint is incomplete; fetch all its files",
        )


def _whole(module: str, leaf: str, shape: Shape, rule: Rule, dims: Mapping[str, int], inverse: bool) -> SourceRows:
    """All rows of one source tensor in the order the rule asks for."""
    rows = shape[0] if len(shape) == 1 else _rows(shape)
    if not rule.order:
        return SourceRows(module, leaf, 0, rows)
    order, period = row_order(rule.order, dims)
    return SourceRows(module, leaf, 0, rows, inverse_order(order) if inverse else order, period)


def _rows(shape: Shape) -> int:
    count = 1
    for size in shape[:-1]:
        count *= size
    return count


def _canonical_hf(parts: Parts, rules: tuple[Rule, ...]) -> dict[str, str]:
    """Map plain module names (``model.layers.0…``) to those of the checkpoint, which may sit under ``language_model``.

    A checkpoint of the base model alone has names without the first word (``layers.0…``), as that of GPT-2 itself.
    """
    names: dict[str, str] = {}
    first = rules[0].hf
    prefix = first.partition(".")[0] + "."
    if first not in parts and first.removeprefix(prefix) in parts:
        return {name if name == "lm_head" else prefix + name: name for name in parts}
    for module in parts:
        name = module.removeprefix("language_model.")
        if name.startswith("model.language_model."):
            name = "model." + name.removeprefix("model.language_model.")
        names[name] = module
    return names


def map_to_gguf(
    rules: tuple[Rule, ...], dims: Mapping[str, int], parts: Parts, *, tied: bool, dropped: dict[str, str]
) -> tuple[TensorMap, ...]:
    """Map HF modules to GGUF tensors; raises ``BadFile`` (``unmapped-tensor``, ``missing-tensor``, ``tensor-shape``)."""
    buffers = {m: s for m, s in parts.items() if not m.startswith(_OTHER_TOWERS)}
    for module, leaves in parts.items():
        if module not in buffers:
            dropped.update({f"{module}.{leaf}": "belongs to the vision part; only the text model is converted" for leaf in leaves})
    kept: dict[str, dict[str, Shape]] = {}
    for module, leaves in buffers.items():
        for leaf, shape in leaves.items():
            if f"{module}.{leaf}".endswith(_BUFFERS):
                dropped[f"{module}.{leaf}"] = "a buffer that the model computes itself"
            else:
                kept.setdefault(module, {})[leaf] = shape
    sources = _Sources(kept, _canonical_hf(kept, rules))
    outputs = {"lm_head", *(rule.hf for rule in rules if rule.kind == "output")} - {rule.hf for rule in rules if rule.optional}
    for name in outputs if tied else ():
        sources.drop(name, "tied: the same weights as the embedding", dropped)
    for name in (name for rule in rules for name in rule.copies):
        sources.drop(name, "the same weights as the embedding", dropped)
    tensors: list[TensorMap] = []
    missing: list[str] = []
    for rule, layer in _layers(rules, dims, block_order=True):
        made = _experts_to_gguf(rule, layer, dims, sources) if "{e}" in rule.hf else _one_to_gguf(rule, layer, dims, sources)
        if not made and not (tied and rule.kind == "output") and not rule.optional:
            missing.append(rule.hf.format(i=layer, e=0) + ".weight")
        tensors.extend(made)
    _missing(missing)
    sources.finish("GGUF")
    return tuple(tensors)


def _one_to_gguf(rule: Rule, layer: int, dims: Mapping[str, int], sources: _Sources) -> list[TensorMap]:
    made: list[TensorMap] = []
    name, target = rule.hf.format(i=layer), rule.gguf.format(i=layer)
    found = sources.take(name, "weight")
    if found is not None and rule.transposed:
        _check_shape(f"{found[0]}.weight", found[1], rule.sizes(dims)[::-1])
        made.append(_transposed(target, found[0], rule.sizes(dims), rule.kind))
    elif found is not None:
        module, shape = found
        expected = rule.sizes(dims, hf=True)
        piece = _whole(module, "weight", shape, rule, dims, inverse=False)
        if rule.resizable and len(shape) == 2 and shape[0] > expected[0]:
            piece, shape = SourceRows(module, "weight", 0, expected[0]), expected
        _check_shape(f"{module}.weight", shape, expected)
        shape = rule.sizes(dims) if rule.hf_shape else shape
        made.append(TensorMap(target, "weight", shape, (piece,), rule.shift, rule.kind, factor=float(rule.factor)))
    if rule.bias and (found := sources.take(name, "bias")) is not None:
        module, shape = found
        _check_shape(f"{module}.bias", shape, rule.sizes(dims)[:1])
        made.append(TensorMap(target, "bias", shape, (_whole(module, "bias", shape, rule, dims, False),), 0.0, "bias"))
    return made


def _transposed(target: str, module: str, shape: Shape, kind: str) -> TensorMap:
    return TensorMap(target, "weight", shape, (SourceRows(module, "weight", 0, shape[0], transposed=True),), 0.0, kind)


def _experts_to_gguf(rule: Rule, layer: int, dims: Mapping[str, int], sources: _Sources) -> list[TensorMap]:
    expected = rule.sizes(dims)
    experts, rows = expected[0], _rows(expected[1:])
    target = rule.gguf.format(i=layer)
    pieces: list[SourceRows] = []
    for expert in range(experts):
        found = sources.take(rule.hf.format(i=layer, e=expert), "weight")
        if found is None:
            break
        _check_shape(f"{found[0]}.weight", found[1], expected[1:])
        pieces.append(SourceRows(found[0], "weight", 0, rows))
    if not pieces and rule.fused is not None:
        return _fused_to_gguf(rule, layer, expected, sources)
    if len(pieces) != experts:
        _missing([rule.hf.format(i=layer, e=len(pieces)) + ".weight"])
    return [TensorMap(target, "weight", expected, tuple(pieces), 0.0, rule.kind)]


def _fused_to_gguf(rule: Rule, layer: int, expected: Shape, sources: _Sources) -> list[TensorMap]:
    """Cut one run of rows of each expert out of ``mlp.experts.gate_up_proj`` (E, 2F, H) or take ``down_proj`` (E, H, F) whole."""
    assert rule.fused is not None
    leaf, part, parts = rule.fused
    base = rule.hf.format(i=layer, e=0).rsplit(".", 2)[0]
    found, used = sources.take(base, leaf), leaf
    if found is None:
        found, used = sources.take(f"{base}.{leaf}", "weight"), "weight"
    if found is None:
        return []
    module, shape = found
    experts, rows, columns = expected
    _check_shape(f"{module}.{used}", shape, (experts, rows * parts, columns))
    starts = [(expert * parts + part) * rows for expert in range(experts)]
    pieces = tuple(SourceRows(module, used, start, start + rows) for start in starts)
    if parts == 1:
        pieces = (SourceRows(module, used, 0, experts * rows),)
    return [TensorMap(rule.gguf.format(i=layer), "weight", expected, pieces, 0.0, rule.kind)]


def map_to_hf(rules: tuple[Rule, ...], dims: Mapping[str, int], parts: Parts, *, dropped: dict[str, str]) -> tuple[TensorMap, ...]:
    """Map GGUF base names to HF modules, the exact inverse of :func:`map_to_gguf`; the same errors."""
    sources = _Sources(parts, {name: name for name in parts})
    for name in _FACTORS:
        sources.drop(name, "rotary factors, kept as rope parameters of config.json", dropped)
    for name in parts:
        sources.drop_leaf(name, "input_scale", "llama.cpp's static scale of the layer's input; floats need none", dropped)
    tensors: list[TensorMap] = []
    missing: list[str] = []
    for rule, layer in _layers(rules, dims, block_order=False):
        made = _one_to_hf(rule, layer, dims, sources)
        if not made and rule.kind != "output":
            missing.append(rule.gguf.format(i=layer) + ".weight")
        tensors.extend(made)
    _missing(missing)
    sources.finish("HF")
    return tuple(tensors)


def _one_to_hf(rule: Rule, layer: int, dims: Mapping[str, int], sources: _Sources) -> list[TensorMap]:
    made: list[TensorMap] = []
    base, expected = rule.gguf.format(i=layer), rule.sizes(dims)
    found = sources.take(base, "weight")
    if found is not None and rule.transposed:
        _check_shape(f"{base}.weight", found[1], expected)
        made.append(_transposed(rule.hf.format(i=layer), base, expected[::-1], "conv1d"))
    elif found is not None:
        shape = expected if expected[:1] == (1,) and found[1] == expected[1:] else found[1]  # older files hold one row as a vector
        if rule.resizable and len(shape) == 2 and shape[0] < expected[0]:
            pieces = [SourceRows(base, "weight", 0, shape[0]), SourceRows("", "", 0, expected[0] - shape[0])]
            shape = (expected[0], shape[1])
        else:
            pieces = [_whole(base, "weight", shape, rule, dims, inverse=True)]
        _check_shape(f"{base}.weight", shape, expected)
        if "{e}" in rule.hf:
            return _experts_to_hf(rule, layer, base, expected)
        undone = 1.0 / float(rule.factor)
        shape = rule.sizes(dims, hf=True) if rule.hf_shape else shape
        made.append(TensorMap(rule.hf.format(i=layer), "weight", shape, tuple(pieces), 0.0 - rule.shift, rule.kind, factor=undone))
    if rule.bias and (found := sources.take(base, "bias")) is not None:
        _check_shape(f"{base}.bias", found[1], expected[:1])
        piece = _whole(base, "bias", found[1], rule, dims, inverse=True)
        made.append(TensorMap(rule.hf.format(i=layer), "bias", found[1], (piece,), 0.0, "bias"))
    return made


def _experts_to_hf(rule: Rule, layer: int, base: str, expected: Shape) -> list[TensorMap]:
    shape, kind = expected[1:], "linear" if rule.kind == "experts" else rule.kind
    rows = _rows(shape) if len(shape) > 1 else shape[0]
    return [
        TensorMap(
            rule.hf.format(i=layer, e=expert), "weight", shape,
            (SourceRows(base, "weight", expert * rows, (expert + 1) * rows),), 0.0 - rule.shift, kind,
        )
        for expert in range(expected[0])
    ]  # fmt: skip
