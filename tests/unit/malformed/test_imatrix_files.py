"""Broken importance matrices: what is wrong, and the code a user gets for it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from container_bytes import ARRAY, F16, F32, STR, U32, Gguf

from qformats.containers.source import MemorySource
from qformats.errors import BadFile, QFormatError
from qformats.quantize.imatrix import read_imatrix


def entry(name: bytes = b"w", calls: int = 1, count: int = 2, values: bytes | None = None, length: int | None = None) -> bytes:
    head = struct.pack("<i", len(name) if length is None else length) + name + struct.pack("<ii", calls, count)
    return head + (struct.pack("<2f", 1.0, 2.0) if values is None else values)


def legacy(*entries: bytes, count: int | None = None, tail: bytes = b"") -> bytes:
    return struct.pack("<i", len(entries) if count is None else count) + b"".join(entries) + tail


def keyed(kind: bytes | None = b"imatrix", *, leave_out: bytes = b"", size_type: int = U32) -> Gguf:
    made = Gguf()
    if kind is not None:
        made.key(b"general.type", STR, made.string(kind))
    if leave_out != b"datasets":
        made.key(b"imatrix.datasets", ARRAY, made.array(STR, 1, made.string(b"x")))
    if leave_out != b"chunk_count":
        made.key(b"imatrix.chunk_count", U32, 1)
    if leave_out != b"chunk_size":
        made.key(b"imatrix.chunk_size", size_type, struct.pack("<I", 512))
    return made


def pair(sums: list[float], counts: list[float], made: Gguf | None = None, types: tuple[int, int] = (F32, F32)) -> bytes:
    made = keyed() if made is None else made
    first = struct.pack(f"<{len(sums)}{'fe'[types[0]]}", *sums)
    first += bytes(-len(first) % 32)
    second = struct.pack(f"<{len(counts)}{'fe'[types[1]]}", *counts)
    made.tensor(b"w.in_sum2", (len(sums),), types[0]).tensor(b"w.counts", (len(counts),), types[1], len(first))
    made.data = first + second + bytes(-len(second) % 32)
    return made.build()


def lonely(name: bytes) -> bytes:
    made = keyed().tensor(b"v.in_sum2", (1,)).tensor(b"v.counts", (1,), F32, 32).tensor(name, (1,), F32, 64)
    made.data = bytes(96)
    return made.build()


CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty file": (lambda: b"", "imatrix-kind"),
    "three bytes": (lambda: b"\1\0\0", "imatrix-kind"),
    "no entries": (lambda: legacy(), "imatrix-empty"),
    "negative number of entries": (lambda: legacy(entry(), count=-1), "imatrix-kind"),
    "more entries than bytes": (lambda: legacy(entry(), count=2**31 - 1), "imatrix-kind"),
    "text": (lambda: b"The quick brown fox jumps over the lazy dog", "imatrix-kind"),
    "name of no bytes": (lambda: legacy(entry(b"")), "imatrix-kind"),
    "name of 2 GiB": (lambda: legacy(entry(length=2**31 - 1)), "imatrix-kind"),
    "name of a negative length": (lambda: legacy(entry(length=-4)), "imatrix-kind"),
    "name longer than the file": (lambda: legacy(entry(length=900)), "truncated"),
    "values longer than the file": (lambda: legacy(entry(count=2**31 - 1)), "truncated"),
    "no values": (lambda: legacy(entry(count=0)), "imatrix-size"),
    "negative number of values": (lambda: legacy(entry(count=-5)), "imatrix-size"),
    "negative calls": (lambda: legacy(entry(calls=-1)), "imatrix-counts"),
    "a value that is no number": (lambda: legacy(entry(values=struct.pack("<2f", 1, float("nan")))), "imatrix-values"),
    "an infinite value": (lambda: legacy(entry(values=struct.pack("<2f", 1, float("inf")))), "imatrix-values"),
    "a negative value": (lambda: legacy(entry(values=struct.pack("<2f", 1, -1))), "imatrix-values"),
    "one name twice": (lambda: legacy(entry(), entry()), "imatrix-duplicate"),
    "cut tail": (lambda: legacy(entry(), tail=b"\1\0"), "truncated"),
    "cut data set": (lambda: legacy(entry(), tail=struct.pack("<ii", 1, 9)), "truncated"),
    "data set of 2 GiB": (lambda: legacy(entry(), tail=struct.pack("<ii", 1, 2**31 - 1)), "imatrix-kind"),
    "negative chunks": (lambda: legacy(entry(), tail=struct.pack("<i", -1)), "imatrix-counts"),
    "bytes behind the end": (lambda: legacy(entry(), tail=struct.pack("<ii", 1, 0) + b"x"), "imatrix-size"),
    "a model": (lambda: keyed(b"model").build(), "imatrix-kind"),
    "a GGUF without sums": (lambda: keyed(None).build(), "imatrix-kind"),
    "no data sets": (lambda: pair([1], [1], keyed(leave_out=b"datasets")), "imatrix-metadata"),
    "no chunk count": (lambda: pair([1], [1], keyed(leave_out=b"chunk_count")), "imatrix-metadata"),
    "no chunk size": (lambda: pair([1], [1], keyed(leave_out=b"chunk_size")), "imatrix-metadata"),
    "chunk size of another type": (lambda: pair([1], [1], keyed(size_type=5)), "imatrix-metadata"),
    "counts of another number": (lambda: pair([1, 2, 3], [1, 1]), "imatrix-size"),
    "sums without counts": (lambda: lonely(b"w.in_sum2"), "imatrix-size"),
    "counts without sums": (lambda: lonely(b"w.counts"), "imatrix-size"),
    "no elements": (lambda: pair([], []), "gguf-dimension-zero"),
    "half precision": (lambda: pair([1], [1], types=(F16, F32)), "imatrix-values"),
    "negative count": (lambda: pair([1], [-1]), "imatrix-counts"),
    "count that is no number": (lambda: pair([1], [float("nan")]), "imatrix-counts"),
    "negative sum": (lambda: pair([-1], [1]), "imatrix-values"),
    "sum that is no number": (lambda: pair([float("nan")], [1]), "imatrix-values"),
    "infinite sum": (lambda: pair([float("inf")], [1]), "imatrix-values"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_defect_has_its_code(case: str) -> None:
    build, code = CASES[case]
    with pytest.raises(BadFile) as error:
        read_imatrix(MemorySource(build(), "broken"))
    assert error.value.code == code, error.value


def test_both_forms_are_read_where_nothing_is_wrong() -> None:
    assert list(read_imatrix(MemorySource(pair([1, 2], [1]))).entries) == ["w"]
    assert list(read_imatrix(MemorySource(legacy(entry(), entry(b"v")))).entries) == ["w", "v"]


WHOLE = [pair([1, 2], [1]), legacy(entry(), entry(b"v"), tail=struct.pack("<ii4s", 1, 4, b"wiki"))]


@pytest.mark.parametrize("data", WHOLE, ids=["gguf", "dat"])
def test_every_cut_is_refused_or_ends_before_the_tail(data: bytes) -> None:
    whole = len(legacy(entry(), entry(b"v")))
    for length in range(len(data)):
        try:
            read_imatrix(MemorySource(data[:length]))
        except QFormatError:
            continue
        padding = 28 if data[:4] == b"GGUF" else 0
        assert length >= len(data) - padding if padding else length in (whole, whole + 4)


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BadFile) as error:
        read_imatrix(tmp_path / "nothing.dat")
    assert error.value.code == "not-found"
