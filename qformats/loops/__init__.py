"""Compiled loops: the only place that imports numba. Each names the torch definition that it must equal, and everything works without."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

__all__ = ["find"]


@cache
def find(name: str) -> Any:
    """The module ``qformats.loops.NAME``, or None where numba cannot be imported."""
    try:
        return importlib.import_module(f"qformats.loops.{name}")
    except ImportError:
        return None
