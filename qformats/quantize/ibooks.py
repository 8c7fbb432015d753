"""The codebooks of ggml's IQ types as the quantizers search them: levels, points on and off the grid, neighbours of those off it.

Source: ``iq2xs_init_impl`` and ``iq3xs_init_impl`` in ``ggml/src/ggml-quants.c`` of llama.cpp v0.5.0. The weights of an entry are named by
their level, the rank of their size among the sizes in the book. A *point* is any choice of levels, numbered ``sum level[i] * base^i``.
A point that is no entry has neighbours: all entries within the ``shells`` smallest distances to it, by distance, then by number.
The distance is that of odd numbers ``2 * level + 1``, whatever the sizes in the book are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["Book", "book", "on_device"]

_SHELLS = {"iq1_s": 3, "iq2_xxs": 2, "iq2_xs": 2, "iq2_s": 1, "iq3_xxs": 2, "iq3_s": 3}
_STEP = 512  # points whose distances are looked at together


@dataclass(frozen=True, slots=True)
class Book:
    """``base`` levels a weight. numpy arrays:

    - ``levels``: uint8 (entries, v); ``index``: int16 (base^v,), the entry at a point or -1;
    - ``starts``: int32 (base^v + 1,), where a point's neighbours start and end in ``lists``, int16.
    """

    base: int
    levels: np.ndarray[Any, Any]
    index: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]
    lists: np.ndarray[Any, Any]

    @property
    def width(self) -> int:
        """Weights an entry."""
        return int(self.levels.shape[1])

    @property
    def powers(self) -> tuple[int, ...]:
        """What a level of each position adds to the number of a point."""
        return tuple(self.base**i for i in range(self.width))


def _nearest_shells(distances: np.ndarray[Any, Any], shells: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Row and entry of all distances among the ``shells`` smallest of their row, by row, distance, entry."""
    import numpy as np

    limit = distances.min(1, keepdims=True)
    for _ in range(shells - 1):
        limit = np.where(distances > limit, distances, np.iinfo(distances.dtype).max).min(1, keepdims=True)
    rows, entries = np.nonzero(distances <= limit)
    order = np.lexsort((entries, distances[rows, entries], rows))
    return rows[order], entries[order]


@cache
def book(name: str) -> Book:
    """The tables of a book of ``qformats.grids``; made once, in some tenths of a second."""
    import numpy as np

    from qformats.grids import table_values

    values = table_values(name).numpy()
    sizes = np.unique(values)
    levels = np.searchsorted(sizes, values)
    base, width = len(sizes), values.shape[1]
    index = np.full(base**width, -1, np.int16)
    index[(levels * base ** np.arange(width)).sum(1)] = np.arange(len(levels))
    points = np.nonzero(index < 0)[0]
    found = []
    for at in range(0, len(points), _STEP):
        few = points[at : at + _STEP]
        apart = (few[:, None] // base ** np.arange(width) % base).astype(np.float32)
        squares = (apart * apart).sum(1)[:, None] + (levels * levels).sum(1) - 2 * apart @ levels.T.astype(np.float32)
        rows, entries = _nearest_shells(squares.astype(np.int16), _SHELLS[name])
        found.append((few[rows], entries))
    counts = np.bincount(np.concatenate([rows for rows, _ in found]), minlength=len(index))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lists = np.concatenate([entries for _, entries in found]).astype(np.int16)
    return Book(base, levels.astype(np.uint8), index, starts, lists)


@cache
def on_device(name: str, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """levels float32 (entries, v) and index, starts, lists as int64 tensors on ``device``."""
    import torch

    made = book(name)
    levels = torch.from_numpy(made.levels).to(device, torch.float32)
    index, starts, lists = (torch.from_numpy(plane).to(device, torch.int64) for plane in (made.index, made.starts, made.lists))
    return levels, index, starts, lists
