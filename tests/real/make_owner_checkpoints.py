"""Checkpoints of bitsandbytes, HQQ, Quanto, torchao and compressed-tensors, each by its own library, and those that ``packers.py``
packs weight by weight: ``make_owner_checkpoints.py NAME …``.

Runs under the lab's interpreter that has bitsandbytes 0.50.2, hqq 0.2.8.post1, optimum-quanto 0.2.7, torchao 0.18.0,
compressed-tensors 0.20.0, aqlm 1.1.7 and mlx 0.32.4. A name is ``OWNER-VARIANT-MODEL`` with a variant of ``RECIPES`` and a model of
``make_checkpoints.BASES``.
Beside the checkpoint stands ``NAME.floats``: the same model as a plain float32 checkpoint in which every quantized weight is what the
owner itself dequantizes it to. A checkpoint appears under its name only when both are complete.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab import CHECKPOINTS, MODELS, floats_of
from make_checkpoints import BASES, SIDE_FILES
from packers import PACKERS

Floats = dict[str, torch.Tensor]  # module -> the owner's values


def _model(base: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options)


def _linears(model: Any) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name.endswith("_proj")]


def _bitsandbytes(base: Path, out: Path, **options: Any) -> Floats:
    from bitsandbytes import functional
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**(options or {"load_in_8bit": True}))
    model = _model(base, quantization_config=config, device_map="cpu")
    model.save_pretrained(out)
    found = {}
    for name, layer in _linears(model):
        w = layer.weight
        if options:
            found[name] = functional.dequantize_4bit(w.data, w.quant_state).reshape(layer.out_features, -1)
        else:
            found[name] = functional.int8_vectorwise_dequant(w.data if w.CB is None else w.CB, w.SCB)
    return found


def _hqq(base: Path, out: Path, bits: int, group: int, axis: int, dtype: torch.dtype = torch.float16, pickled: bool = False) -> Floats:
    """hqq's own ``qmodel.pt``, or the layers' own state in safetensors as transformers saved it."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from safetensors.torch import save_file

    model, config = _model(base, dtype), BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    if pickled:
        from hqq.models.hf.base import AutoHQQHFModel

        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=dtype, device="cpu")
        AutoHQQHFModel.save_quantized(model, str(out))
        return {name: layer.dequantize() for name, layer in model.named_modules() if isinstance(layer, HQQLinear)}
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    found = {}
    for name, _ in _linears(model):
        bias = state.pop(f"{name}.bias", None)
        layer = HQQLinear.from_weights(state.pop(f"{name}.weight"), bias, config, compute_dtype=dtype, device="cpu")
        layer.encoded_state_dict = True
        state |= {f"{name}.{leaf}": part.data.contiguous() for leaf, part in layer.state_dict().items() if part is not None}
        found[name] = layer.dequantize()
    model.config.save_pretrained(out)
    save_file({k: v.contiguous() for k, v in state.items()}, out / "model.safetensors", metadata={"format": "pt"})
    _declare(out, {"quant_config": config, "quant_method": "hqq", "skip_modules": ["lm_head"]})
    return found


def _declare(out: Path, config: dict[str, Any]) -> None:
    held = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(held | {"quantization_config": config}, indent=1, default=str))


def _quanto(base: Path, out: Path, weights: str, dtype: torch.dtype = torch.bfloat16) -> Floats:
    from optimum import quanto

    model = _model(base, dtype)
    quanto.QuantizedModelForCausalLM.quantize(model, weights=getattr(quanto, weights), exclude="lm_head").save_pretrained(str(out))
    return {name: layer.weight.dequantize() for name, layer in _linears(model)}


def _torchao(base: Path, out: Path, kind: str, **options: Any) -> Floats:
    import torchao.quantization as q
    from transformers import TorchAoConfig

    if kind == "intx":
        bits, group = options["bits"], options["group"]
        mapping = q.MappingType.ASYMMETRIC if options.get("asymmetric") else q.MappingType.SYMMETRIC
        config = q.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=q.PerGroup(group), mapping_type=mapping)
    else:
        config = {"int8": q.Int8WeightOnlyConfig, "fp8": q.Float8WeightOnlyConfig}[kind]()
    model = _model(base, quantization_config=TorchAoConfig(quant_type=config), device_map="cpu")
    model.save_pretrained(out)
    return {name: layer.weight.dequantize() for name, layer in _linears(model)}


def _compressed(base: Path, out: Path, form: str, weights: dict[str, Any], acts: dict[str, Any] | None = None) -> Floats:
    """Round-to-nearest scales by the library's ``calculate_qparams``, its compressor, and its own reading back of that."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from safetensors.torch import save_file

    args = QuantizationArgs(**weights)
    activations = None if acts is None else QuantizationArgs(**acts)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=activations, format=form)
    compressor, found = BaseCompressor.get_value_from_registry(form), {}
    model = _model(base)
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for name, linear in _linears(model):
        weight = linear.weight.data
        n, k = weight.shape
        tile = args.block_structure or (1, args.group_size or k)
        runs = weight.reshape(n // tile[0], tile[0], k // tile[1], tile[1])
        low, high = runs.amin((1, 3)), runs.amax((1, 3))
        extra = {"global_scale": generate_gparam(weight.amin(), weight.amax())} if form.startswith("nvfp4") else {}
        scale, zero = calculate_qparams(low, high, args, **extra)
        parts = {"weight": weight, "weight_scale": scale.to(scale.dtype if extra or form.startswith("mx") else weight.dtype)}
        if extra:
            parts["weight_global_scale"] = extra["global_scale"]
        elif args.type == "int":
            parts["weight_zero_point"] = zero.to(torch.int8)
        made = compressor.compress(parts, scheme)
        found[name] = compressor.decompress(dict(made), scheme)["weight"]
        del state[f"{name}.weight"]
        state |= {f"{name}.{leaf}": part.contiguous() for leaf, part in made.items()}
    model.config.save_pretrained(out)
    save_file({k: v.contiguous() for k, v in state.items()}, out / "model.safetensors", metadata={"format": "pt"})
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=["lm_head"])
    _declare(out, json.loads(config.model_dump_json()))
    return found


def _packed(base: Path, out: Path, name: str) -> Floats:
    from safetensors.torch import save_file

    packer, found = PACKERS[name], {}
    model = _model(base, packer.dtype)
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for module in [*(linear for linear, _ in _linears(model)), *(["model.embed_tokens"] if packer.embedding else [])]:
        parts, found[module] = packer.pack(state.pop(f"{module}.weight"))
        state |= {f"{module}.{leaf}": part.contiguous() for leaf, part in parts.items()}
    model.config.save_pretrained(out)
    save_file(state, out / "model.safetensors", metadata={"format": "mlx" if name.startswith("mlx") else "pt"})
    if packer.beside is not None:
        (out / "hf_quant_config.json").write_text(json.dumps(packer.beside, indent=4))
        return found
    _declare(out, packer.config)
    if packer.embedding:  # mlx-lm says it twice
        held = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(held | {"quantization": packer.config}, indent=1))
    return found


def _four(kind: str, **options: Any) -> Callable[[Path, Path], Floats]:
    arguments = {f"bnb_4bit_{key}": value for key, value in options.items()}
    return partial(_bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type=kind, **{"bnb_4bit_compute_dtype": torch.bfloat16} | arguments)


_ROW = {"num_bits": 8, "strategy": "channel"}
_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
RECIPES: dict[str, Callable[[Path, Path], Floats]] = {
    "bnb-nf4": _four("nf4"), "bnb-nf4-double": _four("nf4", use_double_quant=True), "bnb-fp4": _four("fp4"), "bnb-int8": _bitsandbytes,
    "hqq-4-g64-ax1": partial(_hqq, bits=4, group=64, axis=1), "hqq-3-g64-ax1": partial(_hqq, bits=3, group=64, axis=1),
    "hqq-4-g64-ax0": partial(_hqq, bits=4, group=64, axis=0),
    "hqq-qmodel-4-g64-ax1": partial(_hqq, bits=4, group=64, axis=1, pickled=True),
    "quanto-qint8": partial(_quanto, weights="qint8"), "quanto-qint4": partial(_quanto, weights="qint4"),
    "quanto-qfloat8": partial(_quanto, weights="qfloat8_e4m3fn"),
    "torchao-int8": partial(_torchao, kind="int8"), "torchao-int4-g32": partial(_torchao, kind="intx", bits=4, group=32),
    "torchao-int4-g64-asym": partial(_torchao, kind="intx", bits=4, group=64, asymmetric=True),
    "torchao-fp8": partial(_torchao, kind="fp8"),
    "ct-nvfp4": partial(_compressed, form="nvfp4-pack-quantized", weights={
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn,
        "zp_dtype": torch.float8_e4m3fn}),
    "ct-mxfp4": partial(_compressed, form="mxfp4-pack-quantized", weights={
        "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}),
    "ct-fp8-block": partial(_compressed, form="float-quantized", weights={
        "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 64]}),
    "ct-w8a8": partial(_compressed, form="int-quantized", weights=_ROW | {"type": "int"}, acts=_TOKEN | {"type": "int"}),
    "ct-fp8-dynamic": partial(_compressed, form="float-quantized", weights=_ROW | {"type": "float"}, acts=_TOKEN | {"type": "float"}),
    **{name: partial(_packed, name=name) for name in PACKERS},
}  # fmt: skip


def write_floats(base: Path, out: Path, found: Floats) -> None:
    """``base`` as plain float32 with the owner's values in place."""
    model = _model(base, torch.float32)
    parameters = dict(model.named_parameters())
    for name, values in found.items():
        assert parameters[f"{name}.weight"].shape == values.shape, name
        parameters[f"{name}.weight"].data = values.float().contiguous()
    model.save_pretrained(out)


def make(name: str) -> None:
    """Make one checkpoint and its floats under ``CHECKPOINTS``; whatever stood half-made under its partial name goes first."""
    out, partial_out = CHECKPOINTS / name, CHECKPOINTS / f".{name}.part"
    if out.exists():
        return
    recipe, _, model = name.rpartition("-")
    if recipe not in RECIPES or model not in BASES:
        raise SystemExit(f"no recipe makes {name!r}")
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    for folder in (partial_out, floats_of(partial_out), floats_of(out)):
        shutil.rmtree(folder, ignore_errors=True)
    base = MODELS / BASES[model]
    partial_out.mkdir()
    write_floats(base, floats_of(partial_out), RECIPES[recipe](base, partial_out))
    for folder in (partial_out, floats_of(partial_out)):
        for file in SIDE_FILES:
            if (base / file).exists() and not (folder / file).exists():
                shutil.copy(base / file, folder)
    floats_of(partial_out).rename(floats_of(out))
    partial_out.rename(out)


if __name__ == "__main__":
    torch.set_num_threads(2)
    for one in sys.argv[1:]:
        make(one)
