"""Definitions stay on their tensor's device: every operation runs on shapes alone (``meta``), where a stray CPU tensor is an error.

What decides on values (refusals of NaN or of scales beyond fp16) has no shape alone; it is not covered here.
"""

from __future__ import annotations

import pytest
import torch

from qformats.quantize import ggml, kquants


@pytest.mark.parametrize("name", sorted(ggml.QUANTIZERS))
def test_legacy_types(name: str) -> None:
    x = torch.empty(2, 4, 32, device="meta")
    assert all(plane is None or plane.device.type == "meta" for plane in ggml.QUANTIZERS[name](x))


@pytest.mark.parametrize("name", sorted(kquants.RECIPES))
@pytest.mark.parametrize("weighted", [False, True])
def test_searches_and_codes(name: str, weighted: bool) -> None:
    recipe = kquants.RECIPES[name]
    x = torch.empty(recipe.kind.sub, 512 // recipe.kind.sub, device="meta")
    found = kquants.search(recipe, x, torch.empty_like(x) if weighted else None)
    codes = kquants.code(recipe, x, found.scale, found.low, found)
    assert codes.device.type == found.scale.device.type == "meta"


def test_a_stray_tensor_is_seen() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.where(torch.empty(4, device="meta") > 0, torch.zeros(4), torch.empty(4, device="meta"))
