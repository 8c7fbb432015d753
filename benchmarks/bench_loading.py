"""Loading a GGUF, model and tokenizer: ``qformats.load_model`` and ``load_tokenizer`` against transformers' own ``gguf_file=``.

usage: bench_loading.py FILE.gguf [FILE.gguf …] [--repeat 3] [--cold]
Each side runs in a process of its own that has imported transformers' modelling modules and, ours, compiled the loops beforehand; the
sides take turns, the median counts. ``--cold`` adds whole processes, imports and all.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_IMPORTS = """
import sys, time, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama
from transformers.models.gemma3 import modeling_gemma3
from transformers import modeling_gguf_pytorch_utils
import gguf
path = sys.argv[1]
"""
_COLD = """
import sys, time
path = sys.argv[1]
"""
_GGUF = """
from transformers import AutoModelForCausalLM, AutoTokenizer
"""
_OURS = """
import qformats
if len(sys.argv) > 2: qformats.load_model(path); qformats.load_tokenizer(path)
start = time.perf_counter()
model = qformats.load_model(path)
middle = time.perf_counter()
tokenizer = qformats.load_tokenizer(path)
print(middle - start, time.perf_counter() - middle)
"""
_THEIRS = """
from pathlib import Path
folder, name = str(Path(path).parent), Path(path).name
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
middle = time.perf_counter()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
print(middle - start, time.perf_counter() - middle)
"""


def seconds(code: str, *arguments: str) -> tuple[float, float, float]:
    """Of the model, of the tokenizer, of the whole process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    model, tokenizer = map(float, done.stdout.split()[-2:])
    return model, tokenizer, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    print("| file | ours: model s | tokenizer s | transformers: model s | tokenizer s | ratio |\n|---|---|---|---|---|---|")
    for path in args.files:
        ours, theirs = [], []
        for _ in range(args.repeat):
            ours.append(seconds(_IMPORTS + _OURS, str(path.resolve()), "warm"))
            theirs.append(seconds(_IMPORTS + _THEIRS, str(path.resolve())))
        a, b, c, d = (statistics.median(x[i] for x in side) for side in (ours, theirs) for i in (0, 1))
        print(f"| {path.name} | {a:.2f} | {b:.2f} | {c:.1f} | {d:.1f} | {(c + d) / (a + b):.1f} |", flush=True)
        if args.cold:
            mine, other = (seconds(_COLD + side, str(path.resolve()))[2] for side in (_OURS, _GGUF + _THEIRS))
            print(f"| {path.name}, whole process | {mine:.1f} | | {other:.1f} | | {other / mine:.1f} |", flush=True)


if __name__ == "__main__":
    main()
