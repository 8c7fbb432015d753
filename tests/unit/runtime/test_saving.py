"""A loaded model is saved as the files that it came from, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import SAMPLE
from checkpoints import converted, ready

from qformats.runtime.loader import load_model
from qformats.runtime.saving import save_model

pytest.importorskip("transformers")
torch.set_num_threads(1)


def check_files(case: str, tmp_path: Path) -> None:
    source = ready(case, tmp_path)
    model = load_model(source)
    save_model(model, tmp_path / "out")
    for file in sorted(file for file in source.iterdir() if file.suffix != ".py"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("case", SAMPLE)
def test_every_file_comes_back(case: str, tmp_path: Path) -> None:
    check_files(case, tmp_path)


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "q8_0", "iq4_nl", "mxfp4"])
@pytest.mark.parametrize("model", ["dense/llama", "dense/qwen3_moe"])
def test_a_gguf_comes_back(model: str, kind: str, tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    converted(ready(model, tmp_path), source, f"gguf:{kind}", allow_requantize=True)
    save_model(load_model(source), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == source.read_bytes()
