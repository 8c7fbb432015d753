"""Scales, zero points and offsets on a tile: numbers of a plane, or codes with numbers of their own."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from qformats.kernels.triton.codes import address_of, at_any, float_of, value_of
from qformats.kernels.triton.rounding import of, pick, size, stepped

__all__ = ["field", "signed"]


@triton.jit
def _place(planes, INDEX: tl.constexpr, INDEX_ROWS: tl.constexpr, S: tl.constexpr, F: tl.constexpr, row, col):
    """The row, as ``line_of`` takes it, and the column of a parameter's number in its plane, for rows and columns of the weight."""
    kind: tl.constexpr = of(F, "kind")
    prow = (0, tl.zeros([1, 1, 1], tl.int32))
    if kind == "flat":
        pcol = ((row[0] + row[1]).to(tl.int64) * of(S, "columns") + col) // of(F, "tk")
    elif kind == "cyclic":
        pcol = ((row[0] + row[1]).to(tl.int64) * of(S, "columns") + col) % of(F, "tk")
    else:
        if of(F, "per"):
            at = row[0] + row[1]
            prow = (0, (at // of(F, "per") // of(F, "t0")) * of(F, "c1") + (at % of(F, "per")) // of(F, "t1"))
        elif of(F, "t1") < of(S, "rows"):
            if of(F, "t1") > 1:
                prow = (0, (row[0] + row[1]) // of(F, "t1"))
            else:
                prow = row
        if of(F, "ck") == 1:
            pcol = tl.zeros([1, 1, 1], tl.int32)
        elif of(F, "grouped"):
            pcol = tl.load(planes[INDEX] + ((row[0] + row[1]) // INDEX_ROWS) * of(S, "columns") + col)
            pcol = tl.minimum(tl.maximum(pcol, 0), of(F, "ck") - 1)
        else:
            pcol = col // of(F, "tk")
    return prow, pcol


@triton.jit
def _plain(planes, F: tl.constexpr, prow, pcol):
    """Numbers stored in a dtype, float32."""
    found = tl.load(address_of(planes[of(F, "plane")], prow, of(F, "ck")) + pcol)
    dtype: tl.constexpr = of(F, "dtype")
    if dtype == "e4m3fn" or dtype == "e4m3fnuz" or dtype == "e5m2" or dtype == "e5m2fnuz" or dtype == "e8m0":
        made = float_of(dtype, found.to(tl.int32))
    else:
        if dtype == "uint8" or dtype == "int8":
            bits = (found.to(tl.int32) + 128) | 0x4B000000
            made = bits.to(tl.float32, bitcast=True) - 8388736.0
        elif dtype == "int16":
            bits = (found.to(tl.int32) + 32768) | 0x4B000000
            made = bits.to(tl.float32, bitcast=True) - 8421376.0
        else:
            made = found.to(tl.float32)
    return made


@triton.jit
def _coded(planes, F: tl.constexpr, prow, pcol):
    """Numbers stored as codes, float32: exact where their digits fit, or each step rounded as their owner does."""
    T: tl.constexpr = of(F, "inner")
    how: tl.constexpr = of(F, "rounded")
    value = value_of(planes, T, at_any(planes, of(F, "plane"), T, prow, pcol), 0.0)
    if of(T, "zero") is not None:
        zrow, zcol = _place(planes, 0, 1, T, of(T, "zero"), prow, pcol)
        value = stepped(value - _plain(planes, of(T, "zero"), zrow, zcol), how)
    for i in tl.static_range(size(of(T, "factors"))):
        frow, fcol = _place(planes, 0, 1, T, pick(of(T, "factors"), i), prow, pcol)
        value = stepped(value * _plain(planes, pick(of(T, "factors"), i), frow, fcol), how)
    if of(T, "offset") is not None:
        orow, ocol = _place(planes, 0, 1, T, of(T, "offset"), prow, pcol)
        value = stepped(value + _plain(planes, of(T, "offset"), orow, ocol), how)
    return value


@triton.jit
def field(
    planes, S: tl.constexpr, F: tl.constexpr, row, first, ROWS: tl.constexpr, UNITS: tl.constexpr, EVERY: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """A parameter of every ``EVERY``th column of a tile whose units start at the columns ``first`` (units, 1, 1): float32, or float64 if
    WIDE, that broadcasts to (units, rows, width / EVERY). ``EVERY`` divides the parameter's run.
    """
    width: tl.constexpr = of(S, "width") // EVERY
    run: tl.constexpr = of(F, "run") // EVERY
    across: tl.constexpr = width // run
    col = tl.minimum(first + of(F, "run") * tl.arange(0, across)[None, None, :], of(S, "columns") - 1)
    prow, pcol = _place(planes, of(S, "index"), of(S, "index_rows"), S, F, row, col)
    if of(F, "inner") is None:
        found = _plain(planes, F, prow, pcol)
    else:
        found = _coded(planes, F, prow, pcol)
    one_column: tl.constexpr = of(F, "kind") == "tile" and of(F, "ck") == 1
    if across > 1 and run > 1 and not one_column:
        wide = tl.broadcast_to(found, [UNITS, ROWS, across])
        found = tl.reshape(tl.broadcast_to(wide[:, :, :, None], [UNITS, ROWS, across, run]), [UNITS, ROWS, width])
    if WIDE:
        found = found.to(tl.float64)
    return found


@triton.jit
def signed(planes, S: tl.constexpr, row, first, value, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """``value`` with the sign flipped where its bit is set."""
    eighths: tl.constexpr = of(S, "width") // 8
    byte = tl.minimum(first // 8 + tl.arange(0, eighths)[None, None, :], of(S, "sign_nbytes") - 1)
    found = tl.load(address_of(planes[of(S, "signs")], row, of(S, "sign_nbytes")) + byte).to(tl.uint32)
    bits = (found[:, :, :, None] << (31 - tl.arange(0, 8)).to(tl.uint32)[None, None, None, :]) & 0x80000000
    flip = tl.reshape(bits, [UNITS, ROWS, of(S, "width")])
    if value.dtype == tl.float64:
        made = (value.to(tl.uint64, bitcast=True) ^ (flip.to(tl.uint64) << 32)).to(tl.float64, bitcast=True)
    else:
        made = (value.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
    return made
