"""The tests' own reading of GPTQ and AWQ files against the values that the owning libraries computed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from reference import Reference, raw_tensors

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
NAMES = (
    "gptq/4b-g32-sym", "gptq/4b-g32-asym-v1", "gptq/4b-g32-asym-v2", "gptq/4b-g32-act", "gptq/4b-gm1-sym", "gptq/2b-g32-asym-v1",
    "gptq/3b-g32-asym-v1", "gptq/8b-g32-asym-v1", "awq/gemm-g32", "awq/gemm-g64", "awq/gemv-g32", "awq/gemv-g64", "awq/gemv-g128",
)  # fmt: skip
pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", NAMES)
def test_reading_equals_the_owners_values(name: str) -> None:
    folder = FIXTURES / name
    if not (folder / "config.json").exists():
        pytest.skip(f"fixtures/{name} is not there")
    oracle = raw_tensors(folder / "oracle.safetensors")
    config = json.loads((folder / "config.json").read_text())
    reference = Reference.__new__(Reference)
    reference.tensors = {k: v for file in folder.glob("model*.safetensors") for k, v in raw_tensors(file).items()}
    reference.config, reference.quantization = config, config["quantization_config"]
    assert oracle
    for key, (_, values) in oracle.items():
        assert np.array_equal(reference.weight(key.removesuffix(".weight")).astype(np.float32), values), key
