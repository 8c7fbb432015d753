"""Completion in shells: which words may follow, and the scripts that ask for them. click's protocol, made whole for ``FORMAT:TYPE``.

bash cuts words at ``:`` and ``=``, so the script hands over the line itself and takes only what follows the last cut; the variables of
click's own script work too. zsh and fish use click's scripts. Nothing here imports more than click and the registry.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class, split_arg_string

from qformats import registry
from qformats.errors import UsageError

__all__ = ["SHELLS", "VARIABLE", "Words", "gguf_types", "register", "script", "target_words"]

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_QCONVERT_COMPLETE"
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' completion response
    response=$(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete "$1")
    COMPREPLY=()
    for completion in $response; do
        case ${completion%%%%,*} in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${completion#*,}") ;;
        esac
    done
    [[ ${COMPREPLY[0]-} != *= ]] || compopt -o nospace
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class Words(click.ParamType[Any]):
    """A word as it is, with the words that may stand for ``incomplete`` in a shell. ``name`` is shown in messages."""

    def __init__(self, name: str, words: Callable[[str], Iterable[str]]) -> None:
        self.name = name
        self._words = words

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        return [CompletionItem(word) for word in self._words(incomplete) if word.startswith(incomplete)]


def target_words(incomplete: str) -> list[str]:
    """Targets that begin like ``incomplete``: formats, then their types, then their options.

    >>> target_words("awq"), target_words("awq:int4,gr")
    (['awq', 'awq:int4'], ['awq:int4,group='])
    """
    head, comma, rest = incomplete.rpartition(",")
    if comma:
        row = _row(head.partition(",")[0].partition(":")[0])
        return [] if row is None else [f"{head},{word}=" for word in row.options if word.startswith(rest)]
    row = _row(incomplete.partition(":")[0])
    if row is None:
        return [found.name for found in registry.ROWS if found.writes and found.name.startswith(incomplete.lower())]
    name = incomplete.partition(":")[0]
    longer = [found.name for found in registry.ROWS if found.writes and found.name.startswith(name) and found.name != name]
    found = [name, *(f"{name}:{kind}" for kind in dict.fromkeys((*row.types, *row.mixes)))]
    return [word for word in (*found, *longer) if word.startswith(incomplete)]


def gguf_types(incomplete: str) -> list[str]:
    """Types of single tensors in a GGUF; after ``REGEX=`` with that before them."""
    pattern, equals, _ = incomplete.rpartition("=")
    return [f"{pattern}{equals}{kind}" for kind in registry.row("gguf").types]


def _row(name: str) -> registry.Row | None:
    try:
        found = registry.row(name)
    except UsageError:
        return None
    return found if found.writes else None


class _Bash(BashComplete):
    """Words out of the line itself, answers without what stands before the last ``:`` or ``=`` at which bash cuts."""

    source_template = _BASH
    _cut = ""

    def source(self) -> str:
        return self.source_template % self.source_vars()

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ.get("COMP_LINE")
        if line is None:
            return super().get_completion_args()
        words = split_arg_string(line)
        incomplete = "" if not words or line[-1:].isspace() else words.pop()
        value = incomplete.partition("=")[2] if incomplete.startswith("--") and "=" in incomplete else incomplete
        breaks = os.environ.get("COMP_WORDBREAKS", ":=")
        self._cut = value[: max((value.rfind(c) + 1 for c in ":=" if c in breaks), default=0)]
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem[str]) -> str:
        return f"{item.type},{item.value.removeprefix(self._cut)}"


def register() -> None:
    """Make bash's answers ours."""
    add_completion_class(_Bash, "bash")


def script(shell: str, command: click.Command) -> str:
    """The script that ``shell`` reads at its start to complete ``command``'s words."""
    register()
    found = get_completion_class(shell)
    assert found is not None
    return found(command, {}, "qconvert", VARIABLE).source()
