"""Adapters merged while converting: PEFT's own merged weights in every target, one error for each adapter that does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoints import ready
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from converters import convert, plan, verify
from converters.cli import qconvert
from qformats.checkpoint import open_checkpoint
from qformats.errors import QFormatError, UsageError, WouldLose

FIXTURES = Path(__file__).parents[3] / "fixtures"
LORA, DENSE = FIXTURES / "lora", FIXTURES / "dense"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"o_proj": 3},
            "use_rslora": True,
        },
    ),
    "dora": ("llama", {"target_modules": ["q_proj", "v_proj", "gate_proj", "embed_tokens"], "use_dora": True}),
    "saved": ("llama", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm", "input_layernorm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "bias-all": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias-lora-only": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "lora-bias": ("qwen2", {"target_modules": ["k_proj"], "lora_bias": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
}


def base_of(name: str) -> Path:
    return LORA / "gpt2" / "base" if name == "gpt2" else DENSE / name


def float_model(folder: Path) -> Any:
    """The model of a folder's config in float32, its weights those of the folder, as far as they are floats."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.float32)
    if not any(folder.glob("*.safetensors")):
        return model
    with open_checkpoint(folder) as checkpoint, torch.no_grad():
        for key, value in model.state_dict().items():
            if key in checkpoint.tensors:
                found = checkpoint.tensors[key]
                value.copy_(found if isinstance(found, torch.Tensor) else found.dequantize(torch.float32))
    return model


def saved(model: Any, folder: Path) -> Path:
    """A model as PEFT or transformers saves it, the fixture's tokenizer beside it."""
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DENSE / "llama" / file, folder)
    return folder


def adapter(model: Any, folder: Path, **options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random adapter on a model, saved, and the weights that PEFT merges it into."""
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    for key, weight in wrapped.named_parameters():
        if "lora_magnitude" in key:
            weight.data = weight.data * (1 + torch.rand_like(weight) * 0.5)
        elif "lora_" in key or weight.requires_grad:
            weight.data = weight.data + torch.randn_like(weight) * 0.1
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder, {k: v.clone() for k, v in wrapped.merge_and_unload().state_dict().items()}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        values = {name: checkpoint.tensors[name] for name in checkpoint.tensors}
    return {name: v.to(torch.float32) if isinstance(v, torch.Tensor) else v.dequantize(torch.float32) for name, v in values.items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == {name for name in wanted if name in found}
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_the_merged_weights_are_pefts(name: str, tmp_path: Path) -> None:
    base, options = CASES[name]
    folder = saved(float_model(base_of(base)), tmp_path / "base")
    where, wanted = adapter(float_model(folder), tmp_path / "adapter", **options)
    report = convert(folder, tmp_path / "merged", to="hf:f32", lora=[where])
    found = tensors_of(tmp_path / "merged")
    assert_same(found, wanted)
    before = tensors_of(folder)
    changed = {key for key in found if not torch.equal(found[key], before[key])}
    assert changed == {line.name for line in report.tensors if line.merged} != set()


# ---------------------------------------------------------------- codes

CODES = [
    ("gptq/4b-g32-asym-v1", ["q_proj", "down_proj"]),
    ("gptq/4b-g32-act", ["q_proj", "o_proj", "up_proj", "down_proj"]),
    ("awq/gemm-g32", ["k_proj", "v_proj", "gate_proj"]),
]


@pytest.fixture(scope="module", params=CODES, ids=[name for name, _ in CODES])
def coded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A checkpoint of codes, an adapter, and PEFT's merged weights of the dequantized model."""
    name, layers = request.param
    folder = tmp_path_factory.mktemp("coded")
    source = ready(name, folder)
    where, wanted = adapter(float_model(source), folder / "adapter", target_modules=layers)
    return source, where, wanted


def in_gguf(source: Path, wanted: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a GGUF of the model with the merged weights."""
    model = float_model(source)
    model.load_state_dict(wanted)
    convert(saved(model, folder / "floats"), folder / "floats.gguf", to="gguf:f32")
    return tensors_of(folder / "floats.gguf")


def test_codes_and_adapter_to_floats(coded: Any, tmp_path: Path) -> None:
    source, where, wanted = coded
    report = convert(source, tmp_path / "out", to="hf:f32", lora=[where])
    assert_same(tensors_of(tmp_path / "out"), wanted)
    assert {line.kind for line in report.tensors if line.merged} == {"dequantized"}


def test_codes_and_adapter_to_gguf(coded: Any, tmp_path: Path) -> None:
    """Act-order or not: values within the error that the report states; what the adapter does not touch as without it."""
    source, where, wanted = coded
    report = convert(source, tmp_path / "out.gguf", to="gguf:q8_0", lora=[where], allow_requantize=True)
    convert(source, tmp_path / "plain.gguf", to="gguf:q8_0", allow_requantize=True)
    found, plain = tensors_of(tmp_path / "out.gguf"), tensors_of(tmp_path / "plain.gguf")
    act_order = "act" in source.name
    values = None if act_order else in_gguf(source, wanted, tmp_path)
    for line in report.tensors:
        if not line.merged:
            assert act_order or torch.equal(found[line.name], plain[line.name])
            continue
        assert (line.kind, line.type, line.reason) == ("requantized", "Q8_0", "merged adapter adapter")
        assert line.error is not None and 0 < line.error < 0.01
        if values is not None:
            error = (found[line.name] - values[line.name]).norm() / values[line.name].norm()
            assert float(error) == pytest.approx(line.error, rel=1e-3)
    assert any("merged into" in note for note in report.notes())


def test_the_type_without_a_name_is_that_of_the_untouched_tensor(tmp_path: Path) -> None:
    source = ready("awq/gemm-g32", tmp_path)
    where, _ = adapter(float_model(source), tmp_path / "adapter", target_modules=["q_proj"])
    for to, kept in (("gguf", "exact"), ("awq", "copied"), ("gptq", "exact")):
        merged, before = plan(source, to=to, lora=[where]), plan(source, to=to)
        types = {job.name: job.type for job in before.jobs}
        assert {job.name: job.type for job in merged.jobs} == types
        assert {job.kind for job in merged.jobs if job.storage is not None and not job.merged} <= {kept}
        assert [job.kind for job in merged.jobs if job.merged] == ["requantized"]
        merged.checkpoint.close()
        before.checkpoint.close()


@pytest.mark.parametrize("to", ["gptq:int4", "awq:int4"])
def test_codes_again_in_an_integer_format(to: str, tmp_path: Path) -> None:
    source = ready("awq/gemm-g32", tmp_path)
    where, wanted = adapter(float_model(source), tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    report = convert(source, tmp_path / "out", to=to, lora=[where])
    found = tensors_of(tmp_path / "out")
    for line in report.tensors:
        name = f"{line.name.removesuffix('.weight')}.weight"
        error = float((found[name] - wanted[name]).norm() / wanted[name].norm()) if line.merged else 0.0
        assert error < 0.12 and (not line.merged or error == pytest.approx(line.error, rel=1e-3))


def test_codes_of_gpt2_keep_their_axes(tmp_path: Path) -> None:
    """Its floats have inputs as rows, its codes outputs: merged matrices become floats as the model has them, and codes as they were."""
    convert(saved(float_model(base_of("gpt2")), tmp_path / "base"), tmp_path / "nf4", to="bitsandbytes:nf4", allow_requantize=True)
    convert(tmp_path / "nf4", tmp_path / "floats", to="hf:f32")
    where, wanted = adapter(float_model(tmp_path / "floats"), tmp_path / "adapter", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    convert(tmp_path / "nf4", tmp_path / "merged", to="hf:f32", lora=[where])
    assert_same(tensors_of(tmp_path / "merged"), wanted)
    convert(tmp_path / "merged", tmp_path / "wanted.gguf", to="gguf:f32")
    convert(tmp_path / "nf4", tmp_path / "merged.gguf", to="gguf:f32", lora=[where])
    assert_same(tensors_of(tmp_path / "merged.gguf"), tensors_of(tmp_path / "wanted.gguf"))
    convert(tmp_path / "nf4", tmp_path / "codes", to="bitsandbytes", lora=[where], allow_requantize=True)
    convert(tmp_path / "codes", tmp_path / "again", to="hf:f32")
    assert all(float((v - wanted[k]).norm()) <= 0.12 * float(wanted[k].norm()) for k, v in tensors_of(tmp_path / "again").items())


def test_nested_scales_are_found_anew(tmp_path: Path) -> None:
    """The offset of a double-quantized weight's scales follows from its codes: a merged one has another."""
    source = ready("bitsandbytes/nf4-128-double-bf16", tmp_path)
    where, wanted = adapter(float_model(source), tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    convert(source, tmp_path / "out", to="bitsandbytes", lora=[where], allow_requantize=True)
    found, before = tensors_of(tmp_path / "out"), tensors_of(source)
    changed = {name for name, value in found.items() if not torch.equal(value, before[name])}
    assert changed and all(name.endswith(("q_proj.weight", "down_proj.weight")) for name in changed)
    assert all(float((found[name] - wanted[name]).norm() / wanted[name].norm()) < 0.12 for name in changed)
    assert verify(source, tmp_path / "out", lora=[where]).ok


@pytest.mark.parametrize("name", ["gptq/moe-qwen3", "awq/gemm-moe-qwen3"])
def test_one_expert_of_a_stack(name: str, tmp_path: Path) -> None:
    """An adapter of two experts of many: the stack gets new codes, the other experts' are made of their own values."""
    source = ready(name, tmp_path)
    with open_checkpoint(source) as checkpoint:
        modules = [m for m in checkpoint.modules if ".experts." in m and m.endswith("down_proj")][1:3]
        stack = [m for m in checkpoint.modules if m.endswith("down_proj") and ".experts." in m]
        own: dict[str, Any] = {m: checkpoint.tensors[f"{m}.weight"].dequantize(torch.float64) for m in stack}  # type: ignore[call-arg]
    torch.manual_seed(2)
    pairs = {m: (torch.randn(3, own[m].shape[1]) * 0.1, torch.randn(own[m].shape[0], 3) * 0.1) for m in modules}
    where = written(tmp_path / "adapter", {"r": 3, "lora_alpha": 6}, pairs)
    report = convert(source, tmp_path / "out.gguf", to="gguf:f32", lora=[where])
    (line,) = (line for line in report.tensors if line.merged)
    found = tensors_of(tmp_path / "out.gguf")[line.name]
    for number, (module, value) in enumerate(own.items()):
        added = 2.0 * (pairs[module][1].double() @ pairs[module][0].double()) if module in pairs else 0.0
        torch.testing.assert_close(found[number], (value + added).float(), rtol=1e-6, atol=1e-7)
    convert(source, tmp_path / "q.gguf", to="gguf", lora=[where])
    assert verify(source, tmp_path / "q.gguf", lora=[where]).ok


# ---------------------------------------------------------------- a GGUF as the source


@pytest.mark.parametrize("name", [name for name in CASES if name != "dora"])
def test_merged_into_a_gguf(name: str, tmp_path: Path) -> None:
    base, options = CASES[name]
    folder = saved(float_model(base_of(base)), tmp_path / "base")
    where, wanted = adapter(float_model(folder), tmp_path / "adapter", **options)
    convert(folder, tmp_path / "base.gguf", to="gguf:f32")
    convert(tmp_path / "base.gguf", tmp_path / "back", to="hf:f32", lora=[where])
    assert_same(tensors_of(tmp_path / "back"), wanted)


def test_a_gguf_with_reordered_rows_is_refused(tmp_path: Path) -> None:
    source = ready("gptq/4b-g32-act", tmp_path)
    where, _ = adapter(float_model(source), tmp_path / "adapter", target_modules=["down_proj"])
    convert(source, tmp_path / "base.gguf", to="gguf", allow_requantize=True)
    with pytest.raises(QFormatError) as caught:
        convert(tmp_path / "base.gguf", tmp_path / "out.gguf", to="gguf:q8_0", lora=[where])
    assert caught.value.code == "lora-gguf"


# ---------------------------------------------------------------- several, and how much of each


def written(folder: Path, config: dict[str, Any], pairs: dict[str, Any], **more: torch.Tensor) -> Path:
    """An adapter directory by hand: pairs (A, B) by module, other tensors by name."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    tensors = {f"base_model.model.{m}.lora_{side}.weight": t for m, both in pairs.items() for side, t in zip("AB", both, strict=True)}
    save_file({name: t.contiguous() for name, t in {**tensors, **more}.items()}, folder / "adapter_model.safetensors")
    return folder


def test_two_adapters_with_weights(tmp_path: Path) -> None:
    torch.manual_seed(4)
    module = "model.layers.0.self_attn.q_proj"
    with open_checkpoint(DENSE / "llama") as checkpoint:
        own = checkpoint.read(module).to(torch.float64)  # type: ignore[union-attr]
    n, k = own.shape
    pairs = [(torch.randn(4, k) * 0.1, torch.randn(n, 4) * 0.1) for _ in range(2)]
    first, second = (written(tmp_path / name, {}, {module: pair}) for name, pair in zip("ab", pairs, strict=True))
    report = convert(DENSE / "llama", tmp_path / "out", to="hf:f32", lora=[f"{first}=0.5", (second, -2)])
    deltas = [2.0 * b.double() @ a.double() for a, b in pairs]
    wanted = own + 0.5 * deltas[0] - 2 * deltas[1]
    torch.testing.assert_close(tensors_of(tmp_path / "out")[f"{module}.weight"], wanted.float(), rtol=1e-6, atol=1e-7)
    assert [line.merged for line in report.tensors if line.merged] == [("a (weight 0.5)", "b (weight -2)")]
    assert [entry["name"] for entry in report.to_json()["adapters"]] == ["a", "b"]


def test_half_of_a_saved_tensor_and_of_dora(tmp_path: Path) -> None:
    folder = saved(float_model(DENSE / "llama"), tmp_path / "base")
    options = {"target_modules": ["v_proj"], "use_dora": True, "modules_to_save": ["norm"]}
    where, wanted = adapter(float_model(folder), tmp_path / "adapter", **options)
    convert(folder, tmp_path / "out", to="hf:f32", lora=[(where, 0.5)])
    before = tensors_of(folder)
    assert_same(tensors_of(tmp_path / "out"), {name: (before[name] + wanted[name]) / 2 for name in before})


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_float_model_keeps_its_dtype(to: str, tmp_path: Path) -> None:
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    report = convert(DENSE / "llama", out, to=to, lora=[LORA / "llama"])
    assert {(line.type, line.kind) for line in report.tensors if line.merged} == {("BF16", "dequantized")}
    assert all(line.kind in ("copied", "exact") for line in report.tensors if not line.merged)
    assert verify(DENSE / "llama", out, lora=[LORA / "llama"]).ok


# ---------------------------------------------------------------- consent, records, the command line


def test_exact_refuses(tmp_path: Path) -> None:
    with pytest.raises(WouldLose) as caught:
        convert(DENSE / "llama", tmp_path / "out.gguf", to="gguf:f32", lora=[LORA / "llama"], exact=True)
    assert caught.value.code == "not-exact" and "merged adapter llama" in str(caught.value)


def test_verify_wants_the_same_adapters(tmp_path: Path) -> None:
    source, out = DENSE / "llama", tmp_path / "out.gguf"
    convert(source, out, to="gguf:q8_0", lora=[f"{LORA / 'llama'}=0.5"])
    told = verify(source, out)
    assert told.ok and told.method == "digests" and any("'llama'" in text and "--lora" in text for text in told.unseen)
    again = verify(source, out, lora=[(LORA / "llama", 0.5)])
    assert again.ok and again.method == "replay"
    for given, code in (((), "lora-missing"), ((LORA / "llama",), "lora-other"), ((LORA / "rslora",), "lora-other")):
        with pytest.raises(UsageError) as caught:
            verify(source, out, lora=given, replay=True)
        assert caught.value.code == code
    data = bytearray(out.read_bytes())
    data[-1] ^= 1
    out.write_bytes(data)
    blind = verify(source, out)
    assert not blind.ok and "--lora" in blind.unseen[0]
    assert not verify(source, out, lora=[(LORA / "llama", 0.5)]).ok
    convert(source, tmp_path / "plain.gguf", to="gguf")
    with pytest.raises(UsageError) as caught:
        verify(source, tmp_path / "plain.gguf", lora=[LORA / "llama"])
    assert caught.value.code == "lora-other"


def test_from_the_command_line(tmp_path: Path) -> None:
    source, lora, out = str(DENSE / "llama"), str(LORA / "llama"), str(tmp_path / "out.gguf")
    run = CliRunner()
    planned = run.invoke(qconvert, ["plan", source, "--to", "gguf:q8_0", "--lora", f"{lora}=0.5", "--json"])
    assert planned.exit_code == 0
    merged = [line["name"] for line in json.loads(planned.stdout)["tensors"] if line.get("merged") == ["llama (weight 0.5)"]]
    assert "blk.0.attn_q.weight" in merged
    (tmp_path / "plan.json").write_text(planned.stdout)
    stale = run.invoke(qconvert, ["convert", source, out, "--plan", str(tmp_path / "plan.json")])
    assert stale.exit_code == 2 and "lora-missing" in stale.output
    arguments = ["convert", source, out, "--plan", str(tmp_path / "plan.json"), "--lora", f"{lora}=0.5", "--report"]
    for suffix in ("json", "md", "html"):
        report = tmp_path / f"report.{suffix}"
        done = run.invoke(qconvert, [*arguments, str(report), "--overwrite"])
        assert done.exit_code == 0 and "is merged into 14 tensors" in done.output
        assert "merged adapter" in report.read_text()
    assert run.invoke(qconvert, ["verify", source, out, "--lora", f"{lora}=0.5"]).exit_code == 0
    others = (["quantize", source, out, "--to", "gguf:q4_0"], ["hf-to-gguf", source, out], ["dequantize", source, str(tmp_path / "d")])
    for command in others:
        done = run.invoke(qconvert, [*command, "--lora", lora, "--overwrite"])
        assert done.exit_code == 0 and "merged adapter llama" in done.output
    assert run.invoke(qconvert, ["hf-to-gguf", source, out, "--lora", lora, "--exact", "--overwrite"]).exit_code == 7


# ---------------------------------------------------------------- what does not fit

Q, HEAD = "model.layers.0.self_attn.q_proj", "base_model.model."


def config(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        found = load_file(file)
        change(found)
        save_file({name: value.contiguous() for name, value in found.items()}, file)

    return edit


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Path], Any]:
    return tensors(lambda t: t.update({HEAD + name: torch.ones(shape, dtype=dtype)}))


BROKEN: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "no config": ("not-found", lambda folder: (folder / "adapter_config.json").unlink()),
    "config is no JSON": ("json", lambda folder: (folder / "adapter_config.json").write_text("{")),
    "no weights": ("not-found", lambda folder: (folder / "adapter_model.safetensors").unlink()),
    "a pickle": ("pickle", lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")),
    "cut off": ("truncated", lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\1\2\3")),
    "no alpha": ("lora-config", config(lora_alpha=None)),
    "alpha is a word": ("lora-config", config(lora_alpha="8")),
    "rank is zero": ("lora-config", config(r=0)),
    "rank is another": ("lora-pair", config(r=5)),
    "a pattern that is none": ("lora-config", config(alpha_pattern={"(": 2})),
    "bias of no kind": ("lora-config", config(bias="some")),
    "another kind of adapter": ("lora-config", config(peft_type="LOHA")),
    "layer replication": ("lora-config", config(layer_replication=[[0, 1], [0, 2]])),
    "parameters as targets": ("lora-config", config(target_parameters=["mlp.experts.gate_up_proj"])),
    "trainable tokens": ("lora-config", config(trainable_token_indices=[1])),
    "QALoRA": ("lora-config", config(use_qalora=True)),
    "activated LoRA": ("lora-config", config(alora_invocation_tokens=[1, 2])),
    "Arrow": ("lora-config", config(arrow_config={"top_k": 2})),
    "PiSSA took something out of the base": ("lora-config", config(init_lora_weights="pissa_niter_4")),
    "DoRA without magnitudes": ("lora-pair", config(use_dora=True)),
    "magnitudes without DoRA": ("lora-pair", put(f"{Q}.lora_magnitude_vector", 64)),
    "lora_bias without biases": ("lora-pair", config(lora_bias=True)),
    "DoRA and lora_bias": ("lora-config", config(lora_bias=True, use_dora=True)),
    "half a pair": ("lora-pair", tensors(lambda t: t.pop(f"{HEAD}{Q}.lora_A.weight"))),
    "ranks of a pair differ": ("lora-pair", put(f"{Q}.lora_A.weight", 3, 64)),
    "nothing": ("lora-pair", tensors(dict.clear)),
    "no part of an adapter": ("lora-tensor", put(f"{Q}.lora_C.weight", 4, 4)),
    "integers": ("not-float", put(f"{Q}.lora_A.weight", 4, 64, dtype=torch.int8)),
    "not a number": ("lora-values", tensors(lambda t: t[f"{HEAD}{Q}.lora_A.weight"].fill_(float("nan")))),
    "infinite once merged": ("lora-values", tensors(lambda t: [t[f"{HEAD}{Q}.lora_{s}.weight"].fill_(3e38) for s in "AB"])),
    "another model's layer": ("unmapped-tensor", put("model.layers.7.mlp.up_proj.weight", 4, 4)),
    "a bias that the model lacks": ("unmapped-tensor", put(f"{Q}.bias", 64)),
    "inputs of another width": ("tensor-shape", put(f"{Q}.lora_A.weight", 4, 63)),
    "a saved norm of another width": ("tensor-shape", put("model.norm.weight", 63)),
    "a vocabulary that grew": ("tensor-shape", put("lm_head.weight", 99, 64)),
}


@pytest.mark.parametrize("to", ["hf:f32", "gguf:f32"])
@pytest.mark.parametrize("case", BROKEN)
def test_one_error_for_each_adapter_that_does_not_fit(case: str, to: str, tmp_path: Path) -> None:
    code, change = BROKEN[case]
    where = written(tmp_path / "adapter", {}, {Q: (torch.ones(4, 64), torch.ones(64, 4))})
    change(where)
    with pytest.raises(QFormatError) as caught:
        convert(DENSE / "llama", tmp_path / "out", to=to, lora=[where])
    assert caught.value.code == code and caught.value.hint is not None
    assert not (tmp_path / "out").exists()


WORDS = [("=half", "lora-weight"), ("=0", "lora-weight"), ("=nan", "lora-weight"), ("x=0.5", "not-found")]


@pytest.mark.parametrize(("word", "code"), WORDS)
def test_a_weight_that_is_none(word: str, code: str) -> None:
    with pytest.raises(QFormatError) as caught:
        plan(DENSE / "llama", to="gguf", lora=[f"{LORA / 'llama'}{word}"])
    assert caught.value.code == code


def test_a_lora_bias_without_a_bias(tmp_path: Path) -> None:
    bias = {f"{HEAD}{Q}.lora_B.bias": torch.ones(64)}
    where = written(tmp_path / "adapter", {"lora_bias": True}, {Q: (torch.ones(4, 64), torch.ones(64, 4))}, **bias)
    with pytest.raises(QFormatError) as caught:
        plan(DENSE / "llama", to="gguf", lora=[where])
    assert caught.value.code == "lora-bias"


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_one_use_of_a_tied_matrix(layer: str, to: str, tmp_path: Path) -> None:
    where, _ = adapter(float_model(DENSE / "llama-tied"), tmp_path / "adapter", target_modules=[layer])
    with pytest.raises(QFormatError) as caught:
        plan(DENSE / "llama-tied", to=to, lora=[where])
    assert caught.value.code == "lora-tied"
