"""Rounding to small floats: against casts of torch, compressed-tensors' own rules where it is installed, and sums over all levels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qformats import grids
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats.ggml.tables import TABLES
from qformats.quantize import floats, rtn, uses_importance
from qformats.scheme import Factor, Float, Storage, Tile
from qformats.tensor import Param, QuantizedTensor

BLOCKS = Storage("fp8", Float("e4m3fn"), 8, 8.1, ("float32",), rows=4)
ROW = Storage("fp8", Float("e4m3fn"), None, 8.1, ("float32",))
TENSOR = Storage("fp8", Float("e5m2"), None, 8.0, ("float32",), rows=None)
MXFP8 = Storage("mxfp8", Float("e4m3fn"), 32, 8.25, scale_grid=Float("e8m0"))
MXFP4 = Storage("mxfp4-ct", Float("e2m1"), 32, 4.25, scale_grid=Float("e8m0"))
MXFP6 = Storage("mxfp6", Float("e2m3"), 32, 6.25, scale_grid=Float("e8m0"))
NVFP4 = Storage("nvfp4", Float("e2m1"), 16, 4.5, scale_grid=Float("e4m3fn"), factor=Factor("float32"), whole=True)
NVFP4_CT = replace(NVFP4, factor=Factor("float32", inverse=True))
INVERSE = replace(ROW, inverse=True)
ALL = [BLOCKS, ROW, TENSOR, MXFP8, MXFP4, MXFP6, NVFP4, NVFP4_CT, INVERSE]


def _numbers(param: Param) -> torch.Tensor:
    assert isinstance(param.values, torch.Tensor)
    return param.values


def _weights(n: int = 10, k: int = 64, seed: int = 0) -> torch.Tensor:
    made = torch.randn((n, k), generator=torch.Generator().manual_seed(seed))
    made[1] = 0
    return made * torch.logspace(-3, 1, k)


@pytest.mark.parametrize("name", sorted(floats.TYPES))
def test_levels_and_ties(name: str) -> None:
    """Every level is its own nearest; of two levels the middle goes to the even code; beyond the last all saturate."""
    values = grids.float_values(name)
    finite = values.isfinite()
    codes = torch.arange(len(values), dtype=torch.uint8)
    made = floats.to_codes(values[finite].to(torch.float32), name)
    assert torch.equal(made, codes[finite])
    count = int((finite & (values >= 0) & ~torch.signbit(values)).sum())
    positive = values[:count]
    middles = ((positive[1:] + positive[:-1]) / 2).to(torch.float32)
    made = floats.to_codes(middles, name)
    assert bool((made % 2 == 0).all())
    assert floats.to_codes(torch.tensor([1e30]), name).item() == count - 1
    up = floats.to_codes(torch.nextafter(middles, torch.tensor(1e9)), name)
    assert torch.equal(up, codes[1:count])


@pytest.mark.parametrize("storage", ALL, ids=lambda s: f"{s.type}-{s.group}-{s.inverse}-{s.factor and s.factor.inverse}")
def test_form_and_error(storage: Storage) -> None:
    """The tensor is in the storage's form, zeros stay zeros, and no weight is off by more than half a step of its scale's last level."""
    w = _weights()
    made = rtn(w, storage)
    assert made.scales[0].block == storage.scale_block((10, 64))
    value = made.dequantize(torch.float64)
    assert bool((value[1] == 0).all())
    spread = value - w
    assert float((spread.abs() / w.abs().amax(1, keepdim=True).clamp(min=1e-9)).max()) < (0.35 if "4" in storage.type else 0.14)


def test_plain_scales_are_the_largest_over_448() -> None:
    w = _weights()
    made = rtn(w, BLOCKS)
    tiles = torch.nn.functional.pad(w, (0, 0, 0, 2)).reshape(3, 4, 8, 8).abs().amax((1, 3))
    assert torch.equal(_numbers(made.scales[0]), tiles / 448)
    scale = (tiles / 448).repeat_interleave(4, 0)[:10].repeat_interleave(8, 1)
    expected = (w / scale).nan_to_num(0.0).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(made.codes, expected)


def test_powers_of_two_do_not_saturate_eight_bits() -> None:
    w = torch.zeros((4, 32))
    w[0, 0], w[1, 0], w[2, 0] = 448.0, 449.0, 1e-38
    made = rtn(w, MXFP8)
    held = made.scales[0].values
    assert isinstance(held, QuantizedTensor)
    assert held.codes[:, 0].tolist() == [127, 128, 0, 127]
    assert made.codes[0, 0].item() == 0x7E


def test_powers_of_two_under_four_bits() -> None:
    """Just under 7 the last level 6 serves, from 7 on the scale doubles (compressed-tensors' ``round_to_power_2``)."""
    w = torch.zeros((3, 32))
    w[0, 0], w[1, 0], w[2, 0] = 6.99, 7.0, 4.0
    held = rtn(w, MXFP4).scales[0].values
    assert isinstance(held, QuantizedTensor)
    assert held.codes[:, 0].tolist() == [127, 128, 127]


@pytest.mark.parametrize("bits", [4, 6])
def test_powers_of_two_of_compressed_tensors(bits: int) -> None:
    mxfp = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils")
    largest = torch.cat([torch.logspace(-20, 20, 500), torch.tensor([6.0, 7.0, 7.5, 7.75, 8.0])])
    w = torch.zeros((len(largest), 32))
    w[:, 3] = largest
    held = rtn(w, MXFP4 if bits == 4 else MXFP6).scales[0].values
    assert isinstance(held, QuantizedTensor)
    assert torch.equal(held.codes[:, 0].to(torch.float32), mxfp.generate_mx_scales(largest, bits))


def test_factor_of_nvfp4_both_ways() -> None:
    """ModelOpt's multiplier and compressed-tensors' divisor, with the block scales that follow from them."""
    w = _weights()
    made, divided = rtn(w, NVFP4), rtn(w, NVFP4_CT)
    largest = w.abs().max()
    assert torch.equal(_numbers(made.scales[1]), (largest / (448 * 6)).reshape(1, 1))
    assert torch.equal(_numbers(divided.scales[1]), (448 * 6 / largest).reshape(1, 1))
    assert not made.scales[1].inverse and divided.scales[1].inverse
    blocks = w.reshape(10, 4, 16).abs().amax(-1)
    for tensor, factor in ((made, largest / (448 * 6)), (divided, 1 / (448 * 6 / largest))):
        held = tensor.scales[0].values
        assert isinstance(held, QuantizedTensor)
        expected = (blocks / factor / 6).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(held.codes[blocks > 0], expected[blocks > 0])


@pytest.mark.parametrize("storage", ALL, ids=lambda s: f"{s.type}-{s.group}-{s.inverse}-{s.factor and s.factor.inverse}")
def test_search_lowers_the_error_of_every_block(storage: Storage) -> None:
    w = _weights(seed=3)
    q = torch.rand(64, generator=torch.Generator().manual_seed(4)) + 0.01
    block = storage.scale_block((10, 64))
    assert isinstance(block, Tile)
    for importance in (None, q):
        errors = []
        for made in (rtn(w, storage), rtn(w, storage, importance, search="best")):
            off = (made.dequantize(torch.float64) - w) ** 2 * (1.0 if importance is None else importance)
            rows, group = block.sizes
            padded = torch.nn.functional.pad(off, (0, -64 % group, 0, -10 % rows))
            errors.append(padded.reshape(-(-10 // rows), rows, -(-64 // group), group).sum((1, 3)))
        assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
        assert float(errors[1].sum()) <= float(errors[0].sum())


def test_rows_go_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    w = _weights()
    expected = rtn(w, BLOCKS, search="best")
    monkeypatch.setattr(floats, "CHUNK", 64)
    made = rtn(w, BLOCKS, search="best")
    assert torch.equal(made.codes, expected.codes) and torch.equal(_numbers(made.scales[0]), _numbers(expected.scales[0]))
    assert torch.equal(rtn(w[4:8], BLOCKS).codes, rtn(w, BLOCKS).codes[4:8])


def test_ggml_keeps_its_own() -> None:
    for kind in TABLES.values():
        assert not floats.fits(kind.storage)
    assert floats.fits(NVFP4_CT) and floats.fits(MXFP8) and uses_importance(NVFP4_CT, "best") and not uses_importance(NVFP4_CT)


def test_refusals() -> None:
    w = _weights()
    w[3, 5] = float("nan")
    with pytest.raises(BadFile) as bad:
        rtn(w, BLOCKS)
    assert bad.value.code == "not-finite"
    with pytest.raises(UsageError) as wrong:
        rtn(_weights(), BLOCKS, torch.ones(3), search="best")
    assert wrong.value.code == "importance"
    with pytest.raises(Unsupported) as ignored:
        rtn(_weights(), BLOCKS, torch.ones(64))
    assert ignored.value.code == "no-importance"
    with pytest.raises(Unsupported):
        rtn(torch.ones(4, 64), Storage("x", Float("e8m0"), 8, 8.0))
