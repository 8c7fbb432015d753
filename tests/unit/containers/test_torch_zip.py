"""What torch.save writes, read without PyTorch: every dtype, view and wrapping against ``torch.load(weights_only=True)``."""

from __future__ import annotations

import io
import sys
from collections import OrderedDict
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qformats.containers import strided
from qformats.containers.raw import RawTensor
from qformats.containers.source import FileSource, MemorySource
from qformats.containers.strided import StridedSource
from qformats.containers.torch_directory import open_torch_directory
from qformats.containers.torch_zip import DTYPES, encode, flatten, open_torch_zip
from qformats.containers.unpickle import Record, Symbol
from qformats.errors import BadFile, QFormatError, Unsafe, Unsupported


def saved(value: Any, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, pickle_protocol=protocol)
    return out.getvalue()


def opened(data: bytes, allow: tuple[str, ...] = ()) -> Any:
    return open_torch_zip(MemorySource(data), allow).value


def stored(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def equal(raw: RawTensor, tensor: torch.Tensor) -> None:
    word = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if word == "float4_e2m1fn_x2":
        shape = (*shape[:-1], 2 * shape[-1])
    assert (raw.dtype, raw.shape, raw.read()) == (DTYPES[word][0], shape, stored(tensor))


def some(dtype: str, *shape: int) -> torch.Tensor:
    item = DTYPES[dtype][1]
    count = int(np.prod(shape, dtype=int))
    generator = torch.Generator().manual_seed(len(dtype) + count)
    top = 2 if dtype == "bool" else 256
    raw = torch.randint(0, top, (count * item,), generator=generator, dtype=torch.uint8)
    return raw.view(getattr(torch, dtype)).reshape(shape)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_the_bytes_that_torch_loads(dtype: str, protocol: int) -> None:
    whole = some(dtype, 6, 4)
    state: Any = {"a": whole, "rows": whole[2:5], "none": some(dtype, 0), "none2": some(dtype, 0, 4)}
    state["scalar"] = some(dtype, 1).reshape(())
    if dtype == "float4_e2m1fn_x2":
        del state["scalar"]
    else:
        state["columns"] = whole[:, 1:3]
        state["turned"] = whole.T
    data = saved(state, protocol)
    loaded = torch.load(io.BytesIO(data), weights_only=True) if protocol == 2 else state
    found = flatten(opened(data))
    assert list(found) == list(loaded)
    for name, raw in found.items():
        equal(raw, loaded[name])


def test_what_a_model_saves() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4), torch.nn.BatchNorm1d(4), torch.nn.Embedding(5, 3))
    data = saved(model.state_dict())
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert isinstance(loaded, OrderedDict) and hasattr(loaded, "_metadata")
    found = flatten(opened(data))
    assert list(found) == list(loaded) and "2.num_batches_tracked" in found
    for name, raw in found.items():
        equal(raw, loaded[name])


def test_parameters_shared_storages_and_views() -> None:
    base = torch.arange(24.0)
    weight = torch.nn.Parameter(torch.randn(3, 5))
    labelled = torch.nn.Parameter(torch.randn(2))
    labelled.label = "kept by torch, not by us"  # type: ignore[attr-defined]
    state = {
        "weight": weight, "tied": weight, "labelled": labelled, "middle": base[4:10], "end": base[20:],
        "square": base.reshape(4, 6)[1:3, 2:5], "turned": base.reshape(2, 3, 4).permute(2, 0, 1),
        "one": base.reshape(4, 6)[:, :1], "row": base.reshape(1, 24).T,
    }  # fmt: skip
    data = saved(state)
    found = flatten(opened(data))
    loaded = torch.load(io.BytesIO(data), weights_only=False)
    for name, raw in found.items():
        equal(raw, loaded[name])
    assert found["weight"].offset == found["tied"].offset
    assert isinstance(found["turned"].source, StridedSource) and not isinstance(found["row"].source, StridedSource)
    assert np.array_equal(found["turned"].row_range(2, 5), loaded["turned"].reshape(-1, 3)[2:5].numpy())
    assert np.array_equal(found["turned"].column_range(1, 2), loaded["turned"].reshape(-1, 3)[:, 1:2].numpy())


def test_views_in_another_order_are_held_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strided, "_HELD_NBYTES", 5000)
    state = {str(n): torch.randn(20, 30).T for n in range(5)}
    torch.save(state, tmp_path / "a.bin")
    found = flatten(open_torch_zip(tmp_path / "a.bin").value)
    for _ in range(2):
        for name, raw in found.items():
            equal(raw, state[name])
    held = found["0"].source._held._held  # type: ignore[attr-defined]
    assert len(held) == 2


@pytest.mark.parametrize("tensor", [torch.randn(1, 3).expand(4, 3), torch.randn(9).as_strided((3, 3), (1, 1))])
def test_views_that_repeat_elements_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(Unsupported) as caught:
        opened(saved({"a": tensor}))
    assert caught.value.code == "torch-stride"


def test_plain_values_reach_a_format_as_tiny_tensors() -> None:
    state = {
        "layer": {"bits": 4, "flag": True, "scale": 0.5, "none": None, "word": "4bit_u8", "dtype": torch.float16, "axis": -1,
                  "shape": torch.Size([3, 4]), "device": torch.device("cuda", 1), "raw": b"\x00\xff", "list": [1, 2]},
    }  # fmt: skip
    found = flatten(opened(saved(state)))
    assert {name: (raw.dtype, raw.shape) for name, raw in found.items()} == {
        "layer.bits": ("I64", ()), "layer.flag": ("BOOL", ()), "layer.scale": ("F64", ()), "layer.word": ("U8", (7,)),
        "layer.axis": ("I64", ()),
        "layer.dtype": ("U8", (13,)), "layer.shape": ("I64", (2,)), "layer.device": ("U8", (6,)), "layer.raw": ("U8", (2,)),
        "layer.list": ("I64", (2,)),
    }  # fmt: skip
    assert found["layer.axis"].array().item() == -1 and found["layer.scale"].array().item() == 0.5
    assert found["layer.dtype"].read() == b"torch.float16" and found["layer.device"].read() == b"cuda:1"
    assert found["layer.shape"].array().tolist() == [3, 4]


def test_values_that_are_no_tensors_are_named() -> None:
    for value in ([1.5], {"a": {1, 2}}, {"a": [1.5]}, {"a": 2**63}):
        with pytest.raises(BadFile) as caught:
            flatten(opened(saved(value)))
        assert caught.value.code == "torch-value"
    with pytest.raises(BadFile) as caught:
        flatten(opened(saved({"a.b": 1, "a": {"b": 2}})))
    assert caught.value.code == "duplicate-tensor"
    assert list(flatten(opened(saved({"state_dict": {"w": torch.zeros(1)}, "epoch": 3})))) == ["w"]
    assert encode("x", Symbol("torch.int8")).read() == b"torch.int8"


class Domain(Enum):
    INT = "int"


class Layout:
    def __init__(self) -> None:
        self.tiles = 8


class Wrapped(torch.Tensor):
    """A wrapper subclass with its data in attributes, as quantized tensors of other libraries are."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, *_: Any) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, (4, 6), dtype=torch.float16)  # type: ignore[no-any-return, attr-defined]

    def __init__(self, data: torch.Tensor, domain: Domain, layout: Layout) -> None:
        self.int_data, self.domain, self.layout_ = data, domain, layout

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("never computed with")


class Labelled(torch.Tensor):
    """A subclass with data of its own."""


NAMES = tuple(f"{__name__}.{word}" for word in ("Wrapped", "Domain", "Layout", "Labelled"))


def test_allowed_classes_become_inert_records(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved({"w": Wrapped(torch.arange(24, dtype=torch.int8), Domain.INT, Layout()), "l": torch.ones(2).as_subclass(Labelled)})
    monkeypatch.delitem(sys.modules, __name__)  # the classes are not looked for
    value = opened(data, NAMES)
    wrapped, labelled = value["w"], value["l"]
    assert isinstance(wrapped, Record) and wrapped.class_name == NAMES[0]
    assert wrapped.args[:3] == (Symbol("torch.float16"), (4, 6), (6, 1))
    state = wrapped.state
    assert state["domain"].class_name == NAMES[1] and state["domain"].args == ("int",)
    assert state["layout_"].class_name == NAMES[2] and state["layout_"].state == {"tiles": 8}
    equal(state["int_data"], torch.arange(24, dtype=torch.int8))
    assert isinstance(labelled, Record) and labelled.class_name == NAMES[3]
    equal(labelled.args[0], torch.ones(2))


@pytest.mark.parametrize("left_out", NAMES[:3])
def test_classes_that_are_not_allowed_are_named(left_out: str) -> None:
    data = saved({"w": Wrapped(torch.zeros(24), Domain.INT, Layout())})
    with pytest.raises(Unsafe) as caught:
        opened(data, tuple(name for name in NAMES if name != left_out))
    assert caught.value.code == "pickle-global" and left_out in str(caught.value)


def test_files_larger_than_the_field_widths_have_their_sizes_elsewhere(tmp_path: Path) -> None:
    """4 GiB of a hole: an entry with 64-bit sizes, and one behind it with a 64-bit offset."""
    path, count = tmp_path / "large.bin", (1 << 32) + 10
    with torch.serialization.skip_data():
        torch.save({"large": torch.empty(count, dtype=torch.uint8), "small": torch.zeros(3)}, path)
    with FileSource(path) as source:
        found = flatten(open_torch_zip(source).value)
        assert found["large"].nbytes == count and found["small"].nbytes == 12
        assert found["small"].offset > 1 << 32 and found["small"].read() == bytes(12)


def test_a_directory_of_shards(tmp_path: Path) -> None:
    def index(weight_map: dict[str, str]) -> None:
        import json

        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def failure() -> str:
        with pytest.raises(QFormatError) as caught:
            open_torch_directory(tmp_path)
        return caught.value.code

    assert failure() == "no-weights"
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    torch.save({"a": torch.zeros(2)}, tmp_path / names[0])
    torch.save({"b": torch.ones(2)}, tmp_path / names[1])
    torch.save({"lr": 0.1}, tmp_path / "optimizer.pt")
    assert failure() == "index-missing"
    index({"a": names[0], "b": names[1]})
    found = open_torch_directory(tmp_path)
    assert list(flatten(found.value)) == ["a", "b"] and found.files == tuple(names)
    index({"a": names[1], "b": names[1]})
    assert failure() == "tensor-missing"
    index({"a": names[1], "b": names[0]})
    assert failure() == "tensor-wrong-shard"
    index({"a": names[0], "b": names[1], "c": names[1]})
    assert failure() == "tensor-missing"
    index({"a": names[0], "b": "../b.bin"})
    assert failure() == "file-name"
    index({"a": names[0], "b": "model.safetensors"})
    assert failure() == "index"
    index({"a": names[0], "b": "pytorch_model-9.bin"})
    assert failure() == "shard-missing"
    torch.save([torch.ones(2)], tmp_path / names[1])
    index({"a": names[0], "b": names[1]})
    assert failure() == "torch-value"
    torch.save({"a": torch.ones(2)}, tmp_path / names[1])
    index({"x": names[0], "b": names[1]})
    assert failure() == "duplicate-tensor"
    (tmp_path / "other.bin.index.json").write_text("{}")
    assert failure() == "index-ambiguous"
    torch.save({"z": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert list(flatten(open_torch_directory(tmp_path).value)) == ["z"]
