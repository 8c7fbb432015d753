"""Legacy ggml quantizers: bytes equal llama.cpp's (fixtures/ggml/make.py), loops equal their definition, stated bounds hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qformats.errors import BadFile, Unsupported, WouldLose
from qformats.formats import ggml as blocks
from qformats.formats.ggml.legacy import LEGACY
from qformats.quantize import can_quantize, ggml, rtn
from qformats.scheme import Integer, Storage, SubScale

FIXTURES = Path(__file__).parents[3] / "fixtures" / "ggml"
TYPES = list(LEGACY)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("loops", [True, False], ids=["loops", "torch"])
def test_bytes_equal_llama_cpp(name: str, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not loops:
        monkeypatch.setattr(ggml, "_loops", lambda: None)
    data, storage = np.load(FIXTURES / f"{name.lower()}.npz"), LEGACY[name].storage
    tensor = rtn(torch.from_numpy(data["floats"]), storage)
    (piece,) = blocks.write(storage, tensor, 0, tensor.shape)
    assert np.array_equal(piece.array, data["quantized"])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("spread", ["normal", "heavy", "grid", "wide"])
def test_loops_equal_their_definition(name: str, spread: str) -> None:
    loops = pytest.importorskip("qformats.loops.quantize")
    rng = np.random.default_rng(7)
    x = rng.normal(size=(500, 32))
    x = {"normal": x, "heavy": x**5, "grid": np.round(x * 4) / 4, "wide": x * 10.0 ** rng.integers(-44, 4, (500, 1))}[spread]
    w = torch.from_numpy(x.astype(np.float32)).reshape(10, 50, 32)
    *ours, tops = ggml._compiled(loops, w, LEGACY[name].storage)
    for one, other, top in zip(ours, ggml.QUANTIZERS[name.lower()](w), [None, *tops], strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert np.array_equal(bits(one), bits(other))
            assert top is None or top == float(other.abs().max())


def bits(values: torch.Tensor) -> Any:
    return values.contiguous().numpy().view(np.uint8)


@pytest.mark.parametrize("name", TYPES)
def test_error_bounds(name: str) -> None:
    kind = LEGACY[name]
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)) * 0.02
    tensor = rtn(w, kind.storage)
    d = tensor.scales[0].values
    assert isinstance(d, torch.Tensor)
    step = d.double().abs().repeat_interleave(32, -1)
    near = 0.5 + 2**kind.bits * 2**-11
    bound = step * (1.0 if kind.zero_point is not None else near)
    if tensor.offset is not None:
        assert isinstance(tensor.offset.values, torch.Tensor)
        bound = bound + tensor.offset.values.double().abs().repeat_interleave(32, -1) * 2**-11
    tiny = 2**kind.bits * 2**-25  # d below 2^-14 is stored in steps of 2^-24
    assert bool(((tensor.dequantize(torch.float64) - w.double()).abs() <= bound + tiny).all())


@pytest.mark.parametrize("name", TYPES)
def test_row_ranges_agree_with_the_whole(name: str) -> None:
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(4))
    storage = LEGACY[name].storage
    assert torch.equal(rtn(w, storage).codes[2:5], rtn(w[2:5], storage).codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused_with_its_place(bad: float) -> None:
    w = torch.zeros(3, 32)
    w[1, 5] = bad
    with pytest.raises(BadFile, match="row 1, column 5") as caught:
        rtn(w, LEGACY["Q8_0"].storage)
    assert caught.value.code == "not-finite"


@pytest.mark.parametrize("name", TYPES)
def test_scales_beyond_fp16_are_refused(name: str) -> None:
    w = torch.zeros(1, 32)
    w[0, :2] = torch.tensor([-3e7, 3e7])
    with pytest.raises(WouldLose) as caught:
        rtn(w, LEGACY[name].storage)
    assert caught.value.code == "f16-overflow"


def test_other_types_and_ragged_rows_are_refused() -> None:
    unknown = Storage("two-level", Integer(4), 256, 4.5, sub_scale=SubScale(32, Integer(6), offset=True))
    assert not can_quantize(unknown)
    with pytest.raises(Unsupported) as caught:
        rtn(torch.zeros(1, 256), unknown)
    assert caught.value.code == "no-quantizer"
    with pytest.raises(Unsupported) as caught:
        rtn(torch.zeros(1, 48), LEGACY["Q4_0"].storage)
    assert caught.value.code == "k-multiple"


def test_half_precision_sources_round_once() -> None:
    w = torch.randn(2, 64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    storage = LEGACY["Q5_0"].storage
    assert torch.equal(rtn(w, storage).codes, rtn(w.float(), storage).codes)
