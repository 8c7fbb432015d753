"""Byte sources and raw tensors: exact reads, bounds, byte order."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from qformats.containers.raw import RawTensor
from qformats.containers.source import ByteSource, FileSource, MemorySource
from qformats.errors import BadFile


@pytest.fixture(params=["file", "memory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> ByteSource:
    data = bytes(range(64))
    if request.param == "memory":
        return MemorySource(data)
    (tmp_path / "a").write_bytes(data)
    return FileSource(tmp_path / "a")


def test_reads_are_exact(source: ByteSource) -> None:
    assert source.size == 64
    assert source.pread(60, 4) == bytes([60, 61, 62, 63])
    assert source.pread(64, 0) == b""
    buffer = bytearray(3)
    source.pread_into(1, memoryview(buffer))
    assert buffer == b"\1\2\3"


@pytest.mark.parametrize(("offset", "nbytes"), [(61, 4), (-1, 2), (0, 2**60), (2**70, 1), (0, -1)])
def test_reads_outside_are_refused_before_anything_is_allocated(source: ByteSource, offset: int, nbytes: int) -> None:
    with pytest.raises(BadFile) as caught:
        source.pread(offset, nbytes)
    assert caught.value.code == "truncated"


def test_a_closed_file_is_an_error_and_closing_twice_is_not(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    source = FileSource(tmp_path / "a")
    source.close()
    source.close()
    with pytest.raises(BadFile):
        source.pread(0, 1)


def test_a_file_travels_to_another_process_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    source = FileSource(tmp_path / "a")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.pread(0, 3) == b"abc"
    assert copy.identity() == source.identity()


def test_big_endian_values_become_native() -> None:
    raw = RawTensor("a", "I16", (2, 2), MemorySource(bytes([0, 1, 0, 2, 0, 3, 0, 4])), 0, 8, big_endian=True)
    assert raw.array().tolist() == [[1, 2], [3, 4]]
    assert raw.column_range(1, 2).tolist() == [[2], [4]]


def test_block_types_are_rows_of_bytes() -> None:
    raw = RawTensor("a", "Q4_0", (2, 32), MemorySource(bytes(36)), 0, 36)
    assert raw.array().shape == (2, 18)
    assert raw.array().dtype == np.uint8
    assert RawTensor("a", "Q4_0", (0, 32), MemorySource(b""), 0, 0).array().shape == (0, 0)
