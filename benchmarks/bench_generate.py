"""Tokens a second on the CPU: a GGUF on its packed weights, the same model dequantized in transformers, and llama.cpp, in turns.

usage: bench_generate.py FILE.gguf [FILE.gguf …] [--tokens 32] [--threads 1] [--repeats 3]
Beside the tokens: the time that a token spends in packed linears, embedding and head, and llama.cpp's for the whole token. llama.cpp is
that of the real tests (``tests/real/llamacpp.py``); torch stays off AMX, which llama.cpp does not survive in one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "real"))

PROMPT = "The capital of France is a city that"


def generate(model: Any, ids: Any, tokens: int) -> float:
    """Seconds of a new token, the prompt left out."""
    import torch

    with torch.inference_mode():
        model.generate(ids, max_new_tokens=1, min_new_tokens=1, do_sample=False)
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=1, min_new_tokens=1, do_sample=False)
        middle = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens + 1, min_new_tokens=tokens + 1, do_sample=False)
    return (time.perf_counter() - middle - (middle - start)) / tokens


def in_packed(model: Any, ids: Any, tokens: int) -> float:
    """Seconds of a new token inside packed modules."""
    from qformats.runtime.linear import TiedHead
    from qformats.runtime.packed import Packed

    spent, started = [0.0], [0.0]

    def before(*_: Any) -> None:
        started[0] = time.perf_counter()

    def after(*_: Any) -> None:
        spent[0] += time.perf_counter() - started[0]

    modules = [module for module in model.modules() if isinstance(module, Packed | TiedHead)]
    hooks = [hook for m in modules for hook in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    generate(model, ids, 1)
    spent[0] = 0.0
    total = generate(model, ids, tokens)
    for hook in hooks:
        hook.remove()
    passes = tokens + 1 + 2  # two of them with the whole prompt, which is short
    return min(total, spent[0] / passes)


def by_llama(path: Path, tokens: int, threads: int) -> float:
    """Seconds of a new token in llama.cpp."""
    import llamacpp

    with llamacpp.Llama(path, threads=threads) as model:
        ids = model.tokenize(PROMPT)
        model.greedy(ids, 2)
        start = time.perf_counter()
        model.greedy(ids, 1)
        middle = time.perf_counter()
        model.greedy(ids, tokens + 1)
        return (time.perf_counter() - middle - (middle - start)) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    import torch

    import qformats

    torch.set_num_threads(args.threads)
    print("tokens a second; ms a token in packed modules beside llama.cpp's whole token")
    print("| model | exact | int8 | dequantized float32 | llama.cpp | packed ms exact / int8 | llama.cpp ms |")
    print("|---|---|---|---|---|---|---|")
    for path in args.files:
        ids = qformats.load_tokenizer(path)(PROMPT, return_tensors="pt").input_ids
        exact, fast = (qformats.load_model(path, dtype=torch.float32, compute=how) for how in ("exact", "int8"))
        plain = qformats.load_model(path, dtype=torch.float32).dequantize()
        rows: list[list[float]] = []
        for _ in range(args.repeats):
            whole = [generate(model, ids, args.tokens) for model in (exact, fast, plain)]
            inside = [in_packed(model, ids, args.tokens) for model in (exact, fast)]
            rows.append([*whole, by_llama(path, args.tokens, args.threads), *inside])
        a, b, c, d, e, f = (statistics.median(row[i] for row in rows) for i in range(6))
        rates = " | ".join(f"{1 / seconds:.1f}" for seconds in (a, b, c, d))
        print(f"| {path.name} | {rates} | {e * 1e3:.1f} / {f * 1e3:.1f} | {d * 1e3:.1f} |", flush=True)


if __name__ == "__main__":
    main()
