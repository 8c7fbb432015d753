"""What ``--search best`` gains over llama.cpp's own codes, and at what speed, on one thread.

    python benchmarks/bench_search.py [TYPE ...] [--model CHECKPOINT] [--rows 64] [--columns 2048] [--normal-rows 256]
    python benchmarks/bench_search.py --formats

Every type that the search improves, without and with importances (log-normal numbers, one for each column, from a fixed seed), on
normal rows and, with ``--model``, on the first ``--rows`` rows of every two-dimensional weight of a float checkpoint. Each figure is the
reduction of the weighted squared error over all rows, in percent; the speed is that of the normal rows without importances, loops
compiled. Exit code 1 if the error of any block rose. ``--formats``: the relative RMS errors of the reference, ``best`` and ``hqq`` for
types of other formats, on normal and on heavy-tailed rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from converters.claims import float_scheme  # noqa: E402
from qformats import registry  # noqa: E402
from qformats.checkpoint import open_checkpoint  # noqa: E402
from qformats.formats import ggml  # noqa: E402
from qformats.quantize import best, half_quadratic, rtn, uses_importance  # noqa: E402
from qformats.scheme import Storage  # noqa: E402


def weights_of(path: Path, rows: int) -> list[Tensor]:
    """The first rows of every matrix of floats, float32."""
    found = []
    with open_checkpoint(path) as checkpoint:
        for name, module in checkpoint.modules.items():
            raw = module.parts.get("weight")
            if raw is not None and len(raw.shape) == 2 and not checkpoint.is_quantized(name):
                value = checkpoint.read(name, 0, min(rows, raw.shape[0]))
                assert isinstance(value, Tensor)
                found.append(value.to(torch.float32))
    return found


def block_errors(weights: Tensor, storage: Storage, importance: Tensor | None, search: str, run: int = 0) -> Tensor:
    """float64, the weighted squared error of every block; a reference that ignores importances is measured under them too."""
    given = importance if uses_importance(storage, search) else None
    square = (rtn(weights, storage, given, search).dequantize(torch.float64) - weights.double()) ** 2
    weighted = square if importance is None else square * importance.double()
    return weighted.reshape(-1, run or storage.group or weights.shape[1]).sum(1)


def importances(columns: int) -> Tensor:
    return torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(columns)))


def gains(storage: Storage, matrices: list[Tensor]) -> Iterator[tuple[float, int]]:
    """(reduction in percent, blocks that got worse), without and with importances; rows that are not whole blocks are left out."""
    for weighted in (False, True):
        before = after = 0.0
        worse = 0
        for weights in matrices:
            if weights.shape[1] % storage.k_multiple:
                continue
            q = importances(weights.shape[1]) if weighted else None
            old, new = (block_errors(weights, storage, q, search) for search in ("reference", "best"))
            before, after = before + float(old.sum()), after + float(new.sum())
            worse += int((new > old * (1 + 1e-12)).sum())
        yield 100 * (1 - after / before) if before else float("nan"), worse


FORMATS = (
    "gptq:int4,sym", "gptq:int4,asym", "gptq:int3,asym", "awq:int4", "compressed-tensors:int4,asym", "compressed-tensors:int8,channel",
    "compressed-tensors:fp8", "compressed-tensors:nvfp4", "modelopt:nvfp4", "fp8:fp8", "torchao:int4", "torchao:fp8", "torchao:mxfp6_e3m2",
    "hqq:int4", "hqq:int2", "quanto:qint4", "quanto:qint8", "bitsandbytes:nf4", "bitsandbytes:nf4,double=true", "bitsandbytes:int8",
)  # fmt: skip


def compare(rows: int, columns: int) -> None:
    """Print the table of ``--formats``."""
    torch.manual_seed(0)
    sets = [torch.randn(rows, columns) * 0.02, torch.distributions.StudentT(torch.tensor(3.0)).sample((rows, columns)) * 0.02]
    print("| type | normal | normal, weighted | heavy | heavy, weighted |\n|---|---|---|---|---|")
    for text in FORMATS:
        target = registry.parse_target(text)
        storage = registry.format_module(target.format).storages(target, float_scheme((rows, columns)))[0]
        cells = []
        for weights in sets:
            for q in (None, importances(columns)):
                size = float((weights.double() ** 2 * (1 if q is None else q)).sum())
                searches = ("reference", "best", *(("hqq",) if half_quadratic.fits(storage) else ()))
                sums = [float(block_errors(weights, storage, q, search, rows * columns).sum()) for search in searches]
                found = [100 * (each / size) ** 0.5 for each in sums]
                cells.append(" / ".join(f"{error:.2f}" for error in found))
        print(f"| {text} | " + " | ".join(cells) + " |", flush=True)


def speed(storage: Storage, weights: Tensor) -> float:
    """10^6 weights a second of the whole ``rtn``, the better of two."""
    rtn(weights[:1], storage, None, "best")
    seconds = []
    for _ in range(2):
        began = time.thread_time()
        rtn(weights, storage, None, "best")
        seconds.append(time.thread_time() - began)
    return weights.numel() / min(seconds) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", type=str.lower, metavar="TYPE", help=f"of {' '.join(best.RECIPES)}")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--formats", action="store_true")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--normal-rows", type=int, default=256)
    options = parser.parse_args()
    unknown = set(options.types) - best.TYPES
    if unknown:
        parser.error(f"the search does not improve {' '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    if options.formats:
        compare(options.normal_rows, options.columns)
        return 0
    normal = torch.randn(options.normal_rows, options.columns, generator=torch.Generator().manual_seed(0)) * 0.02
    sets = [[normal]] + ([weights_of(options.model, options.rows)] if options.model else [])
    print(f"{normal.numel()} normal weights" + "".join(f", {sum(w.numel() for w in each)} of the model" for each in sets[1:]))
    titles = ["normal", "normal, weighted", *(["model", "model, weighted"] if options.model else []), "10^6 weights/s"]
    print("| type | " + " | ".join(titles) + " |\n|---|" + "---:|" * len(titles))
    risen = 0
    for name in options.types or best.RECIPES:
        storage = ggml.BLOCK_TYPES[name.upper()].storage
        found = [gain for matrices in sets for gain in gains(storage, matrices)]
        risen += sum(worse for _, worse in found)
        cells = [f"{gain:.1f} %" for gain, _ in found] + [f"{speed(storage, normal):.1f}"]
        print(f"| {name.upper()} | " + " | ".join(cells) + " |", flush=True)
    return 1 if risen else 0


if __name__ == "__main__":
    sys.exit(main())
