"""What a plan can say of a tensor before its codes are read: the worst that its header allows, and ranges read only when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from converters.jobs import Job
from converters.sources import Slab, read_rows
from qformats.checkpoint import Checkpoint
from qformats.reencode import Hint
from qformats.rewrite import Refused, block_range, whole_codes
from qformats.scheme import Float, Grid, Integer, Learned, ParamSpec, Scheme, Storage

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = [
    "Ranges",
    "cannot_overflow",
    "check_rows",
    "float32_exact",
    "float_scheme",
    "fractional",
    "hint_rows",
    "pessimist",
    "row_count",
]


class Ranges:
    """Smallest and largest codes of runs, read from the file only when a rule asks."""

    def __init__(self, job: Job, slab: Slab, checkpoint: Checkpoint, start: int, stop: int) -> None:
        self._args = (job, slab, checkpoint, start, stop)
        self._tensor: QuantizedTensor | None = None
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def codes(self) -> Tensor:
        """The codes as they are stored (n, K)."""
        value: QuantizedTensor = read_rows(*self._args)  # type: ignore[assignment]
        return value.codes

    def __call__(self, width: int) -> tuple[Tensor, Tensor]:
        if self._tensor is None:
            value = read_rows(*self._args)
            self._tensor = whole_codes(value)  # type: ignore[arg-type]
        if width not in self._known:
            assert self._tensor is not None
            self._known[width] = block_range(self._tensor, width)
        return self._known[width]


def cannot_overflow(t: QuantizedTensor) -> bool:
    """Whether scale x (any integer a relabelling may use) stays below the largest fp16, and the form is plain."""
    import torch

    if len(t.scales) != 1 or not isinstance(t.scales[0].values, torch.Tensor) or t.scales[0].values.dtype != torch.float16:
        return False
    zero = t.zero_point
    if t.offset is not None or (zero is not None and (not isinstance(zero.values, torch.Tensor) or zero.values.dtype.is_floating_point)):
        return False
    return bool((t.scales[0].values.to(torch.float32).abs() <= 65504 / 512).all())


def hint_rows(hint: Hint | None, start: int, stop: int) -> Hint | None:
    if hint is None or hint.zero_point is None or len(hint.zero_point) == 1:
        return hint
    return Hint(hint.zero_point[start:stop], hint.positive)


def float32_exact(scheme: Scheme) -> bool:
    """Whether scale x (code − zero point) always fits 24 significant bits and nothing is added."""
    bits = {"float16": 11, "bfloat16": 8, "float32": 24, "int8": 8, "uint8": 8, "int16": 16}
    zero = scheme.zero_point
    total = _grid_bits(scheme.grid) + 1
    if zero is not None and fractional(zero) and zero.constant is None:
        return False  # a fraction: the difference has as many bits as it likes
    for scale in scheme.scales:
        if scale.inverse and not _power_of_two(scale.constant):
            return False
        spec: ParamSpec | None = scale
        while spec is not None and spec.nested is not None:
            total += getattr(spec.nested.grid, "bits", 8)
            spec = next(iter(spec.nested.scales), None)
        if spec is not None and not _power_of_two(spec.constant):
            total += bits.get(spec.dtype, 24)
    return scheme.offset is None and total <= 24


def _grid_bits(grid: Grid) -> int:
    """Significant bits of a code's value: those of an integer, of a small float, of the books' entries in float32."""
    if isinstance(grid, Integer):
        return grid.bits
    if isinstance(grid, Float):
        return 4  # e4m3 has the most
    return 24 if isinstance(grid, Learned) or grid.name in _FINE_BOOKS else 8


_FINE_BOOKS = ("nf4", "fp4", "dynamic")


def _power_of_two(value: float | None) -> bool:
    from math import frexp

    return value is not None and abs(frexp(value)[0]) == 0.5


def row_count(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape[:-1]) if len(shape) > 1 else 1


def check_rows(shape: tuple[int, ...], storage: Storage) -> None:
    """``Refused`` where the whole weight has a number of rows that the storage cannot have: ranges of rows do not tell."""
    rows = shape[-2] if len(shape) > 1 else 1
    if rows % storage.n_multiple:
        raise Refused(f"{rows} rows are not a multiple of {storage.n_multiple}")


def float_scheme(shape: tuple[int, ...]) -> Scheme:
    return Scheme(shape, Integer(16, signed=True))


def fractional(zero: ParamSpec) -> bool:
    """Whether a zero point may be other than an integer."""
    return zero.nested is not None or zero.dtype.startswith(("float", "bfloat"))


def pessimist(scheme: Scheme, ordered: bool) -> QuantizedTensor:
    """A row for every zero point the grid can hold, each with the widest code range in every group and no two groups' scales alike."""
    import torch

    from qformats.scheme import Tile
    from qformats.tensor import Param, QuantizedTensor, constant

    if not isinstance(scheme.grid, Integer) or any(not isinstance(s.block, Tile) or s.nested for s in scheme.scales):
        raise Refused("the header does not tell")
    if ordered:
        raise Refused("the config speaks of act-order")
    k, group = scheme.shape[-1], scheme.group_size or scheme.shape[-1]
    known = None if scheme.zero_point is None else scheme.zero_point.constant
    rows = 1 if scheme.zero_point is None or known is not None else scheme.grid.highest + 2
    shape = (rows, k)
    codes = torch.full(shape, scheme.grid.highest, dtype=torch.int8 if scheme.grid.signed else torch.uint8)
    codes[:, ::2] = scheme.grid.lowest
    counts = (rows, -(-k // group))
    zero = None
    if scheme.zero_point is not None:
        plane = torch.arange(rows, dtype=torch.int16).unsqueeze(1).expand(counts).contiguous()
        if known is None and fractional(scheme.zero_point) and scheme.zero_point.nested is None:
            plane = (plane + 1 / 3).to(getattr(torch, scheme.zero_point.dtype))  # all bits used, so that no shift of it is exact
        zero = constant(int(known), shape) if known is not None else Param(plane, Tile((1, group)))
    dtype = getattr(torch, scheme.scales[0].dtype)
    different = 1 + (torch.arange(counts[1]) * 37 % 128 * 8 + 1) / 1024  # all bits used, no small multiples of one number
    scale = Param(different.to(dtype).expand(counts).contiguous(), Tile((1, group)))
    offset = None if scheme.offset is None else Param(torch.full(counts, 0.333, dtype=dtype), Tile((1, group)))
    return QuantizedTensor(shape, codes, scheme.grid, (scale,), zero, offset)


