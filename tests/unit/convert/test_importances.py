"""Conversions under an importance matrix: which tensor meets which importances, what is refused, and what is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FIXTURES, float_gguf, options
from click.testing import CliRunner, Result

from converters import convert, verify
from converters.cli import qconvert
from converters.importances import expert_runs, with_importances
from converters.jobs import Job
from converters.plan import make_plan
from qformats.architectures.mapping import SourceRows, TensorMap
from qformats.checkpoint import open_checkpoint
from qformats.containers.gguf import Value, open_gguf
from qformats.errors import Unsupported, UsageError
from qformats.formats import ggml
from qformats.formats.ggml.kquants import KQUANTS
from qformats.quantize import rtn
from qformats.quantize.imatrix import Entry, ImportanceMatrix, read_imatrix, write_imatrix
from qformats.registry import format_module

Array = np.ndarray[Any, Any]
DOWN, EXPERTS, UP, EMBEDDING = "blk.0.ffn_down.weight", "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up.weight", "token_embd.weight"
K = 512
RNG = np.random.default_rng(5)
WEIGHTS: dict[str, Array] = {
    EMBEDDING: RNG.normal(size=(8, K)).astype("<f4"),
    DOWN: RNG.normal(size=(8, K)).astype("<f4"),
    EXPERTS: RNG.normal(size=(3, 40, K)).astype("<f4"),
    UP: RNG.normal(size=(4, K)).astype("<f4"),
}


def spread(n_mat: int, counts: list[int] | None = None, columns: int = K) -> Entry:
    sums = np.exp(RNG.normal(0, 2, (n_mat, columns))).astype(np.float32)
    return Entry(sums, np.array(counts or [10] * n_mat))


ENTRIES = {DOWN: spread(1), EXPERTS: spread(3, [4, 0, 9])}


def store(path: Path, entries: dict[str, Entry], datasets: tuple[str, ...] = ("corpus/wiki.txt",)) -> Path:
    write_imatrix(ImportanceMatrix(entries, datasets, 12, 512), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_gguf(tmp_path_factory.mktemp("model") / "floats.gguf", WEIGHTS)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("imatrix") / "importances.gguf", ENTRIES)


@pytest.fixture(scope="module")
def made(model: Path, matrix: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("made") / "q4.gguf"
    return path, convert(model, path, to="gguf:q4_k", pure=True, imatrix=matrix, workers=2)


def blocks(path: Path, name: str) -> Array:
    raw = open_gguf(path).tensors[name]
    return raw.row_range(0, raw.rows)


def rounded(values: Array, importance: Array | None) -> Array:
    storage = KQUANTS["Q4_K"].storage
    weights = torch.from_numpy(values.reshape(-1, K))
    tensor = rtn(weights, storage, None if importance is None else torch.from_numpy(importance))
    array: Array = ggml.write(storage, tensor, 0, tensor.shape)[0].array
    return array


def test_a_matrix_is_rounded_under_its_own_importances(made: tuple[Path, Any]) -> None:
    found = blocks(made[0], DOWN)
    np.testing.assert_array_equal(found, rounded(WEIGHTS[DOWN], ENTRIES[DOWN].importance()[0]))
    assert not np.array_equal(found, rounded(WEIGHTS[DOWN], None))


def test_each_expert_is_rounded_under_its_own_and_one_that_met_no_token_under_ones(made: tuple[Path, Any]) -> None:
    importance = ENTRIES[EXPERTS].importance()
    assert (importance[1] == 1).all()
    expected = [rounded(values, importance[expert]) for expert, values in enumerate(WEIGHTS[EXPERTS])]
    np.testing.assert_array_equal(blocks(made[0], EXPERTS), np.concatenate(expected))


def test_a_tensor_without_an_entry_is_rounded_without_and_named(made: tuple[Path, Any]) -> None:
    np.testing.assert_array_equal(blocks(made[0], UP), rounded(WEIGHTS[UP], None))
    assert made[1].warnings == ("importances.gguf has no entry for blk.0.ffn_up.weight: rounded without importances",)


def test_the_report_counts_the_weighted_tensors(made: tuple[Path, Any]) -> None:
    report = made[1]
    assert (report.weighted, report.imatrix) == (2, "importances.gguf")
    assert "2 tensors rounded under the importances of importances.gguf" in report.notes()
    assert report.to_json()["weighted"] == 2


def test_metadata_tells_of_it_as_llama_quantize_does_without_places(made: tuple[Path, Any]) -> None:
    metadata = open_gguf(made[0]).metadata
    assert {key: value for key, value in metadata.items() if key.startswith("quantize.")} == {
        "quantize.imatrix.file": Value("str", "importances.gguf"),
        "quantize.imatrix.dataset": Value("str", "wiki.txt"),
        "quantize.imatrix.entries_count": Value("u32", 2),
        "quantize.imatrix.chunks_count": Value("u32", 12),
    }


def test_an_entry_of_another_size_is_refused(model: Path, tmp_path: Path) -> None:
    path = store(tmp_path / "i.gguf", {DOWN: spread(2)})
    with pytest.raises(UsageError) as error:
        convert(model, tmp_path / "out.gguf", to="gguf:q4_k", pure=True, imatrix=path)
    assert (error.value.code, error.value.tensor) == ("imatrix-size", DOWN)


def test_another_size_for_the_embedding_is_passed_over(model: Path, tmp_path: Path) -> None:
    path = store(tmp_path / "i.gguf", {EMBEDDING: spread(2), DOWN: spread(1)})
    types = [("token_embd", "q4_k")]
    report = convert(model, tmp_path / "out.gguf", to="gguf:q4_k", pure=True, imatrix=path, tensor_types=types)
    assert report.weighted == 1


DENSE = FIXTURES / "dense" / "llama"


def dense_matrix(path: Path, **sizes: int) -> Path:
    """Importances for the tensors ``blk.0.NAME`` of a small llama, of so many columns each."""
    return store(path, {f"blk.0.{name}.weight": spread(1, columns=size) for name, size in sizes.items()})


@pytest.mark.parametrize(("to", "search"), [("ct:int4,group=32,sym", "best"), ("bnb:nf4", "reference"), ("hqq:int4,group=32", "hqq")])
def test_modules_of_other_formats_take_those_of_their_gguf_tensors(to: str, search: str, tmp_path: Path) -> None:
    with open_checkpoint(DENSE) as dense:
        weights = dense.read("model.layers.0.mlp.down_proj")
    assert isinstance(weights, torch.Tensor)
    path = dense_matrix(tmp_path / "i.gguf", ffn_down=weights.shape[1])
    report = convert(DENSE, tmp_path / "out", to=to, imatrix=path, search=search, allow_requantize=True)
    assert report.weighted == 1
    importance = torch.from_numpy(read_imatrix(path).entries[DOWN].importance()[0])
    with open_checkpoint(tmp_path / "out") as out:
        made = out.read("model.layers.0.mlp.down_proj")
        form, module = format_module(out.format), out.modules["model.layers.0.mlp.down_proj"]
        storage = form.storage_of(module)
    assert not isinstance(made, torch.Tensor)
    expected = rtn(weights.float(), storage, importance, search)
    assert torch.equal(made.dequantize(), expected.dequantize())


def test_a_gguf_with_importances_becomes_another_format(tmp_path: Path) -> None:
    convert(DENSE, tmp_path / "model.gguf", to="gguf:f32")
    with open_checkpoint(tmp_path / "model.gguf") as opened:
        columns = opened.modules["blk.0.ffn_down"].parts["weight"].shape[1]
    path = dense_matrix(tmp_path / "i.gguf", ffn_down=columns)
    reports = [
        convert(tmp_path / "model.gguf", tmp_path / search, to="gptq:int4,group=32", imatrix=path, search=search, allow_requantize=True)
        for search in ("best", "reference")
    ]
    assert [report.weighted for report in reports] == [1, 0]
    assert "changes nothing" in reports[1].warnings[0]


def test_a_model_without_names_of_a_gguf_is_refused(matrix: Path, tmp_path: Path) -> None:
    shutil.copytree(DENSE, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"architectures": ["Unheard"], "model_type": "unheard"}))
    with pytest.raises(UsageError) as error:
        convert(tmp_path / "model", tmp_path / "out", to="gptq:int4", imatrix=matrix, allow_requantize=True)
    assert error.value.code == "imatrix-target"


def test_a_matrix_that_nothing_uses_is_said_so(model: Path, matrix: Path, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "out.gguf", to="gguf:q8_0", imatrix=matrix)
    assert report.warnings == ("importances.gguf changes nothing: no tensor gets new codes under its importances",)


@pytest.mark.parametrize("given", [False, True], ids=["no matrix", "no entry"])
def test_a_type_that_cannot_do_without_is_refused_when_planning(
    given: bool, model: Path, matrix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qformats import quantize

    monkeypatch.setattr(quantize, "needs_importance", lambda storage: storage.type == "q4_k")
    with pytest.raises(Unsupported) as error:
        make_plan(model, options("gguf:q4_k", imatrix=read_imatrix(matrix) if given else None))
    assert error.value.code == "importance-needed"
    assert error.value.tensor in ((UP,) if given else (DOWN, EXPERTS))


def test_codes_that_floats_give_again_are_no_new_codes(model: Path, matrix: Path) -> None:
    tensor = TensorMap(UP.removesuffix(".weight"), "weight", (4, K), (SourceRows("a", "weight", 0, 4),))
    job = Job(tensor, "quantize", "exact", "", "Q4_K", {}, True, storage=KQUANTS["Q4_K"].storage, format="gguf")
    with open_checkpoint(model) as checkpoint:
        (kept,), _ = with_importances([job], options("gguf", imatrix=read_imatrix(matrix)), checkpoint)
    assert kept.importance is None


def test_rows_out_of_order_keep_the_importances_of_their_place() -> None:
    tensor = TensorMap("x", "weight", (2, 3, 32), (SourceRows("a", "weight", 0, 6),))
    job = Job(tensor, "quantize", "requantized", "", "Q4_K", {}, False, importance=np.ones((2, 32), np.float32))
    assert list(expert_runs(job, 1, 6, None)) == [(1, 3, 0), (3, 6, 1)]
    assert list(expert_runs(job, 0, 6, np.array([4, 5, 0, 1, 2, 3]))) == [(0, 2, 1), (2, 5, 0), (5, 6, 1)]


# ---------------------------------------------------------------- verify


def test_digests_verify_without_the_matrix(model: Path, made: tuple[Path, Any]) -> None:
    found = verify(model, made[0])
    assert (found.ok, found.method) == (True, "digests")


def test_a_replay_with_the_matrix_meets_every_byte(model: Path, made: tuple[Path, Any], matrix: Path) -> None:
    found = verify(model, made[0], replay=True, imatrix=matrix)
    assert (found.ok, found.method) == (True, "replay")


def test_a_replay_without_it_or_with_another_says_what_is_needed(model: Path, made: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"importances\.gguf.*--imatrix") as error:
        verify(model, made[0], replay=True)
    assert error.value.code == "imatrix-missing"
    other = store(tmp_path / "importances.gguf", {DOWN: spread(1)})
    with pytest.raises(UsageError) as error:
        verify(model, made[0], replay=True, imatrix=other)
    assert error.value.code == "imatrix-other"


def test_a_flipped_bit_is_found_without_the_matrix_and_placed_with_it(
    model: Path, made: tuple[Path, Any], matrix: Path, tmp_path: Path
) -> None:
    data, raw = bytearray(made[0].read_bytes()), open_gguf(made[0]).tensors[EXPERTS]
    data[raw.offset + 777] ^= 4
    (tmp_path / "flipped.gguf").write_bytes(data)
    found = verify(model, tmp_path / "flipped.gguf")
    assert (found.ok, found.method) == (False, "digests") and "importances.gguf" in found.unseen[0]
    found = verify(model, tmp_path / "flipped.gguf", imatrix=matrix)
    assert [(m["tensor"], m["detail"]) for m in found.mismatches] == [(EXPERTS, "byte 777")]


def test_a_matrix_does_not_belong_to_a_conversion_without(model: Path, matrix: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out.gguf", to="gguf:q4_k")
    with pytest.raises(UsageError) as error:
        verify(model, tmp_path / "out.gguf", replay=True, imatrix=matrix)
    assert error.value.code == "imatrix-other"


# ---------------------------------------------------------------- command line


def run(*words: object) -> Result:
    return CliRunner().invoke(qconvert, [str(word) for word in words], prog_name="qconvert")


def test_commands_take_the_matrix_and_plans_hold_it_to_its_word(model: Path, made: tuple[Path, Any], matrix: Path, tmp_path: Path) -> None:
    planned = run("plan", model, "--to", "gguf:q4_k", "--pure", "--imatrix", matrix, "--json")
    assert json.loads(planned.stdout)["options"]["imatrix"]["file"] == "importances.gguf"
    (tmp_path / "plan.json").write_text(planned.stdout)
    refused = run("convert", model, tmp_path / "a.gguf", "--plan", tmp_path / "plan.json")
    assert refused.exit_code == 2 and "imatrix-missing" in refused.stderr
    done = run("convert", model, tmp_path / "a.gguf", "--plan", tmp_path / "plan.json", "--imatrix", matrix)
    assert done.exit_code == 0 and "2 tensors rounded under the importances" in done.stdout
    assert (tmp_path / "a.gguf").read_bytes() == made[0].read_bytes()
    assert run("quantize", model, matrix, "--to", "gguf:q4_k", "--imatrix", matrix, "--overwrite").exit_code == 4
    assert run("quantize", model, tmp_path / "b.gguf", "--to", "gguf:q4_k", "--imatrix", matrix, "--quiet").exit_code == 0
    assert run("verify", model, tmp_path / "b.gguf", "--replay", "--imatrix", matrix).exit_code == 0
