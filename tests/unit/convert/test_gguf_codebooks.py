"""A whole GGUF file with a matrix of every codebook type: inspected, copied byte by byte, turned into floats and into other codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builder import Llama
from checkpoints import array, converted, load
from gguf import GGMLQuantizationType, quants
from test_gguf_types import write

from converters.inspect import inspect_path
from converters.verify import verify
from qformats.containers.ggml_types import GGML_TYPES
from qformats.containers.gguf import open_gguf

Array = np.ndarray[Any, Any]
BLK, HF, HEAD_DIM = "blk.0", "model.layers.0", 32
ATTENTION, MLP = f"{HF}.self_attn", f"{HF}.mlp"
TYPES = {
    f"{BLK}.attn_q.weight": ("IQ2_XXS", f"{ATTENTION}.q_proj.weight"), f"{BLK}.attn_k.weight": ("IQ1_M", f"{ATTENTION}.k_proj.weight"),
    f"{BLK}.attn_v.weight": ("IQ4_XS", f"{ATTENTION}.v_proj.weight"), f"{BLK}.attn_output.weight": ("IQ2_XS", f"{ATTENTION}.o_proj.weight"),
    f"{BLK}.ffn_gate.weight": ("IQ2_S", f"{MLP}.gate_proj.weight"), f"{BLK}.ffn_up.weight": ("IQ3_XXS", f"{MLP}.up_proj.weight"),
    f"{BLK}.ffn_down.weight": ("IQ3_S", f"{MLP}.down_proj.weight"), "output.weight": ("IQ1_S", "lm_head.weight"),
}  # fmt: skip


def random_blocks(kind: str, rows: int, seed: int) -> Array:
    """uint8 (rows, row bytes) of rows of 256 weights, d below one."""
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, GGML_TYPES[kind][2]), dtype=np.uint8)
    if kind == "IQ1_M":
        blocks[:, 55] &= 0xBF
    else:
        blocks[:, 1] &= 0xBF
    return blocks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("codebooks")
    hf = Llama(hidden=256, inner=256, heads=8, kv=4, head_dim=HEAD_DIM).write(work / "hf")
    converted(hf, work / "plain.gguf", "gguf:f32", allow_requantize=True)
    shapes = {name: raw.shape for name, raw in open_gguf(work / "plain.gguf").tensors.items()}
    kinds = [(name, kind, shapes[name]) for name, (kind, _) in TYPES.items()]
    made = {name: (kind, shape, random_blocks(kind, shape[0], i).tobytes()) for i, (name, kind, shape) in enumerate(kinds)}
    return write(work / "model.gguf", work / "plain.gguf", made)


def test_inspect_names_every_type(model: Path) -> None:
    found = inspect_path(model)
    assert {t.name: t.type for t in found.tensors}.items() >= {name: kind for name, (kind, _) in TYPES.items()}.items()
    sizes = {row["type"]: row["bits_per_weight"] for row in found.types()}
    assert sizes["IQ1_S"] == 1.5625 and sizes["IQ4_XS"] == 4.25


def test_a_gguf_is_copied_tensor_by_tensor(model: Path, tmp_path: Path) -> None:
    plan = converted(model, tmp_path / "copy.gguf", "gguf", exact=True)
    assert {job.kind for job in plan.jobs} == {"copied"}
    before, after = open_gguf(model).tensors, open_gguf(tmp_path / "copy.gguf").tensors
    assert {n: (r.dtype, r.shape, r.read()) for n, r in after.items()} == {n: (r.dtype, r.shape, r.read()) for n, r in before.items()}
    assert verify(model, tmp_path / "copy.gguf", replay=True).ok


def test_floats_of_every_type(model: Path, tmp_path: Path) -> None:
    converted(model, tmp_path / "hf", "hf:f32")
    found = load(tmp_path / "hf" / "model.safetensors")
    for name, raw in open_gguf(model).tensors.items():
        if name not in TYPES:
            continue
        kind, target = TYPES[name]
        blocks = np.frombuffer(raw.read(), np.uint8).reshape(raw.shape[0], -1)
        expected = quants.dequantize(blocks, GGMLQuantizationType[kind])
        if ".attn_q." in name or ".attn_k." in name:  # llama.cpp's converter puts the two halves of a head's rows beside one another
            expected = expected.reshape(-1, HEAD_DIM // 2, 2, 256).swapaxes(1, 2).reshape(raw.shape)
        assert np.array_equal(array(found, target), expected), kind
    assert verify(model, tmp_path / "hf", replay=True).ok


def test_codes_are_kept_where_eight_bits_hold_them(model: Path, tmp_path: Path) -> None:
    plan = converted(model, tmp_path / "q8.gguf", "gguf:q8_0", allow_requantize=True)
    kinds = {job.name: job.kind for job in plan.jobs}
    kept = {kind for name, (kind, _) in TYPES.items() if kinds[name] == "codes-exact"}
    assert kept == {"IQ2_XXS", "IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ1_S"}  # one scale for 32 weights or more, whose product is rounded
    assert {kinds[name] for name, (kind, _) in TYPES.items() if kind not in kept} == {"requantized"}  # a scale for each 16
