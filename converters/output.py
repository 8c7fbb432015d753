"""What the command line prints: one ``Output`` decides between human text, JSON and silence. Commands never print directly.

Results go to standard output, everything else (notes, warnings, progress, errors) to standard error. With ``--json`` exactly one
JSON document goes to standard output, errors included. Every text that may come out of a file is escaped on the way.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from qformats.errors import QFormatError, printable

__all__ = ["Output", "ProgressCallback", "count", "size", "table"]

ProgressCallback = Callable[[int, int], None]
_LINE_LIMIT = 4000


def size(nbytes: float) -> str:
    """A size in decimal units.

    >>> size(999), size(1_234_567)
    ('999 B', '1.23 MB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 999.5 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError


def count(number: int, noun: str) -> str:
    """A counted noun.

    >>> count(1, "tensor"), count(1200, "tensor")
    ('1 tensor', '1,200 tensors')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a plain text table; columns in ``right`` are aligned to the right.

    >>> table(("kind", "n"), [("exact", 12)], right=(1,))
    ['kind    n', 'exact  12']
    """
    cells = [[printable(str(cell)) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        line = "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
        lines.append(line.rstrip())
    return lines


class Output:
    """Where a command's words go. ``as_json`` and ``quiet`` are the flags of the same name."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def result(self, data: Mapping[str, Any], lines: Callable[[], Iterable[str]]) -> None:
        """The command's outcome: ``data`` with ``--json``, else the ``lines`` (built only when shown)."""
        if self.as_json:
            _write(json.dumps(data, indent=1, ensure_ascii=True, default=str))
        elif not self.quiet:
            for line in lines():
                _write(printable(line, _LINE_LIMIT))

    def stream(self, text: str) -> None:
        """A piece of a model's words as they come: lines and tabs stay, other control characters are escaped; nothing with ``--json``."""
        if not self.as_json:
            pieces = ("\t".join(printable(part, len(part) * 8 + 8) for part in line.split("\t")) for line in text.split("\n"))
            _write("\n".join(pieces), end="")
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """Something the user may want to know now; on standard error, never with ``--json`` or ``--quiet``."""
        if not (self.as_json or self.quiet):
            _write(printable(text, _LINE_LIMIT), err=True)

    def error(self, error: QFormatError) -> None:
        """The one message of a failed command (also with ``--quiet``)."""
        if self.as_json:
            _write(json.dumps({"error": error_json(error), "exit_code": error.exit_code}, indent=1, ensure_ascii=True))
        else:
            _write(f"qconvert: {printable(str(error), _LINE_LIMIT)}", err=True)

    def _is_watched(self) -> bool:
        return not (self.as_json or self.quiet) and sys.stderr.isatty()

    @contextmanager
    def working(self, title: str) -> Iterator[None]:
        """A sign of life on a terminal while something of unknown length runs."""
        if not self._is_watched():
            yield
            return
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(escape(printable(title))):
            yield

    @contextmanager
    def progress(self, title: str) -> Iterator[ProgressCallback | None]:
        """A progress bar with bytes/s and time left on a terminal; None (nothing to call) in pipes, with --json and --quiet."""
        if not self._is_watched():
            yield None
            return
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(escape(printable(title)), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


    @contextmanager
    def steps(self, title: str, unit: str) -> Iterator[ProgressCallback | None]:
        """Like ``progress``, for work that is counted in ``unit`` and not in bytes."""
        if not self._is_watched():
            yield None
            return
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(escape(unit)), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(escape(printable(title)), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def error_json(error: QFormatError) -> dict[str, Any]:
    """An error's fields as JSON data."""
    found: dict[str, Any] = {"code": error.code, "message": error.message, "path": error.path, "tensor": error.tensor, "hint": error.hint}
    if error.offset_bytes is not None:
        found["offset_bytes"] = error.offset_bytes
    return found


def _write(text: str, *, err: bool = False, end: str = "\n") -> None:
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        click.echo(text.encode(encoding, "backslashreplace").decode(encoding) + end, err=err, nl=False)
    except BrokenPipeError:  # the reader went away: the command ends as it would have, unheard
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
