"""Dequantize torchao's tensors on one thread, against torchao itself, in one run.

    python benchmarks/bench_torchao.py [--size 4096] [--repeats 5]

Each figure is the best of ``--repeats``, both sides in turns, from tensors in memory to bfloat16. Needs torchao (0.18).
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor, PerRow

from qformats.containers.raw import RawTensor
from qformats.formats import torchao
from qformats.formats.protocol import Match, Module

WORDS = {torch.int8: "I8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
CARRIERS = {torch.bfloat16: (torch.int16, "<u2"), torch.float8_e4m3fn: (torch.uint8, "|u1")}


def module_of(tensor: Any) -> Module:
    """The owner's tensor as a module of ours, through its own flattening."""
    parts, metadata = flatten_tensor_state_dict({"m.weight": tensor})
    raws = {}
    for name, part in parts.items():
        carrier, dtype = CARRIERS.get(part.dtype, (part.dtype, None))
        array = part.contiguous().view(carrier).numpy()
        raws[name.removeprefix("m.")] = RawTensor.from_array(name, WORDS[part.dtype], array if dtype is None else array.view(dtype))
    return Module("m", raws, Match("torchao", {}, metadata=metadata))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    w = torch.randn((options.size, options.size), generator=torch.Generator().manual_seed(1)).bfloat16()
    kinds = {
        "Int8Tensor": Int8Tensor.from_hp(w, PerRow()),
        "Intx int4 g32": IntxUnpackedToInt8Tensor.from_hp(w, (1, 32), torch.int4),
        "Float8Tensor": Float8Tensor.from_hp(w, granularity=PerRow()),
    }
    for name, theirs in kinds.items():
        ours = torchao.read(module_of(theirs))
        best = {"ours": float("inf"), "torchao": float("inf")}
        for _ in range(options.repeats):
            for side, run in (("ours", lambda: ours.dequantize(torch.bfloat16, like="torchao")), ("torchao", theirs.dequantize)):  # noqa: B023
                began = time.perf_counter()
                run()
                best[side] = min(best[side], time.perf_counter() - began)
        same = torch.equal(ours.dequantize(torch.bfloat16, like="torchao"), theirs.dequantize())
        rates = {side: round(w.numel() / seconds / 1e9, 3) for side, seconds in best.items()}
        print(json.dumps({"kind": name, "weights_per_ns": rates, "ratio": round(best["torchao"] / best["ours"], 2), "same": same}))


if __name__ == "__main__":
    main()
