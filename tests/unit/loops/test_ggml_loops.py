"""Each compiled ggml loop equals its torch definition, bit for bit, on random and on extreme blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qformats.formats import ggml
from qformats.formats.ggml.ternary import SPELLINGS

loops = pytest.importorskip("qformats.loops.ggml")
TYPES = list(loops.UNPACK)


def blocks_of(name: str, count: int, seed: int) -> np.ndarray[Any, Any]:
    kind = ggml.BLOCK_TYPES[name]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, kind.nbytes), dtype=np.uint8)
    for at in kind.halves:
        infinite = (blocks[:, at + 1] & 0x7C) == 0x7C
        blocks[infinite, at + 1] &= 0xBF
    return blocks


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 256])
def test_unpack_and_pack(name: str, count: int) -> None:
    kind = ggml.BLOCK_TYPES[name]
    blocks = blocks_of(name, count, 3)
    planes = ggml._empty_planes(kind, count)
    loops.UNPACK[name](blocks, *planes)
    definition = kind.unpack_blocks(torch.from_numpy(blocks))
    for ours, theirs in zip(planes, definition, strict=True):
        assert ours.tobytes() == (b"" if theirs is None else theirs.contiguous().numpy().tobytes())
    packed = np.zeros_like(blocks)
    loops.PACK[name](packed, *planes)
    assert np.array_equal(packed, kind.pack_blocks(*definition).numpy())
    assert np.array_equal(packed, blocks) or name in SPELLINGS


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 1024])
def test_dequantize(name: str, count: int) -> None:
    kind = ggml.BLOCK_TYPES[name]
    blocks = blocks_of(name, count, 4)
    out = np.full((count, blocks.shape[1] // kind.nbytes * kind.block), np.nan, np.float32)
    loops.DEQUANTIZE[name](blocks, out)
    expected = kind.dequantize_blocks(torch.from_numpy(blocks)).numpy()
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_every_half_converts_exactly() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    finite = np.isfinite(bits.view(np.float16))
    blocks = np.zeros((65536, 34), np.uint8)
    blocks[:, :2], blocks[:, 2:] = bits[:, None].view(np.uint8), 1
    out = np.empty((65536, 32), np.float32)
    loops.DEQUANTIZE["Q8_0"](blocks, out)
    expected = bits.view(np.float16).astype(np.float32)
    assert np.array_equal(out[finite, 0].view(np.uint32), expected[finite].view(np.uint32))
    assert np.array_equal(np.isnan(out[:, 0]), np.isnan(expected)) and np.array_equal(np.isinf(out[:, 0]), np.isinf(expected))


def test_read_only_and_strided_inputs() -> None:
    blocks = blocks_of("Q5_1", 8, 5).reshape(4, -1)
    out = np.empty((4, 64), np.float32)
    ggml.dequantize("Q5_1", blocks, out)
    locked = blocks.copy()
    locked.flags.writeable = False
    other = np.empty_like(out)
    ggml.dequantize("Q5_1", locked, other)
    assert np.array_equal(out, other)
    ggml.dequantize("Q5_1", np.repeat(blocks, 2, 0)[::2], other)
    assert np.array_equal(out, other)
