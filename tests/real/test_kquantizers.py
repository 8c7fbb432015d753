"""K-quantizers against real llama.cpp: the same bytes for a matrix of SmolLM2 and for spread-out rows, without and with importances.

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
from qformats.formats.ggml.kquants import KQUANTS
from qformats.quantize import rtn

pytestmark = [pytest.mark.real, pytest.mark.skipif(not llamacpp.available(), reason="no llama.cpp libraries are installed")]


def compare(name: str, x: np.ndarray[Any, Any], importance: np.ndarray[Any, Any] | None) -> None:
    storage = KQUANTS[name].storage
    tensor = rtn(torch.from_numpy(x), storage, None if importance is None else torch.from_numpy(importance))
    (piece,) = ggml.write(storage, tensor, 0, tensor.shape)
    different = (piece.array != llamacpp.quantize_rows(x, name, importance)).reshape(-1, KQUANTS[name].nbytes).any(-1)
    assert not different.any(), f"{int(different.sum())} of {len(different)} super-blocks differ"


@pytest.mark.parametrize("name", list(KQUANTS))
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_matrix_of_smollm2(name: str, weighted: bool) -> None:
    from safetensors import safe_open

    path = MODELS / "smollm2-135m" / "model.safetensors"
    if not path.is_file():
        pytest.skip("no SmolLM2 is installed")
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call,unused-ignore]
        x = file.get_tensor("model.layers.3.mlp.down_proj.weight").to(torch.float32).numpy()  # (576, 1536)
    importance = np.exp(np.random.default_rng(1).normal(0, 2, x.shape[1])).astype(np.float32) if weighted else None
    compare(name, x, importance)


@pytest.mark.parametrize("name", list(KQUANTS))
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("spread", ["normal", "heavy", "ties", "wide", "one-sided", "sparse", "any size", "offset"])
def test_quantized_bytes(name: str, weighted: bool, spread: str) -> None:
    rng = np.random.default_rng(12)
    x = rng.normal(size=(32, 2048))
    x = {
        "normal": x * 0.02,
        "heavy": x**5,
        "ties": np.round(x * 4) / 4,
        "wide": x * 10.0 ** rng.integers(-44, 4, (32, 1)),
        "one-sided": np.abs(x),
        "sparse": np.where(rng.random(x.shape) < 0.97, 0.0, x),
        "any size": x * 10.0 ** rng.integers(-44, 4, x.shape),
        "offset": 100 + x * 1e-3,
    }[spread].astype(np.float32)
    importance = np.where(rng.random(2048) < 0.2, 0, np.exp(rng.normal(0, 2, 2048))).astype(np.float32) if weighted else None
    compare(name, x, importance)
