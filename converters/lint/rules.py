"""The rules: read from ``data/ENGINE.toml``, their lists from ``data/ENGINE.json``, and tested against facts.

A rule in the table::

    [[rule]]
    id = "gptq-bits"                       # unique within the engine
    severity = "error"                     # error: it does not load; warning: it loads and something is wrong; note: what it needs
    formats = ["gptq"]                     # formats it is about (absent: any)
    each = "modules"                       # a list among the facts: the rule is tested on each entry (absent: on the facts)
    given = [["method", "is", "gptq"]]     # all of these hold of the facts as such, where `when` is about each entry
    when = [["bits", "not in", [4, 8]]]    # all of these hold
    any = [["a", "is", 1], ["b", "missing"]]   # and, if given, at least one of these
    message = "{value} bits"               # {value}: what the first condition of `when` looked at
    do = "qconvert convert {path} OUT --to gguf"
    source = "project version, file, function"

A condition is ``[fact, operator, value]``; a fact is a name with dots into the facts; a value ``"@name"`` is a list of the engine's JSON,
``"@engine:name"`` one of another's, ``"=name"`` another fact.
Operators: ``is``, ``is not``, ``in``, ``not in``, ``missing`` (absent or null), ``present``, ``above``, ``below``, ``no multiple of``
(numbers; only positive ones have multiples), ``matches`` (regular expression on the whole text), ``within`` (a list that has nothing
beyond the value), ``beyond`` (one that has), ``meets`` (one with something of it), ``holds``, ``lacks`` (of a list). A fact that is absent
makes every operator but ``missing``, ``is not`` and ``not in`` false.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["ENGINES", "SEVERITIES", "Rule", "engine_lists", "load_rules", "look_up"]

ENGINES = ("vllm", "sglang", "transformers", "llama.cpp", "ollama")
SEVERITIES = ("error", "warning", "note")
OPERATORS = (
    "is", "is not", "in", "not in", "missing", "present", "above", "below", "no multiple of", "matches", "within", "beyond", "meets",
    "holds", "lacks",
)  # fmt: skip
Condition = tuple[str, str, Any]


@dataclass(frozen=True)
class Rule:
    """One row of a table; the fields are those of the module's docstring."""

    engine: str
    id: str
    severity: str
    when: tuple[Condition, ...]
    message: str
    source: str
    any: tuple[Condition, ...] = ()
    given: tuple[Condition, ...] = ()
    formats: tuple[str, ...] = ()
    each: str = ""
    do: str = ""

    def hits(self, facts: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """What the rule is true of: the facts themselves, or entries of the list that it names."""
        if (self.formats and facts.get("format") not in self.formats) or not all(_holds(facts, c) for c in self.given):
            return
        found = facts if not self.each else look_up(facts, self.each) or ()
        for item in [found] if isinstance(found, Mapping) else found:
            if all(_holds(item, c) for c in self.when) and (not self.any or any(_holds(item, c) for c in self.any)):
                yield item


@cache
def load_rules(engine: str) -> tuple[str, tuple[Rule, ...]]:
    """The version that the rules of ``engine`` were read in, and the rules."""
    table = tomllib.loads((files(__package__) / "data" / f"{engine}.toml").read_text(encoding="utf-8"))
    return str(table["version"]), tuple(_rule(engine, row) for row in table["rule"])


@cache
def engine_lists(engine: str) -> Mapping[str, Any]:
    """The lists of names that the rules of ``engine`` speak of."""
    found: Mapping[str, Any] = json.loads((files(__package__) / "data" / f"{engine}.json").read_text(encoding="utf-8"))
    return found


def _rule(engine: str, row: Mapping[str, Any]) -> Rule:
    if row["severity"] not in SEVERITIES:
        raise ValueError(f"{engine}: {row['id']}: severity {row['severity']!r}")
    when, others, given = (tuple(_condition(c, engine) for c in row.get(key, ())) for key in ("when", "any", "given"))
    texts = (str(row.get(key, "")) for key in ("each", "do"))
    formats = tuple(row.get("formats", ()))
    return Rule(engine, row["id"], row["severity"], when, row["message"], row["source"], others, given, formats, *texts)


def _condition(row: Sequence[Any], engine: str) -> Condition:
    name, operator, value = (*row, None)[:3]
    if operator not in OPERATORS:
        raise ValueError(f"{operator!r} is no operator")
    if isinstance(value, str) and value.startswith("@"):
        other, colon, listed = value[1:].rpartition(":")
        value = engine_lists(other if colon else engine)[listed]
    return name, operator, value


def look_up(facts: Mapping[str, Any], name: str) -> Any:
    """A fact by its name with dots; None where there is none."""
    found: Any = facts
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _holds(facts: Mapping[str, Any], condition: Condition) -> bool:
    name, operator, value = condition
    found = look_up(facts, name)
    if isinstance(value, str) and value.startswith("="):
        value = look_up(facts, value[1:])
    if operator in ("missing", "present"):
        return (found is None) == (operator == "missing")
    if operator == "is not":
        return bool(found != value)
    if operator == "not in":
        return found not in value
    return found is not None and _TESTS[operator](found, value)


_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "is": lambda found, value: bool(found == value) and isinstance(found, bool) == isinstance(value, bool),
    "in": lambda found, value: isinstance(found, (str, int, float, bool)) and found in value,
    "above": lambda found, value: isinstance(found, (int, float)) and found > value,
    "below": lambda found, value: isinstance(found, (int, float)) and isinstance(value, (int, float)) and found < value,
    "no multiple of": lambda found, value: isinstance(found, int) and isinstance(value, int) and value > 0 and found % value != 0,
    "matches": lambda found, value: isinstance(found, str) and re.fullmatch(value, found) is not None,
    "within": lambda found, value: isinstance(found, (list, tuple)) and set(found) <= set(value),
    "beyond": lambda found, value: isinstance(found, (list, tuple)) and not set(found) <= set(value),
    "meets": lambda found, value: isinstance(found, (list, tuple)) and not set(found).isdisjoint(value),
    "holds": lambda found, value: isinstance(found, (list, tuple, str, Mapping)) and value in found,
    "lacks": lambda found, value: isinstance(found, (list, tuple, str, Mapping)) and value not in found,
}
