"""Unigram vocabularies: SentencePiece's unigram model or a ``Unigram`` tokenizer.json ↔ GGUF's ``t5`` vocabulary.

A text is normalized, then cut into the pieces whose scores sum up highest. GGUF keeps the normalizer as a compiled map of characters
and two flags: a space first, spaces merged. Facts: llama.cpp, ``conversion/t5.py`` ``set_vocab`` and ``src/llama-vocab.cpp``
``llm_tokenizer_ugm``, which also puts the space first wherever it merges spaces. One difference: llama.cpp's converter leaves out
tokens that only tokenizer.json has (``<extra_id_0>``); here they are control tokens under their ids. Where spaces are kept, the
package tokenizers still maps the two letters of a Windows line end as one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qformats.architectures.spm import NORMAL, UNKNOWN, UNUSED, Normalizer, Piece
from qformats.errors import BadFile, Unsupported

__all__ = ["hf_model", "hf_normalizer", "is_unigram_json", "json_normalizer", "json_pieces"]

_ESCAPED = "▁"
_RUNS, _ENDS = " +", "^ +| +$"
_FIRST = r"\A(?= *[^ ])"  # llama.cpp puts the space before the first other letter, and none where there is no other
_MERGING = (_RUNS, " {2,}", r"\s+", r" {2,}")  # patterns of a Replace step that merges spaces
_HARMLESS = ("Strip", "Prepend")  # beside Replace, what a unigram normalizer may be made of


def is_unigram_json(tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether a parsed tokenizer.json holds a unigram model."""
    model = (tokenizer or {}).get("model")
    return isinstance(model, Mapping) and model.get("type") == "Unigram"


def json_pieces(tokenizer: Mapping[str, Any]) -> list[Piece]:
    """The pieces of a unigram tokenizer.json; ``BadFile('tokenizer')`` if broken, ``Unsupported('tokenizer')`` with byte fallback."""
    model = tokenizer["model"]
    if model.get("byte_fallback"):
        raise Unsupported("tokenizer", "a unigram vocabulary with bytes for unknown letters cannot be written to GGUF")
    vocab, unknown = model.get("vocab"), model.get("unk_id")
    pieces: list[Piece] = []
    for number, entry in enumerate(vocab if isinstance(vocab, list) else ()):
        text, score = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if not isinstance(text, str) or not isinstance(score, (int, float)) or isinstance(score, bool):
            raise BadFile("tokenizer", f"tokenizer.json has a piece that is no text with a score: {entry!r}", path="tokenizer.json")
        pieces.append(Piece(text, float(score), UNKNOWN if number == unknown else NORMAL))
    if not pieces:
        raise BadFile("tokenizer", "tokenizer.json has no vocabulary of texts and scores", path="tokenizer.json")
    return pieces


def _steps(section: Any, plural: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences laid out flat."""
    if not isinstance(section, Mapping):
        return
    inner = section.get(plural)
    if section.get("type") == "Sequence" and isinstance(inner, list):
        for part in inner:
            yield from _steps(part, plural)
    else:
        yield section


def json_normalizer(tokenizer: Mapping[str, Any]) -> Normalizer:
    """What a tokenizer.json does before it cuts; ``Unsupported('tokenizer')`` for a step that GGUF has no place for."""
    charsmap, first, merges = b"", False, False
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        kind, pattern = step.get("type"), step.get("pattern")
        text = pattern.get("Regex", pattern.get("String")) if isinstance(pattern, Mapping) else None
        if kind == "Precompiled":
            charsmap = _decoded(step.get("precompiled_charsmap"))
        elif kind == "Replace" and text in (*_MERGING, _ENDS):
            merges = True
        elif kind not in _HARMLESS and not (kind == "Replace" and text in (" ", _FIRST)):
            raise Unsupported("tokenizer", f"a unigram vocabulary behind a normalizer {kind!r} cannot be written to GGUF")
        first = first or kind == "Prepend" or text == _FIRST
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind not in ("WhitespaceSplit", "Metaspace"):
            raise Unsupported("tokenizer", f"a unigram vocabulary behind a pre-tokenizer {kind!r} cannot be written to GGUF")
        merges = merges or kind == "WhitespaceSplit"
        if kind == "Metaspace":
            first = first or step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
    return Normalizer(charsmap, first, merges)


def _decoded(text: Any) -> bytes:
    if text is None:
        return b""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise BadFile("tokenizer", "tokenizer.json has a map of characters that is no base64", path="tokenizer.json") from None


def hf_normalizer(normalizer: Normalizer) -> dict[str, Any]:
    """llama.cpp's normalization as steps of a tokenizer.json."""
    steps: list[dict[str, Any]] = []
    if normalizer.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(normalizer.charsmap).decode()})
    if normalizer.merges_spaces:
        steps += [{"type": "Replace", "pattern": {"Regex": p}, "content": c} for p, c in ((_ENDS, ""), (_RUNS, " "))]
    if normalizer.space_first or normalizer.merges_spaces:
        steps.append({"type": "Replace", "pattern": {"Regex": _FIRST}, "content": " "})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _ESCAPED})
    return {"type": "Sequence", "normalizers": steps}


def hf_model(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], unknown: int | None) -> dict[str, Any]:
    """The model section of tokenizer.json; ids are places, so padding is left out at the end only.

    The cost of an unknown letter follows from the lowest score, in llama.cpp from that of a normal piece: others get none lower.
    """
    end = len(tokens)
    while end and types[end - 1] == UNUSED:
        end -= 1
    lowest = min((score for score, kind in zip(scores, types) if kind == NORMAL), default=0.0)
    plain = (NORMAL, UNUSED)
    vocab = [[t, max(s, lowest) if k in plain else 0.0] for t, s, k in zip(tokens[:end], scores, types)]
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": False}
