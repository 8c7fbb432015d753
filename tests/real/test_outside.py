"""Checkpoints that no fixture is like, made here by the formats' own libraries: what a stranger would bring.

Each goes through the command line: inspect, plan, convert to GGUF and to two other formats, verify, back, dequantize. Read values are the
owner's, bit for bit; what is lossless comes back with the same values; the floats load in plain transformers as the owner's model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_dense import TOKENIZER_FILES

from converters.cli import qconvert
from qformats.checkpoint import open_checkpoint
from qformats.tensor import QuantizedTensor

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "architectures"
Values = dict[str, torch.Tensor]
STORED, NEW = 2.0**-6, 0.17  # a scale or an offset rounded to 16 bits; new codes of four bits of normal weights


def random_model(name: str, dtype: torch.dtype, **sizes: Any) -> Any:
    """A model of a fixture's configuration with other sizes; every parameter random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((FIXTURES / name / "config.json").read_text()) | sizes
    torch.manual_seed(len(name))
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.float32)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0, 0.08) if weight.dim() > 1 else weight.add_(torch.randn_like(weight) * 0.1)
    made.tie_weights()
    return made.to(dtype).eval()


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config, default=str))


# ---------------------------------------------------------------- the owners


def by_bitsandbytes(model: Any, out: Path, *, save: dict[str, Any], **options: Any) -> Values:
    """transformers replaces and saves; values by the library's plain torch path, for its compiled one misreads ragged rows."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as plain
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model.save_pretrained(out / "floats")
    made = AutoModelForCausalLM.from_pretrained(
        out / "floats", quantization_config=BitsAndBytesConfig(**options), device_map="cpu", dtype=model.dtype)
    shutil.rmtree(out / "floats")
    made.save_pretrained(out, **save)
    found = {}
    for name, layer in made.named_modules():
        if type(layer).__name__ == "Linear4bit":
            state = layer.weight.quant_state
            scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
            codes = layer.weight.data.view(torch.uint8).reshape(-1)
            found[name] = plain(codes, scales.float(), state.code, state.blocksize, state.shape, state.dtype)
        elif type(layer).__name__ == "Linear8bitLt":
            w = layer.weight
            found[name] = functional.int8_vectorwise_dequant(w.data if w.CB is None else w.CB, w.SCB)
    return found


def by_compressed_tensors(model: Any, out: Path, *, groups: dict[str, Any], ignore: tuple[str, ...] = ("lm_head",), **more: Any) -> Values:
    """Groups with targets of their own; the library's own compressor and what it decompresses."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=list(ignore), quantization_status="frozen"))
    coded = []
    for name, layer in model.named_modules():
        scheme = getattr(layer, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        args, weight = scheme.weights, layer.weight.data
        runs = weight.reshape(len(weight), -1, args.group_size or weight.shape[1])
        scale, zero = calculate_qparams(runs.amin(2), runs.amax(2), args)
        layer.weight_scale.data.copy_(scale)
        if getattr(layer, "weight_zero_point", None) is not None:
            layer.weight_zero_point.data.copy_(zero)
        coded.append(name)
    compressor = ModelCompressor.from_pretrained_model(model, **more)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    compressor.decompress_model(model)
    return {name: model.get_submodule(name).weight.data for name in coded}


def by_hqq(model: Any, out: Path, *, pick: Callable[[str], dict[str, Any] | None]) -> Values:
    """Every layer under its own settings, as the parts that hqq's layers give."""
    quantize = pytest.importorskip("hqq.core.quantize")
    state, found = dict(model.state_dict()), {}
    for name, linear in model.named_modules():
        asked = pick(name) if isinstance(linear, torch.nn.Linear) else None
        if asked is None:
            continue
        config = quantize.BaseQuantizeConfig(**asked)
        state.pop(f"{name}.weight")
        layer = quantize.HQQLinear.from_weights(linear.weight.data, state.pop(f"{name}.bias", None), config, model.dtype, "cpu")
        layer.encoded_state_dict = True
        state |= {f"{name}.{leaf}": part.data for leaf, part in layer.state_dict().items() if part is not None}
        found[name] = layer.dequantize()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    model.config.save_pretrained(out)
    save_file({key: value.clone().contiguous() for key, value in state.items()}, out / "model.safetensors")
    edit(out, lambda config: config.update(quantization_config={"quant_method": "hqq"}))
    return found


def by_torchao(model: Any, out: Path, *, config: Callable[[], Any], **more: Any) -> Values:
    pytest.importorskip("torchao")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    model.save_pretrained(out / "floats")
    asked = TorchAoConfig(quant_type=config(), **more)
    made = AutoModelForCausalLM.from_pretrained(out / "floats", quantization_config=asked, device_map="cpu", dtype=model.dtype)
    shutil.rmtree(out / "floats")
    made.save_pretrained(out)
    plain = (torch.Tensor, torch.nn.Parameter)
    return {k.removesuffix(".weight"): v.dequantize() for k, v in made.state_dict().items() if type(v) not in plain}


def by_quanto(model: Any, out: Path, *, weights: str, exclude: str | list[str] | None = "lm_head") -> Values:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.QuantizedModelForCausalLM.quantize(model, weights=getattr(quanto, weights), exclude=exclude).save_pretrained(str(out))
    return {name: layer.weight.dequantize() for name, layer in model.named_modules() if isinstance(layer, quanto.QModuleMixin)}


# ---------------------------------------------------------------- the checkpoints


@dataclass(frozen=True)
class Case:
    """``make`` turns a random model of the fixture ``arch`` with these sizes into a checkpoint of ``owner``; ``to``: two other formats."""

    name: str
    owner: str
    arch: str
    make: Callable[[Any, Path], Values]
    to: tuple[str, str]
    dtype: torch.dtype = torch.bfloat16
    sizes: dict[str, Any] = field(default_factory=dict)
    tier: str = "real_full"

    def param(self) -> Any:
        return pytest.param(self, marks=getattr(pytest.mark, self.tier), id=self.name)


def four(**options: Any) -> Callable[[Any, Path], Values]:
    save = options.pop("save", {})
    asked = {"load_in_4bit": True, **{f"bnb_4bit_{key}": value for key, value in options.items()}}
    return lambda model, out: by_bitsandbytes(model, out, save=save, **asked)


def only_what_is_needed(model: Any, out: Path) -> Values:
    """A config that says ``load_in_4bit`` alone, FP4 by the library's default, under the old name of the dtype."""
    found = four()(model, out)
    edit(out, lambda config: config.update(quantization_config={"load_in_4bit": True}, torch_dtype=config.pop("dtype")))
    return found


def group(targets: list[str], **weights: Any) -> dict[str, Any]:
    return {"targets": targets, "weights": weights}


def two_groups(model: Any, out: Path) -> Values:
    attention = group(["re:.*self_attn.*proj$"], num_bits=8, strategy="channel")
    rest = group(["re:.*mlp\\.(gate|up|down)_proj"], num_bits=4, strategy="group", group_size=32, symmetric=False)
    return by_compressed_tensors(model, out, groups={"a": attention, "b": rest}, ignore=("re:.*layers\\.1\\.mlp\\.down_proj",))


def old_key(model: Any, out: Path) -> Values:
    """``compression_config`` with no version and no formats of groups, as its first releases wrote it."""
    found = by_compressed_tensors(model, out, groups={"g": group(["Linear"], num_bits=4, strategy="group", group_size=32)})

    def age(config: dict[str, Any]) -> None:
        held = config.pop("quantization_config")
        for key in ("version", "global_compression_ratio"):
            held.pop(key, None)
        for one in held["config_groups"].values():
            one.pop("format", None)
        config["compression_config"] = held | {"quant_method": "sparseml", "quantization_status": "frozen"}

    edit(out, age)
    return found


def ends(model: Any, out: Path) -> Values:
    groups = {"e": group(["Embedding"], num_bits=8, strategy="channel"),
              "l": group(["Linear"], num_bits=8, strategy="group", group_size=32)}  # fmt: skip
    return by_compressed_tensors(model, out, groups=groups, ignore=(), quantization_format="pack-quantized")


def every_width(name: str) -> dict[str, Any] | None:
    if name == "lm_head":
        return None
    if "self_attn" in name:
        return {"nbits": 8, "group_size": None, "axis": 1}
    return {"nbits": 4, "group_size": 64, "axis": 0} if "down" in name else {"nbits": 3, "group_size": 16, "axis": 1}


def nested(name: str) -> dict[str, Any] | None:
    """Quantized scales and zeros, of runs that go over the ends of rows of 96 columns."""
    return None if name == "lm_head" else {"nbits": 4, "group_size": 64, "axis": 1, "quant_zero": True, "quant_scale": True}


def by_names() -> Any:
    import torchao.quantization as q

    rows = q.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=q.PerAxis(0))
    groups = q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32), mapping_type=q.MappingType.ASYMMETRIC)
    return q.FqnToConfig({r"re:.*self_attn\..*_proj\.weight": rows, r"re:.*mlp\.(gate|up)_proj\.weight": groups})


def fused_experts() -> Any:
    import torchao.quantization as q

    experts = {rf"re:.*\.experts\.{name}_proj": q.Float8WeightOnlyConfig() for name in ("gate_up", "down")}
    return q.FqnToConfig({**experts, "_default": q.Int8WeightOnlyConfig()})


def by_names_of_layers(name: str) -> dict[str, Any] | None:
    """One bit along columns, two in runs of 16, four in runs of 8."""
    if name == "lm_head":
        return None
    if "self_attn" in name:
        return {"nbits": 1, "group_size": 32, "axis": 0}
    return {"nbits": 2, "group_size": 16, "axis": 1} if "down" in name else {"nbits": 4, "group_size": 8, "axis": 1}


def embedding_apart() -> Any:
    import torchao.quantization as q

    return q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(16))


WIDE = {"hidden_size": 96, "intermediate_size": 160}
CASES = (
    Case("biases, rows of no whole blocks", "bitsandbytes", "qwen2", four(quant_type="nf4"), ("torchao:int8", "gptq:int4"), sizes=WIDE,
         tier="real"),
    Case("shards, nested scales, bfloat16 words", "bitsandbytes", "qwen3",
         four(quant_type="nf4", use_double_quant=True, quant_storage=torch.bfloat16, save={"max_shard_size": "60KB"}),
         ("hqq:int4", "compressed-tensors:int8")),
    Case("load_in_4bit alone", "bitsandbytes", "gemma3", only_what_is_needed, ("compressed-tensors:int8", "torchao:int8")),
    Case("two groups by regex", "compressed-tensors", "llama_bpe", two_groups, ("awq", "gptq"), torch.float16, tier="real"),
    Case("an old compression_config", "compressed-tensors", "mistral_spm", old_key, ("gptq", "awq"), torch.float16),
    Case("embedding and head in codes", "compressed-tensors", "mistral_spm", ends, ("quanto", "torchao")),
    Case("widths and axes layer by layer", "hqq", "llama_bpe", lambda model, out: by_hqq(model, out, pick=every_width), ("torchao", "mlx"),
         torch.float16, {"hidden_size": 128, "intermediate_size": 192}, "real"),
    Case("nested scales and zeros of runs", "hqq", "qwen3", lambda model, out: by_hqq(model, out, pick=nested), ("awq", "torchao"),
         torch.float32, tier="real"),
    Case("configs by names", "torchao", "qwen2", lambda model, out: by_torchao(model, out, config=by_names),
         ("compressed-tensors", "bitsandbytes"), sizes=WIDE, tier="real"),
    Case("fused experts", "torchao", "mixtral", lambda model, out: by_torchao(model, out, config=fused_experts),
         ("fp8", "bitsandbytes:nf4")),
    Case("a tied embedding in codes, the head apart", "torchao", "qwen2",
         lambda model, out: by_torchao(
             model, out, config=embedding_apart, include_input_output_embeddings=True, untie_embedding_weights=True),
         ("compressed-tensors", "quanto")),
    Case("a router in codes, experts in one tensor", "bitsandbytes", "qwen2_moe", four(quant_type="nf4", use_double_quant=True),
         ("hqq:int8", "torchao:fp8")),
    Case("one, two and four bits on either axis", "hqq", "cohere2", lambda model, out: by_hqq(model, out, pick=by_names_of_layers),
         ("mlx", "compressed-tensors")),
    Case("four bits, some left out by pattern", "quanto", "gemma3",
         lambda model, out: by_quanto(model, out, weights="qint4", exclude=["*.q_proj", "lm_head"]), ("hqq", "awq"),
         sizes={"hidden_size": 96, "intermediate_size": 192}),
    Case("two bits, odd sizes", "quanto", "llama_bpe", lambda model, out: by_quanto(model, out, weights="qint2"), ("hqq", "torchao"),
         torch.float32, {"hidden_size": 80, "intermediate_size": 144}),
    Case("e5m2, head in codes", "quanto", "mistral_spm", lambda model, out: by_quanto(model, out, weights="qfloat8_e5m2", exclude=None),
         ("torchao", "compressed-tensors"), torch.float16),
)  # fmt: skip


# ---------------------------------------------------------------- the command line


def command(*words: str | Path, ends_with: tuple[int, ...] = (0,)) -> int:
    with pytest.raises(SystemExit) as ended:
        qconvert.main([str(word) for word in (*words, "--quiet")])
    code = int(ended.value.code or 0)
    assert code in ends_with, (words, code)
    return code


def convert(source: Path, out: Path, to: str) -> None:
    """As a stranger: first as it is, then with the consent that the message asks for."""
    command("plan", source, "--to", to)
    if command("convert", source, out, "--to", to, ends_with=(0, 7)):
        command("convert", source, out, "--to", to, "--allow-requantize")
    command("verify", source, out)


def parameters(folder: Path) -> Values:
    """Every parameter as plain transformers loads a directory of floats; none is missing, none is left over."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    return dict(model.state_dict())


def assert_read_as_by_the_owner(source: Path, case: Case, wanted: Values) -> None:
    count = 0
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.format == case.owner
        for module in filter(checkpoint.is_quantized, checkpoint.modules):
            name = module.replace(".block_sparse_moe.", ".mlp.")  # transformers' own name of it
            found = checkpoint.read(module)
            assert isinstance(found, QuantizedTensor)
            values = found.dequantize(wanted[name].dtype, like=case.owner)
            assert torch.equal(values.reshape(wanted[name].shape), wanted[name]), module  # a stack is read as its rows
            count += 1
    assert count == len(wanted) > 0


@pytest.mark.parametrize("case", [case.param() for case in CASES])
def test_a_stranger_s_checkpoint(case: Case, tmp_path: Path, figure: Any) -> None:
    source = tmp_path / "source"
    source.mkdir()
    wanted = case.make(random_model(case.arch, case.dtype, **case.sizes), source)
    for file in TOKENIZER_FILES:
        if (FIXTURES / case.arch / file).exists():
            shutil.copy(FIXTURES / case.arch / file, source)
    command("inspect", source, "--tensors")
    assert_read_as_by_the_owner(source, case, wanted)
    command("convert", source, tmp_path / "floats", "--to", "hf:f32")
    command("dequantize", source, tmp_path / "half")
    plain = parameters(tmp_path / "floats")
    for name, values in wanted.items():
        found = plain[name if name in plain else f"{name}.weight"]
        assert float((found - values.float()).norm() / values.float().norm()) < STORED, name
    worst = {}
    for to in ("gguf", *case.to):
        out = tmp_path / to.replace(":", "-")
        out = out.with_suffix(".gguf") if to == "gguf" else out
        convert(source, out, to)
        convert(out, tmp_path / "back", case.owner)
        shutil.rmtree(tmp_path / "back")
        command("convert", out, tmp_path / "again", "--to", "hf:f32")
        again = parameters(tmp_path / "again")
        shutil.rmtree(tmp_path / "again")
        assert again.keys() == plain.keys()
        worst[to] = max(float((again[key] - value).norm() / max(float(value.norm()), 1e-9)) for key, value in plain.items())
        assert worst[to] <= NEW, to
    figure(f"{len(wanted)} weights as {case.owner} has them; " + ", ".join(f"{to} within {error:.2g}" for to, error in worst.items()))


@pytest.mark.real
def test_what_is_lossless_comes_back(tmp_path: Path) -> None:
    """The exact path of one of them has the same values, not near ones."""
    source = tmp_path / "source"
    source.mkdir()
    old_key(random_model("mistral_spm", torch.float16), source)
    with open_checkpoint(source) as checkpoint:
        wanted = {m: checkpoint.read(m).dequantize() for m in checkpoint.modules if checkpoint.is_quantized(m)}  # type: ignore[union-attr]
    command("convert", source, tmp_path / "out", "--to", "gptq", "--exact")
    with open_checkpoint(tmp_path / "out") as made:
        for module, values in wanted.items():
            assert torch.equal(made.read(module).dequantize(), values), module  # type: ignore[union-attr]
