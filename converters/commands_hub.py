"""The commands that talk to the hub: ``pull`` and ``push``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.flags import Size, output_flags, output_of
from converters.output import Output, count, size, table
from qformats.errors import BadFile, QFormatError

__all__ = ["pull", "push", "push_output"]

if TYPE_CHECKING:
    from qformats.hub.push import Pushed

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
    from qformats.hub import pull as pulling
    from qformats.hub.names import parse_address

    output, address = output_of(as_json, quiet), parse_address(repo)
    if listing:
        commit, sizes = pulling.listed(address, include, exclude)
        data: dict[str, Any] = {"version": 1, "repo": address.repo, "commit": commit}
        output.result({**data, "files": sizes}, lambda: table(("file", "size"), [(n, size(b)) for n, b in sizes.items()], right=(1,)))
        return
    with output.progress(address.repo) as progress:
        folder, names = pulling.pull(address, dst, include=include, exclude=exclude, progress=progress)

    def lines() -> Iterator[str]:
        yield f"{folder}: {count(len(names), 'file')}"

    output.result({"version": 1, "repo": address.repo, "path": str(folder), "files": names}, lines)


@click.command(
    short_help="Put a checkpoint into a repository of the hub.",
    epilog="Example: qconvert push llama-q4_k_m.gguf org/Llama-GGUF --base-model org/Llama --private",
)
@click.argument("path", type=_PATH)
@click.argument("repo", metavar="REPO[@BRANCH]")
@click.option("--private/--public", default=None, help="Of a repository that is made (default: the owner's setting).")
@click.option("--revision", metavar="BRANCH", help="The branch to commit to, made if it is missing.")
@click.option("--create-pr", is_flag=True, help="Propose the commit as a pull request.")
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option("--base-model", metavar="REPO", help="What it was made from, where the files do not say.")
@click.option("--report", type=_PATH, metavar="FILE", help="The conversion's report as JSON, for what the card says of exactness.")
@click.option("--max-file-size", "max_nbytes", type=Size(), default="50G", show_default=True, help="A larger GGUF goes up in shards.")
@output_flags
def push(path: Path, repo: str, report: Path | None, max_nbytes: int, as_json: bool, quiet: bool, **wishes: Any) -> None:
    """Put PATH, a GGUF or a directory, into REPO: one commit of the files and the model card, or none.

    Files of other types in REPO stay; the card lists them all. The same command again sends only what is missing.
    """
    output = output_of(as_json, quiet)
    said = None if report is None else _read_report(report)
    made = _push(path, repo, output, said, max_nbytes, wishes)
    output.result(_pushed_json(made), lambda: _pushed_lines(made))


def push_output(path: Path, repo: str, output: Output, report: Mapping[str, Any], private: bool | None) -> dict[str, Any]:
    """Push what a conversion wrote; the outcome as JSON data."""
    try:
        made = _push(path, repo, output, report, 50 * 1000**3, {"private": private})
    except QFormatError:
        output.note(f"{path} is written and stays; it was not pushed: qconvert push {path} {repo}")
        raise
    for line in _pushed_lines(made):
        output.note(line)
    return _pushed_json(made)


def _push(path: Path, repo: str, output: Output, report: Mapping[str, Any] | None, max_nbytes: int, wishes: Mapping[str, Any]) -> Pushed:
    from qformats.hub.push import push_to_hub

    with _in_shards(path, max_nbytes) as what, output.working(f"pushing {path.name}"):
        return push_to_hub(what, repo, report=report, **wishes)


@contextmanager
def _in_shards(path: Path, max_nbytes: int) -> Iterator[Path]:
    """``path``, or the first shard of it where one file is larger than the hub takes; shards live as long as the context."""
    if path.suffix != ".gguf" or not path.is_file() or path.stat().st_size <= max_nbytes:
        yield path
        return
    from converters.gguf_edit import split_gguf

    with tempfile.TemporaryDirectory(prefix=".qconvert-push-", dir=path.parent) as folder:
        yield split_gguf(path, Path(folder) / path.name, max_nbytes=max_nbytes * 9 // 10).paths[0]


def _read_report(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFile("not-found", f"cannot read the report: {error.strerror}", path=path) from None
    except ValueError:
        found = None
    lines = found.get("tensors") if isinstance(found, dict) else None
    if not isinstance(lines, list) or not all(isinstance(line, dict) and "kind" in line for line in lines):
        raise BadFile("report-file", "is not a report", path=path, hint="write it with --report FILE.json")
    assert isinstance(found, dict)
    return found


def _pushed_json(made: Pushed) -> dict[str, Any]:
    data = {"version": 1, "repo": made.repo, "url": made.url, "commit": made.commit, "files": list(made.files)}
    return {**data, "pull_request": made.pull_request}


def _pushed_lines(made: Pushed) -> Iterator[str]:
    yield f"{made.url}: {count(len(made.files), 'file')} in commit {made.commit[:10]}"
    if made.pull_request:
        yield f"pull request {made.pull_request}"
