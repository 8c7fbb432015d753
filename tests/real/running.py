"""The same weights in llama.cpp and in transformers, compared number by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llamacpp
import numpy as np

__all__ = ["assert_same_logits", "ids_of", "transformers_logits"]

Array = np.ndarray[Any, Any]
TOLERANCE = 1e-3  # of the range of the logits


def ids_of(gguf: Path, text: str, count: int) -> list[int]:
    """The first ``count`` token ids of ``text`` by llama.cpp."""
    with llamacpp.Llama(gguf) as model:
        ids = model.tokenize(text)
    assert len(ids) >= count
    return ids[:count]


def transformers_logits(folder: Path, ids: list[int], **options: Any) -> Array:
    """float32 (len(ids), vocabulary) by plain transformers on the CPU in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        logits: Array = model(torch.tensor([ids])).logits[0].float().numpy()
    return logits


def assert_same_logits(mine: Array, theirs: Array) -> str:
    """The rule of comparison: no logit further apart than ``TOLERANCE`` of their range, the same winner unless it is a tie by that rule."""
    mine = mine[:, : theirs.shape[1]]
    span = float(theirs.max() - theirs.min())
    worst = float(np.abs(mine - theirs).max())
    second, first = np.partition(theirs, -2, axis=1)[:, -2:].T
    clear = first - second > TOLERANCE * span
    assert np.isfinite(mine).all()
    assert worst <= TOLERANCE * span, f"logits differ by {worst:.3g}, range {span:.3g}"
    assert (mine.argmax(1) == theirs.argmax(1))[clear].all()
    return f"logits differ by at most {worst / span:.1e} of their range on {len(mine)} positions, {int(clear.sum())} clear winners agree"
