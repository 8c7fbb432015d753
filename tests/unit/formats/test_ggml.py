"""The ggml block types against bytes and values that real llama.cpp produced (fixtures/ggml/make.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qformats.containers.raw import RawTensor
from qformats.containers.source import MemorySource
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats import ggml
from qformats.formats.protocol import Match, Module, Target
from qformats.scheme import Integer, No, ParamSpec, Scheme, Storage, Tile, Yes, whole
from qformats.tensor import Param, QuantizedTensor, constant

FIXTURES = Path(__file__).parents[3] / "fixtures" / "ggml"
TYPES = list(ggml.BLOCK_TYPES)
SCHEME = Scheme((4, 256), Integer(4))


def fixture(name: str) -> Any:
    return np.load(FIXTURES / f"{name.lower()}.npz")


def raw(name: str, blocks: np.ndarray[Any, Any], shape: tuple[int, ...], big_endian: bool = False) -> RawTensor:
    return RawTensor("blk.0.attn_q.weight", name, shape, MemorySource(blocks.tobytes()), 0, blocks.nbytes, big_endian)


def module(weight: RawTensor) -> Module:
    return Module("blk.0.attn_q", {"weight": weight}, Match("gguf", {"container": "gguf"}))


def loaded(name: str) -> tuple[Module, Any]:
    data = fixture(name)
    return module(raw(name, data["blocks"], data["values"].shape)), data


def bits(values: Any) -> Any:
    return np.asarray(values, np.float32).view(np.uint32)


@pytest.mark.parametrize("name", TYPES)
def test_values_equal_llama_cpp_bit_for_bit(name: str) -> None:
    source, data = loaded(name)
    values, expected = ggml.read(source).dequantize(like="ggml").numpy(), data["values"]
    if name in ("MXFP4", "NVFP4"):  # e2m1 has a -0, which ggml reads as +0
        assert np.array_equal(values, expected)
        values, expected = values + np.float32(0), expected + np.float32(0)
    assert np.array_equal(bits(values), bits(expected))


@pytest.mark.parametrize("name", TYPES)
def test_llama_cpp_s_float32_is_the_exact_value_rounded_once(name: str) -> None:
    source, data = loaded(name)
    assert np.array_equal(ggml.read(source).dequantize(torch.float32).numpy(), data["values"])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("loops", [True, False], ids=["loops", "torch"])
def test_dequantize_fills_the_same_bits(name: str, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not loops:
        monkeypatch.setattr(ggml, "_loops", lambda: None)
    data = fixture(name)
    out = np.full(data["values"].shape, np.nan, np.float32)
    ggml.dequantize(name, data["blocks"], out)
    assert np.array_equal(bits(out), bits(data["values"]))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("loops", [True, False], ids=["loops", "torch"])
def test_write_gives_back_the_bytes(name: str, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not loops:
        monkeypatch.setattr(ggml, "_loops", lambda: None)
    source, data = loaded(name)
    storage = ggml.BLOCK_TYPES[name].storage
    (piece,) = ggml.write(storage, ggml.read(source), 0, data["values"].shape)
    assert (piece.leaf, piece.row, piece.column) == ("weight", 0, 0)
    assert np.array_equal(piece.array, data["blocks"])


@pytest.mark.parametrize("name", TYPES)
def test_scheme_from_the_header_is_the_tensor_s_own(name: str) -> None:
    source, _ = loaded(name)
    assert ggml.scheme(source) == ggml.read(source).scheme


@pytest.mark.parametrize("name", TYPES)
def test_row_ranges_of_experts_are_counted_over_all_of_them(name: str) -> None:
    data = fixture(name)
    rows, k = data["values"].shape
    source = module(raw(name, data["blocks"], (2, rows // 2, k)))
    part = ggml.read(source, 1, 5)
    assert part.shape == (4, k)
    assert torch.equal(part.codes, ggml.read(source).codes[1:5])
    assert ggml.scheme(source).shape == (2, rows // 2, k)
    storage = ggml.BLOCK_TYPES[name].storage
    (piece,) = ggml.write(storage, part, 1, (2, rows // 2, k))
    assert piece.row == 1 and np.array_equal(piece.array, data["blocks"][1:5])


@pytest.mark.parametrize("name", TYPES)
def test_parameters_alone(name: str) -> None:
    source, _ = loaded(name)
    whole_tensor, part = ggml.read(source, 1, 4), ggml.read(source, 1, 4, codes=False)
    assert part.scheme == whole_tensor.scheme and part.codes.stride() == (0, 0)
    zeros = whole_tensor.replace(codes=torch.zeros_like(whole_tensor.codes))
    assert torch.equal(part.dequantize(torch.float64), zeros.dequantize(torch.float64))


def test_big_endian_fields_are_swapped() -> None:
    for name, fields in {
        "Q4_0": [(0, 2)],
        "Q4_1": [(0, 2), (2, 2)],
        "Q5_0": [(0, 2), (2, 4)],
        "Q5_1": [(0, 2), (2, 2), (4, 4)],
        "Q8_0": [(0, 2)],
        "Q4_K": [(0, 2), (2, 2)],
        "IQ4_NL": [(0, 2)],
        "MXFP4": [],
        "NVFP4": [],
        "Q1_0": [(0, 2)],
        "Q2_0": [(0, 2)],
        "TQ1_0": [(52, 2)],
        "TQ2_0": [(64, 2)],
    }.items():
        source, data = loaded(name)
        swapped = data["blocks"].reshape(-1, ggml.BLOCK_TYPES[name].nbytes).copy()
        for at, width in fields:
            swapped[:, at : at + width] = swapped[:, at : at + width][:, ::-1].copy()
        other = ggml.read(module(raw(name, swapped, data["values"].shape, big_endian=True)))
        assert torch.equal(other.dequantize(like="ggml"), ggml.read(source).dequantize(like="ggml"))


def test_q4_0_worked_example() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, :8], codes[0, 16:24] = torch.arange(8), torch.arange(8, 16)
    tensor = QuantizedTensor(
        (1, 32), codes, Integer(4), (Param(torch.tensor([[1.0]], dtype=torch.float16), Tile((1, 32))),), constant(8, (1, 32))
    )
    (piece,) = ggml.write(ggml.storages(Target("gguf", "q4_0"), SCHEME)[0], tensor, 0, (1, 32))
    assert piece.array.tobytes().hex() == "003c" + "8091a2b3c4d5e6f7" + "00" * 8


def test_q4_k_of_a_per_channel_source() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (3, 512), generator=generator, dtype=torch.uint8)
    d = torch.randn((3, 2), generator=generator).to(torch.float16)
    sub = torch.ones((3, 16), dtype=torch.uint8)
    zero = torch.randint(0, 16, (3, 1), generator=generator, dtype=torch.uint8).expand(3, 16).contiguous()
    scale = QuantizedTensor((3, 16), sub, Integer(6), (Param(d, Tile((1, 8))),))
    offset = QuantizedTensor((3, 16), zero, Integer(6), (Param(-d, Tile((1, 8))),))
    tensor = QuantizedTensor((3, 512), codes, Integer(4), (Param(scale, Tile((1, 32))),), None, Param(offset, Tile((1, 32))))
    (piece,) = ggml.write(ggml.storages(Target("gguf", "q4_k"), SCHEME)[0], tensor, 0, (3, 512))
    out = np.empty((3, 512), np.float32)
    ggml.dequantize("Q4_K", piece.array, out)
    expected = d.double().repeat_interleave(256, 1) * (codes.double() - zero.double().repeat_interleave(32, 1))
    assert np.array_equal(out, expected.to(torch.float32).numpy())


def test_detect_wants_the_container_s_word() -> None:
    assert ggml.detect({"container": "gguf"}, ["blk.0.attn_q.weight"]) == Match("gguf", {"container": "gguf"})
    assert ggml.detect({}, ["blk.0.attn_q.weight"]) is None
    assert ggml.detect({"quant_method": "gptq"}, []) is None


def test_candidates_without_a_type_are_ordered_by_size() -> None:
    found = ggml.storages(Target("gguf"), SCHEME)
    assert {s.type for s in found} == {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"}
    assert [s.bits_per_weight for s in found] == sorted(s.bits_per_weight for s in found)
    assert {s.type: s.bits_per_weight for s in found}["q5_0"] == 5.5


def test_unknown_types_and_options_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="q4_0") as caught:
        ggml.storages(Target("gguf", "q9_9"), SCHEME)
    assert caught.value.code == "target-type"
    with pytest.raises(UsageError) as caught:
        ggml.storages(Target("gguf", "q4_0", {"group": "128"}), SCHEME)
    assert caught.value.code == "target-option"


def test_unreadable_blocks_are_named() -> None:
    with pytest.raises(Unsupported, match="Q8_K") as caught:
        ggml.read(module(raw("Q8_K", np.zeros((1, 292), np.uint8), (1, 256))))
    assert caught.value.code == "ggml-type"


@pytest.mark.parametrize(
    ("shape", "code"), [((2, 48), "gguf-row-size"), ((3, 32), "gguf-size"), ((), "gguf-row-size")], ids=["ragged", "short", "scalar"]
)
def test_lying_headers_are_refused(shape: tuple[int, ...], code: str) -> None:
    with pytest.raises(BadFile) as caught:
        ggml.scheme(module(raw("Q4_0", np.zeros((2, 18), np.uint8), shape)))
    assert caught.value.code == code


def test_missing_weight_and_row_range() -> None:
    with pytest.raises(BadFile) as caught:
        ggml.read(Module("blk.0.attn_q", {}, Match("gguf", {})))
    assert caught.value.code == "missing-part"
    source, _ = loaded("Q4_0")
    with pytest.raises(UsageError) as usage:
        ggml.read(source, 5, 99)
    assert usage.value.code == "row-range"
    with pytest.raises(UsageError):
        ggml.read(source, 3, 3)


def affine(shape: tuple[int, int], group: int, *, bits: int = 4, zero: float | None = 8.0) -> Scheme:
    n = ParamSpec("float16", Tile((1, group)))
    return Scheme(shape, Integer(bits), (n,), None if zero is None else ParamSpec("int16", whole(shape), constant=zero))


@pytest.mark.parametrize(
    ("scheme", "answer"),
    [
        (affine((2, 64), 32), ""),
        (affine((2, 64), 64), "its scale is float16 for each (1, 64)"),
        (affine((2, 64), 32, zero=7.0), "its zero_point is the constant 7"),
        (affine((2, 64), 32, zero=None), "it has 0 zero_point planes"),
        (affine((2, 64), 32, bits=5), "its codes are"),
        (affine((2, 48), 32), "not a multiple of 32"),
        (Scheme((2, 64), Integer(4), affine((2, 64), 32).scales, affine((2, 64), 32).zero_point, group_index=True), "act-order"),
    ],
)
def test_can_store_gives_its_reason(scheme: Scheme, answer: str) -> None:
    found = ggml.can_store(ggml.storages(Target("gguf", "q4_0"), scheme)[0], scheme)
    assert isinstance(found, Yes) if not answer else isinstance(found, No) and answer in found.reason


def test_write_refuses_what_can_store_refuses() -> None:
    source, _ = loaded("Q4_0")
    storage = ggml.storages(Target("gguf", "q5_0"), SCHEME)[0]
    with pytest.raises(Unsupported) as caught:
        ggml.write(storage, ggml.read(source), 0, (8, 96))
    assert caught.value.code == "form"
    with pytest.raises(Unsupported) as caught:
        ggml.write(storage, torch.zeros(8, 96), 0, (8, 96))
    assert caught.value.code == "form"


def test_layout_names_the_ggml_type() -> None:
    storage: Storage = ggml.storages(Target("gguf", "q4_k"), SCHEME)[0]
    assert ggml.layout(storage, (4, 512))["weight"].dtype == "Q4_K"
    with pytest.raises(Unsupported) as caught:
        ggml.layout(storage, (4, 96))
    assert caught.value.code == "k-multiple"
    assert ggml.config_out(Target("gguf"), {}, [], None) == {}


@pytest.mark.parametrize(("name", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_float_types_take_tensors_of_their_own_dtype(name: str, dtype: torch.dtype) -> None:
    storage = ggml.storages(Target("gguf", name), SCHEME)[0]
    values = torch.randn(3, 10, generator=torch.Generator().manual_seed(2)).to(dtype)
    (piece,) = ggml.write(storage, values, 2, (5, 10))  # type: ignore[arg-type]
    assert piece.row == 2 and piece.array.tobytes() == values.view(torch.uint8).numpy().tobytes()
    assert storage.bits_per_weight == dtype.itemsize * 8
    with pytest.raises(Unsupported) as caught:
        ggml.write(storage, values.double(), 0, (3, 10))
    assert caught.value.code == "form"


def run(code: str, **environment: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(FIXTURES.parents[1]), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FIXTURES, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


def test_headers_need_no_torch() -> None:
    run(
        "import sys; sys.modules['torch'] = None\n"
        "from qformats.formats import dense, ggml\n"
        "from qformats.formats.protocol import Match, Module, Target\n"
        "from qformats.containers.raw import RawTensor\n"
        "from qformats.containers.source import MemorySource\n"
        "raw = RawTensor('w', 'Q4_K', (2, 256), MemorySource(bytes(288)), 0, 288)\n"
        "scheme = ggml.scheme(Module('w', {'weight': raw}, ggml.detect({'container': 'gguf'}, [])))\n"
        "for storage in ggml.storages(Target('gguf'), scheme) + dense.storages(Target('hf'), scheme):\n"
        "    ggml.layout(storage, (2, 256)), dense.can_store(storage, scheme)\n"
        "assert ggml.can_store(ggml.storages(Target('gguf', 'q4_k'), scheme)[0], scheme)\n"
        "assert sys.modules['torch'] is None and 'numba' not in sys.modules\n"
    )


VALUES_OF_Q4_0 = (
    "import sys, numpy as np\n"
    "from qformats.formats import ggml\n"
    "data = np.load('q4_0.npz'); out = np.empty_like(data['values'])\n"
    "ggml.dequantize('Q4_0', data['blocks'], out); assert np.array_equal(out, data['values'])\n"
)


def test_without_numba() -> None:
    run("import sys; sys.modules['numba'] = None\n" + VALUES_OF_Q4_0 + "assert ggml._loops() is None\n")


def test_where_no_cache_directory_can_be_made(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES.parents[1] / "qformats", tmp_path / "qformats", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "qformats" / "loops" / "__pycache__").write_text("a file where the directory should be")
    (tmp_path / "home").write_text("a file")
    places = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home"), "NUMBA_CACHE_DIR": ""}
    run(VALUES_OF_Q4_0 + "assert ggml._loops() is not None\n", PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1", **places)
