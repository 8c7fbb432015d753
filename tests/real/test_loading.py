"""What we write of SmolLM2's floats, in the loaders of the formats' owners on a CPU: every weight is ours, and a pass gives numbers.

Plain transformers for all but HQQ and Quanto, whose own loaders are taken (``owners.py``). EETQ, FBGEMM FP8 and ModelOpt have no loader
for a CPU, MLX none in torch; transformers dequantizes ``metal``, FP8 and MXFP4 there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workshop
from mxfp4_model import dequantized, pack_experts
from owners import forward, owners_model, owners_weight
from test_dense import tiny_model

from qformats.checkpoint import open_checkpoint

SOON = ("hqq:int4", "quanto:qint4", "bitnet:ternary", "mlx:int8,metal,dtype=bf16", "torchao:int4")
TARGETS = (
    *SOON, "hqq:int4,axis=0", "hqq:int8", "hqq:int3", "hqq:int2", "quanto:qint2", "quanto:qint8", "quanto:qfloat8_e4m3fn",
    "bitnet:ternary,class=autobitlinear", "mlx:int4,metal,dtype=bf16", "torchao:int8", "torchao:fp8", "torchao:nvfp4", "torchao:mxfp4",
    "torchao:mxfp8", "compressed-tensors:int4", "compressed-tensors:int4,asym,format=int", "compressed-tensors:int8",
    "compressed-tensors:fp8", "compressed-tensors:nvfp4", "compressed-tensors:mxfp4", "compressed-tensors:mxfp8",
    "bitsandbytes:nf4", "bitsandbytes:nf4,double", "bitsandbytes:fp4", "bitsandbytes:int8", "fp8:fp8,block=64x64", "fp8:mxfp8",
)  # fmt: skip
LIKE = {"fp8": "transformers", "bitnet": None, "mlx": None}  # else the format's name; None: float32, then its dtype


@pytest.mark.parametrize("to", [pytest.param(to, marks=pytest.mark.real if to in SOON else pytest.mark.real_full) for to in TARGETS])
def test_its_owner_loads_it(to: str, workshop: Workshop, lab_model: Any, figure: Any) -> None:
    folder, report = workshop.convert(lab_model("smollm2-slice4"), to, allow_requantize=True)
    assert report.kinds["requantized"] == 28
    owner = to.partition(":")[0]
    model = owners_model(folder, owner, torch.bfloat16)  # metal is dequantized to the dtype of its scales: theirs must be the model's
    if owner == "compressed-tensors":
        forward(model)  # it unpacks in the first pass
    with open_checkpoint(folder) as made:
        modules = [name for name in made.modules if made.is_quantized(name)]
        for name in modules:
            theirs, like = owners_weight(model, name), LIKE.get(owner, owner)
            tensor: Any = made.read(name)
            mine = tensor.dequantize(theirs.dtype, like=like) if like else tensor.dequantize().to(theirs.dtype)
            if to == "quanto:qint4":  # its bfloat16 kernel keeps shifts in a form of its own, which rounds a few
                assert float((theirs != mine).float().mean()) < 1e-3 and torch.allclose(theirs, mine, rtol=2**-6, atol=2**-8), name
            else:
                assert torch.equal(theirs, mine), name
    assert len(modules) == 28
    if to == "quanto:qint8":
        pytest.xfail("every weight is equal, but torch 2.13's int8 product on a CPU crashes on weights mapped at an odd address")
    logits = forward(model)
    plain = forward(owners_model(lab_model("smollm2-slice4"), "hf", torch.float32))
    figure(f"28 weights equal; logits {float((logits - plain).norm() / plain.norm()):.3f} from the floats'")


@pytest.mark.real
def test_plain_transformers_loads_packed_experts(tmp_path: Path, workshop: Workshop, figure: Any) -> None:
    """gpt-oss's MXFP4 out of a GGUF: transformers dequantizes it to bfloat16, as it does its own."""
    floats = tiny_model("gpt_oss-packed", tmp_path / "floats")
    packed = pack_experts(floats, tmp_path / "packed")
    back, _ = workshop.convert(workshop.convert(packed, "gguf")[0], "mxfp4")
    mine = owners_model(back, "hf", torch.float32)
    theirs = owners_model(dequantized(packed, tmp_path / "dequantized"), "hf", torch.float32)
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        a, b = (model(ids).logits[0].float() for model in (mine, theirs))
    apart = float((a - b).abs().max() / (b.max() - b.min()))
    figure(f"logits {apart:.1e} of their range apart")
    assert apart < 1e-2
