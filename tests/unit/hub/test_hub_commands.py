"""Every command that reads something takes an address for it, and does what it does with the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from loopback import Hub, folder_files

from converters.api import convert
from converters.cli import qconvert
from qformats.errors import QFormatError
from qformats.quantize.imatrix import Entry, ImportanceMatrix, write_imatrix

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures"
AWQ, LLAMA, LORA = FIXTURES / "awq" / "gemm-g32", FIXTURES / "dense" / "llama", FIXTURES / "lora" / "llama"


def run(*words: str | Path, code: int = 0) -> dict[str, Any]:
    found = CliRunner().invoke(qconvert, [*map(str, words), "--json"])
    assert found.exit_code == code, found.output
    data: dict[str, Any] = json.loads(found.stdout)
    return data


@pytest.fixture
def filled(hub: Hub, tmp_path: Path) -> Hub:
    """A model, an adapter of it, and GGUFs: whole, in shards, and of the adapter."""
    hub.add("org/llama", folder_files(LLAMA))
    hub.add("org/adapter", folder_files(LORA))
    convert(LLAMA, tmp_path / "llama.gguf", to="gguf:q8_0")
    run("lora-to-gguf", LORA, tmp_path / "lora.gguf", "--base", LLAMA)
    run("split", tmp_path / "llama.gguf", tmp_path / "llama", "--max-tensors", "9")
    hub.add("org/gguf", {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")})
    return hub


def test_an_adapter_and_its_base_out_of_repositories(filled: Hub, tmp_path: Path) -> None:
    filled.forget()
    run("lora-to-gguf", "hf://org/adapter", tmp_path / "there.gguf", "--base", "hf://org/llama")
    assert (tmp_path / "there.gguf").read_bytes() == (tmp_path / "lora.gguf").read_bytes()
    assert not any("org/llama/" in path and "safetensors" in path for _, path in filled.seen)  # the base model's configuration is enough
    run("lora-to-gguf", LORA, tmp_path / "of-gguf.gguf", "--base", "hf://org/gguf/llama.gguf")
    run("gguf-to-lora", "hf://org/gguf/lora.gguf", tmp_path / "back", "--base", "hf://org/llama")
    run("gguf-to-lora", tmp_path / "lora.gguf", tmp_path / "here", "--base", LLAMA)
    assert folder_files(tmp_path / "back") == folder_files(tmp_path / "here")


def test_an_adapter_out_of_a_repository_is_merged(filled: Hub, tmp_path: Path) -> None:
    for name, adapter in (("there", "hf://org/adapter=0.5"), ("here", f"{LORA}=0.5")):
        run("quantize", LLAMA, tmp_path / f"{name}.gguf", "--to", "gguf:q8_0", "--lora", adapter)
    assert run("verify", "hf://org/llama", tmp_path / "there.gguf", "--lora", "hf://org/adapter=0.5")["ok"]
    there, here = (run("inspect", tmp_path / f"{name}.gguf", "--tensors") for name in ("there", "here"))
    assert there["tensors"] == here["tensors"] and b'"adapter"' in (tmp_path / "there.gguf").read_bytes()


def test_ggufs_out_of_repositories_are_cut_joined_and_edited(filled: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    whole = (tmp_path / "llama.gguf").read_bytes()
    run("merge", "hf://org/gguf/llama-00001-of-00003.gguf", out / "merged.gguf")
    assert (out / "merged.gguf").read_bytes() == whole
    run("split", "hf://org/gguf/llama.gguf", out / "llama", "--max-tensors", "9")
    assert all((out / path.name).read_bytes() == path.read_bytes() for path in tmp_path.glob("llama-0*.gguf"))
    run("edit", "hf://org/gguf/llama.gguf", out / "there.gguf", "--set-metadata", "general.name=There")
    run("edit", tmp_path / "llama.gguf", out / "here.gguf", "--set-metadata", "general.name=There")
    assert (out / "there.gguf").read_bytes() == (out / "here.gguf").read_bytes()
    shards = [f"hf://org/gguf/llama-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert run("merge", *shards, out / "x.gguf", code=2)["error"]["code"] == "hub-address"
    assert run("split", "hf://org/llama", out / "x", "--max-tensors", "9", code=5)["error"]["code"] == "gguf-magic"


def test_an_importance_matrix_is_read_from_a_repository(filled: Hub, tmp_path: Path) -> None:
    entry = Entry(np.linspace(0.1, 4, 64, dtype=np.float32)[None], np.array([8]))
    write_imatrix(ImportanceMatrix({"blk.0.attn_q.weight": entry}, (), 1, 512), tmp_path / "imatrix.gguf")
    filled.add("org/matrix", {"imatrix.gguf": (tmp_path / "imatrix.gguf").read_bytes(), "tokenizer.json": b"{}"})
    filled.forget()
    run("quantize", LLAMA, tmp_path / "there.gguf", "--to", "gguf:q4_0", "--imatrix", "hf://org/matrix/imatrix.gguf")
    run("quantize", LLAMA, tmp_path / "here.gguf", "--to", "gguf:q4_0", "--imatrix", tmp_path / "imatrix.gguf")
    assert (tmp_path / "there.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()
    assert not any("tokenizer" in path for _, path in filled.seen)
    words = ("quantize", LLAMA, tmp_path / "x.gguf", "--to", "gguf:q4_0", "--imatrix", "hf://org/matrix")
    assert run(*words, code=2)["error"]["code"] == "hub-address"


@pytest.mark.parametrize("command", ["plan", "dequantize", "hf-to-gguf"])
def test_plans_and_conversions(filled: Hub, tmp_path: Path, command: str) -> None:
    words = {"plan": ["hf://org/llama", "--to", "gguf"], "dequantize": ["hf://org/llama", tmp_path / "f16", "--to", "hf:f16"]}
    found = run(command, *words.get(command, ["hf://org/llama", tmp_path / "plain.gguf"]))
    assert found["tensors"]


def test_what_is_pushed_lies_here(filled: Hub) -> None:
    assert run("push", "hf://org/llama", "org/other", code=2)["error"]["code"] == "push-source"


def test_an_offline_conversion_out_of_the_cache(filled: Hub, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    filled.add("org/awq", {name: data for name, data in folder_files(AWQ).items() if name != "oracle.safetensors"})
    convert(AWQ, tmp_path / "here.gguf", to="gguf")
    for repo in ("org/awq", "org/llama", "org/adapter", "org/gguf"):
        run("pull", repo)
    request.getfixturevalue("offline")
    filled.forget()
    run("awq-to-gguf", "hf://org/awq", tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()
    assert run("verify", "hf://org/awq", tmp_path / "there.gguf")["method"] == "digests"
    assert run("inspect", "hf://org/gguf/llama.gguf")["format"] == "gguf" and run("inspect", "hf://org/awq")["format"] == "awq"
    run("lora-to-gguf", "hf://org/adapter", tmp_path / "a.gguf", "--base", "hf://org/llama")
    run("edit", "hf://org/gguf/llama.gguf", tmp_path / "e.gguf", "--set-metadata", "general.name=There")
    assert run("inspect", "hf://org/none", code=8)["error"]["code"] == "hub-offline"
    assert filled.seen == []


def test_an_error_spells_an_address_as_it_was_given() -> None:
    """One that went through a ``Path``, which folds its slashes, too."""
    error = QFormatError("not-found", "no such file", path=Path("hf://org/name@v1/a.gguf"))
    assert error.path == "hf://org/name@v1/a.gguf" and str(error).startswith("hf://org/name@v1/a.gguf: no such file")
