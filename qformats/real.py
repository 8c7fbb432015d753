"""Real arithmetic on torch tensors: error-free double-double values and one final rounding.

A ``Real`` is an unevaluated sum ``high + low`` of float64 tensors. Sums and products of parameters whose significands add up to
at most 106 bits are exact; every format's parameters do (the widest is fp32 x fp32 x 8-bit code = 56 bits, plus an fp32 offset).
Where an exact result needs more, ``low`` is rounded to odd, so that rounding the value once more still goes the right way
(Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
Products use Veltkamp/Dekker splitting, sums Knuth's two-sum (both from Shewchuk, "Adaptive Precision Floating-Point Arithmetic", 1997);
magnitudes stay between 2^-900 and 2^990, which three float32 factors do. Infinities, NaN and the sign of a zero follow IEEE 754.

Most operations need none of that: where the operands' ``Extent`` says that the exact result fits 53 bits, plain float64 arithmetic is it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qformats.errors import Unsupported
from qformats.loops import find

__all__ = ["Real", "all_finite", "inexact", "product", "round_once", "round_to_odd", "rounded"]

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


def _nudge(bits: Tensor, inexact: Tensor, away: Tensor) -> Tensor:
    """Round to odd on integer views: where ``inexact`` and the last bit is 0, step one unit away from or towards zero."""
    step = torch.where(away, 1, -1).to(bits.dtype)
    return torch.where(inexact & ((bits & 1) == 0), bits + step, bits)


def _to_odd(value: Tensor, rest: Tensor) -> Tensor:
    """``value + rest`` rounded to odd, where ``|rest| <= ulp(value) / 2``; infinities and NaN stay."""
    odd = _nudge(value.view(torch.int64), rest != 0, torch.signbit(rest) == torch.signbit(value))
    return torch.where(torch.isfinite(value), odd.view(torch.float64), value)


def _sum_to_odd(terms: list[Tensor]) -> Tensor:
    """The sum of small terms rounded to odd (exact where it fits 53 bits)."""
    total, rest = terms[0], None
    for term in terms[1:]:
        total, error = _two_sum(total, term)
        rest = error if rest is None else rest + error
    return total if rest is None else _to_odd(*_two_sum(total, rest))


@dataclass(frozen=True, slots=True)
class Extent:
    """A bound on all finite elements: at most ``bits`` significant bits, multiples of 2^``unit``, magnitudes up to 2^``top``."""

    bits: int
    unit: int
    top: int

    def times(self, other: Extent) -> Extent:
        unit, top = self.unit + other.unit, self.top + other.top
        return Extent(min(self.bits + other.bits, top - unit), unit, top)

    def plus(self, other: Extent) -> Extent:
        unit, top = min(self.unit, other.unit), max(self.top, other.top) + 1
        return Extent(top - unit, unit, top)

    @property
    def fits(self) -> bool:
        """Whether every such number is a normal float64."""
        return self.bits <= 53 and self.unit >= -900 and self.top <= 990


_MEASURED = 1 << 14  # a tensor of at most so many elements, a constant or a codebook, is looked at; others go by their dtype
_ORDERED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # torch finds the smallest and largest of these
_EXTENTS = {
    torch.float32: Extent(24, -149, 128),
    torch.float16: Extent(11, -24, 16),
    torch.bfloat16: Extent(8, -133, 128),
    torch.float8_e4m3fn: Extent(4, -9, 9),
    torch.float8_e5m2: Extent(3, -16, 16),
}


def _extent(values: Tensor, wide: Tensor) -> Extent | None:
    """The extent of ``values``, which as float64 are ``wide``."""
    if not values.dtype.is_floating_point:
        ends = (values if values.dtype in _ORDERED else wide).aminmax() if values.numel() else ()
        top = max((abs(int(v)).bit_length() for v in ends), default=0)
        return Extent(top, 0, top)
    if values.numel() > _MEASURED:
        return _EXTENTS.get(values.dtype)
    mantissa, exponent = torch.frexp(wide[torch.isfinite(wide) & (wide != 0)])  # mantissas in [1/2, 1)
    if not mantissa.numel():
        return Extent(0, 0, 0)
    integer = (mantissa.abs() * 2.0**53).to(torch.int64)
    last = torch.frexp((integer & -integer).to(torch.float64)).exponent - 1  # the place of the lowest set bit
    return Extent(53 - int(last.min()), int((exponent - 53 + last).min()), int(exponent.max()))


@dataclass(frozen=True, slots=True)
class Real:
    """``high + low`` in float64, ``|low| <= ulp(high) / 2``; ``low`` is None where it is known to be zero.

    ``extent`` is None where nothing is known.
    """

    high: Tensor
    low: Tensor | None = None
    extent: Extent | None = None

    @classmethod
    def of(cls, values: Tensor) -> Real:
        """Any float or integer tensor up to 53 significant bits."""
        wide = values.to(torch.float64)
        return cls(wide, None, _extent(values, wide))

    def measured(self) -> Real:
        """The same with its extent narrowed to what its largest and smallest numbers say."""
        if self.extent is None:
            return self
        size = self.high.abs()
        size = size[torch.isfinite(size) & (size > 0)]
        if not size.numel():
            return Real(self.high, self.low, Extent(0, 0, 0))
        low, high = (int(torch.frexp(end).exponent) for end in size.aminmax())
        unit = max(self.extent.unit, low - self.extent.bits)
        return Real(self.high, self.low, Extent(min(self.extent.bits, high - unit), unit, high))

    @classmethod
    def _normal(cls, value: Tensor, error: Tensor) -> Real:
        """``value + error`` with the larger part first; an infinity, a NaN or a signed zero in ``value`` is kept as it is."""
        error = torch.where(torch.isfinite(value) & torch.isfinite(error), error, 0.0)
        if not bool(error.any()):
            return cls(value)
        high, low = _two_sum(value, error)
        exact = error == 0
        return cls(torch.where(exact, value, high), torch.where(exact, 0.0, low))

    def __add__(self, other: Real) -> Real:
        if (extent := _fitting(self, other, Extent.plus)) is not None:
            return Real(self.high + other.high, None, extent)
        s, e = _two_sum(self.high, other.high)
        return self._normal(s, _sum_to_odd([e, *(low for low in (self.low, other.low) if low is not None)]))

    def __mul__(self, other: Real) -> Real:
        if (extent := _fitting(self, other, Extent.times)) is not None:
            return Real(self.high * other.high, None, extent)
        p, e = _two_product(self.high, other.high)
        small = [e]
        if other.low is not None:
            small += _two_product(self.high, other.low)
        if self.low is not None:
            small += _two_product(self.low, other.high)
            if other.low is not None:
                small.append(self.low * other.low)
        return self._normal(p, _sum_to_odd(small))

    def __neg__(self) -> Real:
        return Real(-self.high, None if self.low is None else -self.low, self.extent)

    def divide(self, other: Real) -> Real:
        """The quotient to 106 bits, its last bit rounded to odd; exact quotients come out exact."""
        q = self.high / other.high
        residual = self + -(Real(q) * other)
        low = residual.high / other.high
        rest = (residual + -(Real(low) * other)).high / other.high
        return self._normal(q, _to_odd(low, rest))

    def map(self, function: Callable[..., Tensor]) -> Real:
        """Apply an operation on shapes or signs (indexing, expansion) to both parts."""
        return Real(function(self.high), None if self.low is None else function(self.low), self.extent)


def _fitting(a: Real, b: Real, grow: Callable[[Extent, Extent], Extent]) -> Extent | None:
    """The extent of what comes of two numbers, looked at if need be; None where it does not fit float64, or is not known."""
    if a.extent is None or b.extent is None:
        return None
    extent = grow(a.extent, b.extent)
    if extent.fits:
        return extent
    first, second = a.measured().extent, b.measured().extent
    assert first is not None and second is not None
    extent = grow(first, second)
    return extent if extent.fits else None


def product(start: Real, factors: Iterable[tuple[Real, bool]]) -> Real:
    """``start`` times each factor, or divided by it where its flag is set.

    All products come first and there is one division: a quotient that was cut to 106 bits could be multiplied back to a number that
    lies on a tie, on the wrong side of it.
    """
    divisor: Real | None = None
    for factor, inverse in factors:
        if inverse:
            divisor = factor if divisor is None else divisor * factor
        else:
            start = start * factor
    return start if divisor is None else start.divide(divisor)


def round_to_odd(value: Real) -> Tensor:
    """``value`` in float64, rounded to odd: rounding it once more to a narrower dtype is rounding ``value`` once."""
    return value.high if value.low is None else _to_odd(value.high, value.low)


def round_once(value: Real, dtype: torch.dtype) -> Tensor:
    """``value`` rounded once, to nearest even, to ``dtype`` (float64, float32, float16 or bfloat16; else ``Unsupported('dtype')``)."""
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise Unsupported("dtype", f"values cannot be rounded to {dtype}", hint="use float64, float32, float16 or bfloat16")
    if dtype == torch.float64:
        return value.high
    high = round_to_odd(value)
    single = high.to(torch.float32)
    if dtype == torch.float32:
        return single
    error = high - single.to(torch.float64)
    odd = _nudge(single.contiguous().view(torch.int32), error != 0, torch.signbit(error) == torch.signbit(single))
    single = torch.where(torch.isfinite(single), odd.view(torch.float32), single)
    return single.to(dtype)


_PLACES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in qformats.loops.steps


def rounded(value: Real, dtype: torch.dtype) -> tuple[Tensor, int]:
    """``round_once(value, dtype)`` and how many of its numbers are not ``value`` any more, NaN among them."""
    loops = find("steps") if value.high.device.type == "cpu" and value.low is None and dtype in _PLACES else None
    if loops is not None:
        made = torch.empty(value.high.shape, dtype=dtype)
        size = made.element_size()
        bits = made.view(torch.int32 if size == 4 else torch.int16).view(-1).numpy().view(f"u{size}")
        wrong, none = loops.round_line(value.high.contiguous().view(-1).numpy(), _PLACES[dtype], bits)
        if not none:  # what is in a NaN is left to torch
            return made, int(wrong)
    made = round_once(value, dtype)
    return made, inexact(value, made)


_INFINITIES = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


def all_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    infinity = _INFINITIES.get(values.dtype)
    if infinity is None or values.device.type != "cpu" or not values.numel():
        return bool(torch.isfinite(values).all())
    return int((values.contiguous().view(torch.int16).numpy() & 0x7FFF).max()) < infinity


def inexact(exact: Real, rounded: Tensor) -> int:
    """How many numbers of ``rounded`` are not those of ``exact``; a NaN equals none."""
    if exact.low is None and rounded is exact.high:
        total = float(rounded.sum())
        if total == total:  # no NaN
            return 0
    differs = rounded.to(torch.float64) != exact.high
    if exact.low is not None:
        differs |= exact.low != 0
    return int(differs.sum())
