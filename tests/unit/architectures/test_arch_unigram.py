"""Unigram vocabularies: steps before the pieces, and what a GGUF has no place for."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from qformats.architectures import find
from qformats.architectures.hf_tokenizer import hf_tokenizer_files
from qformats.architectures.spm import NORMAL, UNKNOWN, UNUSED, Normalizer, is_unigram, read_unigram
from qformats.architectures.ugm import hf_model, hf_normalizer, json_normalizer
from qformats.containers.gguf import Value
from qformats.errors import BadFile, QFormatError, Unsupported

MODEL = Path(__file__).resolve().parents[3] / "fixtures" / "architectures" / "t5" / "spiece.model"
CONFIG: dict[str, Any] = {"architectures": ["T5ForConditionalGeneration"], "vocab_size": 8, "d_model": 16, "num_heads": 2, "d_kv": 8}
PIECES = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁", -2.0], ["a", -3.0]]


def tokenizer(**changes: Any) -> dict[str, bytes]:
    model = {"type": "Unigram", "unk_id": 2, "vocab": PIECES, "byte_fallback": False}
    parsed = {"normalizer": None, "pre_tokenizer": None, "added_tokens": [], "model": model, **changes}
    return {"tokenizer.json": json.dumps(parsed).encode()}


def test_a_unigram_model_is_read_with_its_normalizer() -> None:
    pieces, normalizer = read_unigram(MODEL.read_bytes())
    assert is_unigram(MODEL.read_bytes())
    assert [(piece.text, piece.type) for piece in pieces[2:3]] == [("<unk>", UNKNOWN)]
    assert len(pieces) > 100 and len(normalizer.charsmap) > 16 and normalizer.space_first and normalizer.merges_spaces


@pytest.mark.parametrize("first", [False, True])
def test_normalizers_come_back_from_their_steps(first: bool) -> None:
    for normalizer in (Normalizer(b"abcd", first, False), Normalizer(b"", True, True)):
        assert json_normalizer({"normalizer": hf_normalizer(normalizer)}) == normalizer


def test_the_steps_of_transformers_own_tokenizer() -> None:
    charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"abcd").decode()}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    steps = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}
    assert json_normalizer({"normalizer": charsmap, "pre_tokenizer": steps}) == Normalizer(b"abcd", True, True)


def test_added_tokens_become_control_tokens_and_padding_is_left_out() -> None:
    added = [{"id": 5, "content": "<extra_id_0>", "special": True}, {"id": 2, "content": "<unk>", "special": True}]
    made = find(CONFIG).bind(CONFIG).metadata(tokenizer(added_tokens=added))
    assert made["tokenizer.ggml.model"].value == "t5"
    assert made["tokenizer.ggml.tokens"].value[5:] == ["<extra_id_0>", "[PAD6]", "[PAD7]"]
    assert made["tokenizer.ggml.token_type"].value[2:] == [2, 1, 1, 3, 5, 5]
    again = json.loads(hf_tokenizer_files(made)[0]["tokenizer.json"])
    assert again["model"]["vocab"] == [*PIECES, ["<extra_id_0>", 0.0]]
    assert [token["id"] for token in again["added_tokens"]] == [2, 5]
    assert again["post_processor"]["single"][-1] == {"SpecialToken": {"id": "</s>", "type_id": 0}}  # llama.cpp's default end token


def test_padding_between_pieces_costs_no_more_than_they_do() -> None:
    made = hf_model(["a", "[PAD1]", "b", "[PAD3]"], [-1.0, -10000.0, -2.0, -10000.0], [NORMAL, UNUSED, NORMAL, UNUSED], None)
    assert made["vocab"] == [["a", -1.0], ["[PAD1]", -2.0], ["b", -2.0]]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"normalizer": {"type": "Lowercase"}}, Unsupported), ({"pre_tokenizer": {"type": "ByteLevel"}}, Unsupported),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, BadFile),
        ({"model": {"type": "Unigram", "vocab": PIECES, "byte_fallback": True}}, Unsupported),
        ({"model": {"type": "Unigram", "vocab": [["a"]]}}, BadFile), ({"model": {"type": "Unigram", "vocab": {}}}, BadFile),
    ],
)  # fmt: skip
def test_what_a_gguf_has_no_place_for(changes: dict[str, Any], kind: type[QFormatError]) -> None:
    with pytest.raises(kind) as caught:
        find(CONFIG).bind(CONFIG).metadata(tokenizer(**changes))
    assert caught.value.code == "tokenizer"


def test_scores_that_are_missing() -> None:
    metadata = {"tokenizer.ggml.model": Value("str", "t5"), "tokenizer.ggml.tokens": Value("[str]", ["a", "b", "c"])}
    with pytest.raises(BadFile, match="3 tokens and 0 scores"):
        hf_tokenizer_files(metadata)


@pytest.mark.parametrize(
    "changes", [{"num_decoder_layers": 9}, {"feed_forward_proj": "gated-silu"}, {"relative_attention_max_distance": 64}]
)
def test_a_t5_that_llama_cpp_would_not_compute(changes: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as caught:
        find(CONFIG).bind({**CONFIG, **changes})
    assert caught.value.code == "config-value"


def test_the_first_t5_carries_its_factor_in_the_last_norm() -> None:
    later = [{**CONFIG, name: False} for name in ("tie_word_embeddings", "scale_decoder_outputs")]
    for config, factor in ((CONFIG, 0.25), *((config, 1.0) for config in later)):
        rule = next(rule for rule in find(config).bind(config).rules if rule.gguf == "dec.output_norm")
        assert rule.factor == factor
