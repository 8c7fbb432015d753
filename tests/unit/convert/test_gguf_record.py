"""GGUF -> GPTQ -> GGUF: blocks that GPTQ holds as floats come back as blocks, and another producer's metadata comes back key by key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import converted, load, planned, ready, store

from converters.verify import verify
from qformats.checkpoint import open_checkpoint
from qformats.containers.gguf import TensorInfo, Value, layout_gguf

DENSE = "dense/llama"
EXTRA = {
    "general.basename": Value("str", "somebody's"),
    "general.languages": Value("[str]", ["en", "de"]),
    "llama.invented": Value("f32", 0.10000000149011612),
    "made.up.flags": Value("[bool]", [True, False]),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf-record")


@pytest.fixture(scope="module")
def theirs(work: Path) -> Path:
    """A Q4_0 file with a Q8_0 embedding as another tool might write it: more keys, in another order, no record of ours."""
    converted(ready(DENSE, work), work / "ours.gguf", "gguf:q4_0", token_embedding_type="q8_0")
    with open_checkpoint(work / "ours.gguf") as opened:
        kept = {k: v for k, v in reversed(opened.metadata.items()) if not k.startswith("qformats.")}
        layout = layout_gguf({**EXTRA, **kept}, [TensorInfo(t.name, t.dtype, t.shape) for t in opened.raw.values()])
        data = bytearray(layout.size)
        data[: len(layout.header)] = layout.header
        for name, raw in opened.raw.items():
            data[layout.offsets[name] : layout.offsets[name] + raw.nbytes] = raw.read()
    (work / "theirs.gguf").write_bytes(bytes(data))
    return work / "theirs.gguf"


def content(path: Path) -> tuple[list[tuple[str, Value]], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    with open_checkpoint(path) as opened:
        metadata = [(k, v) for k, v in opened.metadata.items() if not k.startswith("qformats.")]
        return metadata, {name: (raw.dtype, raw.shape, raw.read()) for name, raw in opened.raw.items()}


def plain(metadata: list[tuple[str, Value]]) -> list[tuple[str, str, object]]:
    return [(k, v.type, list(v.value) if v.type.startswith("[") else v.value) for k, v in metadata]


def test_everything_comes_back(theirs: Path, work: Path, tmp_path: Path) -> None:
    first = converted(theirs, tmp_path / "gptq", "gptq")
    kinds = {job.name: job.kind for job in first.jobs}
    assert kinds["model.embed_tokens.weight"] == "dequantized" and "exact" in kinds.values()
    back = converted(tmp_path / "gptq", tmp_path / "back.gguf", "gguf")
    assert {job.kind for job in back.jobs} <= {"copied", "exact"}
    before, after = content(theirs), content(tmp_path / "back.gguf")
    assert after[1] == before[1] and before[1]["token_embd.weight"][0] == "Q8_0"
    assert plain(after[0]) == plain(before[0])
    assert verify(tmp_path / "gptq", tmp_path / "back.gguf", replay=True).ok


def test_floats_that_changed_stay_floats(theirs: Path, tmp_path: Path) -> None:
    converted(theirs, tmp_path / "gptq", "gptq")
    file = tmp_path / "gptq" / "model.safetensors"
    tensors = load(file)
    dtype, shape, data = tensors["model.embed_tokens.weight"]
    with open_checkpoint(tmp_path / "gptq") as opened:
        metadata = dict(opened.metadata)
    tensors["model.embed_tokens.weight"] = (dtype, shape, b"\x01" + data[1:])
    store(file, tensors, metadata)
    converted(tmp_path / "gptq", tmp_path / "back.gguf", "gguf")
    metadata_after, tensors_after = content(tmp_path / "back.gguf")
    assert tensors_after["token_embd.weight"][0] == "F32" and tensors_after["token_embd.weight"][2][:1] == b"\x01"
    assert "general.basename" not in dict(metadata_after)  # no longer the model it was recorded for


def test_a_changed_configuration_is_not_overruled(theirs: Path, tmp_path: Path) -> None:
    converted(theirs, tmp_path / "gptq", "gptq")
    path = tmp_path / "gptq" / "config.json"
    config = json.loads(path.read_text())
    config["max_position_embeddings"] = 1234
    path.write_text(json.dumps(config))
    converted(tmp_path / "gptq", tmp_path / "back.gguf", "gguf")
    assert dict(content(tmp_path / "back.gguf")[0])["llama.context_length"].value == 1234


def test_a_named_type_is_obeyed(theirs: Path, tmp_path: Path) -> None:
    converted(theirs, tmp_path / "gptq", "gptq")
    plan = planned(tmp_path / "gptq", "gguf:f32")
    with plan.checkpoint:
        assert {job.type for job in plan.jobs} == {"F32"}


def test_floats_by_choice_stay_floats(theirs: Path, tmp_path: Path) -> None:
    converted(theirs, tmp_path / "hf", "hf:f32")
    plan = planned(tmp_path / "hf", "gguf")
    with plan.checkpoint:
        assert {job.type for job in plan.jobs} == {"F32"}
