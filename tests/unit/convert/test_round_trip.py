"""Every fixture into GGUF and back: values as an independent reader sees them, tensors and configuration byte for byte, verify agrees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import DENSE, ENTRIES, PACKED, Tensors, array, converted, edit, load, put, ready
from reference import expected_gguf, gguf_tensors, hf_values

from converters.verify import verify
from qformats.errors import BadFile

EXACT = ("copied", "exact")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("round-trip")


@pytest.mark.parametrize("path", PACKED + DENSE)
def test_values_in_gguf_are_the_source_s(path: str, work: Path) -> None:
    source, out = ready(path, work), work / f"{path.replace('/', '_')}.gguf"
    plan = converted(source, out, "gguf", allow_requantize=True, overwrite=True)
    config = json.loads((source / "config.json").read_text())
    expected = expected_gguf(hf_values(source, ENTRIES[path]), config)
    found = gguf_tensors(out)
    absorbed = any(job.orders for job in plan.jobs)
    assert found.keys() - expected.keys() <= {"rope_freqs.weight"} and expected.keys() <= found.keys()
    for job in plan.jobs:
        if job.kind not in EXACT or job.name == "rope_freqs.weight":
            continue
        kind, values = found[job.name]
        assert kind == job.type
        if absorbed and ("ffn_" in job.name or "attn_output" in job.name or "attn_v" in job.name):
            continue  # rows and columns in a new order: test_act_order compares what the layer computes
        assert np.array_equal(values, expected[job.name]), job.name
    assert verify(source, out, replay=True).ok


@pytest.mark.parametrize("path", PACKED)
def test_there_and_back_restores_every_byte(path: str, work: Path) -> None:
    source, there, back = ready(path, work), work / "there.gguf", work / "back"
    first = converted(source, there, "gguf", allow_requantize=True, overwrite=True)
    converted(there, back, ENTRIES[path]["format"], allow_requantize=True, overwrite=True)
    assert verify(there, back, replay=True).ok
    if any(job.kind not in EXACT for job in first.jobs):
        return  # new codes or floats: nothing to restore
    assert load(back / "model.safetensors") == load(source / "model.safetensors")
    for name in ("config.json", "quantize_config.json", "quant_config.json", "generation_config.json"):
        assert (back / name).exists() == (source / name).exists(), name
        assert not (source / name).exists() or (back / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("path", DENSE)
def test_a_dense_model_comes_back(path: str, work: Path) -> None:
    source, there, back = ready(path, work), work / "dense.gguf", work / "dense-back"
    converted(source, there, "gguf", overwrite=True)
    converted(there, back, "hf", overwrite=True)
    assert verify(there, back, replay=True).ok
    assert load(back / "model.safetensors") == load(source / "model.safetensors")
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def with_scale(bits: int, work: Path, tmp_path: Path) -> Path:
    """A checkpoint one of whose scales has these bits."""
    source = Path(shutil.copytree(ready("gptq/4b-g32-sym", work), tmp_path / "source"))
    name = "model.layers.0.self_attn.v_proj.scales"

    def change(tensors: Tensors) -> None:
        values = array(tensors, name).view("<u2")
        values[1, 3] = bits
        put(tensors, name, values.view("<f2"))

    edit(source, change)
    return source


@pytest.mark.parametrize("bits", [0x7E01, 0x7C00, 0xFC00])
def test_scales_that_are_not_numbers_are_refused(bits: int, work: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no finite number") as caught:
        converted(with_scale(bits, work, tmp_path), tmp_path / "there.gguf", "gguf")
    assert caught.value.code == "not-finite" and not (tmp_path / "there.gguf").exists()


@pytest.mark.parametrize("bits", [0x8000, 0x0001])
def test_negative_zero_and_the_smallest_scale_are_kept_bit_for_bit(bits: int, work: Path, tmp_path: Path) -> None:
    source = with_scale(bits, work, tmp_path)
    converted(source, tmp_path / "there.gguf", "gguf", exact=True)
    converted(tmp_path / "there.gguf", tmp_path / "back", "gptq")
    assert load(tmp_path / "back" / "model.safetensors") == load(source / "model.safetensors")
    assert verify(source, tmp_path / "there.gguf", replay=True).ok
