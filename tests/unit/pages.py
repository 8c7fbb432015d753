"""Runs the code blocks of a documentation page from top to bottom, and holds what they print against the blocks that show it.

``sh``: lines of ``qconvert`` (run in this process; ``> FILE`` takes what it prints), ``export NAME=VALUE``, ``unset NAME`` and ``ls``;
``# exit 3`` at the end of a line is the exit code it must have, 0 without. ``python``: all blocks of a page share their names; one that
begins with ``# in PATH`` is a file that the page adds, and is handed to ``place``. ``text``: what the block before it prints; ``…`` stands
for any text, alone on a line for any lines, and seconds are not compared. Blocks of other languages fail.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from click.testing import CliRunner

from converters.cli import qconvert

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_EXIT = re.compile(r"#.*\bexit (\d+)")
_SECONDS = re.compile(r"\bin [\d.]+ s\b")


def _nothing(name: str, value: str | None) -> None:
    """Most variables mean nothing to a process that runs already."""


@dataclass
class Page:
    """``export`` is told of variables that are set (or unset: None), ``place`` of files: the path that is written on them, their text."""

    path: Path
    export: Callable[[str, str | None], None] = _nothing
    place: Callable[[str, str], None] | None = None
    names: dict[str, object] = field(default_factory=lambda: {"__name__": "page"})

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self) -> list[tuple[int, str, str]]:
        """(line, language, text) of every block; there are no fences but those of whole blocks."""
        assert 2 * len(_BLOCK.findall(self.text)) == self.text.count("```"), self.path.name
        return [(self.text[: found.start()].count("\n") + 2, found[1], found[2]) for found in _BLOCK.finditer(self.text)]

    def run(self) -> int:
        """Every block in the current directory; how many were run."""
        said, count = "", 0
        for line, language, text in self.blocks():
            where = f"{self.path.name}:{line}"
            if language == "text":
                expected = _pattern(text)
                assert re.fullmatch(expected, _SECONDS.sub("in … s", said.strip("\n"))), f"{where} shows\n{text}\nbut it printed\n{said}"
                continue
            assert language in ("sh", "python"), f"{where}: nothing runs a block of {language!r}"
            said, count = (self._shell(text, where) if language == "sh" else self._python(text, where)), count + 1
        return count

    def _shell(self, text: str, where: str) -> str:
        said = ""
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if words[0] in ("export", "unset"):
                name, _, value = words[1].partition("=")
                self.export(name, value if words[0] == "export" else None)
                continue
            if words[0] == "ls":
                said += "".join(f"{name}\n" for name in sorted(os.listdir(words[1] if len(words) > 1 else ".")))
                continue
            assert words[0] == "qconvert", f"{where}: {words[0]} is no command that is run here"
            wanted = _EXIT.search(line)
            words, into = (words[:-2], Path(words[-1])) if words[-2] == ">" else (words, None)
            run = CliRunner().invoke(qconvert, words[1:])
            assert run.exit_code == int(wanted[1] if wanted else 0), f"{where}: {line}\n{run.output}"
            if into is not None:
                into.write_text(run.stdout)
            said += run.output if into is None else run.stderr
        return said

    def _python(self, text: str, where: str) -> str:
        if text.startswith("# in "):
            assert self.place is not None, f"{where}: no place for files"
            self.place(text.splitlines()[0].removeprefix("# in "), text)
            return ""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * (int(where.rpartition(":")[2]) - 1) + text, str(self.path), "exec"), self.names)
        return out.getvalue()


def _pattern(text: str) -> str:
    lines = [_SECONDS.sub("in … s", line).rstrip() for line in text.strip("\n").splitlines()]
    parts = [r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*?") + r"[ ]*\n" for line in lines]
    return "".join(parts).removesuffix(r"\n") if lines[-1] != "…" else "".join(parts[:-1]) + r"[\s\S]*"
