"""Lint against real llama.cpp: it loads and refuses what lint says of a published GGUF and of broken copies; what repair writes loads."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import llamacpp
from lab import SMOLLM_GGUF

from converters.gguf_edit import edit_gguf, split_gguf
from converters.lint import lint_path
from converters.metadata_words import parse_assignment
from converters.repair import repair_path

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not llamacpp.available(), reason="no llama.cpp libraries are installed"),
    pytest.mark.skipif(not SMOLLM_GGUF.exists(), reason="no published GGUF is installed"),
]


def edited(*words: str, removed: tuple[str, ...] = (), tensors: tuple[tuple[str, str], ...] = ()) -> Callable[[Path], Path]:
    def make(tmp: Path) -> Path:
        out = tmp / "edited.gguf"
        edit_gguf(SMOLLM_GGUF, out, assignments=map(parse_assignment, words), removed=removed, renamed_tensors=tensors)
        return out

    return make


def cut(tmp: Path) -> Path:
    out = tmp / "cut.gguf"
    shutil.copy(SMOLLM_GGUF, out)
    with out.open("r+b") as file:
        file.truncate(out.stat().st_size - 5000)
    return out


def half_a_set(tmp: Path) -> Path:
    paths = split_gguf(SMOLLM_GGUF, tmp / "s", max_nbytes=50_000_000).paths
    paths[-1].unlink()
    return paths[0]


def whole_set(tmp: Path) -> Path:
    return split_gguf(SMOLLM_GGUF, tmp / "s", max_nbytes=50_000_000).paths[0]


def loads(path: Path) -> bool:
    try:
        with llamacpp.Llama(path, n_ctx=64):
            return True
    except RuntimeError:
        return False


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "as it is": (lambda _: SMOLLM_GGUF, ""),
    "shards": (whole_set, ""),
    "no template": (edited(removed=("tokenizer.chat_template",)), "chat-template-missing"),
    "no pre-tokenizer": (edited(removed=("tokenizer.ggml.pre",)), "pre-tokenizer-missing"),
    "architecture": (edited("general.architecture=odd"), "architecture"),
    "hyperparameters": (edited(removed=("llama.block_count",)), "hyperparameters"),
    "embedding": (edited(tensors=(("token_embd.weight", "token_embd.odd"),)), "embedding"),
    "tokenizer": (edited("tokenizer.ggml.model=odd"), "tokenizer"),
    "vocabulary": (edited(removed=("tokenizer.ggml.tokens",)), "vocabulary"),
    "merges": (edited(removed=("tokenizer.ggml.merges",)), "merges"),
    "pre-tokenizer": (edited("tokenizer.ggml.pre=odd"), "pre-tokenizer"),
    "cut": (cut, "unreadable"),
    "half a set": (half_a_set, "shard-missing"),
}


@pytest.mark.parametrize(("make", "rule"), CASES.values(), ids=CASES)
def test_llama_cpp_does_what_lint_says(make: Callable[[Path], Path], rule: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    (verdict,) = lint_path(path, ("llama.cpp",)).verdicts
    assert rule in [finding.rule for finding in verdict.findings] if rule else not verdict.findings
    assert verdict.loads == loads(path)


def test_every_key_of_the_tokenizer_that_repair_sets_makes_it_load(tmp_path: Path) -> None:
    lost = ("tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.chat_template", "tokenizer.ggml.eos_token_id")
    path = edited(removed=lost)(tmp_path)
    assert not loads(path)
    repair_path(path, tmp_path / "out.gguf", like=SMOLLM_GGUF)
    assert lint_path(tmp_path / "out.gguf", ("llama.cpp",)).loads and loads(tmp_path / "out.gguf")
