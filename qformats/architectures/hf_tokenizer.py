"""Hugging Face tokenizer files from a GGUF vocabulary: plain transformers then gives the ids that llama.cpp gives.

``t5`` becomes a unigram model behind llama.cpp's normalization, ``gpt2`` a byte-level BPE with the named pre-tokenizer's rules,
``llama`` (SentencePiece BPE) a byte-fallback BPE whose merges follow from the scores. Every control and user-defined token becomes
an added token under its own id; ``[PAD…]`` tokens only fill ids up to the model's size and are left out. What a GGUF does not say is
not invented: no Unicode normalizer where llama.cpp applies none.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qformats.architectures import pretokenizers
from qformats.architectures.spm import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Normalizer, merges_of
from qformats.architectures.ugm import hf_model, hf_normalizer
from qformats.architectures.wordpiece import wordpiece_tokenizer
from qformats.errors import BadFile, Unsupported

if TYPE_CHECKING:
    from qformats.containers.gguf import Metadata

__all__ = ["has_vocabulary", "hf_tokenizer_files", "no_collection", "special_ids", "tokenizer_parts"]

_PREFIX = "tokenizer.ggml."
_IDS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "sep": "seperator_token_id",
    "pad": "padding_token_id", "mask": "mask_token_id",
}  # fmt: skip
_UNIGRAM_IDS = {"pad": 0, "eos": 1, "unk": 2}  # llama.cpp's where a file of kind t5 does not say
_WPM_IDS = {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103}  # what llama.cpp assumes of a WordPiece
_PADDING = re.compile(r"\[PAD\d+\]")


_TYPES = {"tokens": "[str]", "merges": "[str]", "token_type": "[i32]", "scores": "[f32]", "model": "str", "pre": "str",
          "precompiled_charsmap": "[u8]"}  # fmt: skip


def _get(metadata: Metadata, key: str, default: Any = None) -> Any:
    stored = metadata.get(_PREFIX + key)
    if stored is None:
        return default
    wanted = _TYPES.get(key, "bool" if key.startswith(("add_", "remove_")) else stored.type)
    if stored.type != wanted and (key, stored.type) not in (("token_type", "[u32]"), ("precompiled_charsmap", "[i8]")):
        raise BadFile("gguf-key", f"{_PREFIX}{key} is of type {stored.type}, expected {wanted}")
    return stored.value


def has_vocabulary(metadata: Metadata) -> bool:
    """Whether a GGUF says anything of a tokenizer."""
    return _get(metadata, "model", "none") not in ("none", "no_vocab")


def hf_tokenizer_files(metadata: Metadata) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Build tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

    Returns (files, token ids by name for config.json). A GGUF without vocabulary gives neither. ``BadFile('tokenizer')`` if the
    columns disagree, ``Unsupported`` for a vocabulary kind or pre-tokenizer that has no counterpart.
    """
    if not has_vocabulary(metadata):
        return {}, {}
    parsed, files = tokenizer_parts(metadata)
    with no_collection():
        return {"tokenizer.json": _tokenizer_json(parsed), **files}, special_ids(metadata)


@contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's search for cycles: it would walk over the hundreds of thousands of pairs made here, again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def tokenizer_parts(metadata: Metadata) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What tokenizer.json holds, as Python objects, and the other files; see ``hf_tokenizer_files``."""
    with no_collection():
        return _parts(metadata, str(_get(metadata, "model", "none")))


def _parts(metadata: Metadata, model: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    tokens = list(_get(metadata, "tokens", ()))
    types = list(_get(metadata, "token_type", [NORMAL] * len(tokens)))
    if not tokens or len(types) != len(tokens):
        raise BadFile("tokenizer", f"the vocabulary has {len(tokens)} tokens and {len(types)} types")
    special = _special_ids(metadata, len(tokens), model)
    if model == "gpt2":
        parsed = _byte_level(metadata, tokens, types)
    elif model == "t5":
        parsed = _unigram(metadata, tokens, types, special.get("unk"))
    elif model == "bert":
        parsed = _wordpiece(metadata, tokens, types, special)
    elif model == "llama":
        parsed = _byte_fallback(metadata, tokens, types, special.get("unk"))
    else:
        raise Unsupported("tokenizer", f"a vocabulary of kind {model!r} cannot be written as tokenizer.json")
    parsed["added_tokens"] = _added_tokens(tokens, types)
    parsed["post_processor"] = _post_processor(metadata, tokens, special, model)
    names = {f"{name}_token": tokens[number] for name, number in special.items()}
    if model == "bert":  # transformers' words for the tokens around a text
        names.update({own: names[usual] for own, usual in (("cls_token", "bos_token"), ("sep_token", "sep_token")) if usual in names})
        names = {name: text for name, text in names.items() if name not in ("bos_token", "eos_token")}
    return parsed, {"special_tokens_map.json": _dump(names), **_settings(metadata, names)}


def special_ids(metadata: Metadata) -> dict[str, Any]:
    """Token ids by name (``bos``, ``eos``, ``pad``) for config.json; ``eos`` is a list where a turn ends with another token."""
    model = _get(metadata, "model", "none")
    if not has_vocabulary(metadata):
        return {}
    ids: dict[str, Any] = dict(_special_ids(metadata, len(_get(metadata, "tokens", ())), model))
    if model == "bert":
        ids = {"pad": ids["pad"]} if "pad" in ids else {}
    if (eot := _get(metadata, "eot_token_id")) is not None and "eos" in ids and eot != ids["eos"]:
        ids["eos"] = [ids["eos"], eot]
    return {name: ids[name] for name in ("bos", "eos", "pad") if name in ids}


def _tokenizer_json(parsed: Mapping[str, Any]) -> bytes:
    """JSON with an indent of 1; a vocabulary and its merges, which are long, without Python's own slow indenting."""
    model = parsed["model"]
    long = {key: model[key] for key in ("vocab", "merges") if isinstance(model.get(key), dict if key == "vocab" else list) and model[key]}
    short = {**parsed, "model": {key: f"\0{key}" if key in long else value for key, value in model.items()}}
    text = json.dumps(short, ensure_ascii=False, indent=1)
    if any(text.count(f'"\\u0000{key}"') != 1 for key in long):  # a token of that name
        return json.dumps(parsed, ensure_ascii=False, indent=1).encode() + b"\n"
    if "vocab" in long:
        inner = json.dumps(long["vocab"], ensure_ascii=False, separators=(",\n   ", ": "))[1:-1]
        text = text.replace('"\\u0000vocab"', f"{{\n   {inner}\n  }}", 1)
    if "merges" in long:
        word = json.encoder.encode_basestring  # type: ignore[attr-defined]
        inner = ",\n   ".join(f"[\n    {word(left)},\n    {word(right)}\n   ]" for left, right in long["merges"])
        text = text.replace('"\\u0000merges"', f"[\n   {inner}\n  ]", 1)
    return text.encode() + b"\n"


def _special_ids(metadata: Metadata, size: int, model: str) -> dict[str, int]:
    defaults = _UNIGRAM_IDS if model == "t5" else {}
    ids = {name: number for name, number in _WPM_IDS.items() if number < size} if model == "bert" else {}
    for name, key in _IDS.items():
        number = _get(metadata, key, defaults.get(name))
        if number is None or number == 0xFFFFFFFF:  # llama.cpp's "no such token"
            continue
        if not isinstance(number, int) or not 0 <= number < size:
            raise BadFile("tokenizer", f"{key} is {number!r}, the vocabulary has {size} tokens")
        ids[name] = number
    return ids


def _vocab(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Text → id, first come first served, without the padding."""
    vocab: dict[str, int] = {}
    for number, (text, kind) in enumerate(zip(tokens, types)):
        if not (kind == UNUSED and _PADDING.fullmatch(text)):
            vocab.setdefault(text, number)
    return vocab


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for number, (text, kind) in enumerate(zip(tokens, types))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and text
    ]  # fmt: skip


def _model(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], **changes: Any) -> dict[str, Any]:
    fixed = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {**fixed, **flags, **changes, "vocab": dict(vocab), "merges": list(merges)}


def _byte_level(metadata: Metadata, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    pre = str(_get(metadata, "pre", "default"))
    rules = pretokenizers.rules_of(pre)
    vocab = _vocab(tokens, types)
    merges: list[tuple[str, str]] = []
    for merge in _get(metadata, "merges", ()):
        left, space, right = merge.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise BadFile("tokenizer", f"the merge {merge!r} joins tokens that are not in the vocabulary")
        merges.append((left, right))
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": rules,
        "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _model(vocab, merges, ignore_merges=pretokenizers.ignores_merges(pre)),
    }  # fmt: skip


def _byte_fallback(metadata: Metadata, tokens: Sequence[str], types: Sequence[int], unknown: int | None) -> dict[str, Any]:
    scores = _scores(metadata, len(tokens))
    vocab = _vocab(tokens, types)
    plain = {text: scores[number] for text, number in vocab.items() if types[number] == NORMAL}
    if unknown is None:
        unknown = next((number for number, kind in enumerate(types) if kind == UNKNOWN), None)
    prefix = bool(_get(metadata, "add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = _model(
        vocab, merges_of(plain, vocab), unk_token=None if unknown is None else tokens[unknown], fuse_unk=True,
        byte_fallback=any(kind == BYTE for kind in types),
    )  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]} if prefix else replace,
        "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "Sequence", "decoders": decoders}, "model": model,
    }  # fmt: skip


def _unigram(metadata: Metadata, tokens: Sequence[str], types: Sequence[int], unknown: int | None) -> dict[str, Any]:
    charsmap = _get(metadata, "precompiled_charsmap", b"")
    normalizer = Normalizer(
        charsmap=bytes(number & 255 for number in charsmap), space_first=bool(_get(metadata, "add_space_prefix", True)),
        merges_spaces=bool(_get(metadata, "remove_extra_whitespaces", False)),
    )  # fmt: skip
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}]
    if normalizer.space_first or normalizer.merges_spaces:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": hf_normalizer(normalizer),
        "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "Sequence", "decoders": decoders},
        "model": hf_model(tokens, _scores(metadata, len(tokens)), types, unknown),
    }  # fmt: skip


def _scores(metadata: Metadata, size: int) -> list[float]:
    scores = list(_get(metadata, "scores", ()))
    if len(scores) != size:
        raise BadFile("tokenizer", f"the vocabulary has {size} tokens and {len(scores)} scores")
    return scores


def _wordpiece(metadata: Metadata, tokens: Sequence[str], types: Sequence[int], special: Mapping[str, int]) -> dict[str, Any]:
    if "unk" not in special:
        raise BadFile("tokenizer", "the vocabulary has no token for unknown words")
    flags = {name: _get(metadata, f"normalizer.{name}") for name in ("lowercase", "strip_accents")}
    given = {name: bool(flag) for name, flag in flags.items() if flag is not None}
    return wordpiece_tokenizer(tokens, types, tokens[special["unk"]], given)


def _adds(metadata: Metadata, model: str) -> tuple[bool, bool]:
    """Whether llama.cpp puts the begin and the end token around a text."""
    default = model == "llama" or pretokenizers.adds_bos(str(_get(metadata, "pre", "default")))
    return bool(_get(metadata, "add_bos_token", default)), bool(_get(metadata, "add_eos_token", model == "t5"))


def _post_processor(metadata: Metadata, tokens: Sequence[str], special: Mapping[str, int], model: str) -> dict[str, Any] | None:
    bos, eos = _adds(metadata, model)
    ends = ("bos", "sep") if model == "bert" else ("bos", "eos")
    first = [special[ends[0]]] if (bos or model == "bert") and ends[0] in special else []
    last = [special[ends[1]]] if (eos or model == "bert") and ends[1] in special else []
    if not first and not last:
        return None if model != "gpt2" else {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}

    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        around = [[{"SpecialToken": {"id": tokens[n], "type_id": type_id}} for n in side] for side in (first, last)]
        return [*around[0], {"Sequence": {"id": name, "type_id": type_id}}, *around[1]]

    return {
        "type": "TemplateProcessing", "single": sequence("A", 0), "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {tokens[n]: {"id": tokens[n], "ids": [n], "tokens": [tokens[n]]} for n in (*first, *last)},
    }  # fmt: skip


def _settings(metadata: Metadata, names: Mapping[str, str]) -> dict[str, bytes]:
    """tokenizer_config.json, and chat_template.jinja where there is just one template."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    for name in ("bos", "eos"):
        if (flag := _get(metadata, f"add_{name}_token")) is not None:
            settings[f"add_{name}_token"] = bool(flag)
    template = metadata.get("tokenizer.chat_template")
    stem = "tokenizer.chat_template."
    named = [(key[len(stem) :], stored.value) for key, stored in metadata.items() if key.startswith(stem)]
    if named:
        first = [] if template is None else [("default", template.value)]
        settings["chat_template"] = [{"name": name, "template": text} for name, text in (*first, *named)]
    made = {"tokenizer_config.json": _dump(settings)}
    if template is not None and not named:
        made["chat_template.jinja"] = str(template.value).encode()
    return made


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
