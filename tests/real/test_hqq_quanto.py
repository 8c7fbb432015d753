"""What we write as HQQ and Quanto, loaded by hqq and optimum-quanto themselves on a CPU: the same values bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.execute import execute
from converters.options import PlanOptions
from converters.plan import make_plan
from qformats import registry
from qformats.checkpoint import open_checkpoint

pytestmark = pytest.mark.real
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def converted(source: str, to: str, work: Path) -> Path:
    """A fixture without its oracle, converted."""
    copy = work / "source"
    shutil.copytree(FIXTURES / source, copy, ignore=shutil.ignore_patterns("oracle.safetensors"))
    plan = make_plan(copy, PlanOptions(registry.parse_target(to)))
    with plan.checkpoint:
        execute(plan, work / "out", workers=1)
    return work / "out"


@pytest.mark.parametrize(
    ("source", "to"),
    [("gptq/4b-g32-sym", "hqq:int4"), ("hqq/4b-g32-ax1-f16", "hqq:int4,axis=0"), ("quanto/qint4-f16", "hqq:int4"),
     ("hqq/4b-g32-ax1-f16", "hqq:int3,group=64")],
)  # fmt: skip
def test_hqq_loads_what_we_write(source: str, to: str, tmp_path: Path) -> None:
    owner = pytest.importorskip("hqq.core.quantize")
    load_file = pytest.importorskip("safetensors.torch").load_file
    out = converted(source, to, tmp_path)
    stored, compared = load_file(out / "model.safetensors"), 0
    with open_checkpoint(out) as checkpoint:
        for name in filter(checkpoint.is_quantized, checkpoint.modules):
            layer = owner.HQQLinear(None, None, compute_dtype=torch.float16, device="cpu")
            layer.load_state_dict({key.removeprefix(f"{name}."): v for key, v in stored.items() if key.startswith(f"{name}.")})
            weight: Any = checkpoint.tensors[f"{name}.weight"]
            ours = weight.dequantize(torch.float16, like="hqq")
            assert torch.equal(layer.dequantize(), ours), name
            compared += 1
    assert compared == 7


@pytest.mark.parametrize(
    ("source", "to"),
    [("gptq/4b-g32-sym", "quanto:qint4"), ("gptq/4b-g32-sym", "quanto:qint8"), ("quanto/qint4-f16", "quanto:qint2"),
     ("hqq/4b-g32-ax1-f16", "quanto:qfloat8_e4m3fn"), ("compressed-tensors/fp8-channel", "quanto:qfloat8_e4m3fnuz,dtype=bf16")],
)  # fmt: skip
def test_quanto_loads_what_we_write(source: str, to: str, tmp_path: Path) -> None:
    owner = pytest.importorskip("optimum.quanto")
    out = converted(source, to, tmp_path)
    model, compared = owner.QuantizedModelForCausalLM.from_pretrained(str(out)), 0
    with open_checkpoint(out) as checkpoint:
        for name in filter(checkpoint.is_quantized, checkpoint.modules):
            theirs = model._wrapped.get_submodule(name).weight.dequantize()
            weight: Any = checkpoint.tensors[f"{name}.weight"]
            ours = weight.dequantize(theirs.dtype, like="quanto")
            assert torch.equal(theirs, ours), name
            compared += 1
    assert compared == 7
