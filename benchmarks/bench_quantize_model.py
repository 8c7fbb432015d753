"""Quantize a whole float GGUF, against llama.cpp's ``llama_model_quantize`` with the same number of threads, in one run.

    python benchmarks/bench_quantize_model.py MODEL [TYPE ...] [--threads 2] [--repeats 3]

MODEL is a directory or a GGUF of floats; it becomes a float16 GGUF first. Each side reads that file and writes a whole file, in turns;
figures are medians of wall seconds, loops compiled before. Ours is timed to the file on the disk under its final name (flushed), digests
and provenance included; llama.cpp's ends with its last write. Exit code 1 if the bytes of a tensor differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "real")]

import llamacpp  # type: ignore[import-not-found,unused-ignore]  # noqa: E402

from converters import convert  # noqa: E402
from qformats.containers.gguf import open_gguf  # noqa: E402


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def same(a: Path, b: Path) -> bool:
    """Whether two files hold the same tensors."""
    one, other = open_gguf(a).tensors, open_gguf(b).tensors
    return one.keys() == other.keys() and all(one[name].read() == other[name].read() for name in one)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("types", nargs="*", default=["q4_k_m"], metavar="TYPE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    equal = True
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as work:
        source, ours, theirs = (Path(work) / name for name in ("f16.gguf", "ours.gguf", "theirs.gguf"))
        convert(options.model, source, to="gguf:f16")
        size = f"{source.stat().st_size / 1e6:.0f} MB of float16"
        print(f"{options.model.name}, {size}, {options.threads} threads, median of {options.repeats}")
        print("\n| type | ours s | llama.cpp s | ratio | same tensors |\n|---|---|---|---|---|")
        for kind in options.types:

            def mine(kind: str = kind) -> None:
                convert(source, ours, to=f"gguf:{kind}", allow_requantize=True, workers=options.threads, overwrite=True)

            def other(kind: str = kind) -> None:
                llamacpp.quantize_file(source, theirs, kind.upper(), threads=options.threads)

            mine()
            times = [(seconds(mine), seconds(other)) for _ in range(options.repeats)]
            a, b = (statistics.median(side) for side in zip(*times, strict=True))
            good = same(ours, theirs)
            equal &= good
            print(f"| {kind} | {a:.2f} | {b:.2f} | {b / a:.2f} | {'yes' if good else 'no'} |", flush=True)
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
