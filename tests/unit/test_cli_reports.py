"""Reports: JSON, Markdown and HTML of the same conversion, and hostile text in them."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import converters
from converters.report import Report, TensorLine
from qformats.errors import OutputError, UsageError

ROOT = Path(__file__).resolve().parents[2]
AWQ = ROOT / "fixtures" / "awq" / "gemm-g32"
EVIL = "<script>alert(1)</script>|\x1b[31m"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return converters.convert(AWQ, tmp_path_factory.mktemp("report") / "m.gguf", to="gguf")


def line(name: str = "a", kind: str = "exact", reason: str = "fits", **rest: object) -> TensorLine:
    return replace(TensorLine(name, kind, "Q5_0", (2, 32), 44, True, reason), **rest)  # type: ignore[arg-type]


def made_of(*lines: TensorLine) -> Report:
    return Report("src", "awq", 100, "gguf", 200, lines)


def test_json_names_every_tensor_with_kind_reason_and_error(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["kinds"] == {"copied": 1, "exact": 10} and len(data["tensors"]) == 11
    assert all({"name", "kind", "type", "reason", "error", "nbytes"} <= tensor.keys() for tensor in data["tensors"])
    assert data["seconds"] >= 0 and data["nbytes"] > 0 and data["digest"]


def test_markdown_has_a_row_for_each_tensor(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    assert all(f"| {t.name.replace('_', chr(92) + '_')} |" in text for t in report.tensors)


class Page(HTMLParser):
    """Collects tags, so that the page can be judged as a browser sees it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]


def test_html_is_one_page_without_outside_resources_in_light_and_dark(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    assert page.links == [] and page.tags.count("script") == 1 and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert all(t.name in text for t in report.tensors)


@pytest.mark.parametrize("form", ["to_html", "to_markdown"])
def test_hostile_names_are_escaped(form: str) -> None:
    text = getattr(made_of(line(name=EVIL, reason=EVIL)), form)()
    assert "<script>alert" not in text and "\x1b" not in text and "alert(1)" in text


def test_reasons_that_differ_in_counts_are_summed() -> None:
    found = made_of(line("a", reason="the offset of 3 of 10 blocks rounds"), line("b", reason="the offset of 4 of 20 blocks rounds"))
    assert found.reasons() == [("exact", "Q5_0", "the offset of 7 of 30 blocks rounds", ["a", "b"])]


def test_savings_are_summed_over_tensors() -> None:
    notes = ("q4_1 would save 1000 bytes: codes kept",)
    assert made_of(line("a", notes=notes), line("b", notes=notes)).notes() == ["q4_1 would save 2 kB on 2 tensors: codes kept"]


def test_the_best_kind_comes_first_and_the_worst_error_is_named() -> None:
    found = made_of(line("a", "requantized", error=0.01), line("b", "copied"), line("c", "requantized", error=0.5))
    assert list(found.kinds) == ["copied", "requantized"] and found.worst_error == 0.5
    assert any("largest 0.5 (c)" in text for text in found.to_text())


def test_long_lists_are_cut_in_text_only() -> None:
    found = replace(made_of(line()), warnings=tuple(f"warning {n}" for n in range(40)))
    assert sum("warning " in text for text in found.to_text()) == 12
    assert found.to_markdown().count("warning ") == 40


def test_a_report_of_unknown_form_is_refused(report: Report, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="report-suffix"):
        report.write(tmp_path / "r.txt")


def test_a_report_that_cannot_be_written(report: Report, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="report-write"):
        report.write(tmp_path / "nowhere" / "r.md")
