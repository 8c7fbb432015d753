"""Quantize on load: the model that the converted checkpoint gives, and saved the very files that converting writes."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import converted, ready
from test_load import logits

from converters import unwritten
from qformats import registry
from qformats.checkpoint import open_checkpoint
from qformats.errors import QFormatError
from qformats.quantize.imatrix import Entry, ImportanceMatrix, read_imatrix, write_imatrix
from qformats.runtime.loader import load_model
from qformats.runtime.packed import Packed

pytest.importorskip("transformers")
torch.set_num_threads(1)

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
TARGETS = {
    "gptq": "gptq:int4,group=32", "awq": "awq:int4,group=32", "gguf": "gguf:q4_k_m", "fp8": "fp8:fp8", "fbgemm_fp8": "fbgemm_fp8:fp8",
    "modelopt": "modelopt:nvfp4", "bitsandbytes": "bitsandbytes:nf4", "torchao": "torchao:int4,group=32", "hqq": "hqq:int4,group=64",
    "quanto": "quanto:qint8", "compressed-tensors": "compressed-tensors:int4,group=32", "eetq": "eetq:int8", "bitnet": "bitnet:ternary",
    "mlx": "mlx:int4,group=32", "gemma": "gemma:int4", "hf": "hf:f16",
}  # fmt: skip
OF_THEIR_OWN = {"mxfp4", "aqlm"}  # experts of gpt-oss alone, codebooks of calibration alone
MOE = ["gguf:q4_k_m", "gptq:int4,group=32", "bitsandbytes:nf4", "fp8:fp8", "compressed-tensors:int4,group=32"]


def as_converted(source: Path, folder: Path, to: str, **changes: Any) -> Path:
    out = folder / ("converted.gguf" if to.startswith("gguf") else "converted")
    converted(source, out, to, allow_requantize=True, **changes)
    return out


def files(path: Path) -> dict[str, bytes]:
    """Name → bytes of a directory's files, or of the file."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def check_same(model: Any, out: Path, folder: Path) -> None:
    """``model`` computes what the converted checkpoint ``out`` does, and saves as its bytes."""
    wanted = logits(load_model(out), IDS)
    assert torch.allclose(logits(model, IDS), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    saved = folder / f"saved{out.suffix}"
    model.save_pretrained(saved)
    assert files(saved) == files(out)


def packed_in(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Packed)}


def test_every_format_that_is_written_has_a_target_here() -> None:
    assert {row.name for row in registry.ROWS if row.writes} == TARGETS.keys() | OF_THEIR_OWN


@pytest.mark.parametrize("to", TARGETS.values())
def test_a_model_is_that_of_the_converted_checkpoint(to: str, tmp_path: Path) -> None:
    source = ready("dense/llama", tmp_path)
    model = load_model(source, quantize=to, device="cpu")
    assert bool(packed_in(model)) == (to != "hf:f16")
    check_same(model, as_converted(source, tmp_path, to), tmp_path)


@pytest.mark.parametrize("to", MOE)
def test_experts_too(to: str, tmp_path: Path) -> None:
    source = ready("dense/qwen3_moe", tmp_path)
    model = load_model(source, quantize=to)
    assert any(".experts." in name for name in packed_in(model))
    check_same(model, as_converted(source, tmp_path, to), tmp_path)


@pytest.mark.parametrize("to", ["gguf:q4_0", "gptq:int4,group=32"])
def test_a_gguf_of_floats_is_a_source(to: str, tmp_path: Path) -> None:
    source = tmp_path / "floats.gguf"
    converted(ready("dense/gemma3", tmp_path), source, "gguf:f32")
    check_same(load_model(source, quantize=to), as_converted(source, tmp_path, to), tmp_path)


def test_a_gguf_saved_into_a_directory_is_named_after_its_source(tmp_path: Path) -> None:
    source = ready("dense/llama-tied", tmp_path)
    load_model(source, quantize="gguf:q8_0").save_pretrained(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [f"{source.name}-q8_0.gguf"]


@pytest.mark.parametrize("to", ["gptq:int4,group=32", "bitsandbytes:nf4", "bitnet:ternary", "quanto:qint8", "gguf:q4_0"])
def test_every_weight_is_made_once(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()
    make = unwritten.make_parts

    def counted(plan: Any, job: Any) -> Any:
        made[job.name] += 1
        return make(plan, job)

    monkeypatch.setattr(unwritten, "make_parts", counted)
    load_model(ready("dense/qwen3_moe", tmp_path), quantize=to)
    assert set(made.values()) == {1}


# ---------------------------------------------------------------- which modules


def test_the_head_and_the_embedding_stay_floats(tmp_path: Path) -> None:
    model = load_model(ready("dense/llama", tmp_path), quantize="hqq:int4,group=64")
    assert len(packed_in(model)) == 14
    assert not packed_in(model) & {"lm_head", "model.embed_tokens"}


def test_named_modules_stay_floats(tmp_path: Path) -> None:
    source = ready("dense/llama", tmp_path)
    model = load_model(source, quantize="gptq:int4,group=32", modules_to_not_convert=["lm_head", "k_proj", "layers.1.mlp"])
    left = {name for name in packed_in(model) if "k_proj" in name or "layers.1.mlp" in name}
    assert left == set() and len(packed_in(model)) == 9
    names = r"^(?:.*k_proj|.*layers\.1\.mlp\..*|lm_head)\.weight$"
    as_converted(source, tmp_path, "gptq:int4,group=32", tensor_types=((names, "bf16"),))
    model.save_pretrained(tmp_path / "saved")
    parts = [open_checkpoint(tmp_path / folder) for folder in ("saved", "converted")]
    assert {n: (r.dtype, r.read()) for n, r in parts[0].raw.items()} == {n: (r.dtype, r.read()) for n, r in parts[1].raw.items()}


@pytest.mark.parametrize("to", ["gptq:int4,group=32", "gguf:q4_0"])
def test_experts_may_stay_floats(to: str, tmp_path: Path) -> None:
    source = ready("dense/qwen3_moe", tmp_path)
    model = load_model(source, quantize=to, modules_to_not_convert=["mlp.experts"])
    assert packed_in(model) and not any(".experts" in name for name in packed_in(model))
    out = as_converted(source, tmp_path, to, tensor_types=((r"\.experts\.|_exps\.", "bf16"),))
    assert torch.allclose(logits(model, IDS), logits(load_model(out), IDS), atol=1e-5)


def test_some_experts_alone_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(QFormatError, match=r"layers\.1\.mlp\.experts\.2") as caught:
        load_model(ready("dense/qwen3_moe", tmp_path), quantize="gptq:int4,group=32", modules_to_not_convert=["layers.1.mlp.experts.2"])
    assert caught.value.code == "mixed-experts"


def test_modules_of_a_gguf_bear_the_names_of_transformers(tmp_path: Path) -> None:
    source = ready("dense/llama", tmp_path)
    model = load_model(source, quantize="gguf:q4_0", modules_to_not_convert=["lm_head"], per_module={r"layers\.0\.mlp\.down_proj": "q8_0"})
    assert "lm_head" not in packed_in(model)
    types = (("^output\\.weight$", "bf16"), ("^blk\\.0\\.ffn_down\\.weight$", "q8_0"))
    check_same(model, as_converted(source, tmp_path, "gguf:q4_0", tensor_types=types), tmp_path)


def test_the_head_of_a_tied_gguf_is_its_embedding(tmp_path: Path) -> None:
    model = load_model(ready("dense/llama-tied", tmp_path), quantize="gguf:q4_0", modules_to_not_convert=["lm_head"])
    assert not packed_in(model) & {"lm_head", "model.embed_tokens"}


@pytest.mark.parametrize("word", ["int8", "gptq:int8", "gptq:int8,group=32"])
def test_a_module_of_another_type(word: str, tmp_path: Path) -> None:
    source, to = ready("dense/llama", tmp_path), "gptq:int4,group=32"
    model = load_model(source, quantize=to, per_module={r"v_proj": word})
    check_same(model, as_converted(source, tmp_path, to, tensor_types=(("v_proj", "int8"),)), tmp_path)


def test_a_pattern_that_ends_with_the_module_means_it(tmp_path: Path) -> None:
    model = load_model(ready("dense/llama", tmp_path), quantize="gptq:int4,group=32", per_module={r"\.v_proj$": "hf:bf16"})
    assert len(packed_in(model)) == 12


def test_importances_weigh_the_errors(tmp_path: Path) -> None:
    source, rng = ready("dense/llama", tmp_path), np.random.default_rng(3)
    entry = Entry(np.exp(rng.normal(0, 2, (1, 64))).astype(np.float32), np.array([8]))
    matrix = ImportanceMatrix({f"blk.{i}.attn_{x}.weight": entry for i in (0, 1) for x in "qkv"}, ("text.txt",), 8, 512)
    write_imatrix(matrix, tmp_path / "importances.gguf")
    model = load_model(source, quantize="gguf:q4_0", imatrix=tmp_path / "importances.gguf")
    out = as_converted(source, tmp_path, "gguf:q4_0", imatrix=read_imatrix(tmp_path / "importances.gguf"))
    check_same(model, out, tmp_path)
    assert not torch.equal(logits(model, IDS), logits(load_model(source, quantize="gguf:q4_0"), IDS))


# ---------------------------------------------------------------- what such a model can do


def test_adapters_learn_on_top(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load_model(ready("dense/llama", tmp_path), quantize="bitsandbytes:nf4", dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([value for value in tuned.parameters() if value.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]


def test_it_can_become_floats(tmp_path: Path) -> None:
    model = load_model(ready("dense/llama", tmp_path), quantize="gguf:q4_0", dtype=torch.float32)
    before = logits(model, IDS)
    model.dequantize()
    assert packed_in(model) == set()
    assert torch.allclose(logits(model, IDS), before, atol=1e-4)


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning, which reads weights, must not be reached."""

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr("converters.on_load.make_plan", fail)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"quantize": "nothing:int4"}, "unknown-format"),
        ({"quantize": "gptq:int99"}, "target-type"),
        ({"quantize": "gptq"}, "target-type-missing"),
        ({"quantize": "gguf:q4_0,group=3"}, "target-option"),
        ({"quantize": "gguf:q4_0", "modules_to_not_convert": ["lm_heads"]}, "absent-module"),
        ({"quantize": "gguf:q4_0", "per_module": {"(": "q8_0"}}, "tensor-type"),
        ({"quantize": "gguf:q4_0", "per_module": {"no_such": "q8_0"}}, "absent-module"),
        ({"quantize": "gguf:q4_0", "per_module": {"v_proj": "q4_k_m"}}, "target-type"),
        ({"quantize": "gptq:int4", "per_module": {"v_proj": "awq:int4"}}, "target-type"),
        ({"quantize": "gptq:int4", "per_module": {"v_proj": "gptq:int4,group=16"}}, "target-type"),
        ({"imatrix": "importances.gguf"}, "quantize-missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else re.sub(r"\W+", "-", json.dumps(value)),
)
@pytest.mark.usefixtures("unread")
def test_a_wrong_word_is_refused_before_any_weight_is_read(options: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(QFormatError) as caught:
        load_model(ready("dense/llama", tmp_path), **options)
    assert caught.value.code == code


@pytest.mark.usefixtures("unread")
def test_codes_are_not_rounded_again_unasked(tmp_path: Path) -> None:
    with pytest.raises(QFormatError) as caught:
        load_model(ready("gptq/4b-g32-sym", tmp_path), quantize="gguf:q4_0")
    assert caught.value.code == "requantize" and "allow_requantize" in str(caught.value)


def test_codes_are_rounded_again_with_consent(tmp_path: Path) -> None:
    source = ready("gptq/4b-g32-sym", tmp_path)
    model = load_model(source, quantize="gguf:q8_0", allow_requantize=True)
    check_same(model, as_converted(source, tmp_path, "gguf:q8_0"), tmp_path)
