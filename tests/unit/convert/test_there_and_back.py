"""A → B → A gives every tensor, the quantization config and the files beside it again, codes-exact conversions included.

``walk`` makes the checkpoints; a few pairs of every sort are tried here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import walk
from checkpoints import array, converted, edit, header, load, planned, put, ready, store

from converters import provenance
from converters.choose import IGNORED
from converters.verify import verify
from qformats.checkpoint import PROVENANCE_KEY, open_checkpoint
from qformats.errors import BadFile

# a rounded scale, a zero point as an offset, codes of a float grid as integers, a scale that divides, sub-scales in codes
PAIRS = ("bitsandbytes:int8 gptq", "torchao:int4 awq", "hqq:int4 gguf", "torchao:mxfp4 quanto", "compressed-tensors:nvfp4 gguf",
         "gguf:iq4_nl gptq", "quanto:qint4 hqq", "compressed-tensors:int4 quanto", "modelopt:nvfp4 torchao")  # fmt: skip
FIXTURES = ("quanto/qint4-f16 gguf", "compressed-tensors/fp8-tensor-kv quanto", "modelopt/fp8 torchao",
            "hqq/4b-g32-ax1-f16 gguf")  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("back")


def there_and_back(source: Path, target: str, folder: Path) -> tuple[Path, Path]:
    with open_checkpoint(source) as opened:
        name = opened.format
    there = folder / ("there.gguf" if target == "gguf" else "there")
    back = folder / ("back.gguf" if source.is_file() else "back")
    converted(source, there, target, allow_requantize=True)
    converted(there, back, name, allow_requantize=True)
    return there, back


def differences(a: Path, b: Path) -> list[str]:
    """Names of tensors, files and metadata that are not the same; a tokenizer and the ends of a GGUF may come back in another form."""
    with open_checkpoint(a) as x, open_checkpoint(b) as y:
        ends = ("token_embd", "output") if x.gguf is not None else ()
        mine, theirs = (
            {name: (raw.dtype, raw.shape, raw.read()) for name, raw in c.raw.items() if name.split(".")[0] not in ends} for c in (x, y)
        )
        found = [name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)]
        if x.gguf is not None:
            return found
        words = [{k: v for k, v in c.metadata.items() if not k.startswith("qformats.")} for c in (x, y)]
        found += [] if words[0] == words[1] or words[0].keys() <= {"format"} else ["metadata"]
    for file in a.glob("*.json"):
        if not file.name.startswith("tokenizer") and (not (b / file.name).exists() or _json(file) != _json(b / file.name)):
            found.append(file.name)
    return found


def _json(file: Path) -> object:
    return json.loads(file.read_text())


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
