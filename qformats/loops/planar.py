"""Compiled loops between planar words and uint8 codes. Serial, ``nogil``; numpy arrays in, output arrays as parameters.

They equal ``qformats.bits.unpack_planar_definition`` and ``pack_planar_definition``. A block of 32 codes is four uint64 of eight codes;
of those a plane of four bits holds a word, one of two bits half a word and one of one bit a byte. Matrices are transposed as in
``qformats.loops.words``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from qformats.loops.compiled import compiled
from qformats.loops.half import FILL, GATHER, ONES, PICK

__all__ = ["pack_columns", "pack_rows", "unpack_columns", "unpack_rows"]

Array = np.ndarray[Any, Any]
u32, u64 = np.uint32, np.uint64

_COLUMNS = 32
_BLOCKS = 128  # of 32 codes in the transposing buffer
_PITCH = _BLOCKS * 7 + 16


def _inline(function: Any) -> Any:
    return njit(inline="always", nogil=True, error_model="numpy")(function)


@_inline
def _fours(x: Any) -> Any:
    """32 bits -> eight bytes of four."""
    x = (x | (x << u64(16))) & u64(0x0000FFFF0000FFFF)
    x = (x | (x << u64(8))) & u64(0x00FF00FF00FF00FF)
    return (x | (x << u64(4))) & u64(0x0F0F0F0F0F0F0F0F)


@_inline
def _twos(x: Any) -> Any:
    """16 bits -> eight bytes of two."""
    x = (x | (x << u64(24))) & u64(0x000000FF000000FF)
    x = (x | (x << u64(12))) & u64(0x000F000F000F000F)
    return (x | (x << u64(6))) & u64(0x0303030303030303)


@_inline
def _single(x: Any) -> Any:
    """8 bits -> eight bytes of one."""
    return ((((x * ONES) & PICK) + FILL) >> u64(7)) & ONES


@_inline
def _four_words(x: Any) -> Any:
    x = x & u64(0x0F0F0F0F0F0F0F0F)
    x = (x | (x >> u64(4))) & u64(0x00FF00FF00FF00FF)
    x = (x | (x >> u64(8))) & u64(0x0000FFFF0000FFFF)
    return (x | (x >> u64(16))) & u64(0xFFFFFFFF)


@_inline
def _two_words(x: Any) -> Any:
    x = x & u64(0x0303030303030303)
    x = (x | (x >> u64(6))) & u64(0x000F000F000F000F)
    x = (x | (x >> u64(12))) & u64(0x000000FF000000FF)
    return (x | (x >> u64(24))) & u64(0xFFFF)


@_inline
def _byte(x: Any) -> Any:
    return ((x & ONES) * GATHER) >> u64(56)


@_inline
def _spread_line(source: Array, bits: int, target: Array) -> None:
    """uint32 ``source``, ``bits`` words a block -> uint64 ``target``, four a block."""
    two, one = bits & 4, bits & 6  # where the planes of two bits and of one begin
    for b in range(len(target) // 4):
        at = b * bits
        for c in range(4):
            x = u64(0)
            if bits & 4:
                x = _fours(u64(source[at + c]))
            if bits & 2:
                x |= _twos((u64(source[at + two + (c >> 1)]) >> u64(16 * (c & 1))) & u64(0xFFFF)) << u64(two)
            if bits & 1:
                x |= _single((u64(source[at + one]) >> u64(8 * c)) & u64(0xFF)) << u64(one)
            target[4 * b + c] = x


@_inline
def _gather_line(source: Array, bits: int, target: Array) -> None:
    """The inverse of ``_spread_line``."""
    two, one = bits & 4, bits & 6
    for b in range(len(source) // 4):
        at = b * bits
        first, second, third, fourth = source[4 * b], source[4 * b + 1], source[4 * b + 2], source[4 * b + 3]
        if bits & 4:
            target[at], target[at + 1] = u32(_four_words(first)), u32(_four_words(second))
            target[at + 2], target[at + 3] = u32(_four_words(third)), u32(_four_words(fourth))
        if bits & 2:
            s = u64(two)
            target[at + two] = u32(_two_words(first >> s) | (_two_words(second >> s) << u64(16)))
            target[at + two + 1] = u32(_two_words(third >> s) | (_two_words(fourth >> s) << u64(16)))
        if bits & 1:
            s = u64(one)
            low, high = _byte(first >> s) | (_byte(second >> s) << u64(8)), _byte(third >> s) | (_byte(fourth >> s) << u64(8))
            target[at + one] = u32(low | (high << u64(16)))


@compiled
def unpack_rows(words: Array, bits: int, out: Array) -> None:
    """uint32 (n, B * bits) -> uint64 (n, 4 B), eight codes each."""
    for row in range(words.shape[0]):
        _spread_line(words[row], bits, out[row])


@compiled
def pack_rows(codes: Array, bits: int, out: Array) -> None:
    """The inverse of ``unpack_rows``; bits of a code above ``bits`` are dropped."""
    for row in range(codes.shape[0]):
        _gather_line(codes[row], bits, out[row])


@compiled
def unpack_columns(words: Array, step: int, bits: int, out: Array) -> None:
    """uint32 words (B * bits, n), row r at ``words[r * step]`` -> uint64 (n, 4 B), eight codes each."""
    width, blocks = out.shape[0], out.shape[1] // 4
    buffer = np.empty((_COLUMNS, _PITCH), np.uint32)
    for column in range(0, width, _COLUMNS):
        columns = min(_COLUMNS, width - column)
        for block in range(0, blocks, _BLOCKS):
            count = min(_BLOCKS, blocks - block)
            for row in range(count * bits):
                at = (block * bits + row) * step + column
                for j in range(columns):
                    buffer[j, row] = words[at + j]
            for j in range(columns):
                _spread_line(buffer[j], bits, out[column + j, 4 * block : 4 * (block + count)])


@compiled
def pack_columns(codes: Array, bits: int, out: Array) -> None:
    """The inverse of ``unpack_columns``: uint64 (n, 4 B) -> uint32 words (B * bits, n)."""
    width, blocks = codes.shape[0], codes.shape[1] // 4
    buffer = np.empty((_COLUMNS, _PITCH), np.uint32)
    for column in range(0, width, _COLUMNS):
        columns = min(_COLUMNS, width - column)
        for block in range(0, blocks, _BLOCKS):
            count = min(_BLOCKS, blocks - block)
            for j in range(columns):
                _gather_line(codes[column + j, 4 * block : 4 * (block + count)], bits, buffer[j])
            for row in range(count * bits):
                for j in range(columns):
                    out[block * bits + row, column + j] = buffer[j, row]
