"""Every ordered pair of formats on every fixture: the kinds as in the committed table, exact pairs proven on values, and back again.

``pairs.json`` holds, for every source and target, what becomes of the linear weights and the head. It records what the rules of
re-encoding give; a change of it is a change of what users get, to be read before it is committed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import walk
from builder import Llama
from checkpoints import DENSE, ENTRIES, PACKED, converted, edit_json, load, ready, stripped_gguf
from reference import Packed, expected_gguf, floats, gguf_tensors, hf_values

from converters.verify import verify

TABLE: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("pairs.json").read_text())
TARGETS = ("gptq", "gptq:int8", "awq", "awq:int4,version=gemv", "gguf", "gguf:q4_0", "gguf:q4_1", "gguf:q5_0", "gguf:q5_1", "gguf:q8_0",
           "gguf:q4_k", "gguf:f16", "gguf:bf16", "hf", "hf:f16")  # fmt: skip
GGUF_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32")
SOURCES = (*PACKED, *DENSE, *(f"made/gguf-{kind}" for kind in GGUF_TYPES))
MATRICES = (*walk.LINEAR, "output")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


def source_of(name: str, work: Path) -> Path:
    """A fixture, or a GGUF of one type without a record, made of a dense model."""
    if not name.startswith("made/"):
        return ready(name, work)
    made = work / f"{name.partition('/')[2]}.gguf"
    if not made.exists():
        converted(ready("dense/llama", work), work / "with-record.gguf", f"gguf:{name.rpartition('-')[2]}", overwrite=True)
        stripped_gguf(work / "with-record.gguf", made)
    return made


def test_the_table_is_complete() -> None:
    assert set(TABLE) == set(SOURCES) and all(set(row) == set(TARGETS) for row in TABLE.values())


@pytest.mark.parametrize("name", SOURCES)
def test_kinds_of_every_pair(name: str, work: Path) -> None:
    source = source_of(name, work)
    assert {to: walk.outcome(source, to, MATRICES) for to in TARGETS} == TABLE[name]


# ---------------------------------------------------------------- exact pairs, on values


def output_values(out: Path, to: str, copied_from: str | None = None) -> dict[str, Any]:
    """Float64 values of an output directory, read by the independent reader; copied planes keep the source's zero-point policy."""
    config = json.loads((out / "config.json").read_text())
    quantization = config.get("quantization_config", {})
    if to.startswith("hf"):
        return {name: floats(*t) for name, t in load(out / "model.safetensors").items()}
    policy = ENTRIES[copied_from]["zero_policy"] if copied_from else policy_of(quantization)
    entry = {"format": quantization["quant_method"], "zero_policy": policy, "path": str(quantization.get("version")).lower(),
             "group_size": quantization["group_size"]}  # fmt: skip
    return hf_values(out, entry)


SAMPLE = ("gptq/4b-g32-sym", "gptq/4b-g32-asym-v1", "gptq/3b-g32-sym", "gptq/2b-g32-asym-v1", "gptq/8b-g32-asym-v1", "gptq/moe-qwen3",
          "gptq/bias-qwen2", "gptq/4b-gm1-sym", "awq/gemm-g32", "awq/gemm-g128", "awq/gemv-g64", "awq/gemm-g32-sym-absent-zeros",
          "awq/gemm-skip", "autoround/extra-config")  # fmt: skip


@pytest.mark.parametrize("path", SAMPLE)
@pytest.mark.parametrize("to", ["gptq:int8", "awq", "awq:int4,version=gemv", "hf"])
def test_exact_into_directories(path: str, to: str, work: Path, tmp_path: Path) -> None:
    row = TABLE[path]["hf" if to == "hf" else to]
    if "refused" in row or "requantized" in row or "asks" in row:
        pytest.skip("not an exact pair")
    source, out = ready(path, work), tmp_path / "out"
    plan = converted(source, out, to, exact=True)
    copied = all(job.kind == "copied" for job in plan.jobs)
    expected, found = hf_values(source, ENTRIES[path]), output_values(out, to, path if copied else None)
    assert expected.keys() == found.keys()
    for job in plan.jobs:
        assert np.array_equal(found[job.name], expected[job.name]), job.name
    assert verify(source, out, replay=True).ok


@pytest.mark.parametrize("path", SAMPLE)
@pytest.mark.parametrize("to", ["q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32"])
def test_named_gguf_types(path: str, to: str, work: Path, tmp_path: Path) -> None:
    source, out = ready(path, work), tmp_path / "out.gguf"
    plan = converted(source, out, f"gguf:{to}")
    config = json.loads((source / "config.json").read_text())
    expected, found = expected_gguf(hf_values(source, ENTRIES[path]), config), gguf_tensors(out)
    for job in plan.jobs:
        kind, values = found[job.name]
        assert kind == job.type
        if job.lossless:
            assert np.array_equal(values, expected[job.name]), job.name
        elif job.kind == "dequantized":
            assert np.array_equal(values, rounded(expected[job.name], kind)), job.name
        elif job.kind == "codes-exact":
            offsets = np.abs(expected[job.name] - values)
            reach = np.abs(expected[job.name]).max() * 16  # no offset is larger than 15 steps
            assert offsets.max() <= max(reach * 2.0**-11, 2.0**-25), job.name
        else:
            assert job.kind == "requantized"


def rounded(values: Any, kind: str) -> Any:
    """Float64 rounded once, ties to even, to a 16-bit type (every value here is a float32 number)."""
    if kind == "F16":
        return values.astype(np.float16).astype(np.float64)
    bits = values.astype("<f4").view("<u4").astype(np.uint64)
    up = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return up.astype("<u4").view("<f4").astype(np.float64)


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("path", SAMPLE)
@pytest.mark.parametrize("through", ["gptq:int8", "awq", "gguf:q8_0", "gguf:q5_1"])
def test_back_through_another_format(path: str, through: str, work: Path, tmp_path: Path) -> None:
    row = TABLE[path][through]
    if "refused" in row or "requantized" in row or "codes-exact" in row or "asks" in row:
        pytest.skip("not an exact pair")
    if through.startswith(ENTRIES[path]["format"]):
        pytest.skip("the same format")
    source = ready(path, work)
    converted(source, tmp_path / "there", through, exact=True)
    converted(tmp_path / "there", tmp_path / "back", ENTRIES[path]["format"])
    assert verify(tmp_path / "there", tmp_path / "back", replay=True).ok
    before, after = load(source / "model.safetensors"), load(tmp_path / "back" / "model.safetensors")
    assert after == before
    for name in ("config.json", "quantize_config.json"):
        assert (source / name).exists() == (tmp_path / "back" / name).exists()
        assert not (source / name).exists() or (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


@pytest.mark.parametrize("kind", GGUF_TYPES[:5])
@pytest.mark.parametrize("through", ["gptq", "awq", "gptq:int8"])
def test_a_gguf_back_through_a_directory(kind: str, through: str, work: Path, tmp_path: Path) -> None:
    source = source_of(f"made/gguf-{kind}", work)
    row = TABLE[f"made/gguf-{kind}"][through]
    if "requantized" in row or "refused" in row or "asks" in row:
        pytest.skip("not an exact pair")
    converted(source, tmp_path / "there", through, exact=True)
    converted(tmp_path / "there", tmp_path / "back.gguf", "gguf")
    before, after = gguf_tensors(source), gguf_tensors(tmp_path / "back.gguf")
    assert before.keys() == after.keys()
    for name, (type_before, values) in before.items():
        assert np.array_equal(after[name][1], values), name
        assert after[name][0] == type_before or name in ("token_embd.weight", "output.weight"), name  # these go through floats


# ---------------------------------------------------------------- GGUF files of strangers


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("zero", [8, "mixed"])
@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_groups_and_zero_points_are_recovered_without_a_record(group: int, zero: int | str, to: str, tmp_path: Path) -> None:
    model = Llama(hidden=128, inner=256, heads=4, kv=2, head_dim=32, group=group, zero=zero)
    for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        n, k = model.shape(leaf)
        model.scales[leaf] = 2.0**-6 + np.arange(n * (k // group)).reshape(n, -1) % 1000 * 2.0**-16  # neighbours differ
        codes = np.random.default_rng(3).integers(0, 16, (n, k))
        codes[:, ::32], codes[:, 1::32] = 0, 15  # the whole range in every block: zero points are determined
        model.codes[leaf] = codes
    source = model.write(tmp_path / "source")
    converted(source, tmp_path / "with.gguf", "gguf", exact=True)
    bare = stripped_gguf(tmp_path / "with.gguf", tmp_path / "bare.gguf")
    plan = converted(bare, tmp_path / "out", to, exact=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == group and config["quant_method"] == to
    packed = Packed(tmp_path / "out", {"format": to, "zero_policy": policy_of(config), "path": "gemm", "group_size": group})
    for leaf in ("q_proj", "v_proj", "down_proj", "up_proj"):
        codes, zeros, scales, _ = packed.planes(model.name(leaf))
        assert np.array_equal(packed.weight(model.name(leaf)), model.weight(leaf))
        assert np.array_equal(codes, model.codes[leaf]) and np.array_equal(zeros, model.zeros[leaf])
        assert np.array_equal(scales, model.scales[leaf])
    assert plan.jobs and verify(bare, tmp_path / "out", replay=True).ok


def policy_of(config: dict[str, Any]) -> str:
    return "v2" if config.get("checkpoint_format") == "gptq_v2" else "v1"


@pytest.mark.parametrize(("kind", "to"), [("q4_0", "gptq"), ("q4_0", "awq"), ("q8_0", "gptq:int8"), ("q8_0", "gptq")])
def test_blocks_of_strangers_become_integers_exactly(kind: str, to: str, work: Path, tmp_path: Path) -> None:
    """llama.cpp's own Q4_0 has negative scales about half of the time; every value survives."""
    source, out = source_of(f"made/gguf-{kind}", work), tmp_path / "out"
    converted(source, out, to, exact=True)
    config = json.loads((out / "config.json").read_text())
    found = expected_gguf(output_values(out, to), config)
    for name, (_, values) in gguf_tensors(source).items():
        if name != "rope_freqs.weight":
            assert np.array_equal(found[name], values), name


def test_quantization_config_of_the_way_back_names_the_source_s_fields(work: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(ready("awq/gemm-g32", work), tmp_path / "source"))
    edit_json(source / "config.json", lambda c: c["quantization_config"].update({"unknown_to_us": [1, {"deep": None}]}))
    for through in ("gguf", "gptq"):
        converted(source, tmp_path / through, through)
        converted(tmp_path / through, tmp_path / f"back-{through}", "awq")
        assert (tmp_path / f"back-{through}" / "config.json").read_bytes() == (source / "config.json").read_bytes()
