"""A transformers model without weights: its configuration, its class, and what no checkpoint holds (rotary tables, generation settings)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qformats.checkpoint import Checkpoint
from qformats.errors import BadFile, Unsupported

if TYPE_CHECKING:
    import torch

__all__ = ["config_of", "empty_model", "finish", "rename"]



def transformers() -> Any:
    """The package; ``Unsupported('transformers-missing')`` where it is not installed."""
    try:
        import transformers as package
    except ImportError:
        hint = "install it: pip install transformers"
        raise Unsupported("transformers-missing", "running a model needs the package transformers", hint=hint) from None
    return package


def config_of(checkpoint: Checkpoint) -> Any:
    """The model's configuration as transformers' own object, without the word of its quantization."""
    package = transformers()
    if checkpoint.gguf is not None:
        files = checkpoint.binding.hf_configs(checkpoint.gguf.metadata)
        values = json.loads(files["config.json"])
    else:
        values = dict(checkpoint.config)
    if not values:
        raise BadFile("config-missing", "no config.json beside the weights", path=checkpoint.path, hint="add the model's config.json")
    for key in ("quantization_config", "compression_config", "quantization"):
        values.pop(key, None)
    kind = values.pop("model_type", None)
    try:
        return package.AutoConfig.for_model(kind, **values)
    except ValueError:
        known = f"this transformers ({package.__version__}) knows no model type {kind!r}"
        raise Unsupported("model-type", known, path=checkpoint.path, hint="install a newer transformers") from None


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The model on the meta device, in ``dtype``, for inference."""
    import torch

    package = transformers()
    cls = _class_of(package, config)
    with torch.device("meta"):
        return cls._from_config(config, dtype=dtype).eval()


def _class_of(package: Any, config: Any) -> Any:
    named = [getattr(package, name, None) for name in getattr(config, "architectures", None) or ()]
    for cls in named:
        if cls is not None and getattr(cls, "config_class", None) is type(config):
            return cls
    mapping = package.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        text = f"transformers has no causal language model for {type(config).__name__}"
        raise Unsupported("model-type", text)
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def rename(model: Any) -> Any:
    """A function from a tensor's name in a checkpoint to the name it has in ``model``, by transformers' own table."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    except (ImportError, AttributeError, TypeError):  # an older transformers
        renamings = []
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    prefix = f"{model.base_model_prefix}."

    def new_name(name: str) -> str:
        if name in own:
            return name
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        if name not in own and prefix + name in own:  # a checkpoint of the base model alone
            return prefix + name
        if name not in own and name.startswith(prefix) and name.removeprefix(prefix) in own:
            return name.removeprefix(prefix)
        return name

    return new_name


def expert_sources(model: Any) -> dict[str, tuple[str, ...]]:
    """What a stacked parameter is made of, expert by expert: ``.experts.gate_up_proj`` → (``.experts.*.gate_proj.weight``, …)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return {}
    found = {}
    for converter in get_model_conversion_mapping(model):
        if isinstance(converter, WeightConverter) and len(converter.target_patterns) == 1:
            sources = tuple(getattr(converter, "_original_source_patterns", converter.source_patterns))
            if all("*" in source for source in sources):
                found[converter.target_patterns[0]] = sources
    return found


def finish(model: Any, checkpoint: Checkpoint) -> None:
    """Compute the buffers that no checkpoint holds, tie what is tied, read the generation settings; nothing may be left empty."""
    for module in model.modules():
        left = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if left:
            _fresh_buffers(module, left, model)
    model.tie_weights()
    generation = transformers().GenerationConfig
    try:
        if checkpoint.gguf is None and (checkpoint.path / "generation_config.json").is_file():
            model.generation_config = generation.from_pretrained(str(checkpoint.path))
        elif model.can_generate():
            model.generation_config = generation.from_model_config(model.config)
    except (OSError, ValueError) as error:
        raise BadFile("generation-config", f"generation_config.json: {error}", path=checkpoint.path) from None
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        text = f"{len(empty)} tensors of the model are not in the checkpoint, the first is {empty[0]!r}"
        raise BadFile("missing-tensor", text, path=checkpoint.path, tensor=empty[0], hint="the checkpoint is incomplete")


def _fresh_buffers(module: Any, names: list[str], model: Any) -> None:
    """Computed buffers as the module's own constructor makes them."""
    import inspect

    import torch

    wanted = inspect.signature(type(module).__init__).parameters
    config = getattr(module, "config", None)
    if config is not None and "config" in wanted:
        with torch.device("cpu"):
            fresh = type(module)(config)
        for name in names:
            module._buffers[name] = getattr(fresh, name)
        return
    for name in names:
        module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
    model._init_weights(module)
