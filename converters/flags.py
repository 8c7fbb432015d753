"""The flags that commands share, and how they become a plan's options."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from converters.completion import Words, gguf_types, target_words
from converters.output import Output
from qformats import registry
from qformats.errors import OutputError, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from converters.options import PlanOptions

__all__ = [
    "REPORT_SUFFIXES", "Size", "Wishes", "check_report", "loss_flags", "output_flags", "output_of", "report_flag", "source_flags",
    "writing_flags",
]  # fmt: skip

REPORT_SUFFIXES = (".html", ".json", ".md")
SEARCHES = ("reference", "best", "hqq")  # qformats.quantize.SEARCHES, without its imports
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
TARGET = Words("TARGET", target_words)
GGUF_TYPE = Words("TYPE", gguf_types)
F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType[Any]):
    """A number of bytes with a decimal unit: ``2G``, ``500M``."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,15})([KMGT]?)B?", str(value).strip().upper())
        if found is None or int(found[1]) == 0:
            self.fail(f"{value!r} is no size, such as 2G or 500M", param, ctx)
        return int(found[1]) * _UNITS[found[2]]


class SourceOption(click.ParamType[Any]):
    """``KEY=VALUE``."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return str(value[0]), str(value[1])
        key, _, said = str(value).partition("=")
        if not key or not said:
            self.fail(f"{value!r} is not KEY=VALUE, such as zero-points=v2", param, ctx)
        return key.strip().lower(), said.strip().lower()


class TensorType(click.ParamType[Any]):
    """``REGEX=TYPE``."""

    name = "REGEX=TYPE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Split at the last ``=`` and compile the pattern once, so that a bad one is a usage error."""
        if isinstance(value, tuple):
            return str(value[0]), str(value[1])
        pattern, equals, kind = str(value).rpartition("=")
        if not equals or not pattern or not kind:
            self.fail(f"{value!r} is not REGEX=TYPE, such as 'attn_v=q8_0'", param, ctx)
        try:
            re.compile(pattern)
        except re.error as error:
            self.fail(f"{pattern!r} is not a regular expression: {error}", param, ctx)
        return pattern, kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        return GGUF_TYPE.shell_complete(ctx, param, incomplete) if "=" in incomplete else []


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def output_flags(function: F) -> F:
    """``--json --quiet --traceback``."""
    return _stack(
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
        click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
        click.option("--traceback", is_flag=True, expose_value=False, hidden=True, help="Show where an internal error came from."),
    )(function)  # fmt: skip


def source_flags(function: F) -> F:
    """``--allow-pickle``: how a source may be read."""
    text = "Read .bin and .pt files too, as data: nothing in them is run."
    return click.option("--allow-pickle", is_flag=True, help=text)(function)


def report_flag(function: F) -> F:
    """``--report``: what was done to every tensor, or how far it lies from its source, in a file."""
    text = "Write a report: a page (.html), data (.json) or text (.md)."
    return click.option("--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help=text)(function)


def loss_flags(function: F) -> F:
    """What a plan may do: ``--exact --allow-requantize --tensor-type --search --pre --imatrix --lora --set-metadata``, llama-quantize's."""
    return _stack(
        click.option("--exact", is_flag=True, help="Stop (exit 7) unless every tensor keeps its real numbers."),
        click.option("--allow-requantize", is_flag=True, help="Consent to new codes where codes cannot be kept."),
        click.option("--tensor-type", "tensor_types", type=TensorType(), multiple=True, help="Type of matching target tensors."),
        click.option("--output-tensor-type", type=GGUF_TYPE, metavar="TYPE",
                     help="Type of output.weight, or of the embedding that stands for it (GGUF)."),
        click.option("--token-embedding-type", type=GGUF_TYPE, metavar="TYPE", help="Type of the token embedding (GGUF)."),
        click.option("--pure", is_flag=True, help="The named type for every matrix, none of llama.cpp's exceptions (GGUF)."),
        click.option("--max-error", type=float, metavar="X", help="Smallest types with an rms error of at most X (GGUF)."),
        click.option("--target-size", type=Size(), metavar="SIZE", help="Best types for a file of at most SIZE bytes: 4G, 700M (GGUF)."),
        click.option("--search", type=click.Choice(SEARCHES), help="New codes as the owner has them (default), with less error, as HQQ."),
        click.option("--pre", "pre_tokenizer", metavar="NAME", help="Name of the pre-tokenizer where it is not recognized."),
        click.option("--imatrix", type=click.Path(path_type=Path), metavar="FILE", help="Importance matrix for new codes."),
        click.option("--source-option", "source_options", type=SourceOption(), multiple=True,
                     help="How to read what the source does not tell, such as zero-points=v2."),
        click.option("--lora", metavar="DIR[=WEIGHT]", multiple=True, help="Merge a PEFT adapter; what it changes gets new codes."),
        click.option("--set-metadata", "metadata", metavar="KEY[:TYPE]=VALUE", multiple=True, help="Set a key of the GGUF."),
    )(function)  # fmt: skip


def writing_flags(function: F) -> F:
    """``--overwrite --resume --keep-source --push --private --workers --report``."""
    kept = "Fetch a source of the hub into DIR first and keep it there."
    return _stack(
        click.option("--overwrite", is_flag=True, help="Replace DST if it exists."),
        click.option("--resume", is_flag=True, help="Go on with what a killed run of this command left."),
        click.option("--keep-source", type=click.Path(path_type=Path), metavar="DIR", help=kept),
        click.option("--push", "push_repo", metavar="REPO[@BRANCH]", help="Put DST into a repository of the hub afterwards."),
        click.option("--private/--public", default=None, help="Of a repository that --push makes."),
        click.option("--workers", type=click.IntRange(1, 1024), metavar="N", help="Threads (default: one a core)."),
        report_flag,
    )(function)  # fmt: skip


@dataclass(frozen=True)
class Wishes:
    """What the user asked a conversion for, still in words; ``plan_options`` makes the planner's options of it."""

    to: str
    exact: bool = False
    allow_requantize: bool = False
    tensor_types: tuple[tuple[str, str], ...] = ()
    pre_tokenizer: str | None = None
    header: bool = False
    imatrix: Path | None = None
    metadata: tuple[str, ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    max_error: float | None = None
    target_size: int | None = None
    search: str | None = None
    source_options: tuple[tuple[str, str], ...] = ()
    lora: tuple[str, ...] = ()

    def plan_options(self) -> PlanOptions:
        """Raises ``UsageError`` for an unknown format, type or option, ``BadFile`` for a broken importance matrix or adapter."""
        target = registry.parse_target(self.to)
        from converters.adapters import open_adapters
        from converters.importances import open_imatrix
        from converters.options import REFERENCE, PlanOptions

        matrix = None if self.imatrix is None else open_imatrix(self.imatrix)
        return PlanOptions(
            target, self.exact, self.allow_requantize, tuple(self.tensor_types), self.pre_tokenizer, self.header,
            imatrix=matrix, metadata=tuple(self.metadata), output_tensor_type=self.output_tensor_type,
            token_embedding_type=self.token_embedding_type, pure=self.pure, max_error=self.max_error, target_size=self.target_size,
            search=self.search or REFERENCE, source_options=tuple(self.source_options), lora=open_adapters(self.lora),
        )  # fmt: skip


def output_of(as_json: bool, quiet: bool) -> Output:
    """The ``Output`` of a command's flags."""
    return Output(as_json=as_json, quiet=quiet)


def check_report(path: Path | None, *others: Path) -> None:
    """Refuse a report that could not be written, before any work is done."""
    if path is None:
        return
    if path.suffix.lower() not in REPORT_SUFFIXES:
        raise UsageError("report-suffix", f"a report is {', '.join(REPORT_SUFFIXES)}, not {path.suffix or path.name!r}", path=path)
    if not path.parent.is_dir():
        raise OutputError("report-directory", "the report's directory does not exist", path=path)
    if any(path.resolve() == other.resolve() for other in others):
        raise UsageError("report-path", "the report would overwrite the source or the destination", path=path)
    from qformats.checkpoint import SIDE_FILES

    inside = any(path.resolve().parent == other.resolve() for other in others)
    if inside and (path.name in (*SIDE_FILES, "README.md") or path.name.endswith(".index.json")):
        raise UsageError("report-path", "the report would overwrite a file of the source or the destination", path=path)
