"""Values of tables, small floats, half-integer zero points and sign planes as plain integers times one step."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qformats import grids
from qformats.errors import BadFile
from qformats.loops import find
from qformats.rewrite.codes import block_range
from qformats.rewrite.forms import Refused
from qformats.scheme import Float, Grid, Integer, Learned, Table
from qformats.tensor import QuantizedTensor, constant

__all__ = [
    "code_ends", "code_table", "common_divisor", "common_step", "common_step_definition", "is_whole", "looked_up", "whole_codes",
    "whole_range",
]  # fmt: skip

_MOST_ZEROS = 64  # different fractional zero points that are looked at for a common step
_WIDEST = 62  # bits of an int64 that the numbers of one group may spread over


def whole_codes(t: QuantizedTensor) -> QuantizedTensor:
    """The same weights with signed integers of at most 8 bits for codes, an integer zero point or none, and no sign plane.

    Codes of a table or a small float become their values in units of the largest step that divides them all, which is one more
    (constant) scale; signs and fractional zero points go into the codes. Integers around integers come back as they are. Blank codes
    (of stride zero) stay blank. Refuses values that have no such step: a learned codebook, NF4, eight-bit floats.
    """
    if is_whole(t):
        return t
    book = _book(t)
    zeros = _zeros(t)
    step = _step_of_grid(t.grid) if t.zero_point is None else _step(torch.cat([book[torch.isfinite(book)].reshape(-1), zeros.unique()]))
    if step != step:
        raise Refused(f"the values of {_words(t)} are not integers in any unit")
    bits = _bits(book, zeros, step, t.signs is not None)
    if bits > 8:
        raise Refused(f"the values of {_words(t)} are not evenly spaced, so no codes of 8 bits under one scale stand for them")
    unit = () if step == 1 else (constant(step, t.shape, torch.float32),)
    codes = _blank(t) if all(stride == 0 for stride in t.codes.stride()) else _values(t, book, step)
    return t.replace(codes=codes, grid=Integer(bits, True), scales=(*t.scales, *unit), zero_point=None, signs=None)


def _step(values: Tensor) -> float:
    return float(common_step(values.reshape(1, -1))[0])


@cache
def _step_of_grid(grid: Grid) -> float:
    """The largest number of which all values of a grid are multiples, NaN where there is none."""
    book = _values_of(grid)
    return _step(book[torch.isfinite(book)].reshape(-1))


def code_table(t: QuantizedTensor) -> Tensor | None:
    """What ``whole_codes`` makes of each code there is, int8 (entries,); None where that takes more than the byte, or is refused."""
    loops = find("blocks")
    if loops is None or t.codes.device.type != "cpu" or not t.codes.numel() or t.zero_point is not None or t.signs is not None:
        return None
    if isinstance(t.grid, Integer | Learned) or (isinstance(t.grid, Table) and t.codes.dtype != torch.uint8):
        return None
    table = _table_of_grid(t.grid)
    if table is None or (len(table) < 256 and loops.union(t.codes.contiguous().view(torch.uint8).view(-1).numpy()) >= len(table)):
        return None
    return table


def code_ends(t: QuantizedTensor) -> tuple[int, int] | None:
    """The smallest and largest of the integers that ``whole_codes`` makes of the codes of a grid; None where that takes more than it."""
    if t.zero_point is not None or t.signs is not None or isinstance(t.grid, Integer | Learned):
        return None
    table = _table_of_grid(t.grid)
    return None if table is None else (int(table.min()), int(table.max()))


@cache
def _table_of_grid(grid: Grid) -> Tensor | None:
    """The values of a grid as int8, in units of its step."""
    book = _values_of(grid)
    if book.ndim != 1 or len(book) > 256 or not bool(torch.isfinite(book).all()):
        return None
    step = _step_of_grid(grid)
    fits = step == step and _bits(book, torch.zeros(1, dtype=torch.float64), step, False) <= 8
    return (book / step).to(torch.int8) if fits else None


def whole_range(t: QuantizedTensor, width: int) -> tuple[Tensor, Tensor]:
    """``block_range(whole_codes(t), width)``; without those codes where a table of bytes gives them."""
    k = t.codes.shape[-1]
    table = code_table(t) if k % width == 0 else None
    if table is None:
        return block_range(whole_codes(t), width)
    low, high = (torch.empty((*t.codes.shape[:-1], k // width), dtype=torch.int16) for _ in range(2))
    codes = t.codes.contiguous().view(torch.uint8).view(-1).numpy()
    find("blocks").table_range(codes, table.numpy(), width, low.view(-1).numpy(), high.view(-1).numpy())
    return low, high


def _bits(book: Tensor, zeros: Tensor, step: float, signs: bool) -> int:
    """Bits of the signed integers that (value - zero point) / step and, with signs, its negative can be."""
    finite = book[torch.isfinite(book)]
    low, high = float(finite.min() - zeros.max()) / step, float(finite.max() - zeros.min()) / step
    low, high = (min(low, -high), max(high, -low)) if signs else (low, high)
    return max(int(max(-low, 1) - 1).bit_length(), int(max(high, 0)).bit_length()) + 1


def is_whole(t: QuantizedTensor) -> bool:
    """Whether codes and zero points are plain integers and there is no sign plane."""
    if not isinstance(t.grid, Integer) or t.signs is not None:
        return False
    if t.zero_point is None:
        return True
    values = t.zero_point.values
    if isinstance(values, QuantizedTensor):
        return False
    return not values.dtype.is_floating_point or bool((values == values.round()).all())


def _words(t: QuantizedTensor) -> str:
    if isinstance(t.grid, Learned):
        return "a learned codebook"
    return f"{t.grid.bits}-bit codes around their zero points" if isinstance(t.grid, Integer) else t.grid.name


def _book(t: QuantizedTensor) -> Tensor:
    """What each code stands for, float64 (entries,) or (entries, v_in); integers from the lowest up."""
    return _values_of(t.grid)


def _values_of(grid: Grid) -> Tensor:
    if isinstance(grid, Learned):
        raise Refused("the values of a learned codebook are any numbers")
    if isinstance(grid, Integer):
        return torch.arange(grid.lowest, grid.highest + 1, dtype=torch.float64)
    return grids.float_values(grid.name) if isinstance(grid, Float) else grids.table_values(grid.name)


def _zeros(t: QuantizedTensor) -> Tensor:
    """The zero points in float64, a single 0 where there is none; refuses more of them than a step could hold."""
    if t.zero_point is None:
        return torch.zeros(1, dtype=torch.float64)
    if t.group_index is not None:
        raise Refused("act-order: fractional zero points follow the group index")
    exact = t.zero_point.real()
    if t.zero_point.inverse or (exact.low is not None and bool(exact.low.any())) or not bool(torch.isfinite(exact.high).all()):
        raise Refused("the zero points are not numbers of 53 bits")
    if exact.high.unique().numel() > _MOST_ZEROS:
        raise Refused("the zero points are not integers")
    return exact.high


def _blank(t: QuantizedTensor) -> Tensor:
    return torch.zeros((), dtype=torch.int8).expand(t.shape)


def _values(t: QuantizedTensor, book: Tensor, step: float) -> Tensor:
    """sign * (value - zero point) / step as int8 (…, K)."""
    missing = ~torch.isfinite(book)
    small = (torch.where(missing, 0.0, book) / step).to(torch.int16)
    plain = t.zero_point is None and t.signs is None and not isinstance(t.grid, Integer) and book.ndim == 1
    if plain and (t.codes.dtype == torch.uint8 or isinstance(t.grid, Float)) and not bool(missing.any()):
        found = looked_up(t.codes, small.to(torch.int8))
        if found is not None:
            return found
    index = t.codes.to(torch.int64) - (t.grid.lowest if isinstance(t.grid, Integer) else 0)
    index = torch.where(index < 0, index + 256, index) if isinstance(t.grid, Float) else index
    low, high = (int(v) for v in index.aminmax()) if index.numel() else (0, 0)
    if low < 0 or high >= len(book):
        raise BadFile("codes-range", f"codes run over {low} … {high} but the grid has {len(book)} entries")
    if bool(missing.any()) and bool(missing[index].any()):
        raise Refused("some codes stand for no number")
    n = small[index].reshape(t.shape)
    if t.zero_point is not None:
        spread = t.replace(codes=_blank(t), grid=Integer(8, True), signs=None, scales=(), offset=None).real().high
        n = n + (spread / step).to(torch.int16)
    if t.signs is not None:
        bits = (t.signs.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        n = torch.where(bits.flatten(-2)[..., : t.shape[-1]].bool(), -n, n)
    return n.to(torch.int8)


def looked_up(codes: Tensor, table: Tensor) -> Tensor | None:
    """``table[codes]``, both of bytes, by a compiled loop; None without one, and for codes beyond the table."""
    loops = find("blocks")
    if loops is None or codes.device.type != "cpu" or not codes.numel() or len(table) > 256:
        return None
    held = codes.contiguous().view(torch.uint8)
    if len(table) < 256 and int(held.max()) >= len(table):
        return None
    out = torch.empty(held.shape, dtype=torch.int8)
    loops.translate(held.view(-1).numpy(), table.numpy(), out.view(-1).numpy())
    return out


def common_step(values: Tensor) -> Tensor:
    """For each row of ``values`` (…, n), float64, the largest number of which all n are integer multiples; (…,).

    1 where all are zero; NaN where they spread over more than 62 bits or are not finite.
    """
    loops = find("blocks")
    if loops is None or values.device.type != "cpu" or values.dtype != torch.float64:
        return common_step_definition(values)
    step = torch.empty(values.shape[:-1], dtype=torch.float64)
    loops.common_step(values.reshape(-1, values.shape[-1]).contiguous().numpy(), step.view(-1).numpy())
    return step


def common_step_definition(values: Tensor) -> Tensor:
    """``common_step`` in torch: what the compiled loop must equal."""
    mantissa, exponent = torch.frexp(values)
    integer = (mantissa.nan_to_num() * 2.0**53).to(torch.int64)
    odd = torch.where(integer == 0, 1, integer & -integer)  # the lowest set bit
    low = torch.frexp(odd.to(torch.float64)).exponent.to(torch.int64) - 1 + exponent.to(torch.int64) - 53
    low = torch.where(integer == 0, 1 << 20, low)
    unit = low.amin(-1, keepdim=True)
    shift = torch.where(integer == 0, 0, low - unit)
    bits = torch.frexp((integer // odd).abs().to(torch.float64)).exponent
    wide = ((shift + bits) > _WIDEST).any(-1) | ~torch.isfinite(values).all(-1)
    scaled = torch.where(wide.unsqueeze(-1), 1, (integer // odd) << shift.clamp(max=_WIDEST))
    common = scaled[..., 0].abs()
    for i in range(1, values.shape[-1]):
        common = torch.gcd(common, scaled[..., i])
    none = common == 0
    step = torch.ldexp(torch.where(none, 1, common).to(torch.float64), torch.where(none, 0, unit.squeeze(-1)).to(torch.float64))
    return torch.where(wide, float("nan"), step)


def common_divisor(numbers: Tensor) -> Tensor:
    """The greatest common divisor of each row of ``numbers`` int64 (…, n), 0 where all are; (…,)."""
    loops = find("blocks")
    if loops is None or numbers.device.type != "cpu":
        common = numbers[..., 0].abs()
        for i in range(1, numbers.shape[-1]):
            common = torch.gcd(common, numbers[..., i])
        return common
    divisor = torch.empty(numbers.shape[:-1], dtype=torch.int64)
    loops.common_divisor(numbers.reshape(-1, numbers.shape[-1]).contiguous().numpy(), divisor.view(-1).numpy())
    return divisor
