"""Better codes for affine integer types: from any quantizer's own to ones of less weighted squared error, group by group.

For every storage of integers under one plain scale (``fits``): constant, integer or float zero points, offsets, any group, row, tile
or tensor. The error of a group is the sum of w (x - value)^2 over its weights x, w the importance of the column or 1, value what the
stored numbers stand for. These are tried in every group, each parameter rounded to its stored dtype and each weight then to its nearest
code:

- what is there already, and its parameters with all codes rounded anew;
- the smallest distance of two different weights as the step, which finds the grid of weights that lie on one;
- one scale alone (``Centred``): the largest magnitude on the last level or the one before, and factors of that; with both signs where the
  levels are not symmetric and the storage lets a scale be negative;
- a scale and an origin (zero point or offset): both ends of the range moved inwards by parts of a step, or by factors;
- ``ROUNDS`` times the least squares of scale and origin for the codes found so far.

The first of the least errors is taken, and only where its error, measured once more in float64, is truly lower than that of the codes
given. The arithmetic is float32 on weights divided by a power of two near the group's largest, sums are added in halves; so a group's codes
do not depend on the groups beside it, nor on the number of threads.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qformats.loops import find
from qformats.quantize.groups import grouped, halved, is_ragged, ungrouped
from qformats.quantize.kquants import importance_of
from qformats.scheme import Integer, Storage

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import Param, QuantizedTensor

__all__ = ["Form", "Search", "fits", "improved"]

CHUNK = 1 << 18  # weights in one go
PIECE = 1 << 20  # of a group that is larger
ROUNDS = 3
WHOLE, FREE, OFFSET = 0, 1, 2  # origins
_INWARDS = (-0.3, 0.1, 0.5, 0.9)  # steps by which an end of the range moves inwards
_TOWARDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # factors of both ends
_WIDEST = {1: (0.2, 1.2), 2: (0.3, 1.2), 3: (0.4, 1.15), 4: (0.5, 1.12), 5: (0.6, 1.07), 6: (0.7, 1.04), 7: (0.85, 1.02), 8: (0.92, 1.01)}
_COUNT = 16  # factors between those ends


def fits(storage: Storage) -> bool:
    """Whether ``improved`` is for ``storage``: integers of up to 8 bits under one plain scale."""
    plain = storage.sub_scale is None and storage.scale_grid is None and not storage.doubled and bool(storage.scale_dtypes)
    known = storage.factor is None or storage.factor.constant is not None
    both = storage.offset is not None and (storage.zero_point is not None or storage.zero_dtype is not None)
    return isinstance(storage.grid, Integer) and storage.grid.bits <= 8 and plain and known and not both


@dataclass(frozen=True)
class Form:
    """What may be stored: codes ``low`` … ``top``; for the origin ``constant``, integers ``between``, a float ``zero`` or an ``offset``."""

    low: int
    top: int
    scale: str
    negative: bool
    inverse: bool
    constant: int | None
    between: tuple[int, int] | None
    zero: str | None
    offset: str | None
    factor: float

    @classmethod
    def of(cls, s: Storage) -> Form:
        """The form of a storage that ``fits``."""
        between = s.zero_point if isinstance(s.zero_point, tuple) else None
        constant = None if between or s.zero_dtype or s.offset else s.zero_point if isinstance(s.zero_point, int) else 0
        factor = 1.0 if s.factor is None or s.factor.constant is None else s.factor.constant
        factor = 1 / factor if s.factor is not None and s.factor.inverse else factor
        top = s.integers.lowest + ((1 << s.integers.bits) - 1) if s.highest is None else s.highest
        ends, scale = (s.integers.lowest, top), s.scale_dtypes[0]
        return cls(*ends, scale, s.negative_scale, s.inverse, constant, between, s.zero_dtype, s.offset, factor)

    @property
    def kind(self) -> int:
        """``WHOLE`` zero points, ``FREE`` ones or ``OFFSET``."""
        return OFFSET if self.offset is not None else FREE if self.zero is not None else WHOLE

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.top - self.low).bit_length()


class Search:
    """The best parameters so far of groups ``x`` (G, width), all (G, 1): stored scales and origins as float32, and their ``error``.

    ``unit``: the power of two that weights, steps and offsets are divided by here. Origins are zero points, or offsets over the unit.
    """

    def __init__(self, form: Form, x: Tensor, w: Tensor | None, scale: Tensor, origin: Tensor) -> None:
        import torch

        self.form = form
        self.low, self.high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        _, exponent = torch.frexp(torch.maximum(-self.low, self.high))
        self.unit = torch.ldexp(torch.ones_like(scale), exponent.clamp(-125, 127))
        self.pieces = [(part / self.unit, None if q is None else q.contiguous()) for part, q in _pieces(x, w)]
        self.low, self.high = self.low / self.unit, self.high / self.unit
        self.scale, self.origin = scale, origin if form.offset is None else origin / self.unit
        self.error = torch.nan_to_num(self._error(self.step(scale), self.origin), nan=torch.inf)

    def step(self, stored: Tensor) -> Tensor:
        """float32: what one code more adds, over the unit."""
        real = 1 / stored if self.form.inverse else stored
        return real * self.form.factor / self.unit

    def codes(self, x: Tensor, step: Tensor, origin: Tensor) -> Tensor:
        """The codes nearest to some columns of x, float32 (G, n)."""
        import torch

        if self.form.kind == OFFSET:
            codes = torch.sub(x, origin).div_(step).round_()
        elif self.form.kind == FREE:
            codes = torch.div(x, step).add_(origin).round_()
        else:
            codes = torch.div(x, step).round_().add_(origin)
        return codes.clamp_(self.form.low, self.form.top)

    def made(self) -> Tensor:
        """The codes of the best parameters so far, float32 (G, width)."""
        import torch

        return torch.cat([self.codes(x, self.step(self.scale), self.origin) for x, _ in self.pieces], 1)

    def levels(self, x: Tensor, step: Tensor, origin: Tensor) -> Tensor:
        """What the step is multiplied by: the codes without their zero points."""
        codes = self.codes(x, step, origin)
        return codes if self.form.kind == OFFSET else codes.sub_(origin)

    def define_error(self, x: Tensor, w: Tensor | None, step: Tensor, origin: Tensor) -> Tensor:
        """The weighted squared error (G,) of some columns."""
        apart = self.levels(x, step, origin).mul_(step)
        apart = (apart.add_(origin) if self.form.kind == OFFSET else apart).sub_(x)
        apart.mul_(apart)
        return halved(apart if w is None else apart.mul_(w))

    def define_moments(self, x: Tensor, w: Tensor | None, step: Tensor, origin: Tensor) -> Tensor:
        """The sums (3, G) of w level x, w level^2 and w level of some columns."""
        import torch

        levels = self.levels(x, step, origin)
        weighted = levels if w is None else levels * w
        return torch.stack([halved(weighted * x), halved(weighted * levels), halved(weighted.clone())])

    def _each(self, name: str, step: Tensor, origin: Tensor) -> list[Tensor]:
        """``define_error`` or ``define_moments`` of all pieces, by the loops where there are any."""
        import numpy as np
        import torch

        loops = find("affine_search") if step.device.type == "cpu" else None
        if loops is None:
            return [getattr(self, f"define_{name}")(x, w, step, origin) for x, w in self.pieces]
        ends = step.reshape(-1).numpy(), origin.contiguous().reshape(-1).numpy(), self.form.low, self.form.top, self.form.kind
        found, call = [], loops.errors if name == "error" else loops.moments
        for x, w in self.pieces:
            weights = np.empty((0, int(x.shape[1])), np.float32) if w is None else w.numpy()
            found.append(torch.from_numpy(call(x.numpy(), weights, *ends)))
        return found

    def _error(self, step: Tensor, origin: Tensor) -> Tensor:
        return functools.reduce(operator.add, self._each("error", step.contiguous(), origin)).unsqueeze(1)

    def offer(self, step: Tensor, origin: Tensor) -> None:
        """Take a step and an origin as they are when stored, where they are numbers, if their error is lower."""
        import torch

        form = self.form
        stored = step * self.unit / form.factor
        stored = (1 / stored if form.inverse else stored).to(getattr(torch, form.scale)).to(torch.float32)
        kept = self.rounded(origin)
        good = torch.isfinite(stored) & (stored != 0) & torch.isfinite(kept)
        good = good if form.negative else good & (stored > 0)
        stored, kept = torch.where(good, stored, self.scale), torch.where(good, kept, self.origin)
        error = self._error(self.step(stored), kept)
        better = good & (error < self.error)
        self.scale, self.origin = torch.where(better, stored, self.scale), torch.where(better, kept, self.origin)
        self.error = torch.where(better, error, self.error)

    def rounded(self, origin: Tensor) -> Tensor:
        """An origin as it is when stored."""
        import torch

        form = self.form
        if form.offset is not None:
            return (origin * self.unit).to(getattr(torch, form.offset)).to(torch.float32) / self.unit
        if form.zero is not None:
            return origin.to(getattr(torch, form.zero)).to(torch.float32)
        if form.between is not None:
            return origin.round().clamp(*form.between)
        return torch.full_like(origin, float(form.constant or 0))

    def at(self, step: Tensor, base: Tensor) -> None:
        """Offer a step and the weight that the code 0 shall stand for (over the unit)."""
        self.offer(step, base if self.form.offset is not None else -base / step)

    @cached_property
    def totals(self) -> tuple[Tensor, Tensor]:
        """The sums (G, 1) of w and w x, float64."""
        import torch

        s1 = [_sum(torch.ones_like(x) if w is None else w.clone()) for x, w in self.pieces]
        s2 = [_sum(x.clone() if w is None else x * w) for x, w in self.pieces]
        return functools.reduce(operator.add, s1), functools.reduce(operator.add, s2)

    def fit(self) -> tuple[Tensor, Tensor]:
        """The step and origin of least squares for the codes of the best parameters so far; no numbers where there are none."""
        form, step = self.form, self.step(self.scale).contiguous()
        sums = functools.reduce(operator.add, (part.double() for part in self._each("moments", step, self.origin)))
        lx, l2, sl = (plane.unsqueeze(1) for plane in sums)
        if form.kind == WHOLE and form.between is None:
            return (lx / l2).float(), self.origin
        s1, s2 = self.totals
        slope = (s1 * lx - sl * s2) / (s1 * l2 - sl * sl)
        base = (s2 - slope * sl) / s1  # the weight of level 0
        return slope.float(), (base if form.kind == OFFSET else self.origin - base / slope).float()


def _sum(terms: Tensor) -> Tensor:
    """float64 (G, 1); works in the place of ``terms``."""
    return halved(terms).unsqueeze(1).double()


def _pieces(x: Tensor, w: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Columns of groups, as many at once as stay small beside what else is held."""
    if x.numel() <= PIECE:
        return [(x, w)]
    step = max(1, PIECE // len(x))
    return [(x[:, at : at + step], None if w is None else w[:, at : at + step]) for at in range(0, x.shape[1], step)]


def _distance(search: Search) -> Tensor:
    """The smallest distance of two different weights of each group, (G, 1); zero where all are one."""
    import torch

    ordered = search.pieces[0][0].sort(1).values
    apart = torch.diff(ordered, dim=1)
    apart = torch.where(apart > (search.high - search.low) * 2.0**-12, apart, torch.inf)  # nearer ones are one level, rounded
    least = apart.amin(1, keepdim=True) if apart.shape[1] else torch.zeros_like(search.low)
    return torch.where(torch.isfinite(least), least, 0.0)


def _on_a_grid(search: Search) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps and bases that would make the weights levels, where the smallest distance between two is one step, two or three."""
    import torch

    least, width, form = _distance(search), search.high - search.low, search.form
    for parts in (1, 2, 3):
        count = torch.round(width * parts / least)
        step = torch.where(count <= form.top - form.low, width / count, torch.nan)
        yield step, search.low - form.low * step
        if form.negative and form.constant is not None:
            yield -step, search.low


def _candidates(search: Search) -> None:
    """Offer every step and origin."""
    form = search.form
    search.offer(search.step(search.scale), search.origin)
    for step, base in _on_a_grid(search):
        search.at(step, base)
    if form.constant is not None:
        _one_scale(search, form.constant)
    else:
        _two_ends(search)
    for _ in range(ROUNDS):
        step, origin = search.fit()
        search.offer(step, origin)


def _one_scale(search: Search, zero: int) -> None:
    import torch

    form = search.form
    below, above = zero - form.low, form.top - zero
    last = max(below, above, 1)
    largest = torch.maximum(-search.low, search.high)
    signs = (1, -1) if form.negative and below != above else (1,)
    low, high = _WIDEST[form.bits]
    factors = [low + (high - low) * i / (_COUNT - 1) for i in range(_COUNT)]
    for sign in signs:
        for level in (last, max(last - 1, 1)):
            search.offer(largest * (sign / level), search.origin)
        for factor in factors:
            search.offer(largest * (sign * factor / last), search.origin)


def _two_ends(search: Search) -> None:
    form, width = search.form, search.high - search.low
    steps = form.top - form.low
    for a in _INWARDS:
        for b in _INWARDS:
            step = width / max(steps + a + b, 0.5)
            search.at(step, search.low + step * (a - form.low))
    low, high = search.low.clamp(max=0), search.high.clamp(min=0)
    for bottom, top in ((search.low, search.high), (low, high)):
        for factor in _TOWARDS:
            step = (top - bottom) * (factor / steps)
            search.at(step, bottom * factor - step * form.low)


# ---------------------------------------------------------------- whole tensors


def improved(
    weights: Tensor, start: QuantizedTensor, storage: Storage, importance: Tensor | None = None, offers: Any = _candidates
) -> QuantizedTensor:
    """``start``, some quantizer's codes of ``weights`` (N, K) in ``storage``, with better codes and parameters where there are any.

    ``importance``: float (K,), weighs the errors of each column; ``UsageError('importance')`` for another shape. ``offers``: what is tried.
    """
    import torch

    form, block, shape = Form.of(storage), start.scales[0].block, (int(weights.shape[0]), int(weights.shape[1]))
    q = importance_of(importance, shape[1])
    x, codes = grouped(weights.to(torch.float32), block), grouped(start.codes, block)
    w = _weights(q, block, shape, x)
    origin, scale = start.offset if form.offset is not None else start.zero_point, _plane(start.scales[0], len(x))
    zero = torch.zeros_like(scale) if origin is None else _plane(origin, len(x))
    step, parts = max(1, CHUNK // max(1, x.shape[1])), []
    for at in range(0, len(x), step):
        some = slice(at, at + step)
        parts.append(_better(form, x[some], None if w is None else w[some], codes[some], scale[some], zero[some], offers))
    if not parts or not x.numel():
        return start
    made, scale, zero = (torch.cat(plane) for plane in zip(*parts, strict=True))
    return _tensor(start, form, ungrouped(made, block, shape), scale, zero)


def _plane(param: Param, count: int) -> Tensor:
    """A parameter's numbers as float32 (groups, 1)."""
    import torch

    assert isinstance(param.values, torch.Tensor)
    return param.values.reshape(-1, 1).to(torch.float32).expand(count, 1)


def _weights(q: Tensor | None, block: Any, shape: tuple[int, int], x: Tensor) -> Tensor | None:
    """The importances (groups, width) over the largest, zeros for what fills groups up; None where all weights are alike."""
    import torch

    ragged = is_ragged(block, shape)
    if q is None and not ragged:
        return None
    flat = torch.ones(shape[1], device=x.device) if q is None else q.to(x.device) / q.max().clamp(min=1e-38)
    return grouped(flat.expand(shape), block, zeros=True)


def _better(
    form: Form, x: Tensor, w: Tensor | None, codes: Tensor, scale: Tensor, origin: Tensor, offers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (G, width), scales and origins (G, 1) of some groups."""
    import torch

    search = Search(form, x, w, scale, origin)
    offers(search)
    made = search.made().to(codes.dtype)
    found = search.origin if form.offset is None else search.origin * search.unit
    won = _exact(form, x, w, made, search.scale, found) < _exact(form, x, w, codes, scale, origin)
    return torch.where(won, made, codes), torch.where(won, search.scale, scale), torch.where(won, found, origin)


def _exact(form: Form, x: Tensor, w: Tensor | None, codes: Tensor, scale: Tensor, origin: Tensor) -> Tensor:
    """The error (G, 1) in float64."""
    step = scale.double() * form.factor if not form.inverse else form.factor / scale.double()
    base, at = origin.double(), 0
    total: Any = 0
    for part, weight in _pieces(x, w):
        value = codes[:, at : at + part.shape[1]].double()
        value = value.mul_(step).add_(base) if form.offset is not None else value.sub_(base).mul_(step)
        value.sub_(part)
        value.mul_(value)
        total, at = total + _sum(value if weight is None else value.mul_(weight)), at + part.shape[1]
    return total  # type: ignore[no-any-return]


def _tensor(start: QuantizedTensor, form: Form, codes: Tensor, scale: Tensor, origin: Tensor) -> QuantizedTensor:
    """``start`` with other numbers in the same form."""

    def stored(param: Param, plane: Tensor) -> Param:
        values: Any = param.values
        return param.with_values(plane.to(values.dtype).reshape(values.shape))

    changes: dict[str, Any] = {"codes": codes, "scales": (stored(start.scales[0], scale), *start.scales[1:])}
    if form.offset is not None and start.offset is not None:
        changes["offset"] = stored(start.offset, origin)
    elif form.constant is None and start.zero_point is not None:
        changes["zero_point"] = stored(start.zero_point, origin)
    return start.replace(**changes)
