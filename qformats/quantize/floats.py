"""New codes on small floats: FP8, FP6 and FP4 weights under scales of any form, for every storage whose grid is a ``Float``.

Scales are per row, per tensor or per tile of rows and columns (``Storage.scale_block``), of three kinds:

- a plain dtype: amax / max, max being the grid's largest number (448 for e4m3fn), or max / amax where the stored number divides;
- ``e8m0`` codes (``scale_grid``): powers of two. Grids of 8 bits take the smallest one under which nothing saturates, those of 4 and
  6 bits 2^(floor(log2 amax') - floor(log2 max)) with amax' = amax rounded to the grid's own bits of mantissa, ties up;
- ``e4m3fn`` or ``ue4m3`` codes under one float32 factor for the whole tensor: factor amax / (448 max), or its reciprocal where it
  divides, and the scale is amax of the block / (max * factor), rounded to nearest even, never zero.

Sources: ``Fp8Quantize`` in ``integrations/finegrained_fp8.py`` of transformers 5.23 (amax / 448, ``ue8m0`` rounded up),
``calculate_qparams``, ``generate_gparam`` and ``generate_mx_scales`` in ``quantization/utils`` of compressed-tensors 0.20 (the others;
the factor as a divisor), ``NVFP4QTensor`` of NVIDIA ModelOpt (the factor as a multiplier). Weights are then divided by the scale as it is
stored and rounded to nearest even on the grid, saturating; blocks of zeros get the scale 1. Error of a weight that does not saturate:
half the grid's step at w / scale, times scale.

With the search ``best`` other scales are tried for every block: ``FACTORS`` of a plain one, neighbouring codes of the others, and those
that put the largest magnitude on each of the grid's upper levels (``_levels_below``). The first of the least squared errors is taken, each
weight's error weighed by the importance of its column, but only where that is truly lower than the reference's in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import frexp
from typing import TYPE_CHECKING, Any

from qformats.errors import WouldLose
from qformats.quantize.affine import checked
from qformats.quantize.groups import halved
from qformats.quantize.kquants import importance_of
from qformats.scheme import Float, Storage, Tile, whole

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["NEEDY", "SEARCHES_ITSELF", "TYPES", "WEIGHTED", "fits", "quantize", "to_codes"]

TYPES: frozenset[str] = frozenset({"e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e2m1", "e2m3", "e3m2"})  # the grids
WEIGHTED: frozenset[str] = frozenset()
NEEDY: frozenset[str] = frozenset()
SEARCHES_ITSELF = True

CHUNK = 1 << 22  # weights in one go
FACTORS = tuple(1 + step / 32 for step in (-8, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 6))  # of a plain scale, tried after 1
NEIGHBOURS = {"e8m0": (-1, 1), "e4m3fn": (-3, -2, -1, 1, 2), "ue4m3": (-3, -2, -1, 1, 2)}  # of a scale's code, tried after it
_ONE = {"e8m0": 127, "e4m3fn": 0x38, "ue4m3": 0x38}  # the code of 1
_ENDS = {"e8m0": (0, 254), "e4m3fn": (1, 0x7E), "ue4m3": (1, 0x7E)}  # the least and the largest code of a scale


def fits(storage: Storage) -> bool:
    """Whether ``quantize`` is for ``storage``.

    Not for MXFP4 in blocks of a row, of any format (llama.cpp's rounding, ``tables``), nor for NVFP4 with llama.cpp's own scales (ue4m3).
    """
    if not isinstance(storage.grid, Float) or storage.grid.name not in TYPES or storage.flat:
        return False
    if storage.zero_point is not None or storage.offset is not None or storage.sub_scale is not None:
        return False
    small = storage.scale_grid
    if small is not None and (small.name not in NEIGHBOURS or storage.inverse):
        return False
    of_ggml = (storage.type, small) in (("mxfp4", Float("e8m0")), ("nvfp4", Float("ue4m3"))) and storage.factor is None
    return not (of_ggml and storage.rows == 1)


@cache
def _largest(name: str) -> float:
    """The largest finite number of a grid."""
    from qformats import grids

    values = grids.float_values(name)
    return float(values[values.isfinite()].max())


def to_codes(x: Tensor, name: str) -> Tensor:
    """uint8: the bit patterns of float32 ``x`` rounded to nearest even on the grid ``name``, saturating; the sign of zero stays.

    >>> import torch
    >>> to_codes(torch.tensor([0.25, 0.75, -5.0, 100.0]), "e2m1").tolist()
    [0, 2, 14, 7]
    """
    import torch

    top = _largest(name)
    dtype = getattr(torch, f"float8_{name}", None)
    if dtype is not None:
        return x.clamp(-top, top).to(dtype).view(torch.uint8)
    levels, middles = _levels(name)
    size, middles = x.abs().contiguous(), middles.to(x.device)
    below = torch.bucketize(size, middles)  # of a tie the lower level
    tie = middles[below.clamp(max=len(middles) - 1)] == size
    code = below + (tie & (below % 2 == 1)).to(below.dtype)
    return torch.where(torch.signbit(x), code + len(levels), code).to(torch.uint8)


@cache
def _levels(name: str) -> tuple[Tensor, Tensor]:
    """The magnitudes of a grid without special patterns, code for code, and the middles between them, float32."""
    import torch

    from qformats import grids

    values = grids.float_values(name)
    levels = values[: len(values) // 2]
    return levels.to(torch.float32), ((levels[1:] + levels[:-1]) / 2).to(torch.float32)


@cache
def _levels_below(name: str) -> tuple[float, ...]:
    """Levels under the largest: of a grid of 8 bits those of one octave, which then repeat, else all."""
    from qformats import grids

    values = grids.float_values(name)
    top = _largest(name)
    least = top / 2 if _bits(name) == 8 else 0.0
    return tuple(sorted({float(v) for v in values[values.isfinite()] if least < float(v) < top}, reverse=True))[:16]


def _bits(name: str) -> int:
    return 8 if name.startswith(("e4m3", "e5m2")) else 1 + int(name[1]) + int(name[3])


class _Blocks:
    """Some whole tile rows (n, K) of a weight, as float32 tiles (n / rows, rows, K / group, group), padded with zeros."""

    def __init__(self, x: Tensor, tile: tuple[int, int], importance: Tensor | None) -> None:
        import torch

        self.shape = (int(x.shape[0]), int(x.shape[1]))
        self.rows, self.group = tile
        pad = (0, -self.shape[1] % self.group, 0, -self.shape[0] % self.rows)
        self.x = self._tiles(torch.nn.functional.pad(x, pad))
        self.weight = None
        if importance is not None:
            padded = torch.nn.functional.pad(importance.to(x), (0, pad[1]))
            self.weight = padded.reshape(1, 1, -1, self.group)
        self.largest = self.x.abs().amax((1, 3))  # (n / rows, K / group)

    def _tiles(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] // self.rows, self.rows, x.shape[1] // self.group, self.group)

    def codes(self, number: Tensor, name: str, *, times: bool) -> Tensor:
        """uint8 tiles: x times or divided by ``number``, on the grid."""
        return to_codes(self.x * _spread(number) if times else self.x / _spread(number), name)

    def flat(self, codes: Tensor) -> Tensor:
        """Tiles back as (n, K)."""
        n, k = self.shape
        whole_tiles = codes.reshape(codes.shape[0] * self.rows, codes.shape[2] * self.group)
        return whole_tiles[:n, :k].contiguous()

    def error(self, codes: Tensor, scale: Tensor, name: str) -> Tensor:
        """(n / rows, K / group), in the dtype of ``scale``: the weighted squared error of codes under it (what they are multiplied by)."""
        import torch

        from qformats import grids

        values = grids.float_values(name).to(torch.float32).to(codes.device)
        off = self.x.to(scale.dtype) - values[codes.to(torch.int32)].to(scale.dtype) * _spread(scale)
        squared = off.mul_(off)
        return halved(halved(squared if self.weight is None else squared.mul_(self.weight), 3), 1)


def _spread(scale: Tensor) -> Tensor:
    return scale.unsqueeze(1).unsqueeze(3)  # (n / rows, K / group) -> (n / rows, 1, K / group, 1)


def _factor(x: Tensor, storage: Storage) -> Tensor | None:
    """The factor as it is stored, float32 (1, 1), or None where there is none."""
    import torch

    if storage.factor is None:
        return None
    if storage.factor.constant is not None:
        return torch.full((1, 1), storage.factor.constant, dtype=torch.float32, device=x.device)
    assert isinstance(storage.grid, Float)
    top = _largest(storage.grid.name) * (448.0 if storage.scale_grid is not None else 1.0)
    largest = x.abs().amax().reshape(1, 1) if x.numel() else torch.zeros((1, 1), device=x.device)
    made = top / largest if storage.factor.inverse else largest / top
    return torch.where((largest == 0) | (made == 0) | ~torch.isfinite(made), 1.0, made)


def _plain(blocks: _Blocks, storage: Storage, unit: Tensor | float) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales of a plain dtype as they are stored and what codes are then multiplied by (without ``unit``), the reference first."""
    import torch

    assert isinstance(storage.grid, Float)
    dtype = getattr(torch, storage.scale_dtypes[0])
    top, largest = _largest(storage.grid.name), blocks.largest / unit
    ends = torch.finfo(dtype)
    for factor in (1.0, *FACTORS, *(top / level for level in _levels_below(storage.grid.name))):
        value = largest * factor if factor != 1.0 else largest
        value = top / value if storage.inverse else value / top
        if storage.inverse:
            value = torch.where(largest == 0, 1.0, value).clamp(max=ends.max)
        elif factor == 1.0 and value.numel() and float(value.max()) > ends.max:
            found = f"a scale of {float(value.max()):g} exceeds {ends.max:g}, the largest {storage.scale_dtypes[0]}"
            raise WouldLose("f16-overflow", found, hint="write bf16 or f32 instead")
        else:
            value = torch.where(largest == 0, 1.0, value.clamp(max=ends.max))
        stored = value.to(dtype)
        least = 2.0**-24 if dtype == torch.float16 else ends.tiny
        stored = torch.where(stored == 0, torch.full_like(stored, least), stored)
        yield stored, stored.to(torch.float32)


def _small(blocks: _Blocks, storage: Storage, unit: Tensor | float) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes of small-float scales, uint8, and what they stand for, the reference first."""
    import torch

    from qformats import grids

    assert isinstance(storage.grid, Float) and storage.scale_grid is not None
    name = storage.scale_grid.name
    low, high = _ENDS[name]
    largest = blocks.largest / unit
    first = _powers(largest, storage.grid.name) if name == "e8m0" else _eighths(largest / _largest(storage.grid.name))
    values = grids.float_values(name).to(torch.float32).to(largest.device)
    starts = [first + step for step in (0, *NEIGHBOURS[name])]
    if name != "e8m0":  # under powers of two a smaller scale loses nothing
        starts += [_eighths(largest / level) for level in _levels_below(storage.grid.name)]
    for start in starts:
        code = torch.where(blocks.largest == 0, _ONE[name], start.clamp(low, high))
        yield code.to(torch.uint8), values[code]


def _eighths(scale: Tensor) -> Tensor:
    """int32 codes of e4m3fn nearest to positive scales."""
    import torch

    return to_codes(scale.to(torch.float32), "e4m3fn").to(torch.int32)


def _powers(largest: Tensor, name: str) -> Tensor:
    """int32 codes of e8m0 for blocks of these largest magnitudes; see the module's docstring."""
    import torch

    mantissa, exponent = torch.frexp(largest.to(torch.float64))  # mantissa in [0.5, 1)
    top, power = frexp(_largest(name))
    if name.startswith(("e4m3", "e5m2")):
        up = mantissa > top
    else:
        bits = int(name[-1])
        up = mantissa >= 1 - 2.0 ** -(bits + 2)  # rounds to the next power of two
    return exponent.to(torch.int32) - power + up.to(torch.int32) + 127


def _rows(blocks: _Blocks, storage: Storage, factor: Tensor | None, search: str) -> tuple[Tensor, Tensor]:
    """The planes codes (n, K) and stored scales (n / rows, K / group) of some rows."""
    import torch

    assert isinstance(storage.grid, Float)
    name = storage.grid.name
    inverse_factor = storage.factor is not None and storage.factor.inverse
    unit: Tensor | float = 1.0 if factor is None else 1.0 / factor if inverse_factor else factor
    best: tuple[Tensor, ...] | None = None
    given: tuple[Tensor, ...] = ()
    for stored, number in (_plain if storage.scale_grid is None else _small)(blocks, storage, unit):
        if storage.inverse:
            number = number / unit
        elif factor is not None:
            number = number / factor if inverse_factor else number * factor
        codes = blocks.codes(number, name, times=storage.inverse)
        if search == "reference":
            return blocks.flat(codes), stored
        times = 1 / number if storage.inverse else number
        error = blocks.error(codes, times, name)
        if best is None:
            best = given = codes, stored, error, times
            continue
        better = error < best[2]
        best = (torch.where(_spread(better), codes, best[0]), *(torch.where(better, new, old) for new, old in
                zip((stored, error, times), best[1:], strict=True)))  # fmt: skip
    assert best is not None
    won = blocks.error(best[0], best[3].double(), name) < blocks.error(given[0], given[3].double(), name)
    return blocks.flat(torch.where(_spread(won), best[0], given[0])), torch.where(won, best[1], given[1])


def quantize(weights: Tensor, storage: Storage, importance: Tensor | None = None, search: str = "reference") -> QuantizedTensor:
    """float (N, K) -> the canonical tensor of ``storage``: uint8 bit patterns, one scale a tile and the factor where it has one.

    ``weights`` are whole rows of tiles, or the whole tensor where the storage is ``whole``. Raises ``BadFile('not-finite')``.
    """
    import torch

    from qformats.tensor import Param, QuantizedTensor

    x = checked(weights).contiguous()
    n, k = int(x.shape[0]), int(x.shape[1])
    block = storage.scale_block((n, k))
    assert isinstance(block, Tile)
    rows, group = max(1, block.sizes[0]), max(1, block.sizes[1])
    q, factor = importance_of(importance, k), _factor(x, storage)
    step = max(rows, CHUNK // max(k, 1) // rows * rows)
    parts = [_rows(_Blocks(x[at : at + step], (rows, group), q), storage, factor, search) for at in range(0, max(n, 1), step)]
    codes, scales = (torch.cat(plane) for plane in zip(*parts, strict=True))
    counts = (int(scales.shape[0]), int(scales.shape[1]))
    held: Any = scales if storage.scale_grid is None else QuantizedTensor(counts, scales, storage.scale_grid)
    params = [Param(held, block, storage.inverse)]
    if factor is not None and storage.factor is not None:
        params.append(Param(factor, whole((n, k)), storage.factor.inverse))
    return QuantizedTensor((n, k), codes, storage.grid, tuple(params))
