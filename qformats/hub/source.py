"""A file of the hub as a ``ByteSource``: what is asked for is fetched by range requests, and little more.

Headers are read in small pieces that double while the reading goes on (8 KiB to 128 KiB, or as much as is asked for). What follows is
read in whole chunks of 1 MiB, neighbours in one request, kept in a bounded spool on disk so that what a plan has read is there for the
conversion; the XXH3-128 of every chunk that passed is remembered, so that the digest of a source needs no second reading. A file is
pinned to a commit.

The hub lists one SHA-256 of a whole file (git's SHA-1 of a small one), which can only be taken front to back: chunks are hashed as soon
as all before them have been, out of the spool where they came too early. ``check`` hashes what is left, fetching what was never read or
is no longer in the spool, and holds the result against the list.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qformats.containers.source import ByteSource, FileSource
from qformats.errors import BadFile, QFormatError, RemoteError
from qformats.hub import client
from qformats.hub.names import Address

__all__ = ["CHUNK_NBYTES", "HubSource", "Spool"]

CHUNK_NBYTES = 1 << 20
SPOOL_NBYTES = 2 << 30
_FIRST_NBYTES, _MOST_NBYTES = 8 << 10, 128 << 10  # how far a header is read ahead
_SMALL_NBYTES = 8 << 20  # how much of a file is read in small pieces: the vocabulary of a GGUF
_RUN_CHUNKS = 16  # at most so many in one request
_TRIES = 5  # without a single byte coming
_MOVED = (401, 403, 404, 410)  # what a signed address answers when its time is over


class Spool:
    """Chunks of any files in slots of one nameless file, the least recently used replaced; gone when the process is."""

    def __init__(self, nbytes: int = SPOOL_NBYTES) -> None:
        self._slots: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._count, self._lock = max(1, nbytes // CHUNK_NBYTES), threading.Lock()
        self._file: Any = None

    def put(self, key: tuple[int, int], data: bytes) -> None:
        """Keep a chunk; a full disk only makes the spool smaller."""
        with self._lock:
            if key in self._slots:
                return
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0, prefix="qformats-", dir=_spool_directory())  # noqa: SIM115
            slot = len(self._slots) if len(self._slots) < self._count else self._slots.popitem(last=False)[1]
            try:
                self._file.seek(slot * CHUNK_NBYTES)
                whole = self._file.write(data) == len(data)
            except OSError:
                whole = False
            if whole:
                self._slots[key] = slot
            else:
                self._count = max(1, len(self._slots))

    def get(self, key: tuple[int, int], start: int, buffer: memoryview) -> bool:
        """Copy from byte ``start`` of a chunk into ``buffer`` if the chunk is here."""
        with self._lock:
            slot = self._slots.get(key)
            if slot is None:
                return False
            self._slots.move_to_end(key)
            self._file.seek(slot * CHUNK_NBYTES + start)
            return bool(self._file.readinto(buffer) == len(buffer))

    def close(self) -> None:
        """Give the space back."""
        with self._lock:
            self._slots.clear()
            if self._file is not None:
                self._file.close()
                self._file = None


def _spool_directory() -> str | None:
    """The client's cache, which is where there is room; None (the system's choice) where it cannot be written."""
    from huggingface_hub import constants

    with suppress(OSError):
        Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
        if os.access(constants.HF_HUB_CACHE, os.W_OK):
            return str(constants.HF_HUB_CACHE)
    return None


@dataclass
class _State:
    """What is known of a file so far, shared by all threads."""

    small: list[tuple[int, bytes]] = field(default_factory=list)
    small_nbytes: int = 0
    ahead: int = _FIRST_NBYTES
    bulk: bool = False
    digests: dict[int, bytes] = field(default_factory=dict)
    pending: dict[int, threading.Event] = field(default_factory=dict)
    location: tuple[str, Mapping[str, str]] | None = None
    whole: ByteSource | None = None


@dataclass
class _Hash:
    """The digest that the hub lists, taken over the first ``count`` chunks so far; ``right``: what came of it at the end."""

    state: Any
    count: int = 0
    right: bool | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, file: client.RemoteFile) -> _Hash:
        if file.sha256 is not None:
            return cls(hashlib.sha256())
        return cls(hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False))


class HubSource:
    """File ``file`` of ``address``'s commit. Thread-safe. ``nbytes_read`` and ``requests`` count what went over the wire.

    Raises ``RemoteError`` for the network and the hub, ``BadFile('truncated')`` as every source does.
    """

    def __init__(self, address: Address, file: client.RemoteFile, spool: Spool) -> None:
        self._address = Address(address.repo, address.revision, file.name)
        self._file, self._spool = file, spool
        self.name = str(Address(address.repo, (address.revision or "")[:10], file.name))
        self.size = file.size
        self.nbytes_read = self.requests = 0
        self._lock, self._state, self._hash = threading.Lock(), _State(), _Hash.of(file)

    # ------------------------------------------------------------ ByteSource

    def pread(self, offset: int, nbytes: int) -> bytes:
        buffer = bytearray(max(0, nbytes))
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        if offset < 0 or offset + len(view) > self.size:
            found = max(0, self.size - offset)
            hint = "the file is incomplete; ask its owner"
            raise BadFile("truncated", f"wanted {len(view)} bytes, found {found}", path=self.name, offset_bytes=offset, hint=hint)
        if not len(view):
            return
        state = self._state
        if state.whole is None:
            with self._lock:
                small = not state.bulk and len(view) < CHUNK_NBYTES and state.small_nbytes + len(view) <= _SMALL_NBYTES
                state.bulk = not small
                if small:
                    self._read_small(offset, view)
            if not small:
                self._read_chunks(offset, view)
        if state.whole is not None:
            state.whole.pread_into(offset, view)

    def identity(self) -> str:
        return f"{client.endpoint()}:{self._address}:{self._file.sha256 or self._file.blob}"

    def changed(self) -> bool:
        return False  # a commit does not change

    def close(self) -> None:
        if self._state.whole is not None:
            self._state.whole.close()
        self._spool.close()

    def chunk_digest(self, at: int, nbytes: int) -> bytes | None:
        """XXH3-128 of a chunk that was read before, None for others."""
        whole = at % CHUNK_NBYTES == 0 and nbytes == min(CHUNK_NBYTES, self.size - at)
        return self._state.digests.get(at // CHUNK_NBYTES) if whole else None

    @property
    def checked(self) -> bool:
        """Whether all of the file was held against the hub's digest and found right; may be set for one that an earlier run checked."""
        return self._hash.right is True

    @checked.setter
    def checked(self, value: bool) -> None:
        self._hash.right = value or None

    def check(self) -> None:
        """Hold every byte against the digest that the hub lists; what was not read yet, or is no longer here, is fetched for it.

        Raises ``RemoteError('hub-wrong-hash')``, or ``'hub-changed'`` where what was read before was something else.
        """
        total = -(-self.size // CHUNK_NBYTES)
        with self._hash.lock:
            while self._hash.count < total and self._hash.right is None:
                first = self._hash.count
                at = first * CHUNK_NBYTES
                run = memoryview(self.pread(at, min(_RUN_CHUNKS * CHUNK_NBYTES, self.size - at)))
                for number in range(first, min(total, first + _RUN_CHUNKS)):
                    self._update(number, run[(number - first) * CHUNK_NBYTES : (number - first + 1) * CHUNK_NBYTES])
            self._conclude()

    @property
    def digests(self) -> dict[int, bytes]:
        """The digests of chunks by number; those of an earlier run may be put in."""
        return self._state.digests

    def stream(self, start: int = 0) -> Iterator[bytes]:
        """All bytes from ``start`` on, in order, kept nowhere."""
        yield from self._fetch(start, self.size)
        if self._state.whole is not None:
            for at in range(start, self.size, CHUNK_NBYTES):
                yield self._state.whole.pread(at, min(CHUNK_NBYTES, self.size - at))

    # ------------------------------------------------------------ small pieces

    def _read_small(self, offset: int, view: memoryview) -> None:
        """Out of the pieces read before, else out of a new one; the lock is held."""
        state, end = self._state, offset + len(view)
        at = offset
        while at < end and (held := next(((s, d) for s, d in state.small if s <= at < s + len(d)), None)) is not None:
            start, data = held
            got = data[at - start : end - start]
            view[at - offset : at - offset + len(got)] = got
            at += len(got)
        if at == end:
            return
        goes_on = any(s + len(d) == at for s, d in state.small)
        state.ahead = min(_MOST_NBYTES, 2 * state.ahead) if goes_on else _FIRST_NBYTES
        stop = min(self.size, max(end, at + state.ahead))
        piece = b"".join(self._fetch(at, stop))
        if state.whole is None:
            state.small.append((at, piece))
            state.small_nbytes += len(piece)
            view[at - offset :] = piece[: end - at]

    # ------------------------------------------------------------ chunks

    def _read_chunks(self, offset: int, view: memoryview) -> None:
        end, number = offset + len(view), offset // CHUNK_NBYTES
        while number * CHUNK_NBYTES < end and self._state.whole is None:
            first, last = max(offset, number * CHUNK_NBYTES), min(end, (number + 1) * CHUNK_NBYTES)
            if self._spool.get(self._key(number), first - number * CHUNK_NBYTES, view[first - offset : last - offset]):
                number += 1
                continue
            claimed, other = self._claim(number, -(-end // CHUNK_NBYTES))
            if other is not None:
                other.wait()
                continue
            try:
                for number, chunk in self._fetch_chunks(claimed):
                    at = number * CHUNK_NBYTES
                    first, last = max(offset, at), min(end, at + len(chunk))
                    view[first - offset : last - offset] = chunk[first - at : last - at]
            finally:
                self._release(claimed)
            number = claimed.stop

    def _key(self, number: int) -> tuple[int, int]:
        return id(self), number

    def _claim(self, number: int, stop: int) -> tuple[range, threading.Event | None]:
        """A run of chunks that nobody else fetches, or the event to wait for."""
        with self._lock:
            pending = self._state.pending
            if number in pending:
                return range(0), pending[number]
            last = number + 1
            empty = memoryview(bytearray())
            while last < min(stop, number + _RUN_CHUNKS) and last not in pending and not self._spool.get(self._key(last), 0, empty):
                last += 1
            pending.update(dict.fromkeys(range(number, last), threading.Event()))
            return range(number, last), None

    def _release(self, claimed: range) -> None:
        with self._lock:
            for event in {self._state.pending.pop(number) for number in claimed}:
                event.set()

    def _fetch_chunks(self, numbers: range) -> Iterator[tuple[int, bytes]]:
        import xxhash

        number, held = numbers.start, bytearray()
        stop = min(self.size, numbers.stop * CHUNK_NBYTES)
        for piece in self._fetch(numbers.start * CHUNK_NBYTES, stop):
            held += piece
            while len(held) >= CHUNK_NBYTES or (held and number * CHUNK_NBYTES + len(held) == self.size):
                chunk = bytes(held[:CHUNK_NBYTES])
                del held[:CHUNK_NBYTES]
                digest = xxhash.xxh3_128_digest(chunk)
                if self._state.digests.setdefault(number, digest) != digest:
                    raise self._other_bytes()
                self._spool.put(self._key(number), chunk)
                self._passed(number, chunk)
                yield number, chunk
                number += 1

    # ------------------------------------------------------------ the hub's digest

    def _passed(self, number: int, chunk: bytes) -> None:
        """Hash a chunk that came, if it is the next one, and those behind it that came earlier; whoever hashes already goes on alone."""
        if self._hash.right is not None or not self._hash.lock.acquire(blocking=False):
            return
        try:
            if number == self._hash.count:
                self._update(number, memoryview(chunk))
                room = memoryview(bytearray(CHUNK_NBYTES))
                while (held := self._held(self._hash.count, room)) is not None:
                    self._update(self._hash.count, held)
            self._conclude()
        finally:
            self._hash.lock.release()

    def _held(self, number: int, room: memoryview) -> memoryview | None:
        view = room[: max(0, min(CHUNK_NBYTES, self.size - number * CHUNK_NBYTES))]
        return view if len(view) and self._spool.get(self._key(number), 0, view) else None

    def _update(self, number: int, chunk: memoryview) -> None:
        """The next chunk; bytes of it that were read otherwise before must have been the same."""
        import xxhash

        at = number * CHUNK_NBYTES
        for start, piece in list(self._state.small):
            first, last = max(at, start), min(at + len(chunk), start + len(piece))
            if first < last and piece[first - start : last - start] != chunk[first - at : last - at]:
                raise self._other_bytes()
        if number in self._state.digests and self._state.digests[number] != xxhash.xxh3_128_digest(chunk):
            raise self._other_bytes()
        self._hash.state.update(chunk)
        self._hash.count += 1

    def _conclude(self) -> None:
        """Compare once all is hashed; a file found wrong stays wrong."""
        listed = self._file.sha256 or self._file.blob
        if self._hash.right is None and self._hash.count * CHUNK_NBYTES >= self.size:
            self._hash.right = listed is None or self._hash.state.hexdigest() == listed
        if self._hash.right is False:
            hint = "run the same command again; if it happens again, the file on the hub is broken"
            raise RemoteError("hub-wrong-hash", "the bytes that came do not have the digest that the hub lists", path=self.name, hint=hint)

    def _other_bytes(self) -> RemoteError:
        hint = "run the same command again; the journal of this one cannot be used"
        return RemoteError("hub-changed", "has other bytes than before", path=self.name, hint=hint)

    # ------------------------------------------------------------ the wire

    def _fetch(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from ``start`` to ``stop``, going on where a connection ended. Nothing if the server has no ranges: see ``whole``."""
        at, tries = start, 0
        while at < stop:
            before = at
            failed: Exception | None = None
            with client.translated(self._address):
                try:
                    for piece in self._request(at, stop):
                        at += len(piece)
                        yield piece
                except _NoRanges:
                    self._download()
                    return
                except (QFormatError, OSError) as error:
                    if isinstance(error, QFormatError) or getattr(error, "response", None) is not None:
                        raise
                    failed = error
                except Exception as error:
                    failed = error
                tries = 0 if at > before else tries + 1
                if at < stop and tries >= _TRIES:
                    raise failed or RemoteError("hub-connection", "the connection ends early", path=self._address, hint="try again")
            if tries:
                time.sleep(min(8.0, 0.5 * 2**tries))

    def _request(self, start: int, stop: int) -> Iterator[bytes]:
        utils = client.package().utils
        for attempt in range(2):
            url, headers = self._locate(again=attempt > 0)
            asked = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            with utils.http_stream_backoff("GET", url, headers=asked, timeout=30, retry_on_exceptions=()) as response:
                if response.status_code in _MOVED and attempt == 0:
                    continue
                utils.hf_raise_for_status(response)
                if response.status_code != 206:
                    raise _NoRanges
                if response.headers.get("Content-Range") != f"bytes {start}-{stop - 1}/{self.size}":
                    said = response.headers.get("Content-Range")
                    raise RemoteError("hub-range", f"asked for bytes {start}-{stop - 1} of {self.size}, got {said}", path=self._address)
                self.requests += 1
                for piece in response.iter_raw():
                    self.nbytes_read += len(piece)
                    yield piece
                return

    def _locate(self, again: bool) -> tuple[str, Mapping[str, str]]:
        """Where the bytes are and what to ask with: the token stays with the hub. Checks that the file is the listed one."""
        if self._state.location is not None and not again:
            return self._state.location
        package = client.package()
        assert self._address.file is not None
        url = package.hf_hub_url(self._address.repo, self._address.file, revision=self._address.revision, endpoint=client.endpoint())
        headers = package.utils.build_hf_headers(library_name="qformats")
        found = client.asked(self._address, lambda: package.get_hf_file_metadata(url, headers=headers, endpoint=client.endpoint()))
        if found.size != self.size or found.etag not in (self._file.sha256, self._file.blob):
            raise RemoteError("hub-changed", "is not the file that was listed", path=self._address, hint="run the same command again")
        if urlsplit(found.location).netloc != urlsplit(url).netloc:
            headers = {key: value for key, value in headers.items() if key.lower() != "authorization"}
        self._state.location = found.location, headers
        return self._state.location

    def _download(self) -> None:
        """The whole file into the client's cache: for servers without ranges."""
        from qformats.hub.pull import cached_file

        self._state.whole = FileSource(cached_file(self._address, self._file))


class _NoRanges(Exception):
    """The server sends whole files only."""
