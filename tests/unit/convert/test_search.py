"""Conversions with ``--search best``: who is searched, what is recorded, replayed, planned and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import float_gguf
from click.testing import CliRunner, Result

from converters import convert, plan, verify
from converters.cli import qconvert
from converters.options import PlanOptions, recorded_words
from qformats.containers.gguf import open_gguf
from qformats.errors import UsageError
from qformats.formats import ggml
from qformats.formats.protocol import Target
from qformats.quantize import rtn
from qformats.quantize.imatrix import Entry, ImportanceMatrix, write_imatrix

Array = np.ndarray[Any, Any]
DOWN, UP = "blk.0.ffn_down.weight", "blk.0.ffn_up.weight"
K = 512
RNG = np.random.default_rng(11)
WEIGHTS: dict[str, Array] = {name: RNG.normal(size=(8, K)).astype("<f4") for name in (DOWN, UP)}
SUMS = np.exp(RNG.normal(0, 2, (1, K))).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_gguf(tmp_path_factory.mktemp("model") / "floats.gguf", WEIGHTS)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "importances.gguf"
    write_imatrix(ImportanceMatrix({DOWN: Entry(SUMS, np.array([10]))}, (), 12, 512), path)
    return path


def blocks(path: Path, name: str) -> Array:
    raw = open_gguf(path).tensors[name]
    return raw.row_range(0, raw.rows)


def expected(name: str, kind: str, importance: Array | None = None, search: str = "best") -> Array:
    storage = ggml.BLOCK_TYPES[kind].storage
    tensor = rtn(torch.from_numpy(WEIGHTS[name]), storage, None if importance is None else torch.from_numpy(importance), search)
    array: Array = ggml.write(storage, tensor, 0, tensor.shape)[0].array
    return array


def run(*words: object) -> Result:
    return CliRunner().invoke(qconvert, [str(word) for word in words])


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "MXFP4"])
def test_new_codes_are_the_searched_ones_and_the_record_replays(model: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out.gguf"
    result = run("quantize", model, out, "--to", f"gguf:{kind.lower()}", "--pure", "--search", "best", "--workers", "2")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(blocks(out, UP), expected(UP, kind))
    assert not np.array_equal(blocks(out, UP), expected(UP, kind, search="reference"))
    assert verify(model, out).method == "digests"
    found = verify(model, out, replay=True)
    assert (found.ok, found.method) == (True, "replay")
    broken = tmp_path / "broken.gguf"
    data = bytearray(out.read_bytes())
    data[-40] ^= 1
    broken.write_bytes(data)
    assert not verify(model, broken, replay=True).ok


def test_the_error_in_the_report_is_lower(model: Path, tmp_path: Path) -> None:
    errors = [
        convert(model, tmp_path / f"{search}.gguf", to="gguf:nvfp4", pure=True, search=search, allow_requantize=True).worst_error
        for search in ("reference", "best")
    ]
    assert errors[0] is not None and errors[1] is not None and errors[1] < 0.95 * errors[0]


def test_importances_count_for_every_type_that_is_searched(model: Path, matrix: Path, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "best.gguf", to="gguf:q8_0", pure=True, imatrix=matrix, search="best")
    np.testing.assert_array_equal(blocks(tmp_path / "best.gguf", DOWN), expected(DOWN, "Q8_0", SUMS[0] / 10))
    assert report.weighted == 1
    plain = convert(model, tmp_path / "plain.gguf", to="gguf:q8_0", pure=True, imatrix=matrix)
    np.testing.assert_array_equal(blocks(tmp_path / "plain.gguf", DOWN), expected(DOWN, "Q8_0", search="reference"))
    assert plain.weighted == 0
    assert verify(model, tmp_path / "best.gguf", replay=True, imatrix=matrix).ok


def test_types_that_are_not_searched_keep_the_reference(model: Path, tmp_path: Path) -> None:
    for search in ("reference", "best"):
        convert(model, tmp_path / f"{search}.gguf", to="gguf:q4_k", pure=True, search=search)
    np.testing.assert_array_equal(blocks(tmp_path / "best.gguf", UP), blocks(tmp_path / "reference.gguf", UP))


def test_a_plan_says_which_search_and_is_carried_out_with_it(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    result = run("plan", model, "--to", "gguf:q4_0", "--pure", "--search", "best", "--json")
    saved.write_text(result.output)
    data = json.loads(result.output)
    assert data["options"]["search"] == "best"
    assert [entry["rewrites"] for entry in data["tensors"]] == [["rounded with the least error found"]] * 2
    other = run("convert", model, tmp_path / "x.gguf", "--plan", saved, "--search", "best", "--json")
    assert json.loads(other.output)["error"]["code"] == "plan-options"
    result = run("convert", model, tmp_path / "out.gguf", "--plan", saved)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(blocks(tmp_path / "out.gguf", DOWN), expected(DOWN, "Q4_0"))


def test_a_budget_measures_the_search_it_is_given(model: Path) -> None:
    sizes = [plan(model, to="gguf", max_error=0.07, search=search).output.nbytes for search in ("reference", "best")]
    assert sizes[1] < sizes[0]


def test_the_default_is_not_recorded_and_older_records_mean_it() -> None:
    options = PlanOptions(Target("gguf", "q4_0"))
    assert options == PlanOptions(Target("gguf", "q4_0"), search="reference")
    assert "search" not in options.to_json() and recorded_words(options.to_json())["search"] == "reference"
    assert recorded_words(PlanOptions(Target("gguf", "q4_0"), search="best").to_json())["search"] == "best"


@pytest.mark.parametrize(("to", "search", "code"), [("gguf:q4_0", "better", "search"), ("gguf:q4_0", "hqq", "search")])
def test_unknown_words_and_types_without_an_origin_are_refused(model: Path, to: str, search: str, code: str) -> None:
    with pytest.raises(UsageError) as error:
        plan(model, to=to, search=search, allow_requantize=True)
    assert error.value.code == code


def test_the_command_line_knows_the_words(model: Path, tmp_path: Path) -> None:
    assert run("convert", model, tmp_path / "x.gguf", "--to", "gguf:q4_0", "--search", "better").exit_code == 2
    named = run("gguf-to-gguf", model, tmp_path / "x.gguf", "--type", "q4_0", "--pure", "--search", "reference", "--json")
    assert named.exit_code in (0, 2)
