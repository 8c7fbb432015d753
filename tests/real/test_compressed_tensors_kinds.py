"""Every kind of packed integers that we write: plain transformers loads our values, or fails on the owner's own file of that kind too.

A small Llama whose sizes end no word (K = 96, 160; N = 48, 96, 160), bfloat16, one layer.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import LAB, owners_python, why_missing
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.real
OLDER = LAB / "older" / "compressed-tensors-0.18.0"
SIZES = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "head_dim": 24, "tie_word_embeddings": False,
}  # fmt: skip
STRATEGIES = {"channel": "channel", "group": "group=32", "tensor": "tensor"}


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("floats")
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                weight.add_(0.01)  # zero points off the middle
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, *, dequantize: bool = False) -> Any:
    """The model in plain transformers after a pass, in which it unpacks."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    with torch.no_grad():
        model(torch.arange(8)[None])
    return model


def assert_our_values(folder: Path, model: Any) -> None:
    from qformats.checkpoint import open_checkpoint

    with open_checkpoint(folder) as made:
        modules = [name for name in made.modules if made.is_quantized(name)]
        assert len(modules) == 7
        for name in modules:
            tensor: Any = made.read(name)
            assert torch.equal(model.get_submodule(name).weight, tensor.dequantize(torch.bfloat16, like="compressed-tensors")), name


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_integers_load(bits: int, strategy: str, symmetric: bool, floats: Path, tmp_path: Path) -> None:
    """Asymmetric groups and channels only with ``dequantize=True``, which the plan says; the owner's own do not load either."""
    from converters import convert

    to = f"compressed-tensors:int{bits},format=pack,{STRATEGIES[strategy]},{'sym' if symmetric else 'asym'}"
    report = convert(floats, tmp_path / "ours", to=to, allow_requantize=True)
    fails = not symmetric and strategy != "tensor"
    assert any("dequantize=True" in warning for warning in report.warnings) == fails, report.warnings
    if fails:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            loaded(tmp_path / "ours")
        owners_own(floats, tmp_path / "theirs", bits, strategy)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            loaded(tmp_path / "theirs")
    assert_our_values(tmp_path / "ours", loaded(tmp_path / "ours", dequantize=fails))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bits", (3, 4, 8))
def test_the_way_out_loads(bits: int, strategy: str, floats: Path, tmp_path: Path) -> None:
    """``format=int``, which the warning names: zero points in bytes, in plain transformers as it stands."""
    from converters import convert

    to = f"compressed-tensors:int{bits},format=int,{STRATEGIES[strategy]},asym"
    report = convert(floats, tmp_path / "ours", to=to, allow_requantize=True)
    assert not any("dequantize=True" in warning for warning in report.warnings)
    assert_our_values(tmp_path / "ours", loaded(tmp_path / "ours"))


def owners_own(floats: Path, out: Path, bits: int, strategy: str) -> None:
    """The same floats by the library's own compressor, asymmetric."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    qparams = pytest.importorskip("compressed_tensors.quantization.utils").calculate_qparams
    compressor = pytest.importorskip("compressed_tensors.compressors.base").BaseCompressor.get_value_from_registry("pack-quantized")
    group = {"group_size": 32} if strategy == "group" else {}
    args = quantization.QuantizationArgs(num_bits=bits, type="int", strategy=strategy, symmetric=False, **group)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    parts = {}
    for name, weight in load_file(floats / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            parts[name] = weight
            continue
        runs = weight.reshape(len(weight), -1, args.group_size or weight.shape[1])
        scale, zero = qparams(runs.amin(-1), runs.amax(-1), args)
        made = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}, scheme)
        parts |= {f"{name.removesuffix('weight')}{leaf}": part.contiguous() for leaf, part in made.items()}
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
    )
    out.mkdir()
    save_file(parts, out / "model.safetensors", metadata={"format": "pt"})
    held = json.loads((floats / "config.json").read_text()) | {"quantization_config": json.loads(config.model_dump_json())}
    (out / "config.json").write_text(json.dumps(held))


# What the last release that reads ``weight_g_idx`` makes of every module of a checkpoint
DECOMPRESS = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
folder, out = map(Path, sys.argv[1:])
config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
stored, found = load_file(folder / "model.safetensors"), {}
schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
for name in sorted(key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")):
    state = {key.removeprefix(name + "."): value for key, value in stored.items() if key.startswith(name + ".") and "bias" not in key}
    scheme = schemes.get(name, schemes["Linear"])
    assert str(scheme.weights.actorder) == "group" if "weight_g_idx" in state else scheme.weights.actorder is None
    found[name] = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"].contiguous()
save_file(found, out)
"""


def decompressed(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    missing = why_missing("older", OLDER)
    if missing:
        pytest.skip(missing)
    environment = {**os.environ, "PYTHONPATH": str(OLDER), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([owners_python(), "-c", DECOMPRESS, folder, out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(out)


@pytest.mark.parametrize("source", ["gptq/4b-g32-act", "gptq/4b-g64-asym-act-v2"])
def test_act_order_is_kept(source: str, tmp_path: Path) -> None:
    """GPTQ's group index in ``weight_g_idx``: the owner's values are GPTQ's, and the way back gives the same bytes."""
    from converters import convert
    from qformats.checkpoint import open_checkpoint

    fixture = Path(__file__).parents[2] / "fixtures" / source
    report = convert(fixture, tmp_path / "ct", to="compressed-tensors", exact=True)
    assert set(report.kinds) <= {"copied", "exact"}, report.kinds
    assert any("weight_g_idx" in warning for warning in report.warnings)
    theirs = decompressed(tmp_path / "ct", tmp_path / "theirs.safetensors")
    with open_checkpoint(fixture) as before:
        modules = [name for name in before.modules if before.is_quantized(name)]
        assert sorted(theirs) == sorted(modules)
        ordered = 0
        for name in modules:
            tensor: Any = before.read(name)
            ordered += tensor.group_index is not None
            assert torch.equal(theirs[name].float(), tensor.dequantize(theirs[name].dtype, like="compressed-tensors").float()), name
        assert ordered
    convert(tmp_path / "ct", tmp_path / "back", to="gptq", exact=True)
    old, new = (load_file(folder / "model.safetensors") for folder in (fixture, tmp_path / "back"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
