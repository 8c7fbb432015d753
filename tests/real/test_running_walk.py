"""The README's table of what loaded models can do is what they do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "unit" / "runtime"), str(Path(__file__).parents[1] / "unit" / "convert")]

from walk_running import FORMATS, RUNNING, found  # noqa: E402


@pytest.mark.real
@pytest.mark.parametrize("form", FORMATS)
def test_the_table_is_true(form: str) -> None:
    assert json.loads(RUNNING.read_text())[form] == found(form)
