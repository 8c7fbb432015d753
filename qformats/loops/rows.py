"""Compiled loops that read lowered planes row by row: exact weights in float32, each the exact value rounded once.

The definition is ``qformats.kernels.lower.Lowered.dequantize``. What a weight is made of comes as numbers (``HEAD``, ``SLOT``): addresses
of planes, widths, kinds, made by ``qformats.kernels.cpu_plan``, which also proves that the arithmetic chosen there rounds only once.
Serial and without the GIL; nothing is checked here.

A row goes through four steps in buffers that stay in the first cache: its parameters as float64 on the common groups of columns; its
codes, one a byte (those of more than 8 bits in two buffers); the values that the codes stand for, where they are no integers; the
weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from qformats.loops.compiled import compiled, inlined, pointed
from qformats.loops.lanes import (
    HALVES,
    alive,
    as_floats,
    call,
    divided,
    doubles,
    floats_at,
    fma,
    halves,
    line,
    look_up,
    merge,
    pointer,
    put,
    signed_at,
    signed_line,
    spread,
    times,
    unsigned_at,
)  # fmt: skip

__all__ = [
    "DIVIDED", "DOUBLE", "ROW", "SINGLE", "TARGET", "decode", "decoder", "decoding", "dequantize", "params", "row_codes", "unpack_field",
    "workspace",
]  # fmt: skip

Array = np.ndarray[Any, Any]
u8, u16, u32, f32, f64 = np.uint8, np.uint16, np.uint32, np.float32, np.float64

# places in HEAD, int64
COLUMNS, PADDED, PLANES, PLANE, STRIDE, CODES, KIND, TABLE, V_IN, SIGNS, SIGNS_STRIDE, WIDTH, GROUPS, INDEX, ARITHMETIC = (
    0, 1, 2, 3, 7, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24,
)  # fmt: skip
FIELD = 11  # the widths of the planes
ROWS, QUICK = 25, 26  # rows of the planes; see ``qformats.loops.factors``
HEAD = 27
# HEAD[KIND]: codes are unsigned, signed, names of 16 floats, of up to 256 floats, of entries of V_IN floats
UNSIGNED, SIGNED, SIXTEEN, MANY, ENTRIES = range(5)
# HEAD[ARITHMETIC]
SINGLE, DOUBLE, DIVIDED = range(3)
# places in a row of SLOT, int64; ROLE: 0 scale, 1 divisor, 2 zero point, 3 offset, or -1 for the inner scale of another slot
ROLE, FORM, ADDRESS, ROW_BYTES, COUNT, REPEAT, HEIGHT, MODULO, LOOKUP, INNER, NUMBER_PLANES, SUB_PLANE, SUB_STRIDE, SUB_FIELD = (
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 17,
)  # fmt: skip
SLOT = 20
# FORM: the stored dtype; FORM_BYTES: bytes that name a float64 of LOOKUP; FORM_CODES: packed codes that do; FORM_LINE, FORM_SIGNED_LINE:
# integers whose numbers are evenly spaced, entries 0 and 1 of LOOKUP the first two
FORM_F32, FORM_F16, FORM_BF16, FORM_F64, FORM_U8, FORM_I8, FORM_I16, FORM_I32, FORM_BYTES, FORM_CODES, FORM_LINE, FORM_SIGNED_LINE = (
    range(12)
)

_HALF_SCALE = f32(2.0**112)


@compiled
def workspace(head: Array) -> Any:
    """Buffers for one row: parameters (6, groups) float64, bytes (3, padded), values (2, padded) float32, each on whole cache lines."""
    columns = (head[PADDED] + 127) // 128 * 128 + 128
    groups = (max(head[GROUPS], columns // 16) + 23) // 8 * 8
    bytes_, values = np.zeros(3 * columns + 64, u8), np.zeros(2 * columns + 16, f32)
    first, start = -np.intp(bytes_.ctypes.data) & 63, (-np.intp(values.ctypes.data) & 63) // 4
    lines = bytes_[first : first + 3 * columns].reshape((3, columns))
    return np.zeros((6, groups), f64), lines, values[start : start + 2 * columns].reshape((2, columns))


@compiled
def unpack_field(address: Any, width: Any, at: Any, columns: Any, target: Any) -> None:
    """One plane's field of a row to bit ``at`` of the bytes at ``target``; the first field (``at`` 0) overwrites them."""
    runs = (columns * width + 127) // 128
    if at:
        _add_field(address, width, at, runs, target)
    elif width == 4:
        for run in range(runs):
            spread(address + 16 * run, 0, 15, target + 32 * run)
            spread(address + 16 * run, 4, 15, target + 32 * run + 16)
    elif width == 2:
        for run in range(runs):
            for i in range(4):
                spread(address + 16 * run, 2 * i, 3, target + 64 * run + 16 * i)
    elif width == 1:
        for run in range(runs):
            for i in range(8):
                spread(address + 16 * run, i, 1, target + 128 * run + 16 * i)
    else:
        for run in range(runs):
            spread(address + 16 * run, 0, 255, target + 16 * run)


@compiled
def _add_field(address: Any, width: Any, at: Any, runs: Any, target: Any) -> None:
    """A further field: two bits from the fourth on, or one from the second, fourth or sixth on."""
    for run in range(runs):
        source = address + 16 * run
        if width == 2:
            for i in range(4):
                merge(source, 2 * i, 3, 4, target + 64 * run + 16 * i)
        elif at == 4:
            for i in range(8):
                merge(source, i, 1, 4, target + 128 * run + 16 * i)
        elif at == 2:
            for i in range(8):
                merge(source, i, 1, 2, target + 128 * run + 16 * i)
        else:
            for i in range(8):
                merge(source, i, 1, 6, target + 128 * run + 16 * i)


@compiled
def row_codes(head: Array, row: Any, low: Any, high: Any) -> Any:
    """The codes of a row as bytes, and where they are: at ``low``, or in the plane itself; bits from the 8th on at ``high``."""
    if head[PLANES] == 1 and head[FIELD] == 8:
        return head[PLANE] + row * head[STRIDE]
    at = 0
    for plane in range(head[PLANES]):
        address, width = head[PLANE + plane] + row * head[STRIDE + plane], head[FIELD + plane]
        unpack_field(address, width, at & 7, head[CODES], high if at >= 8 else low)
        at += width
    return low


@compiled
def _from_half(h: Any) -> Any:
    """A float16's bits as float32."""
    magnitude = u32(u32(h & u32(0x7FFF)) << u32(13))
    sign = u32(u32(h & u32(0x8000)) << u32(16))
    scaled = f32(u32(magnitude).view(f32) * _HALF_SCALE).view(u32)
    bits = u32(magnitude | u32(0x70000000)) if magnitude >= u32(0x0F800000) else scaled
    return u32(bits | sign).view(f32)


@compiled
def _from_halves(address: Any, count: Any, target: Any) -> None:
    """``count`` float16 as float64."""
    whole = count // 16 * 16 if HALVES else 0
    if HALVES:
        for i in range(0, whole, 16):
            halves(address + 2 * i, target + 8 * i)
    stored, out = carray(pointer(address), count, u16), carray(pointer(target), count, f64)
    for i in range(whole, count):
        out[i] = f64(_from_half(u32(stored[i])))


@compiled
def _place(slots: Array, slot: Any, row: Any) -> Any:
    """The row of a parameter's plane for a row of weights."""
    height, modulo = slots[slot, HEIGHT], slots[slot, MODULO]
    place = row if height == 1 else row // height
    return place if modulo == 0 else place % modulo


@compiled
def _plain(slots: Array, slot: Any, place: Any, target: Any) -> None:
    """The stored floats of one row, as float64, to the address ``target``."""
    count, form = slots[slot, COUNT], slots[slot, FORM]
    address = slots[slot, ADDRESS] + place * slots[slot, ROW_BYTES]
    if form == FORM_F16:
        _from_halves(address, count, target)
        return
    out = carray(pointer(target), count, f64)
    if form == FORM_F32:
        singles = carray(pointer(address), count, f32)
        for i in range(count):
            out[i] = f64(singles[i])
    elif form == FORM_BF16:
        upper = carray(pointer(address), count, u16)
        for i in range(count):
            out[i] = f64(u32(u32(upper[i]) << u32(16)).view(f32))
    elif form == FORM_U8:
        unsigned = carray(pointer(address), count, u8)
        for i in range(count):
            out[i] = f64(unsigned[i])
    elif form == FORM_I8:
        signed = carray(pointer(address), count, np.int8)
        for i in range(count):
            out[i] = f64(signed[i])
    elif form == FORM_I16:
        short = carray(pointer(address), count, np.int16)
        for i in range(count):
            out[i] = f64(short[i])
    elif form == FORM_I32:
        longer = carray(pointer(address), count, np.int32)
        for i in range(count):
            out[i] = f64(longer[i])
    else:
        wide = carray(pointer(address), count, f64)
        for i in range(count):
            out[i] = wide[i]


@compiled
def _coded(slots: Array, slot: Any, place: Any, target: Any, scratch: Any, low: Any) -> None:
    """Numbers that are stored as codes: looked up, or on a line, and times the inner scale if there is one."""
    count, form = slots[slot, COUNT], slots[slot, FORM]
    address = slots[slot, ADDRESS] + place * slots[slot, ROW_BYTES]
    table, out = carray(pointer(slots[slot, LOOKUP]), 256, f64), carray(pointer(target), count, f64)
    if form != FORM_BYTES and slots[slot, NUMBER_PLANES] == 1 and slots[slot, SUB_FIELD] == 8:
        address = slots[slot, SUB_PLANE] + place * slots[slot, SUB_STRIDE]
    elif form != FORM_BYTES:
        at = 0
        for plane in range(slots[slot, NUMBER_PLANES]):
            width = slots[slot, SUB_FIELD + plane]
            unpack_field(slots[slot, SUB_PLANE + plane] + place * slots[slot, SUB_STRIDE + plane], width, at, count, low)
            at += width
        address = low
    if form == FORM_LINE:
        for i in range(0, count, 16):
            line(address + i, table[1] - table[0], table[0], target + 8 * i)
    elif form == FORM_SIGNED_LINE:
        for i in range(0, count, 16):
            signed_line(address + i, table[1] - table[0], table[0], target + 8 * i)
    else:
        codes = carray(pointer(address), count, u8)
        for i in range(count):
            out[i] = table[codes[i]]
    inner = slots[slot, INNER]
    if inner < 0:
        return
    _plain(slots, inner, _place(slots, inner, place), scratch)
    repeat, factors = slots[inner, REPEAT], carray(pointer(scratch), slots[inner, COUNT], f64)
    for j in range(slots[inner, COUNT]):
        factor, first = factors[j], j * repeat
        if repeat & 7 == 0 and first + repeat <= count:
            for i in range(first, first + repeat, 8):
                times(target + 8 * i, factor)
        else:
            for i in range(first, min(count, first + repeat)):
                out[i] *= factor


@compiled
def _merged(slots: Array, slot: Any, first: bool, start: Any, numbers: Any, target: Any, groups: Any) -> None:
    """A parameter's numbers onto the groups: those of a first one as they are, a further factor multiplied to them."""
    count, repeat, adds = slots[slot, COUNT], slots[slot, REPEAT], slots[slot, ROLE] > 1
    source, out = carray(pointer(numbers), count, f64), carray(pointer(target), groups, f64)
    for i in range(count):
        value = source[i] + start if adds else source[i] * start
        for j in range(i * repeat, min(groups, (i + 1) * repeat)):
            out[j] = value if first else out[j] * value


@compiled
def params(head: Array, slots: Array, constants: Array, row: Any, buffer: Array, low: Any) -> None:
    """Scale, divisor, zero point and offset of each group of a row to ``buffer[:4]``."""
    groups, at, step = head[GROUPS], np.intp(buffer.ctypes.data), 8 * buffer.shape[1]
    met = 0  # bit r: role r has numbers of its own
    for slot in range(len(slots)):
        role = slots[slot, ROLE]
        if role < 0:
            continue
        first = met >> role & 1 == 0
        met |= 1 << role
        neutral = 1.0 if role < 2 else 0.0
        start = (constants[role] if role < 3 else 0.0) if first else neutral
        direct = slots[slot, REPEAT] == 1 and first and start == neutral
        target, place = at + role * step, _place(slots, slot, row)
        numbers = target if direct else at + 4 * step
        if slots[slot, FORM] >= FORM_BYTES:
            _coded(slots, slot, place, numbers, at + 5 * step, low)
        else:
            _plain(slots, slot, place, numbers)
        if not direct:
            _merged(slots, slot, first, start, numbers, target, groups)
    for role in range(4):
        if met >> role & 1 == 0:
            out = carray(pointer(at + role * step), groups, f64)
            for j in range(groups):
                out[j] = constants[role]


@compiled
def _values(head: Array, row: Any, codes: Any, high: Any, values: Array) -> None:
    """What the codes of a row stand for, as float32."""
    kind, vectors = head[KIND], (head[COLUMNS] + 15) // 16
    at = np.intp(values.ctypes.data)
    if kind == UNSIGNED:
        for i in range(vectors):
            put(at + 64 * i, unsigned_at(codes + 16 * i))
    elif kind == SIGNED:
        for i in range(vectors):
            put(at + 64 * i, signed_at(codes + 16 * i))
    elif kind == SIXTEEN:
        table = head[TABLE]
        for i in range(vectors):
            put(at + 64 * i, look_up(codes + 16 * i, table))
    elif kind == MANY:
        entries = carray(pointer(head[TABLE]), 256, f32)
        names = carray(pointer(codes), head[COLUMNS], u8)
        for i in range(head[COLUMNS]):
            values[i] = entries[names[i]]
    else:
        _entries(head, codes, high, values)
    if head[SIGNS]:
        negative = carray(pointer(head[SIGNS] + row * head[SIGNS_STRIDE]), head[SIGNS_STRIDE], u8)
        for i in range(head[COLUMNS]):
            bit = u32(u32(negative[i >> 3]) >> u32(i & 7)) & u32(1)
            values[i] = u32(f32(values[i]).view(u32) ^ u32(u32(bit) << u32(31))).view(f32)


@compiled
def _entries(head: Array, codes: Any, high: Any, values: Array) -> None:
    """Entries of several columns each."""
    v_in, count, wide = head[V_IN], head[CODES], head[FIELD] == 8 and head[PLANES] > 1
    entries = carray(pointer(head[TABLE]), v_in << 16, f32)
    lower = carray(pointer(codes), count, u8)
    upper = carray(pointer(high), count, u8)
    for i in range(count):
        name = np.intp(lower[i])
        if wide:
            name |= np.intp(upper[i]) << 8
        for j in range(v_in):
            values[i * v_in + j] = entries[name * v_in + j]


@compiled
def _single(head: Array, codes: Any, kind: Any, p: Array, out: Any) -> None:
    """Weights of one row in float32, from codes or from values at ``codes``: a difference, then one operation that rounds."""
    vectors, columns = head[WIDTH] // 16, (head[COLUMNS] + 15) // 16
    for j in range(head[GROUPS]):
        scale, zero, offset = as_floats(f32(p[0, j])), as_floats(f32(p[2, j])), as_floats(f32(p[3, j]))
        i, last = j * vectors, min(columns, (j + 1) * vectors)
        if kind == UNSIGNED:
            while i + 1 < last:
                put(out + 64 * i, fma(unsigned_at(codes + 16 * i) - zero, scale, offset))
                put(out + 64 * i + 64, fma(unsigned_at(codes + 16 * i + 16) - zero, scale, offset))
                i += 2
            if i < last:
                put(out + 64 * i, fma(unsigned_at(codes + 16 * i) - zero, scale, offset))
        elif kind == SIGNED:
            while i + 1 < last:
                put(out + 64 * i, fma(signed_at(codes + 16 * i) - zero, scale, offset))
                put(out + 64 * i + 64, fma(signed_at(codes + 16 * i + 16) - zero, scale, offset))
                i += 2
            if i < last:
                put(out + 64 * i, fma(signed_at(codes + 16 * i) - zero, scale, offset))
        elif kind == SIXTEEN:
            while i < last:
                put(out + 64 * i, fma(look_up(codes + 16 * i, head[TABLE]) - zero, scale, offset))
                i += 1
        else:
            while i < last:
                put(out + 64 * i, fma(floats_at(codes + 64 * i) - zero, scale, offset))
                i += 1


@compiled
def _wide(head: Array, values: Any, p: Array, out: Any) -> None:
    """Weights of one row in float64, rounded to float32 at the end."""
    vectors, columns = head[WIDTH] // 16, (head[COLUMNS] + 15) // 16
    by = head[ARITHMETIC] == DIVIDED
    for j in range(head[GROUPS]):
        for i in range(j * vectors, min(columns, (j + 1) * vectors)):
            value = floats_at(values + 64 * i)
            made = divided(value, p[2, j], p[0, j], p[1, j]) if by else doubles(value, p[2, j], p[0, j], p[3, j])
            put(out + 64 * i, made)


@compiled
def _columns(head: Array, values: Array, p: Array, out: Array) -> None:
    """Weights of one row whose groups are no whole vectors: ``HEAD[INDEX]`` has the group of each column."""
    group, by = carray(pointer(head[INDEX]), head[COLUMNS], np.int32), head[ARITHMETIC] == DIVIDED
    for i in range(head[COLUMNS]):
        j = np.intp(group[i])
        product = (f64(values[i]) - p[2, j]) * p[0, j]
        out[i] = f32(product / p[1, j]) if by else f32(product + p[3, j])


@compiled
def decode(head: Array, slots: Array, constants: Array, row: Any, p: Array, bytes_: Array, values: Array, target: Any) -> None:
    """The weights of one row to the address ``target``, rounded up to whole vectors."""
    low, high = np.intp(bytes_[0].ctypes.data), np.intp(bytes_[1].ctypes.data)
    params(head, slots, constants, row, p, np.intp(bytes_[2].ctypes.data))
    codes, kind = row_codes(head, row, low, high), head[KIND]
    if kind <= SIXTEEN and head[SIGNS] == 0 and head[INDEX] == 0 and head[ARITHMETIC] == SINGLE:
        _single(head, codes, kind, p, target)
        return
    _values(head, row, codes, high, values[0])
    if head[INDEX] != 0:
        _columns(head, values[0], p, carray(pointer(target), head[COLUMNS], f32))
    elif head[ARITHMETIC] == SINGLE:
        _single(head, np.intp(values[0].ctypes.data), ENTRIES, p, target)
    else:
        _wide(head, np.intp(values[0].ctypes.data), p, target)


# a frame for ``decoder``: addresses and sizes of what ``decode`` takes; the row and the target are set for each row
ROW, TARGET = 0, 1
_FRAME = 12


@inlined
def decoding(head: Array, slots: Array, constants: Array, p: Array, bytes_: Array, values: Array) -> Any:
    """A frame, which lacks the row and the target; the buffers are those of ``workspace``."""
    frame = np.zeros(_FRAME, np.int64)
    frame[2], frame[3], frame[4] = np.intp(head.ctypes.data), np.intp(slots.ctypes.data), len(slots)
    frame[5], frame[6], frame[7] = np.intp(constants.ctypes.data), np.intp(p.ctypes.data), p.shape[1]
    frame[8], frame[9] = np.intp(bytes_.ctypes.data), bytes_.shape[1]
    frame[10], frame[11] = np.intp(values.ctypes.data), values.shape[1]
    return frame


@cache
def decoder() -> Any:
    """``decode`` for the loops to call."""

    def run(frame: Any) -> Any:
        f = carray(pointer(frame), _FRAME, np.int64)
        head, slots = carray(pointer(f[2]), HEAD, np.int64), carray(pointer(f[3]), (f[4], SLOT), np.int64)
        constants, p = carray(pointer(f[5]), 4, f64), carray(pointer(f[6]), (6, f[7]), f64)
        bytes_, values = carray(pointer(f[8]), (3, f[9]), u8), carray(pointer(f[10]), (2, f[11]), f32)
        decode(head, slots, constants, f[ROW], p, bytes_, values, f[TARGET])
        return f32(0)

    return pointed(run)


@compiled
def dequantize(head: Array, slots: Array, constants: Array, decoder: Any, rows: Array, first: Any, out: Array) -> None:
    """The weights of rows ``first``, ``first + 1`` … or, where ``rows`` is not empty, of those, to ``out`` (n, K) float32.

    ``decoder``: its address.
    """
    p, bytes_, values = workspace(head)
    frame, columns, aside = decoding(head, slots, constants, p, bytes_, values), head[COLUMNS], np.intp(values[1].ctypes.data)
    whole, at, frame_at = columns % 16 == 0, np.intp(out.ctypes.data), np.intp(frame.ctypes.data)
    for i in range(len(out)):
        frame[ROW], frame[TARGET] = rows[i] if len(rows) else first + i, at + 4 * columns * i if whole else aside
        call(decoder, frame_at)
        if not whole:
            for j in range(columns):
                out[i, j] = values[1, j]
    alive(p), alive(bytes_), alive(values), alive(frame)
