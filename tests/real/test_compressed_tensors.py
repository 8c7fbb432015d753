"""Checkpoints that compressed-tensors itself makes of a SmolLM2 slice become GGUF; ours load in plain transformers.

The float32 side is the library's own ``decompress`` of every weight, written as a plain checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workshop
from running import ids_of
from safetensors.torch import load_file, save_file
from text import evaluation_text

pytestmark = pytest.mark.real
GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
CHANNEL = {"num_bits": 8, "strategy": "channel"}
# name: weights' arguments, format, target, worst kind, and how far the mean NLL may lie from float32's (relative where requantized)
CASES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "w4a16": (GROUP, "pack-quantized", "gguf", "exact"),
    "w4a16-asym": (GROUP | {"symmetric": False}, "pack-quantized", "gguf", "exact"),
    "w8a8": (CHANNEL | {"type": "int"}, "int-quantized", "gguf", "exact"),
    "fp8": (CHANNEL | {"type": "float"}, "float-quantized", "gguf:q8_0", "requantized"),
}


def read(checkpoint: Any, module: str) -> Any:
    """The module's canonical tensor."""
    return checkpoint.read(module)


def compressed(base: Path, out: Path, dense: Path, arguments: dict[str, Any], form: str) -> None:
    """``base`` by the library's compressor, and its own floats of that as a plain float32 checkpoint."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    calculate_qparams = pytest.importorskip("compressed_tensors.quantization.utils").calculate_qparams
    BaseCompressor = pytest.importorskip("compressed_tensors.compressors.base").BaseCompressor

    args = quantization.QuantizationArgs(**arguments)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor, parts, floats = BaseCompressor.get_value_from_registry(form), {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            parts[name], floats[name] = weight, weight.float()
            continue
        weight = weight.to(torch.bfloat16)
        runs = weight.reshape(weight.shape[0], -1, args.group_size or weight.shape[1])
        scale, zero = calculate_qparams(runs.amin(-1), runs.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zero.to(torch.int8)}
        if args.type == "float":
            state["weight_zero_point"] = zero
        made = compressor.compress(state, scheme)
        floats[name] = compressor.decompress(dict(made), scheme)["weight"].float()
        parts |= {f"{name.removesuffix('weight')}{leaf}": part.contiguous() for leaf, part in made.items()}
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=["lm_head"]
    )
    for folder, tensors in ((out, parts), (dense, floats)):
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    held = json.loads((out / "config.json").read_text())
    held["quantization_config"] = json.loads(config.model_dump_json())
    (out / "config.json").write_text(json.dumps(held))


def oracle_exact(source: Path, name: str) -> torch.Tensor:
    """The exact product of scale and code, which the library rounds to bfloat16."""
    from qformats.checkpoint import open_checkpoint

    with open_checkpoint(source) as checkpoint:
        values: torch.Tensor = read(checkpoint, name.removesuffix(".weight")).dequantize(torch.float32)
        return values


@pytest.mark.parametrize("name", CASES)
def test_the_librarys_checkpoints_become_gguf(
    name: str, lab_model: Any, tmp_path: Path, workshop: Workshop, llama: Any, figure: Any
) -> None:
    from qformats.checkpoint import open_checkpoint

    arguments, form, to, worst = CASES[name]
    source, dense = tmp_path / name, tmp_path / "dense"
    compressed(lab_model("smollm2-slice4"), source, dense, arguments, form)
    oracle = load_file(dense / "model.safetensors")
    with open_checkpoint(source) as checkpoint:
        for module in (m for m in checkpoint.modules if checkpoint.is_quantized(m)):
            mine = read(checkpoint, module).dequantize(torch.bfloat16, like="compressed-tensors")
            assert torch.equal(mine.float(), oracle[f"{module}.weight"]), module
    file, report = workshop.convert(source, to, allow_requantize=worst == "requantized")
    if worst == "exact":
        again = load_file(workshop.convert(file, "hf:f32")[0] / "model.safetensors")
        assert [k for k in oracle if k.endswith("_proj.weight") and not torch.equal(again[k], oracle_exact(source, k))] == []
    plain, _ = workshop.convert(dense, "gguf:f32")
    assert worst == "requantized" or "requantized" not in report.kinds, report.kinds
    ids = ids_of(plain, evaluation_text(), 1025)
    found = []
    for gguf in (file, plain):
        with llama.Llama(gguf) as model:
            found.append(model.nll(ids, 256))
    figure(f"{dict(report.kinds)}: NLL {found[0]:.4f}, the library's floats {found[1]:.4f}")
    assert abs(found[0] - found[1]) <= (0.015 * found[1] if worst == "requantized" else 0.015)


@pytest.mark.parametrize(
    ("source", "dequantize"), [("gptq-4-sym-g64-slice", False), ("gptq-8-sym-g64-slice", False), ("awq-gemm-g64-slice", True)]
)
def test_gptq_and_awq_load_in_plain_transformers(source: str, dequantize: bool, checkpoint: Any, workshop: Workshop) -> None:
    """Asymmetric ones only with ``dequantize=True``: transformers 5.23 expects their zero points unpacked otherwise."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    from qformats.checkpoint import open_checkpoint

    origin = checkpoint(source)
    folder, report = workshop.convert(origin, "compressed-tensors")
    assert set(report.kinds) <= {"copied", "exact"}, report.kinds
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, **options)
    model(torch.arange(8)[None])  # the first pass unpacks
    with open_checkpoint(origin) as before:
        for module in [m for m in before.modules if before.is_quantized(m)][:8]:
            mine = read(before, module).dequantize(torch.float16, like="compressed-tensors")
            assert torch.equal(model.get_submodule(module).weight, mine), module
