"""A piece out of the middle of a GGUF header: chains of strings, and places behind them where a key or a tensor could begin.

A string is a length of eight bytes and its text; the next one begins where it ends. So a chain that is caught anywhere runs on as far as
there are strings, and bytes that are none break it: text, numbers and blocks hardly ever have five zero bytes where a length has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from struct import calcsize

from qformats.containers.ggml_types import GGML_TYPE_NAMES, MAX_DIMS
from qformats.containers.gguf_values import ARRAY_ID, MAX_ARRAY_COUNT, MAX_STRING_NBYTES, SCALARS, STRING_ID, TYPE_NAMES

__all__ = ["MAX_KEY_NBYTES", "Window", "look", "looks_like_key", "looks_like_tensor", "number"]

MAX_KEY_NBYTES = 256  # longer keys are legal and not looked for
_KEY = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_.\-/]*")
_BOOL_ID = SCALARS["bool"][0]
_MAX_NAME_NBYTES = 63
_MOST_ENDS = 8


@dataclass(frozen=True)
class Window:
    """What a piece of the file looks like as strings.

    ``chain``: the bytes that the longest chain of strings covers, ``text`` those without prefixes, ``mean`` their mean length with prefix.
    ``ends``: places that a chain with text in it leads to and where a key or a tensor could begin, the best first.
    """

    start: int
    data: bytes
    chain: int
    text: int
    mean: float
    ends: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Where it ends in the file."""
        return self.start + len(self.data)

    @property
    def is_inside(self) -> bool:
        """Whether most of it is strings."""
        return 2 * self.chain >= self.stop - self.start and 16 * self.text >= self.chain


@dataclass(frozen=True, slots=True)
class _Chain:
    """What leads to a place: ``count`` strings with ``text`` bytes of text, ``nbytes`` with their prefixes."""

    count: int
    text: int
    nbytes: int


_NOTHING = _Chain(0, 0, 0)


def look(data: bytes, start: int, order: str, *, for_key: bool) -> Window:
    """See ``data``, which begins at byte ``start`` of the file; its ends are places for a key, or for the first tensor."""
    covered = _chains(data, order)
    chain = max(covered.values(), key=lambda found: found.count)
    looks = looks_like_key if for_key else looks_like_tensor
    ends = [at for at, found in covered.items() if found.count > 1 and found.text and looks(data, at, order)]
    ends.sort(key=lambda at: -covered[at].count)
    mean = chain.nbytes / max(1, chain.count)
    return Window(start, data, chain.nbytes, chain.text, mean, tuple(start + at for at in ends[:_MOST_ENDS]))


def _chains(data: bytes, order: str) -> dict[int, _Chain]:
    """Places of ``data`` that a string ends at, with the chain of most strings that leads there."""
    found: dict[int, _Chain] = {0: _NOTHING}
    for at in _prefixes(data, order):
        length = number(data, at, 8, order)
        stop = at + 8 + length
        if stop > len(data):
            continue
        before, known = found.get(at, _NOTHING), found.get(stop, _NOTHING)
        if known.count <= before.count:
            found[stop] = _Chain(before.count + 1, before.text + length, before.nbytes + 8 + length)
    return found


def _prefixes(data: bytes, order: str) -> Iterator[int]:
    """Where eight bytes could be a length: five of them are zero, the upper ones."""
    shift = 3 if order == "<" else 0
    at = data.find(b"\0\0\0\0\0", shift)
    while at >= 0 and at - shift + 8 <= len(data):
        yield at - shift
        at = data.find(b"\0\0\0\0\0", at + 1)


def number(data: bytes, at: int, nbytes: int, order: str) -> int:
    """The unsigned number at ``at``; bytes behind the end count as none."""
    return int.from_bytes(data[at : at + nbytes], "little" if order == "<" else "big")


def looks_like_key(data: bytes, at: int, order: str) -> bool:
    """Whether a key with its value could begin at ``at``, and something with a name behind it.

    A number must lie in ``data`` with what follows it: pieces overlap, so the next one shows what this one cuts.
    """
    length = number(data, at, 8, order)
    stop = at + 8 + length
    if not 0 < length <= MAX_KEY_NBYTES or stop + 4 > len(data) or _KEY.fullmatch(data, at + 8, stop) is None:
        return False
    kind = number(data, stop, 4, order)
    if kind == ARRAY_ID:
        inner, count = number(data, stop + 4, 4, order), number(data, stop + 8, 8, order)
        return stop + 16 <= len(data) and inner in TYPE_NAMES and count <= MAX_ARRAY_COUNT
    if kind not in TYPE_NAMES or (kind == _BOOL_ID and data[stop + 4 : stop + 5] not in (b"\0", b"\1")):
        return False
    if kind == STRING_ID:
        width = number(data, stop + 4, 8, order)
        behind = stop + 12 + width
        return width <= MAX_STRING_NBYTES and (behind + 8 > len(data) or _could_be_named(data, behind, order))
    return _could_be_named(data, stop + 4 + calcsize("<" + SCALARS[TYPE_NAMES[kind]][1]), order)


def _could_be_named(data: bytes, at: int, order: str) -> bool:
    return at + 8 <= len(data) and 0 < number(data, at, 8, order) <= MAX_KEY_NBYTES


def looks_like_tensor(data: bytes, at: int, order: str) -> bool:
    """Whether the first entry of a table of tensors could begin at ``at``: its tensor lies at the start of the data."""
    length = number(data, at, 8, order)
    stop = at + 8 + length
    dims = number(data, stop, 4, order)
    end = stop + 4 + 8 * dims
    if not 0 < length <= _MAX_NAME_NBYTES or dims > MAX_DIMS or end + 12 > len(data):
        return False
    return number(data, end, 4, order) in GGML_TYPE_NAMES and number(data, end + 4, 8, order) == 0
