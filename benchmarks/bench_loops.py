"""Speed of the packing loops: weights a second, one thread, on a range of about 2 MiB of codes; memcpy of the same codes beside it.

usage: bench_loops.py [--rows N] [--columns K] [--repeats R]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from qformats.bits import pack_columns, pack_interleaved, pack_rows, unpack_columns, unpack_interleaved, unpack_rows


def best(function: Callable[[], Any], repeats: int) -> float:
    """Least wall time of ``repeats`` calls after one warm-up call, in seconds."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def cases(rows: int, columns: int) -> list[tuple[str, Callable[[], Any]]]:
    """(name, call) for each loop and width."""
    rng = np.random.default_rng(0)
    out: list[tuple[str, Callable[[], Any]]] = []
    for bits in (4, 2, 3, 8):
        codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
        words = pack_columns(codes, bits)
        out.append((f"gptq unpack {bits}-bit", lambda w=words, b=bits: unpack_columns(w, b, columns)))  # type: ignore[misc]
        out.append((f"gptq pack   {bits}-bit", lambda c=codes, b=bits: pack_columns(c, b)))  # type: ignore[misc]
    codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    gemm, gemv = pack_interleaved(codes), pack_rows(codes, 4)
    out.append(("awq gemm unpack", lambda: unpack_interleaved(gemm)))
    out.append(("awq gemm pack", lambda: pack_interleaved(codes)))
    out.append(("awq gemv unpack", lambda: unpack_rows(gemv, 4, columns)))
    out.append(("awq gemv pack", lambda: pack_rows(codes, 4)))
    out.append(("memcpy of the codes", codes.copy))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    weights = args.rows * args.columns
    print(f"| loop | M weights/s | ({args.rows} x {args.columns})\n|---|---|")
    for name, call in cases(args.rows, args.columns):
        print(f"| {name} | {weights / best(call, args.repeats) / 1e6:.0f} |")


if __name__ == "__main__":
    main()
