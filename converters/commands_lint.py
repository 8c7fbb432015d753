"""The commands that say what is wrong with a checkpoint and mend it: ``lint`` and ``repair``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from converters.flags import output_flags, output_of, source_flags

__all__ = ["lint", "repair"]

ENGINES = ("vllm", "sglang", "transformers", "llama.cpp", "ollama")  # converters.lint.ENGINES, without its imports
DOES_NOT_LOAD = 6
_PATH = click.Path(path_type=Path)


@click.command(
    short_help="Say which engines will load a checkpoint.",
    epilog="Examples: qconvert lint llama-gptq/ --engine vllm --tensor-parallel 4 --gpu sm_89 · qconvert lint llama.gguf · "
    "qconvert lint hf://org/model",
)
@click.argument("path", type=_PATH)
@click.option("--engine", "engines", type=click.Choice(ENGINES), multiple=True, help="Only this one; may be given again (default: all).")
@click.option("--tensor-parallel", type=click.IntRange(1), default=1, metavar="N", help="Parts that every matrix is cut into.")
@click.option("--gpu", metavar="CAPABILITY", help="The GPU's compute capability: sm_90, 9.0.")
@source_flags
@output_flags
def lint(
    path: Path, engines: Sequence[str], tensor_parallel: int, gpu: str | None, allow_pickle: bool, as_json: bool, quiet: bool
) -> int:
    """Say whether vLLM, SGLang, transformers, llama.cpp and Ollama will load PATH, why not, and what to do.

    Every reason names the project, version and file it was read in. Ends with 0 if every engine that was asked loads it, else with 6.
    """
    from converters.lint import ENGINES as known
    from converters.lint import lint_path

    found = lint_path(path, tuple(engines) or known, allow_pickle=allow_pickle, tensor_parallel=tensor_parallel, gpu=gpu)
    output_of(as_json, quiet).result(found.to_json(), found.to_text)
    return 0 if found.loads else DOES_NOT_LOAD


@click.command(
    short_help="Mend what can be mended without touching codes.",
    epilog="Examples: qconvert repair llama-gptq/ mended/ · qconvert repair a.gguf b.gguf --like llama/ --dry-run",
)
@click.argument("path", type=_PATH)
@click.argument("out", type=_PATH, required=False)
@click.option("--like", metavar="DIR|REPO", help="Where missing tokenizer files, templates and configurations are copied from.")
@click.option("--in-place", is_flag=True, help="Put the mended checkpoint in the place of PATH.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--dry-run", is_flag=True, help="Only say what would be mended.")
@output_flags
def repair(path: Path, out: Path | None, as_json: bool, quiet: bool, **wishes: Any) -> None:
    """Write PATH to OUT with labels, trivial tensors, configurations, index and metadata mended.

    Codes are never touched: their digests before and after are compared. Where nothing has to be mended, nothing is written.
    """
    from converters.repair import repair_path

    output = output_of(as_json, quiet)
    with output.working(f"repair {path.name}"):
        found = repair_path(path, out, **wishes)
    output.result(found.to_json(), found.to_text)
