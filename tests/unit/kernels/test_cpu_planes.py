"""The compiled loops between codes and planes equal their definitions."""

from __future__ import annotations

import pytest
import torch

from qformats.kernels import packing


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("shape", [(1, 1), (3, 131), (2, 256)])
def test_planes_of_loops_are_the_definitions(bits: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    codes = codes if bits > 8 else codes.to(torch.uint8)
    found = packing.split(codes, bits)
    joined = packing.join(found, bits, shape[1])
    monkeypatch.setattr(packing, "find", lambda name: None)
    wanted = packing.split(codes, bits)
    assert len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(joined, packing.join(wanted, bits, shape[1])) and torch.equal(joined, codes)
    assert joined.dtype == codes.dtype
