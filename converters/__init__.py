"""Plan, convert and verify checkpoints: ``converters.convert(src, dst, to="gguf")``. Importing this package imports no torch.

>>> from converters import convert, plan, verify
>>> convert.__name__, plan.__name__, verify.__name__
('convert', 'plan', 'verify')
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.api import convert, plan, verify
    from converters.comparing import compare
    from converters.report import Report

__all__ = ["Report", "compare", "convert", "plan", "verify"]

_HOMES = {
    "compare": "converters.comparing", "convert": "converters.api", "plan": "converters.api", "verify": "converters.api",
    "Report": "converters.report",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """``plan`` and ``verify`` are functions here; the submodules of the same names must not hide them once they are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
