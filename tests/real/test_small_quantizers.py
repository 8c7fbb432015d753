"""Four-bit tables, one and two bits, and legacy blocks against real llama.cpp: the same bytes, without and with importances.

Skipped visibly where llama.cpp's libraries or the model are absent (see ``llamacpp.py`` and ``lab.py`` beside this file).
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
from qformats.quantize import legacy_search, rtn, tables, ternary, uses_importance

pytestmark = [pytest.mark.real, pytest.mark.skipif(not llamacpp.available(), reason="no llama.cpp libraries are installed")]

NAMES = sorted(name.upper() for name in {*tables.TYPES, *ternary.TYPES, *legacy_search.TOPS, "q8_0"})
WAYS = [(name, weighted) for name in NAMES for weighted in (False, True) if not weighted or uses_importance(ggml.BLOCK_TYPES[name].storage)]
IDS = [f"{name}-{'weighted' if weighted else 'plain'}" for name, weighted in WAYS]


def ours(name: str, x: np.ndarray[Any, Any], importance: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
    storage = ggml.BLOCK_TYPES[name].storage
    tensor = rtn(torch.from_numpy(x), storage, None if importance is None else torch.from_numpy(importance))
    array: np.ndarray[Any, Any] = ggml.write(storage, tensor, 0, tensor.shape)[0].array
    return array


def compare(name: str, x: np.ndarray[Any, Any], importance: np.ndarray[Any, Any] | None) -> None:
    made, theirs = ours(name, x, importance), llamacpp.quantize_rows(x, name, importance)
    different = (made != theirs).reshape(-1, ggml.BLOCK_TYPES[name].nbytes).any(-1)
    assert not different.any(), f"{int(different.sum())} of {len(different)} blocks differ"


@pytest.mark.parametrize(("name", "weighted"), WAYS, ids=IDS)
def test_a_matrix_of_smollm2(name: str, weighted: bool) -> None:
    from safetensors import safe_open

    path = MODELS / "smollm2-135m" / "model.safetensors"
    if not path.is_file():
        pytest.skip("no SmolLM2 is installed")
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call,unused-ignore]
        x = file.get_tensor("model.layers.3.mlp.down_proj.weight").to(torch.float32).numpy()  # (576, 1536)
    importance = np.exp(np.random.default_rng(1).normal(0, 2, x.shape[1])).astype(np.float32) if weighted else None
    compare(name, x, importance)


@pytest.mark.parametrize(("name", "weighted"), WAYS, ids=IDS)
@pytest.mark.parametrize(
    "spread", ["normal", "log-normal", "bfloat16", "ties", "wide", "one-sided", "negative", "sparse", "any size", "offset", "zeros"]
)
def test_quantized_bytes(name: str, weighted: bool, spread: str) -> None:
    rng = np.random.default_rng(12)
    x = rng.normal(size=(32, 1792))
    largest = 2 if name == "NVFP4" else 4  # powers of ten; beyond 2688 it has no scale and we refuse
    x = {
        "normal": x * 0.02,
        "log-normal": np.clip(np.exp(2 * x), None, 2000) * rng.choice([-1, 1], x.shape),
        "bfloat16": ((x * 0.02).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32),
        "ties": np.round(x * 4) / 4,
        "wide": x * 10.0 ** rng.integers(-36, largest, (32, 1)),
        "one-sided": np.abs(x),
        "negative": -np.abs(x),
        "sparse": np.where(rng.random(x.shape) < 0.97, 0.0, x),
        "any size": x * 10.0 ** rng.integers(-44, largest, x.shape),
        "offset": 100 + x * 1e-3,
        "zeros": np.where(rng.random(x.shape) < 0.5, -0.0, np.repeat(rng.choice([0, 0.7, -0.7], (32, 56)), 32, 1)),
    }[spread].astype(np.float32)
    importance = np.where(rng.random(1792) < 0.2, 0, np.exp(rng.normal(0, 2, 1792))).astype(np.float32) if weighted else None
    if importance is not None:
        importance[32:64] = importance[256:512] = 0
    compare(name, x, importance)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("columns", [32, 96, 544])
def test_rows_of_any_length_are_weighed_by_their_own_mean(name: str, columns: int) -> None:
    rng = np.random.default_rng(13)
    x = (rng.normal(size=(3, columns)) * 10.0 ** rng.integers(-3, 2, (3, 1))).astype(np.float32)
    for rows in (1, 3):
        compare(name, x[:rows], rng.random(columns).astype(np.float32))


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_scales_of_every_power_of_two(name: str) -> None:
    """Maxima around every power of two, where llama.cpp's float32 logarithm rounds up; weights at and beside every middle."""
    exponents = np.repeat(np.arange(-124, 128) if name == "MXFP4" else np.arange(-20, 12), 24)
    ulps = np.tile(np.arange(-20, 4), len(exponents) // 24)
    top = (np.ldexp(1.0, exponents).astype(np.float32).view(np.int32) + ulps.astype(np.int32)).view(np.float32)
    top = np.minimum(top, np.float32(3.3e38 if name == "MXFP4" else 2688))
    steps = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]) / 6
    around = np.concatenate([steps, -steps, steps * (1 + 2**-22), steps * (1 - 2**-22)])
    x = np.zeros((len(top), 64), np.float32)
    x[:, 0], x[:, 1:29] = top, top[:, None] * around.astype(np.float32)
    x[:, 32], x[:, 33:61] = -top, np.ldexp(np.float32(6), exponents - 2)[:, None] * around.astype(np.float32)
    x[:, 33:61] = np.clip(x[:, 33:61], -top[:, None], top[:, None])
    compare(name, x, None)


def test_mxfp4_writes_no_scale_that_other_readers_take_for_nan() -> None:
    """The one difference: llama.cpp's byte for a maximum from 2^-126 up to 2^-125 is 255; both read zeros."""
    x = np.array([[2.0**-126] * 32, [1.5 * 2.0**-126] * 32, [2.0**-127] * 32], np.float32)
    theirs, made = llamacpp.quantize_rows(x, "MXFP4"), ours("MXFP4", x)
    assert theirs[:, 0].tolist() == [255, 255, 254] and made[:, 0].tolist() == [0, 0, 254]
    assert np.array_equal(made[:, 1:], theirs[:, 1:]) and not made[:, 1:].any()
    assert not llamacpp.dequantize_rows(made, "MXFP4", 32).any()
