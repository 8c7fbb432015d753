"""What comes out of a hub through a conversion has the digest that the hub lists for the whole file, or there is no output."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner
from loopback import Fault, Hub, folder_files
from test_hub_reading import big_file, source_of

import qformats
from converters.api import convert, verify
from converters.cli import qconvert
from converters.journal import journal_path
from qformats.errors import RemoteError
from qformats.hub import client
from qformats.hub.names import Address
from qformats.hub.source import CHUNK_NBYTES, HubSource, Spool

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures"
AWQ = FIXTURES / "awq" / "gemm-g32"
LLAMA = FIXTURES / "dense" / "llama"


def wrong(hub: Hub, repo: str, name: str) -> None:
    """The hub now serves other bytes than it lists: one bit in the middle."""
    data = hub.files(repo)[name]
    blob = bytearray(data)
    blob[len(blob) // 2] ^= 1
    hub.blobs[hashlib.sha256(data).hexdigest()] = bytes(blob)


def test_a_file_read_front_to_back_is_checked_on_the_way(hub: Hub) -> None:
    data = big_file(24)
    source = source_of(hub, data)
    source.pread(0, len(data))
    assert source.checked and source.nbytes_read == len(data)
    source.check()
    assert source.nbytes_read == len(data)


@pytest.mark.parametrize(("slots", "most"), [(64, 1.0), (3, 2.0)])
def test_a_file_read_in_any_order_is_fetched_once_if_the_spool_holds_it(hub: Hub, slots: int, most: float) -> None:
    data = big_file(8)
    source = source_of(hub, data, Spool(slots * CHUNK_NBYTES))
    source.pread(8, 5 << 20)  # in bulk from here on
    places = list(range(5, 9))
    random.Random(1).shuffle(places)
    for number in places:
        at = number * CHUNK_NBYTES
        source.pread(at, min(CHUNK_NBYTES, len(data) - at))
    source.check()
    assert source.checked and source.nbytes_read <= most * len(data)


def test_what_nobody_read_is_fetched_for_the_check(hub: Hub) -> None:
    data = big_file(8)
    source = source_of(hub, data)
    source.pread(0, 16)
    source.check()
    assert source.checked and len(data) <= source.nbytes_read <= len(data) + (64 << 10)


def test_wrong_bytes_stop_the_reader_when_the_last_one_came(hub: Hub) -> None:
    data = big_file(8)
    source = source_of(hub, data)
    wrong(hub, "org/bytes", "a.safetensors")
    with pytest.raises(RemoteError, match="hub-wrong-hash"):
        source.pread(0, len(data))
    with pytest.raises(RemoteError, match="hub-wrong-hash"):
        source.check()
    assert not source.checked


def test_small_files_are_held_against_gits_digest(hub: Hub) -> None:
    hub.add("org/bytes", {"a.txt": b"words" * 100})
    found = client.snapshot(Address("org/bytes"))
    good, bad = (HubSource(found.address(), found.files["a.txt"], Spool()) for _ in range(2))
    good.check()
    hub.faults = [Fault("a.txt", times=None, flip=True)]
    with pytest.raises(RemoteError, match="hub-wrong-hash"):
        bad.check()
    assert good.checked


def test_a_header_that_was_read_otherwise_is_found(hub: Hub) -> None:
    data = big_file(8)
    source = source_of(hub, data)
    hub.faults = [Fault("/cdn/", flip=True)]
    source.pread(0, 8)  # its piece of 8 KiB ends with a wrong byte
    with pytest.raises(RemoteError, match="hub-changed"):
        source.pread(0, len(data))


def test_a_conversion_of_wrong_bytes_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/model", folder_files(AWQ))
    wrong(hub, "org/model", "model.safetensors")
    (tmp_path / "out").mkdir()
    run = CliRunner().invoke(qconvert, ["convert", "hf://org/model", str(tmp_path / "out" / "a.gguf"), "--to", "gguf"])
    assert run.exit_code == 8 and "[hub-wrong-hash]" in run.output
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_else_is_written_out_of_wrong_bytes(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/model", folder_files(AWQ))
    convert(AWQ, tmp_path / "a.gguf", to="gguf")
    wrong(hub, "org/model", "model.safetensors")
    with qformats.open("org/model") as checkpoint, pytest.raises(RemoteError, match="hub-wrong-hash"):
        qformats.save(checkpoint, tmp_path / "saved")
    with pytest.raises(RemoteError, match="hub-wrong-hash"):
        verify("hf://org/model", tmp_path / "a.gguf")
    assert not (tmp_path / "saved").exists()


def test_a_file_checked_before_a_break_is_not_checked_again(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", folder_files(LLAMA))
    whole = convert(LLAMA, tmp_path / "whole.gguf", to="gguf:q8_0")
    calls = [0]

    def stop(done: int, total: int) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as caught:
        patched.setattr(HubSource, "checked", True)
        convert("hf://org/model", tmp_path / "a.gguf", to="gguf:q8_0", workers=1, progress=stop)
    assert caught.value.__notes__ == [
        "run the same command with --resume: what is finished stays in .a.gguf.partial, which may be deleted with .a.gguf.journal"
    ]
    lines = journal_path(tmp_path / "a.gguf").read_text().splitlines()
    assert [json.loads(line) for line in lines if "checked" in line] == [{"checked": 0}]
    seen, check = [], HubSource.check
    monkeypatch.setattr(HubSource, "check", lambda self: (seen.append(self.checked), check(self)))
    again = convert("hf://org/model", tmp_path / "a.gguf", to="gguf:q8_0", resume=True)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes() and again.kinds == whole.kinds
    assert seen == [True]


def test_a_checked_source_of_an_earlier_run_is_taken_as_such(hub: Hub) -> None:
    source = source_of(hub, big_file(8))
    source.checked = True
    source.check()
    assert source.nbytes_read == 0
