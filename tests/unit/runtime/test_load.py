"""A loaded model computes what transformers computes on the same weights dequantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SAMPLE
from checkpoints import converted, ready

from qformats.errors import QFormatError
from qformats.runtime.loader import load_model
from qformats.runtime.packed import Packed

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def floats(source: Path, out: Path) -> Any:
    """The checkpoint dequantized, in plain transformers."""
    converted(source, out, "hf:f32", allow_requantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def check_logits(case: str, tmp_path: Path) -> None:
    source = ready(case, tmp_path)
    model = load_model(source, dtype=torch.float32, activations="float")
    assert any(isinstance(module, Packed) for module in model.modules()) or "sparse" in case
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]) % model.config.get_text_config().vocab_size
    found = logits(model, ids)
    wanted = logits(floats(source, tmp_path / "floats"), ids)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())), float((found - wanted).abs().max())


@pytest.mark.parametrize("case", SAMPLE)
def test_logits_are_those_of_the_dequantized_weights(case: str, tmp_path: Path) -> None:
    check_logits(case, tmp_path)


def test_an_unknown_way_of_computing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QFormatError, match="compute"):
        load_model(ready(SAMPLE[0], tmp_path), compute="int4")
    with pytest.raises(QFormatError, match="activations"):
        load_model(ready(SAMPLE[0], tmp_path / "again"), activations="int4")


def test_weights_beside_a_buffer_that_is_computed_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    source = ready("dense/gemma3", tmp_path)
    found, wanted = load_model(source), transformers.AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(found.model.embed_tokens.weight, wanted.model.embed_tokens.weight)
    assert torch.equal(found.model.embed_tokens.embed_scale, wanted.model.embed_tokens.embed_scale)


def test_experts_that_are_floats_one_by_one_are_stacked(tmp_path: Path) -> None:
    source = ready("dense/qwen3_moe", tmp_path)
    found, wanted = load_model(source), transformers.AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(found.model.layers[1].mlp.experts.gate_up_proj, wanted.model.layers[1].mlp.experts.gate_up_proj)
    assert torch.equal(found.model.layers[1].mlp.experts.down_proj, wanted.model.layers[1].mlp.experts.down_proj)
