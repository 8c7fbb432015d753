"""A checkpoint with adapters merged in: what they touch is float32 that is computed when it is read, the rest is as it was.

An adapter names modules as transformers does. In a checkpoint of that layout they are found by name; in a GGUF through the model's
architecture, whose map says which stored rows are which rows of the module. Whatever a conversion does to rows (permutation, splitting,
stacking of experts) it then does to the merged weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from converters.adapters import Adapter, LowRank
from converters.lora import WRONG_BASE
from converters.merged_rows import LowRankRows, MergedSource, Rows, SavedRows, StoredRows, ThreadSlabs
from qformats.architectures.mapping import SourceRows, TensorMap
from qformats.architectures.places import Places
from qformats.checkpoint import Checkpoint
from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, QFormatError, Unsupported
from qformats.formats.protocol import Match, Module

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["MergedCheckpoint", "merge", "merged_into"]

Key = tuple[str, str]
_FLOAT_CONVERSION = "convert the GGUF to floats first (--to hf), and merge the adapter into that"


@dataclass(frozen=True)
class MergedCheckpoint(Checkpoint):
    """``base`` with other values in some tensors: ``chains`` by (module, leaf), ``touched`` names the adapters of each."""

    base: Checkpoint | None = None
    chains: Mapping[Key, Rows] = field(default_factory=dict)
    touched: Mapping[Key, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def modules(self) -> dict[str, Module]:
        """The modules of ``base``, merged tensors as float32 that is computed when it is read."""
        assert self.base is not None
        modules, shapes = dict(self.base.modules), self.base.shapes()
        by_module: dict[str, dict[str, RawTensor]] = {}
        for (name, leaf), chain in self.chains.items():
            shape = shapes[name][leaf]
            rows, width = _flat(shape)
            source = MergedSource(f"{name}.{leaf}", chain, rows, width)
            by_module.setdefault(name, {})[leaf] = RawTensor(f"{name}.{leaf}", "F32", shape, source, 0, source.size)
        for name, parts in by_module.items():
            old = modules[name]
            dense = "weight" in parts and self.base.is_quantized(name)
            kept = {leaf: raw for leaf, raw in old.parts.items() if leaf in shapes[name] and leaf not in parts} if dense else old.parts
            match = Match("gguf" if self.gguf else "hf", old.match.config if self.gguf else {}) if dense else old.match
            modules[name] = Module(name, {**kept, **parts}, match)
        return modules

    def _is_quantized(self, parts: Mapping[str, RawTensor]) -> bool:
        weight = parts.get("weight")
        merged = weight is not None and isinstance(weight.source, MergedSource)
        return not merged and super()._is_quantized(parts)

    @cached_property
    def by_outputs(self) -> frozenset[str]:
        """Those of ``base``: a merged matrix has the axes of its codes."""
        assert self.base is not None
        return self.base.by_outputs

    @property
    def has_codes(self) -> bool:
        """Whether ``base`` has any: merged floats are to be codes again."""
        assert self.base is not None
        return self.base.has_codes


def merged_into(checkpoint: Checkpoint, tensor: TensorMap) -> tuple[str, ...]:
    """The adapters that have a part in a target tensor, in the order they are merged."""
    if not isinstance(checkpoint, MergedCheckpoint):
        return ()
    found = (checkpoint.touched.get((source.module, source.leaf), ()) for source in tensor.sources)
    return tuple(dict.fromkeys(name for names in found for name in names))


def merge(checkpoint: Checkpoint, adapters: Iterable[Adapter]) -> Checkpoint:
    """The checkpoint with ``adapters`` merged in, one after the other; itself where there are none.

    Raises ``BadFile`` (``unmapped-tensor``, ``tensor-shape``, ``lora-bias``) for adapters of another model, ``Unsupported``
    (``lora-tied``, ``lora-gguf``) for what this checkpoint cannot express.
    """
    given = tuple(adapters)
    if not given:
        return checkpoint
    builder = _Builder(checkpoint)
    for adapter in given:
        builder.add(adapter)
    base = {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    touched = {key: tuple(names) for key, names in builder.touched.items()}
    return MergedCheckpoint(**base, base=checkpoint, chains=builder.chains, touched=touched)


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and width; each element of a vector is a row."""
    return (prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (prod(shape), 1)


# ---------------------------------------------------------------- where a module is


@dataclass(frozen=True)
class _Piece:
    """Stored rows ``start : start + count`` are rows ``first …`` of the module's tensor; stored row i is row ``index[i]`` of these."""

    module: str
    leaf: str
    start: int
    count: int
    first: int = 0
    index: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True)
class _Spot:
    """A module's tensor in the checkpoint: its ``shape`` as transformers has it, its pieces; ``flipped`` where (N, K) stands for (K, N)."""

    shape: tuple[int, ...]
    pieces: tuple[_Piece, ...]
    flipped: bool = False
    kind: str = "linear"
    transposed: bool | None = None


class _Spots:
    """Finds modules by the names that adapters have for them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.shapes = checkpoint.shapes()
        self._plain: dict[str, str] = {}
        if checkpoint.gguf is None:
            for name in checkpoint.modules:
                self._plain.setdefault(_plain(name), name)
        else:
            self._check_rows()
            self._mapped = {_plain(t.target) + "." + t.leaf: t for t in checkpoint.binding.to_hf(self.shapes).tensors}

    @cached_property
    def places(self) -> Places | None:
        """The architecture's own words, where it is known."""
        try:
            return Places(self.checkpoint.binding)
        except QFormatError:
            return None

    @cached_property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        if self.places is not None:
            return self.places.binding.tied
        return bool(self.checkpoint.config.get("tie_word_embeddings"))

    def find(self, module: str, leaf: str) -> _Spot | None:
        """The place of a tensor, None where the model has none."""
        if self.checkpoint.gguf is not None:
            return self._in_gguf(module, leaf)
        name = module if module in self.shapes else self._plain.get(_plain(module))
        if name is None or leaf not in self.shapes[name]:
            return None
        shape = self.shapes[name][leaf]
        place = None if self.places is None else self.places.find(module)
        turned = None if place is None else place.rule.transposed and name not in self.checkpoint.by_outputs
        return _Spot(shape, (_Piece(name, leaf, 0, _flat(shape)[0]),), kind=self.kind(module), transposed=turned)

    def kind(self, module: str) -> str:
        """What a module is, by the architecture or by its name."""
        place = None if self.places is None else self.places.find(module)
        return _kind_by_name(module) if place is None else place.rule.kind

    def _in_gguf(self, module: str, leaf: str) -> _Spot | None:
        tensor = self._mapped.get(f"{_plain(module)}.{leaf}")
        if tensor is None:
            return None
        sources = tensor.sources
        if len(sources) == 1 and sources[0].transposed is not None and (sources[0].start, sources[0].stop) == (0, tensor.shape[0]):
            low, high = sources[0].transposed
            return _Spot(tensor.shape, (_Piece(sources[0].module, sources[0].leaf, low, high - low),), True, tensor.kind, True)
        odd = tensor.weave or tensor.altered or any(s.transposed or s.columns != (0, 1) for s in sources)
        if odd or tensor.constant is not None:
            why = "its values in a GGUF are computed of those it has in transformers, so that they cannot be merged there"
            raise Unsupported("lora-gguf", why, tensor=module, hint=_FLOAT_CONVERSION)
        pieces, first = [], 0
        for source in sources:
            pieces += [_piece(source, first, tensor)] if source.module else []
            first += source.stop - source.start
        return _Spot(tensor.shape, tuple(pieces), False, tensor.kind, False)

    def _check_rows(self) -> None:
        """A GGUF made of act-order codes has its rows in an order that only its record tells."""
        restore = (self.checkpoint.provenance or {}).get("restore")
        if isinstance(restore, dict) and restore.get("orders"):
            why = "its rows were reordered when it was made of act-order codes, and an adapter knows their first order"
            raise Unsupported("lora-gguf", why, path=self.checkpoint.path, hint="merge the adapter into the checkpoint it was made of")


def _piece(source: SourceRows, first: int, tensor: TensorMap) -> _Piece:
    import numpy as np

    count = source.stop - source.start
    if source.index is None:
        return _Piece(source.module, source.leaf, source.start, count, first)
    stored = np.full(count, -1, np.int64)
    if int(source.index.max()) < count:
        stored[source.index] = np.arange(count)
    if (stored < 0).any():
        raise Unsupported("lora-gguf", "its rows are spread over others' in a GGUF", tensor=tensor.name, hint=_FLOAT_CONVERSION)
    return _Piece(source.module, source.leaf, source.start, count, first, stored)


def _plain(name: str) -> str:
    """A module's name without the words that a base model or a wrapper around it puts in front."""
    for word in ("language_model.", "model.", "transformer.", "language_model."):
        name = name.removeprefix(word)
    return name


def _kind_by_name(module: str) -> str:
    last = module.rpartition(".")[2]
    return "output" if last in ("lm_head", "embed_out") else "embedding" if last in ("embed_tokens", "wte", "word_embeddings") else "linear"


# ---------------------------------------------------------------- what is done there


class _Builder:
    """Chains of changes, adapter by adapter."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.spots, self.slabs = checkpoint, _Spots(checkpoint), ThreadSlabs(checkpoint)
        self.chains: dict[Key, Rows] = {}
        self.touched: dict[Key, list[str]] = {}

    def add(self, adapter: Adapter) -> None:
        """All changes of one adapter: tensors that are replaced first, as PEFT loads them."""
        self._check_all(adapter)
        for (module, leaf), raw in adapter.saved.items():
            self._replace(adapter, module, leaf, raw)
        for module, pair in adapter.pairs.items():
            self._add_pair(adapter, module, pair)
            if pair.bias is not None:
                self._add_bias(adapter, module, pair, pair.bias)

    def _check_all(self, adapter: Adapter) -> None:
        """Every module and shape before anything is built, so that one message tells of all that is missing."""
        wanted = [*((module, "weight") for module in adapter.pairs), *adapter.saved]
        found = {key: self.spots.find(*key) for key in wanted}
        for (module, _), spot in found.items():
            self._check_tied(module, self.spots.kind(module) if spot is None else spot.kind)
        missing = [f"{module}.{leaf}" for (module, leaf), spot in found.items() if spot is None]
        if missing:
            message = f"the model lacks {len(missing)} tensors that adapter {adapter.name!r} changes: {_some(missing)}"
            raise BadFile("unmapped-tensor", message, tensor=missing[0], hint="check that the adapter was trained on this model")
        wrong = []
        for (module, leaf), spot in found.items():
            assert spot is not None
            pair = adapter.pairs.get(module) if leaf == "weight" else None
            if pair is not None and _orientation(pair, spot) is None:
                wrong.append(f"{module}: A {pair.a.shape} and B {pair.b.shape}, the weight is {spot.shape}")
            if (module, leaf) in adapter.saved and adapter.saved[module, leaf].shape != spot.shape:
                wrong.append(f"{module}.{leaf}: {adapter.saved[module, leaf].shape}, the model has {spot.shape}")
        if wrong:
            message = f"{len(wrong)} tensors of adapter {adapter.name!r} do not fit the model: {_some(wrong, '; ')}"
            raise BadFile("tensor-shape", message, hint="check that the adapter was trained on this model, its vocabulary not resized")

    def _check_tied(self, module: str, kind: str) -> None:
        if kind in ("embedding", "output") and self.spots.tied:
            why = "this model uses one matrix as embedding and output, and the adapter changes only one of the two uses"
            hint = "untie them first: save the model with tie_word_embeddings false and an lm_head of its own"
            raise Unsupported("lora-tied", why, tensor=module, hint=hint)

    def _chain(self, module: str, leaf: str, adapter: Adapter) -> Rows:
        """What there is so far of a tensor, which this adapter will change."""
        names = self.touched.setdefault((module, leaf), [])
        names += [adapter.title] if adapter.title not in names else []
        return self.chains.get((module, leaf)) or self._own(module, leaf)

    def _own(self, module: str, leaf: str) -> Rows:
        return StoredRows(self.checkpoint, self.slabs, module, leaf)

    def _replace(self, adapter: Adapter, module: str, leaf: str, raw: RawTensor) -> None:
        spot = self._spot(module, leaf)
        if spot.flipped:
            raise Unsupported("lora-gguf", "a replaced weight that a GGUF holds transposed", tensor=module, hint=_FLOAT_CONVERSION)
        for piece in spot.pieces:
            before = self._chain(piece.module, piece.leaf, adapter)
            made = SavedRows(before, raw, piece.start, piece.count, piece.first, piece.index, adapter.weight)
            self.chains[piece.module, piece.leaf] = made

    def _add_pair(self, adapter: Adapter, module: str, pair: LowRank) -> None:
        from qformats.formats.dense import read_float

        spot = self._spot(module, "weight")
        turned = _orientation(pair, spot)
        a, b = read_float(pair.a), read_float(pair.b)
        left, right = (a.T, b.T) if turned else (b, a)
        magnitude = None if pair.magnitude is None else read_float(pair.magnitude).reshape(-1)
        if turned and magnitude is not None and self.checkpoint.gguf is not None:
            why = "lengths of the columns of an embedding, of which a GGUF may lack rows"
            raise Unsupported("lora-gguf", why, tensor=module, hint=_FLOAT_CONVERSION)
        for piece in spot.pieces:
            chain = self._chain(piece.module, piece.leaf, adapter)
            total = _flat(self.spots.shapes[piece.module][piece.leaf])[0]
            rows = magnitude if turned or magnitude is None else _in_order(magnitude, piece)
            self.chains[piece.module, piece.leaf] = LowRankRows(
                chain, self._own(piece.module, piece.leaf), piece.start, total, _in_order(left, piece), right,
                pair.scaling, adapter.weight, rows, bool(turned),
            )  # fmt: skip

    def _add_bias(self, adapter: Adapter, module: str, pair: LowRank, bias: RawTensor) -> None:
        import torch

        from qformats.formats.dense import read_float

        spot = self.spots.find(module, "bias")
        if spot is None or spot.shape != bias.shape:
            hint = "merge it with PEFT into a model with that bias"
            raise BadFile("lora-bias", "has a bias to add and the model's layer has none of that shape", tensor=module, hint=hint)
        values, one = read_float(bias).reshape(-1, 1), torch.ones(1, 1)
        for piece in spot.pieces:
            chain, total = self._chain(piece.module, piece.leaf, adapter), spot.shape[0]
            left = _in_order(values, piece)
            own = self._own(piece.module, piece.leaf)
            made = LowRankRows(chain, own, piece.start, total, left, one, pair.scaling, adapter.weight)
            self.chains[piece.module, piece.leaf] = made

    def _spot(self, module: str, leaf: str) -> _Spot:
        spot = self.spots.find(module, leaf)
        if spot is None:
            raise BadFile("unmapped-tensor", "the base model has no such layer", tensor=module, hint=WRONG_BASE)
        return spot


def _in_order(values: Tensor, piece: _Piece) -> Tensor:
    """Rows of a module's factor in the order of the stored rows."""
    import torch

    part = values[piece.first : piece.first + piece.count]
    return part if piece.index is None else part[torch.from_numpy(piece.index)]


def _orientation(pair: LowRank, spot: _Spot) -> bool | None:
    """Whether the stored rows are the pair's inputs, None where the shapes do not fit: PEFT looks at the layer, not at its option."""
    if len(spot.shape) != 2:
        return None
    shape = spot.shape[::-1] if spot.flipped else spot.shape
    outputs, inputs = pair.b.shape[0], pair.a.shape[1]
    said = pair.embedding or (pair.transposed if spot.transposed is None else spot.transposed)
    if spot.flipped:
        said = False
    fits = {False: (outputs, inputs) == shape, True: (inputs, outputs) == shape}
    if fits[said]:
        return said
    return not said if fits[not said] and spot.transposed is None and not pair.embedding else None


def _some(names: list[str], glue: str = ", ") -> str:
    return glue.join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
