"""What a path holds, from headers only: format, types, sizes, bits per weight, warnings. Imports neither torch nor numpy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from converters.output import count, size, table
from qformats import registry
from qformats.checkpoint import FLOAT_TYPES, INTEGER_TYPES, Checkpoint, open_checkpoint
from qformats.errors import Unsupported
from qformats.scheme import Float, Integer, Learned, Scheme, Table, Tile

__all__ = ["Inspection", "Stored", "inspect_path", "scheme_label"]

_SETTINGS = (
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "zero_point",
    "version",
    "format",
    "checkpoint_format",
    "packing_format",
    "quant_method",
)


@dataclass(frozen=True)
class Stored:
    """One tensor as a model knows it: a quantized weight counts as one, with the bytes of all its planes."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    quantized: bool

    @property
    def weights(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element, parameters included."""
        return 8 * self.nbytes / max(1, self.weights)


@dataclass(frozen=True)
class Inspection:
    """The answer of ``qconvert inspect``. ``settings``: the quantization config's main fields; ``converted_from``: by the record."""

    path: str
    format: str
    dialect: str
    container: str
    architecture: str | None
    files: tuple[str, ...]
    nbytes: int
    tensors: tuple[Stored, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    converted_from: str | None = None
    version: int | None = None

    @property
    def weights(self) -> int:
        """Number of elements of all tensors."""
        return sum(t.weights for t in self.tensors)

    def types(self) -> list[dict[str, Any]]:
        """One row a type: tensors, weights, bytes, bits per weight; the largest first."""
        groups: dict[str, list[Stored]] = defaultdict(list)
        for tensor in self.tensors:
            groups[tensor.type].append(tensor)
        rows = []
        for name, found in groups.items():
            weights, nbytes = sum(t.weights for t in found), sum(t.nbytes for t in found)
            bits = round(8 * nbytes / max(1, weights), 4)
            rows.append({"type": name, "tensors": len(found), "weights": weights, "nbytes": nbytes, "bits_per_weight": bits})
        return sorted(rows, key=lambda row: -int(row["nbytes"]))

    def to_json(self, *, tensors: bool = False) -> dict[str, Any]:
        """JSON data; ``tensors`` adds one object for each."""
        data = {k: v for k, v in asdict(self).items() if k != "tensors"}
        bits = round(8 * sum(t.nbytes for t in self.tensors) / max(1, self.weights), 4)
        data.update(weights=self.weights, bits_per_weight=bits, types=self.types(), n_tensors=len(self.tensors))
        if tensors:
            data["tensors"] = [{**asdict(t), "bits_per_weight": round(t.bits_per_weight, 4)} for t in self.tensors]
        return data

    def to_text(self, *, tensors: bool = False) -> Iterator[str]:
        """Lines for a terminal."""
        dialect = f" ({self.dialect})" if self.dialect else ""
        yield f"{self.path}: {self.format}{dialect}, {size(self.nbytes)} in {count(len(self.files), 'file')}"
        if self.architecture:
            yield f"architecture  {self.architecture}"
        if self.settings:
            yield "settings      " + ", ".join(f"{k} {v}" for k, v in self.settings.items())
        if self.converted_from:
            yield f"made from     {self.converted_from}"
        bits = 8 * sum(t.nbytes for t in self.tensors) / max(1, self.weights)
        yield f"tensors       {len(self.tensors):,}, {self.weights:,} weights, {bits:.2f} bits/weight"
        yield ""
        rows = [
            (r["type"], f"{r['tensors']:,}", f"{r['weights']:,}", size(r["nbytes"]), f"{r['bits_per_weight']:.2f}") for r in self.types()
        ]
        yield from table(("type", "tensors", "weights", "size", "bits/weight"), rows, right=(1, 2, 3, 4))
        if tensors:
            yield ""
            each = [(t.name, t.type, " x ".join(map(str, t.shape)), size(t.nbytes), f"{t.bits_per_weight:.2f}") for t in self.tensors]
            yield from table(("tensor", "type", "shape", "size", "bits/weight"), each, right=(3, 4))
        for warning in self.warnings:
            yield f"warning: {warning}"


def inspect_path(path: str | Path, allow_pickle: bool = False) -> Inspection:
    """Open ``path`` and describe it; ``BadFile`` if its headers are broken, ``Unsupported`` if it is nothing we know."""
    with open_checkpoint(path, allow_pickle) as checkpoint:
        return inspect_checkpoint(checkpoint)


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Describe an open checkpoint."""
    warnings = list(checkpoint.warnings)
    tensors = tuple(_stored(checkpoint, warnings))
    sources = checkpoint.sources()
    files = tuple(Path(source.name).name for source in sources) or checkpoint.file_names
    settings = {} if checkpoint.gguf is not None else {k: checkpoint.match.config[k] for k in _SETTINGS if k in checkpoint.match.config}
    record = checkpoint.provenance or {}
    origin = record.get("source")
    return Inspection(
        checkpoint.shown,
        checkpoint.format,
        checkpoint.match.dialect,
        checkpoint.container,
        _architecture(checkpoint),
        files,
        sum(source.size for source in sources),
        tensors,
        settings,
        tuple(warnings),
        str(origin["format"]) if isinstance(origin, dict) and "format" in origin else None,
        None if checkpoint.gguf is None else checkpoint.gguf.version,
    )


def _architecture(checkpoint: Checkpoint) -> str | None:
    if checkpoint.gguf is not None:
        stored = checkpoint.gguf.metadata.get("general.architecture")
        return None if stored is None else str(stored.value)
    classes = checkpoint.config.get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else checkpoint.config.get("model_type")


def _stored(checkpoint: Checkpoint, warnings: list[str]) -> Iterator[Stored]:
    for name, module in checkpoint.modules.items():
        planes: set[str] = set()
        if checkpoint.gguf is None and checkpoint.is_quantized(name):
            planes = {leaf for leaf in module.parts if leaf in ("weight", "", *registry.format_module(module.match.format).SUFFIXES)}
            nbytes = sum(module.parts[leaf].nbytes for leaf in planes)
            try:
                scheme = checkpoint.scheme(name)
            except Unsupported as error:
                warnings.append(str(error))
                yield Stored(_full(name, "weight"), "unsupported", (), nbytes, True)
            else:
                yield Stored(_full(name, "weight"), scheme_label(scheme), scheme.shape, nbytes, True)
        for leaf, raw in module.parts.items():
            if leaf not in planes:
                codes = checkpoint.gguf is not None and raw.dtype not in (*FLOAT_TYPES, *INTEGER_TYPES)
                yield Stored(_full(name, leaf), raw.dtype, raw.shape, raw.nbytes, codes)


def _full(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def scheme_label(scheme: Scheme) -> str:
    """A scheme in a few words.

    >>> from qformats.scheme import ParamSpec, Tile
    >>> scheme_label(Scheme((8, 64), Integer(4), (ParamSpec("float16", Tile((1, 32))),)))
    'int4 group 32'
    """
    grid = scheme.grid
    if isinstance(grid, Integer):
        word = f"int{grid.bits}"
    elif isinstance(grid, (Float, Table)):
        word = grid.name
    else:
        assert isinstance(grid, Learned)
        word = f"{grid.books} learned books of {grid.entries}"
    zero = scheme.zero_point
    zeros = ", zero points" if zero is not None and zero.constant is None else ""
    return f"{word}{_blocks(scheme)}{zeros}{', act-order' if scheme.group_index else ''}"


def _blocks(scheme: Scheme) -> str:
    """How many weights share a scale: the whole tensor, a row, a group of one, or a block of several."""
    block = scheme.scales[0].block if scheme.scales else None
    group, rows = scheme.group_size, block.sizes[-2] if isinstance(block, Tile) and len(block.sizes) > 1 else 1
    if group is None:
        return ""
    if rows > 1 and group >= scheme.shape[-1] and rows >= scheme.shape[-2]:
        return " per tensor"
    if rows > 1:
        return f" blocks {rows}x{group}"
    return " per row" if group >= scheme.shape[-1] else f" group {group}"
