"""Weights out of planes, inside a kernel: one source for all kinds, compiled for a ``Spec`` (``qformats.kernels.triton.spec``).

A tile is (units, rows, width): ``width`` = 16 codes of v columns are a phase of a unit, so that a vector of 16 bytes in a plane gives the
codes of one phase. Columns past the end are read as the last: their products meet zeros, or are not stored.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment, var-annotated"
# ruff: noqa: RUF005, SIM300 (of Python, kernels know little)
from __future__ import annotations

import triton
import triton.language as tl

from qformats.kernels.triton.codes import grid_values
from qformats.kernels.triton.parameters import field, signed
from qformats.kernels.triton.rounding import odd_product, odd_quotient, odd_single, odd_sum, of, pick, rounded, size

__all__ = ["parameters", "tile"]


@triton.jit
def parameters(
    planes, S: tl.constexpr, rows, units, PHASE: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, EVERY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The factors, then the zero point, the divisor and the offset if there are such, of ``span`` phases: see ``field``."""
    row = (rows[0], rows[1][None, :, None])
    first = units[:, None, None] * of(S, "unit") + PHASE * of(S, "width")
    made = ()
    for i in tl.static_range(size(of(S, "factors"))):
        made = made + (field(planes, S, pick(of(S, "factors"), i), row, first, ROWS, UNITS, EVERY, WIDE),)
    if of(S, "zero") is not None:
        made = made + (field(planes, S, of(S, "zero"), row, first, ROWS, UNITS, 1 if of(S, "whole_zero") else EVERY, WIDE),)
    if of(S, "divisor") is not None:
        made = made + (field(planes, S, of(S, "divisor"), row, first, ROWS, UNITS, EVERY, WIDE),)
    if of(S, "offset") is not None:
        made = made + (field(planes, S, of(S, "offset"), row, first, ROWS, UNITS, EVERY, WIDE),)
    return made


@triton.jit
def tile(
    planes, S: tl.constexpr, rows, units, params, PHASE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Weights (UNITS, ROWS, width) of one phase: the exact value rounded once to DTYPE (see ``rounded``).

    ``rows``, a scalar int64 and (ROWS,) more, are rows of the weight, ``units`` (UNITS,) int32 may lie past the end. ``params``:
    ``parameters`` of every column, WIDE as S is.
    """
    row = (rows[0], rows[1][None, :, None])
    unit = units[:, None, None]
    first = unit * of(S, "unit") + PHASE * of(S, "width")
    wide: tl.constexpr = of(S, "wide")
    care: tl.constexpr = wide or (DTYPE != tl.float32 and not of(S, "exact"))
    last: tl.constexpr = size(of(S, "factors")) - 1
    at: tl.constexpr = of(S, "places")
    if of(S, "zero") is not None and of(S, "whole_zero"):
        value = grid_values(planes, S, row, unit, params[pick(at, 0)].to(tl.float32), PHASE, ROWS, UNITS, wide)
    else:
        value = grid_values(planes, S, row, unit, 0.0, PHASE, ROWS, UNITS, wide)
    if of(S, "lift") != 1.0:
        value = value * of(S, "lift")
    if of(S, "zero") is not None and not of(S, "fold") and not of(S, "whole_zero"):
        value -= params[pick(at, 0)]
    if of(S, "signs") >= 0:
        value = signed(planes, S, row, first, value, ROWS, UNITS)
    for i in tl.static_range(last + 1):
        if care and i == last and of(S, "ends_in_product"):
            value = odd_product(value, params[i])
        else:
            value = value * params[i]
    if of(S, "divisor") is not None:
        if care:
            value = odd_quotient(value, params[pick(at, 1)])
        elif wide:
            value = value / params[pick(at, 1)]
        else:
            value = tl.div_rn(value, tl.broadcast_to(params[pick(at, 1)], value.shape))
    if of(S, "offset") is not None:
        value = odd_sum(value, params[pick(at, 2)]) if care else value + params[pick(at, 2)]
    elif of(S, "fold"):
        added = -(params[pick(at, 0)] * params[0])
        value = odd_sum(value, added) if care else value + added
    if wide:
        value = value.to(tl.float32) if DTYPE == tl.float32 else odd_single(value)
    return rounded(value, DTYPE)
