"""A checkpoint's tokenizer files as GGUF keys (``tokenizer.ggml.*``), by llama.cpp's rules. The only importer of ``tokenizers``.

Three kinds of vocabulary: ``t5`` (unigram, see ``ugm``), ``gpt2`` (byte-level BPE out of tokenizer.json: tokens, types, merges,
pre-tokenizer's name) and ``llama``
(SentencePiece BPE out of tokenizer.model, or out of a byte-fallback tokenizer.json: tokens, scores, types). Facts: llama.cpp,
``conversion/base.py`` ``get_vocab_base``, ``_create_vocab_sentencepiece``, ``does_token_look_special``. One difference: where there is no
tokenizer.model llama.cpp writes −1000 as every score, which loses the order of merges; here scores follow the merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qformats.architectures import pretokenizers
from qformats.architectures.metadata import json_file
from qformats.architectures.pretokenizer_hashes import CHECK_TEXT
from qformats.architectures.special import KEYS, merges_as_text, read_special, token_content
from qformats.architectures.spm import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    is_unigram,
    read_model,
    read_unigram,
    scores_of,
)  # fmt: skip
from qformats.architectures.ugm import is_unigram_json, json_normalizer, json_pieces
from qformats.architectures.wordpiece import PRE, is_wordpiece, normalizer_flags, phantom
from qformats.errors import BadFile, Unsupported

if TYPE_CHECKING:
    from qformats.architectures.binding import Binding
    from qformats.containers.gguf import Metadata

__all__ = ["looks_special", "tokenizer_metadata"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPECIAL_TEXTS = frozenset(("<pad>", "<mask>", "<2mass>", "[@BOS@]"))
_SPECIAL_FORMS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0
_GRANITE_VOCABULARY = 49152  # llama.cpp switches the begin token off for llama vocabularies of just this size
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def looks_special(text: str) -> bool:
    """Whether llama.cpp takes a token for a control token by its text alone."""
    return text in _SPECIAL_TEXTS or any(text.startswith(a) and text.endswith(b) for a, b in _SPECIAL_FORMS)


def tokenizer_metadata(binding: Binding, files: Mapping[str, bytes] | None, pre: str | None) -> Metadata:
    """Build the tokenizer keys; ``BadFile`` if files are missing or broken, ``Unsupported`` for a kind GGUF has no word for.

    ``files`` None: a model without vocabulary (``tokenizer.ggml.model`` is ``none``).
    """
    from qformats.containers.gguf import Value

    if files is None:
        return {"tokenizer.ggml.model": Value("str", "none")}
    tokenizer = json_file(files, "tokenizer.json")
    spm = "tokenizer.model" if "tokenizer.model" in files else "spiece.model"
    if tokenizer is None and spm not in files:
        raise BadFile("missing-tokenizer", "there is neither tokenizer.json nor tokenizer.model", hint="fetch the tokenizer files")
    made: Metadata = {}
    settings = json_file(files, "tokenizer_config.json") or {}
    prefix = settings.get("add_prefix_space")
    if binding.architecture.llama_vocabulary and isinstance(prefix, bool):
        made["tokenizer.ggml.add_space_prefix"] = Value("bool", prefix)
    if is_unigram_json(tokenizer) or (tokenizer is None and is_unigram(files[spm])):
        made.update(_from_unigram(binding, files, tokenizer, files.get(spm)))
    elif "tokenizer.model" in files and (tokenizer is None or files["tokenizer.model"][:1] == b"\n"):
        made.update(_from_model(binding, files, tokenizer, settings))
    elif tokenizer is not None and is_wordpiece(tokenizer):
        made.update(_from_wordpiece(binding, files, tokenizer, settings, pre))
    elif tokenizer is not None and _is_byte_fallback(tokenizer):
        made.update(_from_byte_fallback(binding, files, tokenizer))
    elif tokenizer is not None and _is_byte_level(tokenizer):
        made.update(_from_byte_level(binding, files, tokenizer, settings, pre))
    else:
        model = (tokenizer or {}).get("model")
        kind = model.get("type") if isinstance(model, Mapping) else model
        known = "BPE, SentencePiece BPE, unigram and WordPiece can"
        raise Unsupported("tokenizer", f"a tokenizer of type {kind!r} cannot be written to GGUF", hint=known)
    if binding.architecture.llama_vocabulary and binding.dims["T"] == _GRANITE_VOCABULARY:
        made["tokenizer.ggml.add_bos_token"] = Value("bool", False)
    tokens = made["tokenizer.ggml.tokens"].value
    for word, token in binding.architecture.token_ids.items():
        number = token if isinstance(token, int) else (tokens.index(token) if token in tokens else len(tokens))
        if number < len(tokens):
            made.setdefault(f"tokenizer.ggml.{KEYS.get(word, word)}_token_id", Value("u32", number))
    if binding.architecture.adds_bos is not None:
        made.setdefault("tokenizer.ggml.add_bos_token", Value("bool", binding.architecture.adds_bos))
    if binding.architecture.spm_from_json and made["tokenizer.ggml.model"].value == "llama":
        made["tokenizer.ggml.add_space_prefix"] = Value("bool", False)
    return made


def _vocab(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    vocab = tokenizer.get("model", {}).get("vocab") if isinstance(tokenizer.get("model"), Mapping) else None
    if not isinstance(vocab, dict) or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise BadFile("tokenizer", "tokenizer.json has no vocabulary of texts and ids", path="tokenizer.json")
    return vocab


def _added(tokenizer: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    added = (tokenizer or {}).get("added_tokens") or []
    for token in added if isinstance(added, list) else [added]:
        number, content = (token.get("id"), token.get("content")) if isinstance(token, dict) else (None, None)
        if not isinstance(number, int) or number < 0 or not isinstance(content, str):
            raise BadFile("tokenizer", f"tokenizer.json has an added token without id or text: {token!r}", path="tokenizer.json")
    return list(added)


def _is_byte_fallback(tokenizer: Mapping[str, Any]) -> bool:
    model = tokenizer.get("model")
    return isinstance(model, Mapping) and model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    model = tokenizer.get("model")
    return isinstance(model, Mapping) and model.get("type", "BPE") == "BPE" and '"ByteLevel"' in json.dumps(tokenizer.get("pre_tokenizer"))


class _Table:
    """The three columns of a vocabulary of ``size`` tokens, all ``[PAD…]`` at first."""

    def __init__(self, size: int) -> None:
        self.texts = [f"[PAD{i}]" for i in range(size)]
        self.scores = [_PADDING_SCORE] * size
        self.types = [UNUSED] * size

    def put(self, number: int, text: str, score: float, kind: int) -> None:
        """Set one row; rows beyond the model's vocabulary are left out, as llama.cpp does."""
        if number < len(self.texts):
            self.texts[number], self.scores[number], self.types[number] = text, score, kind

    def put_added(self, number: int, text: str, special: bool) -> None:
        if special or looks_special(text):
            self.put(number, text, _ADDED_SCORE, CONTROL)
        else:
            self.put(number, text.replace("▁", " "), _ADDED_SCORE, USER_DEFINED)

    def metadata(self, model: str, pre: str) -> Metadata:
        from qformats.containers.gguf import Value

        made: Metadata = {
            "tokenizer.ggml.model": Value("str", model),
            "tokenizer.ggml.pre": Value("str", pre),
            "tokenizer.ggml.tokens": Value("[str]", self.texts),
        }
        if model in ("llama", "t5"):
            made["tokenizer.ggml.scores"] = Value("[f32]", self.scores)
        made["tokenizer.ggml.token_type"] = Value("[i32]", self.types)
        return made


def _from_model(
    binding: Binding, files: Mapping[str, bytes], tokenizer: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> Metadata:
    """SentencePiece from ``tokenizer.model``, then added tokens over it."""
    table = _Table(binding.dims["T"])
    for number, piece in enumerate(read_model(files["tokenizer.model"])):
        table.put(number, piece.text, piece.score, piece.type)
    for text, number in (json_file(files, "added_tokens.json") or {}).items():
        if isinstance(number, int) and number >= 0:
            table.put(number, text, _ADDED_SCORE, USER_DEFINED)
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        for key, token in decoder.items():
            content = token_content(token)
            if content is not None and str(key).isdecimal():
                table.put_added(int(key), content, isinstance(token, Mapping) and bool(token.get("special")))
    else:
        for token in _added(tokenizer):
            table.put_added(token["id"], token["content"], bool(token.get("special")))
    return _spm_metadata(binding, files, table, prefix=None)


def _from_byte_fallback(binding: Binding, files: Mapping[str, bytes], tokenizer: Mapping[str, Any]) -> Metadata:
    """SentencePiece from a byte-fallback BPE ``tokenizer.json``: scores from the order of its merges."""
    vocab, model = _vocab(tokenizer), tokenizer["model"]
    added = {token["content"] for token in _added(tokenizer)}
    plain = {text: i for text, i in vocab.items() if text not in added and not _BYTE_TOKEN.fullmatch(text)}
    scores = scores_of(plain, _pairs(model.get("merges")))
    table = _Table(binding.dims["T"])
    for text, number in vocab.items():
        if _BYTE_TOKEN.fullmatch(text):
            table.put(number, text, 0.0, BYTE)
        else:
            table.put(number, text, scores.get(text, _ADDED_SCORE), UNKNOWN if text == model.get("unk_token") else NORMAL)
    for token in _added(tokenizer):
        table.put_added(token["id"], token["content"], bool(token.get("special")))
    normalizer = json.dumps(tokenizer.get("normalizer")) + json.dumps(tokenizer.get("pre_tokenizer"))
    prefix = '"Prepend"' in normalizer or ('"Metaspace"' in normalizer and '"never"' not in normalizer)
    return _spm_metadata(binding, files, table, prefix)


def _from_unigram(
    binding: Binding, files: Mapping[str, bytes], tokenizer: Mapping[str, Any] | None, model: bytes | None
) -> Metadata:
    """Unigram pieces out of tokenizer.json, or out of the SentencePiece model alone, then added tokens over them."""
    from qformats.containers.gguf import Value

    if tokenizer is None:
        assert model is not None
        pieces, normalizer = read_unigram(model)
    else:
        pieces, normalizer = json_pieces(tokenizer), json_normalizer(tokenizer)
    table = _Table(binding.dims["T"])
    for number, piece in enumerate(pieces):
        table.put(number, piece.text, piece.score, piece.type)
    for token in _added(tokenizer):
        known = token["id"] < len(table.types) and table.types[token["id"]] == UNKNOWN
        if not known:
            table.put_added(token["id"], token["content"], bool(token.get("special")))
    made = table.metadata("t5", "default")
    made["tokenizer.ggml.add_space_prefix"] = Value("bool", normalizer.space_first)
    made["tokenizer.ggml.remove_extra_whitespaces"] = Value("bool", normalizer.merges_spaces)
    if normalizer.charsmap:
        made["tokenizer.ggml.precompiled_charsmap"] = Value("[u8]", normalizer.charsmap)
    made.update(read_special(files, binding.config, len(table.texts)).metadata())
    return made


def _pairs(merges: Any) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for merge in merges if isinstance(merges, list) else []:
        parts = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise BadFile("tokenizer", f"tokenizer.json has a merge that is no pair of texts: {merge!r}", path="tokenizer.json")
        pairs.append((parts[0], parts[1]))
    return pairs


def _spm_metadata(binding: Binding, files: Mapping[str, bytes], table: _Table, prefix: bool | None) -> Metadata:
    from qformats.containers.gguf import Value

    made = table.metadata("llama", "default")
    made.update(read_special(files, binding.config, len(table.texts)).metadata())
    if prefix is not None and not binding.architecture.spm_from_json:
        made["tokenizer.ggml.add_space_prefix"] = Value("bool", prefix)
    return made


def _from_byte_level(
    binding: Binding, files: Mapping[str, bytes], parsed: Mapping[str, Any], settings: Mapping[str, Any], pre: str | None
) -> Metadata:
    """Byte-level BPE: tokens as stored, added ones as the tokenizer itself decodes them."""
    from qformats.containers.gguf import Value

    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if parsed["model"].get(name):
            raise Unsupported("tokenizer", f"a byte-level BPE with {name} cannot be written to GGUF")
    table, engine = _as_stored(binding, files, parsed, settings)
    made = table.metadata("gpt2", pre_name(engine, parsed, pre))
    merges = merges_as_text(parsed["model"].get("merges"))
    if merges:
        made["tokenizer.ggml.merges"] = Value("[str]", merges)
    made.update(read_special(files, binding.config, None).metadata())
    return made


def _from_wordpiece(
    binding: Binding, files: Mapping[str, bytes], parsed: Mapping[str, Any], settings: Mapping[str, Any], pre: str | None
) -> Metadata:
    """WordPiece: tokens as stored, spelled by where words start."""
    from qformats.containers.gguf import Value

    flags = normalizer_flags(parsed)
    table, _ = _as_stored(binding, files, parsed, settings)
    table.texts = [phantom(text, kind) for text, kind in zip(table.texts, table.types, strict=True)]
    types = binding.full.get("type_vocab_size", 1)
    made: Metadata = {"tokenizer.ggml.token_type_count": Value("u32", types), **table.metadata("bert", PRE if pre is None else pre)}
    made.update(read_special(files, binding.config, len(table.texts)).metadata())
    made.update({f"tokenizer.ggml.normalizer.{name}": Value("bool", flag) for name, flag in flags.items()})
    return made


def _as_stored(
    binding: Binding, files: Mapping[str, bytes], parsed: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[_Table, Any]:
    """The vocabulary as it stands in tokenizer.json, added tokens as the tokenizer itself decodes them; and the tokenizer."""
    engine = _engine(files["tokenizer.json"])
    vocab, added = _vocab(parsed), {token["id"]: token for token in _added(parsed)}
    size = binding.dims["T"]
    for name in _TOKEN_NAMES:  # transformers makes an added token of every special token it is told of
        content = token_content(settings.get(name))
        if content in vocab and vocab[content] not in added:
            added[vocab[content]] = {"content": content, "special": True, "normalized": True}
    highest = max((-1, *vocab.values(), *added))
    if highest >= size:
        raise BadFile("tokenizer", f"the tokenizer has id {highest}, the model has {size} tokens", path="tokenizer.json")
    table = _Table(size)
    for text, number in vocab.items():
        table.put(number, text, 0.0, NORMAL)
    for number, token in added.items():
        text = token["content"]
        if not token.get("normalized"):
            text = engine.decode(engine.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        table.put_added(number, text, bool(token.get("special")))
    return table, engine


def _engine(data: bytes) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise Unsupported("tokenizer", "the package 'tokenizers' is needed for a byte-level BPE", hint="install it") from None
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # the package raises bare Exception for every broken file
        raise BadFile("tokenizer", f"cannot be read by tokenizers: {error}", path="tokenizer.json") from None


def pre_name(engine: Any, parsed: Mapping[str, Any], named: str | None) -> str:
    """llama.cpp's name for the pre-tokenizer: as told, else by the check text's hash, else by its rules."""
    if named is not None:
        if named not in pretokenizers.known_names():
            raise Unsupported("pre-tokenizer", f"llama.cpp has no pre-tokenizer {named!r}")
        return named
    for with_special in (True, False):
        found = pretokenizers.pre_from_ids(engine.encode(CHECK_TEXT, add_special_tokens=with_special).ids)
        if found is not None:
            return found
    found = pretokenizers.pre_from_rules(parsed)
    if found is None:
        raise Unsupported("pre-tokenizer", "the pre-tokenizer is none that llama.cpp knows", hint="name one that fits with pre=NAME")
    return found
