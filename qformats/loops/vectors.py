"""Sixteen float32 in one value, for loops that keep several sums in registers: ``+ - * / < > >= != & |`` and the functions below.

``Floats`` is LLVM's ``<16 x float>`` and ``Mask`` its ``<16 x i1>``; LLVM splits them into whatever the CPU has. Every lane is rounded
like a scalar: nothing is contracted or reordered. Only compiled code can use them. Of arrays: contiguous, any number of dimensions,
addressed by the element's number; indices are not checked.

Compiled loops are cached by the source file they stand in alone: who changes this file must delete the caches beside it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model
from numba.np.arrayobj import make_array

__all__ = [
    "LANES", "any_lane", "bytes_of", "greatest", "half", "least", "load", "magnitude", "nearest", "root", "splat", "store",
    "store_bytes", "where",
]  # fmt: skip

LANES = 16
_FLOATS, _BITS, _BYTES = (ir.VectorType(scalar, LANES) for scalar in (ir.FloatType(), ir.IntType(32), ir.IntType(8)))
_MAGIC = 12582912.0  # 1.5 * 2^23, see ``qformats.quantize.ksearch.nearest``


class _FloatsType(types.Type):  # type: ignore[misc,unused-ignore]
    """``Floats`` as numba's typing knows them."""


class _MaskType(types.Type):  # type: ignore[misc,unused-ignore]
    """``Mask`` as numba's typing knows it."""


floats, mask = _FloatsType("Floats16"), _MaskType("Mask16")


@register_model(_FloatsType)  # type: ignore[untyped-decorator,unused-ignore]
class _FloatsModel(models.PrimitiveModel):  # type: ignore[misc,unused-ignore]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


@register_model(_MaskType)  # type: ignore[untyped-decorator,unused-ignore]
class _MaskModel(models.PrimitiveModel):  # type: ignore[misc,unused-ignore]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), LANES))


def _operator(op: Callable[..., Any], of: Any, result: Any, build: Callable[[Any, Any, Any], Any]) -> None:
    """Teach numba ``op`` of two vectors ``of``."""

    @infer_global(op)  # type: ignore[untyped-decorator,unused-ignore]
    class Typing(ConcreteTemplate):  # type: ignore[misc,unused-ignore]
        cases = (signature(result, of, of),)

    @lower_builtin(op, of, of)  # type: ignore[untyped-decorator,unused-ignore]
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return build(builder, *args)


for _op, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _operator(_op, floats, floats, lambda builder, a, b, name=_name: getattr(builder, name)(a, b))  # type: ignore[misc]
for _op, _sign in ((operator.lt, "<"), (operator.gt, ">"), (operator.ge, ">="), (operator.le, "<="), (operator.eq, "==")):
    _operator(_op, floats, mask, lambda builder, a, b, sign=_sign: builder.fcmp_ordered(sign, a, b))  # type: ignore[misc]
_operator(operator.ne, floats, mask, lambda builder, a, b: builder.fcmp_unordered("!=", a, b))
_operator(operator.and_, mask, mask, lambda builder, a, b: builder.and_(a, b))
_operator(operator.or_, mask, mask, lambda builder, a, b: builder.or_(a, b))


def _constant(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * LANES)


def _pointer(context: Any, builder: Any, array: Any, value: Any, at: Any, kind: Any) -> Any:
    data = make_array(array)(context, builder, value).data
    return builder.bitcast(cgutils.pointer_add(builder, data, builder.mul(at, at.type(array.dtype.bitwidth // 8))), kind.as_pointer())


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def load(typing: Any, array: Any, at: Any) -> Any:
    """Elements ``at`` … ``at + 15`` of a float32 array."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where_ = context.cast(builder, args[1], sig.args[1], types.intp)
        return builder.load(_pointer(context, builder, sig.args[0], args[0], where_, _FLOATS), align=4)

    return floats(array, at), build


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def store(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """``value`` as elements ``at`` … ``at + 15`` of a float32 array."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where_ = context.cast(builder, args[1], sig.args[1], types.intp)
        builder.store(args[2], _pointer(context, builder, sig.args[0], args[0], where_, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(array, at, value), build


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def store_bytes(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """``value``, whole numbers of magnitude below 2^31, modulo 256 as elements ``at`` … ``at + 15`` of a uint8 array."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        where_ = context.cast(builder, args[1], sig.args[1], types.intp)
        narrow = builder.trunc(builder.fptosi(args[2], _BITS), _BYTES)
        builder.store(narrow, _pointer(context, builder, sig.args[0], args[0], where_, _BYTES), align=1)
        return context.get_dummy_value()

    return types.void(array, at, value), build


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def splat(typing: Any, value: Any) -> Any:
    """A float32 in every lane."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), args[0], ir.IntType(32)(0))
        return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), ir.Constant(_BITS, [0] * LANES))

    return floats(types.float32), build


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def where(typing: Any, condition: Any, yes: Any, no: Any) -> Any:
    """``yes`` in the lanes where ``condition`` holds, else ``no``."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return floats(mask, floats, floats), build


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def any_lane(typing: Any, condition: Any) -> Any:
    """Whether ``condition`` holds in any lane."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], ir.IntType(LANES)), ir.IntType(LANES)(0))

    return types.boolean(mask), build


def _folded(sign: str) -> Callable[..., Any]:
    """The one lane that is ``sign`` all others."""

    def typed(typing: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            v = args[0]
            for step in (8, 4, 2, 1):
                turned = ir.Constant(_BITS, [(i + step) % LANES for i in range(LANES)])
                other = builder.shuffle_vector(v, ir.Constant(_FLOATS, ir.Undefined), turned)
                v = builder.select(builder.fcmp_ordered(sign, other, v), other, v)
            return builder.extract_element(v, ir.IntType(32)(0))

        return types.float32(floats), build

    return typed


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def least(typing: Any, value: Any) -> Any:
    """The least of the lanes, none a NaN; of zeros either."""
    return _folded("<")(typing, value)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def greatest(typing: Any, value: Any) -> Any:
    """The greatest of the lanes, none a NaN; of zeros either."""
    return _folded(">")(typing, value)


def _called(name: str) -> Callable[..., Any]:
    def typed(typing: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.FunctionType(_FLOATS, [_FLOATS])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{LANES}f32"), args)

        return floats(floats), build

    return typed


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def magnitude(typing: Any, value: Any) -> Any:
    """|value|."""
    return _called("llvm.fabs")(typing, value)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def root(typing: Any, value: Any) -> Any:
    """The square root, correctly rounded."""
    return _called("llvm.sqrt")(typing, value)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def nearest(typing: Any, value: Any) -> Any:
    """``ksearch.nearest`` by the bits, as float32; a NaN that arithmetic made has only its top mantissa bit set and gives 0."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(builder.fadd(args[0], _constant(_FLOATS, _MAGIC)), _BITS)
        whole = builder.sub(builder.and_(bits, _constant(_BITS, 0x007FFFFF)), _constant(_BITS, 0x00400000))
        return builder.sitofp(whole, _FLOATS)

    return floats(floats), build


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def bytes_of(typing: Any, value: Any) -> Any:
    """Whole numbers of magnitude below 2^31 modulo 256."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(builder.and_(builder.fptosi(args[0], _BITS), _constant(_BITS, 255)), _FLOATS)

    return floats(floats), build


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def half(typing: Any, value: Any) -> Any:
    """The nearest float16, ties to even, as float32; beyond the largest float16 some number of that size."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits, magic = builder.bitcast(args[0], _BITS), _constant(_FLOATS, 0.75)  # 0.75 has the last bit 2^-24 of subnormal halves
        odd = builder.and_(builder.lshr(bits, _constant(_BITS, 13)), _constant(_BITS, 1))
        carried = builder.add(builder.add(bits, _constant(_BITS, 0xFFF)), odd)
        normal = builder.bitcast(builder.and_(carried, _constant(_BITS, 0xFFFFE000)), _FLOATS)
        size = builder.bitcast(builder.and_(bits, _constant(_BITS, 0x7FFFFFFF)), _FLOATS)
        small = builder.fcmp_ordered("<", size, _constant(_FLOATS, 2.0**-14))
        sign = builder.and_(bits, _constant(_BITS, 0x80000000))  # of a zero, too
        subnormal = builder.bitcast(builder.fsub(builder.fadd(size, magic), magic), _BITS)
        return builder.select(small, builder.bitcast(builder.or_(subnormal, sign), _FLOATS), normal)

    return floats(floats), build
