"""bitsandbytes: values and bytes by its own library, its JSON blob, its config, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qformats import grids, registry
from qformats.checkpoint import open_checkpoint
from qformats.containers.raw import RawTensor
from qformats.containers.safetensors import open_safetensors
from qformats.containers.source import MemorySource
from qformats.errors import BadFile, QFormatError, Unsupported
from qformats.formats import bitsandbytes as bnb
from qformats.formats.bitsandbytes.state import State, parse_state, state_bytes
from qformats.formats.dense import read_float
from qformats.formats.protocol import Match, Module, Piece, Target
from qformats.quantize import rtn
from qformats.scheme import Integer, Learned, Scheme

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "bitsandbytes"
CASES = sorted(path.name for path in FIXTURES.iterdir())
FOUR = [case for case in CASES if case != "int8"]
DOWN = "model.layers.0.mlp.down_proj"
ITEMSIZE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def stored(case: str, name: str = DOWN) -> Module:
    with open_checkpoint(FIXTURES / case) as checkpoint:
        module = checkpoint.modules[name]
        parts = {leaf: with_bytes(raw, raw.read()) for leaf, raw in module.parts.items()}
        return Module(name, parts, module.match)


def with_bytes(raw: RawTensor, data: bytes) -> RawTensor:
    return RawTensor(raw.name, raw.dtype, raw.shape, MemorySource(data, "memory"), 0, len(data))


def changed(module: Module, leaf: str, **changes: Any) -> Module:
    return Module(module.name, {**module.parts, leaf: replace(module.parts[leaf], **changes)}, module.match)


def assembled(pieces: list[Piece], layout: dict[str, Any]) -> dict[str, bytes]:
    out, seen = {}, dict.fromkeys(layout, 0)
    for leaf, info in layout.items():
        out[leaf] = bytearray(int(np.prod(info.shape)) * ITEMSIZE[info.dtype])
    for piece in pieces:
        data, width = np.ascontiguousarray(piece.array).tobytes(), piece.array.shape[1] * piece.array.dtype.itemsize
        out[piece.leaf][piece.row * width : piece.row * width + len(data)] = data
        seen[piece.leaf] += len(data)
    assert seen == {leaf: len(data) for leaf, data in out.items()}  # every byte once
    return {leaf: bytes(data) for leaf, data in out.items()}


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_bitsandbytes_in_any_row_range(case: str) -> None:
    oracle = open_safetensors(FIXTURES / case / "oracle.safetensors").tensors
    with open_checkpoint(FIXTURES / case) as checkpoint:
        assert checkpoint.format == "bitsandbytes"
        for name, raw in oracle.items():
            module = checkpoint.modules[name.removesuffix(".weight")]
            wanted = read_float(raw)
            assert torch.equal(bnb.read(module).dequantize(wanted.dtype, like="bitsandbytes"), wanted)
            assert torch.equal(bnb.dequantize(module), wanted) and bnb.dequantize(module).dtype == wanted.dtype
            for start, stop in ((0, 1), (3, 22), (17, len(wanted))):
                rows = bnb.read(module, start, stop)
                assert torch.equal(rows.dequantize(wanted.dtype, like="bitsandbytes"), wanted[start:stop])
                assert torch.equal(bnb.dequantize(module, start, stop), wanted[start:stop])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [32, 64])
def test_written_again_it_is_the_same_bytes(case: str, step: int) -> None:
    with open_checkpoint(FIXTURES / case) as checkpoint:
        for name in [name for name in checkpoint.modules if checkpoint.is_quantized(name)]:
            module, form = checkpoint.modules[name], bnb.scheme(checkpoint.modules[name])
            storage, (n, _) = bnb.storage_of(module), form.shape
            assert bnb.can_store(storage, bnb.read(module).scheme) and bnb.read(module).scheme == form
            pieces: list[Piece] = []
            for start in range(0, n, step):
                pieces += bnb.write(storage, bnb.read(module, start, min(n, start + step)), start, form.shape)
            made = assembled(pieces, bnb.layout(storage, form.shape))
            assert made == {leaf: module.parts[leaf].read() for leaf in made}


@pytest.mark.parametrize("case", FOUR)
def test_without_the_compiled_loops_it_is_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = stored(case)
    tensor, storage = bnb.read(module), bnb.storage_of(module)
    fast, pieces = bnb.dequantize(module), bnb.write(storage, tensor, 0, tensor.shape)
    monkeypatch.setattr("qformats.formats.bitsandbytes.fourbit.find", lambda name: None)
    assert torch.equal(bnb.read(module).codes, tensor.codes) and torch.equal(bnb.dequantize(module), fast)
    again = bnb.write(storage, tensor, 0, tensor.shape)
    assert all(np.array_equal(a.array, b.array) for a, b in zip(pieces, again, strict=True))


def test_the_first_code_of_a_byte_is_in_its_high_nibble() -> None:
    storage = bnb.storages(Target("bitsandbytes", "nf4"), Scheme((1, 8), Integer(16, signed=True)))[0]
    levels = grids.table_values("nf4").to(torch.float32)[[0, 1, 2, 3, 4, 5, 6, 15]].reshape(1, 8)
    weight = next(p for p in bnb.write(storage, rtn(levels, storage), 0, (1, 8)) if p.leaf == "weight")
    assert weight.array.tobytes().hex() == "0123456f"


def quant_storages() -> list[tuple[str, dict[str, str], tuple[int, int]]]:
    shapes = [(5, 37), (33, 64), (7, 100)]
    return [
        (kind, {"blocksize": str(size), **({"double": ""} if double else {})}, shape)
        for kind in ("nf4", "fp4") for size in (32, 64, 256, 4096) for double in (False, True) for shape in shapes
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "shape"), quant_storages())
def test_new_codes_are_read_again(kind: str, options: dict[str, str], shape: tuple[int, int]) -> None:
    """Odd numbers of weights, blocks over the ends of rows, a block of zeros; the values are those of the codes."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
    weights[1] = 0
    storage = bnb.storages(Target("bitsandbytes", kind, options), Scheme(shape, Integer(16, signed=True)))[0]
    tensor = rtn(weights, storage)
    layout = bnb.layout(storage, shape)
    made = assembled(bnb.write(storage, tensor, 0, shape), layout)
    parts = {leaf: with_bytes(RawTensor("x", i.dtype, i.shape, MemorySource(b"", "m"), 0, 0), made[leaf]) for leaf, i in layout.items()}
    module = Module("m", parts, Match("bitsandbytes", {}))
    assert torch.equal(bnb.read(module).dequantize(torch.float64), tensor.dequantize(torch.float64))
    assert float((tensor.dequantize() - weights).norm() / weights.norm()) < 0.25
    heavy = torch.rand(shape[1], generator=torch.Generator().manual_seed(2))
    better = rtn(weights, storage, heavy)
    if "double" not in options:
        assert (heavy * (better.dequantize() - weights) ** 2).sum() <= (heavy * (tensor.dequantize() - weights) ** 2).sum() * 1.0001


def test_new_codes_are_bitsandbytes_own() -> None:
    """Byte for byte, where its library can be imported."""
    peer = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(grids.table_values("dynamic").to(torch.float32), peer.create_dynamic_map())
    weights = torch.randn(48, 128, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    weights[3, :64] = 0
    weights[4, :8] = weights[4].abs().max() * torch.tensor([0.001, 0.002, -0.001, 0, 0.5, -0.5, 0.0026, 1])
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            codes, state = peer.quantize_4bit(weights, quant_type=kind, compress_statistics=double)
            target = Target("bitsandbytes", kind, {"double": str(double).lower()})
            storage = bnb.storages(target, Scheme((48, 128), Integer(16, signed=True)))[0]
            made = assembled(bnb.write(storage, rtn(weights, storage), 0, (48, 128)), bnb.layout(storage, (48, 128)))
            theirs = {f"weight.{leaf}": value.numpy().tobytes() for leaf, value in state.as_dict(packed=True).items()}
            assert {leaf: data.rstrip(b" ") if leaf.startswith("weight.quant_state") else data for leaf, data in made.items()} == {
                "weight": codes.numpy().tobytes(), **theirs,
            }  # fmt: skip
    eight = bnb.storages(Target("bitsandbytes", "int8"), Scheme((48, 128), Integer(16, signed=True)))[0]
    codes, scb, _ = peer.int8_vectorwise_quant(weights.to(torch.float16))
    mine = rtn(weights, eight)
    assert torch.equal(mine.codes, codes) and torch.equal(mine.scales[0].values.reshape(-1), scb)  # type: ignore[union-attr]
    assert torch.equal(mine.dequantize(like="bitsandbytes"), peer.int8_vectorwise_dequant(codes, scb))


# ---------------------------------------------------------------- the blob and the maps


def test_the_blob_has_pythons_own_spacing_and_any_order_is_read() -> None:
    state = State("nf4", 64, "bfloat16", (64, 128), 256, 2.63519287109375)
    assert state_bytes(state) == (
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128], '
        b'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.63519287109375}'
    )
    backwards = json.dumps(dict(reversed(json.loads(state_bytes(state)).items())), indent=1).encode()
    assert parse_state(backwards, "x") == state == parse_state(state_bytes(state, padded=True), "x")


def blob(**changes: Any) -> str:
    return json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [4, 4], **changes})


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "\xff", "[" * 100000, '{"quant_type": "nf4"}', blob(quant_type="af4"), blob(blocksize=60), blob(dtype="int8"),
        blob(shape=[4, -4]), blob(more=1), blob()[:-1] + ', "quant_type": "nf4"}', blob(nested_blocksize=256),
        blob(nested_blocksize=256, nested_dtype="float32", nested_offset=float("nan")),
        blob(nested_blocksize=256, nested_dtype="float32", nested_offset=1e99),
    ],
)  # fmt: skip
def test_other_blobs_are_refused(text: str) -> None:
    with pytest.raises(BadFile) as caught:
        parse_state(text.encode("latin-1"), "x")
    assert caught.value.code == "quant-state"


def test_a_map_of_its_own_is_what_codes_mean_and_is_told_of() -> None:
    module = stored("nf4")
    raw = module.parts["weight.quant_map"]
    book = raw.array() * np.float32(0.5)
    other = Module(module.name, {**module.parts, "weight.quant_map": with_bytes(raw, book.tobytes())}, module.match)
    assert bnb.scheme(other).grid == Learned(16) and "quant_map" in bnb.module_warnings(other)[0] and bnb.module_warnings(module) == []
    assert torch.equal(bnb.read(other).dequantize() * 2, bnb.read(module).dequantize())
    storage, tensor = bnb.storage_of(other), bnb.read(other)
    made = assembled(bnb.write(storage, tensor, 0, tensor.shape), bnb.layout(storage, tensor.shape))
    assert made == {leaf: other.parts[leaf].read() for leaf in made}


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("case", ["nf4", "fp4-double", "int8"])
def test_broken_modules_are_refused_with_one_error(case: str) -> None:
    module = stored(case)
    for leaf, raw in module.parts.items():
        if leaf in ("bias", "weight_format"):
            continue
        rest = {k: v for k, v in module.parts.items() if k != leaf}
        for broken in (
            Module(module.name, rest, module.match),
            changed(module, leaf, dtype="I64"),
            changed(module, leaf, shape=(raw.shape[0] + 1, *raw.shape[1:])),
            changed(module, leaf, shape=(raw.shape[0], *raw.shape[1:], 1)),
        ):
            with pytest.raises(QFormatError):
                bnb.read(broken)


@pytest.mark.parametrize(("case", "leaf"), [("nf4", "weight.absmax"), ("fp4-double", "weight.nested_absmax"), ("int8", "SCB"),
                                            ("nf4", "weight.quant_map"), ("fp4-double", "weight.nested_quant_map")])  # fmt: skip
def test_scales_that_are_no_numbers_are_refused(case: str, leaf: str) -> None:
    module = stored(case)
    raw = module.parts[leaf]
    data = np.frombuffer(raw.read(), np.float32).copy()
    data[1 if len(data) > 1 else 0] = np.nan
    with pytest.raises(BadFile) as caught:
        bnb.read(Module(module.name, {**module.parts, leaf: with_bytes(raw, data.tobytes())}, module.match))
    assert caught.value.code in ("not-finite", "quant-map")


def test_tiles_of_old_kernels_are_refused_by_name() -> None:
    module = stored("int8")
    turing = with_bytes(module.parts["weight_format"], b"\x02")
    with pytest.raises(Unsupported, match="col_turing"):
        bnb.read(Module(module.name, {**module.parts, "weight_format": turing}, module.match))
    older = Module(module.name, {k: v for k, v in module.parts.items() if k != "weight_format"}, module.match)
    assert torch.equal(bnb.read(older).codes, bnb.read(module).codes) and "weight_format" not in bnb.layout(bnb.storage_of(older), (64, 96))


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("case", CASES)
def test_the_config_is_the_one_transformers_writes(case: str) -> None:
    held = json.loads((FIXTURES / case / "config.json").read_text())["quantization_config"]
    with open_checkpoint(FIXTURES / case) as checkpoint:
        modules = {name: bnb.storage_of(m) for name, m in checkpoint.modules.items() if checkpoint.is_quantized(name)}
        skipped = ["model.layers.0.self_attn.v_proj"] if "skip" in case else []
        made = bnb.config_out(Target("bitsandbytes"), modules, skipped, held)
    assert made == held and type(made["llm_int8_threshold"]) is float


@pytest.mark.parametrize(
    "config", [{"load_in_4bit": True}, {"load_in_8bit": True, "llm_int8_threshold": 6}, {"quant_method": "bitsandbytes"}]
)
def test_old_configs_and_new_ones_are_known(config: dict[str, Any]) -> None:
    assert registry.detect(config, ["a.weight"]).format == "bitsandbytes"
    assert registry.parse_target("bnb:nf4,double").format == "bitsandbytes"
