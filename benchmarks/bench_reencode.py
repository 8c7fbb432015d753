"""The re-encode step alone: packed words in memory -> codes -> fit -> finish -> packed blocks, one thread, no files.

usage: bench_reencode.py [--rows 4096] [--columns 4096] [--step 4] [--repeats 9]
Rates are 10^6 weights a second, the best of the repeats; ``--step`` is the 10^6 weights of one row range. Columns: the whole step, then its
parts, each measured alone on the same ranges (their times need not add up), and memcpy of the codes for scale. The target is 300.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from synthetic import linear

from qformats import registry
from qformats.containers.raw import RawTensor
from qformats.formats.protocol import Match, Module
from qformats.reencode import finish, fit
from qformats.scheme import Storage

PAIRS = (("awq", "q5_0"), ("awq", "q4_1"), ("awq", "q8_0"), ("gptq", "q4_0"), ("gptq", "q4_1"), ("gptq", "q8_0"))
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "checkpoint_format": "gptq"},
}


def module(method: str, rows: int, columns: int) -> Module:
    """One synthetic linear module in memory."""
    parts = {name.rpartition(".")[2]: RawTensor.from_array(name, dtype, array)
             for name, dtype, array in linear(np.random.default_rng(0), "m", rows, columns, method)}  # fmt: skip
    return Module("m", parts, Match(method, CONFIGS[method]))


def best(call: Callable[[], object], repeats: int) -> float:
    """Least wall time in seconds after one warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def measure(method: str, kind: str, rows: int, columns: int, step: int, repeats: int) -> list[float]:
    """Seconds of the whole step and of read, fit, finish, write and memcpy over all ranges."""
    source, reader, writer = module(method, rows, columns), registry.format_module(method), registry.format_module("gguf")
    target = registry.parse_target(f"gguf:{kind}")
    storage: Storage = writer.storages(target, reader.scheme(source))[0]
    ranges = [(at, min(rows, at + step)) for at in range(0, rows, step)]

    def whole() -> None:
        for start, stop in ranges:
            tensor = reader.read(source, start, stop)
            made = finish(tensor, fit(tensor, storage, rounding=True))
            writer.write(storage, made, start, (rows, columns))

    tensors = [reader.read(source, *r) for r in ranges]
    fits = [fit(t, storage, rounding=True) for t in tensors]
    made = [finish(t, f) for t, f in zip(tensors, fits, strict=True)]
    return [
        best(call, repeats)
        for call in (
            whole,
            lambda: [reader.read(source, *r) and None for r in ranges],
            lambda: [fit(t, storage, rounding=True) and None for t in tensors],
            lambda: [finish(t, f) and None for t, f in zip(tensors, fits, strict=True)],
            lambda: [writer.write(storage, m, r[0], (rows, columns)) and None for m, r in zip(made, ranges, strict=True)],
            lambda: [t.codes.numpy().copy() is None for t in tensors],
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--step", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    step = max(32, int(args.step * (1 << 20)) // args.columns // 32 * 32)
    print(f"{args.rows} x {args.columns} weights in ranges of {step} rows, one thread, best of {args.repeats}, 10^6 weights/s")
    print("| pair | whole step | read | fit | finish | write | memcpy |\n|---|---|---|---|---|---|---|")
    for method, kind in PAIRS:
        seconds = measure(method, kind, args.rows, args.columns, step, args.repeats)
        cells = " | ".join(f"{args.rows * args.columns / s / 1e6:.0f}" for s in seconds)
        print(f"| {method} → {kind} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
