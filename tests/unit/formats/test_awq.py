"""AWQ fixtures of the original libraries: values equal theirs, written again they have the same bytes, configs are kept or truthful."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from packed_checkpoint import FIXTURES, assembled, entries, modules, oracle, part_bytes, quantization_config, rewritten, same_tensor

from qformats.containers.raw import RawTensor
from qformats.containers.source import MemorySource
from qformats.errors import Unsupported, UsageError
from qformats.formats import awq, gptq
from qformats.formats.protocol import Match, Module, Target
from qformats.scheme import Storage, Yes

torch.set_num_threads(1)
ENTRIES = entries("awq")
PATHS = [e["path"] for e in ENTRIES]


def match_of(path: str) -> Match:
    config = quantization_config(path)
    match = awq.detect(config, ())
    assert match is not None and match.format == "awq"
    assert gptq.detect(config, ()) is None
    return match


@pytest.mark.parametrize("path", PATHS)
def test_values_equal_the_library(path: str) -> None:
    found = modules(path, match_of(path))
    for name, expected in oracle(path).items():
        if name not in found:
            continue  # a module left dense
        tensor = awq.read(found[name])
        if expected.dtype == torch.float32:
            assert torch.equal(tensor.dequantize(torch.float32), expected), name
        else:
            assert torch.equal(tensor.dequantize(torch.float16, like="autoawq"), expected), name


@pytest.mark.parametrize("path", PATHS)
def test_modules_not_to_convert_are_dense(path: str) -> None:
    listed = quantization_config(path).get("modules_to_not_convert") or []
    assert not [name for name in modules(path, match_of(path)) if any(key in name for key in listed)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("step", [None, 32])
def test_write_after_read_gives_the_same_bytes(path: str, step: int | None) -> None:
    for name, module in modules(path, match_of(path)).items():
        storage = awq.storage_of(module)
        parts = rewritten(awq, module, storage, step)
        expected = {leaf: part_bytes(raw) for leaf, raw in module.parts.items() if leaf != "bias"}
        assert parts == expected, name


@pytest.mark.parametrize("path", PATHS)
def test_layout_tells_dtypes_and_shapes(path: str) -> None:
    for module in modules(path, match_of(path)).values():
        layout = awq.layout(awq.storage_of(module), awq.scheme(module).shape)
        found = {leaf: (raw.dtype, raw.shape) for leaf, raw in module.parts.items() if leaf != "bias"}
        assert {leaf: (info.dtype, info.shape) for leaf, info in layout.items()} == found


@pytest.mark.parametrize("path", PATHS)
def test_scheme_and_storage_agree_with_the_tensor(path: str) -> None:
    for module in modules(path, match_of(path)).values():
        tensor, scheme = awq.read(module), awq.scheme(module)
        assert (tensor.shape, tensor.grid, tensor.scales[0].spec()) == (scheme.shape, scheme.grid, scheme.scales[0])
        assert tensor.zero_point is not None and tensor.zero_point.spec() == scheme.zero_point
        assert isinstance(awq.can_store(awq.storage_of(module), tensor.scheme), Yes)
        assert awq.module_warnings(module) == ()


@pytest.mark.parametrize("path", PATHS)
def test_any_row_range_reads_the_same(path: str) -> None:
    module = next(iter(modules(path, match_of(path)).values()))
    whole = awq.read(module)
    n = whole.shape[0]
    for start, stop in ((0, 1), (3, 17), (n - 5, n), (9, 10)):
        part = awq.read(module, start, stop)
        assert torch.equal(part.dequantize(torch.float32), whole.dequantize(torch.float32)[start:stop])


@pytest.mark.parametrize("path", PATHS)
def test_original_config_is_returned_verbatim(path: str) -> None:
    match = match_of(path)
    storages = {name: awq.storage_of(module) for name, module in modules(path, match).items()}
    assert json.dumps(awq.config_out(Target("awq"), storages, [], match.config)) == json.dumps(match.config)


@pytest.mark.parametrize("path", PATHS)
def test_made_config_says_the_truth(path: str) -> None:
    found = modules(path, match_of(path))
    storages = {name: awq.storage_of(module) for name, module in found.items()}
    config = awq.config_out(Target("awq"), storages, ["model.layers.9.mlp.router"], None)
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.9.mlp.router"]
    match = awq.detect(config, ())
    assert match is not None
    for name, module in modules(path, match).items():
        assert awq.scheme(module).scales == awq.scheme(found[name]).scales
        assert same_tensor(awq.read(module), awq.read(found[name]))


def rebuilt(name: str, storage: Storage, shape: tuple[int, ...], raw: dict[str, bytes]) -> Module:
    layout = awq.layout(storage, shape)
    parts = {
        leaf: RawTensor(f"{name}.{leaf}", info.dtype, info.shape, MemorySource(raw[leaf]), 0, len(raw[leaf]))
        for leaf, info in layout.items()
    }
    return Module(name, parts, Match("awq", awq.config_out(Target("awq"), {name: storage}, [], None)))


@pytest.mark.parametrize("version", ["gemm", "gemv"])
@pytest.mark.parametrize("path", ["awq/gemm-g32", "awq/gemv-g64", "awq/gemm-g32-sym-eights"])
def test_gemm_and_gemv_hold_the_same_tensor(path: str, version: str) -> None:
    for module in modules(path, match_of(path)).values():
        tensor = awq.read(module)
        options = {"version": version} | ({"sym": ""} if "sym" in path else {})
        (storage,) = awq.storages(Target("awq", "int4", options), tensor.scheme)
        assert isinstance(awq.can_store(storage, tensor.scheme), Yes)
        raw = assembled(awq.layout(storage, tensor.shape), awq.write(storage, tensor, 0, tensor.shape))
        assert same_tensor(awq.read(rebuilt(module.name, storage, tensor.shape, raw)), tensor)


@pytest.mark.parametrize("path", ["awq/gemm-g32", "awq/gemm-g32-sym-eights"])
def test_the_same_tensor_as_gptq_words(path: str) -> None:
    """AWQ GEMV words are GPTQ words transposed (both pack along K in natural order)."""
    module = next(iter(modules(path, match_of(path)).values()))
    tensor = awq.read(module)
    gemv = awq.storages(Target("awq", "int4", {"version": "gemv"}), tensor.scheme)[0]
    v2 = gptq.storages(Target("gptq", "int4", {"format": "v2", "asym": ""}), tensor.scheme)[0]
    a = {p.leaf: p.array for p in awq.write(gemv, tensor, 0, tensor.shape)}
    b = {p.leaf: p.array for p in gptq.write(v2, tensor, 0, tensor.shape)}
    assert (a["qweight"] == b["qweight"].T).all()


@pytest.mark.parametrize(
    ("type", "options"),
    [
        ("int8", {}), ("q4_0", {}), (None, {"format": "v2"}), (None, {"version": "gemx"}), (None, {"version": "gemv_fast", "group": "16"}),
        (None, {"version": "marlin", "group": "64"}), (None, {"group": "x"}),
        (None, {"group": "0"}), (None, {"sym": "maybe"}), (None, {"group": "16", "version": "gemv"}),
    ],
)  # fmt: skip
def test_unknown_types_and_options_are_refused(type: str | None, options: dict[str, str]) -> None:
    scheme = awq.scheme(next(iter(modules("awq/gemm-g32", match_of("awq/gemm-g32")).values())))
    with pytest.raises(UsageError):
        awq.storages(Target("awq", type, options), scheme)


def test_a_skip_list_is_matched_by_whole_components() -> None:
    """A list with ``gate`` (the router) says nothing of ``gate_proj``; one with ``mlp`` does."""
    path = "awq/gemm-g32"
    match = match_of(path)
    storages = {name: awq.storage_of(m) for name, m in modules(path, match).items()}
    kept = dict(match.config) | {"modules_to_not_convert": ["gate"], "note": 1}
    assert awq.config_out(Target("awq"), storages, [], kept) == kept
    lied = dict(match.config) | {"modules_to_not_convert": ["mlp"], "note": 1}
    assert "note" not in awq.config_out(Target("awq"), storages, [], lied)


def test_mixed_groups_are_refused() -> None:
    scheme = awq.scheme(next(iter(modules("awq/gemm-g32", match_of("awq/gemm-g32")).values())))
    a, b = (awq.storages(Target("awq", "int4", {"group": size}), scheme)[0] for size in ("16", "32"))
    with pytest.raises(Unsupported, match="awq-mixed"):
        awq.config_out(Target("awq"), {"a": a, "b": b}, [], None)


def test_skip_names_never_hit_a_quantized_module() -> None:
    path = "awq/gemm-g32"
    storages: dict[str, Any] = {name: awq.storage_of(m) for name, m in modules(path, match_of(path)).items()}
    with pytest.raises(Unsupported, match="awq-skip-name"):
        awq.config_out(Target("awq"), storages, ["model.layers.0.mlp.gate"], None)


def test_headers_are_read_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import json\n"
        "from qformats.formats import awq\n"
        "from qformats.formats.protocol import Module, Target\n"
        "from qformats.containers.safetensors import open_safetensors\n"
        "for path in ('fixtures/awq/gemm-g32/', 'fixtures/awq/gemv-g32/'):\n"
        "    config = json.load(open(path + 'config.json'))['quantization_config']\n"
        "    raws = open_safetensors(path + 'model.safetensors').tensors\n"
        "    p = next(k for k in raws if k.endswith('.qweight')).rsplit('.', 1)[0]\n"
        "    parts = {k.rsplit('.', 1)[1]: r for k, r in raws.items() if k.startswith(p + '.')}\n"
        "    scheme = awq.scheme(Module(p, parts, awq.detect(config, list(raws))))\n"
        "    assert scheme.group_size == 32, scheme\n"
        "    for s in awq.storages(Target('awq', 'int4'), scheme):\n"
        "        awq.can_store(s, scheme), awq.layout(s, scheme.shape)\n"
        "    awq.side_files(awq.config_out(Target('awq'), {p: s}, [], None))\n"
    )
    root = FIXTURES.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env={"PYTHONPATH": str(root)}, check=False
    )
    assert done.returncode == 0, done.stderr
