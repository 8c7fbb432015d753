"""State dicts have the names and the tensors of the source, and put them back."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SAMPLE
from checkpoints import converted, ready
from safetensors.torch import load_file
from test_load import logits

from qformats.kernels.lower import lower
from qformats.runtime.linear import QuantLinear
from qformats.runtime.loader import load_model
from qformats.runtime.packed import Packed

pytest.importorskip("transformers")
torch.set_num_threads(1)

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def packed_in(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Packed)]


def planes(model: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.{leaf}": plane for name, module in packed_in(model) for leaf, plane in module.named_buffers(recurse=False)}


def check_state(case: str, tmp_path: Path) -> None:
    source = ready(case, tmp_path)
    stored = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model = load_model(source)
    state = model.state_dict()
    spans = [(name, module.source, span) for name, module in packed_in(model) for span in module.source.spans]
    of_packed = {key for name, entries, span in spans for key in entries.keys(f"{name}.", span).values()}
    assert of_packed <= state.keys() and not any(key.endswith(".codes0") for key in state)
    for key in of_packed:
        assert equal(state[key], stored[key]), key
    other, before = deepcopy(model), planes(model)
    for _, module in packed_in(other):
        module._buffers["codes0"] = torch.zeros_like(module._buffers["codes0"])
    assert other.load_state_dict(state).missing_keys == []
    after = planes(other)
    assert before.keys() == after.keys() and all(equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(other, IDS), logits(model, IDS))


@pytest.mark.parametrize("case", SAMPLE)
def test_entries_are_the_stored_tensors(case: str, tmp_path: Path) -> None:
    check_state(case, tmp_path)


@pytest.mark.parametrize("model", ["dense/llama-tied", "dense/qwen3_moe"])
def test_those_of_a_gguf_are_blocks(model: str, tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    converted(ready(model, tmp_path), source, "gguf:q8_0", allow_requantize=True)
    loaded = load_model(source)
    state = loaded.state_dict()
    config = loaded.config
    rows = config.num_key_value_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    key = state["model.layers.0.self_attn.k_proj.weight"]
    assert key.dtype == torch.uint8 and tuple(key.shape) == (rows, config.hidden_size // 32 * 34)
    other = deepcopy(loaded)
    for _, module in packed_in(other):
        module._buffers["codes0"] = torch.zeros_like(module._buffers["codes0"])
    other.load_state_dict(state)
    assert torch.equal(logits(other, IDS), logits(loaded, IDS))


def test_one_module_by_itself(tmp_path: Path) -> None:
    model = load_model(ready("gptq/4b-g32-asym-v1", tmp_path))
    projection = model.model.layers[0].mlp.up_proj
    state = projection.state_dict()
    assert {"qweight", "qzeros", "scales"} <= state.keys()
    changed = {**state, "scales": state["scales"] * 2}
    before = projection.dequantize(torch.float32)
    projection.load_state_dict(changed)
    assert torch.equal(projection.dequantize(torch.float32), 2 * before)
    assert equal(model.state_dict()["model.layers.0.mlp.up_proj.scales"], changed["scales"])


def test_wrong_entries_are_refused(tmp_path: Path) -> None:
    model = load_model(ready("gptq/4b-g32-asym-v1", tmp_path))
    state = model.state_dict()
    key = "model.layers.0.mlp.up_proj.scales"
    with pytest.raises(RuntimeError, match=rf"Missing key.*{key}"):
        model.load_state_dict({name: value for name, value in state.items() if name != key})
    with pytest.raises(RuntimeError, match=f"{key}.*expected torch.float16"):
        model.load_state_dict({**state, key: state[key].float()})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*up_proj\.more"):
        model.load_state_dict({**state, "model.layers.0.mlp.up_proj.more": state[key]})


def test_a_module_of_no_checkpoint_keeps_its_planes_names(tmp_path: Path) -> None:
    model = load_model(ready("gptq/4b-g32-asym-v1", tmp_path))
    rows = model.model.layers[0].mlp.up_proj.rows(0, 8)
    alone = QuantLinear([lower(rows)])
    assert "codes0" in alone.state_dict()
    assert alone.load_state_dict(alone.state_dict()).missing_keys == []
