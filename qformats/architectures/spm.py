"""SentencePiece vocabularies: a small reader of ``tokenizer.model``, and scores ↔ merges for byte-fallback ``tokenizer.json`` files.

``tokenizer.model`` is a protobuf (sentencepiece, ``src/sentencepiece_model.proto``): field 1 repeated pieces {1 text, 2 float score,
3 type}, field 2 trainer {3 model type: 1 unigram, 2 BPE; 24 whether a space ends a word; 35 whether bytes stand for unknown letters},
field 3 normalizer {2 compiled map of characters, 3 whether a space is put first, 4 whether spaces are merged}.

llama.cpp merges the neighbours whose union has the highest score; Hugging Face applies merges in their order. The two agree when a
piece's score falls with the rank of its merges.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qformats.errors import BadFile, Unsupported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "BYTE", "CONTROL", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "Normalizer", "Piece", "is_unigram", "merges_of", "read_model",
    "read_unigram", "scores_of",
]  # fmt: skip

# llama.cpp's token types (``include/llama.h``), which are SentencePiece's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_UNIGRAM, _BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Piece:
    """One token: text, score, type."""

    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class Normalizer:
    """How a text is changed before it is split: a compiled map of characters (empty for none), a space put first, spaces merged."""

    charsmap: bytes = b""
    space_first: bool = True
    merges_spaces: bool = True


def _broken() -> BadFile:
    return BadFile("tokenizer-model", "is no SentencePiece model", path="tokenizer.model", hint="fetch it again")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            return value, at
    raise _broken()


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of one protobuf message; fixed-size and nested values as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise _broken()
        if size > len(data) - at:
            raise _broken()
        yield key >> 3, data[at : at + size]
        at += size


def is_unigram(data: bytes) -> bool:
    """Whether a SentencePiece model is of unigram type; ``BadFile('tokenizer-model')`` if broken."""
    return _trainer(data).get(3, _UNIGRAM) == _UNIGRAM


def read_model(data: bytes) -> list[Piece]:
    """Parse ``tokenizer.model``; ``BadFile('tokenizer-model')`` if broken, ``Unsupported('tokenizer')`` if not of BPE type."""
    pieces = _pieces(data)
    if _trainer(data).get(3, _UNIGRAM) != _BPE:
        raise Unsupported("tokenizer", "tokenizer.model is not of BPE type; llama.cpp's 'llama' vocabulary would split text differently")
    return pieces


def read_unigram(data: bytes) -> tuple[list[Piece], Normalizer]:
    """Parse a model of unigram type; ``Unsupported('tokenizer')`` for what llama.cpp's 't5' vocabulary does not do."""
    trainer = _trainer(data)
    for number, what in ((24, "spaces behind words"), (35, "bytes for unknown letters")):
        if trainer.get(number, 0):
            raise Unsupported("tokenizer", f"a unigram vocabulary with {what} cannot be written to GGUF")
    found: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 3 and isinstance(value, bytes):
            found.update(_fields(value))
    charsmap = found.get(2, b"")
    return _pieces(data), Normalizer(charsmap if isinstance(charsmap, bytes) else b"", bool(found.get(3, 1)), bool(found.get(4, 1)))


def _pieces(data: bytes) -> list[Piece]:
    pieces = [_piece(value) for number, value in _fields(data) if number == 1 and isinstance(value, bytes)]
    if not pieces:
        raise _broken()
    return pieces


def _trainer(data: bytes) -> dict[int, int | bytes]:
    return {n: v for number, value in _fields(data) if number == 2 and isinstance(value, bytes) for n, v in _fields(value)}


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            try:
                text = value.decode()
            except UnicodeDecodeError:
                raise _broken() from None
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            score = float(struct.unpack("<f", value)[0])
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind if kind != USER_DEFINED else NORMAL)  # llama.cpp's converter has no case for user-defined pieces


def scores_of(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Derive SentencePiece scores from ordered merges: −0, −1, −2 … in the order in which pieces are first made.

    Pieces that no merge makes (single characters) follow in the order of their ids, as in SentencePiece's own BPE models.
    """
    order: dict[str, float] = {}
    for left, right in merges:
        if (piece := left + right) in vocab and piece not in order:
            order[piece] = -float(len(order))
    for piece in sorted(vocab, key=vocab.__getitem__):
        if piece not in order:
            order[piece] = -float(len(order))
    return order


def merges_of(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """List every merge of two pieces into a piece, best score first; among equal scores by the ids of the two parts.

    ``scores``: the pieces that text may be split into. Each piece is cut at every place where both halves are pieces.
    """
    import numpy as np

    if not scores:
        return []
    pieces = list(scores)
    table = _cuts_of(pieces)
    score, number = np.array(list(scores.values())), np.array([ids[piece] for piece in pieces])
    whole, left, right = table.T
    order = np.lexsort((number[right], number[left], number[whole], -score[whole]))
    return [(pieces[a], pieces[b]) for a, b in table[order, 1:].tolist()]


def _cuts_of(pieces: Sequence[str]) -> NDArray[np.int32]:
    """(m, 3): the index of a piece and those of its two halves, for every cut of it into two other pieces."""
    import numpy as np

    from qformats.loops import find

    loops = find("pieces")
    if loops is None:
        return _slow_cuts_of(pieces)
    encoded = [piece.encode("utf-8", "surrogatepass") for piece in pieces]
    starts = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(piece) for piece in encoded], out=starts[1:])
    text, slots = np.frombuffer(b"".join(encoded), np.uint8), 1 << (2 * len(encoded)).bit_length()
    found = np.empty((0, 3), np.int32)
    while (count := loops.cuts(text, starts, np.full(slots, -1, np.int64), found)) > len(found):
        found = np.empty((count, 3), np.int32)
    return found


def _slow_cuts_of(pieces: Sequence[str]) -> NDArray[np.int32]:
    import numpy as np

    index_of = {piece: index for index, piece in enumerate(pieces)}.get
    found = []
    for index, piece in enumerate(pieces):
        for cut in range(1, len(piece)):
            left = index_of(piece[:cut])
            if left is not None and (right := index_of(piece[cut:])) is not None:
                found.append((index, left, right))
    return np.array(found, np.int32).reshape(-1, 3)
