"""What the rules of each engine say of a checkpoint: findings, a verdict for each engine, and both as lines and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.lint.facts import facts_of
from converters.lint.fused import fused_layers
from converters.lint.reading import Found, read
from converters.lint.rules import ENGINES, SEVERITIES, Rule, engine_lists, load_rules, look_up
from converters.lint.shards import capability_of, shards
from converters.output import count, table
from qformats.errors import UsageError, printable

__all__ = ["VERDICTS", "Finding", "Lint", "Verdict", "lint_facts", "lint_path"]

VERDICTS = ("loads", "loads with warnings", "will not load")
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """A rule that is true of the checkpoint. ``where``: names of what it is true of, if that is not the checkpoint as such."""

    rule: str
    severity: str
    message: str
    source: str
    do: str = ""
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Of one engine, by the rules of its ``version``."""

    engine: str
    version: str
    findings: tuple[Finding, ...]

    @property
    def word(self) -> str:
        """One of ``VERDICTS``."""
        found = {finding.severity for finding in self.findings}
        return VERDICTS[2] if "error" in found else VERDICTS[1] if "warning" in found else VERDICTS[0]

    @property
    def loads(self) -> bool:
        """Whether the engine loads the checkpoint."""
        return self.word != VERDICTS[2]


@dataclass(frozen=True)
class Lint:
    """The answer of ``qconvert lint``."""

    path: str
    format: str
    verdicts: tuple[Verdict, ...]
    tensor_parallel: int = 1
    capability: int | None = None

    @property
    def loads(self) -> bool:
        """Whether every engine that was asked loads it."""
        return all(verdict.loads for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """JSON data."""
        engines = [
            {"engine": v.engine, "version": v.version, "verdict": v.word, "loads": v.loads, "findings": [asdict(f) for f in v.findings]}
            for v in self.verdicts
        ]
        asked = {"tensor_parallel": self.tensor_parallel, "capability": self.capability}
        return {"version": 1, "path": self.path, "format": self.format, **asked, "loads": self.loads, "engines": engines}

    def to_text(self) -> Iterator[str]:
        """Lines for a terminal."""
        parts = f", in {self.tensor_parallel} parts" if self.tensor_parallel > 1 else ""
        gpu = f", on sm_{self.capability}" if self.capability is not None else ""
        yield f"{self.path}: {self.format}{parts}{gpu}"
        rows = [(v.engine, v.version, v.word, _counted(v)) for v in self.verdicts]
        yield from table(("engine", "rules of", "verdict", ""), rows)
        for verdict in self.verdicts:
            if verdict.findings:
                yield ""
                yield f"{verdict.engine}: {verdict.word}"
            for finding in verdict.findings:
                yield f"  {finding.severity}: {finding.message}{_places(finding.where)}"
                if finding.do:
                    yield f"    do: {finding.do}"
                yield f"    see: {finding.source}"


def _counted(verdict: Verdict) -> str:
    numbers = {word: sum(f.severity == word for f in verdict.findings) for word in ("error", "warning", "note")}
    return ", ".join(count(number, word) for word, number in numbers.items() if number)


def _places(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f" ({', '.join(printable(name, 100) for name in names[:_SHOWN])}{more})"


def lint_path(
    path: str | Path,
    engines: Sequence[str] = ENGINES,
    *,
    allow_pickle: bool = False,
    tensor_parallel: int = 1,
    gpu: str | None = None,
) -> Lint:
    """Hold the checkpoint at ``path`` (a file, a directory, ``hf://org/name``) against the rules of ``engines``.

    ``tensor_parallel``: parts that every matrix is cut into. ``gpu``: its compute capability (``sm_90``, ``9.0``).

    Raises ``UsageError`` (``unknown-engine``, ``gpu-capability``, ``tensor-parallel``), and what ``reading.read`` raises where there
    is nothing to lint.
    """
    for engine in engines:
        if engine not in ENGINES:
            raise UsageError("unknown-engine", f"there are no rules for {engine!r}", hint=f"engines: {', '.join(ENGINES)}")
    if tensor_parallel < 1:
        raise UsageError("tensor-parallel", f"{tensor_parallel} parts of a matrix", hint="1 or more")
    capability = capability_of(gpu)
    found = read(path, allow_pickle)
    try:
        return lint_facts(found, facts_of(found, tensor_parallel, capability), engines)
    finally:
        found.close()


def lint_facts(found: Found, facts: Mapping[str, Any], engines: Sequence[str]) -> Lint:
    """The same of facts that are known already."""
    verdicts = []
    for engine in dict.fromkeys(engines):
        version, rules = load_rules(engine)
        own, lists = dict(facts), engine_lists(engine)
        own["shards"] = shards(facts, lists)
        own["least_capability"] = lists.get("least_capability", {}).get(facts.get("method"))
        if found.checkpoint is not None and "fused" in lists:
            own["fused"] = fused_layers(found.checkpoint, list(facts["modules"]), lists["fused"], facts.get("architecture"))
        findings = [finding for rule in rules if (finding := _finding(rule, own)) is not None]
        verdicts.append(Verdict(engine, version, tuple(sorted(findings, key=lambda f: SEVERITIES.index(f.severity)))))
    asked = (facts["tensor_parallel"], facts["capability"])
    return Lint(str(facts["path"]), str(facts.get("format") or "unknown"), tuple(verdicts), *asked)


def _finding(rule: Rule, facts: Mapping[str, Any]) -> Finding | None:
    hits = list(rule.hits(facts))
    if not hits:
        return None
    value = _shown(look_up(hits[0], rule.when[0][0])) if rule.when else ""
    words = {"value": value, "path": facts["path"], "format": facts.get("format") or "unknown", "method": facts.get("method") or "none"}
    where = tuple(str(hit.get("name", "")) for hit in hits) if rule.each else ()
    return Finding(rule.id, rule.severity, rule.message.format(**words), rule.source, rule.do.format(**words), where)


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        few = ", ".join(_shown(item) for item in value[:_SHOWN])
        return f"{few} and {len(value) - _SHOWN} more" if len(value) > _SHOWN else few
    return printable(str(value).lower() if isinstance(value, bool) else str(value), 160)
