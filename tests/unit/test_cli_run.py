"""``run``, ``perplexity`` and ``compare`` on tiny models of several formats."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent / "convert"))

from checkpoints import converted, ready

from converters import schemas
from converters.cli import qconvert
from converters.output import Output

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
TEXT = " ".join(f"word {i % 37} and {i * i} more of this" for i in range(40))


def cli(*words: object) -> Result:
    return CliRunner().invoke(qconvert, [str(word) for word in words])


def data(*words: object) -> dict[str, Any]:
    result = cli(*words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    jsonschema.validate(found, schemas.schema(str(words[0])))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A GPTQ checkpoint, a GGUF with its codes, and a text."""
    folder = tmp_path_factory.mktemp("models")
    source = ready("gptq/4b-g32-sym", folder)
    converted(source, folder / "model.gguf", "gguf", allow_requantize=True)
    (folder / "text.txt").write_text(TEXT)
    return source, folder / "model.gguf", folder / "text.txt"


def test_run_streams_what_json_says(models: tuple[Path, Path, Path]) -> None:
    for model in models[:2]:
        words = ("run", model, "-p", "word 3 and", "-n", 5, "--device", "cpu", "--dtype", "float32")
        found = data(*words)
        assert found["new_tokens"] <= 5 and found["prompt_tokens"] > 0
        shown = cli(*words)
        assert shown.exit_code == 0 and shown.stdout.rstrip("\n") == found["text"].rstrip("\n")


def test_run_puts_a_prompt_into_the_chat_template(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    plain = data("run", models[0], "-p", "word", "-n", 1, "--device", "cpu")
    assert data("run", models[0], "-p", "word", "-n", 1, "--chat", "--device", "cpu")["prompt_tokens"] > plain["prompt_tokens"]
    bare = tmp_path / "bare"
    shutil.copytree(models[0], bare)
    (bare / "chat_template.jinja").unlink()
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    result = cli("run", bare, "-p", "hello", "--chat", "--device", "cpu")
    assert result.exit_code == 2 and "chat template" in result.stderr


def test_perplexity_is_that_of_the_floats(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, gguf, text = models
    found = data("perplexity", source, "--text", text, "--context", 32, "--device", "cpu", "--dtype", "float32")
    converted(source, tmp_path / "floats", "hf:f32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    starts = list(tokenizer("a").input_ids)[:1] == [tokenizer.bos_token_id]
    step = 31 if starts else 32
    total, count = 0.0, 0
    for at in range(0, len(ids), step):
        run = torch.tensor([([tokenizer.bos_token_id] if starts else []) + ids[at : at + step]])
        if run.shape[1] > 1:
            with torch.no_grad():
                total += float(model(run, labels=run).loss) * (run.shape[1] - 1)
            count += run.shape[1] - 1
    assert found["tokens"] == count
    assert found["nll"] == pytest.approx(total / count, abs=1e-4)
    limited = data("perplexity", gguf, "--text", text, "--context", 32, "--windows", 1, "--device", "cpu")
    assert limited["windows"] == 1


def reported(path: Path) -> dict[str, Any]:
    """A report that is as the schema says."""
    jsonschema = pytest.importorskip("jsonschema")
    found: dict[str, Any] = json.loads(path.read_text())
    schema = Path(__file__).resolve().parents[2] / "converters" / "schemas" / "report.schema.json"
    jsonschema.validate(found, json.loads(schema.read_text()))
    return found


def test_a_checkpoint_agrees_with_its_conversion(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, gguf, text = models
    where = tmp_path / "r.json"
    found = data("compare", source, gguf, "--text", text, "--context", 32, "--device", "cpu", "--dtype", "float32", "--report", where)
    assert found["kl"] == pytest.approx(0.0, abs=1e-6) and found["top1"] > 0.99
    assert found["nll"][0] == pytest.approx(found["nll"][1], abs=1e-4)
    report = reported(where)
    assert report["agreement"]["kl"] == found["kl"] and report["lossless"] and report["agreement"]["text"] == "text.txt"


def test_a_wrong_device_and_a_short_text_are_errors(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    result = cli("run", models[0], "-p", "x", "--device", "nowhere")
    assert result.exit_code == 2 and "device" in result.stderr
    (tmp_path / "empty.txt").write_text("")
    assert cli("perplexity", models[0], "--text", tmp_path / "empty.txt").exit_code == 2


def test_control_characters_of_a_model_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    Output().stream("a\x1b[31m\tb\nc")
    assert capsys.readouterr().out == "a\\x1b[31m\tb\nc"


def test_floats_are_quantized_while_they_are_loaded(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    floats = ready("dense/llama", tmp_path)
    converted(floats, tmp_path / "small.gguf", "gguf:q4_0", allow_requantize=True)
    words = ("--text", models[2], "--context", 32, "--windows", 2, "--device", "cpu", "--dtype", "float32")
    on_load = data("perplexity", floats, "--quantize", "gguf:q4_0", *words)
    assert on_load["nll"] == pytest.approx(data("perplexity", tmp_path / "small.gguf", *words)["nll"], rel=1e-4)
    lost = data("compare", floats, floats, "--quantize", "gguf:q4_0", *words, "--report", tmp_path / "r.json")
    report = reported(tmp_path / "r.json")
    assert (report["target"], report["tensors"], report["agreement"]["kl"]) == ("gguf:q4_0", [], lost["kl"])
    assert lost["kl"] > 0 and lost["nll"][1] == pytest.approx(on_load["nll"], rel=1e-6)
    refused = cli("run", floats, "-p", "word", "--quantize", "gguf:nothing")
    assert refused.exit_code == 2 and "target-type" in refused.output
