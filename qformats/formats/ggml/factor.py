"""The factor of a whole tensor: ``.scale`` beside ``.weight``, F32, one number or one for each expert.

Source: the pass over optional ``.scale`` tensors in ``src/llama-model.cpp`` of llama.cpp v0.5.0, which multiplies a layer's output by it
whatever type the weight has, and ``_repack_nvfp4`` in ``conversion/base.py``, which writes it for NVFP4. Here it is one more scale of
the canonical tensor, the last.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported
from qformats.formats.protocol import Module, PartInfo, Piece
from qformats.scheme import Factor, ParamSpec, Scheme, Storage, Tile, whole

if TYPE_CHECKING:
    from qformats.tensor import QuantizedTensor

__all__ = ["LEAF", "find", "has_factor", "multiplied", "part", "pieces", "spec", "split", "with_factor"]

LEAF = "scale"


def find(module: Module, shape: tuple[int, ...]) -> RawTensor | None:
    """The ``.scale`` part of a weight ``shape``, or None; ``BadFile`` for another dtype (``wrong-dtype``) or shape (``wrong-shape``)."""
    raw = module.parts.get(LEAF)
    if raw is None:
        return None
    name = f"{module.name}.{LEAF}"
    if raw.dtype != "F32":
        raise BadFile("wrong-dtype", f"{LEAF} is {raw.dtype}, expected F32", tensor=name)
    allowed = ((), (1,), *(((shape[0],),) if len(shape) > 2 else ()))
    if tuple(raw.shape) not in allowed:
        raise BadFile("wrong-shape", f"{LEAF} has shape {tuple(raw.shape)}, expected {allowed[-1]}", tensor=name)
    return raw


def _each_expert(raw: RawTensor, shape: tuple[int, ...]) -> bool:
    return len(shape) > 2 and prod(raw.shape) == shape[0] > 1


def spec(raw: RawTensor, shape: tuple[int, ...]) -> ParamSpec:
    """The factor in the scheme of a weight ``shape``."""
    tile = Tile((1, *shape[1:])) if _each_expert(raw, shape) else whole(shape)
    return ParamSpec("float32", tile)


def multiplied(tensor: QuantizedTensor, raw: RawTensor, shape: tuple[int, ...], start: int) -> QuantizedTensor:
    """Rows from ``start`` (over all experts) of the weight ``shape``, as ``tensor`` (n, K), with the factor as its last scale."""
    import torch

    from qformats.tensor import Param

    values = torch.from_numpy(raw.array().reshape(-1).astype("<f4"))
    n, k = tensor.shape
    if _each_expert(raw, shape):
        expert = torch.arange(start, start + n) // prod(shape[1:-1])
        factor = Param(values[expert].unsqueeze(1), Tile((1, k)))
    else:
        factor = Param(values.reshape(1, 1), whole((n, k)))
    return replace(tensor, scales=(*tensor.scales, factor))


def with_factor(storage: Storage) -> Storage:
    """The storage of the same type with a ``.scale`` beside it."""
    return replace(storage, factor=Factor("float32"))


def has_factor(storage: Storage) -> bool:
    """Whether the storage writes a ``.scale``."""
    return storage.factor is not None


def part(shape: tuple[int, ...]) -> PartInfo:
    """The stored part for a weight ``shape``: one number for each expert, or one."""
    return PartInfo("F32", (shape[0],) if len(shape) > 2 else (1,))


def split(scheme: Scheme) -> Scheme | None:
    """The scheme without its factor, or None if its last scale is not one: float32, for whole rows at least."""
    if len(scheme.scales) < 2:
        return None
    last = scheme.scales[-1]
    rows = isinstance(last.block, Tile) and last.block.sizes[-1] >= scheme.shape[-1]
    if last.dtype != "float32" or last.inverse or last.nested is not None or not rows:
        return None
    return replace(scheme, scales=scheme.scales[:-1])


def pieces(tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """The factors of the experts that rows ``start : start + n`` touch; ``Unsupported('form')`` if rows of one expert differ."""
    import numpy as np

    values: Any = tensor.scales[-1].values
    n, rows = tensor.shape[0], prod(shape[1:-1]) if len(shape) > 2 else shape[0]
    each = values.expand(n, 1).reshape(n).numpy()
    expert = np.arange(start, start + n) // rows
    first = np.flatnonzero(np.diff(expert, prepend=-1))
    bits = each.view(np.uint32)
    if not np.array_equal(bits[first].repeat(np.diff(first, append=n)), bits):
        raise Unsupported("form", "one tensor (or expert) has one factor, these rows have several")
    return [Piece(LEAF, each[first].astype("<f4"), int(expert[0]))]
