"""Where every part of the output lies: a GGUF file, or a directory of safetensors shards with side files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from converters.jobs import Job
from qformats.containers.gguf import Metadata, TensorInfo, layout_gguf
from qformats.containers.index import index_json, shard_names, shard_plan
from qformats.containers.layout import Layout
from qformats.containers.safetensors import layout_safetensors
from qformats.formats.protocol import PartInfo

__all__ = ["Output", "OutputPart", "gguf_output", "part_row_nbytes", "safetensors_output"]

MAX_SHARD_NBYTES = 5_000_000_000


@dataclass(frozen=True)
class OutputPart:
    """A stored tensor: file, absolute offset, size, bytes of one row."""

    file: str
    offset: int
    nbytes: int
    row_nbytes: int
    info: PartInfo


@dataclass(frozen=True)
class Output:
    """All files of the output: ``single`` is the one file's name (``""``) or None for a directory; ``small`` are whole small files."""

    directory: bool
    layouts: Mapping[str, Layout]
    parts: Mapping[str, OutputPart]
    small: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Total size of all files."""
        return sum(layout.size for layout in self.layouts.values()) + sum(map(len, self.small.values()))


def part_row_nbytes(info: PartInfo, nbytes: int) -> int:
    """Bytes of one row of a part."""
    rows = prod(info.shape[:-1]) if len(info.shape) > 1 else 1
    return nbytes // max(1, rows)


def _stored(jobs: Sequence[Job]) -> list[tuple[str, PartInfo]]:
    return [(job.part_name(leaf), info) for job in jobs for leaf, info in job.parts.items()]


def _parts(layout: Layout, file: str, stored: Sequence[tuple[str, PartInfo]]) -> dict[str, OutputPart]:
    return {
        name: OutputPart(file, layout.offsets[name], layout.nbytes[name], part_row_nbytes(info, layout.nbytes[name]), info)
        for name, info in stored
    }


def gguf_output(metadata: Metadata, jobs: Sequence[Job], alignment: int) -> Output:
    """One GGUF v3 file, tensors in job order."""
    stored = _stored(jobs)
    layout = layout_gguf(metadata, [TensorInfo(name, info.dtype, info.shape) for name, info in stored], alignment)
    return Output(False, {"": layout}, _parts(layout, "", stored))


def safetensors_output(
    jobs: Sequence[Job],
    small: Mapping[str, bytes],
    metadata: Callable[[Sequence[str]], dict[str, str]],
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
) -> Output:
    """A directory: safetensors shards with an index where there are several, and the small files.

    ``metadata`` of every shard is made from the names of all files.
    """
    stored = dict(_stored(jobs))
    shards = shard_plan([(name, info.dtype, info.shape) for name, info in stored.items()], max_shard_nbytes)
    files = shard_names(len(shards))
    extra = dict(small)
    if len(shards) > 1:
        extra["model.safetensors.index.json"] = index_json(shards)
    layouts: dict[str, Layout] = {}
    parts: dict[str, OutputPart] = {}
    for file, shard in zip(files, shards, strict=True):
        layout = layout_safetensors(shard, metadata((*files, *extra)))
        layouts[file] = layout
        parts.update(_parts(layout, file, [(name, stored[name]) for name, _, _ in shard]))
    return Output(True, layouts, parts, extra)
