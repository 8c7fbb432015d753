"""What a target tensor is made of: rows of source tensors, in order. Knows no names and no rules.

Rows: a tensor (N, K) has N rows, (E, N, K) has E·N rows, and each element of a vector (N,) is one row. Between tensors of different
rank the rows are the target's: of E vectors stacked to (E, K) each is one row, and a vector that becomes (1, K) is one row too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qformats.errors import BadFile

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FUNCTIONS", "Mapped", "Parts", "Shape", "SourceRows", "TensorMap"]

Shape = tuple[int, ...]
FUNCTIONS = {"-exp(x)": "log(-x)", "log(-x)": "-exp(x)"}  # each with the one that undoes it
Parts = Mapping[str, Mapping[str, Shape]]


@dataclass(frozen=True, slots=True)
class SourceRows:
    """Rows ``start:stop`` of source tensor ``module.leaf`` flattened to rows; row ``r`` of the piece is row ``start + index[r]``.

    ``index``: (stop - start,) int64 or None for "in order". ``period``: rows ``k·period:(k+1)·period`` of the piece come only from
    the same rows of the source (1 for "in order", head_dim for a rotary permutation, 0 when the whole piece is needed).
    ``transposed``: the rows meant are the columns of source rows ``first:last``. ``columns`` (first, step): only these columns of the
    rows. An index may reach beyond ``stop - start`` (every second row). Empty ``module`` and ``leaf`` stand for ``stop - start``
    rows of zeros (padding of an embedding).
    """

    module: str
    leaf: str
    start: int
    stop: int
    index: np.ndarray[Any, np.dtype[np.int64]] | None = None
    period: int = 1
    transposed: tuple[int, int] | None = None
    columns: tuple[int, int] = (0, 1)

    @property
    def is_plain(self) -> bool:
        """Whether the rows are the source's, whole and in order."""
        return self.index is None and self.transposed is None and self.columns == (0, 1)


@dataclass(frozen=True, slots=True)
class TensorMap:
    """One target tensor: ``sources`` concatenated along rows, then ``function`` of each value, times ``factor``, plus ``shift``.

    ``target`` is the base name without leaf, ``shape`` the logical one: (N, K), (E, N, K) or (K,). ``kind`` is one of ``linear``,
    ``experts``, ``embedding``, ``output``, ``norm``, ``router``, ``positions``, ``bias``, ``rope``, ``conv``, ``conv1d`` (inputs
    as rows). ``constant``: the float32 values of a computed tensor, which has no sources. ``weave``: sources come in pairs of equal
    size whose ``rows``, or ``columns``, take turns, or that stand ``beside`` each other. ``function``: empty, or a word of ``FUNCTIONS``.
    ``floats``: the same tensor as it stands where it is floats, if it then has another name, or inputs as rows.
    """

    target: str
    leaf: str
    shape: Shape
    sources: tuple[SourceRows, ...]
    shift: float = 0.0
    kind: str = "linear"
    constant: np.ndarray[Any, np.dtype[np.float32]] | None = None
    weave: str = ""
    factor: float = 1.0
    function: str = ""
    floats: TensorMap | None = None

    @property
    def name(self) -> str:
        """The full tensor name, ``target.leaf``; the leaf alone where the name has no dot."""
        return f"{self.target}.{self.leaf}" if self.target else self.leaf

    @property
    def altered(self) -> str:
        """What is done to every value, in words; empty for nothing."""
        words = (
            f"taking {self.function}" if self.function else "",
            f"multiplying by {self.factor:g}" if self.factor != 1.0 else "",
            f"adding {self.shift:g}" if self.shift else "",
        )
        return " and ".join(word for word in words if word)

    def alter(self, values: Any) -> Any:
        """The values of the target by those of the sources: a torch tensor in its own dtype, the same object where nothing is done.

        Raises ``BadFile('tensor-value')`` where a function has no value.
        """
        made = _apply(self.function, values, self.name) if self.function else values
        times = made * self.factor if self.factor != 1.0 else made
        return times + self.shift if self.shift else times

    @property
    def rows(self) -> int:
        """Rows of the flattened target."""
        total = sum(source.stop - source.start for source in self.sources)
        return total // 2 if self.weave in ("columns", "beside") else total


def _apply(function: str, values: Any, name: str) -> Any:
    """A function of floats, computed in float64 and rounded once."""
    import torch

    wide = values.to(torch.float64)
    made = -torch.exp(wide) if function == "-exp(x)" else torch.log(-wide)
    if not bool(torch.isfinite(made).all()):
        raise BadFile("tensor-value", f"{function} of its values is not finite", tensor=name, hint="fetch the file again")
    return made.to(values.dtype)


@dataclass(frozen=True, slots=True)
class Mapped:
    """All target tensors in a fixed order, and every source tensor (or config field, as ``config:NAME``) left out, with the reason."""

    tensors: tuple[TensorMap, ...]
    dropped: dict[str, str] = field(default_factory=dict)
