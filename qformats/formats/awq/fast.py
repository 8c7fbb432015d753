"""AWQ GEMV_FAST and llm-awq: 16-bit words over tiles of 4 rows, and zero points stored as floats. Numpy only.

Sources: autoawq 0.2.9 ``modules/linear/gemv_fast.py`` (``pack_intweight``, ``from_linear``), gptqmodel 7.7.0
``nn_modules/qlinear/gemv_fast_awq.py``, whose ``LLMAwqLinear`` differs in the name of one tensor only.

Words: 4 rows x 64 columns are 64 words; word 16 r + 8 h + j holds row r, columns 32 h + j + (0 8 16 24), the first in the low bits.

Zero points: the tensor holds ``-(scale * z)`` rounded to the scales' dtype, so that the kernel's product is one multiply-add. Where every
stored number is what some z in 0 … 15 gives, bit for bit, those integers are the zero points: the file is what the writer makes of them.
Otherwise the numbers are offsets, ``W = scale * code + offset``. Beside a scale of 0 the zero point is 0: every z gives the same number.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

__all__ = ["SIGNS", "float_zeros", "integer_zeros", "pack_words", "unpack_words"]

SIGNS = ("minus", "plus")  # of a zero point of 0: -(scale * 0) is -0.0, other writers store +0.0


def _loops() -> ModuleType | None:
    try:
        from qformats.loops import tiles
    except ImportError:
        return None
    return tiles


def unpack_words(words: Array) -> Array:
    """int16 words (n / 4, K), K a multiple of 64 -> uint8 codes (n, K)."""
    loops = _loops()
    if loops is None:
        return unpack_words_definition(words)
    out = np.empty((words.shape[0] * 4, words.shape[1]), np.uint8)
    loops.unpack_fast(np.ascontiguousarray(words).view(np.uint16), out)
    return out


def unpack_words_definition(words: Array) -> Array:
    """``unpack_words`` in whole-array steps: what the compiled loop must equal."""
    rows, width = words.shape
    tiles = np.ascontiguousarray(words).view(np.uint16).reshape(rows, width // 64, 4, 2, 1, 8)
    fields = (tiles >> np.arange(0, 16, 4, dtype=np.uint16)[:, None]) & 15  # (n/4, K/64, 4 rows, 2, 4 fields, 8)
    return fields.transpose(0, 2, 1, 3, 4, 5).reshape(rows * 4, width).astype(np.uint8)


def pack_words(codes: Array) -> Array:
    """uint8 codes (n, K), n a multiple of 4 and K of 64 -> int16 words (n / 4, K)."""
    loops = _loops()
    if loops is None:
        return pack_words_definition(codes)
    out = np.empty((codes.shape[0] // 4, codes.shape[1]), np.uint16)
    loops.pack_fast(np.ascontiguousarray(codes), out)
    return out.view(np.int16)


def pack_words_definition(codes: Array) -> Array:
    """``pack_words`` in whole-array steps: what the compiled loop must equal."""
    rows, width = codes.shape[0] // 4, codes.shape[1]
    fields = codes.reshape(rows, 4, width // 64, 2, 4, 8).transpose(0, 2, 1, 3, 4, 5).astype(np.uint16)
    words = np.bitwise_or.reduce(fields << np.arange(0, 16, 4, dtype=np.uint16)[:, None], axis=-2)
    return np.ascontiguousarray(words.reshape(rows, width)).astype(np.uint16).view(np.int16)


def _wide(stored: Array) -> Array:
    """A float plane as float64; uint16 is bfloat16."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def _narrow(values: Array, like: Array) -> Array:
    """Float64 products of a stored number and a small integer rounded once to the dtype of ``like``."""
    if like.dtype != np.uint16:
        with np.errstate(over="ignore"):
            return values.astype(like.dtype)
    bits = values.astype(np.float32).view(np.uint32)  # exact: 8 + 4 significant bits
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def float_zeros(scales: Array, zeros: Array, sign: str) -> Array:
    """Zero points 0 … 15 as a writer stores them beside ``scales`` of the same shape: -(scale * z) in the scales' dtype."""
    product = _wide(scales) * zeros.astype(np.float64)
    return _narrow(np.where(zeros == 0, 0.0, -product) if sign == "plus" else -product, scales)


def integer_zeros(scales: Array, stored: Array) -> tuple[Array, str] | None:
    """Zero points uint8 and the sign of their 0 such that ``float_zeros`` gives ``stored`` bit for bit; None if there are none."""
    step = _wide(scales)
    if not np.isfinite(step).all():
        return None
    quotient = np.rint(np.divide(-_wide(stored), step, out=np.zeros(step.shape), where=step != 0))
    if not np.isfinite(quotient).all() or quotient.min(initial=0) < 0 or quotient.max(initial=0) > 15:
        return None
    zeros = quotient.astype(np.uint8)
    for sign in SIGNS:
        made = float_zeros(scales, zeros, sign)
        if np.array_equal(made.view(np.uint8), np.ascontiguousarray(stored).view(np.uint8)):
            return zeros, sign
    return None
