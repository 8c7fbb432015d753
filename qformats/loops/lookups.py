"""Four-bit codes, two a byte, looked up eight bytes at a time. Only compiled code can use it.

LLVM has no instruction for a table of one's own; elements picked one by one out of a vector of eight 32-bit words are what it makes one
permutation of (``vpermd`` since AVX2), and loads elsewhere.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

__all__ = ["LANES", "look_up"]

LANES = 8
_WORD = ir.IntType(32)
_WORDS, _BYTES = ir.VectorType(_WORD, LANES), ir.VectorType(ir.IntType(8), LANES)


def _pointer(context: Any, builder: Any, array: Any, value: Any, at: Any, kind: Any) -> Any:
    data = make_array(array)(context, builder, value).data
    return builder.bitcast(cgutils.pointer_add(builder, data, builder.mul(at, at.type(array.dtype.bitwidth // 8))), kind.as_pointer())


def _all(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)


def _permuted(builder: Any, words: Any, index: Any) -> Any:
    """The words that ``index`` names, lane by lane."""
    made = ir.Constant(_WORDS, ir.Undefined)
    for lane in range(LANES):
        at = builder.extract_element(index, _WORD(lane))
        made = builder.insert_element(made, builder.extract_element(words, at), _WORD(lane))
    return made


def _picked(builder: Any, halves: list[Any], codes: Any) -> Any:
    """The entries of a table of sixteen words, in two halves, that ``codes`` name."""
    index = builder.and_(codes, _all(LANES - 1))
    low, high = (_permuted(builder, half, index) for half in halves)
    return builder.select(builder.icmp_unsigned(">", codes, _all(LANES - 1)), high, low)


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def look_up(typing: Any, packed: Any, at: Any, table: Any, out: Any) -> Any:
    """Of the bytes ``packed[at : at + 8]`` (uint8) the entries of both nibbles to the words ``out[at : at + 8]``.

    ``table`` uint32 (16,) holds numbers of 16 bits; the high nibble's goes to a word's low half. Arrays are contiguous; indices are not
    checked.
    """

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kinds, place = sig.args, context.cast(builder, args[1], sig.args[1], types.intp)
        source = builder.zext(builder.load(_pointer(context, builder, kinds[0], args[0], place, _BYTES), align=1), _WORDS)
        halves = [
            builder.load(_pointer(context, builder, kinds[2], args[2], place.type(first), _WORDS), align=4) for first in (0, LANES)
        ]
        first, second = (_picked(builder, halves, codes) for codes in (builder.lshr(source, _all(4)), builder.and_(source, _all(15))))
        both = builder.or_(first, builder.shl(second, _all(16)))
        builder.store(both, _pointer(context, builder, kinds[3], args[3], place, _WORDS), align=4)
        return context.get_dummy_value()

    return types.void(packed, at, table, out), build
