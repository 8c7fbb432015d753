"""The searches inside ggml's IQ2 and IQ3 quantizers, vectorized over sub-blocks: entries, signs and the best scale.

Source: ``quantize_row_iq2_xxs_impl`` … ``quantize_row_iq3_s_impl``, ``iq2_find_best_neighbour`` and ``iq3_find_best_neighbour`` in
``ggml/src/ggml-quants.c`` of llama.cpp v0.5.0, compiled without contraction to fused multiply-adds. As in ``ksearch``, arguments are
float32 (n, B), position first; every product and every sum is rounded, in the reference's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from qformats.quantize.ibooks import book, on_device
from qformats.quantize.ksearch import best_positive, nearest, ordered_sum, over, root

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GridSearch", "Searched", "grid_search", "nearest_neighbour", "numerators", "points_of"]

_HUGE = 3.4028234663852886e38  # FLT_MAX


@dataclass(frozen=True, slots=True)
class GridSearch:
    """How scales are tried. The level of a weight is ``(x / scale - 1) / 2``, its value ``2 * level + 1`` scales.

    - ``reach``, ``step``: tries are 2 * levels - 1 + step * i, i = -reach … reach, over the largest weight.
    - ``epsilon``: a sub-block whose largest weight lies below is all zeros; where it is 0, one of zeros alone.
    - ``redo``: which entries are chosen again under the scale found: 0 neighbours, 1 all if there are neighbours, 2 all.
    - ``by_search``: whether tries are counted from ``best_positive``'s scale instead of the largest weight.
    - ``even``: whether every eight weights have an even number of minus signs.
    """

    book: str
    reach: int
    step: float
    epsilon: float
    redo: int = 0
    by_search: bool = False
    even: bool = False


@dataclass(frozen=True, slots=True)
class Searched:
    """For B sub-blocks: int64 ``codes`` (entries, B), int64 ``signs`` (n / 8, B) as bytes, float32 ``scale`` (B,) at least 0."""

    codes: Tensor
    signs: Tensor
    scale: Tensor


@cache
def numerators(highest: int, reach: int, step: float) -> tuple[float, ...]:
    """``highest + step * i`` in float32."""
    import numpy as np

    f32 = np.float32
    return tuple(float(f32(highest) + f32(f32(i) * f32(step))) for i in range(-reach, reach + 1))


def magnitudes(x: Tensor, w: Tensor, even: bool) -> tuple[Tensor, Tensor]:
    """Weights without their signs, and these as bytes (n / 8, B); ``even`` turns the sign of the least w x^2 of eight to keep parity."""
    import torch

    minus = ~(x >= 0)
    size = torch.where(minus, -x, x)
    if even:
        odd = minus.unflatten(0, (-1, 8)).sum(1, keepdim=True) % 2 == 1
        least = (w * x * x).unflatten(0, (-1, 8)).argmin(1, keepdim=True)
        turned = torch.zeros_like(minus).unflatten(0, (-1, 8)).scatter(1, least, odd).flatten(0, 1)
        size, minus = torch.where(turned, -size, size), minus ^ turned
    places = torch.arange(8, device=x.device)[:, None]
    return size, (minus.unflatten(0, (-1, 8)).to(torch.int64) << places).sum(1)


def points_of(levels: Tensor, base: int, width: int) -> Tensor:
    """int (n, B) levels -> int64 (n / width, B) points."""
    import torch

    powers = base ** torch.arange(width, device=levels.device)[:, None]
    points: Tensor = (levels.to(torch.int64).unflatten(0, (-1, width)) * powers).sum(1)
    return points


def nearest_neighbour(name: str, points: Tensor, x: Tensor, w: Tensor, scale: Tensor, values: Tensor, add: Tensor) -> Tensor:
    """int64 (P,): of each point's neighbours the first with the least ``sum w (scale * (value + add) - x)^2``.

    ``x``, ``w``: (v, P); ``scale``, ``add``: (P,); ``values``: (entries, v).
    """
    import torch

    _, _, starts, lists = on_device(name, str(points.device))
    first, count = starts[points], starts[points + 1] - starts[points]
    best, entry = torch.full_like(scale, _HUGE), lists[first]
    for j in range(int(count.max())):
        candidate = lists[(first + j).clamp(max=len(lists) - 1)]
        error = torch.zeros_like(scale)
        for i in range(len(x)):
            diff = scale * (values[candidate, i] + add) - x[i]
            error = error + w[i] * diff * diff
        better = (j < count) & (error < best)
        best, entry = torch.where(better, error, best), torch.where(better, candidate, entry)
    return entry


def _entries(name: str, x: Tensor, aux: Tensor, inverse: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Entries (n / v, B) of weights under one inverse scale, with neighbours chosen under ``scale``, and whether each is one."""
    made, (levels, index, _, _) = book(name), on_device(name, str(x.device))
    rounded = nearest(0.5 * (inverse * x - 1.0)).clamp(0, made.base - 1)
    points = points_of(rounded, made.base, made.width)
    entry = index[points]
    off = entry < 0
    if bool(off.any()):
        own, weights = (v.unflatten(0, (-1, made.width)).transpose(0, 1)[:, off] for v in (x, aux))
        spread = scale.expand_as(off)[off]
        values = 2 * levels + 1
        entry[off] = nearest_neighbour(name, points[off], own, weights, spread, values, spread.new_zeros(()))
    return entry, off


def _sums(name: str, x: Tensor, w: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of w x q and w q q."""
    levels = on_device(name, str(x.device))[0]
    q = (2 * levels[entries] + 1).transpose(1, 2).flatten(0, 1)  # (n, B)
    return ordered_sum(w * x * q), ordered_sum(w * q * q)


def grid_search(how: GridSearch, x: Tensor, w: Tensor) -> Searched:
    """Entries, signs and scale of sub-blocks x under error weights w (n, B)."""
    import torch

    highest = 2 * book(how.book).base - 1
    x, signs = magnitudes(x, w, how.even)
    aux, largest = root(w), x.amax(0)
    empty = (largest < how.epsilon) | (largest == 0)
    scale = largest / torch.full_like(largest, float(highest))
    if how.by_search:
        scale = best_positive(x, w, 4)[0]
        largest = scale * 3.0
        empty = empty | ~(largest > 0)
    best, codes = torch.zeros_like(scale), torch.zeros(len(x) // book(how.book).width, x.shape[1], dtype=torch.int64, device=x.device)
    off = torch.full_like(codes, how.redo == 1, dtype=torch.bool)
    for numerator in numerators(highest, how.reach, how.step):
        inverse = over(numerator, largest)
        entries, neighbours = _entries(how.book, x, aux, inverse, over(1.0, inverse))
        sum_x, sum_2 = _sums(how.book, x, w, entries)
        better = (sum_2 > 0) & (sum_x * sum_x > best * sum_2)
        scale = torch.where(better, sum_x / sum_2, scale)
        best = torch.where(better, scale * sum_x, best)
        codes, off = torch.where(better, entries, codes), torch.where(better, neighbours, off)
    again = (off.any(0) | (how.redo == 2)) & (scale > 0)
    entries, _ = _entries(how.book, x, aux, over(1.0, scale), scale)
    codes = torch.where(again & (off if how.redo == 0 else torch.ones_like(off)), entries, codes)
    sum_x, sum_2 = _sums(how.book, x, w, codes)
    scale = torch.where(again & (sum_2 > 0), sum_x / sum_2, scale)
    signs = torch.where(scale < 0, signs ^ 255, signs)
    nothing = torch.zeros((), dtype=torch.int64, device=x.device)
    return Searched(torch.where(empty, nothing, codes), torch.where(empty, nothing, signs), torch.where(empty, 0.0, scale.abs()))
