"""Vocabularies both ways on tiny tokenizers of the real libraries: the same ids for the same text."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_arch_metadata import CASES, bound, expected_metadata, expected_tensors, load

from qformats.architectures import find, find_gguf, pretokenizers
from qformats.architectures.hf_tokenizer import hf_tokenizer_files
from qformats.architectures.spm import merges_of, read_model, scores_of
from qformats.architectures.tokenizer import looks_special
from qformats.containers.gguf import Metadata, Value
from qformats.errors import BadFile, QFormatError, Unsupported

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "the quick brown fox", " leading and  double   spaces    runs     here", "don't WE'RE it's 12345 3.14",
    "def add(a, b):\n    return a + b\n\n\n\tprint(add(1, 2))", "Zwölf Boxkämpfer Съешь ещё 我想学习中文 こんにちは ไทย हिन्दी العربية",
    "🚀😀👩‍👩‍👧 emoji\u200b zero", "<|im_start|>user\nhi<|im_end|>", "", "\n\n", "a\r\nb\t\tc", "<unk><s> </s>",
]  # fmt: skip
BYTE_LEVEL = ["llama_bpe", "smollm", "qwen2", "qwen3_moe"]


def engine(data: bytes) -> Any:
    return tokenizers.Tokenizer.from_str(data.decode())


@pytest.mark.parametrize("case", BYTE_LEVEL)
def test_a_byte_level_tokenizer_comes_back_with_the_same_ids(case: str) -> None:
    _, files, expected = bound(case)
    made, _ = hf_tokenizer_files(expected_metadata(expected))
    before, after = engine(files["tokenizer.json"]), engine(made["tokenizer.json"])
    for text in TEXTS:
        assert after.encode(text).ids == before.encode(text).ids, text
        ids = before.encode(text, add_special_tokens=False).ids
        assert after.decode(ids, skip_special_tokens=False) == before.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("case", ["mistral_spm", "gemma3"])
def test_a_sentencepiece_tokenizer_comes_back_with_the_same_ids(case: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    _, files, expected = bound(case)
    made, _ = hf_tokenizer_files(expected_metadata(expected))
    before = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    after = engine(made["tokenizer.json"])
    for text in TEXTS:
        if "<" in text or (case == "mistral_spm" and ("  " in text or text.startswith((" ", "\n")) or "\t" in text or "\n" in text)):
            continue  # special texts and SentencePiece's own white-space folding, neither of which llama.cpp has
        assert after.encode(text, add_special_tokens=False).ids == before.encode(text), text


@pytest.mark.parametrize("case", CASES)
def test_the_vocabulary_survives_gguf_hf_gguf(case: str) -> None:
    _, _, expected = load(case)
    wanted = expected_metadata(expected)
    binding = find_gguf(wanted).bind_gguf(wanted, expected_tensors(expected))
    files = binding.hf_files(wanted)
    made = find(binding.config).bind(binding.config).metadata(files)
    types, again = wanted["tokenizer.ggml.token_type"].value, made["tokenizer.ggml.token_type"].value
    assert made["tokenizer.ggml.tokens"].value == wanted["tokenizer.ggml.tokens"].value
    unigram = wanted["tokenizer.ggml.model"].value == "t5"
    assert again == [3 if kind == 2 and not unigram else kind for kind in types]
    unsaid = {"unknown_token_id"} if unigram else set()  # llama.cpp's own default comes back as a key
    for name in {"bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id"} - unsaid:
        assert made.get(f"tokenizer.ggml.{name}") == wanted.get(f"tokenizer.ggml.{name}")
    assert hf_tokenizer_files(made)[0]["tokenizer.json"] == files["tokenizer.json"]


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_files(case: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    _, _, expected = load(case)
    wanted = expected_metadata(expected)
    files = find_gguf(wanted).bind_gguf(wanted, expected_tensors(expected)).hf_files(wanted)
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    plain = engine(files["tokenizer.json"])
    for text in TEXTS:
        assert loaded.encode(text) == plain.encode(text).ids, text
    assert config.vocab_size == len(wanted["tokenizer.ggml.tokens"].value)
    words = {"bos": "cls", "eos": "sep"} if wanted["tokenizer.ggml.model"].value == "bert" else {"bos": "bos", "eos": "eos"}
    for name, word in words.items():
        number = wanted.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None:
            assert getattr(loaded, f"{word}_token_id") == number.value
    if "tokenizer.chat_template" in wanted:
        message = [{"role": "user", "content": "hi"}]
        assert "<|im_start|>user\nhi<|im_end|>" in loaded.apply_chat_template(message, tokenize=False)


def test_named_chat_templates_come_back() -> None:
    _, _, expected = load("mistral_spm")
    made, _ = hf_tokenizer_files(expected_metadata(expected))
    stored = json.loads(made["tokenizer_config.json"])["chat_template"]
    assert [entry["name"] for entry in stored] == ["default", "tool_use"]


def test_template_sources_in_order_of_precedence() -> None:
    binding, files, _ = bound("smollm")
    settings = json.loads(files["tokenizer_config.json"])

    def template(**changes: bytes) -> Any:
        merged = {**files, **{name.replace("__", "."): data for name, data in changes.items()}}
        return binding.metadata(merged)["tokenizer.chat_template"].value

    assert template(chat_template__jinja=b"jinja", chat_template__json=b'{"chat_template": "json"}') == "jinja"
    own = json.dumps({**settings, "chat_template": "own"}).encode()
    assert template(chat_template__jinja=b"jinja", tokenizer_config__json=own) == "own"
    del files["chat_template.jinja"]
    assert template(chat_template__json=b'{"chat_template": "json"}') == "json"


def test_scores_follow_merges_and_give_them_back() -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    scores = scores_of(vocab, merges)
    assert sorted(vocab, key=lambda piece: -scores[piece]) == ["bc", "ab", "abc", "a", "b", "c"]
    assert merges_of(scores, vocab) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def test_the_model_reader_agrees_with_sentencepiece() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    for case in ("mistral_spm", "gemma3"):
        _, files, _ = load(case)
        pieces = read_model(files["tokenizer.model"])
        theirs = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
        assert [piece.text for piece in pieces] == [theirs.IdToPiece(i) for i in range(theirs.vocab_size())]
        assert [piece.score for piece in pieces] == [theirs.GetScore(i) for i in range(theirs.vocab_size())]


@pytest.mark.parametrize("cut", [1, 3, 100, -1])
def test_a_broken_sentencepiece_model(cut: int) -> None:
    binding, files, _ = bound("gemma3")
    with pytest.raises(BadFile) as caught:
        binding.metadata({**files, "tokenizer.model": files["tokenizer.model"][:cut]})
    assert caught.value.code == "tokenizer-model"


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "gpt-4o", "qwen35", "deepseek-v3", "dbrx"])
def test_rules_are_recognised_as_written(pre: str) -> None:
    section = {"pre_tokenizer": pretokenizers.rules_of(pre), "model": {"ignore_merges": pretokenizers.ignores_merges(pre)}}
    assert pretokenizers.pre_from_rules(section) == pre


def test_an_unknown_pre_tokenizer_can_be_named() -> None:
    binding, files, _ = bound("qwen2")
    changed = json.loads(files["tokenizer.json"])
    changed["pre_tokenizer"]["pretokenizers"][0] = {"type": "Whitespace"}
    files["tokenizer.json"] = json.dumps(changed).encode()
    with pytest.raises(Unsupported) as caught:
        binding.metadata(files)
    assert caught.value.code == "pre-tokenizer"
    assert binding.metadata(files, pre="qwen2")["tokenizer.ggml.pre"].value == "qwen2"
    with pytest.raises(Unsupported):
        binding.metadata(files, pre="no-such")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (b"{", "json"), (b"[]", "json"), (b'{"model": {"type": "WordPiece", "vocab": {}}}', "tokenizer"), (b"{}", "tokenizer"),
        (b'{"model": {"type": "BPE", "byte_fallback": true, "vocab": []}}', "tokenizer"),
        (b'{"model": {"type": "BPE", "byte_fallback": true, "vocab": {}, "merges": [[1, 2]]}}', "tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": {"type": "ByteLevel"}}', "tokenizer"),
    ],
)  # fmt: skip
def test_broken_tokenizer_files(damage: bytes, code: str) -> None:
    binding, files, _ = bound("qwen2")
    with pytest.raises((BadFile, Unsupported)) as caught:
        binding.metadata({**files, "tokenizer.json": damage})
    assert caught.value.code == code


def _columns(**changes: Value) -> Metadata:
    made = {
        "model": Value("str", "llama"), "tokens": Value("[str]", ["<unk>", "a"]), "scores": Value("[f32]", [0.0, -1.0]),
        "token_type": Value("[i32]", [2, 1]),
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in {**made, **changes}.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": Value("[str]", [])}, {"token_type": Value("[i32]", [1])}, {"scores": Value("[f32]", [])},
        {"bos_token_id": Value("u32", 9)},
        {"model": Value("str", "gpt2"), "pre": Value("str", "qwen2"), "merges": Value("[str]", ["a b"])},
    ],
)  # fmt: skip
def test_vocabularies_that_contradict_themselves(changes: dict[str, Value]) -> None:
    with pytest.raises(BadFile) as caught:
        hf_tokenizer_files(_columns(**changes))
    assert caught.value.code == "tokenizer"


@pytest.mark.parametrize("changes", [{"model": Value("str", "rwkv")}, {"model": Value("str", "gpt2"), "pre": Value("str", "viking")}])
def test_vocabularies_without_counterpart(changes: dict[str, Value]) -> None:
    with pytest.raises(Unsupported):
        hf_tokenizer_files(_columns(**changes))


def test_tokens_that_look_special() -> None:
    assert [t for t in ("<|x|>", "<unused3>", "<pad>", "<tool_call>", "a") if looks_special(t)] == ["<|x|>", "<unused3>", "<pad>"]


def test_a_subword_prefix_is_refused_before_tokenizers_aborts_on_it() -> None:
    binding, files, _ = bound("qwen2")
    parsed = json.loads(files["tokenizer.json"])
    parsed["model"]["continuing_subword_prefix"] = "x"
    with pytest.raises(Unsupported) as caught:
        binding.metadata({**files, "tokenizer.json": json.dumps(parsed).encode()})
    assert caught.value.code == "tokenizer"


def test_sampling_defaults_of_a_wrong_type_are_left_out() -> None:
    _, _, expected = load("qwen3_moe")
    metadata = {**expected_metadata(expected), "general.sampling.temp": Value("str", "x")}
    files = find_gguf(metadata).bind_gguf(metadata, expected_tensors(expected)).hf_files(metadata)
    generation = json.loads(files["generation_config.json"])
    assert "temperature" not in generation
    assert generation["top_k"] == 20


JUNK: list[Any] = [None, [], {}, "", "x", -1, 0, 1.5, True, [1], {"a": 1}, [["a"]], 1 << 40]


def damaged(node: Any, rng: random.Random) -> Any:
    """A deep copy of ``node`` with one place in it replaced."""
    if not isinstance(node, (dict, list)) or not node or rng.random() < 0.15:
        return rng.choice(JUNK)
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[key] = damaged(node[key], rng)
    return copy


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_damaged_side_files_raise_nothing_but_our_errors(name: str) -> None:
    rng = random.Random(name)
    for number in range(120):
        case = CASES[number % len(CASES)]
        _, files, _ = load(case)
        if name not in files:
            continue
        files[name] = json.dumps(damaged(json.loads(files[name]), rng)).encode()
        parsed = json.loads(files["config.json"])
        with contextlib.suppress(QFormatError):
            if isinstance(parsed, dict):
                find(parsed).bind(parsed).metadata(files)


def test_damaged_metadata_raises_nothing_but_our_errors() -> None:
    rng = random.Random(3)
    values = [Value("str", "x"), Value("u32", 0), Value("u32", 1 << 31), Value("f32", -1.0)]
    values += [Value("[i32]", [1]), Value("bool", True), Value("[str]", [])]
    for number in range(240):
        _, _, expected = load(CASES[number % len(CASES)])
        metadata, tensors = expected_metadata(expected), expected_tensors(expected)
        key = rng.choice(list(metadata))
        metadata[key] = rng.choice(values)
        if rng.random() < 0.3:
            del metadata[rng.choice(list(metadata))]
        with contextlib.suppress(QFormatError):
            binding = find_gguf(metadata).bind_gguf(metadata, tensors)
            binding.hf_files(metadata)
            binding.to_hf({name.rpartition(".")[0]: {"weight": tuple(getattr(t, "shape", t))} for name, t in tensors.items()})


def test_cuts_are_found_alike_by_the_loop_and_in_plain_python() -> None:
    from qformats.architectures import spm

    letters = ["a", "b", "▁", "é", "日", "\U0001f600"]
    pieces = [*letters, *(a + b for a in letters for b in letters), "ab▁é", "日日\U0001f600", "▁▁▁▁", "aéaé", "xa"]
    assert sorted(map(tuple, spm._cuts_of(pieces).tolist())) == sorted(map(tuple, spm._slow_cuts_of(pieces).tolist()))
    assert spm._cuts_of(["a"]).shape == (0, 3)


def test_a_tokenizer_file_is_json_indented_by_one() -> None:
    from qformats.architectures import hf_tokenizer

    model = {"type": "BPE", "vocab": {"a": 0, '"\n': 1, "\0vocab": 2, "é": 3}, "merges": [("a", '"\n'), ("é", "é")]}
    for parsed in ({"model": model, "decoder": None}, {"added": ["\0merges"], "model": model}, {"model": {"vocab": {}, "merges": []}},
                   {"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}):  # fmt: skip
        assert hf_tokenizer._tokenizer_json(parsed) == json.dumps(parsed, ensure_ascii=False, indent=1).encode() + b"\n"


@pytest.mark.parametrize("case", CASES)
def test_a_tokenizer_loaded_at_once_is_the_one_that_its_files_make(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from qformats.architectures.hf_tokenizer import tokenizer_parts
    from qformats.runtime.tokenizer import _from_parts

    _, _, expected = load(case)
    metadata = expected_metadata(expected)
    binding = find_gguf(metadata).bind_gguf(metadata, expected_tensors(expected))
    written, scratch = tmp_path / "written", tmp_path / "scratch"
    written.mkdir()
    scratch.mkdir()
    for name, data in binding.hf_files(metadata).items():
        (written / name).parent.mkdir(exist_ok=True)
        (written / name).write_bytes(data)
    wanted = transformers.AutoTokenizer.from_pretrained(written)
    parsed, files = tokenizer_parts(metadata)
    made = _from_parts(transformers, parsed, {**files, "config.json": binding.hf_configs(metadata)["config.json"]}, scratch, written)
    assert type(made) is type(wanted) and made.special_tokens_map == wanted.special_tokens_map
    assert json.loads(made.backend_tokenizer.to_str()) == json.loads(wanted.backend_tokenizer.to_str())
    assert made.chat_template == wanted.chat_template and made("a text <s>").input_ids == wanted("a text <s>").input_ids
