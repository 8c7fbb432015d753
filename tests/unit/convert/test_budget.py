"""``--max-error`` and ``--target-size``: against every type tried by hand, and the file that is written."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import float_gguf, ready
from click.testing import CliRunner

from converters import convert, plan, verify
from converters.budget import Frontiers, Point
from converters.cli import qconvert
from qformats import registry
from qformats.containers.gguf import open_gguf
from qformats.errors import QFormatError, WouldLose
from qformats.quantize.imatrix import Entry, ImportanceMatrix, write_imatrix

K = 512
RNG = np.random.default_rng(3)
FINE = np.round(RNG.normal(0, 2, (64, K))).clip(-8, 7) / 64
FINE[:, ::32] = -8 / 64  # each block of 32 is sixteen steps of 1/64: Q4_0 has it exactly
WEIGHTS = {
    "blk.0.attn_q.weight": RNG.normal(size=(64, K)),
    "blk.0.attn_k.weight": RNG.standard_t(2, size=(32, K)),
    "blk.0.ffn_up.weight": FINE,
    "blk.0.ffn_down.weight": RNG.laplace(size=(96, K)),
    "blk.0.attn_norm.weight": RNG.normal(size=K),
}
MATRICES = [name for name in WEIGHTS if "norm" not in name]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arrays = {name: values.astype("<f2" if values.ndim > 1 else "<f4") for name, values in WEIGHTS.items()}
    return float_gguf(tmp_path_factory.mktemp("model") / "floats.gguf", arrays)


@pytest.fixture(scope="module")
def every(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[int, float]]]:
    """Tensor → type → (bytes, error in the report) of every type that needs no importances, by converting to each."""
    found: dict[str, dict[str, tuple[int, float]]] = {name: {} for name in MATRICES}
    for kind in registry.row("gguf").types:
        out = tmp_path_factory.mktemp("each") / f"{kind}.gguf"
        try:
            report = convert(model, out, to=f"gguf:{kind}", pure=True)
        except QFormatError as error:
            assert error.code == "importance-needed"
            continue
        for line in report.tensors:
            if line.name in found and line.type.lower() == kind:
                found[line.name][kind] = line.nbytes, line.error or 0.0
    assert all(len(types) > 20 for types in found.values())
    return found


def smallest(types: dict[str, tuple[int, float]], limit: float) -> int:
    return min(nbytes for nbytes, error in types.values() if error <= limit)


@pytest.mark.parametrize("limit", [0.3, 0.1, 0.05, 0.01, 0.001])
def test_each_tensor_gets_the_smallest_type_under_the_bound(model: Path, every: Any, limit: float, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "out.gguf", to="gguf", max_error=limit)
    for line in report.tensors:
        if line.name in MATRICES:
            assert (line.error or 0.0) <= limit
            assert line.nbytes == smallest(every[line.name], limit), (line.name, line.type)
    assert verify(model, tmp_path / "out.gguf", replay=True).ok
    dtypes = {name: raw.dtype for name, raw in open_gguf(tmp_path / "out.gguf").tensors.items()}
    assert dtypes["blk.0.attn_norm.weight"] == "F32"
    if limit == 0.001:
        assert dtypes["blk.0.ffn_up.weight"] == "Q4_0"  # exact, where others need sixteen bits


@pytest.mark.parametrize("size", [40_000, 70_000, 100_000, 200_000])
def test_the_file_keeps_to_its_size_and_no_single_type_does_better(model: Path, every: Any, size: int, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "out.gguf", to="gguf", target_size=size)
    assert os.path.getsize(tmp_path / "out.gguf") <= size
    cost = sum(WEIGHTS[line.name].size * (line.error or 0.0) ** 2 for line in report.tensors if line.name in MATRICES)
    spent = sum(line.nbytes for line in report.tensors if line.name in MATRICES)
    for kind in every[MATRICES[0]]:
        if all(kind in every[name] for name in MATRICES) and sum(every[name][kind][0] for name in MATRICES) <= spent:
            assert cost <= 1.02 * sum(WEIGHTS[name].size * every[name][kind][1] ** 2 for name in MATRICES), kind  # measured on samples
    assert verify(model, tmp_path / "out.gguf", replay=True).ok


def test_a_size_below_the_smallest_types_is_refused(model: Path) -> None:
    with pytest.raises(WouldLose) as caught:
        plan(model, to="gguf", target_size=5_000)
    assert caught.value.code == "target-size"


def test_steps_along_the_hulls_are_the_best_mixture_that_they_reach() -> None:
    hulls = {
        "a": [Point(10, 1.0, "x"), Point(20, 0.2, "y"), Point(40, 0.1, "z")],
        "b": [Point(5, 0.9, "x"), Point(10, 0.6, "y"), Point(30, 0.0, "z")],
    }
    frontiers = Frontiers(hulls, {"a": 100, "b": 50})
    for size in range(15, 75):
        chosen = frontiers.within(size)
        used = sum(point.nbytes for point in chosen.values())
        assert used <= size
        cost = 100 * chosen["a"].error + 50 * chosen["b"].error
        at_that_size = [100 * a.error + 50 * b.error for a, b in product(*hulls.values()) if a.nbytes + b.nbytes <= used]
        assert cost <= min(at_that_size) + 15  # greedy: at most one step of the hulls away from the best


def test_importances_open_types_that_need_them(model: Path, tmp_path: Path) -> None:
    entries = {name: Entry(np.ones((1, K), np.float32), np.array([1])) for name in MATRICES}
    write_imatrix(ImportanceMatrix(entries, (), 1, 512), tmp_path / "i.gguf")
    made = plan(model, to="gguf", target_size=26_000, imatrix=tmp_path / "i.gguf")
    assert {"IQ2_XXS", "IQ1_S", "IQ2_XS", "IQ1_M"} & {job.type for job in made.jobs}


def test_codes_that_are_kept_have_no_error(tmp_path: Path) -> None:
    made = plan(ready("gptq/4b-g32-asym-v2", tmp_path), to="gguf", max_error=0.0001)
    linear = [job for job in made.jobs if job.map.kind == "linear" and job.map.leaf == "weight" and "proj" in job.map.sources[0].module]
    assert linear and {job.kind for job in linear if job.storage is not None} == {"exact"}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--to", "gptq:int4", "--max-error", "0.1"), "budget-target"), (("--to", "gguf:q4_0", "--max-error", "0.1"), "budget-type"),
        (("--to", "gguf", "--max-error", "0.1", "--target-size", "1M"), "budget-type"),
        (("--to", "gguf", "--max-error", "1.5"), "max-error"),
        (("--to", "gguf", "--max-error", "nan"), "max-error"), (("--to", "gguf", "--target-size", "many"), "usage"),
        (("--to", "gguf", "--target-size", "1K"), "target-size"),
    ],
)  # fmt: skip
def test_bad_wishes_are_one_error(words: tuple[str, ...], code: str, model: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(qconvert, ["convert", str(model), str(tmp_path / "out.gguf"), *words, "--json"], prog_name="qconvert")
    assert json.loads(found.stdout)["error"]["code"] == code
    assert not (tmp_path / "out.gguf").exists()


def test_a_saved_plan_keeps_the_budget(model: Path, tmp_path: Path) -> None:
    def run(*words: object) -> Any:
        return CliRunner().invoke(qconvert, [str(word) for word in words], prog_name="qconvert")

    (tmp_path / "plan.json").write_text(run("plan", model, "--to", "gguf", "--target-size", "70K", "--json").stdout)
    done = run("convert", model, tmp_path / "out.gguf", "--plan", tmp_path / "plan.json")
    assert done.exit_code == 0, done.output
    assert os.path.getsize(tmp_path / "out.gguf") <= 70_000
