"""Four-bit tables, one and two bits, weighted legacy blocks: bytes equal llama.cpp's (fixtures), loops equal their definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qformats.errors import BadFile, Unsupported, UsageError, WouldLose
from qformats.formats import ggml as blocks
from qformats.quantize import can_quantize, ggml, legacy_search, rtn, tables, ternary, uses_importance, weighing
from qformats.scheme import Storage

FIXTURES = Path(__file__).parents[3] / "fixtures"
ROWS = np.load(FIXTURES / "ggml-quantize" / "rows.npz")
WEIGHTED = ["IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
TABLES, LOW = ["IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"], ["Q1_0", "Q2_0", "TQ1_0", "TQ2_0"]


def storage_of(name: str) -> Storage:
    return blocks.BLOCK_TYPES[name].storage


def written(name: str, weights: torch.Tensor, importance: torch.Tensor | None = None) -> Any:
    tensor = rtn(weights, storage_of(name), importance)
    (piece,) = blocks.write(storage_of(name), tensor, 0, tensor.shape)
    return piece.array


@pytest.fixture(params=["loops", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "loops":
        pytest.importorskip("numba")
        return
    for module in (ggml, legacy_search, tables, ternary, weighing):
        monkeypatch.setattr(module, "_loops", lambda: None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_searched_bytes_equal_llama_cpp(name: str, weighted: bool) -> None:
    importance = torch.from_numpy(ROWS["importance"]) if weighted else None
    held = np.abs(ROWS["floats"]).max(-1) < (65504 if name.endswith("_1") else np.inf)  # a minimum beyond fp16 is refused
    assert held.sum() >= len(held) - 1
    ours = written(name, torch.from_numpy(ROWS["floats"][held]), importance)
    theirs = np.load(FIXTURES / "ggml-quantize" / f"{name.lower()}.npz")["weighted" if weighted else "plain"][held]
    different = [str(row) for row, same in zip(ROWS["names"][held], (ours == theirs).all(-1), strict=True) if not same]
    assert not different


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["IQ4_NL", "MXFP4", "NVFP4", *LOW])
def test_rounded_bytes_equal_llama_cpp(name: str) -> None:
    data = np.load(FIXTURES / "ggml" / f"{name.lower()}.npz")
    held = np.abs(data["floats"]).max(-1) <= tables.LARGEST.get(name.lower(), 65504)  # beyond is refused
    assert held.sum() >= len(held) - 1
    assert np.array_equal(written(name, torch.from_numpy(data["floats"][held])), data["quantized"][held])


def spreads(n: int, k: int) -> np.ndarray[Any, Any]:
    """Rows of every magnitude, ties, zeros of both signs, constants."""
    rng = np.random.default_rng(9)
    x = rng.normal(size=(n, k))
    x[0], x[1], x[2] = np.where(rng.random(k) < 0.5, -0.0, 0.0), 0.7, -0.7
    x[3:6] = np.round(x[3:6] * 4) / 4
    x[6:9] *= 10.0 ** rng.integers(-44, 2, (3, k))
    x[9:12] *= 10.0 ** np.repeat(rng.integers(-44, 2, (3, k // 32)), 32, axis=1)
    x[12], x[13], x[14] = np.abs(x[12]), -np.abs(x[13]), x[14] * 1e-39
    return x.astype(np.float32)


@pytest.mark.parametrize("name", [*WEIGHTED, *TABLES[2:], *LOW])
@pytest.mark.parametrize("importance", ["plain", "uniform", "half zeros", "tiny"])
def test_loops_equal_their_definition(name: str, importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    if importance != "plain" and not uses_importance(storage_of(name)):
        pytest.skip("it ignores importances")
    x, rng = torch.from_numpy(spreads(17, 768)), np.random.default_rng(3)
    q = rng.random(768).astype(np.float32)
    weights = {"plain": None, "uniform": q, "half zeros": np.where(rng.random(768) < 0.5, np.float32(0), q), "tiny": q * np.float32(1e-30)}
    chosen = weights[importance]
    given = None if chosen is None else torch.from_numpy(chosen)
    ours = written(name, x, given)
    for module in (ggml, legacy_search, tables, ternary, weighing):
        monkeypatch.setattr(module, "_loops", lambda: None)
    assert np.array_equal(ours, written(name, x, given))


@pytest.mark.parametrize("name", [*WEIGHTED, *TABLES[2:], *LOW])
def test_row_ranges_and_single_rows_agree_with_the_whole(name: str) -> None:
    w = torch.from_numpy(spreads(17, 768))
    for importance in (None, torch.rand(768, generator=torch.Generator().manual_seed(1))) if name in WEIGHTED else (None,):
        whole = written(name, w, importance)
        assert np.array_equal(written(name, w[5:12], importance), whole[5:12])
        assert np.array_equal(written(name, w[1:2], importance), whole[1:2])


@pytest.mark.parametrize("name", [*TABLES, *LOW])
def test_the_tensor_is_in_the_canonical_form_and_near(name: str) -> None:
    w = torch.randn(4, 768, generator=torch.Generator().manual_seed(2))
    tensor = rtn(w, storage_of(name))
    assert can_quantize(storage_of(name)) and tensor.scheme == blocks.BLOCK_TYPES[name].scheme((4, 768))
    error = (tensor.dequantize(torch.float64) - w).norm() / w.norm()
    assert float(error) < (0.13 if name in TABLES else 0.95)


@pytest.mark.parametrize("name", ["Q1_0", "Q2_0", "TQ1_0", "TQ2_0"])
def test_models_of_one_bit_or_three_values_survive(name: str) -> None:
    rng = np.random.default_rng(4)
    choices = [-1, 1] if name == "Q1_0" else [-1, 0, 1]
    w = torch.from_numpy(rng.choice(choices, (4, 512)).astype(np.float32) * np.float32(0.03125))
    assert torch.equal(rtn(w, storage_of(name)).dequantize(torch.float32), w)


def test_nvfp4_has_no_tensor_factor_so_small_weights_become_zeros() -> None:
    w = torch.full((1, 64), 0.005)
    tensor = rtn(w, storage_of("NVFP4"))
    assert len(tensor.scales) == 1 and not bool(tensor.dequantize(torch.float32).any())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [*TABLES, *LOW, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_not_finite_is_refused_with_its_place(name: str, bad: float) -> None:
    w = torch.zeros(3, 256)
    w[1, 5] = bad
    for importance in (None, torch.ones(256)) if name in WEIGHTED else (None,):
        with pytest.raises(BadFile, match="row 1, column 5") as caught:
            rtn(w, storage_of(name), importance)
        assert caught.value.code == "not-finite"


@pytest.mark.parametrize("name", [*TABLES[:2], "NVFP4", *LOW, *WEIGHTED])
@pytest.mark.parametrize("size", [1e10, 1e25, 3e38])
def test_weights_beyond_the_scales_are_refused(name: str, size: float) -> None:
    w = torch.linspace(-1, 1, 256).reshape(1, 256) * size
    for importance in (None, torch.ones(256)) if name in WEIGHTED else (None,):
        with pytest.raises(WouldLose) as caught:
            rtn(w, storage_of(name), importance)
        assert caught.value.code == "f16-overflow"


def test_importances_are_taken_where_they_count_and_checked() -> None:
    w = torch.ones(2, 256)
    for name in ("MXFP4", "NVFP4", "Q8_0", *LOW):
        assert not uses_importance(storage_of(name))
        with pytest.raises(Unsupported) as ignored:
            rtn(w, storage_of(name), torch.ones(256))
        assert ignored.value.code == "no-importance"
    for name in WEIGHTED:
        with pytest.raises(UsageError) as shape:
            rtn(w, storage_of(name), torch.ones(128))
        assert shape.value.code == "importance"
        with pytest.raises(BadFile) as caught:
            rtn(w, storage_of(name), torch.full((256,), -1.0))
        assert caught.value.code == "not-finite"


def test_nearest_level_takes_the_upper_of_two_and_the_last_for_nan() -> None:
    x = torch.tensor([-500.0, -127.0, -115.5, -115.6, -4.5, 0.0, 7.0, 101.0, 500.0, float("nan"), float("inf"), -float("inf")])
    assert tables.nearest_level(x).tolist() == [0, 0, 1, 0, 8, 8, 9, 15, 15, 15, 15, 0]
