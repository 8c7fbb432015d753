"""What the command line prints: one ``Output`` decides between human text, JSON and silence. Commands never print directly.

Results go to standard output, everything else (notes, warnings, progress, errors) to standard error. With ``--json`` exactly one
JSON document goes to standard output, errors included. Every text that may come out of a file is escaped on the way. Signs of progress
are for people who watch: none in pipes, on dumb terminals, under ``CI``; without colours where ``NO_COLOR`` is set (rich sees to that).
"""

from __future__ import annotations

import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from qformats.errors import QFormatError, printable

__all__ = ["BROKEN_PIPE", "Output", "ProgressCallback", "count", "size", "spoken", "table"]

BROKEN_PIPE = 141  # what a shell says of a program that SIGPIPE ended
ProgressCallback = Callable[[int, int], None]
_LINE_LIMIT = 4000
# what moves a cursor, colours, rings or turns the direction of writing; joiners, variation selectors and wide spaces are text
_UNSPOKEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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


def spoken(text: str) -> str:
    """A model's words for a terminal: lines and tabs stay, other control characters and changes of direction are escaped.

    >>> spoken("a\\x1b[31m\\tb\\u202e")
    'a\\\\x1b[31m\\tb\\\\u202e'
    """
    return _UNSPOKEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _columns(text: str) -> int:
    """How wide a terminal shows printable ``text``: East Asian characters take two columns, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a plain text table; columns in ``right`` are aligned to the right.

    >>> table(("kind", "n"), [("exact", 12)], right=(1,))
    ['kind    n', 'exact  12']
    """
    cells = [[printable(str(cell)) for cell in row] for row in (head, *rows)]
    widths = [max(_columns(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        gaps = [" " * (w - _columns(c)) for c, w in zip(row, widths)]
        lines.append("  ".join(gap + c if i in right else c + gap for i, (c, gap) in enumerate(zip(row, gaps))).rstrip())
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
        """A piece of a model's words as they come, ``spoken``; nothing with ``--json``."""
        if not self.as_json:
            _write(spoken(text), end="")

    def note(self, text: str) -> None:
        """Something the user may want to know now; on standard error, never with ``--json`` or ``--quiet``."""
        if not (self.as_json or self.quiet):
            _write(printable(text, _LINE_LIMIT), err=True)

    def error(self, error: QFormatError) -> None:
        """The one message of a failed command (also with ``--quiet``)."""
        if self.as_json:
            _write(json.dumps({"error": error_json(error), "exit_code": error.exit_code}, indent=1, ensure_ascii=True), failed=True)
        else:
            _write(f"qconvert: {printable(str(error), _LINE_LIMIT)}", err=True)

    def _is_watched(self) -> bool:
        plain = os.environ.get("TERM") == "dumb" or os.environ.get("CI", "") not in ("", "0", "false")
        return not (self.as_json or self.quiet or plain) and sys.stderr.isatty()

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


def _write(text: str, *, err: bool = False, end: str = "\n", failed: bool = False) -> None:
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        click.echo(text.encode(encoding, "backslashreplace").decode(encoding) + end, err=err, nl=False)
    except BrokenPipeError:  # the reader went away; what is still said goes nowhere, an error keeps its own exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not (err or failed):
            raise SystemExit(BROKEN_PIPE) from None
