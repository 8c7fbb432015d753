"""bitsandbytes checkpoints converted: what keeps its values exactly, what asks, and what comes out of floats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import converted, ready

from qformats.checkpoint import open_checkpoint
from qformats.errors import WouldLose
from qformats.formats import bitsandbytes as bnb

DOWN = "model.layers.0.mlp.down_proj"


def values(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        coded = [name for name in checkpoint.modules if checkpoint.is_quantized(name)]
        return {name: bnb.dequantize(checkpoint.modules[name], dtype=dtype) for name in coded}


@pytest.mark.parametrize(
    ("case", "to"),
    [("fp4-double", "bnb:fp4,double=false"), ("nf4", "bnb:nf4,storage=float32"), ("nf4", "bnb:nf4,blocksize=32"),
     ("nf4-128-double-bf16", "bnb:nf4,double=false,storage=uint8"), ("int8", "bnb"), ("nf4-skip-bias", "bnb")],
)  # fmt: skip
def test_exact_within_the_format(case: str, to: str, tmp_path: Path) -> None:
    source, out = ready(f"bitsandbytes/{case}", tmp_path), tmp_path / "out"
    plan = converted(source, out, to, exact=True)
    assert set(plan.kinds) <= {"copied", "exact"}
    before, after = values(source), values(out)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] == ("double" in case and "double=false" not in to)


def test_plain_scales_are_not_doubled_silently(tmp_path: Path) -> None:
    with pytest.raises(WouldLose):
        converted(ready("bitsandbytes/nf4", tmp_path), tmp_path / "out", "bnb:nf4,double", exact=True)


@pytest.mark.parametrize("to", ["bnb", "bnb:nf4,double", "bnb:fp4,storage=bfloat16", "bnb:int8"])
def test_out_of_floats_and_read_again(to: str, tmp_path: Path) -> None:
    source, out = ready("dense/llama-tied", tmp_path), tmp_path / "out"
    plan = converted(source, out, to, allow_requantize=True)
    coded = values(out)
    assert DOWN in coded and set(coded) == {job.map.target for job in plan.jobs if job.kind == "requantized"}
    with open_checkpoint(source) as checkpoint:
        weight = checkpoint.read(DOWN)
        assert isinstance(weight, torch.Tensor)
        error = float((coded[DOWN] - weight.float()).norm() / weight.float().norm())
    assert error < (0.01 if "int8" in to else 0.15)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"] is None


def test_codes_of_eight_bits_stay_in_a_gguf(tmp_path: Path) -> None:
    plan = converted(ready("bitsandbytes/int8", tmp_path), tmp_path / "out.gguf", "gguf:q8_0")
    assert plan.kinds["codes-exact"] == 7
