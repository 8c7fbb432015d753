"""bitsandbytes for real: what we write loads in plain transformers with bitsandbytes on the CPU and gives the values of our codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Workshop

from qformats.checkpoint import open_checkpoint
from qformats.formats import bitsandbytes as form

pytestmark = pytest.mark.real


@pytest.mark.parametrize("to", ["bitsandbytes:nf4", "bitsandbytes:nf4,double", "bitsandbytes:fp4,storage=bfloat16", "bitsandbytes:int8"])
def test_transformers_loads_what_we_write(to: str, workshop: Workshop, lab_model: Any, figure: Any) -> None:
    peer = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    folder, _ = workshop.convert(lab_model("smollm2-slice4"), to, allow_requantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16)
    with open_checkpoint(folder) as checkpoint:
        coded = {name for name in checkpoint.modules if checkpoint.is_quantized(name)}
        for name in coded:
            layer = model.get_submodule(name)
            if isinstance(layer, peer.nn.Linear8bitLt):
                theirs = peer.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
            else:
                theirs = peer.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(form.dequantize(checkpoint.modules[name]), theirs), name
    assert coded
    figure(f"{to}: {len(coded)} layers, every weight equal")
