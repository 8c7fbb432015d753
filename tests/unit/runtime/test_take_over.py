"""Plain ``from_pretrained`` gives the model that ``load_model`` gives, and the files come back."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SAMPLE
from checkpoints import converted, ready
from safetensors.torch import load_file, save_file
from torch import nn

from qformats import QFormatsConfig
from qformats.errors import QFormatError
from qformats.runtime.loader import load_model
from qformats.runtime.packed import Packed

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from qformats.runtime import take_over  # noqa: E402
from qformats.runtime.registries import METHODS  # noqa: E402

torch.set_num_threads(1)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS % model.config.get_text_config().vocab_size).logits
    return found


def from_pretrained(source: Path, **options: Any) -> Any:
    """The model in transformers' hands, which must have missed nothing."""
    config = json.loads((source / "config.json").read_text()) if (source / "config.json").is_file() else {}
    if "quantization_config" not in config and "gguf_file" not in options:
        options.setdefault("quantization_config", QFormatsConfig())
    with take_over():
        model, said = transformers.AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    return model


def check_taken(case: str, tmp_path: Path) -> None:
    source = ready(case, tmp_path)
    model = from_pretrained(source)
    assert torch.equal(logits(model), logits(load_model(source, dtype=model.dtype)))
    model.save_pretrained(tmp_path / "out")
    for file in sorted(file for file in source.iterdir() if file.suffix != ".py"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("case", SAMPLE)
def test_it_is_what_load_model_gives(case: str, tmp_path: Path) -> None:
    check_taken(case, tmp_path)


SPECIAL = {
    "pre-quantized HQQ": "hqq/4b-g32-ax1-f16",
    "compressed-tensors with four bits and zero points": "compressed-tensors/w4-asym",
    "Quanto's own save": "quanto/qint4-f16",
    "fine-grained FP8 with a partial last block": "fp8/block",
    "ModelOpt, which transformers does not know": "modelopt/nvfp4",
    "per-expert planes under fused experts": "gptq/moe-qwen3",
    "fused experts": "mxfp4",
    "mlx, which names no method": "mlx/4b-g64",
}


@pytest.mark.parametrize("case", [case for case in SPECIAL.values() if case not in SAMPLE])
def test_what_transformers_gets_wrong(case: str, tmp_path: Path) -> None:
    check_taken(case, tmp_path)


def test_it_compiles_without_a_break(tmp_path: Path) -> None:
    model = from_pretrained(ready("compressed-tensors/w4-asym", tmp_path), dtype=torch.float32)
    wanted = logits(model)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=IDS).logits
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("case", ["awq/gemm-g64", "gptq/moe-qwen3"])
def test_a_model_is_pickled_and_saves_as_before(case: str, tmp_path: Path) -> None:
    source = ready(case, tmp_path)
    for number, model in enumerate((from_pretrained(source), load_model(source))):
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(logits(other), logits(model)) and other.config.to_dict() == model.config.to_dict()
        other.save_pretrained(tmp_path / f"out{number}")
        assert (tmp_path / f"out{number}" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        other.dequantize()
        assert type(other) is type(model).__mro__[2]


def test_shards_beside_other_weights(tmp_path: Path) -> None:
    source = Path(shutil.copytree(ready("gptq/4b-g32-asym-v1", tmp_path), tmp_path / "shards"))
    wanted = logits(load_model(source, dtype=torch.float32))
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names, count = sorted(tensors), len(tensors) // 2
    held = {"model-00001-of-00002.safetensors": names[:count], "model-00002-of-00002.safetensors": names[count:]}
    for file, part in held.items():
        save_file({name: tensors[name] for name in part}, source / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in held.items() for name in part}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"other": torch.zeros(2)}, source / "consolidated.safetensors")
    model = from_pretrained(source, dtype=torch.float32)
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "out")
    assert all((tmp_path / "out" / file).read_bytes() == (source / file).read_bytes() for file in held)


def test_a_variant_beside_the_weights(tmp_path: Path) -> None:
    source = Path(shutil.copytree(ready("gptq/4b-g32-asym-v1", tmp_path), tmp_path / "variants"))
    wanted = logits(load_model(source, dtype=torch.float32))
    (source / "model.safetensors").rename(source / "model.small.safetensors")
    save_file({"other": torch.zeros(2)}, source / "model.safetensors")
    assert torch.equal(logits(from_pretrained(source, variant="small", dtype=torch.float32)), wanted)


@pytest.mark.parametrize("dtype", [None, "auto", torch.bfloat16, torch.float32])
def test_floats_are_of_the_dtype_that_is_asked_for(dtype: Any, tmp_path: Path) -> None:
    source = ready("hqq/mixed-g64-ax1-bf16", tmp_path)
    model = from_pretrained(source, dtype=dtype)
    assert model.dtype == (dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)
    assert torch.equal(logits(model), logits(load_model(source, dtype=model.dtype)))
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("model", ["dense/llama-tied", "dense/qwen3_moe", "dense/gemma3", "dense/qwen2"])
def test_a_gguf_of_any_architecture(model: str, tmp_path: Path) -> None:
    source = tmp_path / "gguf" / "model.gguf"
    source.parent.mkdir()
    converted(ready(model, tmp_path), source, "gguf:q8_0", allow_requantize=True)
    taken = from_pretrained(source.parent, gguf_file=source.name)
    assert torch.equal(logits(taken), logits(load_model(source)))
    torch.save(taken, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / source.name).read_bytes() == source.read_bytes()
    assert torch.equal(logits(from_pretrained(tmp_path / "out", gguf_file=source.name)), logits(taken))


@pytest.mark.parametrize("model", ["dense/llama", "dense/gemma3"])
def test_the_tokenizer_of_a_gguf(model: str, tmp_path: Path) -> None:
    from qformats.runtime.tokenizer import load_tokenizer

    source = tmp_path / "gguf" / "model.gguf"
    source.parent.mkdir()
    converted(ready(model, tmp_path), source, "gguf:q8_0", allow_requantize=True)
    with take_over("gguf"):
        taken = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    own = load_tokenizer(source)
    text = "Some text, 12 words: naïve, 日本\n\n"
    assert taken(text).input_ids == own(text).input_ids
    assert (taken.bos_token_id, taken.eos_token_id) == (own.bos_token_id, own.eos_token_id)


def test_a_tokenizer_needs_no_weights(tmp_path: Path) -> None:
    """Those beside it may be a pickle that nobody asked to read."""
    from qformats.runtime.tokenizer import load_tokenizer

    source = ready("dense/llama", tmp_path)
    whole = load_tokenizer(source)("Some text").input_ids
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"never read")
    assert load_tokenizer(source)("Some text").input_ids == whole


# ---------------------------------------------------------------- floats that become codes

TARGETS = ["hqq:int4,group=64", "bitsandbytes:nf4", "gguf:q4_k_m", "gptq:int4,group=32"]


@pytest.mark.parametrize(("model", "to"), [("dense/llama-tied", to) for to in TARGETS] + [("dense/qwen3_moe", "gptq:int4,group=32")])
def test_floats_are_quantized_while_they_load(model: str, to: str, tmp_path: Path) -> None:
    source = ready(model, tmp_path)
    made = from_pretrained(source, quantization_config=QFormatsConfig(to=to))
    wanted = load_model(source, quantize=to, dtype=made.dtype)
    assert torch.equal(logits(made), logits(wanted))
    name = "saved.gguf" if to.startswith("gguf") else "saved"
    saved = []
    for which, folder in ((made, tmp_path / "a"), (wanted, tmp_path / "b")):
        folder.mkdir()
        which.save_pretrained(folder / name)
        saved.append({file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()})
    assert saved[0] == saved[1]
    assert made.config.quantization_config.to_dict()["quant_method"] == {"gguf:q4_k_m": "gguf"}.get(to, to.partition(":")[0])


def test_some_stay_floats(tmp_path: Path) -> None:
    config = QFormatsConfig(to="gptq:int4,group=32", modules_to_not_convert=["k_proj"], per_module={"down_proj": "int8"})
    model = from_pretrained(ready("dense/llama", tmp_path), quantization_config=config)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
    assert packed and not any("k_proj" in name for name in packed) and "lm_head" not in packed
    assert {module.layouts[0].bits for name, module in packed.items() if "down_proj" in name} == {8}
    assert {module.layouts[0].bits for name, module in packed.items() if "up_proj" in name} == {4}


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("case", ["gptq/4b-g32-asym-v1", "awq/gemm-moe-qwen3", "bitsandbytes/nf4-skip-bias"])
@pytest.mark.parametrize("buffers", [True, False])
def test_modules_on_the_disk(case: str, buffers: bool, tmp_path: Path) -> None:
    source = ready(case, tmp_path)
    count = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    places = {"model.embed_tokens": "cpu", "model.norm": "disk", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 == 0 else "cpu" for i in range(count)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = from_pretrained(source, device_map=places, offload_folder=tmp_path / "offload", offload_buffers=buffers)
    assert any("offload_buffers" in str(warning.message) for warning in said) is not buffers
    held = [module for name, module in model.named_modules() if isinstance(module, Packed) and name.startswith("model.layers.0.")]
    assert held and all((module.plane_device.type == "meta") is buffers for module in held)
    assert torch.equal(logits(model), logits(load_model(source, dtype=model.dtype)))
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    stored, state = load_file(source / "model.safetensors"), model.state_dict()
    assert all(torch.equal(state[name], stored[name]) for name in stored if name in state and not state[name].is_meta)
    wanted = logits(load_model(source, dtype=model.dtype).dequantize())
    assert torch.allclose(logits(model.dequantize()), wanted, atol=1e-6)


def test_an_automatic_device_map(tmp_path: Path) -> None:
    source = ready("gptq/4b-g32-asym-v1", tmp_path)
    model = from_pretrained(source, device_map="auto")
    assert torch.equal(logits(model), logits(load_model(source, dtype=model.dtype)))


# ---------------------------------------------------------------- after loading


def test_the_configuration_is_the_checkpoints(tmp_path: Path) -> None:
    source = ready("gptq/4b-g32-asym-v1", tmp_path)
    model = from_pretrained(source)
    stored = json.loads((source / "config.json").read_text())["quantization_config"]
    assert model.config.to_dict()["quantization_config"] == stored
    assert model.config.quantization_config.quant_method == "qformats"
    quantizer = model.hf_quantizer
    assert model.is_quantized and quantizer.is_serializable() and quantizer.is_trainable and quantizer.is_compileable


def test_it_becomes_floats(tmp_path: Path) -> None:
    source = ready("gptq/4b-g32-asym-v1", tmp_path)
    model = from_pretrained(source, dtype=torch.float32)
    before = logits(model)
    plain = model.dequantize()
    assert not any(isinstance(module, Packed) for module in plain.modules())
    assert not getattr(plain, "is_quantized", False) and not hasattr(plain.config, "quantization_config")
    assert torch.allclose(logits(plain), before, atol=1e-5)
    plain.save_pretrained(tmp_path / "floats")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    assert torch.equal(logits(again), logits(plain))


def test_an_adapter_attaches_and_the_trainer_takes_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(from_pretrained(ready("gptq/4b-g32-asym-v1", tmp_path)), config)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "trained"), report_to=[])
    assert transformers.Trainer(model=model, args=arguments).model is model


# ---------------------------------------------------------------- the registries


def test_the_registries_come_back() -> None:
    from transformers.quantizers import auto

    before = (dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), auto.AUTO_QUANTIZER_MAPPING["gguf"], auto.LOADING_ATTRIBUTES_CONFIG_TYPES)
    handle = take_over("gptq", "modelopt", "gguf").install()
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is not before[0]["gptq"] and "modelopt" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["awq"] is before[0]["awq"]
    with pytest.raises(QFormatError, match="already"):
        handle.install()
    handle.close()
    handle.close()
    after = (dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), auto.AUTO_QUANTIZER_MAPPING["gguf"], auto.LOADING_ATTRIBUTES_CONFIG_TYPES)
    assert {**before[0], "qformats": QFormatsConfig} == after[0] and before[1:] == after[1:]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(QFormatError, match="no method is called 'gtpq'"):
        take_over("gtpq")
    with pytest.raises(QFormatError, match="compute"):
        take_over(*METHODS[:1], compute="int3")


# ---------------------------------------------------------------- what is refused


def without(source: Path, end: str) -> str:
    """Take one tensor out of a checkpoint; its name."""
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(end))
    del tensors[name]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return name


CUT = [
    ((".q_proj.scales",), "q_proj"),
    ((".q_proj.qweight", ".q_proj.qzeros", ".q_proj.scales", ".q_proj.g_idx"), "q_proj.weight"),
    (("layers.0.input_layernorm.weight",), "input_layernorm.weight"),
]


@pytest.mark.parametrize(("ends", "names"), CUT)
def test_a_missing_tensor_is_named(ends: tuple[str, ...], names: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(ready("gptq/4b-g32-asym-v1", tmp_path), tmp_path / "cut"))
    for end in ends:
        without(source, end)
    with pytest.raises(QFormatError) as found, take_over():
        transformers.AutoModelForCausalLM.from_pretrained(source)
    assert names in str(found.value)


def test_a_new_head_is_transformers_business(tmp_path: Path) -> None:
    with take_over():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(ready("gptq/4b-g32-asym-v1", tmp_path), num_labels=3)
    assert any(isinstance(module, Packed) for module in model.modules()) and isinstance(model.score, nn.Linear)
