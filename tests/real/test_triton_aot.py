"""Every kernel for every class of weights compiled for sm_90, without a GPU: registers, wide loads, tensor cores, instructions."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process (the unit tests ask for that)", allow_module_level=True)
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu_weights import CLASSES
from triton_aot import Code, compiled

from qformats.kernels.lower import lower
from qformats.kernels.triton import tuning
from qformats.kernels.triton.spec import spec_of

COLUMNS = 4096
SOME = ("int4 g128", "q4_k", "nf4", "mxfp4", "iq2_xxs")
BOUNDS = {  # instructions of a step for each weight, gemv and tiles: what was reached, and a tenth
    "int4 g32": (7.0, 7.5), "int4 g128": (7.4, 8.0), "int2 g64": (8.5, 7.9), "int3 g64": (10.9, 10.9), "int5 g32": (11.8, 13.9),
    "int8 g32": (6.3, 7.3), "hqq4 g64": (8.4, 11.1), "int8 rows": (6.6, 15.2), "q2_k": (11.4, 12.8), "q3_k": (11.9, 14.2),
    "q4_k": (10.2, 14.4), "q5_k": (14.2, 19.0), "q6_k": (11.0, 12.6), "nf4": (8.5, 11.8), "nf4 nested": (9.0, 12.7),
    "iq4_nl": (8.6, 9.0), "mxfp4": (8.7, 9.5), "nvfp4": (10.2, 13.0), "fp8 blocks": (11.7, 17.7), "iq2_xxs": (12.1, 17.7),
    "iq2_s": (14.6, 15.0), "iq3_s": (17.3, 15.9), "iq1_s": (16.9, 13.4), "aqlm 1x16": (7.6, 8.6), "aqlm 2x8": (15.9, 20.9),
}  # fmt: skip


@functools.cache
def code(name: str, shape: str, count: int, dtype: str = "*bf16") -> Code:
    lowered = lower(CLASSES[name](128, COLUMNS, "cpu"))
    spec = spec_of(lowered.layout)
    assert spec is not None
    block = tuning.block("tiles" if shape == "experts" else shape, spec, torch.device("cpu"), count, 14336, single=dtype == "*fp32")
    return compiled(shape, lowered, spec, block, max(1, spec.units // block.units), count, dtype)


def check(found: Code) -> None:
    assert found.stack == 0, "registers are spilled"
    assert found.registers <= 255
    assert found.shared <= 227 << 10
    assert found.count("I2F.U8", loop=True) + found.count("I2F.S8", loop=True) == 0


def wide_loads(found: Code) -> int:
    """Loads of 16 bytes, also those straight into shared memory."""
    return sum(name.startswith(("LDG", "LDGSTS")) and ".128" in name for _, name, _ in found.lines)


@pytest.mark.real
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(("shape", "count"), [("gemv", 1), ("tiles", 16), ("tiles", 256)])
def test_common_kinds_compile_to_what_the_machine_can_feed(name: str, shape: str, count: int) -> None:
    judge(name, shape, count)


@pytest.mark.real_full
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("shape", "count"), [("gemv", 1), ("gemv", 4), ("tiles", 16), ("tiles", 64), ("tiles", 256)])
def test_every_kind_compiles_to_what_the_machine_can_feed(name: str, shape: str, count: int) -> None:
    judge(name, shape, count)


def judge(name: str, shape: str, count: int) -> None:
    found = code(name, shape, count)
    check(found)
    assert wide_loads(found) > 0
    if shape == "tiles":
        assert found.count("HGMMA") > 0
    if count in (1, 16):
        assert found.per_weight <= BOUNDS[name][shape == "tiles"], found.names().most_common(12)


@pytest.mark.real
@pytest.mark.parametrize("name", ["int4 g128", "q4_k"])
def test_experts_dequantization_and_single_precision_compile(name: str) -> None:
    for shape, count, dtype in (("experts", 16, "*bf16"), ("dequantize", 256, "*fp16"), ("tiles", 16, "*fp32"), ("gemv", 2, "*fp16")):
        check(code(name, shape, count, dtype))


@pytest.mark.real_full
@pytest.mark.parametrize("name", CLASSES)
def test_every_kind_serves_experts_and_dequantizes(name: str) -> None:
    for shape, count in (("experts", 16), ("dequantize", 256)):
        check(code(name, shape, count))
