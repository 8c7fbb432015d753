"""The commands that plan, write and check: ``plan convert quantize dequantize verify`` and every ``X-to-Y``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.commands_hub import push_output
from converters.completion import Words
from converters.flags import (
    TARGET,
    Wishes,
    check_report,
    loss_flags,
    output_flags,
    output_of,
    report_flag,
    source_flags,
    writing_flags,
)
from converters.options import LATER, recorded_words
from converters.output import Output, count, error_json, size
from qformats import registry
from qformats.errors import BadFile, QFormatError, UsageError, WouldLose

if TYPE_CHECKING:
    from converters.plan import Plan
    from converters.verify import VerifyResult
    from qformats.checkpoint import Checkpoint

__all__ = ["convert", "dequantize", "pair", "plan", "quantize", "verify"]

FLOAT_TYPES = ("f32", "f16", "bf16")
MAX_PLAN_NBYTES = 1 << 30
_PLANNED = ("exact", "allow_requantize", "tensor_types", "pre_tokenizer", "metadata", *LATER)
_PATH = click.Path(path_type=Path)
_TO = "FORMAT[:TYPE][,key=value…]"


# ---------------------------------------------------------------- commands


@click.command(
    short_help="Say what a conversion would do, and why.",
    epilog="Examples: qconvert plan llama-awq/ --to gguf · qconvert plan llama-awq/ --to gguf:q4_1 --exact",
)
@click.argument("src", type=_PATH)
@click.option("--to", type=TARGET, required=True, metavar=_TO, help="Target, such as gguf, gguf:q4_1 or gptq:int4,group=128.")
@click.option("--header", is_flag=True, help="Read headers only; kinds are then claims.")
@loss_flags
@source_flags
@report_flag
@output_flags
def plan(src: Path, allow_pickle: bool, report: Path | None, as_json: bool, quiet: bool, **wishes: Any) -> None:
    """Say what converting SRC would do to every tensor, and why. Writes nothing."""
    from converters.plan import make_plan, refuse_losses
    from converters.report import Report

    output = output_of(as_json, quiet)
    check_report(report, src)
    options = Wishes(**wishes).plan_options()
    with output.working("planning"):
        planned = make_plan(src, options, allow_pickle=allow_pickle)
    with planned.checkpoint:
        refusal = None
        try:
            refuse_losses(planned)
        except QFormatError as error:
            refusal = error
        data = {**planned.to_json(), "refused": None if refusal is None else error_json(refusal)}
        found = Report.build(planned)
    if report is not None:
        found.write(report)
    output.result(data, found.to_text)
    if refusal is not None:
        output.note(f"convert would stop here: {refusal.hint} [{refusal.code}]")
        if planned.options.exact:
            raise click.exceptions.Exit(refusal.exit_code)


@click.command(
    short_help="Convert to any format and type.",
    epilog="Examples: qconvert convert llama-awq/ llama.gguf --to gguf"
    " · qconvert convert llama-awq/ llama.gguf --to gguf:q4_1 --report llama.html"
    " · qconvert convert llama-gptq/ llama-ct/ --to compressed-tensors:int4,group=32",
)
@click.argument("src", type=_PATH)
@click.argument("dst", type=_PATH)
@click.option("--to", type=TARGET, metavar=_TO, help="Target, such as gguf, gguf:q4_1 or gptq:int4,group=128.")
@click.option("--plan", "plan_file", type=_PATH, metavar="FILE", help="Carry out what `qconvert plan --json` printed, or stop.")
@loss_flags
@source_flags
@writing_flags
@output_flags
def convert(src: Path, dst: Path, to: str | None, plan_file: Path | None, **flags: Any) -> None:
    """Convert SRC into DST, keeping every code where that is possible."""
    if (to is None) == (plan_file is None):
        raise UsageError(
            "target-missing", "give either --to or --plan", hint=f"for example --to gguf; formats: {', '.join(registry.names())}"
        )
    if plan_file is None:
        _run(src, dst, {**flags, "to": to})
        return
    if any(flags[name] for name in _PLANNED):
        raise UsageError("plan-options", "--plan already holds these options", hint="plan again with them")
    from converters.adapters import same_adapters
    from converters.importances import same_imatrix

    saved = _read_plan(plan_file)
    same_imatrix(saved["imatrix"], flags["imatrix"], plan_file)
    same_adapters(saved["lora"], flags["lora"], plan_file)
    _run(src, dst, {**flags, **saved["options"]}, digest=saved["digest"])


@click.command(
    short_help="Make new codes of a named type.",
    epilog="Examples: qconvert quantize llama/ llama.gguf --to gguf:q4_k_m"
    " · qconvert quantize llama/ llama-gptq/ --to gptq:int4,group=32,sym"
    " · qconvert quantize llama-awq/ llama.gguf --to gguf:q4_k_m --lora adapter/",
)
@click.argument("src", type=_PATH)
@click.argument("dst", type=_PATH)
@click.option("--to", type=TARGET, required=True, metavar="FORMAT:TYPE[,key=value…]", help="Target with its type, such as gguf:q8_0.")
@loss_flags
@source_flags
@writing_flags
@output_flags
def quantize(src: Path, dst: Path, to: str, **flags: Any) -> None:
    """Make new codes: convert SRC into DST of a named type, rounding where needed."""
    if registry.parse_target(to).type is None and flags["max_error"] is None and flags["target_size"] is None:
        types = ", ".join(registry.row(registry.parse_target(to).format).types)
        raise UsageError("target-type-missing", f"--to {to} names no type", hint=f"types: {types}")
    _run(src, dst, {**flags, "to": to, "allow_requantize": True})


@click.command(
    short_help="Turn codes back into floats.",
    epilog="Example: qconvert dequantize llama-awq/ llama-bf16/ --to hf:f16",
)
@click.argument("src", type=_PATH)
@click.argument("dst", type=_PATH)
@click.option("--to", type=TARGET, default="hf:bf16", show_default=True, metavar="FORMAT:TYPE",
              help="Float target: hf:bf16, hf:f32, gguf:f16 …")
@loss_flags
@source_flags
@writing_flags
@output_flags
def dequantize(src: Path, dst: Path, to: str, **flags: Any) -> None:
    """Turn every code of SRC back into floats."""
    if registry.parse_target(to).type not in FLOAT_TYPES:
        raise UsageError("target-type", f"--to {to} is not a float type", hint=f"for example hf:{', hf:'.join(FLOAT_TYPES)}")
    _run(src, dst, {**flags, "to": to})


@click.command(
    short_help="Check an output against its source.",
    epilog="Examples: qconvert verify llama-awq/ llama.gguf · qconvert verify llama-awq/ llama.gguf --replay",
)
@click.argument("src", type=_PATH)
@click.argument("dst", type=_PATH)
@click.option("--replay", is_flag=True, help="Convert again in memory and compare every byte, even where the digests agree.")
@click.option("--imatrix", type=_PATH, metavar="FILE", help="The importance matrix that DST was made with, for a replay.")
@click.option("--lora", metavar="DIR[=WEIGHT]", multiple=True, help="An adapter that was merged into DST; DST is then replayed with it.")
@click.option("--workers", type=click.IntRange(1, 1024), metavar="N", help="Threads (default: one a core).")
@source_flags
@report_flag
@output_flags
def verify(src: Path, dst: Path, report: Path | None, as_json: bool, quiet: bool, **wishes: Any) -> None:
    """Check that DST is what SRC was converted to, every byte: by the digests of both, else by replaying its record.

    With --report the weights of any two checkpoints are measured too: every tensor's kind of match and its error.
    """
    from converters.verify import verify as compare

    output = output_of(as_json, quiet)
    check_report(report, src, dst)
    with output.progress("verify") as progress:
        found = compare(src, dst, progress=progress, **wishes)
    if report is not None:
        from converters.comparing import verification_report

        how = {name: wishes[name] for name in ("workers", "allow_pickle")}
        with output.progress("compare") as progress:
            verification_report(src, dst, found.to_json(), progress=progress, **how).write(report)
    data = {**found.to_json(), "exit_code": 0 if found.ok else 3}
    output.result(data, lambda: _verify_lines(dst, found))
    if not found.ok:
        if not as_json:
            found.raise_if_different(dst)
        raise click.exceptions.Exit(3)


def pair(source: str, target: str) -> click.Command:
    """The command ``SOURCE-to-TARGET``: ``convert`` whose source must be in that format."""
    row, into = registry.row(source), registry.row(target)

    @click.command(f"{source}-to-{target}", short_help=f"Convert {row.title.split(' (')[0]} to {into.title.split(' (')[0]}.")
    @click.argument("src", type=_PATH)
    @click.argument("dst", type=_PATH)
    @click.option("--type", "kind", type=Words("TYPE", lambda _: (*into.types, *into.mixes)), metavar="TYPE",
                  help=f"{_words(into)} (default: the smallest that keeps every code).")
    @click.option("--option", "options", metavar="KEY=VALUE", multiple=True, hidden=not into.options, help=f"{', '.join(into.options)}.")
    @loss_flags
    @source_flags
    @writing_flags
    @output_flags
    def command(src: Path, dst: Path, kind: str | None, options: tuple[str, ...], **flags: Any) -> None:
        to = ",".join([f"{target}:{kind}" if kind else target, *options])
        _run(src, dst, {**flags, "to": to}, source=source)

    command.help = f"Convert SRC, {row.title}, into DST, {into.title}."
    command.epilog = f"Example: qconvert {source}-to-{target} model-{source} model{'.gguf' if into.container == 'gguf' else f'-{target}/'}"
    return command


# ---------------------------------------------------------------- what they share


def _words(row: registry.Row) -> str:
    """The types of a format, and one file type to stand for all."""
    return ", ".join(row.types) + (", or a file type such as q4_k_m" if row.mixes else "")


def _run(src: Path, dst: Path, flags: dict[str, Any], *, source: str | None = None, digest: str | None = None) -> None:
    """Plan, refuse, execute, report. ``flags`` holds the wishes, the writing flags and the output flags."""
    output = output_of(flags.pop("as_json"), flags.pop("quiet"))
    overwrite, workers, report = flags.pop("overwrite"), flags.pop("workers"), flags.pop("report")
    allow_pickle, resume, kept = flags.pop("allow_pickle"), flags.pop("resume"), flags.pop("keep_source")
    repo, private = flags.pop("push_repo"), flags.pop("private")
    check_report(report, src, dst)
    if repo is not None:
        from qformats.hub.push import check_target

        check_target(repo)
    wishes = Wishes(**flags)
    if wishes.imatrix is not None:
        from qformats.containers.atomic import check_not_same

        check_not_same(wishes.imatrix, dst)
    registry.parse_target(wishes.to)
    from qformats.checkpoint import open_checkpoint

    if kept is not None:
        src = _kept_source(src, kept, output)
    with open_checkpoint(src, allow_pickle) as checkpoint:
        if source is not None:
            _check_source(checkpoint, source, registry.parse_target(wishes.to).format)
        planned = _planned(checkpoint, wishes, digest, output)
        for warning in planned.warnings:
            output.note(f"warning: {warning}")
        from converters.execute import execute
        from converters.report import Report

        with output.progress(dst.name) as progress:
            outcome = execute(planned, dst, overwrite=overwrite, workers=workers, progress=progress, resume=resume)
        found = Report.build(planned, outcome, dst)
    if report is not None:
        found.write(report)
    pushed = {} if repo is None else {"pushed": push_output(dst, repo, output, found.to_json(), private)}
    output.result({**found.to_json(), **pushed}, found.to_text)


def _kept_source(src: Path, folder: Path, output: Output) -> Path:
    """The source of the hub as files in ``folder``: all of a repository but other kinds of the same weights, or the file it names."""
    from qformats.hub.names import is_address, parse_address
    from qformats.hub.pull import pull_source

    if not is_address(src):
        raise UsageError("keep-source", "--keep-source is for a source of the hub", path=src, hint="leave it out")
    with output.progress(folder.name) as progress:
        return pull_source(parse_address(src), folder, progress=progress)


def _planned(checkpoint: Checkpoint, wishes: Wishes, digest: str | None, output: Output) -> Plan:
    from converters.plan import make_plan, refuse_losses
    from converters.provenance import plan_digest

    options = wishes.plan_options()
    with output.working("planning"):
        planned = make_plan(checkpoint, options)
    if digest is not None and plan_digest(planned.jobs) != digest:
        raise UsageError("plan-stale", "the source no longer gives the saved plan", path=checkpoint.path, hint="run `qconvert plan` again")
    try:
        refuse_losses(planned)
    except WouldLose as error:
        _show_offenders(planned, output)
        if output.as_json or output.quiet:
            raise
        raise WouldLose(error.code, error.message.partition(": ")[0], path=checkpoint.path, hint=error.hint) from None
    return planned


def _show_offenders(planned: Plan, output: Output) -> None:
    """The table of what would be lost, like reasons gathered."""
    from converters.report import Report

    found = Report.build(planned)
    lossy = replace(found, tensors=tuple(line for line in found.tensors if not line.lossless))
    for kind, word, reason, names in lossy.reasons():
        output.note(f"  {kind} {word}, {count(len(names), 'tensor')} ({', '.join(names[:3])}{' …' if len(names) > 3 else ''}): {reason}")


def _check_source(checkpoint: Checkpoint, wanted: str, target: str) -> None:
    if checkpoint.format != wanted:
        hint = f"use {checkpoint.format}-to-{target}" if checkpoint.format != target else "it already is in the target's format"
        raise UsageError("source-format", f"is a {checkpoint.format} checkpoint, not {wanted}", path=checkpoint.path, hint=hint)


def _read_plan(path: Path) -> dict[str, Any]:
    """The options and digest of a saved plan; ``BadFile('plan-file')`` if it is none, ``UsageError('plan-depth')`` if not scanned."""
    from converters.adapters import recorded_adapters
    from converters.importances import recorded_imatrix

    try:
        if path.stat().st_size > MAX_PLAN_NBYTES:
            raise ValueError
        saved = json.loads(path.read_text(encoding="utf-8"))
        options = saved["options"]
        wishes = recorded_words(options)
        found: dict[str, Any] = {"options": wishes, "digest": str(saved["digest"]), "imatrix": recorded_imatrix(options)}
        found["lora"] = recorded_adapters(options)
        depth = saved["depth"]
    except OSError as error:
        raise BadFile("not-found", f"cannot read the plan: {error.strerror}", path=path) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadFile("plan-file", "is not a plan", path=path, hint="save what `qconvert plan --json` prints") from None
    if depth != "scan":
        raise UsageError("plan-depth", "a header plan cannot be carried out", path=path, hint="plan again without --header")
    return found


def _verify_lines(dst: Path, found: VerifyResult) -> list[str]:
    how = {"digests": "source and output have the digests of the conversion", "replay": "every byte as replayed from its record"}
    lines = (
        [f"{dst}: ok, {how.get(found.method, 'every value')} ({size(found.compared_nbytes)} compared)"]
        if found.ok
        else [f"{dst}: {count(len(found.mismatches), 'difference')}"]
    )
    for entry in found.mismatches[:20]:
        where = entry.get("tensor") or entry.get("file") or "file"
        at = entry.get("offset_bytes")
        lines.append(f"  {where}{'' if at is None else f' at byte {at}'}: {entry.get('detail', 'differs')}")
    return lines + [f"not seen: {text}" for text in found.unseen]
