"""Which zeros of a small float are minus zero: integers have one zero, so the record keeps a bit for each.

A bit says minus zero; they follow the weights row by row, those that are no zeros left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.packing import pack, unpack
from qformats.scheme import Float, Grid, Integer, Storage, Table

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["ZeroSigns", "collect_zeros", "loses_signs", "two_zeros", "zero_counts"]


def two_zeros(grid: Grid) -> tuple[int, int] | None:
    """The codes of zero and minus zero, None for a grid that has one zero at most.

    >>> two_zeros(Float("e2m1")), two_zeros(Float("e4m3fnuz"))
    ((0, 8), None)
    """
    from qformats import grids

    if isinstance(grid, Float):
        values = grids.float_values(grid.name)
    elif isinstance(grid, Table) and grid.v_in == 1:
        values = grids.table_values(grid.name)
    else:
        return None
    found = (values == 0).nonzero().reshape(-1).tolist()
    return (found[0], found[1]) if len(found) == 2 else None


@dataclass(frozen=True)
class ZeroSigns:
    """``bits``: packed as NumPy packs them; ``count`` zeros; ``before``: how many there are before each row, where that is known."""

    count: int
    bits: bytes
    before: np.ndarray[Any, Any] | None = None

    @staticmethod
    def parse(data: Any) -> ZeroSigns | None:
        """The inverse of ``collect_zeros``; ``ValueError`` or ``BadFile('provenance')`` for what is none."""
        if data is None:
            return None
        count, text = data
        if type(count) is not int or count < 0:
            raise ValueError("no count")
        return ZeroSigns(count, unpack(text, -(-count // 8)))

    def placed(self, counts: Iterable[np.ndarray[Any, Any]]) -> ZeroSigns | None:
        """The signs with their place in a weight, given the ``zero_counts`` of its rows in order; None where the sum is another."""
        import numpy as np

        before = np.concatenate([[0], np.cumsum(np.concatenate(list(counts)))]).astype(np.int64)
        return ZeroSigns(self.count, self.bits, before) if before[-1] == self.count else None

    def given_back(self, t: QuantizedTensor, start: int) -> QuantizedTensor:
        """Rows ``start:`` of the weight with their minus zeros again."""
        import numpy as np
        import torch

        zeros = two_zeros(t.grid)
        assert zeros is not None and self.before is not None
        first, last = int(self.before[start]), int(self.before[start + t.shape[0]])
        bits = np.unpackbits(np.frombuffer(self.bits, "u1")[first // 8 : -(-last // 8)])[first % 8 :][: last - first]
        codes = t.codes.clone()
        signs = torch.from_numpy(bits) != 0
        codes[is_zero(codes, t.grid)] = torch.where(signs, zeros[1], zeros[0]).to(codes.dtype)
        return t.replace(codes=codes)


def is_zero(codes: Tensor, grid: Grid) -> Tensor:
    """Where ``codes`` of a grid with two zeros are one of them."""
    zeros = two_zeros(grid)
    assert zeros is not None
    return (codes == zeros[0]) | (codes == zeros[1])


def zero_counts(t: QuantizedTensor) -> np.ndarray[Any, Any]:
    """How many zeros each row has."""
    counts: np.ndarray[Any, Any] = is_zero(t.codes, t.grid).sum(-1).numpy()
    return counts


def loses_signs(grid: Grid, target: Storage) -> bool:
    """Whether codes of ``grid`` have minus zeros and those of ``target`` none."""
    return two_zeros(grid) is not None and isinstance(target.grid, Integer | Float) and two_zeros(target.grid) is None


def collect_zeros(rows: Iterable[QuantizedTensor]) -> list[Any] | None:
    """The signs of a weight's zeros as JSON data, None where all are plus; the rows come in order."""
    import numpy as np

    found, any_minus = [], False
    for t in rows:
        zeros = two_zeros(t.grid)
        assert zeros is not None
        minus = (t.codes[is_zero(t.codes, t.grid)] == zeros[1]).numpy()
        any_minus = any_minus or bool(minus.any())
        found.append(minus)
    signs = np.concatenate(found)
    return [len(signs), pack(np.packbits(signs).tobytes())] if any_minus else None
