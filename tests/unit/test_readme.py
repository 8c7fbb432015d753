"""The README's commands and examples do what they say."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from converters.cli import qconvert

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def shell_lines() -> list[list[str]]:
    """Every command of the shell blocks, split at ``&&``, as words."""
    lines = [part for block in blocks("sh") for line in block.splitlines() for part in line.split("&&")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def qconvert_lines() -> list[list[str]]:
    """The arguments of every ``qconvert`` command."""
    return [words[1:] for words in shell_lines() if Path(words[0]).name == "qconvert"]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that looks like the checkout, but may be written to."""
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_command_converts_and_verifies(clone: Path) -> None:
    main_job = [words for words in qconvert_lines() if any(word.startswith("fixtures/") for word in words)]
    assert [words[0] for words in main_job] == ["awq-to-gguf", "verify"]
    for words in main_job:
        found = CliRunner().invoke(qconvert, words)
        assert found.exit_code == 0, found.output
    assert (clone / "model.gguf").read_bytes()[:4] == b"GGUF"


def test_the_python_examples_run(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    example, running, quantizing = blocks("python")
    exec(compile(example, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    exec(compile(running, "README.md", "exec"), names)
    assert (clone / "again" / "model.safetensors").read_bytes() == (ROOT / "fixtures/awq/gemm-g32/model.safetensors").read_bytes()
    exec(compile(quantizing, "README.md", "exec"), names)
    assert json.loads((clone / "llama-gptq" / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    assert "awq (64, 64) torch.uint8" in shown
    assert shown.splitlines()[-2:] == ["{'copied': 1, 'exact': 10} True", "True"]


@pytest.mark.parametrize("words", qconvert_lines(), ids=" ".join)
def test_every_command_shown_exists_with_its_flags(words: list[str]) -> None:
    context = click.Context(qconvert)
    command = qconvert.get_command(context, words[0])
    assert command is not None
    command.make_context(words[0], list(words[1:]), parent=context)  # raises a usage error for a flag that does not exist


def test_both_install_commands_take_torch_first_and_the_constraints() -> None:
    installs = [words for words in shell_lines() if words[1:2] == ["install"]]
    assert [words[-1] for words in installs] == ["torch==2.13.0", ".", "torch==2.13.0", ".[test]"]
    assert all(words[2:4] == ["-c", "constraints.txt"] for words in installs)


def test_constraints_pin_every_dependency_to_a_version_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name]), text


def test_the_rooms_it_names_exist() -> None:
    rooms = set(re.findall(r"`((?:qformats|converters|docs|fixtures|benchmarks)/[\w./-]*)`", README))
    assert len(rooms) >= 15
    assert [room for room in rooms if not (ROOT / room).exists()] == []


def test_the_ci_run_installs_as_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "-c constraints.txt torch==2.13.0" in script
    assert '-c constraints.txt -e ".[test]"' in script
