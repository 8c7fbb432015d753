"""(b) and (c): the converted weights at work, in llama.cpp and in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop, made, new_codes
from running import assert_same_logits, ids_of, transformers_logits
from text import evaluation_text

POSITIONS, TOKENS, MAX_NLL_DIFFERENCE = 128, 256, 0.015


@pytest.mark.parametrize("source", made(without=""), indirect=True)
def test_logits_of_the_same_weights(source: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    """An F32 GGUF in llama.cpp against the float32 Hugging Face directory in plain transformers."""
    file, _ = workshop.convert(source, "gguf:f32")
    folder, _ = workshop.convert(source, "hf:f32")
    ids = ids_of(file, evaluation_text(), POSITIONS)
    with llama.Llama(file) as model:
        mine = model.logits(ids)
    figure(assert_same_logits(mine, transformers_logits(folder, ids)))


@pytest.mark.parametrize("source", made(without=""), indirect=True)
def test_likelihood_of_the_packed_file(source: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    """Mean negative log likelihood of the packed file beside that of the F32 file; greedy text is shown, not judged."""
    packed, _ = workshop.convert(source, "gguf", allow_requantize=new_codes(source.name))
    plain, _ = workshop.convert(source, "gguf:f32")
    ids = ids_of(plain, evaluation_text(), TOKENS)
    figures = []
    for path in (packed, plain):
        with llama.Llama(path) as model:
            assert model.tokenize(evaluation_text())[:TOKENS] == ids
            text = model.detokenize(model.greedy(model.tokenize("The capital of France is"), 12))
            figures.append((model.nll(ids, TOKENS), text))
    (mine, text), (theirs, _) = figures
    figure(f"NLL {mine:.4f}, in float32 {theirs:.4f}, apart {mine - theirs:+.4f}; greedy: {text!r}")
    assert abs(mine - theirs) <= MAX_NLL_DIFFERENCE
