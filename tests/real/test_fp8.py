"""FP8 checkpoints of SmolLM2 that we write: plain transformers loads them on a CPU with our values; GGUF and other FP8 kinds keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workshop
from reference import raw_tensors

from qformats import registry
from qformats.checkpoint import Checkpoint, open_checkpoint
from qformats.tensor import QuantizedTensor

pytestmark = pytest.mark.real
SLICE = "smollm2-slice4"
PLAIN = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # whose rows GGUF leaves in order


def tensors_of(checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
    found = {name: checkpoint.read(name) for name in checkpoint.modules if checkpoint.is_quantized(name)}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, QuantizedTensor)}


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every coded weight in float32."""
    with open_checkpoint(folder) as checkpoint:
        return {name: tensor.dequantize() for name, tensor in tensors_of(checkpoint).items()}


@pytest.mark.parametrize("target", ["fp8:fp8,block=64x64", "fp8:fp8,block=tensor", "fp8:fp8,block=64x64,scale=ue8m0", "fp8:mxfp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_it(target: str, dtype: torch.dtype, workshop: Workshop, lab_model: Any, figure: Any) -> None:
    """It dequantizes when there is no GPU: its weights are ours, bit for bit, and the other weights those of the source."""
    from transformers import AutoModelForCausalLM

    folder, report = workshop.convert(lab_model(SLICE), target, allow_requantize=True)
    assert report.kinds["requantized"] == 28
    theirs = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).named_parameters())
    with open_checkpoint(folder) as checkpoint:
        mine = tensors_of(checkpoint)
        assert len(mine) == 28
        for name, tensor in mine.items():
            assert torch.equal(theirs[f"{name}.weight"], tensor.dequantize(dtype, like="transformers")), name
    floats = raw_tensors(lab_model(SLICE))
    shift = np.uint32(16)
    worst = 0.0
    for name, tensor in mine.items():
        source = torch.from_numpy((floats[f"{name}.weight"][1].view(np.uint16).astype(np.uint32) << shift).view(np.float32))
        worst = max(worst, float((tensor.dequantize() - source).norm() / source.norm()))
    assert worst < 0.04
    figure(f"{target}: relative error at most {worst:.4f}")


def test_blocks_that_the_edges_cut(workshop: Workshop, lab_model: Any) -> None:
    """576 rows in blocks of 128: transformers refuses such a grid; ours against blocks spread by numpy."""
    from safetensors import safe_open

    folder, _ = workshop.convert(lab_model(SLICE), "fp8", allow_requantize=True)
    mine = values_of(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name, values in mine.items():
            codes, scale = file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.weight_scale_inv")
            n, k = codes.shape
            assert tuple(scale.shape) == (-(-n // 128), -(-k // 128))
            spread = np.repeat(np.repeat(scale.numpy(), 128, 0)[:n], 128, 1)[:, :k]
            assert np.array_equal(codes.float().numpy() * spread, values.numpy()), name


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_into_gguf(kind: str, workshop: Workshop, lab_model: Any) -> None:
    """F32 holds every value, BF16 rounds it once, Q8_0 is near."""
    folder, _ = workshop.convert(lab_model(SLICE), "fp8", allow_requantize=True)
    file, _ = workshop.convert(folder, f"gguf:{kind}", allow_requantize=True)
    mine, names = (
        values_of(folder),
        {"v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"},
    )
    with open_checkpoint(file) as gguf:
        for name, values in mine.items():
            layer, leaf = name.split(".")[2], name.rpartition(".")[2]
            if leaf not in PLAIN:
                continue
            found = gguf.read(f"blk.{layer}.{names[leaf]}")
            if isinstance(found, QuantizedTensor):
                other = found.dequantize()
                assert float((other - values).norm() / values.norm()) < 0.01
            else:
                assert torch.equal(found, values.to(found.dtype)), name


OTHERS = [("fp8", "modelopt:fp8,scale=block"), ("fp8:fp8,block=tensor", "modelopt:fp8,scale=tensor"), ("fp8:mxfp8", "modelopt:mxfp8"),
          ("fbgemm_fp8", "modelopt:fp8"), ("modelopt:nvfp4", "gguf:nvfp4"), ("fp8:fp4", "gguf:mxfp4"),
          ("fp8", "compressed-tensors"), ("fbgemm_fp8", "compressed-tensors"), ("modelopt:nvfp4", "compressed-tensors")]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), OTHERS, ids=[f"{a} {b}" for a, b in OTHERS])
def test_other_kinds_hold_the_same_codes(first: str, second: str, workshop: Workshop, lab_model: Any) -> None:
    """There and back: every weight exact both ways."""
    if second.partition(":")[0] not in registry.names():
        pytest.skip(f"{second} is not known yet")
    if "nvfp4" in first and "compressed" in second:
        pytest.skip("the divisor of compressed-tensors is a rounded reciprocal")
    folder, _ = workshop.convert(lab_model(SLICE), first, allow_requantize=True)
    other, report = workshop.convert(folder, second)
    assert set(report.kinds) <= {"copied", "exact"}, report.kinds
    back, again = workshop.convert(other, first)
    assert set(again.kinds) <= {"copied", "exact"}, again.kinds
    mine, theirs = values_of(folder), values_of(back)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
