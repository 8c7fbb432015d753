"""ggml's codebook quantizers: IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M from floats, the same bytes as llama.cpp writes.

Source: ``quantize_row_iq2_xxs_impl`` … in ``ggml/src/ggml-quants.c`` of llama.cpp v0.5.0, compiled without contraction to fused
multiply-adds. Super-blocks of 256; each sub-block goes by itself under weighted errors, then all scales are rounded under one d:

| type    | error weights, plain  | with importances q       | search (``isearch``)               | d                      |
|---------|-----------------------|--------------------------|------------------------------------|------------------------|
| IQ2_XXS | refused               | q sqrt(m + x^2)          | 13 tries around ``best_positive``  | largest / 31           |
| IQ2_XS  | refused               | q sqrt(m + x^2)          | 19 tries around the largest weight | largest / 31           |
| IQ2_S   | m / 2 + x^2           | q sqrt(2 m + x^2)        | as IQ2_XS                          | largest / 31 * 0.9875  |
| IQ3_XXS | x^2                   | q sqrt(2 m + x^2)        | 31 tries around the largest weight | largest / 31 * 1.0125  |
| IQ3_S   | x^2                   | q sqrt(2 m + x^2)        | 19 tries around the largest weight | largest / 31 * 1.033   |
| IQ1_S   | refused               | q sqrt(2 m + x^2)        | all splits (``iternary``)          | largest / 15 * 1.125   |
| IQ1_M   | x^2                   | q sqrt(2 m + x^2)        | all splits, a bit for each half    | refitted * 1.1125      |

m is the mean square of the super-block. The code s of a scale is the nearest to (scale / d - 1) / 2, d before its last factor.
IQ1_M's d is the least-squares fit of the whole super-block under its codes.

One difference: llama.cpp's IQ3_S leaves out the codes and signs of a sub-block of zeros, so that those of later sub-blocks of the same
super-block lie where they are not read; here they lie in their places.

The torch functions are the definition; ``qformats.loops.iquantize`` and ``iternary`` do the searches in one pass over the weights.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from qformats.errors import UsageError, WouldLose
from qformats.formats.ggml.iquants import IQUANTS, SUPER, IQuant
from qformats.quantize.affine import checked, half
from qformats.quantize.ibooks import book
from qformats.quantize.isearch import GridSearch, Searched, grid_search, numerators
from qformats.quantize.iternary import BOOK, ternary_search, ternary_values
from qformats.quantize.kquants import importance_of
from qformats.quantize.ksearch import nearest, ordered_sum, over, positive_tries, root

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.scheme import Storage
    from qformats.tensor import QuantizedTensor

__all__ = ["NEEDY", "RECIPES", "TYPES", "WEIGHTED", "Recipe", "quantize", "searched"]

CHUNK = 1 << 18  # weights in one go


@dataclass(frozen=True, slots=True)
class TernarySearch:
    """``halves``: a bit for each half of a sub-block; a sub-block whose largest weight is below ``epsilon`` is all zeros."""

    epsilon: float
    halves: bool = False
    book: str = BOOK


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one type is made.

    - ``mean``: how many mean squares join x^2 in the error weights made of importances; ``plain``: how many of those join them
      without importances, None where importances are needed.
    - ``factor``: what d is multiplied by at last; ``clears``: whether a super-block under d = 0 loses its codes and signs.
    """

    kind: IQuant
    search: GridSearch | TernarySearch
    mean: float = 2.0
    plain: float | None = 0.0
    factor: float = 1.0
    clears: bool = False


RECIPES = {
    recipe.kind.name.lower(): recipe
    for recipe in (
        Recipe(IQUANTS["IQ2_XXS"], GridSearch("iq2_xxs", 6, 0.1, 1e-15, 2, True, True), 1.0, None, clears=True),
        Recipe(IQUANTS["IQ2_XS"], GridSearch("iq2_xs", 9, 0.1, 1e-15, even=True), 1.0, None, clears=True),
        Recipe(IQUANTS["IQ2_S"], GridSearch("iq2_s", 9, 0.1, 1e-8), plain=0.25, factor=0.9875),
        Recipe(IQUANTS["IQ3_XXS"], GridSearch("iq3_xxs", 15, 0.2, 1e-8, even=True), factor=1.0125, clears=True),
        Recipe(IQUANTS["IQ3_S"], GridSearch("iq3_s", 9, 0.2, 0.0, 1), factor=1.033),
        Recipe(IQUANTS["IQ1_S"], TernarySearch(1e-12), plain=None, factor=1.125),
        Recipe(IQUANTS["IQ1_M"], TernarySearch(1e-7, halves=True), factor=1.1125),
    )
}
TYPES = frozenset(RECIPES)
WEIGHTED = TYPES
NEEDY = frozenset(name for name, recipe in RECIPES.items() if recipe.plain is None)


@cache
def _loops() -> Any:
    """The compiled loops, or None where numba cannot be imported."""
    try:
        grids, ternary = (importlib.import_module(f"qformats.loops.{name}") for name in ("iquantize", "iternary"))
    except ImportError:
        return None
    return SimpleNamespace(LANES=grids.LANES, grid=grids.search, ternary=ternary.search, refit=ternary.refit)


def error_weights(recipe: Recipe, x: Tensor, q: Tensor | None) -> Tensor:
    """float32 (S, 256) of super-blocks x (S, 256) under importances q (columns,) of whole rows."""
    square = x * x
    mean = recipe.mean * ordered_sum(square.T) / 256.0
    if q is None:
        return (recipe.plain or 0.0) * mean[:, None] + square
    spread = q.reshape(-1, SUPER).repeat(len(x) // (len(q) // SUPER), 1)
    return spread * root(mean[:, None] + square)


def searched(recipe: Recipe, x: Tensor, q: Tensor | None, loops: Any = None) -> Searched:
    """What the search finds for super-blocks x (S, 256): codes (S, 256 / v), signs (S, 32), scale (S, 256 / sub)."""
    if loops is not None:
        return _compiled(recipe, x, q, loops)
    w, count = error_weights(recipe, x, q), len(x)
    how, (own, w) = recipe.search, (v.reshape(-1, recipe.kind.sub).T.contiguous() for v in (x, w))
    found = ternary_search(own, w, how.halves, how.epsilon) if isinstance(how, TernarySearch) else grid_search(how, own, w)
    return Searched(found.codes.T.reshape(count, -1), found.signs.T.reshape(count, -1), found.scale.reshape(count, -1))


@cache
def _offsets(name: str) -> Any:
    """uint8 (neighbours, 4 or 5): where the loops find the error terms of each neighbour of ``book``."""
    import numpy as np

    made = book(name)
    levels = made.levels[made.lists].astype(np.int64)
    terms = levels + made.base * np.arange(made.width)
    if made.width == 8:
        terms = np.concatenate([levels[:, :4] @ [[27], [9], [3], [1]], terms[:, 4:]], 1)
    return terms.astype(np.uint8)


@cache
def _tries(how: GridSearch, lanes: int) -> tuple[Any, int]:
    """The tries' numerators, repeated up to whole lanes, and their number."""
    import numpy as np

    tries = numerators(2 * book(how.book).base - 1, how.reach, how.step)
    return np.array(tries + tries[-1:] * (lanes - len(tries)), np.float32), len(tries)


def _compiled(recipe: Recipe, x: Tensor, q: Tensor | None, loops: Any) -> Searched:
    import numpy as np
    import torch

    f32, how, kind, made = np.float32, recipe.search, recipe.kind, book(recipe.search.book)
    codes, scales = np.empty((len(x), SUPER // made.width), np.int16), np.empty((len(x), SUPER // kind.sub), f32)
    bits = np.empty((len(x), SUPER // (kind.shift or 8)), np.uint8)
    importance = np.empty(0, f32) if q is None else q.numpy()
    arrays = x.numpy(), importance, codes, bits, scales, made.levels, made.index, made.starts, made.lists, _offsets(how.book)
    if isinstance(how, TernarySearch):
        loops.ternary(*arrays, kind.sub, how.halves, f32(how.epsilon), f32(recipe.mean))
    else:
        form = kind.sub, made.base, how.even, how.redo, how.by_search, f32(how.epsilon), f32(recipe.mean), f32(recipe.plain or 0)
        loops.grid(*arrays, *_tries(how, loops.LANES), *form, np.array(positive_tries(4), f32))
    return Searched(torch.from_numpy(codes), torch.from_numpy(bits), torch.from_numpy(scales))


def _levels(scale: Tensor, largest_code: int) -> tuple[Tensor, Tensor, Tensor]:
    """d float32 (S,), s uint8 (S, subs) and where d is nothing, of float32 (S, subs) scales."""
    import torch

    largest = scale.amax(1)
    nothing = largest == 0
    d = largest / torch.full_like(largest, float(2 * largest_code + 1))
    s = nearest(0.5 * (over(1.0, d)[:, None] * scale - 1.0)).clamp(0, largest_code)
    return d, torch.where(nothing[:, None], 0, s).to(torch.uint8), nothing


def refitted(recipe: Recipe, x: Tensor, q: Tensor | None, found: Searched, s: Tensor, d: Tensor, loops: Any = None) -> Tensor:
    """float32 (S,): the d that fits super-blocks x (S, 256) under their codes, bits and s best; ``d`` where error weights are zero."""
    import numpy as np
    import torch

    if loops is not None:
        importance = np.empty(0, np.float32) if q is None else q.numpy()
        new = d.clone()
        planes = (found.codes.numpy(), found.signs.numpy(), s.numpy(), new.numpy(), book(BOOK).levels)
        loops.refit(x.numpy(), importance, *planes, np.float32(recipe.mean))
        return new
    w = error_weights(recipe, x, q).T
    values = ternary_values(found.codes.T, found.signs.T) * (2 * s.to(torch.float32) + 1).repeat_interleave(recipe.kind.sub, 1).T
    sum_x, sum_2 = ordered_sum(w * values * x.T), ordered_sum(w * values * values)
    return torch.where(sum_2 > 0, sum_x / sum_2, d)


def _bounded(recipe: Recipe, weights: Tensor, q: Tensor | None) -> Tensor:
    """float32 weights; as ``checked``, ``WouldLose('f16-overflow')`` where not even the largest d, code and level reach one.

    ``UsageError('importance')`` for importances so large that errors overflow.
    """
    x = checked(weights).contiguous()
    largest = float(x.abs().max()) if x.numel() else 0.0
    if largest > 65504.0 * 31 * 16:
        raise WouldLose("f16-overflow", f"a weight of {largest:g} is beyond {recipe.kind.name}", hint="write bf16 or f32 instead")
    if q is not None and q.numel() and float(q.max()) * max(largest, 1e-20) ** 3 * 1e4 > 1e38:
        reason = f"importances up to {float(q.max()):g} overflow float32 under weights up to {largest:g}"
        raise UsageError("importance", reason, hint="divide all of them by the same number")
    return x


def quantize(weights: Tensor, storage: Storage, importance: Tensor | None = None) -> QuantizedTensor:
    """float (N, K), K a multiple of 256 -> the canonical tensor of the type ``storage`` names; ``importance``: (K,) or None."""
    import torch

    recipe = RECIPES[storage.type]
    q = importance_of(importance, int(weights.shape[1]))
    x = _bounded(recipe, weights, q)
    n, k = int(x.shape[0]), int(x.shape[1])
    loops = _loops() if x.device.type == "cpu" else None
    rows = max(1, CHUNK // max(k, 1))
    parts = [_planes(recipe, x[at : at + rows], q, loops) for at in range(0, max(n, 1), rows)]
    codes, signs, s, shift, d = (None if plane[0] is None else torch.cat(plane) for plane in zip(*parts, strict=True))
    assert codes is not None and s is not None and d is not None
    return recipe.kind.to_tensor(codes, signs, s, shift, d)


def _planes(recipe: Recipe, x: Tensor, q: Tensor | None, loops: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """codes, signs, s, shift, d of some rows (n, K), in the order and shapes of ``to_tensor``."""
    import torch

    kind, n, blocks = recipe.kind, int(x.shape[0]), x.reshape(-1, SUPER)
    found = searched(recipe, blocks, q, loops)
    d, s, nothing = _levels(found.scale, (1 << kind.sub_bits) - 1)
    if kind.name == "IQ1_M":
        d = refitted(recipe, blocks, q, found, s, d, loops)
    codes, bits = found.codes.to(getattr(torch, kind.plane_specs[0].dtype)), found.signs.to(torch.uint8)
    if bool(nothing.any()):
        zero = nothing[:, None]
        codes = codes.masked_fill(zero, 0) if recipe.clears else codes
        bits = bits.masked_fill(zero, 0) if recipe.clears or kind.shift else bits
    small = half(torch.where(nothing, 0.0, d * recipe.factor), "scale")
    codes, bits, s, small = (plane.reshape(n, -1) for plane in (codes, bits, s, small))
    return (codes, None, s, bits, small) if kind.shift else (codes, bits, s, None, small)
