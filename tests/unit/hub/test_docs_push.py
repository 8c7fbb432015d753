"""The page on pulling and pushing, against a hub on the loopback interface."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback import Hub, folder_files
from pages import DOCS, ROOT, Page

AWQ, LLAMA = ROOT / "fixtures" / "awq" / "gemm-g32", ROOT / "fixtures" / "dense" / "llama"


def test_pulling_and_pushing(hub: Hub, logged_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = b"---\nlicense: apache-2.0\n---\n# Model\n"
    hub.add("org/model-AWQ", {**{n: d for n, d in folder_files(AWQ).items() if n != "oracle.safetensors"}, "README.md": card})
    hub.add("org/model", folder_files(LLAMA))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def export(name: str, value: str | None) -> None:
        assert name == "HF_HUB_OFFLINE"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value == "1")
        if hasattr(constants, "is_offline_mode"):
            monkeypatch.setattr(constants, "is_offline_mode", lambda: value == "1")

    assert Page(DOCS / "push.md", export=export).run() == 8
    files = hub.files("org/model-GGUF")
    assert {"README.md", "model-Q5_0.gguf", "model-Q4_1.gguf"} <= files.keys() and hub.repos["org/model-GGUF"].private
    assert b"license: apache-2.0" in files["README.md"] and (tmp_path / "here/offline.gguf").read_bytes() == files["model-Q5_0.gguf"]
