"""Every exact and codes-exact pair of a source type and a target format, re-encoded in memory on one thread, slowest first.

    python benchmarks/bench_pairs.py [--rows 2048] [--columns 4096] [--repeats 3] [--folder DIR] [--below 0] [SOURCE[=TARGET] ...]

The pairs are those of docs/kinds.json. A source is a llama of one layer that our own quantizer wrote, its ``up_proj`` of ROWS x COLUMNS;
of a pair it is what the plan makes of that one matrix, carried out by the executor's own functions: stored parts in memory -> read ->
rewrites -> write -> stored parts, which are dropped. CPU time, the least of the repeats after one call that is not counted,
in 10^6 weights a second. Types that only a fixture has (``mxfp4``: stacked experts) are left out. With --folder the sources are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "unit" / "convert")]

import walk  # noqa: E402  # what docs/kinds.json is made with

from converters import execute  # noqa: E402
from converters.jobs import Job  # noqa: E402
from converters.outputs import OutputPart  # noqa: E402
from converters.plan import Plan  # noqa: E402
from qformats.containers.raw import RawTensor  # noqa: E402
from qformats.containers.source import MemorySource  # noqa: E402
from qformats.formats.protocol import Module  # noqa: E402

WORDS = ("exact ", "codes-exact ")
SPREAD = 64  # the columns of a head: the attention's matrices stay small beside those of the feed-forward part


class Nowhere:
    """A sink that counts."""

    def __init__(self) -> None:
        self.nbytes = 0

    def put(self, part: OutputPart, offset: int, data: memoryview) -> None:
        self.nbytes += len(data)


def pairs(wanted: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Sources and their targets, of those that ``wanted`` names (``SOURCE`` or ``SOURCE=TARGET``, parts of names; all if empty)."""
    known: dict[str, dict[str, str]] = json.loads((ROOT / "docs" / "kinds.json").read_text())
    for source, row in known.items():
        targets = [target for target, outcome in row.items() if any(word in f" {outcome}" for word in (f" {w}" for w in WORDS))]
        if wanted:
            targets = [t for t in targets if any(w.partition("=")[0] in source and w.partition("=")[2] in t for w in wanted)]
        if ":" in source and targets:
            yield source, targets


def in_memory(plan: Plan, job: Job) -> None:
    """Put the parts of the job's source where no file is read."""
    for name in {source.module for source in job.map.sources}:
        module = plan.checkpoint.modules[name]
        parts = {leaf: _held(raw) for leaf, raw in module.parts.items()}
        plan.checkpoint.modules[name] = Module(name, parts, module.match, columns=module.columns)


def _held(raw: RawTensor) -> RawTensor:
    return RawTensor(raw.name, raw.dtype, raw.shape, MemorySource(raw.read(), raw.name), 0, raw.nbytes, raw.big_endian)


def measure(plan: Plan, job: Job, repeats: int) -> float:
    """Seconds of all tasks of ``job``."""
    in_memory(plan, job)
    taken = []
    for _ in range(repeats + 1):
        sink, errors = Nowhere(), execute._Errors()
        began = time.process_time()
        for task in execute._tasks(plan, job):
            execute._run_task(plan, task, sink, errors)
        taken.append(time.process_time() - began)
    return min(taken[1:])


def matrix(plan: Plan, shape: tuple[int, int]) -> Job | None:
    """The job of the first matrix of ``shape`` that keeps its codes."""
    found = [job for job in plan.jobs if job.map.shape == shape and job.action == "codes"]
    return found[0] if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", nargs="*", metavar="SOURCE[=TARGET]", help="parts of names; all without")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--below", type=float, default=0.0, help="print pairs under this rate as they come, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: list[tuple[float, str, str]] = []
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        walk.dense(folder, args.columns, args.rows, SPREAD)
        for source, targets in pairs(args.pairs):
            made = walk.make(source, folder)
            for target in targets:
                plan = walk.planned(made, target)
                with plan.checkpoint:
                    job = matrix(plan, (args.rows, args.columns))
                    if job is None:
                        print(f"{source} → {target}: no such matrix keeps its codes", file=sys.stderr)
                        continue
                    rate = args.rows * args.columns / measure(plan, job, args.repeats) / 1e6
                found.append((rate, f"{source} → {target} {job.type}", job.kind))
                if rate < args.below:
                    print(f"{rate:.0f} {found[-1][1]}", file=sys.stderr, flush=True)
    print(f"{args.rows} x {args.columns} weights, one thread, CPU time, best of {args.repeats}\n")
    print("| 10^6 weights/s | pair | kind |\n|---|---|---|")
    for rate, pair, kind in sorted(found):
        print(f"| {rate:.0f} | {pair} | {kind} |")


if __name__ == "__main__":
    main()
