"""The table of malformed containers: what is wrong, and the error class and code a user gets for it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from container_bytes import ARRAY, F16, F32, F32_KV, Q4_0, STR, U8, U32, Gguf, entry, safetensors_file, valid_gguf

from qformats.containers import atomic
from qformats.containers.atomic import OutputDirectory, OutputFile, check_not_same
from qformats.containers.gguf import TensorInfo, Value, layout_gguf, open_gguf
from qformats.containers.index import open_directory, shard_plan
from qformats.containers.safetensors import layout_safetensors, open_safetensors
from qformats.containers.source import FileSource, MemorySource
from qformats.errors import BadFile, OutputError, QFormatError, Unsafe, Unsupported, UsageError

Expected = tuple[type[QFormatError], str]


def alignment(value: object, type_id: int = U32) -> bytes:
    return Gguf().key(b"general.alignment", type_id, value).build()


def tensors(*infos: tuple[bytes, tuple[int, ...], int, int], data: int = 256, **fields: int) -> bytes:
    return Gguf(infos=list(infos), data=bytes(data), **fields).build()


G = Gguf()
GGUF_CASES: dict[str, tuple[Callable[[], bytes], Expected]] = {
    "empty file": (lambda: b"", (BadFile, "gguf-magic")),
    "three bytes": (lambda: b"GGU", (BadFile, "gguf-magic")),
    "wrong magic": (lambda: b"PK\3\4" + bytes(60), (BadFile, "gguf-magic")),
    "old ggml magic": (lambda: b"lmgg" + bytes(60), (Unsupported, "gguf-old-magic")),
    "old ggmf magic": (lambda: b"fmgg" + bytes(60), (Unsupported, "gguf-old-magic")),
    "old ggjt magic": (lambda: b"tjgg" + bytes(60), (Unsupported, "gguf-old-magic")),
    "magic only": (lambda: b"GGUF", (BadFile, "truncated")),
    "version 0": (lambda: Gguf(version=0).build(), (BadFile, "gguf-version")),
    "version 4": (lambda: Gguf(version=4).build(), (Unsupported, "gguf-version")),
    "version 4 big-endian": (lambda: Gguf(version=4, order=">").build(), (Unsupported, "gguf-version")),
    "version 1 big-endian": (lambda: Gguf(version=1, order=">").build(), (Unsupported, "gguf-version")),
    "cut after the version": (lambda: valid_gguf().build()[:12], (BadFile, "truncated")),
    "2^63 tensors": (lambda: Gguf(n_tensors=2**63).build(), (BadFile, "gguf-count")),
    "2^40 keys": (lambda: Gguf(n_kv=2**40).build(), (BadFile, "gguf-count")),
    "more keys than bytes": (lambda: Gguf(n_kv=1000).build(), (BadFile, "gguf-count")),
    "more tensors than there are": (lambda: tensors((b"a", (4,), F32, 0), n_tensors=2, data=0), (BadFile, "gguf-count")),
    "key of 2^60 bytes": (lambda: _header(0, 1) + G.string(b"", 2**60) + bytes(64), (BadFile, "truncated")),
    "key of 70000 bytes": (lambda: Gguf().key(b"k" * 70000, U8, 1).build(), (BadFile, "gguf-string-too-long")),
    "empty key": (lambda: Gguf().key(b"", U8, 1).build(), (BadFile, "gguf-name")),
    "zero byte in a key": (lambda: Gguf().key(b"a\0b", U8, 1).build(), (BadFile, "gguf-name")),
    "key not UTF-8": (lambda: Gguf().key(b"k\xff", U8, 1).build(), (BadFile, "gguf-utf8")),
    "duplicate key": (lambda: Gguf().key(b"k", U8, 1).key(b"k", U8, 1).build(), (BadFile, "gguf-duplicate-key")),
    "value type 13": (lambda: Gguf().key(b"k", 13, b"\0" * 8).build(), (BadFile, "gguf-value-type")),
    "value type 2^32 - 1": (lambda: Gguf().key(b"k", 2**32 - 1, b"\0" * 8).build(), (BadFile, "gguf-value-type")),
    "value cut off": (lambda: Gguf(alignment=1).key(b"kkkkkkkk", 10, b"\0").build(), (BadFile, "truncated")),
    "bool of 2": (lambda: Gguf().key(b"k", 7, 2).build(), (BadFile, "gguf-bool")),
    "bool array with 255": (lambda: Gguf().key(b"k", ARRAY, G.array(7, 2, b"\1\xff")).build(), (BadFile, "gguf-bool")),
    "string value of 2^62 bytes": (lambda: Gguf().key(b"k", STR, G.string(b"", 2**62)).build(), (BadFile, "truncated")),
    "string value not UTF-8": (lambda: Gguf().key(b"k", STR, G.string(b"\xc3(")).build(), (BadFile, "gguf-utf8")),
    "nested array": (lambda: Gguf().key(b"k", ARRAY, G.array(ARRAY, 1, bytes(16))).build(), (Unsupported, "gguf-nested-array")),
    "array of type 99": (lambda: Gguf().key(b"k", ARRAY, G.array(99, 1, bytes(16))).build(), (BadFile, "gguf-value-type")),
    "array of 2^40 numbers": (lambda: Gguf().key(b"k", ARRAY, G.array(U32, 2**40, b"")).build(), (BadFile, "truncated")),
    "array of 2^64 - 1 bytes": (lambda: Gguf().key(b"k", ARRAY, G.array(U8, 2**64 - 1, b"")).build(), (BadFile, "truncated")),
    "array of 2^61 strings": (lambda: Gguf().key(b"k", ARRAY, G.array(STR, 2**61, b"")).build(), (BadFile, "truncated")),
    "string array item too long": (
        lambda: Gguf().key(b"k", ARRAY, G.array(STR, 2, G.string(b"", 2**63) + G.string(b""))).build(), (BadFile, "truncated")),
    "last string array item too long": (
        lambda: Gguf().key(b"k", ARRAY, G.array(STR, 2, G.string(b"a") + G.string(b"", 900))).build(), (BadFile, "truncated")),
    "alignment 0": (lambda: alignment(0), (BadFile, "gguf-alignment")),
    "alignment 24": (lambda: alignment(24), (BadFile, "gguf-alignment")),
    "alignment 2^30": (lambda: alignment(2**30), (BadFile, "gguf-alignment")),
    "alignment as f32": (lambda: alignment(32.0, F32_KV), (BadFile, "gguf-alignment")),
    "alignment as u64": (lambda: alignment(32, 10), (BadFile, "gguf-alignment")),
    "alignment as array": (lambda: alignment(G.array(U32, 1, G.number("I", 32)), ARRAY), (BadFile, "gguf-alignment")),
    "tensor name of 64 bytes": (lambda: tensors((b"n" * 64, (4,), F32, 0)), (BadFile, "gguf-string-too-long")),
    "tensor name empty": (lambda: tensors((b"", (4,), F32, 0)), (BadFile, "gguf-name")),
    "tensor name with zero byte": (lambda: tensors((b"a\0", (4,), F32, 0)), (BadFile, "gguf-name")),
    "tensor name not UTF-8": (lambda: tensors((b"\xff", (4,), F32, 0)), (BadFile, "gguf-utf8")),
    "duplicate tensor": (lambda: tensors((b"a", (4,), F32, 0), (b"a", (4,), F32, 32)), (BadFile, "gguf-duplicate-tensor")),
    "five dimensions": (lambda: tensors((b"a", (1, 1, 1, 1, 1), F32, 0)), (BadFile, "gguf-dims")),
    "2^31 dimensions": (lambda: tensors((b"a", (1,), F32, 0), n_dims=2**31), (BadFile, "gguf-dims")),
    "dimension 2^63": (lambda: tensors((b"a", (2**63,), F32, 0)), (BadFile, "gguf-size")),
    "product wraps to 0": (lambda: tensors((b"a", (2**32, 2**32), F32, 0)), (BadFile, "gguf-size")),
    "product wraps to 4": (lambda: tensors((b"a", (2**62 + 1, 4), F32, 0)), (BadFile, "gguf-size")),
    "bytes wrap to 0": (lambda: tensors((b"a", (2**62,), F32, 0)), (BadFile, "gguf-size")),
    "row not whole blocks": (lambda: tensors((b"a", (33, 32), Q4_0, 0)), (BadFile, "gguf-row-size")),
    "scalar of block type": (lambda: tensors((b"a", (), Q4_0, 0)), (BadFile, "gguf-row-size")),
    "removed type 4": (lambda: tensors((b"a", (32,), 4, 0)), (Unsupported, "gguf-type-removed")),
    "removed type 33": (lambda: tensors((b"a", (32,), 33, 0)), (Unsupported, "gguf-type-removed")),
    "removed type 36": (lambda: tensors((b"a", (32,), 36, 0)), (Unsupported, "gguf-type-removed")),
    "type 43": (lambda: tensors((b"a", (32,), 43, 0)), (Unsupported, "gguf-type-unknown")),
    "type 2^32 - 1": (lambda: tensors((b"a", (32,), 2**32 - 1, 0)), (Unsupported, "gguf-type-unknown")),
    "offset unaligned": (lambda: tensors((b"a", (4,), F32, 4)), (BadFile, "gguf-offset-unaligned")),
    "offset overlaps": (lambda: tensors((b"a", (16,), F32, 0), (b"b", (4,), F32, 32)), (BadFile, "gguf-offset-overlap")),
    "offset leaves a hole": (lambda: tensors((b"a", (4,), F32, 0), (b"b", (4,), F32, 64)), (BadFile, "gguf-offset-gap")),
    "offsets out of order": (lambda: tensors((b"a", (4,), F32, 32), (b"b", (4,), F32, 0)), (BadFile, "gguf-offset-gap")),
    "offset 2^64 - 32": (lambda: tensors((b"a", (4,), F32, 2**64 - 32)), (BadFile, "gguf-offset-gap")),
    "data cut off": (lambda: tensors((b"a", (64, 2), F32, 0), data=511), (BadFile, "truncated")),
    "shape larger than the file": (lambda: tensors((b"a", (2**40,), F16, 0)), (BadFile, "truncated")),
    "no data section": (lambda: tensors((b"a", (4,), F32, 0), data=0, alignment=1), (BadFile, "truncated")),
    "shard opened without its path": (
        lambda: Gguf().key(b"split.no", 2, 0).key(b"split.count", 2, 2).build(), (BadFile, "gguf-shard-name")),
}  # fmt: skip


def _header(n_tensors: int, n_kv: int) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_kv)


def check(expected: Expected, call: Callable[[], object]) -> QFormatError:
    with pytest.raises(QFormatError) as caught:
        call()
    assert (type(caught.value), caught.value.code) == expected, caught.value
    return caught.value


@pytest.mark.parametrize("name", GGUF_CASES)
def test_gguf(name: str) -> None:
    build, expected = GGUF_CASES[name]
    check(expected, lambda: open_gguf(MemorySource(build())))


ONE = {"a": entry()}
SAFETENSORS_CASES: dict[str, tuple[Callable[[], bytes], Expected]] = {
    "empty file": (lambda: b"", (BadFile, "truncated")),
    "seven bytes": (lambda: bytes(7), (BadFile, "truncated")),
    "header of 0 bytes": (lambda: bytes(8), (BadFile, "safetensors-header")),
    "header above the cap": (lambda: safetensors_file(ONE, bytes(8), 100_000_001), (BadFile, "safetensors-header-too-large")),
    "header of 2^64 - 1 bytes": (lambda: safetensors_file(ONE, b"", 2**64 - 1), (BadFile, "safetensors-header-too-large")),
    "header past the end": (lambda: safetensors_file(ONE, bytes(8), 5000), (BadFile, "truncated")),
    "a list": (lambda: safetensors_file(b"[]"), (BadFile, "safetensors-header")),
    "blank before the brace": (lambda: safetensors_file(b" {}"), (BadFile, "safetensors-header")),
    "no JSON": (lambda: safetensors_file(b"{'a':1}"), (BadFile, "safetensors-header")),
    "text behind the JSON": (lambda: safetensors_file(b"{} {}"), (BadFile, "safetensors-header")),
    "zero bytes as padding": (lambda: safetensors_file(b"{}\0\0"), (BadFile, "safetensors-header")),
    "header not UTF-8": (lambda: safetensors_file(b'{"\xff":1}'), (BadFile, "safetensors-header")),
    "lone surrogate": (lambda: safetensors_file(b'{"__metadata__":{"a":"\\ud800"}}'), (BadFile, "safetensors-header")),
    "NaN": (lambda: safetensors_file(b'{"a":NaN}'), (BadFile, "safetensors-header")),
    "nested 100000 deep": (lambda: safetensors_file(b'{"a":' + b"[" * 100_000), (BadFile, "safetensors-header")),
    "duplicate tensor": (
        lambda: safetensors_file(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)), (BadFile, "duplicate-key")),
    "duplicate field": (
        lambda: safetensors_file(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        (BadFile, "duplicate-key")),
    "metadata of numbers": (lambda: safetensors_file({"__metadata__": {"a": 1}}), (BadFile, "safetensors-metadata")),
    "metadata a string": (lambda: safetensors_file({"__metadata__": "pt"}), (BadFile, "safetensors-metadata")),
    "entry a number": (lambda: safetensors_file({"a": 3}), (BadFile, "safetensors-entry")),
    "entry without shape": (
        lambda: safetensors_file({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"), (BadFile, "safetensors-entry")),
    "entry with more fields": (lambda: safetensors_file({"a": entry(x=1)}, bytes(8)), (BadFile, "safetensors-entry")),
    "dtype a number": (lambda: safetensors_file({"a": entry(5)}, bytes(8)), (BadFile, "safetensors-entry")),
    "dtype unknown": (lambda: safetensors_file({"a": entry("F33")}, bytes(8)), (BadFile, "safetensors-dtype")),
    "shape a number": (lambda: safetensors_file({"a": entry("F32", 2)}, bytes(8)), (BadFile, "safetensors-entry")),
    "shape with true": (lambda: safetensors_file({"a": entry("F32", [True, 2])}, bytes(8)), (BadFile, "safetensors-entry")),
    "shape with 2.0": (lambda: safetensors_file({"a": entry("F32", [2.0])}, bytes(8)), (BadFile, "safetensors-header")),
    "shape with -2": (lambda: safetensors_file({"a": entry("F32", [-2])}, bytes(8)), (BadFile, "safetensors-header")),
    "shape with 10^30": (lambda: safetensors_file({"a": entry("F32", [10**30])}, bytes(8)), (BadFile, "safetensors-header")),
    "shape with 10^5000": (lambda: safetensors_file(b'{"a":1' + b"0" * 5000 + b"}"), (BadFile, "safetensors-header")),
    "shape overflows": (lambda: safetensors_file({"a": entry("F32", [2**62, 4])}, bytes(8)), (BadFile, "safetensors-size")),
    "empty shape overflows": (
        lambda: safetensors_file({"a": entry("F32", [2**62, 4, 0], [0, 0])}), (BadFile, "safetensors-size")),
    "F4 with half a byte": (lambda: safetensors_file({"a": entry("F4", [3], [0, 2])}, bytes(2)), (BadFile, "safetensors-size")),
    "three offsets": (lambda: safetensors_file({"a": entry(offsets=[0, 8, 8])}, bytes(8)), (BadFile, "safetensors-entry")),
    "offsets reversed": (lambda: safetensors_file({"a": entry(offsets=[8, 0])}, bytes(8)), (BadFile, "safetensors-offsets")),
    "hole at the start": (lambda: safetensors_file({"a": entry(offsets=[8, 16])}, bytes(16)), (BadFile, "safetensors-offsets")),
    "hole between": (
        lambda: safetensors_file({"a": entry(), "b": entry(offsets=[9, 17])}, bytes(17)), (BadFile, "safetensors-offsets")),
    "overlap": (
        lambda: safetensors_file({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), (BadFile, "safetensors-offsets")),
    "span does not fit the shape": (
        lambda: safetensors_file({"a": entry(offsets=[0, 4])}, bytes(4)), (BadFile, "safetensors-span")),
    "data cut off": (lambda: safetensors_file(ONE, bytes(7)), (BadFile, "truncated")),
    "bytes behind the data": (lambda: safetensors_file(ONE, bytes(9)), (BadFile, "safetensors-trailing")),
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS_CASES)
def test_safetensors(name: str) -> None:
    build, expected = SAFETENSORS_CASES[name]
    check(expected, lambda: open_safetensors(MemorySource(build())))


def shard(name: str = "a") -> bytes:
    return safetensors_file({name: entry()}, bytes(8))


def index(weight_map: object) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


INDEX = "model.safetensors.index.json"
DIRECTORY_CASES: dict[str, tuple[dict[str, bytes], Expected]] = {
    "no weights": ({"config.json": b"{}"}, (BadFile, "no-weights")),
    "two files without index": ({"x.safetensors": shard(), "y.safetensors": shard("b")}, (BadFile, "index-missing")),
    "two indexes": ({"x.safetensors.index.json": b"{}", "y.safetensors.index.json": b"{}"}, (BadFile, "index-ambiguous")),
    "index not JSON": ({INDEX: b"{"}, (BadFile, "index")),
    "index a list": ({INDEX: b"[]"}, (BadFile, "index")),
    "weight_map missing": ({INDEX: b"{}"}, (BadFile, "index")),
    "weight_map empty": ({INDEX: index({})}, (BadFile, "index")),
    "weight_map of numbers": ({INDEX: index({"a": 1})}, (BadFile, "index")),
    "duplicate key in index": ({INDEX: b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'}, (BadFile, "duplicate-key")),
    "shard climbs out": ({INDEX: index({"a": "../x.safetensors"})}, (Unsafe, "file-name")),
    "shard absolute": ({INDEX: index({"a": "/etc/x.safetensors"})}, (Unsafe, "file-name")),
    "shard in a folder": ({INDEX: index({"a": "sub/x.safetensors"})}, (Unsafe, "file-name")),
    "shard with backslash": ({INDEX: index({"a": "..\\x.safetensors"})}, (Unsafe, "file-name")),
    "shard named ..": ({INDEX: index({"a": ".."})}, (Unsafe, "file-name")),
    "shard without name": ({INDEX: index({"a": ""})}, (Unsafe, "file-name")),
    "shard with zero byte": ({INDEX: index({"a": "x\0.safetensors"})}, (Unsafe, "file-name")),
    "shard a pickle": ({INDEX: index({"a": "pytorch_model.bin"})}, (BadFile, "index")),
    "shard missing": ({INDEX: index({"a": "x.safetensors"})}, (BadFile, "shard-missing")),
    "tensor missing": (
        {INDEX: index({"a": "x.safetensors", "b": "x.safetensors"}), "x.safetensors": shard()}, (BadFile, "tensor-missing")),
    "tensor in the wrong shard": (
        {INDEX: index({"a": "y.safetensors", "b": "x.safetensors"}), "x.safetensors": shard("a"), "y.safetensors": shard("b")},
        (BadFile, "tensor-wrong-shard")),
    "unlisted tensor in two shards": (
        {INDEX: index({"b": "x.safetensors", "c": "y.safetensors"}),
         "x.safetensors": safetensors_file({"b": entry(), "a": entry(offsets=[8, 16])}, bytes(16)),
         "y.safetensors": safetensors_file({"c": entry(), "a": entry(offsets=[8, 16])}, bytes(16))},
        (BadFile, "duplicate-tensor")),
    "shard broken": ({INDEX: index({"a": "x.safetensors"}), "x.safetensors": shard()[:-1]}, (BadFile, "truncated")),
}  # fmt: skip


@pytest.mark.parametrize("name", DIRECTORY_CASES)
def test_directory(name: str, tmp_path: Path) -> None:
    files, expected = DIRECTORY_CASES[name]
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    check(expected, lambda: open_directory(tmp_path))


def split(number: object, count: object, total: int = 2, name: bytes = b"a", type_id: int = 2) -> bytes:
    gguf = Gguf(data=bytes(32)).key(b"split.no", type_id, number).key(b"split.count", type_id, count)
    return gguf.key(b"split.tensors.count", 5, total).tensor(name, (4,)).build()


FIRST, SECOND = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"
SHARD_CASES: dict[str, tuple[dict[str, bytes], Expected]] = {
    "second shard missing": ({FIRST: split(0, 2)}, (BadFile, "gguf-shard-missing")),
    "first shard missing": ({SECOND: split(1, 2)}, (BadFile, "gguf-shard-missing")),
    "name without shard number": ({"m.gguf": split(0, 2)}, (BadFile, "gguf-shard-name")),
    "name of another count": ({"m-00001-of-00003.gguf": split(0, 2)}, (BadFile, "gguf-shard-name")),
    "split.count lies": ({FIRST: split(0, 60000)}, (BadFile, "gguf-shard-name")),
    "split.no lies": ({FIRST: split(0, 2), SECOND: split(0, 2, name=b"b")}, (BadFile, "gguf-shard-keys")),
    "split.count differs": ({FIRST: split(0, 2), SECOND: split(1, 3, name=b"b")}, (BadFile, "gguf-shard-keys")),
    "split.tensors.count lies": ({FIRST: split(0, 2), SECOND: split(1, 2, 9, b"b")}, (BadFile, "gguf-shard-keys")),
    "split.count a float": ({FIRST: split(0.0, 2.0, type_id=6)}, (BadFile, "gguf-shard-keys")),
    "second shard without keys": (
        {FIRST: split(0, 2), SECOND: tensors((b"b", (4,), F32, 0), data=32)}, (BadFile, "gguf-shard-keys")),
    "tensor in two shards": ({FIRST: split(0, 2), SECOND: split(1, 2)}, (BadFile, "gguf-duplicate-tensor")),
    "second shard cut": ({FIRST: split(0, 2), SECOND: split(1, 2, name=b"b")[:-20]}, (BadFile, "truncated")),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARD_CASES)
def test_gguf_shards(name: str, tmp_path: Path) -> None:
    files, expected = SHARD_CASES[name]
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    check(expected, lambda: open_gguf(tmp_path / min(files)))


WRITE_CASES: dict[str, tuple[Callable[[], object], Expected]] = {
    "gguf tensor twice": (
        lambda: layout_gguf({}, [TensorInfo("a", "F32", (1,))] * 2), (Unsupported, "gguf-duplicate-tensor")),
    "gguf tensor name of 64 bytes": (
        lambda: layout_gguf({}, [TensorInfo("é" * 32, "F32", (1,))]), (Unsupported, "gguf-string-too-long")),
    "gguf five dimensions": (lambda: layout_gguf({}, [TensorInfo("a", "F32", (1,) * 5)]), (BadFile, "gguf-dims")),
    "gguf ragged row": (lambda: layout_gguf({}, [TensorInfo("a", "Q4_0", (2, 33))]), (BadFile, "gguf-row-size")),
    "gguf unknown type": (lambda: layout_gguf({}, [TensorInfo("a", "Q9", (2,))]), (Unsupported, "gguf-type-unknown")),
    "gguf value out of range": (lambda: layout_gguf({"k": Value("u8", 256)}, []), (Unsupported, "gguf-value")),
    "gguf value of the wrong kind": (lambda: layout_gguf({"k": Value("[str]", [1])}, []), (Unsupported, "gguf-value")),
    "gguf value type unknown": (lambda: layout_gguf({"k": Value("u128", 1)}, []), (Unsupported, "gguf-value-type")),
    "gguf alignment 3": (lambda: layout_gguf({}, [], 3), (Unsupported, "gguf-alignment")),
    "gguf two alignments": (
        lambda: layout_gguf({"general.alignment": Value("u32", 64)}, [], 128), (Unsupported, "gguf-alignment")),
    "gguf lone surrogate": (lambda: layout_gguf({"k": Value("str", "\udcff")}, []), (Unsupported, "gguf-utf8")),
    "safetensors tensor twice": (
        lambda: layout_safetensors([("a", "F32", (1,))] * 2, None), (Unsupported, "safetensors-name")),
    "safetensors reserved name": (
        lambda: layout_safetensors([("__metadata__", "F32", (1,))], None), (Unsupported, "safetensors-name")),
    "safetensors unknown type": (lambda: layout_safetensors([("a", "Q4_0", (1,))], None), (BadFile, "safetensors-dtype")),
    "safetensors lone surrogate": (
        lambda: layout_safetensors([("\ud800", "F32", (1,))], None), (Unsupported, "safetensors-name")),
    "shard size 0": (lambda: shard_plan([], 0), (UsageError, "shard-size")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITE_CASES)
def test_layout(name: str) -> None:
    call, expected = WRITE_CASES[name]
    check(expected, call)


def test_source_is_missing_or_no_file(tmp_path: Path) -> None:
    check((BadFile, "not-found"), lambda: open_gguf(tmp_path / "no.gguf"))
    check((BadFile, "not-a-file"), lambda: open_safetensors(tmp_path))
    check((BadFile, "not-a-directory"), lambda: open_directory(tmp_path / "no"))
    check((BadFile, "unreadable"), lambda: FileSource("a\0b"))


def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    check((BadFile, "not-a-file"), lambda: FileSource(tmp_path / "pipe"))


def test_a_source_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(valid_gguf().build())
    opened = open_gguf(path)
    os.truncate(path, 300)
    check((BadFile, "truncated"), opened.tensors["b.weight"].read)


def test_destination_exists(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    error = check((OutputError, "exists"), lambda: OutputFile(tmp_path / "out", 3, overwrite=False))
    assert error.exit_code == 4
    check((OutputError, "exists"), lambda: OutputDirectory(tmp_path / "out", None, overwrite=True))
    assert os.listdir(tmp_path) == ["out"]


def test_destination_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check((OutputError, "exists"), lambda: OutputFile(tmp_path / "out", 3, overwrite=True))


def test_parent_is_missing(tmp_path: Path) -> None:
    check((OutputError, "unwritable"), lambda: OutputFile(tmp_path / "no" / "out", 3, overwrite=False))
    check((OutputError, "unwritable"), lambda: OutputDirectory(tmp_path / "no" / "out", None, overwrite=False))


def test_parent_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    check((OutputError, "unwritable"), lambda: OutputFile(tmp_path / "out", 3, overwrite=False))


def test_name_is_too_long(tmp_path: Path) -> None:
    check((OutputError, "unwritable"), lambda: OutputFile(tmp_path / ("n" * 250), 3, overwrite=False))


def test_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_free_nbytes", lambda _: 100)
    check((OutputError, "no-space"), lambda: OutputFile(tmp_path / "out", 101, overwrite=False))
    check((OutputError, "no-space"), lambda: OutputDirectory(tmp_path / "out", 101, overwrite=False))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("number", "code"), [(28, "no-space"), (5, "write-failed")])
def test_disk_fails_midway(number: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with OutputFile(tmp_path / "out", 8, overwrite=False) as out:
        monkeypatch.setattr(os, "pwrite", broken)
        check((OutputError, code), lambda: out.pwrite(0, b"abc"))
    assert os.listdir(tmp_path) == []


def test_write_outside_the_plan(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "out", 8, overwrite=False) as out:
        check((OutputError, "write-range"), lambda: out.pwrite(6, b"abc"))
        check((OutputError, "write-range"), lambda: out.pwrite(-1, b"a"))


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "..", ".", "", ".hidden", "a\\b", "a\0b", "c:x"])
def test_directory_file_names(name: str, tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out", None, overwrite=False) as out:
        check((Unsafe, "file-name"), lambda: out.file(name, 1))


def test_destination_is_the_source(tmp_path: Path) -> None:
    source = tmp_path / "model" / "a.safetensors"
    source.parent.mkdir()
    source.write_bytes(shard())
    os.symlink(source, tmp_path / "link")
    os.link(source, tmp_path / "hard")
    same = (OutputError, "same-file")
    check(same, lambda: check_not_same(source, source))
    check(same, lambda: check_not_same(source, tmp_path / "model" / ".." / "model" / "a.safetensors"))
    check(same, lambda: check_not_same([source], tmp_path / "link"))
    check(same, lambda: check_not_same(FileSource(source), tmp_path / "hard"))
    check(same, lambda: check_not_same(tmp_path / "model", tmp_path / "model" / "out.gguf"))
    check(same, lambda: check_not_same(tmp_path / "model", tmp_path / "model"))
    check(same, lambda: check_not_same(source, tmp_path / "model"))
    check_not_same([source, tmp_path / "model"], tmp_path / "out.gguf")
    check_not_same(tmp_path / "model", tmp_path / "model-gguf")
