"""Running models: the only room that imports transformers. ``qformats.runtime.take_over`` makes plain ``from_pretrained`` use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qformats.runtime.registries import take_over

__all__ = ["take_over"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qformats.runtime.registries import take_over as found

    return found
