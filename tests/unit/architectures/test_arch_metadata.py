"""GGUF metadata against what llama.cpp's own converter wrote, and configs rebuilt from it. Fixtures: fixtures/architectures/make.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qformats.architectures import Binding, Mapped, find, find_gguf
from qformats.architectures.rope import frequency_factors, recover_llama3
from qformats.architectures.spm import NORMAL
from qformats.containers.gguf import Metadata, Value
from qformats.errors import BadFile, Unsupported

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "architectures"
SCATTERED = ("glm4", "phi", "phi3_long", "bert_labelled")  # llama.cpp writes some keys of these before or between those of another part
NAMED = {"glm4": "glm4"}  # rules that have several names: a real vocabulary is known by its hash
LOST = {  # what a GGUF does not say
    "mistral_spm": ("architectures", "model_type"), "mixtral": ("head_dim",), "falcon": ("max_position_embeddings",), "gpt2": ("n_inner",),
    "lfm2": ("intermediate_size", "block_auto_adjust_ff_dim"),  # the rounded size comes back as it is
    "llama4_nested": ("architectures", "model_type"),  # a text model that was part of a larger one comes back on its own
}  # fmt: skip
CASES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())


class Stored:
    """A tensor with values, as a container gives it."""

    def __init__(self, values: Any) -> None:
        self.values = np.array(values, np.float32)
        self.shape = self.values.shape

    def array(self) -> Any:
        return self.values


def load(case: str) -> tuple[dict[str, Any], dict[str, bytes], dict[str, Any]]:
    folder = FIXTURES / case
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "expected.json")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return json.loads(files["config.json"]), files, json.loads((folder / "expected.json").read_text())


def file_type(expected: dict[str, Any]) -> int:
    return int(expected["metadata"].get("general.file_type", ("u32", 0))[1])


def bound(case: str) -> tuple[Binding, dict[str, bytes], dict[str, Any]]:
    config, files, expected = load(case)
    return find(config).bind(config), files, expected


def expected_metadata(expected: dict[str, Any]) -> Metadata:
    return {key: Value(kind, value) for key, (kind, value) in expected["metadata"].items()}


def expected_tensors(expected: dict[str, Any]) -> dict[str, Any]:
    tensors: dict[str, Any] = {name: tuple(shape) for name, (_, shape) in expected["tensors"].items()}
    if expected["rope_freqs"]:
        tensors["rope_freqs.weight"] = Stored(expected["rope_freqs"])
    tensors.update({name: Stored(values) for name, values in expected.get("rope_factors", {}).items()})
    return tensors


def gguf_parts(tensors: dict[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        base, _, leaf = name.rpartition(".")
        parts.setdefault(base, {})[leaf] = tuple(getattr(tensor, "shape", tensor))
    return parts


def hf_parts(mapped: Mapped) -> dict[str, dict[str, tuple[int, ...]]]:
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in mapped.tensors:
        parts.setdefault(tensor.target, {})[tensor.leaf] = tensor.shape
    return parts


@pytest.mark.parametrize("case", CASES)
def test_metadata_is_what_llama_cpp_writes(case: str) -> None:
    binding, files, expected = bound(case)
    made = binding.metadata(files, name="Tiny", file_type=file_type(expected), quantization_version=2, pre=NAMED.get(case))
    wanted = expected_metadata(expected)
    if "general.file_type" not in wanted:  # llama.cpp forgets it for GPT-NeoX
        del made["general.file_type"]
    assert sorted(made) == sorted(wanted)
    if case not in SCATTERED:
        assert list(made) == list(wanted)
    for key, value in wanted.items():
        assert made[key].type == value.type, key
        found = list(made[key].value) if value.type.startswith("[") else made[key].value
        assert found == value.value, key


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_llama_cpp_writes(case: str) -> None:
    binding, _, expected = bound(case)
    tensors = expected_tensors(expected)
    back = binding.to_hf(gguf_parts(tensors))
    again = binding.to_gguf(hf_parts(back))
    assert {tensor.name: tensor.shape for tensor in again.tensors} == {n: tuple(s) for n, (_, s) in expected["tensors"].items()}
    f32 = {tensor.name for tensor in again.tensors if tensor.kind in ("norm", "bias", "router", "rope", "state")}
    assert all(len(tensor.shape) > 1 for tensor in again.tensors if tensor.name not in f32)


def test_rope_factors_are_llama_cpps_to_the_bit() -> None:
    binding, _, expected = bound("llama_bpe")
    parts = hf_parts(binding.to_hf(gguf_parts(expected_tensors(expected))))
    first = binding.to_gguf(parts).tensors[0]
    assert first.name == "rope_freqs.weight"
    assert first.constant is not None and first.constant.dtype == np.float32
    assert np.array_equal(first.constant, np.array(expected["rope_freqs"], np.float32))


@pytest.mark.parametrize("case", CASES)
def test_config_is_rebuilt_from_the_file(case: str) -> None:
    config, _, expected = load(case)
    rebuilt = find_gguf(expected_metadata(expected)).bind_gguf(expected_metadata(expected), expected_tensors(expected)).config
    for name, value in rebuilt.items():
        if name in LOST.get(case, ()):
            continue
        if name == "rope_parameters" or (name not in config and name in ("head_dim", "mlp_only_layers", "attention_bias")):
            continue
        if name in config:
            assert config[name] == value, name


@pytest.mark.parametrize("case", CASES)
def test_metadata_survives_the_way_back(case: str) -> None:
    _, _, expected = load(case)
    wanted, tensors = expected_metadata(expected), expected_tensors(expected)
    binding = find_gguf(wanted).bind_gguf(wanted, tensors)
    again = find(binding.config).bind(json.loads(binding.hf_files(wanted)["config.json"]))
    made = again.metadata(binding.hf_files(wanted), name="Tiny", file_type=file_type(expected), quantization_version=2, pre=NAMED.get(case))
    for key, value in wanted.items():
        if key.startswith(("tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.tokens", "tokenizer.ggml.add_")):
            continue  # how these come back is checked in test_arch_tokenizers
        if key.endswith(("key_length", "value_length")) and key not in made:
            continue
        found = list(made[key].value) if value.type.startswith("[") else made[key].value
        assert (made[key].type, found) == (value.type, value.value), key


@pytest.mark.parametrize(
    ("factor", "low", "high", "original", "base", "head_dim"),
    [
        (8.0, 1.0, 4.0, 8192, 500000.0, 128), (32.0, 1.0, 4.0, 8192, 500000.0, 64), (4.0, 1.0, 3.5, 6000, 10000.0, 128),
        (16.0, 2.0, 8.0, 8192, 500000.0, 128),
    ],
)  # fmt: skip
def test_llama3_parameters_are_recovered_from_factors(
    factor: float, low: float, high: float, original: int, base: float, head_dim: int
) -> None:
    rope = {"rope_type": "llama3", "rope_theta": base, "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    rope["original_max_position_embeddings"] = original
    factors = frequency_factors(rope, head_dim, base)
    assert factors is not None
    found = recover_llama3(factors, base, head_dim, 131072)
    assert found["rope_type"] == "llama3"
    assert found["original_max_position_embeddings"] / found["low_freq_factor"] == original / low
    again = frequency_factors(found, head_dim, base)
    assert again is not None and np.array_equal(again, factors)


def test_factors_of_no_rule_come_back_as_listed_ones() -> None:
    factors = np.linspace(1.5, 3.0, 16).astype(np.float32)
    found = recover_llama3(factors, 10000.0, 32, 4096)
    assert found["rope_type"] == "longrope"
    again = frequency_factors(found, 32, 10000.0)
    assert again is not None and np.array_equal(again, factors)


def test_both_spellings_of_rope_mean_the_same() -> None:
    config, files, _ = load("llama_bpe")
    rope = dict(config.pop("rope_parameters"))
    old = {**config, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    new, _, _ = bound("llama_bpe")
    assert find(old).bind(old).metadata(files) == new.metadata(files)


def test_transformers_loads_the_rebuilt_rope_of_listed_factors() -> None:
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = np.linspace(1.5, 3.0, 16).astype(np.float32)
    rope = recover_llama3(factors, 10000.0, 32, 4096)
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=4096, rope_parameters=rope)
    frequencies, scale = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    plain = 1.0 / 10000.0 ** (np.arange(0, 32, 2) / 32)
    assert scale == 1.0
    assert np.allclose(frequencies.numpy(), plain / factors, rtol=1e-6)


def test_deepseek_v3_gates_by_a_sigmoid_even_where_its_config_says_nothing() -> None:
    """transformers 5 saves no scoring_func; llama.cpp's converter then writes no key and its loader takes a softmax."""
    config, files, _ = load("deepseek_v3")
    del config["scoring_func"]
    assert find(config).bind(config).metadata(files)["deepseek2.expert_gating_func"] == Value("u32", 2)


@pytest.mark.parametrize(("vocabulary", "rank", "fits"), [(128256, None, True), (128256, 24, False), (360, None, False)])
def test_deepseek_without_a_latent_query_is_told_by_its_sizes(vocabulary: int, rank: int | None, fits: bool) -> None:
    """llama.cpp, src/models/deepseek2.cpp: 26 and 27 blocks, and 48 with a vocabulary of 128256."""
    config, _, _ = load("deepseek_v3")
    config.update(num_hidden_layers=48, vocab_size=vocabulary, q_lora_rank=rank)
    binding = find(config).bind(config)
    if fits:
        assert "deepseek2.attention.q_lora_rank" not in binding.metadata(None)
        return
    with pytest.raises(Unsupported) as caught:
        binding.metadata(None)
    assert caught.value.code == "config-value"


@pytest.mark.parametrize("labels", [["a"], {"x": "a"}, {"0": 1}])
def test_names_of_classes_that_are_none(labels: Any) -> None:
    config, _, _ = load("bert")
    with pytest.raises(BadFile) as caught:
        find(config).bind({**config, "id2label": labels}).metadata(None)
    assert caught.value.code == "config-field"


def test_made_up_names_of_classes_are_not_written() -> None:
    config, files, _ = load("bert")
    made = find(config).bind({**config, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}).metadata(files)
    assert "bert.classifier.output_labels" not in made


def test_rope_factors_need_their_values() -> None:
    _, _, expected = load("llama_bpe")
    tensors = {**expected_tensors(expected), "rope_freqs.weight": (16,)}
    with pytest.raises(BadFile) as caught:
        find_gguf(expected_metadata(expected)).bind_gguf(expected_metadata(expected), tensors)
    assert caught.value.code == "rope-factors"


@pytest.mark.parametrize(
    ("rope", "code"),
    [({"rope_type": "dynamic", "factor": 2.0}, "rope"), ({"rope_type": "linear"}, "config-field"), ([1], "config-field")],
)
def test_rope_that_gguf_cannot_say(rope: Any, code: str) -> None:
    config, files, _ = load("qwen2")
    broken = {**config, "rope_parameters": rope}
    with pytest.raises((BadFile, Unsupported)) as caught:
        find(broken).bind(broken).metadata(files)
    assert caught.value.code == code


def test_unknown_gguf_architecture() -> None:
    with pytest.raises(Unsupported) as caught:
        find_gguf({"general.architecture": Value("str", "rwkv7")})
    assert caught.value.code == "architecture"
    with pytest.raises(BadFile) as missing:
        find_gguf({})
    assert missing.value.code == "gguf-key"


def test_no_tokenizer_is_an_error_unless_asked_for() -> None:
    binding, _, _ = bound("qwen2")
    with pytest.raises(BadFile) as caught:
        binding.metadata({})
    assert caught.value.code == "missing-tokenizer"
    assert binding.metadata(None)["tokenizer.ggml.model"].value == "none"


def test_token_types_of_a_vocabulary() -> None:
    _, _, expected = load("mistral_spm")
    types = expected["metadata"]["tokenizer.ggml.token_type"][1]
    assert set(types) == {NORMAL, 3, 5, 6}


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_config_and_weights_by_these_names(case: str, tmp_path: Path) -> None:
    """A checkpoint with the rebuilt config and tensors named by to_hf loads without a missing or unexpected key."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    _, _, expected = load(case)
    metadata, tensors = expected_metadata(expected), expected_tensors(expected)
    binding = find_gguf(metadata).bind_gguf(metadata, tensors)
    for name, data in binding.hf_files(metadata).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    mapped = binding.to_hf(gguf_parts(tensors)).tensors
    save_file({t.name: torch.full(t.shape, 0.5) for t in mapped}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    maker = transformers.AutoModelForSeq2SeqLM if binding.config.get("is_encoder_decoder") else transformers.AutoModelForCausalLM
    maker = transformers.AutoModel if binding.architecture.gguf == "bert" else maker
    model, info = maker.from_pretrained(tmp_path, output_loading_info=True)
    unwanted = {key for key in info["missing_keys"] if key.startswith("pooler.")}  # llama.cpp has no place for BERT's pooler
    assert set(info["missing_keys"]) == unwanted and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(bool((value == 0.5).all()) for name, value in model.state_dict().items() if name not in unwanted)
    assert binding.architecture.gguf == "bert" or model.generation_config.eos_token_id is not None
