"""Products with packed weights on the CPU against torch's float products, and how fast weights are lowered, in one process.

    python benchmarks/bench_cpu_matmul.py [--size 4096] [--threads 1] [--repeats 10] [--inputs 1,4,16,64,256] [--write]

Each figure is the fastest of ``--repeats``, all sides in turn; on one thread by the thread's own clock. A ratio is the time of the faster
of the float32 and bfloat16 ``F.linear`` divided by ours: above 1 is faster than floats. ``ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI`` before
the command takes bfloat16's matrix unit away from torch, which few CPUs have. ``--write`` adds to benchmarks/results/cpu-matmul.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qformats.kernels import cpu  # noqa: E402
from qformats.kernels.lower import Lowered, lower  # noqa: E402
from qformats.scheme import Flat, Float, Integer, Table, Tile  # noqa: E402
from qformats.tensor import Param, QuantizedTensor, constant  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "cpu-matmul.md"
RNG = torch.Generator().manual_seed(0)


def codes(low: int, high: int, rows: int, columns: int) -> torch.Tensor:
    dtype = torch.int8 if low < 0 else torch.uint8
    return torch.randint(low, high, (rows, columns), generator=RNG).to(dtype)


def scales(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(shape, generator=RNG) * 0.01 + 0.001).to(dtype)


def nested(n: int, width: int, per: int, grid: Integer) -> Param:
    across = n // width
    values = codes(grid.lowest, grid.highest + 1, n, across)
    inner = QuantizedTensor((n, across), values, grid, (Param(scales((n, across // per)), Tile((1, per))),))
    return Param(inner, Tile((1, width)))


def grouped(n: int, width: int, dtype: torch.dtype = torch.float16) -> Param:
    return Param(scales((n, n // width), dtype), Tile((1, width)))


def weights(n: int) -> dict[str, Callable[[], QuantizedTensor]]:
    """Random weights of n x n of each kind."""
    shape, four = (n, n), Integer(4)
    zero = {
        "gptq": lambda: Param(codes(0, 16, n, n // 128), Tile((1, 128))),
        "hqq": lambda: Param(scales((n, n // 64)) * 800, Tile((1, 64))),
    }
    exponents = lambda: QuantizedTensor((n, n // 32), codes(110, 126, n, n // 32), Float("e8m0"))  # noqa: E731
    return {
        "Q4_0": lambda: QuantizedTensor(shape, codes(0, 16, n, n), four, (grouped(n, 32),), constant(8, shape)),
        "Q4_K": lambda: QuantizedTensor(
            shape, codes(0, 16, n, n), four, (nested(n, 32, 8, Integer(6)),), offset=nested(n, 32, 8, Integer(6))
        ),
        "Q8_0": lambda: QuantizedTensor(shape, codes(-127, 128, n, n), Integer(8, True), (grouped(n, 32),)),
        "Q6_K": lambda: QuantizedTensor(shape, codes(0, 64, n, n), Integer(6), (nested(n, 16, 16, Integer(8, True)),), constant(32, shape)),
        "IQ4_NL": lambda: QuantizedTensor(shape, codes(0, 16, n, n), Table("iq4_nl"), (grouped(n, 32),)),
        "NF4, block 64": lambda: QuantizedTensor(
            shape, codes(0, 16, n, n), Table("nf4"), (Param(scales((n * n // 64,), torch.float32), Flat(64)),)
        ),
        "GPTQ int4, g128": lambda: QuantizedTensor(shape, codes(0, 16, n, n), four, (grouped(n, 128),), zero["gptq"]()),
        "MXFP4": lambda: QuantizedTensor(shape, codes(0, 16, n, n), Float("e2m1"), (Param(exponents(), Tile((1, 32))),)),  # type: ignore[no-untyped-call]
        "HQQ int4, g64": lambda: QuantizedTensor(shape, codes(0, 16, n, n), four, (grouped(n, 64),), zero["hqq"]()),
        "FP8 e4m3, 128 x 128": lambda: QuantizedTensor(
            shape, codes(0, 126, n, n), Float("e4m3fn"), (Param(scales((n // 128, n // 128), torch.float32), Tile((128, 128))),)
        ),
    }


def best(sides: list[Callable[[], object]], repeats: int) -> list[float]:
    """The fastest seconds of each side, taken in turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    found = [float("inf")] * len(sides)
    for _ in range(repeats):
        for number, run in enumerate(sides):
            began = clock()
            run()
            found[number] = min(found[number], clock() - began)
    return found


def measure(lowered: Lowered, floats: tuple[torch.Tensor, torch.Tensor], inputs: list[int], repeats: int) -> list[list[float]]:
    """For each number of inputs: milliseconds of float32, bfloat16, exact, int8."""
    n, k = lowered.layout.shape
    found = []
    for count in inputs:
        x = torch.randn(count, k, generator=RNG)
        half = x.to(torch.bfloat16)
        sides: list[Callable[[], object]] = [
            lambda x=x: F.linear(x, floats[0]),  # type: ignore[misc]
            lambda half=half: F.linear(half, floats[1]),  # type: ignore[misc]
            lambda x=x: cpu.matmul(x, lowered, 0, n, "exact"),  # type: ignore[misc]
            lambda x=x: cpu.matmul(x, lowered, 0, n, "int8"),  # type: ignore[misc]
        ]
        found.append([1e3 * seconds for seconds in best(sides, repeats if count < 64 else max(3, repeats // 2))])
    return found


def products(lines: list[str], arguments: argparse.Namespace, inputs: list[int]) -> None:
    n = arguments.size
    dense = torch.randn(n, n, generator=RNG)
    floats = dense, dense.to(torch.bfloat16)
    lines += [
        f"Milliseconds float32 / bfloat16 / exact / int8, then the ratios exact and int8 to the faster float; {n} x {n}.", "",
        "| weight | " + " | ".join(f"M = {count}" for count in inputs) + " |", "|---" * (len(inputs) + 1) + "|",
    ]  # fmt: skip
    for name, build in weights(n).items():
        lowered = lower(build())
        cells = []
        for one in measure(lowered, floats, inputs, arguments.repeats):
            faster = min(one[:2])
            times = " / ".join(f"{value:.1f}" for value in one)
            cells.append(f"{times}: **{faster / one[2]:.2f}**, **{faster / one[3]:.2f}**")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)


def loading(lines: list[str], arguments: argparse.Namespace) -> None:
    n = arguments.size
    lines += [
        "", "Lowering at load, and decoding to float32, 10^9 weights a second; the definition in torch beside.", "",
        "| weight | lower | decode | decode by the definition |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, build in weights(n).items():
        t = build()
        lowered = lower(t)
        sides: list[Callable[[], object]] = [
            lambda t=t: lower(t),  # type: ignore[misc]
            lambda lowered=lowered: cpu.dequantize(lowered, slice(0, 256)),  # type: ignore[misc]
            lambda lowered=lowered: lowered.dequantize(slice(0, 256)),  # type: ignore[misc]
        ]
        whole, decoded, defined = best(sides, 5)
        lines.append(f"| {name} | {n * n / whole / 1e9:.2f} | {256 * n / decoded / 1e9:.2f} | {256 * n / defined / 1e9:.3f} |")
        print(lines[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--inputs", default="1,4,16,64,256")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    lines = [f"## {torch.get_num_threads()} thread(s), torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"]
    lines += [f"(`ONEDNN_MAX_CPU_ISA={limit}`)" if limit else "(torch with all the CPU has)", ""]
    products(lines, arguments, [int(count) for count in arguments.inputs.split(",")])
    loading(lines, arguments)
    if arguments.write:
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write("\n".join([*lines, "", ""]))


if __name__ == "__main__":
    main()
