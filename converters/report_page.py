"""The report as one HTML page: what is in it, in which order and where it is drawn. The words and marks are in ``templates/``.

The page holds everything it shows: no fonts, pictures or scripts of others, and its content policy forbids any. Its own script sorts
and filters the table and names the points of the plot; without it everything can be read, the worst tensors first. Equal reports give
equal bytes.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import ceil, floor, inf, log10
from typing import TYPE_CHECKING

from converters.output import count, size
from converters.report import KIND_MEANINGS, TITLES
from qformats.errors import printable

if TYPE_CHECKING:
    from converters.report import Report, TensorLine

__all__ = ["number", "render"]

_BLOCK = re.compile(r"(?:^|\.)(\d{1,9})(?:\.|$)")
_DIGITS = re.compile(r"(\d{1,9})")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_HEIGHT, _FLOOR = 100.0, 83.0  # of the plot in per cent; below the floor lie tensors without an error
_MAX_TICKS, _MAX_LEVELS, _MAX_TYPES = 12, 9, 12
_NEVER = ("missing", "different", "extra")  # first among equals: nothing measured says how bad these are


def render(report: Report) -> str:
    """The page as text; every text of a file is escaped, control characters too."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("converters")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=size, printable=printable, number=number, count=count, percent=percent, shape=_shape)
    script, style = (loader.get_source(environment, name)[0] for name in ("report.js", "report.css"))
    return environment.get_template("report.html.j2").render(
        report=report, title=TITLES[report.subject], names=_names(report), verdict=_verdict(report), tiles=_tiles(report),
        kinds=_kinds(report), bars=_bars(report), plot=_plot(report), rows=_worst_first(report.tensors), columns=_columns(report),
        sizes=_sizes(report), meanings=KIND_MEANINGS, notes=report.notes(), dropped=_by_reason(report.dropped), reasons=report.reasons(),
        style=Markup(style), script=Markup(script), script_hash=b64encode(sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


# ---------------------------------------------------------------- words and numbers


def number(value: float) -> str:
    """Three digits, with a power of ten where there would be many zeros.

    >>> number(0.09), number(0.0), number(3.2e-07), number(1234.5), number(18.0)
    ('0.0900', '0', '3.20 × 10⁻⁷', '1,230', '18.0')
    """
    if value == 0:
        return "0"
    short = f"{value:#.3g}"
    if 1e-4 <= abs(float(short)) < 1e6:
        return f"{float(short):,.0f}" if abs(float(short)) >= 100 else short
    digits, power = f"{value:.2e}".split("e")
    return f"{digits} × 10{str(int(power)).translate(_SUPERSCRIPTS)}"


def percent(share: float) -> str:
    """A share as a percentage that is 0 or 100 only where it is exactly that.

    >>> percent(0.5), percent(0.99999), percent(1.0), percent(0.00001)
    ('50 %', '> 99.9 %', '100 %', '< 0.1 %')
    """
    if share in (0.0, 1.0):
        return f"{share * 100:.0f} %"
    if not 0.001 <= share <= 0.999:
        return "< 0.1 %" if share < 0.001 else "> 99.9 %"
    return f"{share * 100:.3g} %"


def _shape(extents: Sequence[int]) -> str:
    return " × ".join(map(str, extents)) or "scalar"


def _last(path: str) -> str:
    """The last name of a path or address."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def _names(report: Report) -> tuple[str, str]:
    """What stands left and right of the arrow."""
    return _last(report.source), report.target if report.destination is None else _last(report.destination)


def _verdict(report: Report) -> tuple[str, str, str]:
    """(``good``, ``fair`` or ``poor``; a few words; the sentence that explains them)."""
    changed = sum(not line.lossless for line in report.tensors)
    rest = _changes(report, changed)
    if report.verification is not None:
        if report.verification["ok"]:
            return "good", "Verified", f"{_HOW[report.verification['method']]} {rest}"
        found = count(len(report.verification["mismatches"]), "difference")
        return "poor", "Differs", f"The check found {found}. {rest}"
    if not report.tensors:
        return "fair", "Weights not compared", "The models were run; their files hold other kinds of weights."
    if report.lossless:
        return "good", "Lossless", rest if report.depth == "scan" else f"{rest} Claimed from headers alone."
    return "fair", "Lossy" if report.subject in ("plan", "conversion") else "Different weights", rest


_HOW = {
    "digests": "Source and output have the digests of the conversion: every byte is as it was written.",
    "replay": "The conversion done again gives the same bytes.",
    "values": "Every weight has the source's value.",
}


def _changes(report: Report, changed: int) -> str:
    if not report.tensors:
        return ""
    whose = "the first's" if report.subject == "comparison" else "the source's"
    if not changed:
        return f"All {count(len(report.tensors), 'tensor')} stand for {whose} real numbers."
    worst = report.worst_error
    tail = "" if not worst else f" The largest relative RMS error is {number(worst)} ({-20 * log10(worst):.1f} dB)."
    one = f"{changed:,} of {count(len(report.tensors), 'tensor')}"
    return f"{one} {'does' if changed == 1 else 'do'} not stand for {whose} real numbers.{tail}"


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """(label, number, note)."""
    found = []
    if report.agreement is not None:
        said = report.agreement
        nll = [f"NLL {said['nll'][0]:.4f}", f"{said['nll'][1]:.4f}"]
        found += [
            ("KL divergence", number(said["kl"]), "nats a token"),
            ("equal best tokens", percent(said["top1"]), f"of {count(said['tokens'], 'token')}"),
            ("perplexity", " → ".join(f"{p:.2f}" if p < 1000 else f"{p:,.0f}" for p in said["perplexity"]), " → ".join(nll)),
        ]
    if report.tensors:
        found.append(("tensors", f"{len(report.tensors):,}", f"{_short(report.weights)} weights"))
        before, after = report.source_bits_per_weight, report.bits_per_weight
        found.append(("bits per weight", f"{before:.2f} → {after:.2f}", f"{report.source_format} → {report.target}"))
    if report.worst_error:
        measured = sum(line.error is not None for line in report.tensors)
        found.append(("largest error", number(report.worst_error), f"relative RMS, {count(measured, 'tensor')} measured"))
    if report.seconds is not None:
        found.append(("time", f"{report.seconds:.1f} s", f"{size(report.source_nbytes / max(report.seconds, 1e-9))}/s read"))
    return found


def _short(weights: int) -> str:
    """A number of weights.

    >>> _short(134_515_008), _short(960)
    ('135 M', '960')
    """
    for unit, least in ((" G", 10**9), (" M", 10**6), (" k", 10**3)):
        if weights >= least:
            return f"{weights / least:.3g}{unit}"
    return str(weights)


def _by_reason(dropped: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of source tensors with no place in the target, by why."""
    found: dict[str, list[str]] = {}
    for name, why in dropped.items():
        found.setdefault(why, []).append(name)
    return found


# ---------------------------------------------------------------- bars


@dataclass(frozen=True)
class Segment:
    """A piece of a bar: ``start`` and ``width`` in per cent."""

    kind: str
    start: str
    width: str
    share: float
    text: str


def _kinds(report: Report) -> list[tuple[str, int, float, int, list[tuple[str, int]]]]:
    """(kind, tensors, share of all weights, bytes, its commonest types with how many tensors have them)."""
    weights = Counter[str]()
    types: dict[str, Counter[str]] = {}
    for line in report.tensors:
        weights[line.kind] += line.weights
        types.setdefault(line.kind, Counter())[line.type] += 1
    total = max(1, sum(weights.values()))
    return [
        (kind, n, weights[kind] / total, nbytes, [(name, m) for name, m in types[kind].most_common(_MAX_TYPES) if name])
        for kind, n, nbytes, _ in report.kind_rows()
    ]


def _bars(report: Report) -> list[tuple[str, list[Segment]]]:
    """The kinds' shares of the tensors and of the weights."""
    rows = _kinds(report)
    if not rows:
        return []
    return [
        ("of tensors", _segments((kind, n / len(report.tensors)) for kind, n, *_ in rows)),
        ("of weights", _segments((kind, share) for kind, _, share, *_ in rows)),
    ]


def _segments(shares: Iterable[tuple[str, float]]) -> list[Segment]:
    at, found = 0.0, []
    for kind, share in shares:
        if share:
            found.append(Segment(kind, f"{at * 100:.3f}", f"{share * 100:.3f}", share, f"{kind} {percent(share)}"))
        at += share
    return found


def _sizes(report: Report) -> list[tuple[str, str, int, str]]:
    """(label, width in per cent, bytes, what it is) before and after."""
    most = max(1, report.source_nbytes, report.nbytes)
    labels = ("before", "after") if report.subject in ("plan", "conversion", "verification") else ("first", "second")
    after = f"{report.target}, planned" if report.subject == "plan" else report.target
    both = ((report.source_nbytes, report.source_format), (report.nbytes, after))
    return [(label, f"{nbytes / most * 100:.3f}", nbytes, what) for label, (nbytes, what) in zip(labels, both)]


# ---------------------------------------------------------------- plot


@dataclass(frozen=True)
class Plot:
    """Points by kind as one path each, zero-length strokes of ``dot`` pixels in a square of 100 × 100; ticks as (per cent, label)."""

    paths: list[tuple[str, str]]
    down: list[tuple[str, str]]
    across: list[tuple[str, str]]
    low: float
    high: float
    floor: float
    measured: int
    unmeasured: int
    name: str
    dot: int


def _plot(report: Report) -> Plot | None:
    """Relative RMS errors of all tensors in the model's order; None where there is no error to be drawn."""
    if not any(line.error for line in report.tensors):
        return None
    low, high = _range(report.tensors)
    lines = _in_model_order(report.tensors)
    marks: dict[str, list[str]] = {}
    unmeasured = 0
    for at, line in enumerate(lines):
        y = _height(line, low, high)
        unmeasured += y is None
        if y is not None:
            marks.setdefault(line.kind, []).append(f"M{(at + 0.5) / len(lines) * 100:.2f} {y:.1f}h0")
    order = [kind for kind in KIND_MEANINGS if kind in marks]
    dot = next(pixels for most, pixels in ((60, 8), (500, 6), (3000, 4), (inf, 3)) if len(lines) <= most)
    worst = max(lines, key=lambda line: line.error or 0.0)
    return Plot(
        [(kind, "".join(marks[kind])) for kind in order], _levels(low, high), _blocks(lines), low, high, _FLOOR,
        len(lines) - unmeasured, unmeasured, worst.name, dot,
    )  # fmt: skip


def _range(lines: Iterable[TensorLine]) -> tuple[float, float]:
    """Logarithms of the axis' ends, 1, 2 or 5 times a power of ten outside the errors."""
    errors = [log10(line.error) for line in lines if line.error]
    low = max(step for step in _steps(floor(min(errors)) - 1, ceil(min(errors)) + 1) if step <= min(errors))
    high = min(step for step in _steps(floor(max(errors)) - 1, ceil(max(errors)) + 1) if step > low and step >= max(errors))
    return low, high


def _steps(first: int, last: int, factors: Sequence[int] = (1, 2, 5)) -> list[float]:
    return [power + log10(factor) for power in range(first, last + 1) for factor in factors]


def _levels(low: float, high: float) -> list[tuple[str, str]]:
    """Labels of the errors' axis: 1, 2, 5 and 10 on a short one, powers of ten on a long one."""
    factors = (1, 2, 5) if high - low <= 2.5 and low > -4.5 else (1,)
    steps = [step for step in _steps(floor(low), ceil(high), factors) if low - 1e-9 <= step <= high + 1e-9]
    nth = max(1, ceil(len(steps) / _MAX_LEVELS))
    return [(f"{(high - step) / (high - low) * _FLOOR:.2f}", _level(step)) for step in steps[::nth]]


def _level(step: float) -> str:
    """A level of the axis, which has one digit.

    >>> _level(-2.0), _level(-5.0)
    ('0.01', '10⁻⁵')
    """
    return f"{10**step:.1g}" if step > -4.5 else f"10{str(round(step)).translate(_SUPERSCRIPTS)}"


def _height(line: TensorLine, low: float, high: float) -> float | None:
    """Per cent from the top; the middle of the lowest band for what has no error."""
    if line.error:
        return (high - log10(line.error)) / (high - low) * _FLOOR
    return (_FLOOR + _HEIGHT) / 2 if line.error == 0 or line.lossless else None


def _in_model_order(lines: Iterable[TensorLine]) -> list[TensorLine]:
    """What stands before the blocks, then the blocks by number, names with numbers in them as people sort them."""

    def key(line: TensorLine) -> tuple[int, list[tuple[int, int | str]]]:
        block = _BLOCK.search(line.name)
        words = [(0, int(word)) if word.isdecimal() else (1, word) for word in _DIGITS.split(line.name)]
        return (int(block[1]) if block else -1, words)

    return sorted(lines, key=key)


def _blocks(lines: Sequence[TensorLine]) -> list[tuple[str, str]]:
    """Where blocks begin, about ``_MAX_TICKS`` of them; none of a single one."""
    starts: dict[int, int] = {}
    for at, line in enumerate(lines):
        block = _BLOCK.search(line.name)
        if block:
            starts.setdefault(int(block[1]), at)
    if len(starts) < 2:
        return []
    step = max(1, ceil(len(starts) / _MAX_TICKS))
    step = next(nice for nice in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, step) if nice >= step)
    return [(f"{at / len(lines) * 100:.2f}", str(block)) for block, at in starts.items() if block % step == 0]


# ---------------------------------------------------------------- table


def _worst_first(lines: Sequence[TensorLine]) -> list[tuple[int, TensorLine, float | None]]:
    """(place in the model, line, share of the worst error in per cent): first what has no counterpart, then by error and size."""
    places = {id(line): at for at, line in enumerate(_in_model_order(lines))}
    worst = max((line.error or 0.0 for line in lines), default=0.0)

    def key(line: TensorLine) -> tuple[bool, float, bool, int, int]:
        alone = line.kind in _NEVER and line.error is None
        return (not alone, -(line.error or 0.0), line.lossless, -line.nbytes, places[id(line)])

    return [(places[id(line)], line, 100 * line.error / worst if line.error else None) for line in sorted(lines, key=key)]


def _columns(report: Report) -> dict[str, bool]:
    """Which columns have anything in them."""
    lines = report.tensors
    return {
        "source": any(line.source_type for line in lines),
        "error": any(line.error is not None for line in lines),
        "max": any(line.max_abs for line in lines),
    }
