"""Adapters on packed weights merge into new codes of the same type, unmerge to the old ones, and are never lost without a word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import converted, ready

import qformats
from qformats.errors import QFormatError
from qformats.runtime.loader import load_model
from qformats.runtime.packed import Packed

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
torch.set_num_threads(1)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
KINDS = (
    "awq/gemm-g64", "gptq/4b-g32-act", "bitsandbytes/nf4-128-double-bf16", "compressed-tensors/fp8-block", "hqq/4b-g16-ax0-f16-floatview",
)  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(input_ids=IDS).logits
    return made


def planes(model: Any) -> list[torch.Tensor]:
    held = (plane for m in model.modules() if isinstance(m, Packed) for plane in m.buffers(recurse=False))
    return [plane.clone(memory_format=torch.contiguous_format) for plane in held]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    if [(x.dtype, x.shape) for x in a] != [(y.dtype, y.shape) for y in b]:
        return False
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def loaded(case: str, tmp_path: Path, **options: Any) -> Any:
    return load_model(ready(case, tmp_path), dtype=torch.float32, **options)


def tuned(model: Any, targets: Any = ("q_proj", "down_proj"), **options: Any) -> Any:
    targets = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False, **options)
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("case", KINDS)
def test_a_merge_is_new_codes_of_the_same_type(case: str, tmp_path: Path) -> None:
    source = ready(case, tmp_path)
    model = tuned(load_model(source, dtype=torch.float32))
    before, wanted = planes(model), logits(model)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    merged = layer.base_layer.dequantize(torch.float32) + layer.get_delta_weight("default").detach()
    model.merge_adapter()
    step = float((layer.base_layer.dequantize(torch.float32) - merged).abs().max()) / float(merged.abs().max())
    assert step < 0.2 and not same(planes(model), before)
    found = logits(model)
    model.base_model.model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_model(tmp_path / "merged", dtype=torch.float32)), found)
    model.unmerge_adapter()
    assert same(planes(model), before) and torch.equal(logits(model), wanted)
    plain = model.merge_and_unload(safe_merge=True)
    plain.save_pretrained(tmp_path / "again")
    check_untouched(source, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "merged" / "model.safetensors").read_bytes()


def check_untouched(source: Path, saved: Path) -> None:
    """The same tensors, equal bytes but in what was merged."""
    with qformats.open(source) as before, qformats.open(saved) as after:
        assert before.raw.keys() == after.raw.keys()
        for name, raw in before.raw.items():
            if "q_proj" not in name and "down_proj" not in name:
                assert bytes(raw.read()) == bytes(after.raw[name].read()), name
    assert (source / "config.json").read_bytes() == (saved / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "mxfp4"])
def test_a_gguf_is_merged_and_saved_as_one(kind: str, tmp_path: Path) -> None:
    converted(ready("dense/llama", tmp_path), tmp_path / "in.gguf", f"gguf:{kind}", allow_requantize=True)
    model = tuned(load_model(tmp_path / "in.gguf", dtype=torch.float32))
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path / "out.gguf")
    assert torch.equal(logits(load_model(tmp_path / "out.gguf", dtype=torch.float32)), logits(plain))
    with qformats.open(tmp_path / "in.gguf") as before, qformats.open(tmp_path / "out.gguf") as after:
        changed = {name for name, raw in before.raw.items() if bytes(raw.read()) != bytes(after.raw[name].read())}
    assert changed and all("attn_q" in name or "ffn_down" in name for name in changed)


def test_several_adapters_are_rounded_once(tmp_path: Path) -> None:
    model = tuned(loaded("awq/gemm-g64", tmp_path))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], use_rslora=True, init_lora_weights=False))
    before = planes(model)
    model.merge_adapter(["default", "second"])
    together = planes(model)
    model.unmerge_adapter()
    assert same(planes(model), before)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert same(planes(model), together)
    model.unmerge_adapter()
    assert same(planes(model), before)


def test_dora_merges_as_peft_merges_floats(tmp_path: Path) -> None:
    model = tuned(loaded("torchao/int8", tmp_path), use_dora=True)
    wanted, before = logits(model), planes(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), wanted, atol=0.1) and not same(planes(model), before)
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted) and same(planes(model), before)


def test_a_bias_is_merged_and_restored(tmp_path: Path) -> None:
    model = tuned(loaded("awq/gemm-bias-qwen2", tmp_path), ("q_proj",), lora_bias=True)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    layer.lora_B["default"].bias.data.fill_(1.0)
    bias = layer.base_layer.bias.detach().clone()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.bias, bias + layer.scaling["default"])
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias)


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    model = tuned(loaded("awq/gemm-g64", tmp_path))
    model.save_pretrained(tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(loaded("awq/gemm-g64", tmp_path / "other"), tmp_path / "adapter").eval()
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(logits(other.merge_and_unload()), logits(model.merge_and_unload()))


def test_an_adapter_of_nothing_changes_no_code(tmp_path: Path) -> None:
    source = ready("awq/gemm-g64", tmp_path)
    model = peft.get_peft_model(load_model(source, dtype=torch.float32), peft.LoraConfig(target_modules=["q_proj"]))
    model.merge_and_unload().save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def refused(code: str, action: Any) -> None:
    with pytest.raises(QFormatError) as caught:
        action()
    assert caught.value.code == code and caught.value.hint


def test_what_is_not_in_the_weights_is_not_lost_on_saving(tmp_path: Path) -> None:
    model = tuned(loaded("awq/gemm-g64", tmp_path))
    refused("adapter", lambda: model.base_model.model.save_pretrained(tmp_path / "out"))
    with model.disable_adapter():
        model.base_model.model.save_pretrained(tmp_path / "base")


def test_learned_codebooks_are_not_made_anew(tmp_path: Path) -> None:
    model = tuned(loaded("aqlm/2x8", tmp_path))
    wanted, before = logits(model), planes(model)
    refused("requantize", model.merge_adapter)
    assert same(planes(model), before) and torch.equal(logits(model), wanted)


def test_floats_that_stand_for_unwritable_codes_are_not_lost(tmp_path: Path) -> None:
    model = tuned(loaded("compressed-tensors/sparse24-bf16", tmp_path)).merge_and_unload()
    refused("changed-weight", lambda: model.save_pretrained(tmp_path / "out"))


def test_a_broken_adapter_changes_nothing(tmp_path: Path) -> None:
    model = tuned(loaded("awq/gemm-g64", tmp_path), ("q_proj",))
    layer, before = next(m for m in model.modules() if hasattr(m, "lora_A")), planes(model)
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(QFormatError, match=r"finite|NaN"):
        model.merge_adapter()
    assert same(planes(model), before) and not layer.merged_adapters


def test_experts_and_whole_modules_are_refused(tmp_path: Path) -> None:
    model = loaded("gptq/moe-qwen3", tmp_path)
    refused("lora-experts", lambda: tuned(model, ("q_proj",), target_parameters=["mlp.experts.down_proj"]))
    refused("lora-experts", lambda: tuned(loaded("gptq/moe-qwen3", tmp_path / "2"), "all-linear"))
    refused("lora-packed", lambda: tuned(loaded("gptq/lm-head", tmp_path / "3"), modules_to_save=["lm_head"]))


def test_packed_embeddings_merge_unless_tied(tmp_path: Path) -> None:
    converted(ready("dense/llama-tied", tmp_path), tmp_path / "tied.gguf", "gguf:q8_0", allow_requantize=True)
    tied = tuned(load_model(tmp_path / "tied.gguf", dtype=torch.float32), ("embed_tokens", "q_proj"))
    refused("lora-tied", tied.merge_adapter)
    converted(ready("dense/llama", tmp_path), tmp_path / "own.gguf", "gguf:q8_0", allow_requantize=True)
    model = tuned(load_model(tmp_path / "own.gguf", dtype=torch.float32), ("embed_tokens", "q_proj"))
    wanted, before = logits(model), planes(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), wanted, atol=0.05) and not same(planes(model), before)
    model.unmerge_adapter()
    assert same(planes(model), before)


def test_prepared_it_trains_under_checkpointing(tmp_path: Path) -> None:
    model = load_model(ready("awq/gemm-g64", tmp_path), dtype=torch.bfloat16)
    before = planes(model)
    assert qformats.prepare_for_training(model) is model and model.is_gradient_checkpointing
    assert model.model.norm.weight.dtype == torch.float32 and not any(p.requires_grad for p in model.parameters())
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    trained = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = trained(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and same(planes(trained), before)


def test_requantize_needs_a_stored_type_and_a_shape(tmp_path: Path) -> None:
    layer = loaded("awq/gemm-g64", tmp_path).model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match="shape"):
        layer.requantize(torch.zeros(2, 2))
    layer.stretches = ()
    with pytest.raises(QFormatError, match="no checkpoint"):
        layer.requantize(torch.zeros(layer.weight_shape))


@pytest.mark.parametrize("first", ["peft", "qformats.runtime.linear"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    second = "peft" if first != "peft" else "qformats.runtime.linear"
    code = f"import {first}, sys; loaded = 'peft' in sys.modules; import {second}; import peft; from peft.tuners.lora import model;" + (
        "print(loaded, model.LoraModel._qformats_watches)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.split()[-2:] == [str(first == "peft"), "True"]
