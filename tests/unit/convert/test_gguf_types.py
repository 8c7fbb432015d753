"""Whole GGUF files of the small types: inspected, copied byte by byte, and turned into floats that gguf-py or plain numpy agrees with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builder import Llama
from checkpoints import array, converted, load
from gguf import GGMLQuantizationType, quants

from converters.inspect import inspect_path
from converters.verify import verify
from qformats.containers.ggml_types import GGML_TYPES
from qformats.containers.gguf import TensorInfo, layout_gguf, open_gguf
from qformats.errors import WouldLose

Array = np.ndarray[Any, Any]
BLK, HF = "blk.0", "model.layers.0"
TYPES = {
    f"{BLK}.attn_q.weight": "MXFP4", f"{BLK}.attn_v.weight": "IQ4_NL", f"{BLK}.attn_output.weight": "Q1_0",
    f"{BLK}.ffn_gate.weight": "TQ1_0", f"{BLK}.ffn_up.weight": "TQ2_0", f"{BLK}.ffn_down.weight": "NVFP4", "output.weight": "Q2_0",
}  # fmt: skip
NAMES = {
    f"{BLK}.attn_v.weight": f"{HF}.self_attn.v_proj.weight", f"{BLK}.attn_output.weight": f"{HF}.self_attn.o_proj.weight",
    f"{BLK}.ffn_gate.weight": f"{HF}.mlp.gate_proj.weight", f"{BLK}.ffn_up.weight": f"{HF}.mlp.up_proj.weight",
    f"{BLK}.ffn_down.weight": f"{HF}.mlp.down_proj.weight", "output.weight": "lm_head.weight",
    f"{BLK}.attn_q.weight": f"{HF}.self_attn.q_proj.weight",
}  # fmt: skip
HEAD_DIM, FACTOR = 32, 0.0371


def random_blocks(kind: str, shape: tuple[int, ...], seed: int) -> Array:
    """uint8 (rows, row bytes), fp16 fields finite and MXFP4 scales moderate."""
    _, width, nbytes = GGML_TYPES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // width, nbytes), dtype=np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(100, 140, len(blocks))
    elif kind != "NVFP4":
        at = {"TQ1_0": 52, "TQ2_0": 64}.get(kind, 0)
        blocks[:, at : at + 2] = rng.normal(0, 0.02, len(blocks)).astype("<f2")[:, None].view("u1")
    return blocks.reshape(shape[0], -1)


def values(kind: str, blocks: Array, shape: tuple[int, ...]) -> Array:
    """float32, by gguf-py; for the two types that it cannot read, by their layout in llama.cpp's ggml-common.h."""
    if kind not in ("Q1_0", "Q2_0"):
        decoded: Array = quants.dequantize(blocks, GGMLQuantizationType[kind])
        return decoded.reshape(shape)
    b = blocks.reshape(-1, 18)
    d, qs = b[:, :2].copy().view("<f2").astype(np.float32), np.unpackbits(b[:, 2:], axis=1, bitorder="little").astype(np.float32)
    codes = 2 * qs - 1 if kind == "Q1_0" else qs[:, ::2] + 2 * qs[:, 1::2] - 1
    values: Array = (d * codes).reshape(shape)
    return values


def write(path: Path, source: Path, changes: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> Path:
    """The GGUF ``source`` with tensors replaced or added."""
    opened = open_gguf(source)
    parts = {name: (raw.dtype, raw.shape, raw.read()) for name, raw in opened.tensors.items()} | dict(changes)
    layout = layout_gguf(opened.metadata, [TensorInfo(name, kind, shape) for name, (kind, shape, _) in parts.items()])
    data = bytearray(layout.size)
    data[: len(layout.header)] = layout.header
    for name, (_, _, payload) in parts.items():
        data[layout.offsets[name] : layout.offsets[name] + layout.nbytes[name]] = payload
    path.write_bytes(data)
    return path


def blocks_of(opened: Any) -> dict[str, tuple[str, tuple[int, ...], Array]]:
    return {name: (kind, opened.tensors[name].shape, random_blocks(kind, opened.tensors[name].shape, i))
            for i, (name, kind) in enumerate(TYPES.items())}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file with a matrix of every type, an F64 norm, and NVFP4 with its two factors."""
    work = tmp_path_factory.mktemp("types")
    hf = Llama(hidden=256, inner=256, heads=8, kv=4, head_dim=HEAD_DIM).write(work / "hf")
    converted(hf, work / "plain.gguf", "gguf:f32", allow_requantize=True)
    made: dict[str, tuple[str, tuple[int, ...], bytes]] = {
        name: (kind, shape, blocks.tobytes()) for name, (kind, shape, blocks) in blocks_of(open_gguf(work / "plain.gguf")).items()
    }
    made["output_norm.weight"] = ("F64", (256,), np.linspace(0.5, 2, 256, dtype="<f8").tobytes())
    made[f"{BLK}.ffn_down.scale"] = ("F32", (1,), np.array([FACTOR], "<f4").tobytes())
    made[f"{BLK}.ffn_down.input_scale"] = ("F32", (1,), np.array([0.5], "<f4").tobytes())
    return write(work / "model.gguf", work / "plain.gguf", made)


@pytest.fixture(scope="module")
def with_integers(model: Path) -> Path:
    extra = {f"extra.{kind.lower()}": (kind, (3, 8), bytes(range(24 * GGML_TYPES[kind][2]))) for kind in ("I8", "I16", "I32", "I64")}
    return write(model.with_name("integers.gguf"), model, extra)


def test_inspect_names_every_type(with_integers: Path) -> None:
    found = inspect_path(with_integers)
    assert {t.name: t.type for t in found.tensors}.items() >= TYPES.items()
    sizes = {row["type"]: row["bits_per_weight"] for row in found.types()}
    assert sizes["TQ1_0"] == 1.6875 and sizes["NVFP4"] == 4.5 and sizes["F64"] == 64 and sizes["I16"] == 16
    assert not any(t.quantized for t in found.tensors if t.type in ("F64", "I8", "I16", "I32", "I64"))


def test_a_gguf_is_copied_tensor_by_tensor(with_integers: Path, tmp_path: Path) -> None:
    plan = converted(with_integers, tmp_path / "copy.gguf", "gguf", exact=True)
    assert {job.kind for job in plan.jobs} == {"copied"}
    before, after = open_gguf(with_integers).tensors, open_gguf(tmp_path / "copy.gguf").tensors
    assert {n: (r.dtype, r.shape, r.read()) for n, r in after.items()} == {n: (r.dtype, r.shape, r.read()) for n, r in before.items()}
    assert verify(with_integers, tmp_path / "copy.gguf", replay=True).ok


def test_floats_of_every_type(model: Path, tmp_path: Path) -> None:
    plan = converted(model, tmp_path / "hf", "hf:f32")
    assert plan.dropped.keys() == {f"{BLK}.ffn_down.input_scale"}
    found = load(tmp_path / "hf" / "model.safetensors")
    for name, (kind, shape, blocks) in blocks_of(open_gguf(model)).items():
        expected = values(kind, blocks, shape)
        if kind == "NVFP4":
            expected = (expected.astype(np.float64) * np.float32(FACTOR)).astype(np.float32)  # 4 + 4 + 24 bits: exact before rounding
        if name.endswith("attn_q.weight"):  # llama.cpp's converter puts the two halves of a head's rows beside one another
            expected = expected.reshape(-1, HEAD_DIM // 2, 2, 256).swapaxes(1, 2).reshape(shape)
        assert np.array_equal(array(found, NAMES[name]), expected), kind
    assert np.array_equal(array(found, "model.norm.weight"), np.linspace(0.5, 2, 256).astype(np.float32))
    assert verify(model, tmp_path / "hf", replay=True).ok


def test_new_codes_absorb_the_factor(model: Path, tmp_path: Path) -> None:
    converted(model, tmp_path / "q8.gguf", "gguf:q8_0", allow_requantize=True)
    tensors = open_gguf(tmp_path / "q8.gguf").tensors
    assert f"{BLK}.ffn_down.scale" not in tensors and tensors[f"{BLK}.ffn_down.weight"].dtype == "Q8_0"
    kind, shape, blocks = blocks_of(open_gguf(model))[f"{BLK}.ffn_down.weight"]
    stored = np.frombuffer(tensors[f"{BLK}.ffn_down.weight"].read(), np.uint8).reshape(shape[0], -1)
    expected, found = values(kind, blocks, shape) * np.float32(FACTOR), values("Q8_0", stored, shape)
    assert float(np.abs(expected - found).max()) <= float(np.abs(expected).max()) / 200


def test_ternary_codes_stay_codes(model: Path, tmp_path: Path) -> None:
    plan = converted(model, tmp_path / "q4.gguf", "gguf:q4_0", allow_requantize=True)
    kinds = {job.name: job.kind for job in plan.jobs}
    assert kinds[f"{BLK}.ffn_gate.weight"] == kinds[f"{BLK}.ffn_up.weight"] == kinds["output.weight"] == "exact"
    assert kinds[f"{BLK}.attn_v.weight"] == "requantized"


def test_a_scale_beyond_float32_is_refused(model: Path, tmp_path: Path) -> None:
    kind, shape, blocks = blocks_of(open_gguf(model))[f"{BLK}.attn_q.weight"]
    blocks[3, 0] = 254
    source = write(tmp_path / "large.gguf", model, {f"{BLK}.attn_q.weight": (kind, shape, blocks.tobytes())})
    with pytest.raises(WouldLose) as caught:
        converted(source, tmp_path / "hf", "hf:f32")
    assert caught.value.code == "f32-overflow" and caught.value.tensor is not None and "q_proj" in caught.value.tensor
