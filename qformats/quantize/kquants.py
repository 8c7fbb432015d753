"""ggml's K-quantizers: Q2_K Q3_K Q4_K Q5_K Q6_K from floats, without and with importances, the same bytes as llama.cpp writes.

Source: ``quantize_row_q2_K_ref`` … ``quantize_row_q6_K_ref`` (no importances) and ``quantize_row_q2_K_impl`` … (with them) in
``ggml/src/ggml-quants.c`` of llama.cpp v0.5.0, compiled without contraction to fused multiply-adds. For each super-block of 256:

1. every sub-block gets a scale (and a minimum) by a search over its weights (``ksearch``), each error weighted:

   | type       | plain                     | with importances q                    | search                        |
   |------------|---------------------------|---------------------------------------|-------------------------------|
   | Q4_K, Q5_K | rms of the sub-block + |x| | q sqrt(2 mean x^2 of super-block + x^2) | ``best_affine``               |
   | Q2_K       | |x|, absolute errors      | q sqrt(mean x^2 of super-block + x^2) | ``best_affine``               |
   | Q3_K       | x^2                       | q sqrt(2 mean x^2 of super-block + x^2) | ``descend``, ``best_centred`` |
   | Q6_K       | x^2                       | q                                     | ``best_centred``              |

2. these scales and minima are rounded to codes under d and dmin of the super-block: to the largest of them, or, with importances
   (not Q6_K), by another search weighted with each sub-block's sum of weights;
3. codes are rounded under the scale and minimum as stored; where that scale is zero, the search's own codes stay.

The torch functions are the definition (``defined``); ``qformats.loops.kquantize`` does the same with super-blocks in SIMD lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qformats.errors import BadFile, UsageError
from qformats.formats.ggml.kquants import KQUANTS, SUPER, KQuant
from qformats.loops import find
from qformats.quantize.affine import bounded, half
from qformats.quantize.ksearch import (
    EPSILON,
    Found,
    best_affine,
    best_centred,
    best_positive,
    centred_tries,
    descend,
    nearest,
    ordered_sum,
    over,
    positive_tries,
    rebuilt,
    root,
    steps,
)

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.scheme import Storage
    from qformats.tensor import QuantizedTensor

__all__ = ["NEEDY", "RECIPES", "TYPES", "WEIGHTED", "Recipe", "quantize"]

CHUNK = 1 << 18  # weights the definition takes in one go: what lies between the searches stays in the cache
Planes = tuple["Tensor", "Tensor", "Tensor", "Tensor", "Tensor"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one type is searched. ``plain`` and ``weighted``: (first, delta, count) of the numerators tried without, with importances.

    ``mean``: how many times the super-block's mean square joins x^2 in the weights made of importances, 0 if they are used alone.
    """

    kind: KQuant
    plain: tuple[float, float, int] = (0.0, 0.0, 0)
    weighted: tuple[float, float, int] = (-0.9, 0.05, 36)
    mean: float = 2.0

    @property
    def affine(self) -> bool:
        return self.kind.has_offset

    @property
    def top(self) -> int:
        """The highest code, or its half plus one half where codes lie around a zero point."""
        return self.kind.grid.highest if self.affine else self.kind.zero_point or 0

    @property
    def levels(self) -> int:
        """The highest sub-scale of types with a minimum: 15 or 63."""
        return self.kind.sub_grid.highest

    def tries(self, weighted: bool) -> tuple[float, ...]:
        return steps(*(self.weighted if weighted else self.plain), self.top)

    @property
    def limits(self) -> tuple[int, int, int]:
        """Lowest and highest code around zero, and what is added to store it."""
        return (0, self.top, 0) if self.affine else (-self.top, self.top - 1, self.top)


RECIPES = {
    recipe.kind.name.lower(): recipe
    for recipe in (
        Recipe(KQUANTS["Q2_K"], (-0.5, 0.1, 15), mean=1.0),
        Recipe(KQUANTS["Q3_K"]),
        Recipe(KQUANTS["Q4_K"], (-1.0, 0.1, 20)),
        Recipe(KQUANTS["Q5_K"], (-0.5, 0.1, 15)),
        Recipe(KQUANTS["Q6_K"], mean=0.0),
    )
}
TYPES = WEIGHTED = frozenset(RECIPES)
NEEDY: frozenset[str] = frozenset()


# ---------------------------------------------------------------- step 1: a scale and a minimum for each sub-block


def _weights(recipe: Recipe, x: Tensor, importance: Tensor | None) -> Tensor:
    """(n, B) weights of the errors; ``importance`` is (n, B) too."""
    if importance is None and not recipe.affine:
        return x * x
    if importance is None and recipe.levels == 15:
        return x.abs()
    if importance is None:
        return root(ordered_sum(x * x) / 32) + x.abs()
    if not recipe.mean:
        return importance
    subs = SUPER // recipe.kind.sub
    whole = x.T.reshape(-1, SUPER).T  # (256, B / subs)
    sigma = recipe.mean * ordered_sum(whole * whole) / SUPER
    return importance * root(sigma.repeat_interleave(subs) + x * x)


def search(recipe: Recipe, x: Tensor, importance: Tensor | None) -> Found:
    """Step 1 for x (n, B); the definition of ``qformats.loops.kquantize``."""
    w = _weights(recipe, x, importance)
    if recipe.affine:
        return best_affine(x, w, recipe.top, recipe.tries(importance is not None), importance is None and recipe.levels == 15)
    if importance is None and recipe.top == 4:
        return descend(x, recipe.top)
    return best_centred(x, w, recipe.top)


# ---------------------------------------------------------------- step 2: sub-scales as codes


def _largest(values: Tensor) -> Tensor:
    """(subs, S) -> (S,), at least plus zero; NaN never counts."""
    import torch

    return torch.where(values > 0, values, 0.0).amax(0)


def _to_largest(values: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """float32 d (S,) and codes (subs, S) for the largest value to get the highest code."""
    import torch

    largest = _largest(values)
    inverse = torch.where(largest > 0, over(float(levels), largest), 0.0)
    return largest / torch.full_like(largest, levels), (nearest(inverse * values) & 255).clamp(max=levels if levels == 63 else 255)


def _stored(recipe: Recipe, sc: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """sc and m (subs, S) as they are read back from the bytes ggml packs them into: codes beyond the grid spill over as they do there."""
    import torch

    if not sc.numel() or max(int(sc.max()), int(m.max())) <= recipe.levels:
        return sc, m
    if recipe.levels == 15:
        packed = (sc | (m << 4)) & 255
        return packed & 15, packed >> 4

    def spilled(v: Tensor) -> Tensor:
        high = ((v[:4] >> 6) | (v[4:] >> 4)) & 3
        return torch.cat([v[:4] & 63, (v[4:] & 15) | (high << 4)])

    return spilled(sc), spilled(m)


def _affine_levels(recipe: Recipe, found: Found, subs: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d, dmin (S,), sc, m (subs, S) of types with a minimum."""
    scales, lows = _by_super(found.scale, subs), _by_super(found.low, subs)
    if weighted:
        total = _by_super(found.total, subs)
        (d, sc), (dmin, m) = (best_positive(v, total, recipe.levels) for v in (scales, lows))
        if recipe.top == 31:
            sc, m = sc.clamp(max=63), m.clamp(max=63)
    else:
        (d, sc), (dmin, m) = (_to_largest(v, recipe.levels) for v in (scales, lows))
    return d, dmin, *_stored(recipe, sc, m)


def _by_super(values: Tensor, subs: int) -> Tensor:
    """(B,) -> (subs, S)."""
    return values.reshape(-1, subs).T


def _first_largest(scales: Tensor) -> Tensor:
    """(subs, S) -> (S,): the first scale of largest magnitude; zero where all are NaN or zero."""
    import torch

    value = size = torch.zeros_like(scales[0])
    for scale in scales:
        larger = scale.abs() > size
        value, size = torch.where(larger, scale, value), torch.where(larger, scale.abs(), size)
    return value


def _centred_levels(recipe: Recipe, found: Found, subs: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """d (S,), sc (subs, S) as stored, and which super-blocks are all zeros (S,)."""
    import torch

    scales = _by_super(found.scale, subs)
    if recipe.top == 4 and weighted:
        again = best_centred(scales, _by_super(found.total, subs), 32)
        sc = torch.where(again.iscale != 0, rebuilt(scales, again.iscale, again.origin, -32, 31) + 32, 0)
        return again.scale, sc, torch.zeros_like(again.scale, dtype=torch.bool)
    extreme = _first_largest(scales)
    if recipe.top == 4:
        nothing = extreme == 0
        iscale = over(-32.0, extreme)
        sc = ((nearest(iscale * scales) + 128) & 255) - 128
        sc = torch.where(nothing, 0, sc.clamp(-32, 31) + 32)
    else:
        nothing = extreme.abs() < EPSILON
        iscale = over(-128.0, extreme)
        sc = torch.where(nothing, 0, nearest(iscale * scales).clamp(max=127))
    return torch.where(nothing, 0.0, over(1.0, iscale)), sc, nothing & (recipe.top == 32)


# ---------------------------------------------------------------- step 3: codes


def code(recipe: Recipe, x: Tensor, scale: Tensor, low: Tensor, found: Found) -> Tensor:
    """Codes (n, B) uint8 under the stored ``scale`` and ``low`` (B,); the search's own where ``scale`` is zero."""
    import torch

    lowest, highest, add = recipe.limits
    final = nearest((x + low) / scale).clamp(lowest, highest) + add
    if found.codes is not None:
        kept = found.codes.to(torch.int32)
    else:
        kept = torch.where(found.iscale != 0, rebuilt(x, found.iscale, found.origin, lowest, highest) + add, 0)
    return torch.where(scale != 0, final, kept).to(torch.uint8)


def _loops() -> Any:
    return find("kquantize")


def importance_of(values: Tensor | None, columns: int) -> Tensor | None:
    """float32 (columns,) importances; ``UsageError('importance')`` for another shape, ``BadFile('not-finite')`` for NaN, inf, negatives."""
    import torch

    if values is None:
        return None
    if tuple(values.shape) != (columns,):
        raise UsageError("importance", f"importances of shape {tuple(values.shape)}, expected one for each of {columns} columns")
    single = values.to(torch.float32).contiguous()
    if not bool(torch.isfinite(single).all()) or bool((single < 0).any()):
        raise BadFile("not-finite", "importances must be finite and not negative", hint="compute the importance matrix again")
    return single


def _bounded(recipe: Recipe, weights: Tensor) -> Tensor:
    """float32 weights; as ``checked``, and ``WouldLose('f16-overflow')`` where not even the largest d, sub-scale and code reach one."""
    largest = 65504.0 * max(abs(recipe.kind.sub_grid.lowest), recipe.kind.sub_grid.highest) * (recipe.top + 1)
    return bounded(weights, largest, recipe.kind.name)


def quantize(weights: Tensor, storage: Storage, importance: Tensor | None = None) -> QuantizedTensor:
    """float (N, K), K a multiple of 256 -> the canonical tensor of the K-quant ``storage`` names; ``importance``: (K,) or None."""
    import torch

    recipe = RECIPES[storage.type]
    x = _bounded(recipe, weights)
    n, k = int(x.shape[0]), int(x.shape[1])
    q = importance_of(None if importance is None else importance.to(x.device), k)
    loops = _loops() if x.device.type == "cpu" else None
    if loops is not None:
        codes, sc, m, d, dmin = compiled(recipe, x, q, loops)
    else:
        rows = max(1, CHUNK // max(k, 1))
        parts = [defined(recipe, x[at : at + rows], q) for at in range(0, max(n, 1), rows)]
        codes, sc, m, d, dmin = (torch.cat(plane) for plane in zip(*parts, strict=True))
    sub, whole = (n, k // recipe.kind.sub), (n, k // SUPER)
    low, least = (m.reshape(sub), dmin.reshape(whole)) if recipe.affine else (None, None)
    return recipe.kind.to_tensor(codes.reshape(n, k), sc.reshape(sub), low, d.reshape(whole), least)


def defined(recipe: Recipe, x: Tensor, q: Tensor | None) -> Planes:
    """codes (S, 256), sc, m (S, subs), d and dmin float16 (S,) of rows (n, K) of S super-blocks.

    m and dmin are empty where there is no minimum. Raises ``WouldLose('f16-overflow')``.
    """
    import torch

    kind, subs = recipe.kind, SUPER // recipe.kind.sub
    blocks = x.reshape(-1, kind.sub).T.contiguous()
    spread = None if q is None else q.reshape(-1, kind.sub).repeat(len(x), 1).T.contiguous()
    found = search(recipe, blocks, spread)
    if recipe.affine:
        d, dmin, sc, m = _affine_levels(recipe, found, subs, q is not None)
        d, dmin = half(d, "scale"), half(dmin, "minimum")
        low = _spread(dmin, m)
    else:
        d, sc, nothing = _centred_levels(recipe, found, subs, q is not None)
        d = half(d, "scale")
        dmin, m, low = d[:0], sc[:, :0], torch.zeros_like(found.scale)
        found = replace(found, iscale=torch.where(nothing.repeat_interleave(subs), 0.0, found.iscale))
    codes = code(recipe, blocks, _spread(d, sc - (kind.sub_zero or 0)), low, found).T.reshape(-1, SUPER)
    small = [v.T.to(torch.int8 if kind.sub_grid.signed else torch.uint8) for v in (sc, m)]
    return codes, small[0], small[1], d, dmin


def compiled(recipe: Recipe, x: Tensor, q: Tensor | None, loops: Any) -> Planes:
    """What ``defined`` defines."""
    import numpy as np
    import torch

    kind, weighted, f32 = recipe.kind, q is not None, np.float32
    blocks, importance = x.numpy().reshape(-1, SUPER), np.empty((0, SUPER), f32) if q is None else q.numpy().reshape(-1, SUPER)
    count, subs, low = len(blocks), SUPER // kind.sub, int(recipe.affine)
    codes, sc, d = np.empty((count, SUPER), np.uint8), np.empty((count, subs), np.uint8), np.empty(count, f32)
    m, dmin = np.empty((low * count, subs), np.uint8), np.empty(low * count, f32)
    mean, top = f32(recipe.mean), f32(recipe.top)
    if weighted:
        mode = 4 if recipe.mean else 3
    else:
        mode = 0 if not recipe.affine else 1 if recipe.levels == 15 else 2
    if recipe.affine:
        tries, again = np.array(recipe.tries(weighted), f32), np.array(positive_tries(recipe.levels), f32)
        loops.affine(blocks, importance, codes, sc, m, d, dmin, tries, again, mode, mean, top)
    else:
        passes, twice = not weighted and recipe.top == 4, weighted and recipe.top == 4
        tries = np.array(() if passes else centred_tries(recipe.top), f32)
        loops.centred(blocks, importance, codes, sc, d, tries, np.array(centred_tries(32) if twice else (), f32), mode, mean, top)
    halves = half(torch.from_numpy(d), "scale"), half(torch.from_numpy(dmin), "minimum")
    small = torch.from_numpy(sc.view(np.int8) if kind.sub_grid.signed else sc)
    return torch.from_numpy(codes), small, torch.from_numpy(m), *halves


def _spread(values: Tensor, codes: Tensor) -> Tensor:
    """d (S,) fp16 times codes (subs, S) -> float32 (B,), as they are read back."""
    import torch

    return (values.to(torch.float32) * codes.to(torch.float32)).T.reshape(-1)
