"""A directory as the owner of its format loads it on a CPU, and a layer's weight as the owner dequantizes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

__all__ = ["forward", "owners_model", "owners_weight"]
PACKAGES = {"compressed-tensors": "compressed_tensors", "quanto": "optimum.quanto", "hqq": "hqq.core.quantize"}


def owners_model(folder: Path, owner: str, dtype: torch.dtype) -> Any:
    """In plain transformers; hqq's layers in it for HQQ (transformers 5.23 loads none), Quanto's own loader for Quanto."""
    if owner not in ("hf", "fp8", "bitnet", "mlx"):  # transformers alone
        pytest.importorskip(PACKAGES.get(owner, owner))
    return {"hqq": _hqq, "quanto": _quanto}.get(owner, _transformers)(folder, dtype).eval()


def _transformers(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")


def _quanto(folder: Path, dtype: torch.dtype) -> Any:
    from optimum import quanto

    return quanto.QuantizedModelForCausalLM.from_pretrained(str(folder))._wrapped


def _hqq(folder: Path, dtype: torch.dtype) -> Any:
    from hqq.core.quantize import HQQLinear
    from transformers import AutoConfig, AutoModelForCausalLM

    config, stored = AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
    del config.quantization_config
    dtype = next(value.dtype for key, value in stored.items() if key.endswith(".scale"))  # it computes in
    model, taken = AutoModelForCausalLM.from_config(config, dtype=dtype), set()
    for name in sorted(key.removesuffix(".W_q") for key in stored if key.endswith(".W_q")):
        layer = HQQLinear(None, None, compute_dtype=dtype, device="cpu")
        layer.load_state_dict({key.removeprefix(f"{name}."): v for key, v in stored.items() if key.startswith(f"{name}.")})
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        taken |= {key for key in stored if key.startswith(f"{name}.")}
    model.load_state_dict({k: v.to(dtype) for k, v in stored.items() if k not in taken}, strict=False)
    model.tie_weights()
    return model


def owners_weight(model: Any, module: str) -> torch.Tensor:
    """The layer's weight as its owner dequantizes it."""
    layer = model.get_submodule(module)
    weight = getattr(layer, "weight", None)
    if type(layer).__name__ == "HQQLinear":
        found = layer.dequantize()
    elif type(layer).__name__ == "Linear8bitLt":
        from bitsandbytes import functional

        found = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    elif type(layer).__name__ == "Linear4bit":
        from bitsandbytes import functional

        found = functional.dequantize_4bit(weight.data, weight.quant_state)
    elif type(layer).__name__ == "BitLinear":
        from transformers.integrations.bitnet import unpack_weights

        with torch.compiler.set_stance("force_eager"):
            found = unpack_weights(weight, torch.float32) / layer.weight_scale.float()
    elif type(layer).__name__ == "AutoBitLinear":
        found = weight.data.float() * layer.weight_scale.float()
    elif type(weight) in (torch.Tensor, torch.nn.Parameter):
        found = weight.data
    else:
        found = weight.dequantize()
    values: torch.Tensor = found.detach()
    return values


def forward(model: Any) -> torch.Tensor:
    """float32 (64, vocabulary), all finite."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # BitNet's layers compile themselves
        logits: torch.Tensor = model(torch.arange(1000, 1064)[None]).logits[0].float()
    assert torch.isfinite(logits).all()
    return logits
