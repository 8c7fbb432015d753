"""How well a model predicts a text, and how much two models agree on it.

The text is tokenized as a whole and cut into windows of ``context`` tokens; a model reads each window on its own, and every token but
the first of a window is predicted. Sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, Any

from qformats.errors import BadFile, UsageError
from qformats.runtime.tokenizer import adds_bos

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Agreement", "Fit", "agreement", "perplexity"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fit:
    """``nll``: the mean negative log-likelihood of a token, in nats, over ``tokens`` predictions."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return exp(self.nll)


@dataclass(frozen=True)
class Agreement:
    """Two models on the same tokens: ``kl`` of the first from the second in nats a token, share of equal best tokens, both fits."""

    kl: float
    top1: float
    first: Fit
    second: Fit


def windows(tokenizer: Any, text: str, context: int, most: int | None = None) -> list[list[int]]:
    """Token windows, each beginning with BOS where the tokenizer adds one; ``UsageError('text-too-short')`` for less than two tokens."""
    if context < 2:
        raise UsageError("text-chunks", f"a window of {context} tokens predicts none", hint="use --context 2 or more")
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    bos = tokenizer.bos_token_id
    starts = adds_bos(tokenizer)
    step = context - 1 if starts else context
    cut = [ids[at : at + step] for at in range(0, len(ids), step)]
    found = [[bos, *window] if starts else window for window in cut]
    found = [window for window in found if len(window) > 1][:most]
    if not found:
        raise UsageError("text-too-short", f"the text has {len(ids)} tokens", hint="give a longer text")
    return found


def perplexity(model: Any, runs: list[list[int]], progress: Progress | None = None) -> Fit:
    """The mean NLL over all windows; ``BadFile('not-finite')`` where the model gives no numbers."""
    total, count = 0.0, 0
    for done, (log_p, ids) in enumerate(_predictions(model, runs)):
        total -= float(log_p.gather(-1, ids.unsqueeze(-1)).sum())
        count += len(ids)
        if progress is not None:
            progress(done + 1, len(runs))
    return _fit(total, count)


def agreement(first: Any, second: Any, runs: list[list[int]], progress: Progress | None = None) -> Agreement:
    """Mean KL divergence of ``second``'s distribution from ``first``'s, top-1 agreement, and the NLL of both, over all windows."""
    kl, same, nll, count = 0.0, 0, [0.0, 0.0], 0
    pairs = zip(_predictions(first, runs), _predictions(second, runs), strict=True)
    for done, ((a, ids), (b, _)) in enumerate(pairs):
        if a.shape[-1] != b.shape[-1]:
            text = f"their vocabularies have {a.shape[-1]} and {b.shape[-1]} tokens"
            raise UsageError("vocabulary", text, hint="compare models with the same tokenizer")
        kl += float((a.exp() * (a - b)).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        for side, log_p in enumerate((a, b)):
            nll[side] -= float(log_p.gather(-1, ids.unsqueeze(-1)).sum())
        count += len(ids)
        if progress is not None:
            progress(done + 1, len(runs))
    return Agreement(kl / count, same / count, _fit(nll[0], count), _fit(nll[1], count))


def _fit(total: float, count: int) -> Fit:
    if total != total or total in (float("inf"), float("-inf")):
        raise BadFile("not-finite", "the model's predictions are not finite", hint="the weights are broken, or it overflows its dtype")
    return Fit(total / count, count)


def _predictions(model: Any, runs: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Float64 log-probabilities (n, vocabulary) of each window's tokens after the first, and those tokens."""
    import torch

    for run in runs:
        ids = torch.tensor([run], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        yield logits.to(torch.float64).log_softmax(-1), ids[0, 1:]
