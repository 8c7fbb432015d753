"""GPTQ and AWQ files that others cannot read any more: Marlin's tiles, float zero points, zero points that their label denies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builder import ATTENTION, Array, Llama
from checkpoints import converted, edit, edit_json, load, planned, ready
from click.testing import CliRunner
from reference import Packed, gguf_tensors

from converters.cli import qconvert
from converters.verify import verify
from qformats.errors import UsageError

LEAVES = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def marlin_order() -> tuple[Array, list[int], list[int]]:
    """The permutations of 1024 codes, 64 and 32 scales, spelled as auto-gptq 0.7.1 ``qlinear_marlin.py _get_perms`` builds them."""
    order: list[int] = []
    for i in range(32):
        rows = (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1)
        tile = [16 * row + i // 4 + 8 * block for block in (0, 1) for row in rows]
        order += [place + 256 * j for j in range(4) for place in tile]
    mixed = np.array(order).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].ravel()
    grouped = [i + 8 * j for i in range(8) for j in range(8)]
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return mixed, grouped, single


def marlin_words(codes: Array) -> Array:
    """(K, N) codes -> (K / 16, 2 N) int32, as ``pack`` does it."""
    k, n = codes.shape
    tiles = codes.reshape(k // 16, 16, n // 16, 16).transpose(0, 2, 1, 3).reshape(-1, 1024)[:, marlin_order()[0]]
    fields = tiles.reshape(k // 16, n * 2, 8).astype(np.uint64)
    words: Array = (fields << (4 * np.arange(8, dtype=np.uint64))).sum(-1).astype("<u4").view("<i4")
    return words


def marlin_source(directory: Path, format: str, group: int) -> tuple[Llama, Path]:
    """A llama whose linears are Marlin's, and the model it was made of."""
    model = Llama(hidden=128, inner=256, heads=4, kv=2, head_dim=32, group=group)
    source = model.write(directory)

    def repack(tensors: Any) -> None:
        for leaf in LEAVES:
            name, scales = model.name(leaf), model.scales[leaf].T
            order = marlin_order()[1 if len(scales) > 1 else 2]
            words, permuted = marlin_words(model.codes[leaf].T), scales.reshape(-1, len(order))[:, order].reshape(scales.shape)
            for part in ("qweight", "qzeros", "g_idx", "scales"):
                del tensors[f"{name}.{part}"]
            names = ("B", "s") if format == "gptq" else ("qweight", "scales")
            tensors[f"{name}.{names[0]}"] = ("I32", list(words.shape), np.ascontiguousarray(words).tobytes())
            tensors[f"{name}.{names[1]}"] = ("F16", list(permuted.shape), np.ascontiguousarray(permuted, "<f2").tobytes())

    edit(source, repack)
    said = {"quant_method": format, "bits": 4, "group_size": group}
    said |= {"is_marlin_format": True, "sym": True} if format == "gptq" else {"version": "marlin", "zero_point": False}
    edit_json(source / "config.json", lambda c: c.update(quantization_config=said))
    return model, source


@pytest.mark.parametrize("format", ["gptq", "awq"])
@pytest.mark.parametrize("group", [128, -1])
@pytest.mark.parametrize("to", ["gptq:int4,format=v1", "awq:int4,version=gemm", "awq:int4,version=gemv_fast"])
def test_marlin_becomes_words_that_others_read(format: str, group: int, to: str, tmp_path: Path) -> None:
    model, source = marlin_source(tmp_path / "source", format, group)
    plan = converted(source, tmp_path / "out", to, exact=True)
    assert {job.kind for job in plan.jobs if job.action == "codes"} == {"exact"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == group and "is_marlin_format" not in config
    entry = {"format": config["quant_method"], "zero_policy": "v1", "group_size": 128, "path": "fast" if "fast" in to else "gemm"}
    packed = Packed(tmp_path / "out", entry)
    for leaf in LEAVES:
        if group == -1 and "fast" in to:
            packed.entry["group_size"] = model.shape(leaf)[1]
        assert np.array_equal(packed.weight(model.name(leaf)), model.weight(leaf)), leaf
    assert verify(source, tmp_path / "out", replay=True).ok


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_marlin_to_gguf_and_back(format: str, tmp_path: Path) -> None:
    model, source = marlin_source(tmp_path / "source", format, 128)
    converted(source, tmp_path / "there.gguf", "gguf", exact=True)
    found = gguf_tensors(tmp_path / "there.gguf")
    for leaf, name in (("v_proj", "attn_v"), ("down_proj", "ffn_down"), ("gate_proj", "ffn_gate")):
        kind, values = found[f"blk.0.{name}.weight"]
        assert kind == "Q4_0" and np.array_equal(values, model.weight(leaf))
    converted(tmp_path / "there.gguf", tmp_path / "back", format)
    assert load(tmp_path / "back" / "model.safetensors") == load(source / "model.safetensors")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("to", ["gptq:int4,format=marlin,group=128", "awq:int4,version=marlin,group=128,sym"])
def test_marlin_is_written_in_the_order_of_its_owner(to: str, tmp_path: Path) -> None:
    model = Llama(hidden=256, inner=256, heads=4, kv=4, head_dim=64, group=128)
    source = model.write(tmp_path / "source")
    plan = converted(source, tmp_path / "out", to, exact=True)
    tensors = load(tmp_path / "out" / "model.safetensors")
    words, scales = ("B", "s") if to.startswith("gptq") else ("qweight", "scales")
    for leaf in LEAVES:
        name, (_, grouped, _) = model.name(leaf), marlin_order()
        assert tensors[f"{name}.{words}"][2] == np.ascontiguousarray(marlin_words(model.codes[leaf].T)).tobytes()
        expected = model.scales[leaf].T.reshape(-1, 64)[:, grouped]
        assert tensors[f"{name}.{scales}"][2] == np.ascontiguousarray(expected, "<f2").tobytes()
    assert plan.jobs and verify(source, tmp_path / "out", replay=True).ok


def test_new_codes_are_written_as_marlin_and_planes(tmp_path: Path) -> None:
    model = Llama(hidden=256, inner=256, heads=4, kv=4, head_dim=64, group=128, zero="mixed")
    source = model.write(tmp_path / "source")
    for to in ("gptq:int4,format=marlin,group=128", "gptq:int5,sym,group=128", "gptq:int3,format=planar,group=128"):
        out = tmp_path / to.partition(":")[2]
        plan = converted(source, out, to, allow_requantize=True)
        kind = "exact" if "int5" in to else "requantized"  # codes 0 … 15 around any zero point are within -15 … 15
        assert {job.kind for job in plan.jobs if job.storage is not None} == {kind}
        assert verify(source, out, replay=True).ok
        converted(out, tmp_path / f"{out.name}.gguf", "gguf", exact=True)


@pytest.mark.parametrize("path", ["awq/fast-g64", "awq/llm-awq-g64"])
def test_fast_files_become_gemm_and_come_back(path: str, tmp_path: Path) -> None:
    source = ready(path, tmp_path)
    converted(source, tmp_path / "gemm", "awq:int4,version=gemm", exact=True)
    version = json.loads((tmp_path / "gemm" / "config.json").read_text())["quantization_config"]["version"]
    assert version == "gemm"
    own = json.loads((source / "config.json").read_text())["quantization_config"]["version"]
    converted(tmp_path / "gemm", tmp_path / "back", f"awq:int4,version={own}", exact=True)
    before, after = load(source / "model.safetensors"), load(tmp_path / "back" / "model.safetensors")
    assert before == after


def test_q4_1_becomes_gemv_fast_exactly(tmp_path: Path) -> None:
    """A GGUF's offsets need no integer zero point there."""
    converted(ready("dense/llama", tmp_path), tmp_path / "q4_1.gguf", "gguf:q4_1")
    plan = converted(tmp_path / "q4_1.gguf", tmp_path / "out", "awq:int4,version=gemv_fast,group=32")
    assert {job.kind for job in plan.jobs if job.storage is not None} == {"exact"}
    tensors, values = load(tmp_path / "out" / "model.safetensors"), gguf_tensors(tmp_path / "q4_1.gguf")
    name = "model.layers.0.mlp.down_proj"
    entry = {"format": "awq", "path": "fast", "group_size": 32}
    packed = Packed(tmp_path / "out", entry)
    codes, _, scales, index = packed.planes(name)
    _, shape, data = tensors[f"{name}.qzeros"]
    offsets = np.frombuffer(data, "<f2").astype("f8").reshape(shape)[: scales.shape[1]].T
    assert np.array_equal(scales[:, index] * codes + offsets[:, index], values["blk.0.ffn_down.weight"][1])
    assert verify(tmp_path / "q4_1.gguf", tmp_path / "out", replay=True).ok


# ---- zero points that the label denies


def mislabelled(directory: Path) -> Path:
    """Zero points 0 … 15 stored as they are, under a label that says minus one."""
    source = Path(shutil.copytree(ready("gptq/4b-g32-asym-v2", directory), directory / "mislabelled"))
    (source / "quantize_config.json").unlink()

    def lie(config: dict[str, Any]) -> None:
        said = config["quantization_config"]
        said.update(checkpoint_format="gptq", format="gptq")
        said.pop("meta", None)

    edit_json(source / "config.json", lie)
    return source


@pytest.mark.parametrize("to", ["gptq", "awq", "gguf", "hf"])
def test_the_user_says_what_the_zero_points_mean(to: str, tmp_path: Path) -> None:
    true, false = ready("gptq/4b-g32-asym-v2", tmp_path), mislabelled(tmp_path)
    for source, name, said in ((true, "true", ()), (false, "told", (("zero-points", "v2"),)), (false, "untold", ())):
        out = tmp_path / f"{name}-{to}"
        converted(source, out if to != "gguf" else out.with_suffix(".gguf"), to, source_options=said, allow_requantize=True)
        assert verify(source, out if to != "gguf" else out.with_suffix(".gguf"), replay=True).ok
    if to == "gguf":
        one, other, expected = (gguf_tensors(tmp_path / f"{n}-gguf.gguf") for n in ("told", "untold", "true"))
        assert all(np.array_equal(one[n][1], expected[n][1]) for n in expected)
        assert not all(np.array_equal(other[n][1], expected[n][1]) for n in expected)
    elif to != "gptq":
        assert load(tmp_path / f"told-{to}" / "model.safetensors") == load(tmp_path / f"true-{to}" / "model.safetensors")
    else:
        told = load(tmp_path / "told-gptq" / "model.safetensors")
        config = json.loads((tmp_path / "told-gptq" / "config.json").read_text())["quantization_config"]
        assert config["checkpoint_format"] == "gptq_v2" and told == load(true / "model.safetensors")


def test_symmetric_mislabelled_files_are_told_apart_and_mended(tmp_path: Path) -> None:
    source = ready("gptq/mislabelled-v2-as-v1", tmp_path)
    plan = converted(source, tmp_path / "out", "gptq:int4,format=v1", exact=True)
    assert any("read as 8" in text for text in plan.warnings)
    tensors = load(tmp_path / "out" / "model.safetensors")
    assert all(set(data) == {0x77} for name, (_, _, data) in tensors.items() if name.endswith(".qzeros"))


@pytest.mark.parametrize(
    ("path", "option", "code"),
    [
        ("gptq/4b-g32-asym-v2", ("zero-points", "v7"), "zero-policy"),
        ("gptq/3b-g32-sym", ("zero-points", "v1-word"), "zero-policy"),
        ("gptq/4b-g32-asym-v2", ("bits", "3"), "source-option"),
        ("awq/gemm-g32", ("zero-points", "float"), "source-option"),
        ("awq/fast-g64", ("zero-points", "v1"), "source-option"),
        ("dense/llama", ("zero-points", "v1"), "source-option"),
    ],
)
def test_options_that_a_source_does_not_have(path: str, option: tuple[str, str], code: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        planned(ready(path, tmp_path), "gguf", source_options=(option,))
    assert caught.value.code == code


def test_the_flag(tmp_path: Path) -> None:
    source = mislabelled(tmp_path)
    words = ["convert", source, tmp_path / "out.gguf", "--to", "gguf", "--source-option", "zero-points=v2", "--quiet"]
    assert CliRunner().invoke(qconvert, [str(word) for word in words]).exit_code == 0
    assert verify(source, tmp_path / "out.gguf", replay=True).ok
    assert CliRunner().invoke(qconvert, ["plan", str(source), "--to", "gguf", "--source-option", "zero-points"]).exit_code == 2
