"""Fixture checkpoints as format modules see them: raw parts grouped by module, and the oracle values beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from qformats.containers.raw import RawTensor
from qformats.containers.safetensors import open_safetensors
from qformats.formats.protocol import Match, Module, PartInfo, Piece
from qformats.scheme import Storage
from qformats.tensor import QuantizedTensor

FIXTURES = Path(__file__).parents[3] / "fixtures"
MANIFEST: list[dict[str, Any]] = json.loads((FIXTURES / "manifest.json").read_text())


def entries(format: str) -> list[dict[str, Any]]:
    """Manifest rows of one format that are on disk."""
    return [e for e in MANIFEST if e.get("format") == format and (FIXTURES / e["path"]).is_dir()]


def quantization_config(path: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FIXTURES / path / "config.json").read_text())["quantization_config"]
    return config


def tensors(path: str) -> Mapping[str, RawTensor]:
    opened = open_safetensors(FIXTURES / path / "model.safetensors").tensors
    return opened if isinstance(opened, Mapping) else {t.name: t for t in opened}


def modules(path: str, match: Match) -> dict[str, Module]:
    """Every packed module of a fixture by name."""
    grouped: dict[str, dict[str, RawTensor]] = {}
    for name, raw in tensors(path).items():
        module, _, leaf = name.rpartition(".")
        grouped.setdefault(module, {})[leaf] = raw
    return {name: Module(name, parts, match) for name, parts in grouped.items() if "qweight" in parts}


def oracle(path: str) -> dict[str, torch.Tensor]:
    """Dequantized weights (N, K) by module name, as the original library computed them."""
    values = load_file(str(FIXTURES / path / "oracle.safetensors"))
    return {name.removesuffix(".weight"): w for name, w in values.items()}


def part_bytes(raw: RawTensor) -> bytes:
    return raw.read()


def assembled(layout: Mapping[str, PartInfo], pieces: Iterator[Piece] | list[Piece]) -> dict[str, bytes]:
    """The bytes of each part after all pieces are put in place; every element must be written exactly once."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    written: dict[str, np.ndarray[Any, Any]] = {}
    for piece in pieces:
        info = layout[piece.leaf]
        height = int(np.prod(info.shape[:-1])) if len(info.shape) > 1 else 1
        plane = arrays.setdefault(piece.leaf, np.zeros((height, info.shape[-1]), piece.array.dtype))
        seen = written.setdefault(piece.leaf, np.zeros(plane.shape, np.uint8))
        rows, columns = piece.array.shape
        plane[piece.row : piece.row + rows, piece.column : piece.column + columns] = piece.array
        seen[piece.row : piece.row + rows, piece.column : piece.column + columns] += 1
    assert all((seen == 1).all() for seen in written.values()), "a part has holes or overlaps"
    return {leaf: arrays[leaf].tobytes() if leaf in arrays else b"" for leaf in layout}


def rewritten(format: ModuleType, module: Module, storage: Storage, step: int | None = None) -> dict[str, bytes]:
    """Read ``module`` in row ranges of ``step`` and write it again as ``storage``."""
    shape = format.scheme(module).shape
    step = step or shape[0]
    pieces: list[Piece] = []
    for start in range(0, shape[0], step):
        tensor = format.read(module, start, min(start + step, shape[0]))
        pieces += format.write(storage, tensor, start, shape)
    return assembled(format.layout(storage, shape), pieces)


def same_tensor(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Equal codes, parameters and group index."""
    if a.shape != b.shape or a.grid != b.grid or not torch.equal(a.codes, b.codes):
        return False
    if (a.group_index is None) != (b.group_index is None):
        return False
    if a.group_index is not None and b.group_index is not None and not torch.equal(a.group_index, b.group_index):
        return False
    pairs = list(zip(a.params(), b.params(), strict=True))
    return all(x.block == y.block and torch.equal(x.values, y.values) for (_, x), (_, y) in pairs)  # type: ignore[arg-type]
