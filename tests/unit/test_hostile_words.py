"""Files that try to steer a terminal: control characters in names, metadata, config and paths never reach it raw."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner

from converters.cli import qconvert
from converters.output import spoken
from qformats.containers.gguf import TensorInfo, Value, layout_gguf
from qformats.errors import QFormatError

# colours, a title, a bell, a return, C1's CSI, a line, turned writing, isolates
EVIL = "\x1b[31m\x1b]0;owned\x07\r\x9b2J\n\u202egpj\u2066x\u2069\u200f"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def gguf(path: Path) -> Path:
    """A GGUF whose architecture, keys, strings and tensor names are hostile."""
    metadata = {
        "general.architecture": Value("str", f"llama{EVIL}"), "general.name": Value("str", EVIL), f"key{EVIL}": Value("str", EVIL),
        "tokenizer.chat_template": Value("str", EVIL),
    }  # fmt: skip
    layout = layout_gguf(metadata, [TensorInfo(f"blk.0{EVIL}.weight", "F32", (32,)), TensorInfo("plain.weight", "F32", (32,))])
    path.write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    return path


def directory(path: Path, method: str | None) -> Path:
    """A checkpoint of safetensors whose names, config and index are hostile."""
    path.mkdir()
    quantization = {} if method is None else {"quantization_config": {"quant_method": method, "bits": EVIL, "version": EVIL}}
    config = {"architectures": [f"LlamaForCausalLM{EVIL}"], "model_type": EVIL, **quantization}
    (path / "config.json").write_text(json.dumps(config))
    names = (f"model{EVIL}.weight", f"a{EVIL}.qweight", f"a{EVIL}.scales")
    header = json.dumps({n: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text(json.dumps({"chat_template": EVIL, "model": {"type": EVIL}}))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("hostile") / f"folder{EVIL.replace('/', '')}"
    folder.mkdir()
    made = [gguf(folder / f"m{EVIL}.gguf"), directory(folder / "floats", None), directory(folder / "gptq", "gptq")]
    (folder / "cut.gguf").write_bytes(made[0].read_bytes()[:200])
    return [*made, directory(folder / "unknown", f"no{EVIL}"), folder / "cut.gguf", folder / f"nowhere{EVIL}"]


LINES = (
    ("inspect", "SRC", "--tensors"), ("inspect", "SRC", "--json"), ("plan", "SRC", "--to", "gguf"), ("plan", "SRC", "--to", "hf:f32"),
    ("convert", "SRC", "DST.gguf", "--to", "gguf:f32"), ("dequantize", "SRC", "DST"), ("verify", "SRC", "SRC"),
    ("awq-to-gguf", "SRC", "DST.gguf"), ("split", "SRC", "DST", "--max-tensors", "1"), ("merge", "SRC", "DST.gguf"),
    ("edit", "SRC", "DST.gguf", "--rename-tensor", f"{EVIL}=b"), ("edit", "SRC", "DST.gguf", "--set-metadata", f"a={EVIL}"),
    ("lora-to-gguf", "SRC", "DST.gguf", "--base", "SRC"), ("gguf-to-lora", "SRC", "DST", "--base", "SRC"),
    ("imatrix", "SRC", "--text", "SRC", "-o", "DST.gguf"), ("convert", "SRC", "DST", "--plan", "SRC"),
    (f"x{EVIL}",), ("inspect", f"--{EVIL}"), ("convert", "SRC", "DST", "--to", f"gguf:{EVIL}"), ("formats", EVIL), ("pull", EVIL),
)  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda words: spoken(" ".join(words)).replace("\n", ""))
def test_no_command_passes_control_characters_on(line: tuple[str, ...], sources: list[Path], tmp_path: Path) -> None:
    for at, source in enumerate(sources):
        words = [word.replace("SRC", str(source)).replace("DST", str(tmp_path / f"{at}{EVIL}")) for word in line]
        found = CliRunner().invoke(qconvert, words, prog_name="qconvert")
        assert isinstance(found.exception, SystemExit | None), (words, found.exception)
        assert found.exit_code != 1, found.stderr
        shown = (found.stdout + found.stderr).replace("\n", "")
        assert RAW.search(shown) is None, shown
        assert found.exit_code == 0 or len(found.stderr.splitlines()) >= 1 or "--json" in words


def test_a_name_never_makes_a_line_of_its_own(sources: list[Path]) -> None:
    found = CliRunner().invoke(qconvert, ["inspect", str(sources[0]), "--tensors"])
    assert found.exit_code == 0, found.output
    assert "\\x1b[31m\\x1b]0;owned\\x07\\r\\x9b2J\\n\\u202egpj\\u2066x\\u2069\\u200f" in found.stdout
    assert not any(line.startswith(("gpj", "\u202e")) for line in found.stdout.splitlines())


def test_every_part_of_an_error_is_escaped() -> None:
    error = QFormatError("code", f"a{EVIL}", path=EVIL, tensor=EVIL, hint=EVIL)
    assert RAW.search(str(error)) is None


def test_words_of_a_model_keep_what_is_text() -> None:
    text = "a\tb\nc — 漢字\u3000かな 👩\u200d💻 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 e\u0301\u00a0"
    assert spoken(text) == text
    assert RAW.search(spoken(EVIL)) is None and spoken("\ud800") == "\\ud800"
