"""How every loop is compiled: serial, without the GIL, cached on disk where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

__all__ = ["compiled"]

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """``njit``, cached on disk where a directory can be written and quietly uncached where not. No fastmath, no check of divisions."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        made: F = njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no directory for its cache
        made = njit(**options)(function)
    return made
