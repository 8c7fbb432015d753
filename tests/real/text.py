"""English prose that every Python carries: the language reference in ``pydoc_data.topics``. No copy is kept here."""

from __future__ import annotations

from pydoc_data.topics import topics

__all__ = ["CALIBRATION", "EVALUATION", "calibration_texts", "evaluation_text"]

EVALUATION = ("objects", "naming", "execmodel")
CALIBRATION = ("class", "function", "import", "try", "for", "with", "assignment", "operator-summary", "strings", "comparisons")


def _prose(names: tuple[str, ...]) -> str:
    return "\n\n".join(" ".join(topics[name].split()) for name in names if name in topics)


def evaluation_text() -> str:
    """The text that negative log likelihoods are taken on."""
    return _prose(EVALUATION)


def calibration_texts(count: int, words: int = 160) -> list[str]:
    """``count`` passages of ``words`` words, spread over other topics than ``evaluation_text``."""
    all_words = _prose(CALIBRATION).split()
    step = max(1, (len(all_words) - words) // count)
    return [" ".join(all_words[i * step : i * step + words]) for i in range(count)]
