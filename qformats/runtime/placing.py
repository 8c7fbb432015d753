"""Packed modules put into a model while transformers loads it: its loader reads the floats, ours reads what stands in codes.

transformers renames every key of a checkpoint, collects them by converter, and sets what the converters give, each tensor on the device
that the map says or on the disk (``convert_and_load_state_dict_in_model`` in ``core_model_loading.py`` of transformers 5.23.0). Two
transforms of ours stand before the model's own: a renaming that marks the keys whose values we make, and a converter that takes the marked
ones. One key of each packed weight stands for all its planes, which the converter reads by ``Supply``; the others stand for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qformats.errors import BadFile
from qformats.runtime import loader
from qformats.runtime.linear import TiedHead
from qformats.runtime.skeleton import part_of_transformers
from qformats.runtime.supply import Supply

if TYPE_CHECKING:
    from qformats.kernels.lower import Lowered
    from qformats.runtime.loader import Place

__all__ = ["Filling", "Placeholder", "transforms"]

PLANE = "codes0"  # every layout has it
_NOTHING = "qformats"  # what the keys that stand for nothing become


class Placeholder(nn.Module):
    """Where a packed module will be: so many bytes on the meta device, which is what a device map counts."""

    def __init__(self, nbytes: int, shape: tuple[int, ...], plain: nn.Module) -> None:
        super().__init__()
        self.register_buffer(PLANE, torch.empty(nbytes, dtype=torch.uint8, device="meta"))
        self.weight_shape = shape
        self.__dict__["plain"] = plain
        self._is_hf_initialized = True


@dataclass
class Filling:
    """What is made of an opened checkpoint's codes, and under which keys transformers asks for it.

    ``keys``: by a key of the checkpoint, the tensor of the model that it stands for, ``""`` for none. ``places``: packed modules by the
    tensor that stands for them. ``floats``: parameters that are codes in the checkpoint and floats in the model → the supply's name.
    """

    supply: Supply
    dtype: torch.dtype
    compute: str
    workers: int
    keys: dict[str, str] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    filled: set[str] = field(default_factory=set)
    _pool: ThreadPoolExecutor | None = None
    _coming: Iterator[tuple[str, list[list[Lowered]]]] | None = None
    _early: dict[str, list[list[Lowered]]] = field(default_factory=dict)

    @staticmethod
    def of(model: Any, supply: Supply, known: Mapping[str, str], dtype: torch.dtype, compute: str, workers: int) -> Filling:
        """Find what of ``model`` (on the meta device) is packed, and put placeholders there.

        ``known``: keys that transformers will ask for → what they are called in the model.
        """
        made = Filling(supply, dtype, compute, workers)
        ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
        places = list(loader.places(model, supply))
        packed = {place.module for place in places}
        coded = [n for n, _ in model.named_parameters() if made._is_ours(n) and n.rpartition(".")[0] not in packed and n not in ties]
        for place in places:
            target = f"{place.module}.down_proj.{PLANE}" if place.kind == "experts" else f"{place.module}.{PLANE}"
            made.places[target] = place
            made._claim(target, [name for stack in place.names for name in stack], place, known)
        for name in coded:
            made.floats[name] = name
            made._claim(name, [name], None, known)
        for place in places:
            _make_room(model, place, supply)
        _tie(model, ties, packed)
        if made.keys:  # what belongs to activations and caches is kept for saving
            extras = (supply.checkpoint.modules[module].parts[leaf].name for module, leaf in supply.checkpoint.extras)
            made.keys.update({key: "" for key in extras if key in known and key not in made.keys})
        left = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        made.keys.update({key: "" for name, key in supply.stored.items() if key in known and name in ties and name not in left})
        return made

    def _is_ours(self, name: str) -> bool:
        """Whether a parameter of floats is not what stands in the file under its key."""
        tensor = self.supply.tensors.get(name)
        if tensor is None or self.supply.checkpoint.unwritten is not None:
            return tensor is not None
        if self.supply.checkpoint.gguf is not None:
            return False  # the state dict has it
        return any(source.module and self.supply.checkpoint.is_quantized(source.module) for source in tensor.sources)

    def _claim(self, target: str, names: list[str], place: Place | None, known: Mapping[str, str]) -> None:
        """Let one key stand for ``target``, and the others of the same tensors, and the module's own biases, for nothing."""
        checkpoint = self.supply.checkpoint
        found: list[tuple[int, str]] = []
        if checkpoint.unwritten is not None:  # the files have other tensors than the supply
            start = target if place is None else f"{place.module}."
            found += [(2, key) for key, name in known.items() if name.startswith(start)]
        for name in names:
            found += [(0, key) for key in (self.supply.stored[name],) if key in known]
            for source in self.supply.tensors[name].sources:
                if checkpoint.gguf is None and source.module in checkpoint.modules:
                    found += [(raw.nbytes, raw.name) for raw in checkpoint.modules[source.module].parts.values() if raw.name in known]
        if place is not None:
            biases = (f"{place.module}{leaf}" for leaf in (".bias", ".gate_up_proj_bias", ".up_proj_bias", ".down_proj_bias"))
            found += [(1 << 62, self.supply.stored[bias]) for bias in biases if self.supply.stored.get(bias) in known]
        found = [pair for pair in sorted(set(found)) if not self.keys.get(pair[1])]
        if not found:
            raise BadFile("missing-tensor", "the checkpoint has no such tensor", path=checkpoint.path, tensor=names[0])
        for _, key in found:
            self.keys.setdefault(key, "")
        self.keys[found[0][1]] = target

    # ------------------------------------------------------------ what the converter gives

    def made(self, target: str, model: Any) -> Mapping[str, Tensor]:
        """The tensors that ``target`` stands for, by their names in the model; a packed module is put in its place."""
        self.filled.add(target)
        with torch.inference_mode(False), torch.no_grad():
            if target in self.floats:
                wanted = model.get_parameter(target).dtype
                return {target: self.supply.floats(self.floats[target]).to(wanted)}
            place = self.places[target]
            held = model.get_submodule(place.module)
            module = loader.packed_module(held.__dict__["plain"], self.supply, place, self._lowered(target), self.dtype, self.compute)
            module.train(model.training)
            tensors = dict(_emptied(module))
            model.set_submodule(place.module, module)
        if place.kind == "embedding":
            for head in model.modules():
                if isinstance(head, TiedHead) and head.__dict__["_embedding"] is held:
                    head.__dict__["_embedding"] = module
        return _Planes(model, target, {f"{place.module}.{name}": tensor for name, tensor in tensors.items()})

    def _lowered(self, target: str) -> list[list[Lowered]]:
        """The planes of a place; those of the next ones are read meanwhile."""
        if self._coming is None:
            self._pool = ThreadPoolExecutor(self.workers)
            order = sorted((key for key in self.keys if self.keys[key] in self.places), key=_natural)
            targets = [self.keys[key] for key in order]
            made = loader.in_order(self._pool, targets, lambda t: loader.lowered(self.supply, self.places[t]), self.workers)
            self._coming = zip(targets, made, strict=True)
        if target not in self._early:
            for name, segments in self._coming:
                self._early[name] = segments
                if name == target:
                    break
        return self._early.pop(target)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool, self._coming = None, None
        self._early.clear()

    def check(self) -> None:
        """``BadFile('missing-tensor')`` for what transformers did not ask for."""
        for target in (*self.places, *self.floats):
            if target not in self.filled:
                name = self.places[target].names[0][0] if target in self.places else target
                raise BadFile("missing-tensor", "transformers' loader passed over it", path=self.supply.checkpoint.path, tensor=name)


class _Planes(dict[str, Tensor]):
    """What a place's module holds, given to the loader one by one: the rest follows the first to a device, or to the disk."""

    def __init__(self, model: Any, first: str, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self._model, self._first = model, first

    def items(self) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        yield self._first, self.pop(self._first)
        device = self._model.get_buffer(self._first).device
        for name in list(self):
            tensor = self.pop(name)
            module, _, leaf = name.rpartition(".")
            owner = self._model.get_submodule(module)
            if device.type == "meta" or leaf not in owner._buffers:  # a parameter of a module on the disk always goes there
                yield name, tensor
            else:
                owner._buffers[leaf] = tensor.to(device)


def _emptied(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module, which has empty ones of their shapes then."""
    for prefix, owner in module.named_modules():
        start = f"{prefix}." if prefix else ""
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                yield start + name, buffer
                owner._buffers[name] = torch.empty_like(buffer, device="meta")
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield start + name, parameter.data
                owner._parameters[name] = nn.Parameter(torch.empty_like(parameter.data, device="meta"), requires_grad=False)


def _natural(key: str) -> Any:
    return part_of_transformers("core_model_loading", "dot_natural_key")(key)


def _make_room(model: Any, place: Place, supply: Supply) -> None:
    """A placeholder for a packed module, with about the bytes that it will have."""
    old = model.get_submodule(place.module)
    names = [name for stack in place.names for name in stack]
    nbytes = sum(_stored_nbytes(supply, name) for name in names)
    shape = supply.tensors[names[0]].shape
    if place.kind == "experts":
        room = nn.Module()
        room._is_hf_initialized = True  # type: ignore[assignment]
        room.__dict__["plain"] = old
        room.add_module("down_proj", Placeholder(nbytes, shape, old))
    else:
        room = Placeholder(nbytes, shape, old)
    model.set_submodule(place.module, room)


def _stored_nbytes(supply: Supply, name: str) -> int:
    modules = {source.module for source in supply.tensors[name].sources}
    checkpoint = supply.checkpoint
    whole = sum(raw.nbytes for module in modules for leaf, raw in checkpoint.modules[module].parts.items() if leaf != "bias")
    rows = sum(checkpoint.scheme(module).shape[0] if len(checkpoint.scheme(module).shape) == 2 else 0 for module in modules)
    return whole if not rows else min(whole, whole * supply.tensors[name].rows // rows)


def _tie(model: Any, ties: Mapping[str, str], packed: set[str]) -> None:
    """Heads of packed embeddings refer to them; what is packed itself is tied to nothing."""
    left = {}
    for name, source in ties.items():
        head, held = name.rpartition(".")[0], source.rpartition(".")[0]
        if held in packed and head not in packed and name.endswith(".weight"):
            bias = getattr(model.get_submodule(head), "bias", None)
            model.set_submodule(head, TiedHead(model.get_submodule(held), None if bias is None else bias.data))
        elif head not in packed and held not in packed:
            left[name] = source
    if left != ties:
        model.all_tied_weights_keys = left
        model._tied_weights_keys = {name: source for name, source in (model._tied_weights_keys or {}).items() if name in left}


# ---------------------------------------------------------------- transformers' transforms


class _Reads:
    """Stands for what the converter does; its inputs come uncast, because they are not looked at."""

    hf_quantizer = True


def transforms(filling: Filling) -> list[Any]:
    """The renaming and the converter that stand before a model's own."""
    renaming: Any = part_of_transformers("core_model_loading", "WeightRenaming")
    converter: Any = part_of_transformers("core_model_loading", "WeightConverter")
    numbers = {key: number for number, key in enumerate(filling.keys)}
    targets = list(filling.keys.values())

    class Mark(renaming):  # type: ignore[misc]
        """Gives the keys that are ours names that no other renaming knows."""

        def rename_source_key(self, key: str) -> tuple[str, str | None]:
            return (f"{_NOTHING}-{numbers[key]}-", _NOTHING) if key in numbers else (key, None)

        def __deepcopy__(self, memo: object) -> Any:
            return Mark(_NOTHING, _NOTHING)

    class Pack(converter):  # type: ignore[misc]
        """Takes the marked keys; makes what they stand for."""

        def rename_source_key(self, key: str) -> tuple[str, str | None]:
            found = re.search(rf"{_NOTHING}-(\d+)-", key)
            return (key, None) if found is None else (targets[int(found.group(1))] or _NOTHING, _NOTHING)

        def convert(self, layer_name: str, model: Any = None, loading_info: Any = None, **_: Any) -> Any:
            self.collected_tensors.clear()
            loading_info.unexpected_keys.discard(_NOTHING)
            return filling.made(layer_name, model)

        def __deepcopy__(self, memo: object) -> Any:
            return made()

    def made() -> Any:
        return Pack(_NOTHING, _NOTHING, [_Reads()], force_cpu=True)

    return [Mark(_NOTHING, _NOTHING), made()]
