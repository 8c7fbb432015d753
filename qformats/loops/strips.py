"""Strips: 128 columns of one row of packed codes as two vectors of 64 bytes, and what is made of them without a buffer between.

``Bytes`` is LLVM's ``<64 x i8>``. A strip's columns lie so that a plane of four bits needs one shift: byte 16 r + j of the first vector is
column 32 r + j, of the second column 32 r + 16 + j. Vector 4 h + b of *word order* has byte 4 i + b of vector h in lane i. Lanes 4 r …
4 r + 3 of all of them are columns 32 r … 32 r + 31. Addresses are those of arrays that the caller keeps alive; nothing is checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from qformats.loops.compiled import compiled, inlined
from qformats.loops.lanes import (
    _FEATURES,
    _FLOATS,
    _I8,
    _I32,
    _INTS,
    _LONG,
    _X86,
    _at,
    _by_address,
    _called,
    _fma,
    _load,
    _named_floats,
    _picked,
    _products,
    _splat,
    flipped,
)
from qformats.loops.rows import COLUMNS, PADDED, PLANE, PLANES, ROWS, STRIDE
from qformats.loops.vectors import LANES, floats

__all__ = [
    "RUNS", "STRIP", "any_of", "bytes_at", "dot", "dots", "flip", "in_words", "keep", "lanes", "names_of", "paired", "planes_of", "strip",
    "value",
]  # fmt: skip

Array = np.ndarray[Any, Any]

STRIP = 128
RUNS = 5
"""A kind of codes of eight bits: those of each run of eight are evenly spaced; the table holds 32 first values and 32 steps."""
_HALF = ir.VectorType(ir.IntType(16), 32)


class _BytesType(types.Type):  # type: ignore[misc,unused-ignore]
    """``Bytes`` as numba's typing knows them."""


many_bytes = _BytesType("Bytes64")
_two = types.UniTuple(many_bytes, 2)  # type: ignore[attr-defined,unused-ignore]


@register_model(_BytesType)  # type: ignore[untyped-decorator,unused-ignore]
class _BytesModel(models.PrimitiveModel):  # type: ignore[misc,unused-ignore]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _LONG)


def _constant(values: list[int], kind: Any = _LONG) -> Any:
    return ir.Constant(kind, values)


def _both(made: Any) -> Any:
    """A typed intrinsic from an address to two vectors of bytes; ``made`` gets the builder and the address."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = context.cast(builder, args[0], sig.args[0], types.intp)
        return context.make_tuple(builder, _two, made(builder, address))

    return _two(types.intp), build


def _runs(builder: Any, vector: Any, picks: list[int]) -> Any:
    """Runs of 16 bytes of a vector, as ``picks`` says, in one of 64."""
    index = [16 * run + j for run in picks for j in range(16)]
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), ir.Constant(ir.VectorType(_I32, 64), index))


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _eights(typing: Any, address: Any) -> Any:
    """128 bytes."""

    def made(builder: Any, at: Any) -> Any:
        stored = _load(builder, at, ir.VectorType(_I8, STRIP))
        return _runs(builder, stored, [0, 2, 4, 6]), _runs(builder, stored, [1, 3, 5, 7])

    return _both(made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _fours(typing: Any, address: Any) -> Any:
    """64 bytes of two fields each."""

    def made(builder: Any, at: Any) -> Any:
        stored, low = _load(builder, at, _LONG), _constant([15] * 64)
        halves = builder.lshr(builder.bitcast(stored, _HALF), _constant([4] * 32, _HALF))
        return builder.and_(stored, low), builder.and_(builder.bitcast(halves, _LONG), low)

    return _both(made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _twos(typing: Any, address: Any) -> Any:
    """32 bytes of four fields each."""

    def made(builder: Any, at: Any) -> Any:
        stored = builder.bitcast(_runs(builder, _load(builder, at, ir.VectorType(_I8, 32)), [0, 0, 1, 1]), _HALF)
        halves = []
        for first in (0, 2):
            shifts = _constant([first + 4 * (run % 2) for run in range(4) for _ in range(8)], _HALF)
            halves.append(builder.and_(builder.bitcast(builder.lshr(stored, shifts), _LONG), _constant([3] * 64)))
        return tuple(halves)

    return _both(made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _ones(typing: Any, address: Any) -> Any:
    """16 bytes of eight fields each."""

    def made(builder: Any, at: Any) -> Any:
        stored, zero = _runs(builder, _load(builder, at, ir.VectorType(_I8, 16)), [0] * 4), _constant([0] * 64)
        halves = []
        for first in (0, 1):
            bits = _constant([1 << (first + 2 * run) for run in range(4) for _ in range(16)])
            halves.append(builder.select(builder.icmp_unsigned("!=", builder.and_(stored, bits), zero), _constant([1] * 64), zero))
        return tuple(halves)

    return _both(made)


def _moved(builder: Any, vector: Any, left: int) -> Any:
    return builder.bitcast(builder.shl(builder.bitcast(vector, _HALF), _constant([left] * 32, _HALF)), _LONG)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _above2(typing: Any, low: Any, high: Any) -> Any:
    """low + 4 high, high below 2."""
    return _by_address(many_bytes, (many_bytes, many_bytes), lambda b, low, high: b.or_(low, _moved(b, high, 2)))


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _above4(typing: Any, low: Any, high: Any) -> Any:
    """low + 16 high, high below 4."""
    return _by_address(many_bytes, (many_bytes, many_bytes), lambda b, low, high: b.or_(low, _moved(b, high, 4)))


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _above6(typing: Any, low: Any, high: Any) -> Any:
    """low + 64 high, high below 2."""
    return _by_address(many_bytes, (many_bytes, many_bytes), lambda b, low, high: b.or_(low, _moved(b, high, 6)))


@inlined
def strip(widths: Any, planes: Any, number: Any) -> Any:
    """Strip ``number`` of codes of at most 8 bits; three ``widths`` and the addresses of the row's ``planes``, width 0 for no plane."""
    first, second, third = widths
    if first == 4:
        a, b = _fours(planes[0] + 64 * number)
        if second == 2:
            c, d = _twos(planes[1] + 32 * number)
            a, b = _above4(a, c), _above4(b, d)
            if third == 1:
                e, f = _ones(planes[2] + 16 * number)
                a, b = _above6(a, e), _above6(b, f)
        elif second == 1:
            c, d = _ones(planes[1] + 16 * number)
            a, b = _above4(a, c), _above4(b, d)
    elif first == 8:
        a, b = _eights(planes[0] + 128 * number)
    elif first == 2:
        a, b = _twos(planes[0] + 32 * number)
        if second == 1:
            c, d = _ones(planes[1] + 16 * number)
            a, b = _above2(a, c), _above2(b, d)
    else:
        a, b = _ones(planes[0] + 16 * number)
    return a, b


@compiled
def planes_of(head: Array, row: Any, spare: Array) -> Any:
    """Where the planes of a row are: in ``spare`` (3 padded rows of bytes) if the last strip would be read past the plane's end."""
    found = (head[PLANE] + row * head[STRIDE], head[PLANE + 1] + row * head[STRIDE + 1], head[PLANE + 2] + row * head[STRIDE + 2])
    if head[COLUMNS] == head[PADDED] or row + STRIP < head[ROWS]:  # a row has 16 bytes at least
        return found
    at = np.intp(spare.ctypes.data)
    for plane in range(head[PLANES]):
        for i in range(0, head[STRIDE + plane], 16):
            flipped(head[PLANE + plane] + row * head[STRIDE + plane] + i, 0, at + plane * head[PADDED] + i)
    return at, at + head[PADDED], at + 2 * head[PADDED]


@compiled
def any_of(plane: Array, first: Any, second: Any) -> Any:
    """Whether one of two bytes is in a plane of bytes (rows, bytes)."""
    for row in range(len(plane)):
        line, found = plane[row], np.uint8(0)
        for i in range(len(line)):
            found |= np.uint8(line[i] == first) | np.uint8(line[i] == second)
        if found:
            return True
    return False


# ---------------------------------------------------------------- bytes


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def keep(typing: Any, address: Any, codes: Any) -> Any:
    """Store 64 bytes."""
    return _by_address(types.void, (types.intp, many_bytes), lambda b, at, v: b.store(v, _at(b, at, _LONG), align=1) and None)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def flip(typing: Any, codes: Any, bits: Any) -> Any:
    """64 bytes with ``bits`` of each flipped."""
    return _by_address(many_bytes, (many_bytes, types.intp), lambda b, v, bits: b.xor(v, _splat(b, b.trunc(bits, _I8), _LONG)))


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def names_of(typing: Any, codes: Any, table: Any) -> Any:
    """The entries of sixteen bytes at the address ``table`` that 64 bytes below 16 name."""
    run, name = ir.VectorType(_I8, 16), ""
    if _X86:
        name = "llvm.x86.avx512.pshuf.b.512" if _FEATURES.get("avx512bw") else ("one" if _FEATURES.get("ssse3") else "")

    def made(builder: Any, codes: Any, table: Any) -> Any:
        entries = _load(builder, table, run)
        if name and name != "one":
            return _called(builder, name, _LONG, _runs(builder, entries, [0] * 4), codes)
        if not name:
            return _picked(builder, entries, codes, _LONG)
        parts = []
        for first in range(0, 64, 16):
            index = ir.Constant(ir.VectorType(_I32, 16), list(range(first, first + 16)))
            part = builder.shuffle_vector(codes, ir.Constant(_LONG, ir.Undefined), index)
            parts.append(_called(builder, "llvm.x86.ssse3.pshuf.b.128", run, entries, part))
        pairs = [builder.shuffle_vector(*parts[i : i + 2], ir.Constant(ir.VectorType(_I32, 32), list(range(32)))) for i in (0, 2)]
        return builder.shuffle_vector(*pairs, ir.Constant(ir.VectorType(_I32, 64), list(range(64))))

    return _by_address(many_bytes, (many_bytes, types.intp), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def dot(typing: Any, codes: Any, x: Any) -> Any:
    """Products of 64 unsigned bytes and the 64 signed ones at the address ``x``, four summed to a lane, as float32."""
    made = lambda b, v, at: b.sitofp(_products(b, v, _load(b, at, _LONG)), _FLOATS)  # noqa: E731
    return _by_address(floats, (many_bytes, types.intp), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def dots(typing: Any, first: Any, second: Any, x: Any) -> Any:
    """The same of a strip, eight summed to a lane."""

    def made(builder: Any, a: Any, b: Any, at: Any) -> Any:
        found = _products(builder, a, _load(builder, at, _LONG))
        rest = builder.add(at, at.type(64))
        return builder.sitofp(_products(builder, b, _load(builder, rest, _LONG), found), _FLOATS)

    return _by_address(floats, (many_bytes, many_bytes, types.intp), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def bytes_at(typing: Any, address: Any) -> Any:
    """64 bytes."""
    return _by_address(many_bytes, (types.intp,), lambda b, at: _load(b, at, _LONG))


# ---------------------------------------------------------------- floats


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def lanes(typing: Any, address: Any, right: Any, left: Any) -> Any:
    """Lane i: float32 number (i >> right) << left, one of sixteen, of those at the address."""

    def made(builder: Any, at: Any, right: Any, left: Any) -> Any:
        every = ir.Constant(_INTS, list(range(LANES)))
        right, left = (_splat(builder, builder.trunc(value, _I32), _INTS) for value in (right, left))
        return _named_floats(builder, _load(builder, at, _FLOATS), builder.shl(builder.lshr(every, right), left))

    return _by_address(floats, (types.intp,) * 3, made)


def _word(builder: Any, codes: Any, number: Any) -> Any:
    """Byte ``number`` of each four at the bottom of a lane, what is above it still there."""
    shift = _splat(builder, builder.trunc(builder.mul(number, number.type(8)), _I32), _INTS)
    return builder.lshr(builder.bitcast(codes, _INTS), shift)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _unsigned(typing: Any, codes: Any, number: Any) -> Any:
    made = lambda b, v, n: b.sitofp(b.and_(_word(b, v, n), ir.Constant(_INTS, [255] * LANES)), _FLOATS)  # noqa: E731
    return _by_address(floats, (many_bytes, types.intp), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _signed(typing: Any, codes: Any, number: Any) -> Any:
    def made(builder: Any, codes: Any, number: Any) -> Any:
        up = builder.shl(_word(builder, codes, number), ir.Constant(_INTS, [24] * LANES))
        return builder.sitofp(builder.ashr(up, ir.Constant(_INTS, [24] * LANES)), _FLOATS)

    return _by_address(floats, (many_bytes, types.intp), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _sixteen(typing: Any, codes: Any, number: Any, table: Any) -> Any:
    def made(builder: Any, codes: Any, number: Any, table: Any) -> Any:
        index = builder.and_(_word(builder, codes, number), ir.Constant(_INTS, [15] * LANES))
        return _named_floats(builder, _load(builder, table, _FLOATS), index)

    return _by_address(floats, (many_bytes, types.intp, types.intp), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _many(typing: Any, codes: Any, number: Any, table: Any) -> Any:
    def made(builder: Any, codes: Any, number: Any, table: Any) -> Any:
        index = builder.and_(_word(builder, codes, number), ir.Constant(_INTS, [255] * LANES))
        if _X86 and _FEATURES.get("avx512f"):
            where, every = builder.inttoptr(table, _I8.as_pointer()), ir.Constant(ir.VectorType(ir.IntType(1), LANES), [1] * LANES)
            name = "llvm.x86.avx512.mask.gather.dps.512"
            return _called(builder, name, _FLOATS, ir.Constant(_FLOATS, [0.0] * LANES), where, index, every, _I32(4))
        found, start = ir.Constant(_FLOATS, ir.Undefined), _at(builder, table, ir.FloatType())
        for lane in range(LANES):
            one = builder.load(builder.gep(start, [builder.extract_element(index, _I32(lane))]), align=4)
            found = builder.insert_element(found, one, _I32(lane))
        return found

    return _by_address(floats, (many_bytes, types.intp, types.intp), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def _runs_of_eight(typing: Any, codes: Any, number: Any, table: Any) -> Any:
    """``start[byte >> 3] + step[byte >> 3] (byte & 7)``; ``table``: 32 starts and 32 steps, float32."""

    def picked(builder: Any, table: Any, first: int, index: Any) -> Any:
        low, high = (_load(builder, builder.add(table, table.type(4 * at)), _FLOATS) for at in (first, first + 16))
        if _X86 and _FEATURES.get("avx512f"):  # which looks at five bits
            return _called(builder, "llvm.x86.avx512.vpermi2var.ps.512", _FLOATS, low, index, high)
        below = builder.and_(index, ir.Constant(_INTS, [15] * LANES))
        upper = builder.icmp_unsigned("!=", builder.and_(index, ir.Constant(_INTS, [16] * LANES)), ir.Constant(_INTS, [0] * LANES))
        return builder.select(upper, _named_floats(builder, high, below), _named_floats(builder, low, below))

    def made(builder: Any, codes: Any, number: Any, table: Any) -> Any:
        word = _word(builder, codes, number)
        run = builder.lshr(word, ir.Constant(_INTS, [3] * LANES))
        if _X86 and _FEATURES.get("avx512f"):  # which looks at four bits
            place = _named_floats(builder, ir.Constant(_FLOATS, [float(i % 8) for i in range(LANES)]), word)
        else:
            place = builder.sitofp(builder.and_(word, ir.Constant(_INTS, [7] * LANES)), _FLOATS)
        return _fma(builder, place, picked(builder, table, 32, run), picked(builder, table, 0, run))

    return _by_address(floats, (many_bytes, types.intp, types.intp), made)


@inlined
def value(codes: Any, number: Any, kind: Any, table: Any) -> Any:
    """What byte ``number`` of each four stands for, by the kinds of ``qformats.loops.rows``: ``UNSIGNED`` … ``MANY``; and ``RUNS``."""
    if kind == 0:
        found = _unsigned(codes, number)
    elif kind == 1:
        found = _signed(codes, number)
    elif kind == 2:
        found = _sixteen(codes, number, table)
    elif kind == RUNS:
        found = _runs_of_eight(codes, number, table)
    else:
        found = _many(codes, number, table)
    return found


# ---------------------------------------------------------------- inputs


@compiled
def in_words(x: Array, out: Array) -> None:
    """Columns of ``x`` (M, K) float32 to ``out`` (M, whole strips), which holds zeros, in word order."""
    columns = x.shape[1]
    for m in range(len(x)):
        for start in range(0, out.shape[1], STRIP):
            for v in range(8):
                for i in range(LANES):
                    at = 4 * i + (v & 3)
                    column = start + 2 * (at & 48) + 16 * (v >> 2) + (at & 15)
                    if column < columns:
                        out[m, start + 16 * v + i] = x[m, column]


@compiled
def paired(source: Any, target: Any) -> None:
    """128 bytes in the order of columns as those of a strip."""
    for run in range(8):
        flipped(source + 16 * run, 0, target + 64 * (run & 1) + 16 * (run >> 1))
