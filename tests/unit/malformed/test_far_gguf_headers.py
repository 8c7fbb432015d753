"""Headers of GGUF files that come over a network: what the search says is what reading them through says, or the same error.

What no search can see, because it was not read, is found when the strings are touched: nothing that uses them takes a guess for the truth.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from container_bytes import ARRAY, F32, F32_KV, STR, U8, U32, Gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.plan import PlanOptions, make_plan
from qformats import registry
from qformats.checkpoint import open_sources
from qformats.containers import gguf_remote
from qformats.containers.gguf import GGUFFile, StringArray, open_gguf, open_gguf_sources
from qformats.containers.source import MemorySource
from qformats.errors import BadFile, QFormatError

BOOL, I32 = 7, 5  # of a value
I8 = 24  # of a tensor


class Far(MemorySource):
    """Bytes that are dear: ``got`` of them were fetched, each once, in ``requests`` pieces."""

    checked = True

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.seen, self.requests = bytearray(len(data)), 0
        self.digests: dict[int, bytes] = {}

    @property
    def got(self) -> int:
        return sum(self.seen)

    def pread(self, offset: int, nbytes: int) -> bytes:
        self.requests += not all(self.seen[offset : offset + nbytes])
        self.seen[offset : offset + nbytes] = b"\1" * max(0, min(nbytes, self.size - offset))
        return super().pread(offset, nbytes)

    def chunk_digest(self, at: int, nbytes: int) -> bytes | None:
        return None

    def check(self) -> None:
        """Nothing to hold it against."""


@contextmanager
def small_windows() -> Iterator[None]:
    """Search in vocabularies of a few kilobytes as otherwise in large ones."""
    words = {"LEAST_COUNT": 24, "LEAST_NBYTES": 300, "WINDOW_NBYTES": 512, "NEAR_NBYTES": 1200, "FAR_NBYTES": 1500, "SEEN_NBYTES": 200}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**words, "EDGE_NBYTES": 160, "REMOTE_READ_NBYTES": 400}.items():
            patch.setattr(gguf_remote, name, value)
        yield


def described(file: GGUFFile) -> tuple[Any, ...]:
    """All that a header says, without the content of arrays."""
    tensors = [(t.name, t.dtype, t.shape, t.offset, t.nbytes) for t in file.tensors.values()]
    values = [(key, v.type, len(v.value) if v.type.startswith("[") else repr(v.value)) for key, v in file.metadata.items()]
    return file.version, file.big_endian, file.alignment, file.data_offset, file.size, tensors, values


def strings_of(file: GGUFFile) -> list[bytes]:
    return [raw for v in file.metadata.values() if isinstance(v.value, StringArray) for raw in v.value.iter_raw()]


def outcome(data: bytes) -> tuple[GGUFFile | None, str]:
    try:
        return open_gguf(MemorySource(data)), ""
    except QFormatError as error:
        return None, str(error)


def agree(data: bytes) -> Far:
    """Hold what is said of far bytes against what is said of the same bytes here."""
    here, problem = outcome(data)
    far = Far(data)
    try:
        there = open_gguf(far)
    except QFormatError as error:
        assert str(error) == problem
        return far
    if here is not None and described(there) == described(here):
        assert strings_of(there) == strings_of(here)
        return far
    with pytest.raises(QFormatError) as caught:  # it was in what the search did not read
        there.settle()
    assert str(caught.value) == problem if here is None else caught.value.code == "gguf-ambiguous"
    return far


def words(count: int, seed: int = 0, most: int = 12) -> list[bytes]:
    generator = random.Random(seed)
    return [b"%x" % generator.getrandbits(4 * generator.randint(1, most)) for _ in range(count)]


def vocabulary(
    file: Gguf, tokens: list[bytes], *, scores: bytes | None = None, types: bytes | None = None, merges: list[bytes] | None = None
) -> Gguf:
    """Add the keys of a vocabulary: ``scores`` and ``types`` are four bytes for each token."""
    file.key(b"tokenizer.ggml.tokens", ARRAY, file.array(STR, len(tokens), b"".join(map(file.string, tokens))))
    for key, kind, numbers in ((b"tokenizer.ggml.scores", F32_KV, scores), (b"tokenizer.ggml.token_type", I32, types)):
        if numbers is not None:
            file.key(key, ARRAY, file.array(kind, len(tokens), numbers))
    if merges is not None:
        file.key(b"tokenizer.ggml.merges", ARRAY, file.array(STR, len(merges), b"".join(map(file.string, merges))))
    return file


def finished(file: Gguf, tensors: int = 3) -> bytes:
    """With tensors of 32 bytes each, to the end of the file."""
    for number in range(tensors):
        file.tensor(b"blk.%d.weight" % number, (8,), F32, 32 * number)
    file.data = bytes(range(32)) * tensors
    return file.build()


def begun(**kind: Any) -> Gguf:
    file = Gguf(**kind)
    return file.key(b"general.architecture", STR, file.string(b"llama"))


def ended(file: Gguf) -> Gguf:
    file.key(b"tokenizer.ggml.bos_token_id", U32, 0).key(b"tokenizer.ggml.add_bos_token", BOOL, 1)
    return file.key(b"tokenizer.chat_template", STR, file.string(b"{{ messages }}"))


# ---------------------------------------------------------------- how little is read


TYPES = struct.pack("<i", 1)


@pytest.mark.parametrize(("version", "order"), [(2, "<"), (3, "<"), (3, ">")])
def test_a_vocabulary_is_stepped_across(version: int, order: str) -> None:
    file = begun(version=version, order=order)
    vocabulary(file, words(50_000), scores=file.number("f", -7.5) * 50_000, types=file.number("i", 1) * 50_000, merges=words(40_000, 1, 16))
    data = finished(ended(file), 20)
    far = Far(data)
    there, here = open_gguf(far), open_gguf(MemorySource(data))
    assert far.got < 240 << 10 < len(data) / 5 and far.requests <= 13
    assert described(there) == described(here)
    assert far.got < 240 << 10 and repr(there.metadata["tokenizer.ggml.tokens"].value) == "StringArray(50000 strings)"
    assert there.metadata["tokenizer.ggml.merges"].value[39_999] == words(40_000, 1, 16)[-1].decode()
    before = far.got
    assert there.metadata == here.metadata and far.got - before <= 420_000  # the numbers


def test_merges_may_follow_the_tokens_directly() -> None:
    data = finished(ended(vocabulary(begun(), words(40_000), merges=words(40_000, 1))), 4)
    agree(data)
    far = Far(data)
    open_gguf(far)
    assert far.got < len(data) / 3


def test_the_tensors_may_follow_the_strings_directly() -> None:
    data = finished(vocabulary(begun(), words(40_000)), 4)
    far = Far(data)
    assert list(open_gguf(far).tensors) == [f"blk.{n}.weight" for n in range(4)]
    assert far.got < 200 << 10
    agree(data)


def test_what_is_short_is_read_through() -> None:
    data = finished(ended(vocabulary(begun(), words(9000))))
    far = Far(data)
    open_gguf(far)
    assert far.requests <= 4 and type(open_gguf(Far(data)).metadata["tokenizer.ggml.tokens"].value) is StringArray


@pytest.mark.parametrize("end", ["nothing", "one more string", "zeros"])
def test_a_file_that_does_not_end_with_its_tensors_is_read_through(end: str) -> None:
    data = finished(ended(vocabulary(begun(), words(30_000))))
    data += {"nothing": b"", "one more string": b"x", "zeros": bytes(64)}[end]
    far = Far(data)
    there = open_gguf(far)
    assert described(there) == described(open_gguf(MemorySource(data)))
    assert (type(there.metadata["tokenizer.ggml.tokens"].value) is StringArray) == (end != "nothing")


def test_a_search_that_leads_nowhere_costs_little_more_than_none() -> None:
    """Strings of which no window says how many there are."""
    tokens = [b"a" * (1 if n % 997 else 9000) + struct.pack("<Q", 3) for n in range(60_000)]
    data = finished(ended(vocabulary(begun(), tokens)))
    far = agree(data)
    assert far.requests < 80


# ---------------------------------------------------------------- strings that look like something else


def fake_key(order: str = "<") -> bytes:
    """A key with its value and the next key, in the middle of a string."""
    file = Gguf(order=order)
    file.key(b"tokenizer.ggml.bos_token_id", U32, 1).key(b"tokenizer.ggml.eos_token_id", U32, 2).key(b"a.b", U8, 1)
    return b"".join(file.string(key) + file.number("I", kind) + raw for key, kind, raw in file.keys)


def fake_tensors(order: str = "<") -> bytes:
    file = Gguf(order=order)
    entries = [(b"blk.0.weight", 0), (b"blk.1.weight", 32), (b"blk.2.weight", 64)]
    one = b"".join(
        file.string(name) + file.number("I", 1) + file.number("Q", 8) + file.number("I", F32) + file.number("Q", at) for name, at in entries
    )
    return one


ODD = [
    b"", b"\0" * 8, b"\0" * 40, struct.pack("<Q", 5) + b"inner", struct.pack("<Q", 2**40), b"tokenizer.ggml.scores", b"general.alignment",
    b"a.b", b"\xff\xfe", "ünïcödé".encode(), fake_key(), fake_tensors(), fake_key() + fake_tensors(), struct.pack("<II", 9, 8), b"x" * 300,
    struct.pack("<Q", 3) + b"abc" + struct.pack("<Q", 4) + b"abcd" + fake_key(),
]  # fmt: skip

tokens_of = st.lists(
    st.one_of(st.sampled_from(ODD), st.binary(max_size=10), st.sampled_from([b"the", b" token", b"ing", b"a.b", b"er"])), max_size=40
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_odd_strings(data: st.DataObject) -> None:
    order = data.draw(st.sampled_from("<>"), "order")
    version = 3 if order == ">" else data.draw(st.sampled_from([1, 2, 3]), "version")
    file = begun(version=version, order=order)
    odd = data.draw(tokens_of, "tokens")
    tokens = words(data.draw(st.sampled_from([0, 20, 150, 400]), "many"), 3)
    for token in odd:
        tokens.insert(data.draw(st.integers(0, len(tokens))), token)
    numbers = st.one_of(st.none(), st.sampled_from([b"\0\0\0\0", b"abcd", b"\1\0\0\0", b"\0\0\0\x08", b"\0\0\x7a\xc4"]))
    scores, types = data.draw(numbers, "scores"), data.draw(numbers, "types")
    merges = data.draw(st.sampled_from([None, [], words(30, 4), words(300, 5)]), "merges")
    many = len(tokens)
    vocabulary(file, tokens, scores=None if scores is None else scores * many, types=None if types is None else types * many, merges=merges)
    if data.draw(st.booleans(), "more keys"):
        ended(file)
    if data.draw(st.integers(0, 9), "nested") == 0:
        file.key(b"k.nested", ARRAY, file.array(ARRAY, 1, file.array(U8, 1, b"\1")))
    with small_windows():
        agree(finished(file, data.draw(st.sampled_from([0, 1, 3, 40]), "tensors")))


KINDS = ["flip", "number", "cut", "drop", "insert"]
DAMAGE = st.lists(st.tuples(st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 2**16)), min_size=1, max_size=3)


def damaged(data: bytes, steps: list[tuple[str, float, int]]) -> bytes:
    out = bytearray(data)
    for kind, place, value in steps:
        at = int(place * max(0, len(out) - 1))
        if kind == "flip" and out:
            out[at] ^= 1 << (value % 8)
        elif kind == "number":
            out[at : at + 8] = struct.pack("<Q", (0, 1, 9, value, 2**31, 2**63, 2**64 - 1)[value % 7])
        elif kind == "cut":
            del out[at:]
        elif kind == "drop":
            del out[at : at + 1 + value % 9]
        else:
            out[at:at] = ODD[value % len(ODD)]
    return bytes(out)


BASES = [
    finished(ended(vocabulary(begun(), words(300), scores=b"\0\0\x7a\xc4" * 300, types=TYPES * 300, merges=words(200, 1)))),
    finished(vocabulary(begun(), words(300)), 30),
    finished(ended(vocabulary(begun(order=">"), words(250), types=struct.pack(">i", 1) * 250))),
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(BASES), DAMAGE)
def test_damaged_headers(data: bytes, steps: list[tuple[str, float, int]]) -> None:
    with small_windows():
        agree(damaged(data, steps))


@pytest.mark.parametrize("base", BASES)
def test_cut_anywhere(base: bytes) -> None:
    with small_windows():
        for at in range(0, len(base), 61):
            agree(base[:at])


# ---------------------------------------------------------------- files with two faces


def two_faced() -> bytes:
    """A right file whose second face, in the middle of one string, is a right file as well."""
    tail = Gguf()
    for number in range(2):
        tail.key(b"k.%d" % number, U32, number)
    keys = b"".join(tail.string(key) + tail.number("I", kind) + raw for key, kind, raw in tail.keys)
    front, back = words(30_000, 1), words(30_000, 2)

    def built(fake_nbytes: int) -> tuple[bytes, int]:
        file = begun()
        shape = file.number("I", 1) + file.number("Q", fake_nbytes)
        entry = file.string(b"blk.0.weight") + shape + file.number("I", I8) + file.number("Q", 0)
        hidden = b"".join(map(file.string, front)) + keys + entry
        tokens = [*front[:9000], hidden, *back]
        file.key(b"tokenizer.ggml.tokens", ARRAY, file.array(STR, 39_001, b"".join(map(file.string, tokens))))
        for key, kind, raw in tail.keys:
            file.key(key, kind, raw)
        file.tensor(b"blk.0.weight", (64,), I8, 0)
        file.data = bytes(64)
        data = file.build()
        at = data.index(keys) + len(keys) + len(entry)
        return data, len(data) - (at + -at % 32)

    _, rest = built(0)
    data, again = built(rest)
    assert rest == again
    return data


def test_a_file_with_two_faces_is_found_out_when_its_strings_are_read() -> None:
    data = two_faced()
    here = open_gguf(MemorySource(data))
    there = open_gguf(Far(data))
    assert described(there) != described(here)  # no reading of a part can tell
    with pytest.raises(BadFile, match="gguf-ambiguous"):
        there.metadata["tokenizer.ggml.tokens"].value[0]
    checkpoint = open_sources(Path("a.gguf"), {"a.gguf": Far(data)})
    options = PlanOptions(registry.parse_target("gguf:q8_0"))
    with pytest.raises(BadFile, match="gguf-ambiguous"):
        make_plan(checkpoint, options)


# ---------------------------------------------------------------- shards


def test_shards_are_one_file_and_the_first_holds_the_vocabulary() -> None:
    parts = []
    for number in range(2):
        file = begun()
        for key, value in (("no", number), ("count", 2), ("tensors.count", 6)):
            file.key(f"split.{key}".encode(), U32, value)
        if number == 0:
            ended(vocabulary(file, words(40_000)))
        for place in range(3):
            file.tensor(b"blk.%d.weight" % (3 * number + place), (8,), F32, 32 * place)
        file.data = bytes(96)
        parts.append(file.build())
    there = open_gguf_sources([Far(part) for part in reversed(parts)])
    here = open_gguf_sources([MemorySource(part) for part in parts])
    assert described(there) == described(here) and there.shards == 2
    first = there.tensors["blk.0.weight"].source
    assert isinstance(first, Far) and first.got < 200 << 10
