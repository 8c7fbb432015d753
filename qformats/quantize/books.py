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
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import TYPE_CHECKING

from qformats import grids
from qformats.errors import UsageError
from qformats.quantize.affine import checked, half
from qformats.scheme import Integer, Storage, Table, Tile, whole

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import Param, QuantizedTensor

__all__ = ["FACTORS", "NEEDY", "TYPES", "WEIGHTED", "fits", "quantize"]

TYPES = frozenset({"nf4", "fp4", "int8"})
WEIGHTED = frozenset({"nf4", "fp4"})
NEEDY: frozenset[str] = frozenset()
FACTORS = (1.0, *(0.70 + 0.02 * i for i in range(15)), 1.02, 1.04, 1.06, 1.08, 1.10)
_SMALLEST = 1e-38
_CHUNK = 1 << 18  # blocks' weights in one go of the search


def fits(storage: Storage) -> bool:
    """Whether ``quantize`` is for ``storage``: codes of ``nf4`` or ``fp4``, or signed bytes under one scale a row and a constant."""
    if isinstance(storage.grid, Table):
        plain = storage.scale_grid in (None, Table("dynamic")) and storage.sub_scale is None
        return storage.grid.name in WEIGHTED and plain and storage.scale_dtypes[0] == "float32"
    eight = storage.grid == Integer(8, signed=True) and storage.group is None and storage.rows == 1
    return eight and storage.factor is not None and storage.factor.constant is not None and storage.type == "int8"


def quantize(weights: Tensor, storage: Storage, importance: Tensor | None = None) -> QuantizedTensor:
    """float (N, K) -> the canonical form of ``storage``; see the module. ``BadFile('not-finite')`` for NaN and infinities.

    ``UsageError('importance')`` for importances that are not (K,).
    """
    w = checked(weights)
    if isinstance(storage.grid, Integer):
        return _eight_bits(w, storage)
    if importance is not None and tuple(importance.shape) != (w.shape[1],):
        raise UsageError("importance", f"importances have shape {tuple(importance.shape)}, expected {(w.shape[1],)}")
    return _four_bits(w, storage, importance)


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


def _searched(w: Tensor, importance: Tensor, size: int, name: str, absmax: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """absmax and codes of less weighted error where a block has them."""
    import torch

    flat, heavy = w.reshape(-1), importance.to(torch.float32).expand(w.shape).reshape(-1)
    short = -flat.numel() % size
    x = torch.nn.functional.pad(flat, (0, short)).reshape(-1, size)
    weight = torch.nn.functional.pad(heavy, (0, short)).reshape(-1, size)
    held = torch.nn.functional.pad(codes, (0, short)).reshape(-1, size)
    parts = [
        _best_of(x[at : at + step], weight[at : at + step], absmax[at : at + step], held[at : at + step], name)
        for step in (max(1, _CHUNK // size),)
        for at in range(0, len(x), step)
    ]
    return torch.cat([scale for scale, _ in parts]), torch.cat([code for _, code in parts]).reshape(-1)[: flat.numel()]


def _best_of(x: Tensor, weight: Tensor, absmax: Tensor, codes: Tensor, name: str) -> tuple[Tensor, Tensor]:
    import torch

    levels = grids.table_values(name).to(torch.float32).to(x.device)

    def error(scale: Tensor, found: Tensor) -> Tensor:
        apart = levels[found.to(torch.int64)] * scale.unsqueeze(1) - x
        return (weight * apart * apart).to(torch.float64).sum(1)

    best_scale, best_codes, least = absmax, codes, error(absmax, codes)
    for factor in FACTORS[1:]:
        scale = absmax * factor
        found = _codes(torch.clamp(x * (1.0 / scale.clamp(min=_SMALLEST)).unsqueeze(1), -1, 1), name)
        now = error(scale, found)
        better = now < least
        best_scale, least = torch.where(better, scale, best_scale), torch.where(better, now, least)
        best_codes = torch.where(better.unsqueeze(1), found, best_codes)
    return best_scale, best_codes


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
