"""Converting needs the same memory whatever the size of a tensor: measured in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
MOST_NBYTES = 256 << 20  # above the imports, with two workers; one of the three large tensors as a whole would take over 400 MiB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("method", "to", "act_order"), [("awq", "gguf", False), ("gptq", "gguf", True)])
def test_memory_does_not_grow_with_the_tensor(
    method: str, to: str, act_order: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import bench_memory
    from synthetic import make_wide

    source = make_wide(tmp_path, method, 131072, 1024, act_order)

    above = bench_memory.conversion_peak(source, to, workers=2) - bench_memory.peak_nbytes(bench_memory._IMPORTS)

    assert above <= MOST_NBYTES, f"{above >> 20} MiB above the imports"
