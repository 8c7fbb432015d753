"""A large tensor's planes filled a few rows at a time, so that no second copy of it is ever in memory.

Planes whose rows are the weight's rows are allocated once; the others, and everything small, are lowered whole (``None`` here).
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from math import prod
from typing import TYPE_CHECKING

from qformats import assemble
from qformats.runtime.supply import CheckpointReader, Supply
from qformats.scheme import Learned, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.kernels.layout import Layout, ParamLayout
    from qformats.kernels.lower import Lowered

__all__ = ["give_back", "lowered_by_rows"]

_RANGE_WEIGHTS = 1 << 21  # 2 MiB of codes
_LARGE_NBYTES, _UNIT = 1 << 19, 16


def lowered_by_rows(supply: Supply, name: str) -> Lowered | None:
    """The tensor's planes, bit for bit those of ``lower``; None where it is small or its planes are not made of its rows."""
    tensor = supply.tensors[name]
    columns = tensor.shape[-1]
    step = _RANGE_WEIGHTS // columns // _UNIT * _UNIT
    if len(tensor.shape) != 2 or step < _UNIT or tensor.rows < 2 * step or not _stored_by_rows(supply, name):
        return None
    planes: dict[str, Tensor] = {}
    layout: Layout | None = None
    for start, stop, made in _ranges(supply, name, step):
        if made is None:
            return None
        whole = _of_rows(made.layout, tensor.rows)
        if whole is None or (layout is not None and whole != layout):
            return None
        layout = whole
        if not _put(planes, made, start, stop, tensor.rows):
            return None
    assert layout is not None
    from qformats.kernels.lower import Lowered

    return Lowered(layout, {plane: planes[plane] for plane in layout.names})


def _ranges(supply: Supply, name: str, step: int) -> Iterator[tuple[int, int, Lowered | None]]:
    from torch import Tensor

    from qformats.kernels.lower import lower
    from qformats.rewrite import Refused

    tensor, reader = supply.tensors[name], CheckpointReader(supply.checkpoint)
    for start in range(0, tensor.rows, step):
        stop = min(start + step, tensor.rows)
        try:
            rows = assemble.read_rows(tensor, reader, start, stop)
        except Refused:
            rows = None
        yield start, stop, None if rows is None or isinstance(rows, Tensor) else lower(rows)


def _stored_by_rows(supply: Supply, name: str) -> bool:
    """Whether rows of the weight are rows of what is stored: only then is a range read without the rest."""
    tensor = supply.tensors[name]
    for source in tensor.sources:
        module = supply.checkpoint.modules[source.module]
        heights = {raw.shape[:1] for raw in module.parts.values() if raw.nbytes > _LARGE_NBYTES}
        if heights != {supply.checkpoint.scheme(source.module).shape[:1]}:
            return False
    return True


def _of_rows(layout: Layout, rows: int) -> Layout | None:
    """The layout of all ``rows`` of which ``layout`` is that of some, None where planes are not rows one after the other."""
    if layout.index or isinstance(layout.grid, Learned) or len(layout.shape) != 2:
        return None
    params = [_param_of_rows(param, layout, rows) for param in layout.params]
    if any(param is None for param in params):
        return None
    return dataclasses.replace(layout, shape=(rows, layout.columns), params=tuple(param for param in params if param is not None))


def _param_of_rows(param: ParamLayout, layout: Layout, rows: int) -> ParamLayout | None:
    block = param.block
    if not isinstance(block, Tile) or len(param.shape) != 2 or len(block.sizes) != 2:
        return None
    if block.sizes[0] == 1 and param.shape[0] == layout.rows:
        nested = None if param.nested is None else _of_rows(param.nested, rows)
        if param.nested is not None and nested is None:
            return None
        return dataclasses.replace(param, shape=(rows, param.shape[1]), nested=nested)
    if prod(param.shape) == 1 and param.nested is None and block.sizes == layout.shape:
        return dataclasses.replace(param, block=Tile((rows, layout.columns)))
    return None


def _put(planes: dict[str, Tensor], made: Lowered, start: int, stop: int, rows: int) -> bool:
    """Rows of every plane into the whole one; whether a single number of the whole weight is the same everywhere."""
    import torch

    for name, part in made.planes.items():
        one = part.ndim == 0 or part.shape[0] != stop - start
        if name not in planes:
            planes[name] = part.clone() if one else part.new_empty((rows, *part.shape[1:]))
        if not one:
            planes[name][start:stop] = part
        elif not torch.equal(planes[name], part):
            return False
    return True


def give_back() -> None:
    """Let the C library return what it keeps of freed memory, where it is glibc; threads leave hundreds of MiB behind otherwise."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
