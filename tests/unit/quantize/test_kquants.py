"""K-quantizers: bytes equal llama.cpp's (fixtures/ggml-quantize/make.py), loops equal their definition, bad input is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qformats.errors import BadFile, Unsupported, UsageError, WouldLose
from qformats.formats import ggml
from qformats.formats.ggml.kquants import KQUANTS
from qformats.formats.ggml.legacy import LEGACY
from qformats.quantize import can_quantize, kquants, ksearch, rtn

FIXTURES = Path(__file__).parents[3] / "fixtures" / "ggml-quantize"
ROWS = np.load(FIXTURES / "rows.npz")
TYPES = list(KQUANTS)


def written(name: str, weights: torch.Tensor, importance: torch.Tensor | None = None) -> Any:
    storage = KQUANTS[name].storage
    tensor = rtn(weights, storage, importance)
    (piece,) = ggml.write(storage, tensor, 0, tensor.shape)
    return piece.array


@pytest.fixture(params=["loops", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(kquants, "_loops", lambda: None)
    else:
        pytest.importorskip("numba")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_bytes_equal_llama_cpp(name: str, weighted: bool) -> None:
    importance = torch.from_numpy(ROWS["importance"]) if weighted else None
    ours = written(name, torch.from_numpy(ROWS["floats"]), importance)
    theirs = np.load(FIXTURES / f"{name.lower()}.npz")["weighted" if weighted else "plain"]
    different = [str(row) for row, same in zip(ROWS["names"], (ours == theirs).all(-1), strict=True) if not same]
    assert not different


@pytest.mark.parametrize("name", TYPES)
def test_row_ranges_and_single_rows_agree_with_the_whole(name: str) -> None:
    w, q = torch.from_numpy(ROWS["floats"]), torch.from_numpy(ROWS["importance"])
    for importance in (None, q):
        whole = written(name, w, importance)
        assert np.array_equal(written(name, w[3:8], importance), whole[3:8])
        assert np.array_equal(written(name, w[1:2], importance), whole[1:2])


@pytest.mark.parametrize("name", TYPES)
def test_errors_stay_below_a_step(name: str) -> None:
    """No bound of llama.cpp's: a sanity check that codes, sub-scales and minima belong together."""
    w = torch.randn(8, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    error = (rtn(w, KQUANTS[name].storage).dequantize(torch.float64) - w).abs()
    assert float(error.mean() / w.abs().mean()) < {"Q2_K": 0.3, "Q3_K": 0.2, "Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.03}[name]


@pytest.mark.parametrize("name", TYPES)
def test_the_tensor_is_in_the_canonical_form(name: str) -> None:
    kind = KQUANTS[name]
    assert can_quantize(kind.storage)
    tensor = rtn(torch.randn(2, 256, generator=torch.Generator().manual_seed(2)), kind.storage)
    assert tensor.scheme == kind.scheme((2, 256))


def test_half_precision_sources_round_once() -> None:
    w = torch.randn(2, 256, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    assert np.array_equal(written("Q4_K", w), written("Q4_K", w.float()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", TYPES)
def test_not_finite_is_refused_with_its_place(name: str, bad: float) -> None:
    w = torch.zeros(3, 256)
    w[1, 5] = bad
    with pytest.raises(BadFile, match="row 1, column 5") as caught:
        rtn(w, KQUANTS[name].storage)
    assert caught.value.code == "not-finite"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("size", [1e10, 1e25, 3e38])
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_beyond_fp16_are_refused(name: str, size: float, weighted: bool) -> None:
    w = torch.linspace(-1, 1, 256).reshape(1, 256) * size
    with pytest.raises(WouldLose) as caught:
        rtn(w, KQUANTS[name].storage, torch.ones(256) if weighted else None)
    assert caught.value.code == "f16-overflow"


def test_bad_importances_are_refused() -> None:
    storage, w = KQUANTS["Q4_K"].storage, torch.ones(2, 256)
    with pytest.raises(UsageError, match="256 columns") as shape:
        rtn(w, storage, torch.ones(2, 256))
    assert shape.value.code == "importance"
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(BadFile) as caught:
            rtn(w, storage, torch.full((256,), bad))
        assert caught.value.code == "not-finite"
    with pytest.raises(Unsupported) as ignored:
        rtn(w, LEGACY["Q8_0"].storage, torch.ones(256))
    assert ignored.value.code == "no-importance"


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(Unsupported) as caught:
        rtn(torch.zeros(1, 128), KQUANTS["Q6_K"].storage)
    assert caught.value.code == "k-multiple"


def test_nearest_rounds_ties_to_even_and_wraps_as_the_bits_do() -> None:
    x = torch.tensor([0.5, 1.5, -0.5, -2.5, 4194303.0, float("nan"), float("inf"), -float("inf"), 8388609.0])
    assert ksearch.nearest(x).tolist() == [0, 2, 0, -2, 4194303, 0, -4194304, -4194304, -2097152]


def test_roots_are_correctly_rounded() -> None:
    rng = np.random.default_rng(0)
    x = (rng.random(100000) * 10.0 ** rng.integers(-44, 38, 100000)).astype(np.float32)
    assert np.array_equal(ksearch.root(torch.from_numpy(x)).numpy(), np.sqrt(x))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("importance", ["plain", "uniform", "half zeros", "tiny"])
def test_loops_equal_their_definition(name: str, importance: str) -> None:
    """Every plane; elements and sub-blocks of every magnitude, more sub-scales of one sign than the other, groups that fill no lanes."""
    loops, rng = pytest.importorskip("qformats.loops.kquantize"), np.random.default_rng(9)
    recipe, x = kquants.RECIPES[name.lower()], rng.normal(0, 0.02, (17, 768))
    x[3:5] *= 10.0 ** rng.integers(-44, 4, (2, 768))
    x[5:7] *= 10.0 ** np.repeat(rng.integers(-44, 4, (2, 48)), 16, axis=1)
    x[7] = np.where(rng.random(768) < 0.03, x[7], 0)
    x[8], x[9], x[10], x[11] = np.abs(x[8]), 100 + x[9], np.round(x[10] * 100) / 4, 0
    q = rng.random(768).astype(np.float32)
    choices = {"plain": None, "uniform": q, "half zeros": np.where(rng.random(768) < 0.5, np.float32(0), q), "tiny": q * np.float32(1e-30)}
    weights = None if choices[importance] is None else torch.from_numpy(choices[importance])
    rows = torch.from_numpy(x.astype(np.float32))
    for some in (rows, rows[:1], rows[6:12]):
        for ours, theirs in zip(kquants.compiled(recipe, some, weights, loops), kquants.defined(recipe, some, weights), strict=True):
            assert ours.shape == theirs.shape and ours.contiguous().numpy().tobytes() == theirs.contiguous().numpy().tobytes()
