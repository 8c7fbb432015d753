"""The quantization config of an output: one config group for each kind of storage, the ignore list, the original where it still holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qformats.errors import QFormatError, Unsupported
from qformats.formats.compressed_tensors.config import METHODS, NAME, candidates, dense_packing, inner, is_ignored
from qformats.formats.protocol import Activations, Target
from qformats.scheme import Float, Integer, Storage

__all__ = ["config_out", "harmonize", "with_activations"]

_VERSIONS = {
    True: "0.18.0",
    False: "0.17.0",
}  # the first release that packs 3, 5, 6, 7 bits as one stream, and the last that reads g_idx; the last that packs words


def config_out(
    target: Target, modules: Mapping[str, Storage], skipped: Sequence[str], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The ``quantization_config`` of an output; ``original`` as it was if it still says the truth of every module.

    Otherwise one group for each (arguments, format): the commonest targets ``Linear``, the others their modules by name. Activation and
    cache schemes of ``original`` stay where the format of the weights is theirs.
    """
    if original is not None and _describes(original, modules, skipped):
        return dict(original)
    if any(s.options.get("read_only") for s in modules.values()):
        raise Unsupported("ct-read-only", "sparse, dense and stacked weights keep their own config; other weights were changed beside them")
    kinds: dict[str, list[str]] = {}
    for name, storage in sorted(modules.items()):
        kinds.setdefault(repr((_arguments(storage), storage.options["format"])), []).append(name)
    ordered = sorted(kinds.values(), key=lambda names: (-len(names), names))
    groups = {f"group_{i}": _group(modules[names[0]], ["Linear"] if i == 0 else names, names) for i, names in enumerate(ordered)}
    formats = sorted({str(s.options["format"]) for s in modules.values()})
    stream = not any(s.options.get("packing") == "words" for s in modules.values())
    return {
        "quant_method": NAME,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _ignored(modules, skipped, original),
        "kv_cache_scheme": None if original is None else inner(original).get("kv_cache_scheme"),
        "global_compression_ratio": None,
        "version": _VERSIONS[stream],
    }


def with_activations(config: Mapping[str, Any], activations: Activations | None, cache: bool) -> dict[str, Any] | None:
    """The config with ``input_activations`` in the groups whose weights are of their kind; None if there is no such group.

    The arguments are those of the preset schemes FP8, FP8_DYNAMIC, FP8_BLOCK, W8A8, NVFP4 and MXFP8 (compressed-tensors 0.20).
    """
    made, taken = dict(config), activations is None
    groups = {name: dict(group) for name, group in config["config_groups"].items()}
    for group in groups.values():
        inputs = None if activations is None else _inputs(group, activations)
        if inputs is not None:
            group["input_activations"], taken = inputs, True
    if cache and not made.get("kv_cache_scheme"):
        made["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    return {**made, "config_groups": groups} if taken else None


def _inputs(group: Mapping[str, Any], activations: Activations) -> dict[str, Any] | None:
    """The arguments of a group's inputs, None where its weights are of another kind or static scales stand over several tensors."""
    formats = {"float-quantized": "fp8", "int-quantized": "int8", "nvfp4-pack-quantized": "nvfp4", "mxfp8-quantized": "mxfp8"}
    if formats.get(str(group["format"])) != activations.kind:
        return None
    made = {"num_bits": 8, "type": "int" if activations.kind == "int8" else "float", "symmetric": True}
    if activations.kind == "nvfp4":
        return {**made, "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
    if activations.kind == "mxfp8":
        return {**made, "strategy": "group", "group_size": 32, "dynamic": True}
    if not activations.dynamic:
        return {**made, "strategy": "tensor", "dynamic": False}
    block = group["weights"]["strategy"] == "block"
    size = {"group_size": group["weights"]["block_structure"][1]} if block else {}
    return {**made, "strategy": "group" if block else "token", **size, "dynamic": True}


def _ignored(modules: Mapping[str, Storage], skipped: Sequence[str], original: Mapping[str, Any] | None) -> list[str]:
    """What stays in floats: the linears that do, ``lm_head`` even where it is tied and not stored, and the original's words for others."""
    head = [] if any(name.rpartition(".")[2] == "lm_head" for name in modules) else ["lm_head"]
    before = [] if original is None else [str(w) for w in inner(original).get("ignore") or ()]
    kept = [word for word in before if not any(is_ignored({"ignore": [word]}, name) for name in modules)]
    return sorted({*skipped, *head, *kept})


def _group(storage: Storage, targets: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    embeddings = [n for n in names if "embed" in n.rpartition(".")[2]]
    return {
        "targets": [*targets, *(n for n in embeddings if n not in targets)],
        "weights": _arguments(storage),
        "input_activations": None,
        "output_activations": None,
        "format": storage.options["format"],
    }


def _arguments(storage: Storage) -> dict[str, Any]:
    """``QuantizationArgs`` of a storage."""
    integers = isinstance(storage.grid, Integer)
    strategy = str(storage.options["strategy"])
    bits = storage.integers.bits if integers else {"e2m1": 4, "e2m3": 6}.get(_name(storage), 8)
    made: dict[str, Any] = {
        "num_bits": bits,
        "type": "int" if integers else "float",
        "symmetric": not isinstance(storage.zero_point, tuple),
        "strategy": strategy,
        "group_size": storage.group if strategy in ("group", "tensor_group") else None,
        "dynamic": False,
    }
    if storage.options.get("g_idx") == "index":
        made["actorder"] = "group"
    if strategy == "block":
        made["block_structure"] = [storage.rows, storage.group]
    if storage.scale_grid is not None:
        made["scale_dtype"] = "torch.float8_e4m3fn" if storage.scale_grid == Float("e4m3fn") else "torch.uint8"
    return made


def _name(storage: Storage) -> str:
    return storage.grid.name if isinstance(storage.grid, Float) else ""


def _describes(original: Mapping[str, Any], modules: Mapping[str, Storage], skipped: Sequence[str]) -> bool:
    """Whether ``original`` still says the truth: each module's first group has its arguments, and what stays dense is ignored."""
    if str(original.get("quant_method") or NAME).lower() not in METHODS:
        return False
    try:
        return all(_says(original, name, storage) for name, storage in modules.items()) and all(
            is_ignored(original, name) or not _targeted(original, name) for name in skipped
        )
    except QFormatError:
        return False


def _targeted(original: Mapping[str, Any], name: str) -> bool:
    return next(candidates(original, name), None) is not None


def _says(original: Mapping[str, Any], name: str, storage: Storage) -> bool:
    found = next(candidates(original, name), None)
    if storage.options.get("read_only") and storage.options["format"] != "stacked":
        return True  # sparse weights need no group
    if found is None or found.weights is None or is_ignored(original, name):
        return False
    if _packing_matters(storage) and dense_packing(original) != (storage.options["packing"] == "stream"):
        return False
    if storage.options.get("read_only"):
        return True
    made, said = _arguments(storage), found.weights
    same = (said.bits, said.kind, said.symmetric, said.strategy) == (made["num_bits"], made["type"], made["symmetric"], made["strategy"])
    naive = found.format == "naive-quantized" and storage.options["format"] in ("int-quantized", "float-quantized", "mxfp8-quantized")
    block = None if said.block is None else list(said.block)
    return (
        same
        and (said.group, block) == (made["group_size"], made.get("block_structure"))
        and not (said.ordered and made["strategy"] == "group" and not storage.options.get("g_idx"))
        and (naive or found.format in (storage.options["format"], "fakequant", "dense"))
    )


def _packing_matters(storage: Storage) -> bool:
    return "packing" in storage.options and isinstance(storage.grid, Integer) and storage.grid.bits in (3, 5, 6, 7)


def harmonize(modules: Mapping[str, Storage]) -> dict[str, Storage]:
    """Storages of one checkpoint, which says its packing once: where they differ, all are one stream."""
    if len({s.options.get("packing") for s in modules.values() if s.options.get("packing")}) < 2:
        return dict(modules)
    words = {name for name, s in modules.items() if s.options.get("packing") == "words"}
    return {
        name: replace(s, options={**s.options, "packing": "stream"}, whole=False) if name in words else s for name, s in modules.items()
    }
