"""The products of ``qformats.kernels.cpu`` with a single input, as arrays: what a token costs beside its loops is felt there."""

from __future__ import annotations

from typing import Any

import numpy as np

from qformats.kernels.cpu_plan import Plan
from qformats.kernels.threads import share
from qformats.loops import find

__all__ = ["exact", "rounded"]

Array = np.ndarray[Any, Any]


def exact(x: Array, plan: Plan, start: int, stop: int, out: Array) -> None:
    """``x`` (1, K) float32 times the transposed rows ``start:stop`` to ``out`` (1, stop - start)."""
    laid = np.zeros((1, plan.padded), np.float32)
    if plan.strips:
        find("strips").in_words(x, laid)
    else:
        laid[:, : x.shape[1]] = x
    few, head, slots, constants = find("products").few, plan.head, plan.slots, plan.constants
    share(lambda low, high: few(head, slots, constants, laid, start, out, low, high), stop - start, (stop - start) * plan.padded)


def rounded(x: Array, plan: Plan, start: int, stop: int, out: Array) -> None:
    """The same with ``cpu.rounded_inputs(x)``; the plan has ``integers``."""
    loops, padded = find("int8"), plan.padded
    q, scales = np.empty((1, padded), np.int8), np.empty((1, padded // loops.BLOCK), np.float32)
    groups = -(-padded // plan.group)
    sums = np.zeros((1, -(-groups // 16) * 16), np.float32)
    loops.quantize(x, plan.group, q, scales, sums)
    how = (plan.head, plan.slots, plan.constants, *(plan.integers or ()), q, scales, sums, start, out)
    share(lambda low, high: loops.multiply(*how, low, high), stop - start, (stop - start) * padded)
