"""Dequantize and re-pack ggml blocks on one thread, against llama.cpp's library, gguf-py and memset, in one run.

    python benchmarks/bench_dequantize.py [--rows 1024] [--columns 4096] [--repeats 15]

Each figure is the best of ``--repeats``, all sides interleaved, into one warm buffer; llama.cpp gets one call over all rows. Rates are
10^9 weights a second. The gate (last column) is the lower of 0.7 x llama.cpp and 0.6 x memset of the same floats, never below gguf-py.
Exit code 1 if a type misses its gate. Needs llama.cpp's libraries (see tests/real/llamacpp.py) and gguf.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "real")]

import llamacpp  # type: ignore[import-not-found,unused-ignore]  # noqa: E402
import torch  # noqa: E402

from qformats.formats import ggml  # noqa: E402
from qformats.formats.ggml.iquants import IQUANTS  # noqa: E402
from qformats.loops import ggml as loops  # noqa: E402

Array = np.ndarray[Any, Any]
Sides = dict[str, Callable[[], object]]


def best(sides: Sides, repeats: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """The fastest seconds of each side by ``clock``, taken in turns so that a noisy moment hits all."""
    found = dict.fromkeys(sides, float("inf"))
    for _ in range(repeats):
        for name, run in sides.items():
            began = clock()
            run()
            found[name] = min(found[name], clock() - began)
    return found


def row(cells: list[Any]) -> str:
    return "| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |"


def sample(name: str, weights: Array) -> Array:
    """Blocks of ``weights``; random bits and a usual d for the codebook types, some of which llama.cpp quantizes with statistics only."""
    kind = IQUANTS.get(name)
    if kind is None:
        quantized: Array = llamacpp.quantize_rows(weights, name)
        return quantized
    rng, rows = np.random.default_rng(3), len(weights)
    bits = rng.integers(0, 256, (rows, weights.shape[1] // kind.block * kind.nbytes), dtype=np.uint8)
    codes, signs, s, shift, d = kind.unpack_blocks(torch.from_numpy(bits))
    usual = torch.from_numpy(rng.normal(0, 0.02, tuple(d.shape)).astype(np.float16))
    packed: Array = kind.pack_blocks(codes, signs, s, shift, usual).numpy()
    return packed


def dequantize_row(name: str, weights: Array, repeats: int) -> bool:
    blocks = sample(name, weights)
    out, reference = np.empty_like(weights), np.empty_like(weights)
    theirs, kind = llamacpp.dequantizer(name), getattr(gguf.GGMLQuantizationType, name, None)
    few = blocks[: max(1, len(blocks) // 16)]  # gguf-py is slow and allocates: a sixteenth, scaled
    sides: Sides = {
        "ours": lambda: ggml.dequantize(name, blocks, out),
        "llama": lambda: theirs(blocks.ctypes.data, reference.ctypes.data, reference.size),
        "memset": lambda: reference.fill(0),
    }
    if kind is not None and name != "Q1_0":  # gguf-py has no Q2_0, and of Q1_0 only the size
        sides["gguf"] = lambda: gguf.quants.dequantize(few, kind)
    seconds = best(sides, repeats)
    seconds["gguf"] = seconds.get("gguf", float("inf")) * len(blocks) / len(few)
    sides["ours"]()
    sides["llama"]()
    same = np.array_equal(out.view(np.uint32), reference.view(np.uint32))
    rate = {side: weights.size / s / 1e9 for side, s in seconds.items()}
    ratios = [rate["ours"] / rate[side] if rate[side] else float("inf") for side in ("llama", "memset", "gguf")]
    passed = same and rate["ours"] >= min(0.7 * rate["llama"], 0.6 * rate["memset"]) and ratios[2] >= 1
    rates = [rate["ours"], rate["llama"], rate["gguf"], rate["memset"]]
    print(row([name, *rates, *ratios, "yes" if same else "NO", "pass" if passed else "MISS"]), flush=True)
    return passed


def pack_row(name: str, weights: Array, repeats: int) -> None:
    kind = ggml.BLOCK_TYPES[name]
    blocks = llamacpp.quantize_rows(weights, name).reshape(-1, kind.nbytes)
    planes, out = ggml._empty_planes(kind, len(blocks)), np.empty_like(blocks)
    sides: Sides = {"unpack": lambda: loops.UNPACK[name](blocks, *planes), "pack": lambda: loops.PACK[name](out, *planes)}
    seconds = best(sides, repeats)
    same = np.array_equal(out, blocks)
    print(row([name, *(weights.size / s / 1e9 for s in seconds.values()), "yes" if same else "NO"]), flush=True)


def header(*titles: str) -> None:
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")


def blocks_rows(weights: Array, repeats: int) -> list[bool]:
    """The tables that round nothing; whether each type passed its gate."""
    header("dequantize", "qformats", "llama.cpp", "gguf-py", "memset", "/ llama.cpp", "/ memset", "/ gguf-py", "same bits", "gate")
    passed = [dequantize_row(name, weights, repeats) for name in loops.DEQUANTIZE]
    header("re-pack", "blocks to codes", "codes to blocks", "same bytes")
    for name in loops.PACK:
        pack_row(name, weights, repeats)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.02, (options.rows, options.columns)).astype(np.float32)
    print(f"{options.rows} x {options.columns} weights, one thread, best of {options.repeats}, 10^9 weights/s")
    passed = blocks_rows(weights, options.repeats)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
