"""Quantize on load: a float checkpoint read as the checkpoint it becomes, so that a model never holds its floats.

``quantized`` gives a checkpoint like any other, whose planes are made tensor by tensor when they are read, and which says how it is
saved. Who fills a model needs nothing else: ``Supply.of(quantized(checkpoint, to), skeleton.rename(model))`` has every parameter, packed
or float, under the model's own names (``is_packed``, ``segments``, ``floats``), and ``Record.of`` of that supply saves the model as the
files that ``qconvert quantize`` writes, byte for byte, whether or not they were ever on a disk.

Which type each tensor gets, and what its bytes are, is the converter's business and is decided there alone; the library asks it by name,
as it asks the registry's formats, and imports it for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from qformats.checkpoint import Checkpoint

__all__ = ["quantized"]

_PLANNER = "converters.on_load"  # of the same distribution


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
    """The opened ``checkpoint`` as it is once quantized ``to`` a target (``"hqq:int4,group=64"``, ``"gguf:q4_k_m"`` …).

    Reads headers, the whole source once for its digest, and what the plan asks for; weights are rounded when they are read. The source
    must stay open until then. Beside the linear layers and experts everything stays in floats, the head and the embedding too; for a
    GGUF the file type decides, as llama.cpp has it.

    ``modules_to_not_convert``: modules that stay as they are as well: whole names, what they end with, or modules that they are in
    (``"lm_head"``, ``"mlp.gate"``, ``"model.layers.0"``). ``per_module``: regular expression → type, for tensors of the output that it is
    found in or, if there are none, modules; a type of the same format (``"int8"``, ``"gptq:int8"``) or floats (``"bf16"``); the first
    that fits counts. ``imatrix``: file of importances for the new codes. ``renaming``: names of the source → of the model, as
    ``skeleton.rename`` has it, for models whose modules are called otherwise than in the source.

    Raises, before any weight is read: ``UsageError`` for an unknown target (``unknown-format``, ``target-type``, ``target-option``,
    ``target-type-missing``), a bad pattern (``tensor-type``) and names that nothing bears (``absent-module``);
    ``WouldLose('requantize')`` for a source of codes unless ``allow_requantize``; ``Unsupported`` and ``BadFile`` as planning does.
    """
    made: Checkpoint = import_module(_PLANNER).quantized(
        checkpoint, to, modules_to_not_convert=modules_to_not_convert, per_module=per_module, imatrix=imatrix,
        allow_requantize=allow_requantize, renaming=renaming,
    )  # fmt: skip
    return made
