"""The better search: no block is ever worse than the reference's, most are better, and what it makes are ordinary blocks."""

from __future__ import annotations

import pytest
import torch

from qformats.errors import UsageError
from qformats.formats import ggml as blocks
from qformats.quantize import best, improves, rtn, uses_importance
from qformats.scheme import Storage
from qformats.tensor import QuantizedTensor

TYPES = sorted(best.TYPES)
K = 512
LARGEST = {"nvfp4": 2600.0}
KINDS = ("normal", "heavy", "uniform", "grid", "zeros", "positive", "wide", "outlier", "huge")


def storage_of(name: str) -> Storage:
    return blocks.BLOCK_TYPES[name.upper()].storage


def rows(kind: str, name: str = "", count: int = 12) -> torch.Tensor:
    g = torch.Generator().manual_seed(len(kind))
    x = torch.randn(count, K, generator=g)
    scale = 10.0 ** torch.randint(-12, 4, (count, K // 16), generator=g).repeat_interleave(16, -1).float()
    spike = torch.where(torch.rand(count, K, generator=g) < 0.01, 30.0, 1.0)
    made = {
        "normal": x * 0.02,
        "heavy": x**5,
        "uniform": torch.rand(count, K, generator=g) - 0.5,
        "grid": torch.round(x * 2) / 4,
        "zeros": torch.where(x > 1, x, 0.0),
        "positive": x.abs() + 3,
        "wide": x * scale,
        "outlier": x * spike,
        "huge": x.clamp(-2, 2) * 15000,
    }[kind]
    made[0] = 0
    return made.clamp(-LARGEST.get(name, 65000.0), LARGEST.get(name, 65000.0))


def importances(seed: int = 3) -> torch.Tensor:
    q = torch.exp(2 * torch.randn(K, generator=torch.Generator().manual_seed(seed)))
    q[5:70] = 0
    return q


def errors(tensor: QuantizedTensor, x: torch.Tensor, q: torch.Tensor | None, storage: Storage) -> torch.Tensor:
    """float64 (blocks,): the weighted squared error under each scale."""
    square = (tensor.dequantize(torch.float64) - x.double()) ** 2
    return (square if q is None else square * q.double()).reshape(-1, storage.group or K).sum(-1)


def reference(x: torch.Tensor, storage: Storage, q: torch.Tensor | None) -> QuantizedTensor:
    return rtn(x, storage, q if uses_importance(storage) else None)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_no_block_is_worse(name: str, kind: str, weighted: bool) -> None:
    storage, x, q = storage_of(name), rows(kind, name), importances() if weighted else None
    before, after = errors(reference(x, storage, q), x, q, storage), errors(rtn(x, storage, q, "best"), x, q, storage)
    assert bool((after <= before * (1 + 1e-12)).all())


LESS = {"q4_0": 0.95, "q5_0": 0.95, "q8_0": 0.9, "q4_1": 0.85, "q5_1": 0.85, "iq4_nl": 0.96, "mxfp4": 0.97, "nvfp4": 0.8,
        "q1_0": 1.0, "q2_0": 0.3, "tq1_0": 0.35, "tq2_0": 0.35}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_normal_rows_have_less_error(name: str) -> None:
    """Q1_0's reference is already the best without importances."""
    x, storage = torch.randn(64, K, generator=torch.Generator().manual_seed(1)) * 0.02, storage_of(name)
    before, after = (errors(t, x, None, storage).sum() for t in (reference(x, storage, None), rtn(x, storage, None, "best")))
    assert after <= before * LESS[name]
    q = importances()
    before, after = (errors(t, x, q, storage).sum() for t in (reference(x, storage, q), rtn(x, storage, q, "best")))
    assert after < before * 0.99


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_row_ranges_agree_and_blocks_read_back(name: str, weighted: bool) -> None:
    storage, x, q = storage_of(name), rows("outlier"), importances() if weighted else None
    tensor = rtn(x, storage, q, "best")
    (piece,) = blocks.write(storage, tensor, 0, tensor.shape)
    for start, stop in ((0, 1), (3, 4), (5, 12)):
        part = rtn(x[start:stop], storage, q, "best")
        (some,) = blocks.write(storage, part, start, tensor.shape)
        assert torch.equal(torch.from_numpy(some.array), torch.from_numpy(piece.array[start:stop]))
    kind = blocks.BLOCK_TYPES[name.upper()]
    again = kind.to_tensor(*kind.unpack_blocks(torch.from_numpy(piece.array)))
    assert torch.equal(again.codes, tensor.codes) and again.scheme == tensor.scheme
    assert torch.equal(again.dequantize(torch.float64), tensor.dequantize(torch.float64))


@pytest.mark.parametrize("name", TYPES)
def test_floats_that_are_blocks_keep_their_codes(name: str) -> None:
    storage = storage_of(name)
    x = reference(rows("normal"), storage, None).dequantize(torch.float32)
    ours, theirs = rtn(x, storage, None, "best"), reference(x, storage, None)
    if bool((errors(theirs, x, None, storage) == 0).all()):
        assert torch.equal(ours.codes, theirs.codes)
    assert bool((errors(ours, x, None, storage) <= errors(theirs, x, None, storage)).all())


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_loops_equal_their_definition(name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("qformats.loops.best")
    storage, q = storage_of(name), importances() if weighted else None
    x = torch.cat([rows(kind, name, 9) for kind in KINDS])
    ours = rtn(x, storage, q, "best")
    monkeypatch.setattr(best, "_loops", lambda: None)
    theirs = rtn(x, storage, q, "best")
    kind = blocks.BLOCK_TYPES[name.upper()]
    for one, other in zip(kind.planes(ours), kind.planes(theirs), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_XS", "IQ3_S"])
def test_other_types_keep_the_reference(name: str) -> None:
    storage, x = storage_of(name), rows("normal", count=4)
    assert not improves(storage, "best")
    assert torch.equal(rtn(x, storage, None, "best").codes, rtn(x, storage).codes)


def test_unknown_words_and_other_shapes_are_refused() -> None:
    storage = storage_of("q4_0")
    with pytest.raises(UsageError) as caught:
        rtn(rows("normal"), storage, None, "better")
    assert caught.value.code == "search"
    with pytest.raises(UsageError) as caught:
        rtn(rows("normal"), storage_of("q8_0"), torch.ones(3), "best")
    assert caught.value.code == "importance"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_every_step_stays_on_its_device(name: str, weighted: bool) -> None:
    """Shapes alone (``meta``): a stray tensor of the CPU would be refused."""
    recipe, run = best.RECIPES[name], storage_of(name).group
    assert run is not None
    x = torch.empty(run, 8, device="meta")
    codes = torch.empty(run, 8, device="meta", dtype=torch.int8 if name == "q8_0" else torch.uint8)
    scale = torch.empty(8, device="meta", dtype=torch.uint8 if recipe.small else torch.float16)
    low = torch.empty_like(scale) if recipe.inwards else None
    made = best._better(recipe, x, x if weighted else None, codes, scale, low)
    assert all(plane.device.type == "meta" for plane in made)
