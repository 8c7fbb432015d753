"""The commands that only look: ``inspect`` and ``formats``. Neither imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from converters.flags import output_flags, output_of, source_flags
from converters.output import table
from qformats import registry

__all__ = ["formats", "inspect"]


@click.command(
    short_help="Show formats, types and sizes of a checkpoint.",
    epilog="Examples: qconvert inspect llama.gguf --tensors · qconvert inspect hf://org/model",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@source_flags
@output_flags
def inspect(path: Path, tensors: bool, allow_pickle: bool, as_json: bool, quiet: bool) -> None:
    """Show formats, types, sizes and bits per weight of PATH (a file, a shard or a directory)."""
    from converters.inspect import inspect_path

    found = inspect_path(path, allow_pickle)
    output_of(as_json, quiet).result(found.to_json(tensors=tensors), lambda: found.to_text(tensors=tensors))


@click.command(short_help="List the formats and every X-to-Y.", epilog="Example: qconvert formats --json")
@output_flags
def formats(as_json: bool, quiet: bool) -> None:
    """List the formats, their types and options, and every X-to-Y command."""
    from converters.matrix import pairs

    commands = [f"{a}-to-{b}" for a, b in pairs()]
    data = {"formats": [asdict(row) for row in registry.ROWS], "commands": commands}

    def lines() -> Iterator[str]:
        rows = [(r.name, r.container, _can(r), ", ".join(r.types), ", ".join(r.options), r.title) for r in registry.ROWS]
        yield from table(("format", "stored in", "can", "types", "options", "of"), rows)
        yield ""
        yield "commands: " + ", ".join(commands)

    output_of(as_json, quiet).result(data, lines)


def _can(row: registry.Row) -> str:
    return " ".join(word for word, yes in (("read", row.reads), ("write", row.writes)) if yes)
