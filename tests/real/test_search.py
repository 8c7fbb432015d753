"""Blocks of the better search in real llama.cpp: it reads the numbers we mean, and their error is below that of its own blocks.

Skipped visibly where llama.cpp's libraries are absent (see ``llamacpp.py`` beside this file).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import llamacpp

from qformats.formats import ggml
from qformats.quantize import best, rtn

pytestmark = [pytest.mark.real, pytest.mark.skipif(not llamacpp.available(), reason="no llama.cpp libraries are installed")]


@pytest.mark.parametrize("name", sorted(name.upper() for name in best.TYPES))
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_llama_cpp_reads_less_error(name: str, weighted: bool) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(0, 0.3, (16, 512)).astype(np.float32)
    q = np.exp(rng.normal(0, 1, 512)).astype(np.float32) if weighted else np.ones(512, np.float32)
    storage = ggml.BLOCK_TYPES[name].storage
    tensor = rtn(torch.from_numpy(x), storage, torch.from_numpy(q) if weighted else None, "best")
    (piece,) = ggml.write(storage, tensor, 0, tensor.shape)
    read = llamacpp.dequantize_rows(piece.array, name, 512)
    np.testing.assert_array_equal(read, tensor.dequantize(torch.float32).numpy())
    takes = weighted and name.lower() in ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
    theirs = llamacpp.dequantize_rows(llamacpp.quantize_rows(x, name, q if takes else None), name, 512)
    errors = [float((q * (values.astype(np.float64) - x) ** 2).sum()) for values in (read, theirs)]
    assert errors[0] < errors[1] or (name == "Q1_0" and errors[0] == errors[1])
