"""The operators ``qformats::matmul``, ``grouped``, their gradients and ``embed`` over lowered planes, and which kernel runs.

An operator takes the planes as a list (in the order of ``Layout.names``), the layout as its text, the weight's rows ``start:stop`` and the
way of computing, one of ``COMPUTE``: ``"exact"`` takes the weights exactly and multiplies in float32; ``"int8"`` rounds the inputs to bytes
(``qformats.kernels.cpu.rounded_inputs``) where a loop multiplies bytes, and is exact elsewhere. ``multiply`` and ``look_up`` are the same
without the operator's overhead, for code that is neither compiled nor differentiated. The gradient is that of the input; planes have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qformats.kernels import cpu, gpu, reference
from qformats.kernels.layout import Layout
from qformats.kernels.lower import Lowered

__all__ = ["COMPUTE", "embed", "grouped", "look_up", "matmul", "multiply", "multiply_grouped"]

COMPUTE = ("exact", "int8")
_KERNELS: dict[str, Any] = {"cpu": cpu, "cuda": gpu}  # by device; None of a kernel: the definition runs


def _lowered(planes: Sequence[Tensor], layout: str) -> Lowered:
    found = Layout.parse(layout)
    return Lowered(found, dict(zip(found.names, planes, strict=True)))


def multiply(x: Tensor, lowered: Lowered, start: int, stop: int, compute: str) -> Tensor:
    """``x`` (..., K) times the transposed rows ``start:stop``, by the fastest kernel that serves this layout, device and batch."""
    kernels = _KERNELS.get(x.device.type)
    made = None if kernels is None else kernels.matmul(x, lowered, start, stop, compute)
    return reference.matmul(x, lowered, start, stop) if made is None else made


@torch.library.custom_op("qformats::matmul", mutates_args=())
def matmul(x: Tensor, planes: Sequence[Tensor], layout: str, start: int, stop: int, compute: str) -> Tensor:
    return multiply(x, _lowered(planes, layout), start, stop, compute)


@matmul.register_fake
def _(x: Tensor, planes: Sequence[Tensor], layout: str, start: int, stop: int, compute: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], stop - start))


def back(grad: Tensor, lowered: Lowered, start: int, stop: int) -> Tensor:
    """The gradient of the input of ``multiply`` from that of its result."""
    kernels = _KERNELS.get(grad.device.type)
    made = None if kernels is None else kernels.matmul_back(grad, lowered, start, stop)
    return reference.matmul_back(grad, lowered, start, stop) if made is None else made


@torch.library.custom_op("qformats::matmul_back", mutates_args=())
def matmul_back(grad: Tensor, planes: Sequence[Tensor], layout: str, start: int, stop: int) -> Tensor:
    return back(grad, _lowered(planes, layout), start, stop)


@matmul_back.register_fake
def _(grad: Tensor, planes: Sequence[Tensor], layout: str, start: int, stop: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], Layout.parse(layout).columns))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, planes, ctx.layout, ctx.start, ctx.stop, _ = inputs
    ctx.save_for_backward(*planes)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    planes = list(ctx.saved_tensors)  # read once: activation checkpointing refuses a second time
    return matmul_back(grad, planes, ctx.layout, ctx.start, ctx.stop), [None] * len(planes), None, None, None, None


matmul.register_autograd(_gradient, setup_context=_keep)


def multiply_grouped(
    x: Tensor, lowered: Lowered, offsets: Tensor, outputs: int, compute: str, known: Callable[[Tensor, int, int], Tensor] | None = None
) -> Tensor:
    """Rows ``offsets[e]:offsets[e + 1]`` of ``x`` (n, K) times the transposed rows of expert e, ``outputs`` of them; (n, outputs).

    ``offsets``: (E + 1,) on the device of ``x``. Rows of no expert come out zero. ``known``: the product with rows of the weight, where
    the caller has it (``cpu.Straight``).
    """
    if x.is_cuda and compute == "exact" and (made := gpu.experts(x, lowered, offsets, outputs)) is not None:
        return made
    out = x.new_zeros((len(x), outputs))
    for expert, (start, stop) in enumerate(pairwise(offsets.tolist())):
        if start < stop:
            first, last = expert * outputs, (expert + 1) * outputs
            some = x[start:stop]
            out[start:stop] = known(some, first, last) if known else multiply(some, lowered, first, last, compute)
    return out


@torch.library.custom_op("qformats::grouped", mutates_args=())
def grouped(x: Tensor, planes: Sequence[Tensor], layout: str, offsets: Tensor, outputs: int, compute: str) -> Tensor:
    return multiply_grouped(x, _lowered(planes, layout), offsets, outputs, compute)


@grouped.register_fake
def _(x: Tensor, planes: Sequence[Tensor], layout: str, offsets: Tensor, outputs: int, compute: str) -> Tensor:
    return x.new_empty((x.shape[0], outputs))


@torch.library.custom_op("qformats::grouped_back", mutates_args=())
def grouped_back(grad: Tensor, planes: Sequence[Tensor], layout: str, offsets: Tensor) -> Tensor:
    lowered, outputs = _lowered(planes, layout), grad.shape[-1]
    out = grad.new_zeros((len(grad), lowered.layout.columns))
    for expert, (start, stop) in enumerate(pairwise(offsets.tolist())):
        if start < stop:
            out[start:stop] = back(grad[start:stop], lowered, expert * outputs, (expert + 1) * outputs)
    return out


@grouped_back.register_fake
def _(grad: Tensor, planes: Sequence[Tensor], layout: str, offsets: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], Layout.parse(layout).columns))


def _keep_grouped(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, planes, ctx.layout, offsets, _, _ = inputs
    ctx.save_for_backward(offsets, *planes)


def _grouped_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    offsets, *planes = ctx.saved_tensors
    return grouped_back(grad.contiguous(), planes, ctx.layout, offsets), [None] * len(planes), None, None, None, None


grouped.register_autograd(_grouped_gradient, setup_context=_keep_grouped)


def look_up(ids: Tensor, lowered: Lowered, dtype: torch.dtype) -> Tensor:
    """The rows ``ids`` of the weight, (*ids.shape, K), each exact value rounded once to ``dtype``."""
    kernels = _KERNELS.get(ids.device.type)
    made = None if kernels is None else kernels.embed(ids, lowered, dtype)
    return reference.embed(ids, lowered, dtype) if made is None else made


@torch.library.custom_op("qformats::embed", mutates_args=())
def embed(ids: Tensor, planes: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    return look_up(ids, _lowered(planes, layout), dtype)


@embed.register_fake
def _(ids: Tensor, planes: Sequence[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    return torch.empty((*ids.shape, Layout.parse(layout).columns), dtype=dtype, device=ids.device)
