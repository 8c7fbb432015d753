"""Weights out of planes, inside a kernel: one source for all kinds, compiled for a ``Spec`` (``qformats.kernels.triton.spec``).

A tile is (units, rows, width): ``width`` = 16 codes of v columns are a phase of a unit, so that a vector of 16 bytes in a plane gives the
codes of one phase by one shift and mask. Rows and columns past the end are read as the last: their products meet zeros, or are not stored.

Under Triton's interpreter bfloat16 arithmetic, its conversion and a fused multiply-add are not what a GPU does (Triton 3.6): there values
are rounded by integer operations, kept in float32, and a product's error is found in float64.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment"
# ruff: noqa: RUF005, SIM300 (of Python, kernels know little)
from __future__ import annotations

import triton
import triton.language as tl

from qformats.kernels.triton.spec import FLOATS

__all__ = ["EMULATED", "of", "rounded", "stored", "tile"]

EMULATED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_FLOATS = tl.constexpr(FLOATS)


@triton.constexpr_function
def of(owner, name):
    """An attribute of a spec or a field."""
    return getattr(owner, name)


@triton.constexpr_function
def pick(items, number):
    return items[number]


@triton.constexpr_function
def size(items):
    return len(items)


@triton.constexpr_function
def lowest(items):
    return min(items)


@triton.constexpr_function
def below(widths, number):
    """Bits of the planes before one."""
    return sum(widths[:number])


@triton.constexpr_function
def _float_rule(name):
    return FLOATS[name]


# ---------------------------------------------------------------- rounding


@triton.jit
def _odd(value, error):
    """``value`` with its last bit set where the exact value is ``error`` away from it, stepped towards it."""
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
    else:
        bits = value.to(tl.int32, bitcast=True)
    inexact = ((error > 0) | (error < 0)) & ((bits & 1) == 0)
    step = tl.where((error > 0) == (value > 0), 1, -1).to(bits.dtype)
    return tl.where(inexact, bits + step, bits).to(value.dtype, bitcast=True)


@triton.jit
def _odd_of(down, up):
    """Of the neighbours around an exact value the one with an odd last bit; the value itself where they are one."""
    if down.dtype == tl.float64:
        bits = down.to(tl.int64, bitcast=True)
    else:
        bits = down.to(tl.int32, bitcast=True)
    return tl.where((bits & 1) == 1, down, up)


@triton.jit
def _odd_product(a, b):
    """a * b rounded to odd."""
    product = a * b
    a = tl.broadcast_to(a, product.shape)
    b = tl.broadcast_to(b, product.shape)
    if EMULATED:
        if product.dtype == tl.float32:
            product = _odd(product, (a.to(tl.float64) * b.to(tl.float64) - product.to(tl.float64)).to(tl.float32))
    elif product.dtype == tl.float64:
        down = tl.inline_asm_elementwise("mul.rm.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, True, 1)
        product = _odd_of(down, tl.inline_asm_elementwise("mul.rp.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, True, 1))
    else:
        down = tl.inline_asm_elementwise("mul.rm.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
        product = _odd_of(down, tl.inline_asm_elementwise("mul.rp.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1))
    return product


@triton.jit
def _odd_sum(a, b):
    """a + b rounded to odd."""
    total = a + b
    a = tl.broadcast_to(a, total.shape)
    b = tl.broadcast_to(b, total.shape)
    if EMULATED:
        back = total - a
        total = _odd(total, (a - (total - back)) + (b - back))
    elif total.dtype == tl.float64:
        down = tl.inline_asm_elementwise("add.rm.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, True, 1)
        total = _odd_of(down, tl.inline_asm_elementwise("add.rp.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, True, 1))
    else:
        down = tl.inline_asm_elementwise("add.rm.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
        total = _odd_of(down, tl.inline_asm_elementwise("add.rp.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1))
    return total


@triton.jit
def _odd_quotient(value, divisor):
    """value / divisor rounded to odd."""
    divisor = tl.broadcast_to(divisor, value.shape)
    if value.dtype == tl.float64:
        made = value / divisor
    else:
        made = tl.div_rn(value, divisor)
    if EMULATED:
        if value.dtype == tl.float64:
            rest = made * 0.0
        else:
            rest = (value.to(tl.float64) - made.to(tl.float64) * divisor.to(tl.float64)).to(tl.float32)
    else:
        rest = tl.fma(-made, divisor, value)
    return _odd(made, tl.where(divisor < 0, -rest, rest))


@triton.jit
def _odd_single(value):
    """A float64 rounded to odd to float32."""
    if EMULATED:
        made = value.to(tl.float32)
        made = _odd(made, (value - made.to(tl.float64)).to(tl.float32))
    else:
        down = tl.inline_asm_elementwise("cvt.rm.f32.f64 $0, $1;", "=f,d", [value], tl.float32, True, 1)
        made = _odd_of(down, tl.inline_asm_elementwise("cvt.rp.f32.f64 $0, $1;", "=f,d", [value], tl.float32, True, 1))
    return made


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """float32 to DTYPE, to nearest even; the interpreter leaves numbers of a half-precision dtype in float32."""
    if DTYPE == tl.float32:
        made = value
    elif EMULATED:
        if DTYPE == tl.bfloat16:
            bits = value.to(tl.uint32, bitcast=True)
            up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            made = tl.where(value == value, up, bits).to(tl.float32, bitcast=True)
        else:
            made = value.to(DTYPE).to(tl.float32)
    else:
        made = value.to(DTYPE)
    return made


@triton.jit
def stored(value, DTYPE: tl.constexpr):
    """What ``rounded`` made as a number of DTYPE, for a store."""
    if EMULATED and DTYPE == tl.bfloat16:
        made = (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        made = value
    return made


@triton.jit
def _stepped(value, ROUNDED: tl.constexpr):
    """A step of a parameter whose owner rounds each to that dtype."""
    if ROUNDED == "float16":
        made = rounded(value, tl.float16).to(tl.float32)
    elif ROUNDED == "bfloat16":
        made = rounded(value, tl.bfloat16).to(tl.float32)
    else:
        made = value
    return made


# ---------------------------------------------------------------- codes and their values


@triton.jit
def _at_any(planes, FIRST: tl.constexpr, S: tl.constexpr, row, col):
    """The codes of a matrix at any rows and columns, int32, in the shape that ``row`` and ``col`` have together."""
    code = _field_at(planes, FIRST, S, 0, row, col)
    for i in tl.static_range(1, size(of(S, "widths"))):
        code |= _field_at(planes, FIRST, S, i, row, col) << below(of(S, "widths"), i)
    return code


@triton.jit
def _field_at(planes, FIRST: tl.constexpr, S: tl.constexpr, PLANE: tl.constexpr, row, col):
    bits: tl.constexpr = pick(of(S, "widths"), PLANE)
    held: tl.constexpr = 128 // bits  # columns of a run
    byte = row * pick(of(S, "row_nbytes"), PLANE) + (col // held) * 16 + col % 16
    found = tl.load(planes[FIRST + PLANE] + byte).to(tl.int32)
    if bits < 8:
        found = (found >> (bits * ((col % held) // 16)).to(tl.int32)) & ((1 << bits) - 1)
    return found


@triton.jit
def _codes(
    planes, S: tl.constexpr, row, unit, PHASE: tl.constexpr, BOOK: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr
):  # fmt: skip
    """The 16 codes of one phase of units, (units, rows, 16) int32; ``row`` (1, rows, 1) int64, ``unit`` (units, 1, 1)."""
    code = _plane_codes(planes, S, 0, row, unit, PHASE, BOOK, ROWS, UNITS)
    for i in tl.static_range(1, size(of(S, "widths"))):
        code |= _plane_codes(planes, S, i, row, unit, PHASE, BOOK, ROWS, UNITS) << below(of(S, "widths"), i)
    return code


@triton.jit
def _plane_codes(
    planes, S: tl.constexpr, PLANE: tl.constexpr, row, unit,
    PHASE: tl.constexpr, BOOK: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """One plane's part of the codes."""
    narrow: tl.constexpr = lowest(of(S, "widths"))
    bits: tl.constexpr = pick(of(S, "widths"), PLANE)
    each: tl.constexpr = 8 // bits  # phases of a run
    row_nbytes: tl.constexpr = pick(of(S, "row_nbytes"), PLANE)
    start: tl.constexpr = BOOK * (of(S, "columns") // of(S, "v")) * bits // 8
    shift: tl.constexpr = bits * (PHASE % each)
    run = unit * (bits // narrow) + PHASE // each
    if start % 16 == 0:
        run = tl.minimum(run + start // 16, row_nbytes // 16 - 1)
        found = _run(planes[PLANE] + row * row_nbytes, run, shift, (1 << bits) - 1, ROWS, UNITS)
    else:
        byte = tl.minimum(run * 16 + start + tl.arange(0, 16)[None, None, :], row_nbytes - 1)
        found = (tl.load(planes[PLANE] + row * row_nbytes + byte).to(tl.int32) >> shift) & ((1 << bits) - 1)
    return found


@triton.jit
def _run(line, run, SHIFT: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """A field of each of the 16 bytes of runs, (units, rows, 16): four words a run, from each word four bytes."""
    word = run * 4 + tl.arange(0, 4)[None, None, :]
    held = tl.load(line.to(tl.pointer_type(tl.int32)) + word)  # (units, rows, 4)
    parts = (held[:, :, :, None] >> (tl.arange(0, 4) * 8 + SHIFT)[None, None, None, :]) & MASK
    return tl.reshape(parts, [UNITS, ROWS, 16])


@triton.jit
def _special(NAME: tl.constexpr, code, value):
    """The bit patterns of a small float that its formula does not give."""
    nan = float("nan")
    if NAME == "e4m3fn":
        made = tl.where((code & 0x7F) == 0x7F, nan, value)
    elif NAME == "e4m3fnuz" or NAME == "e5m2fnuz":
        made = tl.where(code == 0x80, nan, value)
    elif NAME == "ue4m3":
        made = tl.where(code == 0x7F, 0.0, value)
    elif NAME == "e5m2":
        end = (0x7F800000 | ((code & 3) << 21) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
        made = tl.where((code & 0x7C) == 0x7C, end, value)
    else:
        made = value
    return made


@triton.jit
def _float_of(NAME: tl.constexpr, code):
    """The value of a small float's bits, float32."""
    if NAME == "e8m0":
        bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
        made = bits.to(tl.float32, bitcast=True)
    else:
        mask: tl.constexpr = pick(_float_rule(NAME), 0)
        up: tl.constexpr = pick(_float_rule(NAME), 1)
        power: tl.constexpr = 2.0 ** pick(_float_rule(NAME), 2)
        sign: tl.constexpr = pick(_float_rule(NAME), 3)
        value = ((code & mask) << up).to(tl.float32, bitcast=True) * power
        if sign:
            bits = value.to(tl.int32, bitcast=True) | ((code & sign) << pick(_float_rule(NAME), 4))
            value = bits.to(tl.float32, bitcast=True)
        made = _special(NAME, code, value)
    return made


@triton.jit
def _value_of(planes, S: tl.constexpr, code, zero):
    """The values of codes of one column each, less an integer ``zero``, float32.

    An integer goes through the bits of 2^23 + code, which needs no conversion; one subtraction then takes all that is too much.
    """
    if of(S, "kind") == "integer":
        if of(S, "flip"):
            code = code ^ of(S, "flip")
        made = (code | 0x4B000000).to(tl.float32, bitcast=True) - (zero + (8388608.0 + of(S, "low")))
    elif of(S, "kind") == "float":
        made = _float_of(of(S, "name"), code)
    else:
        if of(S, "kind") == "learned":
            code = tl.minimum(code, of(S, "entries") - 1)
        made = tl.load(planes[of(S, "table")] + code).to(tl.float32)
    return made


@triton.jit
def _grid_values(planes, S: tl.constexpr, row, unit, zero, PHASE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """The values of a phase, (units, rows, width), float32; float64 sums of a learned grid's books in a wide spec."""
    v: tl.constexpr = of(S, "v")
    held = row // of(S, "v_out") if of(S, "v_out") > 1 else row
    if v == 1 and of(S, "books") == 1 and of(S, "v_out") == 1:
        made = _value_of(planes, S, _codes(planes, S, held, unit, PHASE, 0, ROWS, UNITS), zero)
        if of(S, "wide"):
            made = made.to(tl.float64)
    else:
        made = tl.zeros([UNITS, ROWS, 16, v], tl.float64 if of(S, "wide") else tl.float32)
        for book in tl.static_range(of(S, "books")):
            code = _codes(planes, S, held, unit, PHASE, book, ROWS, UNITS)
            if of(S, "kind") == "learned":
                code = tl.minimum(code, of(S, "entries") - 1) + book * of(S, "entries")
                code = code * of(S, "v_out") + (row % of(S, "v_out")).to(tl.int32)
            entry = planes[of(S, "table")] + code[:, :, :, None] * v + tl.arange(0, v)[None, None, None, :]
            made += tl.load(entry).to(made.dtype)
        made = tl.reshape(made, [UNITS, ROWS, 16 * v])
    return made


# ---------------------------------------------------------------- parameters


@triton.jit
def _place(planes, INDEX: tl.constexpr, INDEX_ROWS: tl.constexpr, S: tl.constexpr, F: tl.constexpr, row, col):
    """The row and column of a parameter's number in its plane, for rows and columns of the weight."""
    kind: tl.constexpr = of(F, "kind")
    if kind == "flat":
        prow = tl.zeros([1, 1, 1], tl.int64)
        pcol = (row * of(S, "columns") + col) // of(F, "tk")
    elif kind == "cyclic":
        prow = tl.zeros([1, 1, 1], tl.int64)
        pcol = (row * of(S, "columns") + col) % of(F, "tk")
    else:
        if of(F, "per"):
            prow = (row // of(F, "per") // of(F, "t0")) * of(F, "c1") + (row % of(F, "per")) // of(F, "t1")
        elif of(F, "t1") >= of(S, "rows"):
            prow = tl.zeros([1, 1, 1], tl.int64)
        elif of(F, "t1") > 1:
            prow = row // of(F, "t1")
        else:
            prow = row
        if of(F, "ck") == 1:
            pcol = tl.zeros([1, 1, 1], tl.int32)
        elif of(F, "grouped"):
            pcol = tl.load(planes[INDEX] + (row // INDEX_ROWS) * of(S, "columns") + col)
            pcol = tl.minimum(tl.maximum(pcol, 0), of(F, "ck") - 1)
        else:
            pcol = col // of(F, "tk")
    return prow, pcol


@triton.jit
def _plain(planes, F: tl.constexpr, prow, pcol):
    """Numbers stored in a dtype, float32."""
    found = tl.load(planes[of(F, "plane")] + prow * of(F, "ck") + pcol)
    dtype: tl.constexpr = of(F, "dtype")
    if dtype == "e4m3fn" or dtype == "e4m3fnuz" or dtype == "e5m2" or dtype == "e5m2fnuz" or dtype == "e8m0":
        made = _float_of(dtype, found.to(tl.int32))
    else:
        if dtype == "uint8" or dtype == "int8":
            bits = (found.to(tl.int32) + 128) | 0x4B000000
            made = bits.to(tl.float32, bitcast=True) - 8388736.0
        else:
            made = found.to(tl.float32)
    return made


@triton.jit
def _coded(planes, F: tl.constexpr, prow, pcol):
    """Numbers stored as codes, float32: exact where their digits fit, or each step rounded as their owner does."""
    T: tl.constexpr = of(F, "inner")
    how: tl.constexpr = of(F, "rounded")
    value = _value_of(planes, T, _at_any(planes, of(F, "plane"), T, prow, pcol), 0.0)
    if of(T, "zero") is not None:
        zrow, zcol = _place(planes, 0, 1, T, of(T, "zero"), prow, pcol)
        value = _stepped(value - _plain(planes, of(T, "zero"), zrow, zcol), how)
    for i in tl.static_range(size(of(T, "factors"))):
        frow, fcol = _place(planes, 0, 1, T, pick(of(T, "factors"), i), prow, pcol)
        value = _stepped(value * _plain(planes, pick(of(T, "factors"), i), frow, fcol), how)
    if of(T, "offset") is not None:
        orow, ocol = _place(planes, 0, 1, T, of(T, "offset"), prow, pcol)
        value = _stepped(value + _plain(planes, of(T, "offset"), orow, ocol), how)
    return value


@triton.jit
def _field(planes, S: tl.constexpr, F: tl.constexpr, row, first, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """A parameter on a tile whose units start at the columns ``first`` (units, 1, 1): float32 that broadcasts to (units, rows, width)."""
    width: tl.constexpr = of(S, "width")
    run: tl.constexpr = of(F, "run")
    across: tl.constexpr = width // run
    col = tl.minimum(first + run * tl.arange(0, across)[None, None, :], of(S, "columns") - 1)
    prow, pcol = _place(planes, of(S, "index"), of(S, "index_rows"), S, F, row, col)
    if of(F, "inner") is None:
        found = _plain(planes, F, prow, pcol)
    else:
        found = _coded(planes, F, prow, pcol)
    one_column: tl.constexpr = of(F, "kind") == "tile" and of(F, "ck") == 1
    if across > 1 and run > 1 and not one_column:
        wide = tl.broadcast_to(found, [UNITS, ROWS, across])
        found = tl.reshape(tl.broadcast_to(wide[:, :, :, None], [UNITS, ROWS, across, run]), [UNITS, ROWS, width])
    if of(S, "wide"):
        found = found.to(tl.float64)
    return found


@triton.jit
def _signed(planes, S: tl.constexpr, row, first, value, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """``value`` with the sign flipped where its bit is set."""
    eighths: tl.constexpr = of(S, "width") // 8
    byte = tl.minimum(first // 8 + tl.arange(0, eighths)[None, None, :], of(S, "sign_nbytes") - 1)
    found = tl.load(planes[of(S, "signs")] + row * of(S, "sign_nbytes") + byte).to(tl.int32)
    bits = (found[:, :, :, None] >> tl.arange(0, 8)[None, None, None, :]) & 1
    flip = tl.reshape(bits, [UNITS, ROWS, of(S, "width")])
    return tl.where(flip == 1, -value, value)


# ---------------------------------------------------------------- weights


@triton.jit
def tile(
    planes, S: tl.constexpr, rows, units, PHASE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Weights (UNITS, ROWS, width) of one phase: the exact value rounded once to DTYPE (see ``rounded``).

    ``rows`` (ROWS,) int64 and ``units`` (UNITS,) int32 may lie past the end.
    """
    row = tl.minimum(rows, of(S, "rows") - 1)[None, :, None]
    unit = units[:, None, None]
    first = unit * of(S, "unit") + PHASE * of(S, "width")
    care: tl.constexpr = of(S, "wide") or (DTYPE != tl.float32 and not of(S, "exact"))
    last: tl.constexpr = size(of(S, "factors")) - 1
    # parameters before codes: the compiler gives a value the layout of the load that comes last
    factors = ()
    for i in tl.static_range(last + 1):
        factors = factors + (_field(planes, S, pick(of(S, "factors"), i), row, first, ROWS, UNITS),)
    if of(S, "zero") is not None:
        zero = _field(planes, S, of(S, "zero"), row, first, ROWS, UNITS)
    if of(S, "divisor") is not None:
        divisor = _field(planes, S, of(S, "divisor"), row, first, ROWS, UNITS)
    if of(S, "offset") is not None:
        added = _field(planes, S, of(S, "offset"), row, first, ROWS, UNITS)
    elif of(S, "fold"):
        added = -(zero * factors[0])
    if of(S, "zero") is not None and of(S, "whole_zero"):
        value = _grid_values(planes, S, row, unit, zero.to(tl.float32), PHASE, ROWS, UNITS)
    else:
        value = _grid_values(planes, S, row, unit, 0.0, PHASE, ROWS, UNITS)
    if of(S, "zero") is not None and not of(S, "fold") and not of(S, "whole_zero"):
        value -= zero
    if of(S, "signs") >= 0:
        value = _signed(planes, S, row, first, value, ROWS, UNITS)
    for i in tl.static_range(last + 1):
        if care and i == last and of(S, "ends_in_product"):
            value = _odd_product(value, factors[i])
        else:
            value = value * factors[i]
    if of(S, "divisor") is not None:
        if care:
            value = _odd_quotient(value, divisor)
        elif of(S, "wide"):
            value = value / divisor
        else:
            value = tl.div_rn(value, tl.broadcast_to(divisor, value.shape))
    if of(S, "offset") is not None or of(S, "fold"):
        value = _odd_sum(value, added) if care else value + added
    if of(S, "wide"):
        value = value.to(tl.float32) if DTYPE == tl.float32 else _odd_single(value)
    return rounded(value, DTYPE)
