"""Pre-tokenizers of byte-level BPE: recognise llama.cpp's name for one, and write one as a ``tokenizer.json`` section.

llama.cpp knows a pre-tokenizer by name (``tokenizer.ggml.pre``), Hugging Face by its splitting rules. A name is found by the hash of
a check text (``pretokenizer_hashes``), else by the rules themselves. Facts: llama.cpp commit 0c1e57098, ``src/llama-vocab.cpp``
(``llm_tokenizer_bpe``: the original patterns are quoted there beside llama.cpp's own).
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from qformats.architectures.pretokenizer_hashes import HASHES
from qformats.errors import Unsupported

__all__ = ["adds_bos", "ignores_merges", "known_names", "pre_from_ids", "pre_from_rules", "rules_of"]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
_TEKKEN = _LOWER_WORD + "|" + _UPPER_WORD + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_GPT4O = (
    _LOWER_WORD + _CONTRACTIONS + "?|" + _UPPER_WORD + _CONTRACTIONS + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    + "\r\n"
    + r"""\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["""
    + "\r\n"
    + r"]*|\s*["
    + "\r\n"
    + r"]+|\s+(?!\S)|\s+",
)
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"  # without the nested brackets of the original, which mean the same
_BYTE_LEVEL = "byte-level"  # the rule GPT-2's own pattern, built into the ByteLevel step
_DIGITS = "digits"

# rules → names; the first name is written for rules that no hash knows. Steps: a pattern, _DIGITS, or _BYTE_LEVEL at the end
_RULES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    ((_LLAMA3,), ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")),
    ((_LLAMA3,), ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe")),
    ((_QWEN2,), ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2")),
    ((_QWEN35,), ("qwen35",)),
    ((_TEKKEN,), ("tekken",)),
    ((_GPT4O,), ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")),
    (_DEEPSEEK3, ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4")),
    ((_BLOOM,), ("bloom", "poro-chat", "gpt3-finnish")),
    ((_DIGITS, _BYTE_LEVEL), ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2")),
    (
        (_BYTE_LEVEL,),
        ("gpt-2", "mpt", "olmo", "jais", "phi-2", "gigachat", "a.x-4.0", "mellum", "modern-bert", "exaone4", "trillion", "granite-docling"),
    ),
)
# llama.cpp takes a whole word that is a token without merging for these
_IGNORE_MERGES = frozenset((*_RULES[0][1], "tekken", "minicpm5", "youtu", "granite-embed-multi-97m"))


def known_names() -> frozenset[str]:
    """Every name this library can write."""
    return frozenset(HASHES.values()) | {name for _, names in _RULES for name in names}


def ignores_merges(pre: str) -> bool:
    """Whether llama.cpp looks whole words up before merging."""
    return pre in _IGNORE_MERGES


def adds_bos(pre: str) -> bool:
    """Whether llama.cpp puts the begin token first when the file does not say."""
    return pre in _RULES[0][1] or pre in ("tekken", "chameleon")


def pre_from_ids(ids: list[int]) -> str | None:
    """Look up the pre-tokenizer by the ids of the check text."""
    return HASHES.get(sha256(str(ids).encode()).hexdigest())


def pre_from_rules(tokenizer: Mapping[str, Any]) -> str | None:
    """Recognise the rules of a parsed ``tokenizer.json``; None if they are none of ours."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    merges = not tokenizer.get("model", {}).get("ignore_merges", False)
    for rules, names in _RULES:
        if steps == rules and (len(rules) > 1 or rules[0] != _LLAMA3 or merges != ignores_merges(names[0])):
            return names[0]
    return None


def _steps(section: Any) -> tuple[str, ...] | None:
    """Reduce a ``pre_tokenizer`` section to the steps of the table, or None where one is unknown."""
    if not isinstance(section, Mapping):
        return None
    parts = section.get("pretokenizers") if section.get("type") == "Sequence" else [section]
    steps: list[str] = []
    for part in parts if isinstance(parts, list) else []:
        kind = part.get("type") if isinstance(part, Mapping) else None
        pattern = part.get("pattern") if isinstance(part, Mapping) else None
        if kind == "Split" and isinstance(pattern, Mapping) and part.get("behavior") == "Isolated" and not part.get("invert"):
            steps.append(str(pattern.get("Regex")))
        elif kind == "Digits" and part.get("individual_digits"):
            steps.append(_DIGITS)
        elif kind == "ByteLevel" and not part.get("add_prefix_space"):
            steps.extend([_BYTE_LEVEL] if part.get("use_regex", True) else [])
        else:
            return None
    return tuple(steps)


def rules_of(pre: str) -> dict[str, Any]:
    """Write the ``pre_tokenizer`` section for a name; ``Unsupported('pre-tokenizer')`` where Hugging Face has no such rules here."""
    found = next((rules for rules, names in _RULES if pre in names), None)
    if found is None:
        raise Unsupported(
            "pre-tokenizer",
            f"the vocabulary is split by llama.cpp's pre-tokenizer {pre!r}, which cannot be written as tokenizer.json",
            hint="take the tokenizer files of the original model",
        )
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": found[-1] == _BYTE_LEVEL}
    steps: list[dict[str, Any]] = []
    for step in found:
        if step == _DIGITS:
            steps.append({"type": "Digits", "individual_digits": True})
        elif step != _BYTE_LEVEL:
            steps.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": [*steps, last]} if steps else last
