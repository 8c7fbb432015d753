"""Quantize on load: a float checkpoint and a target's words become the checkpoint that ``qconvert quantize`` would write, unwritten.

Modules are named as in the source and as transformers names them, whatever the target's tensors are called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from converters.importances import open_imatrix
from converters.mapping import map_tensors
from converters.options import FLOAT_WORDS, PlanOptions
from converters.plan import make_plan, refuse_losses
from converters.unwritten import checkpoint_of
from qformats import registry
from qformats.architectures.mapping import TensorMap
from qformats.checkpoint import Checkpoint
from qformats.errors import UsageError, WouldLose, did_you_mean
from qformats.formats.ggml import mixes
from qformats.formats.protocol import Target

__all__ = ["quantized"]

_FLOAT_TYPES = {stored: word for word, stored in FLOAT_WORDS.items()}


def quantized(
    checkpoint: Checkpoint,
    to: str,
    *,
    modules_to_not_convert: Sequence[str] | None = None,
    per_module: Mapping[str, str] | None = None,
    imatrix: str | Path | None = None,
    allow_requantize: bool = False,
    renaming: Callable[[str], str] | None = None,
) -> Checkpoint:
    """See ``qformats.runtime.quantizing.quantized``."""
    target = _target(to)
    patterns = {pattern: _compiled(pattern) for pattern in per_module or {}}
    kinds = {pattern: _kind(word, target) for pattern, word in (per_module or {}).items()}
    if checkpoint.has_codes and not allow_requantize:
        text = f"is quantized already ({checkpoint.format}); new codes would be rounded from codes"
        raise WouldLose("requantize", text, path=checkpoint.path, hint="load it as it is, or add allow_requantize=True")
    weights = [tensor for tensor in map_tensors(checkpoint, target.format).tensors if tensor.leaf == "weight"]
    called = _Names(checkpoint, weights, renaming)
    types = [
        *_kept_floats(checkpoint, weights, called, modules_to_not_convert or ()),
        *((found, kinds[pattern]) for pattern, regex in patterns.items() for found in _named(pattern, regex, weights, called)),
    ]
    matrix = None if imatrix is None else open_imatrix(imatrix)
    plan = make_plan(checkpoint, PlanOptions(target, allow_requantize=True, tensor_types=tuple(types), imatrix=matrix))
    refuse_losses(plan)
    stem = checkpoint.path.name if checkpoint.path.is_dir() else checkpoint.path.stem
    return checkpoint_of(plan, f"{stem}-{target.type}.gguf")


# ---------------------------------------------------------------- words


def _target(to: str) -> Target:
    """A target that names its type, or whose format has one alone."""
    target = registry.parse_target(to)
    types = registry.row(target.format).types
    if target.type is None and types:
        raise UsageError("target-type-missing", f"{to} names no type", hint=f"types: {', '.join(types)}")
    return target


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError("tensor-type", f"{pattern!r} is not a regular expression: {error}") from None


def _kind(word: str, target: Target) -> str:
    """The type of a single module: the target's own words, or a bare type; floats of any spelling."""
    if ":" in word or "," in word:
        found = registry.parse_target(word)
        is_float = found.format == "hf" and found.type is not None
        if not is_float and (found.format != target.format or found.type is None or found.options not in ({}, target.options)):
            hint = f"name a type of {target.format}, or hf:bf16 to leave floats"
            raise UsageError("target-type", f"{word!r} is not of the same format and options as {target}", hint=hint)
        return str(found.type)
    row, kind = registry.row(target.format), word.lower()
    block = row.container == "gguf" and mixes.is_block_type(kind)
    if kind not in FLOAT_WORDS and not block and (row.container == "gguf" or kind not in row.types):
        hint = f"{did_you_mean(kind, row.types)}types: {', '.join(row.types)}"
        raise UsageError("target-type", f"{target.format} has no type {word!r} of single tensors", hint=hint)
    return kind


# ---------------------------------------------------------------- modules


class _Names:
    """What the modules behind each tensor of the output are called: in the source, by transformers, and in the output if that is one."""

    def __init__(self, checkpoint: Checkpoint, weights: Sequence[TensorMap], renaming: Callable[[str], str] | None) -> None:
        self._more: dict[str, set[str]] = {}
        if checkpoint.gguf is not None:
            for tensor in checkpoint.binding.to_hf(checkpoint.shapes()).tensors:
                for source in tensor.sources:
                    self._more.setdefault(source.module, set()).add(tensor.target)
        self._renaming = renaming
        has_head = any(tensor.kind == "output" for tensor in weights)
        self._head = frozenset() if has_head else frozenset({"lm_head", "output"})  # the embedding stands for it

    def of(self, tensor: TensorMap) -> set[str]:
        """All of them."""
        found = {source.module for source in tensor.sources if source.module} | {tensor.target}
        for name in tuple(found):
            found |= self._more.get(name, set())
        if self._renaming is not None:
            found |= {self._renaming(f"{name}.weight").removesuffix(".weight") for name in found}
        return found | self._head if tensor.kind == "embedding" else found


def _is_meant(key: str, name: str) -> bool:
    """Whether ``key`` is the module, one that it is in, or the last words of its name."""
    return f".{name}".endswith(f".{key}") or f".{name}.".startswith(f".{key}.") or f".{key}." in f".{name}."


def _kept_floats(
    checkpoint: Checkpoint, weights: Sequence[TensorMap], called: _Names, keys: Iterable[str]
) -> list[tuple[str, str]]:
    """Patterns that leave every named module in the floats that it is stored in; ``UsageError('absent-module')``."""
    by_type: dict[str, list[str]] = {}
    for key in dict.fromkeys(keys):
        found = [tensor for tensor in weights if any(_is_meant(key, name) for name in called.of(tensor))]
        if not found:
            text = f"modules_to_not_convert names {key!r}, and no module of the checkpoint has that name"
            raise UsageError("absent-module", text, path=checkpoint.path, hint="such as 'lm_head' or 'model.layers.0.mlp'")
        for tensor in found:
            names = by_type.setdefault(_stored_type(checkpoint, tensor), [])
            names.extend([tensor.name] if tensor.name not in names else [])
    return [(_exactly(names), kind) for kind, names in by_type.items()]


def _stored_type(checkpoint: Checkpoint, tensor: TensorMap) -> str:
    found = {checkpoint.modules[s.module].parts[s.leaf].dtype for s in tensor.sources if s.leaf in checkpoint.modules[s.module].parts}
    return _FLOAT_TYPES.get(next(iter(found)), "f32") if len(found) == 1 else "f32"


def _named(pattern: str, regex: re.Pattern[str], weights: Sequence[TensorMap], called: _Names) -> list[str]:
    """The pattern for ``PlanOptions.tensor_types``: itself where it speaks of the output's tensors, else the tensors of the modules."""
    if any(regex.search(tensor.name) for tensor in weights):
        return [pattern]
    found = [tensor.name for tensor in weights if any(regex.search(name) for name in called.of(tensor))]
    if not found:
        raise UsageError("absent-module", f"per_module has {pattern!r}, which no module's name matches", hint="such as r'\\.q_proj'")
    return [_exactly(found)]


def _exactly(names: Sequence[str]) -> str:
    return f"^(?:{'|'.join(map(re.escape, names))})$" if len(names) > 1 else f"^{re.escape(names[0])}$"
