"""BERT in llama.cpp against transformers: hidden states token by token, pooled embeddings, and WordPiece ids both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Workshop
from test_tokenizers import TEXTS, VOCABULARIES, differences, save, write_vocabulary
from text import evaluation_text

from qformats.architectures import find
from qformats.architectures.hf_tokenizer import hf_tokenizer_files
from qformats.containers.gguf import open_gguf

pytestmark = pytest.mark.real
VOCABULARY = VOCABULARIES / "ggml-vocab-bert-bge.gguf"
# stripping accents, transformers takes Hangul apart and keeps spacing vowel signs, llama.cpp does not
UNLIKE = ["안녕하세요 세계", "नमस्ते दुनिया"]
SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 256,
    "vocab_size": 30522,
}  # fmt: skip


def tiny_bert(out: Path, pooling: str) -> Path:
    """A random BertModel with the vocabulary of bge and sentence-transformers' files."""
    import torch
    from transformers import AutoConfig, AutoModel

    if not VOCABULARY.exists():
        pytest.skip("llama.cpp's source is not in the lab")
    torch.manual_seed(3)
    model = AutoModel.from_config(AutoConfig.for_model("bert", **SHAPE), dtype=torch.float32)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.0 if "embeddings" in key else 1.5 * weight.shape[-1] ** -0.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(out)
    files, _ = hf_tokenizer_files(open_gguf(VOCABULARY).metadata)
    for name, data in files.items():
        (out / name).write_bytes(data)
    (out / "modules.json").write_text(json.dumps([{"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]))
    (out / "1_Pooling").mkdir()
    modes = {"pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_cls_token": True}
    (out / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return out


def hidden(folder: Path, ids: list[int]) -> Any:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0].numpy()


def as_first_published(folder: Path) -> None:
    """Its norms under the names that the first BERT gave them."""
    from safetensors.numpy import load_file, save_file

    words = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(folder / "model.safetensors")
    for now, then in words.items():
        tensors = {name.replace(now, then): value for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_hidden_states_and_pooled_embeddings(pooling: str, tmp_path: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    folder = tiny_bert(tmp_path / f"bert-{pooling}", pooling)
    if pooling == "cls":
        as_first_published(folder)
    file, report = workshop.convert(folder, "gguf:f32")
    assert {line.kind for line in report.tensors} <= {"copied", "exact"}
    with llama.Llama(file, pooling="none") as model:
        ids = model.tokenize(evaluation_text()[:600])[:128]
        mine = model.embeddings(ids)
    theirs = hidden(folder, ids)
    span = theirs.max() - theirs.min()
    worst = np.abs(mine - theirs).max() / span
    figure(f"hidden states differ by at most {worst:.1e} of their range on {len(ids)} tokens")
    assert len(ids) >= 64 and worst <= 1e-3
    with llama.Llama(file, pooling="as the file says") as model:
        pooled = model.embeddings(ids)
    wanted = theirs.mean(0) if pooling == "mean" else theirs[0]
    assert np.abs(pooled - wanted).max() <= 1e-3 * span
    back, _ = workshop.convert(file, "hf:f32")
    assert np.abs(hidden(back, ids) - theirs).max() <= 1e-6 * span
    again, _ = workshop.convert(back, "gguf:f32")  # the pooling has come along, in sentence-transformers' files
    assert open_gguf(again).metadata["bert.pooling_type"] == open_gguf(file).metadata["bert.pooling_type"]


def test_wordpiece_ids_both_ways(tmp_path: Path) -> None:
    """tokenizer.json made of llama.cpp's own test vocabulary, and a vocabulary made of that file again."""
    if not VOCABULARY.exists():
        pytest.skip("llama.cpp's source is not in the lab")
    texts = VOCABULARY.with_suffix(".gguf.inp").read_text().split("\n__ggml_vocab_test__\n") + [t for t in TEXTS if "<|" not in t]
    texts.append(evaluation_text()[:20000])
    published = open_gguf(VOCABULARY).metadata
    files, _ = hf_tokenizer_files(published)
    loaded = save(files, tmp_path)
    assert differences(VOCABULARY, loaded.encode, texts) == UNLIKE
    config = {"architectures": ["BertModel"], **SHAPE}
    made = find(config).bind(config).metadata(files, file_type=0)
    for key in ("tokens", "token_type"):
        assert list(made[f"tokenizer.ggml.{key}"].value) == list(published[f"tokenizer.ggml.{key}"].value)
    for key in ("model", "pre"):
        assert made[f"tokenizer.ggml.{key}"].value == published[f"tokenizer.ggml.{key}"].value
    assert differences(write_vocabulary(made, tmp_path / "again.gguf"), loaded.encode, texts) == UNLIKE
