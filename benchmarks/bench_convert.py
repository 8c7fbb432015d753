"""Conversion and verification of a 1 GB checkpoint against cp and cat of the same files, all in one run.

usage: bench_convert.py [--layers 12] [--repeat 5] [--dir DIR]
Both sides are durable: ours fsyncs file and directory, theirs is cp of the input, cp of the output, then sync. Median of the repeats,
alternating, source warm. Prints a markdown table with ratios (1 = as fast as the peer).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from synthetic import make

from converters.execute import execute
from converters.options import PlanOptions
from converters.plan import make_plan
from converters.verify import verify
from qformats import registry

CASES = (("awq", "gguf"), ("awq", "gguf:q4_1"), ("gptq", "gguf"))


def timed(action: object) -> float:
    assert callable(action)
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def copy_both(source: Path, output: Path, scratch: Path) -> None:
    subprocess.run(["cp", str(source), str(scratch / "a")], check=True)
    subprocess.run(["cp", str(output), str(scratch / "b")], check=True)
    subprocess.run(["sync"], check=True)


def cat_both(source: Path, output: Path) -> None:
    with open(os.devnull, "wb") as null:
        subprocess.run(["cat", str(source), str(output)], stdout=null, check=True)


def convert(source: Path, output: Path, target: str) -> None:
    plan = make_plan(source, PlanOptions(registry.parse_target(target)))
    with plan.checkpoint:
        execute(plan, output, overwrite=True, workers=2)


def run(source: Path, target: str, repeat: int, scratch: Path) -> dict[str, float]:
    output, weights = scratch / "out.gguf", source / "model.safetensors"
    convert(source, output, target)
    times: dict[str, list[float]] = {"convert": [], "cp": [], "verify": [], "cat": []}
    subprocess.run(["sync"], check=True)
    for _ in range(repeat):
        cat_both(weights, output)
        output.unlink()  # neither side replaces a file
        times["convert"].append(timed(lambda: convert(source, output, target)))
        for name in ("a", "b"):
            (scratch / name).unlink(missing_ok=True)
        times["cp"].append(timed(lambda: copy_both(weights, output, scratch)))
        times["verify"].append(timed(lambda: verify(source, output, workers=2)))
        times["cat"].append(timed(lambda: cat_both(weights, output)))
    result = {name: statistics.median(values) for name, values in times.items()}
    result["in"], result["out"] = weights.stat().st_size, output.stat().st_size
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "qformats-bench")
    args = parser.parse_args()
    print("| conversion | in MB | out MB | convert s | cp+cp+sync s | ratio | verify s | cat s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for method, target in CASES:
        source = make(args.dir, method, args.layers)
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            r = run(source, target, args.repeat, Path(scratch))
        print(
            f"| {method} → {target} | {r['in'] / 1e6:.0f} | {r['out'] / 1e6:.0f} | {r['convert']:.2f} | {r['cp']:.2f} | "
            f"{r['cp'] / r['convert']:.2f} | {r['verify']:.2f} | {r['cat']:.2f} | {r['cat'] / r['verify']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
