"""Build pickles opcode by opcode and torch.save-like zips byte by byte, right or wrong, independently of the code under test."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

STOP = b"."


def u(nbytes: int, value: int) -> bytes:
    return value.to_bytes(nbytes, "little")


def text(word: str) -> bytes:
    raw = word.encode()
    return b"X" + u(4, len(raw)) + raw


def short(word: str) -> bytes:
    raw = word.encode()
    return b"\x8c" + u(1, len(raw)) + raw


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stack_global(module: str, name: str) -> bytes:
    return short(module) + short(name) + b"\x93"


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + u(1, value)
    if -(2**31) <= value < 2**31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + u(1, len(raw)) + raw


def tup(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def proto(body: bytes, version: int = 2) -> bytes:
    return b"\x80" + u(1, version) + body + STOP


def reduce(function: bytes, *args: bytes) -> bytes:
    return function + tup(*args) + b"R"


def storage(kind: str = "FloatStorage", key: str = "0", count: int = 6, module: str = "torch") -> bytes:
    return tup(text("storage"), glob(module, kind), text(key), text("cpu"), number(count)) + b"Q"


def ordered() -> bytes:
    return glob("collections", "OrderedDict") + b")R"


def tensor(
    place: bytes | None = None, offset: int = 0, size: tuple[int, ...] = (2, 3), stride: tuple[int, ...] = (3, 1), more: bytes = b""
) -> bytes:
    sizes, strides = tup(*map(number, size)), tup(*map(number, stride))
    function = glob("torch._utils", "_rebuild_tensor_v2")
    return function + b"(" + (place or storage()) + number(offset) + sizes + strides + b"\x89" + ordered() + more + b"tR"


def state(**items: bytes) -> bytes:
    """A pickle of a dict."""
    return proto(b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u")


@dataclass
class Entry:
    """One entry of a zip; what the headers say may lie."""

    name: bytes
    data: bytes = b""
    flags: int = 0x0800
    method: int = 0
    said: int | None = None  # size in the directory
    packed: int | None = None  # compressed size in the directory
    offset: int | None = None  # where the directory says the header is
    local_name: bytes | None = None
    local_said: int | None = None
    extra: bytes = b""
    comment: bytes = b""
    before: bytes = b""  # bytes in front of the header


@dataclass
class Zip:
    """A zip with a zip64 end record, as torch.save writes it; every field may lie."""

    entries: list[Entry] = field(default_factory=list)
    before: bytes = b""
    after: bytes = b""
    count: int | None = None
    size: int | None = None
    start: int | None = None
    count64: int | None = None
    start64: int | None = None
    locator: int | None = None
    wide: bool = True
    comment: bytes = b""

    def build(self) -> bytes:
        out, directory = bytearray(self.before), bytearray()
        for e in self.entries:
            out += e.before
            at, said = len(out), len(e.data) if e.said is None else e.said
            name, mine = e.name if e.local_name is None else e.local_name, said if e.local_said is None else e.local_said
            crc = zlib.crc32(e.data)
            sizes = crc, mine & 0xFFFFFFFF, mine & 0xFFFFFFFF
            out += struct.pack("<4s5H3I2H", b"PK\x03\x04", 0, e.flags, e.method, 0, 0, *sizes, len(name), 0)
            out += name + e.data
            packed, offset = said if e.packed is None else e.packed, at if e.offset is None else e.offset
            directory += struct.pack(
                "<4s6H3I5H2I", b"PK\x01\x02", 0, 0, e.flags, e.method, 0, 0, crc, packed, said,
                len(e.name), len(e.extra), len(e.comment), 0, 0, 0, offset,
            )  # fmt: skip
            directory += e.name + e.extra + e.comment
        return bytes(out + directory + self._end(len(out), len(directory))) + self.after

    def _end(self, start: int, size: int) -> bytes:
        count = len(self.entries)
        wide = b""
        if self.wide:
            count64 = count if self.count64 is None else self.count64
            start64 = start if self.start64 is None else self.start64
            wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 30, 45, 0, 0, count64, count64, size, start64)
            wide += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size if self.locator is None else self.locator, 1)
        count, size = count if self.count is None else self.count, size if self.size is None else self.size
        start = start if self.start is None else self.start
        return wide + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, size, start, len(self.comment)) + self.comment


def archive(pickled: bytes, storages: dict[str, bytes] | None = None, more: list[Entry] | None = None, byteorder: bytes = b"little") -> Zip:
    """A file of torch.save around a pickle; storage 0 has six float32 unless others are given."""
    storages = {"0": struct.pack("<6f", *range(6))} if storages is None else storages
    entries = [Entry(b"archive/data.pkl", pickled), Entry(b"archive/byteorder", byteorder)]
    entries += [Entry(f"archive/data/{key}".encode(), data) for key, data in storages.items()]
    return Zip([*entries, Entry(b"archive/version", b"3\n"), *(more or [])])


def torch_file(pickled: bytes, **changes: object) -> bytes:
    return archive(pickled, **changes).build()  # type: ignore[arg-type]
