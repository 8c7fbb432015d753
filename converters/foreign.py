"""What other packages say while they work, in log records and warnings: escaped like everything, and nothing with ``--quiet``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from converters.output import Output, spoken
from qformats.errors import printable

__all__ = ["escaped"]


class _Record(logging.LogRecord):
    """A log record whose words cannot steer a terminal."""

    def getMessage(self) -> str:
        return spoken(super().getMessage())


@contextmanager
def escaped(output: Output) -> Iterator[None]:
    """Records made and warnings given inside are escaped; a warning is one line on standard error (deprecations are not shown)."""

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
    ) -> None:
        if issubclass(category, DeprecationWarning | PendingDeprecationWarning):
            return  # for those who write code, as Python has it
        print(f"warning: {printable(str(message), 2000)}", file=file or sys.stderr)

    factory, disabled = logging.getLogRecordFactory(), logging.root.manager.disable
    logging.setLogRecordFactory(_Record)
    if output.quiet:
        logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            if output.quiet:
                warnings.simplefilter("ignore")
            warnings.showwarning = show
            yield
    finally:
        logging.setLogRecordFactory(factory)
        logging.disable(disabled)
