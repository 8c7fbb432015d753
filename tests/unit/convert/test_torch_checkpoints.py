"""Checkpoints of torch.save convert as their safetensors twins do, with ``--allow-pickle`` and never without it."""

from __future__ import annotations

import json
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FIXTURES, ready
from click.testing import CliRunner
from safetensors.torch import load_file

from converters import convert, plan, verify
from converters.cli import qconvert
from converters.inspect import inspect_path
from converters.lora import lora_to_gguf
from qformats import registry
from qformats.checkpoint import PROVENANCE_KEY, open_checkpoint
from qformats.containers.gguf import open_gguf
from qformats.containers.raw import RawTensor
from qformats.containers.torch_zip import encode
from qformats.containers.unpickle import Record
from qformats.errors import OutputError, Unsafe
from qformats.saving import save

DIGESTS_KEY = "qformats.digests"


def resaved(path: str, directory: Path, shards: int = 2) -> tuple[Path, Path]:
    """A fixture as it is and as a twin whose weights torch.save wrote."""
    original = ready(path, directory)
    twin = directory / f"{original.name}-bin"
    shutil.copytree(original, twin, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(original / "model.safetensors")
    if shards == 1:
        torch.save(tensors, twin / "pytorch_model.bin")
        return original, twin
    names = [f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin" for n in range(shards)]
    weight_map = {name: names[at % shards] for at, name in enumerate(tensors)}
    for shard in names:
        part = {name: torch.nn.Parameter(t, False) for name, t in tensors.items() if weight_map[name] == shard}
        torch.save(part, twin / shard)
    (twin / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return original, twin


def content(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata but for the record of the source, and every tensor's place, type and bytes."""
    file = open_gguf(path)
    metadata = {k: v.value for k, v in file.metadata.items() if k not in (PROVENANCE_KEY, DIGESTS_KEY)}
    base = min(raw.offset for raw in file.tensors.values())
    return metadata, {name: (t.dtype, t.shape, t.offset - base, t.read()) for name, t in file.tensors.items()}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("path", "to"),
    [
        ("dense/llama", "gguf"), ("dense/llama", "gguf:q8_0"), ("dense/llama-tied", "gguf"), ("gptq/4b-g32-sym", "gguf"),
        ("awq/gemm-g32", "gguf"),
    ],
)  # fmt: skip
def test_a_twin_gives_the_same_gguf(path: str, to: str, shards: int, tmp_path: Path) -> None:
    original, twin = resaved(path, tmp_path, shards)
    for source, name in ((original, "a.gguf"), (twin, "b.gguf")):
        convert(source, tmp_path / name, to=to, allow_pickle=source == twin, workers=2)
    assert content(tmp_path / "a.gguf") == content(tmp_path / "b.gguf")
    assert verify(twin, tmp_path / "b.gguf", allow_pickle=True).method == "digests"
    assert verify(twin, tmp_path / "b.gguf", allow_pickle=True, replay=True).ok


def test_a_twin_gives_the_same_safetensors(tmp_path: Path) -> None:
    original, twin = resaved("gptq/4b-g32-sym", tmp_path)
    convert(twin, tmp_path / "out", to="gptq", allow_pickle=True)
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(original / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_a_changed_shard_is_noticed(tmp_path: Path) -> None:
    _, twin = resaved("dense/llama", tmp_path)
    convert(twin, tmp_path / "a.gguf", to="gguf", allow_pickle=True)
    shard = twin / "pytorch_model-00001-of-00002.bin"
    tensors = torch.load(shard, weights_only=True)
    name = next(name for name in tensors if name.endswith("proj.weight"))
    tensors[name][0, 0] += 1
    torch.save(tensors, shard)
    found = verify(twin, tmp_path / "a.gguf", allow_pickle=True)
    assert not found.ok and found.mismatches


def test_transposed_weights_convert_to_the_same_bytes(tmp_path: Path) -> None:
    original, twin = resaved("dense/llama", tmp_path, 1)
    tensors = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in load_file(original / "model.safetensors").items()}
    assert any(not t.is_contiguous() for t in tensors.values())
    torch.save(tensors, twin / "pytorch_model.bin")
    convert(original, tmp_path / "a.gguf", to="gguf")
    convert(twin, tmp_path / "b.gguf", to="gguf", allow_pickle=True, workers=3)
    assert content(tmp_path / "a.gguf") == content(tmp_path / "b.gguf")


def test_a_tied_head_that_is_saved_twice_is_written_once(tmp_path: Path) -> None:
    original, twin = resaved("dense/llama-tied", tmp_path, 1)
    tensors = load_file(original / "model.safetensors")
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, twin / "pytorch_model.bin")
    convert(original, tmp_path / "a.gguf", to="gguf")
    convert(twin, tmp_path / "b.gguf", to="gguf", allow_pickle=True)
    assert content(tmp_path / "a.gguf") == content(tmp_path / "b.gguf")


def test_one_file_opens_alone(tmp_path: Path) -> None:
    _, twin = resaved("dense/llama", tmp_path, 1)
    with open_checkpoint(twin / "pytorch_model.bin", allow_pickle=True) as found:
        assert (found.container, found.format) == ("torch", "hf")
        assert [Path(source.name).name for source in found.sources()] == ["pytorch_model.bin"]
        assert found.read("model.norm").shape == (64,)
    assert inspect_path(twin, True).container == "torch"


def test_without_consent_nothing_is_opened(tmp_path: Path) -> None:
    _, twin = resaved("dense/llama", tmp_path, 1)
    for run in (
        lambda: open_checkpoint(twin),
        lambda: open_checkpoint(twin / "pytorch_model.bin"),
        lambda: plan(twin, to="gguf"),
        lambda: convert(twin, tmp_path / "a.gguf", to="gguf"),
        lambda: verify(twin, tmp_path / "a.gguf"),
        lambda: inspect_path(twin),
    ):
        with pytest.raises(Unsafe) as caught:
            run()
        assert caught.value.code == "pickle" and "--allow-pickle" in str(caught.value)


def test_shards_save_as_they_are(tmp_path: Path) -> None:
    _, twin = resaved("dense/llama", tmp_path)
    with open_checkpoint(twin, allow_pickle=True) as found:
        save(found, tmp_path / "copy")
    names = {path.name for path in twin.iterdir()}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names
    assert all((tmp_path / "copy" / name).read_bytes() == (twin / name).read_bytes() for name in names)


def test_a_format_reads_its_own_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with the three optional names gets the value of its own file, classes as records, and says what the tensors are."""
    module = registry.format_module("mxfp4")
    seen: list[Any] = []

    def flat(value: Any, config: Any) -> dict[str, RawTensor] | None:
        seen.append((value, config))
        return {"own.weight": encode("own.weight", value["own"]["w"])} if "own" in value else None

    monkeypatch.setattr(module, "PICKLED_CLASSES", frozenset({f"{__name__}.Kind"}), raising=False)
    monkeypatch.setattr(module, "PICKLE_FILES", ("qmodel.pt",), raising=False)
    monkeypatch.setattr(module, "flatten", flat, raising=False)
    torch.save({"own": {"w": torch.ones(2, 2), "kind": Kind.B}}, tmp_path / "qmodel.pt")
    torch.save({}, tmp_path / "another.pt")
    with open_checkpoint(tmp_path, allow_pickle=True) as found:
        assert list(found.raw) == ["own.weight"] and found.file_names == ("qmodel.pt",)
    (value, config), kind = seen[0], seen[0][0]["own"]["kind"]
    assert config == {} and isinstance(value["own"]["w"], RawTensor)
    assert isinstance(kind, Record) and (kind.class_name, kind.args) == (f"{__name__}.Kind", ("b",))


class Kind(Enum):
    A = "a"
    B = "b"


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    original = ready("dense/llama", tmp_path)
    (original / "pytorch_model.bin").write_bytes(b"no pickle at all")
    with open_checkpoint(original, allow_pickle=True) as found:
        assert found.container == "safetensors"


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "SRC"], ["plan", "SRC", "--to", "gguf"], ["convert", "SRC", "DST", "--to", "gguf"], ["hf-to-gguf", "SRC", "DST"],
        ["quantize", "SRC", "DST", "--to", "gguf:q8_0"], ["dequantize", "SRC", "DST", "--to", "gguf:f16"],
    ],
)  # fmt: skip
def test_every_command_asks_first(words: list[str], tmp_path: Path) -> None:
    _, twin = resaved("dense/llama", tmp_path, 1)
    line = [{"SRC": str(twin), "DST": str(tmp_path / "out.gguf")}.get(word, word) for word in words]
    without, allowed = CliRunner().invoke(qconvert, line), CliRunner().invoke(qconvert, [*line, "--allow-pickle"])
    assert (without.exit_code, allowed.exit_code) == (5, 0), allowed.output
    if "DST" in words:
        check = ["verify", str(twin), str(tmp_path / "out.gguf")]
        assert CliRunner().invoke(qconvert, check).exit_code == 5
        assert CliRunner().invoke(qconvert, [*check, "--allow-pickle"]).exit_code == 0


def test_a_pickle_is_never_replaced_by_its_own_conversion(tmp_path: Path) -> None:
    _, twin = resaved("dense/llama", tmp_path, 1)
    with pytest.raises(OutputError):
        convert(twin / "pytorch_model.bin", twin / "pytorch_model.bin", to="gguf", allow_pickle=True, overwrite=True)


def test_an_old_adapter_converts_to_the_same_gguf(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", FIXTURES / "dense" / "llama"
    shutil.copytree(FIXTURES / "lora" / "llama", adapter)
    lora_to_gguf(adapter, base, tmp_path / "a.gguf")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(Unsafe):
        lora_to_gguf(adapter, base, tmp_path / "b.gguf")
    line = ["lora-to-gguf", str(adapter), str(tmp_path / "b.gguf"), "--base", str(base), "--allow-pickle"]
    assert CliRunner().invoke(qconvert, line).exit_code == 0
    ours, theirs = (open_gguf(tmp_path / name).tensors for name in ("b.gguf", "a.gguf"))
    assert ours.keys() == theirs.keys() and all(ours[name].read() == theirs[name].read() for name in theirs)
