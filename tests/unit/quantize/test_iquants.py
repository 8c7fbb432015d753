"""Codebook quantizers: bytes equal llama.cpp's (fixtures/ggml-quantize/make.py), loops equal their definition, bad input is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qformats import registry
from qformats.errors import BadFile, Unsupported, UsageError, WouldLose
from qformats.formats import ggml
from qformats.formats.ggml.iquants import IQUANTS
from qformats.formats.ggml.legacy import LEGACY
from qformats.quantize import can_quantize, iquants, needs_importance, rtn
from qformats.quantize.ibooks import book
from qformats.reencode import fit
from qformats.rewrite import Refused

FIXTURES = Path(__file__).parents[3] / "fixtures" / "ggml-quantize"
ROWS = np.load(FIXTURES / "rows.npz")
TYPES = [name.upper() for name in sorted(iquants.TYPES)]
WAYS = [(name, weighted) for name in TYPES for weighted in (False, True) if weighted or name.lower() not in iquants.NEEDY]


def written(name: str, weights: torch.Tensor, importance: torch.Tensor | None) -> Any:
    storage = IQUANTS[name].storage
    tensor = rtn(weights, storage, importance)
    (piece,) = ggml.write(storage, tensor, 0, tensor.shape)
    return piece.array


@pytest.mark.parametrize(("name", "weighted"), WAYS)
def test_bytes_equal_llama_cpp(name: str, weighted: bool) -> None:
    pytest.importorskip("numba")
    importance = torch.from_numpy(ROWS["importance"]) if weighted else None
    ours = written(name, torch.from_numpy(ROWS["floats"]), importance)
    theirs = np.load(FIXTURES / "iquants.npz")[f"{name} {'weighted' if weighted else 'plain'}"]
    different = [str(row) for row, same in zip(ROWS["names"], (ours == theirs).all(-1), strict=True) if not same]
    assert different == (["sparse"] if name == "IQ3_S" else [])  # there llama.cpp moves codes, see ``iquants``


@pytest.mark.parametrize(("name", "weighted"), WAYS)
def test_loops_equal_their_definition(name: str, weighted: bool) -> None:
    """Super-blocks of normal, tied, tiny, mixed and absent weights, one of each; importances with zeros and with none but zeros."""
    pytest.importorskip("numba")
    rng, recipe = np.random.default_rng(9), iquants.RECIPES[name.lower()]
    x = rng.normal(0, 0.02, (6, 256))
    x[1] = np.round(50 * x[1]) / 50
    x[2] *= 1e-30
    x[3] *= 10.0 ** rng.integers(-44, 4, 256)
    x[4] *= 10.0 ** np.repeat(rng.integers(-40, 4, 16), 16)
    x[5, :128] = 0
    q = np.exp(rng.normal(0, 2, 512))
    q[rng.random(512) < 0.3] = 0
    q[64:128] = 0
    weights, importance = torch.from_numpy(x.astype(np.float32)), torch.from_numpy(q.astype(np.float32)) if weighted else None
    one, other = (iquants.searched(recipe, weights, importance, way) for way in (iquants._loops(), None))
    assert torch.equal(one.scale, other.scale)
    assert torch.equal(one.codes.to(torch.int64), other.codes)
    assert torch.equal(one.signs.to(torch.int64), other.signs)


def test_the_fitted_scale_of_iq1_m_equals_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    w, q = torch.randn(1, 512, generator=torch.Generator().manual_seed(3)), torch.rand(512, generator=torch.Generator().manual_seed(4))
    for importance in (None, q):
        compiled = written("IQ1_M", w, importance)
        with monkeypatch.context() as patch:
            patch.setattr(iquants, "_loops", lambda: None)
            assert np.array_equal(written("IQ1_M", w, importance), compiled)


@pytest.mark.parametrize("name", TYPES)
def test_row_ranges_agree_with_the_whole_and_the_form_is_canonical(name: str) -> None:
    kind, q = IQUANTS[name], torch.rand(512, generator=torch.Generator().manual_seed(1))
    assert can_quantize(kind.storage)
    w = torch.randn(5, 512, generator=torch.Generator().manual_seed(2))
    assert rtn(w, kind.storage, q).scheme == kind.scheme((5, 512))
    assert np.array_equal(written(name, w[1:3], q), written(name, w, q)[1:3])
    assert np.array_equal(written(name, w.to(torch.bfloat16), q), written(name, w.to(torch.bfloat16).float(), q))


@pytest.mark.parametrize(("name", "weighted"), WAYS)
def test_errors_stay_below_a_step(name: str, weighted: bool) -> None:
    """No bound of llama.cpp's: a sanity check that codes, signs and scales belong together."""
    w = torch.randn(8, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    error = (rtn(w, IQUANTS[name].storage, torch.ones(512) if weighted else None).dequantize(torch.float64) - w).abs()
    assert float(error.mean() / w.abs().mean()) < {"IQ1": 0.6, "IQ2": 0.4, "IQ3": 0.25}[name[:3]]


@pytest.mark.parametrize("name", TYPES)
def test_zeros_are_zeros(name: str) -> None:
    tensor = rtn(torch.zeros(2, 256), IQUANTS[name].storage, torch.ones(256))
    assert not tensor.dequantize().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", TYPES)
def test_not_finite_is_refused_with_its_place(name: str, bad: float) -> None:
    w = torch.zeros(3, 256)
    w[1, 5] = bad
    with pytest.raises(BadFile, match="row 1, column 5") as caught:
        rtn(w, IQUANTS[name].storage, torch.ones(256))
    assert caught.value.code == "not-finite"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("size", [1.5e7, 1e10, 1e38])
def test_scales_beyond_fp16_are_refused(name: str, size: float) -> None:
    w = torch.linspace(-1, 1, 256).reshape(1, 256) * size * (3 if name[:3] == "IQ3" else 1)
    with pytest.raises(WouldLose) as caught:
        rtn(w, IQUANTS[name].storage, torch.ones(256))
    assert caught.value.code == "f16-overflow"


def test_importances_are_needed_and_checked() -> None:
    assert {"iq1_s", "iq2_xs", "iq2_xxs"} == iquants.NEEDY
    storage, w = IQUANTS["IQ2_XS"].storage, torch.ones(2, 256)
    assert needs_importance(storage) and not needs_importance(IQUANTS["IQ2_S"].storage)
    with pytest.raises(Unsupported) as needed:
        rtn(w, storage)
    assert needed.value.code == "importance-needed"
    for bad in (torch.ones(2, 256), torch.full((256,), 3e38)):
        with pytest.raises(UsageError) as caught:
            rtn(w, storage, bad)
        assert caught.value.code == "importance"
    with pytest.raises(BadFile):
        rtn(w, storage, torch.full((256,), -1.0))


@pytest.mark.parametrize("name", TYPES)
def test_codes_of_other_formats_are_never_taken(name: str) -> None:
    (storage,) = ggml.storages(registry.parse_target(f"gguf:{name.lower()}"), IQUANTS[name].scheme((1, 256)))
    source = rtn(torch.randn(1, 256, generator=torch.Generator().manual_seed(1)), LEGACY["Q4_0"].storage)
    with pytest.raises(Refused, match="do not stand for the values"):
        fit(source, storage, rounding=True)


@pytest.mark.parametrize("name", ["iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"])
def test_neighbours_are_the_nearest_entries(name: str) -> None:
    made, rng = book(name), np.random.default_rng(0)
    shells = {"iq1_s": 3, "iq2_s": 1, "iq3_s": 3}.get(name, 2)
    points = np.nonzero(made.index < 0)[0]
    assert np.array_equal((made.levels.astype(int) * made.powers).sum(1), np.argsort(made.index, kind="stable")[-len(made.levels) :])
    for point in rng.choice(points, 20):
        apart = made.levels.astype(int) - point // np.array(made.powers) % made.base
        distance = (apart * apart).sum(1)
        near = np.nonzero(distance <= np.unique(distance)[shells - 1])[0]
        expected = near[np.lexsort((near, distance[near]))]
        assert np.array_equal(made.lists[made.starts[point] : made.starts[point + 1]], expected)
