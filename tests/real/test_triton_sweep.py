"""All fixtures' layouts through the interpreted kernels, in a process of its own: Triton interprets or compiles, never both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def sweep(every: int, name: str = "triton_sweep.py") -> None:
    script = Path(__file__).with_name(name)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", str(script), str(every)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.real
def test_some_fixtures_have_exact_weights() -> None:
    sweep(12)


@pytest.mark.real_full
def test_all_fixtures_have_exact_weights() -> None:
    sweep(1)


@pytest.mark.real
def test_products_with_some_kinds_are_right_and_repeatable() -> None:
    sweep(6, "triton_products.py")


@pytest.mark.real_full
def test_products_with_all_kinds_are_right_and_repeatable() -> None:
    sweep(1, "triton_products.py")
