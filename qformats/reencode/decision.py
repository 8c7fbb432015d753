"""What the search decides about one tensor: how its codes are relabelled and which parameters they get."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qformats.reencode.floats import Spelling
from qformats.scheme import Grid
from qformats.tensor import Param

__all__ = ["KINDS", "Fit", "Hint"]

KINDS = ("copied", "exact", "codes-exact", "dequantized", "requantized")


@dataclass(frozen=True, slots=True)
class Hint:
    """What a provenance record knows of the tensor to be restored: its zero points (N, G) and whether all scales were positive."""

    zero_point: Tensor | None = None
    positive: bool = False


@dataclass(frozen=True, slots=True)
class Fit:
    """How a tensor is relabelled for a storage: ``new code = shift ± factor * code`` on runs of ``width`` columns, and the new parameters.

    ``code`` is that of ``rewrite.whole_codes`` where the storage's codes are integers. ``factor``, int16, is on runs of ``factor_width``.
    ``half``: the new code is 0 or twice this number of its run, and 1 is written for it. ``extra``: further scales.
    ``as_it_stands``: nothing changes. ``own_codes``: ``code`` is the tensor's own. ``spelling``: codes of one small float become another's.
    """

    kind: str
    reason: str
    rewrites: tuple[str, ...]
    width: int
    shift: Tensor | None
    flip: Tensor | None
    grid: Grid
    scale: Param
    zero_point: Param | None
    offset: Param | None
    factor: Tensor | None = None
    factor_width: int = 1
    half: Tensor | None = None
    extra: tuple[Param, ...] = ()
    as_it_stands: bool = False
    own_codes: bool = False
    spelling: Spelling | None = None
