"""Opening GGUF files: ours against gguf-py's GGUFReader, in one run, and a synthetic header with a 150k-token vocabulary.

usage: bench_open.py FILE.gguf [FILE.gguf …]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from qformats.containers.gguf import TensorInfo, Value, layout_gguf, open_gguf


def median(action: object, repeat: int) -> float:
    assert callable(action)
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synthetic(directory: str) -> Path:
    """150k tokens, 151k merges, scores and types, 700 tensors."""
    tokens = [f"token{i}" for i in range(150_000)]
    metadata = {
        "general.architecture": Value("str", "llama"),
        "tokenizer.ggml.tokens": Value("[str]", tokens),
        "tokenizer.ggml.scores": Value("[f32]", [0.0] * len(tokens)),
        "tokenizer.ggml.token_type": Value("[i32]", [1] * len(tokens)),
        "tokenizer.ggml.merges": Value("[str]", [f"tok en{i}" for i in range(151_000)]),
    }
    layout = layout_gguf(metadata, [TensorInfo(f"blk.{i}.weight", "F32", (4,)) for i in range(700)])
    path = Path(directory) / "synthetic.gguf"
    path.write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    return path


def main() -> None:
    import gguf

    print("| file | ours ms | gguf-py ms | ratio |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for path in [*map(Path, sys.argv[1:]), synthetic(directory)]:
            ours = median(lambda p=path: open_gguf(p), 7)
            theirs = median(lambda p=path: gguf.GGUFReader(str(p)), 1)
            print(f"| {path.name} | {ours * 1e3:.0f} | {theirs * 1e3:.0f} | {theirs / ours:.0f} |", flush=True)


if __name__ == "__main__":
    main()
