"""Products with every kind of weights, odd shapes, by the interpreted kernels. Run with TRITON_INTERPRET=1; one line a failure, status 1.

usage: triton_products.py [EVERY]: every EVERYth kind only
"""

# ruff: noqa: E402

from __future__ import annotations

import sys
from pathlib import Path

UNIT = Path(__file__).parents[1] / "unit"
sys.path[:0] = [str(UNIT), str(UNIT / "kernels"), str(UNIT / "convert")]

import torch
from kinds import KINDS

from qformats.kernels import gpu
from qformats.kernels.lower import lower
from qformats.kernels.triton import tuning
from qformats.kernels.triton.spec import Spec
from qformats.tensor import QuantizedTensor

CASES = ((1, torch.bfloat16), (2, torch.float16), (3, torch.float32), (5, torch.bfloat16), (5, torch.float16), (17, torch.float32))


def small(shape: str, spec: Spec, device: torch.device, count: int, height: int, single: bool = False) -> tuning.Block:
    """Few programs, and parts of K: the interpreter's time goes by their number."""
    if shape == "tiles":
        return tuning._fitted(tuning.Block(16, max(1, 1024 // spec.unit), 16, splits=2), spec)
    rows = min(64, 1 << max(2, (height - 1).bit_length() - 1))
    return tuning._fitted(tuning.Block(rows, max(1, 1024 // spec.unit), splits=2), spec)


def wrong(t: QuantizedTensor, count: int, dtype: torch.dtype) -> str:
    """What is wrong with a product of ``count`` rows; "" for nothing. A row that meets no number (infinities, NaN) must be none too."""
    lowered = lower(t)
    w = t.dequantize(torch.float32 if count <= gpu.VECTOR else dtype).reshape(lowered.layout.rows, -1).double()
    x = torch.randn(count, w.shape[1], generator=torch.Generator().manual_seed(count)).to(dtype)
    found = gpu.matmul(x, lowered, 1, len(w), "exact")
    again = gpu.matmul(x, lowered, 1, len(w), "exact")
    if found is None or again is None:
        return "not served"
    if not torch.equal(found.nan_to_num(7.0), again.nan_to_num(7.0)):
        return "not the same bits again"
    wanted, size = x.double() @ w[1:].t(), x.double().abs() @ w[1:].abs().t()
    finite = wanted.abs() < 0.99 * torch.finfo(dtype).max
    near = (found.double() - wanted).abs() <= 2e-6 * size + torch.finfo(dtype).eps * wanted.abs() + torch.finfo(dtype).tiny
    bad = int((~torch.where(finite, near, ~found.isfinite() | (wanted.abs() >= 0.99 * torch.finfo(dtype).max))).sum())
    return f"{bad} of {found.numel()} sums differ" if bad else ""


def main(every: int) -> int:
    torch.set_num_threads(1)
    tuning.block = small
    failures = 0
    for name in list(KINDS)[::every]:
        for count, dtype in CASES:
            found = wrong(KINDS[name](), count, dtype)
            failures += bool(found)
            if found:
                print(f"{name}, {count} rows of {dtype}: {found}", flush=True)
    print(f"{len(KINDS)} kinds, {failures} wrong")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
