"""Compiled loops that read lowered planes row by row: exact weights in float32, each the exact value rounded once.

The definition is ``qformats.kernels.lower.Lowered.dequantize``. What a weight is made of comes as numbers (``HEAD``, ``SLOT``): addresses
of planes, widths, kinds, made by ``qformats.kernels.cpu_plan``, which also proves that the arithmetic chosen there rounds only once.
Serial and without the GIL; nothing is checked here.

A row goes through four steps in buffers that stay in the first cache: its parameters as float64 on the common groups of columns; its
codes, one a byte (those of more than 8 bits in two buffers); the values that the codes stand for, where they are no integers; the
weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from qformats.loops.compiled import compiled
from qformats.loops.lanes import (
    as_floats,
    divided,
    doubles,
    floats_at,
    fma,
    look_up,
    pointer,
    put,
    signed_at,
    spread,
    unsigned_at,
)  # fmt: skip

__all__ = ["DIVIDED", "DOUBLE", "SINGLE", "decode", "dequantize", "params", "row_codes", "workspace"]

Array = np.ndarray[Any, Any]
u8, u16, u32, f32, f64 = np.uint8, np.uint16, np.uint32, np.float32, np.float64

# places in HEAD, int64
COLUMNS, PADDED, PLANES, PLANE, STRIDE, CODES, KIND, TABLE, V_IN, SIGNS, SIGNS_STRIDE, WIDTH, GROUPS, INDEX, ARITHMETIC = (
    0, 1, 2, 3, 7, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24,
)  # fmt: skip
FIELD = 11  # the widths of the planes
HEAD = 25
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

_RUN = 16
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
def _unpack(address: Any, width: Any, at: Any, columns: Any, target: Any) -> None:
    """One plane's field of a row to bit ``at`` of the bytes at ``target``; the first field (``at`` 0) overwrites them."""
    runs, merge = (columns * width + 127) // 128, 1 if at else 0
    for run in range(runs):
        source = address + run * _RUN
        if width == 4:
            spread(source, 0, 15, at, merge, target + 32 * run)
            spread(source, 4, 15, at, merge, target + 32 * run + 16)
        elif width == 2:
            for i in range(4):
                spread(source, 2 * i, 3, at, merge, target + 64 * run + 16 * i)
        elif width == 1:
            for i in range(8):
                spread(source, i, 1, at, merge, target + 128 * run + 16 * i)
        else:
            spread(source, 0, 255, at, merge, target + 16 * run)


@compiled
def row_codes(head: Array, row: Any, low: Any, high: Any) -> Any:
    """The codes of a row as bytes, and where they are: at ``low``, or in the plane itself; bits from the 8th on at ``high``."""
    if head[PLANES] == 1 and head[FIELD] == 8:
        return head[PLANE] + row * head[STRIDE]
    at = 0
    for plane in range(head[PLANES]):
        address, width = head[PLANE + plane] + row * head[STRIDE + plane], head[FIELD + plane]
        _unpack(address, width, at & 7, head[CODES], high if at >= 8 else low)
        at += width
    return low


@compiled
def _from_half(h: Any) -> Any:
    """A float16's bits as float32."""
    magnitude = u32(u32(h & u32(0x7FFF)) << u32(13))
    sign = u32(u32(h & u32(0x8000)) << u32(16))
    if magnitude >= u32(0x0F800000):
        return u32(sign | magnitude | u32(0x70000000)).view(f32)
    scaled = f32(u32(magnitude).view(f32) * _HALF_SCALE).view(u32)
    return u32(scaled | sign).view(f32)


@compiled
def _numbers(slots: Array, slot: Any, row: Any, out: Array, scratch: Array, low: Any) -> None:
    """The stored numbers of one parameter for a row of weights, as float64, to ``out``."""
    count, form = slots[slot, COUNT], slots[slot, FORM]
    place = row // slots[slot, HEIGHT]
    if slots[slot, MODULO] > 0:
        place = place % slots[slot, MODULO]
    address = slots[slot, ADDRESS] + place * slots[slot, ROW_BYTES]
    if form == FORM_F16:
        halves = carray(pointer(address), count, u16)
        for i in range(count):
            out[i] = f64(_from_half(u32(halves[i])))
    elif form == FORM_F32:
        singles = carray(pointer(address), count, f32)
        for i in range(count):
            out[i] = f64(singles[i])
    elif form == FORM_BF16:
        halves = carray(pointer(address), count, u16)
        for i in range(count):
            out[i] = f64(u32(u32(halves[i]) << u32(16)).view(f32))
    elif form == FORM_U8:
        unsigned = carray(pointer(address), count, u8)
        for i in range(count):
            out[i] = f64(unsigned[i])
    elif form == FORM_F64:
        wide = carray(pointer(address), count, f64)
        for i in range(count):
            out[i] = wide[i]
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
        _coded(slots, slot, place, address, out, scratch, low)


@compiled
def _coded(slots: Array, slot: Any, place: Any, address: Any, out: Array, scratch: Array, low: Any) -> None:
    """Numbers that are stored as codes: looked up, or on a line, and times the inner scale if there is one."""
    count, form = slots[slot, COUNT], slots[slot, FORM]
    table = carray(pointer(slots[slot, LOOKUP]), 256, f64)
    if form != FORM_BYTES:
        at = 0
        if slots[slot, NUMBER_PLANES] == 1 and slots[slot, SUB_FIELD] == 8:
            address = slots[slot, SUB_PLANE] + place * slots[slot, SUB_STRIDE]
        else:
            for plane in range(slots[slot, NUMBER_PLANES]):
                width = slots[slot, SUB_FIELD + plane]
                _unpack(slots[slot, SUB_PLANE + plane] + place * slots[slot, SUB_STRIDE + plane], width, at, count, low)
                at += width
            address = low
    codes = carray(pointer(address), count, u8)
    if form == FORM_LINE:
        start, step = table[0], table[1] - table[0]
        for i in range(count):
            out[i] = f64(codes[i]) * step + start
    elif form == FORM_SIGNED_LINE:
        signed = carray(pointer(address), count, np.int8)
        start, step = table[0], table[1] - table[0]
        for i in range(count):
            out[i] = f64(signed[i]) * step + start
    else:
        for i in range(count):
            out[i] = table[codes[i]]
    inner = slots[slot, INNER]
    if inner < 0:
        return
    _numbers_plain(slots, inner, place, scratch)
    repeat = slots[inner, REPEAT]
    for j in range(slots[inner, COUNT]):
        factor, first = scratch[j], j * repeat
        if repeat == 8 and first + 8 <= count:
            for i in range(8):
                out[first + i] *= factor
        elif repeat == 16 and first + 16 <= count:
            for i in range(16):
                out[first + i] *= factor
        else:
            for i in range(first, min(count, first + repeat)):
                out[i] *= factor


@compiled
def _numbers_plain(slots: Array, slot: Any, row: Any, out: Array) -> None:
    """``_numbers`` of an inner scale: float16, bfloat16 or float32."""
    count, form = slots[slot, COUNT], slots[slot, FORM]
    address = slots[slot, ADDRESS] + row // slots[slot, HEIGHT] * slots[slot, ROW_BYTES]
    if form == FORM_F32:
        singles = carray(pointer(address), count, f32)
        for i in range(count):
            out[i] = f64(singles[i])
        return
    halves = carray(pointer(address), count, u16)
    if form == FORM_F16:
        for i in range(count):
            out[i] = f64(_from_half(u32(halves[i])))
    else:
        for i in range(count):
            out[i] = f64(u32(u32(halves[i]) << u32(16)).view(f32))


@compiled
def params(head: Array, slots: Array, constants: Array, row: Any, buffer: Array, low: Any) -> None:
    """Scale, divisor, zero point and offset of each group of a row to ``buffer[:4]``."""
    groups = head[GROUPS]
    set_ = 0  # bit r: role r has numbers of its own
    for slot in range(len(slots)):
        role = slots[slot, ROLE]
        if role < 0:
            continue
        repeat, target = slots[slot, REPEAT], buffer[role]
        first = role > 1 or set_ >> role & 1 == 0
        set_ |= 1 << role
        start = constants[role]
        direct = repeat == 1 and first
        numbers = target if direct else buffer[4]
        _numbers(slots, slot, row, numbers, buffer[5], low)
        if direct:
            if role < 2 and start != 1.0:
                for j in range(groups):
                    target[j] *= start
            elif role == 2 and start != 0.0:
                for j in range(groups):
                    target[j] += start
            continue
        for i in range(slots[slot, COUNT]):
            value = numbers[i]
            begin, end = i * repeat, min(groups, (i + 1) * repeat)
            if role < 2:
                if first:
                    value *= start
                    for j in range(begin, end):
                        target[j] = value
                else:
                    for j in range(begin, end):
                        target[j] *= value
            else:
                if role == 2:
                    value += start
                for j in range(begin, end):
                    target[j] = value
    for role in range(4):
        if set_ >> role & 1 == 0:
            for j in range(groups):
                buffer[role, j] = constants[role]


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


@compiled
def dequantize(head: Array, slots: Array, constants: Array, rows: Array, first: Any, out: Array) -> None:
    """The weights of rows ``first``, ``first + 1`` … or, where ``rows`` is not empty, of those, to ``out`` (n, K) float32."""
    p, bytes_, values = workspace(head)
    columns, aside = head[COLUMNS], np.intp(values[1].ctypes.data)
    whole, at = columns % 16 == 0, np.intp(out.ctypes.data)
    for i in range(len(out)):
        row = rows[i] if len(rows) else first + i
        decode(head, slots, constants, row, p, bytes_, values, at + 4 * columns * i if whole else aside)
        if not whole:
            for j in range(columns):
                out[i, j] = values[1, j]
