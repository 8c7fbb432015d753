"""A → B → A gives every tensor, the quantization config and the files beside it again, codes-exact conversions included.

``walk`` makes the checkpoints; a few pairs of every sort are tried here, ``tests/real/test_ways_back.py`` takes them all.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import walk
from checkpoints import Tensors, array, edit, header, load, planned, put, ready, store
from ways import LOST, differences, there_and_back, unkept

from converters import provenance
from converters.choose import IGNORED
from converters.verify import verify
from qformats.checkpoint import PROVENANCE_KEY
from qformats.errors import BadFile

# a rounded scale, a zero point as an offset, codes of a float grid as integers, a scale that divides, sub-scales in codes
PAIRS = ("bitsandbytes:int8 gptq", "torchao:int4 awq", "hqq:int4 gguf", "torchao:mxfp4 quanto", "compressed-tensors:nvfp4 gguf",
         "gguf:iq4_nl gptq", "quanto:qint4 hqq", "compressed-tensors:int4 quanto", "modelopt:nvfp4 torchao",
         "fp8:fp4 gptq", "compressed-tensors:mxfp6 hqq", "gguf:nvfp4 gemma")  # fmt: skip
# minus zeros of a small float where there are integers are among these, act-order, rows of tiles, names of tied tensors
FIXTURES = ("quanto/qint4-f16 gguf", "compressed-tensors/fp8-tensor-kv quanto", "modelopt/fp8 torchao", "hqq/4b-g32-ax1-f16 gguf",
            "modelopt/nvfp4 gptq", "compressed-tensors/actorder gptq", "eetq/int8 gemma", "torchao/int8 modelopt",
            "bitnet/autobitlinear hqq")  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("back")


@pytest.mark.parametrize("pair", PAIRS)
def test_what_was_made_comes_back(pair: str, work: Path, tmp_path: Path) -> None:
    name, target = pair.split()
    source = walk.make(name, work)
    _, back = there_and_back(source, target, tmp_path)
    assert differences(source, back) == []


@pytest.mark.parametrize("pair", FIXTURES)
def test_what_its_owner_made_comes_back(pair: str, work: Path, tmp_path: Path) -> None:
    path, target = pair.split()
    source = ready(path, work)
    there, back = there_and_back(source, target, tmp_path)
    assert verify(source, there).ok and verify(there, back, replay=True).ok
    assert differences(source, back) == []


def test_weights_that_came_along_with_new_codes_come_back(work: Path, tmp_path: Path) -> None:
    """Some layers get new codes in ModelOpt, the others have theirs again, and the scales of their activations."""
    assert unkept(ready("quanto/mixed-bf16", work), "modelopt", tmp_path) == []


def test_a_plan_says_what_does_not_come_back(work: Path) -> None:
    plan = planned(ready("compressed-tensors/sparse24-fp8", work), "quanto")
    with plan.checkpoint:
        coded = [job for job in plan.jobs if job.action == "codes"]
        assert len(coded) == 7 and all(any(LOST in note for note in job.notes) for job in coded)
        assert any(LOST in text for text in plan.warnings)


def test_other_zeros_are_not_mixed_with_recorded_signs(work: Path, tmp_path: Path) -> None:
    """A code that became zero since: its weight has the parameters it had, and zeros without signs."""
    there, _ = there_and_back(walk.make("fp8:fp4", work), "gemma", tmp_path)
    name = next(name for name in load(there / "model.safetensors") if name.endswith("q_proj.weight"))

    def change(tensors: Tensors) -> None:
        codes = array(tensors, name)
        codes.reshape(-1)[codes.reshape(-1).nonzero()[0][0]] = 0
        put(tensors, name, codes)

    edit(there, change)
    plan = planned(there, "fp8", allow_requantize=True)
    with plan.checkpoint:
        unsigned = [job.name for job in plan.jobs if job.earlier is not None and job.earlier.zeros is None]
        assert unsigned == [name] and not any(job.action == "quantize" for job in plan.jobs)


def test_other_parameters_are_never_mixed_with_recorded_ones(work: Path, tmp_path: Path) -> None:
    """A scale that changed since: the record is ignored and the plan says so."""
    there, _ = there_and_back(walk.make("bitsandbytes:int8", work), "gptq", tmp_path)
    name = next(name for name in load(there / "model.safetensors") if name.endswith("q_proj.scales"))
    edit(there, lambda tensors: put(tensors, name, array(tensors, name) * 2))
    plan = planned(there, "bitsandbytes")
    with plan.checkpoint:
        touched = [job for job in plan.jobs if IGNORED in job.notes]
        assert [job.name for job in touched] == [name.replace("scales", "weight")]
        assert any(IGNORED in text for text in plan.warnings)
        assert touched[0].earlier is None and touched[0].kind != "copied"


@pytest.mark.parametrize("change", ["bytes", "size", "block", "dtype", "held"])
def test_damaged_planes_are_one_error(change: str, work: Path, tmp_path: Path) -> None:
    """A record with the right digest and planes that are none."""
    there, _ = there_and_back(walk.make("bitsandbytes:int8", work), "gptq", tmp_path)
    file = there / "model.safetensors"
    metadata = header(file)["__metadata__"]
    record = json.loads(metadata[PROVENANCE_KEY])
    entry = next(iter(record["restore"]["modules"].values()))["planes"]
    held, plane = entry, entry["params"]["scale"]
    broken = {"bytes": "AAAA", "size": [1, 1], "block": ["tile", 0], "dtype": "object", "held": 99}[change]
    (held if change == "held" else plane)[change] = broken
    record["digest"] = provenance._digest(record)
    store(file, load(file), {**metadata, PROVENANCE_KEY: json.dumps(record)})
    with pytest.raises(BadFile) as caught:
        planned(there, "bitsandbytes")
    assert caught.value.code == "provenance"
