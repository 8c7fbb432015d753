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

COLUMNS = 16384  # more than one step
SOME = ("int4 g128", "q4_k", "nf4", "mxfp4", "iq2_xxs")
REGISTERS = 168  # three blocks of 128 threads on a processor; 255 for the tiles of a block of 256
LANES, BANDWIDTH = 30e12, 3.0e12
"""Of an H100: operations of single lanes and bytes a second. A weight of b bits may take LANES / (BANDWIDTH * 8 / b) instructions."""

# Instructions of a step for each weight where they are above that, and a twentieth. One row of x: a weight takes 3 in any case (to a float,
# less its zero point, times x), more than 2 or 3 bits may take; those of grids and books of several columns take 2 more for signs and are
# read by other threads than their codes. 16 rows may take 1.15 of the time of one: a weight is rounded once to x's dtype there, which costs
# a product, and 3 more where float32 does not hold the exact value (K-quants with offsets, float32 scales).
VECTOR_ABOVE = {
    "int2 g64": 4.0, "int3 g64": 5.1, "q2_k": 5.5, "q3_k": 6.1, "iq2_xxs": 11.5, "iq2_s": 16.5, "iq3_s": 13.7, "iq1_s": 16.6,
    "aqlm 1x16": 5.9, "aqlm 2x8": 8.7,
}  # fmt: skip
TILES_ABOVE = {
    "int2 g64": 5.5, "int3 g64": 6.6, "int5 g32": 9.9, "hqq4 g64": 9.0, "q2_k": 10.7, "q3_k": 10.3, "q4_k": 10.5, "q5_k": 12.1,
    "nf4": 8.1, "fp4": 8.1, "nf4 nested": 8.5, "mxfp4": 7.6, "nvfp4": 10.7, "fp8 blocks": 14.5, "iq2_xxs": 13.0, "iq2_s": 13.8,
    "iq3_s": 13.8, "iq1_s": 12.3, "aqlm 1x16": 7.3, "aqlm 2x8": 19.2,
}  # fmt: skip


@functools.cache
def code(name: str, shape: str, count: int, dtype: str = "*bf16") -> Code:
    lowered = lower(CLASSES[name](128, COLUMNS, "cpu"))
    spec = spec_of(lowered.layout)
    assert spec is not None
    block = tuning.block("tiles" if shape == "experts" else shape, spec, torch.device("cpu"), count, 14336, single=dtype == "*fp32")
    return compiled(shape, lowered, spec, block, max(1, spec.units // block.units), count, dtype)


SPILLED = {("aqlm 2x8", "tiles", 64): 24, ("aqlm 2x8", "tiles", 256): 304}
"""Bytes of a thread: two books are summed in float64 beside the sums of 64 or 128 rows; fewer at a time would decode them more often."""


def check(found: Code, registers: int = 255, spilled: int = 0) -> None:
    """No spilled registers nor local memory, no more registers and shared memory than there are; in the loop neither integers made floats
    nor integer divisions (which take MUFU.RCP)."""
    assert found.stack <= spilled and (spilled or not found.count("LDL") + found.count("STL")), "registers are spilled"
    assert found.registers <= registers
    assert found.shared <= 227 << 10
    assert not found.count("I2F", loop=True) + found.count("MUFU", loop=True) + found.count("F2I", loop=True)


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


def budget(name: str, shape: str) -> float:
    """Instructions for each weight."""
    lowered = lower(CLASSES[name](256, 4096, "cpu"))
    nbytes = sum(plane.nbytes for part, plane in lowered.planes.items() if part != "codebook")
    allowed = LANES / (BANDWIDTH / (nbytes / (256 * 4096)))
    return VECTOR_ABOVE.get(name, allowed) if shape == "gemv" else TILES_ABOVE.get(name, 1.15 * allowed)


def judge(name: str, shape: str, count: int) -> None:
    found = code(name, shape, count)
    few = (shape, count) in (("gemv", 1), ("tiles", 16)) and not name.startswith(("iq", "aqlm"))
    check(found, REGISTERS if few else 255, SPILLED.get((name, shape, count), 0))
    assert wide_loads(found) > 0
    if shape == "tiles":
        assert found.count("HGMMA") > 0
    if count in (1, 16):
        assert found.per_weight <= budget(name, shape), found.names().most_common(12)


@pytest.mark.real
def test_codes_come_as_vectors_and_scales_once_a_group() -> None:
    """A thread has 8 rows of a unit of 32 columns: 8 vectors of codes, 8 scales, 8 zero points, nothing through shared memory."""
    found = code("int4 g128", "gemv", 1)
    assert found.count("LDG.E.EF.128", loop=True) == 8
    assert found.count("LDG.E.U16", loop=True) == found.count("LDG.E.U8", loop=True) == 8
    assert not found.count("LDS", loop=True) + found.count("STS", loop=True) + found.count("BAR", loop=True)
    assert found.count("PRMT", loop=True) <= found.step_weights + 8


@pytest.mark.real
def test_rows_of_x_are_fetched_ahead() -> None:
    """Copies to shared memory that nothing waits for at once."""
    found = code("int4 g128", "tiles", 16)
    assert found.count("LDGSTS", loop=True) > 0 and found.count("LDGDEPBAR", loop=True) > 0
    assert found.count("WARPGROUP", loop=True) > 0


@pytest.mark.real
def test_rows_that_do_not_fill_a_block_compile() -> None:
    lowered = lower(CLASSES["int4 g128"](128, COLUMNS, "cpu"))
    spec = spec_of(lowered.layout)
    assert spec is not None
    block = tuning.block("gemv", spec, torch.device("cpu"), 1, 14336)
    check(compiled("gemv", lowered, spec, block, 2, 1, full=False), REGISTERS)


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
