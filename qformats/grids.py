"""Constant value tables: what a code of a small float or of a fixed codebook stands for.

``float_values`` gives the meaning of every bit pattern of a small float, ``table_values`` the entries of a constant book. Both return
float64 tensors (every entry is exact in float32) and are cached: treat the result as read-only. The module imports torch only inside.

Small floats: sign, then ``exponent`` bits with ``bias``, then ``mantissa`` bits; exponent 0 is subnormal.

| name | bits | bias | special patterns | source |
|---|---|---|---|---|
| e4m3fn | 1-4-3 | 7 | 0x7F 0xFF NaN, no infinity | OCP 8-bit Floating Point Specification 1.0 |
| e5m2 | 1-5-2 | 15 | exponent 31: infinity, NaN | OCP 8-bit Floating Point Specification 1.0 |
| e4m3fnuz | 1-4-3 | 8 | 0x80 NaN, no infinity, no -0 | Noune et al., arXiv 2206.02915; torch.float8_e4m3fnuz |
| e5m2fnuz | 1-5-2 | 16 | 0x80 NaN, no infinity, no -0 | the same; torch.float8_e5m2fnuz |
| ue4m3 | 0-4-3 | 7 | bit 7 ignored; 0x7F is 0 (but 0xFF is 480) | llama.cpp ggml-impl.h ``ggml_ue4m3_to_fp32``, without its factor 1/2 |
| e2m1, e2m3, e3m2 | 1-2-1, 1-2-3, 1-3-2 | 1, 1, 3 | none | OCP Microscaling Formats (MX) Specification 1.0 |
| e8m0 | 0-8-0 | 127 | 0xFF NaN; 0 is 2^-127 | OCP Microscaling Formats (MX) Specification 1.0 |

Books: ``nf4`` and ``fp4`` from bitsandbytes 0.50.2 ``functional.get_4bit_type``; ``dynamic`` is the map of its double quantization, 256
numbers of -0.993 … 1 in decades that halve in steps (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning",
arXiv 1511.04561; bitsandbytes 0.50.2 ``functional.create_dynamic_map``); ``iq4_nl`` from llama.cpp ggml-common.h
``kvalues_iq4nl``; ``iq1_s iq2_xxs iq2_xs iq2_s iq3_xxs iq3_s`` are the grids of ggml-common.h as ``gguf.quants`` (0.19) carries them,
with entries of 8 (iq1, iq2) or 4 (iq3) values along K. ``iq1_s`` serves IQ1_M too.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from qformats.errors import Unsupported

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FLOAT_NAMES", "TABLE_BITS", "TABLE_WIDTHS", "float_values", "table_values"]

# name: exponent bits, mantissa bits, bias, has a sign bit
_FLOATS = {
    "e4m3fn": (4, 3, 7, True),
    "e4m3fnuz": (4, 3, 8, True),
    "ue4m3": (4, 3, 7, False),
    "e5m2": (5, 2, 15, True),
    "e5m2fnuz": (5, 2, 16, True),
    "e2m1": (2, 1, 1, True),
    "e2m3": (2, 3, 1, True),
    "e3m2": (3, 2, 3, True),
}
_NAN, _INF = float("nan"), float("inf")
_SPECIAL = {
    "e4m3fn": {0x7F: _NAN, 0xFF: _NAN},
    "e4m3fnuz": {0x80: _NAN},
    "ue4m3": {0x7F: 0.0},
    "e5m2": {sign | 0x7C | m: _NAN if m else (-_INF if sign else _INF) for sign in (0, 0x80) for m in range(4)},
    "e5m2fnuz": {0x80: _NAN},
}

FLOAT_NAMES = (*_FLOATS, "e8m0")

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # then the same with the sign bit; each divided by 12 in float32
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

TABLE_WIDTHS = {
    "nf4": 1, "fp4": 1, "dynamic": 1, "iq4_nl": 1, "iq1_s": 8, "iq2_xxs": 8, "iq2_xs": 8, "iq2_s": 8, "iq3_xxs": 4, "iq3_s": 4,
}  # fmt: skip
"""Name of every book and the number of weights along K that one entry stands for (``Table.v_in``)."""

TABLE_BITS = {
    "nf4": 4, "fp4": 4, "dynamic": 8, "iq4_nl": 4, "iq1_s": 11, "iq2_xxs": 8, "iq2_xs": 9, "iq2_s": 10, "iq3_xxs": 8, "iq3_s": 9,
}  # fmt: skip
"""Name of every book and the bits that its codes need."""


def _float_value(code: int, exponent_bits: int, mantissa_bits: int, bias: int, signed: bool) -> float:
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    magnitude = float(mantissa + (1 << mantissa_bits if exponent else 0)) * 2.0 ** (max(exponent, 1) - bias - mantissa_bits)
    return -magnitude if signed and code >> (exponent_bits + mantissa_bits) & 1 else magnitude


@cache
def float_values(name: str) -> Tensor:
    """Every bit pattern's value, float64: (256,), (64,) for e2m3 and e3m2, (16,) for e2m1. NaN patterns are NaN.

    ``Unsupported('grid')`` for an unknown name.

    >>> [float(v) for v in float_values("e2m1")[:8]]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    import torch

    if name == "e8m0":
        return torch.tensor([2.0 ** (e - 127) for e in range(255)] + [_NAN], dtype=torch.float64)
    if name not in _FLOATS:
        raise Unsupported("grid", f"no float grid is called {name!r}", hint=f"known: {', '.join(FLOAT_NAMES)}")
    exponent_bits, mantissa_bits, bias, signed = _FLOATS[name]
    count = 256 if exponent_bits + mantissa_bits == 7 else 1 << (1 + exponent_bits + mantissa_bits)
    values = [_float_value(code, exponent_bits, mantissa_bits, bias, signed) for code in range(count)]
    for code, value in _SPECIAL.get(name, {}).items():
        values[code] = value
    return torch.tensor(values, dtype=torch.float64)


def same_patterns(one: str, other: str) -> int | None:
    """The power of two that makes the numbers of ``one`` those that ``other`` has under the same bits, special ones aside.

    None where the two have other fields.

    >>> same_patterns("e4m3fnuz", "e4m3fn"), same_patterns("e4m3fn", "e5m2")
    (1, None)
    """
    if one not in _FLOATS or other not in _FLOATS:
        return None
    (*fields, bias, signed), (*others, other_bias, other_signed) = _FLOATS[one], _FLOATS[other]
    return bias - other_bias if fields == others and signed == other_signed else None


@cache
def not_finite(name: str) -> tuple[int, ...]:
    """The bit patterns of a small float that stand for NaN or an infinity."""
    import torch

    return tuple((~torch.isfinite(float_values(name))).nonzero().reshape(-1).tolist())


@cache
def table_values(name: str) -> Tensor:
    """The entries of a constant book, float64: (entries,), or (entries, v_in) where an entry stands for ``v_in`` weights.

    The book's own numbers: a factor such as IQ2's 1/4 or IQ3_XXS's 1/2 belongs to the scales. ``Unsupported('grid')`` for an unknown name.

    >>> table_values("iq4_nl")[8].item(), tuple(table_values("iq2_s").shape)
    (1.0, (1024, 8))
    """
    import torch

    if name == "nf4":
        return torch.tensor(_NF4, dtype=torch.float64)
    if name == "fp4":
        positive = (torch.tensor(_FP4_TWELFTHS) / 12.0).to(torch.float64)
        return torch.cat([positive, 0.0 - positive])  # code 8 reads as +0
    if name == "dynamic":
        return _dynamic_map().to(torch.float64)
    if name == "iq4_nl":
        return torch.tensor(_IQ4_NL, dtype=torch.float64)
    if name not in TABLE_WIDTHS:
        raise Unsupported("grid", f"no constant book is called {name!r}", hint=f"known: {', '.join(TABLE_WIDTHS)}")
    return _ggml_grid(name)


def _dynamic_map() -> Tensor:
    """0, 1 and, for each power of ten 10^-6 … 10^0, the middles of 1, 2, 4 … 64 equal parts of 0.1 … 1 times it, with both signs."""
    import torch

    decades = []
    for place in range(7):
        ends = torch.linspace(0.1, 1.0, 2**place + 1, dtype=torch.float32)
        decades.append((ends[:-1] + ends[1:]) / 2 * 10.0 ** (place - 6))
    positive = torch.cat(decades)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values


def _ggml_grid(name: str) -> Tensor:
    """A codebook of ggml-common.h through the gguf package, (entries, v_in) float64."""
    import torch
    from gguf import quants

    codec = getattr(quants, name.upper())
    codec.init_grid()
    return torch.from_numpy(codec.grid.reshape(codec.grid_shape)).to(torch.float64)
