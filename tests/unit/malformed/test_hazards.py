"""Files that crashed or fooled other loaders (``fixtures/gguf-hazards``): one error each, at every entrance, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner

from converters.cli import qconvert
from qformats.containers.gguf import open_gguf
from qformats.errors import QFormatError

HAZARDS = Path(__file__).parents[3] / "fixtures" / "gguf-hazards"
CASES = json.loads((HAZARDS / "cases.json").read_text())


def test_every_file_has_a_case() -> None:
    assert {path.stem for path in HAZARDS.glob("*.gguf")} == set(CASES)


def test_the_script_makes_these_bytes(tmp_path: Path) -> None:
    script = (HAZARDS / "make.py").read_text().replace("HERE = Path(__file__).parent\n", f"HERE = Path({str(tmp_path)!r})\n")
    script = script.replace("HERE.parents[1]", f"Path({str(HAZARDS)!r}).parents[1]")
    (tmp_path / "make.py").write_text(script)
    subprocess.run([sys.executable, str(tmp_path / "make.py")], check=True)
    for path in HAZARDS.glob("*.gguf"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", CASES)
def test_opening_is_one_error_and_allocates_little(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(QFormatError) as caught:
            open_gguf(HAZARDS / f"{name}.gguf")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (caught.value.code, caught.value.exit_code) == (CASES[name]["code"], CASES[name]["exit_code"])
    assert peak < 4 << 20


@pytest.mark.parametrize("name", CASES)
def test_the_command_says_it_and_writes_nothing(name: str, tmp_path: Path) -> None:
    source, out = HAZARDS / f"{name}.gguf", tmp_path / "out"
    for words in (["inspect", source, "--json"], ["convert", source, out, "--to", "hf", "--json"]):
        found = CliRunner().invoke(qconvert, [str(word) for word in words], prog_name="qconvert")
        assert found.exit_code == CASES[name]["exit_code"], found.output
        assert json.loads(found.stdout)["error"]["code"] == CASES[name]["code"]
    assert not list(tmp_path.iterdir())
