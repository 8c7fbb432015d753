"""compressed-tensors read and written: the library's own floats bit for bit, its own bytes again, its config rules, and broken files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qformats.checkpoint import open_checkpoint
from qformats.containers.raw import RawTensor
from qformats.errors import BadFile, QFormatError, Unsupported, UsageError
from qformats.formats import compressed_tensors as ct
from qformats.formats.compressed_tensors.config import candidates, detect
from qformats.formats.protocol import Match, Module, PartInfo, Target
from qformats.scheme import Scheme, Storage
from qformats.tensor import QuantizedTensor

FIXTURES = Path(__file__).parents[3] / "fixtures" / "compressed-tensors"
ALL = sorted(p.name for p in FIXTURES.iterdir())
READ_ONLY = ("sparse24-bf16", "sparse24-fp8", "sparse-bitmask")
LAYER = "model.layers.0."


def modules(name: str) -> dict[str, Module]:
    checkpoint = open_checkpoint(FIXTURES / name)
    return {m: checkpoint.modules[m] for m in checkpoint.modules if checkpoint.is_quantized(m)}


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("name", ALL)
def test_the_owners_floats_to_the_bit(name: str) -> None:
    found, oracle = modules(name), load_file(FIXTURES / name / "oracle.safetensors")
    for key, expected in oracle.items():
        tensor = ct.read(found[key.removesuffix(".weight")])
        step = tensor.shape[0] // expected.shape[0]  # 4 where the fixture keeps every fourth row
        got = tensor.dequantize(expected.dtype, like="compressed-tensors")[::step]
        assert torch.equal(bits(got), bits(expected)), key


@pytest.mark.parametrize("name", ALL)
def test_any_row_range_is_those_rows(name: str) -> None:
    for module in modules(name).values():
        whole = ct.read(module)
        n = whole.shape[0]
        assert whole.shape == ct.scheme(module).shape
        for start, stop in ((0, n), (3, 11), (n - 5, n), (8, 9)):
            part = ct.read(module, start, stop)
            assert torch.equal(part.codes, whole.codes[start:stop])
            assert torch.equal(part.dequantize(torch.float64), whole.dequantize(torch.float64)[start:stop]), (module.name, start, stop)
            assert [(p, v.values) for p, v in ct.read(module, start, stop, codes=False).params()] != []


def assembled(storage: Storage, tensor: QuantizedTensor, ranges: list[tuple[int, int]], read: Callable[[int, int], QuantizedTensor]) -> Any:
    layout: dict[str, PartInfo] = ct.layout(storage, tensor.shape)
    planes: dict[str, list[Any]] = {leaf: [] for leaf in layout}
    for start, stop in ranges:
        for piece in ct.write(storage, read(start, stop), start, tensor.shape):
            planes[piece.leaf].append(piece)
    parts = {}
    for leaf, info in layout.items():
        height, width = (max(p.row + p.array.shape[0] for p in planes[leaf]), max(p.column + p.array.shape[1] for p in planes[leaf]))
        out = np.zeros((height, width), planes[leaf][0].array.dtype)
        for p in planes[leaf]:
            out[p.row : p.row + p.array.shape[0], p.column : p.column + p.array.shape[1]] = p.array
        parts[leaf] = replace(RawTensor.from_array(leaf, "U8", out.reshape(-1).view(np.uint8)), dtype=info.dtype, shape=info.shape)
    return parts


@pytest.mark.parametrize("name", [n for n in ALL if n not in READ_ONLY])
def test_write_after_read_gives_the_same_bytes(name: str) -> None:
    for module in modules(name).values():
        storage, tensor = ct.storage_of(module), ct.read(module)
        assert ct.can_store(storage, tensor.scheme), (module.name, ct.can_store(storage, tensor.scheme))
        n = tensor.shape[0]
        unit = n if storage.whole else 32
        parts = assembled(storage, tensor, [(s, min(n, s + unit)) for s in range(0, n, unit)], partial(ct.read, module))
        kept = {leaf: raw for leaf, raw in module.parts.items() if leaf in ct.SUFFIXES or leaf == "weight"}
        assert {k: (r.dtype, r.shape) for k, r in parts.items()} == {k: (r.dtype, r.shape) for k, r in kept.items()}, module.name
        assert {k: r.read() for k, r in parts.items()} == {k: r.read() for k, r in kept.items()}, module.name


@pytest.mark.parametrize("name", [n for n in ALL if n not in READ_ONLY])
def test_the_original_config_is_kept_and_a_new_one_reads_the_same(name: str) -> None:
    found = modules(name)
    storages = {m: ct.storage_of(module) for m, module in found.items()}
    original = next(iter(found.values())).match.config
    assert ct.config_out(Target("compressed-tensors"), storages, ["lm_head"], original) == original
    made = ct.config_out(Target("compressed-tensors"), storages, ["lm_head"], None)
    json.dumps(made)
    match = detect(made, [])
    assert match is not None and made["ignore"] == ["lm_head"]
    for m, module in found.items():
        again = ct.read(replace(module, match=match, memo={}))
        assert torch.equal(again.dequantize(torch.float64), ct.read(module).dequantize(torch.float64)), m


@pytest.mark.parametrize("name", READ_ONLY)
def test_sparse_checkpoints_are_copied_or_refused(name: str) -> None:
    found = modules(name)
    storages = {m: ct.storage_of(module) for m, module in found.items()}
    original = next(iter(found.values())).match.config
    assert ct.config_out(Target("compressed-tensors"), storages, ["lm_head"], original) == original
    module = next(iter(found.values()))
    for action in (lambda: ct.write(ct.storage_of(module), ct.read(module), 0, ct.scheme(module).shape),
                   lambda: ct.config_out(Target("compressed-tensors"), storages, [], None)):  # fmt: skip
        with pytest.raises(Unsupported):
            action()


def test_the_ignore_list_names_the_head_even_where_it_is_tied() -> None:
    storages = {m: ct.storage_of(module) for m, module in modules("w4-sym").items()}
    made = ct.config_out(Target("compressed-tensors"), storages, [], {"quant_method": "gptq", "ignore": ["re:vision.*", "re:.*q_proj"]})
    assert made["ignore"] == ["lm_head", "re:vision.*"]
    assert ct.config_out(Target("compressed-tensors"), {"lm_head": next(iter(storages.values()))}, [], None)["ignore"] == []


def test_stacked_experts_are_read_expert_by_expert() -> None:
    """Two copies of a module as one (2, N, K): zero points are packed along the rows of each slice."""
    for name in ("w4-asym", "w4-sym", "fp8-channel"):
        module = modules(name)[f"{LAYER}self_attn.k_proj"]
        parts = {}
        for leaf, raw in module.parts.items():
            array = raw.array()
            two = np.array([2, *array], array.dtype) if leaf == "weight_shape" else np.stack([array, array])
            parts[leaf] = replace(RawTensor.from_array(leaf, "U8", two.reshape(-1).view(np.uint8)), dtype=raw.dtype, shape=two.shape)
        stacked, one = ct.read(Module(module.name, parts, module.match)), ct.read(module).dequantize(torch.float64)
        assert ct.scheme(Module(module.name, parts, module.match)).shape == (2, 16, 64)
        assert torch.equal(stacked.dequantize(torch.float64), torch.cat([one, one]))
        part = ct.read(Module(module.name, parts, module.match), 13, 21).dequantize(torch.float64)
        assert torch.equal(part, torch.cat([one, one])[13:21])


# ---------------------------------------------------------------- configs


def group(targets: list[str], bits: int = 4, **more: Any) -> dict[str, Any]:
    return {"targets": targets, "weights": {"num_bits": bits, "type": "int", "group_size": 32, **more}}


def config(groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, **more}


def test_an_exact_name_goes_before_a_regex_before_a_class() -> None:
    groups = {"a": group(["Linear"], 2), "b": group(["re:.*q_proj"], 3), "c": group(["layers.0.q_proj"], 4)}
    order = [[g.name for g in candidates(config(groups), name)] for name in ("layers.0.q_proj", "layers.1.q_proj", "layers.1.k_proj")]
    assert order == [["c", "b", "a"], ["b", "a"], ["a"]]


def test_a_regex_matches_from_the_start_and_not_to_the_end() -> None:
    groups = {"a": group(["re:layers"])}
    assert [g.name for g in candidates(config(groups), "layers.0.q_proj")] == ["a"]
    assert list(candidates(config(groups), "model.layers.0.q_proj")) == []


def test_of_two_groups_with_one_target_the_later_counts() -> None:
    groups = {"a": group(["Linear"], 2), "b": group(["Linear"], 8)}
    assert [g.name for g in candidates(config(groups), "q")] == ["b"]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("W4A16", (4, "int", True, "group", 128)), ("w4a16_asym", (4, "int", False, "group", 128)),
     ("FP8", (8, "float", True, "tensor", None)), ("FP8_BLOCK", (8, "float", True, "block", None)),
     ("NVFP4", (4, "float", True, "tensor_group", 16)), ("W3A8", (3, "int", True, "group", 128)),
     ("MXFP4xFP8", (4, "float", True, "group", 32)), ("MXFP6A16", (6, "float", True, "group", 32)),
     ("INT8", (8, "int", True, "channel", None)), ("W4AFP8", (4, "int", True, "group", 128))],
)  # fmt: skip
def test_presets(preset: str, expected: tuple[Any, ...]) -> None:
    found = next(candidates(config({preset: ["Linear"]}), "q")).weights
    assert found is not None and (found.bits, found.kind, found.symmetric, found.strategy, found.group) == expected


def test_presets_are_the_librarys_own() -> None:
    schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme").PRESET_SCHEMES
    for name, preset in schemes.items():
        found = next(candidates(config({name: ["Linear"]}), "q"), None)
        args = preset.get("weights")
        if args is None:
            assert found is None
            continue
        assert found is not None and found.weights is not None
        ours = found.weights
        assert (ours.bits, ours.kind, ours.symmetric, ours.strategy) == (args.num_bits, args.type, args.symmetric, args.strategy), name
        assert (ours.group, None if ours.block is None else list(ours.block)) == (args.group_size, args.block_structure), name


def test_old_spellings(tmp_path: Path) -> None:
    """``compression_config``, a config in the config, the method ``sparseml``, status ``frozen``, a block structure as a string."""
    inner = config({"group_0": group(["Linear"], observer="minmax", observer_kwargs={})}, quantization_status="frozen")
    old = {k: v for k, v in inner.items() if k != "quant_method"}
    for spelled in (
        old,
        {"quant_method": "compressed-tensors", "quantization_config": old, "sparsity_config": {}},
        {**inner, "quant_method": "sparseml"},
    ):
        assert detect(spelled, []) is not None
        assert [g.name for g in candidates(spelled, "q")] == ["group_0"]
    block = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x64"}}
    weights = next(candidates(config({"g": block}), "q")).weights
    assert weights is not None and weights.block == (128, 64)
    source = FIXTURES / "w4-sym"
    held = json.loads((source / "config.json").read_text())
    held["compression_config"] = held.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(held))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "compressed-tensors"
        checkpoint.read(f"{LAYER}self_attn.q_proj")


def test_fused_transforms_are_part_of_the_weights_and_online_ones_are_refused() -> None:
    def transform(location: str) -> dict[str, Any]:
        apply = [{"targets": ["Linear"], "location": location}]
        return config({"a": group(["Linear"])}, transform_config={"config_groups": {"R4": {"type": "hadamard", "apply": apply}}})

    assert detect(transform("weight_input"), []) is not None
    for location in ("input", "output", "q_attn", "k_cache"):
        with pytest.raises(Unsupported) as caught:
            detect(transform(location), [])
        assert caught.value.code == "online-transform" and "R4" in caught.value.message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"format": "marlin-24"}, "marlin-24"),
        ({"format": "tomorrow-quantized"}, "ct-format"),
        ({"config_groups": []}, "config-value"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "surprise": 1}}}}, "config-key"),
        ({"config_groups": {"a": {"targets": ["Linear"], "surprise": 1}}}, "config-key"),
        ({"config_groups": {"W9A16": ["Linear"]}}, "config-preset"),
        ({"config_groups": {"a": group(["Linear"], strategy="block")}}, "config-value"),
        ({"config_groups": {"a": group(["Linear"], strategy="diagonal")}}, "config-value"),
        ({"config_groups": {"a": {"targets": "Linear"}}}, "config-value"),
        ({"config_groups": {"a": group(["Linear"], "four")}}, "config-value"),  # type: ignore[arg-type]
        ({"config_groups": {"a": {**group(["Linear"]), "format": "mixed-precision"}}}, "config-value"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], code: str) -> None:
    with pytest.raises(QFormatError) as caught:
        detect(config({"a": group(["Linear"])}) | change, [])
    assert caught.value.code == code


def test_top_level_keys_nobody_knows_are_ignored_as_the_owner_does() -> None:
    assert detect(config({"a": group(["Linear"])}, surprise=1), []) is not None


# ---------------------------------------------------------------- broken files


def broken(name: str, leaf: str, change: Callable[[RawTensor], RawTensor | None], module: str = "self_attn.k_proj") -> Module:
    found = modules(name)[LAYER + module]
    parts = dict(found.parts)
    made = change(parts.pop(leaf))
    return Module(found.name, parts if made is None else {**parts, leaf: made}, found.match)


def gone(raw: RawTensor) -> None:
    return None


def retyped(dtype: str) -> Callable[[RawTensor], RawTensor]:
    return lambda raw: replace(raw, dtype=dtype)


def shorter(raw: RawTensor) -> RawTensor:
    return replace(raw, shape=(*raw.shape[:-1], raw.shape[-1] - 1))


def filled(value: Any, at: int = 0) -> Callable[[RawTensor], RawTensor]:
    def change(raw: RawTensor) -> RawTensor:
        array = raw.array()
        array.reshape(-1)[at] = value
        return replace(RawTensor.from_array(raw.name, "U8", array.reshape(-1).view(np.uint8)), dtype=raw.dtype, shape=raw.shape)

    return change


@pytest.mark.parametrize(
    ("name", "leaf", "change", "code"),
    [
        ("w4-sym", "weight_packed", gone, "missing-weight-packed"),
        ("w4-sym", "weight_packed", retyped("I64"), "wrong-dtype"),
        ("w4-sym", "weight_packed", shorter, "wrong-shape"),
        ("w4-sym", "weight_scale", gone, "missing-weight-scale"),
        ("w4-sym", "weight_scale", retyped("I16"), "wrong-dtype"),
        ("w4-sym", "weight_scale", shorter, "wrong-shape"),
        ("w4-sym", "weight_scale", filled(0x7F80), "scale-value"),
        ("w4-sym", "weight_scale", filled(0x7FC0, 3), "scale-value"),
        ("w4-sym", "weight_shape", filled(65, 1), "wrong-shape"),
        ("w4-sym", "weight_shape", filled(17), "weight-shape"),
        ("w4-sym", "weight_shape", filled(-64, 1), "weight-shape"),
        ("w4-sym", "weight_shape", retyped("F32"), "wrong-dtype"),
        ("w4-asym", "weight_zero_point", gone, "missing-weight-zero-point"),
        ("w4-asym", "weight_zero_point", retyped("I16"), "wrong-dtype"),
        ("w4-asym", "weight_zero_point", shorter, "wrong-shape"),
        ("w4-asym", "weight_zero_point", lambda r: replace(r, shape=(r.shape[0] - 1, r.shape[1])), "wrong-shape"),
        ("w8a8", "weight", gone, "missing-weight"),
        ("w8a8", "weight", retyped("I16"), "wrong-dtype"),
        ("w8a8", "weight_scale", gone, "missing-weight-scale"),
        ("fp8-channel", "weight_scale", filled(0xFF80), "scale-value"),
        ("fp8-block", "weight_scale", lambda r: replace(r, shape=(2, 1)), "wrong-shape"),
        ("nvfp4", "weight_global_scale", gone, "missing-weight-global-scale"),
        ("nvfp4", "weight_global_scale", filled(0.0), "scale-value"),
        ("nvfp4", "weight_global_scale", filled(np.nan), "scale-value"),
        ("nvfp4", "weight_scale", filled(0x7F), "scale-value"),
        ("nvfp4", "weight_scale", shorter, "wrong-shape"),
        ("mxfp4", "weight_scale", filled(0xFF), "scale-value"),
        ("mxfp4", "weight_scale", retyped("I32"), "wrong-dtype"),
        ("mxfp4", "weight_packed", shorter, "wrong-shape"),
        ("actorder", "weight_g_idx", filled(2), "g-idx-range"),
        ("actorder", "weight_g_idx", filled(-7), "g-idx-range"),
        ("actorder", "weight_g_idx", shorter, "wrong-shape"),
        ("actorder", "weight_g_idx", lambda r: filled(1 - int(r.array()[0]))(r), "g-idx-groups"),
        ("sparse24-bf16", "bitmask", filled(0xFF), "bitmask"),
        ("sparse24-bf16", "compressed", shorter, "wrong-shape"),
        ("sparse24-bf16", "shape", gone, "missing-shape"),
        ("sparse-bitmask", "weight.bitmask", filled(0xFF), "bitmask"),
        ("sparse-bitmask", "weight.row_offsets", filled(1), "bitmask"),
        ("sparse-bitmask", "weight.row_offsets", filled(10**9, 1), "bitmask"),
        ("sparse-bitmask", "weight.row_offsets", gone, "missing-weight-row-offsets"),
    ],
)  # fmt: skip
def test_broken_parts(name: str, leaf: str, change: Callable[[RawTensor], RawTensor | None], code: str) -> None:
    with pytest.raises(QFormatError) as caught:
        ct.read(broken(name, leaf, change))
    assert caught.value.code == code, caught.value


@pytest.mark.parametrize(
    ("name", "groups", "code"),
    [
        ("w4-sym", {"a": group(["re:vision.*"])}, "config-group"),
        ("w4-sym", {"a": group(["Linear"], type="float", bits=8)}, "config-disagrees"),
        ("w4-sym", {"a": group(["Linear"], 8)}, "wrong-shape"),
        ("w4-sym", {"a": {**group(["Linear"]), "format": "int-quantized"}}, "config-disagrees"),
        ("w4-sym", {"a": group(["Linear"], group_size=64)}, "wrong-shape"),
        ("w4-sym", {"a": group(["Linear"], symmetric=False)}, "missing-weight-zero-point"),
        ("mxfp4", {"a": group(["Linear"], type="float")}, "config-disagrees"),
    ],
)
def test_configs_that_contradict_the_tensors(name: str, groups: dict[str, Any], code: str) -> None:
    module = modules(name)[f"{LAYER}self_attn.k_proj"]
    with pytest.raises(BadFile) as caught:
        ct.scheme(replace(module, match=Match("compressed-tensors", config(groups)), memo={}))
    assert caught.value.code == code, caught.value


def test_marlin_tensors_are_refused_by_name() -> None:
    module = modules("w4-sym")[f"{LAYER}self_attn.k_proj"]
    with pytest.raises(Unsupported, match="marlin-24"):
        ct.scheme(Module(module.name, {**module.parts, "meta": module.parts["weight_shape"]}, module.match))


# ---------------------------------------------------------------- targets


def test_targets_name_types_tiles_and_forms() -> None:
    scheme = Scheme((256, 256), ct.scheme(modules("w4-sym")[f"{LAYER}self_attn.k_proj"]).grid)

    def first(kind: str, **options: str) -> tuple[Any, ...]:
        s = ct.storages(Target("compressed-tensors", kind, options), scheme)[0]
        return s.type, s.rows, s.group, s.zero_point, s.options["format"], s.options["strategy"]

    assert first("int4") == ("int4", 1, 128, 8, "pack-quantized", "group")
    assert first("int4", asym="", group="32") == ("int4", 1, 32, (0, 15), "pack-quantized", "group")
    assert first("int8", channel="") == ("int8", 1, None, 128, "pack-quantized", "channel")
    assert first("int8", channel="", format="int") == ("int8", 1, None, None, "int-quantized", "channel")
    assert first("int4", tensor="", asym="") == ("int4", None, None, (0, 15), "pack-quantized", "tensor")
    assert first("int8", tensor="", format="int", asym="") == ("int8", None, None, (-128, 127), "int-quantized", "tensor")
    assert first("fp8") == ("fp8", 1, None, None, "float-quantized", "channel")
    assert first("fp8", block="") == ("fp8", 128, 128, None, "float-quantized", "block")
    assert first("fp8", tensor="") == ("fp8", None, None, None, "float-quantized", "tensor")
    assert first("nvfp4") == ("nvfp4", 1, 16, None, "nvfp4-pack-quantized", "tensor_group")
    assert first("mxfp8") == ("mxfp8", 1, 32, None, "mxfp8-quantized", "group")
    ordered = Scheme((256, 256), scheme.grid, group_index=True)
    indexed = [s for s in ct.storages(Target("compressed-tensors", "int4", {"group": "32"}), ordered) if s.group_index]
    assert {(s.zero_point, s.full_groups, s.options["g_idx"]) for s in indexed} == {(8, True, "index"), ((0, 15), True, "index")}
    for options in ({"group": "32", "act-order": "no"}, {"channel": ""}, {"group": "32", "format": "int"}):
        assert not any(s.group_index for s in ct.storages(Target("compressed-tensors", "int4", options), ordered))
    for bad in (
        {"group": "0"},
        {"block": "a"},
        {"sym": "", "asym": ""},
        {"group": "32", "channel": ""},
        {"format": "zip"},
        {"scale": "f8"},
        {"x": ""},
    ):
        with pytest.raises(UsageError):
            ct.storages(Target("compressed-tensors", "int4", bad), scheme)
