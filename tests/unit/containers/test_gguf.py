"""GGUF against the reference reader and writer, and against bytes of our own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qformats.containers.ggml_types import REMOVED_TYPES
from qformats.containers.gguf import GGML_TYPES, GGUFFile, StringArray, TensorInfo, Value, layout_gguf, open_gguf, tensor_nbytes
from qformats.containers.source import FileSource, MemorySource
from qformats.errors import BadFile

ROOT = Path(__file__).resolve().parents[3]
FIXTURES = ROOT / "fixtures" / "containers"
SCALARS = {
    "k.u8": ("u8", 200), "k.i8": ("i8", -5), "k.u16": ("u16", 60000), "k.i16": ("i16", -30000), "k.u32": ("u32", 4000000000),
    "k.i32": ("i32", -2000000000), "k.u64": ("u64", 2**63 + 1), "k.i64": ("i64", -(2**62)), "k.f64": ("f64", 0.1),
    "k.bool": ("bool", True), "k.str": ("str", "zwölf ♥\n"), "k.words": ("[str]", ["a", "", "ünï", "😀"]),
    "k.ints": ("[i32]", (1, -2, 3)), "k.floats": ("[f32]", (0.5, -1.25)), "k.flags": ("[bool]", (True, False)),
    "general.architecture": ("str", "llama"), "k.f32": ("f32", float(np.float32(0.1))),
}  # fmt: skip


def infos(opened: GGUFFile) -> list[TensorInfo]:
    return [TensorInfo(t.name, t.dtype, t.shape) for t in opened.tensors.values()]


@pytest.mark.parametrize("name", ["small.gguf", "aligned.gguf", "big-endian.gguf"])
def test_metadata_of_the_reference_writer(name: str) -> None:
    opened = open_gguf(FIXTURES / name)
    expected = {key: Value(*pair) for key, pair in SCALARS.items()}
    metadata = dict(opened.metadata)
    assert (name == "aligned.gguf") == (metadata.pop("general.alignment", None) == Value("u32", 64))
    assert metadata == expected
    assert (opened.version, opened.big_endian) == (3, name == "big-endian.gguf")
    assert opened.alignment == (64 if name == "aligned.gguf" else 32)


@pytest.mark.parametrize("name", ["small.gguf", "aligned.gguf", "big-endian.gguf"])
def test_tensors_equal_the_reference_reader(name: str) -> None:
    opened = open_gguf(FIXTURES / name)
    reference = gguf.GGUFReader(FIXTURES / name)
    assert [t.name for t in reference.tensors] == list(opened.tensors)
    for theirs in reference.tensors:
        ours = opened.tensors[theirs.name]
        assert (ours.dtype, ours.offset, ours.nbytes) == (theirs.tensor_type.name, theirs.data_offset, theirs.n_bytes)
        assert ours.shape == tuple(int(n) for n in reversed(theirs.shape))
        np.testing.assert_array_equal(ours.array().reshape(theirs.data.shape), theirs.data)
        assert ours.array().dtype.isnative


@pytest.mark.parametrize("name", ["small.gguf", "aligned.gguf"])
def test_writing_what_was_read_gives_the_same_bytes(name: str) -> None:
    opened = open_gguf(FIXTURES / name)
    planned = layout_gguf(opened.metadata, infos(opened))
    raw = (FIXTURES / name).read_bytes()
    assert planned.header == raw[: len(planned.header)]
    assert planned.size == len(raw)
    assert planned.offsets == {t.name: t.offset for t in opened.tensors.values()}
    assert planned.nbytes == {t.name: t.nbytes for t in opened.tensors.values()}


def test_big_endian_metadata_is_written_little_endian() -> None:
    big, small = open_gguf(FIXTURES / "big-endian.gguf"), open_gguf(FIXTURES / "small.gguf")
    assert layout_gguf(big.metadata, []).header == layout_gguf(small.metadata, []).header
    assert big.tensors["half.weight"].big_endian


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_shard_opens_the_set(number: int) -> None:
    opened = open_gguf(FIXTURES / f"split-{number:05d}-of-00003.gguf")
    whole = open_gguf(FIXTURES / "small.gguf")
    assert opened.shards == 3
    assert opened.size == sum(path.stat().st_size for path in FIXTURES.glob("split-*.gguf"))
    assert list(opened.tensors) == list(whole.tensors)
    assert all(opened.tensors[name].read() == tensor.read() for name, tensor in whole.tensors.items())
    assert opened.metadata["k.words"] == whole.metadata["k.words"]


def test_shards_follow_the_renamed_path(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        shutil.copy(FIXTURES / f"split-{number:05d}-of-00003.gguf", tmp_path / f"other name-{number:05d}-of-00003.gguf")
    assert open_gguf(tmp_path / "other name-00002-of-00003.gguf").shards == 3
    assert open_gguf(FileSource(tmp_path / "other name-00003-of-00003.gguf")).shards == 3


def test_reference_reader_accepts_what_we_write(tmp_path: Path) -> None:
    types = [name for name in GGML_TYPES if name not in ("Q8_1", "Q2_0")]
    tensors = [TensorInfo(f"t.{name}", name, (3, 2, 512)) for name in types]
    tensors += [TensorInfo("scalar", "F32", ()), TensorInfo("x" * 63, "I8", (5,)), TensorInfo("ones", "F16", (1, 1, 1, 7))]
    metadata = {key: Value(*pair) for key, pair in SCALARS.items()} | {"k.empty": Value("[u16]", ())}
    planned = layout_gguf(metadata, tensors, alignment=64)
    generator = np.random.default_rng(1)
    data = {t.name: generator.integers(0, 256, planned.nbytes[t.name], np.uint8).tobytes() for t in tensors}
    raw = bytearray(planned.size)
    raw[: len(planned.header)] = planned.header
    for name, payload in data.items():
        raw[planned.offsets[name] : planned.offsets[name] + len(payload)] = payload
    (tmp_path / "a.gguf").write_bytes(raw)
    reference = gguf.GGUFReader(tmp_path / "a.gguf")
    for key, (kind, value) in SCALARS.items():
        assert reference.fields[key].contents() == (list(value) if kind.startswith("[") else value)
    assert [t.name for t in reference.tensors] == [t.name for t in tensors]
    for theirs in reference.tensors:
        assert theirs.data.tobytes() == data[theirs.name]
    assert open_gguf(tmp_path / "a.gguf").tensors["ones"].shape == (1, 1, 1, 7)


@pytest.mark.parametrize("name", [name for name in GGML_TYPES if name not in ("Q8_1", "Q2_0")])
def test_type_table_equals_the_reference(name: str) -> None:
    number, block, nbytes = GGML_TYPES[name]
    assert GGMLQuantizationType[name] == number
    assert GGML_QUANT_SIZES[GGMLQuantizationType(number)] == (block, nbytes)
    assert tensor_nbytes(name, (2, 3, 4 * block)) == 24 * nbytes


def test_type_table_where_the_reference_lacks_or_errs() -> None:
    assert GGML_TYPES["Q8_1"] == (9, 32, 36)
    assert GGML_TYPES["Q2_0"] == (42, 64, 18)
    assert not set(REMOVED_TYPES) & {number for number, _, _ in GGML_TYPES.values()}
    assert {number for number, _, _ in GGML_TYPES.values()} | set(REMOVED_TYPES) == set(range(43))


def test_scalars_have_a_size_and_nothing_is_empty() -> None:
    assert tensor_nbytes("F32", ()) == 4
    with pytest.raises(BadFile) as caught:
        layout_gguf({}, [TensorInfo("none", "F32", (0, 3)), TensorInfo("one", "F32", (1,))])
    assert caught.value.code == "gguf-dimension-zero"


def test_no_padding_is_needed_after_the_last_tensor() -> None:
    planned = layout_gguf({}, [TensorInfo("a", "F32", (3,))])
    assert open_gguf(MemorySource(planned.header + b"\1" * 12)).tensors["a"].read() == b"\1" * 12


def strings(*raw: bytes) -> StringArray:
    planned = layout_gguf({"k": Value("[str]", list(raw))}, [])
    value = open_gguf(MemorySource(planned.header)).metadata["k"].value
    assert isinstance(value, StringArray)
    return value


def test_string_arrays_are_sequences() -> None:
    array = strings(b"a", b"", "é".encode())
    assert (len(array), array[0], array[-1], array[1:]) == (3, "a", "é", ["", "é"])
    assert array == ["a", "", "é"] == list(array)
    assert array == ("a", "", "é") and array != ["a", "", "e"] and array != ["a"] and array != 3
    assert "é" in array and array.index("é") == 2
    assert array == strings(b"a", b"", "é".encode()) and array != strings(b"a", b"", b"e")
    with pytest.raises(IndexError):
        array[3]
    assert list(strings()) == []


def test_tokens_that_are_not_utf8_stay_readable_as_bytes() -> None:
    array = strings(b"ok", b"\xff\xfe")
    assert array[0] == "ok"
    with pytest.raises(BadFile) as caught:
        list(array)
    assert caught.value.code == "gguf-utf8"
    assert array.raw(1) == b"\xff\xfe"
    assert array.decode("surrogateescape") == ["ok", "\udcff\udcfe"]
    assert strings(*array.iter_raw()) == array


def test_large_string_arrays_cross_the_read_buffer() -> None:
    words = [f"w{n}" * (n % 90) for n in range(20_000)]
    planned = layout_gguf({"a": Value("u8", 1), "k": Value("[str]", words), "z": Value("str", "end")}, [])
    opened = open_gguf(MemorySource(planned.header))
    assert opened.metadata["k"].value == words
    assert opened.metadata["z"].value == "end"


def vocabulary() -> bytes:
    tokens = [f"tok{n}" + "é" * (n % 5) for n in range(150_000)]
    merges = [f"{tokens[n]} {tokens[-n]}" for n in range(150_000)]
    metadata = {
        "tokenizer.ggml.tokens": Value("[str]", tokens), "tokenizer.ggml.merges": Value("[str]", merges),
        "tokenizer.ggml.token_type": Value("[i32]", [1] * 150_000), "tokenizer.ggml.scores": Value("[f32]", [0.5] * 150_000),
    }  # fmt: skip
    return layout_gguf(metadata, [TensorInfo(f"blk.{n}.weight", "F32", (1,)) for n in range(500)]).header + bytes(500 * 32)


def test_a_150k_vocabulary_opens_in_a_quarter_second() -> None:
    data = vocabulary()
    best = 9.0
    for _ in range(5):
        begin = time.process_time()
        opened = open_gguf(MemorySource(data))
        best = min(best, time.process_time() - begin)
    assert len(opened.metadata["tokenizer.ggml.merges"].value) == 150_000
    assert best <= 0.25


REAL_FILES = sorted(Path(os.environ.get("LAB", "/nonexistent")).glob("models/gguf/*.gguf"))


@pytest.mark.skipif(not REAL_FILES, reason="needs real GGUF files in $LAB/models/gguf")
def test_real_files_are_written_back_byte_for_byte() -> None:
    for path in REAL_FILES:
        opened = open_gguf(path)
        planned = layout_gguf(opened.metadata, infos(opened))
        with FileSource(path) as source:
            assert planned.header == source.pread(0, opened.data_offset)
        assert planned.offsets == {t.name: t.offset for t in opened.tensors.values()}


def test_importing_and_opening_needs_neither_numpy_nor_torch() -> None:
    code = (
        "import sys; from qformats.containers import gguf, safetensors, index, atomic; gguf.open_gguf(sys.argv[1]);"
        "assert not {'numpy', 'torch', 'gguf'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(FIXTURES / "small.gguf")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
