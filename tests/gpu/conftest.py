"""Tests that need a CUDA device and Triton; they skip, saying so, where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "tests" / "unit"
sys.path[:0] = [str(folder) for folder in (UNIT, UNIT / "convert", UNIT / "kernels", UNIT / "runtime", ROOT / "benchmarks")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
