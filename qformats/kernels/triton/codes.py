"""Codes out of planes, and the values they stand for.

Four codes are the bytes of a word: one shift and mask for all of them, then one instruction (``prmt``) for each that puts it under the
exponent of a float32, into an address, or at a word's top. No integer is converted to a float. The interpreter takes shifts instead.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment, var-annotated"
# ruff: noqa: SIM300 (of Python, kernels know little)
from __future__ import annotations

import triton
import triton.language as tl

from qformats.kernels.triton.rounding import EMULATED, below, float_rule, lowest, of, pick, size

__all__ = ["address_of", "at_any", "float_of", "grid_values", "half", "value_of"]


@triton.jit
def address_of(plane, row, STRIDE: tl.constexpr):
    """The address of rows of a plane. ``row``: a scalar and what each row has more, so that only the scalar's product is of 64 bits."""
    return plane + row[0] * STRIDE + row[1] * STRIDE


@triton.jit
def at_any(planes, FIRST: tl.constexpr, S: tl.constexpr, row, col):
    """The codes of a matrix at any rows and columns, int32, in the shape that ``row`` and ``col`` have together."""
    code = _field_at(planes, FIRST, S, 0, row, col)
    for i in tl.static_range(1, size(of(S, "widths"))):
        code |= _field_at(planes, FIRST, S, i, row, col) << below(of(S, "widths"), i)
    return code


@triton.jit
def _field_at(planes, FIRST: tl.constexpr, S: tl.constexpr, PLANE: tl.constexpr, row, col):
    bits: tl.constexpr = pick(of(S, "widths"), PLANE)
    held: tl.constexpr = 128 // bits  # columns of a run
    line = address_of(planes[FIRST + PLANE], row, pick(of(S, "row_nbytes"), PLANE))
    found = tl.load(line + ((col // held) * 16 + col % 16)).to(tl.int32)
    if bits < 8:
        found = (found >> (bits * ((col % held) // 16)).to(tl.int32)) & ((1 << bits) - 1)
    return found


@triton.jit
def _codes(
    planes, S: tl.constexpr, row, unit, PHASE: tl.constexpr, BOOK: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr
):  # fmt: skip
    """The 16 codes of one phase of units, (units, rows, 16) int32; ``row`` as ``line_of`` takes it, ``unit`` (units, 1, 1)."""
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
        found = (tl.load(address_of(planes[PLANE], row, row_nbytes) + byte).to(tl.int32) >> shift) & ((1 << bits) - 1)
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
    line = address_of(planes[PLANE].to(tl.pointer_type(tl.uint32)), row, row_nbytes // 4)
    held = tl.load(line + (run * 4 + tl.arange(0, 4)[None, None, :]), eviction_policy="evict_first")
    if down > 0:
        held = held >> down
    if down < 0:
        held = held << -down
    if bits < 8:
        held = held & (((1 << bits) - 1 << UP) * 0x01010101)
    return held


@triton.constexpr_function
def _permutation(selector):
    return f"prmt.b32 $0, $1, $2, {selector:#x};"


@triton.jit
def _unseen(NUMBER: tl.constexpr):
    """A number that the assembler does not know (no grid has a third dimension) and keeps in a register, instead of its neighbours."""
    return (tl.program_id(2) + NUMBER).to(tl.uint32)


@triton.jit
def _byte(words, top, NUMBER: tl.constexpr, PLACE: tl.constexpr):
    """A byte of each of ``words`` uint32 as the ``PLACE``th byte (0 or 3) of a word, the highest being that of ``top`` if it is the 0th."""
    if EMULATED:
        made = ((words >> (8 * NUMBER)) & 0xFF) << (8 * PLACE)
        if PLACE == 0:
            made = made | top
    elif PLACE == 3:
        made = tl.inline_asm_elementwise(_permutation(0x0444 + 0x1000 * NUMBER), "=r,r,r", [words, 0], tl.uint32, True, 1)
    else:
        made = tl.inline_asm_elementwise(_permutation(0x7440 + NUMBER), "=r,r,r", [words, top], tl.uint32, True, 1)
    return made


@triton.jit
def _spread(words, PLACE: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """``_byte`` of all bytes of words (units, rows, 4) uint32, under the byte TOP, (units, rows, 16)."""
    top = _unseen(TOP << 24) if TOP else tl.zeros([1], tl.uint32)
    even = tl.join(_byte(words, top, 0, PLACE), _byte(words, top, 2, PLACE))
    odd = tl.join(_byte(words, top, 1, PLACE), _byte(words, top, 3, PLACE))
    return tl.reshape(tl.join(even, odd), [UNITS, ROWS, 16])


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
def float_of(NAME: tl.constexpr, code):
    """The value of a small float's bits, float32."""
    if NAME == "e8m0":
        bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
        made = bits.to(tl.float32, bitcast=True)
    else:
        mask: tl.constexpr = pick(float_rule(NAME), 0)
        up: tl.constexpr = pick(float_rule(NAME), 1)
        power: tl.constexpr = 2.0 ** pick(float_rule(NAME), 2)
        sign: tl.constexpr = pick(float_rule(NAME), 3)
        value = ((code & mask) << up).to(tl.float32, bitcast=True) * power
        if sign:
            bits = value.to(tl.int32, bitcast=True) | ((code & sign) << pick(float_rule(NAME), 4))
            value = bits.to(tl.float32, bitcast=True)
        made = _special(NAME, value)
    return made


@triton.constexpr_function
def _address(selector):
    return f"{{ .reg .b32 low; prmt.b32 low, $1, $2, {selector:#x}; mov.b64 $0, {{low, $3}}; }}"


@triton.jit
def _entry(words, low, high, NUMBER: tl.constexpr):
    """The address whose lowest byte is a byte of each of ``words``, the others being those of ``low`` and ``high``: one instruction."""
    selector: tl.constexpr = _address(0x7650 + NUMBER)
    return tl.inline_asm_elementwise(selector, "=l,r,r,r", [words, low, high], tl.uint64, True, 1)


@triton.jit
def _looked_up(table, words, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """The entries of a float32 table of at most 64 for codes that are bytes of words (units, rows, 4), four times each.

    A constant table lies at a multiple of 256 bytes, so that a code is the address's lowest byte.
    """
    base = table.to(tl.uint64)
    low = base.to(tl.uint32)
    high = (base >> 32).to(tl.uint32)
    even = tl.join(tl.load(_entry(words, low, high, 0).to(table.dtype)), tl.load(_entry(words, low, high, 2).to(table.dtype)))
    odd = tl.join(tl.load(_entry(words, low, high, 1).to(table.dtype)), tl.load(_entry(words, low, high, 3).to(table.dtype)))
    return tl.reshape(tl.join(even, odd), [UNITS, ROWS, 16])


@triton.jit
def value_of(planes, S: tl.constexpr, code, zero):
    """The values of codes of one column each, less an integer ``zero``, float32.

    An integer goes through the bits of 2^23 + code, which needs no conversion; one subtraction then takes all that is too much.
    """
    if of(S, "kind") == "integer":
        if of(S, "flip"):
            code = code ^ of(S, "flip")
        made = (code | 0x4B000000).to(tl.float32, bitcast=True) - (zero + (8388608.0 + of(S, "low")))
    elif of(S, "kind") == "float":
        made = float_of(of(S, "name"), code)
    else:
        if of(S, "kind") == "learned":
            code = tl.minimum(code, of(S, "entries") - 1)
        made = tl.load(planes[of(S, "table")] + code).to(tl.float32)
    return made


@triton.jit
def half(bits, DTYPE: tl.constexpr):
    """The float32 of a 16-bit number in the low half of a word."""
    if DTYPE == tl.bfloat16:
        made = (bits << 16).to(tl.float32, bitcast=True)
    else:
        made = (bits & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
    return made


@triton.jit
def _halves(planes, S: tl.constexpr, row, unit, PHASE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Small floats that are the upper byte of a float16 with another bias, which ``lift`` makes good: four at a time, then two."""
    bits: tl.constexpr = of(S, "bits")
    words = _words(planes, S, row, unit, PHASE, 8 - bits)
    if bits < 8:
        held: tl.constexpr = (((1 << bits - 1) - 1) << of(S, "half_up")) * 0x01010101
        words = (words & 0x80808080) | ((words >> (8 - bits - of(S, "half_up"))) & held)
    if EMULATED:
        low = ((words & 0xFF) << 8) | ((words & 0xFF00) << 16)
        high = ((words & 0xFF0000) >> 8) | (words & 0xFF000000)
    else:
        low = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, 0x1404;", "=r,r", [words], tl.uint32, True, 1)
        high = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, 0x3424;", "=r,r", [words], tl.uint32, True, 1)
    even = tl.join(half(low, tl.float16), half(high, tl.float16))
    odd = tl.join(half(low >> 16, tl.float16), half(high >> 16, tl.float16))
    return tl.reshape(tl.join(even, odd), [UNITS, ROWS, 16])


@triton.jit
def _phase_values(planes, S: tl.constexpr, row, unit, zero, PHASE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """``value_of`` for the codes of a phase, one column each, (units, rows, 16) float32."""
    if of(S, "kind") == "integer":
        words = _words(planes, S, row, unit, PHASE, 0)
        if of(S, "flip"):
            words = words ^ 0x80808080
        made = _spread(words, 0, 0x4B, ROWS, UNITS).to(tl.float32, bitcast=True) - (zero + (8388608.0 + of(S, "low")))
    elif of(S, "kind") == "float" and of(S, "half_up") >= 0:
        made = _halves(planes, S, row, unit, PHASE, ROWS, UNITS)
    elif of(S, "kind") == "float" and of(S, "name") != "e8m0":
        mask: tl.constexpr = pick(float_rule(of(S, "name")), 0)
        up: tl.constexpr = pick(float_rule(of(S, "name")), 1)
        power: tl.constexpr = 2.0 ** pick(float_rule(of(S, "name")), 2)
        sign: tl.constexpr = pick(float_rule(of(S, "name")), 3)
        down: tl.constexpr = 32 - of(S, "bits") - up  # from the top of a word to its exponent
        left = _spread(_words(planes, S, row, unit, PHASE, 8 - of(S, "bits")), 3, 0, ROWS, UNITS).to(tl.int32, bitcast=True)
        bits = (left >> down) & ((mask << up) - (0x80000000 if sign else 0))
        made = _special(of(S, "name"), bits.to(tl.float32, bitcast=True) * power)
    elif of(S, "kind") == "table" and of(S, "bits") == 4 and not EMULATED:
        made = _looked_up(planes[of(S, "table")], _words(planes, S, row, unit, PHASE, 2), ROWS, UNITS)
    else:
        made = value_of(planes, S, _codes(planes, S, row, unit, PHASE, 0, ROWS, UNITS), zero)
    return made


@triton.jit
def grid_values(
    planes, S: tl.constexpr, row, unit, zero, PHASE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The values of a phase, (units, rows, width), float32; float64 if WIDE, as are the sums of a learned grid's books."""
    v: tl.constexpr = of(S, "v")
    if of(S, "v_out") > 1:
        held = (0, (row[0] + row[1]) // of(S, "v_out"))
    else:
        held = row
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
                code = code * of(S, "v_out") + ((row[0] + row[1]) % of(S, "v_out")).to(tl.int32)
            entry = planes[of(S, "table")] + code[:, :, :, None] * v + tl.arange(0, v)[None, None, None, :]
            found = tl.load(entry).to(sums)
            made = found if book == 0 else made + found
        made = tl.reshape(made if WIDE else made.to(tl.float32), [UNITS, ROWS, 16 * v])
    return made
