"""Scale and zero of an HQQ layer as parameters: plain floats, or 8-bit codes with a scale and a zero of their own.

Source: ``HQQLinear.dequantize`` and ``Quantizer.dequantize`` in ``core/quantize.py`` of hqq 0.2.8: a quantized statistic is dequantized by
the routine of the weights, in the compute dtype. Its parts are ``scale_q`` and, under ``meta_scale.``, those of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile
from qformats.formats.hqq.state import Geometry, Layer, geometry_of, state_of
from qformats.formats.packed import FLOATS, float_tensor
from qformats.formats.protocol import Module
from qformats.scheme import Block, Integer, ParamSpec, Scheme, Tile, whole

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import Param

__all__ = ["nested_spec", "statistic_param"]


def _is_nested(found: Layer, leaf: str) -> bool:
    return bool(found.state.get(f"quant_{leaf}", False))


def _nested(module: Module, leaf: str, found: Layer) -> Geometry:
    """The geometry of a quantized statistic."""
    prefix = f"meta_{leaf}."
    state = {"axis": 0, "channel_wise": True, **state_of(module.parts, prefix)}
    if "nbits" not in state or f"{prefix}scale" not in module.parts or f"{prefix}zero" not in module.parts:
        raise BadFile(f"missing-meta-{leaf}", f"there is no whole {module.name}.meta_{leaf}", hint="fetch the file again")
    raw = found.scale if leaf == "scale" else found.zero
    plane = found.geometry.plane or (1, 1)
    if module.parts[f"{prefix}scale"].shape in ((), (1,)):
        state["channel_wise"] = False
    g = geometry_of(plane, state, f"{module.name}.meta_{leaf}")
    if raw.dtype not in ("U8", "I32") or raw.nbytes != g.slabs.nbytes:
        raise BadFile("wrong-shape", f"is {raw.dtype} of {raw.nbytes} bytes, expected {g.slabs.nbytes} bytes of codes", tensor=raw.name)
    for name in ("scale", "zero"):
        part = module.parts[prefix + name]
        if part.dtype not in FLOATS or part.nbytes != g.count * {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[part.dtype]:
            raise BadFile("wrong-shape", f"is {part.dtype} of shape {part.shape}, expected {g.count} floats", tensor=part.name)
    return g


def nested_spec(module: Module, leaf: str, found: Layer) -> Scheme | None:
    """The scheme of a quantized statistic in the whole weight, None of a plain one."""
    if not _is_nested(found, leaf):
        return None
    g, shape = _nested(module, leaf, found), _counts(found.geometry)
    block = whole(shape) if g.count == 1 else Tile((1,) * len(shape))
    specs = []
    for name in ("scale", "zero"):
        only = float(_floats(module.parts[f"meta_{leaf}.{name}"], found.compute)[0]) if g.count == 1 else None
        specs.append(ParamSpec(FLOATS[found.compute], block, constant=only))
    return Scheme(shape, Integer(g.bits), (specs[0],), specs[1])


def _counts(g: Geometry) -> tuple[int, ...]:
    """The shape of a parameter plane of the whole weight."""
    if g.kind == "rows":
        return (g.shape[0], g.shape[1] // g.group)
    return (1, 1) if g.kind == "whole" else (g.count,)


def _floats(raw: RawTensor, compute: str) -> Tensor:
    """All numbers of a plane in the compute dtype, as the owner casts them on load; ``BadFile('not-finite')`` for NaN and infinities."""
    import torch

    values = float_tensor(raw.array().reshape(-1), raw.dtype).to(getattr(torch, FLOATS[compute]))
    if not bool(torch.isfinite(values).all()):
        raise BadFile("not-finite", "holds NaN or infinities", tensor=raw.name, hint="the file is damaged or overflowed")
    return values


def statistic_param(module: Module, leaf: str, found: Layer, index: Tensor, block: Block) -> Param:
    """The numbers ``index`` of ``scale`` or ``zero`` on ``block``."""
    import torch

    from qformats.tensor import Param, QuantizedTensor

    raw = found.scale if leaf == "scale" else found.zero
    if not _is_nested(found, leaf):
        return Param(_kept(module, leaf, raw, found.compute)[index], block)
    g, prefix = _nested(module, leaf, found), f"meta_{leaf}."
    stored = torch.from_numpy(g.slabs.unpack(raw, 0, g.shape[0] * g.shape[1]))
    shape = tuple(index.shape)
    inner = index * 0 if g.kind == "whole" else index % g.count if g.kind == "cyclic" else index // g.group
    tile = Tile((1,) * len(shape))
    params = []
    for name in ("scale", "zero"):
        values = _floats(module.parts[prefix + name], found.compute)
        params.append(Param(values.reshape((1,) * len(shape)), whole(shape)) if g.count == 1 else Param(values[inner], tile))
    nested = QuantizedTensor(shape, stored[index], Integer(g.bits), (params[0],), params[1])
    return Param(nested, block, rounded_to=getattr(torch, FLOATS[found.compute]))


def _kept(module: Module, leaf: str, raw: RawTensor, compute: str) -> Tensor:
    """A plane, read once."""
    key = f"plane {leaf}"
    if key not in module.memo:
        module.memo[key] = _floats(raw, compute)
    kept: Tensor = module.memo[key]
    return kept
