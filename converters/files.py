"""The output's metadata and side files: GGUF keys out of an HF directory, HF files out of a GGUF, quantization configs, the record."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from converters import activations
from converters.digests import DIGESTS_KEY, placeholder
from converters.gguf_record import kept_keys, restored_metadata
from converters.importances import metadata_keys
from converters.jobs import Job
from converters.mapping import linear_modules
from converters.metadata_words import assigned, parse_assignment
from converters.mixing import meant
from converters.options import PlanOptions
from converters.outputs import Output, gguf_output, safetensors_output
from qformats import registry
from qformats.checkpoint import PROVENANCE_KEY, Checkpoint
from qformats.containers.gguf import Metadata, Value
from qformats.errors import BadFile, UsageError
from qformats.formats.protocol import Target
from qformats.scheme import Storage

if TYPE_CHECKING:
    from converters.provenance import Restore

__all__ = ["FILE_TYPES", "build_output", "quantization_config", "side_files"]

# llama_ftype of a file by the type most of its weights have (llama.cpp, include/llama.h); 1024 + type is "guessed"
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16,
    "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 29, "IQ4_XS": 30, "IQ1_M": 31,
    "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39, "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip
_QUANTIZATION_VERSION = 2
_BESIDE = tuple(name for row in registry.ROWS for name in row.configs)
_CONFIGS = ("config.json", *_BESIDE, "generation_config.json")


def side_files(checkpoint: Checkpoint, options: PlanOptions, jobs: Sequence[Job], restore: Restore | None) -> dict[str, bytes]:
    """The small files of the output beside its weights, by name; none beside a GGUF."""
    if registry.row(options.target.format).container == "gguf":
        return {}
    return _hf_files(checkpoint, options, jobs, restore)


def build_output(
    checkpoint: Checkpoint,
    options: PlanOptions,
    jobs: Sequence[Job],
    record: str,
    restore: Restore | None,
    small: Mapping[str, bytes],
) -> Output:
    """Layouts of the whole output, its side files ``small`` among them."""
    if registry.row(options.target.format).container == "gguf":
        metadata = _gguf_metadata(checkpoint, options, jobs)
        if restore is not None and restore.metadata is not None:
            metadata = restored_metadata(restore.metadata, metadata, checkpoint.side_files(), jobs)
        metadata.update(metadata_keys(options.imatrix))
        for word in options.metadata:
            metadata = assigned(metadata, parse_assignment(word))
        metadata[PROVENANCE_KEY] = Value("str", record)
        metadata[DIGESTS_KEY] = Value("str", placeholder([""]))
        alignment = metadata["general.alignment"].value if "general.alignment" in metadata else 32
        return gguf_output(metadata, jobs, alignment)
    if options.metadata:
        hint = "leave --set-metadata out, or name the target gguf"
        raise UsageError("metadata-target", f"{options.target.format} has no keys of a GGUF to set", hint=hint)
    own = _own_metadata(checkpoint, options, jobs, restore)
    return safetensors_output(jobs, small, lambda names: {"format": "pt", **own, PROVENANCE_KEY: record, DIGESTS_KEY: placeholder(names)})


def _own_metadata(checkpoint: Checkpoint, options: PlanOptions, jobs: Sequence[Job], restore: Restore | None) -> dict[str, str]:
    """What the target format says of its tensors in ``__metadata__`` of safetensors files, as it was said before of the same tensors."""
    make = getattr(registry.format_module(options.target.format), "metadata_out", None)
    if make is None:
        return {}
    storages = _storages(checkpoint, options.target.format, jobs)
    modules = {j.map.target: (storages[j.map.target], j.map.shape) for j in jobs if j.map.leaf == "weight" and j.map.target in storages}
    others = {job.name: job.dtype or "" for job in jobs if not (job.map.leaf == "weight" and job.map.target in storages)}
    made: dict[str, str] = make(modules, others)
    said: Mapping[str, str] = {} if restore is None or not _restores_all(jobs, restore) else restore.said
    tied = said.keys() - made.keys() - (set() if restore is None else restore.dtypes.keys())  # named, but stored under another name
    if checkpoint.format == options.target.format and all(job.kind == "copied" for job in jobs):
        said = {key: value for key, value in checkpoint.metadata.items() if not key.startswith("qformats.")}
    return dict(said) if said.keys() - tied | {"format"} == made.keys() | {"format"} else made


def _storages(checkpoint: Checkpoint, name: str, jobs: Sequence[Job]) -> dict[str, Storage]:
    """The storage of every module that is written as codes of the format ``name``, planes that are only copied among them."""
    storages = {j.map.target: j.storage for j in jobs if j.storage is not None and j.map.leaf == "weight"}
    for job in jobs:
        if job.action == "parts" and job.format == name != "hf" and job.map.leaf == "weight" and job.map.kind != "extra":
            storages[job.map.target] = registry.format_module(name).storage_of(checkpoint.modules[job.map.target])
    return storages


# ---------------------------------------------------------------- GGUF


def _file_type(checkpoint: Checkpoint, options: PlanOptions, jobs: Sequence[Job]) -> int:
    """The file type that was asked for, else that of the type most weights have."""
    asked = meant(checkpoint, options)
    if asked is not None:
        return asked.number
    weights: Counter[str] = Counter()
    for job in jobs:
        if len(job.map.shape) > 1 and job.map.kind in ("linear", "experts"):
            weights[job.type] += job.weights
    if not weights:
        weights.update({job.type: job.weights for job in jobs if len(job.map.shape) > 1} or {"F32": 1})
    return FILE_TYPES.get(weights.most_common(1)[0][0], 1024)


def _gguf_metadata(checkpoint: Checkpoint, options: PlanOptions, jobs: Sequence[Job]) -> Metadata:
    if checkpoint.gguf is None:
        return dict(
            checkpoint.binding.metadata(
                checkpoint.side_files(),
                file_type=_file_type(checkpoint, options, jobs),
                quantization_version=_QUANTIZATION_VERSION,
                pre=options.pre_tokenizer,
            )
        )
    kept = {k: checkpoint.gguf.metadata[k] for k in kept_keys(checkpoint.gguf.metadata)}
    asked = meant(checkpoint, options) is not None
    if asked or ("general.file_type" in kept and any(job.kind != "copied" for job in jobs)):
        kept["general.file_type"] = Value("u32", _file_type(checkpoint, options, jobs))
    if asked:
        kept["general.quantization_version"] = Value("u32", _QUANTIZATION_VERSION)
    return kept


# ---------------------------------------------------------------- HF


def _hf_files(checkpoint: Checkpoint, options: PlanOptions, jobs: Sequence[Job], restore: Restore | None) -> dict[str, bytes]:
    files = checkpoint.side_files() if checkpoint.gguf is None else checkpoint.binding.hf_files(checkpoint.gguf.metadata)
    if checkpoint.gguf is None and all(job.kind == "copied" for job in jobs):
        return files
    if restore is not None and _restores_all(jobs, restore):
        recorded = {name: text.encode() for name, text in restore.files.items()}
        return {**{k: v for k, v in files.items() if k not in _CONFIGS}, **recorded}
    config = _config_json(files, checkpoint, restore)
    for name in _BESIDE:
        files.pop(name, None)
    inner = config.get("text_config")
    for key in ("quantization_config", "quantization"):
        config.pop(key, None)
        if isinstance(inner, dict):
            inner.pop(key, None)
    _set_dtype(config, jobs)
    quantization, _ = quantization_config(checkpoint, options, jobs, restore)
    if quantization:
        module = registry.format_module(options.target.format)
        if getattr(module, "CONFIG_INSIDE", True):
            config.update(dict.fromkeys(getattr(module, "CONFIG_KEYS", ("quantization_config",)), quantization))
        if hasattr(module, "side_files"):
            files.update(module.side_files(quantization))
    files["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _restores_all(jobs: Sequence[Job], restore: Restore) -> bool:
    """Whether every quantized module came back in the storage it had."""
    mine = {j.map.target: j.storage for j in jobs if j.action == "codes"}
    if len(mine) != restore.quantized:
        return False
    return mine.keys() == restore.storages.keys() and all(restore.storages[name] == storage for name, storage in mine.items())


def _config_json(files: Mapping[str, bytes], checkpoint: Checkpoint, restore: Restore | None) -> dict[str, Any]:
    text = files.get("config.json")
    if restore is not None and "config.json" in restore.files:
        text = restore.files["config.json"].encode()
    if text is None:
        return {}
    config = json.loads(text)
    if not isinstance(config, dict):
        raise BadFile("json", "config.json is not an object", path=checkpoint.path)
    return config


def _set_dtype(config: dict[str, Any], jobs: Sequence[Job]) -> None:
    """State the float dtype most of the dense weights have, under the key the configuration already uses."""
    words = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    weights: Counter[str] = Counter()
    for job in jobs:
        if job.dtype in words and len(job.map.shape) > 1:
            weights[job.dtype] += job.weights
    if not weights or not config:
        return
    word = words[weights.most_common(1)[0][0]]
    holders = [config, *([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])]
    for holder in holders:
        for key in ("torch_dtype", "dtype"):
            if key in holder:
                holder[key] = word
    if not any(key in holder for holder in holders for key in ("torch_dtype", "dtype")):
        config["dtype"] = word


def quantization_config(
    checkpoint: Checkpoint, options: PlanOptions, jobs: Sequence[Job], restore: Restore | None
) -> tuple[dict[str, Any], bool]:
    """The config of the output, and whether it has the source's activations (or there are none)."""
    row = registry.row(options.target.format)
    storages = {} if row.container == "gguf" else _storages(checkpoint, row.name, jobs)
    if row.name == "hf" or not storages:
        return {}, activations.scheme_of(checkpoint) is None
    linear = {j.map.target for j in jobs if j.map.leaf == "weight" and len(j.map.shape) == 2 and j.map.kind in _LINEAR}
    if checkpoint.gguf is None:
        linear |= set(linear_modules(checkpoint))
    coded = {s.module for j in jobs if j.map.target in storages and j.map.leaf == "weight" for s in j.map.sources}
    skipped = sorted(linear - storages.keys() - (coded if checkpoint.gguf is None else set()))
    original = None
    if restore is not None and "config.json" in restore.files:
        before = json.loads(restore.files["config.json"])
        original = before.get("quantization_config", before.get("quantization"))
    elif checkpoint.format == row.name:
        original = dict(checkpoint.match.config)
    target = Target(row.name, options.target.type, options.target.options)
    config: dict[str, Any] = registry.format_module(row.name).config_out(target, storages, skipped, original)
    return activations.configured(checkpoint, row.name, jobs, config, original)


_LINEAR = ("linear", "experts", "router", "output")
