"""Every search of every type of every format: never more error than the reference, exact where weights lie on the grid, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from converters.claims import float_scheme
from qformats import registry
from qformats.errors import BadFile, UsageError, WouldLose
from qformats.formats.protocol import Target
from qformats.quantize import affine_search, half_quadratic, improves, rtn, uses_importance
from qformats.quantize.groups import grouped, ungrouped
from qformats.scheme import Cyclic, Flat, Integer, Storage, Tile
from qformats.tensor import QuantizedTensor

N, K = 64, 256


def storages() -> dict[str, Storage]:
    """All that a weight (64, 256) can be made into, by ``FORMAT:TYPE-NUMBER``."""
    found: dict[str, Storage] = {}
    for row in registry.ROWS:
        for kind in [k for k in row.types or ("",) if k not in ("f32", "f16", "bf16")] if row.writes else ():
            made = registry.format_module(row.name).storages(Target(row.name, kind or None, {}), float_scheme((N, K)))
            found |= {f"{row.name}:{kind}-{i}": storage for i, storage in enumerate(made)}
    return found


EVERY = storages()
SEARCHED = [name for name, storage in EVERY.items() if improves(storage, "best")]


def weights(n: int = N) -> torch.Tensor:
    """Normal rows with heavy tails, a row of zeros, one weight alone, a constant, numbers far from zero, very small and denormal ones."""
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(n, K, generator=generator) * 0.02
    w[1::4] *= torch.rand(w[1::4].shape, generator=generator).clamp(min=0.01) ** -0.7
    w[2], w[3], w[6] = 0.0, 0.0, 0.37
    w[3, 17] = -1.5
    w[5] = w[5] + 0.4
    w[7] *= 1e-4
    w[9] *= 1e-38
    return w


def errors(w: torch.Tensor, made: QuantizedTensor, storage: Storage, q: torch.Tensor | None) -> torch.Tensor:
    apart = (made.dequantize(torch.float64) - w) ** 2 * (1.0 if q is None else q.double())
    return grouped(apart, storage.scale_block((len(w), K))).sum(1)


@pytest.mark.parametrize("name", SEARCHED)
def test_no_group_gets_worse(name: str) -> None:
    storage, w = EVERY[name], weights()
    q = torch.exp(torch.randn(K, generator=torch.Generator().manual_seed(3)))
    for importance in (None, q):
        given = importance if uses_importance(storage) else None
        reference = rtn(w, storage, given)
        made = rtn(w, storage, importance, "best")
        assert registry.format_module(name.partition(":")[0]).can_store(storage, made.scheme)
        old, new = (errors(w, some, storage, importance) for some in (reference, made))
        assert bool((new <= old * (1 + 1e-9)).all()), float((new / old).nan_to_num(0.0).max())
        assert bool(torch.isfinite(made.dequantize(torch.float64)).all())
        assert float(new.sum()) < float(old.sum()) or name.partition(":")[2].startswith(("q1_0", "mxfp"))
        assert torch.equal(rtn(w, storage, importance, "best").codes, made.codes)


def test_types_that_are_not_searched() -> None:
    """K-quants and types with codebooks stay what they are; there is nothing else."""
    others = {name for name in EVERY if name not in SEARCHED}
    assert all(name.startswith("gguf:") and name[5:7] in ("q2", "q3", "q4", "q5", "q6", "iq") for name in others)


@pytest.mark.parametrize("name", [name for name in SEARCHED if EVERY[name].row_unit((N, K)) > 0])
def test_rows_go_by_themselves(name: str) -> None:
    storage, w = EVERY[name], weights(128 if EVERY[name].row_unit((N, K)) > 32 else N)
    unit = storage.row_unit((N, K))
    start = max(1, 16 // unit) * unit if unit < 64 else 0
    made, part = rtn(w, storage, None, "best"), rtn(w[start : start + 2 * unit], storage, None, "best")
    assert torch.equal(part.dequantize(), made.dequantize()[start : start + 2 * unit])


AFFINE = {
    "centred": Storage("int", Integer(4), 64, 4.0, zero_point=8),
    "positive": Storage("int", Integer(4), 64, 4.0, zero_point=8, negative_scale=False),
    "signed": Storage("int", Integer(8, signed=True), None, 8.0, ("float32",)),
    "between": Storage("int", Integer(4), 32, 4.0, zero_point=(0, 15)),
    "signed-between": Storage("int", Integer(3, signed=True), 64, 4.0, ("bfloat16",), zero_point=(-4, 3)),
    "offset": Storage("int", Integer(3), 64, 4.0, offset="float16"),
    "zero": Storage("int", Integer(2), 64, 4.0, zero_dtype="float32"),
    "tile": Storage("int", Integer(4), 32, 4.0, zero_point=8, rows=16),
    "tensor": Storage("int", Integer(5), None, 4.0, zero_point=(0, 31), rows=None),
    "inverse": Storage("int", Integer(4), 64, 4.0, ("float32",), zero_point=8, inverse=True),
}


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("loops", [True, False])
def test_weights_on_the_grid_come_back(name: str, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of every value under steps that every dtype holds: the search finds the step again, whatever min-max makes of them."""
    if not loops:
        monkeypatch.setattr(affine_search, "find", lambda _: None)
    storage, generator = AFFINE[name], torch.Generator().manual_seed(5)
    low, high = storage.integers.lowest, storage.top
    codes = torch.randint(low + (name == "signed"), high + 1, (N, K), generator=generator).float()
    block = storage.scale_block((N, K))
    assert isinstance(block, Tile)
    step = (2.0 ** torch.randint(-9, -2, block.counts((N, K)), generator=generator)).repeat_interleave(block.sizes[0], 0)
    step = step.repeat_interleave(block.sizes[1], 1)[:N, :K] * (1.0 if name == "inverse" else 1.25)
    zero = {"offset": 0.0, "zero": 1.25, "between": 7, "tensor": 3, "signed-between": 1}.get(name, storage.zero_point or 0)
    w = (codes - float(zero)) * step + (0.75 if name == "offset" else 0.0)  # type: ignore[arg-type]
    assert torch.equal(rtn(w, storage, None, "best").dequantize(torch.float64), w.double())


@pytest.mark.parametrize("name", AFFINE)
def test_the_loops_are_their_definitions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.rand(K, generator=torch.Generator().manual_seed(1))
    made = rtn(weights(), AFFINE[name], q, "best")
    monkeypatch.setattr(affine_search, "find", lambda _: None)
    plain = rtn(weights(), AFFINE[name], q, "best")
    assert torch.equal(made.codes, plain.codes) and torch.equal(made.dequantize(), plain.dequantize())


@pytest.mark.parametrize("piece", [1 << 20, 300])
def test_large_groups_are_searched_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affine_search, "PIECE", piece)
    monkeypatch.setattr(affine_search, "CHUNK", 100)
    w, storage = weights(), AFFINE["tensor"]
    old, new = (errors(w, rtn(w, storage, None, search), storage, None) for search in ("reference", "best"))
    assert bool((new < old).all())


@pytest.mark.parametrize("name", [n for n, s in EVERY.items() if half_quadratic.fits(s)])
def test_half_quadratic(name: str) -> None:
    storage, w = EVERY[name], weights()
    old, new = (errors(w, rtn(w, storage, None, search), storage, None) for search in ("reference", "hqq"))
    assert bool((new <= old * (1 + 1e-9)).all())
    assert name.startswith("hqq") or isinstance(storage.zero_point, tuple) or float(new.sum()) < float(old.sum())


@pytest.mark.parametrize("name", ["gptq:int4-0", "gguf:q4_0-0", "bitsandbytes:nf4-0", "fp8:fp8-0", "gguf:q4_k-0"])
def test_half_quadratic_needs_an_origin(name: str) -> None:
    with pytest.raises(UsageError) as error:
        rtn(weights(), EVERY[name], None, "hqq")
    assert error.value.code == "search"


REFUSING = ["gptq:int4-0", "awq:int4-0", "hqq:int4-0", "quanto:qint4-0", "compressed-tensors:fp8-0", "bitsandbytes:nf4-0"]


@pytest.mark.parametrize("name", REFUSING)
def test_what_is_no_number_is_refused(name: str) -> None:
    for search in ("reference", "best"):
        for bad in (float("nan"), float("inf")):
            w = weights()
            w[4, 9] = bad
            with pytest.raises(BadFile) as error:
                rtn(w, EVERY[name], None, search)
            assert error.value.code == "not-finite"


@pytest.mark.parametrize("name", AFFINE)
def test_scales_beyond_their_dtype(name: str) -> None:
    """A refusal or numbers, never an infinity."""
    w = weights()
    for size in (3e5, 3e38):
        w[8, 8], w[8, 9] = size, -size
        try:
            made = rtn(w, AFFINE[name], None, "best")
        except WouldLose as error:
            assert error.code == "f16-overflow"
        else:
            assert bool(torch.isfinite(made.dequantize(torch.float64)).all())


@pytest.mark.parametrize("block", [Tile((1, 7)), Tile((5, 7)), Tile((13, 20)), Tile((64, 64)), Flat(10), Flat(7), Cyclic(26)])
def test_groups_and_back(block: Any) -> None:
    plane = torch.arange(13 * 20).reshape(13, 20)
    found = grouped(plane, block)
    assert len(found) == torch.tensor(block.counts((13, 20))).prod()
    assert torch.equal(ungrouped(found, block, (13, 20)), plane)
    assert int((grouped(plane + 1, block, zeros=True) > 0).sum()) == 13 * 20
