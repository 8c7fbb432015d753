"""EETQ, BitNet, MLX, AQLM and transformers' gemma method: the owners' values, bytes by hand, there and back, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rationals import round_fraction

from qformats import registry, rewrite
from qformats.checkpoint import open_checkpoint
from qformats.containers.raw import RawTensor
from qformats.containers.safetensors import open_safetensors
from qformats.errors import BadFile, QFormatError, Unsupported, UsageError
from qformats.formats import bitnet, eetq, mlx
from qformats.formats.dense import read_float
from qformats.formats.protocol import Match, Module, Target
from qformats.quantize import rtn
from qformats.real import round_once
from qformats.reencode import finish, fit
from qformats.scheme import Float, Integer, Learned, ParamSpec, Scheme, Storage, Tile, whole
from qformats.tensor import Param, QuantizedTensor, constant

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures"
FORMATS = ("eetq", "bitnet", "mlx", "aqlm", "gemma")
CASES = [f"{form}/{path.name}" for form in FORMATS for path in sorted((FIXTURES / form).iterdir())]
LIKE = {"mlx": "mlx", "aqlm": "aqlm"}  # what rounds in its own dtype; the others' values are exact in float32, or rounded once


def modules(case: str) -> dict[str, Module]:
    with open_checkpoint(FIXTURES / case) as checkpoint:
        assert checkpoint.format == case.split("/")[0]
        config, names = checkpoint.match.config, list(checkpoint.raw)
        claims = [row.name for row in registry.ROWS if registry.format_module(row.name).detect(config, names) is not None]
        assert claims == [checkpoint.format]
        return {name: held(m) for name, m in checkpoint.modules.items() if checkpoint.is_quantized(name)}


def held(module: Module) -> Module:
    parts = {leaf: memory(raw, raw.dtype, raw.shape, raw.read()) for leaf, raw in module.parts.items()}
    return Module(module.name, parts, module.match)


def memory(like: RawTensor | str, dtype: str, shape: tuple[int, ...], data: bytes) -> RawTensor:
    from qformats.containers.source import MemorySource

    name = like if isinstance(like, str) else like.name
    return RawTensor(name, dtype, shape, MemorySource(data, "memory"), 0, len(data))


def made(module: Module, storage: Storage, tensor: QuantizedTensor, step: int) -> dict[str, RawTensor]:
    """The parts that ``write`` makes of ``tensor`` in ranges of ``step`` rows."""
    form = registry.format_module(module.match.format)
    parts = {}
    step = tensor.shape[0] if storage.together else step
    pieces = []
    for start in range(0, tensor.shape[0], step):
        stop = min(tensor.shape[0], start + step)
        rows = form.read(module, start, stop) if module.parts else rewrite.select_rows(tensor, torch.arange(start, stop))
        pieces += form.write(storage, rows, start, tensor.shape)
    for leaf, info in form.layout(storage, tensor.shape).items():
        mine = [p if p.array.ndim == 2 else replace(p, array=p.array.reshape(1, -1)) for p in pieces if p.leaf == leaf]
        plane = np.zeros((max(p.row + p.array.shape[0] for p in mine), max(p.column + p.array.shape[1] for p in mine)), mine[0].array.dtype)
        for p in mine:
            plane[p.row : p.row + p.array.shape[0], p.column : p.column + p.array.shape[1]] = p.array
        parts[leaf] = memory(f"m.{leaf}", info.dtype, info.shape, plane.tobytes())
        assert parts[leaf].nbytes == module.parts[leaf].nbytes if leaf in module.parts else True
    return parts


def unvalued(scheme: Scheme) -> Scheme:
    """Without the value of a scale of one number, which no header tells."""
    return replace(scheme, scales=tuple(replace(s, constant=None) for s in scheme.scales))


@pytest.mark.parametrize("case", CASES)
def test_values_are_the_owners(case: str) -> None:
    found, oracle = modules(case), open_safetensors(FIXTURES / case / "oracle.safetensors").tensors
    assert len(oracle) > 0
    for name, raw in oracle.items():
        module, wanted = found[name.removesuffix(".weight")], read_float(raw)
        form = registry.format_module(module.match.format)
        tensor = form.read(module)
        assert unvalued(form.scheme(module)) == unvalued(tensor.scheme)
        like = LIKE.get(module.match.format) if module.match.dialect != "metal" else None
        gemma = module.match.format == "gemma"  # both sides rounded to the model's dtype, and their product
        values = tensor.evaluate_in(wanted.dtype) if gemma else tensor.dequantize(wanted.dtype, like=like)
        assert torch.equal(values, wanted), name
        rows = form.read(module, 3, tensor.shape[0] - 5)
        assert torch.equal(rows.dequantize(torch.float64), tensor.dequantize(torch.float64)[3:-5])
        blank = form.read(module, 1, 2, codes=False)
        assert blank.shape == (1, tensor.shape[1]) and (case.startswith("aqlm") or not bool(blank.codes.any()))


@pytest.mark.parametrize("case", CASES)
def test_written_again_the_bytes_are_the_same(case: str) -> None:
    for name, module in modules(case).items():
        form = registry.format_module(module.match.format)
        storage, tensor = form.storage_of(module), form.read(module)
        assert form.can_store(storage, tensor.scheme), form.can_store(storage, tensor.scheme)
        parts = made(module, storage, tensor, 16)
        assert {leaf: raw.read() for leaf, raw in parts.items()} == {leaf: module.parts[leaf].read() for leaf in parts}, name
        assert {leaf: (raw.dtype, raw.shape) for leaf, raw in parts.items()} == {
            leaf: (module.parts[leaf].dtype, module.parts[leaf].shape) for leaf in parts
        }
        assert {"bias", *parts} >= set(module.parts) - getattr(form, "EXTRAS", frozenset())


def written(form: Any, target: str, shape: tuple[int, int] = (64, 128)) -> tuple[QuantizedTensor, Module]:
    """New codes of random weights, and the module they become."""
    parsed = registry.parse_target(target)
    storage = form.storages(parsed, Scheme(shape, Integer(16, signed=True)))[0]
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.05
    tensor = rtn(weights, storage)
    config = form.config_out(parsed, {"m": storage}, [], None)
    module = Module("m", {}, Match(form.NAME, config))
    module = replace(module, parts=made(module, storage, tensor, 64))
    match = registry.detect(config, [f"m.{leaf}" for leaf in module.parts])
    return tensor, replace(module, match=match)


NEW = ["eetq:int8", "bitnet:ternary", "bitnet:ternary,class=bitlinear"] + [
    f"mlx:int{bits},group={group}{dtype}" for bits, group, dtype in ((2, 32, ""), (3, 64, ""), (4, 64, ""), (5, 32, ",dtype=bf16"),
                                                                   (6, 128, ""), (8, 64, ",dtype=f32"))
] + ["mlx:int4,metal,group=16", "mlx:nvfp4", "mlx:mxfp8", "mlx:mxfp4", "gemma:int2", "gemma:int4", "gemma:int8"]  # fmt: skip


@pytest.mark.parametrize("target", NEW)
def test_new_codes_are_read_again(target: str) -> None:
    form = registry.format_module(target.split(":")[0])
    tensor, module = written(form, target)
    again = form.read(module)
    assert torch.equal(again.codes, tensor.codes) and torch.equal(again.dequantize(torch.float64), tensor.dequantize(torch.float64))


# ---------------------------------------------------------------- bytes by hand


def test_eetq_takes_even_bytes_for_the_first_eight_inputs() -> None:
    stored = np.arange(128, dtype=np.uint8).reshape(2, 64).view(np.int8)  # two outputs, one tile
    codes = eetq.unpack(stored)
    assert codes[0, :16].tolist() == [b - 128 for b in (0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)]
    assert codes[1, 0] == 64 - 128
    assert np.array_equal(eetq.pack(codes), stored)


def test_eetq_loops_equal_their_definitions() -> None:
    codes = np.random.default_rng(1).integers(-128, 128, (64, 192)).astype(np.int8)
    assert np.array_equal(eetq.pack(codes), eetq.pack_definition(codes))
    assert np.array_equal(eetq.unpack(codes), eetq.unpack_definition(codes))


def test_eetq_of_sm70_is_the_matrix_by_rows() -> None:
    codes = np.array([[1, 2, 3, 4, 5, 6, 7, 8]], np.int8).repeat(3, 0)  # (K, N): all inputs alike
    data = (codes[:, [0, 2, 1, 3, 4, 6, 5, 7]].view(np.uint8) ^ 0x80).tobytes()
    parts = {
        "weight": memory("m.weight", "I8", (3, 8), data),
        "weight_scales": memory("m.weight_scales", "F16", (8,), np.ones(8, np.float16).tobytes()),
    }
    config = {"quant_method": "eetq", "weights": "int8"}
    module = Module("m", parts, Match("eetq", config, options={"layout": "sm70"}))
    tensor = eetq.read(module)
    assert tensor.codes.tolist() == codes.T.tolist()
    assert eetq.read(module, 3, 6).codes.tolist() == codes.T[3:6].tolist()
    assert made(module, eetq.storage_of(module), tensor, 4)["weight"].read() == data
    with pytest.raises(Unsupported, match="layout=sm70"):
        eetq.scheme(replace(module, match=Match("eetq", config)))


def test_bitnet_slabs_of_a_byte() -> None:
    def values(**config: str) -> list[float]:
        parts = {
            "weight": memory("m.weight", "U8", (1, 1), b"\xa1"),
            "weight_scale": memory("m.weight_scale", "F32", (1,), np.float32(4).tobytes()),
        }
        match = bitnet.detect({"quant_method": "bitnet", **config}, [])
        assert match is not None
        return bitnet.read(Module("m", parts, match)).dequantize(torch.float32).flatten().tolist()

    assert values() == values(linear_class="bitlinear") == [0, -0.25, 0.25, 0.25]
    assert values(linear_class="autobitlinear") == [0, -4, 4, 4]


def test_bitnet_codes_that_transformers_saved_as_floats() -> None:
    module = next(iter(modules("bitnet/autobitlinear").values()))
    tensor = bitnet.read(module)
    floats = (tensor.codes.to(torch.float32) - 1).to(torch.float16)
    parts = {**module.parts, "weight": memory("m.weight", "F16", tuple(floats.shape), floats.numpy().tobytes())}
    again = replace(module, parts=parts)
    assert torch.equal(bitnet.read(again, 2, 9).codes, tensor.codes[2:9])
    with pytest.raises(Unsupported) as caught:
        bitnet.storage_of(again)
    assert caught.value.code == "bitnet-floats"
    broken = floats.clone()
    broken[1, 1] = 0.5
    with pytest.raises(BadFile) as found:
        bitnet.read(replace(module, parts={**parts, "weight": memory("m.weight", "F16", tuple(floats.shape), broken.numpy().tobytes())}))
    assert found.value.code == "codes-range"


def test_bitnet_rounds_as_the_paper_says() -> None:
    storage = bitnet.storages(Target("bitnet", None, {"class": "autobitlinear"}), Scheme((4, 8), Integer(2)))[0]
    weights = torch.tensor([[1.0, -1.0, 0.5, -0.5, 0.25, -0.25, 0.0, 0.5]] * 4)
    tensor = rtn(weights, storage)
    assert float(tensor.scales[0].values) == 0.5  # type: ignore[arg-type]
    assert (tensor.codes.to(torch.int8) - 1).tolist() == [[1, -1, 1, -1, 0, 0, 0, 1]] * 4


def test_mlx_first_code_in_the_lowest_bits() -> None:
    parts = {
        "weight": memory("m.weight", "U32", (1, 4), np.array([0x87654321] + [0] * 3, "<u4").tobytes()),
        "scales": memory("m.scales", "F16", (1, 1), np.float16(0.5).tobytes()),
        "biases": memory("m.biases", "F16", (1, 1), np.float16(-1).tobytes()),
    }
    module = Module("m", parts, Match("mlx", {"group_size": 32, "bits": 4}))
    assert mlx.read(module).dequantize()[0, :8].tolist() == [-0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3]


def test_mlx_config_says_what_most_layers_have_and_names_the_others() -> None:
    four, eight = (mlx.storages(registry.parse_target(f"mlx:int{bits},group=32"), Scheme((64, 64), Integer(4)))[0] for bits in (4, 8))
    made = mlx.config_out(Target("mlx"), {"a": four, "b": four, "c": eight}, [], None)
    assert made == {"group_size": 32, "bits": 4, "mode": "affine", "c": {"group_size": 32, "bits": 8, "mode": "affine"}}
    assert mlx.config_out(Target("mlx"), {"a": four}, [], {"group_size": 32, "bits": 4, "x": 1}) == {"group_size": 32, "bits": 4, "x": 1}
    assert mlx.config_out(Target("mlx"), {"a": eight}, [], {"group_size": 32, "bits": 4})["bits"] == 8


# ---------------------------------------------------------------- refusals


def without(leaf: str) -> Callable[[Module], Module]:
    return lambda m: replace(m, parts={k: v for k, v in m.parts.items() if k != leaf})


def changed(leaf: str, **what: Any) -> Callable[[Module], Module]:
    return lambda m: replace(m, parts={**m.parts, leaf: replace(m.parts[leaf], **what)})


def filled(leaf: str, value: float) -> Callable[[Module], Module]:
    def change(m: Module) -> Module:
        raw = m.parts[leaf]
        word = {"F16": np.float16, "F32": np.float32, "U8": np.uint8}.get(raw.dtype)
        size = int(np.prod(raw.shape))
        data = (np.full(size, value, np.float32).view(np.uint32) >> 16).astype(np.uint16) if word is None else np.full(size, value, word)
        return replace(m, parts={**m.parts, leaf: memory(raw, raw.dtype, raw.shape, data.tobytes())})

    return change


def says(**config: Any) -> Callable[[Module], Module]:
    return lambda m: replace(m, match=replace(m.match, config={**m.match.config, **config}))


NAN, INF = float("nan"), float("inf")
REFUSED: list[tuple[str, Callable[[Module], Module], str]] = [
    ("eetq/int8", without("weight_scales"), "missing-weight-scales"),
    ("eetq/int8", without("weight"), "missing-weight"),
    ("eetq/int8", changed("weight", dtype="U8"), "wrong-dtype"),
    ("eetq/int8", changed("weight_scales", dtype="F32"), "wrong-dtype"),
    ("eetq/int8", changed("weight_scales", shape=(32,)), "wrong-shape"),
    ("eetq/int8", changed("weight", shape=(4096,)), "wrong-shape"),
    ("eetq/int8", changed("weight", nbytes=7), "size"),
    ("eetq/int8", filled("weight_scales", NAN), "not-finite"),
    ("eetq/int8", filled("weight_scales", INF), "not-finite"),
    ("bitnet/bitlinear", without("weight"), "missing-weight"),
    ("bitnet/bitlinear", changed("weight", dtype="I8"), "wrong-dtype"),
    ("bitnet/bitlinear", changed("weight", dtype="F32", shape=(1, 1), nbytes=4), "wrong-dtype"),
    ("bitnet/bitlinear", changed("weight_scale", shape=(2,)), "wrong-shape"),
    ("bitnet/bitlinear", changed("weight_scale", dtype="F64"), "wrong-dtype"),
    ("bitnet/bitlinear", filled("weight_scale", INF), "not-finite"),
    ("bitnet/bitlinear", filled("weight_scale", 0), "not-finite"),
    ("bitnet/autobitlinear", says(quantization_mode="online"), "config-disagrees"),
    ("mlx/4b-g64", without("biases"), "missing-biases"),
    ("mlx/4b-g64", without("scales"), "missing-scales"),
    ("mlx/4b-g64", changed("weight", dtype="I32"), "wrong-dtype"),
    ("mlx/4b-g64", changed("scales", dtype="BF16"), "wrong-dtype"),
    ("mlx/4b-g64", changed("scales", shape=(1, 64)), "wrong-shape"),
    ("mlx/4b-g64", changed("weight", shape=(64, 7), nbytes=1792), "wrong-shape"),
    ("mlx/4b-g64", says(bits=7), "config-value"),
    ("mlx/4b-g64", says(bits=8), "wrong-shape"),
    ("mlx/4b-g64", says(group_size=0.5), "config-value"),
    ("mlx/4b-g64", says(mode="q4k"), "mlx-mode"),
    ("mlx/4b-g64", says(mode="mxfp4"), "config-value"),
    ("mlx/4b-g64", filled("scales", NAN), "not-finite"),
    ("mlx/4b-g64", filled("biases", INF), "not-finite"),
    ("mlx/metal-8b-g32", without("qbiases"), "missing-qbiases"),
    ("aqlm/2x8", without("codebooks"), "missing-codebooks"),
    ("aqlm/2x8", without("codes"), "missing-codes"),
    ("aqlm/2x8", without("scales"), "missing-scales"),
    ("aqlm/2x8", changed("codes", dtype="I16"), "wrong-dtype"),
    ("aqlm/2x8", changed("codes", shape=(32, 2, 4)), "wrong-shape"),
    ("aqlm/2x8", changed("codebooks", shape=(2, 255, 1, 8), nbytes=8160), "wrong-shape"),
    ("aqlm/2x8", changed("scales", dtype="F32"), "wrong-dtype"),
    ("aqlm/2x8", changed("scales", shape=(32, 1)), "wrong-shape"),
    ("aqlm/2x8", says(num_codebooks=1), "config-disagrees"),
    ("gemma/mixed", without("weight"), "missing-weight"),
    ("gemma/mixed", changed("weight", dtype="I8"), "wrong-dtype"),
    ("gemma/mixed", changed("weight_scale", shape=(16, 2)), "wrong-shape"),
    ("gemma/mixed", says(module_quant_configs={"q_proj": {"num_bits": 3}}), "config-value"),
    ("gemma/mixed", says(module_quant_configs={"(": {"num_bits": 4}}), "config-value"),
    ("gemma/mixed", filled("weight_scale", NAN), "not-finite"),
    ("aqlm/2x8", filled("scales", NAN), "not-finite"),
    ("aqlm/2x8", filled("codebooks", INF), "not-finite"),
]


@pytest.mark.parametrize(("case", "change", "code"), REFUSED)
def test_broken_modules(case: str, change: Callable[[Module], Module], code: str) -> None:
    module = change(next(m for name, m in modules(case).items() if name.endswith("q_proj")))
    form = registry.format_module(module.match.format)
    with pytest.raises(QFormatError) as caught:
        form.scheme(module)
        form.read(module)
    assert caught.value.code == code, caught.value


def test_float_scales_that_are_nan() -> None:
    for name, leaf in (("gate_proj", 0xFF), ("down_proj", 0x7F)):
        module = filled("scales", leaf)(next(m for n, m in modules("mlx/mixed-bf16").items() if n.endswith(name)))
        with pytest.raises(BadFile) as caught:
            mlx.read(module)
        assert caught.value.code == "not-finite"


@pytest.mark.parametrize(
    ("target", "code"),
    [("eetq:int8,layout=sm99", "option"), ("eetq:int8,leaf=w", "option"), ("bitnet:ternary,class=linear", "option"),
     ("mlx:int4,group=48", "option"), ("mlx:int4,dtype=f8", "option"), ("mlx:int3,metal", "type")],
)  # fmt: skip
def test_targets_that_are_refused(target: str, code: str) -> None:
    parsed = registry.parse_target(target)
    with pytest.raises(UsageError) as caught:
        registry.format_module(parsed.format).storages(parsed, Scheme((64, 64), Integer(4)))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("config", "code"),
    [({"quant_method": "eetq", "weights": "int4"}, "eetq-weights"), ({"quant_method": "bitnet", "linear_class": "linear"}, "config-value")],
)
def test_configs_that_are_refused(config: dict[str, Any], code: str) -> None:
    with pytest.raises(QFormatError) as caught:
        registry.detect(config, [])
    assert caught.value.code == code


@pytest.mark.parametrize("method", sorted(registry.REFUSED))
def test_known_methods_are_refused_by_name(method: str) -> None:
    with pytest.raises(Unsupported) as caught:
        registry.detect({"quant_method": method}, ["m.weight"])
    assert caught.value.code == "quant-method" and registry.REFUSED[method] in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("config", "form"),
    [({"quant_method": "auto_round", "bits": 4}, "gptq"), ({"quant_method": "autoround", "packing_format": "auto_round:awq"}, "awq"),
     ({"quant_method": "modelopt_mxfp8", "quant_algo": "MXFP8"}, "modelopt"), ({"method": "gptq", "format": "gptq_v2"}, "gptq"),
     ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "nvfp4"}}, "modelopt"),
     ({"config_groups": {}, "format": "pack-quantized"}, "compressed-tensors"), ({"load_in_8bit": True}, "bitsandbytes"),
     ({"group_size": 64, "bits": 4}, "mlx"), ({"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "awq"),
     ({"bits": 4, "group_size": 128, "desc_act": False, "damp_percent": 0.01, "model_name_or_path": None}, "gptq")],
)  # fmt: skip
def test_spellings_of_published_configs(config: dict[str, Any], form: str) -> None:
    assert registry.detect(config, ["m.scales", "m.weight"]).format == form


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(Unsupported) as caught:
        registry.detect({"quant_method": "magic"}, ["m.weight"])
    assert caught.value.code == "quant-method" and "aqlm" in str(caught.value.hint) and "gptq" in str(caught.value.hint)


# ---------------------------------------------------------------- additive codebooks


@pytest.mark.parametrize(("high", "books", "bits"), [(1, 2, 8), (2, 3, 6), (1, 1, 12), (1, 5, 4)])
def test_sums_of_entries_are_rounded_once(high: int, books: int, bits: int) -> None:
    generator, entries, shape = torch.Generator().manual_seed(bits), 1 << bits, (16, 64)
    codes = torch.randint(-entries // 2, entries // 2, (shape[0] // high, 8, books), generator=generator)
    spread = torch.exp2(torch.randint(-14, 9, (books, entries, high, 8), generator=generator).float())
    book = (torch.randn((books, entries, high, 8), generator=generator) * spread).half()
    scale = (torch.rand((shape[0] // high, 1), generator=generator) * 0.01).half()
    word = torch.int8 if bits <= 8 else torch.int16
    block = Tile((high, shape[1]))
    tensor = QuantizedTensor(shape, codes.to(word), Learned(entries, high, 8, books), (Param(scale, block),), codebook=book)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(tensor.dequantize(dtype), round_once(tensor.real(), dtype))
    rows = rewrite.select_rows(tensor, torch.tensor([3, 0, 15]))
    assert torch.equal(rows.dequantize(torch.float64), tensor.dequantize(torch.float64)[[3, 0, 15]])


def test_codes_beyond_their_entries() -> None:
    module = next(m for name, m in modules("aqlm/1x10-o2").items() if name.endswith("q_proj"))
    raw = module.parts["codes"]
    data = np.full(raw.shape, 512, np.int16)
    data[0, 0, 0] = -1025
    parts = {**module.parts, "codes": memory(raw, "I16", raw.shape, data.tobytes())}
    tensor = registry.format_module("aqlm").read(replace(module, parts=parts))
    for read in (tensor.dequantize, lambda: tensor.dequantize(torch.float16), lambda: tensor.dequantize(torch.float16, like="aqlm")):
        with pytest.raises(BadFile) as caught:
            read()
        assert caught.value.code == "codes-range"


# ---------------------------------------------------------------- from format to format


def stored(case: str, target: str, name: str = "q_proj") -> tuple[str, QuantizedTensor, QuantizedTensor]:
    """How a weight of a fixture is kept in the first storage of ``target`` that takes it, with the weight before and after."""
    module = next(m for n, m in modules(case).items() if n.endswith(name))
    tensor, parsed = registry.format_module(module.match.format).read(module), registry.parse_target(target)
    form = registry.format_module(parsed.format)
    refusals = []
    for storage in form.storages(parsed, tensor.scheme):
        try:
            decision = fit(tensor, storage, own=partial(form.can_store, storage))
            return decision.kind, tensor, finish(tensor, decision)
        except rewrite.Refused as refusal:
            refusals.append(str(refusal))
    raise AssertionError(refusals)


@pytest.mark.parametrize("target", ["gguf:tq1_0", "gguf:tq2_0", "gptq:int2", "mlx:int2,dtype=f16", "bitnet:ternary,class=autobitlinear"])
@pytest.mark.parametrize("divisor", [3.0, 1.3, 2.0])
def test_a_scale_that_divides_is_rounded_once_where_it_multiplies(target: str, divisor: float) -> None:
    shape, parsed = (256, 256), registry.parse_target(target)
    codes = torch.randint(0, 3, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    held = Param(torch.tensor([[divisor]], dtype=torch.bfloat16), whole(shape), inverse=True)
    tensor = QuantizedTensor(shape, codes, Integer(2), (held,), constant(1, shape))
    form = registry.format_module(parsed.format)
    storage = next(s for s in form.storages(parsed, tensor.scheme) if target.startswith("bitnet") or "float16" in s.scale_dtypes)
    own = partial(form.can_store, storage)
    decision = fit(tensor, storage, own=own, rounding=divisor != 2.0)
    made, dtype = finish(tensor, decision), getattr(torch, storage.scale_dtypes[0])
    wanted = round_fraction(1 / Fraction(float(held.values)), dtype)  # type: ignore[arg-type]
    assert decision.kind == ("exact" if divisor == 2.0 else "codes-exact")
    assert torch.equal(made.dequantize(torch.float64), (codes.to(torch.float64) - 1) * float(wanted))
    if divisor != 2.0:
        with pytest.raises(rewrite.Refused, match="rounds"):
            fit(tensor, storage, own=own)


@pytest.mark.parametrize(
    ("case", "target"),
    [("eetq/int8", "gguf:q8_0"), ("eetq/int8", "gptq:int8"), ("eetq/int8", "torchao:int8"),
     ("eetq/int8", "compressed-tensors:int8,channel"),
     ("eetq/int8", "mlx:int8"), ("mlx/4b-g64", "gguf:q4_1"), ("bitnet/autobitlinear", "gptq:int2"),
     ("bitnet/autobitlinear", "mlx:int2"), ("bitnet/autobitlinear", "compressed-tensors:int2"), ("bitnet/bitlinear", "bitnet:ternary")],
)  # fmt: skip
def test_exact_ways(case: str, target: str) -> None:
    kind, before, after = stored(case, target)
    assert kind == "exact"
    assert torch.equal(before.dequantize(torch.float64), after.dequantize(torch.float64))


@pytest.mark.parametrize("words", [("f16", "float16"), ("bf16", "bfloat16"), ("f32", "float32")])
@pytest.mark.parametrize("start", ["mlx:int4,dtype=", "hqq:int4,dtype=", "quanto:qint4,dtype=", "compressed-tensors:int4,scale=",
                                   "bitsandbytes:nf4,dtype=", "fp8:fp8,scale="])  # fmt: skip
def test_a_dtype_has_two_words_in_every_format(start: str, words: tuple[str, str]) -> None:
    """Torch's and GGUF's, which mean the same."""
    if start.startswith("fp8") and words[0] != "f32":
        pytest.skip("FP8's scales are float32 or exponents")
    scheme = Scheme((64, 128), Float("e4m3fn") if start.startswith("fp8") else Integer(8, True))
    found = []
    for word in words:
        target = registry.parse_target(start + word)
        found.append(registry.format_module(target.format).storages(target, scheme))
    assert found[0] == found[1] and found[0]
    with pytest.raises(UsageError):
        target = registry.parse_target(f"{start}f12")
        registry.format_module(target.format).storages(target, scheme)


def test_mlx_computes_in_the_model_s_dtype() -> None:
    """``quantized_matmul`` of mlx 0.32.4 gives float32 where inputs and scales differ: new scales follow the model, kept ones may not."""
    tile = Tile((1, 32))
    scheme = Scheme((64, 128), Integer(4), (ParamSpec("float16", tile),))
    for dtype in ("float16", "bfloat16", "float32"):
        found = [s.scale_dtypes[0] for s in mlx.storages(Target("mlx", "int4", {}, dtype), scheme)]
        assert found[0] == dtype and "float16" in found
        assert {s.scale_dtypes for s in mlx.storages(Target("mlx", "int4", {"metal": ""}, dtype), scheme)} == {(dtype,)}
    assert {s.scale_dtypes for s in mlx.storages(Target("mlx", "int4", {"dtype": "f16"}, "bfloat16"), scheme)} == {("float16",)}
