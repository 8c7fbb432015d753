"""Layouts of scales that few checkpoints have, written of tiny models, in plain transformers with the owner's package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from owners import owners_weight
from test_outside import random_model

from converters import convert
from qformats.checkpoint import open_checkpoint

pytestmark = pytest.mark.real
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def loaded(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The directory in plain transformers, in which nothing is missing and nothing left over."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"], (told["missing_keys"], told["unexpected_keys"])
    return model.eval()


def assert_ours(model: Any, folder: Path, like: str) -> int:
    """Every weight in codes is the value that we read; the number of them."""
    with open_checkpoint(folder) as made:
        modules = [name for name in made.modules if made.is_quantized(name)]
        for name in modules:
            theirs, tensor = owners_weight(model, name), made.read(name)
            assert torch.equal(theirs, tensor.dequantize(theirs.dtype, like=like)), name  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(3, 19)[None]).logits).all()
    return len(modules)


@pytest.mark.parametrize("to", ["torchao:fp8,block", "torchao:fp8_e5m2,block", "torchao:int4,tensor", "torchao:fp8,tensor"])
def test_torchao_takes_any_block(to: str, tmp_path: Path) -> None:
    """Its config classes have no word for blocks of float8 and for one scale below 8 bits; its tensors and their metadata have."""
    pytest.importorskip("torchao")
    random_model("llama_bpe", torch.bfloat16, **WIDE).save_pretrained(tmp_path / "floats")
    convert(tmp_path / "floats", tmp_path / "out", to=to, allow_requantize=True)
    assert assert_ours(loaded(tmp_path / "out"), tmp_path / "out", "torchao") == 14


@pytest.mark.parametrize("sizes", [WIDE, {"hidden_size": 160, "intermediate_size": 192}], ids=["whole", "ragged"])
def test_blocks_of_fp8_go_to_torchao_and_back(sizes: dict[str, int], tmp_path: Path) -> None:
    """Where blocks do not divide a weight, smaller ones that do: torchao has no ragged blocks."""
    pytest.importorskip("torchao")
    random_model("llama_bpe", torch.bfloat16, **sizes).save_pretrained(tmp_path / "floats")
    convert(tmp_path / "floats", tmp_path / "fp8", to="fp8", allow_requantize=True)
    report = convert(tmp_path / "fp8", tmp_path / "out", to="torchao")
    assert report.kinds["exact"] >= 14
    assert assert_ours(loaded(tmp_path / "out"), tmp_path / "out", "torchao") == 14
    convert(tmp_path / "out", tmp_path / "back", to="fp8")
    with open_checkpoint(tmp_path / "fp8") as before, open_checkpoint(tmp_path / "back") as after:
        assert {k: bytes(v.read()) for k, v in before.raw.items()} == {k: bytes(v.read()) for k, v in after.raw.items()}


# ---------------------------------------------------------------- embeddings


@pytest.mark.parametrize("to", ["compressed-tensors", "torchao", "bitsandbytes", "quanto", "hqq"])
@pytest.mark.parametrize("codes", ["int4", "mxfp4"])
def test_an_embedding_is_codes_only_where_it_loads(codes: str, to: str, tmp_path: Path) -> None:
    """MLX has embeddings in codes; of transformers' loaders torchao's alone takes them, and no microscaled ones."""
    random_model("llama_bpe", torch.bfloat16, **WIDE).save_pretrained(tmp_path / "floats")
    convert(tmp_path / "floats", tmp_path / "mlx", to=f"mlx:{codes}", allow_requantize=True, tensor_types=[("embed_tokens", codes)])
    with open_checkpoint(tmp_path / "mlx") as source:
        assert source.is_quantized("model.embed_tokens")
    report = convert(tmp_path / "mlx", tmp_path / "out", to=to, allow_requantize=True)
    with open_checkpoint(tmp_path / "out") as made:
        kept, tensor = made.is_quantized("model.embed_tokens"), made.read("model.embed_tokens")
    assert kept == (to == "torchao" and codes == "int4")
    values = tensor.dequantize() if kept else tensor.float()  # type: ignore[union-attr]
    reason = next(line.reason for line in report.tensors if line.name == "model.embed_tokens.weight")
    assert ("take no embedding" in reason) == ((to, codes) != ("torchao", "int4"))
    if to in ("compressed-tensors", "torchao", "bitsandbytes"):  # the others have loaders of their own, for linear layers
        pytest.importorskip(to.replace("-", "_"))
        weight = loaded(tmp_path / "out").get_input_embeddings().weight
        found = weight.dequantize() if hasattr(weight, "qdata") else weight
        assert float((found.float() - values).norm() / values.norm()) < 2.0**-7


# ---------------------------------------------------------------- single experts


SINGLE = ("fp8:fp8,block=64x64", "compressed-tensors:int8", "compressed-tensors:int4", "mlx:int4,metal", "torchao:int8")


@pytest.mark.parametrize("to", SINGLE)
def test_a_plan_says_whether_transformers_takes_single_experts(to: str, tmp_path: Path) -> None:
    """Mixtral's experts are one parameter in transformers 5: some loaders fill it from single experts in codes, others leave these out."""
    pytest.importorskip({"torchao": "torchao", "compressed-tensors": "compressed_tensors"}.get(to.partition(":")[0], "torch"))
    model = random_model("mixtral", torch.bfloat16, hidden_size=128, intermediate_size=128)
    model.save_pretrained(tmp_path / "floats")
    report = convert(tmp_path / "floats", tmp_path / "out", to=to, allow_requantize=True)
    warned = any("leaves such experts out" in text for text in report.warnings)
    from transformers import AutoModelForCausalLM

    found, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, device_map="cpu", output_loading_info=True)
    assert warned == bool(told["missing_keys"])
    if not warned:
        name = "model.layers.1.mlp.experts.gate_up_proj"
        mine, theirs = found.get_parameter(name).float(), model.get_parameter(name).float()
        assert float((mine - theirs).norm() / theirs.norm()) < 0.17
