"""Whether an engine will load a checkpoint, and why not: facts of the checkpoint held against rules that are kept as data.

``reading`` opens what is there, broken or not; ``facts`` says what it is in plain values; ``rules`` reads the tables under ``data`` (one
for each engine, every rule with the project, version and file it was read in); ``shards`` says what each of several GPUs gets of a matrix;
``verdicts`` holds one against the other. Nothing of an engine is imported, and nothing here looks at codes.
"""

from converters.lint.rules import ENGINES, Rule, load_rules
from converters.lint.verdicts import Finding, Lint, Verdict, lint_path

__all__ = ["ENGINES", "Finding", "Lint", "Rule", "Verdict", "lint_path", "load_rules"]
