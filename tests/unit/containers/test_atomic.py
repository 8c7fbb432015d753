"""Atomic output: complete under the final name, or not there at all."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qformats.containers.atomic import OutputDirectory, OutputFile
from qformats.errors import OutputError, Unsafe


@pytest.fixture
def umask() -> Iterator[None]:
    old = os.umask(0o027)
    yield
    os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_nothing_has_the_final_name_before_commit(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "a.gguf", 4, overwrite=False) as out:
        out.pwrite(0, b"abcd")
        assert os.listdir(tmp_path) == [".a.gguf.partial"]
        out.commit()
    assert os.listdir(tmp_path) == ["a.gguf"]
    assert (tmp_path / "a.gguf").read_bytes() == b"abcd"


def test_leaving_without_commit_removes_everything(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), OutputFile(tmp_path / "a", 4, overwrite=False) as out:
        out.pwrite(0, b"ab")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with pytest.raises(OutputError, match="closed"):
        out.pwrite(0, b"a")


def test_planned_size_is_the_final_size_and_gaps_are_zero(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "a", 8, overwrite=False) as out:
        out.pwrite(2, memoryview(b"xy"))
        out.commit()
        out.commit()
    assert (tmp_path / "a").read_bytes() == b"\0\0xy\0\0\0\0"


def test_size_may_be_unknown(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "a", None, overwrite=False) as out:
        out.pwrite(3, b"z")
        out.commit()
    assert (tmp_path / "a").read_bytes() == b"\0\0\0z"


def test_mode_follows_the_umask(tmp_path: Path, umask: None) -> None:
    with OutputFile(tmp_path / "a", 1, overwrite=False) as out:
        out.commit()
    with OutputDirectory(tmp_path / "d", None, overwrite=False) as directory:
        directory.write_bytes("config.json", b"{}")
        directory.commit()
    assert mode(tmp_path / "a") == 0o640
    assert mode(tmp_path / "d") == 0o750
    assert mode(tmp_path / "d" / "config.json") == 0o640


def test_overwrite_keeps_the_old_file_until_commit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with OutputFile(path, 3, overwrite=True) as out:
        out.pwrite(0, b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"old"
    with OutputFile(path, 3, overwrite=True) as out:
        out.pwrite(0, b"new")
        out.commit()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_overwriting_a_link_leaves_its_target_alone(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    os.symlink(tmp_path / "target", tmp_path / "a")
    with OutputFile(tmp_path / "a", 3, overwrite=True) as out:
        out.pwrite(0, b"new")
        out.commit()
    assert (tmp_path / "target").read_bytes() == b"old"
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_file_created_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "a", 3, overwrite=False) as out:
        (tmp_path / "a").write_bytes(b"theirs")
        with pytest.raises(OutputError) as caught:
            out.commit()
    assert caught.value.code == "exists"
    assert (tmp_path / "a").read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_threads_write_disjoint_ranges(workers: int, tmp_path: Path) -> None:
    pieces = [bytes([n]) * 10_000 for n in range(64)]
    with OutputFile(tmp_path / "a", 640_000, overwrite=False) as out:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda n: out.pwrite(n * 10_000, pieces[n]), reversed(range(64))))
        out.commit()
    assert (tmp_path / "a").read_bytes() == b"".join(pieces)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    with OutputFile(tmp_path / "a", 10, overwrite=False) as out:
        out.pwrite(0, b"0123456789")
        out.commit()
    assert (tmp_path / "a").read_bytes() == b"0123456789"


KILLED = """
import sys, time
from pathlib import Path
from qformats.containers.atomic import OutputDirectory, OutputFile
kind, path = sys.argv[1], Path(sys.argv[2])
out = OutputFile(path, 1000, False) if kind == "file" else OutputDirectory(path, None, False)
out.pwrite(0, b"half") if kind == "file" else out.write_bytes("config.json", b"{}")
print("ready", flush=True)
time.sleep(60)
"""


def start(kind: str, path: Path) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[3]
    env = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, kind, str(path)], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_killed_run_leaves_no_final_name_and_does_not_block_the_next(kind: str, tmp_path: Path) -> None:
    final = tmp_path / "out"
    process = start(kind, final)
    try:
        with pytest.raises(OutputError) as caught:
            OutputFile(final, 4, False) if kind == "file" else OutputDirectory(final, None, False)
        assert caught.value.code == "in-use"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert os.listdir(tmp_path) == [".out.partial"]
    if kind == "file":
        with OutputFile(final, 4, False) as out:
            out.pwrite(0, b"good")
            out.commit()
        assert final.read_bytes() == b"good"
    else:
        with OutputDirectory(final, None, False) as directory:
            directory.write_bytes("other.json", b"{}")
            directory.commit()
        assert os.listdir(final) == ["other.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_in_place_of_the_partial_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"safe")
    os.symlink(tmp_path / "victim", tmp_path / ".a.partial")
    with pytest.raises(OutputError) as caught:
        OutputFile(tmp_path / "a", 4, overwrite=True)
    assert caught.value.code == "unwritable"
    assert (tmp_path / "victim").read_bytes() == b"safe"


def checkpoint(path: Path, text: bytes) -> None:
    path.mkdir()
    (path / "config.json").write_bytes(text)


def test_directory_appears_complete_and_commits_open_files(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out", 100, overwrite=False) as out:
        out.write_bytes("config.json", b"{}")
        weights = out.file("model.safetensors", 3)
        weights.pwrite(0, b"abc")
        assert os.listdir(tmp_path) == [".out.partial"]
        out.commit()
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"abc"


def test_aborted_directory_is_gone(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out", None, overwrite=False) as out:
        out.write_bytes("config.json", b"{}")
        out.file("model.safetensors", 3)
    assert os.listdir(tmp_path) == []


def test_directory_overwrite_swaps_the_whole_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path / "out", b"old")
    (tmp_path / "out" / "stale.safetensors").write_bytes(b"x")
    with OutputDirectory(tmp_path / "out", None, overwrite=True) as out:
        out.write_bytes("config.json", b"new")
        assert (tmp_path / "out" / "config.json").read_bytes() == b"old"
        out.commit()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["config.json"]
    assert (tmp_path / "out" / "config.json").read_bytes() == b"new"


def test_failed_swap_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "out", b"old")
    real = os.rename

    def fail_for_partial(source: Path, target: Path) -> None:
        if Path(source).name == ".out.partial":
            raise OSError(5, "Input/output error")
        real(source, target)

    with OutputDirectory(tmp_path / "out", None, overwrite=True) as out:
        out.write_bytes("config.json", b"new")
        monkeypatch.setattr(os, "rename", fail_for_partial)
        with pytest.raises(OutputError):
            out.commit()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_bytes() == b"old"


def test_a_directory_without_a_checkpoint_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x")
    with pytest.raises(OutputError) as caught:
        OutputDirectory(tmp_path / "photos", None, overwrite=True)
    assert caught.value.code == "not-a-checkpoint"
    checkpoint(tmp_path / "here", b"{}")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="current"):
        OutputDirectory(Path("../here"), None, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["here", "photos"]


def test_a_name_is_written_once(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out", None, overwrite=False) as out:
        out.write_bytes("a.json", b"{}")
        with pytest.raises(OutputError, match="twice"):
            out.file("a.json", 1)


def test_reserving_a_large_file_is_quick(tmp_path: Path) -> None:
    begin = time.perf_counter()
    with OutputFile(tmp_path / "a", 64 << 20, overwrite=False):
        pass
    assert time.perf_counter() - begin < 5


def test_a_small_file_may_lie_one_folder_down(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out", None, False) as out:
        out.write_bytes("config.json", b"{}")
        out.write_bytes("config.json", b"[]", folder="1_Pooling")
        for folder in ("..", "a/b", ".hidden", "/x"):
            with pytest.raises(Unsafe):
                out.write_bytes("x.json", b"", folder=folder)
        out.commit()
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_bytes() == b"[]"
    with OutputDirectory(tmp_path / "out", None, True) as out:
        out.write_bytes("config.json", b"{}")
        out.commit()
    assert not (tmp_path / "out" / "1_Pooling").exists()
