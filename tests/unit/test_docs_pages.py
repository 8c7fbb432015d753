"""Every command and every example of the pages in ``docs`` does what the page says, on the checkpoints that come with the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import DOCS, ROOT, Page

from qformats import formats, registry


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that looks like the checkout, but may be written to."""
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_adding_a_format(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (clone / "new").mkdir()

    def place(where: str, text: str) -> None:
        if where == "qformats/registry.py":
            row = eval("\n".join(text.splitlines()[1:]), {"Row": registry.Row})
            monkeypatch.setattr(registry, "ROWS", (*registry.ROWS, row))
        else:
            assert Path(where).parent == Path("qformats/formats")
            (clone / "new" / Path(where).name).write_text(text)

    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(clone / "new")])
    assert Page(DOCS / "add-a-format.md", place=place).run() == 6


def test_converting(clone: Path) -> None:
    assert Page(DOCS / "convert.md").run() == 12
    report = (clone / "report.html").read_text()
    assert report.startswith("<!doctype html>") and (clone / "joined.gguf").read_bytes() == (clone / "q4.gguf").read_bytes()
