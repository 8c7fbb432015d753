"""gpt-oss's MXFP4 experts: re-encoded for GGUF code by code, and back; the values are those that transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Workshop
from mxfp4_model import dequantized, pack_experts
from running import assert_same_logits, ids_of, transformers_logits
from test_dense import tiny_model
from text import evaluation_text

pytestmark = pytest.mark.real


def test_packed_experts_there_and_back(tmp_path: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    """llama.cpp on the GGUF agrees with transformers on the dequantized checkpoint; every byte comes back."""
    from safetensors.numpy import load_file

    folder = pack_experts(tiny_model("gpt_oss-packed", tmp_path / "floats"), tmp_path / "packed")
    file, report = workshop.convert(folder, "gguf")
    experts = [line for line in report.tensors if "exps.weight" in line.name]
    assert experts and {(line.type, line.kind) for line in experts} == {("MXFP4", "exact")}
    ids = ids_of(file, evaluation_text(), 128)
    floats = dequantized(folder, tmp_path / "by-transformers")
    theirs = transformers_logits(floats, ids, attn_implementation="eager")
    with llama.Llama(file) as model:
        apart = np.abs(model.logits(ids) - theirs).max() / (theirs.max() - theirs.min())
    figure(f"MXFP4 experts: logits {apart:.1e} of their range apart (llama.cpp rounds what meets MXFP4 weights to 8 bits)")
    assert apart < 0.01
    wide, _ = workshop.convert(folder, "gguf:f32")
    with llama.Llama(wide) as model:
        figure(assert_same_logits(model.logits(ids), theirs))
    back, _ = workshop.convert(file, "mxfp4")
    before, after = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    plain, _ = workshop.convert(file, "hf:f32")
    assert_same_logits(transformers_logits(plain, ids), theirs)
    direct, _ = workshop.convert(folder, "hf:f32")
    ours, wanted = load_file(direct / "model.safetensors"), load_file(floats / "model.safetensors")
    assert ours.keys() == wanted.keys() and all(np.array_equal(ours[name], wanted[name]) for name in ours)
