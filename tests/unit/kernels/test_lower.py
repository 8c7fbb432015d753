"""Lowered planes hold what the tensor holds: it comes back bit for bit, and any rows of it have the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import ALL, ready
from test_gallery import GALLERY

import qformats
from qformats.kernels import packing
from qformats.kernels.layout import Layout, widths
from qformats.kernels.lower import lower, raised
from qformats.rewrite import drop_trivial_group_index
from qformats.tensor import Param, QuantizedTensor

torch.set_num_threads(1)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("columns", [1, 16, 33, 128, 200])
def test_codes_survive_their_planes(bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (5, columns), generator=generator, dtype=torch.int32)
    codes = codes if bits > 8 else codes.to(torch.uint8)
    planes = packing.split(codes, bits)
    assert all(plane.shape[1] == packing.row_nbytes(columns, width) for plane, width in zip(planes, widths(bits), strict=True))
    assert torch.equal(packing.join(planes, bits, columns), codes)


def test_a_run_of_16_bytes_holds_vectors_of_16_columns() -> None:
    plane = packing.pack(torch.arange(32, dtype=torch.uint8).reshape(1, 32) % 16, 4)
    assert plane.tolist() == [[(column % 16) * 17 for column in range(16)]]
    plane = packing.pack(torch.tensor([[3] * 16 + [2] * 16 + [1] * 16 + [0] * 16], dtype=torch.uint8), 2)
    assert plane.tolist() == [[0b00_01_10_11] * 16]


def raw(values: torch.Tensor) -> bytes:
    return values.reshape(-1).clone().view(torch.uint8).numpy().tobytes()


def same(a: object, b: object) -> bool:
    """Whether two parameters or tensors are the same bits."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, Param) and isinstance(b, Param):
        return (a.block, a.inverse, a.rounded_to) == (b.block, b.inverse, b.rounded_to) and same(a.values, b.values)
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        fields = ("codes", "zero_point", "offset", "signs", "group_index", "codebook")
        scales = len(a.scales) == len(b.scales) and all(same(x, y) for x, y in zip(a.scales, b.scales, strict=True))
        return (a.shape, a.grid) == (b.shape, b.grid) and scales and all(same(getattr(a, f), getattr(b, f)) for f in fields)
    return a is None and b is None


def check(t: QuantizedTensor) -> None:
    t = drop_trivial_group_index(t)
    lowered = lower(t)
    assert same(raised(lowered), t)
    assert tuple(lowered.planes) == lowered.layout.names
    assert Layout.parse(lowered.layout.text) == lowered.layout
    assert set(json.loads(lowered.layout.text)[0]) == set(t.shape)
    wanted = t.dequantize(torch.float32).reshape(-1, t.shape[-1])
    rows = len(wanted)
    picked = torch.tensor([rows - 1, 0, rows // 2])
    for part in (slice(0, rows), slice(1, rows), slice(rows // 3, rows // 3 + 1), picked):
        found = lowered.dequantize(part)
        assert torch.equal(found.view(torch.int32), wanted[part].view(torch.int32)), part


@pytest.mark.parametrize("name", list(GALLERY))
def test_every_kind_of_quantization_survives(name: str) -> None:
    check(GALLERY[name]())


@pytest.mark.parametrize("case", ALL)
def test_every_fixture_survives(case: str, tmp_path: Path) -> None:
    with qformats.open(ready(case, tmp_path)) as checkpoint:
        names = [name for name in checkpoint.modules if checkpoint.is_quantized(name)]
        for name in names[:2]:
            t = checkpoint.read(name)
            assert isinstance(t, QuantizedTensor)
            check(t)

