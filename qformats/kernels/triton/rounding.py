"""Constants of specs inside kernels, and rounding: to odd, and once to a kernel's dtype.

Under Triton's interpreter bfloat16 arithmetic, its conversion and a fused multiply-add are not what a GPU does (Triton 3.6): there values
are rounded by integer operations, kept in float32, and a product's error is found in float64.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, assignment, var-annotated"
# ruff: noqa: SIM300 (of Python, kernels know little)
from __future__ import annotations

import triton
import triton.language as tl

from qformats.kernels.triton.spec import FLOATS

__all__ = [
    "EMULATED", "below", "float_rule", "lowest", "mirrored", "odd_product", "odd_quotient", "odd_single", "odd_sum",
    "of", "pick", "rounded", "size", "stepped", "stored",
]  # fmt: skip

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
def float_rule(name):
    return FLOATS[name]


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
def odd_product(a, b):
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
def odd_sum(a, b):
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
def odd_quotient(value, divisor):
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
def odd_single(value):
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
def stepped(value, ROUNDED: tl.constexpr):
    """A step of a parameter whose owner rounds each to that dtype."""
    if ROUNDED == "float16":
        made = rounded(value, tl.float16).to(tl.float32)
    elif ROUNDED == "bfloat16":
        made = rounded(value, tl.bfloat16).to(tl.float32)
    else:
        made = value
    return made
