"""From affine sources through the search into ggml blocks: the values ggml decodes are the source's, rounded once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qformats import reencode
from qformats.formats import ggml
from qformats.scheme import Integer, Tile
from qformats.tensor import Param, QuantizedTensor, constant


def source(bits: int, group: int | None, zero: str, n: int = 6, k: int = 512) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(bits * 1000 + (group or 1))
    top, width = (1 << bits) - 1, group or k
    codes = torch.randint(0, top + 1, (n, k), generator=generator, dtype=torch.uint8)
    scale = Param((torch.rand((n, k // width), generator=generator) * 0.01 + 1e-4).to(torch.float16), Tile((1, width)))
    if zero == "sym":
        return QuantizedTensor((n, k), codes, Integer(bits), (scale,), constant(1 << (bits - 1), (n, k)))
    zeros = torch.randint(0, top + 1, (n, k // width), generator=generator, dtype=torch.uint8)
    return QuantizedTensor((n, k), codes, Integer(bits), (scale,), Param(zeros, Tile((1, width))))


@pytest.mark.parametrize(
    ("bits", "group", "zero", "name"),
    [
        (4, 128, "sym", "Q4_0"),
        (4, 32, "sym", "Q4_0"),
        (3, 128, "asym", "Q4_0"),
        (2, 64, "asym", "Q4_0"),
        (4, 128, "asym", "Q5_0"),
        (4, None, "asym", "Q5_0"),
        (4, None, "asym", "Q4_K"),
        (4, 256, "sym", "Q4_K"),
        (8, 64, "sym", "Q8_0"),
        (8, None, "sym", "Q8_0"),
        (4, 64, "asym", "Q8_0"),
    ],
)
def test_exact_all_the_way(bits: int, group: int | None, zero: str, name: str) -> None:
    tensor, kind = source(bits, group, zero), ggml.BLOCK_TYPES[name]
    decision = reencode.fit(tensor, kind.storage)
    assert decision.kind == "exact"
    stored = reencode.finish(tensor, decision)
    assert ggml.can_store(kind.storage, stored.scheme)
    (piece,) = ggml.write(kind.storage, stored, 0, tensor.shape)
    out = np.empty(tensor.shape, np.float32)
    ggml.dequantize(name, piece.array, out)
    assert np.array_equal(out, tensor.dequantize(torch.float32).numpy())
