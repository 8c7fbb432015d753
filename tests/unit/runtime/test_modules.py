"""Modules on packed weights behave as the plain ones they stand for: moved, copied, compiled, trained on, saved, made plain again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import converted, ready

from qformats.runtime.embedding import QuantEmbedding
from qformats.runtime.experts import QuantExperts
from qformats.runtime.linear import QuantLinear, TiedHead
from qformats.runtime.loader import load_model
from qformats.runtime.packed import Packed

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(ready("awq/gemm-g64", tmp_path_factory.mktemp("awq")), dtype=torch.float32)


def planes(model: Any) -> dict[str, torch.Tensor]:
    return {f"{n}.{b}": t for n, m in model.named_modules() if isinstance(m, Packed) for b, t in m.named_buffers(recurse=False)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(input_ids=IDS).logits
    return made


def test_no_cast_reaches_a_plane(awq: Any) -> None:
    model = copy.deepcopy(awq)
    before = {name: plane.clone() for name, plane in planes(model).items()}
    model.to(torch.bfloat16)
    after = planes(model)
    assert all(torch.equal(after[name], plane) and after[name].dtype == plane.dtype for name, plane in before.items())
    found = logits(model)
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), logits(awq), atol=0.1, rtol=0.1)


def test_a_copy_computes_the_same_and_shares_nothing(awq: Any) -> None:
    other = copy.deepcopy(awq)
    assert torch.equal(logits(other), logits(awq))
    assert not {t.data_ptr() for t in planes(other).values()} & {t.data_ptr() for t in planes(awq).values()}


def test_a_packed_weight_reads_as_floats_and_refuses_writes(awq: Any) -> None:
    layer = awq.model.layers[0].self_attn.q_proj
    assert isinstance(layer, torch.nn.Linear) and layer.weight.shape == (layer.out_features, layer.in_features)
    assert torch.equal(layer.weight + 0, layer.dequantize(torch.float32))
    assert layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"
    for write in (lambda: layer.weight.add_(1), lambda: setattr(layer.weight, "data", torch.zeros(1)), lambda: layer.weight.zero_()):
        with pytest.raises(RuntimeError, match="packed weight"):
            write()


def test_it_compiles_without_a_break(awq: Any) -> None:
    compiled = torch.compile(awq.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(input_ids=IDS, use_cache=False).logits, logits(awq), atol=1e-5)


def test_it_generates(awq: Any) -> None:
    assert awq.generate(IDS, max_new_tokens=4, do_sample=False).shape == (1, IDS.shape[1] + 4)


def test_made_plain_it_computes_the_same(tmp_path: Path) -> None:
    for case in ("awq/gemm-g64", "gptq/moe-qwen3", "mxfp4"):
        model = load_model(ready(case, tmp_path), dtype=torch.float32)
        wanted = logits(model)
        model.dequantize()
        assert not any(isinstance(m, Packed | QuantExperts | TiedHead) for m in model.modules())
        assert torch.allclose(logits(model), wanted, atol=1e-5 * float(wanted.abs().max()))
        model.save_pretrained(tmp_path / f"plain-{case.replace('/', '-')}")


def test_saving_writes_the_checkpoint_again(tmp_path: Path) -> None:
    source = ready("awq/gemm-g64", tmp_path)
    load_model(source).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    converted(source, tmp_path / "model.gguf", "gguf", allow_requantize=True)
    load_model(tmp_path / "model.gguf").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_packed_embeddings_and_tied_heads(tmp_path: Path) -> None:
    converted(ready("dense/llama-tied", tmp_path), tmp_path / "tied.gguf", "gguf:q8_0", allow_requantize=True)
    model = load_model(tmp_path / "tied.gguf", dtype=torch.float32)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding) and isinstance(model.lm_head, TiedHead)
    converted(tmp_path / "tied.gguf", tmp_path / "floats", "hf:f32", allow_requantize=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32)
    assert torch.allclose(logits(model), logits(plain), atol=1e-4)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))


def test_adapters_train_on_packed_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load_model(ready("awq/gemm-g64", tmp_path), dtype=torch.float32)
    before = {name: plane.clone() for name, plane in planes(model).items()}
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=True))
    tuned.train()
    tuned.base_model.model.gradient_checkpointing_enable()
    tuned.enable_input_require_grads()
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(plane, before[name.replace(".base_layer", "")]) for name, plane in planes(model).items())
    assert isinstance(tuned.base_model.model.model.layers[0].self_attn.q_proj.base_layer, QuantLinear)
    with pytest.raises(RuntimeError, match="packed weight"):  # PEFT's own merge, without the layers of qformats
        peft.tuners.lora.layer.Linear.merge(tuned.base_model.model.model.layers[0].self_attn.q_proj)
