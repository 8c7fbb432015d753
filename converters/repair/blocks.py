"""GGUF metadata: the file type where it cannot be true, the quantization version, keys of the tokenizer and the template (``--like``).

``llama_ftype``: llama.cpp 0.5.0, ``include/llama.h``; the loader guesses from the tensors too (``src/llama-model-loader.cpp``).
"""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from typing import Any

from converters.files import FILE_TYPES
from converters.lint.reading import Found
from converters.metadata_words import Assignment
from converters.repair.mending import Repair
from qformats.checkpoint import Checkpoint
from qformats.containers.gguf import Value
from qformats.errors import BadFile
from qformats.formats.ggml.mixes import FILE_TYPES as MIXES

__all__ = ["gguf_repairs"]

_VERSION = 2
_ENDS = ("token_embd.weight", "output.weight")  # often of another type than the rest
_FLOATS = ("F32", "F16", "BF16", "F64")


def gguf_repairs(checkpoint: Checkpoint, like: Found | None) -> tuple[list[Repair], list[Assignment]]:
    """What to set in a GGUF, and why; ``BadFile('vocabulary-differs')`` where ``like`` is another model's."""
    repairs: list[Repair] = []
    found: list[Assignment] = []
    for repair, assignment in (*_types(checkpoint), *(() if like is None else _tokenizer(checkpoint, like))):
        repairs.append(repair)
        found.append(assignment)
    return repairs, found


def _values(checkpoint: Checkpoint) -> dict[str, Any]:
    return {key: value.value for key, value in checkpoint.metadata.items()}


def _types(checkpoint: Checkpoint) -> list[tuple[Repair, Assignment]]:
    values, weights = _values(checkpoint), Counter[str]()
    for name, raw in checkpoint.raw.items():
        if len(raw.shape) > 1 and name not in _ENDS:
            weights[raw.dtype] += prod(raw.shape)
    if not weights:
        return []
    main, said = weights.most_common(1)[0][0], values.get("general.file_type")
    made = []
    if main in FILE_TYPES and (said is None or not _can_be(said, weights)):
        number = FILE_TYPES[main]
        why = "it was missing" if said is None else f"it was {said}, and no tensor has a type of that"
        repair = Repair("file-type", f"general.file_type set to {number} ({main})", why)
        made.append((repair, Assignment("general.file_type", "u32", str(number))))
    if "general.quantization_version" not in values and any(kind not in _FLOATS for kind in weights):
        what = f"general.quantization_version set to {_VERSION}"
        repair = Repair("quantization-version", what, "it was missing beside quantized tensors")
        made.append((repair, Assignment("general.quantization_version", "u32", str(_VERSION))))
    return made


def _can_be(said: object, weights: Counter[str]) -> bool:
    """Whether a file of these types could be of the ``llama_ftype`` ``said``; numbers that are not known here can be anything."""
    kinds = {name for name, number in FILE_TYPES.items() if number == said} | {f.block.upper() for f in MIXES.values() if f.number == said}
    return not kinds or any(kind in weights for kind in kinds)


def _tokenizer(checkpoint: Checkpoint, like: Found) -> list[tuple[Repair, Assignment]]:
    """Keys of ``tokenizer.*`` that are missing, as a conversion of ``like`` would write them."""
    values = _values(checkpoint)
    assert like.checkpoint is not None
    if like.checkpoint.gguf is not None:
        wanted = dict(like.checkpoint.gguf.metadata)
    else:
        wanted = dict(like.checkpoint.binding.metadata(like.checkpoint.side_files()))
    tokens = wanted.get("tokenizer.ggml.tokens")
    if tokens is not None and "tokenizer.ggml.tokens" in values and list(tokens.value) != list(values["tokenizer.ggml.tokens"]):
        text = f"the vocabulary of {like.path} is another one"
        raise BadFile("vocabulary-differs", text, path=checkpoint.path, hint="name the model that the file was made from")
    made = []
    for key, value in wanted.items():
        if key.startswith("tokenizer.") and key not in values:
            repair = Repair("tokenizer-key", f"{key} set", f"missing here, there in {like.path}", (key,))
            made.append((repair, Assignment(key, value.type, _text(value))))
    return made


def _text(value: Value) -> str:
    if value.type.startswith("["):
        return json.dumps(list(value.value))
    return str(value.value).lower() if value.type == "bool" else str(value.value)
