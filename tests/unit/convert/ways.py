"""A → B → A: conversions there and back, and what is not the same afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import walk
from checkpoints import converted, planned

from converters.plan import Plan
from converters.verify import verify
from qformats.checkpoint import open_checkpoint
from qformats.errors import QFormatError

__all__ = ["KEPT", "LOST", "differences", "there_and_back", "unkept"]

KEPT = ("copied", "exact", "codes-exact")
LOST = "will not come back bit for bit"


def there_and_back(source: Path, target: str, folder: Path) -> tuple[Path, Path]:
    with open_checkpoint(source) as opened:
        name = opened.format
    there = folder / ("there.gguf" if target == "gguf" else "there")
    back = folder / ("back.gguf" if source.is_file() else "back")
    converted(source, there, target, allow_requantize=True)
    converted(there, back, name, allow_requantize=True)
    return there, back


def differences(a: Path, b: Path) -> list[str]:
    """Names of tensors, files and metadata that are not the same; a tokenizer and the ends of a GGUF may come back in another form."""
    with open_checkpoint(a) as x, open_checkpoint(b) as y:
        ends = ("token_embd", "output") if x.gguf is not None else ()
        mine, theirs = (
            {name: (raw.dtype, raw.shape, raw.read()) for name, raw in c.raw.items() if name.split(".")[0] not in ends} for c in (x, y)
        )
        found = [name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)]
        if x.gguf is not None:
            return found
        words = [{k: v for k, v in c.metadata.items() if not k.startswith("qformats.")} for c in (x, y)]
        found += [] if words[0] == words[1] or words[0].keys() <= {"format"} else ["metadata"]
    for file in a.glob("*.json"):
        if file.name == "quantization_config.json":  # AutoRound's second copy of what config.json has
            continue
        if not file.name.startswith("tokenizer") and (not (b / file.name).exists() or _json(file) != _json(b / file.name)):
            found.append(file.name)
    return found


def _json(file: Path) -> object:
    return json.loads(file.read_text())


def unkept(source: Path, target: str, folder: Path) -> list[str] | None:
    """What a conversion to ``target`` and back loses without saying so; None where no linear weight keeps its codes.

    Of weights with new codes, and of those that the plan says will not come back, nothing is expected.
    """
    try:
        plan = planned(source, target, allow_requantize=True)
    except QFormatError:
        return None
    plan.checkpoint.close()
    linear = [job for job in plan.jobs if job.map.leaf == "weight" and len(job.map.shape) > 1 and job.map.kind in walk.LINEAR]
    kept = [job for job in linear if job.action == "codes" and job.kind in KEPT and not any(LOST in note for note in job.notes)]
    if not kept or plan.checkpoint.format == target:
        return None
    there, back = there_and_back(source, target, folder)
    for replay in (False, True):
        assert verify(source, there, replay=replay).ok and verify(there, back, replay=replay).ok
    found = differences(source, back)
    new = {source.module for job in plan.jobs if job.kind in ("requantized", "dequantized") for source in job.map.sources}
    if not new:
        return found
    modules = {source.module for job in kept for source in job.map.sources} - new
    return [name for name in found if _module(plan, name) in modules]


def _module(plan: Plan, name: str) -> str | None:
    """The source's module that a stored tensor belongs to."""
    parts = {raw.name: module.name for module in plan.checkpoint.modules.values() for raw in module.parts.values()}
    return parts.get(name)
