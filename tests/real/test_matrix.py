"""Every ordered pair of formats, converted: what is called exact has the same values, what is not stays as near as its type allows.

Values are compared as float32 checkpoints that both sides are dequantized to.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "convert"))

import walk
from checkpoints import converted, load, planned

from converters.jobs import Job
from converters.verify import verify
from qformats import registry
from qformats.errors import QFormatError
from qformats.scheme import Integer

# the most that new codes of so many bits a weight may be off, relative to normal weights' root mean square
WORST = ((1.9, 1.3), (2.9, 0.8), (3.9, 0.35), (5.0, 0.2), (6.0, 0.1), (7.5, 0.06), (33.0, 0.06))
STORED_ROUNDING = 2.0**-7  # a scale or an offset rounded to bfloat16, and an offset of up to 15 steps


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


def floats(source: Path, work: Path) -> dict[str, np.ndarray]:
    out = work / f"floats-{source.name}"
    converted(source, out, "hf:f32", allow_requantize=True, overwrite=True)
    return {name: np.frombuffer(data, "<f4").reshape(shape) for name, (dtype, shape, data) in load(out / "model.safetensors").items()
            if dtype == "F32"}  # fmt: skip


def pairs() -> list[Any]:
    """Every source and target; one type of each format in the short tier."""
    found = []
    for name in walk.sources():
        form, _, kind = name.partition(":")
        usual = kind in ("", "q4_0", "bf16", registry.row(form).default_type)
        mark = pytest.mark.real if usual else pytest.mark.real_full
        found += [pytest.param(name, target, marks=mark) for target in walk.TARGETS]
    return found


@pytest.mark.parametrize(("name", "target"), pairs())
def test_pair(name: str, target: str, work: Path, tmp_path: Path) -> None:
    try:
        source = walk.make(name, work)
        plan = planned(source, target, allow_requantize=True)
    except QFormatError as error:
        pytest.skip(f"refused: {error.code}")
    plan.checkpoint.close()
    out = tmp_path / ("out.gguf" if target == "gguf" else "out")
    plan = converted(source, out, target, allow_requantize=True)
    assert verify(source, out).ok
    jobs = [j for j in plan.jobs if j.map.leaf == "weight" and j.map.kind in ("linear", "experts")]
    limit = max((limit_of(job) for job in jobs), default=0.0)
    before, after = floats(source, work), floats(out, tmp_path)
    assert before.keys() == after.keys()
    for key, values in before.items():
        a, b = values.astype(np.float64), after[key].astype(np.float64)
        error = float(np.sqrt(((a - b) ** 2).mean() / max((a**2).mean(), 1e-30)))
        assert np.array_equal(a, b) if limit == 0 else error <= limit, (key, error, limit)


def limit_of(job: Job) -> float:
    """How far a tensor may be off; nothing where it is lossless."""
    if job.lossless:
        return 0.0
    if job.kind == "codes-exact":
        return STORED_ROUNDING
    if job.storage is None:
        return WORST[-1][1]
    grid, bits = job.storage.grid, job.storage.bits_per_weight
    bits = min(bits, grid.bits) if isinstance(grid, Integer) else bits  # torchao keeps 4-bit codes in bytes
    return next(limit for width, limit in WORST if bits < width)
