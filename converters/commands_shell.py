"""The commands about this installation: ``doctor`` and ``completion``."""

from __future__ import annotations

import click

from converters import completion as completing
from converters.flags import output_flags, output_of

__all__ = ["completion", "doctor"]

BROKEN = 6


@click.command(short_help="Check this installation.", epilog="Examples: qconvert doctor · qconvert doctor --json")
@output_flags
def doctor(as_json: bool, quiet: bool) -> None:
    """Show versions, processor, GPU, kernels, caches and optional packages, and what would be slow here and why.

    Ends with 6 where something is broken that conversions need.
    """
    from converters.doctor import examine, lines

    output = output_of(as_json, quiet)
    with output.working("looking"):
        found = examine()
    exit_code = BROKEN if found["broken"] else 0
    output.result({**found, "exit_code": exit_code}, lambda: lines(found))
    if exit_code:
        raise click.exceptions.Exit(exit_code)


@click.command(
    short_help="Print a shell's completion script.",
    epilog="Examples: qconvert completion bash >> ~/.bashrc · qconvert completion fish > ~/.config/fish/completions/qconvert.fish",
)
@click.argument("shell", type=click.Choice(completing.SHELLS))
@output_flags
@click.pass_context
def completion(ctx: click.Context, shell: str, as_json: bool, quiet: bool) -> None:
    """Print the script by which SHELL completes commands, X-to-Y names, options, targets, types and paths.

    Into ~/.bashrc or ~/.zshrc goes: eval "$(qconvert completion bash)", or zsh; fish takes the script as the file
    ~/.config/fish/completions/qconvert.fish.
    """
    text = completing.script(shell, ctx.find_root().command)
    output_of(as_json, quiet).result({"version": 1, "shell": shell, "script": text}, text.splitlines)
