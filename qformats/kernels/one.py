"""The products of ``qformats.kernels.cpu`` with a single input, as arrays: what a token costs beside its loops is felt there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qformats.kernels.cpu_plan import Plan
from qformats.kernels.cpu_strips import strips_of
from qformats.kernels.lower import Lowered
from qformats.kernels.threads import share
from qformats.loops import find

__all__ = ["exact", "few_of", "multiply_of", "rounded"]

Array = np.ndarray[Any, Any]
Product = Callable[[Array, int, int, Array], None]
"""``x`` (1, K) float32 times the transposed rows from the second up to the third argument, to the fourth, (1, rows)."""


def few_of(plan: Plan, lowered: Lowered, single: bool) -> tuple[Any, tuple[Any, ...]]:
    """The loop of exact products with few inputs, or with one, and its arguments before the inputs."""
    loops = find("products")
    if not plan.strips:
        return loops.few, (plan.head, plan.slots, plan.constants, find("rows").decoder().address)
    strips, gather = strips_of(plan, lowered), find("factors").row_factors().address
    made = (loops.row_times if single else loops.row)(strips.widths, strips.kind, strips.zeros, strips.offsets)
    return loops.few_strips, (plan.head, plan.slots, plan.constants, gather, made.address, strips.table)


def multiply_of(plan: Plan, lowered: Lowered, single: bool) -> tuple[Any, tuple[Any, ...]]:
    """The same of products of bytes; the plan has ``integers``."""
    loops, strips = find("int8"), strips_of(plan, lowered)
    kind, gather = int(plan.head[find("rows").KIND]), find("factors").row_factors().address
    made = loops.row_times(strips.widths, kind, strips.fine) if single else loops.kept(strips.widths, kind)
    return loops.multiply, (plan.head, plan.slots, plan.constants, gather, made.address, *(plan.integers or ()))


def exact(plan: Plan, lowered: Lowered) -> Product:
    """The exact product."""
    few, how = few_of(plan, lowered, True)
    in_words = find("strips").in_words if plan.strips else None

    def run(x: Array, start: int, stop: int, out: Array) -> None:
        laid = np.zeros((1, plan.padded), np.float32)
        if in_words is not None:
            in_words(x, laid)
        else:
            laid[:, : x.shape[1]] = x
        share(lambda low, high: few(*how, laid, start, out, low, high), stop - start, (stop - start) * plan.padded)

    return run


def rounded(plan: Plan, lowered: Lowered) -> Product:
    """The product with ``cpu.rounded_inputs(x)``; the plan has ``integers``."""
    multiply, how = multiply_of(plan, lowered, True)
    quantize, padded, groups, block = find("int8").quantize, plan.padded, -(-plan.padded // plan.group), find("int8").BLOCK

    def run(x: Array, start: int, stop: int, out: Array) -> None:
        q, scales = np.empty((1, padded), np.int8), np.empty((1, padded // block), np.float32)
        sums = np.zeros((1, -(-groups // 16) * 16), np.float32)
        quantize(x, plan.group, q, scales, sums)
        share(lambda low, high: multiply(*how, q, scales, sums, start, out, low, high), stop - start, (stop - start) * padded)

    return run
