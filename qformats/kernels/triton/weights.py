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

__all__ = ["EMULATED", "of", "of_units", "parameters", "rounded", "stored", "tile"]

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
def mirrored(number, count):
    """The bits of a number below ``count``, a power of two, in the other direction."""
    return sum((number >> i & 1) * (count >> i + 1) for i in range(count.bit_length() - 1))


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
    if of(S, "bits") <= 8 and BOOK == 0:
        code = _spread(_words(planes, S, row, unit, PHASE, 0), 0, 0, ROWS, UNITS).to(tl.int32, bitcast=True)
    else:
        code = _plane_codes(planes, S, 0, row, unit, PHASE, BOOK, ROWS, UNITS)
        for i in tl.static_range(1, size(of(S, "widths"))):
            code |= _plane_codes(planes, S, i, row, unit, PHASE, BOOK, ROWS, UNITS) << below(of(S, "widths"), i)
    return code


@triton.jit
def _plane_codes(
    planes, S: tl.constexpr, PLANE: tl.constexpr, row, unit,
    PHASE: tl.constexpr, BOOK: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """One plane's part of the codes of a book."""
    narrow: tl.constexpr = lowest(of(S, "widths"))
    bits: tl.constexpr = pick(of(S, "widths"), PLANE)
    each: tl.constexpr = 8 // bits  # phases of a run
    row_nbytes: tl.constexpr = pick(of(S, "row_nbytes"), PLANE)
    start: tl.constexpr = BOOK * (of(S, "columns") // of(S, "v")) * bits // 8
    shift: tl.constexpr = bits * (PHASE % each)
    if start % 16 == 0:
        found = _spread(_plane_words(planes, S, PLANE, row, unit, PHASE, start // 16, 0), 0, 0, ROWS, UNITS).to(tl.int32, bitcast=True)
    else:
        run = unit * (bits // narrow) + PHASE // each
        byte = tl.minimum(run * 16 + start + tl.arange(0, 16)[None, None, :], row_nbytes - 1)
        found = (tl.load(planes[PLANE] + row * row_nbytes + byte).to(tl.int32) >> shift) & ((1 << bits) - 1)
    return found


@triton.jit
def _words(planes, S: tl.constexpr, row, unit, PHASE: tl.constexpr, UP: tl.constexpr):
    """The codes of at most 8 bits of one phase as the bytes of words, (units, rows, 4) uint32, each ``UP`` bits up its byte."""
    code = _plane_words(planes, S, 0, row, unit, PHASE, 0, UP)
    for i in tl.static_range(1, size(of(S, "widths"))):
        code |= _plane_words(planes, S, i, row, unit, PHASE, 0, UP + below(of(S, "widths"), i))
    return code


@triton.jit
def _plane_words(
    planes, S: tl.constexpr, PLANE: tl.constexpr, row, unit, PHASE: tl.constexpr, AFTER: tl.constexpr, UP: tl.constexpr
):  # fmt: skip
    """A plane's field of each of the 16 bytes of runs, ``AFTER`` runs later, ``UP`` bits up its byte: one shift and mask for four."""
    narrow: tl.constexpr = lowest(of(S, "widths"))
    bits: tl.constexpr = pick(of(S, "widths"), PLANE)
    each: tl.constexpr = 8 // bits
    row_nbytes: tl.constexpr = pick(of(S, "row_nbytes"), PLANE)
    down: tl.constexpr = bits * (PHASE % each) - UP
    run = tl.minimum(unit * (bits // narrow) + PHASE // each + AFTER, row_nbytes // 16 - 1)
    line = (planes[PLANE] + row * row_nbytes).to(tl.pointer_type(tl.uint32))
    held = tl.load(line + run * 4 + tl.arange(0, 4)[None, None, :], eviction_policy="evict_first")
    if down > 0:
        held = held >> down
    if down < 0:
        held = held << -down
    if bits < 8:
        held = held & (((1 << bits) - 1 << UP) * 0x01010101)
    return held


@triton.jit
def _spread(words, PLACE: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """A word of each byte of words (units, rows, 4) uint32: it is the ``PLACE``th byte (0 or 3), ``TOP`` the third; (units, rows, 16)."""
    byte = tl.arange(0, 4)[None, None, None, :]
    wide = tl.broadcast_to(words[:, :, :, None], [UNITS, ROWS, 4, 4])
    if EMULATED:
        made = (((wide >> (8 * byte).to(tl.uint32)) & 0xFF) << (8 * PLACE)) | (TOP << 24)
    elif PLACE == 3:
        chosen = tl.broadcast_to(0x0444 + byte * 0x1000, [UNITS, ROWS, 4, 4])
        made = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, $2;", "=r,r,r", [wide, chosen], tl.uint32, True, 1)
    elif TOP == 0x4B:
        chosen = tl.broadcast_to(0x7440 + byte, [UNITS, ROWS, 4, 4])
        made = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0x4B000000, $2;", "=r,r,r", [wide, chosen], tl.uint32, True, 1)
    else:
        chosen = tl.broadcast_to(0x4440 + byte, [UNITS, ROWS, 4, 4])
        made = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, $2;", "=r,r,r", [wide, chosen], tl.uint32, True, 1)
    return tl.reshape(made, [UNITS, ROWS, 16])


@triton.jit
def _special(NAME: tl.constexpr, value):
    """The infinities and NaN of a small float, whose formula gives a finite ``value`` for them."""
    nan = float("nan")
    if NAME == "e4m3fn":
        made = tl.where(tl.abs(value) > 448.0, nan, value)
    elif NAME == "e4m3fnuz" or NAME == "e5m2fnuz":
        made = tl.where(value.to(tl.uint32, bitcast=True) == 0x80000000, nan, value)
    elif NAME == "ue4m3":
        made = tl.where(value > 448.0, 0.0, value)
    elif NAME == "e5m2":
        end = tl.where(tl.abs(value) == 65536.0, value * float("inf"), nan)
        made = tl.where(tl.abs(value) > 57344.0, end, value)
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
        made = _special(NAME, value)
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
        made = tl.load(planes[of(S, "table")] + code.to(tl.uint32, bitcast=True)).to(tl.float32)
    return made


@triton.jit
def _halves(planes, S: tl.constexpr, row, unit, PHASE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Small floats that are the upper byte of a float16 with another bias, which ``lift`` makes good: four at a time, then two."""
    bits: tl.constexpr = of(S, "bits")
    words = _words(planes, S, row, unit, PHASE, 8 - bits)
    if bits < 8:
        low: tl.constexpr = ((1 << bits - 1) - 1) << of(S, "half_up")
        words = (words & 0x80808080) | ((words >> (8 - bits - of(S, "half_up"))) & (low * 0x01010101))
    pair = tl.arange(0, 2)[None, None, None, :]
    wide = tl.broadcast_to(words[:, :, :, None], [UNITS, ROWS, 4, 2])
    if EMULATED:
        byte = (wide >> (16 * pair).to(tl.uint32)) & 0xFFFF
        pairs = ((byte & 0xFF) << 8) | ((byte & 0xFF00) << 16)
    else:
        chosen = tl.broadcast_to(0x1404 + pair * 0x2020, [UNITS, ROWS, 4, 2])
        pairs = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, $2;", "=r,r,r", [wide, chosen], tl.uint32, True, 1)
    return tl.reshape(tl.join(_half(pairs, tl.float16), _half(pairs >> 16, tl.float16)), [UNITS, ROWS, 16])


@triton.jit
def _phase_values(planes, S: tl.constexpr, row, unit, zero, PHASE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """``_value_of`` for the codes of a phase, one column each, (units, rows, 16) float32."""
    if of(S, "kind") == "integer":
        words = _words(planes, S, row, unit, PHASE, 0)
        if of(S, "flip"):
            words = words ^ 0x80808080
        made = _spread(words, 0, 0x4B, ROWS, UNITS).to(tl.float32, bitcast=True) - (zero + (8388608.0 + of(S, "low")))
    elif of(S, "kind") == "float" and of(S, "half_up") >= 0:
        made = _halves(planes, S, row, unit, PHASE, ROWS, UNITS)
    elif of(S, "kind") == "float" and of(S, "name") != "e8m0":
        mask: tl.constexpr = pick(_float_rule(of(S, "name")), 0)
        up: tl.constexpr = pick(_float_rule(of(S, "name")), 1)
        power: tl.constexpr = 2.0 ** pick(_float_rule(of(S, "name")), 2)
        sign: tl.constexpr = pick(_float_rule(of(S, "name")), 3)
        down: tl.constexpr = 32 - of(S, "bits") - up  # from the top of a word to its exponent
        left = _spread(_words(planes, S, row, unit, PHASE, 8 - of(S, "bits")), 3, 0, ROWS, UNITS).to(tl.int32, bitcast=True)
        bits = (left >> down) & ((mask << up) - (0x80000000 if sign else 0))
        made = _special(of(S, "name"), bits.to(tl.float32, bitcast=True) * power)
    else:
        made = _value_of(planes, S, _codes(planes, S, row, unit, PHASE, 0, ROWS, UNITS), zero)
    return made


@triton.jit
def _grid_values(
    planes, S: tl.constexpr, row, unit, zero, PHASE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The values of a phase, (units, rows, width), float32; float64 if WIDE, as are the sums of a learned grid's books."""
    v: tl.constexpr = of(S, "v")
    held = row // of(S, "v_out") if of(S, "v_out") > 1 else row
    if v == 1 and of(S, "books") == 1 and of(S, "v_out") == 1:
        made = _phase_values(planes, S, held, unit, zero, PHASE, ROWS, UNITS)
        if WIDE:
            made = made.to(tl.float64)
    else:
        sums: tl.constexpr = tl.float64 if WIDE or of(S, "books") > 2 else tl.float32
        for book in tl.static_range(of(S, "books")):
            code = _codes(planes, S, held, unit, PHASE, book, ROWS, UNITS)
            if of(S, "kind") == "learned":
                code = tl.minimum(code, of(S, "entries") - 1) + book * of(S, "entries")
                code = code * of(S, "v_out") + (row % of(S, "v_out")).to(tl.int32)
            entry = planes[of(S, "table")] + code[:, :, :, None] * v + tl.arange(0, v)[None, None, None, :]
            found = tl.load(entry).to(sums)
            made = found if book == 0 else made + found
        made = tl.reshape(made if WIDE else made.to(tl.float32), [UNITS, ROWS, 16 * v])
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
def _field(
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
def _signed(planes, S: tl.constexpr, row, first, value, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """``value`` with the sign flipped where its bit is set."""
    eighths: tl.constexpr = of(S, "width") // 8
    byte = tl.minimum(first // 8 + tl.arange(0, eighths)[None, None, :], of(S, "sign_nbytes") - 1)
    found = tl.load(planes[of(S, "signs")] + row * of(S, "sign_nbytes") + byte).to(tl.uint32)
    bits = (found[:, :, :, None] << (31 - tl.arange(0, 8)).to(tl.uint32)[None, None, None, :]) & 0x80000000
    flip = tl.reshape(bits, [UNITS, ROWS, of(S, "width")])
    if value.dtype == tl.float64:
        made = (value.to(tl.uint64, bitcast=True) ^ (flip.to(tl.uint64) << 32)).to(tl.float64, bitcast=True)
    else:
        made = (value.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
    return made


# ---------------------------------------------------------------- weights


@triton.jit
def parameters(
    planes, S: tl.constexpr, rows, units, PHASE: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, EVERY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The factors, then the zero point, the divisor and the offset if there are such, of ``span`` phases: see ``_field``."""
    row = tl.minimum(rows, of(S, "rows") - 1)[None, :, None]
    first = units[:, None, None] * of(S, "unit") + PHASE * of(S, "width")
    made = ()
    for i in tl.static_range(size(of(S, "factors"))):
        made = made + (_field(planes, S, pick(of(S, "factors"), i), row, first, ROWS, UNITS, EVERY, WIDE),)
    if of(S, "zero") is not None:
        made = made + (_field(planes, S, of(S, "zero"), row, first, ROWS, UNITS, 1 if of(S, "whole_zero") else EVERY, WIDE),)
    if of(S, "divisor") is not None:
        made = made + (_field(planes, S, of(S, "divisor"), row, first, ROWS, UNITS, EVERY, WIDE),)
    if of(S, "offset") is not None:
        made = made + (_field(planes, S, of(S, "offset"), row, first, ROWS, UNITS, EVERY, WIDE),)
    return made


@triton.jit
def tile(
    planes, S: tl.constexpr, rows, units, params, PHASE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Weights (UNITS, ROWS, width) of one phase: the exact value rounded once to DTYPE (see ``rounded``).

    ``rows`` (ROWS,) int64 and ``units`` (UNITS,) int32 may lie past the end. ``params``: ``parameters`` of every column, WIDE as S is.
    """
    row = tl.minimum(rows, of(S, "rows") - 1)[None, :, None]
    unit = units[:, None, None]
    first = unit * of(S, "unit") + PHASE * of(S, "width")
    wide: tl.constexpr = of(S, "wide")
    care: tl.constexpr = wide or (DTYPE != tl.float32 and not of(S, "exact"))
    last: tl.constexpr = size(of(S, "factors")) - 1
    at: tl.constexpr = of(S, "places")
    if of(S, "zero") is not None and of(S, "whole_zero"):
        value = _grid_values(planes, S, row, unit, params[pick(at, 0)].to(tl.float32), PHASE, ROWS, UNITS, wide)
    else:
        value = _grid_values(planes, S, row, unit, 0.0, PHASE, ROWS, UNITS, wide)
    if of(S, "lift") != 1.0:
        value = value * of(S, "lift")
    if of(S, "zero") is not None and not of(S, "fold") and not of(S, "whole_zero"):
        value -= params[pick(at, 0)]
    if of(S, "signs") >= 0:
        value = _signed(planes, S, row, first, value, ROWS, UNITS)
    for i in tl.static_range(last + 1):
        if care and i == last and of(S, "ends_in_product"):
            value = _odd_product(value, params[i])
        else:
            value = value * params[i]
    if of(S, "divisor") is not None:
        if care:
            value = _odd_quotient(value, params[pick(at, 1)])
        elif wide:
            value = value / params[pick(at, 1)]
        else:
            value = tl.div_rn(value, tl.broadcast_to(params[pick(at, 1)], value.shape))
    if of(S, "offset") is not None:
        value = _odd_sum(value, params[pick(at, 2)]) if care else value + params[pick(at, 2)]
    elif of(S, "fold"):
        added = -(params[pick(at, 0)] * params[0])
        value = _odd_sum(value, added) if care else value + added
    if wide:
        value = value.to(tl.float32) if DTYPE == tl.float32 else _odd_single(value)
    return rounded(value, DTYPE)


# ---------------------------------------------------------------- sums of products


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
def _half(bits, DTYPE: tl.constexpr):
    """The float32 of a 16-bit number in the low half of a word."""
    if DTYPE == tl.bfloat16:
        made = (bits << 16).to(tl.float32, bitcast=True)
    else:
        made = (bits & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
    return made


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
                made = made + (_half(word, line.dtype.element_ty), _half(word >> 16, line.dtype.element_ty))
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
    row = tl.minimum(rows, of(S, "rows") - 1)[None, :, None]
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
            for m in tl.static_range(MOST):
                totals = totals + (tl.zeros([UNITS, ROWS, lanes], tl.float32), tl.zeros([UNITS, 1, lanes], tl.float32))
        if of(S, "zero") is not None and of(S, "whole_zero"):
            value = _grid_values(planes, S, row, unit, params[pick(at, 0)], phase, ROWS, UNITS, False)
        else:
            value = _grid_values(planes, S, row, unit, middle, phase, ROWS, UNITS, False)
        if of(S, "signs") >= 0:
            value = _signed(planes, S, row, unit * of(S, "unit") + phase * of(S, "width"), value, ROWS, UNITS)
        values = _each(tl.reshape(value, [UNITS, ROWS, lanes, chain]), chain, lanes, ROWS, UNITS)
        more = ()
        for m in tl.static_range(MOST):
            total = totals[2 * m]
            whole = totals[2 * m + 1]
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
