"""Conversions that were killed go on: the bytes and the errors of an uninterrupted run, and nothing fetched or made twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from loopback import Fault, Hub, folder_files

from converters.api import convert
from converters.cli import qconvert
from converters.journal import journal_path
from converters.report import Report
from qformats.containers import atomic
from qformats.errors import OutputError, QFormatError, RemoteError, UsageError

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures"
LLAMA = FIXTURES / "dense" / "llama"
AWQ = FIXTURES / "awq" / "gemm-g32"


class Stop:
    """A progress that interrupts after so many calls."""

    def __init__(self, calls: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.calls, self.error = calls, error

    def __call__(self, done: int, total: int) -> None:
        self.calls -= 1
        if self.calls == 0:
            raise self.error


class Seen:
    """A progress that remembers its first call."""

    def __init__(self) -> None:
        self.first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        self.first = done if self.first is None else self.first


def interrupted(source: str | Path, out: Path, to: str, calls: int = 3, **options: object) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, to=to, workers=2, progress=Stop(calls), **options)  # type: ignore[arg-type]
    assert not out.exists() and journal_path(out).is_file()


def bytes_of(out: Path) -> dict[str, bytes]:
    return folder_files(out) if out.is_dir() else {"": out.read_bytes()}


def errors_of(report: Report) -> dict[str, float | None]:
    return {line.name: line.error for line in report.tensors}


@pytest.mark.parametrize(("to", "name"), [("gguf:q4_k_m", "a.gguf"), ("bitsandbytes:nf4", "out"), ("gguf:q8_0", "b.gguf")])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path: Path, to: str, name: str) -> None:
    (tmp_path / "whole").mkdir()
    whole = convert(LLAMA, tmp_path / "whole" / name, to=to)
    interrupted(LLAMA, tmp_path / name, to)
    seen = Seen()
    again = convert(LLAMA, tmp_path / name, to=to, resume=True, progress=seen)
    assert bytes_of(tmp_path / name) == bytes_of(tmp_path / "whole" / name)
    assert errors_of(again) == errors_of(whole) and seen.first
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "whole"])


def test_nothing_finished_is_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters import execute

    interrupted(LLAMA, tmp_path / "a.gguf", "gguf:q8_0")
    finished = {json.loads(line)["tensor"] for line in journal_path(tmp_path / "a.gguf").read_text().splitlines()[1:]}
    made: set[str] = set()
    run = execute._run_task
    monkeypatch.setattr(execute, "_run_task", lambda plan, task, *rest: (made.add(task.job.name), run(plan, task, *rest))[1])
    convert(LLAMA, tmp_path / "a.gguf", to="gguf:q8_0", resume=True)
    assert finished and made and not finished & made


def test_bytes_that_were_damaged_meanwhile_are_made_again(tmp_path: Path) -> None:
    convert(LLAMA, tmp_path / "whole.gguf", to="gguf:q8_0")
    interrupted(LLAMA, tmp_path / "a.gguf", "gguf:q8_0")
    partial = tmp_path / ".a.gguf.partial"
    partial.write_bytes(bytes(partial.stat().st_size))
    convert(LLAMA, tmp_path / "a.gguf", to="gguf:q8_0", resume=True)
    assert bytes_of(tmp_path / "a.gguf") == bytes_of(tmp_path / "whole.gguf")


@pytest.mark.parametrize("cut", [0, 3, 40])
def test_a_journal_cut_in_a_line_is_used_as_far_as_it_goes(tmp_path: Path, cut: int) -> None:
    convert(LLAMA, tmp_path / "whole.gguf", to="gguf:q8_0")
    interrupted(LLAMA, tmp_path / "a.gguf", "gguf:q8_0")
    journal = journal_path(tmp_path / "a.gguf")
    data = journal.read_bytes()
    journal.write_bytes(data[: len(data) - cut] if cut else b"")
    convert(LLAMA, tmp_path / "a.gguf", to="gguf:q8_0", resume=True)
    assert bytes_of(tmp_path / "a.gguf") == bytes_of(tmp_path / "whole.gguf")


def test_other_options_are_refused(tmp_path: Path) -> None:
    interrupted(LLAMA, tmp_path / "a.gguf", "gguf:q8_0")
    with pytest.raises(UsageError, match="journal-changed"):
        convert(LLAMA, tmp_path / "a.gguf", to="gguf:q4_0", resume=True)
    with pytest.raises(UsageError, match="journal-changed"):
        convert(AWQ, tmp_path / "a.gguf", to="gguf:q8_0", resume=True, allow_requantize=True)
    convert(LLAMA, tmp_path / "a.gguf", to="gguf:q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_changed_source_is_refused(tmp_path: Path) -> None:
    for name, data in folder_files(LLAMA).items():
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / name).write_bytes(data)
    interrupted(tmp_path / "src", tmp_path / "a.gguf", "gguf:q8_0")
    os.utime(tmp_path / "src" / "model.safetensors", ns=(1, 1))
    with pytest.raises(UsageError, match="journal-changed"):
        convert(tmp_path / "src", tmp_path / "a.gguf", to="gguf:q8_0", resume=True)


def test_the_message_of_an_interrupted_command_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("converters.execute._run_task", interrupt)
    run = CliRunner().invoke(qconvert, ["quantize", str(LLAMA), str(tmp_path / "a.gguf"), "--to", "gguf:q8_0"])
    assert run.exit_code == 130 and "run the same command with --resume" in run.output and ".a.gguf.partial" in run.output
    assert {path.name for path in tmp_path.iterdir()} == {".a.gguf.partial", ".a.gguf.journal"}


def test_resume_begins_where_there_is_nothing_to_go_on_with(tmp_path: Path) -> None:
    convert(LLAMA, tmp_path / "a.gguf", to="gguf:q8_0", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_errors_that_will_come_again_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        convert(LLAMA, tmp_path / "a.gguf", to="gguf:q8_0", progress=Stop(3, ZeroDivisionError))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(LLAMA, tmp_path / "whole.gguf", to="gguf:q8_0")
    calls, write = [0], atomic.OutputFile.pwrite

    def full(self: atomic.OutputFile, offset: int, buffer: memoryview) -> None:
        calls[0] += 1
        if calls[0] > 6:
            raise OutputError("no-space", "cannot be written", path=self.final)
        write(self, offset, buffer)

    monkeypatch.setattr(atomic.OutputFile, "pwrite", full)
    with pytest.raises(OutputError, match="--resume"):
        convert(LLAMA, tmp_path / "a.gguf", to="gguf:q8_0")
    monkeypatch.setattr(atomic.OutputFile, "pwrite", write)
    convert(LLAMA, tmp_path / "a.gguf", to="gguf:q8_0", resume=True)
    assert bytes_of(tmp_path / "a.gguf") == bytes_of(tmp_path / "whole.gguf")


# ---------------------------------------------------------------- out of the hub


def test_a_hub_that_goes_away_and_comes_back(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/model", folder_files(AWQ))
    convert(AWQ, tmp_path / "whole.gguf", to="gguf")
    with pytest.raises(KeyboardInterrupt):
        convert("hf://org/model", tmp_path / "a.gguf", to="gguf", workers=1, progress=Stop(4))
    hub.faults = [Fault("/cdn/", times=None, status=503)]
    with pytest.raises(QFormatError) as caught:
        convert("hf://org/model", tmp_path / "a.gguf", to="gguf", resume=True)
    assert isinstance(caught.value, RemoteError)
    hub.faults.clear()
    convert("hf://org/model", tmp_path / "a.gguf", to="gguf", resume=True)
    assert bytes_of(tmp_path / "a.gguf") == bytes_of(tmp_path / "whole.gguf")


def test_another_commit_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/model", folder_files(AWQ))
    with pytest.raises(KeyboardInterrupt):
        convert("hf://org/model", tmp_path / "a.gguf", to="gguf", workers=1, progress=Stop(4))
    hub.add("org/model", {"README.md": b"new words"})
    with pytest.raises(UsageError, match="journal-changed"):
        convert("hf://org/model", tmp_path / "a.gguf", to="gguf", resume=True)


def test_a_killed_conversion_out_of_the_hub_goes_on_with_the_same_command(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/model", folder_files(LLAMA))
    convert(LLAMA, tmp_path / "whole.gguf", to="gguf:q8_0", allow_requantize=True)
    journal, command = journal_path(tmp_path / "a.gguf"), [sys.executable, "-c", _KILLED, str(tmp_path / "a.gguf")]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert len(journal.read_text().splitlines()) > 2 and not (tmp_path / "a.gguf").exists()
    run = [sys.executable, "-m", "converters.cli", "quantize", "hf://org/model", str(tmp_path / "a.gguf"), "--to", "gguf:q8_0", "--resume"]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    assert bytes_of(tmp_path / "a.gguf") == bytes_of(tmp_path / "whole.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", "whole.gguf", "hf"}


_KILLED = """
import os, signal, sys
from converters.api import convert
calls = 0
def progress(done, total):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
convert("hf://org/model", sys.argv[1], to="gguf:q8_0", workers=2, allow_requantize=True, progress=progress)
"""
