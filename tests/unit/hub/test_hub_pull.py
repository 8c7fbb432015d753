"""Files down: byte for byte, on after a break, checked, and out of the cache without a network."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from loopback import Fault, Hub, folder_files

import qformats
from converters.api import convert
from converters.cli import qconvert
from converters.inspect import inspect_path
from qformats.errors import OutputError, RemoteError, Unsafe
from qformats.hub.names import Address
from qformats.hub.pull import chosen, pull

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures"
AWQ = FIXTURES / "awq" / "gemm-g32"
MODEL = Address("org/model")


@pytest.fixture
def model(hub: Hub) -> Hub:
    hub.add("org/model", {**folder_files(AWQ), "extra/notes.txt": b"words"})
    return hub


def test_patterns() -> None:
    names = ["a.gguf", "b.gguf", "c/d.gguf", "config.json"]
    assert chosen(names, ["*.gguf"], ["b*"]) == ["a.gguf", "c/d.gguf"]
    assert chosen(names, ["c/"]) == ["c/d.gguf"] and chosen(names) == sorted(names)


def test_every_file_comes_as_it_is(model: Hub, tmp_path: Path) -> None:
    folder, names = pull(MODEL, tmp_path / "out")
    assert folder_files(folder) == model.files("org/model") and names == sorted(model.files("org/model"))


def test_nothing_is_fetched_twice(model: Hub, tmp_path: Path) -> None:
    pull(MODEL, tmp_path / "out")
    model.forget()
    pull(MODEL, tmp_path / "out")
    assert sum(model.sent.values()) == 0


def test_a_break_in_the_middle_of_a_file_goes_on_there(model: Hub, tmp_path: Path) -> None:
    whole = len(model.files("org/model")["model.safetensors"])
    model.faults = [Fault("/cdn/", cut=20_000), Fault("/cdn/", times=None, cut=0)]
    with pytest.raises(RemoteError, match="hub-connection"):
        pull(MODEL, tmp_path / "out", include=["model.safetensors"])
    assert (tmp_path / "out" / ".model.safetensors.partial").stat().st_size == 20_000
    model.faults.clear()
    model.forget()
    pull(MODEL, tmp_path / "out", include=["model.safetensors"])
    assert max(model.sent.values()) == whole - 20_000
    assert folder_files(tmp_path / "out") == {"model.safetensors": model.files("org/model")["model.safetensors"]}


def test_a_killed_pull_goes_on(hub: Hub, tmp_path: Path) -> None:
    data = os.urandom(6 << 20)
    hub.add("org/big", {"a.gguf": data, "b.txt": data[:1000]})
    reached, go = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        go.wait(20)
        raise ConnectionAbortedError

    hub.faults = [Fault("/cdn/", cut=3 << 20), Fault("/cdn/", times=None, call=hold)]
    command = [sys.executable, "-m", "converters.cli", "pull", "org/big", str(tmp_path / "out")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    assert reached.wait(100)
    child.send_signal(signal.SIGKILL)
    child.wait()
    go.set()
    hub.faults.clear()
    hub.forget()
    pull(Address("org/big"), tmp_path / "out")
    assert folder_files(tmp_path / "out") == hub.files("org/big")
    assert sum(hub.sent.values()) <= len(data) - (2 << 20)


@pytest.mark.parametrize("into", ["out", None])
def test_wrong_bytes_are_removed_and_fetched_anew(model: Hub, tmp_path: Path, into: str | None) -> None:
    where = None if into is None else tmp_path / into
    model.faults = [Fault("/cdn/", flip=True)]
    with pytest.raises(RemoteError, match="hub-wrong-hash"):
        pull(MODEL, where)
    folder, _ = pull(MODEL, where)
    assert folder_files(folder) == model.files("org/model")


def test_two_pulls_into_one_place_do_not_mix(model: Hub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".model.safetensors.partial").open("ab") as other:
        fcntl.flock(other.fileno(), fcntl.LOCK_EX)
        other.write(b"theirs")
        other.flush()
        with pytest.raises(OutputError, match="in-use"):
            pull(MODEL, tmp_path / "out")
        assert (tmp_path / "out" / ".model.safetensors.partial").read_bytes() == b"theirs"
    folder, _ = pull(MODEL, tmp_path / "out")
    assert folder_files(folder) == model.files("org/model")


def test_what_another_commit_left_half_is_fetched_anew(model: Hub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".model.safetensors.partial").write_bytes(b"other bytes" * 1000)
    ticks: list[int] = []
    folder, _ = pull(MODEL, tmp_path / "out", progress=lambda done, total: ticks.append(done))
    assert folder_files(folder) == model.files("org/model") and ticks[-1] == sum(map(len, model.files("org/model").values()))


def test_no_space_is_said_before_anything_is_fetched(model: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match="no-space"):
        pull(MODEL, tmp_path / "out")
    assert sum(model.sent.values()) == 0


def test_a_directory_that_cannot_be_written(model: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="is not a directory"):
        pull(MODEL, tmp_path / "file")


def test_a_name_that_leaves_the_directory_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/evil", {"../../evil.json": b"{}"})
    with pytest.raises(Unsafe, match="file-name"):
        pull(Address("org/evil"), tmp_path / "out")


def test_a_pickle_is_refused_before_it_is_fetched(hub: Hub) -> None:
    hub.add("org/pickle", {"pytorch_model.bin": b"\x80\x02" * 1000, "config.json": b"{}"})
    with pytest.raises(Unsafe, match="pickle"):
        qformats.open("hf://org/pickle")
    assert sum(hub.sent.values()) < 1000


def test_offline_everything_comes_from_the_cache(model: Hub, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pull(MODEL)
    expected = inspect_path("hf://org/model").to_json()["types"]
    request.getfixturevalue("offline")
    model.forget()
    folder, _ = pull(MODEL)
    assert folder_files(folder) == model.files("org/model")
    pull(MODEL, tmp_path / "out")
    assert folder_files(tmp_path / "out") == model.files("org/model")
    assert inspect_path("hf://org/model").to_json()["types"] == expected
    assert model.seen == []


def test_offline_what_is_not_in_the_cache_is_one_error(model: Hub, offline: None) -> None:
    with pytest.raises(RemoteError, match="hub-offline"):
        pull(MODEL)


def test_a_model_runs_from_its_repository_and_is_fetched_once(hub: Hub) -> None:
    hub.add("org/llama", folder_files(FIXTURES / "dense" / "llama"))
    qformats.load_model("org/llama")
    hub.forget()
    model = qformats.load_model("hf://org/llama")
    assert model.num_parameters() > 0 and sum(hub.sent.values()) == 0


def test_a_tokenizer_comes_without_the_weights(hub: Hub, tmp_path: Path) -> None:
    files = folder_files(AWQ)
    convert(AWQ, tmp_path / "a.gguf", to="gguf:q8_0", allow_requantize=True)
    hub.add("org/model", files)
    hub.add("org/pickled", {**{n: d for n, d in files.items() if not n.endswith(".safetensors")}, "pytorch_model.bin": b"x" * 1000})
    hub.add("org/gguf", {"a-Q8_0.gguf": (tmp_path / "a.gguf").read_bytes() + bytes(8 << 20), "README.md": b"words"})
    for address, most in (("org/model", 20_000), ("org/pickled", 20_000), ("hf://org/gguf/a-Q8_0.gguf", 200_000), ("org/gguf", 200_000)):
        hub.forget()
        tokenizer = qformats.load_tokenizer(address)
        assert tokenizer("a b").input_ids and sum(hub.sent.values()) <= most
        assert not any(name.endswith((".safetensors", ".bin", ".gguf")) for _, name in hub.seen if "gguf" not in address)


def test_offline_a_tokenizer_comes_out_of_the_cache(model: Hub, request: pytest.FixtureRequest) -> None:
    qformats.load_tokenizer("org/model")
    request.getfixturevalue("offline")
    model.forget()
    assert qformats.load_tokenizer("org/model")("a").input_ids and not model.seen


def test_offline_a_file_that_is_not_in_the_cache_is_said_so(model: Hub, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pull(MODEL)
    request.getfixturevalue("offline")
    missing, config = Address("org/model", None, "none.gguf"), Address("org/model", None, "config.json")
    for call in (lambda: pull(missing), lambda: pull(missing, tmp_path / "out"), lambda: qformats.open(str(missing))):
        with pytest.raises(RemoteError, match="hub-offline"):
            call()
    assert pull(config, tmp_path / "one")[1] == ["config.json"] and set(folder_files(tmp_path / "one")) == {"config.json"}
    run = CliRunner().invoke(qconvert, ["pull", "org/model", "--list", "--json"])
    assert json.loads(run.stdout)["files"] == {name: len(data) for name, data in model.files("org/model").items()}
    assert inspect_path("hf://org/model").path == "hf://org/model"


def test_nothing_is_written_to_an_address(model: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:" / "org").mkdir(parents=True)
    for words in (["pull", "org/model", "hf://org/copy"], ["convert", str(AWQ), "hf://org/a.gguf", "--to", "gguf"]):
        run = CliRunner().invoke(qconvert, words)
        assert run.exit_code == 4 and "address of the hub" in run.output
    assert not list((tmp_path / "hf:" / "org").iterdir())


@pytest.mark.parametrize("text", ["org/model", "org/model/a.gguf", "https://huggingface.co/org/model"])
def test_a_path_like_an_address_is_told_how_one_is_written(
    model: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(qconvert, ["inspect", text])
    assert run.exit_code == 5 and "hf://org/model" in run.output


def test_the_command(model: Hub, tmp_path: Path) -> None:
    run = CliRunner().invoke(qconvert, ["pull", "org/model", str(tmp_path / "out"), "--include", "*.json", "--json"])
    assert run.exit_code == 0 and json.loads(run.stdout)["files"] == sorted(n for n in folder_files(AWQ) if n.endswith(".json"))
    run = CliRunner().invoke(qconvert, ["pull", "org/model", "--list", "--json"])
    assert json.loads(run.stdout)["files"] == {name: len(data) for name, data in sorted(model.files("org/model").items())}
    run = CliRunner().invoke(qconvert, ["pull", "org/none", "--json"])
    assert run.exit_code == 8 and json.loads(run.stdout)["error"]["code"] == "hub-repository"
    run = CliRunner().invoke(qconvert, ["inspect", "hf://org/model", "--json"])
    assert json.loads(run.stdout)["path"] == "hf://org/model"
