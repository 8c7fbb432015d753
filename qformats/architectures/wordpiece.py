"""WordPiece vocabularies: a ``tokenizer.json`` ↔ GGUF's ``bert`` model, which marks the start of a word, not its continuation.

HF's ``##ing`` is ``ing`` in GGUF, its ``ing`` is ``▁ing``; special tokens stay as they are (llama.cpp, ``conversion/bert.py``
``set_vocab``; ``src/llama-vocab.cpp`` ``llm_tokenizer_wpm_session`` cleans the text, splits at spaces, punctuation and Chinese characters,
lowercases and strips accents as the ``tokenizer.ggml.normalizer`` keys say, by default both, and takes the longest piece each time). Where
accents are stripped it neither takes Hangul apart nor keeps spacing vowel signs, as transformers does: such words differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qformats.architectures.spm import CONTROL, UNUSED
from qformats.errors import Unsupported

__all__ = ["PRE", "is_wordpiece", "normalizer_flags", "phantom", "wordpiece_tokenizer"]

PRE = "bert-bge"  # llama.cpp's name for a WordPiece; it computes the same whatever the name
_SPACE = "▁"
_PREFIX = "##"


def is_wordpiece(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a parsed ``tokenizer.json`` is a WordPiece."""
    model = tokenizer.get("model")
    return isinstance(model, Mapping) and model.get("type") == "WordPiece"


def phantom(text: str, kind: int) -> str:
    """A token's text in a GGUF.

    >>> phantom("##ing", 1), phantom("ing", 1), phantom("[CLS]", 3)
    ('ing', '▁ing', '[CLS]')
    """
    if kind == CONTROL:
        return text
    return text[len(_PREFIX) :] if text.startswith(_PREFIX) else _SPACE + text


def normalizer_flags(tokenizer: Mapping[str, Any]) -> dict[str, bool]:
    """``lowercase`` and ``strip_accents`` where the normalizer says so; ``Unsupported`` for steps that llama.cpp has no word for."""
    prefix = tokenizer["model"].get("continuing_subword_prefix", _PREFIX)
    if prefix != _PREFIX:
        raise Unsupported("tokenizer", f"a WordPiece with the prefix {prefix!r} cannot be written to GGUF")
    section = tokenizer.get("normalizer")
    flags: dict[str, bool] = {"lowercase": False} if section is None else {}
    steps = section.get("normalizers", [section]) if isinstance(section, Mapping) else []
    for step in steps if isinstance(steps, list) else []:
        kind = step.get("type") if isinstance(step, Mapping) else None
        if kind == "BertNormalizer":
            flags.update({name: step[name] for name in ("lowercase", "strip_accents") if isinstance(step.get(name), bool)})
        elif kind == "Lowercase":
            flags["lowercase"] = True
        elif kind == "StripAccents":
            flags["strip_accents"] = True
        elif kind not in ("NFD", "NFC", "NFKC", "NFKD"):
            raise Unsupported("tokenizer", f"a WordPiece with the normalizer {kind!r} cannot be written to GGUF")
    return flags


def _plain(text: str, kind: int) -> str:
    """The inverse of ``phantom``."""
    if kind == CONTROL:
        return text
    return text[len(_SPACE) :] if text.startswith(_SPACE) else _PREFIX + text


def wordpiece_tokenizer(tokens: Sequence[str], types: Sequence[int], unknown: str, flags: Mapping[str, bool]) -> dict[str, Any]:
    """A ``tokenizer.json`` without added tokens and post-processor; ``flags`` as the GGUF has them, llama.cpp's defaults elsewhere."""
    vocab: dict[str, int] = {}
    for number, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != UNUSED:
            vocab.setdefault(_plain(text, kind), number)
    lowercase = flags.get("lowercase", True)
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
            "strip_accents": flags.get("strip_accents", lowercase), "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": _PREFIX, "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": _PREFIX, "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }  # fmt: skip
