"""``--json``: one document on standard output, of the schema that is packaged for the command; so are failures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from converters import cli, schemas
from converters.cli import qconvert

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"
AWQ, GGUF = FIXTURES / "awq" / "gemm-g32", FIXTURES / "containers" / "small.gguf"
NAMES = sorted(path.name.removesuffix(".schema.json") for path in (ROOT / "converters" / "schemas").glob("*.schema.json"))
ELSEWHERE = {"imatrix", "run", "perplexity", "compare", "pull", "push"}  # below, and where models run: test_cli_run.py


def check(name: str, data: Any) -> None:
    jsonschema.validate(data, schemas.schema(name), jsonschema.Draft202012Validator)


def document(*words: object, exit_code: int = 0) -> Any:
    """The one document of a command."""
    found = CliRunner().invoke(qconvert, [*(str(word) for word in words), "--json"], prog_name="qconvert")
    assert found.exit_code == exit_code, found.output
    assert found.stdout.isascii()
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF made from the AWQ fixture."""
    path = tmp_path_factory.mktemp("made") / "model.gguf"
    document("awq-to-gguf", AWQ, path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_schemas_are_schemas_that_say_what_is_required(name: str) -> None:
    found = schemas.schema(name)
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["required"] and found["$id"].startswith(f"urn:qformats:{name}:")
    with pytest.raises(jsonschema.ValidationError):
        check(name, {})


@pytest.mark.parametrize("name", [*cli.COMMANDS, "awq-to-gguf"])
def test_every_command_has_a_schema(name: str) -> None:
    if schemas.schema_name(name) not in NAMES:
        pytest.skip(f"{schemas.schema_name(name)}.schema.json is not packaged")
    assert schemas.schema(schemas.schema_name(name))["type"] == "object"


def commands(made: Path, tmp: Path) -> dict[str, tuple[object, ...]]:
    """A line of each command that needs neither a running model nor a hub."""
    lora = next((FIXTURES / "lora").glob("llama/**/adapter_config.json")).parent
    return {
        "inspect": ("inspect", made, "--tensors"), "plan": ("plan", AWQ, "--to", "gguf"), "formats": ("formats",), "doctor": ("doctor",),
        "awq-to-gguf": ("awq-to-gguf", AWQ, tmp / "p.gguf"), "verify": ("verify", AWQ, made), "completion": ("completion", "bash"),
        "split": ("split", made, tmp / "s", "--max-tensors", 5),
        "merge": ("merge", FIXTURES / "containers/split-00001-of-00003.gguf", tmp / "m"),
        "edit": ("edit", GGUF, tmp / "e.gguf", "--set-metadata", "general.name=B"),
        "lora-to-gguf": ("lora-to-gguf", lora, tmp / "l.gguf", "--base", FIXTURES / "dense/llama"),
        "lint": ("lint", AWQ, "--engine", "transformers"), "repair": ("repair", AWQ, tmp / "mended", "--dry-run"),
        "gguf-to-lora": ("gguf-to-lora", tmp / "l.gguf", tmp / "l", "--base", FIXTURES / "dense/llama"),
    }  # fmt: skip


def test_no_command_is_forgotten(made: Path, tmp_path: Path) -> None:
    asked = {schemas.schema_name(name) for name in commands(made, tmp_path)}
    assert {schemas.schema_name(name) for name in cli.COMMANDS} <= asked | ELSEWHERE


def test_documents_follow_their_schemas(made: Path, tmp_path: Path) -> None:
    for name, words in commands(made, tmp_path).items():
        data = document(*words)
        if schemas.schema_name(name) in NAMES:
            check(schemas.schema_name(name), data)


def test_outcomes_that_are_no_success_follow_them_too(made: Path, tmp_path: Path) -> None:
    broken = bytearray(made.read_bytes())
    broken[-50] ^= 1
    (tmp_path / "broken.gguf").write_bytes(broken)
    check("verify", document("verify", AWQ, tmp_path / "broken.gguf", exit_code=3))
    check("plan", document("plan", AWQ, "--to", "gguf:q4_1", "--exact", exit_code=7))


@pytest.mark.parametrize("name", [*cli.COMMANDS, "awq-to-gguf"])
def test_failures_are_documents(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = document(name, "--no-such-option", exit_code=2)
    check("error", data)
    assert data["error"]["code"] == "usage" and f"see qconvert {name} --help" in data["error"]["hint"]


def test_a_broken_file_is_a_document(tmp_path: Path) -> None:
    shutil.copy(GGUF, tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(GGUF.read_bytes()[:40])
    check("error", document("inspect", tmp_path / "a.gguf", exit_code=5))
    check("error", document("no-such-command", exit_code=2))


def test_the_hub_and_importances_with_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters import commands_hub, commands_imatrix
    from qformats.hub import pull
    from qformats.hub.push import Pushed

    monkeypatch.setattr(pull, "pull", lambda *_, **__: (tmp_path, ["config.json"]))
    check("pull", document("pull", "org/model"))
    check("push", commands_hub._pushed_json(Pushed("org/model", "https://hub/org/model", "0" * 40, ("a.gguf",), None)))
    entry = SimpleNamespace(counts=np.array([3, 0]))
    check("imatrix", commands_imatrix._data(SimpleNamespace(entries={"a": entry}, chunk_count=2, chunk_size=512), tmp_path))  # type: ignore[arg-type]
