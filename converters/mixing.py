"""Where llama.cpp's file types meet a conversion: which of them is meant, for which model, and the type it gives each target tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qformats import registry
from qformats.architectures.mapping import TensorMap
from qformats.checkpoint import Checkpoint
from qformats.errors import UsageError, did_you_mean
from qformats.formats.ggml import mixes

if TYPE_CHECKING:
    from converters.options import PlanOptions

__all__ = ["NO_MIX", "Mix", "check_options", "is_named", "meant", "mix_of", "model_of"]


@dataclass(frozen=True)
class Mix:
    """``types``: type name by target tensor name. ``file_type``: None where only single tensors were named.

    ``asks``: whether codes may be replaced only with consent, as a file type names no type for a tensor of codes. ``kept``: the type
    that codes go to before ``types`` is asked, where it holds them exactly; None for a name that is a file type's alone.
    """

    file_type: mixes.FileType | None = None
    types: Mapping[str, str] = field(default_factory=dict)
    asks: bool = False
    kept: str | None = None
    overridden: frozenset[str] = frozenset()


NO_MIX = Mix()


def check_options(options: PlanOptions) -> None:
    """``UsageError`` for llama.cpp's options beside another container, for unknown types and for ``--pure`` without a type."""
    given = (options.output_tensor_type, options.token_embedding_type)
    if not options.pure and given == (None, None):
        return
    if registry.row(options.target.format).container != "gguf":
        raise UsageError("mix-options", "--pure, --output-tensor-type and --token-embedding-type speak of GGUF tensors", hint="drop them")
    if options.pure and options.target.type is None:
        raise UsageError("target-type-missing", "--pure without a type", hint="name one, as in gguf:q4_k")
    for name in given:
        if name is not None and not mixes.is_block_type(name):
            raise _no_type(name, options)


def meant(checkpoint: Checkpoint, options: PlanOptions) -> mixes.FileType | None:
    """The file type that a target's type name stands for, or None where it names the type of code tensors alone.

    Names of block types (``q4_1``) mean the block type where the source is a checkpoint of integer codes: these are kept, the rest
    stays dense. From floats and from another GGUF, and with ``--pure``, they mean the file type.
    """
    kind = options.target.type
    if kind is None or registry.row(options.target.format).container != "gguf":
        return None
    coded = checkpoint.gguf is None and checkpoint.has_codes
    return None if coded and mixes.is_block_type(kind) and not options.pure else mixes.file_type(kind)


def mix_of(checkpoint: Checkpoint, options: PlanOptions, tensors: Iterable[TensorMap], *, with_imatrix: bool = False) -> Mix:
    """The types of all ``tensors`` (the whole output) by llama.cpp's rules; ``NO_MIX`` for other targets. Raises as ``mixes.choose``."""
    if registry.row(options.target.format).container != "gguf":
        return NO_MIX
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    found = meant(checkpoint, options)
    if found is None:
        return Mix(types=_single(options, shapes))
    named = tuple((pattern, kind.lower()) for pattern, kind in options.tensor_types)
    for _, kind in named:
        if not mixes.is_block_type(kind):
            raise _no_type(kind, options)
    wish = mixes.Wish(found, named, *_head_and_embedding(options), options.pure, with_imatrix)
    types = mixes.choose(wish, model_of(checkpoint), shapes)
    overridden = frozenset(name for name in types if _is_overridden(name, options, named, "output.weight" not in shapes))
    kind = options.target.type or ""
    is_block = mixes.is_block_type(kind)
    return Mix(found, types, not is_block, kind if is_block else None, overridden)


def is_named(name: str, options: PlanOptions) -> bool:
    """Whether ``--tensor-type`` speaks of this tensor."""
    return any(re.search(pattern, name, re.IGNORECASE) for pattern, _ in options.tensor_types)


def _is_overridden(name: str, options: PlanOptions, named: tuple[tuple[str, str], ...], tied: bool) -> bool:
    """Whether the user said something of this very tensor."""
    embedding = name in ("token_embd.weight", "per_layer_token_embd.weight")
    head = options.output_tensor_type is not None and (name == "output.weight" or (tied and embedding))
    said = head or (options.token_embedding_type is not None and embedding)
    return said or any(re.search(pattern, name, re.IGNORECASE) for pattern, _ in named)


def _no_type(kind: str, options: PlanOptions) -> UsageError:
    close = did_you_mean(kind, registry.row(options.target.format).types)
    return UsageError("target-type", f"gguf has no type {kind!r} of single tensors", hint=f"{close}types are q8_0, q6_k, f16 …")


def _single(options: PlanOptions, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What was said of the embedding and the head alone; an embedding that is the head too follows the head."""
    types: dict[str, str] = {}
    head, embedding = _head_and_embedding(options)
    if head is not None:
        types["output.weight" if "output.weight" in shapes else "token_embd.weight"] = head
    if embedding is not None:
        types["token_embd.weight"] = embedding
    return {name: kind for name, kind in types.items() if name in shapes}


def _head_and_embedding(options: PlanOptions) -> tuple[str | None, str | None]:
    head, embedding = options.output_tensor_type, options.token_embedding_type
    return head and head.lower(), embedding and embedding.lower()


def model_of(checkpoint: Checkpoint) -> mixes.Model:
    """What the rules look at, from a GGUF's own keys or from those that the architecture gives a checkpoint's config."""
    metadata = checkpoint.gguf.metadata if checkpoint.gguf is not None else checkpoint.binding.metadata(None)
    return mixes.Model.of({key: value.value for key, value in metadata.items()})
