"""T5 in llama.cpp and in transformers: unigram vocabularies, and the same logits behind the same encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop
from running import assert_same_logits
from test_tokenizers import TEXTS, differences, write_vocabulary
from text import calibration_texts, evaluation_text

from qformats.architectures import find
from qformats.architectures.hf_tokenizer import hf_tokenizer_files
from qformats.architectures.metadata import SIDE_FILES
from qformats.architectures.spm import read_unigram

pytestmark = pytest.mark.real
WORDS = TEXTS[4:13]  # letters of several scripts
SIZES: dict[str, Any] = {"d_model": 64, "d_kv": 24, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "t5-v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5": {"num_decoder_layers": 1},
}
# what SentencePiece does to a text before it cuts it
NORMALIZERS: dict[str, dict[str, Any]] = {
    "nmt_nfkc": {}, "nfkc_casefold": {"normalization_rule_name": "nmt_nfkc_cf"},
    "spaces-kept": {"remove_extra_whitespaces": False}, "no-space-first": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
}  # fmt: skip


def vocabulary(folder: Path, **options: Any) -> Any:
    """(T5 tokenizer, SentencePiece's own) over a unigram model trained on English prose and a few words of other scripts."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import T5Tokenizer

    text = folder / "text"
    text.write_text("\n".join([*calibration_texts(60), *WORDS * 3]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spiece"), vocab_size=900, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        character_coverage=0.999, minloglevel=2, **options,
    )  # fmt: skip
    engine = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    pieces = [(engine.id_to_piece(number), engine.get_score(number)) for number in range(engine.vocab_size())]
    _, normalizer = read_unigram((folder / "spiece.model").read_bytes())
    return T5Tokenizer(pieces, _spm_precompiled_charsmap=normalizer.charsmap or None, extra_ids=10), engine


def tiny_t5(name: str, out: Path) -> Path:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    out.mkdir()
    tokenizer, _ = vocabulary(out)
    torch.manual_seed(3)
    model = T5ForConditionalGeneration(T5Config(vocab_size=920, **SIZES, **MODELS[name]))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5 * weight.shape[-1] ** -0.5 if len(weight) != 920 else 1.0)
            else:
                weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def logits_of(folder: Path, source: list[int], ids: list[int]) -> Any:
    import torch
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_t5_both_ways(name: str, tmp_path: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    from transformers import AutoTokenizer

    folder = tiny_t5(name, tmp_path / name)
    file, _ = workshop.convert(folder, "gguf:f32")
    back, _ = workshop.convert(file, "hf:f32")
    source = AutoTokenizer.from_pretrained(folder).encode(evaluation_text()[:600])
    with llama.Llama(file) as model:
        assert model.tokenize(evaluation_text()[:600]) == source
        ids = [0, *model.tokenize(evaluation_text()[600:1400])[:99]]
        mine = model.decoder_logits(source, ids)
    theirs = logits_of(folder, source, ids)
    figure(assert_same_logits(mine, theirs))
    assert_same_logits(logits_of(back, source, ids), theirs)


def test_a_quantized_t5_runs_and_verifies(tmp_path: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    """Blocks for the matrices, floats for the relative positions; the altered norm is what a check expects."""
    from converters import verify

    folder = tiny_t5("t5", tmp_path / "t5")
    plain, _ = workshop.convert(folder, "gguf:f32")
    assert verify(folder, plain).ok
    file, report = workshop.convert(folder, "gguf:q8_0")
    assert {line.type for line in report.tensors if "attn_rel_b" in line.name or "norm" in line.name} == {"F32"}
    source, ids, found = list(range(3, 60)), [0, *range(100, 180)], []
    for path in (plain, file):
        with llama.Llama(path) as model:
            found.append(model.decoder_logits(source, ids))
    apart = float(abs(found[1] - found[0]).max() / (found[0].max() - found[0].min()))
    figure(f"logits of Q8_0 differ from float32's by at most {apart:.1e} of their range")
    assert apart < 0.05


@pytest.mark.parametrize("name", NORMALIZERS)
def test_unigram_vocabularies_both_ways(name: str, tmp_path: Path) -> None:
    """The same ids in llama.cpp as in transformers, and in transformers again out of the GGUF."""
    from transformers import AutoTokenizer

    folder, back = tmp_path / "one", tmp_path / "two"
    folder.mkdir()
    back.mkdir()
    loaded, engine = vocabulary(folder, **NORMALIZERS[name])
    loaded.save_pretrained(folder)
    config = {"architectures": ["T5ForConditionalGeneration"], "vocab_size": 920, "eos_token_id": 1, "pad_token_id": 0}
    files = {file: (folder / file).read_bytes() for file in SIDE_FILES if (folder / file).exists()}
    if name not in ("nmt_nfkc", "nfkc_casefold"):
        del files["tokenizer.json"]  # transformers merges spaces whatever the model says
    metadata = find(config).bind(config).metadata(files)
    path = write_vocabulary(metadata, tmp_path / "vocab.gguf")
    for file, data in hf_tokenizer_files(metadata)[0].items():
        (back / file).write_bytes(data)
    texts = TEXTS if "tokenizer.json" in files else [text for text in TEXTS if "\r\n" not in text]  # one letter to tokenizers
    assert differences(path, AutoTokenizer.from_pretrained(back).encode, texts) == []
    plain = [text for text in TEXTS if "<" not in text and text.strip()]  # llama.cpp puts no space before nothing but spaces
    assert differences(path, lambda text: [*engine.encode(text), 1], plain) == []
    if "tokenizer.json" in files:
        assert differences(path, loaded.encode, TEXTS) == []
        assert json.loads(files["tokenizer.json"])["normalizer"]
