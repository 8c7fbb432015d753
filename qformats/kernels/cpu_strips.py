"""What the loops over strips are compiled for: the widths of a weight's planes, how its codes become numbers, what is added to them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qformats.kernels.cpu_plan import Plan, values_of
from qformats.kernels.lower import Lowered
from qformats.loops import find

__all__ = ["Strips", "strips_of"]


@dataclass(frozen=True, eq=False)
class Strips:
    """``widths`` of at most three planes; ``kind`` of ``qformats.loops.strips.value``, read from the address ``table`` (``kept``).

    ``zeros``, ``offsets``: whether numbers have a zero point that is not yet in the table, and an offset. ``fine``: groups of 16 columns.
    """

    widths: tuple[int, int, int]
    kind: int
    zeros: bool
    offsets: bool
    fine: bool
    table: int
    kept: Tensor | None


_MADE: weakref.WeakKeyDictionary[Plan, Strips] = weakref.WeakKeyDictionary()


def strips_of(plan: Plan, lowered: Lowered) -> Strips:
    """How the codes of a ``plain`` plan are read; made when it is first asked for."""
    found = _MADE.get(plan)
    if found is None:
        found = _MADE[plan] = _strips(plan, lowered)
    return found


def _strips(plan: Plan, lowered: Lowered) -> Strips:
    rows, head = find("rows"), plan.head
    fields = [int(one) for one in head[rows.FIELD : rows.FIELD + int(head[rows.PLANES])]]
    first, second, third = [*fields, 0, 0, 0][:3]
    roles = {int(row[rows.ROLE]) for row in plan.slots}
    kind, zero, table = int(head[rows.KIND]), float(plan.constants[2]), None
    zeros, offsets = 2 in roles or zero != 0, 3 in roles or float(plan.constants[3]) != 0
    if kind == rows.UNSIGNED and sum(fields) <= 4:
        values = values_of(plan) - (0.0 if 2 in roles else zero)
        single = values.to(torch.float32)
        if bool((single.to(torch.float64) == values).all()):  # the zero point that all share is taken off in the table
            kind, zeros, table = rows.SIXTEEN, 2 in roles, torch.nn.functional.pad(single, (0, 16 - len(single)))
    elif kind == rows.MANY and (table := _runs(values_of(plan), lowered.planes["codes0"])) is not None:
        kind = find("strips").RUNS
    address = int(head[rows.TABLE]) if table is None else table.data_ptr()
    return Strips((first, second, third), kind, zeros, offsets, plan.group == 16 and int(head[rows.GROUPS]) > 1, address, table)


def _runs(values: Tensor, codes: Tensor) -> Tensor | None:
    """Starts and steps, float32 (64,), of 256 numbers whose runs of eight are evenly spaced but for NaN, which no code may name."""
    if len(values) != 256:
        return None
    runs = values.to(torch.float32).view(32, 8)
    start, step = runs[:, 0], runs[:, 1] - runs[:, 0]
    line = start[:, None] + step[:, None] * torch.arange(8, dtype=torch.float32)
    lost = (line.to(torch.float64) != values.view(32, 8)).flatten().nonzero().flatten().tolist()
    if len(lost) > 2 or not bool(values[lost].isnan().all()):
        return None
    plane = codes.view(torch.uint8).numpy()
    if lost and find("strips").any_of(plane, np.uint8(lost[0]), np.uint8(lost[-1])):
        return None
    return torch.cat([start, step]).contiguous()
