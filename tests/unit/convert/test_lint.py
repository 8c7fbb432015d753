"""What lint says: every rule of every engine has a broken copy of a fixture that it is true of, and whole ones that it is not true of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FIXTURES, array, converted, edit, edit_json, load, put, ready
from click.testing import CliRunner

from converters.cli import qconvert
from converters.commands_lint import ENGINES as OFFERED
from converters.gguf_edit import edit_gguf, split_gguf
from converters.lint import ENGINES, lint_path, load_rules
from converters.lint.rules import OPERATORS, SEVERITIES
from converters.metadata_words import parse_assignment
from qformats.errors import QFormatError

Make = Callable[[Path, Path], Path]
GPTQ, AWQ, CT, FP8, DENSE = "gptq/4b-g32-sym", "awq/gemm-g32", "compressed-tensors/w4-sym", "fp8/block", "dense/llama"
GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    converted(ready(GPTQ, path.parent), path, "gguf")
    return path


def changed(fixture: str, **fields: Any) -> Make:
    """A fixture with fields of its quantization config set, or with None removed."""

    def make(tmp: Path, _: Path) -> Path:
        path = ready(fixture, tmp)

        def change(config: dict[str, Any]) -> None:
            stated = config["quantization_config"]
            stated.update({k: v for k, v in fields.items() if v is not None})
            for key in [k for k, v in fields.items() if v is None]:
                stated.pop(key, None)

        edit_json(path / "config.json", change)
        (path / "quantize_config.json").unlink(missing_ok=True)
        return path

    return make


def model(fixture: str, **fields: Any) -> Make:
    """A fixture with fields of config.json set, or with None removed."""

    def make(tmp: Path, _: Path) -> Path:
        path = ready(fixture, tmp)

        def change(config: dict[str, Any]) -> None:
            config.update({k: v for k, v in fields.items() if v is not None})
            for key in [k for k, v in fields.items() if v is None]:
                config.pop(key, None)

        edit_json(path / "config.json", change)
        return path

    return make


def plain(fixture: str) -> Make:
    return lambda tmp, _: ready(fixture, tmp)


def groups(group: Mapping[str, Any], **weights: Any) -> Make:
    """compressed-tensors with one config group that is otherwise than the tensors."""
    return changed(CT, config_groups={"group_0": {**GROUP, **group, "weights": {**GROUP["weights"], **weights}}})  # type: ignore[dict-item]


def without(fixture: str, *names: str) -> Make:
    def make(tmp: Path, _: Path) -> Path:
        path = ready(fixture, tmp)
        for name in names:
            (path / name).unlink()
        return path

    return make


def tensors(fixture: str, change: Callable[[dict[str, Any]], Any]) -> Make:
    def make(tmp: Path, _: Path) -> Path:
        path = ready(fixture, tmp)
        edit(path, change)
        return path

    return make


def indexed(weight_map: Callable[[dict[str, str]], Any], file: str = "model-00001-of-00001.safetensors") -> Make:
    """A fixture as one shard under an index that ``weight_map`` changes."""

    def make(tmp: Path, _: Path) -> Path:
        path = ready(GPTQ, tmp)
        names = list(load(path / "model.safetensors"))
        (path / "model.safetensors").rename(path / file)
        found = dict.fromkeys(names, file)
        weight_map(found)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": found}))
        return path

    return make


def edited(*words: str, removed: tuple[str, ...] = ()) -> Make:
    """The GGUF with other metadata."""

    def make(tmp: Path, gguf: Path) -> Path:
        edit_gguf(gguf, tmp / "edited.gguf", assignments=[parse_assignment(word) for word in words], removed=removed)
        return tmp / "edited.gguf"

    return make


def other_type(tmp: Path, _: Path) -> Path:
    converted(ready(GPTQ, tmp), tmp / "iq.gguf", "gguf:iq4_nl", allow_requantize=True)
    return tmp / "iq.gguf"


def renamed_embedding(tmp: Path, gguf: Path) -> Path:
    edit_gguf(gguf, tmp / "e.gguf", renamed_tensors=[("token_embd.weight", "token_embd.other")])
    return tmp / "e.gguf"


def half_a_set(tmp: Path, gguf: Path) -> Path:
    written = split_gguf(gguf, tmp / "s.gguf", max_tensors=5)
    written.paths[-1].unlink()
    return written.paths[0]


def cut(tmp: Path, gguf: Path) -> Path:
    (tmp / "cut.gguf").write_bytes(gguf.read_bytes()[:-100])
    return tmp / "cut.gguf"


def broken_safetensors(tmp: Path, _: Path) -> Path:
    path = ready(DENSE, tmp)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    return path


def broken_config(tmp: Path, _: Path) -> Path:
    path = ready(DENSE, tmp)
    (path / "config.json").write_text("{")
    return path


def broken_index(tmp: Path, gguf: Path) -> Path:
    path = indexed(lambda found: None)(tmp, gguf)
    (path / "model.safetensors.index.json").write_text("[]")
    return path


def other_name(tmp: Path, _: Path) -> Path:
    path = ready(GPTQ, tmp)
    (path / "model.safetensors").rename(path / "gptq_model-4bit-32g.safetensors")
    return path


def dropped_g_idx(found: dict[str, Any]) -> None:
    for name in [name for name in found if name.endswith(".g_idx")]:
        del found[name]


def one_other_zero(found: dict[str, Any]) -> None:
    name = next(name for name in found if name.endswith("qzeros"))
    words = array(found, name)
    words[0, 0] ^= 3
    put(found, name, words)


def dense_k(found: dict[str, Any]) -> None:
    """k_proj in floats beside q_proj in codes."""
    prefix = next(name for name in found if name.endswith("k_proj.qweight")).removesuffix("qweight")
    n = found[f"{prefix}scales"][1][1]
    for leaf in ("qweight", "qzeros", "scales", "g_idx"):
        found.pop(prefix + leaf, None)
    found[f"{prefix}weight"] = ("F16", [n, 64], np.zeros((n, 64), np.float16).tobytes())


def as_marlin(found: dict[str, Any]) -> None:
    """Marlin's names for the tensors; whether their shapes are Marlin's is no matter here."""
    for name in [name for name in found if name.endswith((".qweight", ".scales"))]:
        base, _, leaf = name.rpartition(".")
        found[f"{base}.{'B' if leaf == 'qweight' else 's'}"] = found.pop(name)
    for name in [name for name in found if name.endswith((".qzeros", ".g_idx"))]:
        del found[name]


def ruled(tmp: Path, gguf: Path) -> Path:
    """The same rule for the parts of a fused layer, by their names."""
    rule = {r"+:.*\.(q_proj|k_proj|v_proj)$": {"bits": 4, "group_size": 32}}
    return changed(GPTQ, dynamic=rule)(tmp, gguf)


FP4 = "fp8/experts-fp4"
# what is made, and the rules that are true of it: engine, id
CASES: list[tuple[str, Make, tuple[str, ...]]] = [
    ("a GGUF", lambda _, gguf: gguf, ("vllm gguf", "transformers gguf-needs")),
    ("a cut GGUF", cut, ("llama.cpp unreadable", "ollama unreadable", "sglang gguf-unreadable", "transformers gguf-unreadable")),
    ("half a set of shards", half_a_set, ("llama.cpp shard-missing",)),
    ("weights cut", broken_safetensors, ("vllm broken-file", "sglang broken-file", "transformers broken-file", "ollama broken-file")),
    ("config.json cut", broken_config, ("vllm config-unreadable", "sglang config-unreadable", "transformers config-unreadable")),
    ("index cut", broken_index, ("vllm index-unreadable", "sglang index-unreadable", "transformers index-unreadable")),
    ("a shard is not there", indexed(lambda found: found.update(x="model-00002-of-00002.safetensors")),
     ("vllm shard-missing", "sglang shard-missing", "transformers shard-missing")),
    ("the index forgets", indexed(lambda found: found.popitem()), ("vllm unlisted-tensors",)),
    ("another file name", other_name, ("transformers no-weights-name",)),
    ("unknown method", changed(GPTQ, quant_method="nobody"), ("vllm method", "sglang method", "transformers method")),
    ("no method", changed(GPTQ, quant_method=None), ("vllm method-missing", "sglang method-missing", "transformers method-missing")),
    ("fbgemm", plain("fbgemm_fp8/rows"), ("vllm deprecated", "sglang method", "transformers fbgemm-needs")),
    ("not stated", model(GPTQ, quantization_config=None), ("vllm unstated", "sglang unstated", "transformers unstated")),
    ("keys missing", changed(GPTQ, sym=None), ("vllm gptq-keys", "sglang gptq-keys")),
    ("3 bits", plain("gptq/3b-g32-sym"), ("vllm gptq-bits", "sglang gptq-bits", "llama.cpp converter-bits", "llama.cpp not-gguf")),
    ("5 bits", changed("gptq/planar-mixed", bits=5), ("transformers gptq-bits",)),
    ("asymmetric", plain("gptq/4b-g32-asym-v1"), ("vllm gptq-asymmetric", "sglang gptq-asymmetric", "transformers gptq-needs")),
    ("act-order", plain("gptq/4b-g32-act"), ("vllm gptq-act-order",)),
    ("act-order unsaid", changed("gptq/4b-g32-act", desc_act=False), ("vllm gptq-hidden-act-order", "sglang gptq-hidden-act-order")),
    ("groups of 16", lambda tmp, _: small_groups(tmp), ("vllm gptq-group", "sglang gptq-group")),
    ("zero points", tensors(GPTQ, one_other_zero), ("vllm gptq-zero-points", "sglang gptq-zero-points")),
    ("no g_idx", tensors(GPTQ, dropped_g_idx), ("transformers gptq-index", "llama.cpp converter-index")),
    ("no g_idx, act-order", tensors("gptq/4b-g32-act", dropped_g_idx), ("sglang gptq-index", "transformers gptq-index")),
    ("packed for Marlin", tensors(GPTQ, as_marlin), ("vllm gptq-marlin-tensors",)),
    ("AWQ of 8 bits", changed(AWQ, bits=8), ("vllm awq-bits", "sglang awq-bits")),
    ("AWQ without zero_point", changed(AWQ, zero_point=None), ("vllm awq-keys", "sglang awq-keys")),
    ("AWQ gemv", plain("awq/gemv-g32"), ("vllm awq-layout", "sglang awq-layout", "transformers awq-needs")),
    ("AWQ ipex", changed(AWQ, version="ipex"), ("transformers awq-version",)),
    ("AutoRound's own packing", plain("autoround/auto-round-2b-g32-asym"),
     ("vllm autoround-packing", "sglang autoround", "transformers autoround-needs")),
    ("AutoRound asymmetric", plain("autoround/auto-gptq-4b-g32-asym"), ("vllm autoround-asymmetric",)),
    ("act-order of groups", plain("compressed-tensors/actorder"), ("vllm ct-act-order", "transformers compressed-tensors-needs")),
    ("sparse", plain("compressed-tensors/sparse-bitmask"), ("vllm ct-sparse",)),
    ("integers alone", plain("compressed-tensors/mixed"), ("vllm ct-weights-alone", "sglang ct-weights-alone", "vllm ct-float6")),
    ("asymmetric and rounded inputs", groups({"format": "int-quantized", "input_activations": {"num_bits": 8}}, symmetric=False),
     ("vllm ct-asymmetric", "sglang ct-asymmetric")),
    ("Marlin 2:4", groups({"format": "marlin-24"}), ("vllm ct-format",)),
    ("packed by tensor", groups({"format": "pack-quantized"}, strategy="tensor"), ("vllm ct-pack-strategy",)),
    ("other integers", plain("compressed-tensors/words"), ("sglang ct-integers",)),
    ("no activation scheme", changed(FP8, activation_scheme=None), ("vllm fp8-keys",)),
    ("static blocks", changed(FP8, activation_scheme="static"), ("vllm fp8-block-static", "sglang fp8-block-static")),
    ("a scheme of nobody", changed(FP8, activation_scheme="odd"), ("transformers fp8-scheme",)),
    ("no blocks", plain("fp8/tensor-static"), ("ollama fp8-blocks",)),
    ("FP4 experts", plain(FP4), ("ollama dtypes",)),
    ("ModelOpt of 4 bits", changed("modelopt/nvfp4", quant_algo="W4A8_AWQ"), ("vllm modelopt-algorithm", "sglang modelopt-algorithm")),
    ("parts that disagree", tensors(GPTQ, dense_k), ("vllm fused", "sglang fused")),
    ("rules by parts", ruled, ("vllm fused-rules",)),
    ("no architecture", model(DENSE, architectures=None),
     ("vllm architecture-missing", "sglang architecture-missing", "ollama architecture-safetensors")),
    ("a dropped architecture", model(DENSE, architectures=["MPTForCausalLM"]), ("vllm architecture-gone",)),
    ("a plug-in's architecture", model(DENSE, architectures=["BartForConditionalGeneration"]), ("vllm architecture-plugin",)),
    ("an architecture of nobody", model(DENSE, architectures=["OddForCausalLM"]),
     ("vllm architecture-unknown", "sglang architecture-unknown")),
    ("a model type of nobody", model(DENSE, model_type="odd"), ("transformers model-type",)),
    ("no tokenizer", without(GPTQ, "tokenizer.json"), ("vllm tokenizer-missing", "sglang tokenizer-missing",
     "transformers tokenizer-missing", "ollama tokenizer-safetensors")),
    ("no template", without(GPTQ, "chat_template.jinja"), ("vllm chat-template-missing", "transformers chat-template-missing")),
    ("bitsandbytes", plain("bitsandbytes/nf4"), ("vllm method", "transformers bitsandbytes-needs", "ollama quantized-safetensors")),
    ("hqq", plain("hqq/4b-g32-ax1-f16"), ("transformers hqq-needs",)),
    ("quanto", model("quanto/qint4-f16", quantization_config={"quant_method": "quanto", "weights": "int4", "activations": "int8"}),
     ("transformers quanto-activations", "transformers quanto-needs")),
    ("torchao", plain("torchao/int8"), ("transformers torchao-needs",)),
    ("eetq", plain("eetq/int8"), ("transformers eetq-needs",)),
    ("aqlm", plain("aqlm/2x8"), ("transformers aqlm-needs",)),
    ("metal", changed("mlx/metal-8b-g32", bits=3), ("transformers metal-bits",)),
    ("AutoRound of 5 bits", changed("autoround/auto-gptq-4b-g32-sym", bits=5), ("sglang autoround-bits",)),
    ("GGUF: architecture", edited("general.architecture=odd"),
     ("llama.cpp architecture", "ollama architecture", "transformers gguf-architecture", "llama.cpp hyperparameters")),
    ("GGUF: tokenizer", edited("tokenizer.ggml.model=odd"), ("llama.cpp tokenizer", "ollama tokenizer", "transformers gguf-tokenizer")),
    ("GGUF: vocabulary", edited(removed=("tokenizer.ggml.tokens",)), ("llama.cpp vocabulary",)),
    ("GGUF: merges", edited(removed=("tokenizer.ggml.merges",)), ("llama.cpp merges",)),
    ("GGUF: pre-tokenizer", edited("tokenizer.ggml.pre=odd"), ("llama.cpp pre-tokenizer",)),
    ("GGUF: no pre-tokenizer", edited(removed=("tokenizer.ggml.pre",)), ("llama.cpp pre-tokenizer-missing",)),
    ("GGUF: embedding", renamed_embedding, ("llama.cpp embedding",)),
    ("GGUF: big-endian", lambda _, __: FIXTURES / "containers" / "big-endian.gguf", ("llama.cpp big-endian", "ollama big-endian")),
    ("GGUF: no template", edited(removed=("tokenizer.chat_template",)), ("llama.cpp chat-template-missing",)),
    ("GGUF: types", other_type, ("ollama types",)),
    ("GGUF: types without a kernel", lambda tmp, _: ternary(tmp), ("sglang gguf-types",)),
]  # fmt: skip


def fp8_experts(tmp: Path, _: Path) -> Path:
    """Experts of 32 inputs under blocks of 128."""
    converted(ready("awq/gemm-moe-qwen3", tmp), tmp / "f", "fp8", allow_requantize=True)
    return tmp / "f"


MOE = "awq/gemm-moe-qwen3"
# the same of what the user says: parts of matrices and the GPU
SHARDS: list[tuple[str, Make, dict[str, Any], tuple[str, ...]]] = [
    ("heads in 3 parts", plain(GPTQ), {"tensor_parallel": 3}, ("vllm tp-heads", "sglang tp-heads", "vllm tp-uneven", "sglang tp-uneven")),
    ("half a group", plain("awq/gemm-g64"), {"tensor_parallel": 4}, ("vllm tp-groups", "sglang tp-groups", "sglang awq-marlin-shape")),
    ("half a group of GPTQ", plain(GPTQ), {"tensor_parallel": 4}, ("vllm tp-groups",)),
    ("half a group packed", plain(CT), {"tensor_parallel": 2}, ("vllm tp-groups", "sglang tp-groups")),
    ("half a block", plain(FP8), {"tensor_parallel": 2},
     ("vllm tp-fp8-inputs", "sglang tp-fp8-inputs", "vllm tp-fp8-outputs", "sglang tp-fp8-outputs")),
    ("experts of other blocks", fp8_experts, {}, ("vllm moe-fp8-blocks", "sglang moe-fp8-blocks")),
    ("small experts", plain(MOE), {}, ("vllm moe-marlin", "sglang moe-marlin")),
    ("Pascal", plain(GPTQ), {"gpu": "sm_52"}, ("vllm gpu", "sglang gpu", "vllm gpu-marlin")),
    ("Volta, packed", plain(CT), {"gpu": "7.0"}, ("vllm gpu-ct-packed", "sglang gpu-ct-packed")),
    ("Ampere, FP8", plain(FP8), {"gpu": "sm_86"}, ("vllm gpu-fp8-marlin",)),
    ("Ampere, packed FP8", plain("compressed-tensors/fp8-channel"), {"gpu": "80"}, ("vllm gpu-ct-fp8-marlin", "sglang gpu-ct-fp8-weights")),
]  # fmt: skip


def small_groups(tmp: Path) -> Path:
    converted(ready("dense/llama", tmp), tmp / "g16", "gptq:int4,group=16,sym")
    return tmp / "g16"


def ternary(tmp: Path) -> Path:
    converted(ready("dense/llama", tmp), tmp / "t.gguf", "gguf:mxfp4")
    return tmp / "t.gguf"


def rules_found(path: Path, **said: Any) -> dict[str, str]:
    """``engine id`` of every rule that is true of ``path``, with its message."""
    return {f"{v.engine} {f.rule}": f.message for v in lint_path(path, **said).verdicts for f in v.findings}


@pytest.mark.parametrize(("make", "wanted"), [pytest.param(make, wanted, id=name) for name, make, wanted in CASES])
def test_a_broken_copy_meets_its_rules(make: Make, wanted: tuple[str, ...], tmp_path: Path, gguf: Path) -> None:
    assert set(wanted) - rules_found(make(tmp_path, gguf)).keys() == set()


@pytest.mark.parametrize(("make", "said", "wanted"), [pytest.param(*rest, id=name) for name, *rest in SHARDS])
def test_parts_and_gpus_meet_their_rules(make: Make, said: dict[str, Any], wanted: tuple[str, ...], tmp_path: Path, gguf: Path) -> None:
    found = rules_found(make(tmp_path, gguf), **said)
    assert set(wanted) - found.keys() == set()


def test_what_is_not_said_is_not_judged(tmp_path: Path) -> None:
    """One part, or parts that are whole groups, on no GPU or a new one."""
    path = ready(GPTQ, tmp_path)
    for said in ({}, {"tensor_parallel": 2}, {"gpu": "sm_90a"}, {"tensor_parallel": 2, "gpu": "10.0"}):
        assert not [rule for rule in rules_found(path, **said) if " tp-" in rule or " gpu" in rule]


def test_heads_of_keys_are_copied_where_they_are_fewer_than_the_parts(tmp_path: Path) -> None:
    """4 heads and 2 of keys in 4 parts: every part has a head of keys, nothing is uneven."""
    found = rules_found(ready(GPTQ, tmp_path), tensor_parallel=4)
    assert "vllm tp-heads" not in found and "vllm tp-uneven" not in found


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rule_has_a_broken_copy(engine: str) -> None:
    covered = {rule for *_, wanted in (*CASES, *SHARDS) for rule in wanted}
    assert {f"{engine} {rule.id}" for rule in load_rules(engine)[1]} - covered == set()


@pytest.mark.parametrize("engine", ENGINES)
def test_rules_name_a_source_and_what_to_do(engine: str) -> None:
    version, rules = load_rules(engine)
    assert len({rule.id for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.severity in SEVERITIES
        assert "," in rule.source and any(c.isdigit() for c in rule.source)
        assert rule.severity != "error" or rule.do
        assert all(c[1] in OPERATORS for c in (*rule.when, *rule.any, *rule.given))
        text = f"{rule.message} {rule.do}".format(value="v", path="p", format="f", method="m")
        assert "{" not in text
    assert version.split()[0] == engine


@pytest.mark.parametrize(
    ("fixture", "engines"),
    [
        (GPTQ, ("vllm", "sglang", "transformers")), (AWQ, ("vllm", "sglang", "transformers")), (CT, ("vllm", "sglang", "transformers")),
        (FP8, ("vllm", "sglang", "transformers")), (DENSE, ("vllm", "sglang", "transformers", "ollama")),
    ],
)  # fmt: skip
def test_whole_checkpoints_load(fixture: str, engines: tuple[str, ...], tmp_path: Path) -> None:
    path = model(fixture, architectures=["LlamaForCausalLM"], model_type="llama")(tmp_path, tmp_path)
    found = lint_path(path, engines)
    assert [(v.engine, v.word) for v in found.verdicts] == [(engine, "loads") for engine in engines]


def test_a_whole_gguf_loads(gguf: Path) -> None:
    assert {v.engine: v.loads for v in lint_path(gguf, ("llama.cpp", "ollama", "transformers", "sglang", "vllm")).verdicts} == {
        "llama.cpp": True, "ollama": True, "transformers": True, "sglang": True, "vllm": False,
    }  # fmt: skip


def test_only_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QFormatError) as found:
        lint_path(tmp_path / "nothing")
    assert found.value.code == "not-found"


# ---------------------------------------------------------------- the command


def run(*words: object) -> Any:
    return CliRunner().invoke(qconvert, [str(word) for word in words], prog_name="qconvert")


def test_the_exit_code_says_whether_every_engine_loads_it(tmp_path: Path, gguf: Path) -> None:
    path = ready(GPTQ, tmp_path)
    assert run("lint", path, "--engine", "vllm", "--engine", "transformers").exit_code == 0
    assert run("lint", path, "--engine", "llama.cpp").exit_code == 6
    assert run("lint", gguf, "--engine", "llama.cpp").exit_code == 0
    assert run("lint", path, "--engine", "nobody").exit_code == 2


def test_parts_and_a_gpu_are_said_on_the_command_line(tmp_path: Path) -> None:
    path = ready("awq/gemm-g64", tmp_path)
    found = run("lint", path, "--engine", "vllm", "--tensor-parallel", 4, "--gpu", "sm_90", "--json")
    data = json.loads(found.stdout)
    assert found.exit_code == 6 and (data["tensor_parallel"], data["capability"]) == (4, 90)
    assert "awq, in 2 parts, on sm_90" in run("lint", path, "--tensor-parallel", 2, "--gpu", "9.0").stdout
    assert run("lint", path, "--engine", "vllm").exit_code == 0
    assert run("lint", path, "--tensor-parallel", 0).exit_code == 2
    wrong = run("lint", path, "--gpu", "H100")
    assert wrong.exit_code == 2 and "compute capability" in wrong.output + wrong.stderr


def test_json_and_text_say_the_same(tmp_path: Path) -> None:
    path = ready("gptq/3b-g32-sym", tmp_path)
    data = json.loads(run("lint", path, "--engine", "vllm", "--json").stdout)
    assert data["loads"] is False and data["engines"][0]["verdict"] == "will not load"
    finding = next(f for f in data["engines"][0]["findings"] if f["rule"] == "gptq-bits")
    assert finding["severity"] == "error" and "auto_gptq.py" in finding["source"] and "compressed-tensors" in finding["do"]
    text = run("lint", path, "--engine", "vllm").stdout
    assert finding["message"] in text and finding["source"] in text


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    path = ready(GPTQ, tmp_path)
    evil = tmp_path / "a\x1b[31mb"
    shutil.move(path, evil)
    edit_json(evil / "config.json", lambda config: config.update(architectures=["Odd\x1b]0;x\x07"]))
    assert "\x1b" not in run("lint", evil).stdout


def test_the_command_offers_the_engines_that_have_rules() -> None:
    assert OFFERED == ENGINES


# ---------------------------------------------------------------- transformers itself


def loaded(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)


def test_transformers_loads_what_lint_says_it_loads(tmp_path: Path) -> None:
    path = ready(DENSE, tmp_path)
    assert lint_path(path, ("transformers",)).loads
    assert loaded(path)[1]["missing_keys"] == set()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (model(DENSE, model_type="odd"), ValueError),
        (partial(lambda fixture, tmp, _: _renamed(ready(fixture, tmp)), DENSE), OSError),
        (broken_safetensors, Exception),
        (changed(GPTQ, quant_method=None), ValueError),
    ],
    ids=["model type", "file name", "weights cut", "no method"],
)
def test_transformers_refuses_what_lint_says_it_refuses(make: Make, kind: type[Exception], tmp_path: Path, gguf: Path) -> None:
    path = make(tmp_path, gguf)
    assert not lint_path(path, ("transformers",)).loads
    with pytest.raises(kind):
        loaded(path)


def _renamed(path: Path) -> Path:
    (path / "model.safetensors").rename(path / "weights.safetensors")
    return path


def test_transformers_fills_weights_of_an_unknown_method_at_random(tmp_path: Path, gguf: Path) -> None:
    path = changed(GPTQ, quant_method="nobody")(tmp_path, gguf)
    assert "transformers method" in rules_found(path)
    assert any(key.endswith("q_proj.weight") for key in loaded(path)[1]["missing_keys"])
