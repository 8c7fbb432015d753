"""What a provenance record keeps of a GGUF that becomes a checkpoint of another kind, so that the way back is the same file again.

``blocks``: the block type of each module that the other format holds as floats (embedding, head), where rounding these floats to
nearest gives the very bytes again. ``metadata``: the keys in their order, the values of all but long arrays, the SHA-256 of long
arrays, of the side files the conversion wrote, and of the tensors' types: only where all of them are met again is it the same model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from converters.digests import DIGESTS_KEY
from converters.jobs import Job
from converters.sources import SCAN_WEIGHTS
from qformats import registry
from qformats.checkpoint import PROVENANCE_KEY, Checkpoint
from qformats.containers.gguf import Metadata, Value
from qformats.containers.gguf_values import encode_value
from qformats.errors import QFormatError
from qformats.formats.protocol import Target

__all__ = ["block_storage", "collect", "kept_keys", "parse", "restored_metadata"]

_MAX_ELEMENTS = 64
_SCALARS = (str, int, float, bool)


def kept_keys(metadata: Mapping[str, Any]) -> list[str]:
    """The keys that belong to the model: not our own, and not those of a split."""
    return [k for k in metadata if not k.startswith("split.") and k not in (PROVENANCE_KEY, DIGESTS_KEY)]


def collect(checkpoint: Checkpoint, jobs: Sequence[Job], side: Mapping[str, bytes]) -> dict[str, Any]:
    """``blocks`` and ``metadata`` for a conversion out of a GGUF that writes the side files ``side``."""
    floats = {s.module for j in jobs if j.action == "float" and j.dtype == "F32" and j.lossless for s in j.map.sources if s.module}
    wanted = [name for name in floats if checkpoint.is_quantized(name)] if any(j.format not in ("hf", "gguf") for j in jobs) else []
    blocks = {name: checkpoint.modules[name].parts["weight"].dtype for name in sorted(wanted) if _rounds_to_itself(checkpoint, name)}
    return {"blocks": blocks, "metadata": _metadata(checkpoint, side)}


def block_storage(kind: str) -> Any:
    """The storage of a block type that floats can be rounded to, or None."""
    from qformats.quantize import can_quantize
    from qformats.scheme import Integer, Scheme

    try:
        storage = registry.format_module("gguf").storages(Target("gguf", kind.lower(), {}), Scheme((1, 1), Integer(8)))[0]
    except QFormatError:
        return None
    return storage if can_quantize(storage) else None


def _rounds_to_itself(checkpoint: Checkpoint, name: str) -> bool:
    """Whether new codes from a module's values are its own bytes, in every block."""
    import numpy as np
    import torch

    from qformats.quantize import rtn

    module = checkpoint.modules[name]
    raw, storage, form = module.parts["weight"], block_storage(module.parts["weight"].dtype), registry.format_module("gguf")
    if storage is None or raw.big_endian:
        return False
    step = max(1, SCAN_WEIGHTS // raw.shape[-1])
    for start in range(0, raw.rows, step):
        stop = min(raw.rows, start + step)
        try:
            again = rtn(form.read(module, start, stop).dequantize(torch.float32), storage)
        except QFormatError:
            return False
        if not np.array_equal(form.write(storage, again, start, raw.shape)[0].array, raw.row_range(start, stop)):
            return False
    return True


def _metadata(checkpoint: Checkpoint, side: Mapping[str, bytes]) -> dict[str, Any]:
    assert checkpoint.gguf is not None
    found = checkpoint.gguf.metadata
    values = {key: [found[key].type, plain] for key in kept_keys(found) if (plain := _plain(found[key])) is not None}
    arrays = {key: _sha(encode_value(key, found[key])) for key in kept_keys(found) if key not in values}
    tensors = _types((name, raw.dtype) for name, raw in checkpoint.raw.items())
    files = {name: _sha(data) for name, data in sorted(side.items())}
    return {"keys": kept_keys(found), "values": values, "arrays": arrays, "files": files, "tensors": tensors}


def _plain(value: Value) -> Any:
    """A value as JSON holds it, or None for a long array and for what JSON cannot hold."""
    items = [value.value]
    if value.type.startswith("["):
        if len(value.value) > _MAX_ELEMENTS:
            return None
        try:
            items = list(value.value)
        except QFormatError:  # strings that are no UTF-8
            return None
    good = all(isinstance(item, _SCALARS) and (not isinstance(item, float) or math.isfinite(item)) for item in items)
    return None if not good else items if value.type.startswith("[") else items[0]


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _types(pairs: Iterable[tuple[str, str]]) -> str:
    return _sha(json.dumps(sorted(pairs)).encode())


def parse(restore: Mapping[str, Any]) -> tuple[dict[str, str], Mapping[str, Any] | None]:
    """``blocks`` and ``metadata`` of a record; ``ValueError`` for what is none."""
    blocks, metadata = restore.get("blocks", {}), restore.get("metadata")
    if not all(isinstance(name, str) and isinstance(kind, str) for name, kind in blocks.items()):
        raise ValueError("no block types")
    if metadata is not None:
        for key in metadata["keys"]:
            if key in metadata["values"]:
                kind, plain = metadata["values"][key]
                encode_value(key, Value(kind, plain))
            elif not isinstance(metadata["arrays"][key], str):
                raise ValueError("no digest of an array")
    return dict(blocks), metadata


def restored_metadata(kept: Mapping[str, Any], made: Metadata, side: Mapping[str, bytes], jobs: Sequence[Job]) -> Metadata:
    """The recorded metadata, where side files, tensor types and long arrays are those it was recorded with; else ``made``."""
    same_files = {name: _sha(data) for name, data in sorted(side.items()) if name in kept["files"]} == kept["files"]
    if not same_files or _types((job.name, job.type) for job in jobs) != kept["tensors"]:
        return made
    result: Metadata = {}
    for key in kept["keys"]:
        if key in kept["values"]:
            result[key] = Value(*kept["values"][key])
        elif key in made and _sha(encode_value(key, made[key])) == kept["arrays"][key]:
            result[key] = made[key]
        else:
            return made
    return result
