"""Models that round their activations compute what their owners compute, layer by layer and as a whole, where these run on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from owners import owners_model

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "convert"))

from checkpoints import ready

from qformats.runtime.loader import load_model
from qformats.runtime.packed import Packed

pytestmark = pytest.mark.real
FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# what a layer's results may be apart, of the largest: the owner's rounding of what it multiplies and gives
CASES = {
    "compressed-tensors/w8a8": ("compressed-tensors", FULL, 1e-5),
    "compressed-tensors/fp8-channel": ("compressed-tensors", FULL, 1e-5),
    "bitsandbytes/int8": ("bitsandbytes", HALF, 1e-3),
    "torchao/int8-dynamic": ("torchao", FULL, 1e-5),
    "bitnet/bitlinear": ("bitnet", FULL, 1e-5),
    "quanto/mixed-bf16": ("quanto", BRAIN, 0.02),
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def result(module: Any, *args: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = module(*args, **options)
    made: torch.Tensor = getattr(found, "logits", found)
    return (made.dequantize() if type(made) is not torch.Tensor else made).float()


def owner(source: Path, case: str) -> Any:
    name, dtype, _ = CASES[case]
    if name != "quanto":
        return owners_model(source, name, dtype)
    quanto = pytest.importorskip("optimum.quanto")
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
    quanto.requantize(model, load_file(source / "model.safetensors"), json.loads((source / "quanto_qmap.json").read_text()))
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_every_layer_rounds_as_its_owner(case: str, tmp_path: Path) -> None:
    source = ready(case, tmp_path)
    _, dtype, near = CASES[case]
    theirs, mine = owner(source, case), load_model(source, dtype=dtype)
    result(theirs, input_ids=IDS)  # compressed-tensors' layers unpack themselves in the first pass
    torch.manual_seed(0)
    checked = 0
    for name, layer in mine.named_modules():
        if isinstance(layer, Packed) and layer.input_rules:
            x = torch.randn(2, 8, layer.in_features).to(dtype)
            x[0, 0, 3] = 9  # an outlier of LLM.int8()
            found, wanted = result(layer, x), result(theirs.get_submodule(name), x.clone())
            assert float((found - wanted).abs().max()) <= near * float(wanted.abs().max()), name
            checked += 1
    assert checked >= 7


@pytest.mark.parametrize("case", ["compressed-tensors/w8a8", "compressed-tensors/fp8-channel", "torchao/int8-dynamic", "bitnet/bitlinear"])
def test_the_model_computes_what_its_owners_does(case: str, tmp_path: Path) -> None:
    source = ready(case, tmp_path)
    wanted = result(owner(source, case), input_ids=IDS)
    found = result(load_model(source, dtype=FULL), input_ids=IDS)
    floats = result(load_model(source, dtype=FULL, activations="float"), input_ids=IDS)
    apart = float((found - wanted).abs().max())
    assert apart <= 2e-3 * float(wanted.abs().max()) and apart < 0.2 * float((floats - wanted).abs().max())


RULES: dict[str, dict[str, Any]] = {
    "int8-asymmetric": {"num_bits": 8, "symmetric": False, "strategy": "token"},
    "int8-tensor": {"num_bits": 8, "strategy": "tensor"},
    "int4-group": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "fp8-tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "mxfp8": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
              "scale_dtype": "torch.float8_e4m3fn"},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [FULL, BRAIN])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_of_compressed_tensors_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    import numpy as np
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    from qformats.containers.raw import RawTensor
    from qformats.containers.source import MemorySource
    from qformats.formats.compressed_tensors import inputs
    from qformats.formats.protocol import Match, Module
    from qformats.runtime.inputs import rounded

    said = {"dynamic": True, **RULES[name]}
    torch.manual_seed(0)
    x = (torch.randn(2, 7, 64) * torch.logspace(-3, 2, 7).view(1, 7, 1)).to(dtype)
    x[0, 0] = 0
    factor = torch.tensor([20.0]).to(dtype) if name == "nvfp4" else None
    args = QuantizationArgs(**said)
    wanted = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, None, factor), args, factor)
    data = np.float32([20.0]).tobytes()
    parts = {"input_global_scale": RawTensor("m.input_global_scale", "F32", (1,), MemorySource(data, "m"), 0, 4)}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": said}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    rule = inputs(Module("m", parts if factor is not None else {}, Match("compressed-tensors", config)))
    assert rule is not None
    assert torch.equal(rounded(x, rule), wanted.float())


@pytest.mark.parametrize("row", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_torchaos_float8_bit_for_bit(dtype: torch.dtype, row: bool) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.quant_primitives import _choose_scale_float8, _quantize_affine_float8

    from qformats.formats.protocol import Inputs
    from qformats.runtime.inputs import rounded

    torch.manual_seed(0)
    x = torch.randn(9, 64) * torch.logspace(-3, 2, 9).view(9, 1)
    scale = _choose_scale_float8(x, [1, 64] if row else [9, 64], dtype)
    wanted = _quantize_affine_float8(x, scale, dtype).float() * scale
    span, grid = torch.finfo(dtype).max, str(dtype).removeprefix("torch.float8_")
    assert torch.equal(rounded(x, Inputs(grid, "token" if row else "tensor", span=span)), wanted)


@pytest.mark.parametrize("mode", ["FLOOR", "RCEIL"])
def test_torchaos_mx_and_nvfp4_bit_for_bit(mode: str) -> None:
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    from qformats.formats.protocol import Inputs
    from qformats.runtime.inputs import rounded

    torch.manual_seed(0)
    x = torch.randn(9, 64) * torch.logspace(-3, 2, 9).view(9, 1)
    wanted = MXTensor.to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode[mode]).dequantize(FULL)
    assert torch.equal(rounded(x, Inputs("e4m3fn", "group", 32, scale_grid={"FLOOR": "floor", "RCEIL": "ceil"}[mode])), wanted)
    wanted = NVFP4Tensor.to_nvfp4(x).dequantize(FULL)
    found = rounded(x, Inputs("e2m1", "group", 16, span=6.0, scale_grid="e4m3fn", least=2.0**-6))
    assert (found == wanted).float().mean() > 0.99
