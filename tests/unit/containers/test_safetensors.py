"""safetensors against the reference implementation: equal bytes written, equal tensors read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from qformats.containers.index import index_json, open_directory, shard_names, shard_plan
from qformats.containers.safetensors import DTYPE_BITS, layout_safetensors, open_safetensors, tensor_nbytes
from qformats.containers.source import MemorySource

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "containers"
TORCH = [
    torch.bool, torch.int8, torch.uint8, torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32,
    torch.complex64, torch.float64, torch.int64, torch.uint64,
]  # fmt: skip


def every_dtype() -> dict[str, torch.Tensor]:
    found = {f"{name}{n}": torch.zeros(n + 1, dtype=dtype) for n, dtype in enumerate(TORCH) for name in "ba"}
    return found | {"é\n\"\\\x7f\x01": torch.zeros(2, 0, dtype=torch.bfloat16), "scalar": torch.zeros((), dtype=torch.float64)}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"k\u00e9": 'a"\n\u2028'}])
def test_layout_equals_the_reference_byte_for_byte(metadata: dict[str, str] | None) -> None:
    raw = safetensors.torch.save(every_dtype(), metadata)
    opened = open_safetensors(MemorySource(raw))
    assert opened.metadata == (metadata or {})
    planned = layout_safetensors([(t.name, t.dtype, t.shape) for t in reversed(opened.tensors.values())], metadata)
    assert planned.header == raw[: len(planned.header)]
    assert planned.size == len(raw)
    assert planned.offsets == {t.name: t.offset for t in opened.tensors.values()}


def test_metadata_is_sorted() -> None:
    one = layout_safetensors([], {"b": "1", "a": "2"}).header
    assert one == layout_safetensors([], {"a": "2", "b": "1"}).header
    assert one[8:] == b'{"__metadata__":{"a":"2","b":"1"}} '.ljust(len(one) - 8)


def test_reference_accepts_what_we_write() -> None:
    tensors = [(name, name, (2, 8)) for name in DTYPE_BITS] + [("empty", "F32", (0,)), ("scalar", "I64", ())]
    planned = layout_safetensors(tensors, {"x": "y"})
    found = dict(safetensors.deserialize(planned.header + bytes(planned.size - len(planned.header))))
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in found.items()} == {
        name: (dtype, shape) for name, dtype, shape in tensors
    }
    assert len(planned.header) % 8 == 0


def test_fixture_reads_as_the_reference_reads_it() -> None:
    opened = open_safetensors(FIXTURES / "small.safetensors")
    with safetensors.safe_open(FIXTURES / "small.safetensors", "np") as reference:
        assert set(reference.keys()) == set(opened.tensors)
        assert opened.metadata == reference.metadata()
        for name, tensor in opened.tensors.items():
            np.testing.assert_array_equal(tensor.array(), reference.get_tensor(name))


def test_rows_and_columns_are_windows_on_the_file() -> None:
    tensor = open_safetensors(FIXTURES / "small.safetensors").tensors["w"]
    assert tensor.row_range(1, 2).tolist() == [[3, 4, 5]]
    assert tensor.column_range(1, 3).tolist() == [[1, 2], [4, 5]]


def test_sizes() -> None:
    assert tensor_nbytes("F4", (3, 2)) == 3
    assert tensor_nbytes("F6_E2M3", (4,)) == 3
    assert tensor_nbytes("C64", ()) == 8


ENTRIES = [("a", "F32", (2,)), ("b", "F32", (4,)), ("c", "U8", (3,)), ("d", "U8", (0,))]


def write_set(directory: Path, limit: int) -> None:
    plan = shard_plan(ENTRIES, limit)
    for name, shard in zip(shard_names(len(plan)), plan):
        planned = layout_safetensors(shard, {"format": "pt"})
        (directory / name).write_bytes(planned.header + bytes(planned.size - len(planned.header)))
    if len(plan) > 1:
        (directory / "model.safetensors.index.json").write_bytes(index_json(plan))


@pytest.mark.parametrize(("limit", "files"), [(100, 1), (16, 3), (1, 4)])
def test_shards_written_are_read_back(limit: int, files: int, tmp_path: Path) -> None:
    write_set(tmp_path, limit)
    opened = open_directory(tmp_path)
    assert {(t.name, t.dtype, t.shape) for t in opened.tensors.values()} == set(ENTRIES)
    assert opened.metadata == {"format": "pt"}
    assert opened.files == shard_names(files)


def test_shard_plan_keeps_order_and_limit() -> None:
    assert [[name for name, _, _ in shard] for shard in shard_plan(ENTRIES, 16)] == [["a"], ["b"], ["c", "d"]]
    assert shard_plan([], 5) == [[]]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index_json(shard_plan(ENTRIES[:2], 1)) == (
        b'{\n  "metadata": {\n    "total_size": 24\n  },\n  "weight_map": {\n'
        b'    "a": "model-00001-of-00002.safetensors",\n    "b": "model-00002-of-00002.safetensors"\n  }\n}\n'
    )


def test_a_single_file_of_any_name_is_found(tmp_path: Path) -> None:
    planned = layout_safetensors([("a", "U8", (1,))], None)
    (tmp_path / "gptq_model-4bit-128g.safetensors").write_bytes(planned.header + b"x")
    (tmp_path / "._hidden.safetensors").write_bytes(b"junk")
    (tmp_path / ".out.safetensors.partial").write_bytes(b"junk")
    assert open_directory(tmp_path).files == ["gptq_model-4bit-128g.safetensors"]


def test_an_index_of_another_name_and_an_unlisted_tensor(tmp_path: Path) -> None:
    write_set(tmp_path, 16)
    (tmp_path / "model.safetensors.index.json").unlink()
    weight_map = dict(zip("abc", shard_names(3)))
    (tmp_path / "gptq_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_directory(tmp_path).tensors) == {"a", "b", "c", "d"}
