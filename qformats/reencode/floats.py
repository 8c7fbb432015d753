"""Codes of one small float as codes of another: the same numbers, or the same times a power of two that their scale takes back.

e4m3fnuz has the bit patterns of e4m3fn for half their values, one zero, and NaN at 0x80 (Noune et al., arXiv 2206.02915). Every number of
e4m3fn is one of e4m3fnuz under a doubled scale. The way back halves the scale where no weight of the group is plus or minus 240, which
would be 480, and keeps it where none is an odd multiple of 2^-10; a group that has both is in neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import copysign, isnan

import torch
from torch import Tensor

from qformats import grids
from qformats.rewrite import Refused, looked_up
from qformats.scheme import Float, Storage, Tile
from qformats.tensor import Param, QuantizedTensor, constant

__all__ = ["Spelling", "spelled", "spelling"]


@dataclass(frozen=True, slots=True)
class Spelling:
    """The new code of each byte, uint8 (1 or 2, 256); ``choice``, uint8 (…, K / width): which of the two runs of ``width`` columns have."""

    tables: Tensor
    choice: Tensor | None
    width: int
    reason: str


@cache
def _table(source: str, target: str, power: int) -> tuple[Tensor, Tensor]:
    """What each code's number times 2^power is in ``target``, uint8 (256,), and whether it is there, bool (256,); NaN is NaN."""
    known: dict[tuple[float, float], int] = {}
    for code, value in enumerate(grids.float_values(target).tolist()):
        known.setdefault(_key(value), code)
    table, there = torch.zeros(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.bool)
    for code, value in enumerate(grids.float_values(source).tolist()):
        key = _key(value * 2.0**power)
        found = known.get(key, known.get((key[0], 1.0)) if key[0] == 0 or isnan(value) else None)
        if found is not None:
            table[code], there[code] = found, True
    return table, there


def _key(value: float) -> tuple[float, float]:
    """A number with the sign of a zero; all NaN are one."""
    return (float("inf"), 0.0) if isnan(value) else (value, copysign(1.0, value))


def spelling(t: QuantizedTensor, storage: Storage, codes: Callable[[], Tensor] | None) -> tuple[QuantizedTensor, Spelling]:
    """``t`` as a tensor of the storage's small float, codes aside, and how they are spelled; ``codes()``: its own where ``t`` has none.

    ``Refused`` where a number is not there, whatever of the two the scale does.
    """
    assert isinstance(t.grid, Float) and isinstance(storage.grid, Float)
    powers = _powers(t.grid.name, storage)
    tables = [_table(t.grid.name, storage.grid.name, power) for power in powers]
    values = grids.float_values(t.grid.name)
    for power, (table, there) in zip(powers, tables, strict=True):
        if bool(there[: len(values)].all()):
            reason = f"every number of {t.grid.name}{_times(power)} is one of {storage.grid.name}"
            return _scaled(t, storage, constant(2.0**-power, t.shape, torch.float32) if power else None), Spelling(
                table.unsqueeze(0), None, t.shape[-1], reason)  # fmt: skip
    return _chosen(t, storage, powers, tables, t.codes if codes is None else codes())


def _powers(source: str, storage: Storage) -> list[int]:
    """Powers of two to try in turn: that of the same bit patterns, where each run has a scale of its own to take it, and none."""
    assert isinstance(storage.grid, Float)
    same = grids.same_patterns(source, storage.grid.name)
    free = storage.rows == 1 and storage.scale_grid is None and storage.sub_scale is None and not storage.flat and not storage.cyclic
    total = same is not None and bool(_table(source, storage.grid.name, same)[1].all())
    return [same, 0] if same and (total or free) and storage.scale_grid is None else [0]


def _times(power: int) -> str:
    return {-1: " halved", 0: "", 1: " doubled"}.get(power, f" times 2^{power}")


def _scaled(t: QuantizedTensor, storage: Storage, factor: Param | None) -> QuantizedTensor:
    return t.replace(grid=storage.grid, scales=t.scales if factor is None else (*t.scales, factor))


def _chosen(
    t: QuantizedTensor, storage: Storage, powers: list[int], tables: list[tuple[Tensor, Tensor]], codes: Tensor
) -> tuple[QuantizedTensor, Spelling]:
    """The first power for each group of columns that has all its numbers."""
    assert isinstance(t.grid, Float) and isinstance(storage.grid, Float)
    k = t.shape[-1]
    width = min(storage.group or k, k)
    if k % width:
        raise Refused(f"{k} columns are no whole groups of {width}")
    fits = torch.stack([_look(codes, there.to(torch.uint8)).unflatten(-1, (-1, width)).amin(-1) for _, there in tables])
    bad = int((fits.amax(0) == 0).sum())
    if bad:
        ways = " nor".join(_times(power) or " as they are" for power in powers)
        what = f"{bad} of {fits[0].numel()} groups hold numbers of {t.grid.name}"
        raise Refused(f"{what} that are none of {storage.grid.name},{' neither' if len(powers) > 1 else ''}{ways}")
    choice = fits.argmax(0).to(torch.uint8)  # the first that fits
    counts = torch.bincount(choice.reshape(-1).to(torch.int64), minlength=len(powers)).tolist()
    said = [f"{count} of {choice.numel()} groups{_times(p) or ' as they are'}" for p, count in zip(powers, counts, strict=True) if count]
    reason = f"all numbers are {storage.grid.name} numbers: {', '.join(said)}"
    plane = torch.tensor([2.0**-power for power in powers], dtype=torch.float32)[choice.to(torch.int64)]
    factor = None if powers == [0] else Param(plane, Tile((*(1 for _ in t.shape[:-1]), width)))
    return _scaled(t, storage, factor), Spelling(torch.stack([table for table, _ in tables]), choice, width, reason)


def _look(codes: Tensor, table: Tensor) -> Tensor:
    """``table[codes]``, uint8."""
    by_loop = looked_up(codes, table.view(torch.int8))
    return table[codes.contiguous().view(torch.uint8).to(torch.int64)] if by_loop is None else by_loop.view(torch.uint8)


def spelled(codes: Tensor, how: Spelling) -> Tensor:
    """``codes`` (…, K) in the new spelling."""
    first = _look(codes, how.tables[0])
    if how.choice is None or len(how.tables) == 1:
        return first
    other = _look(codes, how.tables[1])
    turned = how.choice.unsqueeze(-1) != 0
    return torch.where(turned, other.unflatten(-1, (-1, how.width)), first.unflatten(-1, (-1, how.width))).flatten(-2)
