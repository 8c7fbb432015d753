"""New codes from floats: the only place in the library that rounds weights.

Map: each family of ggml types is one module (``ggml`` the 32-weight blocks, ``kquants`` the super-blocks with searches in ``ksearch``,
``iquants`` those with codebooks, ``tables`` four-bit tables, ``ternary`` one and two bits) whose bytes equal llama.cpp's; ``floats`` rounds
to FP8, FP6 and FP4 under scales of any form; ``books`` makes the bytes of bitsandbytes; ``absmean`` is BitNet's rule; ``affine`` is min-max
round-to-nearest for integer types. ``rtn`` picks one by the storage. All refuse NaN and infinities. ``best`` starts from what a family
makes of a type with one scale a block and lowers its error; ``imatrix`` reads and writes files of importances.
A family module has

- ``TYPES``: the storage types it rounds to (lower case); ``WEIGHTED``: those of them that use importances; ``NEEDY``: those of them
  that cannot do without;
- ``quantize(weights, storage, importance)``;
- ``fits(storage)`` where it knows its storages by their form, not by name. ``weights`` are then whole groups of rows
  (``Storage.row_unit``), or the whole tensor;
- ``SEARCHES_ITSELF`` where its ``quantize`` takes the search as a fourth argument, and importances with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from qformats.errors import Unsupported, UsageError
from qformats.quantize import absmean, affine, best, books, floats, ggml, hqq, iquants, kquants, quanto, tables, ternary

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


SEARCHES = ("reference", "best")  # the bytes of llama.cpp; at most their error, and less where ``improves``
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
    """Whether ``search`` makes other codes of ``storage`` than the reference; ``UsageError('search')`` for an unknown word."""
    check_search(search)
    return search == "best" and (_searches(storage) or storage.type in best.TYPES)


def uses_importance(storage: Storage, search: str = "reference") -> bool:
    """Whether importances change what ``rtn`` makes of ``storage``."""
    family = _family(storage)
    weighted = family is not None and not _searches(storage) and storage.type in family.WEIGHTED
    return family is not None and (weighted or improves(storage, search))


def needs_importance(storage: Storage) -> bool:
    """Whether ``rtn`` refuses ``storage`` without importances."""
    family = _family(storage)
    return family is not None and not _searches(storage) and storage.type in family.NEEDY


def rtn(weights: Tensor, storage: Storage, importance: Tensor | None = None, search: str = "reference") -> QuantizedTensor:
    """Round ``weights`` (float, (N, K)) in ``storage``'s own form; ``importance`` (float, (K,)) weighs the errors of each column.

    Each row and group goes by itself, so any row range gives the same codes.
    For the types of ggml the written bytes equal llama.cpp's; for affine integer types see ``affine.quantize``. With the ``search``
    ``best`` no block's weighted squared error is higher than that, and most have less (``qformats.quantize.best``); types that it does
    not improve (``improves``) come out as ever. ``UsageError('search')`` for another word.
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
    if family is None:
        return affine.quantize(weights, storage)
    if _searches(storage):
        searched: QuantizedTensor = family.quantize(weights, storage, importance, search)  # type: ignore[call-arg]
        return searched
    made = family.quantize(weights, storage, importance if storage.type in family.WEIGHTED else None)
    return best.improved(weights, made, storage, importance) if improve else made
