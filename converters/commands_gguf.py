"""The commands that treat GGUF files as files: ``split merge edit``. They copy tensors unread and need no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.flags import Size, output_flags, output_of
from converters.output import count, size

if TYPE_CHECKING:
    from converters.gguf_edit import Written

__all__ = ["edit", "merge", "split"]

_PATH = click.Path(path_type=Path)
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what exists.")


class Pair(click.ParamType[Any]):
    """``OLD=NEW``."""

    name = "OLD=NEW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return str(value[0]), str(value[1])
        old, equals, new = str(value).partition("=")
        if not equals or not old or not new:
            self.fail(f"{value!r} is not OLD=NEW", param, ctx)
        return old, new


@click.command(short_help="Cut a GGUF into shards.", epilog="Example: qconvert split llama.gguf llama --max-size 2G")
@click.argument("src", type=_PATH)
@click.argument("dst", type=_PATH)
@click.option("--max-size", "max_nbytes", type=Size(), help="Most bytes of tensors in a shard: 2G, 500M (decimal).")
@click.option("--max-tensors", type=click.IntRange(1), metavar="N", help="Most tensors in a shard.")
@click.option("--no-tensor-first", is_flag=True, help="Leave the first shard to the metadata alone.")
@_OVERWRITE
@output_flags
def split(src: Path, dst: Path, as_json: bool, quiet: bool, **limits: Any) -> None:
    """Write SRC as shards DST-00001-of-0000N.gguf, laid out as llama.cpp's gguf-split does."""
    from converters.gguf_edit import split_gguf

    output = output_of(as_json, quiet)
    with output.progress(dst.name) as progress:
        written = split_gguf(src, dst, progress=progress, **limits)
    output.result(_data(written), lambda: _lines(written))


@click.command(short_help="Make one GGUF of shards.", epilog="Example: qconvert merge llama-00001-of-00003.gguf llama.gguf")
@click.argument("shards", type=_PATH, nargs=-1, required=True)
@click.argument("dst", type=_PATH)
@_OVERWRITE
@output_flags
def merge(shards: tuple[Path, ...], dst: Path, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Write SHARDS, all of them or one with the others beside it, as the one file DST."""
    from converters.gguf_edit import merge_gguf

    output = output_of(as_json, quiet)
    with output.progress(dst.name) as progress:
        written = merge_gguf(shards, dst, overwrite=overwrite, progress=progress)
    output.result(_data(written), lambda: _lines(written))


@click.command(short_help="Copy a GGUF with other metadata.", epilog="Example: qconvert edit a.gguf b.gguf --set-metadata general.name=B")
@click.argument("src", type=_PATH)
@click.argument("dst", type=_PATH)
@click.option("--set-metadata", "words", metavar="KEY[:TYPE]=VALUE", multiple=True, help="Set a key; its type stays unless one is named.")
@click.option("--remove-metadata", "removed", metavar="KEY", multiple=True, help="Leave a key out.")
@click.option("--rename-metadata", "renamed", type=Pair(), multiple=True, help="Give a key another name.")
@click.option("--rename-tensor", "renamed_tensors", type=Pair(), multiple=True, help="Give a tensor another name.")
@_OVERWRITE
@output_flags
def edit(src: Path, dst: Path, words: tuple[str, ...], as_json: bool, quiet: bool, **changes: Any) -> None:
    """Copy SRC to DST with its metadata changed: keys renamed, then removed, then set. Tensors keep every byte."""
    from converters.gguf_edit import edit_gguf
    from converters.metadata_words import parse_assignment

    output = output_of(as_json, quiet)
    assignments = [parse_assignment(word) for word in words]
    with output.progress(dst.name) as progress:
        written = edit_gguf(src, dst, assignments=assignments, progress=progress, **changes)
    output.result(_data(written), lambda: _lines(written))


def _data(written: Written) -> dict[str, Any]:
    files = [str(path) for path in written.paths]
    return {"version": 1, "files": files, "nbytes": written.nbytes, "tensors": written.tensors, "keys": written.keys}


def _lines(written: Written) -> Iterator[str]:
    yield f"{count(len(written.paths), 'file')}, {size(written.nbytes)}, {count(written.tensors, 'tensor')}, {count(written.keys, 'key')}"
    yield from (f"  {path}" for path in written.paths)
