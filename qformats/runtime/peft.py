"""Adapters on packed weights: PEFT makes the right layers by itself, and a model is made ready for training.

PEFT is not imported here. ``watch`` changes two of its functions as soon as it is imported, or at once if it is already:

- ``LoraModel._create_new_module``: a LoRA layer that PEFT made over a packed module becomes one of ``qformats.runtime.lora``;
- the checks of ``ModulesToSaveWrapper`` and ``TrainableTokensWrapper``, and ``LoraModel._inject_parameters``: what would train nothing, or
  would be lost when it is saved, is refused.

(peft 0.21.2, ``tuners/lora/model.py``, ``tuners/tuners_utils.py``, ``utils/other.py``.)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from qformats.errors import Unsupported

__all__ = ["prepare_for_training", "watch"]

_LORA = "peft.tuners.lora.model"
_MARK = "_qformats_watches"


def watch() -> None:
    """Make PEFT know packed weights, once for the process; nothing is imported, and nothing happens where PEFT never is."""
    if _LORA in sys.modules:
        _change(sys.modules[_LORA])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds one module as Python does, and changes it once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _LORA:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        plain = spec.loader.exec_module

        def run(module: ModuleType) -> None:
            plain(module)
            _change(module)

        spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec


def _change(module: Any) -> None:
    model = module.LoraModel
    if getattr(model, _MARK, False):
        return
    create, inject = model._create_new_module, model._inject_parameters

    def created(lora_config: Any, adapter_name: str, target: Any, **options: Any) -> Any:
        _refuse(target)
        return _ours(create(lora_config, adapter_name, target, **options))

    def injected(self: Any, peft_config: Any, model: Any, *rest: Any, **options: Any) -> Any:
        _refuse_parameters(model, getattr(peft_config, "target_parameters", None) or ())
        return inject(self, peft_config, model, *rest, **options)

    model._create_new_module = staticmethod(created)
    model._inject_parameters = injected
    setattr(model, _MARK, True)
    _change_wrappers()


def _change_wrappers() -> None:
    """Modules that are trained whole, and rows of embeddings that are trained: neither can be codes."""
    from importlib import import_module

    other: Any = import_module("peft.utils.other")
    for name in ("ModulesToSaveWrapper", "TrainableTokensWrapper"):
        wrapper = getattr(other, name, None)
        if wrapper is None:
            continue

        def checked(self: Any, plain: Any = wrapper.check_module) -> None:
            from qformats.runtime.linear import TiedHead
            from qformats.runtime.packed import Packed

            if any(isinstance(module, Packed | TiedHead) for module in self.original_module.modules()):
                text = f"{self._error_message_name()} names a module whose weights are codes, which no optimizer can change"
                hint = "train a LoRA on it, or call dequantize() on the model before"
                raise Unsupported("lora-packed", text, hint=hint)
            plain(self)

        wrapper.check_module = checked


def _refuse(target: Any) -> None:
    from qformats.runtime.experts import ExpertStack, QuantExperts

    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if isinstance(base, ExpertStack | QuantExperts):
        raise _no_experts("an adapter")


def _refuse_parameters(model: Any, wanted: Sequence[str]) -> None:
    names = set(_stacked(model))
    for name in wanted:
        if any(own == name or own.endswith(f".{name}") for own in names):
            raise _no_experts(f"target_parameters has {name!r}, which")


def _stacked(model: Any) -> Iterator[str]:
    """Names of the parameters of experts that are codes here, as transformers has them."""
    from qformats.runtime.experts import QuantExperts

    for name, module in model.named_modules():
        if isinstance(module, QuantExperts):
            yield from (f"{name}.{leaf}" for leaf in ("gate_up_proj", "up_proj", "gate_proj", "down_proj"))


def _no_experts(what: str) -> Unsupported:
    text = f"{what} is for the stacked experts of a mixture, and these are codes here"
    hint = "name other modules alone in target_modules (q_proj, k_proj, v_proj, o_proj), or call dequantize() on the model before"
    return Unsupported("lora-experts", text, hint=hint)


def _ours(made: Any) -> Any:
    """PEFT's own layer of LoRA as the one that can merge into codes."""
    from peft.tuners.lora.layer import Embedding, Linear

    from qformats.runtime.linear import TiedHead
    from qformats.runtime.packed import Packed

    base = made.get_base_layer() if hasattr(made, "get_base_layer") else None
    if isinstance(base, Packed | TiedHead):
        from qformats.runtime.lora import PackedEmbeddingLora, PackedLora

        made.__class__ = {Linear: PackedLora, Embedding: PackedEmbeddingLora}.get(type(made), type(made))
    return made


def prepare_for_training(model: Any, *, gradient_checkpointing: bool = True) -> Any:
    """Make ``model`` ready for adapters on top of its frozen weights; the model itself.

    What PEFT's ``prepare_model_for_kbit_training`` does for the methods that it knows: every parameter is frozen, those in half precision
    become float32 (norms, biases, routers; an embedding of floats keeps its dtype unless it is the output layer too), inputs require
    gradients, and activations are recomputed in the backward pass (non-reentrant) unless ``gradient_checkpointing`` is False. Packed
    weights stay as they are. Attach adapters afterwards.

    >>> import torch
    >>> model = prepare_for_training(torch.nn.Sequential(torch.nn.LayerNorm(4, dtype=torch.bfloat16)), gradient_checkpointing=False)
    >>> [(p.dtype, p.requires_grad) for p in model.parameters()][0]
    (torch.float32, False)
    """
    import torch

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    used = None if head is None else head._parameters.get("weight")
    for module in model.modules():
        for leaf, value in module._parameters.items():
            if value is None:
                continue
            value.requires_grad_(False)
            table = isinstance(module, torch.nn.Embedding) and leaf == "weight" and value is not used
            if value.dtype in (torch.float16, torch.bfloat16) and not table:
                value.data = value.data.to(torch.float32)
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    if gradient_checkpointing and hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
