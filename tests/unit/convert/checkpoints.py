"""Fixture checkpoints as whole directories, small edits of them, and conversions in one call."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from converters.execute import execute
from converters.options import PlanOptions
from converters.plan import Plan, make_plan, refuse_losses
from qformats import registry
from qformats.checkpoint import PROVENANCE_KEY, open_checkpoint
from qformats.containers.gguf import TensorInfo, Value, layout_gguf

FIXTURES = Path(__file__).parents[3] / "fixtures"
MANIFEST: list[dict[str, Any]] = json.loads((FIXTURES / "manifest.json").read_text())
ENTRIES: dict[str, dict[str, Any]] = {e["path"]: e for e in MANIFEST}
PACKED = [e["path"] for e in MANIFEST if e["format"] in ("gptq", "awq")]
ALL = [e["path"] for e in MANIFEST if e["format"] not in ("dense", "gguf") and (FIXTURES / e["path"] / "model.safetensors").exists()]
DENSE = [e["path"] for e in MANIFEST if e["format"] == "dense"]
TOKENIZER = FIXTURES / "gptq" / "4b-g32-sym"

Tensors = dict[str, tuple[str, list[int], bytes]]
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"}


def ready(path: str, directory: Path) -> Path:
    """A copy of fixture ``path`` under ``directory`` without its oracle and with a tokenizer, as a user would have it."""
    copy = directory / path.replace("/", "_")
    if not copy.exists():
        shutil.copytree(FIXTURES / path, copy, ignore=shutil.ignore_patterns("oracle.safetensors"))
        if not (copy / "tokenizer.json").exists():
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(TOKENIZER / name, copy / name)
    return copy


def options(to: str, **changes: Any) -> PlanOptions:
    return PlanOptions(registry.parse_target(to), **changes)


def planned(source: Path, to: str, **changes: Any) -> Plan:
    """A scanned plan whose checkpoint is still open."""
    return make_plan(source, options(to, **changes))


def converted(source: Path, destination: Path, to: str, *, workers: int = 2, overwrite: bool = False, **changes: Any) -> Plan:
    """Plan, check and write; the plan comes back (closed)."""
    plan = planned(source, to, **changes)
    with plan.checkpoint:
        refuse_losses(plan)
        execute(plan, destination, workers=workers, overwrite=overwrite)
    return plan


def load(file: Path) -> Tensors:
    """dtype word, shape and bytes of every tensor, by the safetensors package."""
    dtypes = {name: entry["dtype"] for name, entry in header(file).items() if name != "__metadata__"}
    parsed = safetensors.deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
    return {name: (dtypes[name], list(t["shape"]), bytes(t["data"])) for name, t in parsed}


def header(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    parsed: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return parsed


def store(file: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file as its definition says: header length, JSON, payload."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at, payload = 0, bytearray()
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
        payload += data
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    file.write_bytes(len(head).to_bytes(8, "little") + head + bytes(payload))


def edit(directory: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors of ``model.safetensors`` in place."""
    file = directory / "model.safetensors"
    tensors = load(file)
    metadata = header(file).get("__metadata__")
    change(tensors)
    store(file, tensors, metadata)


def array(tensors: Tensors, name: str) -> Any:
    import numpy as np

    dtype, shape, data = tensors[name]
    return np.frombuffer(data, _NUMPY[dtype]).reshape(shape).copy()


def put(tensors: Tensors, name: str, values: Any) -> None:
    """Replace a tensor's values; its dtype word stays."""
    import numpy as np

    dtype = tensors[name][0]
    values = np.ascontiguousarray(values, _NUMPY[dtype])
    tensors[name] = (dtype, list(values.shape), values.tobytes())


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value, indent=2))


def digest(path: Path) -> str:
    """SHA-256 over names and bytes of everything under ``path``."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        total.update(str(file.relative_to(path)).encode() + b"\0" + (file.read_bytes() if file.is_file() else b"") + b"\0")
    return total.hexdigest()


def names_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def stripped_gguf(origin: Path, output: Path) -> Path:
    """The same file without its record."""
    with open_checkpoint(origin) as opened:
        metadata = {k: v for k, v in opened.metadata.items() if k != PROVENANCE_KEY}
        infos = [TensorInfo(t.name, t.dtype, t.shape) for t in opened.raw.values()]
        layout = layout_gguf(metadata, infos)
        data = bytearray(layout.size)
        data[: len(layout.header)] = layout.header
        for name, raw in opened.raw.items():
            data[layout.offsets[name] : layout.offsets[name] + raw.nbytes] = raw.read()
    output.write_bytes(bytes(data))
    return output


def float_gguf(path: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> Path:
    """A GGUF of an architecture that nobody knows, with these float32 and float16 tensors."""
    infos = [TensorInfo(name, {"<f2": "F16", "<f4": "F32"}[values.dtype.str], values.shape) for name, values in arrays.items()]
    layout = layout_gguf({"general.architecture": Value("str", "made-up")}, infos)
    data = bytearray(layout.size)
    data[: len(layout.header)] = layout.header
    for name, values in arrays.items():
        data[layout.offsets[name] : layout.offsets[name] + values.nbytes] = values.tobytes()
    path.write_bytes(data)
    return path
