"""torchao fixtures: values equal torchao's, written again they have the same bytes, metadata and config tell what is there."""

from __future__ import annotations

import json
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qformats.checkpoint import Checkpoint, open_checkpoint
from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, QFormatError, Unsupported, UsageError
from qformats.formats import torchao
from qformats.formats.protocol import Match, Module, Target
from qformats.formats.torchao.tiles import pack_tiles, swizzle, unpack_tiles, unswizzle
from qformats.scheme import Float, Integer, ParamSpec, Scheme, Storage, Tile

torch.set_num_threads(1)
FIXTURES = Path(__file__).parents[3] / "fixtures" / "torchao"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if (path / "model.safetensors").exists())


def opened(name: str) -> Checkpoint:
    return open_checkpoint(FIXTURES / name)


def quantized(checkpoint: Checkpoint) -> dict[str, Module]:
    return {name: module for name, module in checkpoint.modules.items() if checkpoint.is_quantized(name)}


def module_of(name: str, fixture: str = "kinds") -> Module:
    return opened(fixture).modules[name]


def written(storage: Storage, module: Module, shape: tuple[int, ...], step: int) -> dict[str, bytes]:
    """The parts that ``write`` makes of what ``read`` gives, in row ranges of ``step`` (or what one scale needs)."""
    layout = torchao.layout(storage, shape)
    planes = {leaf: np.zeros(0) for leaf in layout}
    rows = int(np.prod(shape[:-1]))
    step = lcm(step, storage.row_unit(shape) or rows)
    for start in range(0, rows, step):
        part = torchao.read(module, start, min(rows, start + step))
        for piece in torchao.write(storage, part, start, shape):
            if not planes[piece.leaf].size:
                counts = layout[piece.leaf].shape
                planes[piece.leaf] = np.zeros((int(np.prod(counts[:-1], dtype=int)), (1, *counts)[-1]), piece.array.dtype)
            height, width = piece.array.shape
            planes[piece.leaf][piece.row : piece.row + height, piece.column : piece.column + width] = piece.array
    return {leaf: plane.tobytes() for leaf, plane in planes.items()}


@pytest.mark.parametrize("name", NAMES)
def test_values_equal_torchao(name: str) -> None:
    oracle = load_file(FIXTURES / name / "oracle.safetensors")
    with opened(name) as checkpoint:
        found = quantized(checkpoint)
        assert {torchao_name(module) for module in found} == set(oracle) if name == "kinds" else len(found) == len(oracle)
        for key, expected in oracle.items():
            module = found[key.removesuffix(".weight")]
            tensor = torchao.read(module)
            assert torch.equal(tensor.dequantize(expected.dtype, like="torchao").reshape(expected.shape), expected), key
            scheme = torchao.scheme(module)
            assert scheme.shape == tuple(expected.shape)
            assert [s.dtype for s in scheme.scales] == [s.dtype for s in tensor.scheme.scales]
            assert (scheme.zero_point is None, scheme.offset is None) == (tensor.zero_point is None, tensor.offset is None)


def torchao_name(module: str) -> str:
    return module if module.split(".")[0] in ("experts", "stack") else f"{module}.weight"


@pytest.mark.parametrize("name", NAMES)
def test_any_range_of_rows_is_the_same_rows(name: str) -> None:
    with opened(name) as checkpoint:
        for module in quantized(checkpoint).values():
            whole = torchao.read(module).dequantize(torch.float64)
            for start, stop in ((0, 1), (3, 5), (1, len(whole)), (len(whole) - 3, len(whole))):
                part = torchao.read(module, start, stop)
                assert torch.equal(part.dequantize(torch.float64), whole[start:stop]), (module.name, start, stop)
                blank = torchao.read(module, start, stop, codes=False)
                assert blank.shape == part.shape and blank.scheme == part.scheme
            with pytest.raises(UsageError):
                torchao.read(module, 0, len(whole) + 1)


@pytest.mark.parametrize("name", NAMES)
def test_write_after_read_gives_the_same_bytes(name: str) -> None:
    with opened(name) as checkpoint:
        for key, module in quantized(checkpoint).items():
            if key == "stack.nvfp4":  # a factor for each expert has no storage
                continue
            storage, shape = torchao.storage_of(module), torchao.scheme(module).shape
            stored = {leaf: raw.read() for leaf, raw in module.parts.items() if leaf != "bias"}
            layout = torchao.layout(storage, shape)
            assert {leaf: (i.dtype, i.shape) for leaf, i in layout.items()} == {
                leaf: (module.parts[leaf].dtype, module.parts[leaf].shape) for leaf in stored
            }, key
            if key == "padded":  # what fills up holds random numbers here, torchao's packer would write others
                continue
            assert written(storage, module, shape, 32) == stored, key


def test_what_fills_up_tiles_is_what_torchao_makes_of_zeros() -> None:
    """As ``Int4TilePackedTo4dTensor.from_hp`` of torchao 0.18.0: a padded weight through its tinygemm parameters and codes."""
    n, k, group = 12, 72, 32
    w = torch.zeros((16, 1024), dtype=torch.bfloat16)
    w[:n, :k] = torch.randn((n, k), generator=torch.Generator().manual_seed(3)).bfloat16()
    runs = w.reshape(16, -1, group)
    low, high = runs.amin(-1), runs.amax(-1)
    scale = torch.clamp((high - low) / 15, min=torch.finfo(torch.bfloat16).tiny)
    zero = low + scale * 8
    least = (zero - scale * 8).unsqueeze(-1)
    codes = torch.clamp(torch.round((runs - least) / scale.unsqueeze(-1)), 0, 15).reshape(16, 1024).to(torch.uint8)
    both = torch.stack([scale.reshape(16, -1), zero.reshape(16, -1)], -1).transpose(0, 1).contiguous()
    raw = {"_weight_qdata": ("I32", pack_tiles(codes.numpy(), 8)),
           "_weight_scale_and_zero": ("BF16", both.view(torch.int16).numpy().view("<u2"))}  # fmt: skip
    entry = {"_type": "Int4TilePackedTo4dTensor", "_data": {"block_size": [1, group], "shape": [n, k]},
             "_tensor_data_names": ["qdata", "scale_and_zero"]}  # fmt: skip
    module = made(raw, entry)
    storage = torchao.storage_of(module)
    assert torchao.read(module).shape == (n, k)
    expected = {leaf: part.read() for leaf, part in module.parts.items()}
    assert written(storage, module, (n, k), 32) == expected


def made(parts: dict[str, tuple[str, Any]], entry: Any, name: str = "m") -> Module:
    raws = {leaf: RawTensor.from_array(f"{name}.{leaf}", dtype, array) for leaf, (dtype, array) in parts.items()}
    metadata = {"tensor_names": json.dumps([f"{name}.weight"]), f"{name}.weight": json.dumps(entry)}
    return Module(name, raws, Match("torchao", {}, metadata=metadata))


def test_names_are_split_and_joined() -> None:
    for stored, parts in {
        "model.a._weight_qdata": ("model.a", "_weight_qdata"),
        "model.a._weight_act_quant_scale": ("model.a", "_weight_act_quant_scale"),
        "model.a._weight_scale_and_zero": ("model.a", "_weight_scale_and_zero"),
        "model.experts._gate_up_proj_qdata": ("model.experts.gate_up_proj", "_qdata"),
        "model.experts._down_proj_per_tensor_scale": ("model.experts.down_proj", "_per_tensor_scale"),
        "model.norm.weight": ("model.norm", "weight"),
        "model.norm.scale": ("model.norm", "scale"),
        "alone": ("", "alone"),
    }.items():
        assert torchao.split_name(stored) == parts
        assert torchao.join_name(*parts) == stored


def test_tiles_and_swizzles_are_permutations() -> None:
    rng = np.random.default_rng(0)
    for inner in (2, 4, 8):
        codes = rng.integers(0, 16, (24, 32 * inner), dtype=np.uint8)
        words = pack_tiles(codes, inner)
        assert words.shape == (3, 2, 32, inner // 2) and np.array_equal(unpack_tiles(words), codes)
    for rows, groups in ((128, 4), (130, 9), (5, 1)):
        scales = rng.integers(0, 256, (rows, groups), dtype=np.uint8)
        blocked = swizzle(scales)
        across = -(-groups // 4)
        for r, c in ((0, 0), (rows - 1, groups - 1), (rows // 2, groups // 2)):  # torchao's ``to_blocked``, element by element
            tile = r // 128 * across + c // 4
            assert blocked.reshape(-1)[512 * tile + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] == scales[r, c]
        assert np.array_equal(unswizzle(blocked, groups)[:rows], scales)


def test_activation_factors_are_part_of_the_weight() -> None:
    module = module_of("int8_row")
    factor = np.linspace(0.5, 2, 64).astype("<f4")
    parts = {**module.parts, "_weight_act_pre_scale": RawTensor.from_array("int8_row._weight_act_pre_scale", "F32", factor)}
    entry = json.loads(module.match.metadata["int8_row.weight"])
    entry["_tensor_data_names"].append("act_pre_scale")
    match = replace(module.match, metadata={**module.match.metadata, "int8_row.weight": json.dumps(entry)})
    scaled = Module("int8_row", parts, match)
    exact = torchao.read(module).dequantize(torch.float64) * torch.from_numpy(factor).double()
    assert torch.equal(torchao.read(scaled, 2, 7).dequantize(torch.float64), exact[2:7])
    assert len(torchao.scheme(scaled).scales) == 2 and "column by column" in torchao.module_warnings(scaled)[0]
    dynamic = next(iter(quantized(opened("int8-dynamic")).values()))
    assert "run time" in torchao.module_warnings(dynamic)[0]


# ---------------------------------------------------------------- broken files


def changed(module: Module, parts: dict[str, RawTensor | None] | None = None, **data: Any) -> Module:
    """``module`` with parts replaced or removed and attributes of its entry changed."""
    kept = {**module.parts, **(parts or {})}
    entry = json.loads(module.match.metadata[f"{module.name}.weight"])
    entry["_data"].update(data)
    metadata = {**module.match.metadata, f"{module.name}.weight": json.dumps(entry)}
    return Module(module.name, {k: v for k, v in kept.items() if v is not None}, replace(module.match, metadata=metadata))


@pytest.mark.parametrize("name", ["int8_group", "int1", "fp8_block", "mxfp4", "nvfp4_factor", "int4", "tiles8", "xpu"])
def test_a_missing_part_is_named(name: str) -> None:
    module = module_of(name)
    for leaf in module.parts:
        with pytest.raises(BadFile) as caught:
            torchao.scheme(changed(module, {leaf: None}))
        assert caught.value.code == ("torchao-parts" if len(module.parts) > 1 else "torchao-metadata")


@pytest.mark.parametrize("name", ["int8_group", "int1", "fp8_block", "mxfp4", "nvfp4", "int4", "tiles8", "xpu"])
def test_wrong_dtypes_and_shapes_are_refused(name: str) -> None:
    module = module_of(name)
    for leaf, raw in module.parts.items():
        with pytest.raises(BadFile) as caught:
            torchao.scheme(changed(module, {leaf: replace(raw, dtype="I64")}))
        assert caught.value.code == "wrong-dtype"
        with pytest.raises((BadFile, Unsupported)) as caught2:
            torchao.scheme(changed(module, {leaf: replace(raw, shape=(*raw.shape[:-1], raw.shape[-1] + 1))}))
        assert caught2.value.code in ("wrong-shape", "block-size", "torchao-attribute"), caught2.value


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("int8_group", {"block_size": [1, 24]}, "block-size"),
        ("int8_group", {"block_size": [1, 16]}, "wrong-shape"),
        ("int8_group", {"block_size": [1]}, "torchao-attribute"),
        ("int8_group", {"block_size": [True, 32]}, "torchao-attribute"),
        ("int8_group", {"block_size": [0, 32]}, "torchao-attribute"),
        ("int8_group", {"block_size": "1,32"}, "torchao-attribute"),
        ("int8_group", {"dtype": {"_type": "torch.dtype", "_data": "int64"}}, "torchao-attribute"),
        ("int8_group", {"dtype": 7}, "torchao-attribute"),
        ("int1", {"target_dtype": {"_type": "torch.dtype", "_data": "int9"}}, "torchao-attribute"),
        ("fp8_block", {"block_size": [16, 32]}, "wrong-shape"),
        ("mxfp4", {"block_size": 48}, "block-size"),
        ("mxfp4", {"block_size": 16}, "wrong-shape"),
        ("mxfp4", {"block_size": [32]}, "block-size"),
        ("mxfp4", {"elem_dtype": "fp6_e2m3"}, "wrong-shape"),
        ("mxfp4", {"elem_dtype": "fp5"}, "torchao-attribute"),
        ("mxfp4", {"is_swizzled_scales": True}, "wrong-shape"),
        ("mxfp4_swizzled", {"is_swizzled_scales": False}, "wrong-shape"),
        ("mxfp4", {"is_swizzled_scales": 1}, "torchao-attribute"),
        ("int4", {"shape": [16, 64]}, "wrong-shape"),
        ("int4", {"block_size": [2, 32]}, "block-size"),
        ("tiles8", {"shape": [64, 128]}, "wrong-shape"),
        ("tiles8", {"shape": [2, 8, 128]}, "torchao-layout"),
        ("xpu", {"block_size": [1, 48]}, "block-size"),
    ],
)
def test_metadata_that_lies_is_refused(name: str, data: dict[str, Any], code: str) -> None:
    with pytest.raises(QFormatError) as caught:
        torchao.scheme(changed(module_of(name), **data))
    assert caught.value.code == code, caught.value


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (None, "torchao-metadata"),
        ("{", "torchao-metadata"),
        ("[]", "torchao-metadata"),
        ('{"_type": "Tensor"}', "torchao-type"),
        ('{"_type": "Int4OpaqueTensor", "_data": {}, "_tensor_data_names": []}', "torchao-type"),
        ('{"_type": "Int8Tensor"}', "torchao-metadata"),
        ('{"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": ["qdata"]}', "torchao-parts"),
        ("[" * 100_000, "torchao-metadata"),
    ],
)
def test_broken_entries_are_refused(text: str | None, code: str) -> None:
    module = module_of("int8_row")
    metadata = {**module.match.metadata, "int8_row.weight": text}
    with pytest.raises(QFormatError) as caught:
        torchao.scheme(Module("int8_row", module.parts, replace(module.match, metadata=metadata)))
    assert caught.value.code == code
    for names in (None, "{}", "[]", "[1]", "x"):
        metadata = {**module.match.metadata, "tensor_names": names}
        with pytest.raises(BadFile) as missing:
            torchao.scheme(Module("int8_row", module.parts, replace(module.match, metadata=metadata)))
        assert missing.value.code == "torchao-metadata"


@pytest.mark.parametrize(
    ("name", "leaf", "value"),
    [
        ("int8_row", "_weight_scale", b"\0\0\xc0\x7f"),
        ("int8_tensor", "_weight_scale", b"\0\0\x80\x7f"),
        ("int4", "_weight_zero_point", b"\x80\x7f"),
        ("tiles8", "_weight_scale_and_zero", b"\xc0\x7f"),
        ("mxfp4", "_weight_scale", b"\xff"),
        ("mxfp4_swizzled", "_weight_scale", b"\xff"),
        ("nvfp4", "_weight_scale", b"\x7f"),
        ("nvfp4_factor", "_weight_per_tensor_scale", b"\0\0\x80\xff"),
    ],
)
def test_scales_that_are_no_numbers_are_refused(name: str, leaf: str, value: bytes) -> None:
    module = module_of(name)
    raw = module.parts[leaf]
    data = np.frombuffer(value + raw.read()[len(value) :], "u1").copy()
    broken = replace(raw, source=RawTensor.from_array("x", "U8", data).source, offset=0)
    with pytest.raises(BadFile) as caught:
        torchao.read(changed(module, {leaf: broken}))
    assert caught.value.code == "scale-not-finite"


def test_codes_outside_their_type_are_refused() -> None:
    for name in ("int1", "mxfp6_e2m3"):
        module = module_of(name)
        raw = module.parts["_weight_qdata"]
        data = np.frombuffer(b"\x70" + raw.read()[1:], "u1").copy()
        broken = replace(raw, source=RawTensor.from_array("x", "U8", data).source, offset=0)
        with pytest.raises(BadFile) as caught:
            torchao.read(changed(module, {"_weight_qdata": broken}))
        assert caught.value.code == "codes-range"


def test_layouts_that_are_not_public_are_refused_by_name() -> None:
    module = module_of("xpu")
    zero = RawTensor.from_array("x", "BF16", np.zeros((4, 16), "<u2"))
    with pytest.raises(Unsupported, match="NPU"):
        torchao.scheme(changed(module, {"_weight_zero_point": zero}))
    inner = {"_type": "Int4WeightOnlyConfig", "_data": {"int4_tile_packed_ntile": 16}}
    config = {"quant_method": "torchao", "quant_type": {"default": inner}}
    with pytest.raises(Unsupported, match="ROCm"):
        torchao.detect(config, ())
    broken: Any
    for broken in ({"default": 3}, [], {"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": {"a": 1}}}}):
        with pytest.raises(BadFile, match="config"):
            torchao.detect({"quant_method": "torchao", "quant_type": broken}, ())


def test_detection() -> None:
    old = torchao.detect({"quant_method": "torchao", "quant_type": "int4_weight_only", "quant_type_kwargs": {"group_size": 32}}, ())
    assert old is not None and old.format == "torchao"
    bare = torchao.detect({}, ["m._weight_qdata", "m._weight_scale"])
    assert bare is not None and bare.warnings
    assert torchao.detect({}, ["m.weight"]) is None and torchao.detect({"quant_method": "gptq"}, ["m._weight_qdata"]) is None


# ---------------------------------------------------------------- targets


SCHEME = Scheme((64, 128), Integer(4), (ParamSpec("float16", Tile((1, 32))),), ParamSpec("uint8", Tile((1, 32)), constant=8))


@pytest.mark.parametrize(
    ("text", "kind", "group", "scale"),
    [
        ("int4", "IntxUnpackedToInt8Tensor", 32, "float16"),
        ("int4,group=64", "IntxUnpackedToInt8Tensor", 64, "float16"),
        ("int4,channel", "IntxUnpackedToInt8Tensor", None, "float16"),
        ("int8", "Int8Tensor", 32, "float32"),
        ("int8,channel", "Int8Tensor", None, "float32"),
        ("fp8", "Float8Tensor", None, "float32"),
        ("fp8,block", "Float8Tensor", 128, "float32"),
        ("nvfp4", "NVFP4Tensor", 16, "float32"),
        ("mxfp8", "MXTensor", 32, "float32"),
    ],
)
def test_targets(text: str, kind: str, group: int | None, scale: str) -> None:
    from qformats.registry import parse_target

    target = parse_target(f"torchao:{text}")
    shape = (128, 256) if "block" in text else SCHEME.shape
    storages = torchao.storages(target, replace(SCHEME, shape=shape))
    first = storages[0]
    assert first.options["kind"] == kind and first.group == group and first.scale_dtypes == (scale,)
    metadata = torchao.metadata_out({"a.m": (first, shape)}, {"a.norm.weight": "BF16"})
    assert json.loads(metadata["tensor_names"]) == ["a.m.weight", "a.norm.weight"] and json.loads(metadata["a.m.weight"])["_type"] == kind


def test_targets_refuse_what_they_have_not() -> None:
    for kind, options in (("int9", {}), ("int4", {"what": ""}), ("int4", {"sym": "", "asym": ""}), ("int8", {"group": "32", "channel": ""}),
                          ("fp8", {"group": "32"}), ("nvfp4", {"channel": ""}), ("int4", {"block": ""})):  # fmt: skip
        with pytest.raises(UsageError):
            torchao.storages(Target("torchao", kind, options), SCHEME)
    (row,) = torchao.storages(Target("torchao", "fp8", {"block": ""}), SCHEME)
    with pytest.raises(Unsupported, match="do not divide"):
        torchao.layout(row, (96, 128))
    assert row.n_multiple == row.rows  # so that a plan leaves such a weight out


def test_a_scheme_without_a_named_type_meets_its_own_grid_first() -> None:
    def first(scheme: Scheme) -> str:
        return torchao.storages(Target("torchao"), scheme)[0].type

    assert first(SCHEME) == "int4" and first(replace(SCHEME, grid=Integer(3))) == "int3"
    tile = Tile((1, 32))
    assert first(Scheme((64, 128), Float("e2m1"), (ParamSpec("codes", tile, nested=Scheme((64, 4), Float("e8m0"))),))) == "mxfp4"
    assert first(Scheme((64, 128), Float("e4m3fn"), (ParamSpec("float32", Tile((1, 128))),))) == "fp8"


def test_configs_tell_one_class_or_one_for_each_name() -> None:
    int4, int8 = (torchao.storages(Target("torchao", kind, {}), SCHEME)[0] for kind in ("int4", "int8"))
    target = Target("torchao", None, {})
    plain = torchao.config_out(target, {"a": int4, "b": int4}, ["c"], None)
    assert plain["quant_type"]["default"]["_type"] == "IntxWeightOnlyConfig" and plain["modules_to_not_convert"] == ["c"]
    mixed = torchao.config_out(target, {"a": int4, "b": int4, "lm_head": int8}, [], None)
    names = mixed["quant_type"]["default"]["_data"]["fqn_to_config"]
    assert set(names) == {"_default", "lm_head"} and names["lm_head"]["_type"] == "Int8WeightOnlyConfig"
    assert mixed["include_input_output_embeddings"] and mixed["modules_to_not_convert"] is None


def test_torchao_reads_every_config_we_write() -> None:
    config_from_dict = pytest.importorskip("torchao.core.config").config_from_dict
    target = Target("torchao", None, {})
    for kind in ("int1", "int4", "int8", "fp8", "nvfp4", "mxfp8", "mxfp4"):
        for storage in torchao.storages(Target("torchao", kind, {}), SCHEME):
            config = torchao.config_out(target, {"a": storage}, [], None)["quant_type"]["default"]
            assert type(config_from_dict(config)).__name__ == config["_type"]
    with opened("intx-mixed") as checkpoint:
        storages = {name: torchao.storage_of(module) for name, module in quantized(checkpoint).items()}
        original = dict(checkpoint.match.config)
        assert torchao.config_out(target, storages, [], original) == original
        config_from_dict(torchao.config_out(target, storages, ["lm_head"], None)["quant_type"]["default"])


# ---------------------------------------------------------------- pickles


def pickled() -> Checkpoint:
    return open_checkpoint(FIXTURES / "pickled" / "pytorch_model.bin", allow_pickle=True)


def test_what_torchao_no_longer_reads_is_read() -> None:
    with pytest.raises(QFormatError):
        open_checkpoint(FIXTURES / "pickled" / "pytorch_model.bin")
    oracle = load_file(FIXTURES / "pickled" / "oracle.safetensors")
    with pickled() as checkpoint:
        found = quantized(checkpoint)
        assert {f"{name}.weight" for name in found} == set(oracle) and checkpoint.format == "torchao"
        for key, expected in oracle.items():
            module = found[key.removesuffix(".weight")]
            assert torch.equal(torchao.read(module).dequantize(expected.dtype, like="torchao"), expected), key
            assert torch.equal(torchao.read(module, 3, 9).dequantize(expected.dtype, like="torchao"), expected[3:9]), key
        assert "int8.bias" in checkpoint.raw and "dense.weight" in checkpoint.raw
        kinds = {name: json.loads(str(checkpoint.match.metadata[f"{name}.weight"]))["_type"] for name in found}
    assert kinds["int8"] == kinds["int8_dynamic"] == "Int8Tensor" and kinds["tiles"] == "Int4TilePackedTo4dTensor"
    assert kinds["int4_dynamic"] == "IntxUnpackedToInt8Tensor" and kinds["fp8"] == kinds["fp8_new"] == "Float8Tensor"


def test_rescued_weights_are_what_torchao_reads_today(tmp_path: Path) -> None:
    """The parts and metadata of an old pickle as safetensors, loaded by torchao's own parser."""
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    oracle = load_file(FIXTURES / "pickled" / "oracle.safetensors")
    with pickled() as checkpoint:
        storages = {name: (torchao.storage_of(m), torchao.scheme(m).shape) for name, m in quantized(checkpoint).items()}
        metadata = torchao.metadata_out(storages, {"int8.bias": "BF16", "dense.weight": "BF16"})
        words = {"I8": torch.int8, "I32": torch.int32, "F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
        tensors = {
            name: torch.frombuffer(bytearray(raw.read()), dtype=words[raw.dtype]).reshape(raw.shape) for name, raw in checkpoint.raw.items()
        }
        kept = {name: storage for name, (storage, _) in storages.items()}
        config = torchao.config_out(Target("torchao", None, {}), kept, [], dict(checkpoint.match.config))
    assert isinstance(config["quant_type"], dict)
    loaded, rest = support.unflatten_tensor_state_dict(tensors, metadata)
    assert not rest
    for key, expected in oracle.items():
        if key != "tiles.weight":  # torchao dequantizes tiles on a GPU only
            assert torch.equal(loaded[key].dequantize(), expected), key


def test_pickled_classes_that_are_not_known_are_refused() -> None:
    from qformats.containers.unpickle import Record

    name = "torchao.dtypes.affine_quantized_tensor.AffineQuantizedTensor"
    plain = Record("torchao.dtypes.uintx.plain_layout.PlainAQTTensorImpl", (), {})
    size = (None, (4, 4))
    for state, code in (
        (None, "torchao-pickle"),
        ({}, "torchao-pickle"),
        ({"tensor_impl": plain}, "torchao-pickle"),
        ({"tensor_impl": plain, "block_size": (1, 0)}, "torchao-pickle"),
        ({"tensor_impl": plain, "block_size": (1, 4)}, "torchao-type"),
        ({"tensor_impl": Record("x.UintxAQTTensorImpl", (), {}), "block_size": (1, 4)}, "torchao-type"),
    ):
        with pytest.raises(QFormatError) as caught:
            torchao.flatten({"m.weight": Record(name, size, state)}, {})
        assert caught.value.code == code
    assert torchao.flatten({"m.weight": 1}, {}) is None and torchao.flatten([], {}) is None
