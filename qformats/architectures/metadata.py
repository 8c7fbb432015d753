"""A model's GGUF metadata from its config and side files, and its Hugging Face files from GGUF metadata.

Keys, types and order are those of llama.cpp's converter (``conversion/base.py``, ``gguf-py/gguf/metadata.py``): general,
architecture, tokenizer. Not written, because they are guesses from a directory's name or from the model card: ``general.basename``,
``finetune``, ``version``, ``organization``, ``license``, ``tags``, ``languages``, ``base_model.*``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qformats.architectures.fields import as_float32, number
from qformats.architectures.rope import DEFAULT_THETA, full_rope, rope_keys, rope_parameters
from qformats.errors import BadFile

if TYPE_CHECKING:
    from qformats.architectures.binding import Binding
    from qformats.containers.gguf import Metadata

__all__ = ["SIDE_FILES", "build_hf_configs", "build_hf_files", "build_metadata", "json_file", "size_label"]

# side files that metadata reads, where they exist
SIDE_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", "vocab.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip

# generation_config.json field → (key after general.sampling, type), in llama.cpp's order
_SAMPLING = (
    ("sequence", "sequence", "str"), ("top_k", "top_k", "i32"), ("top_p", "top_p", "f32"), ("min_p", "min_p", "f32"),
    ("xtc_probability", "xtc_probability", "f32"), ("xtc_threshold", "xtc_threshold", "f32"), ("temperature", "temp", "f32"),
    ("penalty_last_n", "penalty_last_n", "i32"), ("repetition_penalty", "penalty_repeat", "f32"), ("mirostat", "mirostat", "i32"),
    ("mirostat_tau", "mirostat_tau", "f32"), ("mirostat_eta", "mirostat_eta", "f32"),
)  # fmt: skip


def json_file(files: Mapping[str, bytes], name: str) -> dict[str, Any] | None:
    """Parse one side file, None where it is absent; ``BadFile('json')`` if it is no JSON object."""
    if name not in files:
        return None
    try:
        parsed = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise BadFile("json", f"is not valid JSON: {error}", path=name) from None
    if not isinstance(parsed, dict):
        raise BadFile("json", f"holds {type(parsed).__name__}, expected an object", path=name)
    return parsed


def build_metadata(
    binding: Binding,
    files: Mapping[str, bytes] | None,
    *,
    name: str | None,
    file_type: int | None,
    quantization_version: int | None,
    pre: str | None,
) -> Metadata:
    """See ``Binding.metadata``."""
    from qformats.architectures.tokenizer import tokenizer_metadata
    from qformats.containers.gguf import Value

    metadata: Metadata = {
        "general.architecture": Value("str", binding.architecture.gguf),
        "general.type": Value("str", "model"),
    }
    for key, kind, value in _sampling(json_file(files or {}, "generation_config.json") or {}):
        metadata[f"general.sampling.{key}"] = Value(kind, value)
    if (title := name or _title(binding.config)) is not None:
        metadata["general.name"] = Value("str", title)
    metadata["general.size_label"] = Value("str", size_label(binding))
    for key, kind, value in _architecture_keys(binding):
        if key == "file_type":
            if file_type is not None:
                metadata["general.file_type"] = Value("u32", file_type)
        else:
            metadata[f"{binding.architecture.gguf}.{key}"] = Value(kind, value)
    pooled = None if binding.architecture.pooling is None else binding.architecture.pooling(files or {})
    if pooled is not None:
        metadata[f"{binding.architecture.gguf}.pooling_type"] = Value("u32", pooled)
    if quantization_version is not None:
        metadata["general.quantization_version"] = Value("u32", quantization_version)
    metadata.update(tokenizer_metadata(binding, files, pre))
    return metadata


def _sampling(generation: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    made: list[tuple[str, str, Any]] = []
    for source, key, kind in _SAMPLING:
        value = generation.get("penalty_repeat", generation.get(source)) if key == "penalty_repeat" else generation.get(source)
        if value is None:
            continue
        if kind == "str" and isinstance(value, str):
            made.append((key, kind, value))
        elif kind != "str" and isinstance(value, (int, float)) and not isinstance(value, bool):
            made.append((key, kind, int(value) if kind == "i32" else as_float32(float(value))))
    return made


def _title(config: Mapping[str, Any]) -> str | None:
    """A name out of ``_name_or_path`` when that is a hub name and no path, spelled as llama.cpp spells it."""
    path = config.get("_name_or_path")
    if not isinstance(path, str) or not path or path.count("/") > 1 or path.startswith((".", "/")):
        return None
    words = path.rsplit("/", 1)[-1].strip().replace("-", " ").split()
    return " ".join(word.title() if word.islower() and not word[0].isdigit() and word[0] != "v" else word for word in words)


def _architecture_keys(binding: Binding) -> list[tuple[str, str, Any]]:
    """(key after the architecture, type, value) in llama.cpp's order; the pseudo-key ``file_type`` marks that key's place."""
    keys: list[tuple[str, str, Any]] = []
    for entry in binding.architecture.before:
        _add_field(keys, entry.key, entry.type, _value(binding, entry.config) if entry.constant is None else entry.constant)
    for key, kind, value in _rope(binding):
        _add_field(keys, key, kind, value)
    family = False
    own = [] if binding.architecture.own_keys is None else binding.architecture.own_keys(binding.full)
    left_out = {key for key, _, value in own if value is None}
    for entry in binding.architecture.after:
        if entry.key == binding.architecture.first_own_key:
            keys.append(("file_type", "u32", None))
            family = True
        value = _value(binding, entry.config) if entry.constant is None else entry.constant
        _add_field(keys, entry.key, entry.type, None if entry.key in left_out else value)
    keys.extend(key for key in own if key[2] is not None)
    if not family:
        keys.append(("file_type", "u32", None))
    return keys


def _rope(binding: Binding) -> list[tuple[str, str, Any]]:
    """The rotary keys; none for a family that llama.cpp writes none for, as long as they would say what it assumes without them."""
    if any(entry.config == "rope_theta" for entry in binding.architecture.before):  # they are in the family's own list
        return []
    keys = rope_keys(rope_parameters(binding.full), number(binding.full, "rope_theta"))
    if not binding.architecture.plain_rope and keys == [("rope.freq_base", "f32", DEFAULT_THETA)]:
        return []
    return keys


def _value(binding: Binding, name: str) -> Any:
    """A config field; what transformers derives when it is absent (head counts and sizes) is derived here too."""
    if name == "rotary_dim":
        return binding.dims["R"]
    if name == "rope_theta":
        return number(full_rope(rope_parameters(binding.full)), name, number(binding.full, name))
    if name == "num_key_value_heads":
        return binding.dims["G"]
    if name == "head_dim" and binding.architecture.writes_head_dim:
        return binding.dims["D"]
    return binding.full.get(name)


def _add_field(keys: list[tuple[str, str, Any]], key: str, kind: str, value: Any) -> None:
    if value is None:
        return
    if kind == "[i32]" and isinstance(value, list) and all(type(number) is int and abs(number) < 1 << 31 for number in value):
        keys.append((key, kind, value))
        return
    if kind == "[bool]" and isinstance(value, list) and all(type(flag) is bool for flag in value):
        keys.append((key, kind, value))
        return
    right = isinstance(value, {"str": str, "bool": bool}.get(kind, (int, float))) and (kind == "bool") == isinstance(value, bool)
    if not right or (kind == "u32" and (not isinstance(value, int) or not 0 <= value < 1 << 32)):
        raise BadFile("config-field", f"the config value for {key!r} is {value!r}, which is no {kind}")
    keys.append((key, kind, as_float32(float(value)) if kind == "f32" else value))


def size_label(binding: Binding) -> str:
    """Count the parameters the config means and name them as llama.cpp does (``135M``, ``128x1.8B``)."""
    shared = expert = experts = 0
    for rule in binding.rules:
        if rule.kind == "output" and binding.tied:
            continue
        count = 1
        for size in rule.sizes(binding.dims):
            count *= size
        layers = rule.blocks(binding.dims) if "{i}" in rule.gguf else 1
        if rule.kind == "experts":
            experts = binding.dims["E"]
            expert += count // experts * layers
        else:
            has_bias = rule.bias if isinstance(rule.bias, bool) else binding.full.get(rule.bias)
            shared += (count + (rule.sizes(binding.dims)[0] if has_bias else 0)) * layers
    shared += sum(len(values) for values in binding.factors().values())
    rounded = _rounded(shared + expert)
    return f"{experts}x{rounded}" if experts else rounded


def _rounded(count: int) -> str:
    """Two significant digits with a unit; the thresholds are llama.cpp's (``gguf-py/gguf/utility.py``)."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count > limit:
            return _digits(count / limit, unit)
    return _digits(count / 1e3, "K")


def _digits(scaled: float, unit: str) -> str:
    decimals = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{decimals}f}{unit}"


def build_hf_files(binding: Binding, metadata: Metadata) -> dict[str, bytes]:
    """See ``Binding.hf_files``."""
    from qformats.architectures.hf_tokenizer import hf_tokenizer_files

    return {**build_hf_configs(binding, metadata), **hf_tokenizer_files(metadata)[0]}


def build_hf_configs(binding: Binding, metadata: Metadata) -> dict[str, bytes]:
    """See ``Binding.hf_configs``."""
    from qformats.architectures.hf_tokenizer import special_ids

    special = special_ids(metadata)
    config = {**binding.config, **{f"{name}_token_id": special.get(name) for name in ("bos", "eos", "pad")}}
    generation: dict[str, Any] = {f"{name}_token_id": special[name] for name in ("bos", "eos", "pad") if name in special}
    generation.update(_generation(metadata))
    made = {"config.json": config, "generation_config.json": {**generation, "_from_model_config": not _generation(metadata)}}
    pooled = metadata.get(f"{binding.architecture.gguf}.pooling_type")
    if binding.architecture.pooled_files is not None and pooled is not None:
        made.update(binding.architecture.pooled_files(pooled.value, binding.dims["H"]))
    return {name: _dump(value) for name, value in made.items()}


def _generation(metadata: Metadata) -> dict[str, Any]:
    from qformats.architectures.fields import shortest_float

    made: dict[str, Any] = {}
    for source, key, kind in _SAMPLING:
        stored = metadata.get(f"general.sampling.{key}")
        if stored is not None and stored.type == kind and source in ("top_k", "top_p", "min_p", "temperature", "repetition_penalty"):
            made[source] = shortest_float(stored.value) if kind == "f32" else stored.value
    if made:
        made["do_sample"] = True
    return made


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
