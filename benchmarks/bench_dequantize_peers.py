"""Weights in stored form dequantized on one thread by the libraries that own the formats, and by us, in one run.

    python benchmarks/bench_dequantize_peers.py [--size 4096] [--repeats 7] [--clock wall|cpu] [KIND ...]

Both sides start from the stored parts in memory and end with a new tensor of the owner's dtype; they take turns, the figures are medians,
and the values must be the same bit for bit. Needs bitsandbytes, hqq, optimum-quanto, torchao and compressed-tensors.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qformats import registry
from qformats.containers.raw import RawTensor
from qformats.formats.protocol import Match, Module

warnings.filterwarnings("ignore")
WORDS = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32",
    torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
CARRIERS = {torch.bfloat16: (torch.int16, "<u2"), torch.float8_e4m3fn: (torch.uint8, "|u1")}


@dataclass(frozen=True)
class Case:
    """One kind of weight: the owner's call, our module of the same parts, the format, and the ratio asked."""

    owner: Callable[[], Tensor]
    module: Module
    asked: float = 2.0

    @property
    def format(self) -> str:
        return self.module.match.format


def raw(name: str, value: Tensor) -> RawTensor:
    value = value.detach().contiguous()
    carrier, dtype = CARRIERS.get(value.dtype, (value.dtype, None))
    array = value.view(carrier).numpy()
    return RawTensor.from_array(name, WORDS[value.dtype], array if dtype is None else array.view(dtype))


def module_of(form: str, parts: dict[str, Tensor], config: dict[str, Any], **more: Any) -> Module:
    return Module("m", {name: raw(f"m.{name}", value) for name, value in parts.items()}, Match(form, config), **more)


# ---------------------------------------------------------------- the owners


def bitsandbytes(w: Tensor, kind: str, nested: bool) -> Case:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(w.bfloat16(), blocksize=64, quant_type=kind, compress_statistics=nested)
    parts = {"weight": packed, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}
    return Case(lambda: functional.dequantize_4bit(packed, state), module_of("bitsandbytes", parts, {}), 1.0)


def hqq(w: Tensor, dtype: torch.dtype) -> Case:
    from hqq.core.quantize import HQQLinear

    params = {
        "nbits": 4, "channel_wise": True, "group_size": 64, "optimize": False, "round_zero": False, "axis": 1, "view_as_float": False,
    }  # fmt: skip
    config = {"weight_quant_params": params, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
    layer = HQQLinear.from_weights(w.clone(), None, config, compute_dtype=dtype, device="cpu")
    return Case(layer.dequantize, module_of("hqq", {k: v for k, v in layer.state_dict().items() if v is not None}, {}))


def quanto(w: Tensor, kind: str, dtype: torch.dtype) -> Case:
    import optimum.quanto as owner

    qtype, w = getattr(owner, kind), w.to(dtype)
    if qtype.bits == 8:
        scale = owner.AbsmaxOptimizer()(w, qtype=qtype, axis=0)
        weight = owner.quantize_weight(w, qtype=qtype, axis=0, scale=scale, optimized=False)
    else:
        scale, shift = owner.MaxOptimizer()(w, qtype=qtype, axis=0, group_size=128)
        weight = owner.quantize_weight(w, qtype=qtype, axis=0, scale=scale, shift=shift, group_size=128, optimized=False)
    state: dict[str, Tensor] = {}
    weight.save_to_state_dict(state, "weight.", False)
    return Case(weight.dequantize, module_of("quanto", state, {}, columns=w.shape[1]))


def torchao(w: Tensor, kind: str) -> Case:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor, PerRow

    made = {
        "int8": lambda: Int8Tensor.from_hp(w.bfloat16(), PerRow()),
        "int4": lambda: IntxUnpackedToInt8Tensor.from_hp(w.bfloat16(), (1, 32), torch.int4),  # type: ignore[attr-defined]
        "float8": lambda: Float8Tensor.from_hp(w.bfloat16(), granularity=PerRow()),
    }[kind]()
    parts, metadata = flatten_tensor_state_dict({"m.weight": made})
    raws = {name.removeprefix("m."): raw(name, part) for name, part in parts.items()}
    return Case(made.dequantize, Module("m", raws, Match("torchao", {}, metadata=metadata)))


INT = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
CHANNEL, FP8 = {"num_bits": 8, "type": "int", "strategy": "channel"}, {"num_bits": 8, "type": "float", "strategy": "channel"}
MX = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
FP8_SCALES = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
CT: dict[str, tuple[str, dict[str, Any]]] = {
    "w4 sym": ("pack-quantized", INT),
    "w4 asym": ("pack-quantized", INT | {"symmetric": False}),
    "w3 sym": ("pack-quantized", INT | {"num_bits": 3}),
    "int8": ("int-quantized", CHANNEL),
    "fp8 channel": ("float-quantized", FP8),
    "fp8 block": ("float-quantized", FP8 | {"strategy": "block", "block_structure": [128, 128]}),
    "mxfp4": ("mxfp4-pack-quantized", MX),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16} | FP8_SCALES),
}


def _ends(w: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight under each scale."""
    if args.group_size:
        w = w.reshape(w.shape[0], -1, args.group_size)
        return w.amin(-1), w.amax(-1)
    if args.strategy == "channel":
        return w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    h, v = args.block_structure
    tiles = w.reshape(w.shape[0] // h, h, -1, v)
    return tiles.amin((1, 3)), tiles.amax((1, 3))


def compressed_tensors(w: Tensor, kind: str) -> Case:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    form, wanted = CT[kind]
    args, w = QuantizationArgs(**wanted), w.bfloat16()
    scheme, known, state = QuantizationScheme(targets=["Linear"], weights=args), {}, {"weight": w}
    if args.strategy == "tensor_group":
        known["global_scale"] = generate_gparam(w.amin().float().reshape(1), w.amax().float().reshape(1)).reshape(1)
        state["weight_global_scale"] = known["global_scale"]
    scale, zero = calculate_qparams(*_ends(w, args), args, **known)
    powers = args.scale_dtype == torch.uint8 and scale.max() > 60
    state["weight_scale"] = torch.exp2(scale.float() - 127).bfloat16() if powers else scale.bfloat16()
    state["weight_zero_point"] = zero.to(torch.int8) if args.type == "int" else zero
    owner = BaseCompressor.get_value_from_registry(form)
    parts = {k: v for k, v in owner.compress(state, scheme).items() if not (args.symmetric and k == "weight_zero_point")}
    config = QuantizationConfig(config_groups={"g": scheme}, format=form).model_dump(mode="json")
    return Case(lambda: owner.decompress(dict(parts), scheme)["weight"], module_of("compressed-tensors", parts, config))


def cases(w: Tensor) -> dict[str, Callable[[], Case]]:
    floats = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    made: dict[str, Callable[[], Case]] = {
        "bitsandbytes nf4": lambda: bitsandbytes(w, "nf4", False),
        "bitsandbytes nf4 nested": lambda: bitsandbytes(w, "nf4", True),
    }
    for name, dtype in floats.items():
        made[f"hqq int4 g64 {name}"] = lambda d=dtype: hqq(w, d)  # type: ignore[misc]
    for kind in ("qint4", "qint8"):
        for name, dtype in floats.items():
            made[f"quanto {kind} {name}"] = lambda k=kind, d=dtype: quanto(w, k, d)  # type: ignore[misc]
    for kind in ("int8", "int4", "float8"):
        made[f"torchao {kind}"] = lambda k=kind: torchao(w, k)  # type: ignore[misc]
    for kind in CT:
        made[f"compressed-tensors {kind}"] = lambda k=kind: compressed_tensors(w, k)  # type: ignore[misc]
    return made


# ---------------------------------------------------------------- measuring


def measure(sides: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each side, taken in turns, after one call that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            began = clock()
            made = run()
            if turn:
                taken[name].append(clock() - began)
            del made
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="part of a kind's name; all without")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    w = torch.randn((args.size, args.size), generator=torch.Generator().manual_seed(1)) * 0.05
    print(f"{args.size} x {args.size} weights, one thread, {args.clock} time, medians of {args.repeats}; read: ours from parts to codes\n")
    print("| kind | dtype | owner ms | ours ms | read ms | ratio | asked | same bits |\n|---|---|---|---|---|---|---|---|")
    for title, make in cases(w).items():
        if args.kinds and not any(kind in title for kind in args.kinds):
            continue
        case = make()
        form: Any = registry.format_module(case.format)
        wanted = case.owner()

        def ours(form: Any = form, case: Case = case, dtype: torch.dtype = wanted.dtype) -> Tensor:
            whole = getattr(form, "dequantize", None)
            made: Tensor = form.read(case.module).dequantize(dtype, like=case.format) if whole is None else whole(case.module, dtype=dtype)
            return made

        same = "yes" if torch.equal(ours(), wanted) else "NO"
        took = measure({"owner": case.owner, "ours": ours, "read": lambda f=form, c=case: f.read(c.module)}, args.repeats, clock)  # type: ignore[misc]
        ratio, dtype = took["owner"] / took["ours"], str(wanted.dtype).removeprefix("torch.")
        cells = " | ".join(f"{took[side] * 1e3:.1f}" for side in ("owner", "ours", "read"))
        print(f"| {title} | {dtype} | {cells} | {ratio:.2f} | {case.asked:g} | {same} |", flush=True)


if __name__ == "__main__":
    main()
