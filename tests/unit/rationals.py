"""The slow evaluator that the tests trust: weights and roundings in exact rational arithmetic, element by element in plain Python.

Shares no code with qformats: block indexing, grids and rounding are written again here.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product as cartesian
from math import prod
from typing import Any

import torch
from hypothesis import settings

from qformats.scheme import Cyclic, Flat, Float, Integer, Learned, Table
from qformats.tensor import Param, QuantizedTensor

settings.register_profile("unit", deadline=None)  # a shared machine is slow at times
settings.load_profile("unit")

# precision, smallest and largest exponent of a normal number
LIMITS = {torch.float64: (53, -1022, 1023), torch.float32: (24, -126, 127), torch.float16: (11, -14, 15), torch.bfloat16: (8, -126, 127)}
DTYPES = tuple(LIMITS)


def round_fraction(x: Fraction, dtype: torch.dtype) -> float:
    """``x`` rounded to nearest, ties to even, to ``dtype``; an underflow keeps its sign."""
    if x == 0:
        return 0.0
    precision, lowest, highest = LIMITS[dtype]
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    assert Fraction(2) ** exponent <= size < Fraction(2) ** (exponent + 1)
    quantum = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    steps, remainder = divmod(size, quantum)
    if remainder * 2 > quantum or (remainder * 2 == quantum and steps % 2 == 1):
        steps += 1
    rounded = steps * quantum
    magnitude = float("inf") if rounded >= Fraction(2) ** (highest + 1) else float(rounded)
    return -magnitude if x < 0 else magnitude


def small_float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> Fraction:
    """A sign-exponent-mantissa pattern without special values."""
    code &= (1 << (1 + exponent_bits + mantissa_bits)) - 1
    sign = code >> (exponent_bits + mantissa_bits)
    exponent, mantissa = (code >> mantissa_bits) & ((1 << exponent_bits) - 1), code & ((1 << mantissa_bits) - 1)
    fraction = Fraction(mantissa, 1 << mantissa_bits)
    value = (1 + fraction) * Fraction(2) ** (exponent - bias) if exponent else fraction * Fraction(2) ** (1 - bias)
    return -value if sign else value


def _float_code(name: str, code: int) -> Fraction:
    if name == "e8m0":
        return Fraction(2) ** ((code & 0xFF) - 127)
    if name == "ue4m3":
        return Fraction(0) if code == 0x7F else small_float(code & 0x7F, 4, 3, 7)
    layout = {"e4m3fn": (4, 3, 7), "e4m3fnuz": (4, 3, 8), "e5m2": (5, 2, 15), "e5m2fnuz": (5, 2, 16), "e2m1": (2, 1, 1)}
    return small_float(code, *(layout | {"e2m3": (2, 3, 1), "e3m2": (3, 2, 3)})[name])


def _at(values: torch.Tensor, where: tuple[int, ...]) -> Fraction:
    return Fraction(values[where].item())


def _param(param: Param, where: tuple[int, ...], shape: tuple[int, ...], group_index: torch.Tensor | None) -> Fraction:
    """The real factor, zero point or offset of the element at ``where``."""
    flat = sum(i * prod(shape[axis + 1 :]) for axis, i in enumerate(where))
    if isinstance(param.block, Flat):
        cell: tuple[int, ...] = (flat // param.block.n,)
    elif isinstance(param.block, Cyclic):
        cell = (flat % param.block.count,)
    else:
        cell = tuple(i // size for i, size in zip(where, param.block.sizes))
        if group_index is not None and param.block.sizes[-1] > 1 and param.values.shape[-1] > 1:
            cell = (*cell[:-1], int(group_index[where[-1]] if group_index.ndim == 1 else group_index[where[0], where[-1]]))
    if isinstance(param.values, QuantizedTensor):
        value = weight(param.values, cell) if param.rounded_to is None else stepwise(param.values, cell, param.rounded_to)
    else:
        value = _at(param.values, cell)
    return 1 / value if param.inverse else value


def stepwise(t: QuantizedTensor, where: tuple[int, ...], dtype: torch.dtype) -> Fraction:
    """One element as the owner of a nested parameter computes it: code - zero, scales, product, offset and sum each rounded."""
    centred = code_value(t, where)
    if t.zero_point is not None:
        centred -= _param(t.zero_point, where, t.shape, t.group_index)
    if t.signs is not None and int(t.signs[(*where[:-1], where[-1] // 8)]) >> (where[-1] % 8) & 1:
        centred = -centred
    centred = Fraction(round_fraction(centred, dtype))
    factor = prod((_param(s, where, t.shape, t.group_index) for s in t.scales), start=Fraction(1))
    result = Fraction(round_fraction(centred * Fraction(round_fraction(factor, dtype)), dtype))
    if t.offset is not None:
        offset = round_fraction(_param(t.offset, where, t.shape, t.group_index), dtype)
        result = Fraction(round_fraction(result + Fraction(offset), dtype))
    return result


def code_value(t: QuantizedTensor, where: tuple[int, ...]) -> Fraction:
    """What the codes at ``where`` stand for, before any parameter."""
    if isinstance(t.grid, Integer):
        return _at(t.codes, where)
    if isinstance(t.grid, Float):
        return _float_code(t.grid.name, int(t.codes[where]))
    if isinstance(t.grid, Table):
        return table_entry(t.grid.name, int(t.codes[(*where[:-1], where[-1] // t.grid.v_in)]), where[-1] % t.grid.v_in)
    assert isinstance(t.grid, Learned) and t.codebook is not None
    *lead, n, k = (0, *where) if len(where) == 1 else where
    cell = (*lead, n // t.grid.v_out, k // t.grid.v_in)[-len(where) :]
    total = Fraction(0)
    for book in range(t.grid.books):
        entry = int(t.codes[(*cell, book)]) % t.grid.entries
        total += _at(t.codebook, (book, entry, n % t.grid.v_out, k % t.grid.v_in))
    return total


def table_entry(name: str, code: int, position: int) -> Fraction:
    """A constant book's entry from the original project's own package."""
    from gguf import quants

    if name == "nf4":
        return Fraction(NF4[code])
    if name == "iq4_nl":
        return Fraction(quants.IQ4_NL.kvalues[code])
    codec: Any = getattr(quants, name.upper())
    codec.init_grid()
    return Fraction(float(codec.grid[0, 0, code, position]))


NF4 = list(map(float.fromhex, (  # bitsandbytes 0.50.2 functional.get_4bit_type("nf4"), as hexadecimal float32 numbers
    "-0x1.0000000000000p+0", "-0x1.6473620000000p-1", "-0x1.0cd6600000000p-1", "-0x1.9465400000000p-2",
    "-0x1.23449a0000000p-2", "-0x1.7a6a7e0000000p-3", "-0x1.74f0e20000000p-4", "0x0.0p+0",
    "0x1.45f5fe0000000p-4", "0x1.4995c60000000p-3", "0x1.f809ba0000000p-3", "0x1.5a06740000000p-2",
    "0x1.c349700000000p-2", "0x1.200f560000000p-1", "0x1.7227660000000p-1", "0x1.0000000000000p+0",
)))  # fmt: skip


def weight(t: QuantizedTensor, where: tuple[int, ...]) -> Fraction:
    """offset + product of scales * sign * (sum of codes' values - zero point), exactly."""
    w = code_value(t, where)
    if t.zero_point is not None:
        w -= _param(t.zero_point, where, t.shape, t.group_index)
    if t.signs is not None and int(t.signs[(*where[:-1], where[-1] // 8)]) >> (where[-1] % 8) & 1:
        w = -w
    for scale in t.scales:
        w *= _param(scale, where, t.shape, t.group_index)
    return w if t.offset is None else w + _param(t.offset, where, t.shape, t.group_index)


def elements(shape: tuple[int, ...]) -> Any:
    return cartesian(*(range(n) for n in shape))


def weights(t: QuantizedTensor) -> list[Fraction]:
    """Every weight in row-major order."""
    return [weight(t, where) for where in elements(t.shape)]


def assert_rounded_once(found: torch.Tensor, exact: list[Fraction], dtype: torch.dtype) -> None:
    """``found`` equals ``exact`` rounded once, bit for bit (the sign of an exact zero is free)."""
    assert found.dtype == dtype
    for value, x in zip(found.reshape(-1).to(torch.float64).tolist(), exact, strict=True):
        expected = round_fraction(x, dtype)
        assert value == expected and (x == 0 or str(value) == str(expected)), f"{value!r}, expected {expected!r} for {x}"
