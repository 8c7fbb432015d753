"""LLM.int8() weights: one scale a row.

Source: ``nn.Linear8bitLt._save_to_state_dict`` and ``functional.int8_vectorwise_dequant`` of bitsandbytes 0.50.2.

| stored key    | dtype | shape  | meaning                                                                       |
|---------------|-------|--------|-------------------------------------------------------------------------------|
| weight        | I8    | (N, K) | codes -127 … 127                                                              |
| SCB           | F32   | (N,)   | the largest magnitude of the row                                              |
| weight_format | U8    | ()     | 0: rows as they are; older files have none. 1, 2, 3: tiles for old GPU kernels |

w = fp32(fp32(code * SCB) * c) with c = 7.874015718698502e-3, the float32 next to 1/127.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.protocol import Module, PartInfo, Piece
from qformats.scheme import Factor, Integer, No, ParamSpec, Scheme, Storage, Tile, Yes, whole

if TYPE_CHECKING:
    from qformats.tensor import QuantizedTensor

__all__ = ["RECIPROCAL", "SUFFIXES", "can_store", "layout", "read", "scheme", "storage", "storage_of", "write"]

SUFFIXES = frozenset({"SCB", "weight_format"})
RECIPROCAL = 0.007874015718698502  # a float32 number
_GRID = Integer(8, signed=True)
_TILINGS = {1: "col32", 2: "col_turing", 3: "col_ampere"}


def _part(module: Module, leaf: str, dtype: str, rank: int) -> RawTensor:
    raw = module.parts.get(leaf)
    if raw is None:
        raise BadFile(f"missing-{leaf}", f"there is no {module.name}.{leaf}", tensor=module.name, hint="fetch all shards")
    if raw.dtype != dtype:
        raise BadFile("wrong-dtype", f"is {raw.dtype}, expected {dtype}", tensor=raw.name)
    if len(raw.shape) != rank:
        raise BadFile("wrong-shape", f"has shape {raw.shape}, expected {rank} dimensions", tensor=raw.name)
    return raw


def _parts(module: Module) -> tuple[RawTensor, RawTensor]:
    """``weight`` and ``SCB``, checked against each other; ``Unsupported('int8-tiles')`` for a layout of old GPU kernels."""
    weight, scb = _part(module, "weight", "I8", 2), _part(module, "SCB", "F32", 1)
    if scb.shape != weight.shape[:1]:
        raise BadFile("wrong-shape", f"has shape {scb.shape}, expected {weight.shape[:1]}", tensor=scb.name)
    for raw, nbytes in ((weight, weight.shape[0] * weight.shape[1]), (scb, 4 * scb.shape[0])):
        if raw.nbytes != nbytes:
            raise BadFile("size", f"{raw.nbytes} bytes, expected {nbytes}", tensor=raw.name)
    if "weight_format" in module.parts and "format" not in module.memo:
        raw = _part(module, "weight_format", "U8", 0)
        tiling = raw.read()[0]
        if tiling:
            what = _TILINGS.get(tiling, f"format {tiling}")
            hint = "load and save it with bitsandbytes 0.44 on a GPU, which writes rows"
            raise Unsupported("int8-tiles", f"the codes are in the order of {what}, not in rows", tensor=raw.name, hint=hint)
        module.memo["format"] = tiling
    return weight, scb


def _scheme(shape: tuple[int, ...]) -> Scheme:
    scale = ParamSpec("float32", Tile((1, shape[1])))
    return Scheme(shape, _GRID, (scale, ParamSpec("float32", whole(shape), constant=RECIPROCAL)))


def scheme(module: Module) -> Scheme:
    """The scheme of the weight (N, K), from the headers."""
    return _scheme(_parts(module)[0].shape)


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Rows ``start:stop``: codes int8 (n, K), a float32 scale each row and the constant 1/127."""
    import torch

    from qformats.tensor import Param, QuantizedTensor, constant

    weight, scb = _parts(module)
    stop = weight.shape[0] if stop is None else stop
    if not 0 <= start < stop <= weight.shape[0]:
        raise UsageError("row-range", f"rows {start}:{stop} of a weight of {weight.shape[0]} rows", tensor=weight.name)
    shape = (stop - start, weight.shape[1])
    row_scales = torch.from_numpy(scb.row_range(0, 1)[0, start:stop].copy()).unsqueeze(1)
    if not bool(torch.isfinite(row_scales).all()):
        raise BadFile("not-finite", "holds NaN or infinite scales", tensor=scb.name, hint="the source is damaged")
    plane = torch.from_numpy(weight.row_range(start, stop)) if codes else torch.zeros((), dtype=torch.int8).expand(shape)
    return QuantizedTensor(shape, plane, _GRID, (Param(row_scales, Tile((1, shape[1]))), constant(RECIPROCAL, shape, torch.float32)))


def storage(k: int, *, labelled: bool = True) -> Storage:
    """The storage of rows of ``k`` weights; ``labelled``: with a ``weight_format``."""
    options: dict[str, object] = {} if labelled else {"weight_format": "absent"}
    return Storage("int8", _GRID, None, 8 + 32 / k, ("float32",), factor=Factor("float32", constant=RECIPROCAL), options=options)


def storage_of(module: Module) -> Storage:
    """The storage that ``write`` makes these parts of."""
    return storage(_parts(module)[0].shape[1], labelled="weight_format" in module.parts)


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K)."""
    if len(shape) != 2:
        raise Unsupported("rank", f"bitsandbytes stores matrices, not weights of {len(shape)} dimensions")
    parts = {"weight": PartInfo("I8", shape), "SCB": PartInfo("F32", shape[:1])}
    return parts if storage.options.get("weight_format") == "absent" else {**parts, "weight_format": PartInfo("U8", ())}


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Signed 8-bit codes under one float32 scale a row and the constant 1/127."""
    if len(scheme.shape) != 2 or scheme.grid != _GRID:
        return No("it is not a matrix of signed 8-bit codes")
    if scheme.zero_point or scheme.offset or scheme.signs or scheme.group_index or len(scheme.scales) != 2:
        return No("it has not one scale a row and a factor 1/127")
    row, factor = scheme.scales
    alike = (row.dtype, row.block) == ("float32", Tile((1, scheme.shape[1]))) and not row.inverse and not factor.inverse
    return Yes() if alike and factor.constant == RECIPROCAL else No("its scales are not one float32 a row and a factor 1/127")


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + n`` of the weight ``shape``; ``Unsupported('form')`` for a tensor in another form."""
    import numpy as np

    from qformats.tensor import QuantizedTensor

    answer = can_store(storage, tensor.scheme)
    if isinstance(answer, No):
        raise Unsupported("form", f"cannot be stored as int8: {answer.reason}")
    row_scales = tensor.scales[0].values
    assert not isinstance(row_scales, QuantizedTensor)
    pieces = [Piece("weight", tensor.codes.contiguous().numpy(), start), Piece("SCB", row_scales.contiguous().numpy(), start)]
    if start == 0 and storage.options.get("weight_format") != "absent":
        pieces.append(Piece("weight_format", np.zeros((1, 1), np.uint8)))
    return pieces
