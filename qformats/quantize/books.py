"""Rounding to bitsandbytes' types: NF4 and FP4, plain and double-quantized, and LLM.int8(); bytes equal its own on a CPU.

Source: the ops ``quantize_4bit``, ``quantize_blockwise`` and ``int8_vectorwise_quant`` of bitsandbytes 0.50.2 (backends ``default`` and
``cpu``), ``functional.quantize_4bit`` and ``nn.Int8Params``.

- 4 bits: absmax of each block of the row-major vector, x = clamp(w * (1 / absmax), -1, 1), the code by the number of middles between
  sorted levels that lie below x, so that a tie goes to the lower level. FP4 has two codes of zero: 8 stands right above 0, so small
  positive numbers get it. A last short block divides by its absmax, which is at least 1e-38.
- double: the mean of absmax, rounded as torch's ``mean`` does, is taken off; what is left is scaled by the same rule in blocks of 256
  and, as the CPU kernel does, put in one of 65536 equal places between -1 and 1; its code is the level of ``dynamic`` nearest to the
  place's middle (measured: every one of its thresholds lies half way between two places).
- int8: weights first become float16 (``WouldLose('f16-overflow')``), SCB is the largest magnitude of the row and a code is w * (127 / SCB)
  rounded to nearest even, all in float32. A row of zeros gets codes 0.

With importances (``WEIGHTED``), absmax of a block is instead that of ``FACTORS`` times it under which the sum of importance * error^2 is
smallest, the first of equal ones; 1 is tried first, so no block gets worse than bitsandbytes' own. Double quantization follows after.

With the search ``best``, importances or not, those are tried too that put the largest magnitude on every other level, and the one of least
squares for the codes found; of a double-quantized absmax the codes around its own, under the scales and the offset that the reference
makes of all blocks. What is found is taken where the error in float64 is truly lower than the reference's. LLM.int8() is searched as any
type of integers (``affine_search``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import gcd
from typing import TYPE_CHECKING

from qformats import grids
from qformats.quantize.affine import checked, half
from qformats.quantize.affine_search import improved
from qformats.quantize.groups import halved
from qformats.quantize.kquants import importance_of
from qformats.scheme import Integer, Storage, Table, Tile, whole

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import Param, QuantizedTensor

__all__ = ["FACTORS", "NEEDY", "SEARCHES_ITSELF", "TYPES", "WEIGHTED", "fits", "quantize"]

TYPES = frozenset({"nf4", "fp4", "int8"})
WEIGHTED = frozenset({"nf4", "fp4"})
NEEDY: frozenset[str] = frozenset()
SEARCHES_ITSELF = True
FACTORS = (1.0, *(0.70 + 0.02 * i for i in range(15)), 1.02, 1.04, 1.06, 1.08, 1.10)
_SMALLEST = 1e-38
_CHUNK = 1 << 18  # blocks' weights in one go of the search
_MOVES = (0, *(sign * move for move in range(1, 7) for sign in (1, -1)))  # from a scale's code of ``dynamic`` to others, by size


def fits(storage: Storage) -> bool:
    """Whether ``quantize`` is for ``storage``: codes of ``nf4`` or ``fp4``, or signed bytes under one scale a row and a constant."""
    if isinstance(storage.grid, Table):
        plain = storage.scale_grid in (None, Table("dynamic")) and storage.sub_scale is None
        return storage.grid.name in WEIGHTED and plain and storage.scale_dtypes[0] == "float32"
    eight = storage.grid == Integer(8, signed=True) and storage.group is None and storage.rows == 1
    return eight and storage.factor is not None and storage.factor.constant is not None and storage.type == "int8"


def quantize(weights: Tensor, storage: Storage, importance: Tensor | None = None, search: str = "reference") -> QuantizedTensor:
    """float (N, K) -> the canonical form of ``storage``; see the module. ``BadFile('not-finite')`` for NaN and infinities.

    ``UsageError('importance')`` for importances that are not (K,).
    """
    w = checked(weights)
    q = importance_of(importance, int(w.shape[1]))
    if isinstance(storage.grid, Integer):
        made = _eight_bits(w, storage)
        return improved(w, made, storage, q) if search == "best" else made
    made = _four_bits(w, storage, q)
    return _better(w, made, storage, q) if search == "best" else made


# ---------------------------------------------------------------- 4 bits


@cache
def _rule(name: str) -> tuple[Tensor, Tensor]:
    """The middles between sorted levels and the code of each level, float32 and uint8."""
    import torch

    levels = grids.table_values(name).to(torch.float32)
    order = torch.argsort(levels, stable=True)
    return (levels[order[:-1]] + levels[order[1:]]) / 2, order.to(torch.uint8)


def _codes(x: Tensor, name: str) -> Tensor:
    import torch

    middles, order = _rule(name)
    return order.to(x.device)[torch.bucketize(x, middles.to(x.device))]


@cache
def _places() -> Tensor:
    """The code of ``dynamic`` nearest to each of 65536 places from -1 to 1."""
    import torch

    return _codes((torch.arange(65536, dtype=torch.float64) / 32767.5 - 1).to(torch.float32), "dynamic")


def _placed(x: Tensor) -> Tensor:
    """The codes of ``dynamic`` of numbers from -1 to 1."""
    import torch

    return _places().to(x.device)[((x + 1) * 32767.5 + 0.5).to(torch.int64)]


def _blocks(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The whole blocks (n, size) of a vector, and what is left."""
    full = flat.numel() // size * size
    return flat[:full].reshape(-1, size), flat[full:]


def _four_bits(w: Tensor, storage: Storage, importance: Tensor | None) -> QuantizedTensor:
    import torch

    from qformats.tensor import Param, QuantizedTensor

    assert isinstance(storage.grid, Table) and storage.group is not None
    name, size = storage.grid.name, storage.group
    body, tail = _blocks(w.reshape(-1), size)
    absmax = body.abs().amax(1) if len(body) else w.new_zeros(0)
    scaled = torch.clamp(body * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(1), -1, 1).reshape(-1)
    if tail.numel():
        last = tail.abs().max().clamp(min=_SMALLEST)
        absmax, scaled = torch.cat([absmax, last.reshape(1)]), torch.cat([scaled, torch.clamp(tail / last, -1, 1)])
    codes = _codes(scaled, name)
    if importance is not None:
        absmax, codes = _searched(w, importance, size, name, absmax, codes)
    n, k = int(w.shape[0]), int(w.shape[1])
    run = gcd(k, size)
    index = torch.arange(n * k // run).reshape(n, -1) * run // size  # (N, runs): the block of each run
    if storage.scale_grid is None:
        param = Param(absmax[index].contiguous(), Tile((1, run)))
    else:
        every = int(str(storage.options.get("nested", 256)))
        param = _double(absmax, index, every, gcd(index.shape[1], every) if run == size else 1, run)
    return QuantizedTensor((n, k), codes.reshape(n, k), storage.grid, (param,))


def _double(absmax: Tensor, index: Tensor, every: int, step: int, run: int) -> Param:
    """The scale as codes of ``dynamic``: one scale for each ``every`` of them, one offset."""
    import torch

    from qformats.tensor import Param, QuantizedTensor

    offset = absmax.mean()
    rest = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % every)).reshape(-1, every)
    outer = rest.abs().amax(1)
    inverse = torch.where(outer > 0, 1.0 / outer, 0.0)
    codes = _placed(torch.clamp(rest * inverse.unsqueeze(1), -1, 1)).reshape(-1)
    inner = (int(index.shape[0]), int(index.shape[1]))
    scale = Param(outer[index[:, ::step] // every].contiguous(), Tile((1, step)))
    held = QuantizedTensor(inner, codes[index], Table("dynamic"), (scale,), None, Param(offset.reshape(1, 1), whole(inner)))
    return Param(held, Tile((1, run)), rounded_to=torch.float32)


def _rows(plane: Tensor, size: int) -> Tensor:
    """A vector as blocks (n, size), the last one filled up with zeros."""
    import torch

    return torch.nn.functional.pad(plane.reshape(-1), (0, -plane.numel() % size)).reshape(-1, size)


def _searched(w: Tensor, importance: Tensor, size: int, name: str, absmax: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """absmax and codes of less weighted error where a block has them."""
    import torch

    x, weight, held = _rows(w, size), _rows(importance.to(torch.float32).expand(w.shape), size), _rows(codes, size)
    step, parts = max(1, _CHUNK // size), []
    for at in range(0, len(x), step):
        some = slice(at, at + step)
        found = _Best(name, x[some], weight[some], absmax[some], held[some])
        for factor in FACTORS[1:]:
            found.offer(absmax[some] * factor)
        parts.append((found.scale, found.codes))
    return torch.cat([scale for scale, _ in parts]), torch.cat([code for _, code in parts]).reshape(-1)[: w.numel()]


class _Best:
    """The scale (n,) and codes (n, size) of least error so far of blocks x (n, size)."""

    def __init__(self, name: str, x: Tensor, weight: Tensor | None, scale: Tensor, codes: Tensor) -> None:
        import torch

        self.name, self.x, self.weight, self.scale, self.codes = name, x, weight, scale, codes
        self.levels = grids.table_values(name).to(torch.float32).to(x.device)
        self.least = self.error(scale, codes)

    def error(self, scale: Tensor, found: Tensor) -> Tensor:
        """float64 (n,)."""
        import torch

        apart = (self.levels[found.to(torch.int32)] * scale.unsqueeze(1) - self.x).double()
        apart.mul_(apart)
        return halved(apart if self.weight is None else apart.mul_(self.weight))

    def nearest(self, scale: Tensor) -> Tensor:
        """The codes nearest to x under a scale of either sign."""
        import torch

        size = torch.where(scale.abs() < _SMALLEST, _SMALLEST, scale)
        return _codes(torch.clamp(self.x * (1.0 / size).unsqueeze(1), -1, 1), self.name)

    def offer(self, scale: Tensor) -> Tensor:
        """Take a scale where its error is lower; bool (n,)."""
        import torch

        found = self.nearest(scale)
        now = self.error(scale, found)
        better = now < self.least
        self.scale, self.least = torch.where(better, scale, self.scale), torch.where(better, now, self.least)
        self.codes = torch.where(better.unsqueeze(1), found, self.codes)
        return better


def _better(w: Tensor, start: QuantizedTensor, storage: Storage, importance: Tensor | None) -> QuantizedTensor:
    """``start`` with other scales and codes where they have less error."""
    import torch

    from qformats.tensor import QuantizedTensor as Coded

    assert isinstance(storage.grid, Table) and storage.group is not None
    name, size, shape, param = storage.grid.name, storage.group, start.shape, start.scales[0]
    if not w.numel():
        return start
    x, held = _rows(w, size), _rows(start.codes, size)
    short = bool(w.numel() % size)
    weight = None
    if importance is not None or short:
        q = torch.ones(shape[1], device=w.device) if importance is None else importance.to(w.device)
        weight = _rows(q.expand(shape), size)
    run = gcd(shape[1], size)
    index = torch.arange(w.numel() // run, device=w.device) * run // size  # the block of each run
    first = torch.searchsorted(index, torch.arange(len(x), device=w.device))
    double = isinstance(param.values, Coded)
    near, scales = _neighbours(param) if double else ([], [param.values.reshape(-1)])  # type: ignore[union-attr]
    near, scales = [plane[first] for plane in near], [plane[first] for plane in scales]
    step, parts = max(1, _CHUNK // size), []
    for at in range(0, len(x), step):
        some = slice(at, at + step)
        found = _Best(name, x[some], None if weight is None else weight[some], scales[0][some], held[some])
        place = _nested(found, [plane[some] for plane in near], [plane[some] for plane in scales]) if double else _plain(found)
        parts.append((found.codes, place))
    codes, places = (torch.cat(plane) for plane in zip(*parts, strict=True))
    plane = places[index].reshape(param.values.shape)
    values = param.values.replace(codes=plane) if isinstance(param.values, Coded) else plane
    return start.replace(codes=codes.reshape(-1)[: w.numel()].reshape(shape), scales=(param.with_values(values),))


def _plain(best: _Best) -> Tensor:
    """The best scale of float32."""
    import torch

    largest = best.x.abs().amax(1)
    best.offer(best.scale)
    for factor in FACTORS[1:]:
        best.offer(largest * factor)
    for level in sorted({float(v.abs()) for v in best.levels if 0 < abs(float(v)) < 1}):
        best.offer(largest / level)
    for _ in range(2):
        levels = best.levels[best.codes.to(torch.int64)]
        weighted = levels if best.weight is None else levels * best.weight
        fitted = halved(weighted * best.x) / halved(weighted * levels)
        best.offer(torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, best.scale))
    return best.scale


def _nested(best: _Best, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """The best of some codes of double-quantized scales, each with the scale that it stands for; the reference's come first."""
    import torch

    taken = codes[0]
    for code, scale in zip(codes, scales, strict=True):
        better = best.offer(torch.where(scale > 0, scale, best.scale))
        taken = torch.where(better, code, taken)
    return taken


def _neighbours(param: Param) -> tuple[list[Tensor], list[Tensor]]:
    """Codes around those of a double-quantized scale, by size, and the float32 numbers they stand for, all (runs,)."""
    import torch

    from qformats.real import round_once
    from qformats.tensor import QuantizedTensor

    held = param.values
    assert isinstance(held, QuantizedTensor)
    order = torch.argsort(grids.table_values("dynamic").to(torch.float32), stable=True).to(held.codes.device)
    place = torch.argsort(order)[held.codes.to(torch.int64)]
    codes = [order[(place + move).clamp(0, 255)].to(torch.uint8) for move in _MOVES]
    scales = [round_once(param.with_values(held.replace(codes=code)).real(), torch.float32) for code in codes]
    return [code.reshape(-1) for code in codes], [scale.reshape(-1) for scale in scales]


# ---------------------------------------------------------------- 8 bits


def _eight_bits(w: Tensor, storage: Storage) -> QuantizedTensor:
    import torch

    from qformats.tensor import Param, QuantizedTensor, constant

    assert storage.factor is not None and storage.factor.constant is not None
    shape = (int(w.shape[0]), int(w.shape[1]))
    x = half(w, "weight").to(torch.float32)
    scb = x.abs().amax(1)
    inverse = torch.where(scb > 0, 127.0 / scb, 0.0)
    codes = torch.round(x * inverse.unsqueeze(1)).to(torch.int8)
    factor = constant(storage.factor.constant, shape, torch.float32)
    return QuantizedTensor(shape, codes, storage.grid, (Param(scb.unsqueeze(1), Tile((1, shape[1]))), factor))
