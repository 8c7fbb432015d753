"""The record every output carries: where it came from and what the target cannot hold, so that the way back restores every bit.

One JSON text under ``qformats.provenance`` (GGUF key, safetensors ``__metadata__``). It has no time, host or path. ``restore``
holds what the way back needs: the source modules' storages, their zero points where the target type has none, absorbed act-orders
and float dtypes; byte planes are zlib-compressed and base64-encoded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from converters import gguf_record
from converters.jobs import Job, storage_from_json, storage_to_json
from converters.kept_planes import TOO_LARGE, Extra, collect_extras, kept_planes, parse_extras, parse_kept, source_storage
from converters.packing import MAX_NBYTES, pack, unpack
from converters.planes import Kept
from qformats import registry
from qformats.checkpoint import Checkpoint
from qformats.errors import BadFile
from qformats.scheme import Storage

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.reencode import Hint

__all__ = ["Restore", "build", "collect", "is_intact", "plan_digest", "read_restore", "speaks_of", "tool_version"]

RECORD_VERSION = 1
_MAX_METADATA_NBYTES = 4 << 20
_MAX_PLANES_NBYTES = 48 << 20  # of all kept planes together: the header of a safetensors file may have 100 MB
_KEPT_FILES = ("config.json", "generation_config.json", *(name for row in registry.ROWS for name in row.configs))


def tool_version() -> str:
    """The installed version of this package."""
    try:
        return version("qformats")
    except PackageNotFoundError:
        return "0"


def _pack_zeros(plane: Tensor) -> str:
    """Zero points as nibbles where all fit, else as bytes, else (z = 256 of 8-bit v1 files) as 16-bit words."""
    import torch

    if int(plane.max()) > 255:
        return "16:" + pack(plane.reshape(-1).numpy().astype("<i2").tobytes())
    flat = plane.reshape(-1).to(torch.uint8)
    if int(plane.max()) > 15:
        return "8:" + pack(flat.numpy().tobytes())
    flat = torch.cat((flat, flat.new_zeros(len(flat) % 2)))
    return "4:" + pack((flat[::2] | (flat[1::2] << 4)).numpy().tobytes())


def _unpack_zeros(text: Any, shape: Sequence[int]) -> Tensor:
    import numpy as np
    import torch

    count = _element_count(shape)
    bits, _, packed = str(text).partition(":")
    if bits == "16":
        flat = np.frombuffer(unpack(packed, 2 * count), "<i2")
    elif bits == "8":
        flat = np.frombuffer(unpack(packed, count), "u1")
    else:
        pairs = np.frombuffer(unpack(packed, (count + 1) // 2), "u1")
        flat = np.stack((pairs & 15, pairs >> 4), 1).reshape(-1)[:count]
    return torch.from_numpy(flat.reshape(shape).astype("i2"))


def _element_count(shape: Sequence[int]) -> int:
    """Rows times groups; ``ValueError`` for what is no shape of a plane."""
    rows, groups = shape
    if not (type(rows) is int and type(groups) is int and 0 < rows <= MAX_NBYTES and 0 < groups <= MAX_NBYTES):
        raise ValueError("no shape of a plane")
    return rows * groups


def _unpack_order(text: Any, count: Any) -> np.ndarray[Any, Any]:
    """A permutation of ``count`` indices; ``ValueError`` if it is none."""
    import numpy as np

    order = np.frombuffer(unpack(text, 4 * count), "<i4").astype(np.int64)
    if not np.array_equal(np.sort(order), np.arange(count)):
        raise ValueError("no permutation")
    return order


@dataclass(frozen=True)
class Restore:
    """What a record says of the earlier format: its name, per-module storages, hints and orders, dtypes and configuration files.

    Of a GGUF also ``blocks`` (block types of modules that are floats now) and ``metadata`` (see ``converters.gguf_record``).
    ``kept``: parameters that the other format rounded (see ``converters.planes``). ``extras``: tensors that are no weights.
    ``said``: what its safetensors files said in ``__metadata__``.
    """

    format: str
    storages: Mapping[str, Storage]
    hints: Mapping[str, Hint]
    orders: Mapping[str, np.ndarray[Any, Any]]
    dtypes: Mapping[str, str]
    files: Mapping[str, str]
    group_indices: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    quantized: int = 0
    blocks: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] | None = None
    kept: Mapping[str, Kept] = field(default_factory=dict)
    extras: tuple[Extra, ...] | None = None
    said: Mapping[str, str] = field(default_factory=dict)


def build(checkpoint: Checkpoint, jobs: Sequence[Job], options: Mapping[str, Any], restore: Mapping[str, Any]) -> str:
    """The record of this conversion as canonical JSON text."""
    files = checkpoint.side_files()
    record = {
        "version": RECORD_VERSION,
        "tool": f"qformats {tool_version()}",
        "source": {
            "format": checkpoint.format,
            "container": checkpoint.container,
            "files": {name: files[name].decode("utf-8", "replace") for name in _KEPT_FILES if name in files},
        },
        "options": dict(options),
        "plan": plan_digest(jobs),
        "restore": restore,
    }
    text = _canonical(record)  # "digest" sorts before every other key, so the record with it is this text with it in front
    return '{"digest":"' + hashlib.sha256(text.encode()).hexdigest() + '",' + text[1:]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({k: v for k, v in record.items() if k != "digest"}).encode()).hexdigest()


def is_intact(record: Mapping[str, Any]) -> bool:
    """Whether a record still has the digest it was written with."""
    return record.get("digest") == _digest(record)


def plan_digest(jobs: Sequence[Job]) -> str:
    """SHA-256 over what every tensor becomes."""
    lines = [[j.name, j.type, j.kind, j.action, list(j.map.shape), list(j.rewrites)] for j in jobs]
    return hashlib.sha256(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()


def collect(
    checkpoint: Checkpoint, jobs: Sequence[Job], orders: Mapping[str, np.ndarray[Any, Any]], side: Mapping[str, bytes]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The ``restore`` part: storages of quantized source modules, zero points that the target drops, act-orders, dtypes.

    And why modules whose codes are kept will not come back as they were. ``side``: the side files of the output, for what depends on them.
    """
    used = {s.module: job for job in jobs for s in job.map.sources if s.module and s.leaf == "weight"}
    kept = {name: job for name, job in used.items() if job.action == "codes" and checkpoint.is_quantized(name)}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # compression releases the interpreter
        found = dict(zip(kept, pool.map(lambda item: _module_entry(checkpoint, *item), kept.items())))
    storages: list[str] = []
    modules: dict[str, Any] = {}
    lost: dict[str, str] = {}

    def number(storage: Storage) -> int:
        text = json.dumps(storage_to_json(storage), sort_keys=True)
        if text not in storages:
            storages.append(text)
        return storages.index(text)

    budget = _MAX_PLANES_NBYTES
    for name, (storage, entry) in found.items():
        numbers = {} if storage is None else {"storage": number(storage)}
        planes, why = entry.pop("planes", None), entry.pop("lost", None)
        fits = planes is not None and (budget := budget - len(json.dumps(planes))) > 0
        if why is not None or (planes is not None and not fits):
            lost[name] = why or TOO_LARGE
        if fits:
            held = kept[name].storage
            assert held is not None
            entry = {**entry, "planes": {**planes, "held": number(held)}}
        modules[name] = {**numbers, **entry}
    gguf = {} if checkpoint.gguf is None or not side else gguf_record.collect(checkpoint, jobs, side)
    extras = collect_extras(checkpoint, jobs)
    speaks = checkpoint.gguf is None and hasattr(registry.format_module(checkpoint.format), "metadata_out")
    said = {k: v for k, v in checkpoint.metadata.items() if not k.startswith("qformats.")} if speaks else {}
    restore = {
        **gguf,
        **({"extras": extras} if extras else {}),
        **({"metadata_words": said} if said and len(json.dumps(said)) <= _MAX_METADATA_NBYTES else {}),
        "quantized": sum(checkpoint.is_quantized(name) for name in checkpoint.modules),
        "storages": [json.loads(text) for text in storages],
        "modules": modules,
        "orders": {name: [pack(order.astype("<i4").tobytes()), len(order)] for name, order in orders.items()},
        "dtypes": {name: raw.dtype for name, raw in checkpoint.raw.items() if raw.dtype in ("F32", "F16", "BF16", "F64")},
    }
    return restore, lost


def _module_entry(checkpoint: Checkpoint, name: str, job: Job) -> tuple[Storage | None, dict[str, Any]]:
    """A source module's storage, where its format can tell, its planes, and what of it is lost."""
    storage, entry = source_storage(checkpoint, name), _planes(checkpoint, name, job)
    hint = None if "zero_point" not in entry else _unpack_zeros(*entry["zero_point"])
    planes, lost = kept_planes(checkpoint, name, job, storage, hint, bool(entry.get("positive")))
    found = {"planes": planes, "lost": lost}
    return storage, {**entry, **{key: value for key, value in found.items() if value is not None}}


def _planes(checkpoint: Checkpoint, name: str, job: Job) -> dict[str, Any]:
    """Zero points of a module whose target type has no place for them, and the sign of its scales."""
    import torch

    from qformats.tensor import QuantizedTensor

    module = checkpoint.modules[name]
    tensor = registry.format_module(checkpoint.format).read(module, codes=False)
    if not isinstance(tensor, QuantizedTensor) or not tensor.scales:
        return {}
    scale = tensor.scales[0].values
    entry: dict[str, Any] = {}
    if isinstance(scale, torch.Tensor):
        entry["positive"] = not bool(torch.signbit(scale).any())
    if tensor.group_index is not None and name in job.orders:
        entry["group_index"] = [pack(tensor.group_index.to(torch.int32).numpy().astype("<i4").tobytes()), tensor.shape[-1]]
    zero = None if tensor.zero_point is None else tensor.zero_point.values
    held = isinstance(job.storage and job.storage.zero_point, tuple)
    if isinstance(zero, torch.Tensor) and zero.dim() == 2 and zero.numel() > 1 and not held:  # 1: of runs over the ends of rows
        plane = zero.to(torch.int16)  # in the source's group order; the way back reorders it by the group index
        entry["zero_point"] = [_pack_zeros(plane), list(plane.shape)]
    return entry


def speaks_of(checkpoint: Checkpoint, format_name: str) -> bool:
    """Whether the checkpoint has a record of an earlier life in ``format_name``."""
    record = checkpoint.provenance
    source = record.get("source") if record is not None else None
    return isinstance(source, dict) and source.get("format") == format_name


def read_restore(checkpoint: Checkpoint) -> Restore | None:
    """The usable part of a checkpoint's record, or None if it has none; ``BadFile('provenance')`` if it is damaged."""
    record = checkpoint.provenance
    if record is None or record.get("version") != RECORD_VERSION:
        return None
    if not is_intact(record):
        hint = "name a type, as in awq:int4, to convert without it"
        raise BadFile("provenance", "the provenance record was changed after it was written", path=checkpoint.path, hint=hint)
    try:
        return _parse(record)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError, RecursionError):
        raise BadFile("provenance", "the provenance record is incomplete or contradicts itself", path=checkpoint.path) from None


def _parse(record: Mapping[str, Any]) -> Restore:
    import numpy as np

    from qformats.reencode import Hint

    restore, source = record["restore"], record["source"]
    kinds = [storage_from_json(entry) for entry in restore["storages"]]
    storages, hints, orders, groups, kept = {}, {}, {}, {}, {}
    for name, entry in restore["modules"].items():
        if "storage" in entry:
            storages[name] = kinds[entry["storage"]]
        if "group_index" in entry:
            text, count = entry["group_index"]
            groups[name] = np.frombuffer(unpack(text, 4 * count), "<i4").astype(np.int64)
        if "planes" in entry:
            kept[name] = parse_kept(entry["planes"], kinds)
        zero = None
        if "zero_point" in entry:
            text, shape = entry["zero_point"]
            zero = _unpack_zeros(text, shape)
        hints[name] = Hint(zero, bool(entry.get("positive")))
    for name, (text, count) in restore["orders"].items():
        orders[name] = _unpack_order(text, count)
    if any(len(orders[name]) != len(index) or int(index.min()) < 0 for name, index in groups.items() if name in orders):
        raise ValueError("orders and groups disagree")
    files = {name: str(text) for name, text in source["files"].items()}
    if any(name not in _KEPT_FILES or not isinstance(json.loads(text), dict) for name, text in files.items()):
        raise ValueError("no configuration file")
    if any(word not in ("F32", "F16", "BF16", "F64") for word in restore["dtypes"].values()):
        raise ValueError("no float dtype")
    dtypes, options, quantized = dict(restore["dtypes"]), dict(record["options"]), int(restore["quantized"])
    blocks, metadata = gguf_record.parse(restore)
    said = dict(restore.get("metadata_words", {}))
    if not all(isinstance(word, str) for word in said.values()):
        raise ValueError("no metadata")
    return Restore(str(source["format"]), storages, hints, orders, dtypes, files, groups, options, quantized, blocks, metadata, kept,
                   parse_extras(restore.get("extras", [])), said)  # fmt: skip
