"""What repair mends: lint is clean afterwards, values are equal, codes keep every byte, and what is whole stays unwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import array, converted, digest, edit, edit_json, header, load, names_in, put, ready, store
from click.testing import CliRunner

from converters.cli import qconvert
from converters.digests import of_tensors
from converters.gguf_edit import edit_gguf
from converters.lint import lint_path
from converters.metadata_words import parse_assignment
from converters.repair import repair_path
from qformats.checkpoint import open_checkpoint
from qformats.errors import Mismatch, QFormatError
from qformats.tensor import QuantizedTensor

GPTQ, AWQ, DENSE = "gptq/4b-g32-sym", "awq/gemm-g32", "dense/llama"


def values(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor as float32 numbers."""
    with open_checkpoint(path) as opened:
        found = {name: opened.tensors[name] for name in opened.tensors}
        return {k: v.dequantize(torch.float32) if isinstance(v, QuantizedTensor) else v.float() for k, v in found.items()}


def codes(path: Path) -> str:
    """The digest of all planes of codes and of everything that is not in codes."""
    with open_checkpoint(path) as opened:
        return of_tensors(raw for name, raw in opened.raw.items() if not name.endswith((".g_idx", ".qzeros")))


def kinds(path: Path, **wishes: Any) -> list[str]:
    return [repair.kind for repair in repair_path(path, dry_run=True, **wishes).repairs]


def loads(path: Path, *engines: str) -> bool:
    return lint_path(path, engines).loads


def config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


def without_fields(*keys: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / "quantize_config.json").unlink(missing_ok=True)
        edit_json(path / "config.json", lambda c: [c["quantization_config"].pop(key, None) for key in keys] and None)

    return change


def said(**fields: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / "quantize_config.json").unlink(missing_ok=True)
        edit_json(path / "config.json", lambda c: c["quantization_config"].update(fields))

    return change


def no_g_idx(path: Path) -> None:
    edit(path, lambda found: [found.pop(name) for name in list(found) if name.endswith("g_idx")])


def zero_g_idx(path: Path) -> None:
    def change(found: dict[str, Any]) -> None:
        for name in [name for name in found if name.endswith("g_idx")]:
            put(found, name, np.zeros_like(array(found, name)))

    edit(path, change)


def blank_zeros(path: Path) -> None:
    def change(found: dict[str, Any]) -> None:
        for name in [name for name in found if name.endswith("qzeros")]:
            put(found, name, np.zeros_like(array(found, name)))

    edit(path, change)


def one_mislabelled(path: Path) -> None:
    """One module stores its zero points as they are, the others minus one."""

    def change(found: dict[str, Any]) -> None:
        name = next(name for name in found if name.endswith("qzeros"))
        put(found, name, np.full_like(array(found, name), np.uint32(0x88888888).astype(np.int32)))

    edit(path, change)


def unmarked(path: Path) -> None:
    store(path / "model.safetensors", load(path / "model.safetensors"))


def beside(path: Path) -> None:
    """The quantization config only in quantize_config.json."""
    stated = config(path)
    (path / "quantize_config.json").write_text(json.dumps(stated))
    edit_json(path / "config.json", lambda c: c.pop("quantization_config"))


def renamed(path: Path) -> None:
    (path / "model.safetensors").rename(path / "gptq_model-4bit-32g.safetensors")


def in_two(path: Path, names: tuple[str, str] = ("a.safetensors", "b.safetensors")) -> dict[str, str]:
    found = load(path / "model.safetensors")
    half = len(found) // 2
    for name, part in zip(names, (list(found)[:half], list(found)[half:])):
        store(path / name, {key: found[key] for key in part}, {"format": "pt"})
    (path / "model.safetensors").unlink()
    return {key: names[place >= half] for place, key in enumerate(found)}


def no_index(path: Path) -> None:
    in_two(path)


def wrong_shard_names(path: Path) -> None:
    weight_map = in_two(path)
    wrong = {key: f"model-0000{1 + (file[0] == 'b')}-of-00002.safetensors" for key, file in weight_map.items()}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 7, "by": "x"}, "weight_map": wrong}))


def forgetful_index(path: Path) -> None:
    weight_map = in_two(path)
    weight_map.popitem()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def broken_index(path: Path) -> None:
    in_two(path)
    (path / "model.safetensors.index.json").write_text("{")


CASES: list[tuple[str, str, Callable[[Path], None], str, tuple[str, ...]]] = [
    ("no g_idx", GPTQ, no_g_idx, "g-idx", ("transformers", "vllm")),
    ("g_idx of zeros", GPTQ, zero_g_idx, "g-idx", ("transformers", "vllm")),
    ("zero points never filled in", GPTQ, blank_zeros, "zero-points", ("vllm", "transformers")),
    ("one module mislabelled", GPTQ, one_mislabelled, "zero-points", ("vllm", "transformers")),
    ("all mislabelled", "gptq/mislabelled-v2-as-v1", lambda path: None, "zero-point-label", ("vllm", "transformers")),
    ("labelled v2, stored v1", GPTQ, said(checkpoint_format="gptq_v2", format="gptq_v2"), "zero-point-label", ("vllm",)),
    ("desc_act with no order", GPTQ, said(desc_act=True), "desc-act", ("vllm", "sglang")),
    ("order unsaid", "gptq/4b-g32-act", said(desc_act=False), "desc-act", ("sglang", "transformers")),
    ("sym and desc_act missing", GPTQ, without_fields("sym", "desc_act"), "config-fields", ("vllm", "sglang")),
    ("bits missing", GPTQ, without_fields("bits", "group_size"), "config-fields", ("vllm", "sglang", "transformers")),
    ("zero_point missing", AWQ, without_fields("zero_point"), "config-fields", ("vllm", "sglang")),
    ("no method", GPTQ, without_fields("quant_method"), "quant-method", ("vllm", "sglang", "transformers")),
    ("bits wrong", GPTQ, said(bits=8), "sizes", ("vllm", "transformers")),
    ("group_size wrong", AWQ, said(group_size=64), "sizes", ("vllm", "transformers")),
    ("config only beside", GPTQ, beside, "quantization-config", ("vllm", "sglang", "transformers")),
    ("another file name", GPTQ, renamed, "file-name", ("transformers",)),
    ("no format", GPTQ, unmarked, "format-metadata", ("transformers",)),
    ("no index", GPTQ, no_index, "index", ("transformers", "vllm")),
    ("wrong shard names", GPTQ, wrong_shard_names, "index", ("transformers", "vllm", "sglang")),
    ("the index forgets", GPTQ, forgetful_index, "index", ("transformers", "vllm")),
    ("index cut", GPTQ, broken_index, "index", ("transformers", "vllm", "sglang")),
]


@pytest.mark.parametrize(("fixture", "damage", "kind", "engines"), [pytest.param(*rest, id=name) for name, *rest in CASES])
def test_what_is_mended_is_whole(
    fixture: str, damage: Callable[[Path], None], kind: str, engines: tuple[str, ...], tmp_path: Path
) -> None:
    whole = values(ready(fixture, tmp_path / "whole"))
    path = ready(fixture, tmp_path)
    damage(path)
    before = digest(path)
    done = repair_path(path, tmp_path / "out")
    assert kind in [repair.kind for repair in done.repairs]
    assert digest(path) == before
    assert loads(tmp_path / "out", *engines)
    assert kinds(tmp_path / "out") == []
    found = values(tmp_path / "out")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert codes(tmp_path / "out") == codes(ready(fixture, tmp_path / "again"))


@pytest.mark.parametrize("damage", [no_g_idx, wrong_shard_names, renamed, without_fields("sym")])
def test_in_place_gives_the_same_files(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = ready(GPTQ, tmp_path)
    damage(path)
    repair_path(path, tmp_path / "out")
    repair_path(path, in_place=True)
    assert names_in(path) == names_in(tmp_path / "out")
    assert digest(path) == digest(tmp_path / "out")
    assert kinds(path) == []


def test_rules_by_parts_get_the_names_of_fused_layers(tmp_path: Path) -> None:
    path = ready(GPTQ, tmp_path)
    rule = r"+:.*\.(q_proj|k_proj|v_proj)$"
    said(dynamic={rule: {"bits": 4, "group_size": 32}})(path)
    assert not loads(path, "vllm")
    repair_path(path, tmp_path / "out")
    assert loads(tmp_path / "out", "vllm")
    assert next(iter(config(tmp_path / "out")["dynamic"])) == rule


def test_small_files_come_from_another_checkpoint(tmp_path: Path) -> None:
    like, path = ready(GPTQ, tmp_path / "like"), ready(GPTQ, tmp_path)
    lost = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name in lost:
        (path / name).unlink()
    edit_json(path / "config.json", lambda c: [c.pop(key) for key in ("architectures", "model_type")] and None)
    assert not loads(path, "vllm")
    repair_path(path, tmp_path / "out", like=like)
    assert all((tmp_path / "out" / name).read_bytes() == (like / name).read_bytes() for name in lost)
    assert loads(tmp_path / "out", "vllm", "sglang", "transformers")


def test_nothing_is_written_where_nothing_is_to_be_mended(tmp_path: Path) -> None:
    path = ready(GPTQ, tmp_path)
    before = digest(path)
    found = CliRunner().invoke(qconvert, ["repair", str(path), str(tmp_path / "out")])
    assert found.exit_code == 0 and "nothing to repair" in found.stdout
    assert CliRunner().invoke(qconvert, ["repair", str(path), "--in-place"]).exit_code == 0
    assert digest(path) == before and not (tmp_path / "out").exists()


def test_a_dry_run_says_what_and_why_and_writes_nothing(tmp_path: Path) -> None:
    path = ready(GPTQ, tmp_path)
    no_g_idx(path)
    before = digest(path)
    data = json.loads(CliRunner().invoke(qconvert, ["repair", str(path), "--dry-run", "--json"]).stdout)
    assert data["dry_run"] and data["out"] is None and digest(path) == before
    assert [repair["kind"] for repair in data["repairs"]] == ["g-idx"]
    assert all(repair["what"] and repair["why"] for repair in data["repairs"])


def test_the_report_has_the_digests_of_what_kept_its_bytes(tmp_path: Path) -> None:
    path = ready(GPTQ, tmp_path)
    no_g_idx(path)
    done = repair_path(path, tmp_path / "out")
    assert done.tensors == len(load(path / "model.safetensors"))
    assert dict(done.digests).keys() == {"model.safetensors"}
    assert header(tmp_path / "out" / "model.safetensors")["__metadata__"]["format"] == "pt"


def test_changed_bytes_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters.repair import writing

    path = ready(GPTQ, tmp_path)
    no_g_idx(path)
    monkeypatch.setattr(writing, "of_tensors", lambda tensors: str(sum(raw.offset for raw in tensors)))
    with pytest.raises(Mismatch) as found:
        repair_path(path, tmp_path / "out")
    assert found.value.code == "tensor-bytes" and not (tmp_path / "out").exists()


def lost_shard(path: Path) -> None:
    weight_map = in_two(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "b.safetensors").unlink()


def cut(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def twice(path: Path) -> None:
    shutil.copy(path / "model.safetensors", path / "a.safetensors")
    (path / "model.safetensors").rename(path / "b.safetensors")


@pytest.mark.parametrize(
    ("damage", "code"),
    [(lost_shard, "tensor-missing"), (cut, "broken-weights"), (twice, "duplicate-tensor"),
     (lambda path: (path / "config.json").write_text("{"), "json")],
)  # fmt: skip
def test_what_cannot_be_mended_is_one_error(damage: Callable[[Path], None], code: str, tmp_path: Path) -> None:
    path = ready(GPTQ, tmp_path)
    damage(path)
    with pytest.raises(QFormatError) as found:
        repair_path(path, tmp_path / "out")
    assert found.value.code == code and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code"), [((), 2), (("x", "--in-place"), 2)], ids=["nowhere", "two places"]
)  # fmt: skip
def test_the_destination_is_one(words: tuple[str, ...], code: int, tmp_path: Path) -> None:
    assert CliRunner().invoke(qconvert, ["repair", str(ready(GPTQ, tmp_path)), *words]).exit_code == code


def test_only_local_checkpoints_are_repaired(tmp_path: Path) -> None:
    found = CliRunner().invoke(qconvert, ["repair", "hf://org/name", str(tmp_path / "out"), "--json"])
    assert found.exit_code == 2 and json.loads(found.stdout)["error"]["code"] == "repair-remote"


# ---------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    converted(ready(GPTQ, path.parent), path, "gguf")
    return path


def damaged(gguf: Path, tmp: Path, *words: str, removed: tuple[str, ...] = ()) -> Path:
    path = tmp / "damaged.gguf"
    edit_gguf(gguf, path, assignments=[parse_assignment(word) for word in words], removed=removed)
    return path


def metadata(path: Path) -> dict[str, Any]:
    with open_checkpoint(path) as opened:
        return {k: v for k, v in opened.metadata.items() if not k.startswith("qformats.")}


@pytest.mark.parametrize("in_place", [False, True], ids=["to another file", "in place"])
def test_keys_of_the_tokenizer_come_from_the_model(gguf: Path, tmp_path: Path, in_place: bool) -> None:
    lost = ("tokenizer.chat_template", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.pre", "tokenizer.ggml.merges")
    path, like = damaged(gguf, tmp_path, removed=lost), ready(GPTQ, tmp_path)
    assert not loads(path, "llama.cpp")
    out = path if in_place else tmp_path / "out.gguf"
    done = repair_path(path, None if in_place else out, like=like, in_place=in_place)
    assert {repair.where[0] for repair in done.repairs} == set(lost)
    assert metadata(out) == metadata(gguf)
    assert loads(out, "llama.cpp", "ollama")
    with open_checkpoint(out) as mended, open_checkpoint(gguf) as whole:
        assert of_tensors(mended.raw.values()) == of_tensors(whole.raw.values())


def test_a_file_type_that_cannot_be_is_set(gguf: Path, tmp_path: Path) -> None:
    right = metadata(gguf)["general.file_type"]
    for path in (damaged(gguf, tmp_path, "general.file_type=31"), damaged(gguf, _folder(tmp_path), removed=("general.file_type",))):
        assert kinds(path) == ["file-type"]
        repair_path(path, path.with_name("out.gguf"))
        assert metadata(path.with_name("out.gguf"))["general.file_type"] == right
        assert kinds(path.with_name("out.gguf")) == []


def test_a_whole_gguf_stays(gguf: Path, tmp_path: Path) -> None:
    assert kinds(gguf) == [] and kinds(gguf, like=ready(GPTQ, tmp_path)) == []


def test_the_model_must_be_the_same(gguf: Path, tmp_path: Path) -> None:
    like = ready(GPTQ, tmp_path)
    def grown(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary[next(iter(vocabulary)) + "x"] = len(vocabulary) + 40

    edit_json(like / "tokenizer.json", grown)
    with pytest.raises(QFormatError):
        repair_path(damaged(gguf, tmp_path, removed=("tokenizer.chat_template",)), tmp_path / "out.gguf", like=like)
    assert not (tmp_path / "out.gguf").exists()


def _folder(tmp: Path) -> Path:
    (tmp / "b").mkdir()
    return tmp / "b"
