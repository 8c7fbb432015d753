"""Quantize floats to ggml blocks on one thread, against llama.cpp's library, in one run.

    python benchmarks/bench_quantize.py [TYPE ...] [--rows 4096] [--columns 4096] [--repeats 5] [--seconds 60]

Types (default: every ggml type that has a quantizer) without importances and, where they count, with them. Each figure is the best of
``--repeats`` in CPU time of the one thread, so that other load counts little; both sides in turns, fewer where a type takes more than
``--seconds``, two at least. Ours runs over row ranges as a conversion does, each written into one warm buffer; llama.cpp gets one call
over all rows into another. "first call" is ours before anything is compiled or cached by this process (delete numba's cache folders to
see the compilation itself). Exit code 1 if bytes differ. Needs llama.cpp's libraries (see tests/real/llamacpp.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
from bench_dequantize import Array, Sides, best, header, row  # also puts the repository and tests/real on the path

import llamacpp  # type: ignore[import-not-found,unused-ignore]  # isort: skip
import torch

from qformats.formats import ggml
from qformats.quantize import FAMILIES, needs_importance, rtn, uses_importance

WEIGHTS = 1 << 20  # in one row range, as a conversion takes them


def types() -> list[str]:
    """The ggml types with a quantizer of their own, in the order of their table."""
    known = {name for family in FAMILIES for name in family.TYPES}
    return [name for name, kind in ggml.BLOCK_TYPES.items() if kind.storage.type in known]


def ours(name: str, weights: Array, importance: Array | None, out: Array) -> None:
    """Blocks of all rows into ``out``, range by range."""
    storage, rows = ggml.BLOCK_TYPES[name].storage, max(1, WEIGHTS // weights.shape[1])
    weighted = None if importance is None else torch.from_numpy(importance)
    for at in range(0, len(weights), rows):
        quantized = rtn(torch.from_numpy(weights[at : at + rows]), storage, weighted)
        out[at : at + rows] = ggml.write(storage, quantized, at, weights.shape)[0].array


def theirs(name: str, weights: Array, importance: Array | None, out: Array) -> None:
    """The same by ``ggml_quantize_chunk`` in one call."""
    pointer = None if importance is None else importance.ctypes.data
    base = llamacpp.base_library()
    base.ggml_quantize_chunk(llamacpp.GGML[name], weights.ctypes.data, out.ctypes.data, 0, *weights.shape, pointer)


def quantize_row(name: str, weights: Array, importance: Array | None, repeats: int, seconds: float) -> bool:
    """One line of the table; whether the bytes are equal."""
    kind = ggml.BLOCK_TYPES[name]
    made, reference = (np.zeros((len(weights), ggml.row_nbytes(kind, weights.shape[1])), np.uint8) for _ in range(2))
    began = time.perf_counter()
    ours(name, weights[:1], importance, made[:1])
    cold = time.perf_counter() - began
    sides: Sides = {
        "ours": lambda: ours(name, weights, importance, made),
        "llama": lambda: theirs(name, weights, importance, reference),
    }
    once = best(sides, 1, time.thread_time)
    more = min(repeats, max(2, int(seconds / sum(once.values())))) - 1
    again = best(sides, more, time.thread_time)
    rate = {side: weights.size / min(once[side], again[side]) / 1e6 for side in sides}
    different = int((made != reference).reshape(-1, kind.nbytes).any(-1).sum())
    way = "-" if importance is None else "yes"
    print(row([name, way, rate["ours"], rate["llama"], rate["ours"] / rate["llama"], cold, different]), flush=True)
    return not different


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", type=str.upper, metavar="TYPE", help=f"of {' '.join(types())}")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    unknown = set(options.types) - set(types())
    if unknown:
        parser.error(f"no quantizer for {' '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.02, (options.rows, options.columns)).astype(np.float32)
    importance: Any = np.exp(rng.normal(0, 1, options.columns)).astype(np.float32)
    print(f"{options.rows} x {options.columns} weights, one thread, best of {options.repeats}, 10^6 weights/s")
    header("quantize", "importances", "qformats", "llama.cpp", "/ llama.cpp", "first call, s", "blocks that differ")
    same = []
    for name in options.types or types():
        storage = ggml.BLOCK_TYPES[name].storage
        ways = [] if needs_importance(storage) else [None]
        ways += [importance] if uses_importance(storage) else []
        same += [quantize_row(name, weights, q, options.repeats, options.seconds) for q in ways]
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
