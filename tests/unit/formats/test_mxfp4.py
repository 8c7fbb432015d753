"""MXFP4 as gpt-oss stores it: bytes by hand, values by transformers, GGUF blocks and back, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters import convert, plan
from qformats import registry
from qformats.checkpoint import open_checkpoint
from qformats.containers.raw import RawTensor
from qformats.containers.safetensors import open_safetensors
from qformats.containers.source import MemorySource
from qformats.errors import BadFile, QFormatError, Unsupported, WouldLose
from qformats.formats import mxfp4
from qformats.formats.protocol import Match, Module, Target

FIXTURE = Path(__file__).resolve().parents[3] / "fixtures" / "mxfp4"
EXPERTS = "model.layers.0.mlp.experts"


def raw(name: str, shape: tuple[int, ...], data: bytes, dtype: str = "U8") -> RawTensor:
    return RawTensor(name, dtype, shape, MemorySource(data, "memory"), 0, len(data))


def module(blocks: bytes, scales: bytes) -> Module:
    parts = {"_blocks": raw("x_blocks", (1, 1, 1, 16), blocks), "_scales": raw("x_scales", (1, 1, 1), scales)}
    return Module("x", parts, Match("mxfp4", {"quant_method": "mxfp4"}))


def test_neighbours_share_a_byte_and_the_low_nibble_comes_first() -> None:
    values = mxfp4.read(module(bytes.fromhex("10325476" + "98badcfe" + "00" * 8), b"\x80")).dequantize(torch.float32)[0]
    small = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert values[:16].tolist() == [2 * v for v in small] + [-2 * v for v in small]


def test_values_are_those_of_transformers() -> None:
    oracle = open_safetensors(FIXTURE / "oracle.safetensors").tensors
    with open_checkpoint(FIXTURE) as checkpoint:
        assert checkpoint.format == "mxfp4"
        for leaf in ("gate_up_proj", "down_proj"):
            wanted = oracle[f"{EXPERTS}.{leaf}"].array()  # (E, K, N)
            found = mxfp4.read(checkpoint.modules[f"{EXPERTS}.{leaf}"]).dequantize(torch.float32).numpy()
            assert np.array_equal(found, wanted.swapaxes(1, 2).reshape(found.shape))
            part = mxfp4.read(checkpoint.modules[f"{EXPERTS}.{leaf}"], 5, 40).dequantize(torch.float32).numpy()
            assert np.array_equal(part, found[5:40])


def test_to_gguf_and_back_is_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(FIXTURE, source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURE.parent / "dense" / "llama-tied" / name, source)
    header = plan(source, to="gguf", header_only=True)
    with header.checkpoint:
        claimed = [job for job in header.jobs if job.map.kind == "experts"]
    assert len(claimed) == 3 and {(job.type, job.kind) for job in claimed} == {("MXFP4", "exact")}  # the header is enough
    report = convert(source, tmp_path / "a.gguf", to="gguf", workers=1)
    experts = [line for line in report.tensors if line.name.endswith("exps.weight")]
    assert len(experts) == 3 and {(line.type, line.kind) for line in experts} == {("MXFP4", "exact")}
    convert(tmp_path / "a.gguf", tmp_path / "back", to="mxfp4", workers=1)
    before = open_safetensors(FIXTURE / "model.safetensors").tensors
    after = open_safetensors(tmp_path / "back" / "model.safetensors").tensors
    assert {name: (t.dtype, t.shape, t.read()) for name, t in before.items()} == {n: (t.dtype, t.shape, t.read()) for n, t in after.items()}


def test_floats_are_turned_as_transformers_has_them(tmp_path: Path) -> None:
    convert(FIXTURE, tmp_path / "floats", to="hf:f32", workers=1)
    made, wanted = (open_safetensors(p).tensors for p in (tmp_path / "floats" / "model.safetensors", FIXTURE / "oracle.safetensors"))
    assert all(np.array_equal(made[name].array(), wanted[name].array()) for name in wanted)
    with pytest.raises(WouldLose):
        convert(tmp_path / "floats", tmp_path / "again", to="mxfp4", workers=1)
    convert(tmp_path / "floats", tmp_path / "again", to="mxfp4", workers=1, allow_requantize=True)
    convert(tmp_path / "again", tmp_path / "once-more", to="hf:f32", workers=1)
    near = open_safetensors(tmp_path / "once-more" / "model.safetensors").tensors
    for name in wanted:  # new codes under scales of their own: most values are met again
        values, found = wanted[name].array(), near[name].array()
        assert np.abs(values - found).max() < np.abs(values).max() / 4 and np.mean(values == found) > 0.5


@pytest.mark.parametrize(
    ("leaf", "changes", "code"),
    [
        ("_blocks", None, "missing-blocks"), ("_scales", None, "missing-scales"), ("_blocks", {"dtype": "I8"}, "wrong-dtype"),
        ("_scales", {"shape": (1, 2, 1)}, "wrong-shape"), ("_blocks", {"shape": (1, 1, 2, 8)}, "wrong-shape"),
        ("_blocks", {"shape": (16,)}, "wrong-shape"), ("_scales", {"nbytes": 3}, "size"),
    ],
)  # fmt: skip
def test_broken_parts_are_refused(leaf: str, changes: dict[str, Any] | None, code: str) -> None:
    whole = module(bytes(16), b"\x7f")
    parts = dict(whole.parts)
    if changes is None:
        del parts[leaf]
    else:
        parts[leaf] = replace(parts[leaf], **changes)
    with pytest.raises(BadFile) as caught:
        mxfp4.scheme(replace(whole, parts=parts))
    assert caught.value.code == code


def test_other_codes_and_options_are_refused() -> None:
    tensor = mxfp4.read(module(bytes(16), b"\x7f"))
    storage = registry.format_module("gguf").BLOCK_TYPES["NVFP4"].storage
    assert not registry.format_module("gguf").can_store(storage, tensor.scheme)
    with pytest.raises(QFormatError):
        mxfp4.storages(Target("mxfp4", None, {"group": "16"}), tensor.scheme)
    with pytest.raises(Unsupported):
        mxfp4.write(mxfp4.storages(Target("mxfp4"), tensor.scheme)[0], replace(tensor, scales=()), 0, (1, 1, 32))
    with pytest.raises(Unsupported):
        mxfp4.layout(mxfp4.storage_of(module(bytes(16), b"\x7f")), (2, 3, 40))
