"""The report's page as a browser gets it, its data against the schema, and the reports of ``plan``, ``verify`` and ``compare``."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import converters
from converters.cli import qconvert
from converters.comparing import compare
from converters.report import KIND_MEANINGS, Report, TensorLine
from converters.report_page import number, render

jsonschema = pytest.importorskip("jsonschema")
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
AWQ, DENSE = ROOT / "fixtures" / "awq" / "gemm-g32", ROOT / "fixtures" / "dense" / "llama"
SCHEMA = json.loads((ROOT / "converters" / "schemas" / "report.schema.json").read_text())
EVIL = "<script>alert('&')</script>\x1b[31m\u202e"
VOID = ("meta", "br", "input")


def cli(*words: object) -> Result:
    return CliRunner().invoke(qconvert, [str(word) for word in words])


def lines(count: int, error: float | None = 0.05) -> tuple[TensorLine, ...]:
    made = []
    for at in range(count):
        name = f"blk.{at // 9}.ffn_{at % 9}.weight"
        rest: dict[str, Any] = {"error": None if error is None else error / (at + 1), "source_type": "BF16", "source_nbytes": 9000}
        made.append(TensorLine(name, "requantized", "Q4_K", (4096, 4096), 4500, False, "new codes from floats", **rest))
    return tuple(made)


def report_of(*found: TensorLine, **rest: Any) -> Report:
    return replace(Report("model", "hf", 9000, "gguf:q4_k", 4500, found, tool="qformats 0"), **rest)


def checked(data: dict[str, Any]) -> dict[str, Any]:
    data = json.loads(json.dumps(data, allow_nan=False))
    jsonschema.Draft202012Validator(SCHEMA).validate(data)
    return data


def read(path: Path) -> dict[str, Any]:
    return checked(json.loads(path.read_text()))


class Page(HTMLParser):
    """A page taken apart: every open element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.names: list[str] = []
        self._cell = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "action", "srcset", "data", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)
        self._cell = "name" if tag == "td" and ("class", "name") in attrs else ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._cell = ""

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.names.append(data)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "q.gguf"
    result = cli("quantize", DENSE, path, "--to", "gguf:q4_0", "--report", path.with_suffix(".json"), "--quiet")
    assert result.exit_code == 0, result.output
    return path


# ---------------------------------------------------------------- the page


def test_the_page_holds_all_that_it_shows() -> None:
    text = render(report_of(*lines(30)))
    page = Page(text)
    assert page.addresses == [] and "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text
    assert page.seen.count("script") == 1 and "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_the_content_policy_lets_only_the_own_script_run() -> None:
    from base64 import b64encode
    from hashlib import sha256

    text = render(report_of(*lines(1)))
    script = text.partition("<script>")[2].partition("</script>")[0]
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in text


def test_every_tensor_has_a_row_and_the_worst_is_first() -> None:
    found = lines(40)
    names = Page(render(report_of(*reversed(found)))).names
    assert names[-40:] == [line.name for line in found]  # the error falls with the number


def test_names_of_files_are_escaped() -> None:
    (one,) = lines(1)
    hostile = replace(one, name=EVIL, type=EVIL, reason=EVIL, source_type=EVIL, notes=(EVIL,), rewrites=(EVIL,))
    text = render(report_of(hostile, source=EVIL, destination=EVIL, warnings=(EVIL,), dropped={EVIL: EVIL}, tool="t"))
    assert "alert(&#39;&amp;&#39;)" in text and "<script>alert" not in text and "\x1b" not in text and "\u202e" not in text
    assert Page(text).seen.count("script") == 1


@pytest.mark.parametrize("name", ["9" * 5000, "", ".", "a\nb", "blk.\u0663.x", "\ud800"])
def test_odd_names_have_a_place(name: str, tmp_path: Path) -> None:
    (one,) = lines(1)
    report_of(replace(one, name=name), *lines(2)).write(tmp_path / "r.html")
    Page((tmp_path / "r.html").read_text())


def test_equal_reports_give_equal_bytes() -> None:
    assert render(report_of(*lines(200))) == render(report_of(*lines(200)))


def test_ten_thousand_tensors_are_a_few_megabytes() -> None:
    text = render(report_of(*lines(10_000)))
    assert len(text.encode()) < 6_000_000 and text.count("<tr data-i=") == 10_000


def test_every_kind_has_a_colour() -> None:
    text = render(report_of(*lines(1)))
    assert all(f".k-{kind} " in text and f".s-{kind} " in text for kind in KIND_MEANINGS)


@pytest.mark.parametrize("error", [None, 0.0, 1e-300, 3.0, 1e300])
def test_any_error_can_be_drawn(error: float | None) -> None:
    page = Page(render(report_of(*lines(3, error))))
    assert len(page.names) >= 3


def test_a_report_without_tensors_is_a_page() -> None:
    Page(render(report_of(warnings=("the weights were not compared: why",))))


def test_numbers_have_three_digits() -> None:
    assert [number(x) for x in (0.1, 999.6, 1e-4, 9.9e-5, 1e12)] == ["0.100", "1,000", "0.000100", "9.90 × 10⁻⁵", "1.00 × 10¹²"]


# ---------------------------------------------------------------- the data


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_a_conversion_says_what_each_tensor_was(quantized: Path) -> None:
    data = read(quantized.with_suffix(".json"))
    assert data["report"] == "conversion" and data["seconds"] >= 0
    coded = [line for line in data["tensors"] if line["kind"] == "requantized"]
    assert coded and all(line["source_type"] in ("F32", "BF16", "F16") and line["snr_db"] > 0 for line in coded)
    assert sum(line["source_nbytes"] for line in data["tensors"]) == data["source_nbytes"]


def test_a_plan_has_a_report(tmp_path: Path) -> None:
    assert cli("plan", AWQ, "--to", "gguf", "--report", tmp_path / "r.json", "--quiet").exit_code == 0
    data = read(tmp_path / "r.json")
    assert (data["report"], data["seconds"], data["destination"]) == ("plan", None, None)


def test_weights_that_are_no_numbers_have_no_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(DENSE, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    data = checked(compare(DENSE, copy).to_json())
    (line,) = [line for line in data["tensors"] if not line["lossless"]]
    assert (line["name"], line["error"], line["max_abs"]) == ("model.norm.weight", None, None) and "finite" in line["reason"]


# ---------------------------------------------------------------- two checkpoints


def test_verify_measures_what_it_checked(quantized: Path, tmp_path: Path) -> None:
    result = cli("verify", DENSE, quantized, "--report", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    data, made = read(tmp_path / "r.json"), read(quantized.with_suffix(".json"))
    assert data["verification"]["ok"] and data["kinds"] == {kind: n for kind, n in made["kinds"].items() if n}
    measured = {line["name"]: line["error"] for line in data["tensors"]}
    for line in made["tensors"]:
        assert measured[line["name"]] == pytest.approx(line["error"] or 0.0, rel=1e-3)


def test_a_damaged_output_has_a_report_too(quantized: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copy(quantized, tmp_path / "broken.gguf"))
    data = bytearray(broken.read_bytes())
    data[-100] ^= 4
    broken.write_bytes(data)
    result = cli("verify", DENSE, broken, "--report", tmp_path / "r.json", "--quiet")
    assert result.exit_code == 3 and not read(tmp_path / "r.json")["verification"]["ok"]
    data[4] ^= 255  # the version
    broken.write_bytes(data)
    result = cli("verify", DENSE, broken, "--report", tmp_path / "r.html", "--quiet")
    assert result.exit_code == 3 and "not compared" in (tmp_path / "r.html").read_text()


def test_kinds_are_what_the_numbers_prove(quantized: Path, tmp_path: Path) -> None:
    converters.convert(AWQ, tmp_path / "exact.gguf", to="gguf")
    converters.convert(AWQ, tmp_path / "rounded.gguf", to="gguf:q4_1")
    converters.convert(AWQ, tmp_path / "half", to="hf:f16")
    assert set(compare(AWQ, tmp_path / "exact.gguf").kinds) == {"copied", "exact"}
    assert set(compare(AWQ, AWQ).kinds) == {"copied"}
    assert "codes-exact" in compare(AWQ, tmp_path / "rounded.gguf").kinds
    assert {"copied", "exact", "dequantized"} >= set(compare(AWQ, tmp_path / "half").kinds)
    assert set(compare(tmp_path / "rounded.gguf", tmp_path / "exact.gguf").kinds) <= {"copied", "exact", "codes-exact"}
    other = compare(AWQ, quantized)
    checked(other.to_json())
    assert not other.lossless and other.kinds["different"] + other.kinds.get("requantized", 0) > 0


def test_missing_and_extra_tensors_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(DENSE, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    gone = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
    weights["added.weight"] = weights.pop(gone)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    found = compare(DENSE, copy)
    assert {line.name: line.kind for line in found.tensors if not line.lossless} == {
        gone: "missing", "added.weight": "extra", "model.norm.weight": "different",
    }  # fmt: skip
    names = Page(render(found)).names
    assert "model.norm.weight" in names and set(names[-len(found.tensors) :][:2]) == {gone, "added.weight"}


def test_models_that_were_run_have_tiles() -> None:
    said: dict[str, Any] = {"kl": 1e-6, "top1": 0.998, "nll": [2.5, 2.51], "perplexity": [12.18, 12.3], "tokens": 500, "windows": 2}
    said |= {"context": 256, "text": EVIL}
    found = report_of(*lines(2), subject="comparison", agreement=said, destination="other")
    checked(found.to_json())
    assert all(word in render(found) for word in ("1.00 × 10⁻⁶", "99.8 %", "12.18 → 12.3", "500 predicted tokens in 2 windows"))


# ---------------------------------------------------------------- where it is written


@pytest.mark.parametrize("name", ["r.txt", "r", "r.htm"])
def test_another_ending_is_refused_with_those_there_are(name: str, quantized: Path, tmp_path: Path) -> None:
    result = cli("verify", DENSE, quantized, "--report", tmp_path / name)
    assert result.exit_code == 2 and ".html" in result.output and ".json" in result.output


def test_a_report_never_replaces_a_file_of_the_checkpoint(quantized: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(DENSE, tmp_path / "copy"))
    before = (copy / "config.json").read_bytes()
    result = cli("verify", copy, quantized, "--report", copy / "config.json")
    assert result.exit_code == 2 and "report-path" in result.output and (copy / "config.json").read_bytes() == before


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    report_of(*lines(2)).write(tmp_path / "r.html")
    report_of(*lines(3)).write(tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
