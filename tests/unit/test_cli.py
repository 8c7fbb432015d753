"""The command line on fixtures: what each command prints, writes and returns."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from converters import cli, commands_convert
from converters.cli import qconvert
from converters.output import Output, size, table
from qformats import registry
from qformats.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
AWQ = ROOT / "fixtures" / "awq" / "gemm-g32"
GPTQ = ROOT / "fixtures" / "gptq" / "4b-g32-sym"
ACT_ORDER = ROOT / "fixtures" / "gptq" / "4b-g32-act"
DENSE = ROOT / "fixtures" / "dense" / "llama"
SMALL_GGUF = ROOT / "fixtures" / "containers" / "small.gguf"


def run(*words: object) -> Result:
    """One command in this process; never lets an exception but SystemExit through."""
    found = CliRunner().invoke(qconvert, [str(word) for word in words], prog_name="qconvert")
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def ran(*words: object) -> Result:
    """One command that must succeed."""
    found = run(*words)
    assert found.exit_code == 0, found.stderr
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF made from the AWQ fixture."""
    path = tmp_path_factory.mktemp("made") / "model.gguf"
    ran("awq-to-gguf", AWQ, path)
    return path


# ---------------------------------------------------------------- help, names, usage


def test_help_names_the_main_commands_and_says_that_there_are_more() -> None:
    text = ran("--help").stdout
    listed = re.findall(r"^  ([a-z][\w-]+)  ", text, re.MULTILINE)
    assert listed[:6] == ["inspect", "plan", "convert", "quantize", "dequantize", "verify"]
    assert listed == [*cli.COMMANDS, "awq-to-gguf", "gptq-to-gguf", "gguf-to-gptq", "gguf-to-awq", "gguf-to-hf"]
    assert "Examples:\n    qconvert inspect" in text and "Every X-to-Y" in " ".join(text.split())


@pytest.mark.parametrize("name", [*cli.COMMANDS, *cli.registry_pairs()])
def test_every_command_has_help_with_an_example_and_the_output_flags(name: str) -> None:
    text = ran(name, "--help").stdout
    assert "--json" in text and "--quiet" in text and f"Examples:\n    qconvert {name}" in text


@pytest.mark.parametrize(("word", "name"), [(alias, row.name) for row in registry.ROWS for alias in row.aliases])
def test_other_words_for_a_format_make_commands_too(word: str, name: str) -> None:
    other = "awq" if name != "awq" else "gptq"
    for word_first, name_first in ((f"{word}-to-{other}", f"{name}-to-{other}"), (f"{other}-to-{word}", f"{other}-to-{name}")):
        assert name_first in ran(word_first, "--help").output


@pytest.mark.parametrize(("typed", "meant"), [("inspekt", "inspect"), ("awq-to-guff", "awq-to-gguf"), ("hf-to-gpt", "hf-to-gptq")])
def test_a_mistyped_command_is_suggested(typed: str, meant: str) -> None:
    found = run(typed)
    assert found.exit_code == 2
    assert f"there is no command '{typed}' — did you mean '{meant}'?" in found.stderr


def test_a_command_like_nothing_points_to_the_help() -> None:
    assert "see qconvert --help" in run("zzzzzz").stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["convert", AWQ, "x.gguf"], "target-missing"),
        (["convert", AWQ, "x.gguf", "--to", "gguf", "--plan", "p.json"], "target-missing"),
        (["convert", AWQ, "x.gguf", "--to", "gguff"], "unknown-format"),
        (["convert", AWQ, "x.gguf", "--to", "gguf:q9"], "target-type"),
        (["convert", AWQ, "x.gguf", "--to", "gptq,grp=3"], "target-option"),
        (["convert", AWQ, "x.gguf", "--to", "gguf", "--workers", "0"], "usage"),
        (["convert", AWQ, "x.gguf", "--to", "gguf", "--tensor-type", "attn"], "usage"),
        (["convert", AWQ, "x.gguf", "--to", "gguf", "--tensor-type", "(=q8_0"], "usage"),
        (["convert", AWQ, "x.gguf", "--to", "gguf", "--report", "r.txt"], "report-suffix"),
        (["convert", AWQ, "x.json", "--to", "gguf", "--report", "x.json"], "report-path"),
        (["convert", AWQ, "x.gguf", "--to", "gguf", "--nonsense"], "usage"),
        (["quantize", DENSE, "x.gguf", "--to", "gguf"], "target-type-missing"),
        (["dequantize", AWQ, "x", "--to", "gguf:q8_0"], "target-type"),
        (["awq-to-gguf", GPTQ, "x.gguf"], "source-format"),
        (["gguf-to-hf", AWQ, "x"], "source-format"),
        (["inspect"], "usage"),
    ],
)
def test_wrong_requests_exit_2_with_their_code(words: list[Any], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain, as_json = run(*words), run(*words, "--json")
    assert (plain.exit_code, as_json.exit_code) == (2, 2)
    assert plain.stderr.startswith("qconvert: ") and plain.stderr.endswith(f"[{code}]\n") and plain.stdout == ""
    assert json.loads(as_json.stdout)["error"]["code"] == code
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- inspect, formats


def test_inspect_gives_format_types_sizes_and_bits() -> None:
    data = json.loads(ran("inspect", ACT_ORDER, "--json").stdout)
    assert (data["format"], data["container"], data["architecture"]) == ("gptq", "safetensors", "LlamaForCausalLM")
    types = {row["type"]: row for row in data["types"]}
    assert set(types) == {"F16", "int4 group 32, act-order"}
    packed = types["int4 group 32, act-order"]
    assert (packed["tensors"], packed["weights"]) == (7, 36864)
    assert packed["bits_per_weight"] == pytest.approx(8 * packed["nbytes"] / packed["weights"], abs=1e-3)
    assert data["nbytes"] == (ACT_ORDER / "model.safetensors").stat().st_size
    assert "tensors" not in data


def test_inspect_lists_tensors_on_request() -> None:
    data = json.loads(ran("inspect", ACT_ORDER, "--tensors", "--json").stdout)
    assert len(data["tensors"]) == data["n_tensors"] == 11
    line = next(line for line in ran("inspect", ACT_ORDER, "--tensors").stdout.splitlines() if "self_attn.q_proj.weight" in line)
    assert line.split("  ")[0] == "model.layers.0.self_attn.q_proj.weight" and "64 x 64" in line


def test_inspect_follows_shards(made: Path) -> None:
    data = json.loads(ran("inspect", ROOT / "fixtures" / "containers" / "split-00001-of-00003.gguf", "--json").stdout)
    assert len(data["files"]) == 3
    assert data["nbytes"] == sum(f.stat().st_size for f in (ROOT / "fixtures" / "containers").glob("split-*.gguf"))


def test_inspect_says_where_a_converted_file_came_from(made: Path) -> None:
    assert "made from     awq" in ran("inspect", made).stdout
    assert json.loads(ran("inspect", made, "--json").stdout)["converted_from"] == "awq"


@pytest.mark.parametrize(
    ("make", "exit_code", "code"),
    [
        (lambda p: None, 5, "not-found"),
        (lambda p: p.write_bytes(SMALL_GGUF.read_bytes()[:100]), 5, None),
        (lambda p: p.with_suffix(".bin").write_bytes(b"\x80\x02"), 5, "pickle"),
        (lambda p: p.write_bytes(b""), 5, None),
    ],
)
def test_inspect_of_a_bad_file(make: Callable[[Path], Any], exit_code: int, code: str | None, tmp_path: Path) -> None:
    make(tmp_path / "model.gguf")
    path = next(tmp_path.iterdir(), tmp_path / "model.gguf")
    found = run("inspect", path)
    assert found.exit_code == exit_code and found.stdout == ""
    assert len(found.stderr.splitlines()) == 1 and str(path) in found.stderr
    if code is not None:
        assert f"[{code}]" in found.stderr


def test_control_characters_out_of_a_file_are_escaped(tmp_path: Path) -> None:
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a\x1b[31mred\nline": tensor}).encode()
    (tmp_path / "evil.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    found = run("inspect", tmp_path / "evil.safetensors", "--tensors")
    assert "\x1b" not in found.output and "\\x1b[31mred\\nline" in found.output


def test_formats_lists_the_registry() -> None:
    data = json.loads(ran("formats", "--json").stdout)
    assert [f["name"] for f in data["formats"]] == registry.names()
    assert data["commands"] == cli.registry_pairs()
    assert all(name in ran("formats").stdout for name in registry.names())


# ---------------------------------------------------------------- plan


def test_plan_writes_nothing_and_gives_the_smallest_exact_type_with_its_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = ran("plan", AWQ, "--to", "gguf").stdout
    assert re.search(r"^exact +10 .*Q5_0 7", text, re.MULTILINE)
    assert re.search(r"q4_1 would save 2\.3 kB on 7 tensors: codes kept, offsets rounded", text)
    assert list(tmp_path.iterdir()) == []


def test_plan_json_has_every_tensor_and_no_refusal() -> None:
    data = json.loads(ran("plan", AWQ, "--to", "gguf", "--json").stdout)
    assert data["depth"] == "scan" and data["refused"] is None and len(data["tensors"]) == 11
    assert all(t["reason"] and t["kind"] in ("copied", "exact") for t in data["tensors"])


def test_a_header_plan_says_that_it_only_claims() -> None:
    assert "kinds are claims" in ran("plan", AWQ, "--to", "gguf", "--header").stdout
    assert json.loads(ran("plan", AWQ, "--to", "gguf", "--header", "--json").stdout)["depth"] == "header"


def test_plan_with_exact_exits_7_where_something_is_lost() -> None:
    found = run("plan", AWQ, "--to", "gguf:q4_1", "--exact", "--json")
    assert found.exit_code == 7
    data = json.loads(found.stdout)
    assert data["refused"]["code"] == "not-exact" and data["kinds"]["codes-exact"] == 7


def test_a_plan_that_needs_consent_says_so() -> None:
    found = ran("plan", ACT_ORDER, "--to", "gguf")
    assert found.stderr.startswith("convert would stop here: add --allow-requantize")


def test_a_saved_plan_is_carried_out(tmp_path: Path, made: Path) -> None:
    (tmp_path / "plan.json").write_text(ran("plan", AWQ, "--to", "gguf", "--json").stdout)
    ran("convert", AWQ, tmp_path / "model.gguf", "--plan", tmp_path / "plan.json")
    assert (tmp_path / "model.gguf").read_bytes() == made.read_bytes()


def test_a_saved_plan_of_another_source_is_stale(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(ran("plan", AWQ, "--to", "gguf", "--json").stdout)
    found = run("convert", GPTQ, tmp_path / "model.gguf", "--plan", tmp_path / "plan.json")
    assert found.exit_code == 2 and "[plan-stale]" in found.stderr and not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("text", "exit_code", "code"),
    [("{}", 5, "plan-file"), ("[]", 5, "plan-file"), ("no json", 5, "plan-file"), ("[" * 10**5, 5, "plan-file"), (None, 5, "not-found")],
)
def test_a_file_that_is_no_plan(text: str | None, exit_code: int, code: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    found = run("convert", AWQ, tmp_path / "model.gguf", "--plan", tmp_path / "plan.json")
    assert found.exit_code == exit_code and f"[{code}]" in found.stderr


def test_a_header_plan_is_not_carried_out(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(ran("plan", AWQ, "--to", "gguf", "--header", "--json").stdout)
    found = run("convert", AWQ, tmp_path / "model.gguf", "--plan", tmp_path / "plan.json")
    assert found.exit_code == 2 and "[plan-depth]" in found.stderr


# ---------------------------------------------------------------- convert and its kin


def test_convert_and_the_named_pair_give_the_same_bytes(tmp_path: Path, made: Path) -> None:
    found = ran("convert", AWQ, tmp_path / "model.gguf", "--to", "gguf", "--workers", "1")
    assert (tmp_path / "model.gguf").read_bytes() == made.read_bytes()
    assert "exact Q5_0, 7 tensors such as" in found.stdout and "model.gguf (gguf," in found.stdout


def test_quiet_prints_nothing_and_json_prints_one_document(tmp_path: Path) -> None:
    quiet = ran("awq-to-gguf", AWQ, tmp_path / "a.gguf", "--quiet")
    assert quiet.output == ""
    data = json.loads(ran("awq-to-gguf", AWQ, tmp_path / "b.gguf", "--json").stdout)
    assert data["kinds"] == {"copied": 1, "exact": 10} and data["lossless"] is True
    assert data["nbytes"] == (tmp_path / "b.gguf").stat().st_size
    assert {t["type"] for t in data["tensors"]} == {"F16", "F32", "Q5_0"}


def test_a_named_type_is_taken(tmp_path: Path) -> None:
    data = json.loads(ran("awq-to-gguf", AWQ, tmp_path / "m.gguf", "--type", "q4_1", "--json").stdout)
    assert data["kinds"]["codes-exact"] == 7 and data["lossless"] is False


def test_tensor_type_names_the_type_of_some_tensors(tmp_path: Path) -> None:
    data = json.loads(ran("awq-to-gguf", AWQ, tmp_path / "m.gguf", "--tensor-type", "attn_v=q5_1", "--json").stdout)
    types = {t["name"]: t["type"] for t in data["tensors"]}
    assert types["blk.0.attn_v.weight"] == "Q5_1" and types["blk.0.attn_q.weight"] == "Q5_0"


def test_exact_stops_before_writing_and_names_the_offenders(tmp_path: Path) -> None:
    found = run("convert", AWQ, tmp_path / "m.gguf", "--to", "gguf:q4_1", "--exact")
    assert found.exit_code == 7 and "7 tensors cannot be kept exactly" in found.stderr
    assert re.search(r"codes-exact Q4_1, [1-7] tensors \(.*\): the offset of \d+ of [\d,]+ blocks rounds", found.stderr)
    assert list(tmp_path.iterdir()) == []


def test_new_codes_need_consent(tmp_path: Path) -> None:
    found = run("gptq-to-gguf", ACT_ORDER, tmp_path / "m.gguf")
    assert found.exit_code == 7 and "[requantize]" in found.stderr and list(tmp_path.iterdir()) == []
    data = json.loads(ran("gptq-to-gguf", ACT_ORDER, tmp_path / "m.gguf", "--allow-requantize", "--json").stdout)
    assert data["kinds"]["requantized"] >= 1 and 0 < data["worst_error"] < 0.02


def test_quantize_is_consent_and_measures_the_error(tmp_path: Path) -> None:
    found = ran("quantize", DENSE, tmp_path / "m.gguf", "--to", "gguf:q8_0")
    assert re.search(r"relative RMS error measured on 16 tensors, largest 0\.00\d", found.stdout)


def test_file_types_and_their_options_through_a_saved_plan(tmp_path: Path) -> None:
    wishes = ("--to", "gguf:q4_k_m", "--output-tensor-type", "Q5_1", "--token-embedding-type", "q4_0", "--pure")
    saved = tmp_path / "plan.json"
    saved.write_text(ran("plan", DENSE, *wishes, "--json").stdout)
    assert json.loads(saved.read_text())["options"]["pure"] is True
    ran("convert", DENSE, tmp_path / "m.gguf", "--plan", saved)
    ran("verify", DENSE, tmp_path / "m.gguf", "--replay")
    data = json.loads(ran("inspect", tmp_path / "m.gguf", "--json").stdout)
    assert {row["type"] for row in data["types"]} == {"Q5_1", "Q4_0", "Q5_0", "F32"}
    found = run("convert", DENSE, tmp_path / "n.gguf", "--plan", saved, "--pure")
    assert found.exit_code == 2 and "[plan-options]" in found.stderr


def test_dequantize_gives_floats(tmp_path: Path) -> None:
    ran("dequantize", AWQ, tmp_path / "floats")
    data = json.loads(ran("inspect", tmp_path / "floats", "--json").stdout)
    assert data["format"] == "hf" and {row["type"] for row in data["types"]} <= {"BF16", "F16"}


def test_the_way_back_through_the_pairs(tmp_path: Path, made: Path) -> None:
    ran("gguf-to-awq", made, tmp_path / "awq")
    ran("gguf-to-gptq", made, tmp_path / "gptq")
    ran("gptq-to-awq", GPTQ, tmp_path / "awq2")
    formats = [json.loads(ran("inspect", tmp_path / name, "--json").stdout)["format"] for name in ("awq", "gptq", "awq2")]
    assert formats == ["awq", "gptq", "awq"]


def test_an_existing_destination_is_kept_unless_overwriting(tmp_path: Path, made: Path) -> None:
    target = tmp_path / "m.gguf"
    target.write_bytes(b"precious")
    found = run("awq-to-gguf", AWQ, target)
    assert found.exit_code == 4 and target.read_bytes() == b"precious"
    ran("awq-to-gguf", AWQ, target, "--overwrite")
    assert target.read_bytes() == made.read_bytes()


def test_the_destination_may_not_be_the_source(tmp_path: Path, made: Path) -> None:
    before = made.read_bytes()
    found = run("convert", made, made, "--to", "gguf:q8_0", "--overwrite")
    assert found.exit_code == 4 and made.read_bytes() == before


# ---------------------------------------------------------------- verify


def test_verify_accepts_what_convert_made(made: Path) -> None:
    assert "ok, source and output have the digests" in ran("verify", AWQ, made).stdout
    assert "ok, every byte" in ran("verify", AWQ, made, "--replay").stdout
    data = json.loads(ran("verify", AWQ, made, "--json").stdout)
    assert (data["ok"], data["method"], data["exit_code"]) == (True, "digests", 0)


@pytest.mark.parametrize("at", [-100, 30_000, 200], ids=["weights", "middle", "metadata"])
def test_verify_finds_one_flipped_bit(at: int, tmp_path: Path, made: Path) -> None:
    data = bytearray(made.read_bytes())
    data[at] ^= 1
    (tmp_path / "m.gguf").write_bytes(data)
    found = run("verify", AWQ, tmp_path / "m.gguf", "--json")
    assert found.exit_code == 3
    document = json.loads(found.stdout)
    assert document["ok"] is False and document["exit_code"] == 3 and document["mismatches"]
    plain = run("verify", AWQ, tmp_path / "m.gguf")
    assert plain.exit_code == 3 and "[verify]" in plain.stderr
    quiet = run("verify", AWQ, tmp_path / "m.gguf", "--quiet")
    assert quiet.exit_code == 3 and quiet.stdout == ""


# ---------------------------------------------------------------- errors and interrupts


def raising(error: BaseException) -> Callable[..., None]:
    def command(*_: Any, **__: Any) -> None:
        raise error

    return command


def test_a_defect_is_one_line_and_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converters.inspect.inspect_path", raising(ZeroDivisionError("oh\x1b[0m")))
    found = run("inspect", AWQ)
    assert found.exit_code == 1
    assert (
        found.stderr == "qconvert: ZeroDivisionError: oh\\x1b[0m — this is a defect: run again with --traceback and report it [internal]\n"
    )
    assert json.loads(run("inspect", AWQ, "--json").stdout)["exit_code"] == 1


def test_traceback_shows_the_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converters.inspect.inspect_path", raising(ZeroDivisionError()))
    found = CliRunner().invoke(qconvert, ["inspect", str(AWQ), "--traceback"])
    assert isinstance(found.exception, ZeroDivisionError)


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converters.inspect.inspect_path", raising(KeyboardInterrupt()))
    found = run("inspect", AWQ)
    assert found.exit_code == 130 and found.stderr.endswith("under the name of the output [interrupted]\n")
    error = KeyboardInterrupt()
    error.add_note("--resume")
    monkeypatch.setattr("converters.inspect.inspect_path", raising(error))
    assert run("inspect", AWQ).stderr.endswith("of the output — --resume [interrupted]\n")
    assert json.loads(run("inspect", AWQ, "--json").stdout)["error"]["hint"] == "--resume"


@pytest.mark.parametrize(("words", "exit_code"), [(f"inspect {AWQ} --tensors", 141), ("inspect nowhere --json", 5)])
def test_a_pipe_that_closes_early_is_no_traceback(words: str, exit_code: int) -> None:
    command = f"{sys.executable} -m converters.cli {words} | true; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (exit_code, "")


def test_prints_under_an_ascii_terminal() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "converters.cli", "plan", str(AWQ), "--to", "gguf"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and "\\u2192" in found.stdout


# ---------------------------------------------------------------- output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def of_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a terminal that someone watches."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_progress_on_a_terminal_shows_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    with Output().progress("model.gguf") as progress:
        assert progress is not None
        progress(25_000_000, 100_000_000)
    assert "model.gguf" in terminal.getvalue() and "25.0/100.0 MB" in terminal.getvalue()


def test_planning_shows_a_sign_of_life_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", terminal)
        with Output().working("planning"):
            pass
        assert ("planning" in terminal.getvalue()) is shown


@pytest.mark.parametrize("output", [Output(as_json=True), Output(quiet=True)], ids=["json", "quiet"])
def test_no_progress_with_json_or_quiet(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with output.progress("x") as progress:
        assert progress is None


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_no_progress_where_nobody_watches(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv(name, value)
    with Output().progress("x") as progress, Output().steps("x", "steps") as steps, Output().working("x"):
        assert progress is None and steps is None
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [20, 60, 200])
def test_progress_keeps_to_the_width_and_to_no_color(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    with Output().progress("a name that is much longer than a narrow terminal is wide.gguf") as progress:
        assert progress is not None
        progress(1, 2)
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[?\d;]*[A-Zhl]", "", terminal.getvalue()))
    assert max(map(len, lines)) <= width and not re.search(r"\x1b\[[\d;]*[34]\d", terminal.getvalue())


def test_no_progress_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Output().progress("x") as progress:
        assert progress is None


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (2.5e9, "2.5 GB"), (3e15, "3e+03 TB")]
)
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_tables_escape_their_cells() -> None:
    assert table(("a",), [("x\n",)]) == ["a", "x\\n"]
    assert table(("a", "b"), [("模型", 1), ("e\u0301", 2)]) == ["a     b", "模型  1", "e\u0301     2"]


def test_what_other_packages_say_is_escaped_and_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def command(*_: Any, **__: Any) -> None:
        warnings.warn("look\x1b[2J\rhere", stacklevel=1)
        logging.getLogger("someone").warning("%s", "and\x1b]0;title\x07")
        raise UsageError("stop", "stop")

    monkeypatch.setattr("converters.inspect.inspect_path", command)
    said = run("inspect", AWQ).stderr + capfd.readouterr().err
    assert "warning: look\\x1b[2J\\rhere\n" in said and "\x1b" not in said and "\x07" not in said
    assert run("inspect", AWQ, "--quiet").stderr + capfd.readouterr().err == "qconvert: stop [stop]\n"


def test_a_pair_is_a_command_of_its_own() -> None:
    command = commands_convert.pair("hf", "gguf")
    assert isinstance(command, click.Command) and command.name == "hf-to-gguf"
