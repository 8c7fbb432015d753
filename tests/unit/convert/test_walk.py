"""The whole matrix: what every type of every format becomes in every other is what ``docs/kinds.json``, and so the README, says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import walk

TABLE: dict[str, dict[str, str]] = json.loads(walk.KINDS.read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("walk")


def test_the_table_has_every_type_and_format() -> None:
    assert list(TABLE) == walk.sources(), "run: python tests/unit/convert/walk.py"
    assert all(set(row) == set(walk.TARGETS) for row in TABLE.values() if "" not in row)


@pytest.mark.parametrize("name", walk.sources())
def test_what_becomes_of_it(name: str, work: Path) -> None:
    assert walk.row_of(name, work) == TABLE[name], "run: python tests/unit/convert/walk.py, and read what changed"
