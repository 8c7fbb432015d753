"""A zip archive of stored (never compressed) entries, read so that two readers cannot see two different archives. Torch-free.

The subset is what ``torch.save`` writes (PyTorch 2.13, ``caffe2/serialize/inline_container.cc`` on miniz): local headers from byte 0,
each followed by its name, padding as an extra field, the data and an optional data descriptor; then the central directory, a zip64
end record with its locator, and the end record, which is the last thing in the file. Everything else is refused: bytes before, between
and after the entries, comments, compression, encryption, several disks, entries that overlap or appear twice, names that are no plain
relative paths, and local headers that say something else than the directory. Field layouts: PKWARE APPNOTE 6.3.10, 4.3.

| record | magic | fields used |
|--------|-------|-------------|
| local header, 30 bytes | ``PK 03 04`` | flags @6, method @8, sizes @18 @22, name length @26, extra length @28 |
| directory entry, 46 bytes | ``PK 01 02`` | flags @8, method @10, sizes @20 @24, lengths @28 @30 @32, disk @34, offset @42 |
| zip64 end, 56 bytes | ``PK 06 06`` | size @4, disks @16 @20, entries @24 @32, directory size @40, offset @48 |
| zip64 locator, 20 bytes | ``PK 06 07`` | disk @4, offset of the zip64 end @8, disks @16 |
| end, 22 bytes | ``PK 05 06`` | disks @4 @6, entries @8 @10, directory size @12, offset @16, comment length @20 |
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from qformats.containers.source import ByteSource
from qformats.errors import BadFile, QFormatError, Unsafe, Unsupported

__all__ = ["MAX_ENTRIES", "ZipEntry", "read_stored_zip"]

MAX_ENTRIES = 1 << 20
MAX_DIRECTORY_NBYTES = 1 << 27
MAX_NAME_NBYTES = 1024

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTOR, _UTF8 = 0x0008, 0x0800
_DESCRIPTOR_NBYTES = (0, 12, 16, 20, 24)  # none; without and with its magic, with 32-bit and 64-bit sizes
_ENCRYPTED = 0x2041


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One stored file: ``nbytes`` bytes at ``offset`` of the source."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Listed:
    """What the directory says of an entry; ``header`` is where its local header begins."""

    raw_name: bytes
    name: str
    flags: int
    nbytes: int
    header: int


def read_stored_zip(source: ByteSource) -> dict[str, ZipEntry]:
    """All entries by name in file order.

    Raises ``BadFile`` (``not-a-zip``, ``zip-end``, ``zip-directory``, ``zip-entry``, ``zip-overlap``, ``zip-duplicate``),
    ``Unsafe`` (``zip-name``, ``zip-hidden-bytes``, ``zip-limit``) and ``Unsupported`` (``zip-compressed``, ``zip-encrypted``).
    """
    if source.size < _END.size or source.pread(0, 4) not in (b"PK\x03\x04", b"PK\x05\x06"):
        raise BadFile("not-a-zip", "does not begin with a zip entry", path=source.name, offset_bytes=0)
    count, size, start = _end(source)
    listed = _directory(source, count, size, start)
    entries: dict[str, ZipEntry] = {}
    at = 0
    for entry in sorted(listed, key=lambda e: e.header):
        found = _checked(source, entry, at, start)
        entries[found.name] = found
        at = found.offset + found.nbytes
    _check_gap(source, at, start, bool(listed))
    return entries


def _end(source: ByteSource) -> tuple[int, int, int]:
    """Number of entries, size and offset of the directory; the end records must be the last bytes, directly behind it."""
    at = source.size - _END.size
    magic, disk, first, here, count, size, start, comment = _END.unpack(source.pread(at, _END.size))
    if magic != b"PK\x05\x06" or comment:
        hint = "the file is cut, or bytes were added to it; fetch it again"
        raise BadFile("zip-end", "does not end with a zip end record", path=source.name, offset_bytes=at, hint=hint)
    single = disk == first == 0 and here == count
    if at >= _LOCATOR.size and source.pread(at - _LOCATOR.size, 4) == b"PK\x06\x07":
        at, *wide = _end64(source, at - _LOCATOR.size)
        narrow = (min(wide[0], _FULL16), min(wide[1], _FULL32), min(wide[2], _FULL32))
        said = (count, size, start)
        if any(one not in (low, full) for one, low, full in zip(said, narrow, (_FULL16, _FULL32, _FULL32))):
            raise BadFile("zip-end", f"the end records disagree: {said} and {tuple(wide)}", path=source.name, offset_bytes=at)
        count, size, start = wide
    elif count == _FULL16 or _FULL32 in (size, start):
        raise BadFile("zip-end", "the end record wants a zip64 record, there is none", path=source.name, offset_bytes=at)
    if not single:
        raise BadFile("zip-end", "is a part of an archive of several files", path=source.name)
    if start + size != at:
        message = f"the directory spans bytes {start} to {start + size}, its end record begins at {at}"
        raise BadFile("zip-end", message, path=source.name, offset_bytes=at)
    return count, size, start


def _end64(source: ByteSource, locator: int) -> tuple[int, int, int, int]:
    """Where the zip64 end record begins, and its counts."""
    _, disk, at, disks = _LOCATOR.unpack(source.pread(locator, _LOCATOR.size))
    if disk or disks != 1 or at != locator - _END64.size or at < 0:
        raise BadFile("zip-end", f"the zip64 locator points to byte {at}", path=source.name, offset_bytes=locator)
    fields = _END64.unpack(source.pread(at, _END64.size))
    magic, nbytes, _, _, disk, first, here, count, size, start = fields
    if magic != b"PK\x06\x06" or nbytes != _END64.size - 12 or disk or first or here != count:
        raise BadFile("zip-end", "the zip64 end record is damaged", path=source.name, offset_bytes=at)
    return at, count, size, start


def _directory(source: ByteSource, count: int, size: int, start: int) -> list[_Listed]:
    if count > MAX_ENTRIES or size > MAX_DIRECTORY_NBYTES:
        raise Unsafe("zip-limit", f"has {count} entries in {size} bytes, at most {MAX_ENTRIES} are read", path=source.name)
    if count * _CENTRAL.size > size:
        raise BadFile("zip-directory", f"{count} entries do not fit into {size} bytes", path=source.name, offset_bytes=start)
    data, at = source.pread(start, size), 0
    listed: list[_Listed] = []
    seen: set[str] = set()
    for _ in range(count):
        entry, at = _listed(source, data, at, start)
        if entry.name.casefold() in seen:
            raise BadFile("zip-duplicate", f"holds {entry.name!r} twice", path=source.name, offset_bytes=start)
        seen.add(entry.name.casefold())
        listed.append(entry)
    if at != size:
        raise BadFile("zip-directory", f"{size - at} bytes follow its last entry", path=source.name, offset_bytes=start + at)
    return listed


def _listed(source: ByteSource, data: bytes, at: int, start: int) -> tuple[_Listed, int]:
    if at + _CENTRAL.size > len(data):
        raise BadFile("zip-directory", "ends within an entry", path=source.name, offset_bytes=start + at)
    fields = _CENTRAL.unpack_from(data, at)
    magic, flags, method, compressed, nbytes = fields[0], fields[3], fields[4], fields[8], fields[9]
    name_nbytes, extra_nbytes, comment_nbytes, disk, header = fields[10], fields[11], fields[12], fields[13], fields[16]
    begin = at + _CENTRAL.size
    end = begin + name_nbytes + extra_nbytes
    if magic != b"PK\x01\x02" or end > len(data) or comment_nbytes or disk:
        raise BadFile("zip-directory", "holds a damaged entry", path=source.name, offset_bytes=start + at)
    raw_name = data[begin : begin + name_nbytes]
    name = _plain_name(raw_name, source)
    _check_stored(source, name, flags, method)
    compressed, nbytes, header = _widened(source, name, (compressed, nbytes, header), data[begin + name_nbytes : end])
    if compressed != nbytes:
        message = f"{name!r} is stored in {compressed} bytes and would have {nbytes}"
        raise BadFile("zip-entry", message, path=source.name, offset_bytes=start + at)
    return _Listed(raw_name, name, flags, nbytes, header), end


def _check_stored(source: ByteSource, name: str, flags: int, method: int) -> None:
    if flags & _ENCRYPTED:
        raise Unsupported("zip-encrypted", f"the entry {name!r} is encrypted", path=source.name, hint="decrypt it first")
    if method:
        hint = "torch.save stores its entries as they are; save it again with torch.save"
        raise Unsupported("zip-compressed", f"the entry {name!r} is compressed (method {method})", path=source.name, hint=hint)
    if flags & ~(_DESCRIPTOR | _UTF8):
        raise Unsupported("zip-encrypted", f"the entry {name!r} has flags {flags:#06x}", path=source.name)


def _plain_name(raw: bytes, source: ByteSource) -> str:
    """The name as text; ``Unsafe('zip-name')`` unless it is a relative path of ordinary parts."""
    name = raw.decode("utf-8", "backslashreplace")
    parts = name.split("/")
    ordinary = bool(raw) and len(raw) <= MAX_NAME_NBYTES and name.isprintable() and not set(name) & set('\\:*?"<>|')
    if not ordinary or any(part in ("", ".", "..") for part in parts):
        raise Unsafe("zip-name", f"holds an entry named {name[:200]!r}", path=source.name, hint="this is not what torch.save writes")
    return name


def _widened(source: ByteSource, name: str, sizes: tuple[int, int, int], extra: bytes) -> tuple[int, int, int]:
    """Compressed size, size and offset with those that are all ones taken from the zip64 extra field, in the order it has them."""
    compressed, nbytes, header = sizes
    wide = [value for key, value in _extras(source, name, extra) if key == 1]
    wanted = sum(value == _FULL32 for value in sizes)
    if not wanted:
        if wide:
            raise BadFile("zip-entry", f"the entry {name!r} has sizes twice", path=source.name)
        return sizes
    if len(wide) != 1 or len(wide[0]) != 8 * wanted:
        raise BadFile("zip-entry", f"the entry {name!r} lacks its 64-bit sizes", path=source.name)
    fields = iter(struct.unpack(f"<{wanted}Q", wide[0]))
    nbytes = next(fields) if nbytes == _FULL32 else nbytes
    compressed = next(fields) if compressed == _FULL32 else compressed
    header = next(fields) if header == _FULL32 else header
    return compressed, nbytes, header


def _extras(source: ByteSource, name: str, extra: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(extra):
        key, length = struct.unpack_from("<2H", extra, at) if at + 4 <= len(extra) else (0, len(extra))
        if at + 4 + length > len(extra):
            raise BadFile("zip-entry", f"the entry {name!r} has a damaged extra field", path=source.name)
        found.append((key, extra[at + 4 : at + 4 + length]))
        at += 4 + length
    return found


def _checked(source: ByteSource, entry: _Listed, at: int, start: int) -> ZipEntry:
    """The place of an entry's data, its local header held against the directory; ``at`` is where the entry before it ended."""
    if entry.header < at:
        message = f"the entry {entry.name!r} overlaps the one before it"
        raise BadFile("zip-overlap", message, path=source.name, offset_bytes=entry.header)
    _check_gap(source, at, entry.header, at > 0)
    if entry.header + _LOCAL.size > start:
        raise _mismatch(source, entry)
    fields = _LOCAL.unpack(source.pread(entry.header, _LOCAL.size))
    magic, flags, method, compressed, nbytes, name_nbytes, extra_nbytes = fields[0], fields[2], fields[3], *fields[7:]
    begin = entry.header + _LOCAL.size
    offset = begin + name_nbytes + extra_nbytes
    if magic != b"PK\x03\x04" or flags != entry.flags or method or name_nbytes != len(entry.raw_name) or offset + entry.nbytes > start:
        raise _mismatch(source, entry)
    allowed = {min(entry.nbytes, _FULL32), _FULL32, 0} if flags & _DESCRIPTOR else {min(entry.nbytes, _FULL32), _FULL32}
    if source.pread(begin, name_nbytes) != entry.raw_name or not {compressed, nbytes} <= allowed:
        raise _mismatch(source, entry)
    return ZipEntry(entry.name, offset, entry.nbytes)


def _mismatch(source: ByteSource, entry: _Listed) -> QFormatError:
    message = f"the header of entry {entry.name!r} is not what the directory says, or its data ends outside"
    return BadFile("zip-entry", message, path=source.name, offset_bytes=entry.header)


def _check_gap(source: ByteSource, at: int, stop: int, after_entry: bool) -> None:
    """Between two entries only a data descriptor may stand, before the first one nothing."""
    if stop - at not in (_DESCRIPTOR_NBYTES if after_entry else (0,)):
        message = f"{stop - at} bytes are in no entry"
        raise Unsafe("zip-hidden-bytes", message, path=source.name, offset_bytes=at, hint="this is not what torch.save writes")
