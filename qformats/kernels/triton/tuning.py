"""Block sizes: of the table ``tuned.json`` where a device was measured, else by rule. Never measured while a product runs.

The table: {"<device name>": {"<shape class>/<bits>/<batch bucket>": {"rows": …, "units": …, …}}}, written by ``benchmarks/gpu.py --tune``.
Buckets are powers of two; a batch in one bucket always takes the same kernel, so that its results do not depend on its neighbours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qformats.kernels.triton.spec import Spec

__all__ = ["Block", "block", "bucket", "key", "unsplit"]

_PROGRAMS = 132 * 2  # two waves of an H100's processors


_SHARED = 144 << 10  # bytes of shared memory for tiles of x


@dataclass(frozen=True, slots=True)
class Block:
    """``rows`` of the weight, ``batch`` rows of x and ``units`` of columns (``Spec.unit``) at a time; ``splits`` parts of K."""

    rows: int
    units: int
    batch: int = 1
    splits: int = 1
    warps: int = 4
    stages: int = 1


@lru_cache(maxsize=1)
def _tuned() -> dict[str, dict[str, dict[str, int]]]:
    found: dict[str, dict[str, dict[str, int]]] = json.loads((Path(__file__).parent / "tuned.json").read_text())
    return found


def bucket(count: int) -> int:
    """The power of two that ``count`` rows of x are counted as."""
    return 1 << max(0, count - 1).bit_length()


def key(shape: str, spec: Spec, count: int) -> str:
    """A table's key."""
    kind = spec.kind if spec.v == 1 else f"{spec.kind}x{spec.v}"
    return f"{shape}/{kind}/{spec.bits}/{bucket(count)}"


@lru_cache(maxsize=16)
def _device(index: int) -> str:
    return torch.cuda.get_device_name(index)


def block(shape: str, spec: Spec, device: torch.device, count: int, height: int, single: bool = False) -> Block:
    """Sizes for ``shape`` ("gemv", "tiles", "dequantize"), ``count`` rows of x, ``height`` rows of the weight; ``single``: x is float32."""
    if device.type == "cuda" and not single:
        found = _tuned().get(_device(device.index or 0), {}).get(key(shape, spec, count))
        if found is not None:
            return _fitted(Block(**found), spec)
    made: Block = {"gemv": _vector, "tiles": _tile, "dequantize": _plain}[shape](spec, bucket(count), height, single)
    return _fitted(made, spec)


def unsplit(found: Block) -> Block:
    return replace(found, splits=1)


def _power(number: int) -> int:
    """The largest power of two that is not above ``number``, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def _fitted(found: Block, spec: Spec) -> Block:
    """No more units than a row has."""
    return replace(found, units=min(found.units, bucket(spec.units)))


def _vector(spec: Spec, most: int, height: int, single: bool) -> Block:
    """One thread to a unit: the loads of its rows then lie at constant distances, and no number changes threads before the last sum."""
    if spec.v > 1:
        units = max(1, (1024 if spec.phases == 1 else 512) // spec.width)
        rows = {1: 4, 2: 2}.get(most, 1)
        return Block(rows, units, splits=_parts(-(-height // rows)), warps=4)
    nested = any(field is not None and field.inner is not None for field in (*spec.factors, spec.offset))
    # no more than 168 registers
    many = spec.phases == 8 or (most >= 4 and ((nested and spec.phases > 2) or spec.kind == "table"))
    rows = (8 if most < 4 else 4) // (2 if many else 1)
    units = next((u for u in (128, 64) if -(-spec.units // u) * u <= 1.07 * spec.units), 32)
    return Block(rows, units, splits=_parts(-(-height // rows)), warps=units // 32)


def _parts(programs: int) -> int:
    """Parts of K for so many programs without it."""
    return _power(max(1, min(8, _PROGRAMS // programs)))


def _tile(spec: Spec, count: int, height: int, single: bool) -> Block:
    batch = max(16, min(128, count))
    rows = 128 if count > 64 and not spec.wide else 64
    units = max(1, (32 if single or spec.wide else 64) // spec.width)
    units = max(units // 2, 16 // spec.width, 1) if spec.phases == 8 else units
    # a step's tiles of x, one for each phase, lie in shared memory once for each stage ahead; tables are better left to the first cache
    held = units * spec.unit * batch * (4 if single else 2)
    stages = 1 if spec.kind in ("table", "learned") else min(3, 1 + _SHARED // held)
    programs = -(-height // rows) * -(-count // batch)
    return Block(rows, units, batch, _parts(programs), warps=8 if rows == 128 else 4, stages=stages)


def _plain(spec: Spec, count: int, height: int, single: bool) -> Block:
    return Block(4 if count >= 4 else 1, max(1, 512 // spec.width), warps=4)


def as_data(found: Block) -> dict[str, Any]:
    """A block as the table has it."""
    return {name: getattr(found, name) for name in Block.__slots__}
