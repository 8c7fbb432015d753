"""A better search for ggml's types of one scale a block: from llama.cpp's own codes to ones of less weighted squared error.

The error of a block is the sum of w (x - value)^2 over its weights x: w is the importance of the column or 1, value what the written block
stands for, under the scale as it is stored. Of every block, in this order:

- the reference's scale and many around the one that maps the largest magnitude to the last level (``Recipe.factors``; with both signs
  where the levels are not symmetric) are tried, each rounded to its stored dtype first and every weight then to its nearest level;
- types with a minimum try to move both ends inwards instead, and fit scale and minimum to the codes by least squares;
- scales that are small floats try the ``around`` neighbours of the reference's byte;
- the fp16 scale that has the least error for the codes found so far is tried, and the codes rounded again, ``ROUNDS`` times.

The first of the least errors is taken, and what is taken is measured once more in float64 against the reference's codes, which stay
unless their error is truly higher: no block gets worse. The arithmetic is float32, sums are added in halves (``halved_sum``), so a block's
codes do not depend on the blocks beside it. The torch functions are the definition, ``qformats.loops.best`` does two of them in one pass
each. Q2_0 may get code 3 (+2 d), which the reference never writes and every reader takes.

K-quants, IQ types with codebooks and IQ4_XS are not here: two levels of scales depend on one another; they keep the reference's search.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from qformats.formats.ggml.legacy import LEGACY
from qformats.formats.ggml.tables import TABLES
from qformats.formats.ggml.ternary import TERNARY
from qformats.loops import find
from qformats.quantize.kquants import importance_of
from qformats.quantize.ksearch import over

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.scheme import Storage
    from qformats.tensor import QuantizedTensor

__all__ = ["RECIPES", "TYPES", "Book", "Recipe", "Uniform", "improved"]

LANES = 16  # blocks side by side in the loops, which take whole groups
CHUNK = 1 << 18  # weights in one go
ROUNDS = 3  # fits of the scale to the codes
KINDS: dict[str, Any] = {name.lower(): kind for name, kind in {**LEGACY, **TABLES, **TERNARY}.items()}


@dataclass(frozen=True)
class Uniform:
    """Levels ``lowest`` … ``highest`` one apart; the code of level 0 is ``zero``."""

    lowest: int
    highest: int
    zero: int = 0

    @property
    def last(self) -> float:
        """The largest magnitude of a level."""
        return float(max(-self.lowest, self.highest))

    def table(self) -> tuple[list[float], list[float]]:
        """No middles, and both ends: what the loops take."""
        return [], [float(self.lowest), float(self.highest)]

    def nearest(self, t: Tensor) -> Tensor:
        """The level nearest to each t, in the place of t."""
        return t.round_().clamp_(self.lowest, self.highest)

    def encode(self, t: Tensor, like: Tensor) -> Tensor:
        """The codes of the levels ``nearest`` finds, in the dtype of ``like``."""
        return (self.nearest(t) + self.zero).to(like.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 levels of codes."""
        import torch

        return codes.to(torch.float32) - self.zero


@dataclass(frozen=True)
class Book:
    """Levels of a table, code for code; the middles between neighbours are multiples of 1 / ``per``, up to ``last`` in magnitude."""

    levels: tuple[float, ...]
    per: int

    @property
    def last(self) -> float:
        """The largest magnitude of a level."""
        return max(abs(level) for level in self.levels)

    def table(self) -> tuple[list[float], list[float]]:
        """The middles between neighbouring levels, and the levels, in order."""
        levels = sorted({level + 0.0 for level in self.levels})
        return [(a + b) / 2 for a, b in pairwise(levels)], levels

    def _places(self, t: Tensor) -> Tensor:
        import torch

        edge = int(self.last) * self.per
        return t.mul_(self.per).floor_().clamp_(-edge, edge - 1).add_(edge).to(torch.int32).flatten()

    def nearest(self, t: Tensor) -> Tensor:
        """As ``Uniform.nearest``."""
        return _nearest_codes(self)[1].to(t.device).index_select(0, self._places(t)).view(t.shape)

    def encode(self, t: Tensor, like: Tensor) -> Tensor:
        """As ``Uniform.encode``."""
        return _nearest_codes(self)[0].to(t.device, like.dtype).index_select(0, self._places(t)).view(t.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """As ``Uniform.decode``."""
        import torch

        return torch.tensor(self.levels, device=codes.device).index_select(0, codes.to(torch.int32).flatten()).view(codes.shape)


@cache
def _nearest_codes(book: Book) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and levels (float32) nearest to every interval of width 1 / per between -last and last."""
    import torch

    levels, edge = torch.tensor(book.levels), int(book.last) * book.per
    middles = (torch.arange(-edge, edge) + 0.5) / book.per
    codes = (middles.unsqueeze(1) - levels).abs().argmin(1)  # of equal ones the first: +0 before -0
    return codes.to(torch.uint8), levels[codes]


@dataclass(frozen=True)
class Recipe:
    """How one type is searched: its levels, and the scales to try.

    ``factors``: fp16 scales, over max|x| / last level; negative ones where the levels are not symmetric. ``around``: scale bytes, over
    the reference's, of the grid ``small``. ``inwards``: pairs of steps by which minimum and maximum move inwards (types with a minimum).
    """

    levels: Uniform | Book
    factors: tuple[float, ...] = ()
    around: tuple[int, ...] = ()
    small: str | None = None
    inwards: tuple[tuple[float, float], ...] = ()


def _range(first: float, last: float, count: int, *, both: bool = False) -> tuple[float, ...]:
    found = tuple(first + (last - first) * i / (count - 1) for i in range(count))
    return tuple(sign * f for f in found for sign in ((1, -1) if both else (1,)))


def _inwards(*steps: float) -> tuple[tuple[float, float], ...]:
    return tuple((a, b) for a in steps for b in steps)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_IQ4_NL = tuple(float(v) for v in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_FLOATS = Book((*_E2M1, *(-v for v in _E2M1)), 4)
RECIPES = {
    "q4_0": Recipe(Uniform(-8, 7, 8), _range(0.6, 1.12, 14, both=True)),
    "q5_0": Recipe(Uniform(-16, 15, 16), _range(0.7, 1.06, 14, both=True)),
    "q8_0": Recipe(Uniform(-127, 127), _range(0.94, 1.01, 24)),
    "q4_1": Recipe(Uniform(0, 15), inwards=_inwards(-0.3, 0.1, 0.5, 0.9)),
    "q5_1": Recipe(Uniform(0, 31), inwards=_inwards(-0.3, 0.1, 0.5, 0.9)),
    "iq4_nl": Recipe(Book(_IQ4_NL, 2), _range(0.7, 1.2, 14, both=True)),
    "mxfp4": Recipe(_FLOATS, around=(-1, 0, 1), small="e8m0"),
    "nvfp4": Recipe(_FLOATS, around=tuple(range(-4, 7)), small="ue4m3"),
    "q1_0": Recipe(Book((-1.0, 1.0), 1)),
    "q2_0": Recipe(Uniform(-1, 2, 1), _range(0.4, 1.1, 14, both=True)),
    "tq1_0": Recipe(Uniform(-1, 1, 1), _range(0.2, 1.0, 17)),
    "tq2_0": Recipe(Uniform(-1, 1, 1), _range(0.2, 1.0, 17)),
}
TYPES = frozenset(RECIPES)


def _loops() -> Any:
    return find("best")


def _tiled(plane: Tensor | None) -> Any:
    """float32 (n, B) as an array (B / LANES, n, LANES), an empty one of None."""
    import numpy as np

    return np.empty((0, 0, 0), np.float32) if plane is None else plane.unflatten(1, (-1, LANES)).transpose(0, 1).contiguous().numpy()


def halved_sum(terms: Tensor) -> Tensor:
    """The sum over the first axis, of a power of two places: half of them added to the other half, until one is left."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms = terms[:half] + terms[half:]
    return terms[0]


def _error(x: Tensor, w: Tensor | None, levels: Tensor, scale: Tensor, low: Tensor | None) -> Tensor:
    """The error (B,) of levels (n, B) under scale and minimum (B,); works in the place of ``levels``."""
    value = levels.mul_(scale).sub_(x)
    if low is not None:
        value.add_(low)
    value.mul_(value)
    return halved_sum(value if w is None else value.mul_(w))


def _moments(x: Tensor, w: Tensor | None, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums (B,) of w level x, w level^2 and w level."""
    weighted = levels if w is None else levels * w
    return halved_sum(weighted * x), halved_sum(weighted * levels), halved_sum(weighted)


def _scaled(x: Tensor, scale: Tensor, low: Tensor | None) -> Tensor:
    import torch

    inverse = torch.where(scale != 0, over(1.0, scale), 0.0)
    return x * inverse if low is None else (x - low).mul_(inverse)


def _half(values: Tensor) -> Tensor:
    """float32 as it is after storing it in fp16."""
    import torch

    return values.to(torch.float16).to(torch.float32)


class _Search:
    """The best scale, byte and minimum so far of blocks x (n, B), all (B,); starts with the reference's."""

    def __init__(self, recipe: Recipe, x: Tensor, w: Tensor | None, codes: Tensor, scale: Tensor, low: Tensor | None) -> None:
        self.recipe, self.x, self.w = recipe, x, w
        self.stored, self.low = scale, low  # ``stored``: fp16 scales as float32, or scale bytes
        self.error = _error(x, w, recipe.levels.decode(codes), self.real(scale), low)
        self.loops = _loops() if x.device.type == "cpu" else None
        if self.loops is not None:
            self.tiles = [_tiled(plane) for plane in (x, w)]
        if low is not None:
            self.total = halved_sum(x * 0 + 1 if w is None else w), halved_sum(x if w is None else x * w)

    def real(self, stored: Tensor) -> Tensor:
        """float32 scales."""
        return stored if self.recipe.small is None else _bytes(self.recipe.small).to(stored.device)[stored.long()]

    def offer(self, stored: Tensor, low: Tensor | None = None) -> None:
        """Take a scale and minimum, where both are finite, if their error, with all codes rounded anew, is lower."""
        import torch

        if self.recipe.small is None:
            finite = torch.isfinite(stored if low is None else stored + low)
            stored = torch.where(finite, stored, self.stored)
            low = None if low is None or self.low is None else torch.where(finite, low, self.low)
        scale = self.real(stored)
        if self.loops is None:
            error = _error(self.x, self.w, self.levels(scale, low), scale, low)
        else:
            error = torch.from_numpy(self.loops.errors(*self._arrays(scale, low)))
        better = error < self.error
        self.stored, self.error = torch.where(better, stored, self.stored), torch.where(better, error, self.error)
        if low is not None and self.low is not None:
            self.low = torch.where(better, low, self.low)

    def levels(self, scale: Tensor, low: Tensor | None) -> Tensor:
        """float32 (n, B): the nearest levels."""
        return self.recipe.levels.nearest(_scaled(self.x, scale, low))

    def _arrays(self, scale: Tensor, low: Tensor | None) -> list[Any]:
        """What the loops take."""
        import numpy as np

        tables = [np.array(table, np.float32) for table in self.recipe.levels.table()]
        return [*self.tiles, scale.contiguous().numpy(), np.empty(0, np.float32) if low is None else low.numpy(), *tables]

    def fit(self, scale: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """fp16 scale (and minimum) of least squares for the codes under ``scale`` and ``low``; no numbers where there is none."""
        import torch

        if self.loops is None:
            lx, l2, sl = _moments(self.x, self.w, self.levels(scale, low))
        else:
            lx, l2, sl = torch.from_numpy(self.loops.moments(*self._arrays(scale, low)))
        if low is None:
            return _half(lx / l2 + 0.0), None  # a sum of nothing has either sign
        s1, s2 = self.total
        slope = (s1 * lx - sl * s2) / (s1 * l2 - sl * sl)
        base = (s2 - slope * sl) / s1
        return _half(slope + 0.0), _half(base + 0.0)


@cache
def _bytes(name: str) -> Tensor:
    """What each scale byte stands for, float32 (256,)."""
    import torch

    from qformats import grids

    return grids.float_values(name).to(torch.float32)


def _searched(recipe: Recipe, search: _Search) -> None:
    """Offer every candidate."""
    x = search.x
    search.offer(search.stored, search.low)
    largest = x.abs().amax(0) / recipe.levels.last
    for factor in recipe.factors:
        search.offer(_half(largest * factor))
    if recipe.small is not None:
        start, top = search.stored.int(), 254 if recipe.small == "e8m0" else 126  # above: what is no number, or zero
        for move in recipe.around:
            search.offer((start + move).clamp(0, top).to(search.stored.dtype))
        return
    if recipe.inwards:
        bottom, width = x.amin(0), x.amax(0) - x.amin(0)
        for a, b in recipe.inwards:
            step = width / (recipe.levels.last + a + b)
            search.offer(*search.fit(step, bottom + step * a))
    for _ in range(ROUNDS):
        search.offer(*search.fit(search.stored, search.low))


def _better(recipe: Recipe, x: Tensor, w: Tensor | None, codes: Tensor, scale: Tensor, low: Tensor | None) -> tuple[Tensor, ...]:
    """Codes (n, B), scales and minima (B,) of blocks x (n, B), in the dtypes of the reference's, which are given."""
    import torch

    blocks, fp16 = len(scale), recipe.small is None
    x, codes, scale = (torch.nn.functional.pad(plane, (0, -blocks % LANES)) for plane in (x, codes, scale))
    w, low = (None if plane is None else torch.nn.functional.pad(plane, (0, -blocks % LANES)) for plane in (w, low))
    known = (scale.to(torch.float32) if fp16 else scale), None if low is None else low.to(torch.float32)
    search = _Search(recipe, x, w, codes, *known)
    _searched(recipe, search)
    made = recipe.levels.encode(_scaled(x, search.real(search.stored), search.low), codes)
    wide, weights = x.double(), None if w is None else w.double()

    def exact(some: Tensor, stored: Tensor, least: Tensor | None) -> Tensor:
        levels = recipe.levels.decode(some).double()
        return _error(wide, weights, levels, search.real(stored).double(), None if least is None else least.double())

    won = exact(made, search.stored, search.low) < exact(codes, *known)
    planes = [torch.where(won, made, codes), torch.where(won, search.stored.to(scale.dtype), scale)]
    if low is not None and search.low is not None:
        planes.append(torch.where(won, search.low.to(low.dtype), low))
    return tuple(plane[..., :blocks] for plane in planes)


def improved(weights: Tensor, start: QuantizedTensor, storage: Storage, importance: Tensor | None = None) -> QuantizedTensor:
    """``start``, what the reference makes of ``weights`` (N, K) in ``storage``, with better codes and scales where there are any.

    ``importance``: float (K,), weighs the errors of each column; ``UsageError('importance')`` for another shape.
    """
    import torch

    kind, recipe = KINDS[storage.type], RECIPES[storage.type]
    codes, scale, *rest = kind.planes(start)
    low = rest[0] if rest else None
    n, k = int(weights.shape[0]), int(weights.shape[1])
    q, run = importance_of(importance, k), storage.group or k
    parts, rows = [], max(1, CHUNK // max(k, 1))

    def columns(plane: Tensor) -> Tensor:
        return plane.reshape(-1, run).T.contiguous()

    for at in range(0, n, rows):
        some = slice(at, min(n, at + rows))
        w = None if q is None else columns(q.expand(some.stop - at, k))
        known = scale[some].flatten(), None if low is None else low[some].flatten()
        made = _better(recipe, columns(weights[some].to(torch.float32)), w, columns(codes[some]), *known)
        parts.append((made[0].T.reshape(-1, k), *(plane.reshape(-1, k // run) for plane in made[1:])))
    if not parts:
        return start
    planes = [torch.cat(plane) for plane in zip(*parts, strict=True)]
    return kind.to_tensor(*planes, *([None] if rest and low is None else []))  # type: ignore[no-any-return]
