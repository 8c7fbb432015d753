"""Merged weights, row range by row range: W' of stored rows as a chain of changes on what the checkpoint holds, read as float32 bytes.

Everything is added up in float64 and rounded once to float32: W + s B A, the vectors of DoRA (PEFT 0.21, ``tuners/lora/variants.py``:
m / |W + s B A| times the sum, the length taken of the model's own W), and tensors that are replaced. A chain holds the small
factors only; W is read when rows are asked for, so ranges stream.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from converters.sources import Slab
from qformats import registry
from qformats.checkpoint import Checkpoint
from qformats.containers.raw import RawTensor
from qformats.errors import BadFile
from qformats.formats.protocol import Module

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["LowRankRows", "MergedSource", "Rows", "SavedRows", "StoredRows", "ThreadSlabs"]

_STEP_WEIGHTS = 1 << 20


class Rows(Protocol):
    """Stored rows of one tensor as float64 (n, width), a fresh tensor; each element of a vector is a row."""

    def rows(self, first: int, last: int) -> Tensor: ...


class ThreadSlabs:
    """A ``Slab`` for each thread: the last module that a thread read is read ahead."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._local = checkpoint, threading.local()

    def module(self, name: str) -> Module:
        """The module, for the calling thread alone."""
        if not hasattr(self._local, "slab"):
            self._local.slab = Slab(self._checkpoint)
        slab: Slab = self._local.slab
        return slab.module(name)


@dataclass(frozen=True)
class StoredRows:
    """What the checkpoint itself holds, codes dequantized."""

    checkpoint: Checkpoint
    slabs: ThreadSlabs
    module: str
    leaf: str

    def rows(self, first: int, last: int) -> Tensor:
        import torch

        from qformats.formats.dense import read_float

        module = self.slabs.module(self.module)
        if self.leaf == "weight" and self.checkpoint.is_quantized(self.module):
            codes = registry.format_module(module.match.format).read(module, first, last)
            made: Tensor = codes.dequantize(torch.float64)
            return made
        raw = module.parts[self.leaf]
        if len(raw.shape) <= 1:
            return read_float(raw).reshape(-1, 1)[first:last].to(torch.float64, copy=True)
        return read_float(raw, first, last).to(torch.float64, copy=True)


@dataclass(frozen=True)
class LowRankRows:
    """``scale`` · ``left`` ``right`` added to stored rows ``start : start + len(left)``, ``weight`` of the change kept.

    ``left`` (n, r) in the order of the stored rows, ``right`` (r, width). DoRA: ``magnitude`` (n,), or (width,) where the outputs are
    ``columns``; ``own`` are the rows of the model itself, all ``total`` of them.
    """

    before: Rows
    own: Rows
    start: int
    total: int
    left: Tensor
    right: Tensor
    scale: float
    weight: float = 1.0
    magnitude: Tensor | None = None
    columns: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)
    lengths: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    def rows(self, first: int, last: int) -> Tensor:
        value = self.before.rows(first, last)
        low, high = max(first, self.start), min(last, self.start + len(self.left))
        if low < high:
            part, added = value[low - first : high - first], self._added(low, high)
            if self.magnitude is None:
                part += self.weight * added
            else:
                part += self.weight * (self._factor(low, high, added) * (part + added) - part)
        return value

    def _added(self, low: int, high: int) -> Tensor:
        import torch

        left = self.left[low - self.start : high - self.start].to(torch.float64)
        return self.scale * (left @ self.right.to(torch.float64))

    def _factor(self, low: int, high: int, added: Tensor) -> Tensor:
        import torch

        assert self.magnitude is not None
        lengths = self.magnitude.to(torch.float64)
        if self.columns:
            return lengths / self._column_lengths()
        rows = torch.linalg.vector_norm(self.own.rows(low, high) + added, dim=1)
        factor: Tensor = (lengths[low - self.start : high - self.start] / rows).unsqueeze(1)
        return factor

    def _column_lengths(self) -> Tensor:
        """Lengths of all columns, which take a pass over the whole tensor: once."""
        import torch

        with self.lock:
            if not self.lengths:
                width = self.right.shape[1]
                step, squares = max(1, _STEP_WEIGHTS // width), torch.zeros(width, dtype=torch.float64)
                for low in range(0, self.total, step):
                    high = min(self.total, low + step)
                    squares += (self.own.rows(low, high) + self._added(low, high)).square().sum(0)
                self.lengths.append(squares.sqrt())
        return self.lengths[0]


@dataclass(frozen=True)
class SavedRows:
    """Stored rows ``start : start + count`` replaced by those of ``raw`` from ``first_row`` on, stored row i by row ``index[i]``."""

    before: Rows
    raw: RawTensor
    start: int
    count: int
    first_row: int = 0
    index: np.ndarray | None = None  # type: ignore[type-arg]
    weight: float = 1.0

    def rows(self, first: int, last: int) -> Tensor:
        value = self.before.rows(first, last)
        low, high = max(first, self.start), min(last, self.start + self.count)
        if low < high:
            part = value[low - first : high - first]
            saved = self._saved(low - self.start, high - self.start)
            part.copy_(saved if self.weight == 1.0 else part + self.weight * (saved - part))
        return value

    def _saved(self, low: int, high: int) -> Tensor:
        import torch

        if self.index is None:
            return self._read(self.first_row + low, self.first_row + high)
        wanted = self.index[low:high] + self.first_row
        first = int(wanted.min())
        return self._read(first, int(wanted.max()) + 1)[torch.from_numpy(wanted - first)]

    def _read(self, first: int, last: int) -> Tensor:
        import torch

        from qformats.formats.dense import read_float

        if len(self.raw.shape) <= 1:
            return read_float(self.raw).reshape(-1, 1)[first:last].to(torch.float64)
        return read_float(self.raw, first, last).to(torch.float64)


class MergedSource:
    """A chain's rows as a run of little-endian float32, with the interface of a file."""

    def __init__(self, name: str, chain: Rows, rows: int, width: int) -> None:
        self.name, self.chain = name, chain
        self._width, self.size = width, 4 * rows * width

    def pread(self, offset: int, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        self.pread_into(offset, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        if offset < 0 or offset + len(view) > self.size:
            raise BadFile("truncated", f"wanted {len(view)} bytes of {self.size}", tensor=self.name, offset_bytes=offset)
        row_nbytes, end = 4 * self._width, offset + len(view)
        step = max(1, _STEP_WEIGHTS // self._width)
        for first in range(offset // row_nbytes, -(-end // row_nbytes), step):
            last = min(first + step, -(-end // row_nbytes))
            data = self._bytes(first, last)
            low, high = max(offset, first * row_nbytes), min(end, last * row_nbytes)
            view[low - offset : high - offset] = data[low - first * row_nbytes : high - first * row_nbytes]

    def _bytes(self, first: int, last: int) -> memoryview:
        import torch

        values = self.chain.rows(first, last).to(torch.float32)
        if not bool(torch.isfinite(values).all()):
            raise BadFile("lora-values", "the merged weights are not finite", tensor=self.name, hint="the adapter or the model is broken")
        return values.contiguous().numpy().reshape(-1).view("u1").data

    def identity(self) -> str:
        return f"merged:{id(self)}"

    def changed(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to release: the checkpoint and the adapter have files of their own."""
