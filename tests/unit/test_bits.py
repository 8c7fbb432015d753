"""Property tests of the bit stream: every width, order and odd size; the compiled loops equal the torch definition."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qformats import bits as B

torch.set_num_threads(1)
LOOPS = importlib.util.find_spec("numba") is not None


def codes_of(seed: int, shape: tuple[int, ...], bits: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=np.uint8)


def by_rational_arithmetic(row: list[int], bits: int) -> int:
    """The stream as one Python integer: the meaning of 'value i occupies bits [i*b, (i+1)*b)'."""
    return sum(code << (bits * i) for i, code in enumerate(row))


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(0, 131), lead=st.sampled_from([(), (1,), (3,), (2, 3)]),
       word=st.sampled_from([8, 16, 32, 64]), seed=st.integers(0, 999))  # fmt: skip
def test_unpack_undoes_pack(bits: int, count: int, lead: tuple[int, ...], word: int, seed: int) -> None:
    codes = torch.from_numpy(codes_of(seed, (*lead, count), bits))
    words = B.pack_stream(codes, bits, word)
    assert words.shape == (*lead, B.words_for(count, bits, word))
    assert words.element_size() * 8 == word
    assert torch.equal(B.unpack_stream(words, bits, count), codes)


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(1, 70), word=st.sampled_from([8, 16, 32, 64]), seed=st.integers(0, 999))
def test_words_are_the_little_endian_stream(bits: int, count: int, word: int, seed: int) -> None:
    codes = codes_of(seed, (count,), bits)
    words = B.pack_stream(torch.from_numpy(codes), bits, word)
    assert int.from_bytes(words.numpy().tobytes(), "little") == by_rational_arithmetic(codes.tolist(), bits)


def test_worked_examples() -> None:
    assert B.pack_stream(torch.arange(1, 9), 4).tolist() == [0x87654321 - (1 << 32)]
    assert B.pack_stream(torch.full((8,), 7), 4).tolist() == [0x77777777]
    assert B.inverse_order(B.AWQ_ORDER) == B.AWQ_REVERSE
    # AutoGPTQ's 3-bit words: ten values, the low two bits of the eleventh, then its high bit
    codes = codes_of(5, (32,), 3).astype(int).tolist()
    first = sum(c << (3 * i) for i, c in enumerate(codes[:10])) | (codes[10] & 3) << 30
    second = codes[10] >> 2 | sum(c << (3 * i + 1) for i, c in enumerate(codes[11:21])) | (codes[21] & 1) << 31
    third = codes[21] >> 1 | sum(c << (3 * i + 2) for i, c in enumerate(codes[22:]))
    assert [w & 0xFFFFFFFF for w in B.pack_stream(torch.tensor(codes), 3).tolist()] == [first, second, third]


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(8)), blocks=st.integers(0, 5))
def test_every_order_is_undone_by_its_inverse(order: list[int], blocks: int) -> None:
    values = torch.arange(blocks * 8).reshape(1, -1)
    moved = B.reorder(values, tuple(order))
    assert torch.equal(B.reorder(moved, B.inverse_order(tuple(order))), values)


@pytest.fixture(params=["loops", "definition"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "definition":
        monkeypatch.setattr(B, "_loops", lambda: None)
    elif not LOOPS:
        pytest.skip("numba is not installed")
    return str(request.param)


SHAPES = [(1, 8), (3, 32), (16, 96), (17, 64), (40, 1056), (5, 4128), (33, 31), (2, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_column_and_row_forms_equal_the_definition(path: str, bits: int, shape: tuple[int, int]) -> None:
    codes = codes_of(bits, shape, bits)
    expected = B.pack_stream(torch.from_numpy(codes), bits).numpy()
    columns = B.pack_columns(codes, bits)
    rows = B.pack_rows(codes, bits)
    assert np.array_equal(columns, expected.T) and columns.dtype == np.int32
    assert np.array_equal(rows, expected)
    assert np.array_equal(B.unpack_columns(columns, bits, shape[1]), codes)
    assert np.array_equal(B.unpack_rows(rows, bits, shape[1]), codes)


@pytest.mark.parametrize("shape", [(8, 1), (16, 5), (128, 130), (136, 257), (264, 64)])
def test_interleaved_form_equals_the_definition(path: str, shape: tuple[int, int]) -> None:
    codes = codes_of(3, shape, 4)
    expected = B.pack_stream(B.reorder(torch.from_numpy(np.ascontiguousarray(codes.T)), B.AWQ_ORDER), 4).numpy()
    words = B.pack_interleaved(codes)
    assert np.array_equal(words, expected) and words.dtype == np.int32
    assert np.array_equal(B.unpack_interleaved(words), codes)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_interleaved_odd_widths(bits: int) -> None:
    codes = codes_of(4, (64, 9), bits)
    assert np.array_equal(B.unpack_interleaved(B.pack_interleaved(codes, bits), bits), codes)


@pytest.mark.parametrize("word", [8, 16, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_other_word_widths_along_columns(bits: int, word: int) -> None:
    codes = codes_of(6, (7, 64), bits)
    words = B.pack_columns(codes, bits, word)
    assert words.itemsize * 8 == word
    assert np.array_equal(B.unpack_columns(words, bits, 64), codes)


@pytest.mark.skipif(not LOOPS, reason="numba is not installed")
@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_drops_bits_above_the_width(bits: int) -> None:
    codes = np.random.default_rng(1).integers(0, 256, (4, 64), dtype=np.uint8)
    assert np.array_equal(B.pack_rows(codes, bits), B.pack_rows(codes & ((1 << bits) - 1), bits))


def test_unsigned_words_read_like_signed() -> None:
    codes = codes_of(2, (5, 64), 4)
    words = B.pack_columns(codes, 4)
    assert np.array_equal(B.unpack_columns(words.view(np.uint32), 4, 64), codes)


def test_one_word_of_each_column() -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    words = np.array([[0x3210, 0x7654, 0xBA98]], dtype=np.int32)
    assert np.array_equal(B.unpack_columns(words, 4, 4), values)


@pytest.mark.parametrize("columns", [2, 8, 14, 64])
def test_pairs_and_bytes_are_the_stream(columns: int) -> None:
    codes = np.random.default_rng(columns).integers(0, 16, (3, columns)).astype(np.uint8)
    packed = B.pack_pairs(codes)
    assert np.array_equal(packed, B.pack_stream(torch.from_numpy(codes), 4, 8).numpy().view(np.uint8))
    assert np.array_equal(B.pack_bytes(codes, 4), packed) and np.array_equal(B.unpack_pairs(packed), codes)
    assert np.array_equal(B.unpack_bytes(packed, 4), codes)
    assert np.array_equal(B.pack_pairs(codes.view(np.int8) - np.int8(8)), B.pack_pairs(codes ^ np.uint8(8)))
