"""What a checkpoint is, in plain values that rules can name: format, widths, symmetry, names, files, metadata of a GGUF.

The facts, all optional for a rule (an absent one is null):

- ``container`` (``safetensors``, ``gguf``, ``torch``, ``broken gguf``, ``none``), ``format``, ``dialect``, ``method`` (``quant_method``
  in lower case, ``""`` if config.json states none), ``stated`` (config.json has a quantization config), ``quantization`` (that config, or
  the one beside it), ``config`` (config.json), ``architecture``, ``model_type``, ``remote_code`` (``auto_map``); ``problem`` (``code``,
  ``message``): why the files cannot be opened.
- ``modules``: of each module in codes ``name bits group symmetric act_order inputs outputs leaves type``; from parameters where there are
  zero points in words: ``zeros`` (how they are stored), ``zero`` (the one true value, if there is one), ``index`` (``absent``,
  ``trivial``, ``act-order`` …), ``label``; or ``problem``. ``bits``, ``groups``, ``types``: their distinct values. ``asymmetric``,
  ``act_order``: of any of them.
- ``dtypes``: of all tensors. ``groups_said``: ``config_groups`` of compressed-tensors as a list, with ``format`` and ``weights`` filled in.
- ``files``: ``single`` (model.safetensors), ``count``, ``names``, ``missing`` (named by the index, not there), ``wrong`` (tensors in
  another file than the index says), ``unlisted``, ``total`` (``total_size`` is wrong), ``index`` (there is one), ``unmarked`` (no
  ``format`` in the metadata), ``broken``.
- ``tensor_parallel`` (parts that every matrix is cut into, 1 if the user does not say), ``capability`` (of the GPU; null if he does not),
  ``heads``, ``kv_heads``; for engines whose JSON says how they cut, ``shards`` (see ``shards``) and ``least_capability`` (of the method).
- ``tokenizer``: ``any json model settings template``. ``generation``: generation_config.json is there.
- ``gguf``: ``architecture tokenizer pre template merges tokens types keys_missing embedding big_endian shards``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from converters.inspect import scheme_label
from converters.lint.reading import Found
from converters.lint.shards import heads_of
from qformats import registry
from qformats.checkpoint import Checkpoint
from qformats.containers.safetensors import tensor_nbytes
from qformats.errors import QFormatError
from qformats.scheme import Integer, Scheme

__all__ = ["facts_of"]

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
_HYPERPARAMETERS = ("context_length", "embedding_length", "block_count")


def facts_of(found: Found, tensor_parallel: int = 1, capability: int | None = None) -> dict[str, Any]:
    """The facts of the module's docstring; reads headers, configs and the parameters named there, no codes."""
    checkpoint = found.checkpoint
    facts: dict[str, Any] = {"path": found.path, "container": "none", "modules": [], "bits": [], "groups": [], "types": []}
    facts.update(tensor_parallel=tensor_parallel, capability=capability, heads=None, kv_heads=None, quantization={})
    if found.problem is not None:
        facts["problem"] = {"code": found.problem.code, "message": found.problem.message}
        if checkpoint is None and (found.path.endswith(".gguf") or found.problem.code.startswith("gguf")):
            return {**facts, "container": "broken gguf", "format": "gguf"}
    if checkpoint is not None and checkpoint.gguf is not None:
        return {**facts, "container": "gguf", "format": "gguf", "gguf": _gguf(checkpoint)}
    config = dict(checkpoint.config) if checkpoint is not None else found.json("config.json")
    facts.update(_said(config, checkpoint), tokenizer=_tokenizer(found), generation="generation_config.json" in found.names)
    facts["files"] = _files(found)
    if checkpoint is None:
        facts["format"] = next((row.name for row in registry.ROWS if facts["method"] and facts["method"] in row.methods), None)
    if checkpoint is not None:
        modules = list(_modules(checkpoint))
        known = [m for m in modules if "problem" not in m]
        facts.update(
            container=checkpoint.container,
            format=checkpoint.format,
            dialect=checkpoint.match.dialect,
            modules=modules,
            dtypes=sorted({raw.dtype for raw in checkpoint.raw.values()}),
            bits=sorted({m["bits"] for m in known if m["bits"] is not None}),
            groups=sorted({m["group"] for m in known if m["group"] is not None}),
            types=sorted({m["type"] for m in known}),
            asymmetric=any(m["symmetric"] is False for m in known),
            act_order=any(m["act_order"] for m in known),
        )
    return facts


def _said(config: Mapping[str, Any], checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What config.json says."""
    holders = [holder for holder in (config, config.get("text_config")) if isinstance(holder, dict)]
    stated = next((h[key] for h in holders for key in ("quantization_config", "compression_config") if h.get(key)), None)
    quantization = dict(checkpoint.match.config) if checkpoint is not None else stated
    if not isinstance(quantization, dict):
        quantization = {}
    classes = config.get("architectures")
    heads, kv_heads = heads_of(config)
    return {
        "config": dict(config),
        "stated": stated is not None,
        "method": str((stated or {}).get("quant_method") or "").lower() if isinstance(stated, dict) else "",
        "quantization": quantization,
        "heads": heads,
        "kv_heads": kv_heads or heads,
        "architecture": classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else None,
        "model_type": config.get("model_type"),
        "remote_code": bool(config.get("auto_map")),
        "groups_said": list(_config_groups(quantization)),
    }


def _config_groups(quantization: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Groups of compressed-tensors, each with the format that is in force for it."""
    groups = quantization.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and isinstance(group.get("weights"), dict):
            said = group.get("format") or quantization.get("format")
            yield {**group, "name": name, "format": said, "weights": {"symmetric": True, **group["weights"]}}


# ---------------------------------------------------------------- modules


def _modules(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    for name in checkpoint.modules:
        if checkpoint.is_quantized(name):
            try:
                yield _module(checkpoint, name)
            except QFormatError as error:
                leaves = sorted(checkpoint.modules[name].parts)
                yield {"name": name, "leaves": leaves, "problem": {"code": error.code, "message": error.message}}


def _module(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    module = checkpoint.modules[name]
    scheme = checkpoint.scheme(name)
    zero = scheme.zero_point
    made: dict[str, Any] = {
        "name": name,
        "type": scheme_label(scheme),
        "bits": scheme.grid.bits if isinstance(scheme.grid, Integer) else None,
        "group": _group(scheme),
        "symmetric": zero is None or zero.constant is not None,
        "act_order": False,
        "inputs": scheme.shape[-1],
        "outputs": scheme.shape[-2],
        "leaves": sorted(module.parts),
    }
    if "qzeros" in module.parts and module.parts["qzeros"].dtype.startswith("I"):
        options = registry.format_module(module.match.format).storage_of(module)
        said = options.options
        made["act_order"] = said.get("g_idx") == "act-order"
        made["symmetric"] = isinstance(options.zero_point, int)
        made.update(label=said.get("checkpoint_format"), zeros=said.get("zeros"), index=said.get("g_idx"))
        made["zero"] = options.zero_point if isinstance(options.zero_point, int) else None
    elif scheme.group_index:
        made["act_order"] = True
    return made


def _group(scheme: Scheme) -> int | None:
    """Columns that share a scale; -1 for a whole row."""
    group = scheme.group_size
    return None if group is None else -1 if group >= scheme.shape[-1] else group


# ---------------------------------------------------------------- files


def _files(found: Found) -> dict[str, Any]:
    weights = [name for name in found.names if name.endswith(".safetensors")]
    made: dict[str, Any] = {
        "single": "model.safetensors" in weights,
        "count": len(weights),
        "names": weights,
        "index": found.index is not None,
        "broken": [{"name": name, "message": message} for name, message in found.broken.items()],
        "unmarked": [name for name, file in found.shards.items() if file.metadata.get("format") is None],
        "pickles": [name for name in found.names if name.endswith((".bin", ".pt", ".pth"))],
    }
    index = found.index
    if index is None:
        return made
    if index.weight_map is None:
        return {**made, "unreadable_index": True}
    made["missing"] = sorted(set(index.weight_map.values()) - set(found.names))
    if found.shards:
        held = {tensor: name for name, file in found.shards.items() for tensor in file.tensors}
        made["wrong"] = sorted(t for t, name in index.weight_map.items() if t in held and held[t] != name)
        made["absent"] = sorted(t for t in index.weight_map if t not in held)
        made["unlisted"] = sorted(t for t in held if t not in index.weight_map)
        total = sum(tensor_nbytes(raw.dtype, raw.shape) for file in found.shards.values() for raw in file.tensors.values())
        made["total"] = index.total_size is not None and index.total_size != total and not made["unlisted"]
    return made


def _tokenizer(found: Found) -> dict[str, Any]:
    settings = found.json("tokenizer_config.json")
    return {
        "any": any(name in found.names for name in TOKENIZERS),
        "json": "tokenizer.json" in found.names,
        "model": "tokenizer.model" in found.names,
        "settings": "tokenizer_config.json" in found.names,
        "template": bool(settings.get("chat_template")) or any(name in found.names for name in TEMPLATES),
    }


# ---------------------------------------------------------------- GGUF


def _gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.gguf
    assert file is not None
    values = {key: value.value for key, value in file.metadata.items()}
    architecture = values.get("general.architecture")
    tokens = values.get("tokenizer.ggml.tokens")
    return {
        "architecture": architecture,
        "kind": values.get("general.type", "model"),
        "tokenizer": values.get("tokenizer.ggml.model"),
        "pre": values.get("tokenizer.ggml.pre"),
        "template": bool(values.get("tokenizer.chat_template")),
        "merges": "tokenizer.ggml.merges" in values,
        "tokens": None if tokens is None else len(tokens),
        "eos": values.get("tokenizer.ggml.eos_token_id"),
        "file_type": values.get("general.file_type"),
        "types": sorted({raw.dtype for raw in file.tensors.values()}),
        "keys_missing": [f"{architecture}.{key}" for key in _HYPERPARAMETERS if f"{architecture}.{key}" not in values],
        "embedding": "token_embd.weight" in file.tensors,
        "big_endian": file.big_endian,
        "shards": file.shards,
    }
