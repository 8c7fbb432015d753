"""Planar bits, Marlin tiles, GEMV_FAST words: loops equal definitions, Marlin equals AutoGPTQ's packer, tensors come back bit for bit."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from packed_checkpoint import FIXTURES, assembled, same_tensor

from qformats.bits import (
    PLANES,
    pack_planar_columns,
    pack_planar_definition,
    pack_planar_rows,
    unpack_planar_columns,
    unpack_planar_definition,
    unpack_planar_rows,
)
from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, Unsupported
from qformats.formats import awq, gptq, marlin
from qformats.formats.awq import fast
from qformats.formats.protocol import Match, Module, Target
from qformats.scheme import Integer, ParamSpec, Scheme, Storage, Tile
from qformats.tensor import Param, QuantizedTensor, constant

torch.set_num_threads(1)
GOLDEN = np.load(FIXTURES / "marlin.npz")
CASES = sorted({name.rpartition(".")[0] for name in GOLDEN.files})
FORMATS: dict[str, Any] = {"gptq": gptq, "awq": awq}
_CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def raw(array: Any, dtype: str) -> RawTensor:
    return RawTensor.from_array("x", dtype, np.ascontiguousarray(array))


def tensor_of(n: int, k: int, group: int, bits: int = 4, zero: int | None = 8, dtype: torch.dtype = torch.float16) -> QuantizedTensor:
    rng = np.random.default_rng(n + k + group)
    codes = torch.from_numpy(rng.integers(0, 1 << bits, (n, k), dtype=np.uint8))
    scale = torch.from_numpy((rng.normal(0, 1, (n, k // group)) * 0.02).astype("f4")).to(dtype)
    plane = torch.from_numpy(rng.integers(0, 1 << bits, (n, k // group)).astype(np.uint8))
    zeros = Param(plane, Tile((1, group))) if zero is None else constant(zero, (n, k))
    return QuantizedTensor((n, k), codes, Integer(bits), (Param(scale, Tile((1, group))),), zeros)


def module_of(form: Any, storage: Storage, tensor: QuantizedTensor, config: dict[str, Any], step: int | None = None) -> Module:
    n, k = tensor.shape
    step, pieces = step or n, []
    for start in range(0, n, step):
        pieces += form.write(storage, cut(tensor, start, min(n, start + step)), start, (n, k))
    layout = form.layout(storage, (n, k))
    data = assembled(layout, pieces)
    parts = {leaf: RawTensor.from_array(leaf, "U8", np.frombuffer(data[leaf], "u1")) for leaf in layout}
    parts = {leaf: replace(part, dtype=layout[leaf].dtype, shape=layout[leaf].shape) for leaf, part in parts.items()}
    return Module("m", parts, Match(form.NAME, config))


def cut(t: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    def rows(p: Param | None) -> Param | None:
        if p is None:
            return None
        assert isinstance(p.values, torch.Tensor)
        return constant(int(p.values), (stop - start, t.shape[1])) if p.values.numel() == 1 else p.with_values(p.values[start:stop])

    scale = rows(t.scales[0])
    assert scale is not None
    shape = (stop - start, t.shape[1])
    return QuantizedTensor(shape, t.codes[start:stop], t.grid, (scale,), rows(t.zero_point), rows(t.offset))


def check(form: Any, storage: Storage, tensor: QuantizedTensor, config: dict[str, Any]) -> Module:
    """Written whole and in steps, read whole and in parts, written again."""
    module = module_of(form, storage, tensor, config)
    assert same_tensor(form.read(module), tensor)
    part = form.read(module, 7, 40)
    assert torch.equal(part.codes, tensor.codes[7:40]) and torch.equal(part.dequantize(), tensor.dequantize()[7:40])
    assert form.scheme(module).offset == tensor.scheme.offset and form.scheme(module).scales == tensor.scheme.scales
    again = module_of(form, form.storage_of(module), form.read(module), config, step=64)
    assert {leaf: part.read() for leaf, part in again.parts.items()} == {leaf: part.read() for leaf, part in module.parts.items()}
    assert {leaf: (p.dtype, p.shape) for leaf, p in again.parts.items()} == {leaf: (p.dtype, p.shape) for leaf, p in module.parts.items()}
    return module


# ---- planar


def test_worked_example_of_the_planes() -> None:
    words = pack_planar_rows(np.full((1, 32), 5, np.uint8), 3).view(np.uint32)
    assert words.tolist() == [[0x55555555, 0x55555555, 0xFFFFFFFF]]


@pytest.mark.parametrize("bits", list(PLANES))
def test_planes_come_back(bits: int) -> None:
    blocks = 131  # more than the loops transpose at a time
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (40, 32 * blocks), dtype=np.uint8)
    words = pack_planar_definition(codes, bits)
    assert words.shape == (40, blocks * bits) and np.array_equal(unpack_planar_definition(words, bits, 32 * blocks), codes)
    assert np.array_equal(pack_planar_rows(codes, bits), words) and np.array_equal(pack_planar_columns(codes, bits), words.T)
    assert np.array_equal(unpack_planar_rows(words, bits, 32 * blocks), codes)
    assert np.array_equal(unpack_planar_columns(np.ascontiguousarray(words.T), bits, 32 * blocks), codes)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("zero", [None, "middle"])
def test_planar_gptq(bits: int, zero: str | None) -> None:
    tensor = tensor_of(96, 128, 32, bits, None if zero is None else 1 << (bits - 1))
    target = Target("gptq", f"int{bits}", {"format": "planar", **({"sym": ""} if zero else {"asym": ""})})
    (storage,) = gptq.storages(target, tensor.scheme)
    config = gptq.config_out(Target("gptq"), {"m": storage}, [], None)
    assert config["checkpoint_format"] == "gptq_p" and config["bits"] == bits
    check(gptq, storage, tensor, config)


def test_one_planar_module_makes_all_of_them_planar() -> None:
    three, five = (gptq.storages(Target("gptq", f"int{b}", {"sym": ""}), tensor_of(64, 64, 32, b).scheme)[0] for b in (3, 5))
    settled = gptq.harmonize({"a": three, "b": five})
    assert [s.options["packing"] for s in settled.values()] == ["planar", "planar"]
    assert {s.options["checkpoint_format"] for s in settled.values()} == {"gptq_p"}
    assert not gptq.can_store(settled["a"], replace(tensor_of(64, 64, 32, 3, 4).scheme, shape=(40, 64)))


# ---- Marlin


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_marlin_is_what_the_owners_pack(case: str, format: str) -> None:
    words, scales, codes = (GOLDEN[f"{case}.{leaf}"] for leaf in ("B", "s", "codes"))
    plain = GOLDEN[f"{case}.scales"]
    names = {"gptq": ("B", "s"), "awq": ("qweight", "scales")}[format]
    config = {"quant_method": format, "bits": 4, "group_size": 128, "zero_point": False}
    config |= {"is_marlin_format": True} if format == "gptq" else {"version": "marlin"}
    form = FORMATS[format]
    match = form.detect(config, [])
    assert match is not None
    module = Module("m", {names[0]: raw(words, "I32"), names[1]: raw(scales, "F16")}, match)
    tensor = form.read(module)
    assert np.array_equal(tensor.codes.numpy(), codes) and np.array_equal(tensor.scales[0].values.numpy(), plain)
    expected = (codes.astype("f8") - 8) * np.repeat(plain.astype("f8"), codes.shape[1] // plain.shape[1], 1)
    assert np.array_equal(tensor.dequantize(torch.float64).numpy(), expected)
    again = module_of(form, form.storage_of(module), tensor, config)
    assert {leaf: part.read() for leaf, part in again.parts.items()} == {leaf: part.read() for leaf, part in module.parts.items()}


@pytest.mark.parametrize(("format", "option"), [("gptq", {"format": "marlin"}), ("awq", {"version": "marlin"})])
@pytest.mark.parametrize("group", [128, 256])
def test_marlin_written(format: str, option: dict[str, str], group: int) -> None:
    form = FORMATS[format]
    tensor = tensor_of(256, 256, group)
    (storage,) = form.storages(Target(format, "int4", option | {"group": "128" if group == 128 else "-1"}), tensor.scheme)
    config = form.config_out(Target(format), {"m": storage}, [], None)
    assert "is_marlin_format" not in config and config.get("checkpoint_format", config.get("version")) == "marlin"
    check(form, storage, tensor, config)
    assert not form.can_store(storage, replace(tensor.scheme, shape=(96, 256)))
    with pytest.raises(Unsupported, match="marlin-shape"):
        form.storages(Target(format, "int4", option | {"group": "-1"}), replace(tensor.scheme, shape=(64, 256)))
    with pytest.raises(Unsupported, match="zero-point-range"):
        form.write(storage, tensor_of(256, 256, group, zero=7), 0, (256, 256))
    with pytest.raises(Unsupported, match="row-range"):
        form.write(storage, cut(tensor, 0, 32), 0, (256, 256))


# ---- GEMV_FAST and llm-awq


@pytest.mark.parametrize("version", ["gemv_fast", "llm-awq"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("zero", [None, 8, 0, 15])
def test_fast_zero_points_are_integers_again(version: str, group: int, zero: int | None) -> None:
    tensor = tensor_of(64, 256, group, zero=zero)
    storage = awq.storages(Target("awq", "int4", {"version": version, "group": str(group)}), tensor.scheme)[0]
    config = awq.config_out(Target("awq"), {"m": storage}, [], None)
    module = check(awq, storage, tensor, config)
    assert ("scaled_zeros" in module.parts) == (version == "llm-awq")
    assert awq.config_out(Target("awq"), {"m": awq.storage_of(module)}, [], config) == config
    assert awq.module_warnings(module) == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fast_offsets_stay_as_they_are(dtype: torch.dtype) -> None:
    tensor = tensor_of(64, 128, 64, dtype=dtype)
    offset = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (64, 2)).astype("f4")).to(dtype)
    tensor = QuantizedTensor(tensor.shape, tensor.codes, tensor.grid, tensor.scales, offset=Param(offset, Tile((1, 64))))
    word = str(dtype).removeprefix("torch.")
    storage = awq.storages(Target("awq", "int4", {"version": "llm-awq", "group": "64"}), tensor.scheme)[1]
    storage = replace(storage, scale_dtypes=(word,), offset=word)
    assert awq.can_store(storage, tensor.scheme)
    module = check(awq, storage, tensor, awq.config_out(Target("awq"), {"m": storage}, [], None))
    assert any("offsets" in text for text in awq.module_warnings(module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fast_zero_points_of_other_dtypes(dtype: torch.dtype) -> None:
    tensor = tensor_of(64, 128, 64, zero=None, dtype=dtype)
    storage = awq.storages(Target("awq", "int4", {"version": "llm-awq", "group": "64"}), tensor.scheme)[0]
    storage = replace(storage, scale_dtypes=(str(dtype).removeprefix("torch."),))
    check(awq, storage, tensor, awq.config_out(Target("awq"), {"m": storage}, [], None))


def test_a_positive_zero_and_a_zero_scale_come_back() -> None:
    tensor = tensor_of(64, 128, 64, zero=0)
    tensor.scales[0].values[3] = 0  # type: ignore[index]
    storage = awq.storages(Target("awq", "int4", {"version": "gemv_fast", "group": "64"}), tensor.scheme)[0]
    storage = replace(storage, options={**storage.options, "zero_sign": "plus"})
    module = check(awq, storage, tensor, awq.config_out(Target("awq"), {"m": storage}, [], None))
    assert not any(module.parts["qzeros"].read())


def test_the_user_may_have_float_zero_points_as_they_are() -> None:
    tensor = tensor_of(64, 128, 64, zero=None)
    storage = awq.storages(Target("awq", "int4", {"version": "gemv_fast", "group": "64"}), tensor.scheme)[0]
    config = awq.config_out(Target("awq"), {"m": storage}, [], None)
    module = module_of(awq, storage, tensor, config)
    asked = Module("m", module.parts, Match("awq", config, options={"zero-points": "float"}))
    found = awq.read(asked)
    assert found.zero_point is None and found.offset is not None
    assert (found.dequantize() - tensor.dequantize()).abs().max() < 15 * 0.1 * 2.0**-11


def test_an_llm_awq_state_without_a_config() -> None:
    tensor = tensor_of(64, 256, 64, zero=None)
    storage = awq.storages(Target("awq", "int4", {"version": "llm-awq", "group": "64"}), tensor.scheme)[0]
    module = module_of(awq, storage, tensor, {})
    match = awq.detect({}, ["m.qweight", "m.scaled_zeros"])
    assert match is not None and match.warnings
    bare = Module("m", module.parts, match)
    assert same_tensor(awq.read(bare), tensor)
    odd = Module("m", {**module.parts, "scales": raw(np.zeros((16, 64), "<f2"), "F16")}, match)
    with pytest.raises(BadFile, match="group-size"):
        awq.scheme(odd)


def test_products_that_overflow_are_refused() -> None:
    tensor = tensor_of(64, 128, 64, zero=15)
    tensor.scales[0].values[0, 0] = 6e4  # type: ignore[index]
    storage = awq.storages(Target("awq", "int4", {"version": "gemv_fast", "group": "64"}), tensor.scheme)[0]
    with pytest.raises(Unsupported, match="zero-point-range"):
        awq.write(storage, tensor, 0, tensor.shape)


@pytest.mark.parametrize("version", ["exllama", "exllamav2", "ipex", "GEMM"])
def test_kernels_that_take_gemm_files(version: str) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": version, "format": "gemm"}
    assert awq.module_settings(config, "m").version == "gemm"


# ---- loops


@pytest.mark.parametrize("rows", [64, 192])
def test_loops_equal_their_definitions(rows: int) -> None:
    pytest.importorskip("numba")
    codes = np.random.default_rng(rows).integers(0, 16, (rows, 192), dtype=np.uint8)
    words, tiles = fast.pack_words_definition(codes), marlin.pack_tiles_definition(codes)
    assert np.array_equal(fast.pack_words(codes), words) and np.array_equal(fast.unpack_words(words), codes)
    assert np.array_equal(marlin.pack_tiles(codes), tiles) and np.array_equal(marlin.unpack_tiles(tiles), codes)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(1).integers(0, 16, (64, 128), dtype=np.uint8)
    monkeypatch.setitem(sys.modules, "qformats.loops.tiles", None)
    assert np.array_equal(fast.unpack_words(fast.pack_words(codes)), codes)
    assert np.array_equal(marlin.unpack_tiles(marlin.pack_tiles(codes)), codes)


def test_schemes_of_headers() -> None:
    words = np.zeros((8, 128), "<i4")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}
    module = Module("m", {"B": raw(words, "I32"), "s": raw(np.zeros((1, 64), "<f2"), "F16")}, Match("gptq", config))
    scales = (ParamSpec("float16", Tile((1, 128))),)
    assert gptq.scheme(module) == Scheme((64, 128), Integer(4), scales, constant(8, (64, 128)).spec())
