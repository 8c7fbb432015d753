"""GGUF to GGUF of another type through the whole tool: kinds as the plan says, values of exact pairs equal, sub-scales kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from builder import Llama
from checkpoints import converted, stripped_gguf

from converters.jobs import storage_from_json, storage_to_json
from qformats.formats.ggml import BLOCK_TYPES


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paths")
    Llama(hidden=256, inner=256, heads=4, kv=2, head_dim=64, group=128, zero=8).write(folder / "source")
    return folder


def gguf_tensors(path: Path) -> dict[str, tuple[str, Any]]:
    """Type and values of each tensor, decoded by the gguf package."""
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}


def source_of(kind: str, work: Path) -> Path:
    """A GGUF without a record whose linear layers are new codes of one type."""
    made = work / f"{kind}.gguf"
    if not made.exists():
        converted(work / "source", work / "with-record.gguf", f"gguf:{kind}", overwrite=True, pure=True)
        stripped_gguf(work / "with-record.gguf", made)
    return made


@pytest.mark.parametrize(
    ("kind", "to", "expected"),
    [("q3_k", "q6_k", "exact"), ("q3_k", "q8_0", "exact"), ("q4_k", "q5_k", "exact"), ("q6_k", "q4_k", "requantized")],
)
def test_super_blocks_into_others(kind: str, to: str, expected: str, work: Path, tmp_path: Path) -> None:
    source, out = source_of(kind, work), tmp_path / "out.gguf"
    plan = converted(source, out, f"gguf:{to}", pure=True)
    before, after = gguf_tensors(source), gguf_tensors(out)
    jobs = [job for job in plan.jobs if job.map.kind == "linear" and job.map.leaf == "weight" and len(job.map.shape) > 1]
    assert jobs and {(job.kind, job.type) for job in jobs if before[job.name][0] == kind.upper()} == {(expected, to.upper())}
    for job in jobs:
        if job.kind == "exact":
            assert np.array_equal(before[job.name][1], after[job.name][1]), job.name


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_storages_survive_a_record(name: str) -> None:
    storage = BLOCK_TYPES[name].storage
    assert storage_from_json(json.loads(json.dumps(storage_to_json(storage)))) == storage


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_records_of_the_first_version_are_read(name: str) -> None:
    storage = BLOCK_TYPES[name].storage
    data = storage_to_json(storage)
    assert storage.sub_scale is not None
    highest = storage.sub_scale.grid.highest
    data["sub_scale"], data["zero_point"] = [storage.sub_scale.width, highest, highest], None
    assert storage_from_json(data) == storage


@pytest.mark.parametrize("change", [{"float": "e9m9"}, {"table": "nf4", "v_in": 3}, {"table": ["nf4"], "v_in": 1}])
def test_unknown_grids_in_a_record_are_refused(change: dict[str, object]) -> None:
    data = storage_to_json(BLOCK_TYPES["IQ4_NL"].storage)
    del data["table"], data["v_in"]
    with pytest.raises((ValueError, TypeError, KeyError)):
        storage_from_json({**data, **change})
