"""Settings of all unit tests: one torch thread, so that timings on shared machines stay sane, and Triton interpreted."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports it: its kernels then run without a GPU

import torch

torch.set_num_threads(1)
