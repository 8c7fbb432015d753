"""Packing b-bit codes into words: one bit stream, permutations inside eight values, and the matrix forms that formats use.

The stream: value i of a row occupies bits [i*b, (i+1)*b) of the row's little-endian bytes, whatever words they are grouped in; a value may
straddle two words. For b = 2, 4, 8 that is "32 / b values a word, the first in the low bits"; for b = 3 it is AutoGPTQ's hand-written
layout (auto-gptq 0.7.1 ``qlinear_cuda_old.py``), for 5, 6, 7 AutoRound's ``pack_bitstream`` (auto-round 0.16.1).
Eight values are always exactly b bytes. Example, b = 4: codes 1 2 3 4 5 6 7 8 -> bytes 21 43 65 87 -> int32 word 0x87654321.

The planar packing (gptqmodel 7.7.0 ``utils/planar_packing.py``) cuts each block of 32 codes into bit planes, ``PLANES``, the low one first:
a plane of width w is a stream of its own, w words a block. One plane (2, 4, 8 bits) is the stream. Example, b = 3: of 32 codes of 5 (101b)
the words are 0x55555555 0x55555555 (low two bits: 01) 0xffffffff (the third).

``pack_stream`` and ``unpack_stream`` (torch, last axis) are the definition. The ``*_columns`` and ``*_interleaved`` functions work on numpy
arrays, transpose on the way, and run compiled loops (``qformats.loops.words``, ``planar``) where numba can be imported, else what is
defined.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from qformats.errors import Unsupported

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, Any]

__all__ = [
    "AWQ_ORDER",
    "AWQ_REVERSE",
    "PLANES",
    "inverse_order",
    "pack_bytes",
    "pack_columns",
    "pack_interleaved",
    "pack_pairs",
    "pack_planar_columns",
    "pack_planar_definition",
    "pack_planar_rows",
    "pack_rows",
    "pack_stream",
    "pack_words",
    "reorder",
    "unpack_bytes",
    "unpack_columns",
    "unpack_interleaved",
    "unpack_pairs",
    "unpack_planar_columns",
    "unpack_planar_definition",
    "unpack_planar_rows",
    "unpack_rows",
    "unpack_stream",
    "unpack_words",
    "words_for",
]

# autoawq 0.2.9 ``modules/linear/gemm.py``: field i of a word holds column AWQ_ORDER[i]; column c is read from field AWQ_REVERSE[c].
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_REVERSE = (0, 4, 1, 5, 2, 6, 3, 7)

# gptqmodel 7.7.0 ``utils/planar_packing.py``: widths of the bit planes, low to high
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes ``order``: ``inverse_order(AWQ_ORDER) == AWQ_REVERSE``."""
    inverse = [0] * len(order)
    for field, column in enumerate(order):
        inverse[column] = field
    return tuple(inverse)


def words_for(count: int, bits: int, word_bits: int = 32) -> int:
    """Words that hold ``count`` values of ``bits`` bits; the last one is filled up with zeros."""
    return -(-count * bits // word_bits)


def _little_endian_host() -> None:
    if sys.byteorder != "little":
        raise Unsupported("big-endian-host", "packed weights can only be read on little-endian machines")


def _word_dtype(word_bits: int) -> Any:
    import torch

    return {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[word_bits]


def pack_stream(values: Tensor, bits: int, word_bits: int = 32) -> Tensor:
    """Pack integers (..., n) in 0 .. 2^bits - 1 along the last axis into signed words (..., ``words_for(n, bits)``); tails are zero."""
    import torch

    _little_endian_host()
    *lead, count = values.shape
    eights = -(-count // 8)
    padded = torch.zeros(*lead, eights * 8, dtype=torch.int64)
    padded[..., :count] = values.to(torch.int64) & ((1 << bits) - 1)
    shifts = torch.arange(8, dtype=torch.int64) * bits
    packed = (padded.reshape(*lead, eights, 8) << shifts).sum(-1)  # (..., n/8) int64, the low b bytes are the stream
    stream = packed.unsqueeze(-1).view(torch.uint8)[..., :bits].reshape(*lead, eights * bits)
    nbytes = words_for(count, bits, word_bits) * word_bits // 8
    out = torch.zeros(*lead, nbytes, dtype=torch.uint8)
    kept = min(nbytes, stream.shape[-1])
    out[..., :kept] = stream[..., :kept]
    return out.view(_word_dtype(word_bits)) if nbytes else out.to(_word_dtype(word_bits))


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack the first ``count`` values of each row of integer words (..., w) of any width into uint8 (..., count)."""
    import torch

    _little_endian_host()
    *lead, width = words.shape
    flat = words.contiguous().reshape(-1)  # a last dimension of 1 may keep a stride that no view takes
    stream = flat.view(torch.uint8).reshape(*lead, width * words.element_size())
    if bits in (1, 2, 4, 8):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        fields = (stream.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)  # (..., bytes, 8 / b)
        return fields.reshape(*lead, stream.shape[-1] * (8 // bits))[..., :count].contiguous()
    eights = -(-count // 8)
    padded = torch.zeros(*lead, eights * bits, dtype=torch.uint8)
    kept = min(stream.shape[-1], eights * bits)
    padded[..., :kept] = stream[..., :kept]
    lanes = torch.arange(bits, dtype=torch.int64) * 8
    packed = (padded.reshape(*lead, eights, bits).to(torch.int64) << lanes).sum(-1, keepdim=True)  # (..., n/8, 1)
    fields = (packed >> (torch.arange(8, dtype=torch.int64) * bits)) & ((1 << bits) - 1)
    return fields.to(torch.uint8).reshape(*lead, eights * 8)[..., :count].contiguous()


def reorder(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """Permute the last axis inside blocks of ``len(order)``: ``out[block + i] = values[block + order[i]]``; the length must divide."""
    import torch

    blocks = values.reshape(*values.shape[:-1], -1, len(order))
    return blocks.index_select(-1, torch.tensor(order)).reshape(values.shape)


def _loops(name: str = "words") -> Any:
    from qformats.loops import find

    return find(name)


def _as_tensor(array: Array) -> Tensor:
    import numpy as np
    import torch

    signed = array if array.dtype.kind == "i" or array.itemsize == 1 else array.view(f"<i{array.itemsize}")
    return torch.from_numpy(np.ascontiguousarray(signed))


def _run(words: Array) -> tuple[Array, int, int]:
    """Words (H, W), maybe columns of a wider array, as one run of uint32 in memory, the distance of its rows, and H."""
    import numpy as np

    height, width = words.shape
    if words.strides[1] != 4 or words.strides[0] % 4 or words.strides[0] < 0:
        words = np.ascontiguousarray(words)
    step = words.strides[0] // 4 if height > 1 else width
    return np.lib.stride_tricks.as_strided(words.view(np.uint32), ((height - 1) * step + width,), (4,)), step, height


def unpack_columns(words: Array, bits: int, count: int) -> Array:
    """Words (W, n) packed along the first axis -> uint8 codes (n, count)."""
    import numpy as np

    loops = _loops()
    if loops is None or words.itemsize != 4 or count % 8 or not words.size:
        return unpack_stream(_as_tensor(words).T, bits, count).numpy()
    out = np.empty((words.shape[1], count), np.uint8)
    loops.unpack_columns(*_run(words), bits, out.view(np.uint64))
    return out


def pack_columns(codes: Array, bits: int, word_bits: int = 32) -> Array:
    """uint8 codes (n, count) -> words (W, n) packed along the first axis."""
    import numpy as np

    rows, count = codes.shape
    loops = _loops()
    if loops is None or word_bits != 32 or count % 8 or count * bits % 32:
        packed: Array = np.ascontiguousarray(pack_stream(_as_tensor(codes), bits, word_bits).numpy().T)
        return packed
    out = np.empty((count * bits // 32, rows), np.uint32)
    loops.pack_columns(np.ascontiguousarray(codes).view(np.uint64), bits, out)
    return out.view(np.int32)


def unpack_rows(words: Array, bits: int, count: int) -> Array:
    """Words (n, W) packed along the last axis -> uint8 codes (n, count)."""
    import numpy as np

    loops = _loops()
    if loops is None or words.itemsize != 4 or count % 8:
        return unpack_stream(_as_tensor(words), bits, count).numpy()
    out = np.empty((words.shape[0], count), np.uint8)
    loops.unpack_rows(np.ascontiguousarray(words).view(np.uint32), bits, out.view(np.uint64))
    return out


def pack_rows(codes: Array, bits: int, word_bits: int = 32) -> Array:
    """uint8 codes (n, count) -> words (n, W) packed along the last axis."""
    import numpy as np

    rows, count = codes.shape
    loops = _loops()
    if loops is None or word_bits != 32 or count % 8 or count * bits % 32:
        return pack_stream(_as_tensor(codes), bits, word_bits).numpy()
    out = np.empty((rows, count * bits // 32), np.uint32)
    loops.pack_rows(np.ascontiguousarray(codes).view(np.uint64), bits, out)
    return out.view(np.int32)


def unpack_bytes(packed: Array, bits: int) -> Array:
    """Bytes (n, W) of whole values of 1, 2 or 4 bits, the first in the low bits -> uint8 codes (n, 8 W / bits)."""
    import numpy as np

    count = packed.shape[1] * 8 // bits
    if packed.shape[1] % 4 or not packed.size:
        return unpack_stream(_as_tensor(packed), bits, count).numpy()
    return unpack_rows(np.ascontiguousarray(packed).view(np.uint32), bits, count)


def pack_bytes(codes: Array, bits: int) -> Array:
    """uint8 codes (n, count) of 1, 2 or 4 bits -> bytes (n, count * bits / 8): the inverse of ``unpack_bytes``."""
    import numpy as np

    word = 8 if codes.shape[1] * bits % 32 else 32
    packed = pack_rows(codes, bits) if word == 32 else pack_stream(_as_tensor(codes), bits, word).numpy()
    array: Array = packed.view(np.uint8)
    return array


def unpack_pairs(packed: Array) -> Array:
    """Bytes (n, K / 2) of two four-bit codes, the first in the low half -> uint8 codes (n, K)."""
    import numpy as np

    if packed.shape[1] % 4 == 0 and _loops() is not None:
        return unpack_bytes(packed, 4)
    out = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed.view(np.uint8), 15, out=out[..., 0])
    np.right_shift(packed.view(np.uint8), 4, out=out[..., 1])
    return out.reshape(packed.shape[0], -1)


def pack_pairs(codes: Array) -> Array:
    """uint8 or int8 codes (n, K), of which the low four bits count -> uint8 (n, K / 2), the first of two in the low half."""
    import numpy as np

    fields = np.ascontiguousarray(codes).view(np.uint8)
    loops = _loops()
    packed = np.empty((len(fields), fields.shape[1] // 2), np.uint8)
    if loops is not None:
        loops.pack_pairs(fields, packed)
    else:
        np.bitwise_or(fields[:, 0::2] & 15, fields[:, 1::2] << 4, out=packed)
    return packed


def unpack_words(words: Array, bits: int, count: int) -> Array:
    """32-bit words (n, W) with ``32 // bits`` whole values each, the first in the low bits -> uint8 codes (n, count)."""
    import numpy as np

    if 32 % bits == 0:  # without unused bits it is one stream
        return unpack_rows(np.ascontiguousarray(words), bits, count)
    each, fields = 32 // bits, words.view("<u4")
    out = np.empty((*words.shape, each), np.uint8)
    for at in range(each):
        out[:, :, at] = (fields >> np.uint32(at * bits)).astype(np.uint8) & np.uint8((1 << bits) - 1)
    codes: Array = np.ascontiguousarray(out.reshape(words.shape[0], -1)[:, :count])
    return codes


def pack_words(codes: Array, bits: int) -> Array:
    """uint8 codes (n, count) -> int32 words (n, ceil(count / (32 // bits))): the inverse of ``unpack_words``, unused bits zero."""
    import numpy as np

    each = 32 // bits
    if 32 % bits == 0 and codes.shape[1] % each == 0:
        return pack_rows(codes, bits)
    width = -(-codes.shape[1] // each)
    padded = np.zeros((codes.shape[0], width * each), np.uint8)
    padded[:, : codes.shape[1]] = codes
    fields = padded.reshape(codes.shape[0], width, each)
    words = np.zeros((codes.shape[0], width), np.uint32)
    for at in range(each):
        words |= fields[:, :, at].astype(np.uint32) << np.uint32(at * bits)
    return words.view("<i4")


def unpack_interleaved(words: Array, bits: int = 4) -> Array:
    """AWQ GEMM words (K, n * bits / 32), eight columns interleaved by ``AWQ_ORDER`` -> uint8 codes (n, K)."""
    import numpy as np

    rows, width = words.shape
    columns = width * 32 // bits
    loops = _loops()
    if loops is None or bits != 4 or not rows:
        fields = reorder(unpack_stream(_as_tensor(words), bits, columns), AWQ_REVERSE)
        out: Array = np.ascontiguousarray(fields.numpy().T)
        return out
    codes = np.empty((columns, rows), np.uint8)
    loops.unpack_interleaved(*_run(words), codes)
    return codes


def pack_interleaved(codes: Array, bits: int = 4) -> Array:
    """uint8 codes (n, K), n a multiple of 32 / bits (of 32 for odd widths) -> AWQ GEMM words (K, n * bits / 32)."""
    import numpy as np

    loops = _loops()
    if loops is None or bits != 4:
        return pack_stream(reorder(_as_tensor(np.ascontiguousarray(codes.T)), AWQ_ORDER), bits).numpy()
    out = np.empty((codes.shape[1], codes.shape[0] // 8), np.uint32)
    loops.pack_interleaved(np.ascontiguousarray(codes), out)
    return out.view(np.int32)


def unpack_planar_columns(words: Array, bits: int, count: int) -> Array:
    """Planar words (W, n) packed along the first axis, W = count * bits / 32 -> uint8 codes (n, count), count a multiple of 32."""
    import numpy as np

    if len(PLANES[bits]) == 1:
        return unpack_columns(words, bits, count)
    loops = _loops("planar")
    if loops is None or not words.size:
        return unpack_planar_definition(np.ascontiguousarray(words.T), bits, count)
    out = np.empty((words.shape[1], count), np.uint8)
    run, step, _ = _run(words)
    loops.unpack_columns(run, step, bits, out.view(np.uint64))
    return out


def pack_planar_columns(codes: Array, bits: int) -> Array:
    """uint8 codes (n, count), count a multiple of 32 -> planar words (count * bits / 32, n)."""
    import numpy as np

    if len(PLANES[bits]) == 1:
        return pack_columns(codes, bits)
    loops = _loops("planar")
    if loops is None or not codes.size:
        return np.ascontiguousarray(pack_planar_definition(codes, bits).T)
    out = np.empty((codes.shape[1] // 32 * bits, codes.shape[0]), np.uint32)
    loops.pack_columns(np.ascontiguousarray(codes).view(np.uint64), bits, out)
    return out.view(np.int32)


def unpack_planar_rows(words: Array, bits: int, count: int) -> Array:
    """Planar words (n, W) packed along the last axis, W = count * bits / 32 -> uint8 codes (n, count), count a multiple of 32."""
    import numpy as np

    if len(PLANES[bits]) == 1:
        return unpack_rows(words, bits, count)
    loops = _loops("planar")
    if loops is None or not words.size:
        return unpack_planar_definition(words, bits, count)
    out = np.empty((words.shape[0], count), np.uint8)
    loops.unpack_rows(np.ascontiguousarray(words).view(np.uint32), bits, out.view(np.uint64))
    return out


def pack_planar_rows(codes: Array, bits: int) -> Array:
    """uint8 codes (n, count), count a multiple of 32 -> planar words (n, count * bits / 32)."""
    import numpy as np

    if len(PLANES[bits]) == 1:
        return pack_rows(codes, bits)
    loops = _loops("planar")
    if loops is None or not codes.size:
        return pack_planar_definition(codes, bits)
    out = np.empty((codes.shape[0], codes.shape[1] // 32 * bits), np.uint32)
    loops.pack_rows(np.ascontiguousarray(codes).view(np.uint64), bits, out)
    return out.view(np.int32)


def unpack_planar_definition(words: Array, bits: int, count: int) -> Array:
    """``unpack_planar_rows`` plane by plane in torch: what the compiled loops must equal."""
    import numpy as np

    blocks = words.reshape(words.shape[0], -1, bits)
    out = np.zeros((words.shape[0], count), np.uint8)
    at = 0
    for width in PLANES[bits]:
        plane = np.ascontiguousarray(blocks[:, :, at : at + width]).reshape(len(words), -1)
        out |= unpack_stream(_as_tensor(plane), width, count).numpy() << at
        at += width
    return out


def pack_planar_definition(codes: Array, bits: int) -> Array:
    """``pack_planar_rows`` plane by plane in torch: what the compiled loops must equal."""
    import numpy as np

    out = np.empty((codes.shape[0], codes.shape[1] // 32, bits), np.int32)
    at = 0
    for width in PLANES[bits]:
        plane = np.ascontiguousarray((codes >> at) & ((1 << width) - 1))
        out[:, :, at : at + width] = pack_stream(_as_tensor(plane), width).numpy().reshape(codes.shape[0], -1, width)
        at += width
    return out.reshape(codes.shape[0], -1)
