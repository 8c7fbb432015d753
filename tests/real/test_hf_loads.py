"""Directories made from GGUF files load in plain transformers: the ids, the weights and the logits of transformers' own GGUF reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop
from lab import GEMMA_GGUF, SMOLLM_GGUF, why_missing
from running import assert_same_logits, ids_of, transformers_logits
from text import evaluation_text

POSITIONS = 128
TEXTS = ("Hello, world!", evaluation_text()[:2000], "def f(x):\n\treturn x**2  # π ≈ 3.14159\n", "<|im_start|>user\nhi<|im_end|>\n")
pytestmark = pytest.mark.real


def assert_loads(gguf_file: Path, folder: Path, llama: Any, figure: Any, *, template: bool) -> None:
    """Ids equal llama.cpp's; logits in float32 equal those of transformers' own reading of the GGUF."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with llama.Llama(gguf_file) as model:
        for text in TEXTS:
            assert tokenizer.encode(text) == model.tokenize(text), text
        assert bool(tokenizer.chat_template) == template
    ids = ids_of(gguf_file, evaluation_text(), POSITIONS)
    theirs = transformers_logits(gguf_file.parent, ids, gguf_file=gguf_file.name)
    figure(assert_same_logits(transformers_logits(folder, ids), theirs))


def test_published_smollm2(workshop: Workshop, llama: Any, figure: Any) -> None:
    missing = why_missing("smollm", SMOLLM_GGUF)
    if missing:
        pytest.skip(missing)
    folder, report = workshop.convert(SMOLLM_GGUF, "hf:f32")
    assert set(report.kinds) <= {"copied", "exact", "dequantized"}
    assert_loads(SMOLLM_GGUF, folder, llama, figure, template=True)


def test_published_smollm2_in_bfloat16(workshop: Workshop, lab_model: Any) -> None:
    """Weights rounded once to bfloat16 are those that transformers saved out of the same GGUF."""
    from reference import raw_tensors

    theirs = raw_tensors(lab_model("smollm2-135m", "smollm") / "model.safetensors")
    folder, _ = workshop.convert(SMOLLM_GGUF, "hf:bf16")
    mine = raw_tensors(folder)
    assert set(mine) == set(theirs)
    assert [k for k in mine if mine[k][0] != "BF16" or mine[k][1].tobytes() != theirs[k][1].tobytes()] == []


def test_a_file_of_our_own(checkpoint: Any, workshop: Workshop, llama: Any, figure: Any) -> None:
    """AWQ -> GGUF -> float32 directory: what transformers computes from our Q5_0 file, bit widths and heads and all."""
    file, _ = workshop.convert(checkpoint("awq-gemm-g64-slice"), "gguf")
    folder, _ = workshop.convert(file, "hf:f32")
    assert_loads(file, folder, llama, figure, template=True)


def test_published_gemma(workshop: Workshop, llama: Any, figure: Any) -> None:
    """K-quants and Q5_0, an SPM tokenizer, norms stored with one added."""
    missing = why_missing("gemma", GEMMA_GGUF)
    if missing:
        pytest.skip(missing)
    folder, _ = workshop.convert(GEMMA_GGUF, "hf:f32")
    assert_loads(GEMMA_GGUF, folder, llama, figure, template=False)
