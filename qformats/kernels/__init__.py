"""Products with packed weights: a weight's device layout, its dequantization from there, and the operator that multiplies with it.

``lower`` turns a canonical tensor into planes made for kernels, once, at load; nothing is lost, and ``raised`` gives the tensor back.
``matmul`` is the ``torch.library`` operator over such planes. Which kernel runs is decided in ``qformats.kernels.dispatch``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qformats.kernels.dispatch import embed, matmul
    from qformats.kernels.layout import Layout
    from qformats.kernels.lower import Lowered, lower, raised

__all__ = ["Layout", "Lowered", "embed", "lower", "matmul", "raised"]

_HOMES = {"Layout": "layout", "Lowered": "lower", "embed": "dispatch", "lower": "lower", "matmul": "dispatch", "raised": "lower"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"qformats.kernels.{_HOMES[name]}"), name)
