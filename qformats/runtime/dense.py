"""Packed modules replaced by the plain ones that they stand for."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qformats.runtime.embedding import QuantEmbedding
from qformats.runtime.experts import QuantExperts
from qformats.runtime.linear import QuantLinear, TiedHead
from qformats.runtime.packed import present

__all__ = ["to_floats"]


def to_floats(model: Any, dtype: torch.dtype) -> None:
    """Every packed module of ``model`` as the one it replaced, with weights of ``dtype``."""
    heads = []
    for name, module in list(model.named_modules()):
        with ExitStack() as here:  # offloaded planes come back for it
            for part in module.modules() if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts) else ():
                here.enter_context(present(part))
            if isinstance(module, QuantLinear):
                model.set_submodule(name, _linear(module.dequantize(dtype), module.bias, module))
            elif isinstance(module, QuantEmbedding):
                model.set_submodule(name, _embedding(module, dtype))
            elif isinstance(module, QuantExperts):
                model.set_submodule(name, module.to_floats(dtype))
            elif isinstance(module, TiedHead):
                heads.append(name)
    for name in heads:
        weight = model.get_input_embeddings().weight
        head = _linear(weight, model.get_submodule(name).bias, model.get_submodule(name))
        head.weight = weight
        model.set_submodule(name, head)


def _linear(weight: Tensor, bias: Tensor | None, module: nn.Module) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return made.train(module.training)


def _embedding(module: QuantEmbedding, dtype: torch.dtype) -> nn.Module:
    made: nn.Module = module.__dict__["plain"]
    made._parameters["weight"] = nn.Parameter(module.dequantize(dtype), requires_grad=False)
    return made.train(module.training)
