"""Every fixture that is a whole model is loaded on its packed weights, compared with its floats, and saved as the same files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "convert"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "runtime"))

from cases import MODELS, SAMPLE
from test_load import check_logits
from test_saving import check_files

REST = [case for case in MODELS if case not in SAMPLE]


@pytest.mark.real
@pytest.mark.parametrize("case", REST)
def test_it_runs_and_comes_back(case: str, tmp_path: Path) -> None:
    check_logits(case, tmp_path / "run")
    check_files(case, tmp_path / "saved")
