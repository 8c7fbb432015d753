"""``qconvert``: the group of commands, the ``X-to-Y`` names out of the registry, and how an error becomes an exit code.

Exit codes: 0 ok · 1 internal · 2 usage · 3 verify mismatch · 4 output or disk · 5 bad or unsafe input · 6 unsupported ·
7 would lose · 8 remote · 130 interrupted · 141 the reader of a pipe went away.
Starting up imports neither torch nor numpy; commands import what they need.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from converters import (
    commands_convert,
    commands_gguf,
    commands_hub,
    commands_imatrix,
    commands_lint,
    commands_lora,
    commands_run,
    commands_shell,
    commands_show,
    completion,
)
from converters.foreign import escaped
from converters.output import Output, spoken
from converters.usage import said
from qformats import registry
from qformats.errors import QFormatError, UsageError, did_you_mean

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["Commands", "main", "qconvert"]

INTERRUPTED = 130
LISTED_PAIRS = ("awq-to-gguf", "gptq-to-gguf", "gguf-to-gptq", "gguf-to-awq", "gguf-to-hf")
COMMANDS: dict[str, click.Command] = {
    "inspect": commands_show.inspect,
    "plan": commands_convert.plan,
    "convert": commands_convert.convert,
    "quantize": commands_convert.quantize,
    "dequantize": commands_convert.dequantize,
    "verify": commands_convert.verify,
    "imatrix": commands_imatrix.imatrix,
    "run": commands_run.run,
    "perplexity": commands_run.perplexity,
    "compare": commands_run.compare,
    "pull": commands_hub.pull,
    "push": commands_hub.push,
    "split": commands_gguf.split,
    "merge": commands_gguf.merge,
    "edit": commands_gguf.edit,
    "lint": commands_lint.lint,
    "repair": commands_lint.repair,
    "formats": commands_show.formats,
    "lora-to-gguf": commands_lora.lora_to_gguf,
    "gguf-to-lora": commands_lora.gguf_to_lora,
    "doctor": commands_shell.doctor,
    "completion": commands_shell.completion,
}


class Commands(click.Group):
    """The command table plus every ``X-to-Y`` that the registry holds; turns errors into one message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands that ``--help`` names."""
        return [*COMMANDS, *LISTED_PAIRS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by name; ``X-to-Y`` names are made when asked for."""
        found = COMMANDS.get(cmd_name)
        if found is None:
            source, _, target = cmd_name.partition("-to-")
            names = [next((row.name for row in registry.ROWS if word == row.name or word in row.aliases), "") for word in (source, target)]
            found = commands_convert.pair(*names) if "-to-".join(names) in registry_pairs() else None
        if found is not None and found.epilog:
            found.epilog = _in_lines(found.epilog)
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one was probably meant."""
        if not (args[0].startswith("-") or ctx.resilient_parsing) and self.get_command(ctx, args[0]) is None:
            known = [*COMMANDS, *registry_pairs()]
            hint = did_you_mean(args[0], known).rstrip() or "see qconvert --help"
            raise UsageError("unknown-command", f"there is no command {args[0]!r}", hint=hint)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        """Commands and options that begin like ``incomplete``; every ``X-to-Y`` once something is typed."""
        from click.shell_completion import CompletionItem

        pairs = (name for name in registry_pairs() if incomplete and name not in LISTED_PAIRS and name.startswith(incomplete))
        return [*super().shell_complete(ctx, incomplete), *(CompletionItem(name) for name in pairs)]

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run; ends in ``SystemExit`` with the code of the table above, like any click command."""
        words = list(sys.argv[1:] if args is None else args)
        flags = words[: words.index("--")] if "--" in words else words
        extra["standalone_mode"] = False
        if completion.VARIABLE in os.environ:
            completion.register()
        output = Output(as_json="--json" in flags, quiet="--quiet" in flags or "-q" in flags)
        try:
            with escaped(output):
                found = super().main(words, *rest, **extra)
        except Exception as error:
            _stop(error, output, "--traceback" in flags)
        sys.exit(found if isinstance(found, int) else 0)


def _in_lines(epilog: str) -> str:
    """``Example(s): this · that`` as a block with a line for each, which ``--help`` does not fold."""
    _, found, text = epilog.partition("Examples: " if epilog.startswith("Examples: ") else "Example: ")
    return "\n".join(("\b", "Examples:", *(f"  {line.strip()}" for line in text.split(" · ")))) if found else epilog


def _stop(error: Exception, output: Output, show_traceback: bool) -> NoReturn:
    if isinstance(error, click.Abort):
        hint = "; ".join(getattr(error.__cause__, "__notes__", ())) or None
        output.error(_Interrupted("interrupted", "interrupted; nothing half-written is left under the name of the output", hint=hint))
        sys.exit(INTERRUPTED)
    if isinstance(error, click.ClickException):
        sys.exit(_usage(error, output))
    if not isinstance(error, QFormatError):
        if show_traceback:
            raise error
        hint = "this is a defect: run again with --traceback and report it"
        error = QFormatError("internal", f"{type(error).__name__}: {error}", hint=hint)
    output.error(error)
    sys.exit(error.exit_code)


def _usage(error: click.ClickException, output: Output) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    found = said(error)
    output.error(found)
    return found.exit_code


class _Interrupted(QFormatError):
    exit_code = INTERRUPTED


def registry_pairs() -> list[str]:
    """Every ``X-to-Y`` command name."""
    return [f"{a.name}-to-{b.name}" for a in registry.ROWS if a.reads for b in registry.ROWS if b.writes and a.name != b.name]


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        import qformats

        click.echo(f"qconvert {qformats.version}")
        ctx.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_in_lines(
        "Examples: qconvert inspect llama.gguf · qconvert awq-to-gguf llama-awq/ llama.gguf · qconvert verify llama-awq/ llama.gguf"
    ),
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version and exit.")
def qconvert() -> None:
    """Convert quantized model checkpoints without losing a bit, or say exactly what is lost.

    Every X-to-Y of `qconvert formats` is a command too.
    """


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """``sys.excepthook`` for ``--traceback``: what a message holds of a file is escaped there too."""
    import traceback

    click.echo(spoken("".join(traceback.format_exception(kind, error, trace))), err=True, nl=False)


def main() -> None:
    """The console script."""
    sys.excepthook = _show_traceback
    signal.signal(signal.SIGTERM, _interrupt)
    qconvert(prog_name="qconvert")


if __name__ == "__main__":
    main()
