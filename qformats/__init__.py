"""Read, write and convert quantized model checkpoints without losing a bit.

``qformats.open(path)`` gives a ``Checkpoint``; its ``tensors`` are ``QuantizedTensor`` values or floats, read when asked for;
``qformats.save(checkpoint, path)`` writes it in its own format. Converting to another is ``converters.convert``.
Paths may be addresses of the hub, ``hf://org/name[@revision][/file]``; ``qformats.push_to_hub(path, repo)`` is the way back.
``qformats.load_model(path)`` gives a transformers model that runs on the packed weights, ``qformats.load_tokenizer`` its tokenizer.
Importing this package imports neither torch nor transformers.

>>> import qformats
>>> issubclass(qformats.BadFile, qformats.QFormatError)
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qformats.checkpoint import Checkpoint
    from qformats.checkpoint import open_checkpoint as open
    from qformats.errors import (
        BadFile,
        Mismatch,
        OutputError,
        QFormatError,
        RemoteError,
        Unsafe,
        Unsupported,
        UsageError,
        WouldLose,
    )
    from qformats.hub.push import push_to_hub
    from qformats.runtime.config import QFormatsConfig
    from qformats.runtime.loader import load_model
    from qformats.runtime.peft import prepare_for_training
    from qformats.runtime.tokenizer import load_tokenizer
    from qformats.saving import save
    from qformats.tensor import QuantizedTensor

    version: str

__all__ = [
    "BadFile",
    "Checkpoint",
    "Mismatch",
    "OutputError",
    "QFormatError",
    "QFormatsConfig",
    "QuantizedTensor",
    "RemoteError",
    "Unsafe",
    "Unsupported",
    "UsageError",
    "WouldLose",
    "load_model",
    "load_tokenizer",
    "open",
    "prepare_for_training",
    "push_to_hub",
    "save",
    "version",
]

_HOMES = {
    "Checkpoint": "checkpoint", "QFormatsConfig": "runtime.config", "QuantizedTensor": "tensor", "load_model": "runtime.loader",
    "load_tokenizer": "runtime.tokenizer", "open": "checkpoint", "prepare_for_training": "runtime.peft", "push_to_hub": "hub.push",
    "save": "saving",
}  # fmt: skip
_SPELLINGS = {"open": "open_checkpoint"}


def __getattr__(name: str) -> Any:
    if name == "version":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"qformats.{_HOMES.get(name, 'errors')}"), _SPELLINGS.get(name, name))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("qformats")
    except PackageNotFoundError:
        return "0"


def __dir__() -> list[str]:
    return sorted(__all__)
