"""Real checkpoints run on their packed weights: their likelihood beside that of floats, in transformers and in llama.cpp."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workshop, made
from lab import floats_of
from running import Array, transformers_logits
from test_owners import INTO_GGUF, owners_dtype
from text import evaluation_text

import qformats

TOKENS, WINDOW = 512, 256
MAX_NLL, MAX_INT8_NLL, MAX_LLAMA_NLL, TIE = 5e-4, 0.01, 0.02, 1e-4
SOON = ("bnb-nf4-double-slice", "hqq-4-g64-ax0-slice", "quanto-qint4-slice", "torchao-int4-g64-asym-slice", "ct-nvfp4-slice",
        "aqlm-2x8-slice", "mlx-4b-g64-slice", "fp8-b64-slice")  # fmt: skip
OWNERS = [pytest.param(case.name, marks=pytest.mark.real if case.name in SOON else pytest.mark.real_full) for case in INTO_GGUF]
GGUFS = ("SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m.Q4_K_M.gguf")


@cache
def tokens(folder: Path) -> list[int]:
    """The first ``TOKENS`` of the text."""
    found: list[int] = qformats.load_tokenizer(folder)(evaluation_text(), add_special_tokens=False).input_ids[:TOKENS]
    return found


def logits_of(model: Any, ids: list[int]) -> Array:
    """float32 (len(ids), vocabulary), in windows."""
    with torch.no_grad():
        parts = [model(torch.tensor([ids[at : at + WINDOW]])).logits[0].float() for at in range(0, len(ids), WINDOW)]
    found: Array = torch.cat(parts).numpy()
    return found


def nll(logits: Array, ids: list[int]) -> float:
    """Mean over all tokens but the first of each window."""
    losses = torch.nn.functional.cross_entropy(torch.from_numpy(logits[:-1]), torch.tensor(ids[1:]), reduction="none")
    keep = torch.arange(len(losses)) % WINDOW != WINDOW - 1
    return float(losses[keep].double().mean())


def judge(mine: Array, theirs: Array, ids: list[int]) -> str:
    """The likelihoods agree, and so does every best token that is ahead by more than a tie."""
    found, wanted = nll(mine, ids), nll(theirs, ids)
    second, first = np.partition(theirs, -2, axis=1)[:, -2:].T
    clear = first - second > TIE
    wrong = int((mine.argmax(1) != theirs.argmax(1))[clear].sum())
    assert np.isfinite(mine).all()
    assert abs(found - wanted) <= MAX_NLL, f"NLL {found:.5f}, of the floats {wanted:.5f}"
    assert wrong == 0, f"{wrong} of {int(clear.sum())} best tokens differ"
    return f"NLL {found:.5f}, apart {found - wanted:+.1e}"


def floats_logits(folder: Path, ids: list[int]) -> Array:
    return np.concatenate([transformers_logits(folder, ids[at : at + WINDOW]) for at in range(0, len(ids), WINDOW)])


@pytest.mark.parametrize("source", [*OWNERS, *made()], indirect=True)
def test_as_the_same_numbers_in_floats(source: Path, workshop: Workshop, figure: Any) -> None:
    """Beside the float32 of every exact value; and beside the owner's own floats, which most owners round to 16 bits."""
    ids = tokens(source)
    mine = logits_of(qformats.load_model(source, dtype=torch.float32, activations="float", allow_pickle=True), ids)
    plain, _ = workshop.convert(source, "hf:f32", allow_pickle=True)
    words = judge(mine, floats_logits(plain, ids), ids)
    if floats_of(source).exists():
        theirs = floats_logits(floats_of(source), ids)
        if owners_dtype(source.name) == torch.float32:
            judge(mine, theirs, ids)
        words += f"; the owner's floats: {nll(theirs, ids):.5f}"
    figure(words)


@pytest.mark.real
@pytest.mark.parametrize("name", GGUFS)
def test_a_gguf_as_in_llama_cpp(name: str, lab_model: Any, llama: Any, figure: Any) -> None:
    path = lab_model("gguf") / name
    with llama.Llama(path) as model:
        ids = model.tokenize(evaluation_text())[:TOKENS]
        theirs = model.nll(ids, WINDOW)
    mine = nll(logits_of(qformats.load_model(path, dtype=torch.float32), ids), ids)
    figure(f"NLL {mine:.4f}, in llama.cpp {theirs:.4f}, apart {mine - theirs:+.4f}")
    assert abs(mine - theirs) <= MAX_LLAMA_NLL


@pytest.mark.real
@pytest.mark.parametrize("name", GGUFS[:1])
def test_products_of_bytes_are_near_the_exact_ones(name: str, lab_model: Any, figure: Any) -> None:
    path = lab_model("gguf") / name
    ids = qformats.load_tokenizer(path)(evaluation_text(), add_special_tokens=False).input_ids[:TOKENS]
    exact, near = (nll(logits_of(qformats.load_model(path, dtype=torch.float32, compute=how), ids), ids) for how in ("exact", "int8"))
    figure(f"NLL {exact:.4f}, of bytes {near:.4f}, apart {near - exact:+.4f}")
    assert abs(near - exact) <= MAX_INT8_NLL
