"""The commands of a model card, followed as the program that they name follows them: the file they choose is the one that runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from lab import SMOLLM_GGUF, why_missing

import qformats
from qformats.hub.names import Address

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(bool(why_missing("models", SMOLLM_GGUF)), reason=str(why_missing("models", SMOLLM_GGUF))),
]


def chosen_by_llamacpp(files: list[str], words: str) -> str:
    """The file that ``-hf ORG/NAME[:TAG] [--hf-file NAME]`` takes: find_best_model of llama.cpp v0.5.0 (common/download.cpp)."""
    match = re.fullmatch(r"llama-cli -hf [^/ ]+/[^/: ]+(?::(\S+))?(?: --hf-file (\S+))?", words)
    assert match is not None, words
    if match[2]:
        return match[2]
    models = [name for name in sorted(files) if name.endswith(".gguf") and not re.search("mmproj|imatrix|mtp-", name)]
    for tag in [match[1]] if match[1] else ["Q4_K_M", "Q8_0"]:
        for name in models:
            if re.search(f"{tag}[.-]", name, re.IGNORECASE):
                return name
    return "" if match[1] else models[0]


def test_the_card_of_a_pushed_file_runs_in_llamacpp(hub: Any, llama: Any, tmp_path: Path) -> None:
    from qformats.hub.pull import pull

    shutil.copyfile(SMOLLM_GGUF, tmp_path / "Small-Q4_1.gguf")
    qformats.push_to_hub(tmp_path / "Small-Q4_1.gguf", "org/Small-GGUF")
    files = hub.files("org/Small-GGUF")
    (command,) = re.findall(r"^llama-cli .*$", files["README.md"].decode(), re.MULTILINE)
    name = chosen_by_llamacpp(list(files), command)
    assert name == "Small-Q4_1.gguf"
    folder, _ = pull(Address("org/Small-GGUF"), tmp_path / "down", include=[name])
    with llama.Llama(folder / name) as there:
        said = there.greedy(there.tokenize("The capital of France is"), 6)
    with llama.Llama(SMOLLM_GGUF) as here:
        assert said == here.greedy(here.tokenize("The capital of France is"), 6)
        assert "Paris" in here.detokenize(said)


def test_a_name_that_says_no_type_gets_one_that_llamacpp_finds(hub: Any, tmp_path: Path) -> None:
    shutil.copyfile(SMOLLM_GGUF, tmp_path / "plain.gguf")
    qformats.push_to_hub(tmp_path / "plain.gguf", "org/Tiny")
    files = hub.files("org/Tiny")
    (command,) = re.findall(r"^llama-cli .*$", files["README.md"].decode(), re.MULTILINE)
    assert command == "llama-cli -hf org/Tiny:Q4_1" and chosen_by_llamacpp(list(files), command) == "Tiny-Q4_1.gguf"
