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


def test_searching(clone: Path) -> None:
    assert Page(DOCS / "search.md").run() == 1


def test_verifying(clone: Path) -> None:
    assert Page(DOCS / "verify.md").run() == 8


def test_running_and_python(clone: Path) -> None:
    assert Page(DOCS / "run.md").run() == 4
    assert Page(DOCS / "python.md").run() == 8
    assert (clone / "llama-gptq" / "model.safetensors").is_file()


def test_every_page_is_run_or_made_and_named_by_the_index() -> None:
    run = {"add-a-format.md", "convert.md", "verify.md", "run.md", "python.md", "push.md", "search.md"}
    made = {"errors.md", "conversions.md"}
    pages = {path.name for path in DOCS.glob("*.md")}
    assert pages == run | made | {"README.md"}
    assert all(f"({name})" in (DOCS / "README.md").read_text() for name in pages - {"README.md"})
    assert [name for name in (*made, "README.md") if "```" in (DOCS / name).read_text(encoding="utf-8")] == []


def test_links_between_pages_lead_somewhere() -> None:
    for path in DOCS.glob("*.md"):
        found = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
        assert [link for link in found if not (DOCS / link).exists()] == [], path.name
