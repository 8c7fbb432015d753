"""GPTQ fixtures of the original libraries: values equal theirs, written again they have the same bytes, configs are kept or truthful."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from packed_checkpoint import FIXTURES, assembled, entries, modules, oracle, part_bytes, quantization_config, rewritten, same_tensor

from qformats.formats import gptq
from qformats.formats.protocol import Match, Target
from qformats.scheme import Storage, Yes

torch.set_num_threads(1)
ENTRIES = entries("gptq")
PATHS = [e["path"] for e in ENTRIES]


def match_of(path: str) -> Match:
    config = quantization_config(path)
    side = FIXTURES / path / "quantize_config.json"
    if side.exists():
        config, warnings = gptq.reconcile(config, json.loads(side.read_text()))
        assert bool(warnings) == ("disagreeing" in path)
    match = gptq.detect(config, ())
    assert match is not None and match.format == "gptq"
    return match


@pytest.mark.parametrize("entry", ENTRIES, ids=PATHS)
def test_values_equal_the_library(entry: dict[str, Any]) -> None:
    found = modules(entry["path"], match_of(entry["path"]))
    policy = "v1-field" if entry["zero_policy"] == "v1-ambiguous" else None  # the library reads 0 where the common kernels read 2^b
    for name, expected in oracle(entry["path"]).items():
        value = gptq.read(found[name], zero_policy=policy).dequantize(torch.float32)
        assert torch.equal(value, expected.float()), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("step", [None, 32])
def test_write_after_read_gives_the_same_bytes(path: str, step: int | None) -> None:
    for name, module in modules(path, match_of(path)).items():
        storage = gptq.storage_of(module)
        parts = rewritten(gptq, module, storage, step)
        expected = {leaf: part_bytes(raw) for leaf, raw in module.parts.items() if leaf != "bias"}
        assert parts == expected, name


@pytest.mark.parametrize("path", PATHS)
def test_layout_tells_dtypes_and_shapes(path: str) -> None:
    for module in modules(path, match_of(path)).values():
        layout = gptq.layout(gptq.storage_of(module), gptq.scheme(module).shape)
        found = {leaf: (raw.dtype, raw.shape) for leaf, raw in module.parts.items() if leaf != "bias"}
        assert {leaf: (info.dtype, info.shape) for leaf, info in layout.items()} == found


@pytest.mark.parametrize("entry", ENTRIES, ids=PATHS)
def test_scheme_and_storage_agree_with_the_tensor(entry: dict[str, Any]) -> None:
    act_order = False
    for module in modules(entry["path"], match_of(entry["path"])).values():
        tensor, scheme, storage = gptq.read(module), gptq.scheme(module), gptq.storage_of(module)
        assert (tensor.shape, tensor.grid, tensor.scales[0].spec()) == (scheme.shape, scheme.grid, scheme.scales[0])
        assert isinstance(gptq.can_store(storage, tensor.scheme), Yes)
        assert tensor.group_index is None or scheme.group_index
        if scheme.zero_point is not None and scheme.zero_point.constant is not None:
            assert tensor.zero_point is not None and tensor.zero_point.spec() == scheme.zero_point
        act_order = act_order or tensor.group_index is not None
    assert act_order == entry["act_order"]


@pytest.mark.parametrize("path", PATHS)
def test_any_row_range_reads_the_same(path: str) -> None:
    name, module = next(iter(modules(path, match_of(path)).items()))
    whole = gptq.read(module)
    n = whole.shape[0]
    for start, stop in ((0, 1), (3, 17), (n - 5, n), (9, 10)):
        part = gptq.read(module, start, stop)
        assert torch.equal(part.dequantize(torch.float32), whole.dequantize(torch.float32)[start:stop]), (name, start)


@pytest.mark.parametrize("path", PATHS)
def test_original_config_is_returned_verbatim(path: str) -> None:
    match = match_of(path)
    storages = {name: gptq.storage_of(module) for name, module in modules(path, match).items()}
    out = gptq.config_out(Target("gptq"), storages, [], match.config)
    assert json.dumps(out) == json.dumps(match.config)


def test_ambiguous_zero_fields_are_read_as_the_kernels_do_with_a_warning() -> None:
    path = "gptq/4b-g32-z0-per-field"
    found = modules(path, match_of(path)).values()
    tops = [m for m in found if (gptq.read(m).zero_point.values == 16).any()]  # type: ignore[union-attr]
    assert tops
    for module in tops:
        assert any("read as 16" in text for text in gptq.module_warnings(module))
        high, low = gptq.read(module).zero_point, gptq.read(module, zero_policy="v1-field").zero_point
        assert high is not None and low is not None
        assert isinstance(high.values, torch.Tensor) and isinstance(low.values, torch.Tensor)
        assert torch.equal(low.values, high.values % 16)
        assert not gptq.module_warnings(module, zero_policy="v1-field")


def test_mislabelled_symmetric_zeros_are_read_as_they_are_with_a_warning() -> None:
    path = "gptq/mislabelled-v2-as-v1"
    for module in modules(path, match_of(path)).values():
        assert gptq.read(module).zero_point.spec().constant == 8  # type: ignore[union-attr]
        assert any("labelled gptq" in text for text in gptq.module_warnings(module))
        forced = gptq.read(module, zero_policy="v1").zero_point
        assert forced is not None and forced.spec().constant == 9


@pytest.mark.parametrize("path", [e["path"] for e in ENTRIES if e["dialect"] == "gptqmodel"])
def test_ordinary_files_raise_no_warning(path: str) -> None:
    for module in modules(path, match_of(path)).values():
        assert gptq.module_warnings(module) == ()


@pytest.mark.parametrize("path", [e["path"] for e in ENTRIES if e["dialect"] == "gptqmodel"])
def test_side_file_is_the_library_s_own(path: str) -> None:
    written = gptq.side_files(json.loads((FIXTURES / path / "quantize_config.json").read_text()))
    assert written == {"quantize_config.json": (FIXTURES / path / "quantize_config.json").read_bytes()}


@pytest.mark.parametrize("path", PATHS)
def test_made_config_says_the_truth(path: str) -> None:
    """A config made without an original leads a reader to the same codes and parameters."""
    found = modules(path, match_of(path))
    if any(gptq.storage_of(m).options["dialect"] for m in found.values()):
        pytest.skip("AutoRound's dialect is kept only with its original config")
    storages = {name: gptq.storage_of(module) for name, module in found.items()}
    config = gptq.config_out(Target("gptq"), storages, ["model.layers.0.self_attn.o_proj2", "lm_head2"], None)
    match = gptq.detect(config, ())
    assert match is not None
    for name, module in modules(path, match).items():
        said = gptq.module_settings(config, name)
        assert not said.skipped and said.bits == storages[name].grid.bits
        assert gptq.scheme(module).scales == gptq.scheme(found[name]).scales
    assert gptq.module_settings(config, "model.layers.0.self_attn.o_proj2").skipped


@pytest.mark.parametrize("path", PATHS)
def test_rewriting_in_a_new_storage_keeps_the_tensor(path: str) -> None:
    """Own v2 files: the same codes, zero points and index come back."""
    for module in list(modules(path, match_of(path)).values())[:2]:
        tensor = gptq.read(module)
        scheme = tensor.scheme
        version = "v1" if (tensor.zero_point.values >> scheme.grid.bits).any() else "v2"  # type: ignore[union-attr, operator]
        version = "planar" if path == "gptq/planar-mixed" else version
        target = Target("gptq", f"int{scheme.grid.bits}", {"format": version, "asym": ""})  # type: ignore[union-attr]
        storage = gptq.storages(target, scheme)[-1]
        raw = assembled(gptq.layout(storage, tensor.shape), gptq.write(storage, tensor, 0, tensor.shape))
        again = gptq.read(rebuilt(module.name, storage, tensor.shape, raw))
        assert torch.equal(again.dequantize(torch.float32), tensor.dequantize(torch.float32))
        assert same_tensor(again, tensor)


def rebuilt(name: str, storage: Storage, shape: tuple[int, ...], raw: dict[str, bytes]) -> Any:
    from qformats.containers.raw import RawTensor
    from qformats.containers.source import MemorySource
    from qformats.formats.protocol import Module

    config = gptq.config_out(Target("gptq"), {name: storage}, [], None)
    layout = gptq.layout(storage, shape)
    parts = {
        leaf: RawTensor(f"{name}.{leaf}", info.dtype, info.shape, MemorySource(raw[leaf]), 0, len(raw[leaf]))
        for leaf, info in layout.items()
    }
    return Module(name, parts, Match("gptq", config))


def test_headers_are_read_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "sys.path.insert(0, 'tests/unit/formats')\n"
        "import json\n"
        "from qformats.formats import gptq\n"
        "from qformats.formats.protocol import Module, Target\n"
        "from qformats.containers.safetensors import open_safetensors\n"
        "path = 'fixtures/gptq/4b-g32-act/'\n"
        "config = json.load(open(path + 'config.json'))['quantization_config']\n"
        "raws = open_safetensors(path + 'model.safetensors').tensors\n"
        "raws = raws if hasattr(raws, 'items') else {r.name: r for r in raws}\n"
        "p = 'model.layers.0.mlp.down_proj'\n"
        "parts = {k.rsplit('.', 1)[1]: r for k, r in raws.items() if k.startswith(p + '.')}\n"
        "match = gptq.detect(config, list(raws))\n"
        "scheme = gptq.scheme(Module(p, parts, match))\n"
        "assert scheme.shape == (64, 128) and scheme.group_size == 32, scheme\n"
        "for s in gptq.storages(Target('gptq', 'int4'), scheme):\n"
        "    gptq.can_store(s, scheme), gptq.layout(s, scheme.shape)\n"
        "gptq.side_files(gptq.config_out(Target('gptq'), {p: s}, [], None))\n"
    )
    root = FIXTURES.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env={"PYTHONPATH": str(root)}, check=False
    )
    assert done.returncode == 0, done.stderr
