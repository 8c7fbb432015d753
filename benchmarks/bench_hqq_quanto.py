"""HQQ and Quanto layers of 4096 x 4096 dequantized by their owners and by us, and their codes packed; one thread, times and ratios.

    python benchmarks/bench_hqq_quanto.py

Both sides start from the stored planes in memory and end with floats in the compute dtype; the values are checked to be the same.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qformats import registry
from qformats.containers.raw import RawTensor
from qformats.formats.protocol import Match, Module

warnings.filterwarnings("ignore")
SIZE = 4096
WORDS = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


def raw(name: str, value: torch.Tensor) -> RawTensor:
    value = value.detach().contiguous()
    array = value.view(torch.int16).numpy().view("<u2") if value.dtype == torch.bfloat16 else value.numpy()
    return RawTensor.from_array(name, WORDS[value.dtype], array)


def best(call: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def hqq(dtype: torch.dtype) -> tuple[Callable[[], torch.Tensor], Module]:
    from hqq.core.quantize import HQQLinear

    params = {
        "nbits": 4, "channel_wise": True, "group_size": 64, "optimize": False, "round_zero": False, "axis": 1, "view_as_float": False,
    }  # fmt: skip
    config = {"weight_quant_params": params, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
    layer = HQQLinear.from_weights(torch.randn(SIZE, SIZE), None, config, compute_dtype=dtype, device="cpu")
    parts = {name: raw(name, value) for name, value in layer.state_dict().items() if value is not None}
    return layer.dequantize, Module("m", parts, Match("hqq", {}))


def quanto(kind: str, dtype: torch.dtype) -> tuple[Callable[[], torch.Tensor], Module]:
    import optimum.quanto as owner

    linear = torch.nn.Linear(SIZE, SIZE, bias=False).to(dtype)
    qtype = getattr(owner, kind)
    if qtype.bits == 8:
        scale = owner.AbsmaxOptimizer()(linear.weight, qtype=qtype, axis=0)
        weight = owner.quantize_weight(linear.weight, qtype=qtype, axis=0, scale=scale, optimized=False)
    else:
        scale, shift = owner.MaxOptimizer()(linear.weight, qtype=qtype, axis=0, group_size=128)
        weight = owner.quantize_weight(linear.weight, qtype=qtype, axis=0, scale=scale, shift=shift, group_size=128, optimized=False)
    state: dict[str, torch.Tensor] = {}
    weight.save_to_state_dict(state, "weight.", False)
    parts = {name: raw(name, value) for name, value in state.items()}
    return weight.dequantize, Module("m", parts, Match("quanto", {}), columns=SIZE)


def main() -> None:
    torch.set_num_threads(1)
    rows: list[tuple[str, str, Callable[[], torch.Tensor], Module]] = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        rows.append((f"hqq 4-bit g64 {dtype}", "hqq", *hqq(dtype)))
        rows += [(f"quanto {kind} {dtype}", "quanto", *quanto(kind, dtype)) for kind in ("qint4", "qint8")]
    print(f"| {SIZE} x {SIZE}, one thread | owner ms | ours ms | ratio | unpack M/s | pack M/s |\n|---|---|---|---|---|---|")
    for title, name, owner, module in rows:
        form: Any = registry.format_module(name)
        tensor, storage, wanted = form.read(module), form.storage_of(module), owner()

        def ours(form: Any = form, module: Module = module, dtype: torch.dtype = wanted.dtype, name: str = name) -> torch.Tensor:
            made: torch.Tensor = form.read(module).dequantize(dtype, like=name)
            return made

        assert torch.equal(ours(), wanted), title
        theirs, mine = best(owner), best(ours)
        unpack, pack = best(lambda f=form, m=module: f.read(m)), best(lambda f=form, s=storage, t=tensor: f.write(s, t, 0, t.shape))
        speed = [SIZE * SIZE / seconds / 1e6 for seconds in (unpack, pack)]
        print(f"| {title} | {theirs * 1e3:.1f} | {mine * 1e3:.1f} | {theirs / mine:.2f} | {speed[0]:.0f} | {speed[1]:.0f} |")


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
