"""The rows of a job as new codes, each expert's under its own importances: what is written, and what a budget measures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from converters.importances import expert_runs
from converters.jobs import Job

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["new_codes"]


def new_codes(
    job: Job, value: Any, start: int, stop: int, rows: np.ndarray[Any, Any] | None = None
) -> Iterator[tuple[int, Tensor, QuantizedTensor]]:
    """(first row, weights float32, their codes) of runs of rows ``start:stop``; ``rows``: the target row of each where out of order."""
    import torch

    from qformats.quantize import rtn

    assert job.storage is not None
    weights = value if isinstance(value, torch.Tensor) else value.dequantize(torch.float32)
    for first, last, expert in expert_runs(job, start, stop, rows):
        run = job.map.alter(weights[first - start : last - start].to(torch.float32))
        importance = None if job.importance is None else torch.from_numpy(job.importance[expert])
        yield first, run, rtn(run, job.storage, importance, job.search)
