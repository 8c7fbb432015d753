"""What the products with packed weights are made of: sixteen columns at a time, read and written by address.

``Floats`` is the type of ``qformats.loops.vectors``. Addresses are those of arrays that the caller keeps alive; nothing is checked. Every
lane is rounded like a scalar. Only compiled code can use these functions; LLVM splits the vectors into whatever the CPU has. Products
of bytes alone look at the CPU: they take its instruction where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, codegen, config, types
from numba.extending import intrinsic

from qformats.loops.vectors import LANES, floats

__all__ = [
    "FUSED",
    "HALVES",
    "alive",
    "as_floats",
    "call",
    "divided",
    "doubles",
    "flipped",
    "floats_at",
    "fma",
    "halves",
    "line",
    "look_up",
    "merge",
    "pointer",
    "put",
    "shorts_at",
    "signed_at",
    "signed_line",
    "singles_at",
    "spread",
    "times",
    "total",
    "unsigned_at",
]  # fmt: skip

_I8, _I32, _F32, _F64 = ir.IntType(8), ir.IntType(32), ir.FloatType(), ir.DoubleType()
_FLOATS, _DOUBLES, _INTS, _BYTES = (ir.VectorType(kind, LANES) for kind in (_F32, _F64, _I32, _I8))
_LONG = ir.VectorType(_I8, 4 * LANES)


def _features() -> dict[str, bool]:
    """What numba compiles for: the CPU of this machine, or what its settings NUMBA_CPU_NAME, NUMBA_CPU_FEATURES, NUMBA_ENABLE_AVX say."""
    text = config.CPU_FEATURES
    if text is None:
        text = "" if config.CPU_NAME else codegen.get_host_cpu_features()
    return {name[1:]: True for name in text.split(",") if name.startswith("+")}


_FEATURES = _features()
_X86 = "x86_64" in binding.get_default_triple()

FUSED = not _X86 or bool(_FEATURES.get("fma"))
"""Whether a product and a sum are rounded once by one instruction; without it ``fma`` is a slow call."""

Build = Callable[..., Any]


def _by_address(result: Any, kinds: tuple[Any, ...], made: Build) -> Any:
    """A typed intrinsic; ``made`` gets the builder and values: integers as intp, floats as they are."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = [context.cast(builder, value, kind, wanted) for value, kind, wanted in zip(args, sig.args, kinds, strict=True)]
        found = made(builder, *values)
        return context.get_dummy_value() if found is None else found

    return result(*kinds), build


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(_at(builder, address, kind), align=1)


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count))


def _called(builder: Any, name: str, kind: Any, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [arg.type for arg in args]), name)
    return builder.call(function, args)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _called(builder, f"llvm.fma.v{LANES}f32", _FLOATS, a, b, c)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def pointer(typing: Any, address: Any) -> Any:
    """The address as what ``numba.carray`` takes."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), build


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def alive(typing: Any, array: Any) -> Any:
    """Nothing; but ``array`` is used here. numba frees what a function made after its last use, which taking the address may be."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), build


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def call(typing: Any, address: Any, frame: Any) -> Any:
    """What the function at ``address`` (of ``qformats.loops.compiled.pointed``) makes of the address ``frame``, float32."""

    def made(builder: Any, address: Any, frame: Any) -> Any:
        function = ir.FunctionType(_F32, [frame.type])
        return builder.call(builder.inttoptr(address, function.as_pointer()), [frame])

    return _by_address(types.float32, (types.intp, types.intp), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def floats_at(typing: Any, address: Any) -> Any:
    """Sixteen float32."""
    return _by_address(floats, (types.intp,), lambda b, at: _load(b, at, _FLOATS))


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def unsigned_at(typing: Any, address: Any) -> Any:
    """Sixteen uint8 as float32."""
    return _by_address(floats, (types.intp,), lambda b, at: b.sitofp(b.zext(_load(b, at, _BYTES), _INTS), _FLOATS))


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def signed_at(typing: Any, address: Any) -> Any:
    """Sixteen int8 as float32."""
    return _by_address(floats, (types.intp,), lambda b, at: b.sitofp(_load(b, at, _BYTES), _FLOATS))


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def shorts_at(typing: Any, address: Any) -> Any:
    """Sixteen float16 as float32; only where ``HALVES`` is set."""
    return _by_address(floats, (types.intp,), lambda b, at: b.fpext(_load(b, at, ir.VectorType(ir.HalfType(), LANES)), _FLOATS))


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def singles_at(typing: Any, address: Any) -> Any:
    """Sixteen bfloat16 as float32."""

    def made(builder: Any, at: Any) -> Any:
        wide = builder.zext(_load(builder, at, ir.VectorType(ir.IntType(16), LANES)), _INTS)
        return builder.bitcast(builder.shl(wide, ir.Constant(_INTS, [16] * LANES)), _FLOATS)

    return _by_address(floats, (types.intp,), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def put(typing: Any, address: Any, value: Any) -> Any:
    """Store sixteen float32."""
    return _by_address(types.void, (types.intp, floats), lambda b, at, v: b.store(v, _at(b, at, _FLOATS), align=1) and None)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def as_floats(typing: Any, value: Any) -> Any:
    """A float32 in every lane."""
    return _by_address(floats, (types.float32,), lambda b, v: _splat(b, v, _FLOATS))


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once."""
    return _by_address(floats, (floats, floats, floats), _fma)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def total(typing: Any, value: Any) -> Any:
    """The sum of the lanes, in halves: always in the same order."""

    def made(builder: Any, v: Any) -> Any:
        for step in (8, 4, 2, 1):
            turned = ir.Constant(_INTS, [(i + step) % LANES for i in range(LANES)])
            v = builder.fadd(v, builder.shuffle_vector(v, ir.Constant(_FLOATS, ir.Undefined), turned))
        return builder.extract_element(v, _I32(0))

    return _by_address(types.float32, (floats,), made)


# ---------------------------------------------------------------- codes


def _field(builder: Any, source: Any, shift: Any, mask: Any) -> Any:
    shift, mask = (_splat(builder, builder.trunc(value, _I8), _BYTES) for value in (shift, mask))
    return builder.and_(builder.lshr(_load(builder, source, _BYTES), shift), mask)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def spread(typing: Any, source: Any, shift: Any, mask: Any, target: Any) -> Any:
    """Of sixteen bytes ``byte >> shift & mask`` to sixteen bytes."""

    def made(builder: Any, source: Any, shift: Any, mask: Any, target: Any) -> Any:
        builder.store(_field(builder, source, shift, mask), _at(builder, target, _BYTES), align=1)

    return _by_address(types.void, (types.intp,) * 4, made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def merge(typing: Any, source: Any, shift: Any, mask: Any, left: Any, target: Any) -> Any:
    """The same, shifted left, or'ed to the bytes that are there."""

    def made(builder: Any, source: Any, shift: Any, mask: Any, left: Any, target: Any) -> Any:
        moved = builder.shl(_field(builder, source, shift, mask), _splat(builder, builder.trunc(left, _I8), _BYTES))
        builder.store(builder.or_(moved, _load(builder, target, _BYTES)), _at(builder, target, _BYTES), align=1)

    return _by_address(types.void, (types.intp,) * 5, made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def flipped(typing: Any, source: Any, bits: Any, target: Any) -> Any:
    """Sixteen bytes with ``bits`` of each flipped to sixteen bytes."""

    def made(builder: Any, source: Any, bits: Any, target: Any) -> Any:
        found = builder.xor(_load(builder, source, _BYTES), _splat(builder, builder.trunc(bits, _I8), _BYTES))
        builder.store(found, _at(builder, target, _BYTES), align=1)

    return _by_address(types.void, (types.intp,) * 3, made)


def _picked(builder: Any, entries: Any, index: Any, kind: Any) -> Any:
    """``entries[index]`` lane by lane, one element after the other."""
    made = ir.Constant(kind, ir.Undefined)
    for lane in range(kind.count):
        made = builder.insert_element(made, builder.extract_element(entries, builder.extract_element(index, _I32(lane))), _I32(lane))
    return made


def _named_floats(builder: Any, table: Any, index: Any) -> Any:
    """Entries of a table of sixteen floats by sixteen integers."""
    if _X86 and _FEATURES.get("avx512f"):
        return _called(builder, "llvm.x86.avx512.permvar.sf.512", _FLOATS, table, index)
    if not (_X86 and _FEATURES.get("avx2")):
        return _picked(builder, table, index, _FLOATS)
    eight, words = ir.VectorType(_F32, 8), ir.VectorType(_I32, 8)

    def half(vector: Any, first: int) -> Any:
        return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), ir.Constant(words, list(range(first, first + 8))))

    parts = []
    for first in (0, 8):
        names = half(index, first)
        low, high = (_called(builder, "llvm.x86.avx2.permps", eight, half(table, side), names) for side in (0, 8))
        parts.append(builder.select(builder.icmp_unsigned(">", names, ir.Constant(words, [7] * 8)), high, low))
    return builder.shuffle_vector(*parts, ir.Constant(_INTS, list(range(LANES))))


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def look_up(typing: Any, codes: Any, table: Any) -> Any:
    """Of sixteen bytes below 16 the entries of a table of sixteen float32."""

    def made(builder: Any, codes: Any, table: Any) -> Any:
        index = builder.and_(builder.zext(_load(builder, codes, _BYTES), _INTS), ir.Constant(_INTS, [15] * LANES))
        return _named_floats(builder, _load(builder, table, _FLOATS), index)

    return _by_address(floats, (types.intp, types.intp), made)


# ---------------------------------------------------------------- parameters in float64


HALVES = not _X86 or bool(_FEATURES.get("f16c"))
"""Whether the CPU reads float16; without it ``halves`` is no function that LLVM knows."""


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def halves(typing: Any, source: Any, target: Any) -> Any:
    """Sixteen float16 to sixteen float64."""

    def made(builder: Any, source: Any, target: Any) -> Any:
        single = builder.fpext(_load(builder, source, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)
        builder.store(builder.fpext(single, _DOUBLES), _at(builder, target, _DOUBLES), align=1)

    return _by_address(types.void, (types.intp, types.intp), made)


def _on_line(signed: bool) -> Any:
    def made(builder: Any, source: Any, step: Any, start: Any, target: Any) -> Any:
        stored = _load(builder, source, _BYTES)
        wide = builder.sitofp((builder.sext if signed else builder.zext)(stored, _INTS), _DOUBLES)
        found = builder.fadd(builder.fmul(wide, _splat(builder, step, _DOUBLES)), _splat(builder, start, _DOUBLES))
        builder.store(found, _at(builder, target, _DOUBLES), align=1)

    return _by_address(types.void, (types.intp, types.float64, types.float64, types.intp), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def line(typing: Any, source: Any, step: Any, start: Any, target: Any) -> Any:
    """Of sixteen uint8 ``byte step + start``, both steps in float64, to sixteen float64."""
    return _on_line(False)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def signed_line(typing: Any, source: Any, step: Any, start: Any, target: Any) -> Any:
    """The same of sixteen int8."""
    return _on_line(True)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def times(typing: Any, target: Any, factor: Any) -> Any:
    """Multiply eight float64."""
    eight = ir.VectorType(_F64, 8)

    def made(builder: Any, target: Any, factor: Any) -> Any:
        found = builder.fmul(_load(builder, target, eight), _splat(builder, factor, eight))
        builder.store(found, _at(builder, target, eight), align=1)

    return _by_address(types.void, (types.intp, types.float64), made)


# ---------------------------------------------------------------- weights in float64


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def doubles(typing: Any, value: Any, zero: Any, scale: Any, offset: Any) -> Any:
    """(value - zero) scale + offset, each step in float64, then float32."""

    def made(builder: Any, value: Any, zero: Any, scale: Any, offset: Any) -> Any:
        zero, scale, offset = (_splat(builder, number, _DOUBLES) for number in (zero, scale, offset))
        centred = builder.fsub(builder.fpext(value, _DOUBLES), zero)
        return builder.fptrunc(builder.fadd(builder.fmul(centred, scale), offset), _FLOATS)

    return _by_address(floats, (floats, types.float64, types.float64, types.float64), made)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def divided(typing: Any, value: Any, zero: Any, scale: Any, divisor: Any) -> Any:
    """(value - zero) scale / divisor, each step in float64, then float32."""

    def made(builder: Any, value: Any, zero: Any, scale: Any, divisor: Any) -> Any:
        zero, scale, divisor = (_splat(builder, number, _DOUBLES) for number in (zero, scale, divisor))
        centred = builder.fsub(builder.fpext(value, _DOUBLES), zero)
        return builder.fptrunc(builder.fdiv(builder.fmul(centred, scale), divisor), _FLOATS)

    return _by_address(floats, (floats, types.float64, types.float64, types.float64), made)


# ---------------------------------------------------------------- bytes times bytes


def _instruction() -> str:
    """The LLVM name of the product of 64 unsigned and 64 signed bytes, four to a lane; ``""`` where the CPU has none."""
    return "llvm.x86.avx512.vpdpbusd.512" if _X86 and _FEATURES.get("avx512vnni") else ""


def _products(builder: Any, codes: Any, x: Any, start: Any = None) -> Any:
    """``start`` (None: nothing) plus sums of four products of an unsigned and a signed byte, in 16 lanes."""
    name = _instruction()
    if name:
        start = ir.Constant(_INTS, [0] * LANES) if start is None else start
        if binding.llvm_version_info[0] >= 22:
            return _called(builder, name, _INTS, start, codes, x)
        return _called(builder, name, _INTS, start, builder.bitcast(codes, _INTS), builder.bitcast(x, _INTS))
    half = ir.VectorType(ir.IntType(16), 4 * LANES)
    pair = ir.VectorType(_I32, 2 * LANES)
    wide, other = builder.zext(codes, half), builder.sext(x, half)
    sides = []
    for first in (0, 1):  # even columns, then odd ones: what LLVM makes one multiply-and-add of pairs of
        index = ir.Constant(pair, list(range(first, 4 * LANES, 2)))
        a, b = (builder.sext(builder.shuffle_vector(v, ir.Constant(half, ir.Undefined), index), pair) for v in (wide, other))
        sides.append(builder.mul(a, b))
    both = builder.add(*sides)
    even, odd = (
        builder.shuffle_vector(both, ir.Constant(pair, ir.Undefined), ir.Constant(_INTS, list(range(first, 2 * LANES, 2))))
        for first in (0, 1)
    )
    found = builder.add(even, odd)
    return found if start is None else builder.add(start, found)
