"""The search inside ggml's IQ1 quantizers, vectorized over sub-blocks: three levels, split where the error is least, then entries.

Source: ``quantize_row_iq1_s_impl``, ``quantize_row_iq1_m_impl`` and ``iq1_find_best_neighbour2`` in ``ggml/src/ggml-quants.c`` of llama.cpp
v0.5.0, compiled without contraction to fused multiply-adds. Arguments are float32 (n, B), position first, as in ``ksearch``.

A level's value is ``level - 1 + 1/8``, or ``- 1/8`` where a group's bit is set. Weights are sorted, equal ones in their order (as glibc's
``qsort`` leaves them); the first i1 get level 0, those up to i2 level 1, the rest level 2. All (i1, i2, bits) are tried in this order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformats.quantize.ibooks import on_device
from qformats.quantize.isearch import Searched, nearest_neighbour, points_of
from qformats.quantize.ksearch import ordered_sum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BOOK", "ternary_search", "ternary_values"]

BOOK = "iq1_s"
LOW = -3.4028234663852886e38  # -FLT_MAX
_PLUS, _MINUS = (-0.875, 0.125, 1.125), (-1.125, -0.125, 0.875)


def _sums_before(terms: Tensor) -> Tensor:
    """(n, B) -> (n + 1, B): the sum of the terms before each place, in order."""
    import torch

    sums = [torch.zeros_like(terms[0])]
    for term in terms:
        sums.append(sums[-1] + term)
    return torch.stack(sums)


def _whole_scores(x: Tensor, w: Tensor, inside: Tensor, i1: Tensor, i2: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of w x q and w q q of every split (P,), one bit for all weights: (P, 2, B) each."""
    import torch

    sx, sw = _sums_before(w * x), _sums_before(w)
    sum_x, sum_2 = [], []
    for v in (_PLUS, _MINUS):
        parts = [(s[i1] - s[0], s[i2] - s[i1], s[-1] - s[i2]) for s in (sx, sw)]
        sum_x.append(parts[0][0] * v[0] + parts[0][1] * v[1] + parts[0][2] * v[2])
        sum_2.append(parts[1][0] * v[0] * v[0] + parts[1][1] * v[1] * v[1] + parts[1][2] * v[2] * v[2])
    return torch.stack(sum_x, 1), torch.stack(sum_2, 1)


def _half_scores(x: Tensor, w: Tensor, inside: Tensor, i1: Tensor, i2: Tensor) -> tuple[Tensor, Tensor]:
    """As ``_whole_scores`` with one bit for each half of the weights: (P, 4, B); ``inside``: which sorted weights are of the second."""
    import torch

    halves = []
    for half in (~inside, inside):
        px, pw = (_sums_before(torch.where(half, terms, 0.0)) for terms in (w * x, w))
        between = px[i1] + px[i2]
        pair = []
        for v in (_PLUS, _MINUS):
            first, second = v[0] * v[0] - v[1] * v[1], v[1] * v[1] - v[2] * v[2]
            pair.append((px[-1] * v[2] - between, pw[-1] * v[2] * v[2] + pw[i1] * first + pw[i2] * second))
        halves.append(pair)
    both = [(halves[0][a], halves[1][b]) for a in (0, 1) for b in (0, 1)]
    return torch.stack([a[0] + b[0] for a, b in both], 1), torch.stack([a[1] + b[1] for a, b in both], 1)


def _best_split(sum_x: Tensor, sum_2: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The number of the winner among (C, B) candidates, -1 for none, and its scale, ``first`` for none."""
    import torch

    best, scale, winner = torch.full_like(first, LOW), first, torch.full(first.shape, -1, device=first.device)
    for c in range(len(sum_x)):
        better = (sum_2[c] > 0) & (sum_x[c] * sum_x[c] > best * sum_2[c])
        scale = torch.where(better, sum_x[c] / sum_2[c], scale)
        best, winner = torch.where(better, scale * sum_x[c], best), torch.where(better, c, winner)
    return winner, scale


def ternary_values(codes: Tensor, bits: Tensor) -> Tensor:
    """float32 (n, B): what entries (n / 8, B) stand for under the bits of their groups."""
    levels = on_device(BOOK, str(codes.device))[0]
    return ((levels[codes] - 1.0) + (0.125 - 0.25 * bits.to(levels.dtype)).unsqueeze(-1)).transpose(1, 2).flatten(0, 1)


def ternary_search(x: Tensor, w: Tensor, halves: bool, epsilon: float) -> Searched:
    """Entries, bits (in ``signs``: 1 for each group or, where ``halves`` is not set, for all) and scales of sub-blocks."""
    import torch

    n, device = len(x), x.device
    size = x.abs().amax(0)
    order = torch.sort(x + 0.0, dim=0, stable=True)[1]
    rank = order.argsort(0)
    i1, i2 = (torch.tensor(place, device=device) for place in zip(*((i, j) for i in range(n + 1) for j in range(i, n + 1)), strict=True))
    scores = _half_scores if halves else _whole_scores
    sum_x, sum_2 = scores(x.gather(0, order), w.gather(0, order), order >= n // 2, i1, i2)
    count = sum_x.shape[1]
    winner, scale = _best_split(sum_x.flatten(0, 1), sum_2.flatten(0, 1), size)
    empty = (size < epsilon) | (winner < 0)
    split, choice = winner.clamp(min=0) // count, winner.clamp(min=0) % count
    levels = (rank >= i1[split]).to(torch.int64) + (rank >= i2[split])
    negative = scale < 0
    levels, choice, scale = torch.where(negative, 2 - levels, levels), torch.where(negative, count - 1 - choice, choice), scale.abs()
    bits = torch.stack([choice >> 1, choice & 1]) if halves else choice.expand(n // 8, -1)
    codes, off = _entries(x, w, points_of(levels, 3, 8), bits, scale)
    q = ternary_values(codes, bits)
    sum_x, sum_2 = ordered_sum(w * q * x), ordered_sum(w * q * q)
    scale = torch.where(off.any(0) & (sum_x > 0) & (sum_2 > 0), sum_x / sum_2, scale)
    bits = bits if halves else bits[:1]
    nothing = torch.zeros((), dtype=torch.int64, device=device)
    return Searched(torch.where(empty, nothing, codes), torch.where(empty, nothing, bits), torch.where(empty, 0.0, scale))


def _entries(x: Tensor, w: Tensor, points: Tensor, bits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Entries of points (n / 8, B) and whether each is a neighbour."""
    levels, index, _, _ = on_device(BOOK, str(x.device))
    entry = index[points]
    off = entry < 0
    if bool(off.any()):
        own, weights = (v.unflatten(0, (-1, 8)).transpose(0, 1)[:, off] for v in (x, w))
        add = 0.125 - 0.25 * bits[off].to(x.dtype)
        entry[off] = nearest_neighbour(BOOK, points[off], own, weights, scale.expand_as(off)[off], levels - 1.0, add)
    return entry, off
