"""A directory of ``torch.save`` files as one value: which files belong to it, and their state dicts joined. Torch-free.

Reading order follows transformers 5.23: ``pytorch_model.bin``, else the one ``*.bin.index.json`` (``weight_map`` as for safetensors), else
a file name that a format calls its own, else the only such file there is. What a training run leaves beside a model is passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformats.containers.index import file_names, read_index
from qformats.containers.source import ByteSource
from qformats.containers.torch_zip import TorchFile, open_torch_zip
from qformats.errors import BadFile

__all__ = ["INDEX_SUFFIX", "SUFFIXES", "TorchSet", "is_torch_name", "open_torch_directory", "open_torch_file"]

SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SINGLE_NAME = "pytorch_model.bin"
INDEX_SUFFIX = ".bin.index.json"
_TRAINING = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")


@dataclass(frozen=True)
class TorchSet:
    """The joined value of all files, the plain names of what was read, and the sources of the tensors' bytes."""

    value: Any
    files: tuple[str, ...]
    sources: tuple[ByteSource, ...]


def is_torch_name(name: str) -> bool:
    """Whether a file's name is one of a saved model.

    >>> is_torch_name("qmodel.pt"), is_torch_name("training_args.bin"), is_torch_name("model.safetensors")
    (True, False, False)
    """
    return name.endswith(SUFFIXES) and not name.startswith((".", *_TRAINING))


def open_torch_file(path: Path, allow: Iterable[str] = ()) -> TorchSet:
    """One file; raises what ``open_torch_zip`` raises."""
    found = open_torch_zip(path, allow)
    return TorchSet(found.value, (path.name,), (found.source,))


def open_torch_directory(directory: Path, known: Sequence[str] = (), allow: Iterable[str] = ()) -> TorchSet:
    """The checkpoint in a directory; ``known``: file names that formats use, ``allow``: see ``open_torch_zip``.

    Raises ``BadFile``: ``no-weights``, ``index-ambiguous``, ``index-missing``, ``shard-missing``, ``tensor-wrong-shard``,
    ``tensor-missing``, ``duplicate-tensor``, ``torch-value``, those of ``read_index`` and of ``open_torch_zip``.
    """
    names = file_names(directory)
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if SINGLE_NAME in names:
        return open_torch_file(directory / SINGLE_NAME, allow)
    if len(indexes) > 1:
        raise BadFile("index-ambiguous", f"holds several indexes: {', '.join(indexes)}", path=directory, hint="keep one")
    if indexes:
        return _join(directory, read_index(directory / indexes[0], ".bin"), allow)
    own = [name for name in known if name in names]
    files = own[:1] or [name for name in names if is_torch_name(name)]
    if len(files) > 1:
        hint = f"fetch {SINGLE_NAME}.index.json, or name one of the files"
        raise BadFile("index-missing", f"holds {len(files)} files of torch.save and no index", path=directory, hint=hint)
    if not files:
        raise BadFile("no-weights", "holds no file of torch.save", path=directory)
    return open_torch_file(directory / files[0], allow)


def _join(directory: Path, weight_map: Mapping[str, str], allow: Iterable[str]) -> TorchSet:
    """The state dicts of all shards as one, held against the index."""
    files = sorted(set(weight_map.values()))
    for name in files:
        if not (directory / name).exists():
            raise BadFile("shard-missing", f"the index names {name!r}, which is not there", path=directory, hint="fetch it")
    opened: dict[str, TorchFile] = {name: open_torch_zip(directory / name, allow) for name in files}
    joined: dict[Any, Any] = {}
    for name, file in opened.items():
        if type(file.value) is not dict:
            raise BadFile("torch-value", f"holds a {type(file.value).__name__}, expected a dict of tensors", path=directory / name)
        for key, value in file.value.items():
            wanted = weight_map.get(key, name)
            if wanted != name:
                raise BadFile("tensor-wrong-shard", f"is in {name!r}, the index says {wanted!r}", path=directory, tensor=str(key))
            if key in joined:
                raise BadFile("duplicate-tensor", "is in two files", path=directory, tensor=str(key))
            joined[key] = value
    for key, name in weight_map.items():
        if key not in joined:
            raise BadFile("tensor-missing", f"the index says it is in {name!r}, it is nowhere", path=directory, tensor=key)
    return TorchSet(joined, tuple(files), tuple(file.source for file in opened.values()))
