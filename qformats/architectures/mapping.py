"""Names and row operations, HF modules ↔ GGUF tensors, as one list of invertible rules for each family.

A ``Rule`` pairs an HF module with a GGUF tensor; ``map_to_gguf`` and ``map_to_hf`` read the same rules in the two directions.
What a rule can do to a tensor acts on whole rows (rotary permutation, expert stacking, vocabulary trimming) or adds a constant to
a norm, so it applies to packed codes and to their parameters alike. Facts: llama.cpp, ``conversion/{llama,qwen,gemma}.py`` and
``gguf-py/gguf/tensor_mapping.py``.

``parts`` has the values that say what a tensor is made of, ``splits`` the tensors that are one in HF and several in GGUF.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from types import MappingProxyType

from qformats.architectures.parts import FUNCTIONS, Mapped, Parts, Shape, SourceRows, TensorMap
from qformats.architectures.rows import inverse_order, row_order
from qformats.architectures.rules import Rule
from qformats.architectures.splits import Split, join, joined_shape, take_apart
from qformats.errors import BadFile

__all__ = ["Mapped", "Parts", "Rule", "SourceRows", "TensorMap", "map_to_gguf", "map_to_hf"]

# never weights (llama.cpp, conversion/base.py prepare_tensors skips them too)
_BUFFERS = (
    ".rotary_emb.inv_freq", "embeddings.position_ids", ".attention.masked_bias", ".attention.bias", ".attn.masked_bias", ".attn.bias")
# the linear layers of one expert whose matrices a stack holds
_ONE_BY_ONE = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_FACTORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
# the other halves of a multimodal checkpoint; only the text model is converted
_OTHER_TOWERS = ("vision_tower.", "vision_model.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


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

    def __init__(self, parts: Parts, canonical: Mapping[str, str], by_outputs: Container[str] | None = None) -> None:
        self._parts = parts
        self.by_outputs = by_outputs
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

    def stored(self, name: str, leaf: str) -> str:
        """The leaf of a norm under the name it has here: the first BERT and its like say gamma and beta."""
        module = self._module.get(name)
        old = {"weight": "gamma", "bias": "beta"}.get(leaf, leaf)
        return old if module is not None and leaf not in self._parts[module] and old in self._parts[module] else leaf

    def drop(self, name: str, reason: str, dropped: dict[str, str]) -> None:
        for leaf in self._parts[self._module[name]] if name in self._module else ():
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
        name = module.removeprefix("language_model.").removeprefix("bert.")
        if name.startswith("model.language_model."):
            name = "model." + name.removeprefix("model.language_model.")
        names[name] = module
    return names


def map_to_gguf(
    rules: tuple[Rule, ...],
    dims: Mapping[str, int],
    parts: Parts,
    *,
    tied: bool,
    dropped: dict[str, str],
    left_out: Mapping[str, str] = MappingProxyType({}),
    by_outputs: Container[str] | None = None,
) -> tuple[TensorMap, ...]:
    """Map HF modules to GGUF tensors; raises ``BadFile`` (``unmapped-tensor``, ``missing-tensor``, ``tensor-shape``).

    ``left_out``: beginnings of plain names that have no place in a GGUF, with the reason. ``by_outputs``: see ``Binding.to_gguf``.
    """
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
    names = _canonical_hf(kept, rules)
    sources = _Sources(kept, names, by_outputs)
    for name in names:
        if (why := next((reason for start, reason in left_out.items() if name.startswith(start)), None)) is not None:
            sources.drop(name, why, dropped)
    outputs = {"lm_head", *(rule.hf for rule in rules if rule.kind == "output")} - {rule.hf for rule in rules if rule.optional}
    for name in outputs if tied else ():
        sources.drop(name, "tied: the same weights as the embedding", dropped)
    for name in (name for rule in rules for name in rule.copies):
        sources.drop(name, "the same weights as the embedding", dropped)
    tensors: list[TensorMap] = []
    missing: list[str] = []
    for rule, layer in _layers(rules, dims, block_order=True):
        if rule.split is not None:
            made = _split_to_gguf(rule, rule.split, rules, layer, dims, sources)
        else:
            made = _experts_to_gguf(rule, layer, dims, sources) if "{e}" in rule.hf else _one_to_gguf(rule, layer, dims, sources)
        if not made and not (tied and rule.kind == "output") and not rule.optional:
            missing.append(f"{rule.hf.format(i=layer, e=0)}.{rule.leaf if rule.split is None else rule.split.leaf}")
        tensors.extend(made)
    _missing(missing)
    sources.finish("GGUF")
    return tuple(tensors)


def _one_to_gguf(rule: Rule, layer: int, dims: Mapping[str, int], sources: _Sources) -> list[TensorMap]:
    made: list[TensorMap] = []
    name, target = rule.hf.format(i=layer), rule.gguf.format(i=layer)
    leaf, bias = (sources.stored(name, own) if rule.kind == "norm" else own for own in (rule.leaf, "bias"))
    found = sources.take(name, leaf)
    if found is not None and rule.transposed and found[0] not in (sources.by_outputs or ()):
        _check_shape(f"{found[0]}.weight", found[1], rule.sizes(dims)[::-1])
        made.append(_transposed(target, found[0], rule.sizes(dims), rule.kind))
    elif found is not None:
        module, shape = found
        expected = rule.sizes(dims, hf=True)
        piece = _whole(module, leaf, shape, rule, dims, inverse=False)
        if rule.resizable and len(shape) == 2 and shape[0] > expected[0]:
            piece, shape = SourceRows(module, leaf, 0, expected[0]), expected
        _check_shape(f"{module}.{leaf}", shape, expected)
        shape = rule.sizes(dims) if rule.hf_shape else shape
        made.append(
            TensorMap(
                target, rule.gguf_leaf, shape, (piece,), rule.shift, rule.kind, factor=float(rule.factor), function=rule.function
            )
        )  # fmt: skip
    if rule.bias and (found := sources.take(name, bias)) is not None:
        module, shape = found
        _check_shape(f"{module}.{bias}", shape, rule.sizes(dims)[:1])
        made.append(TensorMap(target, "bias", shape, (_whole(module, bias, shape, rule, dims, False),), 0.0, "bias"))
    return made


def _transposed(target: str, module: str, shape: Shape, kind: str) -> TensorMap:
    return TensorMap(target, "weight", shape, (SourceRows(module, "weight", 0, shape[0], transposed=(0, shape[1])),), 0.0, kind)


def _siblings(rule: Rule, split: Split, rules: tuple[Rule, ...]) -> list[Rule]:
    """All rules whose GGUF tensors make the HF tensor of ``rule``, in the order of their parts."""
    same = [r for r in rules if r.split is not None and r.hf == rule.hf and r.split.leaf == split.leaf]
    return sorted(same, key=lambda r: r.split.part if r.split else 0)


def _split_to_gguf(
    rule: Rule, split: Split, rules: tuple[Rule, ...], layer: int, dims: Mapping[str, int], sources: _Sources
) -> list[TensorMap]:
    """One part of an HF tensor, which is ``module.leaf`` or, packed, the weight of a module of that name."""
    name, leaf = rule.hf.format(i=layer), split.leaf
    found = sources.take(name, leaf)
    packed = False
    if found is None:
        found, leaf = sources.take(f"{name}.{leaf}", "weight"), "weight"
        packed = found is not None and (sources.by_outputs is None or found[0] in sources.by_outputs)
    if found is None and rule.fused is not None and (made := _fused_to_gguf(rule, layer, rule.sizes(dims), sources)):
        return made
    if found is None:
        return _one_by_one_to_gguf(rule, split, layer, dims, sources)
    shapes = [other.sizes(dims) for other in _siblings(rule, split, rules)]
    _check_shape(f"{found[0]}.{leaf}", found[1], joined_shape(split, shapes, packed))
    pieces = take_apart(split, found[0], leaf, shapes, packed)
    return [TensorMap(rule.gguf.format(i=layer), rule.gguf_leaf, rule.sizes(dims), pieces, 0.0, rule.kind)]


def _one_by_one_to_gguf(rule: Rule, split: Split, layer: int, dims: Mapping[str, int], sources: _Sources) -> list[TensorMap]:
    """A stack out of linear layers, ``experts.3.gate_proj``: llm-compressor and AutoRound take stacks apart to quantize their experts."""
    leaf = "bias" if split.leaf.endswith("_bias") else "weight"
    names = _ONE_BY_ONE.get(split.leaf.removesuffix("_bias"), ())
    expected, base = rule.sizes(dims), rule.hf.format(i=layer)
    pieces: list[SourceRows] = []
    for expert in range(expected[0] if names else 0):
        found = sources.take(f"{base}.{expert}.{names[split.part]}", leaf)
        if found is None:
            break
        _check_shape(f"{found[0]}.{leaf}", found[1], expected[1:])
        pieces.append(SourceRows(found[0], leaf, 0, _rows(expected[1:])))
    if not pieces:
        return []
    if len(pieces) != expected[0]:
        _missing([f"{base}.{len(pieces)}.{names[split.part]}.{leaf}"])
    return [TensorMap(rule.gguf.format(i=layer), rule.gguf_leaf, expected, tuple(pieces), 0.0, rule.kind)]


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
    bases = {rule.experts.format(i=layer), rule.stack.format(i=layer)} - {""}
    places = [place for base in sorted(bases) for place in ((base, leaf), (f"{base}.{leaf}", "weight"))]
    found, used = next(((taken, place[1]) for place in places if (taken := sources.take(*place)) is not None), (None, ""))
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


def map_to_hf(
    rules: tuple[Rule, ...], dims: Mapping[str, int], parts: Parts, *, dropped: dict[str, str], packed: bool = False
) -> tuple[TensorMap, ...]:
    """Map GGUF base names to HF modules, the exact inverse of :func:`map_to_gguf`; the same errors. ``packed``: see ``Split``."""
    sources = _Sources(parts, {name: name for name in parts})
    for name in _FACTORS:
        sources.drop(name, "rotary factors, kept as rope parameters of config.json", dropped)
    for name in parts:
        sources.drop_leaf(name, "input_scale", "llama.cpp's static scale of the layer's input; floats need none", dropped)
    tensors: list[TensorMap] = []
    missing: list[str] = []
    for rule, layer in _layers(rules, dims, block_order=False):
        if rule.split is not None:
            made = _split_to_hf(rule, rule.split, rules, layer, dims, sources, packed)
            complete = bool(made) or rule.split.part > 0
        else:
            made = _one_to_hf(rule, layer, dims, sources)
            complete = bool(made) or rule.kind == "output"
        if not complete:
            missing.append(f"{rule.gguf.format(i=layer)}.{rule.gguf_leaf}")
        tensors.extend(made)
    _missing(missing)
    sources.finish("HF")
    return tuple(tensors)


def _split_to_hf(
    rule: Rule, split: Split, rules: tuple[Rule, ...], layer: int, dims: Mapping[str, int], sources: _Sources, packed: bool
) -> list[TensorMap]:
    """The whole HF tensor at the rule of its first part, nothing at the others."""
    if split.part:
        return []
    names, shapes, parts = [], [], _siblings(rule, split, rules)
    for part in parts:
        base = part.gguf.format(i=layer)
        found = sources.take(base, part.gguf_leaf)
        if found is None:
            return []
        shapes.append(part.sizes(dims))
        _check_shape(f"{base}.{part.gguf_leaf}", found[1], shapes[-1])
        names.append((base, part.gguf_leaf))
    target, leaf, as_module = rule.hf.format(i=layer), split.leaf, packed and len(shapes[0]) == 3 and split.layout == "alternate"
    if as_module:
        target, leaf = f"{target}.{leaf}", "weight"
    return [join(split, target, leaf, names, shapes, as_module, rule.kind)]


def _one_to_hf(rule: Rule, layer: int, dims: Mapping[str, int], sources: _Sources) -> list[TensorMap]:
    made: list[TensorMap] = []
    base, expected = rule.gguf.format(i=layer), rule.sizes(dims)
    found = sources.take(base, rule.gguf_leaf)
    if found is not None and rule.transposed:
        _check_shape(f"{base}.weight", found[1], expected)
        made.append(_transposed(rule.hf.format(i=layer), base, expected[::-1], "conv1d"))
    elif found is not None:
        shape = expected if expected[:1] == (1,) and found[1] == expected[1:] else found[1]  # older files hold one row as a vector
        if rule.resizable and len(shape) == 2 and shape[0] < expected[0]:
            pieces = [SourceRows(base, rule.gguf_leaf, 0, shape[0]), SourceRows("", "", 0, expected[0] - shape[0])]
            shape = (expected[0], shape[1])
        else:
            pieces = [_whole(base, rule.gguf_leaf, shape, rule, dims, inverse=True)]
        _check_shape(f"{base}.{rule.gguf_leaf}", shape, expected)
        if "{e}" in rule.hf:
            return _experts_to_hf(rule, layer, base, expected)
        factor, function = 1.0 / float(rule.factor), FUNCTIONS.get(rule.function, "")
        shape, target = rule.sizes(dims, hf=True) if rule.hf_shape else shape, rule.hf.format(i=layer)
        made.append(
            TensorMap(target, rule.leaf, shape, tuple(pieces), 0.0 - rule.shift, rule.kind, factor=factor, function=function)
        )  # fmt: skip
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
