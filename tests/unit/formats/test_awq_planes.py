"""AWQ planes built by hand: other widths and orders, scale dtypes, GEMV padding, absent zero points, claims that do not hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from packed_checkpoint import assembled, same_tensor

from qformats.bits import AWQ_ORDER, pack_stream, reorder
from qformats.containers.raw import RawTensor
from qformats.containers.source import MemorySource
from qformats.errors import Unsupported
from qformats.formats import awq
from qformats.formats.awq.weights import zeros_width
from qformats.formats.protocol import Match, Module, Target
from qformats.scheme import Integer, Storage, Tile
from qformats.tensor import Param, QuantizedTensor, constant

torch.set_num_threads(1)
CONFIG: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def tensor_of(n: int, k: int, bits: int, group: int, zero: int | None = None, dtype: torch.dtype = torch.float16) -> QuantizedTensor:
    rng = np.random.default_rng(n + k + bits)
    tile, top = Tile((1, group)), (1 << bits) - 1
    codes = torch.from_numpy(rng.integers(0, top + 1, (n, k), dtype=np.uint8))
    scale = torch.from_numpy(rng.normal(0, 0.1, (n, k // group)).astype("f4")).to(dtype)
    plane = rng.integers(0, top + 1, (n, k // group), dtype=np.uint8)
    plane[0, 0], plane[-1, -1] = 0, top
    zeros = Param(torch.from_numpy(plane), tile) if zero is None else constant(zero, (n, k))
    return QuantizedTensor((n, k), codes, Integer(bits), (Param(scale, tile),), zeros)


def storage_for(tensor: QuantizedTensor, bits: int, group: int, **options: object) -> Storage:
    base = awq.storages(Target("awq", "int4", {"group": str(group)}), tensor.scheme)[0]
    scale = str(tensor.scales[0].values.dtype).removeprefix("torch.")  # type: ignore[union-attr]
    multiple = 1 if options.get("order") == "natural" else 8
    return replace(base, grid=Integer(bits), scale_dtypes=(scale,), n_multiple=multiple, options={**base.options, **options})


def written(storage: Storage, tensor: QuantizedTensor, config: dict[str, Any], dialect: str = "") -> Module:
    layout = awq.layout(storage, tensor.shape)
    raw = assembled(layout, awq.write(storage, tensor, 0, tensor.shape))
    parts = {
        leaf: RawTensor(f"m.{leaf}", info.dtype, info.shape, MemorySource(raw[leaf]), 0, len(raw[leaf])) for leaf, info in layout.items()
    }
    return Module("m", parts, Match("awq", config, dialect))


def check(module: Module, tensor: QuantizedTensor) -> None:
    assert same_tensor(awq.read(module), tensor)
    again = written(awq.storage_of(module), tensor, dict(module.match.config), module.match.dialect)
    assert {leaf: raw.read() for leaf, raw in again.parts.items()} == {leaf: raw.read() for leaf, raw in module.parts.items()}
    part = awq.read(module, 5, 20)
    assert torch.equal(part.codes, tensor.codes[5:20])
    assert torch.equal(part.dequantize(), tensor.dequantize()[5:20])


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("n", [64, 40])
def test_gptqmodel_writes_other_widths_in_natural_order(bits: int, n: int) -> None:
    tensor = tensor_of(n, 96, bits, 32)
    config = CONFIG | {"bits": bits, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    module = written(storage_for(tensor, bits, 32, order="natural"), tensor, config)
    assert module.parts["qweight"].read() == pack_stream(tensor.codes.T, bits).numpy().tobytes()
    check(module, tensor)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_autoround_writes_odd_widths_interleaved(bits: int) -> None:
    tensor = tensor_of(64, 96, bits, 32)
    config = {"quant_method": "auto-round", "bits": bits, "group_size": 32, "sym": False, "packing_format": "auto_round:auto_awq"}
    module = written(storage_for(tensor, bits, 32), tensor, config, "auto-round")
    assert module.parts["qweight"].read() == pack_stream(reorder(tensor.codes.T, AWQ_ORDER), bits).numpy().tobytes()
    check(module, tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_scales_keep_their_dtype(dtype: torch.dtype, version: str) -> None:
    tensor = tensor_of(40, 96, 4, 32, dtype=dtype)
    check(written(storage_for(tensor, 4, 32, version=version, order=version), tensor, CONFIG | {"version": version}), tensor)


@pytest.mark.parametrize(("k", "group", "width"), [(4096, 128, 4), (64, 32, 4), (1280, 32, 8), (128, 64, 2), (11008, 128, 11), (96, 96, 2)])
def test_gemv_padding(k: int, group: int, width: int) -> None:
    assert zeros_width(k, group) == width
    tensor = tensor_of(24, k, 4, group)
    config = CONFIG | {"version": "gemv", "group_size": group}
    module = written(storage_for(tensor, 4, group, version="gemv", order="gemv"), tensor, config)
    assert module.parts["qzeros"].shape == (24, width) and module.parts["scales"].shape == (24, 8 * width)
    check(module, tensor)


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_absent_zero_points_are_the_middle(version: str) -> None:
    tensor = tensor_of(40, 96, 4, 32, zero=8)
    storage = storage_for(tensor, 4, 32, version=version, order=version, qzeros="absent")
    module = written(storage, tensor, CONFIG | {"version": version, "zero_point": False})
    assert "qzeros" not in module.parts
    check(module, tensor)
    with pytest.raises(Unsupported, match="zero-point-range"):
        awq.write(storage, tensor_of(40, 96, 4, 32, zero=7), 0, (40, 96))


def test_stored_zero_points_count_even_if_the_config_denies_them() -> None:
    tensor = tensor_of(40, 96, 4, 32)
    module = written(storage_for(tensor, 4, 32), tensor, CONFIG | {"zero_point": False})
    check(module, tensor)
    assert any("zero_point is false" in text for text in awq.module_warnings(module))


def test_one_group_a_row() -> None:
    tensor = tensor_of(40, 96, 4, 96)
    check(written(storage_for(tensor, 4, 96), tensor, CONFIG | {"group_size": -1}), tensor)
    check(written(storage_for(tensor, 4, 96), tensor, CONFIG | {"group_size": 128}), tensor)


def test_sizes_that_do_not_divide_are_refused() -> None:
    tensor = tensor_of(40, 96, 4, 32)
    storage = storage_for(tensor, 4, 32)
    for shape in ((41, 96), (40, 80)):
        verdict = awq.can_store(storage, replace(tensor.scheme, shape=shape))
        assert not verdict
    with pytest.raises(Unsupported, match="row-range"):
        awq.write(storage, tensor, 8, (48, 96))
