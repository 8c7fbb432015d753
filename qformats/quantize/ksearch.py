"""The searches inside ggml's K-quantizers, vectorized over blocks: the best scale (and minimum) for the n weights of every block.

Source: ``nearest_int``, ``make_qkx2_quants``, ``make_qkx3_quants``, ``make_qx_quants``, ``make_q3_quants`` and ``make_qp_quants`` in
``ggml/src/ggml-quants.c`` of llama.cpp v0.5.0, as compiled without contraction to fused multiply-adds. Every argument ``x`` or ``w`` is
float32 (n, B): position first, so that ``x[i]`` is one number of every block and sums run over i in the reference's order, one rounding
for each product and each sum. The results are the same bits whatever B is.

Codes are not carried through a search: its winning inverse scale and the minimum it was used with rebuild them (``rebuilt``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "EPSILON",
    "Found",
    "best_affine",
    "best_centred",
    "best_positive",
    "centred_tries",
    "descend",
    "nearest",
    "ordered_sum",
    "over",
    "positive_tries",
    "rebuilt",
    "root",
    "steps",
]

EPSILON = 1e-15  # GROUP_MAX_EPS: a block whose largest magnitude lies below is all zeros
_MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer, ties to even, in the low bits


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found for B blocks: float32 (B,) each.

    ``scale``, ``low`` (what is subtracted from every weight, at least zero; zeros where the type has no minimum), and to rebuild
    the codes the winning ``iscale`` (zero in blocks of zeros) with the ``origin`` it was used with. ``total``: the sum of weights.
    ``codes``: uint8 (n, B) where a search has no inverse scale to rebuild them from.
    """

    scale: Tensor
    low: Tensor
    iscale: Tensor
    origin: Tensor
    total: Tensor
    codes: Tensor | None = None


def over(numerator: float, x: Tensor) -> Tensor:
    """``numerator / x`` in float32, rounded once; torch's own number / tensor multiplies by a reciprocal."""
    import torch

    return torch.full_like(x, numerator) / x


def root(x: Tensor) -> Tensor:
    """The float32 square root, correctly rounded: torch's own may be off in the last bit, through double precision it is not."""
    import torch

    return torch.sqrt(x.to(torch.float64)).to(torch.float32)


def nearest(x: Tensor) -> Tensor:
    """ggml's ``nearest_int``: int32, ties to even, and its wrap-around beyond 2^22; 0 for NaN, -2^22 for infinities."""
    import torch

    bits = (x + _MAGIC).view(torch.int32)
    return torch.where(torch.isnan(x), 0, (bits & 0x007FFFFF) - 0x00400000)


def ordered_sum(terms: Tensor) -> Tensor:
    """(n, B) -> (B,), added from the first to the last, each sum rounded."""
    import torch

    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


@cache
def steps(first: float, delta: float, count: int, top: int) -> tuple[float, ...]:
    """The numerators ``first + delta * i + top`` that a search tries, i = 0 … count, in float32."""
    import numpy as np

    f32 = np.float32
    return tuple(float(f32(f32(first) + f32(f32(delta) * f32(i))) + f32(top)) for i in range(count + 1))


def rebuilt(x: Tensor, iscale: Tensor, origin: Tensor, lowest: int, highest: int) -> Tensor:
    """The codes of a winning try less their zero point: int32 (n, B) in lowest … highest."""
    return nearest(iscale * (x - origin)).clamp(lowest, highest)


def _finite(iscale: Tensor) -> Tensor:
    """Zero instead of infinity: both give zeros for codes, for inf * 0 and inf are 0 and -2^22 to ``nearest``."""
    import torch

    return torch.where(torch.isinf(iscale), 0.0, iscale)


def best_affine(x: Tensor, w: Tensor, top: int, tries: tuple[float, ...], absolute: bool) -> Found:
    """``x ≈ scale * code - low`` with codes 0 … top and low >= 0: least squares by ``w`` for each of the ``tries``, then the least error.

    The error is sum w |diff| if ``absolute``, else sum w diff^2. A later try starts from the minimum of the best one so far.
    """
    import torch

    low, high = x[0], x.amax(0)
    for row in x[1:]:
        low = torch.where(row < low, row, low)  # of several zeros the first one's sign counts
    low = torch.where(low > 0, 0.0, low)
    empty = high == low
    total = w[0].clone()
    for term in w[1:]:
        total = total + term
    sum_x = w[0] * x[0]
    for term in (w * x)[1:]:
        sum_x = sum_x + term

    def error(scale: Tensor, minimum: Tensor, codes: Tensor) -> Tensor:
        diff = scale * codes + minimum - x
        return ordered_sum(w * (diff.abs() if absolute else diff * diff))

    iscale = over(float(top), high - low)
    scale = over(1.0, iscale)
    kept, origin = _finite(iscale), low
    best = error(scale, low, rebuilt(x, kept, low, 0, top).to(x.dtype))
    for numerator in tries:
        iscale = _finite(over(numerator, high - low))
        codes = rebuilt(x, iscale, low, 0, top).to(x.dtype)
        wl = w * codes
        sum_l, sum_l2, sum_xl = ordered_sum(wl), ordered_sum(wl * codes), ordered_sum(wl * x)
        det = total * sum_l2 - sum_l * sum_l
        new_scale = (total * sum_xl - sum_x * sum_l) / det
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        positive = new_low > 0
        new_scale = torch.where(positive, sum_xl / sum_l2, new_scale)
        new_low = torch.where(positive, 0.0, new_low)
        new_error = error(new_scale, new_low, codes)
        better = (det > 0) & (new_error < best)
        best = torch.where(better, new_error, best)
        scale, kept = torch.where(better, new_scale, scale), torch.where(better, iscale, kept)
        origin, low = torch.where(better, low, origin), torch.where(better, new_low, low)
    scale, kept = torch.where(empty, 0.0, scale), torch.where(empty, 0.0, kept)
    return Found(scale, -low, kept, origin, total)


def _extreme(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first weight of largest magnitude in each block, and where that magnitude is no more than zero."""
    size = x.abs()
    value = x.gather(0, size.argmax(0, keepdim=True)).squeeze(0)
    return value, size.amax(0) < EPSILON


def best_centred(x: Tensor, w: Tensor, top: int) -> Found:
    """``x ≈ scale * code`` with codes -top … top - 1: least squares by ``w`` at 19 inverse scales around the largest weight's."""
    import torch

    extreme, empty = _extreme(x)
    wx = w * x

    def sums(iscale: Tensor) -> tuple[Tensor, Tensor]:
        codes = rebuilt(x, iscale, torch.zeros_like(iscale), -top, top - 1).to(x.dtype)
        return ordered_sum(wx * codes), ordered_sum(w * codes * codes)

    kept = over(-float(top), extreme)
    sum_lx, sum_l2 = sums(kept)
    scale = torch.where(sum_l2 != 0, sum_lx / sum_l2, 0.0)
    best = scale * sum_lx
    for numerator in centred_tries(top):
        iscale = over(numerator, extreme)
        sum_lx, sum_l2 = sums(iscale)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = torch.where(better, sum_lx / sum_l2, scale)
        best = torch.where(better, scale * sum_lx, best)
        kept = torch.where(better, iscale, kept)
    scale, kept = torch.where(empty, 0.0, scale), torch.where(empty, 0.0, kept)
    return Found(scale, torch.zeros_like(scale), kept, torch.zeros_like(scale), ordered_sum(w))


@cache
def centred_tries(top: int) -> tuple[float, ...]:
    """``-(top + 0.1 * i)`` in float32 for i = -9 … 9 without 0."""
    import numpy as np

    f32 = np.float32
    return tuple(float(-f32(f32(top) + f32(f32(0.1) * f32(i)))) for i in range(-9, 10) if i)


def descend(x: Tensor, top: int) -> Found:
    """``x ≈ scale * code`` with weights x^2: five passes that move one code at a time where that lowers the error. Codes 0 … 2 top - 1."""
    import torch

    extreme, empty = _extreme(x)
    iscale = over(-float(top), extreme)
    w = x * x
    wx = w * x
    codes = list(rebuilt(x, iscale, torch.zeros_like(iscale), -top, top - 1).to(x.dtype))
    sum_lx = ordered_sum(wx * torch.stack(codes))
    sum_l2 = ordered_sum(w * torch.stack(codes) * torch.stack(codes))
    for _ in range(5):
        for i, code in enumerate(codes):
            lx, l2 = sum_lx - wx[i] * code, sum_l2 - w[i] * code * code
            new = nearest(x[i] * l2 / lx).clamp(-top, top - 1).to(x.dtype)
            new_lx, new_l2 = lx + wx[i] * new, l2 + w[i] * new * new
            better = (lx > 0) & (new != code) & (new_l2 > 0) & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            codes[i] = torch.where(better, new, code)
            sum_lx, sum_l2 = torch.where(better, new_lx, sum_lx), torch.where(better, new_l2, sum_l2)
    scale = torch.where(empty | ~(sum_l2 > 0), 0.0, sum_lx / sum_l2)
    kept = torch.where(empty, 0, torch.stack(codes) + top).to(torch.uint8)
    zero = torch.zeros_like(scale)
    return Found(scale, zero, zero, zero, zero, kept)


def best_positive(x: Tensor, w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """``x ≈ scale * code`` for non-negative x, codes 0 … top (bytes): float32 (B,) scales and int32 (n, B) codes."""
    import torch

    largest = x.amax(0).clamp(min=0.0)
    empty = largest < EPSILON

    def error(scale: Tensor, codes: Tensor) -> Tensor:
        diff = x - scale * codes.to(x.dtype)
        return ordered_sum(w * diff * diff)

    iscale = over(float(top), largest)
    best = error(over(1.0, iscale), nearest(iscale * x) & 255)
    for numerator in positive_tries(top):
        attempt = over(numerator, largest)
        new_error = error(over(1.0, attempt), nearest(attempt * x).clamp(max=top))
        better = new_error < best
        best, iscale = torch.where(better, new_error, best), torch.where(better, attempt, iscale)
    whole = nearest(iscale * x).clamp(max=top)
    moving = whole.to(x.dtype)
    wx = w * x
    sum_lx, sum_l2 = ordered_sum(wx * moving), ordered_sum(w * moving * moving)
    codes = list(whole & 255)
    for _ in range(5):
        for i, code in enumerate(codes):
            old = code.to(x.dtype)
            lx, l2 = sum_lx - wx[i] * old, sum_l2 - w[i] * old * old
            new = nearest(x[i] * l2 / lx).clamp(max=top)
            step = new.to(x.dtype)
            new_lx, new_l2 = lx + wx[i] * step, l2 + w[i] * step * step
            better = (lx > 0) & (l2 > 0) & (new != code) & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            codes[i] = torch.where(better, new & 255, code)
            sum_lx, sum_l2 = torch.where(better, new_lx, sum_lx), torch.where(better, new_l2, sum_l2)
    scale = torch.where(~empty & (sum_l2 > 0), sum_lx / sum_l2, 0.0)
    return scale, torch.where(empty, 0, torch.stack(codes))


@cache
def positive_tries(top: int) -> tuple[float, ...]:
    """``0.1 * i + top`` in float32 for i = -4 … 4 without 0."""
    import numpy as np

    f32 = np.float32
    return tuple(float(f32(f32(f32(0.1) * f32(i)) + f32(top))) for i in range(-4, 5) if i)
