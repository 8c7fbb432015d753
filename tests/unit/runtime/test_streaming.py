"""Planes filled a few rows at a time are those of the whole tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from cases import MODELS  # noqa: E402
from checkpoints import ready  # noqa: E402

from qformats.checkpoint import open_checkpoint  # noqa: E402
from qformats.kernels.lower import lower  # noqa: E402
from qformats.runtime import skeleton, streaming  # noqa: E402
from qformats.runtime.supply import Supply  # noqa: E402

CASES = MODELS[1::5]


def names(path: Path) -> Iterator[tuple[Supply, str]]:
    with open_checkpoint(path, True) as checkpoint:
        supply = Supply.of(checkpoint, skeleton.rename(skeleton.empty_model(skeleton.config_of(checkpoint), torch.float32)))
        for name in supply.tensors:
            if supply.is_packed(name):
                yield supply, name


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of 16 rows, so that a tiny tensor has several."""
    monkeypatch.setattr(streaming, "_RANGE_WEIGHTS", 16 * 64)
    monkeypatch.setattr(streaming, "_LARGE_NBYTES", 0)


@pytest.mark.parametrize("case", CASES)
def test_ranges_make_the_planes_of_the_whole(case: str, small: None, tmp_path: Path) -> None:
    for supply, name in names(ready(case, tmp_path)):
        made = streaming.lowered_by_rows(supply, name)
        if made is not None:
            wanted = lower(supply.segments(name)[0])
            assert made.layout == wanted.layout
            for plane, values in wanted.planes.items():
                assert made.planes[plane].dtype == values.dtype
                assert torch.equal(made.planes[plane].view(torch.uint8), values.contiguous().view(torch.uint8))


def test_what_is_stored_by_rows_is_filled_by_ranges(small: None, tmp_path: Path) -> None:
    counts = {}
    for case in ("compressed-tensors/w8a8", "gptq/3b-g32-sym"):
        counts[case] = sum(streaming.lowered_by_rows(supply, name) is not None for supply, name in names(ready(case, tmp_path / case)))
    assert counts["compressed-tensors/w8a8"] and not counts["gptq/3b-g32-sym"]
