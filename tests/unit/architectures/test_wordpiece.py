"""WordPiece vocabularies and pooling: spelling both ways, flags, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qformats.architectures import find
from qformats.architectures.bert import pooling_type
from qformats.architectures.hf_tokenizer import hf_tokenizer_files
from qformats.errors import BadFile, Unsupported

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "▁", "a"]
CONFIG = {
    "architectures": ["BertModel"], "vocab_size": 10, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
    "intermediate_size": 8, "max_position_embeddings": 16,
}  # fmt: skip


def side_files(**normalizer: Any) -> dict[str, bytes]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": text, **plain} for i, text in enumerate(TOKENS[:5])]
    around = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    last = {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
    tokenizer = {
        "version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "BertPreTokenizer"},
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True,
                       **normalizer},
        "post_processor": {
            "type": "TemplateProcessing", "single": [*around, last], "pair": [*around, last],
            "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for i, t in ((2, "[CLS]"), (3, "[SEP]"))},
        },
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": {text: i for i, text in enumerate(TOKENS)},
        },
    }  # fmt: skip
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")}
    return {"tokenizer.json": json.dumps(tokenizer).encode(), "tokenizer_config.json": json.dumps(names).encode()}


def test_words_are_marked_where_they_start_and_back() -> None:
    made = find(CONFIG).bind(CONFIG).metadata(side_files(lowercase=False))

    def value(key: str) -> Any:
        return made[f"tokenizer.ggml.{key}"].value

    assert value("tokens") == [*TOKENS[:5], "▁play", "ing", "▁▁", "▁a", "▁[PAD9]"]
    assert (value("model"), value("token_type_count"), value("normalizer.lowercase")) == ("bert", 2, False)
    assert [value(f"{name}_token_id") for name in ("bos", "seperator", "unknown", "padding", "mask")] == [2, 3, 1, 0, 4]
    files, ids = hf_tokenizer_files(made)
    parsed = json.loads(files["tokenizer.json"])
    assert parsed["model"]["vocab"] == {text: i for i, text in enumerate(TOKENS)}
    assert parsed["normalizer"]["lowercase"] is False and ids == {"pad": 0}
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["cls_token"], settings["sep_token"]) == ("[CLS]", "[SEP]")


def test_a_normalizer_without_a_word_in_gguf_is_refused() -> None:
    with pytest.raises(Unsupported):
        find(CONFIG).bind(CONFIG).metadata(side_files(type="Replace", pattern={"String": "a"}, content="b"))


@pytest.mark.parametrize(("config", "wanted"), [({"pooling_mode_mean_tokens": True}, 1), ({"pooling_mode_cls_token": True}, 2),
                                                ({"pooling_mode": "lasttoken"}, 3)])  # fmt: skip
def test_pooling(config: dict[str, Any], wanted: int) -> None:
    files = {"modules.json": b"[]", "1_Pooling/config.json": json.dumps(config).encode()}
    assert pooling_type(files) == wanted
    assert pooling_type({}) is None


def test_pooling_without_a_number_is_refused() -> None:
    with pytest.raises(Unsupported):
        pooling_type({"modules.json": b"[]", "1_Pooling/config.json": b'{"pooling_mode_max_tokens": true}'})
    with pytest.raises(BadFile):
        pooling_type({"modules.json": b"[]", "1_Pooling/config.json": b"[1]"})


def test_pooler_and_heads_are_named_as_dropped() -> None:
    binding = find(CONFIG).bind(CONFIG)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for rule in binding.rules:
        shape = rule.sizes(binding.dims)
        parts["bert." + rule.hf.format(i=0)] = {"weight": shape, **({"bias": shape[:1]} if rule.bias else {})}
    parts["bert.pooler.dense"] = {"weight": (8, 8), "bias": (8,)}
    parts["cls.predictions"] = {"bias": (10,)}
    mapped = binding.to_gguf(parts)
    assert set(mapped.dropped) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.predictions.bias"}
    assert len(mapped.tensors) == 4 + 1 + 16
