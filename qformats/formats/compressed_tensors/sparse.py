"""Weights of compressed-tensors that are floats: 2:4 and unstructured bitmasks of old releases, and dense ones of unfinished checkpoints.

Source: compressed-tensors 0.9.4 ``sparse_compressors/sparse_24_bitmask.py`` and ``sparse_bitmask.py``. The bitmask has a row of ceil(K/8)
bytes for each row of weights, column 0 in the lowest bit; ``compressed`` holds the values of the set bits, row by row. A canonical tensor
has no codes for floats: these are one-bit codes (the mask) under a scale for each weight (the value). FP8 and int8 are codes as ever.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from qformats.errors import BadFile
from qformats.formats.compressed_tensors.shapes import Geometry, missing, quantized_args, stored_numbers, tile_of, zero_of
from qformats.formats.packed import FLOATS, blank_codes, check_dtype, float_tensor, wrong_shape
from qformats.formats.protocol import Module
from qformats.scheme import Float, Integer, ParamSpec, Scheme, Tile, whole

if TYPE_CHECKING:
    import numpy as np

    from qformats.tensor import QuantizedTensor

    Array = np.ndarray[Any, Any]

__all__ = ["dense_plane", "read_floats", "sparse_geometry", "sparse_scheme"]

_LEAVES = {"sparse": "weight.", "sparse24": ""}


def sparse_geometry(module: Module, kind: str) -> Geometry:
    """Check a module of the kinds ``dense``, ``sparse`` and ``sparse24``."""
    if kind == "dense":
        shape = tuple(module.parts["weight"].shape)
        if len(shape) != 2 or 0 in shape:
            raise wrong_shape(module, "weight", "two dimensions, none of them 0")
        return Geometry("dense", shape, 1, 1, 1, stored=module.parts["weight"].dtype)
    at = _LEAVES[kind]
    for leaf in (f"{at}shape", f"{at}compressed", f"{at}bitmask", *(("weight.row_offsets",) if kind == "sparse" else ())):
        if leaf not in module.parts:
            raise missing(module, leaf)
    shape = stored_numbers(module, f"{at}shape")
    values, mask = module.parts[f"{at}compressed"], module.parts[f"{at}bitmask"]
    check_dtype(module, f"{at}bitmask", ("U8",))
    check_dtype(module, f"{at}compressed", (*FLOATS, "F8_E4M3", "I8"))
    if len(shape) != 2 or min(shape) <= 0 or tuple(mask.shape) != (shape[0], -(-shape[1] // 8)):
        raise wrong_shape(module, f"{at}bitmask", f"a row of bits for each of the weights {shape}")
    if kind == "sparse24" and (shape[1] % 4 or tuple(values.shape) != (shape[0], shape[1] // 2)):
        raise wrong_shape(module, "compressed", f"({shape[0]}, {shape[1] // 2})")
    if kind == "sparse" and (len(values.shape) != 1 or tuple(module.parts["weight.row_offsets"].shape) != (shape[0],)):
        raise wrong_shape(module, "weight.row_offsets", f"({shape[0]},)")
    if kind == "sparse":
        check_dtype(module, "weight.row_offsets", ("I64",))
    if values.dtype in FLOATS:
        return Geometry(kind, shape, 1, 1, 1, stored=values.dtype)
    args = quantized_args(module, "int" if values.dtype == "I8" else "float")
    rows, group = tile_of(module, args, shape)
    zero = zero_of(module, args, shape, -(-shape[1] // group))
    return Geometry(kind, shape, 8, rows, group, module.parts["weight_scale"].dtype, zero, stored=values.dtype)


def sparse_scheme(module: Module, g: Geometry) -> Scheme:
    """The scheme of a sparse or dense weight."""
    if g.stored in FLOATS:
        return Scheme(g.shape, Integer(1), (ParamSpec(FLOATS[g.stored], Tile((1, 1))),))
    tile = whole(g.shape) if g.rows is None else Tile((g.rows, g.columns))
    zero = ParamSpec("int8", tile) if g.zero == "plain" else None
    return Scheme(g.shape, Integer(8, signed=True) if g.stored == "I8" else Float("e4m3fn"), (ParamSpec(FLOATS[g.scale], tile),), zero)


def _bad(module: Module, what: str) -> BadFile:
    return BadFile("bitmask", f"the bits of the mask and {what} disagree", tensor=module.name, hint="the file is damaged")


def _expanded(module: Module, g: Geometry, start: int, stop: int) -> tuple[Array, Array]:
    """Rows of the mask (n, K) and of the values (n, K), zero where no bit is set."""
    import numpy as np

    at = _LEAVES[g.kind]
    mask = np.unpackbits(module.parts[f"{at}bitmask"].row_range(start, stop), axis=1, count=g.k, bitorder="little")
    held, counts = module.parts[f"{at}compressed"], mask.sum(1, dtype=np.int64)
    if g.kind == "sparse24":
        if (counts != g.k // 2).any():
            raise _bad(module, "the rows of two values in four")
        values = held.row_range(start, stop)
    else:
        ends = np.append(module.parts["weight.row_offsets"].array(), prod(held.shape))
        if ends[0] != 0 or (np.diff(ends[start : stop + 1]) != counts).any():
            raise _bad(module, "row_offsets")
        values = held.column_range(int(ends[start]), int(ends[stop]))
    plane = np.zeros(mask.shape, values.dtype)
    plane[mask.view(bool)] = values.reshape(-1)
    return mask, plane


def dense_plane(module: Module, g: Geometry, start: int, stop: int) -> Array:
    """Codes (n, K) of a sparse weight whose values are FP8 or int8: its own bytes, zero where no bit is set."""
    return _expanded(module, g, start, stop)[1]


def read_floats(module: Module, g: Geometry, start: int, stop: int, codes: bool) -> QuantizedTensor:
    """Rows of a float weight: one-bit codes, a scale for each weight."""
    import numpy as np
    import torch

    from qformats.tensor import Param, QuantizedTensor

    shape = (stop - start, g.k)
    if g.kind == "dense":
        plane = module.parts["weight"].row_range(start, stop)
        bits = torch.ones((1, 1), dtype=torch.uint8).expand(shape)
    else:
        mask, plane = _expanded(module, g, start, stop)
        bits = torch.from_numpy(mask)
    scale = Param(float_tensor(np.ascontiguousarray(plane), g.stored), Tile((1, 1)))
    return QuantizedTensor(shape, bits if codes else blank_codes(shape), Integer(1), (scale,))
