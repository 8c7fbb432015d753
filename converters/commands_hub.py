"""The commands that talk to the hub: ``pull`` and ``push``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from converters.flags import output_flags, output_of
from converters.output import count, size, table

__all__ = ["pull"]

_PATH = click.Path(path_type=Path)
_PATTERN = {"metavar": "PATTERN", "multiple": True}


@click.command(short_help="Fetch a repository of the hub.", epilog='Example: qconvert pull org/model-GGUF llama/ --include "*Q4_K_M*"')
@click.argument("repo", metavar="REPO[@REV]")
@click.argument("dst", type=_PATH, required=False)
@click.option("--include", help="Only files that match (DIR/ is all in it); may be given again.", **_PATTERN)  # type: ignore[arg-type]
@click.option("--exclude", help="No files that match; may be given again.", **_PATTERN)  # type: ignore[arg-type]
@click.option("--list", "listing", is_flag=True, help="Only list the files and their sizes.")
@output_flags
def pull(
    repo: str, dst: Path | None, include: tuple[str, ...], exclude: tuple[str, ...], listing: bool, as_json: bool, quiet: bool
) -> None:
    """Fetch REPO into DST, or into the cache that transformers uses. The same command again goes on after a break.

    Every large file is checked against the SHA-256 that the hub lists. HF_HUB_OFFLINE=1 takes everything out of the cache.
    """
    from qformats.hub import client
    from qformats.hub import pull as pulling
    from qformats.hub.names import parse_address

    output, address = output_of(as_json, quiet), parse_address(repo)
    if listing:
        found = client.snapshot(address)
        names = pulling.chosen(found.files, include, exclude)
        data: dict[str, Any] = {"version": 1, "repo": found.repo, "commit": found.commit}
        sizes = {name: found.files[name].size for name in names}
        output.result({**data, "files": sizes}, lambda: table(("file", "size"), [(n, size(b)) for n, b in sizes.items()], right=(1,)))
        return
    with output.progress(address.repo) as progress:
        folder, names = pulling.pull(address, dst, include=include, exclude=exclude, progress=progress)

    def lines() -> Iterator[str]:
        yield f"{folder}: {count(len(names), 'file')}"

    output.result({"version": 1, "repo": address.repo, "path": str(folder), "files": names}, lines)
