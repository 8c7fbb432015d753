"""Where a model runs, and the experts of a layer in one launch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ready

import qformats
from qformats.errors import QFormatError
from qformats.kernels import dispatch, gpu
from qformats.runtime import devices

pytest.importorskip("transformers")
torch.set_num_threads(1)
AWQ, IDS = "awq/gemm-g32", torch.tensor([[3, 1, 4, 1, 5]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(
    ("options", "code"),
    [({"device": "cuda:99"}, "device"), ({"device": "moon"}, "device"), ({"device": "cpu", "device_map": "auto"}, "device-map"),
     ({"device_map": "somewhere"}, "device-map"), ({"device_map": {"model.layers": "cpu"}}, "device-map"),
     ({"device_map": {"": "disk"}}, "device-map")],
)  # fmt: skip
def test_places_that_are_none_are_refused(options: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(QFormatError) as found:
        qformats.load_model(ready(AWQ, tmp_path), **options)
    assert found.value.code == code


def test_too_little_memory_is_said_before_any_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_free_here", lambda: 1000)
    with pytest.raises(QFormatError, match="free") as found:
        qformats.load_model(ready(AWQ, tmp_path))
    assert found.value.code == "memory"


@pytest.mark.parametrize("map_", ["auto", {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
                                           "model.layers": "disk", "lm_head": "disk"}])  # fmt: skip
def test_a_map_gives_the_same_model(map_: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    source = ready(AWQ, tmp_path)
    model = qformats.load_model(source, device_map=map_, offload_folder=tmp_path / "offloaded")
    assert torch.equal(logits(model), logits(qformats.load_model(source)))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("case", ["awq/gemm-moe-qwen3", "gptq/moe-qwen3"])
def test_experts_in_one_launch_are_those_one_by_one(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = qformats.load_model(ready(case, tmp_path), dtype=torch.float32)
    layer = next(module for module in model.modules() if type(module).__name__ == "QuantExperts")
    hidden = torch.randn(5, layer.down_proj.outputs, generator=torch.Generator().manual_seed(1), requires_grad=True)
    index = torch.tensor([[0, 1], [1, layer.num_experts], [0, 3], [3, 2], [1, 0]]) % (layer.num_experts + 1)
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(2))
    found, wanted = layer.grouped(hidden, index, weights), layer._one_by_one(hidden, index, weights)
    close = {"rtol": 1e-4, "atol": 1e-5 * float(wanted.abs().max())}
    assert torch.allclose(found, wanted, **close)
    (one,), (other,) = torch.autograd.grad(found.square().sum(), hidden), torch.autograd.grad(wanted.square().sum(), hidden)
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    with torch.no_grad():
        assert torch.equal(layer(hidden, index, weights), layer.grouped(hidden, index, weights))
        if importlib.util.find_spec("triton"):
            monkeypatch.setattr(dispatch, "multiply_grouped", lambda x, w, offsets, outputs, *_: gpu.experts(x, w, offsets, outputs))
            assert torch.allclose(layer.grouped(hidden, index, weights), wanted, **close)


@pytest.mark.parametrize("rule", [{"grid": "int8", "per": "tensor"}, {"grid": "int8", "outliers": 0.5}, {"grid": "int8"}])
def test_inputs_of_an_expert_are_rounded_without_those_of_others(rule: dict[str, Any], tmp_path: Path) -> None:
    model = qformats.load_model(ready("awq/gemm-moe-qwen3", tmp_path), dtype=torch.float32)
    layer = next(module for module in model.modules() if type(module).__name__ == "QuantExperts")
    for stack in layer.children():
        stack.input_rules = ((0, stack.weight_shape[0], json.dumps(rule)),)
    hidden = torch.randn(5, layer.down_proj.outputs, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 6).view(5, 1)
    chosen = torch.tensor([[0, 1], [1, 2], [0, 3], [3, 2], [1, 0]]), torch.full((5, 2), 0.5)
    with torch.no_grad():
        found, wanted = layer(hidden, *chosen), layer._one_by_one(hidden, *chosen)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_mixtures_compile_without_a_break(tmp_path: Path) -> None:
    model = qformats.load_model(ready("awq/gemm-moe-qwen3", tmp_path), dtype=torch.float32)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(input_ids=IDS, use_cache=False).logits, logits(model), atol=1e-4)
