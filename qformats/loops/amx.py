"""The matrix unit of x86 CPUs (AMX): 16 rows of weights times 16 inputs, 32 columns an instruction, as typed intrinsics for the loops.

Factors are bfloat16, products and sums float32 (Intel 64 manual, TDPBF16PS: each product exact, sums to the nearest, subnormal numbers
zero). A float32 is the exact sum of three bfloat16. A *tile* is 1024 bytes: for weights 16 rows of 32 columns; for inputs 16 pairs of
columns of 16 inputs each. Tiles of a strip lie one after the other. Addresses are those of arrays that the caller keeps alive.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from qformats.loops.lanes import _FEATURES, _FLOATS, _I8, _I32, _INTS, _X86, _at, _by_address, _called, _fma, _load, _splat
from qformats.loops.strips import _HALF, many_bytes
from qformats.loops.vectors import floats

__all__ = [
    "LINE", "TILE", "available", "columns_of", "configure", "fetch", "keep_tiles", "laid_codes", "laid_columns", "laid_inputs",
    "laid_values", "piece_products", "release", "settle", "turned",
]  # fmt: skip

TILE = 1024
LINE = 64  # bytes of a row of a tile
_NEEDED = ("amx-tile", "amx-bf16", "avx512f", "avx512bw")
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18  # Linux, arch/x86/include/uapi/asm/prctl.h: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
PAIRS = (((0, 0),), ((0, 0), (0, 1), (0, 2)), ((0, 0), (1, 0), (2, 0)), ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2)))
"""Which parts of weights and inputs are multiplied, by 2 [weights of three parts] + [inputs of three parts]; the rest is below float32."""


@cache
def available() -> bool:
    """Whether this process may use the unit: the CPU has it, and the kernel (Linux) grants its registers."""
    if not _X86 or sys.platform != "linux" or not all(_FEATURES.get(name) for name in _NEEDED):
        return False
    try:
        return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0)
    except (OSError, AttributeError):
        return False


def columns_of(strips: bool) -> Any:
    """Which of 32 columns a tile has at each place, int64 (32,); ``strips``: as ``laid_codes`` and ``laid_values`` lay them."""
    if not strips:
        return np.arange(32).reshape(2, 16).T.reshape(-1).copy()
    return np.concatenate([first + np.arange(start, 16, 2) for first in (0, 16) for start in (0, 1)])


# ---------------------------------------------------------------- the unit's state


def _unit(builder: Any, name: str, *args: Any) -> None:
    function = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.x86.{name}"), args)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I8.as_pointer())


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def configure(typing: Any, wanted: Any, held: Any) -> Any:
    """Shape the tiles as 64 bytes say and keep the shapes that this thread had in 64 others."""

    def made(builder: Any, wanted: Any, held: Any) -> None:
        _unit(builder, "sttilecfg", _pointer(builder, held))
        _unit(builder, "ldtilecfg", _pointer(builder, wanted))

    return _by_address(types.void, (types.intp, types.intp), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def release(typing: Any, held: Any) -> Any:
    """Give the thread back the shapes that it had, or none."""

    def made(builder: Any, held: Any) -> None:
        had = builder.icmp_unsigned("!=", builder.load(_pointer(builder, held)), _I8(0))
        with builder.if_else(had) as (some, none):
            with some:
                _unit(builder, "ldtilecfg", _pointer(builder, held))
            with none:
                _unit(builder, "tilerelease")

    return _by_address(types.void, (types.intp,), made)


# ---------------------------------------------------------------- weights


def _shuffled(builder: Any, a: Any, b: Any, index: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(index)), index))


def _put_lines(builder: Any, vectors: list[Any], target: Any) -> None:
    """Of four vectors the fourths number r, one after the other, to the line at ``target + TILE r``."""
    n = vectors[0].type.count
    quarter = n // 4
    for half in (0, 1):
        index = [side * n + r * quarter + i for r in (2 * half, 2 * half + 1) for side in (0, 1) for i in range(quarter)]
        first, second = (_shuffled(builder, a, b, index) for a, b in (vectors[:2], vectors[2:]))
        for j in (0, 1):
            line = _shuffled(builder, first, second, [side * n + 2 * quarter * j + i for side in (0, 1) for i in range(2 * quarter)])
            at = builder.add(target, target.type((2 * half + j) * TILE))
            builder.store(line, _at(builder, at, line.type), align=64)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def laid_codes(typing: Any, first: Any, second: Any, table: Any, target: Any) -> Any:
    """A strip of codes below 32 as one line of each of its four tiles; ``table``: the address of 32 bfloat16."""

    def made(builder: Any, first: Any, second: Any, table: Any, target: Any) -> None:
        entries, found = _load(builder, table, _HALF), []
        for codes in (first, second):
            even = builder.bitcast(codes, _HALF)
            for index in (even, builder.lshr(even, ir.Constant(_HALF, [8] * 32))):
                found.append(_called(builder, "llvm.x86.avx512.permvar.hi.512", _HALF, entries, index))
        _put_lines(builder, found, target)

    return _by_address(types.void, (many_bytes, many_bytes, types.intp, types.intp), made)


def _parts(builder: Any, value: Any, count: int) -> list[Any]:
    """A vector of float32 as ``count`` bfloat16 in the upper halves of integers; the lower halves hold anything."""
    upper, found = ir.Constant(_INTS, [0xFFFF0000] * 16), []
    for number in range(count):
        bits = builder.bitcast(value, _INTS)
        found.append(bits)
        if number + 1 < count:
            part = builder.bitcast(builder.and_(bits, upper), _FLOATS)
            rest = builder.fsub(value, part)
            magnitude = builder.and_(bits, ir.Constant(_INTS, [0x7FFFFFFF] * 16))
            infinite = builder.icmp_unsigned("==", magnitude, ir.Constant(_INTS, [0x7F800000] * 16))
            value = builder.select(infinite, ir.Constant(_FLOATS, [0.0] * 16), rest)
    return found


def _paired(builder: Any, low: Any, high: Any) -> Any:
    """The upper halves of two vectors of integers, side by side."""
    upper = ir.Constant(_INTS, [0xFFFF0000] * 16)
    return builder.or_(builder.lshr(low, ir.Constant(_INTS, [16] * 16)), builder.and_(high, upper))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator,unused-ignore]
def laid_values(typing: Any, parts: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, target: Any, step: Any) -> Any:
    """A strip of float32 in word order as one line of each of its four tiles; further parts ``step`` bytes on."""
    count = parts.literal_value

    def made(builder: Any, _: Any, *args: Any) -> None:
        *values, target, step = args
        split = [_parts(builder, value, count) for value in values]
        for number in range(count):
            one = [parts[number] for parts in split]
            pairs = [_paired(builder, one[low], one[high]) for low, high in ((0, 2), (1, 3), (4, 6), (5, 7))]
            _put_lines(builder, pairs, builder.add(target, builder.mul(step, step.type(number))))

    return _by_address(types.void, (parts, *(floats,) * 8, types.intp, types.intp), made)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator,unused-ignore]
def laid_columns(typing: Any, parts: Any, source: Any, target: Any, step: Any) -> Any:
    """32 float32 in the order of columns as one line of a tile; further parts ``step`` bytes on."""
    count = parts.literal_value

    def made(builder: Any, _: Any, source: Any, target: Any, step: Any) -> None:
        low, high = (_parts(builder, _load(builder, builder.add(source, source.type(side)), _FLOATS), count) for side in (0, 64))
        for number in range(count):
            at = builder.add(target, builder.mul(step, step.type(number)))
            builder.store(_paired(builder, low[number], high[number]), _at(builder, at, _INTS), align=64)

    return _by_address(types.void, (parts, types.intp, types.intp, types.intp), made)


# ---------------------------------------------------------------- inputs and results


def _turned(builder: Any, lines: list[Any]) -> list[Any]:
    """Sixteen vectors of sixteen as their columns."""
    zips = [[half * 8 + i // 2 + 16 * (i % 2) for i in range(16)] for half in (0, 1)]
    for _ in range(4):
        lines = [_shuffled(builder, lines[i // 2], lines[i // 2 + 8], zips[i % 2]) for i in range(16)]
    return lines


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator,unused-ignore]
def laid_inputs(typing: Any, parts: Any, strips: Any, source: Any, row: Any, target: Any, step: Any) -> Any:
    """32 columns of 16 inputs, float32, ``row`` bytes apart, to a tile; further parts ``step`` bytes on; ``strips``: see ``columns_of``."""
    count, order = parts.literal_value, columns_of(bool(strips.literal_value))

    def made(builder: Any, _1: Any, _2: Any, source: Any, row: Any, target: Any, step: Any) -> None:
        pairs: list[list[Any]] = []
        for m in range(16):
            start = builder.add(source, builder.mul(row, row.type(m)))
            low, high = (_load(builder, builder.add(start, start.type(side)), _FLOATS) for side in (0, 64))
            first, second = (_parts(builder, _shuffled(builder, low, high, [int(i) for i in order[side::2]]), count) for side in (0, 1))
            pairs.append([_paired(builder, a, b) for a, b in zip(first, second, strict=True)])
        for number in range(count):
            at = builder.add(target, builder.mul(step, step.type(number)))
            for i, line in enumerate(_turned(builder, [one[number] for one in pairs])):
                builder.store(line, _at(builder, builder.add(at, at.type(LINE * i)), _INTS), align=64)

    return _by_address(types.void, (parts, strips, *(types.intp,) * 4), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def turned(typing: Any, source: Any, target: Any) -> Any:
    """The columns of a tile of float32 as the lines of another."""

    def made(builder: Any, source: Any, target: Any) -> None:
        lines = [_load(builder, builder.add(source, source.type(LINE * i)), _FLOATS) for i in range(16)]
        for i, line in enumerate(_turned(builder, lines)):
            builder.store(line, _at(builder, builder.add(target, target.type(LINE * i)), _FLOATS), align=64)

    return _by_address(types.void, (types.intp, types.intp), made)


# ---------------------------------------------------------------- products


def _far(builder: Any, start: Any, *terms: Any) -> Any:
    """An address and what is added to it, integers or values."""
    for term in terms:
        start = builder.add(start, term if isinstance(term, ir.Value) else start.type(term))
    return start


def _tile(builder: Any, name: str, number: int, address: Any) -> None:
    _unit(builder, name, _I8(number), _pointer(builder, address), address.type(LINE))


def _multiplied(builder: Any, three: int, to: int, weights: Any, w_step: Any, inputs: Any, x_step: Any) -> None:
    """Add the products of a tile of weights and one of inputs to tile ``to``; 4, 5, 6 hold weights, 7 inputs."""
    pairs = PAIRS[three]
    for part in sorted({w for w, _ in pairs}):
        _tile(builder, "tileloadd64", 4 + part, _far(builder, weights, builder.mul(w_step, w_step.type(part))))
    for part in sorted({x for _, x in pairs}):
        _tile(builder, "tileloadd64", 7, _far(builder, inputs, builder.mul(x_step, x_step.type(part))))
        for w, x in pairs:
            if x == part:
                _unit(builder, "tdpbf16ps", _I8(to), _I8(4 + w), _I8(7))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator,unused-ignore]
def piece_products(typing: Any, to: Any, three: Any, each: Any, weights: Any, w_step: Any, inputs: Any, x_step: Any) -> Any:
    """16 rows times 16 inputs, a *piece* of a strip: all of it, or two groups. The sum of group number j is tile ``to`` + j.

    ``three``: see ``PAIRS``. ``weights``, ``inputs``: addresses of the first tiles, further parts ``w_step`` and ``x_step`` on.
    """
    first, pairs, groups = to.literal_value, three.literal_value, min(2, each.literal_value)
    tall = LINE // 2 if each.literal_value == 8 else TILE  # an eighth of a strip is half a tile
    count = 2 if each.literal_value > 2 else 4

    def made(builder: Any, _1: Any, _2: Any, _3: Any, weights: Any, w_step: Any, inputs: Any, x_step: Any) -> None:
        for j in range(groups):
            _unit(builder, "tilezero", _I8(first + j))
        for j in range(count):
            right = j * (TILE if tall == TILE else TILE // 2)
            at = _far(builder, weights, j * tall), w_step, _far(builder, inputs, right), x_step
            _multiplied(builder, pairs, first + j * groups // count, *at)

    return _by_address(types.void, (to, three, each, *(types.intp,) * 4), made)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator,unused-ignore]
def keep_tiles(typing: Any, to: Any, each: Any, room: Any) -> Any:
    """Store what ``piece_products`` made, a row of 16 inputs to a line."""
    first, groups = to.literal_value, min(2, each.literal_value)

    def made(builder: Any, _1: Any, _2: Any, room: Any) -> None:
        for j in range(groups):
            _tile(builder, "tilestored64", first + j, _far(builder, room, j * TILE))

    return _by_address(types.void, (to, each, types.intp), made)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator,unused-ignore]
def settle(
    typing: Any, each: Any, scaled: Any, beside: Any, room: Any, scales: Any, rests: Any, row: Any, sums: Any, total: Any
) -> Any:
    """Add what ``keep_tiles`` left in ``room`` to the tile of float32 at ``total``.

    ``scales``, ``rests``: float32 (16, at most two), ``row`` bytes apart. A sum counts its scale where ``scaled`` is set; rests times
    ``sums`` (at most two, 16) are added where ``beside`` is.
    """
    groups = min(2, each.literal_value)
    scales_, beside_ = bool(scaled.literal_value), bool(beside.literal_value)

    def made(b: Any, _1: Any, _2: Any, _3: Any, room: Any, scales: Any, rests: Any, row: Any, sums: Any, total: Any) -> None:
        added = [_load(b, _far(b, sums, LINE * j), _FLOATS) for j in range(groups)] if beside_ else []

        def number(start: Any, r: int, j: int) -> Any:
            at = _far(b, start, b.mul(row, row.type(r)), 4 * j)
            return _splat(b, b.load(_at(b, at, ir.FloatType()), align=4), _FLOATS)

        for r in range(16):
            at = _at(b, _far(b, total, r * LINE), _FLOATS)
            sum_ = b.load(at, align=64)
            for j in range(groups):
                line = _load(b, _far(b, room, j * TILE + r * LINE), _FLOATS)
                sum_ = _fma(b, line, number(scales, r, j), sum_) if scales_ else b.fadd(line, sum_)
            for j, one in enumerate(added):
                sum_ = _fma(b, number(rests, r, j), one, sum_)
            b.store(sum_, at, align=64)

    return _by_address(types.void, (each, scaled, beside, *(types.intp,) * 6), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def fetch(typing: Any, address: Any) -> Any:
    """Ask for the line at an address; nothing happens if there is none."""

    def made(builder: Any, address: Any) -> None:
        where = _pointer(builder, address)
        kind = ir.FunctionType(ir.VoidType(), [where.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [where, _I32(0), _I32(3), _I32(1)])

    return _by_address(types.void, (types.intp,), made)
