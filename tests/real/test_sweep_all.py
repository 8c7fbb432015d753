"""The sweep of tests/unit/convert/test_sweep.py over every fixture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "convert"))

from checkpoints import ALL
from test_sweep import sweep

pytestmark = [pytest.mark.real, pytest.mark.real_full]


@pytest.mark.parametrize("path", [path for path in ALL if path != "torchao/kinds"])  # which is no model
def test_every_fixture(path: str, tmp_path: Path) -> None:
    sweep(path, tmp_path, every=True)
