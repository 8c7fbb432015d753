"""GGUF metadata values: reading and writing the typed key-value section, with lazily decoded string arrays.

| name | id | bytes |      | name | id | bytes |
|------|----|-------|------|------|----|-------|
| u8   | 0  | 1     |      | f32  | 6  | 4     |
| i8   | 1  | 1     |      | bool | 7  | 1     |
| u16  | 2  | 2     |      | str  | 8  | length (u64; u32 in version 1) + UTF-8 |
| i16  | 3  | 2     |      | array| 9  | element type u32, count (u64; u32 in version 1), elements |
| u32  | 4  | 4     |      | u64  | 10 | 8     |
| i32  | 5  | 4     |      | i64, f64 | 11, 12 | 8 |

Source: the GGUF specification (``docs/gguf.md`` of the ggml repository) and ``ggml/src/gguf.cpp`` (llama.cpp v0.5.0).
Every length is checked against the bytes left in the file before anything of that size is read or built.

Of a file that comes over a network, long arrays of numbers are passed over and read when they are touched. Where an array of strings
ends is written nowhere: ``gguf_remote`` finds it.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, overload

from qformats.containers.source import ByteSource, is_remote
from qformats.errors import BadFile, Unsupported

__all__ = [
    "MAX_ARRAY_COUNT",
    "MAX_HEADER_NBYTES",
    "MAX_KEY_NBYTES",
    "MAX_STRING_NBYTES",
    "Cursor",
    "Metadata",
    "NumberArray",
    "StringArray",
    "Value",
    "encode_string",
    "encode_value",
    "read_value",
]

MAX_HEADER_NBYTES = 512 << 20  # everything before the tensor data; the largest known vocabularies need under 20 MB
MAX_STRING_NBYTES = 64 << 20  # one string (ggml allows 1 GiB); chat templates and tokenizer JSON stay far below
MAX_KEY_NBYTES = 65535  # the specification's own limit
MAX_ARRAY_COUNT = 1 << 24  # elements of one array (ggml allows 2^30)
FIRST_READ_NBYTES = 256 << 10
REMOTE_READ_NBYTES = 64 << 10  # the least that is asked for over a network, and the least that is worth passing over
REMOTE_MOST_NBYTES = 768 << 10

SCALARS = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"),
    "bool": (7, "B"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d"),
}  # fmt: skip
STRING_ID, ARRAY_ID = 8, 9
TYPE_IDS = {**{name: number for name, (number, _) in SCALARS.items()}, "str": STRING_ID}
TYPE_NAMES = {number: name for name, number in TYPE_IDS.items()}
U64 = struct.Struct("<Q")
U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Value:
    """One metadata value: ``type`` is a scalar name of the module table or ``"[name]"``; an array's ``value`` is a sequence.

    >>> Value("u32", 32), Value("[str]", ("a", "b"))
    (Value(type='u32', value=32), Value(type='[str]', value=('a', 'b')))
    """

    type: str
    value: Any


Metadata = dict[str, Value]


class StringArray(Sequence[str]):
    """The strings of one array, kept as their encoded bytes and decoded when touched.

    ``array[i]`` is strict: bytes that are no UTF-8 raise ``BadFile('gguf-utf8')``. Some vocabularies do hold such tokens
    on purpose; ``raw(i)`` gives the bytes, ``decode(errors)`` all strings with any of Python's error handlers, and writing
    the array back copies the bytes whatever they are. Equal to any sequence of the same strings.
    """

    __slots__ = ("_blob", "_encoded", "_name", "_starts", "_width")

    def __init__(self, blob: bytes, starts: array[int], *, width: int, encoded: bool, name: str = "") -> None:
        """``blob`` is the array's region of the file, ``starts[i]`` where string i begins in it (behind its length of ``width`` bytes)."""
        self._blob, self._starts, self._width, self._encoded, self._name = blob, starts, width, encoded, name

    def __len__(self) -> int:
        return len(self._starts)

    def settle(self) -> None:
        """Read what was not read yet: nothing."""

    def raw(self, index: int) -> bytes:
        """The bytes of string ``index`` as stored."""
        count = len(self._starts)
        if index < 0:
            index += count
        if not 0 <= index < count:
            raise IndexError("string index out of range")
        end = self._starts[index + 1] - self._width if index + 1 < count else len(self._blob)
        return self._blob[self._starts[index] : end]

    def iter_raw(self) -> Iterator[bytes]:
        """All strings as bytes, in order."""
        blob, width, starts = self._blob, self._width, self._starts
        for i in range(len(starts) - 1):
            yield blob[starts[i] : starts[i + 1] - width]
        if starts:
            yield blob[starts[-1] :]

    def decode(self, errors: str = "strict") -> list[str]:
        """All strings, decoded with Python's ``errors`` handler (``"surrogateescape"`` keeps invalid bytes recoverable)."""
        if errors == "strict":
            return list(self)
        return [raw.decode("utf-8", errors) for raw in self.iter_raw()]

    def encoded(self) -> bytes:
        """The strings as a version 3 little-endian file stores them."""
        return self._blob if self._encoded else b"".join(U64.pack(len(raw)) + raw for raw in self.iter_raw())

    def _text(self, index: int, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadFile(
                "gguf-utf8",
                f"string {index} of the array {self._name!r} is not UTF-8 at its byte {error.start}",
                hint="read it as bytes or with another error handler",
            ) from None

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._text(index, self.raw(index))

    def __iter__(self) -> Iterator[str]:
        try:
            texts = [str(raw, "utf-8") for raw in self.iter_raw()]
        except UnicodeDecodeError:
            texts = [self._text(index, raw) for index, raw in enumerate(self.iter_raw())]
        return iter(texts)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray):
            return len(self) == len(other) and self.encoded() == other.encoded()
        if isinstance(other, (list, tuple)):
            return len(self) == len(other) and all(
                isinstance(text, str) and raw == text.encode("utf-8", "surrogatepass") for raw, text in zip(self.iter_raw(), other)
            )
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.iter_raw()))

    def __repr__(self) -> str:
        return f"StringArray({len(self)} strings)"


class NumberArray(Sequence[Any]):
    """The numbers of one long array, read when one is touched; ``BadFile`` and ``RemoteError`` then, as the source raises them."""

    __slots__ = ("_count", "_form", "_offset", "_source", "_values")

    def __init__(self, source: ByteSource, offset: int, count: int, form: str) -> None:
        """``form`` is the struct format of all ``count`` numbers, which begin at byte ``offset``."""
        self._source, self._offset, self._count, self._form = source, offset, count, form
        self._values: tuple[Any, ...] | None = None

    def _read(self) -> tuple[Any, ...]:
        if self._values is None:
            self._values = struct.unpack(self._form, self._source.pread(self._offset, struct.calcsize(self._form)))
        return self._values

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._read()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._read())

    def __eq__(self, other: object) -> bool:
        return self._read() == tuple(other) if isinstance(other, (NumberArray, tuple, list)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._read())

    def __repr__(self) -> str:
        return f"NumberArray({self._count} numbers)"


class Cursor:
    """Reads a GGUF header front to back; refills from ``source`` in growing pieces and never past its end.

    ``buffer`` holds the file from byte ``base`` on; ``at`` is the place in the file.

    ``order`` is ``"<"`` or ``">"``; ``wide`` says that lengths and counts have 64 bits (32 in version 1). ``n_tensors`` and ``keys_left``
    say what is behind the value that is read, ``places`` where the keys began, and the tensors. ``least_nbytes``: how much is read at once.
    """

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.at = 0
        self.order = "<"
        self.wide = True
        self.buffer, self.base = b"", 0
        self.n_tensors = self.keys_left = 0
        self.places: list[int] = []
        self.least_nbytes = REMOTE_READ_NBYTES if is_remote(source) else FIRST_READ_NBYTES

    def fail(self, code: str, message: str, *, tensor: str | None = None, hint: str | None = None) -> NoReturn:
        raise BadFile(code, message, path=self.source.name, offset_bytes=self.at, tensor=tensor, hint=hint)

    @property
    def remaining(self) -> int:
        """Bytes between here and the end of the file."""
        return self.source.size - self.at

    def need(self, nbytes: int, what: str, likely: int = 0) -> None:
        """Make the next ``nbytes`` available in ``buffer``, or raise ``BadFile`` (``truncated``, ``gguf-header-too-large``).

        ``likely``: about how many bytes will be asked for next.
        """
        end, have = self.at + nbytes, self.base + len(self.buffer)
        if end <= have:
            return
        if end > self.source.size:
            self.fail(
                "truncated",
                f"{what} needs {nbytes} bytes, the file has {max(0, self.remaining)} left",
                hint="the file is corrupt, or incomplete: fetch it again",
            )
        if end > MAX_HEADER_NBYTES:
            self.fail("gguf-header-too-large", f"the header exceeds {MAX_HEADER_NBYTES} bytes at {what}")
        step = max(self.least_nbytes, likely if is_remote(self.source) else len(self.buffer))
        target = min(self.source.size, max(end, have + step))
        self.buffer += self.source.pread(have, target - have)

    def pass_over(self, nbytes: int) -> bool:
        """Go on ``nbytes`` further without reading them, where that saves more than a request costs; whether it was done."""
        end = self.at + nbytes
        if not is_remote(self.source) or end - self.base - len(self.buffer) < REMOTE_READ_NBYTES or end > MAX_HEADER_NBYTES:
            return False
        self.at = self.base = end
        self.buffer = b""
        return True

    def pass_strings(self, key: str, count: int) -> StringArray | None:
        """Go on behind an array of strings without reading it, where a cursor can: this one cannot."""
        return None

    def unpack(self, code: str, what: str) -> Any:
        """Read one number of struct ``code``."""
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from(self.order + code, self.buffer, self.at - self.base)
        self.at += size
        return value

    def length(self, what: str) -> int:
        """Read a string length or an array count."""
        value: int = self.unpack("Q" if self.wide else "I", what)
        return value

    def raw_string(self, what: str, limit: int = MAX_STRING_NBYTES) -> bytes:
        """Read one length-prefixed string as bytes."""
        nbytes = self.length(f"the length of {what}")
        if nbytes > self.remaining:
            self.fail("truncated", f"{what} claims {nbytes} bytes, the file has {self.remaining} left")
        if nbytes > limit:
            self.fail("gguf-string-too-long", f"{what} has {nbytes} bytes, at most {limit} are accepted")
        self.need(nbytes, what)
        self.at += nbytes
        return self.buffer[self.at - nbytes - self.base : self.at - self.base]

    def string(self, what: str, limit: int = MAX_STRING_NBYTES) -> str:
        """Read one string; raises ``BadFile('gguf-utf8')`` if it is not UTF-8."""
        raw = self.raw_string(what, limit)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail("gguf-utf8", f"{what} is not UTF-8 at its byte {error.start}")


def read_value(cursor: Cursor, key: str) -> Value:
    """Read type and value of ``key``; raises ``BadFile`` or, for nested arrays, ``Unsupported('gguf-nested-array')``."""
    type_id = cursor.unpack("I", f"the type of {key!r}")
    if type_id == ARRAY_ID:
        return _read_array(cursor, key)
    if type_id == STRING_ID:
        return Value("str", cursor.string(f"the value of {key!r}"))
    name = _scalar_name(cursor, key, type_id)
    value = cursor.unpack(SCALARS[name][1], f"the value of {key!r}")
    return Value(name, _as_bool(cursor, key, value) if name == "bool" else value)


def _scalar_name(cursor: Cursor, key: str, type_id: int) -> str:
    if type_id not in TYPE_NAMES:
        cursor.fail("gguf-value-type", f"key {key!r} has the unknown value type {type_id}; known are 0 to 12")
    return TYPE_NAMES[type_id]


def _as_bool(cursor: Cursor, key: str, value: int) -> bool:
    if value > 1:
        cursor.fail("gguf-bool", f"key {key!r} holds the byte {value} as a bool, allowed are 0 and 1")
    return value == 1


def _read_array(cursor: Cursor, key: str) -> Value:
    type_id = cursor.unpack("I", f"the element type of {key!r}")
    if type_id == ARRAY_ID:
        raise Unsupported(
            "gguf-nested-array", f"key {key!r} is an array of arrays", path=cursor.source.name, offset_bytes=cursor.at,
            hint="ggml rejects nested arrays as well",
        )  # fmt: skip
    name = _scalar_name(cursor, key, type_id)
    count = cursor.length(f"the count of {key!r}")
    code = "Q" if name == "str" and cursor.wide else "I" if name == "str" else SCALARS[name][1]
    nbytes = count * struct.calcsize("<" + code)
    if nbytes > cursor.remaining:
        cursor.fail("truncated", f"array {key!r} claims {count} elements ({nbytes} bytes), the file has {cursor.remaining} left")
    if count > MAX_ARRAY_COUNT:
        cursor.fail("gguf-array-too-long", f"array {key!r} has {count} elements, at most {MAX_ARRAY_COUNT} are accepted")
    if name == "str":
        passed = cursor.pass_strings(key, count)
        return Value("[str]", _read_strings(cursor, key, count) if passed is None else passed)
    start, form = cursor.at, f"{cursor.order}{count}{code}"
    if name != "bool" and cursor.pass_over(nbytes):
        return Value(f"[{name}]", NumberArray(cursor.source, start, count, form))
    cursor.need(nbytes, f"array {key!r}")
    values: tuple[Any, ...] = struct.unpack_from(form, cursor.buffer, cursor.at - cursor.base)
    cursor.at += nbytes
    if name == "bool":
        values = tuple(_as_bool(cursor, key, value) for value in values)
    return Value(f"[{name}]", values)


def _read_strings(cursor: Cursor, key: str, count: int) -> StringArray:
    """Walk over ``count`` length prefixes; only the lengths become Python objects."""
    prefix = struct.Struct(cursor.order + ("Q" if cursor.wide else "I"))
    unpack, width = prefix.unpack_from, prefix.size
    base = cursor.base  # from here on places are those in the buffer
    first = at = cursor.at - base
    starts: array[int] = array("Q")
    append, buffer = starts.append, cursor.buffer
    last = len(buffer) - width  # the last place where a whole prefix is in the buffer
    while len(starts) < count:
        if at > last:
            cursor.at = base + at
            likely = (count - len(starts)) * (at - first) // max(1, len(starts))  # if those to come are as long as these
            cursor.need(width, f"string {len(starts)} of array {key!r}", min(likely, REMOTE_MOST_NBYTES))
            buffer, last = cursor.buffer, len(cursor.buffer) - width
        for _ in range(count - len(starts)):
            if at > last:
                break
            (nbytes,) = unpack(buffer, at)
            at += width
            append(at - first)
            at += nbytes
    if base + at > cursor.source.size:
        cursor.need(base + at - cursor.at, f"the last string of array {key!r}")
    cursor.at = base + first
    cursor.need(at - first, f"array {key!r}")
    cursor.at = base + at
    native = cursor.order == "<" and cursor.wide
    return StringArray(cursor.buffer[first:at], starts, width=width, encoded=native, name=key)


def encode_string(text: str | bytes, what: str) -> bytes:
    """Encode one string with its u64 length; bytes are stored as they are, text that is no UTF-8 is refused."""
    try:
        raw = text.encode("utf-8") if isinstance(text, str) else bytes(text)
    except UnicodeEncodeError:
        raise Unsupported("gguf-utf8", f"{what} holds a lone surrogate and has no UTF-8 form") from None
    return U64.pack(len(raw)) + raw


def encode_value(key: str, value: Value) -> bytes:
    """Encode type and value as version 3 little-endian; raises ``Unsupported`` (``gguf-value-type``, ``gguf-value``)."""
    name = value.type[1:-1] if value.type.startswith("[") and value.type.endswith("]") else value.type
    if name not in TYPE_IDS:
        raise Unsupported("gguf-value-type", f"key {key!r} has the type {value.type!r}, which GGUF does not know")
    try:
        if name == value.type:
            return U32.pack(TYPE_IDS[name]) + _encode_elements(key, name, (value.value,))
        head = U32.pack(ARRAY_ID) + U32.pack(TYPE_IDS[name]) + U64.pack(len(value.value))
        return head + _encode_elements(key, name, value.value)
    except (struct.error, TypeError, OverflowError, AttributeError) as error:
        raise Unsupported("gguf-value", f"the value of key {key!r} does not fit its type {value.type}: {error}") from None


def _encode_elements(key: str, name: str, values: Iterable[Any]) -> bytes:
    if isinstance(values, StringArray) and name == "str":
        return values.encoded()
    if name == "str":
        items = list(values)
        if not all(isinstance(item, (str, bytes)) for item in items):
            raise TypeError("a string is expected")
        what = f"the value of {key!r}"
        return b"".join([encode_string(item, what) for item in items])
    items = list(values)
    if name == "bool" and not all(isinstance(item, bool) or item in (0, 1) for item in items):
        raise TypeError("a bool is expected")
    return struct.pack(f"<{len(items)}{SCALARS[name][1]}", *items)
