"""Codebook quantizers against real llama.cpp: the same bytes for spread-out rows, without and with importances.

One exception: llama.cpp v0.5.0 leaves out the codes and signs of an IQ3_S sub-block of zeros, so that those of later sub-blocks lie too
early in its block; ours lie where they are read. ``test_sub_blocks_of_zeros`` pins both.
Skipped visibly where llama.cpp's libraries are absent (see ``llamacpp.py`` beside this file).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import llamacpp
from lab import MODELS

from qformats.formats import ggml
from qformats.formats.ggml.iquants import IQUANTS
from qformats.quantize import iquants, rtn

pytestmark = [pytest.mark.real, pytest.mark.skipif(not llamacpp.available(), reason="no llama.cpp libraries are installed")]

TYPES = [name.upper() for name in sorted(iquants.TYPES)]
WAYS = [(name, weighted) for name in TYPES for weighted in (False, True) if weighted or name.lower() not in iquants.NEEDY]
Array = np.ndarray[Any, Any]


def written(name: str, x: Array, importance: Array | None) -> Array:
    storage = IQUANTS[name].storage
    tensor = rtn(torch.from_numpy(x), storage, None if importance is None else torch.from_numpy(importance))
    (piece,) = ggml.write(storage, tensor, 0, tensor.shape)
    blocks: Array = piece.array
    return blocks


def compare(name: str, x: Array, importance: Array | None) -> None:
    different = written(name, x, importance) != llamacpp.quantize_rows(x, name, importance)
    different = different.reshape(-1, IQUANTS[name].nbytes).any(-1)
    assert not different.any(), f"{int(different.sum())} of {len(different)} super-blocks differ"


def importances(rng: np.random.Generator, columns: int) -> Array:
    values = np.exp(rng.normal(0, 2, columns))
    values[rng.random(columns) < 0.2] = 0
    values[:64] = 0
    return values.astype(np.float32)


def test_what_llama_cpp_refuses_without_importances() -> None:
    needs = {name.lower() for name in TYPES if llamacpp.base_library().ggml_quantize_requires_imatrix(llamacpp.GGML[name])}
    assert needs == iquants.NEEDY


@pytest.mark.parametrize(("name", "weighted"), WAYS)
def test_rows_of_smollm2(name: str, weighted: bool) -> None:
    from safetensors import safe_open

    path = MODELS / "smollm2-135m" / "model.safetensors"
    if not path.is_file():
        pytest.skip("no SmolLM2 is installed")
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call,unused-ignore]
        x = file.get_tensor("model.layers.3.mlp.down_proj.weight")[:64].to(torch.float32).numpy()
    compare(name, x, importances(np.random.default_rng(1), x.shape[1]) if weighted else None)


@pytest.mark.parametrize(("name", "weighted"), WAYS)
@pytest.mark.parametrize(
    "spread", ["normal", "log-normal", "bf16", "ties", "wide", "one-sided", "sparse", "any size", "any block", "offset"]
)
def test_quantized_bytes(name: str, weighted: bool, spread: str) -> None:
    rng = np.random.default_rng(12)
    x = rng.normal(size=(64, 1024))
    x = {
        "normal": x * 0.02,
        "log-normal": np.sign(x) * np.exp(2 * rng.normal(size=x.shape)) * 0.01,
        "bf16": torch.from_numpy(x * 0.02).to(torch.bfloat16).double().numpy(),
        "ties": np.round(x * 4) / 4,
        "wide": x * 10.0 ** rng.integers(-44, 4, (64, 1)),
        "one-sided": np.abs(x),
        "sparse": np.where(rng.random(x.shape) < (0.7 if name == "IQ3_S" else 0.97), 0.0, x),
        "any size": x * 10.0 ** rng.integers(-44, 4, x.shape),
        "any block": x * 10.0 ** np.repeat(rng.integers(-36, 4, (64, 64)), 16, axis=1),
        "offset": 100 + x * 1e-3,
    }[spread].astype(np.float32)
    compare(name, x, importances(rng, 1024) if weighted else None)


def test_sub_blocks_of_zeros() -> None:
    """IQ3_S as llama.cpp writes it is ours with the later codes and signs moved over those of zeros; read back, ours is nearer."""
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(16, 1024)) * 0.02).astype(np.float32)
    zeros = rng.random((16, 32)) < 0.3
    x.reshape(16, 32, 32)[zeros] = 0
    ours, theirs = written("IQ3_S", x, None).reshape(-1, 110), llamacpp.quantize_rows(x, "IQ3_S").reshape(-1, 110)
    moved = ours.copy()
    for block, empty in zip(moved, zeros.reshape(-1, 8), strict=True):
        for start, width in ((2, 8), (74, 4)):
            field = block[start : start + 8 * width].reshape(8, width)
            field[...] = np.concatenate([field[~empty], np.zeros((int(empty.sum()), width), np.uint8)])
    assert np.array_equal(moved, theirs)
    near, far = (np.abs(llamacpp.dequantize_rows(b.reshape(16, -1), "IQ3_S", 1024) - x).mean() for b in (ours, theirs))
    assert near < 0.2 * far
