"""The ggml types below five bits that are not K-quants: worked examples, odd bytes, the factor beside a weight."""

from __future__ import annotations

from typing import Any

import blocks_by_hand
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from qformats.containers.raw import RawTensor
from qformats.containers.source import MemorySource
from qformats.errors import BadFile, Unsupported
from qformats.formats import ggml
from qformats.formats.ggml.kind import Kind
from qformats.formats.ggml.tables import TABLES
from qformats.formats.ggml.ternary import TERNARY
from qformats.formats.protocol import Match, Module, Target
from qformats.scheme import Float, Integer, No, Scheme, Table
from qformats.tensor import QuantizedTensor

TYPES: dict[str, Kind] = {**TABLES, **TERNARY}
Array = np.ndarray[Any, Any]


def random_blocks(name: str, rows: int, k: int, seed: int = 1) -> Array:
    kind = TYPES[name]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * k // kind.block, kind.nbytes), dtype=np.uint8)
    for at in kind.halves:
        blocks[:, at : at + 2] = rng.normal(0, 0.1, len(blocks)).astype("<f2")[:, None].view("u1")
    if name == "MXFP4":
        blocks[:, 0] %= 250
    return blocks.reshape(rows, -1)


def raw(leaf: str, dtype: str, data: Array, shape: tuple[int, ...]) -> RawTensor:
    return RawTensor(f"blk.0.x.{leaf}", dtype, shape, MemorySource(data.tobytes()), 0, data.nbytes)


def module(name: str, blocks: Array, shape: tuple[int, ...], scale: Array | None = None, dtype: str = "F32") -> Module:
    parts = {"weight": raw("weight", name, blocks, shape)}
    if scale is not None:
        parts["scale"] = raw("scale", dtype, scale, scale.shape)
    return Module("blk.0.x", parts, Match("gguf", {"container": "gguf"}))


def dequantized(name: str, blocks: Array) -> Array:
    kind = TYPES[name]
    out = np.empty((len(blocks), blocks.shape[1] // kind.nbytes * kind.block), np.float32)
    ggml.dequantize(name, blocks, out)
    return out


@pytest.mark.parametrize("name", [n for n in TYPES if n not in ("Q1_0", "Q2_0")])
def test_the_same_bits_as_gguf_py(name: str) -> None:
    blocks = random_blocks(name, 5, 1024)
    expected = quants.dequantize(blocks, GGMLQuantizationType[name])
    assert np.array_equal(dequantized(name, blocks).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", ["TQ1_0", "MXFP4"])
def test_codes_decoded_by_hand(name: str) -> None:
    blocks = random_blocks(name, 2, 512)
    kind, codes = TYPES[name], ggml.read(module(name, blocks, (2, 512))).codes
    by_hand = [getattr(blocks_by_hand, name.lower())(b.tobytes())["codes"] for b in blocks.reshape(-1, kind.nbytes)]
    assert torch.equal(codes.reshape(-1, kind.block), torch.tensor(by_hand, dtype=torch.uint8))


@pytest.mark.parametrize(("name", "block", "expected"), [
    ("Q1_0", "0040" + "05" + "00" * 15, {0: 2.0, 1: -2.0, 2: 2.0, 8: -2.0, 127: -2.0}),
    ("Q2_0", "003c" + "e4" + "55" * 15, {0: -1.0, 1: 0.0, 2: 1.0, 3: 2.0, 4: 0.0}),
    ("TQ2_0", "e4" + "55" * 63 + "003c", {0: -1.0, 32: 0.0, 64: 1.0, 96: 2.0, 1: 0.0}),
    ("TQ1_0", "cf" + "80" * 51 + "003c", {0: 1.0, 32: 0.0, 64: -1.0, 96: 1.0, 128: 0.0}),
    ("IQ4_NL", "003c" + "f0" + "88" * 15, {0: -127.0, 16: 113.0, 1: 1.0}),
    ("MXFP4", "7f" + "a1" + "00" * 15, {0: 0.5, 16: -1.0, 1: 0.0}),
    ("NVFP4", "38403000" + "a1" + "00" * 7 + "77" * 24, {0: 0.5, 8: -1.0, 16: 12.0, 32: 3.0, 48: 0.0}),
])  # fmt: skip
def test_worked_examples(name: str, block: str, expected: dict[int, float]) -> None:
    data = np.frombuffer(bytes.fromhex(block), np.uint8).reshape(1, -1)
    values, tensor = dequantized(name, data)[0], ggml.read(module(name, data, (1, TYPES[name].block)))
    assert {i: float(values[i]) for i in expected} == expected
    assert {i: float(tensor.dequantize()[0, i]) for i in expected} == expected


def test_the_grids_say_what_the_codes_are() -> None:
    grids = {name: kind.grid for name, kind in TYPES.items()}
    assert grids["IQ4_NL"] == Table("iq4_nl") and grids["MXFP4"] == grids["NVFP4"] == Float("e2m1") and grids["Q1_0"] == Integer(1)
    scale = ggml.read(module("NVFP4", random_blocks("NVFP4", 2, 128), (2, 128))).scales[0].values
    assert isinstance(scale, QuantizedTensor) and scale.grid == Float("ue4m3") and scale.shape == (2, 8)


def test_they_are_targets() -> None:
    for name, kind in TYPES.items():
        (storage,) = ggml.storages(Target("gguf", name.lower()), Scheme((4, 256), Integer(4)))
        assert storage.type == name.lower() and storage.bits_per_weight == kind.nbytes * 8 / kind.block


def test_second_spellings_of_five_digits_are_kept() -> None:
    blocks = np.zeros((5, 54), np.uint8)
    blocks[:, :52] = np.resize(np.arange(256, dtype=np.uint8), (5, 52))
    blocks[:, 52:] = np.array([1.0], "<f2").view("u1")
    tensor = ggml.read(module("TQ1_0", blocks, (5, 256)))
    storage = TERNARY["TQ1_0"].storage
    (piece,) = ggml.write(storage, tensor, 0, (5, 256))
    assert np.array_equal(piece.array, blocks)
    (first,) = ggml.write(storage, tensor.replace(), 0, (5, 256))  # a tensor that has been touched: the quantizer's spelling
    assert not np.array_equal(first.array, blocks)
    assert np.array_equal(dequantized("TQ1_0", first.array), dequantized("TQ1_0", blocks))
    assert len(set(first.array[:, :48].reshape(-1).tolist())) <= 243


def test_a_scale_byte_of_255() -> None:
    block = np.frombuffer(bytes.fromhex("ff" + "01" + "00" * 15), np.uint8).reshape(1, 17)
    assert dequantized("MXFP4", block)[0, 0] == 2.0**127  # as llama.cpp has it
    assert bool(ggml.read(module("MXFP4", block, (1, 32))).dequantize()[0, 0].isnan())


# ---------------------------------------------------------------- the factor


def test_one_factor() -> None:
    blocks, scale = random_blocks("NVFP4", 6, 128), np.array([0.0371], "<f4")
    source = module("NVFP4", blocks, (6, 128), scale)
    tensor, storage = ggml.read(source), ggml.stored_as(source)
    assert len(ggml.scheme(source).scales) == 2
    expected = dequantized("NVFP4", blocks).astype(np.float64) * scale
    assert np.array_equal(tensor.dequantize(torch.float64).numpy(), expected)
    assert ggml.can_store(storage, tensor.scheme) and not ggml.can_store(TABLES["NVFP4"].storage, tensor.scheme)
    weight, factor = ggml.write(storage, tensor, 0, (6, 128))
    assert np.array_equal(weight.array, blocks) and (factor.leaf, factor.row) == ("scale", 0) and factor.array.tobytes() == scale.tobytes()
    assert ggml.layout(storage, (6, 128))["scale"].shape == (1,)


def test_a_factor_for_each_expert() -> None:
    blocks, scales = random_blocks("NVFP4", 6, 64), np.array([0.5, 3.0, -0.25], "<f4")
    source = module("NVFP4", blocks, (3, 2, 64), scales)
    storage, shape = ggml.stored_as(source), (3, 2, 64)
    part = ggml.read(source, 1, 5)
    expected = dequantized("NVFP4", blocks).astype(np.float64) * scales.repeat(2)[:, None]
    assert np.array_equal(part.dequantize(torch.float64).numpy(), expected[1:5])
    weight, factor = ggml.write(storage, part, 1, shape)
    assert weight.row == 1 and factor.row == 0 and factor.array.tobytes() == scales.tobytes()
    assert ggml.layout(storage, shape)["scale"].shape == (3,)
    assert ggml.read(source, codes=False).scheme.scales[1] == ggml.read(source).scheme.scales[1]
    with pytest.raises(Unsupported) as caught:
        ggml.write(storage, part, 0, shape)  # rows of two experts where one stands
    assert caught.value.code == "form"


def test_a_missing_factor_is_named() -> None:
    source = module("NVFP4", random_blocks("NVFP4", 2, 64), (2, 64), np.array([2.0], "<f4"))
    answer = ggml.can_store(ggml.stored_as(source), TABLES["NVFP4"].scheme((2, 64)))
    assert isinstance(answer, No) and "factor" in answer.reason


@pytest.mark.parametrize(("scale", "dtype", "code"), [
    (np.zeros(1, "<f2"), "F16", "wrong-dtype"), (np.zeros(2, "<f4"), "F32", "wrong-shape"), (np.zeros((1, 1), "<f4"), "F32", "wrong-shape"),
])  # fmt: skip
def test_other_factors_are_refused(scale: Array, dtype: str, code: str) -> None:
    with pytest.raises(BadFile) as caught:
        ggml.scheme(module("NVFP4", random_blocks("NVFP4", 2, 64), (2, 64), scale, dtype))
    assert caught.value.code == code
