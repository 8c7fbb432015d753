"""Every fixture that is a whole model loads through plain ``from_pretrained``, and its state dict has the stored tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "convert"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "runtime"))

from cases import MODELS, SAMPLE
from test_state_dict import check_state
from test_take_over import check_taken

REST = [case for case in MODELS if case not in SAMPLE]


@pytest.mark.real
@pytest.mark.parametrize("case", REST)
def test_it_is_taken_over(case: str, tmp_path: Path) -> None:
    check_taken(case, tmp_path / "taken")


@pytest.mark.real
@pytest.mark.parametrize("case", REST)
def test_its_state_dict_is_the_sources(case: str, tmp_path: Path) -> None:
    check_state(case, tmp_path / "state")
