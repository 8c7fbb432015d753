"""safetensors: open and check a file, lay out a new one. Torch-free and numpy-free.

File: u64 header length, a JSON header ``{"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}}``
padded with spaces, the tensor data. Offsets count from the start of the data; the tensors cover it without hole or overlap.

The rules are those of the reference implementation (safetensors 0.8.0, ``tensor.rs``), and a few stricter ones: no key may
appear twice anywhere, and a tensor entry has exactly its three fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qformats.containers.layout import Layout
from qformats.containers.raw import RawTensor
from qformats.containers.source import ByteSource, FileSource
from qformats.errors import BadFile, Unsupported

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_NBYTES",
    "SafetensorsFile",
    "layout_safetensors",
    "open_safetensors",
    "parse_json",
    "tensor_nbytes",
]

MAX_HEADER_NBYTES = 100_000_000  # the reference's own limit
MAX_ELEMENTS = 2**63 - 1
MAX_INTEGER_DIGITS = 20
METADATA_KEY = "__metadata__"
FIELDS = {"dtype", "shape", "data_offsets"}

# bits of one element; the order is the reference's sort order of the payload, from last to first
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}


@dataclass(frozen=True)
class SafetensorsFile:
    """An open file; ``tensors`` in the order of the payload, ``metadata`` the header's ``__metadata__`` (or empty)."""

    name: str
    metadata: dict[str, str]
    tensors: dict[str, RawTensor]
    size: int


def tensor_nbytes(dtype: str, shape: Sequence[int], *, path: str | None = None, tensor: str | None = None) -> int:
    """Return the bytes of a tensor; raises ``BadFile``: ``safetensors-dtype``, ``safetensors-size`` (overflow, part of a byte).

    >>> tensor_nbytes("BF16", (2, 3))
    12
    """
    if dtype not in DTYPE_BITS:
        raise BadFile("safetensors-dtype", f"{dtype!r} is not a safetensors type", path=path, tensor=tensor)
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        if size < 0 or bits > MAX_ELEMENTS:
            raise BadFile("safetensors-size", f"shape {tuple(shape)} is negative or overflows 63 bits", path=path, tensor=tensor)
    if bits % 8:
        raise BadFile("safetensors-size", f"{dtype} of shape {tuple(shape)} ends within a byte", path=path, tensor=tensor)
    return bits // 8


class _Refused(ValueError):
    """Raised inside the JSON decoder with a message for the user."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        raise _Refused(f"key {next(key for key in names if names.count(key) > 1)!r} appears twice")
    return found


def _small_integer(text: str) -> int:
    if len(text) > MAX_INTEGER_DIGITS or text.startswith("-"):
        raise _Refused(f"the number {text[:40]} is no size")
    return int(text)


def _no_number(text: str) -> NoReturn:
    raise _Refused(f"the number {text[:40]} is no integer")


def parse_json(raw: bytes, code: str, path: str, *, sizes_only: bool = False) -> Any:
    """Decode strict JSON (UTF-8, no duplicate key, no NaN); raises ``BadFile(code)``, or ``duplicate-key``.

    ``sizes_only`` refuses every number that is not a non-negative integer of at most 20 digits.
    """
    numbers: dict[str, Any] = {"parse_int": _small_integer, "parse_float": _no_number} if sizes_only else {}
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, **numbers)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate has no UTF-8 form
    except UnicodeDecodeError as error:
        raise BadFile(code, f"is not UTF-8 at byte {error.start} of the JSON", path=path) from None
    except UnicodeEncodeError:
        raise BadFile(code, "the JSON holds a lone surrogate", path=path) from None
    except _Refused as error:
        raise BadFile("duplicate-key" if "twice" in str(error) else code, str(error), path=path) from None
    except RecursionError:
        raise BadFile(code, "the JSON is nested too deeply", path=path) from None
    except ValueError as error:
        raise BadFile(code, f"is not JSON: {error}", path=path) from None
    return value


def open_safetensors(path: str | Path | ByteSource) -> SafetensorsFile:
    """Read and check the header; raises ``BadFile`` for whatever the reference implementation rejects."""
    source: ByteSource = FileSource(path) if isinstance(path, (str, Path)) else path
    nbytes = _header_nbytes(source)
    raw = source.pread(8, nbytes)
    if not raw.startswith(b"{"):
        raise BadFile("safetensors-header", f"begins with {raw[:8]!r}, expected a JSON object", path=source.name, offset_bytes=8)
    header = parse_json(raw, "safetensors-header", source.name, sizes_only=True)
    metadata = _metadata(source, header.pop(METADATA_KEY, None))
    entries = sorted((_entry(source, name, entry) for name, entry in header.items()), key=lambda e: (e[3], e[4]))
    tensors: dict[str, RawTensor] = {}
    data, expected = 8 + nbytes, 0
    for name, dtype, shape, begin, end in entries:
        size = tensor_nbytes(dtype, shape, path=source.name, tensor=name)
        if begin != expected or end < begin:
            message = f"data_offsets [{begin}, {end}] leave a hole or overlap, expected a start at {expected}"
            raise BadFile("safetensors-offsets", message, path=source.name, tensor=name)
        if end - begin != size:
            message = f"{dtype} of shape {shape} has {size} bytes, its data_offsets span {end - begin}"
            raise BadFile("safetensors-span", message, path=source.name, tensor=name)
        tensors[name] = RawTensor(name, dtype, shape, source, data + begin, size)
        expected = end
    _check_end(source, data + expected)
    return SafetensorsFile(source.name, metadata, tensors, source.size)


def _header_nbytes(source: ByteSource) -> int:
    if source.size < 8:
        raise BadFile("truncated", f"has {source.size} bytes, a header needs at least 8", path=source.name)
    nbytes = int.from_bytes(source.pread(0, 8), "little")
    if nbytes > MAX_HEADER_NBYTES:
        raise BadFile(
            "safetensors-header-too-large",
            f"claims a header of {nbytes} bytes, at most {MAX_HEADER_NBYTES} are allowed",
            path=source.name,
            hint="this is no safetensors file, or a corrupt one",
        )
    if 8 + nbytes > source.size:
        message = f"claims a header of {nbytes} bytes, the file has {source.size - 8} behind its length"
        raise BadFile("truncated", message, path=source.name, hint="the file is incomplete, fetch it again")
    return nbytes


def _metadata(source: ByteSource, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BadFile("safetensors-metadata", f"{METADATA_KEY} is not an object of strings", path=source.name)
    return value


def _entry(source: ByteSource, name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """Check the form of one header entry: (name, dtype, shape, begin, end)."""

    def bad(message: str) -> BadFile:
        return BadFile("safetensors-entry", message, path=source.name, tensor=name)

    if not isinstance(entry, dict) or set(entry) != FIELDS:
        raise bad(f"an entry needs exactly {', '.join(sorted(FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise bad(f"dtype is {dtype!r}, expected a string")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise bad(f"shape is {shape!r}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int for at in offsets):
        raise bad(f"data_offsets is {offsets!r}, expected two offsets")
    return name, dtype, tuple(shape), offsets[0], offsets[1]


def _check_end(source: ByteSource, end: int) -> None:
    if end > source.size:
        message = f"the tensors end at byte {end}, the file has {source.size}"
        raise BadFile("truncated", message, path=source.name, hint="the download is incomplete, fetch it again")
    if end < source.size:
        raise BadFile("safetensors-trailing", f"{source.size - end} bytes follow the last tensor", path=source.name, offset_bytes=end)


def layout_safetensors(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> Layout:
    """Plan a file of ``(name, dtype, shape)``: equal input in any order gives equal bytes.

    Payload and header are sorted as the reference sorts them (wide types first, then name), ``__metadata__`` by key.
    Raises ``BadFile`` for unknown types and sizes, ``Unsupported`` for names the header cannot hold.

    >>> layout_safetensors([("b", "F32", (2,)), ("a", "U8", (3,))], None).header[8:].rstrip()
    b'{"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}'
    """
    for name, dtype, shape in tensors:
        tensor_nbytes(dtype, shape, tensor=name)
    header: dict[str, Any] = {}
    if metadata:
        header[METADATA_KEY] = {key: metadata[key] for key in sorted(metadata)}
    relative: dict[str, tuple[int, int]] = {}
    at = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (-_RANK[t[1]], t[0].encode("utf-8", "surrogatepass"))):
        if name in header or name == METADATA_KEY:
            raise Unsupported("safetensors-name", "the name is reserved or would be written twice", tensor=name)
        end = at + tensor_nbytes(dtype, shape, tensor=name)
        header[name] = {"dtype": dtype, "shape": [int(size) for size in shape], "data_offsets": [at, end]}
        relative[name], at = (at, end), end
    raw = _encode_header(header)
    data = len(raw)
    offsets = {name: data + begin for name, (begin, _) in relative.items()}
    return Layout(raw, offsets, {name: end - begin for name, (begin, end) in relative.items()}, data + at)


def _encode_header(header: dict[str, Any]) -> bytes:
    """Compact JSON behind its u64 length, padded with spaces to eight bytes."""
    if not all(isinstance(text, str) for item in header.get(METADATA_KEY, {}).items() for text in item):
        raise Unsupported("safetensors-metadata", f"{METADATA_KEY} holds something else than strings")
    try:
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        raise Unsupported("safetensors-name", "a name or a metadata text holds a lone surrogate, which JSON cannot keep") from None
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_NBYTES:
        raise Unsupported("safetensors-header-too-large", f"the header would have {len(raw)} bytes", hint="write more shards")
    return len(raw).to_bytes(8, "little") + raw
