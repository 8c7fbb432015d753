"""The compiled product of inputs with lowered planes on the CPU's matrix unit (``qformats.loops.amx``), for more than a few inputs.

Rows are decoded once for all inputs, sixteen to a tile. Codes whose values are bfloat16 numbers are multiplied as they are and each
group's sum is scaled in float32; ``value = scale (number - zero) + offset`` adds ``offset - zero scale`` times the sum of the group's
inputs. Weights of any other kind are decoded to float32 and taken as three bfloat16 each. Inputs are float32 numbers, three bfloat16 each,
or bfloat16 numbers, one each. Sums are float32; their order depends on the shape alone.
Definition: ``qformats.kernels.reference.matmul``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from qformats.loops.amx import (
    LINE,
    TILE,
    configure,
    fetch,
    keep_tiles,
    laid_codes,
    laid_columns,
    laid_inputs,
    laid_values,
    piece_products,
    release,
    settle,
    turned,
)
from qformats.loops.compiled import compiled, pointed
from qformats.loops.factors import factoring, room
from qformats.loops.lanes import alive, as_floats, call, floats_at, pointer, put
from qformats.loops.rows import GROUPS, PADDED, ROW, TARGET, WIDTH, decoding, workspace
from qformats.loops.strips import STRIP, planes_of, strip, value

__all__ = ["BLOCK", "decoded", "lay", "multiply", "pieces", "shapes"]

Array = np.ndarray[Any, Any]
f32, u8, u16, u32 = np.float32, np.uint8, np.uint16, np.uint32

BLOCK = 64  # rows decoded before they are multiplied


def shapes(each: int) -> Array:
    """The configuration of the tiles, uint8 (64,): whole ones, or for eighths of a strip weights of 16 columns and inputs of 8 pairs."""
    made = np.zeros(64, u8)
    made[0] = 1
    wide, tall = made[16:32].view(u16), made[48:56]
    wide[:], tall[:] = LINE, 16
    if each == 8:
        wide[4:7], tall[7] = LINE // 2, 8
    return made


@cache
def lay(parts: int, strips: bool) -> Any:
    """``run(x, target)``: inputs (16 n, padded) float32 to tiles, ``target`` uint32 (parts, n, padded / 128, 4, 16, 16) on whole lines.

    One part: the inputs are bfloat16 numbers. ``strips``: see ``qformats.loops.amx.columns_of``.
    """
    order = 1 if strips else 0

    @compiled
    def run(x: Array, target: Array) -> None:
        row, tiles = 4 * x.shape[1], x.shape[1] // 32
        step, source, to = 4 * target[0].size, np.intp(x.ctypes.data), np.intp(target.ctypes.data)
        for block in range(len(x) // 16):
            for t in range(tiles):
                laid_inputs(parts, order, source + 16 * row * block + 128 * t, row, to + (block * tiles + t) * TILE, step)

    return run


@compiled
def _numbers(head: Array, p: Any, step: Any, each: Any, strips: Any, scales: Any, rests: Any) -> None:
    """A row's scales, and what its groups' sums count, to two addresses, ``each`` for a strip; ``factors`` left its numbers at ``p``."""
    width, part, last = head[WIDTH], STRIP // each, head[GROUPS] - 1
    if width == part:
        for at in range(0, 4 * head[GROUPS], 64):  # what follows the last ones is overwritten by the next row, or is no group's
            scale = floats_at(p + at)
            put(scales + at, scale)
            put(rests + at, floats_at(p + 3 * step + at) - floats_at(p + 2 * step + at) * scale)
        return
    to_scales, to_rests = carray(pointer(scales), strips * each, f32), carray(pointer(rests), strips * each, f32)
    scale, zero = carray(pointer(p), last + 1, f32), carray(pointer(p + 2 * step), last + 1, f32)
    offset = carray(pointer(p + 3 * step), last + 1, f32)
    i, left = 0, width
    for j in range(strips * each):
        to_scales[j], to_rests[j] = scale[i], offset[i] - zero[i] * scale[i]
        left -= part
        if left <= 0 and i < last:
            i, left = i + 1, width


# a frame of a block of rows: where their strips begin (rows, 3), how many there are, the strip's number, the first tile of weights, how
# far 16 rows and parts are apart, the table and numbers of the codes, the bits of a float32 zero
_FRAME = 40
_WHERE, _COUNT, _STRIP, _WEIGHTS, _DOWN, _PART, _NAMES, _NUMBERS, _ZERO = range(9)
# and of the products: blocks of inputs, the strip's tiles of inputs, how far blocks and parts are apart, room for four tiles, totals,
# scales, rests, how far apart they are of two rows, sums of the strip, how far those of two blocks are apart
_BLOCKS, _INPUTS, _ACROSS, _X_PART, _ROOM, _TOTALS, _SCALES, _RESTS, _ROW, _SUMS, _SUMS_STEP = range(9, 20)
# the pieces under way: which comes next, and for the last two scales, rests, sums, totals
_TURN, _LAST, _BEFORE = 20, 21, 25


@cache
def decoded(widths: tuple[int, int, int], kind: int, form: int) -> Any:
    """A strip of a block of rows to tiles, for ``multiply``; ``kind``: of ``qformats.loops.strips.value``; ``form``: of ``multiply``."""
    first, second, third = widths
    parts = 3 if form == 3 else 1

    def run(frame: Any) -> Any:
        f = carray(pointer(frame), _FRAME, np.int64)
        where, k, names, numbers = carray(pointer(f[_WHERE]), (f[_COUNT], 3), np.int64), f[_STRIP], f[_NAMES], f[_NUMBERS]
        zero = as_floats(u32(f[_ZERO]).view(f32))
        for i in range(f[_COUNT]):
            planes, at = (where[i, 0], where[i, 1], where[i, 2]), f[_WEIGHTS] + (i >> 4) * f[_DOWN] + (i & 15) * LINE
            fetch(planes[0] + 16 * first * (k + 1))
            a, b = strip((first, second, third), planes, k)
            if form != 1:
                for part in range(parts):
                    laid_codes(a, b, names + LINE * part, at + part * f[_PART])
            else:
                laid_values(
                    1,
                    value(a, 0, kind, numbers) - zero, value(a, 1, kind, numbers) - zero, value(a, 2, kind, numbers) - zero,
                    value(a, 3, kind, numbers) - zero, value(b, 0, kind, numbers) - zero, value(b, 1, kind, numbers) - zero,
                    value(b, 2, kind, numbers) - zero, value(b, 3, kind, numbers) - zero, at, 0,
                )  # fmt: skip
        return f32(0)

    return pointed(run)


@cache
def pieces(three: int, each: int, scaled: int, beside: int) -> Any:
    """A strip of a block of rows times all inputs, for ``multiply``; ``_STRIP`` -1: what is under way is finished.

    Three pieces are under way: one multiplied, one stored, one scaled, since what the unit makes is long not there to be read.
    """
    skip = TILE // 2 if each == 8 else TILE

    def run(frame: Any) -> Any:
        f = carray(pointer(frame), _FRAME, np.int64)
        room_at, row_step = f[_ROOM], f[_ROW]
        odd_at, turn = room_at + 2 * TILE, f[_TURN]
        last = f[_LAST], f[_LAST + 1], f[_LAST + 2], f[_LAST + 3]
        before = f[_BEFORE], f[_BEFORE + 1], f[_BEFORE + 2], f[_BEFORE + 3]
        if f[_STRIP] < 0:
            if before[3]:
                at = odd_at if turn else room_at
                settle(each, scaled, beside, at, before[0], before[1], row_step, before[2], before[3])
            if turn:
                keep_tiles(0, each, room_at)
            else:
                keep_tiles(2, each, room_at)
            settle(each, scaled, beside, room_at, last[0], last[1], row_step, last[2], last[3])
            f[_TURN:] = 0
            return f32(0)
        for m in range(f[_BLOCKS]):
            for block in range((f[_COUNT] + 15) >> 4):
                for part in range(0, each, 2):
                    w, x = f[_WEIGHTS] + block * f[_DOWN] + skip * part, f[_INPUTS] + m * f[_ACROSS] + skip * part
                    if turn:
                        piece_products(2, three, each, w, f[_PART], x, f[_X_PART])
                        if last[3]:
                            keep_tiles(0, each, room_at)
                        if before[3]:
                            settle(each, scaled, beside, odd_at, before[0], before[1], row_step, before[2], before[3])
                    else:
                        piece_products(0, three, each, w, f[_PART], x, f[_X_PART])
                        if last[3]:
                            keep_tiles(2, each, odd_at)
                        if before[3]:
                            settle(each, scaled, beside, room_at, before[0], before[1], row_step, before[2], before[3])
                    turn, before = 1 - turn, last
                    skipped, sums = 16 * block * row_step + 4 * part, f[_SUMS] + m * f[_SUMS_STEP] + LINE * part
                    total = f[_TOTALS] + (4 * m + block) * TILE
                    last = (f[_SCALES] + skipped, f[_RESTS] + skipped, sums, total)
        f[_TURN] = turn
        f[_LAST], f[_LAST + 1], f[_LAST + 2], f[_LAST + 3] = last
        f[_BEFORE], f[_BEFORE + 1], f[_BEFORE + 2], f[_BEFORE + 3] = before
        return f32(0)

    return pointed(run)


@compiled
def multiply(
    head: Array, slots: Array, constants: Array, made: Any, decoded: Any, pieces: Any, form: Any, each: Any, table: Array, numbers: Any,
    zero: Any, shape: Array, laid: Array, sums: Array, first: Any, out: Array, low: Any, high: Any,
) -> None:  # fmt: skip
    """Inputs in tiles times rows ``first + low`` … ``first + high`` to ``out[:, low:high]`` (M, n) float32.

    ``made``: the address of ``qformats.loops.factors.row_factors``, for form 2 of ``qformats.loops.rows.decoder``; ``decoded``,
    ``pieces``: those of the functions above. ``form``: 0 codes named in ``table`` (32 bfloat16), 1 values less ``zero`` that are bfloat16
    numbers, read from the address ``numbers``, 2 exact weights in float32, 3 codes whose values are the sums of three bfloat16, ``table``
    (3, 32). ``each``: groups in a strip, 0 for weights without scales or rows with one. ``laid``: of ``lay``; ``sums`` (inputs / 16,
    strips ``each``, 16): of the inputs of each group.
    """
    held, wide, aside = room(head, constants)
    strips, inputs, blocks, groups, parts = head[PADDED] // STRIP, len(out), laid.shape[1], max(each, 1), 3 if form > 1 else 1
    p, bytes_, values = workspace(head)
    spare, saved = np.zeros((1 if form == 2 else BLOCK, 3 * head[PADDED]), u8), np.zeros(64, u8)
    down = (strips if form == 2 else 1) * 4 * TILE  # weights in float32 are kept for a whole row
    part, across, row_step = BLOCK // 16 * down, strips * 4 * TILE, 4 * (strips * groups + 16)
    buffer = np.zeros(parts * part + (4 + 4 * blocks) * TILE + 64, u8)
    w_at = (np.intp(buffer.ctypes.data) + 63) & ~63
    room_at, total_at, values_at = w_at + parts * part, w_at + parts * part + 4 * TILE, np.intp(values[0].ctypes.data)
    held_at, apart = np.intp(held.ctypes.data), 4 * held.shape[1]
    given, rows = factoring(head, slots, constants, held, wide, aside), decoding(head, slots, constants, p, bytes_, values)
    given_at, rows_at = np.intp(given.ctypes.data), np.intp(rows.ctypes.data)
    factors_ = np.ones((2, BLOCK + 1, strips * groups + 16), f32)
    s_at, rest_at, x_at = np.intp(factors_.ctypes.data), np.intp(factors_[1].ctypes.data), np.intp(laid.ctypes.data)
    sums_at = np.intp(sums.ctypes.data)
    totals, lines = carray(pointer(total_at), (blocks, 4, 16, 16), f32), carray(pointer(room_at), (16, 16), f32)
    where, f = np.zeros((BLOCK, 3), np.int64), np.zeros(_FRAME, np.int64)
    f[_WHERE], f[_DOWN], f[_PART], f[_NAMES], f[_NUMBERS] = np.intp(where.ctypes.data), down, part, np.intp(table.ctypes.data), numbers
    f[_ZERO], f[_BLOCKS], f[_ACROSS], f[_X_PART], f[_ROOM] = np.int64(f32(zero).view(u32)), blocks, across, blocks * across, room_at
    f[_TOTALS], f[_ROW], f[_SUMS_STEP] = total_at, row_step, strips * groups * LINE
    frame = np.intp(f.ctypes.data)
    configure(np.intp(shape.ctypes.data), np.intp(saved.ctypes.data))
    for start in range(low, high, BLOCK):
        count = min(BLOCK, high - start)
        totals[:], f[_COUNT] = f32(0), count
        for i in range(count):
            row = first + start + i
            if form == 2:
                rows[ROW], rows[TARGET] = row, values_at
                call(made, rows_at)
                target = w_at + (i >> 4) * down + (i & 15) * LINE
                for t in range(4 * strips):
                    laid_columns(3, values_at + 128 * t, target + t * TILE, part)
            else:
                given[0] = row
                call(made, given_at)
                _numbers(head, held_at, apart, groups, strips, s_at + i * row_step, rest_at + i * row_step)
                where[i, 0], where[i, 1], where[i, 2] = planes_of(head, row, spare[i])
        for k in range(strips):
            f[_STRIP], f[_WEIGHTS], f[_INPUTS] = k, w_at + (4 * TILE * k if form == 2 else 0), x_at + 4 * TILE * k
            f[_SCALES], f[_RESTS] = s_at + 4 * groups * k, rest_at + 4 * groups * k
            f[_SUMS] = sums_at + groups * LINE * k
            if form != 2:
                call(decoded, frame)
            call(pieces, frame)
        f[_STRIP] = -1
        call(pieces, frame)
        for m in range(blocks):
            for block in range(0, count, 16):
                if each == 0 and form != 2:
                    for r in range(min(16, count - block)):
                        totals[m, block >> 4, r] *= factors_[0, block + r, 0]
                turned(total_at + (4 * m + block // 16) * TILE, room_at)
                for i in range(min(16, inputs - 16 * m)):
                    for r in range(min(16, count - block)):
                        out[16 * m + i, start + block + r] = lines[i, r]
    release(np.intp(saved.ctypes.data))
    alive(held), alive(aside), alive(spare), alive(saved), alive(buffer), alive(values), alive(factors_), alive(where), alive(f)
    alive(given), alive(rows), alive(wide), alive(p), alive(bytes_)
