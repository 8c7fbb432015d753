"""ggml blocks against real llama.cpp on random data: dequantized bits, quantized bytes, float types.

Skipped visibly where llama.cpp's libraries are absent (see ``llamacpp.py`` beside this file).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import llamacpp

from qformats.formats import dense, ggml
from qformats.formats.ggml.legacy import LEGACY, Legacy
from qformats.quantize import rtn

pytestmark = [pytest.mark.real, pytest.mark.skipif(not llamacpp.available(), reason="no llama.cpp libraries are installed")]


def random_blocks(name: str, rows: int, k: int, seed: int) -> np.ndarray[Any, Any]:
    """Every bit random, so scales of both signs, zeros and subnormals occur; exponents of all ones (inf, NaN) are taken back."""
    kind = ggml.BLOCK_TYPES[name]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows * k // kind.block, kind.nbytes), dtype=np.uint8)
    for at in kind.halves:
        special = (blocks[:, at + 1] & 0x7C) == 0x7C
        blocks[special, at + 1] &= 0xBF
        blocks[::5, at + 1] &= 0x83  # subnormal scales
    if name == "IQ1_M":  # d is in the top nibbles of four words; its exponent ends in the last of them
        blocks[(blocks[:, 55] & 0x70) == 0x70, 55] &= 0xBF
        blocks[::5, 55], blocks[::5, 53] = blocks[::5, 55] & 0x8F, blocks[::5, 53] & 0x3F
    if name == "Q8_0":
        blocks[::3, 2:10] = 0x80
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", list(ggml.BLOCK_TYPES))
@pytest.mark.parametrize("loops", [True, False], ids=["loops", "torch"])
def test_dequantized_bits(name: str, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not loops:
        monkeypatch.setattr(ggml, "_loops", lambda: None)
    blocks = random_blocks(name, 64, 2048, 11)
    out = np.empty((64, 2048), np.float32)
    ggml.dequantize(name, blocks, out)
    assert np.array_equal(out.view(np.uint32), llamacpp.dequantize_rows(blocks, name, 2048).view(np.uint32))


@pytest.mark.parametrize("name", list(LEGACY))
@pytest.mark.parametrize("spread", ["normal", "heavy", "ties", "wide", "one-sided", "sparse"])
def test_quantized_bytes(name: str, spread: str) -> None:
    rng = np.random.default_rng(12)
    x = rng.normal(size=(64, 2048))
    x = {
        "normal": x * 0.02,
        "heavy": x**5,
        "ties": np.round(x * 4) / 4,
        "wide": x * 10.0 ** rng.integers(-44, 4, (64, 1)),
        "one-sided": np.abs(x),
        "sparse": np.where(rng.random(x.shape) < 0.97, 0.0, x),
    }[spread].astype(np.float32)
    kind: Legacy = LEGACY[name]
    tensor = rtn(torch.from_numpy(x), kind.storage)
    (piece,) = ggml.write(kind.storage, tensor, 0, tensor.shape)
    assert np.array_equal(piece.array, llamacpp.quantize_rows(x, name))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_float_types_round_as_llama_cpp_does(name: str) -> None:
    rng = np.random.default_rng(13)
    x = (rng.normal(size=(64, 256)) * 10.0 ** rng.integers(-12, 4, (64, 1))).astype(np.float32)
    assert np.array_equal(dense.write_float(torch.from_numpy(x), name).view(np.uint8), llamacpp.quantize_rows(x, name))
