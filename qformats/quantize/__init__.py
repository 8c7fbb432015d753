"""New codes from floats: the only place in the library that rounds weights.

Map: each family of ggml types is one module (``ggml`` the 32-weight blocks, ``kquants`` the super-blocks with searches in ``ksearch``,
``iquants`` those with codebooks, ``tables`` four-bit tables, ``ternary`` one and two bits) whose bytes equal llama.cpp's; ``floats`` rounds
to FP8, FP6 and FP4 under scales of any form; ``books`` makes the bytes of bitsandbytes; ``absmean`` is BitNet's rule; ``affine`` is min-max
round-to-nearest for integer types. ``rtn`` picks one by the storage. All refuse NaN and infinities. ``imatrix`` reads and writes files of
importances.

Searches lower the error of what a family made: ``best`` that of ggml's types with one scale a block, ``affine_search`` that of any integer
type under one plain scale; ``half_quadratic`` is HQQ's solver for those of the latter with a free origin; ``floats`` and ``books`` search
by themselves.
A family module has

- ``TYPES``: the storage types it rounds to (lower case); ``WEIGHTED``: those of them that use importances; ``NEEDY``: those of them
  that cannot do without;
- ``quantize(weights, storage, importance)``;
- ``fits(storage)`` where it knows its storages by their form, not by name. ``weights`` are then whole groups of rows
  (``Storage.row_unit``), or the whole tensor;
- ``SEARCHES_ITSELF`` where its ``quantize`` takes the search as a fourth argument, and importances with the search ``best``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from qformats.errors import Unsupported, UsageError
from qformats.quantize import (
    absmean,
    affine,
    affine_search,
    best,
    books,
    floats,
    ggml,
    half_quadratic,
    hqq,
    iquants,
    kquants,
    quanto,
    tables,
    ternary,
)

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.scheme import Storage
    from qformats.tensor import QuantizedTensor

__all__ = ["SEARCHES", "can_quantize", "check_search", "improves", "needs_importance", "rtn", "uses_importance"]


class Family(Protocol):
    """What a family module has."""

    TYPES: frozenset[str]
    WEIGHTED: frozenset[str]
    NEEDY: frozenset[str]

    def quantize(self, weights: Tensor, storage: Storage, importance: Tensor | None = None) -> QuantizedTensor: ...


# each family's own, ggml's the bytes of llama.cpp; at most its error in every group, and less where ``improves``; HQQ's solver
SEARCHES = ("reference", "best", "hqq")
FAMILIES: tuple[Family, ...] = (floats, ggml, kquants, iquants, tables, ternary, books, hqq, quanto, absmean)


def _family(storage: Storage) -> Family | None:
    """The first family that rounds to ``storage``: by its type's name, or by the form of the storage where it has a ``fits`` of its own."""
    for family in FAMILIES:
        fits = getattr(family, "fits", None)
        if storage.type in family.TYPES if fits is None else fits(storage):
            return family
    return None


def _searches(storage: Storage) -> bool:
    return bool(getattr(_family(storage), "SEARCHES_ITSELF", False))


def can_quantize(storage: Storage) -> bool:
    """Whether ``rtn`` knows a quantizer for ``storage``."""
    return _family(storage) is not None or affine.fits(storage)


def check_search(search: str) -> None:
    """``UsageError('search')`` for a word that is none of ``SEARCHES``."""
    if search not in SEARCHES:
        raise UsageError("search", f"there is no search called {search!r}", hint=f"choose one of {', '.join(SEARCHES)}")


def improves(storage: Storage, search: str) -> bool:
    """Whether ``search`` makes other codes of ``storage`` than the reference.

    ``UsageError('search')`` for an unknown word, and for ``hqq`` where the storage has no origin to move.
    """
    check_search(search)
    if search == "hqq" and not half_quadratic.fits(storage):
        message = f"the half-quadratic search moves zero points or offsets, and {storage.type} has none of its own for each group"
        raise UsageError("search", message, hint="choose best, or an asymmetric type, such as gptq:int4,asym or hqq:int4")
    return search == "hqq" or (search == "best" and (_searches(storage) or _blocks(storage) or affine_search.fits(storage)))


def _blocks(storage: Storage) -> bool:
    """Whether ``best.improved`` is for what the storage's family makes."""
    return storage.type in best.TYPES and _family(storage) in (ggml, tables, ternary)


def uses_importance(storage: Storage, search: str = "reference") -> bool:
    """Whether importances change what ``rtn`` makes of ``storage``."""
    family = _family(storage)
    return (family is not None and storage.type in family.WEIGHTED) or improves(storage, search)


def needs_importance(storage: Storage) -> bool:
    """Whether ``rtn`` refuses ``storage`` without importances."""
    family = _family(storage)
    return family is not None and storage.type in family.NEEDY


def rtn(weights: Tensor, storage: Storage, importance: Tensor | None = None, search: str = "reference") -> QuantizedTensor:
    """Round ``weights`` (float, (N, K)) in ``storage``'s own form; ``importance`` (float, (K,)) weighs the errors of each column.

    Each row and group goes by itself, so any row range gives the same codes.
    For the types of ggml the written bytes equal llama.cpp's; for affine integer types see ``affine.quantize``. With the ``search``
    ``best`` no group's weighted squared error is higher than that, and most have less; types that it does not improve (``improves``:
    those with two levels of scales) come out as ever. ``hqq`` moves zero points or offsets by HQQ's solver (``half_quadratic``).
    ``UsageError('search')`` for another word, and for ``hqq`` where there is nothing to move.
    Raises ``BadFile('not-finite')``, ``WouldLose('f16-overflow')`` where a scale exceeds fp16, ``UsageError('importance')`` for
    importances of another shape, ``Unsupported`` with ``no-quantizer`` for other types, with ``no-importance`` where importances
    would be ignored (``uses_importance``), ``importance-needed`` where they are missing (``needs_importance``) and with
    ``k-multiple`` for rows that are not whole blocks.

    >>> import torch
    >>> from qformats.formats.ggml.legacy import LEGACY
    >>> t = rtn(torch.linspace(-1, 1, 32).reshape(1, 32), LEGACY["Q8_0"].storage)
    >>> t.codes[0, 0].item(), t.codes[0, -1].item()
    (-127, 127)
    """
    family, improve = _family(storage), improves(storage, search)
    if not can_quantize(storage):
        known = ", ".join(sorted(name for family in FAMILIES for name in family.TYPES))
        raise Unsupported("no-quantizer", f"there is no quantizer for {storage.type}", hint=f"choose one of {known}, or an integer type")
    if weights.shape[-1] % storage.k_multiple:
        raise Unsupported("k-multiple", f"rows of {weights.shape[-1]} weights are not a multiple of {storage.k_multiple}")
    if importance is not None and not uses_importance(storage, search):
        known = ", ".join(sorted(name for family in FAMILIES for name in family.WEIGHTED))
        raise Unsupported(
            "no-importance", f"{storage.type} is rounded without importances", hint=f"leave them out, or choose one of {known}"
        )
    if importance is None and needs_importance(storage):
        hint = "give an importance matrix (`qconvert imatrix` computes one), or choose a larger type"
        raise Unsupported("importance-needed", f"{storage.type} cannot be made without an importance matrix", hint=hint)
    made: QuantizedTensor
    own = importance if family is not None and storage.type in family.WEIGHTED else None
    if family is not None and _searches(storage):
        made = family.quantize(weights, storage, importance, search if search == "best" else "reference")  # type: ignore[call-arg]
        return made
    made = affine.quantize(weights, storage) if family is None else family.quantize(weights, storage, own)
    if search == "hqq":
        return made if family is hqq else half_quadratic.solved(weights, made, storage, importance)
    if not improve:
        return made
    lower = best.improved if _blocks(storage) else affine_search.improved
    return lower(weights, made, storage, importance)
