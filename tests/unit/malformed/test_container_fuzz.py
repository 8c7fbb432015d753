"""Random damage to right files: nothing but a QFormatError may come out, and no memory beyond the file's own size."""

from __future__ import annotations

import contextlib
import random
import tracemalloc

import pytest
import safetensors
from container_bytes import entry, safetensors_file, valid_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from qformats.containers.gguf import open_gguf
from qformats.containers.gguf_values import StringArray
from qformats.containers.safetensors import open_safetensors
from qformats.containers.source import MemorySource
from qformats.errors import QFormatError

GGUF_FILES = [valid_gguf().build(), valid_gguf(order=">").build(), valid_gguf(version=1).build(), valid_gguf(version=2).build()]
SAFETENSORS_FILE = safetensors_file(
    {"__metadata__": {"format": "pt"}, "a": entry(), "bé": entry("U8", [3, 1], [8, 11]), "c": entry("I64", [0], [11, 11])}, bytes(11)
)
NUMBERS = [0, 1, 2, 7, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
damage = st.lists(
    st.tuples(st.sampled_from(["flip", "byte", "number", "cut", "drop"]), st.integers(0, 2**16), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def broken(data: bytes, steps: list[tuple[str, int, int]]) -> bytes:
    out = bytearray(data)
    for kind, place, value in steps:
        at = place % max(1, len(out))
        if not out:
            break
        if kind == "flip":
            out[at] ^= 1 << (value % 8)
        elif kind == "byte":
            out[at] = value
        elif kind == "number":
            out[at : at + 8] = NUMBERS[value % len(NUMBERS)].to_bytes(8, "little")
        elif kind == "cut":
            del out[at:]
        else:
            del out[at : at + 1 + value % 9]
    return bytes(out)


def read_gguf(data: bytes) -> None:
    opened = open_gguf(MemorySource(data))
    for value in opened.metadata.values():
        if isinstance(value.value, StringArray):
            list(value.value)
    for tensor in opened.tensors.values():
        assert len(tensor.read()) == tensor.nbytes


def read_safetensors(data: bytes) -> None:
    for tensor in open_safetensors(MemorySource(data)).tensors.values():
        assert len(tensor.read()) == tensor.nbytes


@pytest.mark.parametrize("data", GGUF_FILES)
def test_right_gguf_files_open(data: bytes) -> None:
    read_gguf(data)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(GGUF_FILES), damage)
def test_damaged_gguf(data: bytes, steps: list[tuple[str, int, int]]) -> None:
    with contextlib.suppress(QFormatError):
        read_gguf(broken(data, steps))


@settings(max_examples=600, deadline=None)
@given(damage)
def test_damaged_safetensors_is_refused_wherever_the_reference_refuses(steps: list[tuple[str, int, int]]) -> None:
    data = broken(SAFETENSORS_FILE, steps)
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        with pytest.raises(QFormatError):
            read_safetensors(data)
        return
    with contextlib.suppress(QFormatError):
        read_safetensors(data)


def test_every_flipped_bit_and_every_cut_of_a_safetensors_header() -> None:
    refused = 0
    header = len(SAFETENSORS_FILE) - 11
    variants = [SAFETENSORS_FILE[:n] for n in range(len(SAFETENSORS_FILE))]
    for at in range(header):
        for bit in range(8):
            out = bytearray(SAFETENSORS_FILE)
            out[at] ^= 1 << bit
            variants.append(bytes(out))
    for data in variants:
        try:
            safetensors.deserialize(data)
        except safetensors.SafetensorError:
            refused += 1
            with pytest.raises(QFormatError):
                open_safetensors(MemorySource(data))
    assert refused > 1000


def test_damaged_files_allocate_little() -> None:
    generator = random.Random(7)
    tracemalloc.start()
    for _ in range(300):
        steps = [("number", generator.randrange(400), generator.randrange(256))]
        for data, read in ((GGUF_FILES[0], read_gguf), (SAFETENSORS_FILE, read_safetensors)):
            with contextlib.suppress(QFormatError):
                read(broken(data, steps))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20


@pytest.mark.parametrize("data", GGUF_FILES)
def test_every_version_and_byte_order_says_the_same(data: bytes) -> None:
    opened = open_gguf(MemorySource(data))
    assert [value.value for value in opened.metadata.values()] == ["llama", ["a", "", "é"], (7, 9)]
    assert [(t.dtype, t.shape, t.nbytes) for t in opened.tensors.values()] == [("F32", (2, 3), 24), ("Q4_0", (1, 32), 18)]
    assert opened.tensors["b.weight"].read() == bytes(range(32, 50))
