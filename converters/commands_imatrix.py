"""The command ``imatrix``: importances of a model's columns, measured over a text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.flags import output_flags, output_of, source_flags
from converters.output import Output, count
from qformats.errors import BadFile, OutputError

if TYPE_CHECKING:
    from qformats.quantize.imatrix import ImportanceMatrix

__all__ = ["imatrix", "read_text"]

MAX_TEXT_NBYTES = 1 << 30
_PATH = click.Path(path_type=Path)


@click.command(short_help="Measure an importance matrix.", epilog="Example: qconvert imatrix llama/ --text wiki.txt -o imatrix.gguf")
@click.argument("model", type=_PATH)
@click.option("--text", type=_PATH, required=True, metavar="FILE", help="What the model reads: plain text, UTF-8.")
@click.option("--output", "-o", "path", type=_PATH, default=Path("imatrix.gguf"), show_default=True, metavar="OUT.gguf", help="Result.")
@click.option("--chunks", type=click.IntRange(1), metavar="N", help="At most this many chunks of the text (default: all).")
@click.option("--context", type=click.IntRange(1, 1 << 20), default=512, show_default=True, metavar="N", help="Tokens of a chunk.")
@click.option("--process-output", is_flag=True, help="Measure the inputs of the output matrix too.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.gguf if it exists.")
@source_flags
@output_flags
def imatrix(
    model: Path, text: Path, path: Path, overwrite: bool, allow_pickle: bool, as_json: bool, quiet: bool, **wishes: Any
) -> None:
    """Run MODEL over a text and write how much each column of its weights meets, for `quantize --imatrix`.

    MODEL is any checkpoint that can be read; one that is no directory of floats is converted to one, in a temporary place. Needs
    transformers.
    """
    from qformats.containers.atomic import check_not_same
    from qformats.quantize.imatrix import write_imatrix
    from qformats.runtime.activations import measure

    output = output_of(as_json, quiet)
    words = read_text(text)
    check_not_same([model, text], path)
    if path.exists() and not overwrite:
        raise OutputError("exists", "already exists", path=path, hint="choose another name or add --overwrite")
    with _floats(model, output, allow_pickle) as directory, output.steps("imatrix", "chunks") as progress:
        found = measure(directory, words, dataset=text.name, progress=progress, **wishes)
    write_imatrix(found, path, overwrite=overwrite)
    output.result(_data(found, path), lambda: _lines(found, path))


def read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_NBYTES:
            raise BadFile("text", f"is larger than {MAX_TEXT_NBYTES} bytes", path=path)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadFile("not-found", f"cannot read the text: {error.strerror}", path=path) from None
    except UnicodeDecodeError as error:
        raise BadFile("text", f"is not UTF-8 at byte {error.start}", path=path, hint="save it as UTF-8") from None


@contextmanager
def _floats(model: Path, output: Output, allow_pickle: bool) -> Iterator[Path]:
    """The model as a directory that transformers loads: itself, or a float32 copy that lives as long as the context."""
    from converters.api import convert
    from qformats.checkpoint import fetched, open_checkpoint

    model = fetched(model)
    with open_checkpoint(model, allow_pickle) as checkpoint:
        plain = checkpoint.format == "hf" and checkpoint.container == "safetensors" and checkpoint.path.is_dir()
    if plain:
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="qconvert-imatrix-") as folder:
        with output.working("converting to floats"):
            convert(model, Path(folder) / "floats", to="hf:f32", allow_pickle=allow_pickle)
        yield Path(folder) / "floats"


def _data(found: ImportanceMatrix, path: Path) -> dict[str, Any]:
    empty = {name: int((entry.counts == 0).sum()) for name, entry in found.entries.items() if (entry.counts == 0).any()}
    return {
        "version": 1,
        "file": str(path),
        "entries": len(found.entries),
        "chunks": found.chunk_count,
        "context": found.chunk_size,
        "matrices_without_tokens": empty,
    }


def _lines(found: ImportanceMatrix, path: Path) -> Iterator[str]:
    yield f"{path}: {count(len(found.entries), 'tensor')} over {count(found.chunk_count, 'chunk')} of {found.chunk_size:,} tokens"
    idle = sum(int((entry.counts == 0).sum()) for entry in found.entries.values())
    if idle:
        yield f"  {count(idle, 'expert matrix') if idle == 1 else f'{idle:,} expert matrices'} met no token: give more text"
