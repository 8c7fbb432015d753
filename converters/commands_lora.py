"""The commands for low-rank adapters: ``lora-to-gguf`` and ``gguf-to-lora``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.flags import output_flags, output_of, source_flags
from converters.output import Output, count, size

if TYPE_CHECKING:
    from converters.lora import LoraResult

__all__ = ["gguf_to_lora", "lora_to_gguf"]

_PATH = click.Path(path_type=Path)
_BASE = click.option(
    "--base", required=True, type=_PATH, metavar="MODEL", help="The adapter's base model: a directory with its config.json, or a GGUF."
)
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")


@click.command(
    "lora-to-gguf",
    short_help="Convert a PEFT LoRA adapter to GGUF.",
    epilog="Example: qconvert lora-to-gguf adapter/ lora.gguf --base llama/",
)
@click.argument("src", type=_PATH)
@click.argument("dst", type=_PATH)
@_BASE
@click.option("--type", "dtype", type=click.Choice(["f32", "f16", "bf16"]), help="Float type (default: as stored).")
@_OVERWRITE
@source_flags
@output_flags
def lora_to_gguf(src: Path, dst: Path, base: Path, as_json: bool, quiet: bool, **wishes: Any) -> None:
    """Convert SRC, a directory with a PEFT LoRA adapter, into DST, a GGUF adapter for llama.cpp."""
    from converters.lora import lora_to_gguf as convert

    _say(convert(src, base, dst, **wishes), dst, output_of(as_json, quiet))


@click.command(
    "gguf-to-lora",
    short_help="Convert a GGUF LoRA adapter to PEFT.",
    epilog="Example: qconvert gguf-to-lora lora.gguf adapter/ --base llama/",
)
@click.argument("src", type=_PATH)
@click.argument("dst", type=_PATH)
@_BASE
@_OVERWRITE
@output_flags
def gguf_to_lora(src: Path, dst: Path, base: Path, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Convert SRC, a GGUF adapter, into DST, a directory that PEFT loads."""
    from converters.lora import gguf_to_lora as convert

    _say(convert(src, base, dst, overwrite=overwrite), dst, output_of(as_json, quiet))


def _say(found: LoraResult, dst: Path, output: Output) -> None:
    for note in found.notes:
        output.note(f"note: {note}")
    ranks = ", ".join(str(rank) for rank in found.ranks)
    kind = "exact" if found.lossless else "dequantized"
    line = f"{dst}: {kind}, {count(found.pairs, 'low-rank pair')} of rank {ranks}, alpha {found.alpha:g} ({size(found.nbytes)})"
    output.result({**found.to_json(), "exit_code": 0}, lambda: [line])
