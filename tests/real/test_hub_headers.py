"""A look at published GGUF files on a hub: what the local file shows, for a few hundred KB and a few requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lab import GEMMA_GGUF, SMOLLM_GGUF, why_missing

import qformats
from converters.cli import qconvert

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(bool(why_missing("models", SMOLLM_GGUF)), reason=str(why_missing("models", SMOLLM_GGUF))),
]
MOST_NBYTES, MOST_REQUESTS = 400_000, 16


@pytest.fixture(params=[SMOLLM_GGUF, GEMMA_GGUF], ids=["smollm2", "gemma3"])
def published(request: pytest.FixtureRequest, hub: Any) -> Path:
    """A real file, in a repository of its own."""
    hub.add("org/model", {request.param.name: request.param.read_bytes()})
    hub.forget()
    path: Path = request.param
    return path


def shown(*words: str) -> str:
    """What a command prints."""
    run = CliRunner().invoke(qconvert, words)
    assert run.exit_code == 0, run.output
    return run.stdout


def test_inspect_says_what_it_says_of_the_local_file(published: Path, hub: Any, figure: Any) -> None:
    there = json.loads(shown("inspect", "hf://org/model", "--json", "--tensors"))
    nbytes, requests = sum(hub.sent.values()), len(hub.seen)
    assert nbytes <= MOST_NBYTES and requests <= MOST_REQUESTS
    here = json.loads(shown("inspect", str(published), "--json", "--tensors"))
    assert {**there, "path": ""} == {**here, "path": ""}
    figure(f"inspect of {published.name} ({published.stat().st_size >> 20} MB) on a hub: {nbytes:,} bytes in {requests} requests")
    one, other = shown("inspect", "hf://org/model", "--tensors"), shown("inspect", str(published), "--tensors")
    assert one.splitlines()[1:] == other.splitlines()[1:]


def test_the_vocabulary_is_there_when_it_is_asked_for(published: Path, hub: Any) -> None:
    with qformats.open("org/model") as there, qformats.open(published) as here:
        before = sum(hub.sent.values())
        assert before <= MOST_NBYTES
        tokens, wanted = (file.metadata["tokenizer.ggml.tokens"].value for file in (there, here))
        assert list(tokens.iter_raw()) == list(wanted.iter_raw())
        assert there.metadata == here.metadata and sum(hub.sent.values()) > before
