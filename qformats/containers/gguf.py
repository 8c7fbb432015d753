"""GGUF: open a file or a set of shards, and lay out a new file. Sizes, names and offsets only; blocks are opaque bytes.

File: ``GGUF``, u32 version, u64 n_tensors, u64 n_kv, the key-value pairs (``gguf_values``), the tensor infos (name, u32
n_dims, u64 dims fastest first, u32 type, u64 offset), zeros up to ``general.alignment`` (32 when absent), the tensor data.
Offsets count from the start of the data; tensor i begins exactly at the sum of the padded sizes before it.

Version 1 has u32 where 2 and 3 have u64 (counts, lengths, dims; not offsets). Version 3 may be big-endian: then the version
read little-endian has zero low 16 bits, and every number is swapped, those inside the blocks too. Rules and limits follow
``ggml/src/gguf.cpp`` (llama.cpp v0.5.0); what that rejects is rejected here. Shards: ``tools/gguf-split`` of the same tree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qformats.containers import gguf_remote
from qformats.containers.ggml_types import GGML_TYPES, MAX_DIMS, tensor_nbytes, type_name
from qformats.containers.gguf_values import (
    MAX_KEY_NBYTES,
    U32,
    U64,
    Cursor,
    Metadata,
    StringArray,
    Value,
    encode_string,
    encode_value,
    read_value,
)
from qformats.containers.layout import Layout
from qformats.containers.raw import RawTensor
from qformats.containers.source import ByteSource, FileSource, is_remote
from qformats.errors import BadFile, Unsupported

__all__ = [
    "DEFAULT_ALIGNMENT",
    "GGML_TYPES",
    "GGUFFile",
    "Layout",
    "Metadata",
    "StringArray",
    "TensorInfo",
    "Value",
    "layout_gguf",
    "open_gguf",
    "open_gguf_shards", "open_gguf_sources",
    "tensor_nbytes",
]

MAGIC = b"GGUF"
OLD_MAGICS = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt", b"algg": "ggla"}  # u32 constants, so reversed on disk
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_NAME_NBYTES = 63  # GGML_MAX_NAME is 64 with the final zero
MAX_COUNT = 1 << 20  # tensors, and keys, of one file
SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
SHARD_KEYS = ("split.no", "split.count", "split.tensors.count")
INTEGERS = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF. ``metadata`` and ``tensors`` keep file order; a set of shards looks like one file.

    ``tensors[...].dtype`` is a ggml type name, ``shape`` in torch order (ggml's ``ne`` reversed, ones as stored).
    ``data_offset`` is that of the first shard, ``size`` the sum over all. The metadata is the first shard's, its
    ``split.*`` keys included: they say how the source was cut, so a writer of one file leaves them out.
    """

    name: str
    version: int
    big_endian: bool
    alignment: int
    metadata: Metadata
    tensors: dict[str, RawTensor]
    data_offset: int
    size: int
    shards: int

    def settle(self) -> None:
        """Read the strings that a search for the rest stepped across; raises as touching them does (``gguf_remote``)."""
        for value in self.metadata.values():
            if isinstance(value.value, StringArray):
                value.value.settle()


@dataclass(frozen=True)
class TensorInfo:
    """A tensor to be written: ``dtype`` a ggml type name, ``shape`` in torch order."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def open_gguf(path: str | Path | ByteSource) -> GGUFFile:
    """Parse and check the header of a GGUF file, or of all shards if ``path`` is one of ``NAME-00001-of-0000N.gguf``.

    Raises ``BadFile`` for anything that contradicts itself or the file's size, ``Unsupported`` for old magics, unknown
    versions, removed and unknown tensor types and nested arrays.
    """
    source: ByteSource = FileSource(path) if isinstance(path, (str, Path)) else path
    first = _open_one(source)
    count = _integer(first, "split.count")
    if count is None or count <= 1:
        return first
    if not isinstance(source, FileSource):
        raise BadFile("gguf-shard-name", f"is one of {count} shards; open it by its path", path=source.name)
    return _open_shards(first, count)


def open_gguf_shards(paths: Sequence[str | Path]) -> GGUFFile:
    """Open the shards at ``paths``, in any order and under any names, as one file; raises as ``open_gguf``."""
    return open_gguf_sources([FileSource(path) for path in paths])


def open_gguf_sources(sources: Sequence[ByteSource]) -> GGUFFile:
    """``open_gguf_shards`` of bytes from anywhere; one source that is no shard is a file."""
    opened = [_open_one(source) for source in sources]
    if len(opened) == 1 and _integer(opened[0], "split.count") in (None, 0, 1):
        return opened[0]
    numbers = [_integer(file, "split.no") for file in opened]
    files = [file for _, file in sorted(zip(numbers, opened), key=lambda pair: -1 if pair[0] is None else pair[0])]
    count = _integer(files[0], "split.count") if files else None
    if count != len(files):
        where = files[0].name if files else None
        raise BadFile("gguf-shard-missing", f"is one of {count} shards, {len(files)} were given", path=where, hint="give all shards")
    for number, file in enumerate(files):
        _check_shard(file, files[0], number, count)
    return _merge(files[0].name, files)


# reading one file


def _open_one(source: ByteSource) -> GGUFFile:
    found = gguf_remote.search(source, _read_header) if is_remote(source) else None
    return _read_header(Cursor(source)) if found is None else found


def _read_header(cursor: Cursor) -> GGUFFile:
    source = cursor.source
    version = _read_version(cursor)
    cursor.n_tensors = n_tensors = _count(cursor, "tensors", 25 if cursor.wide else 21)
    n_kv = _count(cursor, "keys", 13 if cursor.wide else 9)
    metadata = _read_metadata(cursor, n_kv)
    alignment = _alignment(cursor, metadata)
    infos = _read_infos(cursor, n_tensors)
    data_offset = cursor.at + (-cursor.at % alignment if n_tensors else 0)
    if data_offset > source.size:
        cursor.fail("truncated", f"the data begins at byte {data_offset}, the file has {source.size} bytes")
    tensors = _place(cursor, infos, data_offset, alignment)
    return GGUFFile(source.name, version, cursor.order == ">", alignment, metadata, tensors, data_offset, source.size, 1)


def _read_version(cursor: Cursor) -> int:
    """Check the magic, find version and byte order, and set the cursor up for them."""
    cursor.need(min(4, cursor.source.size), "the magic")
    magic = cursor.buffer[:4]
    if magic in OLD_MAGICS:
        raise Unsupported(
            "gguf-old-magic",
            f"is an old {OLD_MAGICS[magic]} file, not GGUF",
            path=cursor.source.name,
            hint="convert it with llama.cpp's convert_llama_ggml_to_gguf.py",
        )
    if magic != MAGIC:
        cursor.fail("gguf-magic", f"begins with {magic!r}, expected {MAGIC!r}")
    cursor.at = 4
    version: int = cursor.unpack("I", "the version")
    if version & 0xFFFF == 0 and version:
        cursor.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
    if version == 0:
        cursor.fail("gguf-version", "has version 0")
    if version > 3 or (version == 1 and cursor.order == ">"):
        raise Unsupported("gguf-version", f"is GGUF version {version}, known are 1, 2 and 3", path=cursor.source.name)
    cursor.wide = version > 1
    return version


def _count(cursor: Cursor, what: str, smallest: int) -> int:
    """Read a count and hold it against the bytes left: each of ``what`` takes at least ``smallest``."""
    count = cursor.length(f"the number of {what}")
    if count > MAX_COUNT or count * smallest > cursor.remaining:
        cursor.fail("gguf-count", f"claims {count} {what}, the file has {cursor.remaining} bytes left")
    return count


def _name(cursor: Cursor, what: str, limit: int) -> str:
    name = cursor.string(what, limit)
    if not name or "\0" in name:
        cursor.fail("gguf-name", f"{what} is {'empty' if not name else 'cut by a zero byte'}")
    return name


def _read_metadata(cursor: Cursor, count: int) -> Metadata:
    metadata: Metadata = {}
    for i in range(count):
        cursor.keys_left = count - i - 1
        cursor.places.append(cursor.at)
        key = _name(cursor, f"key {i}", MAX_KEY_NBYTES)
        if key in metadata:
            cursor.fail("gguf-duplicate-key", f"key {key!r} appears twice")
        metadata[key] = read_value(cursor, key)
    cursor.places.append(cursor.at)
    return metadata


def _alignment(cursor: Cursor, metadata: Metadata) -> int:
    value = metadata.get(ALIGNMENT_KEY)
    if value is None:
        return DEFAULT_ALIGNMENT
    problem = _alignment_problem(value)
    if problem:
        cursor.fail("gguf-alignment", problem)
    alignment: int = value.value
    return alignment


def _alignment_problem(value: Value) -> str | None:
    if value.type != "u32":
        return f"{ALIGNMENT_KEY} has type {value.type}, expected u32"
    n = value.value
    if not isinstance(n, int) or n <= 0 or n & (n - 1) or n > MAX_ALIGNMENT:
        return f"{ALIGNMENT_KEY} is {n}, expected a power of two up to {MAX_ALIGNMENT}"
    return None


def _read_infos(cursor: Cursor, count: int) -> list[tuple[TensorInfo, int, int]]:
    """Read the tensor infos as (info, nbytes, offset within the data)."""
    infos: list[tuple[TensorInfo, int, int]] = []
    names: set[str] = set()
    for i in range(count):
        name = _name(cursor, f"the name of tensor {i}", MAX_NAME_NBYTES)
        if name in names:
            cursor.fail("gguf-duplicate-tensor", "appears twice", tensor=name)
        names.add(name)
        n_dims = cursor.unpack("I", f"the dimensions of {name!r}")
        if n_dims > MAX_DIMS:
            cursor.fail("gguf-dims", f"{n_dims} dimensions, ggml has at most {MAX_DIMS}", tensor=name)
        shape = tuple(reversed([cursor.length(f"the shape of {name!r}") for _ in range(n_dims)]))
        number = cursor.unpack("I", f"the type of {name!r}")
        dtype = type_name(number, path=cursor.source.name, tensor=name, offset_bytes=cursor.at - 4)
        nbytes = tensor_nbytes(dtype, shape, path=cursor.source.name, tensor=name, offset_bytes=cursor.at)
        infos.append((TensorInfo(name, dtype, shape), nbytes, cursor.unpack("Q", f"the offset of {name!r}")))
    return infos


def _place(
    cursor: Cursor, infos: list[tuple[TensorInfo, int, int]], data_offset: int, alignment: int
) -> dict[str, RawTensor]:
    """Check that the tensors follow each other without hole or overlap inside the file."""
    source, expected = cursor.source, 0
    tensors: dict[str, RawTensor] = {}
    for info, nbytes, offset in infos:
        if offset % alignment:
            cursor.fail("gguf-offset-unaligned", f"offset {offset} is not a multiple of {alignment}", tensor=info.name)
        if offset != expected:
            problem = "overlaps the tensor before it" if offset < expected else "leaves a hole behind the tensor before it"
            code = "gguf-offset-overlap" if offset < expected else "gguf-offset-gap"
            cursor.fail(code, f"offset {offset} {problem}, expected {expected}", tensor=info.name)
        start = data_offset + offset
        if start + nbytes > source.size:
            raise BadFile(
                "truncated",
                f"ends at byte {start + nbytes}, the file has {source.size} bytes",
                path=source.name,
                tensor=info.name,
                offset_bytes=start,
                hint="the download is incomplete, fetch it again",
            )
        tensors[info.name] = RawTensor(info.name, info.dtype, info.shape, source, start, nbytes, cursor.order == ">")
        expected += nbytes + -nbytes % alignment
    return tensors


# shards


def _integer(file: GGUFFile, key: str) -> int | None:
    """An integer key of any width, or None if it is absent."""
    value = file.metadata.get(key)
    if value is None:
        return None
    if value.type not in INTEGERS:
        raise BadFile("gguf-shard-keys", f"{key} has type {value.type}, expected an integer", path=file.name)
    number: int = value.value
    return number


def _open_shards(opened: GGUFFile, count: int) -> GGUFFile:
    """Open all shards named after the one that was opened; nothing but its path and the shard count makes a name."""
    path = Path(opened.name)
    match = SHARD_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise BadFile(
            "gguf-shard-name",
            f"split.count is {count}, which the file name does not show",
            path=path,
            hint=f"shards are named NAME-00001-of-{count:05d}.gguf; restore the original names",
        )
    files: list[GGUFFile] = []
    for number in range(count):
        shard = path.with_name(f"{match[1]}-{number + 1:05d}-of-{count:05d}.gguf")
        if not shard.is_file():
            raise BadFile("gguf-shard-missing", f"shard {number + 1} of {count} is missing", path=shard, hint="fetch it")
        files.append(opened if shard.name == path.name else _open_one(FileSource(shard)))
        _check_shard(files[-1], files[0], number, count)
    return _merge(opened.name, files)


def _check_shard(file: GGUFFile, first: GGUFFile, number: int, count: int) -> None:
    found_no, found_count = _integer(file, "split.no"), _integer(file, "split.count")
    if (found_no, found_count) != (number, count):
        raise BadFile(
            "gguf-shard-keys",
            f"split.no {found_no} and split.count {found_count}, expected {number} and {count}",
            path=file.name,
            hint="the shards are misnamed or of different models",
        )
    if (file.version, file.big_endian) != (first.version, first.big_endian):
        raise BadFile("gguf-shard-keys", "has another version or byte order than the first shard", path=file.name)
    for key, value in file.metadata.items():
        if key not in (*SHARD_KEYS, ALIGNMENT_KEY) and first.metadata.get(key) != value:
            raise BadFile("gguf-shard-keys", f"key {key!r} differs from that of the first shard", path=file.name)


def _merge(name: str, files: list[GGUFFile]) -> GGUFFile:
    tensors: dict[str, RawTensor] = {}
    for file in files:
        for tensor in file.tensors.values():
            if tensor.name in tensors:
                raise BadFile("gguf-duplicate-tensor", "appears in two shards", path=file.name, tensor=tensor.name)
            tensors[tensor.name] = tensor
    for file in files:
        total = _integer(file, "split.tensors.count")
        if total is not None and total != len(tensors):
            raise BadFile("gguf-shard-keys", f"split.tensors.count is {total}, the shards hold {len(tensors)}", path=file.name)
    return replace(files[0], name=name, tensors=tensors, size=sum(file.size for file in files), shards=len(files))


# writing


def layout_gguf(metadata: Metadata, tensors: Sequence[TensorInfo], alignment: int = DEFAULT_ALIGNMENT) -> Layout:
    """Plan a version 3 little-endian file with ``tensors`` in the given order, each padded to the alignment.

    ``general.alignment`` in ``metadata`` decides; without it an ``alignment`` other than 32 adds the key at the end.
    Raises ``Unsupported`` or ``BadFile`` with the reader's codes for what GGUF cannot hold.

    >>> layout_gguf({"general.architecture": Value("str", "llama")}, [TensorInfo("a", "F32", (2, 3))]).size
    160
    """
    metadata = _with_alignment(metadata, alignment)
    step = metadata[ALIGNMENT_KEY].value if ALIGNMENT_KEY in metadata else DEFAULT_ALIGNMENT
    parts = [MAGIC, U32.pack(3), U64.pack(len(tensors)), U64.pack(len(metadata))]
    for key, value in metadata.items():
        if not key or "\0" in key:
            raise Unsupported("gguf-name", f"a key is {'empty' if not key else 'cut by a zero byte'}")
        parts += [encode_string(key, "a key"), encode_value(key, value)]
    relative: dict[str, int] = {}
    nbytes: dict[str, int] = {}
    at = 0
    for info in tensors:
        _check_name(info.name, relative)
        nbytes[info.name] = tensor_nbytes(info.dtype, info.shape, tensor=info.name)
        relative[info.name] = at
        parts += [encode_string(info.name, "a tensor name"), U32.pack(len(info.shape))]
        parts += [U64.pack(size) for size in reversed(info.shape)]
        parts += [U32.pack(GGML_TYPES[info.dtype][0]), U64.pack(at)]
        at += nbytes[info.name] + -nbytes[info.name] % step
    header = b"".join(parts)
    header += bytes(-len(header) % step)
    return Layout(header, {name: len(header) + offset for name, offset in relative.items()}, nbytes, len(header) + at)


def _with_alignment(metadata: Metadata, alignment: int) -> Metadata:
    if ALIGNMENT_KEY not in metadata and alignment != DEFAULT_ALIGNMENT:
        metadata = {**metadata, ALIGNMENT_KEY: Value("u32", alignment)}
    value = metadata.get(ALIGNMENT_KEY, Value("u32", DEFAULT_ALIGNMENT))
    problem = _alignment_problem(value)
    if problem is None and alignment not in (DEFAULT_ALIGNMENT, value.value):
        problem = f"{ALIGNMENT_KEY} is {value.value}, but {alignment} was asked for"
    if problem:
        raise Unsupported("gguf-alignment", problem)
    return metadata


def _check_name(name: str, taken: dict[str, int]) -> None:
    if not name or "\0" in name:
        raise Unsupported("gguf-name", f"a tensor name is {'empty' if not name else 'cut by a zero byte'}")
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_NBYTES:
        raise Unsupported("gguf-string-too-long", f"the name has more than {MAX_NAME_NBYTES} bytes", tensor=name)
    if name in taken:
        raise Unsupported("gguf-duplicate-tensor", "would be written twice", tensor=name)
