"""Sums of products for a few rows of x: values of codes times x first, their parameters once for all columns under the same ones."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment, var-annotated"
# ruff: noqa: RUF005 (of Python, kernels know little)
from __future__ import annotations

import triton
import triton.language as tl

from qformats.kernels.triton.codes import grid_values, half
from qformats.kernels.triton.parameters import signed
from qformats.kernels.triton.rounding import mirrored, of, pick, size
from qformats.kernels.triton.weights import parameters

__all__ = ["of_units"]


@triton.jit
def _each(found, COUNT: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """The (units, rows, lanes) tensors of (units, rows, lanes, COUNT), a power of two: those of even numbers first, and so of each half."""
    if COUNT == 1:
        made = (tl.reshape(found, [UNITS, ROWS, LANES]),)
    else:
        even, odd = tl.split(tl.reshape(found, [UNITS, ROWS, LANES, COUNT // 2, 2]))
        made = _each(even, COUNT // 2, LANES, ROWS, UNITS) + _each(odd, COUNT // 2, LANES, ROWS, UNITS)
    return made


@triton.jit
def _fused(a, b, c):
    """a * b + c rounded once, in the shape of c."""
    return tl.fma(tl.broadcast_to(a, c.shape), tl.broadcast_to(b, c.shape), c)


@triton.jit
def _columns(line, S: tl.constexpr, unit, PHASE: tl.constexpr, UNITS: tl.constexpr):
    """A row of x at one phase, zero past its end: ``chain`` tensors (units, 1, lanes) float32, neighbouring columns one after the other.

    A thread has the columns of one weight's vector of codes: numbers of 16 bits come as words of two.
    """
    chain: tl.constexpr = of(S, "chain")
    lanes: tl.constexpr = of(S, "width") // chain
    each: tl.constexpr = 2 if line.dtype.element_ty.primitive_bitwidth == 16 and of(S, "columns") % 2 == 0 and chain > 1 else 1
    many: tl.constexpr = chain // each if chain // each < 4 else 4  # of a vector
    first = unit * (of(S, "unit") // each) + PHASE * (of(S, "width") // each)
    first = (first + (chain // each) * tl.arange(0, lanes)[None, None, :])[:, :, :, None]
    made = ()
    for i in tl.static_range(chain // each // many):
        at = first + (i * many + tl.arange(0, many))[None, None, None, :]
        inside = at < of(S, "columns") // each
        if each == 2:
            held = tl.load(line.to(tl.pointer_type(tl.uint32)) + at, mask=inside, other=0, eviction_policy="evict_last")
        else:
            held = tl.load(line + at, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        found = _each(held, many, lanes, 1, UNITS)
        for j in tl.static_range(many):
            if each == 2:
                word = found[mirrored(j, many)]
                made = made + (half(word, line.dtype.element_ty), half(word >> 16, line.dtype.element_ty))
            else:
                made = made + (found[mirrored(j, many)],)
    return made


@triton.jit
def of_units(
    x, count, planes, S: tl.constexpr, rows, units, sums, MOST: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr
):  # fmt: skip
    """``sums``, MOST of (UNITS, ROWS, lanes) float32, each with the products of units and one of the ``count`` rows of x added.

    Columns under the same parameters, ``chain`` neighbours in each of ``span`` phases, are summed as values of codes, then take the
    parameters: no weight is rounded. A code that a float is to be taken off, or that an offset follows, is counted from the middle of its
    range.
    """
    row = (rows[0], rows[1][None, :, None])
    unit = units[:, None, None]
    chain: tl.constexpr = of(S, "chain")
    lanes: tl.constexpr = of(S, "width") // chain
    middle: tl.constexpr = of(S, "middle")
    at: tl.constexpr = of(S, "places")
    for phase in tl.static_range(of(S, "phases")):
        xs = ()
        for m in tl.static_range(MOST):
            xs = xs + _columns(x + tl.minimum(m, count - 1) * of(S, "columns"), S, unit, phase, UNITS)
        if phase % of(S, "span") == 0:
            params = parameters(planes, S, rows, units, phase, ROWS, UNITS, chain, False)
            totals = ()
            for _ in tl.static_range(MOST):
                totals = totals + (tl.zeros([UNITS, ROWS, lanes], tl.float32), tl.zeros([UNITS, 1, lanes], tl.float32))
        if of(S, "zero") is not None and of(S, "whole_zero"):
            value = grid_values(planes, S, row, unit, params[pick(at, 0)], phase, ROWS, UNITS, False)
        else:
            value = grid_values(planes, S, row, unit, middle, phase, ROWS, UNITS, False)
        if of(S, "signs") >= 0:
            value = signed(planes, S, row, unit * of(S, "unit") + phase * of(S, "width"), value, ROWS, UNITS)
        values = _each(tl.reshape(value, [UNITS, ROWS, lanes, chain]), chain, lanes, ROWS, UNITS)
        more = ()
        for m in tl.static_range(MOST):
            total, whole = totals[2 * m], totals[2 * m + 1]
            for i in tl.static_range(chain):
                total = _fused(values[mirrored(i, chain)], xs[m * chain + i], total)
                whole += xs[m * chain + i]
            more = more + (total, whole)
        totals = more
        if (phase + 1) % of(S, "span") == 0:
            sums = _parametrized(S, params, totals, sums, MOST)
    return sums


@triton.jit
def _parametrized(S: tl.constexpr, params, totals, sums, MOST: tl.constexpr):
    """``sums`` with the sums of values times x, and of x alone, under their parameters added."""
    at: tl.constexpr = of(S, "places")
    scale = tl.full([1, 1, 1], 1.0, tl.float32)
    for i in tl.static_range(size(of(S, "factors"))):
        scale = scale * params[i]
    made = ()
    for m in tl.static_range(MOST):
        total = totals[2 * m] * of(S, "lift")
        if of(S, "zero") is not None and not of(S, "whole_zero"):
            total = _fused(of(S, "middle") - params[pick(at, 0)], totals[2 * m + 1], total)
        if of(S, "divisor") is not None:
            total = tl.div_rn(total, tl.broadcast_to(params[pick(at, 1)], total.shape))
        new = _fused(scale, total, sums[m])
        if of(S, "offset") is not None:
            new = _fused(params[pick(at, 2)] + scale * of(S, "middle"), totals[2 * m + 1], new)
        made = made + (new,)
    return made
