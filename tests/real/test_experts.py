"""Experts and transposed layers as their owners store them: transformers' own values and llama.cpp's logits on what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Workshop
from running import assert_same_logits, ids_of, transformers_logits
from test_dense import tiny_model
from text import evaluation_text

pytestmark = pytest.mark.real


def logits_of(llama: Any, file: Path, ids: list[int]) -> Any:
    with llama.Llama(file) as model:
        return model.logits(ids)


@pytest.mark.parametrize("bits", [4, 8])
def test_gpt2_by_bitsandbytes_itself(bits: int, tmp_path: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    """transformers transposes GPT-2's layers before it quantizes them: its checkpoint as floats in llama.cpp; ours loads there."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    folder, owner = tiny_model("gpt2", tmp_path / "gpt2"), tmp_path / "owner"
    asked = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**asked), dtype=torch.float32)
    model.save_pretrained(owner)
    for side in ("tokenizer.json", "tokenizer_config.json"):
        (owner / side).write_bytes((folder / side).read_bytes())
    file, _ = workshop.convert(owner, "gguf:f32")
    floats, _ = workshop.convert(owner, "hf:f32")
    ids = ids_of(file, evaluation_text(), 128)
    ours, theirs = transformers_logits(floats, ids), transformers_logits(owner, ids)
    assert_same_logits(logits_of(llama, file, ids), ours)
    if bits == 4:
        assert_same_matrices(model, floats)
    apart = np.abs(ours - theirs).max() / (theirs.max() - theirs.min())
    figure(f"GPT-2 in {bits} bits by bitsandbytes: logits {apart:.1e} of their range from those of its floats")
    assert apart < (0.01 if bits == 4 else 0.05)  # it computes with 16 bits; with 8, activations are rounded too
    made, _ = workshop.convert(folder, "bitsandbytes:nf4" if bits == 4 else "bitsandbytes:int8", allow_requantize=True)
    again = transformers_logits(made, ids)
    assert np.abs(again - theirs).max() < (0.01 if bits == 4 else 0.05) * (theirs.max() - theirs.min())


def assert_same_matrices(model: Any, floats: Path) -> None:
    """Every matrix as bitsandbytes dequantizes it is the transpose of ours, bit for bit."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from safetensors.torch import load_file

    found = load_file(floats / "model.safetensors")
    modules = {name: m for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(modules) >= 8
    for name, module in modules.items():
        wanted = dequantize_4bit(module.weight.data, module.weight.quant_state).to(torch.float32)
        assert torch.equal(found[f"{name}.weight"].T, wanted), name


def test_llama4_by_fbgemm(tmp_path: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    """e4m3fn experts with inputs as rows under a scale for each output, as ``FbgemmFp8Llama4TextExperts`` computes with them."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tiny_model("llama4-interleaved", tmp_path / "llama4")
    weights = load_file(folder / "model.safetensors")
    floats = dict(weights)
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        values = weights[name]
        scale = values.abs().amax(1, keepdim=True) / 448
        codes = (values / scale).to(torch.float8_e4m3fn)
        weights[name] = codes
        weights[f"{name}_scale"] = scale if name.endswith("gate_up_proj") else scale.transpose(1, 2).contiguous()
        floats[name] = codes.to(torch.float32) * scale
    save_file(floats, folder / "model.safetensors", metadata={"format": "pt"})
    packed = tmp_path / "packed"
    packed.mkdir()
    for side in folder.iterdir():
        (packed / side.name).write_bytes(side.read_bytes())
    save_file(weights, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    (packed / "config.json").write_text(json.dumps(config))
    made, _ = workshop.convert(packed, "hf:f32")
    found = load_file(made / "model.safetensors")
    assert found.keys() == floats.keys() and all(torch.equal(found[name], floats[name]) for name in floats)
    file, _ = workshop.convert(packed, "gguf:f32")
    ids = ids_of(file, evaluation_text(), 128)
    figure(assert_same_logits(logits_of(llama, file, ids), transformers_logits(folder, ids, attn_implementation="eager")))


@pytest.mark.parametrize("target", ["compressed-tensors:int8,group=32", "compressed-tensors:mxfp4"])
def test_experts_by_compressed_tensors(target: str, tmp_path: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    """Codes of single experts, stacked for llama.cpp as they are, and loaded by plain transformers: the same model."""
    pytest.importorskip("compressed_tensors")
    folder = tiny_model("qwen3_moe", tmp_path / "model")
    codes, _ = workshop.convert(folder, target, allow_requantize=True)
    file, report = workshop.convert(codes, "gguf")
    assert {line.kind for line in report.tensors if "exps" in line.name} == {"exact"}
    wide, _ = workshop.convert(codes, "gguf:f32")
    floats, _ = workshop.convert(codes, "hf:f32")
    ids = ids_of(file, evaluation_text(), 128)
    theirs = transformers_logits(floats, ids)
    assert_same_logits(logits_of(llama, wide, ids), theirs)
    by_position = np.abs(logits_of(llama, file, ids) - theirs).max(1) / (theirs.max() - theirs.min())
    apart = float(np.median(by_position))  # it rounds what meets such weights to 8 bits, and here and there another expert is chosen
    figure(f"{target} experts in llama.cpp: logits {apart:.1e} of their range apart at half of the positions")
    assert apart < 0.03
    if target.endswith("int8,group=32"):  # the library leaves layers of MXFP4 in bfloat16, which transformers does not run in float32
        assert np.abs(transformers_logits(codes, ids) - theirs).max() < 0.01 * (theirs.max() - theirs.min())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_itself_leaves_stacks_in_floats(kind: str, tmp_path: Path) -> None:
    """Fused experts stay a plain parameter under its own quantizer: what the plan's warning says."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    floats = tiny_model("granitemoe", tmp_path / "floats")
    config = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.bfloat16, quantization_config=config)
    stacks = [weight for weight in model.parameters() if weight.dim() == 3]
    assert stacks and all(type(weight) is torch.nn.Parameter and weight.dtype == torch.bfloat16 for weight in stacks)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ in ("Linear4bit", "Linear8bitLt")


@pytest.mark.parametrize(("name", "runs"), [("llama4", False), ("gpt_oss", False), ("granitemoe", True)])
def test_torchao_itself_multiplies_float8_stacks_with_outputs_as_rows_alone(name: str, runs: bool, tmp_path: Path) -> None:
    """Its int8 fails in every default pass; float8 stacks with inputs as rows too: what the plan's warning says."""
    import torch
    from transformers import AutoModelForCausalLM, TorchAoConfig

    quantization = pytest.importorskip("torchao.quantization")
    floats = tiny_model(name, tmp_path / "floats")
    plain = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.bfloat16)
    names = [key for key, weight in plain.named_parameters() if weight.dim() == 3 and not key.endswith("_bias")]
    assert names
    for config, fine in ((quantization.Float8WeightOnlyConfig(), runs), (quantization.Int8WeightOnlyConfig(), False)):
        config = TorchAoConfig(quantization.FqnToConfig(dict.fromkeys(names, config)))
        model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.bfloat16, quantization_config=config)
        assert all(type(model.get_parameter(key)) is not torch.nn.Parameter for key in names)
        if fine:
            assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
        else:
            with pytest.raises((NotImplementedError, AssertionError, RuntimeError)):
                model(torch.arange(8)[None])


@pytest.mark.parametrize("options", ["", ",tensor"])
@pytest.mark.parametrize("name", ["granitemoe", "mixtral", "qwen3_moe"])
def test_float8_stacks_load_in_torchao(name: str, options: str, tmp_path: Path, workshop: Workshop, figure: Any) -> None:
    """What we write of floats, plain transformers loads as ``Float8Tensor`` with our values, and its default pass multiplies it."""
    import torch
    from transformers import AutoModelForCausalLM

    from qformats.checkpoint import open_checkpoint
    from qformats.tensor import QuantizedTensor

    pytest.importorskip("torchao")
    floats = tiny_model(name, tmp_path / "floats")
    made, _ = workshop.convert(floats, f"torchao:fp8{options}")
    model, told = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    stacks = 0
    with open_checkpoint(made) as checkpoint:
        for module in filter(checkpoint.is_quantized, checkpoint.modules):
            bare = checkpoint.is_bare(module)
            owned, ours = model.get_parameter(module if bare else f"{module}.weight"), checkpoint.read(module)
            assert type(owned).__name__ == "Float8Tensor" and isinstance(ours, QuantizedTensor)
            assert torch.equal(ours.dequantize(owned.dtype, like="torchao").reshape(owned.shape), owned.dequantize()), module
            stacks += bare
    assert stacks == 2 * model.config.num_hidden_layers
    ids = torch.arange(16)[None]
    wanted = AutoModelForCausalLM.from_pretrained(floats)(ids).logits.detach()
    apart = float((model(ids).logits.detach() - wanted).abs().max() / (wanted.max() - wanted.min()))
    figure(f"{stacks} float8 stacks of {name} in torchao: logits {apart:.1e} of their range from those of the floats")
    assert apart < 0.5  # another expert may be chosen
