"""Products with lowered weights on a GPU: which kernel serves a layout, a dtype and a number of rows. None where no kernel does.

| rows of x | half precision | float32 |
|---|---|---|
| 1–4 | ``gemv``, no tensor cores, float32 products | the same |
| 5–``LARGE`` | ``tiles``, weights as the left operand of the tensor cores | to ``LARGE_SINGLE`` |
| more | ``dequantize`` and torch's own product | the same |

The caller then takes ``qformats.kernels.reference``, which runs on any device; it is told so once for each layout. Results have the same
bits on every run. Nothing here imports Triton before it is asked for a product. Where Triton cannot be imported, or cannot compile a
kernel for the device, a warning says so and None is the answer for all that follows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qformats.kernels.layout import Layout
from qformats.kernels.lower import Lowered

__all__ = ["LARGE", "LARGE_SINGLE", "embed", "experts", "matmul", "matmul_back"]

VECTOR = 4
LARGE = 1024
LARGE_SINGLE = 16
_SCRATCH_WEIGHTS = 1 << 28  # of a dequantized part of a weight

_refused: set[Layout] = set()
_scratch: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """``qformats.kernels.triton.launch``, or None where Triton cannot be imported."""
    try:
        from qformats.kernels.triton import launch
    except ImportError as error:
        warnings.warn(f"Triton cannot be imported ({error}): packed weights are multiplied in plain torch, slower", stacklevel=2)
        return None
    return launch


def _refuse(layout: Layout, reason: str) -> None:
    _refused.add(layout)
    warnings.warn(f"no GPU kernel for {layout.grid} of {layout.shape} ({reason}): multiplied in plain torch, slower", stacklevel=4)


def _served(lowered: Lowered, dtype: torch.dtype, product: Callable[[Any, Any], Tensor]) -> Tensor | None:
    """``product(kernels, spec)``, or None with one warning for each layout."""
    layout = lowered.layout
    launch = None if layout in _refused else _kernels()
    if launch is None:
        return None
    spec = launch.served(lowered, dtype)
    if spec is None:
        _refuse(layout, f"its parameters, or {dtype}")
        return None
    try:
        with _on(lowered.planes["codes0"].device):
            return product(launch, spec)
    except launch.FAILURES as error:
        _refuse(layout, f"it cannot be compiled here: {type(error).__name__}")
        return None


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def matmul(x: Tensor, lowered: Lowered, start: int, stop: int, compute: str) -> Tensor | None:
    """``x`` (..., K) times the transposed rows ``start:stop``, (..., stop - start), in the dtype of ``x``.

    float16, bfloat16 or float32 with float32 sums. For up to 4 rows no weight is rounded: values of codes are multiplied and summed in
    float32, and what columns share (scales, offsets) takes their sum. For more, each weight is exact up to one rounding to the dtype of
    ``x``. Every way of computing is served as "exact" is.
    """
    count = x.numel() // max(1, x.shape[-1])
    if not count or stop == start:
        return x.new_zeros((*x.shape[:-1], stop - start))

    def product(launch: Any, spec: Any) -> Tensor:
        if count <= VECTOR:
            made: Tensor = launch.vector_product(x, lowered, spec, start, stop)
        elif count <= (LARGE_SINGLE if x.dtype == torch.float32 else LARGE):
            made = launch.tile_product(x, lowered, spec, start, stop)
        else:
            made = _through_floats(x.reshape(count, -1), lowered, launch, spec, start, stop)
        return made.view(*x.shape[:-1], stop - start)

    return _served(lowered, x.dtype, product)


def _parts(columns: int, start: int, stop: int) -> list[slice]:
    """Row ranges that fit the scratch memory."""
    step = max(128, _SCRATCH_WEIGHTS // columns)
    return [slice(at, min(stop, at + step)) for at in range(start, stop, step)]


def _floats(lowered: Lowered, launch: Any, spec: Any, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of the weight in memory that the next product may overwrite; it grows to the largest asked for, on each stream."""
    device = lowered.planes["codes0"].device
    size = (rows.stop - rows.start) * spec.columns
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _scratch.get((device, stream, dtype))
    if held is None or held.numel() < size:
        held = torch.empty(size, dtype=dtype, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():  # a graph's own memory stays the graph's
            _scratch[(device, stream, dtype)] = held
    made: Tensor = launch.dequantize(lowered, spec, rows, dtype, held[:size].view(-1, spec.columns))
    return made


def _through_floats(x: Tensor, lowered: Lowered, launch: Any, spec: Any, start: int, stop: int) -> Tensor:
    out = x.new_empty((len(x), stop - start))
    for rows in _parts(spec.columns, start, stop):
        w = _floats(lowered, launch, spec, rows, x.dtype)
        torch.mm(x, w.t(), out=out[:, rows.start - start : rows.stop - start])
    return out


def matmul_back(grad: Tensor, lowered: Lowered, start: int, stop: int) -> Tensor | None:
    """``grad`` (..., stop - start) times the rows ``start:stop``, (..., K), in the dtype of ``grad``."""
    flat = grad.reshape(-1, grad.shape[-1])
    if not len(flat):
        return grad.new_zeros((*grad.shape[:-1], lowered.layout.columns))

    def product(launch: Any, spec: Any) -> Tensor:
        parts = _parts(spec.columns, start, stop)
        total: Tensor | None = None
        for rows in parts:
            w = _floats(lowered, launch, spec, rows, grad.dtype)
            made = torch.mm(flat[:, rows.start - start : rows.stop - start], w)
            made = made if len(parts) == 1 else made.to(torch.float32)
            total = made if total is None else total + made
        assert total is not None
        return total.to(grad.dtype).view(*grad.shape[:-1], spec.columns)

    return _served(lowered, grad.dtype, product)


def embed(ids: Tensor, lowered: Lowered, dtype: torch.dtype) -> Tensor | None:
    """The rows ``ids`` (integers on the device), (*ids.shape, K), each exact value rounded once to ``dtype``.

    A row that the weight has not is read as its first or last: the device does not wait to be asked.
    """
    if not ids.numel():
        return torch.empty((*ids.shape, lowered.layout.columns), dtype=dtype, device=ids.device)

    def product(launch: Any, spec: Any) -> Tensor:
        made: Tensor = launch.dequantize(lowered, spec, ids.reshape(-1).contiguous(), dtype)
        return made.view(*ids.shape, -1)

    return _served(lowered, dtype, product)


def experts(x: Tensor, lowered: Lowered, offsets: Tensor, outputs: int) -> Tensor | None:
    """Each row of ``x`` (n, K) times the transposed matrix of its expert, (n, outputs): all experts in one launch.

    The weight is (E, outputs, K). Rows are sorted by expert, those of expert e being ``offsets[e]:offsets[e + 1]``; ``offsets`` (E + 1,)
    are integers on the device. Rows of no expert come out zero.
    """
    if not len(x):
        return x.new_zeros((0, outputs))
    return _served(lowered, x.dtype, lambda launch, spec: launch.experts(x, lowered, spec, offsets, outputs))
