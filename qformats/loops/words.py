"""Compiled loops between packed words and uint8 codes. Serial, ``nogil``; numpy arrays in, output arrays as parameters.

Each loop equals a torch definition in ``qformats.bits`` (named in its docstring) and is tested equal to it. Eight codes travel as one
uint64, byte i = code i (little-endian), because eight codes are exactly ``bits`` bytes of the stream: spreading b-bit fields to bytes takes
three shift-and-mask steps, and so does the way back. Matrices are transposed through a buffer of 32 columns (two cache lines of
words), so that the strided side and the contiguous side stay in cache and the arithmetic runs over long contiguous runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from qformats.loops.compiled import compiled

__all__ = ["pack_columns", "pack_interleaved", "pack_pairs", "pack_rows", "unpack_columns", "unpack_interleaved", "unpack_rows"]

Array = np.ndarray[Any, Any]

_COLUMNS = 32  # uint32 words in two cache lines
_DEPTH = 1024  # words of one column in the transposing buffer: long runs, since each run costs as much to start as 64 bytes to move
_PITCH = _DEPTH + 16  # a cache line more, so that the columns of the buffer do not share cache sets


def _inline(function: Any) -> Any:
    return njit(inline="always", nogil=True, error_model="numpy")(function)


@_inline
def _steps(bits: int) -> Any:
    """Shift, low mask and high mask of each step: 8 -> 4 fields a 32-bit lane, 4 -> 2 a 16-bit lane, 2 -> 1 a byte."""
    one = np.uint64(1)
    four = (one << np.uint64(4 * bits)) - one
    two = ((one << np.uint64(2 * bits)) - one) * np.uint64(0x0000000100000001)
    single = ((one << np.uint64(bits)) - one) * np.uint64(0x0001000100010001)
    return np.uint64(32 - 4 * bits), four, np.uint64(16 - 2 * bits), two, np.uint64(8 - bits), single


@_inline
def _spread(x: Any, s1: Any, m1: Any, s2: Any, m2: Any, s3: Any, m3: Any) -> Any:
    """Eight b-bit fields of ``x`` (higher bits ignored) -> eight bytes."""
    x = (x & m1) | ((x << s1) & (m1 << np.uint64(32)))
    x = (x & m2) | ((x << s2) & (m2 << np.uint64(16)))
    return (x & m3) | ((x << s3) & (m3 << np.uint64(8)))


@_inline
def _gather(x: Any, s1: Any, m1: Any, s2: Any, m2: Any, s3: Any, m3: Any) -> Any:
    """Eight bytes -> eight b-bit fields in the low 8 b bits: the inverse of ``_spread``; higher bits of each byte are dropped."""
    x = (x & m3) | ((x & (m3 << np.uint64(8))) >> s3)
    x = (x & m2) | ((x & (m2 << np.uint64(16))) >> s2)
    return (x & m1) | ((x & (m1 << np.uint64(32))) >> s1)


@_inline
def _spread_line(source: Array, bits: int, target: Array) -> None:
    """uint32 stream ``source`` -> uint64 ``target``, eight codes each; ``source`` has two readable words beyond the last."""
    s1, m1, s2, m2, s3, m3 = _steps(bits)
    if bits == 4:
        for i in range(len(target)):
            x = np.uint64(source[i])
            x = (x | (x << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
            x = (x | (x << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
            target[i] = (x | (x << np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    elif bits == 8:
        for i in range(len(target)):
            target[i] = np.uint64(source[2 * i]) | (np.uint64(source[2 * i + 1]) << np.uint64(32))
    else:
        for i in range(len(target)):
            at = i * bits * 8
            word = at >> 5
            offset = np.uint64(at & 31)
            x = (np.uint64(source[word]) | (np.uint64(source[word + 1]) << np.uint64(32))) >> offset
            if bits == 7 and offset != np.uint64(0):
                x |= np.uint64(source[word + 2]) << (np.uint64(64) - offset)
            target[i] = _spread(x, s1, m1, s2, m2, s3, m3)


@_inline
def _gather_line(source: Array, bits: int, target: Array) -> None:
    """uint64 ``source``, eight codes each, a multiple of 32 / bits codes -> uint32 stream ``target``."""
    s1, m1, s2, m2, s3, m3 = _steps(bits)
    if bits == 4:
        for i in range(len(source)):
            x = source[i] & np.uint64(0x0F0F0F0F0F0F0F0F)
            x = (x | (x >> np.uint64(4))) & np.uint64(0x00FF00FF00FF00FF)
            x = (x | (x >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
            target[i] = np.uint32(x | (x >> np.uint64(16)))
    elif bits == 8:
        for i in range(len(source)):
            target[2 * i] = np.uint32(source[i] & np.uint64(0xFFFFFFFF))
            target[2 * i + 1] = np.uint32(source[i] >> np.uint64(32))
    else:
        held, word = 0, 0
        pending = np.uint64(0)
        for i in range(len(source)):
            x = _gather(source[i], s1, m1, s2, m2, s3, m3)
            pending |= x << np.uint64(held)
            spill = x >> np.uint64(64 - held) if held else np.uint64(0)
            held += 8 * bits
            while held >= 32:
                target[word] = np.uint32(pending & np.uint64(0xFFFFFFFF))
                pending = (pending >> np.uint64(32)) | (spill << np.uint64(32))
                spill = spill >> np.uint64(32)
                word += 1
                held -= 32


@compiled
def unpack_rows(words: Array, bits: int, out: Array) -> None:
    """uint32 words (n, W) -> uint64 (n, C), eight codes each: ``unpack_stream(words, bits, 8 * C)``."""
    width = words.shape[1]
    line = np.zeros(width + 2, np.uint32)
    for row in range(words.shape[0]):
        line[:width] = words[row]
        _spread_line(line, bits, out[row])


@compiled
def pack_rows(codes: Array, bits: int, out: Array) -> None:
    """uint64 (n, C), eight codes each -> uint32 words (n, C * bits / 4): ``pack_stream(codes, bits)``."""
    for row in range(codes.shape[0]):
        _gather_line(codes[row], bits, out[row])


@compiled
def pack_pairs(codes: Array, packed: Array) -> None:
    """uint8 (n, K) -> uint8 (n, K / 2): the low four bits of two codes, the first in the low half."""
    for row in range(packed.shape[0]):
        for i in range(packed.shape[1]):
            packed[row, i] = np.uint8((codes[row, 2 * i] & np.uint8(15)) | np.uint8(codes[row, 2 * i + 1] << np.uint8(4)))


@compiled
def unpack_columns(words: Array, step: int, height: int, bits: int, out: Array) -> None:
    """uint32 words (W, n), row r at ``words[r * step]`` -> uint64 (n, C), eight codes each: ``unpack_stream(words.T, bits, 8 * C)``."""
    width, chunks = out.shape
    span = _DEPTH * 4 // bits // 4 * 4  # chunks a tile: whole blocks of 32 codes
    buffer = np.zeros((_COLUMNS, _PITCH), np.uint32)
    for column in range(0, width, _COLUMNS):
        columns = min(_COLUMNS, width - column)
        for chunk in range(0, chunks, span):
            count = min(span, chunks - chunk)
            first = chunk * bits // 4
            for row in range(min((count * bits + 3) // 4, height - first)):
                at = (first + row) * step + column
                for j in range(columns):
                    buffer[j, row] = words[at + j]
            for j in range(columns):
                _spread_line(buffer[j], bits, out[column + j, chunk : chunk + count])


@compiled
def pack_columns(codes: Array, bits: int, out: Array) -> None:
    """uint64 (n, C), eight codes each -> uint32 words (C * bits / 4, n): ``pack_stream(codes, bits).T``."""
    width, chunks = codes.shape
    span = _DEPTH * 4 // bits // 4 * 4
    buffer = np.zeros((_COLUMNS, _PITCH), np.uint32)
    for column in range(0, width, _COLUMNS):
        columns = min(_COLUMNS, width - column)
        for chunk in range(0, chunks, span):
            count = min(span, chunks - chunk)
            first, depth = chunk * bits // 4, count * bits // 4
            for j in range(columns):
                _gather_line(codes[column + j, chunk : chunk + count], bits, buffer[j])
            for row in range(depth):
                for j in range(columns):
                    out[first + row, column + j] = buffer[j, row]


@compiled
def unpack_interleaved(words: Array, step: int, height: int, out: Array) -> None:
    """uint32 AWQ words (K, W), row r at ``words[r * step]`` -> uint8 (8 W, K): ``reorder(unpack_stream(…), AWQ_REVERSE).T``."""
    width = out.shape[0] // 8
    buffer = np.empty((_COLUMNS, _PITCH), np.uint32)
    for column in range(0, width, _COLUMNS):
        columns = min(_COLUMNS, width - column)
        for first in range(0, height, _DEPTH):
            depth = min(_DEPTH, height - first)
            for row in range(depth):
                at = (first + row) * step + column
                for j in range(columns):
                    buffer[j, row] = words[at + j]
            for j in range(columns):
                line = buffer[j]
                for field in range(8):
                    c = (field & 3) * 2 + (field >> 2)  # AWQ_ORDER[field]
                    shift = np.uint32(4 * field)
                    target = out[(column + j) * 8 + c, first : first + depth]
                    for k in range(depth):
                        target[k] = np.uint8((line[k] >> shift) & np.uint32(15))


@compiled
def pack_interleaved(codes: Array, out: Array) -> None:
    """uint8 (8 W, K) -> uint32 AWQ words (K, W): ``pack_stream(reorder(codes.T, AWQ_ORDER), 4)``."""
    height, width = out.shape
    buffer = np.empty((_COLUMNS, _PITCH), np.uint32)
    for column in range(0, width, _COLUMNS):
        columns = min(_COLUMNS, width - column)
        for first in range(0, height, _DEPTH):
            depth = min(_DEPTH, height - first)
            for j in range(columns):
                line = buffer[j]
                for field in range(8):
                    c = (field & 3) * 2 + (field >> 2)  # AWQ_ORDER[field]
                    shift = np.uint32(4 * field)
                    source = codes[(column + j) * 8 + c, first : first + depth]
                    if field == 0:
                        for k in range(depth):
                            line[k] = np.uint32(source[k] & np.uint8(15))
                    else:
                        for k in range(depth):
                            line[k] |= np.uint32(source[k] & np.uint8(15)) << shift
            for row in range(depth):
                for j in range(columns):
                    out[first + row, column + j] = buffer[j, row]
