"""What surrounds the commands: examples in every help, completion in shells, ``doctor``."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from converters import cli, completion, doctor
from converters.cli import qconvert
from qformats import loops, registry

ROOT = Path(__file__).resolve().parents[2]
NAMES = [*cli.COMMANDS, *cli.LISTED_PAIRS]  # test_cli.py asks every pair for its help


def run(*words: str, **environment: str) -> Result:
    return CliRunner().invoke(qconvert, words, prog_name="qconvert", env=environment)


# ---------------------------------------------------------------- examples


def examples(*words: str) -> list[list[str]]:
    """The words of every line of the block at the end of a help."""
    text = run(*words, "--help", COLUMNS="80").output
    _, found, block = text.partition("\n  Examples:\n")
    assert found and all(line.startswith("    ") for line in block.splitlines())
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert all(line[0] == "qconvert" for line in lines)
    return [line[1 : line.index(mark)] if (mark := next((m for m in (">", ">>") if m in line), "")) else line[1:] for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_every_help_ends_with_examples_that_parse(name: str) -> None:
    found = examples(name)
    assert 1 <= len(found) <= 4
    for words in found:
        assert words[0] == name
        context = click.Context(qconvert)
        command = qconvert.get_command(context, words[0])
        assert command is not None
        made = command.make_context(words[0], list(words[1:]), parent=context)  # a usage error where the line is none
        if made.params.get("to"):
            registry.parse_target(made.params["to"])


def test_the_help_of_all_has_examples_of_its_own() -> None:
    assert [words[0] for words in examples()] == ["inspect", "awq-to-gguf", "verify"]


def test_examples_work_on_real_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama-awq", "model-awq"):
        shutil.copytree(ROOT / "fixtures/awq/gemm-g32", tmp_path / name)
    shutil.copy(ROOT / "fixtures/containers/small.gguf", tmp_path / "a.gguf")
    monkeypatch.chdir(tmp_path)
    for name in ("awq-to-gguf", "verify", "inspect", "edit", "formats", "doctor"):
        words = examples(name)[0]
        found = run(*words)
        assert found.exit_code == 0, (words, found.output)
        if name == "awq-to-gguf":
            shutil.copy(words[-1], "llama.gguf")  # whose model has the same files


# ---------------------------------------------------------------- completion


def answers(line: str, shell: str = "bash") -> list[str]:
    """What click's protocol says of a line whose last word is unfinished."""
    words = shlex.split(line) + ([""] if line.endswith(" ") else [])
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1) if shell == "bash" else words[-1]}
    found = run(_QCONVERT_COMPLETE=f"{shell}_complete", **variables)
    assert found.exit_code == 0, found.output
    return [part.partition(",")[2].partition("\t")[0] for part in found.stdout.split("\n") if part.startswith("plain,")]


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("qconvert ins", ["inspect"]),
        ("qconvert awq-to-g", ["awq-to-gguf", "awq-to-gptq", "awq-to-gemma"]),
        ("qconvert hqq-to-bitn", ["hqq-to-bitnet"]),
        ("qconvert convert a b --allow-r", ["--allow-requantize"]),
        ("qconvert convert a b --to gp", ["gptq"]),
        ("qconvert convert a b --to gguf:q4_k", ["gguf:q4_k", "gguf:q4_k_s", "gguf:q4_k_m"]),
        ("qconvert convert a b --to gptq:int4,gr", ["gptq:int4,group="]),
        ("qconvert convert a b --to bnb:n", ["bnb:nf4"]),
        ("qconvert awq-to-gguf a b --type iq4", ["iq4_nl", "iq4_xs"]),
        ("qconvert quantize a b --output-tensor-type q6", ["q6_k"]),
        ("qconvert quantize a b --tensor-type attn_v=q8", ["attn_v=q8_0"]),
        ("qconvert quantize a b --search b", ["best"]),
        ("qconvert run m --dtype bf", ["bfloat16"]),
        ("qconvert completion z", ["zsh"]),
        ("qconvert no-such-command --x", []),
    ],
)
def test_words_are_completed(line: str, some: list[str], shell: str) -> None:
    found = answers(line, shell)
    assert set(some) <= set(found) and (some or not found)


def test_paths_are_left_to_the_shell() -> None:
    found = run(_QCONVERT_COMPLETE="bash_complete", COMP_WORDS="qconvert inspect ll", COMP_CWORD="2")
    assert found.stdout.strip() == "file,ll"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("qconvert convert a b --to gguf:q4_k_", ["q4_k_s", "q4_k_m"]),  # bash holds only what follows the colon
        ("qconvert convert a b --to=gguf:q4_k_", ["q4_k_s", "q4_k_m"]),
        ("qconvert convert a b --to=gg", ["gguf"]),
        ("qconvert quantize 'a file' b --tensor-type attn=q6", ["q6_k"]),
    ],
)
def test_bash_is_answered_with_what_it_took_for_the_word(line: str, shown: list[str]) -> None:
    found = run(_QCONVERT_COMPLETE="bash_complete", COMP_LINE=line, COMP_WORDBREAKS=" \t\n\"'><=;|&(:")
    assert found.stdout.split() == [f"plain,{word}" for word in shown]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_scripts_name_the_program_and_the_protocol(shell: str) -> None:
    text = run("completion", shell).stdout
    assert "qconvert" in text and f"_QCONVERT_COMPLETE={shell}_complete" in text
    assert json.loads(run("completion", shell, "--json").stdout)["script"].strip() == text.strip()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_itself_completes(tmp_path: Path) -> None:
    program = tmp_path / "qconvert"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m converters.cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / "script").write_text(run("completion", "bash").stdout)
    typed = (
        'source script; COMP_LINE="qconvert convert a b --to gguf:q4_k_"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9; '
        '_qconvert_completion ./qconvert 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"; complete -p qconvert'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(["bash", "--norc", "-c", typed], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.split()[:2] == ["q4_k_s", "q4_k_m"] and "-F _qconvert_completion qconvert" in found.stdout, found


# ---------------------------------------------------------------- doctor


def test_doctor_shows_versions_and_what_is_slow() -> None:
    found = run("doctor")
    assert found.exit_code == 0, found.output
    for word in ("qformats", "torch", "numba", "processor", "GPU", "Triton", "loops", "hub"):
        assert re.search(rf"^{word}\b", found.stdout, re.MULTILINE), word


def test_doctor_never_shows_a_token() -> None:
    token = "hf_" + "q" * 34
    found = run("doctor", HF_TOKEN=token)
    assert "a token is there" in found.stdout and token not in found.output
    assert json.loads(run("doctor", "--json", HF_TOKEN=token).stdout)["hub"]["token"] is True


@pytest.mark.parametrize("package", [*doctor.NEEDED, *doctor.OPTIONAL])
def test_doctor_survives_any_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version, load = doctor._version, importlib.import_module

    def loaded(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(f"no {name}")
        return load(name, *rest)

    monkeypatch.setattr(doctor, "_version", lambda name: None if name == package else version(name))
    monkeypatch.setattr(importlib, "import_module", loaded)
    if package == "numba":
        monkeypatch.setattr(loops, "find", lambda name: None)
    found = run("doctor", "--json")
    data = json.loads(found.stdout)
    needed = package in doctor.NEEDED
    assert (found.exit_code, data["exit_code"]) == ((6, 6) if needed else (0, 0))
    assert [entry["what"] for entry in data["broken" if needed else "missing"]].count(package) == 1
    assert run("doctor").exit_code == found.exit_code


def test_doctor_says_why_every_start_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_loops", lambda: {"usable": True, "cache": "/somewhere", "writable": False, "kept": 0})
    text = run("doctor").stdout
    assert "not writable" in text and "each process compiles them again" in text and "NUMBA_CACHE_DIR" in text
