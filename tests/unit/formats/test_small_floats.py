"""FP8 and FP4 checkpoints: values against their owners' or the fixtures' oracles, row ranges, the same bytes again, and broken files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qformats import registry
from qformats.checkpoint import Checkpoint, open_checkpoint
from qformats.containers.raw import RawTensor
from qformats.containers.source import MemorySource
from qformats.errors import BadFile, QFormatError, Unsupported, UsageError
from qformats.formats.protocol import Match, Module, Target
from qformats.quantize import rtn
from qformats.scheme import Integer, Scheme, Storage, Tile
from qformats.tensor import QuantizedTensor

FIXTURES = Path(__file__).parents[3] / "fixtures"
PATHS = [
    "fp8/block",
    "fp8/tensor-static",
    "fp8/mxfp8",
    "fp8/experts-fp4",
    "fbgemm_fp8/rows",
    "modelopt/fp8",
    "modelopt/nvfp4",
    "modelopt/mixed",
]
WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
         torch.float8_e8m0fnu: "F8_E8M0"}  # fmt: skip


def raw(name: str, tensor: torch.Tensor) -> RawTensor:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return RawTensor(name, WORDS[tensor.dtype], tuple(tensor.shape), MemorySource(data, "memory"), 0, len(data))


def module(config: dict[str, Any], **parts: torch.Tensor) -> tuple[Any, Module]:
    """A module of these parts (``own`` = the leaf without a name) and the format its config speaks of."""
    named = {"" if leaf == "own" else leaf: raw(leaf, tensor) for leaf, tensor in parts.items()}
    match = registry.detect(config, [f"m.{leaf}" for leaf in named])
    return registry.format_module(match.format), Module("m", named, match)


def opened(path: str) -> tuple[Any, Checkpoint]:
    checkpoint = open_checkpoint(FIXTURES / path)
    return registry.format_module(checkpoint.format), checkpoint


def coded(checkpoint: Checkpoint) -> list[Module]:
    return [found for name, found in checkpoint.modules.items() if checkpoint.is_quantized(name)]


def written(form: Any, storage: Storage, tensor: QuantizedTensor, shape: tuple[int, ...]) -> dict[str, RawTensor]:
    """The parts ``write`` makes of the whole tensor."""
    parts, layout = {}, form.layout(storage, shape)
    pieces = form.write(storage, tensor, 0, shape)
    assert {piece.leaf for piece in pieces} == set(layout)
    for piece in pieces:
        info, data = layout[piece.leaf], np.ascontiguousarray(piece.array).tobytes()
        parts[piece.leaf] = RawTensor(piece.leaf, info.dtype, info.shape, MemorySource(data, "memory"), 0, len(data))
    return parts


@pytest.mark.parametrize("path", PATHS)
def test_values_are_the_owners(path: str) -> None:
    form, checkpoint = opened(path)
    oracle = load_file(FIXTURES / path / "oracle.safetensors")
    with checkpoint:
        assert {f"{m.name}.weight" for m in coded(checkpoint)} >= set(oracle) and checkpoint.format == path.split("/")[0]
        for name, expected in oracle.items():
            tensor = form.read(checkpoint.modules[name.removesuffix(".weight")])
            folded = len(tensor.scales) > 1 and isinstance(tensor.scales[-1].block, Tile) and tensor.scales[-1].block.sizes[-1] == 1
            if not folded:  # a factor of columns is our own reading of pre_quant_scale
                like = "modelopt" if form.NAME == "modelopt" else "transformers"
                assert torch.equal(tensor.dequantize(torch.float32, like=like), expected), name
            limit = 1e-6 * float(expected.abs().max())
            assert torch.allclose(tensor.dequantize(torch.float32), expected, rtol=2e-7, atol=limit), name


@pytest.mark.parametrize("path", PATHS)
def test_row_ranges_and_the_same_bytes(path: str) -> None:
    form, checkpoint = opened(path)
    with checkpoint:
        for found in coded(checkpoint):
            whole = form.read(found)
            scheme = form.scheme(found)
            assert scheme.shape == whole.shape and [s.inverse for s in scheme.scales] == [s.inverse for s in whole.scales]
            values, n = whole.dequantize(torch.float64), whole.shape[0]
            for start, stop in ((0, 1), (1, 2), (3, n), (n // 2, n // 2 + 5), (n - 1, n)):
                part = form.read(found, start, stop)
                assert torch.equal(part.dequantize(torch.float64), values[start:stop])
                blank = form.read(found, start, stop, codes=False)
                assert blank.scheme == part.scheme and int(blank.codes.to(torch.int32).abs().sum()) == 0
            storage = form.storage_of(found)
            assert form.can_store(storage, whole.scheme) and form.can_store(storage, scheme), (storage, whole.scheme)
            parts = written(form, storage, whole, scheme.shape)
            own = {leaf: part for leaf, part in found.parts.items() if leaf in {"weight", *form.SUFFIXES}}
            assert {leaf: (p.dtype, p.shape, p.read()) for leaf, p in parts.items()} == {
                leaf: (p.dtype, tuple(p.shape), p.read()) for leaf, p in own.items()
            }, found.name


@pytest.mark.parametrize("path", PATHS)
def test_config_comes_back_verbatim(path: str) -> None:
    form, checkpoint = opened(path)
    with checkpoint:
        config = dict(checkpoint.match.config)
        storages = {m.name: form.storage_of(m) for m in coded(checkpoint)}
        again = form.config_out(Target(form.NAME), storages, ["lm_head"] if path != "fp8/block" else [], config)
        assert again == config
        fresh = form.config_out(Target(form.NAME), storages, ["lm_head"], None)
        assert registry.detect(fresh, []).format == form.NAME
        json.dumps(fresh)


@pytest.mark.parametrize(("n", "k"), [(576, 64), (100, 200), (128, 257), (130, 130)])
def test_partial_blocks(n: int, k: int) -> None:
    """Blocks of 128 x 128 that the edges cut: repeated and trimmed, as DeepSeek's ``weight_dequant`` does it."""
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 126, (n, k), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.rand((-(-n // 128), -(-k // 128)), generator=generator) + 0.1
    form, found = module({"quant_method": "fp8", "weight_block_size": [128, 128]}, weight=codes, weight_scale_inv=scale)
    expected = codes.float().numpy() * np.repeat(np.repeat(scale.numpy(), 128, 0)[:n], 128, 1)[:, :k]
    assert np.array_equal(form.read(found).dequantize(like="transformers").numpy(), expected)
    assert np.array_equal(form.read(found, 5, 99).dequantize(like="transformers").numpy(), expected[5:99])
    storage = form.storage_of(found)
    assert (storage.rows, storage.group) == (128, 128)
    parts = written(form, storage, form.read(found), (n, k))
    assert parts["weight_scale_inv"].read() == found.parts["weight_scale_inv"].read()


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "scale", "qscale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_bytes_of_a_scale_are_exponents(leaf: str, dtype: torch.dtype) -> None:
    codes = torch.full((4, 64), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)  # 1.0
    scale = torch.tensor([[127, 128], [126, 130], [120, 127], [127, 0]], dtype=torch.uint8).view(dtype)
    form, found = module({"quant_method": "fp8", "weight_block_size": [1, 32]}, weight=codes, **{leaf: scale})
    assert form.read(found).dequantize(torch.float64)[:, ::32].tolist() == [[1, 2], [0.5, 8], [2.0**-7, 1], [1, 2.0**-127]]


def test_fused_experts_of_transformers() -> None:
    """``gate_up_proj`` beside ``gate_up_proj_scale_inv``: one weight, named without a leaf, tiles within each expert."""
    dequantize = pytest.importorskip("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)._dequantize_one
    codes = torch.randint(0, 126, (3, 8, 64), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, 2)
    form, found = module({"quant_method": "fp8", "weight_block_size": [4, 32]}, own=codes, _scale_inv=scale)
    assert form.split_name("a.experts.gate_up_proj_scale_inv") == ("a.experts.gate_up_proj", "_scale_inv")
    assert form.split_name("a.q_proj.weight_scale_inv") == ("a.q_proj", "weight_scale_inv")
    assert form.join_name("a.gate_up_proj", "_scale_inv") == "a.gate_up_proj_scale_inv" and form.join_name("a", "weight") == "a.weight"
    assert form.scheme(found).shape == (3, 8, 64)
    expected = dequantize(codes, scale, torch.float32).reshape(24, 64)
    assert torch.equal(form.read(found).dequantize(like="transformers"), expected)
    assert torch.equal(form.read(found, 5, 19).dequantize(like="transformers"), expected[5:19])
    parts = written(form, form.storage_of(found), form.read(found), (3, 8, 64))
    assert parts["_scale_inv"].read() == found.parts["_scale_inv"].read() and parts[""].shape == (3, 8, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_transformers(dtype: torch.dtype) -> None:
    dequantize = pytest.importorskip("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)._dequantize_one
    codes = torch.randint(0, 126, (64, 96), dtype=torch.uint8)
    scale = torch.rand(4, 3) * 0.01
    for weight, plane, config in [
        (codes.view(torch.float8_e4m3fn), scale, [16, 32]),
        (codes.view(torch.float8_e4m3fn), torch.tensor(0.03), None),
        (codes.view(torch.float8_e4m3fn), torch.randint(110, 130, (64, 3), dtype=torch.uint8), [1, 32]),
        (codes[:, :64].contiguous().view(torch.int8), torch.randint(110, 130, (64, 4), dtype=torch.uint8), [16, 32]),
    ]:
        form, found = module({"quant_method": "fp8", "weight_block_size": config}, weight=weight, weight_scale_inv=plane)
        assert torch.equal(form.read(found).dequantize(dtype, like="transformers"), dequantize(weight, plane, dtype))


@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
def test_fbgemm_experts_of_llama4(leaf: str) -> None:
    """One scale an output, which is a column of the stored (E, K, N), whichever way the scale's own shape lies."""
    codes = torch.randint(0, 126, (2, 6, 10), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.rand((2, 1, 10) if leaf == "gate_up_proj" else (2, 10, 1))
    form, found = module({"quant_method": "fbgemm_fp8"}, own=codes, _scale=scale)
    assert form.split_name(f"x.experts.{leaf}_scale") == (f"x.experts.{leaf}", "_scale")
    expected = (codes.float() * scale.reshape(2, 1, 10)).reshape(12, 10)
    assert torch.equal(form.read(found).dequantize(), expected)
    assert torch.equal(form.read(found, 4, 9).dequantize(), expected[4:9])
    parts = written(form, form.storage_of(found), form.read(found), (2, 6, 10))
    assert parts["_scale"].read() == found.parts["_scale"].read() and parts["_scale"].shape == tuple(scale.shape)


def test_modelopt_spellings(tmp_path: Path) -> None:
    """The file's spelling and config.json's say the same; globs are globs; unknown algorithms and stacked experts are named."""
    form, checkpoint = opened("modelopt/fp8")
    with checkpoint:
        config = dict(checkpoint.match.config)
        assert config["quantization"]["quant_algo"] == "FP8" and config["quant_method"] == "modelopt"
        assert set(checkpoint.extras) >= {("model.layers.0.self_attn.k_proj", "k_scale"), ("model.layers.0.self_attn.v_proj", "v_scale")}
        beside = json.loads(form.side_files(config)["hf_quant_config.json"])
        assert beside == json.loads((FIXTURES / "modelopt/fp8/hf_quant_config.json").read_text())
    _, other = opened("modelopt/nvfp4")
    with other:
        made = json.loads(form.side_files(other.match.config)["hf_quant_config.json"])["quantization"]
        assert made["quant_algo"] == "NVFP4" and made["exclude_modules"] == ["lm_head"]
    for wrong, code in (({"quant_algo": "NVFP4_SVD"}, "quant-algo"), ({"quant_algo": "MXFP9"}, "quant-algo")):
        with pytest.raises(Unsupported) as caught:
            registry.detect({"quant_method": "modelopt", **wrong}, [])
        assert caught.value.code == code
    with pytest.raises(Unsupported) as caught:
        registry.detect({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ["x.experts.gate_up_proj_weight_scale"])
    assert caught.value.code == "stacked-experts"


def test_a_factor_of_the_input_is_told() -> None:
    form, checkpoint = opened("modelopt/mixed")
    with checkpoint:
        told = {m.name: form.module_warnings(m) for m in coded(checkpoint)}
        assert [name for name, texts in told.items() if texts] == ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
        kinds = {str(form.storage_of(m).options["algo"]) for m in coded(checkpoint)}
        assert len(kinds) == 7


# ---------------------------------------------------------------- broken files

Change = Callable[[dict[str, RawTensor]], object]


def _with(leaf: str, **fields: Any) -> Change:
    return lambda parts: parts.update({leaf: replace(parts[leaf], **fields)})


def _filled(leaf: str, tensor: torch.Tensor) -> Change:
    return lambda parts: parts.update({leaf: raw(leaf, tensor)})


NAN = float("nan")
BROKEN: list[tuple[str, str, Change, str]] = [
    ("fp8/block", "q_proj", lambda parts: parts.pop("weight_scale_inv"), "missing-weight-scale-inv"),
    ("fp8/block", "q_proj", lambda parts: parts.pop("weight"), "missing-weight"),
    ("fp8/block", "q_proj", _with("weight", dtype="F16"), "wrong-dtype"),
    ("fp8/block", "q_proj", _with("weight_scale_inv", dtype="I32"), "wrong-dtype"),
    ("fp8/block", "q_proj", _with("weight", shape=(4096,)), "wrong-shape"),
    ("fp8/block", "q_proj", _filled("weight_scale_inv", torch.ones(3, 5)), "wrong-shape"),
    ("fp8/block", "q_proj", _filled("weight_scale_inv", torch.full((1, 1), NAN)), "not-finite"),
    ("fp8/block", "q_proj", _filled("weight_scale_inv", torch.full((1, 1), float("inf"))), "not-finite"),
    ("fp8/mxfp8", "q_proj", _filled("weight_scale_inv", torch.full((32, 1), 255, dtype=torch.uint8)), "not-finite"),
    ("fp8/experts-fp4", "experts.0.gate_proj", _filled("scale", torch.ones(7, 2)), "wrong-shape"),
    ("fbgemm_fp8/rows", "q_proj", lambda parts: parts.pop("weight_scale"), "missing-weight-scale"),
    ("fbgemm_fp8/rows", "q_proj", _with("weight", dtype="I8"), "wrong-dtype"),
    ("fbgemm_fp8/rows", "q_proj", _filled("weight_scale", torch.ones(31, 1)), "wrong-shape"),
    ("fbgemm_fp8/rows", "q_proj", _filled("weight_scale", torch.full((32, 1), NAN)), "not-finite"),
    ("modelopt/nvfp4", "q_proj", lambda parts: parts.pop("weight_scale_2"), "missing-weight-scale-2"),
    ("modelopt/nvfp4", "q_proj", lambda parts: parts.pop("weight_scale"), "missing-weight-scale"),
    ("modelopt/nvfp4", "q_proj", _with("weight_scale_2", dtype="BF16"), "wrong-dtype"),
    ("modelopt/nvfp4", "q_proj", _filled("weight_scale", torch.ones(64, 3).to(torch.float8_e4m3fn)), "wrong-shape"),
    ("modelopt/nvfp4", "q_proj", _filled("weight_scale", torch.full((64, 4), NAN).to(torch.float8_e4m3fn)), "not-finite"),
    ("modelopt/nvfp4", "q_proj", _filled("weight_scale_2", torch.tensor(NAN)), "not-finite"),
    ("modelopt/mixed", "up_proj", _with("pre_quant_scale", dtype="U8"), "wrong-dtype"),
    ("modelopt/mixed", "up_proj", _filled("pre_quant_scale", torch.ones(5)), "wrong-shape"),
    ("modelopt/mixed", "down_proj", _filled("weight_scale", torch.ones(32, 7)), "wrong-shape"),
    ("modelopt/mixed", "k_proj", _filled("weight_scale", torch.ones(9)), "wrong-shape"),
    ("modelopt/fp8", "q_proj", lambda parts: parts.update({"svdquant_lora_a": parts["weight"]}), "svdquant"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "name", "change", "code"), BROKEN, ids=[f"{p}-{n}-{c}-{i}" for i, (p, n, _, c) in enumerate(BROKEN)])
def test_broken_parts_are_refused(path: str, name: str, change: Change, code: str) -> None:
    form, checkpoint = opened(path)
    with checkpoint:
        found = next(m for m in coded(checkpoint) if m.name.endswith(name))
        parts = dict(found.parts)
        change(parts)
        with pytest.raises(QFormatError) as caught:
            broken = replace(found, parts=parts, memo={})
            form.scheme(broken)
            form.read(broken)
        assert caught.value.code == code and isinstance(caught.value, (BadFile, Unsupported))
        if code.startswith("missing"):
            assert form.holds_codes(parts)


@pytest.mark.parametrize("value", [[128], [0, 128], "128x128", [1.5, 2], [128, 128, 1], True])
def test_a_block_size_that_is_none(value: object) -> None:
    with pytest.raises(BadFile) as caught:
        registry.detect({"quant_method": "fp8", "weight_block_size": value}, [])
    assert caught.value.code == "config-value"


def test_a_norm_with_a_scale_of_its_own_is_no_weight() -> None:
    """Inkling 2's ``q_l2_clip.scale`` is no scale of codes."""
    form = registry.format_module("fp8")
    assert not form.holds_codes({"scale": raw("scale", torch.ones(1))})
    assert not form.holds_codes({"scale": raw("scale", torch.ones(1)), "weight": raw("weight", torch.ones(4))})
    assert form.holds_codes({"weight": raw("weight", torch.zeros(2, 2, dtype=torch.uint8).view(torch.float8_e4m3fn))})


# ---------------------------------------------------------------- targets

TARGETS = [
    "fp8", "fp8:fp8,block=tensor", "fp8:fp8,block=64x32", "fp8:fp8,scale=ue8m0", "fp8:mxfp8", "fp8:fp4", "fbgemm_fp8",
    "modelopt:fp8", "modelopt:fp8,scale=tensor", "modelopt:fp8,scale=block", "modelopt:mxfp8", "modelopt:mxfp4", "modelopt:nvfp4",
    "modelopt:int4,group=32", "modelopt:int8",
]  # fmt: skip


@pytest.mark.parametrize("text", TARGETS)
@pytest.mark.parametrize("shape", [(192, 256), (130, 96)])
def test_rounded_written_and_read_again(text: str, shape: tuple[int, int]) -> None:
    """What the quantizer makes of a storage is in its form; written and read under the written config it is the same tensor."""
    target = registry.parse_target(text)
    form = registry.format_module(target.format)
    storage = form.storages(target, Scheme(shape, Integer(16)))[0]
    tensor = rtn(torch.randn(shape, generator=torch.Generator().manual_seed(1)), storage)
    assert form.can_store(storage, tensor.scheme), (storage, tensor.scheme)
    config = form.config_out(target, {"m": storage}, ["lm_head"], None)
    match = registry.detect(json.loads(json.dumps(config)), ["m.weight"])
    assert match.format == form.NAME
    again = form.read(Module("m", written(form, storage, tensor, shape), Match(match.format, match.config)))
    assert torch.equal(again.dequantize(torch.float64), tensor.dequantize(torch.float64)) and torch.equal(again.codes, tensor.codes)
    assert form.storage_of(Module("m", written(form, storage, tensor, shape), match)).type == storage.type


@pytest.mark.parametrize(
    "text", ["fp8:fp8,block=0x3", "fp8:fp8,block=big", "fp8:fp8,scale=int", "fp8:mxfp8,block=128x128", "modelopt:fp8,scale=row"]
)
def test_options_that_mean_nothing(text: str) -> None:
    target = registry.parse_target(text)
    with pytest.raises(UsageError):
        registry.format_module(target.format).storages(target, Scheme((64, 64), Integer(16)))
