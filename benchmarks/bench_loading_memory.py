"""Memory of ``load_model`` on a generated GGUF of about 2 GB: the largest growth of RssAnon + RssFile beside the bytes the model keeps.

usage: bench_loading_memory.py [--layers 40] [--type Q4_0] [--dir DIR]     (Linux)
Growth is over a process that has imported transformers, compiled the loops and loaded a tokenizer and a small model of the same types.
The bound is 1.15 x the kept bytes + 64 MiB. Exit code 1 if it is above.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from qformats.containers.gguf import TensorInfo, Value, layout_gguf

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, INNER, HEADS, VOCABULARY = 4096, 11008, 32, 32000
_LOAD = """
import sys, threading, time
import qformats
from transformers.models.llama import modeling_llama
small, large, tokenizer = sys.argv[1:]
qformats.load_tokenizer(tokenizer)
qformats.load_model(small)(__import__("torch").zeros(1, 4, dtype=int))
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssFile:"))) * 1024
before, peak, going = resident(), 0, True
def watch():
    global peak
    while going:
        peak = max(peak, resident())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
model = qformats.load_model(large)
took = time.perf_counter() - start
going = False
thread.join()
kept = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
print(kept, peak - before, resident() - before, took)
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes, rows first."""
    block = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN, HIDDEN), "attn_v": (HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
    }  # fmt: skip
    blocks = {f"blk.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}
    return {"token_embd.weight": (VOCABULARY, HIDDEN), **blocks, "output_norm.weight": (HIDDEN,), "output.weight": (VOCABULARY, HIDDEN)}


def generate(path: Path, layers: int, kind: str) -> None:
    """A llama without vocabulary, its blocks random, scales small."""
    metadata = {
        "general.architecture": Value("str", "llama"), "llama.block_count": Value("u32", layers),
        "llama.context_length": Value("u32", 2048),
        "llama.embedding_length": Value("u32", HIDDEN), "llama.feed_forward_length": Value("u32", INNER),
        "llama.attention.head_count": Value("u32", HEADS), "llama.attention.layer_norm_rms_epsilon": Value("f32", 1e-5),
        "llama.vocab_size": Value("u32", VOCABULARY), "tokenizer.ggml.model": Value("str", "none"),
    }  # fmt: skip
    infos = [TensorInfo(name, kind if len(shape) > 1 else "F32", shape) for name, shape in shapes(layers).items()]
    layout = layout_gguf(metadata, infos)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 64, 1 << 24, dtype=np.uint8)  # as halves: 0 to 1.4 at most, no infinities
    with path.open("wb") as file:
        file.write(layout.header)
        while (left := layout.size - file.tell()) > 0:
            file.write(noise[:left].tobytes())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--type", default="Q4_0")
    parser.add_argument("--tokenizer", required=True, help="a GGUF with a vocabulary")
    parser.add_argument("--dir", type=Path, default=None)
    args = parser.parse_args()
    print("| type | file MiB | kept MiB | largest growth MiB | at the end MiB | bound MiB | seconds |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        small, large = Path(folder) / "small.gguf", Path(folder) / "large.gguf"
        generate(small, 1, args.type)
        generate(large, args.layers, args.type)
        command = [sys.executable, "-c", _LOAD, str(small), str(large), args.tokenizer]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        kept, peak, end = map(int, done.stdout.split()[-4:-1])
        bound = kept * 115 // 100 + (64 << 20)
        row = [large.stat().st_size >> 20, kept >> 20, peak >> 20, end >> 20, bound >> 20]
        print("|", args.type, "|", " | ".join(map(str, row)), f"| {float(done.stdout.split()[-1]):.1f} |")
    return int(peak > bound)


if __name__ == "__main__":
    sys.exit(main())
