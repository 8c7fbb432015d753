"""(b) and (c): the converted weights at work, in llama.cpp and in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop, made, new_codes
from make_checkpoints import REAL
from running import assert_same_logits, ids_of, transformers_logits
from text import evaluation_text

POSITIONS, WINDOW, MAX_NLL_DIFFERENCE = 128, 256, 0.015
WINDOWS = 16  # of the long tier: llama.cpp rounds activations for packed weights, and four layers cut out of a model magnify that noise


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
    """Mean negative log likelihood of the packed file beside that of the F32 file; greedy text is shown, not judged.

    One window of 256 tokens for the checkpoints of every change; enough windows for the noise of the mean to stay below the bound for
    the rest.
    """
    packed, _ = workshop.convert(source, "gguf", allow_requantize=new_codes(source.name))
    plain, _ = workshop.convert(source, "gguf:f32")
    ids = ids_of(plain, evaluation_text(), WINDOW * (1 if source.name in REAL else WINDOWS))
    figures = []
    for path in (packed, plain):
        with llama.Llama(path) as model:
            assert model.tokenize(evaluation_text())[: len(ids)] == ids
            text = model.detokenize(model.greedy(model.tokenize("The capital of France is"), 12))
            figures.append((model.nll(ids, WINDOW), text))
    (mine, text), (theirs, _) = figures
    figure(f"NLL {mine:.4f}, in float32 {theirs:.4f}, apart {mine - theirs:+.4f}; greedy: {text!r}")
    assert abs(mine - theirs) <= MAX_NLL_DIFFERENCE
