"""The parameters of one row in float32, for strips: what ``rows.params`` gives, without float64 where that is exact.

``HEAD[QUICK]`` says that each role's numbers lie on the common groups, that they and what they are made of are float32 numbers, and that
they are stored as ``_plain`` and ``_coded`` read them. What ``head``, ``slots`` and ``constants`` are: ``qformats.loops.rows``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from qformats.loops.compiled import compiled, inlined, pointed
from qformats.loops.lanes import (
    HALVES,
    as_floats,
    floats_at,
    fma,
    pointer,
    put,
    shorts_at,
    signed_at,
    singles_at,
    unsigned_at,
)  # fmt: skip
from qformats.loops.rows import (
    ADDRESS,
    ARITHMETIC,
    COUNT,
    DIVIDED,
    FORM,
    FORM_BF16,
    FORM_CODES,
    FORM_F16,
    FORM_F32,
    FORM_I8,
    FORM_LINE,
    FORM_U8,
    GROUPS,
    HEAD,
    INNER,
    LOOKUP,
    NUMBER_PLANES,
    PADDED,
    QUICK,
    REPEAT,
    ROLE,
    ROW_BYTES,
    SLOT,
    SUB_FIELD,
    SUB_PLANE,
    SUB_STRIDE,
    WIDTH,
    _from_half,
    _place,
    params,
    unpack_field,
)  # fmt: skip
from qformats.loops.strips import STRIP, lanes

__all__ = ["factoring", "factors", "framed", "group_at", "lanes_of", "room", "row_factors"]

Array = np.ndarray[Any, Any]
u8, u16, u32, f32, f64 = np.uint8, np.uint16, np.uint32, np.float32, np.float64


@compiled
def room(head: Array, constants: Array) -> Any:
    """Buffers for ``factors``: (5, groups and more) float32, the constants in it; float64 and bytes for what is made in passing."""
    groups = (head[GROUPS] + 15) // 16 * 16 + 48
    found = np.zeros((5, groups), f32)
    for role in range(4):
        found[role] = f32(constants[role])
    return found, np.zeros((6, groups), f64), np.zeros(8 * groups + 256, u8)


@compiled
def _plain(form: Any, address: Any, count: Any, target: Any) -> None:
    """``count`` stored numbers; whole vectors are written."""
    whole = count // 16 * 16
    if form == FORM_F16:
        whole = whole if HALVES else 0
        if HALVES:
            for i in range(0, whole, 16):
                put(target + 4 * i, shorts_at(address + 2 * i))
        stored, out = carray(pointer(address), count, u16), carray(pointer(target), count, f32)
        for i in range(whole, count):
            out[i] = _from_half(u32(stored[i]))
    elif form == FORM_F32:
        stored32, out = carray(pointer(address), count, f32), carray(pointer(target), count, f32)
        out[:] = stored32
    elif form == FORM_BF16:
        for i in range(0, whole, 16):
            put(target + 4 * i, singles_at(address + 2 * i))
        stored, out = carray(pointer(address), count, u16), carray(pointer(target), count, f32)
        for i in range(whole, count):
            out[i] = u32(u32(stored[i]) << u32(16)).view(f32)
    elif form == FORM_U8:
        unsigned, out = carray(pointer(address), count, u8), carray(pointer(target), count, f32)
        for i in range(count):
            out[i] = f32(unsigned[i])
    else:
        signed, out = carray(pointer(address), count, np.int8), carray(pointer(target), count, f32)
        for i in range(count):
            out[i] = f32(signed[i])


@compiled
def _sub_codes(slots: Array, slot: Any, place: Any, low: Any) -> Any:
    """The address of a packed parameter's codes as bytes."""
    if slots[slot, NUMBER_PLANES] == 1 and slots[slot, SUB_FIELD] == 8:
        return slots[slot, SUB_PLANE] + place * slots[slot, SUB_STRIDE]
    at = 0
    for plane in range(slots[slot, NUMBER_PLANES]):
        width = slots[slot, SUB_FIELD + plane]
        unpack_field(slots[slot, SUB_PLANE + plane] + place * slots[slot, SUB_STRIDE + plane], width, at, slots[slot, COUNT], low)
        at += width
    return low


@compiled
def _coded(slots: Array, slot: Any, place: Any, target: Any, scratch: Any, low: Any) -> None:
    """Numbers stored as codes, on a line or looked up, times the inner scale if there is one."""
    count, form, table = slots[slot, COUNT], slots[slot, FORM], carray(pointer(slots[slot, LOOKUP]), 256, f64)
    if form >= FORM_LINE:
        codes, start, step = _sub_codes(slots, slot, place, low), as_floats(f32(table[0])), as_floats(f32(table[1] - table[0]))
        for i in range(0, count, 16):
            put(target + 4 * i, fma(unsigned_at(codes + i) if form == FORM_LINE else signed_at(codes + i), step, start))
    else:
        codes = _sub_codes(slots, slot, place, low) if form == FORM_CODES else slots[slot, ADDRESS] + place * slots[slot, ROW_BYTES]
        names, out = carray(pointer(codes), count, u8), carray(pointer(target), count, f32)
        for i in range(count):
            out[i] = f32(table[names[i]])
    inner = slots[slot, INNER]
    if inner < 0:
        return
    address = slots[inner, ADDRESS] + _place(slots, inner, place) * slots[inner, ROW_BYTES]
    _plain(slots[inner, FORM], address, slots[inner, COUNT], scratch)
    repeat = slots[inner, REPEAT]
    if repeat == 8:
        for i in range(0, count, 16):
            put(target + 4 * i, floats_at(target + 4 * i) * lanes(scratch + 4 * (i >> 3), 3, 0))
    elif repeat % 16 == 0:
        for i in range(0, count, 16):
            put(target + 4 * i, floats_at(target + 4 * i) * lanes(scratch + 4 * (i // repeat), 4, 0))
    else:
        made, by = carray(pointer(target), count, f32), carray(pointer(scratch), slots[inner, COUNT], f32)
        for i in range(count):
            made[i] *= by[i // repeat]


@compiled
def _quick(slots: Array, constants: Array, row: Any, p: Any, step: Any, low: Any) -> None:
    for slot in range(len(slots)):
        role = slots[slot, ROLE]
        if role < 0:
            continue
        target, place, count, form = p + role * step, _place(slots, slot, row), slots[slot, COUNT], slots[slot, FORM]
        if form <= FORM_I8:
            _plain(form, slots[slot, ADDRESS] + place * slots[slot, ROW_BYTES], count, target)
        else:
            _coded(slots, slot, place, target, p + 4 * step, low)
        start = constants[role]
        if role == 0 and start != 1.0:
            for i in range(0, count, 16):
                put(target + 4 * i, floats_at(target + 4 * i) * as_floats(f32(start)))
        elif role == 2 and start != 0.0:
            for i in range(0, count, 16):
                put(target + 4 * i, floats_at(target + 4 * i) + as_floats(f32(start)))


@compiled
def factors(head: Array, slots: Array, constants: Array, row: Any, held: Array, wide: Array, p: Any, low: Any) -> None:
    """Scale, zero point and offset of each group of a row to ``held[0]``, ``held[2]``, ``held[3]``; a divisor is in the scale.

    ``held``, ``wide``: of ``room``; ``p``, ``low``: the addresses of ``held`` and of the bytes (asking an array for its address takes
    longer than what is done here).
    """
    if head[QUICK]:
        _quick(slots, constants, row, p, 4 * held.shape[1], low)
        return
    params(head, slots, constants, row, wide, low)
    for j in range(head[GROUPS]):
        held[0, j] = f32(wide[0, j] / wide[1, j]) if head[ARITHMETIC] == DIVIDED else f32(wide[0, j])
        held[2, j], held[3, j] = f32(wide[2, j]), f32(wide[3, j])


# a frame for ``row_factors``: the row, then addresses and sizes of what ``factors`` takes
_FRAME = 10


@inlined
def factoring(head: Array, slots: Array, constants: Array, held: Array, wide: Array, bytes_: Array) -> Any:
    """A frame, which lacks the row; the buffers are those of ``room``."""
    frame = np.zeros(_FRAME, np.int64)
    frame[1], frame[2], frame[3] = np.intp(head.ctypes.data), np.intp(slots.ctypes.data), len(slots)
    frame[4], frame[5], frame[6] = np.intp(constants.ctypes.data), np.intp(held.ctypes.data), held.shape[1]
    frame[7], frame[8], frame[9] = np.intp(wide.ctypes.data), wide.shape[1], np.intp(bytes_.ctypes.data)
    return frame


@cache
def row_factors() -> Any:
    """``factors`` for the loops to call."""

    def run(frame: Any) -> Any:
        f = carray(pointer(frame), _FRAME, np.int64)
        head, slots = carray(pointer(f[1]), HEAD, np.int64), carray(pointer(f[2]), (f[3], SLOT), np.int64)
        constants, held = carray(pointer(f[4]), 4, f64), carray(pointer(f[5]), (5, f[6]), f32)
        factors(head, slots, constants, f[0], held, carray(pointer(f[7]), (6, f[8]), f64), f[5], f[9])
        return f32(0)

    return pointed(run)


@inlined
def lanes_of(head: Array) -> Any:
    """How lanes find their numbers: shifts for ``lanes``, how far those of a strip's second vector are behind, and for ``group_at``."""
    width = head[WIDTH]
    if head[GROUPS] == 1:
        return 4, 0, 0, 0, 1
    if width >= STRIP:
        return 4, 0, 0, 4, width // STRIP
    if width == 16:
        return 2, 1, 4, 32, 1
    return (2, 0, 0, 16, 1) if width == 32 else (3, 0, 0, 8, 1)


@inlined
def group_at(number: Any, ahead: Any, every: Any) -> Any:
    """How far the numbers of a strip's first group are behind those of the row's; they go ``ahead`` after ``every`` strips."""
    return ahead * (number if every == 1 else number // every)


# a frame for a function of one row in strips: addresses of the row's planes, of its numbers, how far apart their kinds are, strips, table,
# of ``lanes_of``; then two addresses that the function says
ROW_FRAME = 14
NUMBERS, APART, COUNT_OF_STRIPS, ENTRIES_AT, RIGHT, LEFT, BEHIND, AHEAD, EVERY, FIRST, SECOND = range(3, 14)


@inlined
def framed(head: Array, table: Any, p: Any, apart: Any) -> Any:
    """A frame for the rows of a weight, which lacks the planes and the last two entries."""
    right, left, behind, ahead, every = lanes_of(head)
    frame = np.zeros(ROW_FRAME, np.int64)
    frame[NUMBERS], frame[APART], frame[COUNT_OF_STRIPS], frame[ENTRIES_AT] = p, apart, head[PADDED] // STRIP, table
    frame[RIGHT], frame[LEFT], frame[BEHIND], frame[AHEAD], frame[EVERY] = right, left, behind, ahead, every
    return frame
