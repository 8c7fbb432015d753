"""Real arithmetic on torch tensors: error-free double-double values and one final rounding.

A ``Real`` is an unevaluated sum ``high + low`` of float64 tensors. Sums and products of parameters whose significands add up to
at most 106 bits are exact; every format's parameters do (the widest is fp32 x fp32 x 8-bit code = 56 bits, plus an fp32 offset).
Products use Veltkamp/Dekker splitting, sums Knuth's two-sum (both from Shewchuk, "Adaptive Precision Floating-Point Arithmetic", 1997).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Real", "round_once"]

_SPLIT = 134217729.0  # 2^27 + 1


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _split(a: Tensor) -> tuple[Tensor, Tensor]:
    c = a * _SPLIT
    high = c - (c - a)
    return high, a - high


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    p = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


@dataclass(frozen=True, slots=True)
class Real:
    """``high + low`` in float64, ``|low| <= ulp(high) / 2``; ``low`` is None where it is known to be zero."""

    high: Tensor
    low: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor) -> Real:
        """Any float or integer tensor up to 53 significant bits."""
        return cls(values.to(torch.float64))

    def __add__(self, other: Real) -> Real:
        s, e = _two_sum(self.high, other.high)
        for low in (self.low, other.low):
            if low is not None:
                e = e + low
        return Real(*_two_sum(s, e))

    def __mul__(self, other: Real) -> Real:
        p, e = _two_product(self.high, other.high)
        if other.low is not None:
            e = e + self.high * other.low
        if self.low is not None:
            e = e + self.low * other.high
        return Real(*_two_sum(p, e))

    def __neg__(self) -> Real:
        return Real(-self.high, None if self.low is None else -self.low)

    def divide(self, other: Real) -> Real:
        """Quotient to about 106 bits; exact quotients come out exact."""
        q = self.high / other.high
        residual = self + -(Real(q) * other)
        return Real(*_two_sum(q, residual.high / other.high))

    def map(self, function: object) -> Real:
        """Apply a shape operation (indexing, expansion) to both parts."""
        assert callable(function)
        return Real(function(self.high), None if self.low is None else function(self.low))


def _nudge(bits: Tensor, inexact: Tensor, away: Tensor) -> Tensor:
    """Round to odd on integer views: where ``inexact`` and the last bit is 0, step one unit away from or towards zero."""
    step = torch.where(away, 1, -1).to(bits.dtype)
    return torch.where(inexact & ((bits & 1) == 0), bits + step, bits)


def round_once(value: Real, dtype: torch.dtype) -> Tensor:
    """``value`` rounded once, to nearest even, to ``dtype`` (float64, float32, float16 or bfloat16)."""
    high = value.high
    if dtype == torch.float64:
        return high
    if value.low is not None:
        odd = _nudge(high.view(torch.int64), value.low != 0, torch.signbit(value.low) == torch.signbit(high))
        high = torch.where(torch.isfinite(high), odd.view(torch.float64), high)
    single = high.to(torch.float32)
    if dtype == torch.float32:
        return single
    error = high - single.to(torch.float64)
    odd32 = _nudge(single.contiguous().view(torch.int32), error != 0, torch.signbit(error) == torch.signbit(single))
    single = torch.where(torch.isfinite(single), odd32.view(torch.float32), single)
    return single.to(dtype)
