"""The header of a GGUF that comes over a network, without the vocabulary in its middle: long arrays of strings are stepped across.

Where an array of strings ends is written nowhere, but windows of a few KiB tell on which side of the end they are: strings are a chain,
each begins where the one before it ends, and bytes behind the array form no chain. So the end is looked for: from the lengths seen so far
follows where it should be, and a window there, or beside it, holds the chain's end with the next key (or the first tensor) behind it.

What is found so is a guess until it is proven: the keys from there on must be as many as the file's head says, the table of tensors
must follow them, and the last tensor must end where the file ends. If any of it fails, the header is read through, as that of a local
file: same result, same error. The strings that were stepped across are read when one of them is touched, by reading the header through
once; should that find anything else than the search did (a file made to be read in two ways), it is ``BadFile('gguf-ambiguous')``.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any

from qformats.containers.gguf_values import (
    ARRAY_ID,
    MAX_HEADER_NBYTES,
    REMOTE_READ_NBYTES,
    STRING_ID,
    Cursor,
    StringArray,
    read_value,
)
from qformats.containers.gguf_windows import MAX_KEY_NBYTES, Window, look, looks_like_tensor, number
from qformats.containers.source import ByteSource
from qformats.errors import BadFile, Unsupported

if TYPE_CHECKING:
    from qformats.containers.gguf import GGUFFile

__all__ = ["search"]

Read = Callable[[Cursor], "GGUFFile"]

LEAST_COUNT = 2048  # arrays of so many strings are worth a search
LEAST_NBYTES = 192 << 10  # what is expected to be shorter is read through
WINDOW_NBYTES = 16 << 10
NEAR_NBYTES = 48 << 10  # what is left when it is read in one piece instead of being searched
FAR_NBYTES = 192 << 10  # a guess of what is so far away is not yet a good one
SEEN_NBYTES = 8 << 10  # strings that are looked at before the first guess
EDGE_NBYTES = 1 << 10  # by which windows overlap, so that no key lies on an edge
MOST_NBYTES, MOST_PIECES = 640 << 10, 40  # a search that has read more is given up
LIKELY = 2.0  # by such a factor the count of an array may differ from what the lengths seen of it make it
_KEYS_AHEAD = 3  # so many keys behind a place must be right before it is taken for the end


def search(source: ByteSource, read: Read) -> GGUFFile | None:
    """The header as ``read`` gives it, with strings that were not read; None where only reading it through can tell.

    ``read`` parses a header at a cursor. Raises ``RemoteError``; what is wrong with the file is left to the reading through.
    """
    through = _Through(source, read)
    cursor = _Searching(source, through)
    try:
        found = read(cursor)
    except (BadFile, Unsupported, _GivenUp):
        return None
    through.places = cursor.places
    return found if not cursor.passed or _proven(found, cursor) else None


def _proven(found: GGUFFile, cursor: Cursor) -> bool:
    """Whether the tensors fill the file to its end: ``read`` has checked all before that."""
    ends = [tensor.offset + tensor.nbytes for tensor in found.tensors.values()]
    end = ends[-1] if ends else cursor.at
    return end <= found.size <= end + -end % found.alignment


class _Through:
    """The header read through, when strings are asked for that were stepped across; once for all of them.

    ``places``: where the search found the keys and the table of tensors.
    """

    def __init__(self, source: ByteSource, read: Read) -> None:
        self._source, self._read = source, read
        self._whole: GGUFFile | None = None
        self.places: list[int] = []

    def strings(self, key: str) -> StringArray:
        """The array under ``key``; raises what reading the header through raises, and ``BadFile('gguf-ambiguous')``."""
        if self._whole is None:
            cursor = Cursor(self._source)
            whole = self._read(cursor)
            if cursor.places != self.places:
                raise BadFile(
                    "gguf-ambiguous", "the header can be read in two ways: its strings hold another header", path=self._source.name,
                    hint="the file was made to mislead; do not use it",
                )  # fmt: skip
            self._whole = whole
        strings: StringArray = self._whole.metadata[key].value
        return strings


class _LateStrings(StringArray):
    """An array whose place and count are known and whose strings are read when one is touched."""

    __slots__ = ("_count", "_key", "_through")

    def __init__(self, through: _Through, key: str, count: int) -> None:
        self._through, self._key, self._count = through, key, count

    def __len__(self) -> int:
        return self._count

    def settle(self) -> None:
        """Read the strings."""
        known = self._through.strings(self._key)
        for slot in StringArray.__slots__:
            setattr(self, slot, getattr(known, slot))

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there yet: the slots of ``StringArray``."""
        if name not in StringArray.__slots__:
            raise AttributeError(name)
        self.settle()
        return getattr(self, name)


# ---------------------------------------------------------------- the search


class _GivenUp(Exception):
    """The search has read so much that it is not worth going on."""


@dataclass
class _Budget:
    """What a search may still read, in pieces and in bytes."""

    pieces: int = MOST_PIECES
    nbytes: int = MOST_NBYTES

    def take(self, nbytes: int) -> None:
        """One piece of ``nbytes``."""
        self.pieces, self.nbytes = self.pieces - 1, self.nbytes - nbytes
        if self.pieces < 0 or self.nbytes < 0:
            raise _GivenUp


@dataclass
class _Bracket:
    """Between which bytes the end is of what begins at ``start``.

    About ``index`` strings end before ``low``; ``mean``: their length there; ``growth``: by how much a string is longer when there are
    e times as many before it, as in vocabularies that were built by merging. ``is_closed``: ``high`` was found, too.
    """

    low: int
    high: int
    index: float
    mean: float
    growth: float
    start: int
    stride: int = 0
    is_closed: bool = False

    def guess(self, count: int) -> int:
        """Where string ``count`` should end."""
        rest = count - self.index
        if rest <= 0:
            return self.low
        return self.low + int(self.mean * rest + self.growth * (count * log(count / self.index) - rest))

    def advance(self, window: Window) -> None:
        """The end is behind ``window``: take what it says of the lengths."""
        before = self.index
        self.index += (window.start - self.low) / ((self.mean + window.mean) / 2) + (window.stop - window.start) / window.mean
        self.growth = _growth(self.mean, window.mean, self.index / before)
        self.low, self.mean = window.stop, window.mean


def _growth(mean: float, later: float, times: float) -> float:
    return max(0.0, min(later / 4, (later - mean) / log(max(1.25, times))))


class _Searching(Cursor):
    """A cursor that steps across long arrays of strings; ``passed``: whether it did."""

    def __init__(self, source: ByteSource, through: _Through) -> None:
        super().__init__(source)
        self.passed = False
        self._through, self._budget, self._is_trial = through, _Budget(), False

    def need(self, nbytes: int, what: str, likely: int = 0) -> None:
        """As the base class, with little read ahead once something was stepped across."""
        self.least_nbytes = WINDOW_NBYTES if self.passed else REMOTE_READ_NBYTES
        if self._is_trial and self.at + nbytes > self.base + len(self.buffer):
            self._budget.take(max(nbytes, WINDOW_NBYTES))
        super().need(nbytes, what, likely)

    def pass_strings(self, key: str, count: int) -> StringArray | None:
        """Go on behind ``count`` strings that begin here, without reading them all; None if they should be read."""
        if count < LEAST_COUNT or not self.wide or self._is_trial or not (self.keys_left or self.n_tensors):
            return None
        bracket = self._seen(count)
        if bracket is None or bracket.guess(count) - bracket.low < LEAST_NBYTES:
            return None
        end, window = self._end(bracket, count)
        if not 1 / LIKELY < (bracket.index + (end - bracket.low) / bracket.mean) / count < LIKELY:
            raise _GivenUp
        self._go(end, window)
        self.passed = True
        return _LateStrings(self._through, key, count)

    def _seen(self, count: int) -> _Bracket | None:
        """Walk the strings that are in the buffer anyway, or ``SEEN_NBYTES`` of them."""
        self.need(min(SEEN_NBYTES, self.remaining), "an array of strings")
        limit = self.base + len(self.buffer)
        starts, at = array("Q"), self.at
        while at + 8 <= limit and len(starts) < count:
            starts.append(at)
            at += 8 + number(self.buffer, at - self.base, 8, self.order)
        if at > self.source.size or len(starts) < 2:
            return None
        half = len(starts) // 2
        front, back = (starts[half] - starts[0]) / half, (at - starts[half]) / (len(starts) - half)
        return _Bracket(at, min(self.source.size, MAX_HEADER_NBYTES), len(starts), back, _growth(front, back, 3), self.at)

    def _end(self, bracket: _Bracket, count: int) -> tuple[int, Window]:
        """Where the strings end, and the window that this was seen in."""
        while bracket.low < bracket.high:
            start, stop = _span(bracket, count)
            window = self._window(max(bracket.start, start - EDGE_NBYTES), min(self.source.size, stop + EDGE_NBYTES))
            for end in window.ends:
                if self._leads_on(end, window):
                    return end, window
            if window.is_inside and not _is_far_behind(bracket, window, count):
                bracket.advance(window)
            else:
                bracket.high, bracket.is_closed = min(bracket.high - 1, max(start, bracket.low)), True
        raise _GivenUp

    def _window(self, start: int, stop: int) -> Window:
        self._budget.take(stop - start)
        return look(self.source.pread(start, stop - start), start, self.order, for_key=self.keys_left > 0)

    def _go(self, at: int, window: Window) -> None:
        self.at, self.base, self.buffer = at, window.start, window.data

    def _leads_on(self, end: int, window: Window) -> bool:
        """Whether keys and values, or tensors, follow at ``end``."""
        ahead = _Searching(self.source, self._through)
        ahead.order, ahead.wide, ahead.passed = self.order, self.wide, True
        ahead._budget, ahead._is_trial = self._budget, True
        ahead._go(end, window)
        try:
            for _ in range(min(self.keys_left, _KEYS_AHEAD)):
                key = ahead.string("a key", MAX_KEY_NBYTES)
                if _is_long(ahead):
                    return True
                read_value(ahead, key)
            if self.keys_left < _KEYS_AHEAD and self.n_tensors:
                ahead.need(min(64, ahead.remaining), "a tensor")
                return looks_like_tensor(ahead.buffer, ahead.at - ahead.base, self.order)
        except (BadFile, Unsupported):
            return False
        return True


def _span(bracket: _Bracket, count: int) -> tuple[int, int]:
    """The next piece to look at: all that is left if that is little, else where the end should be, or beside what is known."""
    if bracket.high - bracket.low <= NEAR_NBYTES:
        return bracket.low, bracket.high
    away = bracket.guess(count) - bracket.low
    if bracket.is_closed:
        middle = (bracket.low + bracket.high) // 2
    elif away > max(FAR_NBYTES, (bracket.low - bracket.start) // 8):
        middle = bracket.low + 2 * away // 3  # to see how long the strings are there
    else:
        middle = bracket.low + max(away, bracket.stride)
        bracket.stride = max(WINDOW_NBYTES // 2, (bracket.low - bracket.start) // 100, 2 * bracket.stride)
    start = max(bracket.low, min(middle - WINDOW_NBYTES // 2, bracket.high - WINDOW_NBYTES))
    return start, min(bracket.high, start + WINDOW_NBYTES)


def _is_far_behind(bracket: _Bracket, window: Window, count: int) -> bool:
    """Whether strings are those of a later array: many more would lie before it than there are."""
    before = bracket.index + (window.start - bracket.low) / ((bracket.mean + window.mean) / 2)
    return before > 1.15 * count + 256


def _is_long(cursor: Cursor) -> bool:
    """Whether an array of strings follows that is itself worth a search."""
    at = cursor.at
    cursor.need(min(16, cursor.remaining), "a value")
    head = cursor.buffer[at - cursor.base : at - cursor.base + 16]
    kind, inner = number(head, 0, 4, cursor.order), number(head, 4, 4, cursor.order)
    return kind == ARRAY_ID and inner == STRING_ID and LEAST_COUNT <= number(head, 8, 8, cursor.order) <= cursor.remaining // 8
