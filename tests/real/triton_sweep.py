"""Every layout of every fixture through the interpreted dequantizing kernel. Run with TRITON_INTERPRET=1; one line a failure, status 1.

usage: triton_sweep.py [EVERY]: two weights of every EVERYth fixture only
"""

# ruff: noqa: E402

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

UNIT = Path(__file__).parents[1] / "unit"
sys.path[:0] = [str(UNIT), str(UNIT / "convert")]

import torch
from checkpoints import ALL, ready

import qformats
from qformats.kernels.layout import Layout
from qformats.kernels.lower import lower
from qformats.kernels.triton import launch, tuning
from qformats.kernels.triton.spec import Spec
from qformats.tensor import QuantizedTensor

ROWS = 24  # of a weight: enough for a tile that is not full


def small(shape: str, spec: Spec, device: torch.device, count: int, height: int, single: bool = False) -> tuning.Block:
    return tuning._fitted(tuning.Block(16, max(1, 512 // spec.unit)), spec)


def wrong(t: QuantizedTensor, seen: set[Layout]) -> str:
    """What is wrong with the kernel's weights; "" for nothing, and for a layout that was seen."""
    lowered = lower(t)
    if lowered.layout in seen:
        return ""
    seen.add(lowered.layout)
    spec = launch.served(lowered, torch.float32)
    if spec is None:
        return "not served"
    rows = slice(0, min(ROWS, lowered.layout.rows))
    for dtype in (torch.float32, torch.bfloat16):
        found, wanted = launch.dequantize(lowered, spec, rows, dtype), lowered.dequantize(rows, dtype)
        if not bool(((found == wanted) | ((found != found) & (wanted != wanted))).all()):
            return f"{int((found != wanted).sum())} of {found.numel()} weights differ in {dtype}"
    return ""


def main(every: int) -> int:
    torch.set_num_threads(1)
    tuning.block = small
    seen: set[Layout] = set()
    failures = 0
    for case in ALL[::every]:
        with tempfile.TemporaryDirectory() as folder, qformats.open(ready(case, Path(folder))) as checkpoint:
            for name in [name for name in checkpoint.modules if checkpoint.is_quantized(name)][: 2 if every > 1 else None]:
                t = checkpoint.read(name)
                found = wrong(t, seen) if isinstance(t, QuantizedTensor) else ""
                failures += bool(found)
                if found:
                    print(f"{case} {name}: {found}", flush=True)
    print(f"{len(seen)} layouts, {failures} wrong")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
