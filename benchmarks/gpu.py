"""Products with packed weights on a GPU: time, share of the floor of reading the bytes, ratios to torch's product and to other libraries.

usage: gpu.py [--classes NAME …] [--shapes N,K …] [--batches M …] [--tune]

All in one run, on random data: copy bandwidth; a kernel that only reads the same packed bytes (the floor); bfloat16 F.linear; dequantize
plus F.linear; comparators that can be imported. A figure is the median of 50 replays of a CUDA graph of 24 launches that go through at
least 8 copies of the weight (four times the second cache in all). Prints a table and writes it to results/<device>.md. --tune first
measures block sizes for these classes, shapes and batches and writes the best to qformats/kernels/triton/tuned.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gpu_weights import CLASSES, bits_per_weight

from qformats.kernels import gpu
from qformats.kernels.lower import Lowered, lower

SHAPES = ((4096, 4096), (11008, 4096), (14336, 4096), (28672, 8192))
BATCHES = (1, 16, 64, 256, 2048)
LAUNCHES, REPLAYS = 24, 50
RESULTS = Path(__file__).parent / "results"
Call = Callable[[int], object]


def seconds(call: Call) -> float:
    """Median time of one ``call(i)`` inside a replayed graph; i counts up, to go through copies."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):  # compiles, and takes memory
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(LAUNCHES):
            call(i)
    times = []
    for _ in range(REPLAYS + 5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / LAUNCHES)
    return float(statistics.median(times[5:]))


def copies_of(nbytes: int) -> int:
    """Copies of so many bytes that no cache holds."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(8, -(-4 * cache // max(1, nbytes)))


def copied(lowered: Lowered, count: int) -> list[Lowered]:
    return [Lowered(lowered.layout, {name: plane.clone() for name, plane in lowered.planes.items()}) for _ in range(count)]


def copy_bandwidth() -> float:
    """Bytes a second read and written."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda i: target.copy_(source))


def read_floor(nbytes: int) -> float:
    """Time of a kernel that only reads so many bytes."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def read(words: Any, out: Any, count: Any, BLOCK: tl.constexpr) -> None:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        found = tl.load(words + at, mask=at < count, other=0, eviction_policy="evict_first")
        tl.store(out + tl.program_id(0), tl.sum(found, 0))

    count, block = nbytes // 4, 8192
    sources = [torch.randint(0, 1 << 30, (count,), dtype=torch.int32, device="cuda") for _ in range(copies_of(nbytes))]
    out = torch.empty(triton.cdiv(count, block), dtype=torch.int32, device="cuda")
    return seconds(lambda i: read[(len(out),)](sources[i % len(sources)], out, count, BLOCK=block, num_warps=8))


# ---------------------------------------------------------------- other libraries


def torch_int4(n: int, k: int, x: Tensor) -> Call:
    count = copies_of(n * k // 2)
    packed = [
        torch.ops.aten._convert_weight_to_int4pack(torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device="cuda"), 8)
        for _ in range(count)
    ]
    scales = torch.rand((k // 128, n, 2), device="cuda", dtype=torch.bfloat16)
    return lambda i: torch.ops.aten._weight_int4pack_mm(x, packed[i % count], 128, scales)


def bitsandbytes_nf4(n: int, k: int, x: Tensor) -> Call:
    import bitsandbytes.functional as functional
    from bitsandbytes import matmul_4bit

    count = copies_of(n * k // 2)
    w = torch.randn((n, k), device="cuda", dtype=torch.bfloat16)
    held = [functional.quantize_4bit(w, quant_type="nf4") for _ in range(count)]
    return lambda i: matmul_4bit(x, held[i % count][0].t(), quant_state=held[i % count][1])


def gemlite_int4(n: int, k: int, x: Tensor) -> Call:
    from gemlite.core import DType, GemLiteLinear

    layers = []
    for _ in range(copies_of(n * k // 2)):
        layer = GemLiteLinear(4, group_size=128, in_features=k, out_features=n, input_dtype=DType.BF16, output_dtype=DType.BF16)
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
        groups = (n, k // 128)
        layer.pack(codes, torch.rand(groups, device="cuda").bfloat16(), torch.full(groups, 8.0, device="cuda").bfloat16(), None)
        layers.append(layer)
    return lambda i: layers[i % len(layers)](x)


COMPARATORS: dict[str, Callable[[int, int, Tensor], Call]] = {
    "torch int4 g128": torch_int4, "bitsandbytes nf4": bitsandbytes_nf4, "gemlite int4 g128": gemlite_int4,
}  # fmt: skip


def compared(n: int, k: int, m: int) -> Iterator[str]:
    x = torch.randn((m, k), device="cuda", dtype=torch.bfloat16)
    for name, make in COMPARATORS.items():
        try:
            yield f"| {name} | {n}x{k} | {m} | {seconds(make(n, k, x)) * 1e6:.1f} | | | | |"
        except Exception as error:  # whatever another library does, the run goes on and says so
            why = f"{type(error).__name__}: {error}".splitlines()[0][:90]
            yield f"| {name} | {n}x{k} | {m} | not run: {why} | | | | |"


# ---------------------------------------------------------------- ours


def ours(name: str, n: int, k: int, batches: list[int], linear: dict[int, float]) -> Iterator[str]:
    """One line of the table for each batch."""
    lowered = lower(CLASSES[name](n, k, "cuda"))
    held = copied(lowered, copies_of(lowered.nbytes))
    floor = read_floor(lowered.nbytes)
    for m in batches:
        x = torch.randn((m, k), device="cuda", dtype=torch.bfloat16)
        fused = seconds(lambda i, x=x: gpu.matmul(x, held[i % len(held)], 0, n, "exact"))  # type: ignore[misc]
        large, gpu.LARGE = gpu.LARGE, gpu.VECTOR
        floats = seconds(lambda i, x=x: gpu.matmul(x, held[i % len(held)], 0, n, "exact")) if m > gpu.VECTOR else float("nan")  # type: ignore[misc]
        gpu.LARGE = large
        size = f"{bits_per_weight(lowered.nbytes, n, k):.2f}"
        yield (
            f"| {name} ({size} bits) | {n}x{k} | {m} | {fused * 1e6:.1f} | {floor * 1e6:.1f} | {fused / floor:.2f} | "
            f"{linear[m] / fused:.2f} | {floats / fused:.2f} |"
        )


def linear_times(n: int, k: int, batches: list[int]) -> dict[int, float]:
    weights = [torch.randn((n, k), device="cuda", dtype=torch.bfloat16) for _ in range(min(16, copies_of(2 * n * k)))]
    found = {}
    for m in batches:
        x = torch.randn((m, k), device="cuda", dtype=torch.bfloat16)
        found[m] = seconds(lambda i, x=x: torch.nn.functional.linear(x, weights[i % len(weights)]))  # type: ignore[misc]
    return found


# ---------------------------------------------------------------- block sizes


def candidates(shape: str, m: int) -> Iterator[dict[str, int]]:
    if shape == "gemv":
        for rows, units, splits, warps in itertools.product((1, 2, 4, 8), (16, 32, 64, 128), (1, 2, 4, 8), (2, 4, 8)):
            yield {"rows": rows, "units": units, "batch": 1, "splits": splits, "warps": warps, "stages": 1}
        return
    batch = max(16, min(128, 1 << (m - 1).bit_length()))
    for rows, units, splits, warps, stages in itertools.product((64, 128), (2, 4, 8), (1, 2, 4, 8), (4, 8), (1, 2, 3, 4)):
        yield {"rows": rows, "units": units, "batch": batch, "splits": splits, "warps": warps, "stages": stages}


def tune(names: list[str], shapes: list[tuple[int, int]], batches: list[int]) -> None:
    """The quickest block for each class and batch on the largest shape, into the table."""
    from qformats.kernels.triton import tuning
    from qformats.kernels.triton.spec import spec_of

    n, k = max(shapes)
    table = tuning._tuned().setdefault(torch.cuda.get_device_name(0), {})
    for name, m in itertools.product(names, [m for m in batches if m <= gpu.LARGE]):
        lowered = lower(CLASSES[name](n, k, "cuda"))
        spec = spec_of(lowered.layout)
        if spec is None:
            continue
        held = copied(lowered, copies_of(lowered.nbytes))
        shape = "gemv" if m <= gpu.VECTOR else "tiles"
        x = torch.randn((m, k), device="cuda", dtype=torch.bfloat16)
        best: tuple[float, dict[str, int]] | None = None
        for block in candidates(shape, m):
            table[tuning.key(shape, spec, m)] = block
            gpu._refused.clear()
            try:
                took = seconds(lambda i, x=x, held=held: gpu.matmul(x, held[i % len(held)], 0, n, "exact"))  # type: ignore[misc]
            except RuntimeError:  # too large for the device: the fallback cannot be captured in a graph
                continue
            if not gpu._refused and (best is None or took < best[0]):
                best = took, block
        if best is not None:
            table[tuning.key(shape, spec, m)] = best[1]
            print(f"{name} {m}: {best[0] * 1e6:.1f} us {best[1]}", flush=True)
    Path(tuning.__file__).with_name("tuned.json").write_text(json.dumps(tuning._tuned(), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="*", default=list(CLASSES))
    parser.add_argument("--shapes", nargs="*", default=[f"{n},{k}" for n, k in SHAPES])
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    shapes = [(int(n), int(k)) for n, k in (text.split(",") for text in options.shapes)]
    torch.manual_seed(0)
    if options.tune:
        tune(options.classes, shapes, options.batches)
    device = torch.cuda.get_device_name(0)
    lines = [
        f"# {device}, torch {torch.__version__}", "", f"Copy bandwidth {copy_bandwidth() / 1e12:.2f} TB/s.", "",
        "| weight | N x K | rows of x | us | floor us | time / floor | F.linear / time | dequantize + F.linear / time |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    print("\n".join(lines), flush=True)
    for n, k in shapes:
        linear = linear_times(n, k, options.batches)
        for name in options.classes:
            for line in ours(name, n, k, options.batches, linear):
                lines.append(line)
                print(line, flush=True)
        for m in options.batches:
            for line in compared(n, k, m):
                lines.append(line)
                print(line, flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{device.replace(' ', '-').lower()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
