"""Settings of all unit tests: one torch thread, so that timings on shared machines stay sane."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
