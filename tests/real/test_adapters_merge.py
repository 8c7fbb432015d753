"""Every fixture that is a whole model takes an adapter, merges it into new codes, comes back from its files, and unmerges."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "convert"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "runtime"))

import peft
from cases import MODELS
from checkpoints import ready
from test_peft import planes, same

from qformats.errors import QFormatError
from qformats.runtime.linear import QuantLinear
from qformats.runtime.loader import load_model

TARGETS = ["q_proj", "down_proj"]
REFUSED = {  # learned codebooks; floats that stand for sparse codes; factors for each column
    "aqlm/1x10-o2": "requantize", "aqlm/2x8": "requantize", "compressed-tensors/sparse-bitmask": "changed-weight",
    "compressed-tensors/sparse24-bf16": "changed-weight", "compressed-tensors/sparse24-fp8": "requantize", "modelopt/mixed": "requantize",
}  # fmt: skip


@pytest.mark.real
@pytest.mark.parametrize("case", [case for case in MODELS if case != "mxfp4"])  # which has codes in its experts alone
def test_it_merges_and_comes_back(case: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = load_model(ready(case, tmp_path))
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    config = peft.LoraConfig(r=4, lora_alpha=1, target_modules=packed or TARGETS, init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).eval()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        before, wanted = planes(tuned), tuned(input_ids=ids).logits
        if case in REFUSED:
            with pytest.raises(QFormatError) as caught:
                tuned.merge_adapter()
                model.save_pretrained(tmp_path / "out")
            assert caught.value.code == REFUSED[case]
            return
        tuned.merge_adapter()
        found = tuned(input_ids=ids).logits
        model.save_pretrained(tmp_path / "out")
        assert torch.equal(load_model(tmp_path / "out")(input_ids=ids).logits, found)
        tuned.unmerge_adapter()
        assert same(planes(tuned), before)
        assert torch.equal(tuned(input_ids=ids).logits, wanted)
