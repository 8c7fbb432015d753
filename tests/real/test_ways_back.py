"""A → B → A over the whole matrix: what is exact or codes-exact comes back to the byte, or the plan says beforehand that it does not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "convert"))

import walk
from checkpoints import ALL, ready
from ways import unkept

from qformats.errors import QFormatError

pytestmark = pytest.mark.real_full


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ways")


@pytest.mark.parametrize("name", [*walk.sources(), *ALL])
def test_every_way_back(name: str, work: Path, tmp_path: Path) -> None:
    """One source, every target."""
    try:
        source = walk.make(name, work) if name in walk.sources() else ready(name, work)
    except QFormatError as error:
        pytest.skip(f"cannot be made: {error.code}")
    lost = {}
    for target in walk.TARGETS:
        folder = tmp_path / target
        folder.mkdir()
        lost[target] = unkept(source, target, folder)
        shutil.rmtree(folder)
    assert {target: found for target, found in lost.items() if found} == {}
