"""Importance matrices: both file forms, written by hand and by gguf-py, and the form this library writes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qformats.errors import OutputError, Unsupported
from qformats.quantize.imatrix import Entry, ImportanceMatrix, read_imatrix, write_imatrix

SUMS = np.arange(12, dtype=np.float32).reshape(3, 4)


def legacy(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack(f"<i{len(name)}sii{len(values)}f", len(name), name.encode(), calls, len(values), *values)
    return data + tail


def matrix(**entries: tuple[Any, list[int]]) -> ImportanceMatrix:
    made = {name: Entry(np.array(sums, np.float32), np.array(counts)) for name, (sums, counts) in entries.items()}
    return ImportanceMatrix(made, ("wiki.txt", "more.txt"), 7, 512)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(matrix(a=(SUMS[:1], [2]), b=(SUMS, [1, 0, 4])), path)
    found = read_imatrix(path)
    assert (found.datasets, found.chunk_count, found.chunk_size, found.name) == (("wiki.txt", "more.txt"), 7, 512, "imatrix.gguf")
    assert len(found.digest) == 64
    np.testing.assert_array_equal(found.entries["a"].importance(), [[0, 0.5, 1, 1.5]])
    np.testing.assert_array_equal(found.entries["b"].importance(), [[0, 1, 2, 3], [1, 1, 1, 1], [2, 2.25, 2.5, 2.75]])


def test_gguf_py_reads_what_is_written_in_llama_cpps_shapes_and_order(tmp_path: Path) -> None:
    write_imatrix(matrix(b=(SUMS, [1, 0, 4]), a=(SUMS[:1], [2])), tmp_path / "imatrix.gguf")
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    assert [(t.name, list(t.shape)) for t in reader.tensors] == [
        ("a.in_sum2", [4]), ("a.counts", [1]), ("b.in_sum2", [4, 3]), ("b.counts", [1, 3]),
    ]  # fmt: skip
    keys = [name for name in reader.fields if not name.startswith("GGUF.")]
    assert keys == ["general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"]
    np.testing.assert_array_equal(reader.tensors[2].data, SUMS)


def test_a_file_of_gguf_py_is_read_whatever_its_number_of_dimensions(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "i.gguf"), "none")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["x"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("w.in_sum2", SUMS.reshape(1, 3, 4))
    writer.add_tensor("w.counts", np.array([[[2.0], [0.0], [2.4]]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = read_imatrix(tmp_path / "i.gguf").entries["w"]
    assert entry.counts.tolist() == [2, 0, 2]
    np.testing.assert_array_equal(entry.importance(), [SUMS[0] / 2, np.ones(4), SUMS[2] / 2])


@pytest.mark.parametrize(
    ("tail", "datasets", "chunks"),
    [(b"", (), 0), (struct.pack("<i", 9), (), 9), (struct.pack("<ii4s", 9, 4, b"wiki"), ("wiki",), 9), (struct.pack("<ii", 9, 0), (), 9)],
    ids=["none", "chunks", "chunks and data set", "data set without a name"],
)
def test_the_older_form_is_read_with_any_tail(tmp_path: Path, tail: bytes, datasets: tuple[str, ...], chunks: int) -> None:
    (tmp_path / "i.dat").write_bytes(legacy({"w": (4, [8.0, 2.0]), "v": (0, [3.0])}, tail))
    found = read_imatrix(tmp_path / "i.dat")
    np.testing.assert_array_equal(found.entries["w"].importance(), [[2.0, 0.5]])
    np.testing.assert_array_equal(found.entries["v"].importance(), [[3.0]])
    assert (found.datasets, found.chunk_count, found.chunk_size) == (datasets, chunks, 0)


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write_imatrix(matrix(a=(SUMS, [1, 1, 1])), tmp_path / "i.gguf")
    with pytest.raises(OutputError) as error:
        write_imatrix(matrix(a=(SUMS, [1, 1, 1])), tmp_path / "i.gguf")
    assert error.value.code == "exists"
    write_imatrix(matrix(a=(SUMS, [1, 1, 1])), tmp_path / "i.gguf", overwrite=True)


def test_a_name_that_ggml_could_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as error:
        write_imatrix(matrix(**{"x" * 60: (SUMS, [1, 1, 1])}), tmp_path / "i.gguf")
    assert error.value.code == "gguf-string-too-long"
