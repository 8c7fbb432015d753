"""Quantize on load, on a real model: the converted checkpoint's numbers and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from converters import convert
from qformats.runtime.loader import load_model


@pytest.mark.real
@pytest.mark.parametrize("to", ["gguf:q4_k_m", "bitsandbytes:nf4"])
def test_a_real_model_is_quantized_while_it_is_loaded(to: str, tmp_path: Path, lab_model: Any) -> None:
    source = lab_model("smollm2-135m")
    model = load_model(source, quantize=to)
    out, saved = (tmp_path / f"{name}.gguf" if to.startswith("gguf") else tmp_path / name for name in ("out", "saved"))
    convert(source, out, to=to, allow_requantize=True)
    ids = torch.tensor([[504, 5446, 282, 4649, 314, 2]])
    with torch.no_grad():
        found, wanted = (one(input_ids=ids).logits.float() for one in (model, load_model(out)))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    model.save_pretrained(saved)
    pairs = [(saved, out)] if out.is_file() else [(saved / file.name, file) for file in out.iterdir() if file.is_file()]
    assert all(mine.read_bytes() == theirs.read_bytes() for mine, theirs in pairs)
