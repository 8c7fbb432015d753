"""How every loop is compiled: serial, without the GIL, cached on disk where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba import float32, intp, njit
from numba.core.ccallback import CFunc

__all__ = ["compiled", "inlined", "pointed"]

F = TypeVar("F", bound=Callable[..., Any])


@cache
def _stamp() -> tuple[tuple[str, int, int], ...]:
    """What tells one state of this folder's sources from another."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        status = path.stat()
        found.append((path.name, status.st_mtime_ns, status.st_size))
    return tuple(found)


def compiled(function: F) -> F:
    """``njit``, cached on disk where a directory can be written and quietly uncached where not. No fastmath, no check of divisions.

    numba takes a cached loop for current as long as its own file is unchanged; here it must be all files of this folder, because a
    loop is compiled together with what it calls in others.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        made: F = njit(cache=True, **options)(function)
        made._cache._cache_file._source_stamp = _stamp()  # type: ignore[attr-defined]
    except (RuntimeError, AttributeError, OSError):  # no directory for the cache, or a numba whose caches are made another way
        made = njit(**options)(function)
    return made


def inlined(function: F) -> F:
    """What ``compiled`` makes, for a function that is always a part of the loops that call it: its vectors then stay in registers."""
    made: F = njit(nogil=True, error_model="numpy", forceinline=True)(function)
    return made


def pointed(function: Callable[[Any], Any]) -> Any:
    """A function of an address that returns a float32, compiled now, for ``call`` of ``qformats.loops.lanes``; its ``address`` is wanted.

    What is compiled for one kind of weights alone is small so, and the loops that are the same for all are compiled once.
    """
    signature, options = ((intp,), float32), {"error_model": "numpy"}
    made = CFunc(function, signature, {}, options)
    try:
        made.enable_caching()
        made._cache._cache_file._source_stamp = _stamp()  # type: ignore[attr-defined,unused-ignore]
    except (RuntimeError, AttributeError, OSError):
        made = CFunc(function, signature, {}, options)
    made.compile()
    return made
