"""Peak anonymous memory of conversions in a process of their own, sampled from /proc (Linux): the largest RssAnon.

usage: bench_memory.py [--workers 2] [--layers 12] [--rows 65536] [--columns 8192] [--dir DIR]
Sources are synthetic: a checkpoint of about 1 GB, and one whose ``up_proj`` is a single tensor of ``--rows`` x ``--columns`` 4-bit weights.
Baseline: the imports alone. The bound is 400 MiB + 64 MiB a worker, whatever the tensor's size. Exit code 1 if one is above.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthetic import make, make_wide

ROOT = Path(__file__).resolve().parent.parent
CASES = (("awq", "gguf"), ("awq", "gguf:q4_1"), ("awq", "gptq"), ("gptq", "gguf"), ("gptq", "awq"), ("gptq act-order", "gguf"))
_IMPORTS = """
import torch, numba
import converters.execute, converters.plan, qformats.reencode, qformats.loops.words, qformats.loops.blocks
"""
_CONVERT = """
import sys
from converters.options import PlanOptions
from converters.execute import execute
from converters.plan import make_plan
from qformats import registry
source, target, to, workers = sys.argv[1:]
plan = make_plan(source, PlanOptions(registry.parse_target(to)))
execute(plan, target, overwrite=True, workers=int(workers))
"""


def peak_nbytes(code: str, *arguments: str) -> int:
    """The largest RssAnon of ``python -c code arguments`` in bytes; ``CalledProcessError`` if it fails."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT)
    peak = 0
    while process.poll() is None:
        peak = max(peak, rss_anon(process.pid))
        time.sleep(0.002)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return peak


def rss_anon(pid: int) -> int:
    """Anonymous resident bytes of a process now, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return found[0] * 1024 if found else 0


def conversion_peak(source: Path, to: str, workers: int) -> int:
    """Peak of planning and carrying out one conversion, output thrown away."""
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        return peak_nbytes(_CONVERT, str(source), f"{scratch}/out", to, str(workers))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "qformats-bench")
    args = parser.parse_args()
    bound = (400 + 64 * args.workers) << 20
    print(f"bound {bound >> 20} MiB with {args.workers} workers, imports alone {peak_nbytes(_IMPORTS) >> 20} MiB")
    print("| source | target | peak MiB | |\n|---|---|---|---|")
    good = True
    for kind, to in CASES:
        method, _, act_order = kind.partition(" ")
        sources = [(f"{args.rows} x {args.columns}", make_wide(args.dir, method, args.rows, args.columns, bool(act_order)))]
        if not act_order:
            sources.append((f"{args.layers} layers", make(args.dir, method, args.layers)))
        for name, source in sources:
            peak = conversion_peak(source, to, args.workers)
            good &= peak <= bound
            print(f"| {kind}, {name} | {to} | {peak >> 20} | {'pass' if peak <= bound else 'ABOVE'} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
