"""Weights of the kinds that the gallery lacks, as kernels meet them: every number of bits, every small float, sorted act-order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from test_gallery import GALLERY

from qformats.grids import TABLE_BITS, TABLE_WIDTHS
from qformats.scheme import Flat, Float, Integer, Table, Tile, whole
from qformats.tensor import Param, QuantizedTensor, constant

Build = Callable[[], QuantizedTensor]


def _codes(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(high), dtype=torch.int64).to(dtype)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64) / 16).to(dtype)


def integers(bits: int, shape: tuple[int, int] = (5, 150), group: int = 48) -> QuantizedTensor:
    """An asymmetric integer weight whose groups do not divide the columns."""
    block, groups = Tile((1, group)), -(-shape[1] // group)
    zero = _codes((shape[0], groups), 0, (1 << bits) + 1, torch.int16 if bits == 8 else torch.uint8)
    scale = Param(_numbers((shape[0], groups)), block)
    return QuantizedTensor(shape, _codes(shape, 0, 1 << bits), Integer(bits), (scale,), Param(zero, block))


def signed(bits: int) -> QuantizedTensor:
    shape, block = (4, 64), Tile((1, 32))
    codes = _codes(shape, -(1 << (bits - 1)), 1 << (bits - 1), torch.int8)
    zero = Param(_codes((4, 2), -3, 4, torch.int8), block)
    return QuantizedTensor(shape, codes, Integer(bits, True), (Param(_numbers((4, 2), torch.bfloat16), block),), zero)


def small_float(name: str) -> QuantizedTensor:
    """Blocks of several rows and columns; every bit pattern, infinities and NaN too."""
    count = {"e2m1": 16, "e2m3": 64, "e3m2": 64}.get(name, 256)
    shape = (5, 64)
    codes = (torch.arange(320, dtype=torch.int64) % count).to(torch.uint8).reshape(shape)
    return QuantizedTensor(shape, codes, Float(name), (Param(_numbers((3, 2), torch.float32), Tile((2, 32))),))


def book(name: str) -> QuantizedTensor:
    v = TABLE_WIDTHS[name]
    shape = (3, 64 * v)
    codes = _codes((3, 64), 0, 1 << TABLE_BITS[name], torch.int16 if TABLE_BITS[name] > 8 else torch.uint8)
    return QuantizedTensor(shape, codes, Table(name, v), (Param(_numbers((3, 4)), Tile((1, 16 * v))),))


def q4_k() -> QuantizedTensor:
    shape, block = (3, 512), Tile((1, 32))

    def level(sign: int) -> QuantizedTensor:
        d = _numbers((3, 2)) * sign
        return QuantizedTensor((3, 16), _codes((3, 16), 0, 64), Integer(6), (Param(d, Tile((1, 8))),))

    return QuantizedTensor(shape, _codes(shape, 0, 16), Integer(4), (Param(level(1), block),), offset=Param(level(-1), block))


def sorted_order() -> QuantizedTensor:
    shape, block = (6, 64), Tile((1, 16))
    index = (torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 16).to(torch.int32)
    zero = Param(_codes((6, 4), 0, 16), block)
    return QuantizedTensor(shape, _codes(shape, 0, 16), Integer(4), (Param(_numbers((6, 4)), block),), zero, group_index=index)


def float_zero() -> QuantizedTensor:
    shape, block = (5, 96), Tile((1, 32))
    zero = Param(_numbers((5, 3)) * 100, block)
    return QuantizedTensor(shape, _codes(shape, 0, 16), Integer(4), (Param(_numbers((5, 3)), block),), zero)


def nested_rows() -> QuantizedTensor:
    """bitsandbytes' doubly quantized NF4 where runs do not cross rows."""
    shape, runs = (4, 128), 8
    absmax = QuantizedTensor(
        (runs,), _codes((runs,), 0, 256), Table("dynamic"), (Param(torch.tensor([0.731]), Flat(256)),),
        offset=constant(0.0412, (runs,), torch.float32),
    )  # fmt: skip
    return QuantizedTensor(shape, _codes(shape, 0, 16), Table("nf4"), (Param(absmax, Flat(64), rounded_to=torch.float32),))


def stacked() -> QuantizedTensor:
    """Three experts of 20 rows under scales of two rows and 32 columns."""
    shape = (3, 20, 64)
    scales = (Param(_numbers((3, 10, 2)), Tile((1, 2, 32))), constant(0.125, shape, torch.float32))
    return QuantizedTensor(shape, _codes(shape, 0, 16), Integer(4), scales, constant(8, shape))


def divided() -> QuantizedTensor:
    shape = (4, 40)
    scale = Param(torch.tensor([[3.1]], dtype=torch.bfloat16), whole(shape), inverse=True)
    return QuantizedTensor(shape, _codes(shape, 0, 3), Integer(2), (scale,), constant(1, shape))


KINDS: dict[str, Build] = {
    **{name: build for name, build in GALLERY.items() if name != "a_hair_from_every_tie"},
    **{f"{bits}_bits": lambda bits=bits: integers(bits) for bits in range(1, 9)},  # type: ignore[misc]
    **{f"{bits}_bits_signed": lambda bits=bits: signed(bits) for bits in (3, 4, 8)},  # type: ignore[misc]
    **{name: lambda name=name: small_float(name) for name in ("e4m3fnuz", "e5m2", "e5m2fnuz", "e2m3", "e3m2")},  # type: ignore[misc]
    **{name: lambda name=name: book(name) for name in TABLE_BITS if name != "iq2_s"},  # type: ignore[misc]
    "q4_k": q4_k, "sorted_order": sorted_order, "float_zero": float_zero, "nested_rows": nested_rows, "stacked": stacked,
    "divided": divided,
}  # fmt: skip
