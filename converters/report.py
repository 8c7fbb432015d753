"""The report of a plan or a conversion: every tensor's kind, reason, size and error, as JSON, Markdown, HTML or terminal text."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from math import isfinite, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.importances import WEIGHTED
from converters.output import count, size, table
from converters.stored import StoredWeights
from qformats.containers.atomic import OutputFile
from qformats.errors import OutputError, UsageError, printable

if TYPE_CHECKING:
    from converters.execute import Outcome
    from converters.plan import Plan

__all__ = ["KIND_MEANINGS", "SCHEMA", "TITLES", "Report", "TensorLine"]

KIND_MEANINGS = {
    "copied": "the same bytes",
    "exact": "the same real numbers",
    "codes-exact": "every code kept, a scale or offset rounded",
    "dequantized": "float numbers instead of codes",
    "requantized": "new codes",
    "different": "other values",
    "missing": "only in the first",
    "extra": "only in the second",
}
SCHEMA = "urn:qformats:report:1"  # the $id of schemas/report.schema.json
TITLES = {"plan": "Plan", "conversion": "Conversion", "verification": "Verification", "comparison": "Comparison"}
_SAVING = re.compile(r"(?P<type>\S+) would save (?P<nbytes>\d+) bytes: (?P<how>.*)")
_SHARE = re.compile(r"(\d+) of (\d+)")
_REFUSAL = re.compile(r"(\w+): (.*)")
_SHOWN = 12  # groups of one list in terminal text; reports hold all


@dataclass(frozen=True)
class TensorLine:
    """One target tensor. ``error``: relative RMS error of new codes or rounded floats, None where nothing was measured.

    ``merged``: the adapters in it. ``source_type``, ``source_nbytes``: of what it is made of, as far as it is. ``max_abs``: the largest
    absolute error, None where nothing was measured.
    """

    name: str
    kind: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    lossless: bool
    reason: str
    rewrites: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: float | None = None
    merged: tuple[str, ...] = ()
    source_type: str = ""
    source_nbytes: int | None = None
    max_abs: float | None = None

    @property
    def snr_db(self) -> float | None:
        """The signal-to-noise ratio in decibels; None where there is no error, or none was measured."""
        return -20 * log10(self.error) if self.error else None

    @property
    def weights(self) -> int:
        """Number of elements."""
        product = 1
        for extent in self.shape:
            product *= extent
        return product


@dataclass(frozen=True)
class Report:
    """What was planned (``seconds`` None), done or compared. ``dropped``: source tensors with no place in the target, with reasons.

    ``imatrix``: file name of the importance matrix. ``adapters``: what the record keeps of each that was merged in. ``subject``: one of
    ``TITLES``; where two checkpoints are compared, source and destination are the first and the second. ``verification``: what
    ``verify`` found. ``agreement``: how two models that were run agree.
    """

    source: str
    source_format: str
    source_nbytes: int
    target: str
    nbytes: int
    tensors: tuple[TensorLine, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    depth: str = "scan"
    digest: str = ""
    tool: str = ""
    destination: str | None = None
    seconds: float | None = None
    imatrix: str | None = None
    adapters: tuple[Mapping[str, Any], ...] = ()
    subject: str = "conversion"
    verification: Mapping[str, Any] | None = None
    agreement: Mapping[str, Any] | None = None

    @classmethod
    def build(cls, plan: Plan, outcome: Outcome | None = None, destination: str | Path | None = None) -> Report:
        """The report of ``plan``, and of what carrying it out measured."""
        from converters.provenance import plan_digest, tool_version

        errors = {} if outcome is None else outcome.errors
        stored, lines = StoredWeights(plan.checkpoint), []
        for job in plan.jobs:
            nbytes = sum(plan.output.parts[job.part_name(leaf)].nbytes for leaf in job.parts)
            shape = tuple(int(n) for n in job.map.shape)
            line = TensorLine(
                job.name, job.kind, job.type, shape, nbytes, job.lossless, job.reason, job.rewrites, job.notes,
                _finite(errors.get(job.name)), job.merged, *stored.source_of(job.map),
            )  # fmt: skip
            lines.append(line)
        return cls(
            plan.checkpoint.shown,
            plan.checkpoint.format,
            sum(raw.nbytes for raw in plan.checkpoint.raw.values()),
            str(plan.options.target),
            plan.output.nbytes,
            tuple(lines),
            dict(plan.dropped),
            tuple(plan.warnings),
            "scan" if plan.scanned else "header",
            plan_digest(plan.jobs),
            f"qformats {tool_version()}",
            None if destination is None else str(destination),
            None if outcome is None else outcome.seconds,
            None if plan.options.imatrix is None else plan.options.imatrix.name,
            tuple(adapter.to_json() for adapter in plan.options.lora),
            "plan" if outcome is None else "conversion",
        )

    @property
    def kinds(self) -> dict[str, int]:
        """Number of tensors of each kind, best kind first."""
        found = Counter(line.kind for line in self.tensors)
        return {kind: found[kind] for kind in (*KIND_MEANINGS, *sorted(found.keys() - KIND_MEANINGS.keys())) if kind in found}

    @property
    def lossless(self) -> bool:
        """Whether every tensor stands for the source's real numbers."""
        return all(line.lossless for line in self.tensors)

    @property
    def worst_error(self) -> float | None:
        """The largest measured relative RMS error."""
        return max((line.error for line in self.tensors if line.error is not None), default=None)

    @property
    def weights(self) -> int:
        """Number of elements of all target tensors."""
        return sum(line.weights for line in self.tensors if line.kind != "missing")

    @property
    def weighted(self) -> int:
        """Number of tensors rounded under an importance matrix."""
        return sum(WEIGHTED in line.rewrites for line in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the tensors of the output, headers and side files not counted."""
        return 8 * sum(line.nbytes for line in self.tensors) / max(1, self.weights)

    @property
    def source_bits_per_weight(self) -> float:
        """Of the source, on the same number of weights."""
        return 8 * self.source_nbytes / max(1, sum(line.weights for line in self.tensors if line.kind != "extra"))

    # ---------------------------------------------------------------- groups

    def kind_rows(self) -> list[tuple[str, int, int, str]]:
        """(kind, tensors, bytes, types) for each kind."""
        rows = []
        for kind, number in self.kinds.items():
            lines = [line for line in self.tensors if line.kind == kind]
            types = Counter(line.type for line in lines)
            rows.append((kind, number, sum(line.nbytes for line in lines), ", ".join(f"{t} {n}" for t, n in types.most_common())))
        return rows

    def reasons(self) -> list[tuple[str, str, str, list[str]]]:
        """(kind, type, reason, tensor names), best kind first; reasons that differ only in "n of m" are one, their counts summed."""
        groups: dict[tuple[str, str, str], list[TensorLine]] = defaultdict(list)
        for line in self.tensors:
            groups[line.kind, line.type, _SHARE.sub("# of #", line.reason)].append(line)
        order = list(KIND_MEANINGS)
        found = [(kind, word, _gather(_sum_shares(lines)), [line.name for line in lines]) for (kind, word, _), lines in groups.items()]
        return sorted(found, key=lambda group: order.index(group[0]) if group[0] in order else len(order))

    def notes(self) -> list[str]:
        """The tensors' notes, like ones gathered: what a smaller type would save is summed."""
        saved: dict[tuple[str, str], list[int]] = defaultdict(list)
        plain: Counter[str] = Counter()
        for line in self.tensors:
            for note in line.notes:
                match = _SAVING.fullmatch(note)
                if match:
                    saved[match["type"], match["how"]].append(int(match["nbytes"]))
                else:
                    plain[note] += 1
        lines = [f"{t} would save {size(sum(n))} on {count(len(n), 'tensor')}: {how}" for (t, how), n in saved.items()]
        if self.imatrix is not None:
            lines.append(f"{count(self.weighted, 'tensor')} rounded under the importances of {self.imatrix}")
        lines += self._merged_notes()
        return lines + [f"{count(number, 'tensor')}: {note}" for note, number in plain.items()]

    def _merged_notes(self) -> list[str]:
        """Which tensors hold an adapter, and how far what is stored lies from the exact merged weights."""
        found = []
        for adapter in self.adapters:
            name = adapter["name"] if adapter["weight"] == 1 else f"{adapter['name']} (weight {adapter['weight']:g})"
            lines = [line for line in self.tensors if name in line.merged]
            errors = [line.error for line in lines if line.error is not None]
            worst = f"; relative RMS error against the exact merged weights at most {max(errors):.3g}" if errors else ""
            found.append(f"adapter {name} (SHA-256 {adapter['sha256'][:16]}…) is merged into {count(len(lines), 'tensor')}{worst}")
        return found

    # ---------------------------------------------------------------- forms

    def to_json(self) -> dict[str, Any]:
        """JSON data: the fields, the totals and one object a tensor, as ``schemas/report.schema.json`` says."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("tensors", "subject")}
        return {
            "schema": SCHEMA,
            "version": 1,
            "report": self.subject,
            **fields,
            "kinds": self.kinds,
            "lossless": self.lossless,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "source_bits_per_weight": round(self.source_bits_per_weight, 4),
            "worst_error": self.worst_error,
            "weighted": self.weighted,
            "notes": self.notes(),
            "tensors": [{**asdict(line), "snr_db": None if line.snr_db is None else round(line.snr_db, 3)} for line in self.tensors],
        }

    def _to_json_text(self) -> str:
        return json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"

    def headline(self) -> str:
        """One sentence: from what to what, and the sizes."""
        done = "" if self.seconds is None else f" in {self.seconds:.1f} s"
        before = f"{self.source} ({self.source_format}, {size(self.source_nbytes)}, {self.source_bits_per_weight:.2f} bits/weight)"
        after = f"{size(self.nbytes)}, {self.bits_per_weight:.2f} bits/weight"
        if self.subject in ("verification", "comparison"):
            return f"{before} and {self.destination} ({self.target}, {after})"
        return (
            f"{before} → {self.destination} ({self.target}, {after}){done}" if self.destination else f"{before} → {self.target} ({after})"
        )

    def to_text(self) -> Iterator[str]:
        """Lines for a terminal."""
        yield self.headline()
        if self.depth == "header":
            yield "from headers only: kinds are claims; plan without --header to prove them"
        yield ""
        rows = [(k, f"{n:,}", size(b), types) for k, n, b, types in self.kind_rows()]
        yield from table(("kind", "tensors", "size", "types"), rows, right=(1, 2))
        yield from _section("why", [f"{k} {t}, {_names(names)}: {why}" for k, t, why, names in self.reasons()])
        yield from _section("error", self._error_lines())
        yield from _section("notes", self.notes())
        yield from _section("dropped", [f"{why}: {_names(names)}" for why, names in _by_value(self.dropped).items()])
        yield from _section("warnings", list(self.warnings))

    def _error_lines(self) -> list[str]:
        measured = sorted(((line.error, line.name) for line in self.tensors if line.error is not None), reverse=True)
        if not measured:
            return []
        worst, name = measured[0]
        return [f"relative RMS error measured on {count(len(measured), 'tensor')}, largest {worst:.3g} ({name})"]

    def to_markdown(self) -> str:
        """A Markdown document with every tensor."""
        lines = [
            f"# {TITLES[self.subject]} report",
            "",
            _md(self.headline()),
            "",
            "| kind | tensors | size | types | meaning |",
            "|---|---:|---:|---|---|",
        ]
        lines += [f"| {k} | {n:,} | {size(b)} | {_md(types)} | {KIND_MEANINGS.get(k, '')} |" for k, n, b, types in self.kind_rows()]
        for title, items in self._lists():
            lines += ["", f"## {title}", "", *(f"- {_md(item)}" for item in items)]
        lines += [
            "",
            "## Tensors",
            "",
            "| tensor | kind | type | shape | bytes | relative RMS error | reason |",
            "|---|---|---|---|---:|---:|---|",
        ]
        for line in self.tensors:
            error = "" if line.error is None else f"{line.error:.3g}"
            shape = " × ".join(map(str, line.shape))
            lines.append(f"| {_md(line.name)} | {line.kind} | {line.type} | {shape} | {line.nbytes} | {error} | {_md(line.reason)} |")
        lines += ["", f"Made by {_md(self.tool)}{f', plan {self.digest[:16]}' if self.digest else ''}."]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """One self-contained HTML page: see ``report_page``."""
        from converters.report_page import render

        return render(self)

    def _lists(self) -> list[tuple[str, list[str]]]:
        found = [
            ("Why", [f"{k} {t}, {_names(names)}: {why}" for k, t, why, names in self.reasons()]),
            ("Error", self._error_lines()),
            ("Notes", self.notes()),
            ("Dropped", [f"{name}: {why}" for name, why in self.dropped.items()]),
            ("Warnings", list(self.warnings)),
        ]
        return [(title, items) for title, items in found if items]

    def write(self, path: str | Path) -> None:
        """Write the report, whole or not at all, in the form that the suffix names.

        ``UsageError('report-suffix')``, ``OutputError('report-write')``.
        """
        where = Path(path)
        forms = {".html": self.to_html, ".json": self._to_json_text, ".md": self.to_markdown}
        if where.suffix.lower() not in forms:
            raise UsageError("report-suffix", f"a report is {', '.join(forms)}, not {where.suffix or where.name!r}", path=where)
        data = forms[where.suffix.lower()]().encode("utf-8", "backslashreplace")
        try:
            with OutputFile(where, len(data), overwrite=True) as file:
                file.pwrite(0, data)
                file.commit()
        except OutputError as error:
            raise OutputError("report-write", f"cannot write the report: {error.message}", path=where) from None


def _finite(number: float | None) -> float | None:
    return number if number is not None and isfinite(number) else None


def _section(title: str, items: list[str]) -> Iterator[str]:
    if items:
        yield ""
        yield title
        yield from (f"  {item}" for item in items[:_SHOWN])
        if len(items) > _SHOWN:
            yield f"  … and {len(items) - _SHOWN} more (--report or --json lists all)"


def _sum_shares(lines: list[TensorLine]) -> str:
    """The lines' common reason with every "n of m" replaced by the sums over all lines."""
    shares = [_SHARE.findall(line.reason) for line in lines]
    sums = iter([tuple(sum(int(share[at][side]) for share in shares) for side in (0, 1)) for at in range(len(shares[0]))])
    return _SHARE.sub(lambda _: "{:,} of {:,}".format(*next(sums)), lines[0].reason)


def _gather(reason: str) -> str:
    """Refusals of several types, like ones together.

    >>> _gather("q4_0: act-order; q4_k: 64 columns; q5_0: act-order")
    'q4_0, q5_0: act-order; q4_k: 64 columns'
    """
    parts = [_REFUSAL.fullmatch(part) for part in reason.split("; ")]
    groups: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        if part is None:
            return reason
        groups[part[2]].append(part[1])
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in groups.items())


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{count(len(names), 'tensor')} such as {names[0]}"


def _by_value(mapping: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, why in mapping.items():
        groups[why].append(name)
    return groups


def _md(text: str) -> str:
    """Untrusted text inside a Markdown table or list."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", escape(printable(text, 4000), quote=False))
