"""Dense float tensors: bits unchanged on reading, one rounding to nearest even on writing, overflow refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qformats.containers.raw import RawTensor
from qformats.containers.source import MemorySource
from qformats.errors import BadFile, Unsupported, UsageError, WouldLose
from qformats.formats import dense
from qformats.formats.protocol import Match, Module, PartInfo, Target
from qformats.scheme import Integer, Scheme

SCHEME = Scheme((2, 4), Integer(4))


def raw(dtype: str, data: np.ndarray[Any, Any], shape: tuple[int, ...], big_endian: bool = False) -> RawTensor:
    return RawTensor("model.norm.weight", dtype, shape, MemorySource(data.tobytes()), 0, data.nbytes, big_endian)


@pytest.mark.parametrize(
    ("word", "numpy_dtype", "torch_dtype"),
    [("F32", "<f4", torch.float32), ("F16", "<f2", torch.float16), ("F64", "<f8", torch.float64), ("BF16", "<u2", torch.bfloat16)],
)
@pytest.mark.parametrize("big_endian", [False, True])
def test_read_keeps_every_bit(word: str, numpy_dtype: str, torch_dtype: torch.dtype, big_endian: bool) -> None:
    pattern = np.random.default_rng(1).integers(0, 256, 48 * np.dtype(numpy_dtype).itemsize, dtype=np.uint8)
    little = pattern.view(numpy_dtype).reshape(2, 3, 8)
    stored = little.astype(little.dtype.newbyteorder(">")) if big_endian else little
    found = dense.read_float(raw(word, stored, (2, 3, 8), big_endian))
    assert found.dtype == torch_dtype and tuple(found.shape) == (2, 3, 8)
    assert found.contiguous().view(torch.uint8).numpy().tobytes() == little.tobytes()
    part = dense.read_float(raw(word, stored, (2, 3, 8), big_endian), 1, 4)
    assert part.view(torch.uint8).numpy().tobytes() == little.reshape(6, 8)[1:4].tobytes()


def test_vectors_keep_their_shape() -> None:
    assert tuple(dense.read_float(raw("F32", np.ones(5, "<f4"), (5,))).shape) == (5,)


@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize("word", ["F16", "BF16", "F32"])
def test_write_rounds_once_to_nearest_even(source: torch.dtype, word: str) -> None:
    target = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[word]
    exact = torch.linspace(-3, 3, 501, dtype=torch.float64).to(target)
    for factor in (0.0, 2.0**-20, 2.0**-11, 2.0**-8):
        values = exact.to(source) * (1 + factor)
        written = dense.write_float(values, word)
        got = torch.from_numpy(written.view("<i2") if word == "BF16" else written).view(target)
        assert torch.equal(got.double(), nearest_even(values.double(), target))


def nearest_even(values: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """By arithmetic: scale the significand to an integer, round half to even, scale back."""
    digits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}[target]
    fraction, exponent = torch.frexp(values)
    return torch.ldexp(torch.round(fraction * 2.0**digits), exponent - digits)


def test_a_double_is_not_rounded_twice() -> None:
    value = torch.tensor([1 + 2**-11 + 2**-40], dtype=torch.float64)  # just above a float16 tie; float32 would make it the tie
    assert float(dense.write_float(value, "F16")[0]) == 1 + 2**-10
    value = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert int(dense.write_float(value, "BF16")[0]) == 0x3F81


@pytest.mark.parametrize(("word", "value"), [("F16", 65520.0), ("BF16", 3.4e38), ("F32", 1e300)])
def test_overflow_is_refused(word: str, value: float) -> None:
    with pytest.raises(WouldLose) as caught:
        dense.write_float(torch.tensor([1.0, value], dtype=torch.float64), word, name="lm_head.weight")
    assert caught.value.code == f"{word.lower()}-overflow" and caught.value.tensor == "lm_head.weight"


def test_largest_and_not_finite_pass() -> None:
    values = torch.tensor([65504.0, 65519.0, float("inf"), float("nan")])
    out = dense.write_float(values, "F16")
    assert out[:3].tolist() == [65504.0, 65504.0, float("inf")] and np.isnan(out[3])


def test_refusals() -> None:
    with pytest.raises(Unsupported) as unsupported:
        dense.read_float(raw("I32", np.ones(4, "<i4"), (2, 2)))
    assert unsupported.value.code == "not-float"
    with pytest.raises(UsageError) as usage:
        dense.read_float(raw("F32", np.ones(4, "<f4"), (2, 2)), 1, 3)
    assert usage.value.code == "row-range"
    with pytest.raises(BadFile) as bad:
        dense.read_float(raw("F32", np.ones(4, "<f4"), (2, 3)))
    assert bad.value.code == "size"
    with pytest.raises(UsageError) as usage:
        dense.write_float(torch.ones(2), "Q4_0")
    assert usage.value.code == "target-type"


def test_storages_layout_and_write() -> None:
    assert [s.type for s in dense.storages(Target("hf"), SCHEME)] == ["bf16", "f16", "f32"]
    (storage,) = dense.storages(Target("hf", "f16"), SCHEME)
    assert dense.layout(storage, (2, 4)) == {"weight": PartInfo("F16", (2, 4))}
    (piece,) = dense.write(storage, torch.ones(1, 4, dtype=torch.float16), 1, (2, 4))
    assert (piece.leaf, piece.row, piece.array.dtype) == ("weight", 1, np.dtype("<f2"))
    with pytest.raises(Unsupported):
        dense.write(storage, torch.ones(1, 4), 1, (2, 4))
    with pytest.raises(UsageError):
        dense.storages(Target("hf", "int4"), SCHEME)
    with pytest.raises(UsageError):
        dense.storages(Target("hf", "f16", {"group": "1"}), SCHEME)
    assert not dense.can_store(storage, SCHEME)


def test_detect_and_module() -> None:
    assert dense.detect({}, ["model.norm.weight"]) == Match("hf", {})
    assert dense.detect({"quant_method": "gptq"}, []) is None
    found = Module("model.norm", {"weight": raw("F32", np.arange(4, dtype="<f4"), (4,))}, Match("hf", {}))
    assert dense.read(found).tolist() == [0, 1, 2, 3]
    with pytest.raises(Unsupported):
        dense.scheme(found)
