"""Random weights of every class that the GPU kernels know, of any size: for ``gpu.py`` and for the checks of compiled kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qformats.scheme import Float, Integer, Learned, Table, Tile, whole
from qformats.tensor import Param, QuantizedTensor, constant

__all__ = ["CLASSES", "bits_per_weight"]


def _codes(shape: tuple[int, ...], count: int, device: str, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, count, shape, device=device, dtype=torch.int16 if count > 256 else torch.uint8).to(dtype)


def _numbers(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float16) -> Tensor:
    return ((torch.rand(shape, device=device) + 0.5) / 64).to(dtype)


def _integers(n: int, k: int, device: str, bits: int, group: int, zero: str) -> QuantizedTensor:
    """``zero``: "middle", a constant; "codes", a number of uint8; "float", of float16; "offset", no zero point but an offset."""
    groups, block, shape = k // group, Tile((1, group)), (n, k)
    point: Param | None = None
    if zero == "middle":
        point = Param(torch.full((1, 1), 1 << (bits - 1), dtype=torch.int16, device=device), whole(shape))
    elif zero == "codes":
        point = Param(_codes((n, groups), 1 << bits, device), block)
    elif zero == "float":
        point = Param(_numbers((n, groups), device) * 512, block)
    offset = Param(-_numbers((n, groups), device), block) if zero == "offset" else None
    scale = Param(_numbers((n, groups), device), block)
    return QuantizedTensor(shape, _codes(shape, 1 << bits, device), Integer(bits), (scale,), point, offset)


def _level(n: int, k: int, device: str, group: int, bits: int, sign: int = 1) -> Param:
    """Scales that are ``bits``-bit codes under a float16 for 256 weights."""
    d = _numbers((n, k // 256), device) * sign
    codes = _codes((n, k // group), 1 << bits, device)
    return Param(QuantizedTensor((n, k // group), codes, Integer(bits), (Param(d, Tile((1, 256 // group))),)), Tile((1, group)))


def _super(n: int, k: int, device: str, bits: int, group: int, scale_bits: int, offset: bool) -> QuantizedTensor:
    made = _codes((n, k), 1 << bits, device)
    low = _level(n, k, device, group, scale_bits, -1) if offset else None
    point = None if offset else constant(1 << (bits - 1), (n, k))
    if point is not None:
        assert isinstance(point.values, Tensor)
        point = point.with_values(point.values.to(device))
    return QuantizedTensor((n, k), made, Integer(bits), (_level(n, k, device, group, scale_bits),), point, low)


def _table(n: int, k: int, device: str, name: str, group: int, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    scale = Param(_numbers((n, k // group), device, dtype), Tile((1, group)))
    return QuantizedTensor((n, k), _codes((n, k), 256 if name == "dynamic" else 16, device), Table(name), (scale,))


def _nested_table(n: int, k: int, device: str) -> QuantizedTensor:
    inner = (n, k // 64)
    scale = Param(_numbers((n, k // 64), device, torch.float32), Tile((1, 1)))
    offset = Param(torch.full((1, 1), 0.05, device=device), whole(inner))
    absmax = QuantizedTensor(inner, _codes(inner, 256, device), Table("dynamic"), (scale,), offset=offset)
    return QuantizedTensor((n, k), _codes((n, k), 16, device), Table("nf4"), (Param(absmax, Tile((1, 64)), rounded_to=torch.float32),))


def _small(n: int, k: int, device: str, scale: str, group: int) -> QuantizedTensor:
    """e2m1 under scales that are codes of a small float, with one float32 beside them for e4m3."""
    held = _codes((n, k // group), 32, device) + (112 if scale == "e8m0" else 48)
    factors = [Param(QuantizedTensor((n, k // group), held.to(torch.uint8), Float(scale)), Tile((1, group)))]
    if scale != "e8m0":
        factors.append(Param(torch.full((1, 1), 0.037, device=device), whole((n, k))))
    return QuantizedTensor((n, k), _codes((n, k), 16, device), Float("e2m1"), tuple(factors))


def _fp8(n: int, k: int, device: str) -> QuantizedTensor:
    scale = Param(_numbers((-(-n // 128), k // 128), device, torch.float32), Tile((128, 128)))
    return QuantizedTensor((n, k), _codes((n, k), 120, device), Float("e4m3fn"), (scale,))


def _grid(n: int, k: int, device: str, name: str, count: int, v: int, group: int, signs: bool) -> QuantizedTensor:
    scale = _level(n, k, device, group, 4)
    assert isinstance(scale.values, QuantizedTensor)
    half = constant(-0.5, (n, k // group), torch.float32)
    assert isinstance(half.values, Tensor)
    inner = scale.values.replace(zero_point=half.with_values(half.values.to(device)))
    quarter = Param(torch.full((1, 1), 0.25, device=device), whole((n, k)))
    codes = _codes((n, k // v), count, device)
    bits = _codes((n, k // 8), 256, device) if signs else None
    return QuantizedTensor((n, k), codes, Table(name, v), (scale.with_values(inner), quarter), signs=bits)


def _books(n: int, k: int, device: str, entries: int, books: int) -> QuantizedTensor:
    codes = torch.randint(0, min(entries, 1 << 15), (n, k // 8, books), device=device, dtype=torch.int16)
    book = torch.randn((books, entries, 1, 8), device=device).to(torch.float16)
    return QuantizedTensor((n, k), codes, Learned(entries, 1, 8, books), (Param(_numbers((n, 1), device), Tile((1, k))),), codebook=book)


def _rows(n: int, k: int, device: str) -> QuantizedTensor:
    codes = torch.randint(-127, 128, (n, k), device=device, dtype=torch.int8)
    return QuantizedTensor((n, k), codes, Integer(8, True), (Param(_numbers((n, 1), device, torch.float32), Tile((1, k))),))


CLASSES: dict[str, Callable[[int, int, str], QuantizedTensor]] = {
    "int4 g32": lambda n, k, d: _integers(n, k, d, 4, 32, "middle"),
    "int4 g128": lambda n, k, d: _integers(n, k, d, 4, 128, "codes"),
    "int2 g64": lambda n, k, d: _integers(n, k, d, 2, 64, "codes"),
    "int3 g64": lambda n, k, d: _integers(n, k, d, 3, 64, "codes"),
    "int5 g32": lambda n, k, d: _integers(n, k, d, 5, 32, "offset"),
    "int6 g64": lambda n, k, d: _integers(n, k, d, 6, 64, "codes"),
    "int7 g64": lambda n, k, d: _integers(n, k, d, 7, 64, "codes"),
    "int8 g32": lambda n, k, d: _integers(n, k, d, 8, 32, "middle"),
    "hqq4 g64": lambda n, k, d: _integers(n, k, d, 4, 64, "float"),
    "int8 rows": _rows,
    "q2_k": lambda n, k, d: _super(n, k, d, 2, 16, 4, True),
    "q3_k": lambda n, k, d: _super(n, k, d, 3, 16, 6, False),
    "q4_k": lambda n, k, d: _super(n, k, d, 4, 32, 6, True),
    "q5_k": lambda n, k, d: _super(n, k, d, 5, 32, 6, True),
    "q6_k": lambda n, k, d: _super(n, k, d, 6, 16, 8, False),
    "nf4": lambda n, k, d: _table(n, k, d, "nf4", 64),
    "fp4": lambda n, k, d: _table(n, k, d, "fp4", 64),
    "dynamic8": lambda n, k, d: _table(n, k, d, "dynamic", 64),
    "nf4 nested": _nested_table,
    "iq4_nl": lambda n, k, d: _table(n, k, d, "iq4_nl", 32, torch.float16),
    "mxfp4": lambda n, k, d: _small(n, k, d, "e8m0", 32),
    "nvfp4": lambda n, k, d: _small(n, k, d, "e4m3fn", 16),
    "fp8 blocks": _fp8,
    "iq2_xxs": lambda n, k, d: _grid(n, k, d, "iq2_xxs", 256, 8, 32, True),
    "iq2_s": lambda n, k, d: _grid(n, k, d, "iq2_s", 1024, 8, 16, True),
    "iq3_s": lambda n, k, d: _grid(n, k, d, "iq3_s", 512, 4, 32, True),
    "iq1_s": lambda n, k, d: _grid(n, k, d, "iq1_s", 2048, 8, 32, False),
    "aqlm 1x16": lambda n, k, d: _books(n, k, d, 1 << 16, 1),
    "aqlm 2x8": lambda n, k, d: _books(n, k, d, 256, 2),
}
"""Name: weights (N, K) on a device, K a multiple of 256."""


def bits_per_weight(nbytes: int, n: int, k: int) -> float:
    return 8 * nbytes / (n * k)
