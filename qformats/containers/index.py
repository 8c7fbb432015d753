"""A directory of safetensors files as one set of tensors, and the plan and index of a sharded output.

Reading order follows transformers 5.23: ``model.safetensors``, else the one ``*.safetensors.index.json``, else the only
``*.safetensors`` there is (``gptq_model-4bit-128g.safetensors`` and the like). Shard naming and the greedy split follow
huggingface_hub 1.x (``model-00001-of-00003.safetensors``, ``weight_map`` and ``metadata.total_size``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qformats.containers.atomic import plain_file_name
from qformats.containers.raw import RawTensor
from qformats.containers.safetensors import SafetensorsFile, open_safetensors, parse_json, tensor_nbytes
from qformats.containers.source import ByteSource, FileSource
from qformats.errors import BadFile, UsageError

__all__ = ["INDEX_NAME", "SafetensorsSet", "file_names", "index_json", "open_directory", "read_index", "shard_names", "shard_plan"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
MAX_INDEX_NBYTES = 100_000_000
MAX_SHARDS = 99_999  # five digits

Entry = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class SafetensorsSet:
    """All tensors of a directory in file and payload order; ``files`` are the plain names of what was read.

    ``metadata`` joins the ``__metadata__`` of all files; of two values for one key that of the first file stands.
    """

    metadata: dict[str, str]
    tensors: dict[str, RawTensor]
    files: list[str]


def open_directory(path: str | Path, sources: Mapping[str, ByteSource] | None = None) -> SafetensorsSet:
    """Open the safetensors files of a checkpoint directory and hold them against their index.

    Raises ``BadFile``: ``not-a-directory``, ``no-weights``, ``index-missing``, ``index-ambiguous``, ``index``,
    ``shard-missing``, ``tensor-missing``, ``tensor-wrong-shard``, ``duplicate-tensor`` and those of ``open_safetensors``;
    ``Unsafe('file-name')`` for a shard name that is no plain file name. A tensor that only the index forgets is kept, as
    transformers keeps it. ``sources``: files by name that lie elsewhere and stand for those of the directory.
    """
    directory, others = Path(path), sources or {}
    names = sorted({*file_names(directory), *others})
    if SINGLE_NAME in names:
        return _join(directory, [SINGLE_NAME], {}, others)
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if INDEX_NAME in indexes or len(indexes) == 1:
        weight_map = read_index(directory / (INDEX_NAME if INDEX_NAME in indexes else indexes[0]))
        return _join(directory, sorted(set(weight_map.values())), weight_map, others)
    if indexes:
        raise BadFile("index-ambiguous", f"holds several indexes: {', '.join(indexes)}", path=directory, hint="keep one")
    files = [name for name in names if name.endswith(".safetensors")]
    if not files:
        raise BadFile("no-weights", "holds no .safetensors file", path=directory)
    if len(files) > 1:
        raise BadFile("index-missing", f"holds {len(files)} .safetensors files and no index", path=directory, hint=f"fetch {INDEX_NAME}")
    return _join(directory, files, {}, others)


def file_names(directory: Path) -> list[str]:
    """The names in a directory but those that begin with a dot, sorted; ``BadFile`` (``not-a-directory``, ``unreadable``)."""
    if not directory.is_dir():
        raise BadFile("not-a-directory", "is not a directory", path=directory, hint="check the path")
    try:
        return sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise BadFile("unreadable", f"cannot be listed: {error.strerror}", path=directory) from None


def read_index(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Read ``weight_map`` and check every shard name before any of them becomes a path."""
    with FileSource(path) as source:
        if source.size > MAX_INDEX_NBYTES:
            raise BadFile("index", f"has {source.size} bytes, at most {MAX_INDEX_NBYTES} are accepted", path=path)
        index = parse_json(source.pread(0, source.size), "index", str(path))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadFile("index", "has no weight_map of tensor names to file names", path=path)
    if not weight_map:
        raise BadFile("index", "has an empty weight_map", path=path)
    for shard in sorted(set(weight_map.values())):
        plain_file_name(shard, path)
        if not shard.endswith(suffix):
            raise BadFile("index", f"names {shard!r}, which is no {suffix} file", path=path)
    return weight_map


def _join(directory: Path, files: list[str], weight_map: dict[str, str], others: Mapping[str, ByteSource]) -> SafetensorsSet:
    for name in files:
        if name not in others and not (directory / name).exists():
            raise BadFile("shard-missing", f"the index names {name!r}, which is not there", path=directory, hint="fetch it")
    opened: dict[str, SafetensorsFile] = {name: open_safetensors(others.get(name, directory / name)) for name in files}
    metadata: dict[str, str] = {}
    tensors: dict[str, RawTensor] = {}
    for name, file in opened.items():
        metadata = {**file.metadata, **metadata}
        for tensor in file.tensors.values():
            wanted = weight_map.get(tensor.name, name)
            if wanted != name:
                message = f"is in {name!r}, the index says {wanted!r}"
                raise BadFile("tensor-wrong-shard", message, path=directory, tensor=tensor.name)
            if tensor.name in tensors:
                raise BadFile("duplicate-tensor", "is in two files", path=directory, tensor=tensor.name)
            tensors[tensor.name] = tensor
    for tensor_name, name in weight_map.items():
        if tensor_name not in tensors:
            raise BadFile("tensor-missing", f"the index says it is in {name!r}, it is nowhere", path=directory, tensor=tensor_name)
    return SafetensorsSet(metadata, tensors, files)


def shard_plan(tensors: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Split ``(name, dtype, shape)`` in the given order into files of at most ``max_shard_bytes`` of payload.

    A tensor larger than that gets a file of its own. No tensors give one empty file.

    >>> [len(shard) for shard in shard_plan([("a", "U8", (4,)), ("b", "U8", (4,)), ("c", "U8", (9,))], 8)]
    [2, 1]
    """
    if max_shard_bytes <= 0:
        raise UsageError("shard-size", f"a shard of {max_shard_bytes} bytes holds nothing", hint="give a positive size")
    shards: list[list[Entry]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        nbytes = tensor_nbytes(dtype, shape, tensor=name)
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, tuple(shape)))
        filled += nbytes
    if len(shards) > MAX_SHARDS:
        raise UsageError("shard-size", f"{len(shards)} shards are too many", hint="choose a larger shard size")
    return shards


def shard_names(count: int) -> list[str]:
    """File names of ``count`` shards; a single one is ``model.safetensors``."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_json(plan: Sequence[Sequence[Entry]]) -> bytes:
    """The bytes of ``model.safetensors.index.json`` for a plan of more than one shard; sorted, so equal for equal plans."""
    names = shard_names(len(plan))
    weight_map = {name: names[number] for number, shard in enumerate(plan) for name, _, _ in shard}
    total = sum(tensor_nbytes(dtype, shape, tensor=name) for shard in plan for name, dtype, shape in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
