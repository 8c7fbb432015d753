"""Weights in the parts of AQLM, BitNet, MLX, EETQ, FBGEMM, fine-grained FP8 and ModelOpt, and the values that their owners read there.

By the owners' own functions where a CPU runs them: aqlm 1.1.7 ``pack_int_data`` and ``_dequantize_weight`` (the books are a k-means of the
weight), transformers 5.23 ``integrations/bitnet.py``, ``metal_quantization.py`` and ``finegrained_fp8.py``, mlx 0.32.4 ``quantize`` and
``dequantize``. The others are followed here from their sources and share no code with the library: ``cutlass_preprocessors.cc`` of
NetEase-FuXi/EETQ (4750aa4), ``integrations/fbgemm_fp8.py`` of transformers, and
``qtensor/{fp8,nvfp4}_tensor.py`` of NVIDIA Model-Optimizer 0.47.

A packer takes a weight (N, K) and returns its parts by the last word of their names, and the values (N, K).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

__all__ = ["PACKERS", "Packer", "eetq_bytes"]

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Packer:
    """``pack`` for each linear weight (and the embedding), the quantization config, and the dtype of everything else."""

    pack: Callable[[torch.Tensor], Packed]
    config: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    embedding: bool = False
    beside: dict[str, Any] | None = None  # hf_quant_config.json, with no config in config.json


# ---------------------------------------------------------------- AQLM


def _means(groups: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` centres (count, d) of groups (M, d), three rounds of Lloyd over a part of them, and the nearest of each group (M,)."""
    gen = torch.Generator().manual_seed(seed)
    part = groups[torch.randperm(len(groups), generator=gen)[: 16 * count]]
    centres = part[:count].clone()
    for _ in range(3):
        near = _nearest(part, centres)
        sums = torch.zeros_like(centres).index_add_(0, near, part)
        hits = torch.bincount(near, minlength=count).unsqueeze(1)
        centres = torch.where(hits > 0, sums / hits.clamp(min=1), centres)
    centres = centres.half().float()
    return centres, _nearest(groups, centres)


def _nearest(groups: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    half = centres.square().sum(1) / 2
    return torch.cat([(half - run @ centres.T).argmin(1) for run in groups.split(16384)])


def _aqlm(weight: torch.Tensor, bits: int, books: int, rows: int, columns: int) -> Packed:
    from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data  # type: ignore[import-not-found, unused-ignore]

    (n, k), w = weight.shape, weight.float()
    tiles = w.reshape(n // rows, rows, k // columns, columns).swapaxes(1, 2)  # (N / rows, K / columns, rows, columns)
    scales = tiles.square().mean((1, 2, 3), keepdim=True).sqrt().half()
    left, entries, chosen = (tiles / scales.float()).reshape(-1, rows * columns), [], []
    for book in range(books):  # each of what the ones before left
        centres, near = _means(left, 2**bits, book)
        entries.append(centres.reshape(2**bits, rows, columns))
        chosen.append(near.reshape(n // rows, k // columns))
        left = left - centres[near]
    codes, codebooks = pack_int_data(torch.stack(chosen, -1), bits), torch.stack(entries).half()
    values = _dequantize_weight(unpack_int_data(codes, bits), codebooks, scales)
    return {"codes": codes, "codebooks": codebooks, "scales": scales}, values


def _aqlm_config(bits: int, books: int, rows: int, columns: int) -> dict[str, Any]:
    return {"quant_method": "aqlm", "in_group_size": columns, "out_group_size": rows, "num_codebooks": books, "nbits_per_codebook": bits,
            "linear_weights_not_to_quantize": ["model.embed_tokens.weight", "lm_head.weight"]}  # fmt: skip


# ---------------------------------------------------------------- BitNet


def _bitnet(weight: torch.Tensor, divides: bool) -> Packed:
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    mean = weight.float().abs().mean()
    scale = (1 / mean if divides else mean).to(weight.dtype).reshape(1)
    made = pack_weights((weight.float() / mean).round().clamp(-1, 1))
    ternary = getattr(unpack_weights, "__wrapped__", unpack_weights)(made, torch.float32)
    return {"weight": made, "weight_scale": scale}, ternary / scale.float() if divides else ternary * scale.float()


# ---------------------------------------------------------------- MLX, and transformers' metal


def _mlx(weight: torch.Tensor, mode: str, bits: int, group: int) -> Packed:
    import mlx.core as mx  # type: ignore[import-not-found, unused-ignore]

    mx.set_default_device(mx.cpu)

    def torch_of(value: Any) -> torch.Tensor:
        if value.dtype == mx.bfloat16:
            return torch.from_numpy(np.array(value.view(mx.uint16)).view(np.int16)).view(torch.bfloat16)
        array = np.array(value)
        return torch.from_numpy(array.view(np.int32)).view(torch.uint32) if array.dtype == np.uint32 else torch.from_numpy(array)

    kind = {torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}[weight.dtype]
    options = {"group_size": group, "bits": bits, "mode": mode}
    words, scales, *biases = mx.quantize(mx.array(weight.float().numpy()).astype(kind), **options)
    values = mx.dequantize(words, scales, biases[0] if biases else None, **options)
    parts = {"weight": words, "scales": scales} | ({"biases": biases[0]} if biases else {})
    return {leaf: torch_of(value) for leaf, value in parts.items()}, torch_of(values)


def _metal(weight: torch.Tensor, bits: int, group: int) -> Packed:
    from transformers.integrations.metal_quantization import _affine_dequantize_tensor, _affine_quantize_tensor

    words, scales, biases = _affine_quantize_tensor(weight, group, bits)
    scales, biases = scales.to(weight.dtype), biases.to(weight.dtype)
    values = _affine_dequantize_tensor(words.view(torch.int32), scales, biases, group, bits)
    return {"weight": words, "scales": scales, "qbiases": biases}, values


# ---------------------------------------------------------------- EETQ


def eetq_bytes(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """int8 (K, N) in the bytes of GPUs from sm75 on: ``preprocess_weights_for_mixed_gemm``'s four steps, each over the whole matrix."""
    k, n = codes.shape
    order = [8 * ((at % 4) // 2) + at % 2 + 2 * (at // 4) for at in range(16)]
    rows = codes.reshape(k // 16, 16, n)[:, order].reshape(k, n)  # permute_B_rows_for_mixed_gemm
    columns = np.ascontiguousarray(rows.T)  # subbyte_transpose
    tiles = columns.reshape(n // 2, 2, k // 64, 64).swapaxes(1, 2)  # interleave_column_major_tensor: two columns in turns of 64 rows
    fours = (np.ascontiguousarray(tiles).astype(np.int16) + 128).astype(np.int8).reshape(-1, 4)  # add_bias_and_interleave_int8s
    return np.ascontiguousarray(fours[:, [0, 2, 1, 3]]).reshape(k, n)


def _eetq(weight: torch.Tensor) -> Packed:
    scale = (weight.float().abs().amax(1) / 128).half()
    codes = (weight.float() / scale.float().unsqueeze(1)).round().clamp(-128, 127).to(torch.int8)
    made = torch.from_numpy(eetq_bytes(codes.T.contiguous().numpy()))
    return {"weight": made, "weight_scales": scale}, codes.float() * scale.float().unsqueeze(1)


# ---------------------------------------------------------------- FP8 and FP4


def _e4m3(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def _fbgemm(weight: torch.Tensor) -> Packed:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = _e4m3(weight, scale)
    return {"weight": codes, "weight_scale": scale, "input_scale_ub": torch.tensor([1200.0])}, codes.float() * scale


def _blocks(weight: torch.Tensor, rows: int, columns: int, powers: bool = False) -> Packed:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = SimpleNamespace(weight_block_size=(rows, columns), scale_fmt="ue8m0" if powers else "float")
    made = Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one("x.weight", weight)
    codes, scale = made["x.weight"], made["x.weight_scale_inv"]
    values = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    return {"weight": codes, "weight_scale_inv": scale.view(torch.uint8) if powers else scale}, values


def _modelopt_fp8(weight: torch.Tensor) -> Packed:
    scale = weight.float().abs().max() / 448
    codes = _e4m3(weight, scale)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.015)}, codes.float() * scale


def _nvfp4(weight: torch.Tensor) -> Packed:
    """``NVFP4QTensor.quantize``: nearest of e2m1, ties to even, the even column in the low half of a byte."""
    sizes, middles = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    runs = weight.float().reshape(weight.shape[0], -1, 16)
    factor = runs.abs().max() / (6 * 448)
    scale = (runs.abs().amax(-1) / (6 * factor)).to(torch.float8_e4m3fn)
    both = (scale.float() * factor).unsqueeze(-1)
    parts = torch.where(both > 0, runs / both, 0.0)
    size = parts.abs().contiguous()
    near = torch.searchsorted(middles, size) + torch.isin(size, middles[[1, 3, 5]])
    codes = (near + 8 * (parts < 0)).to(torch.uint8).flatten(1)
    values = (sizes[near] * torch.where(parts < 0, -1.0, 1.0) * both).flatten(1)
    made = {"weight": codes[:, 0::2] | (codes[:, 1::2] << 4), "weight_scale": scale, "weight_scale_2": factor}
    return made | {"input_scale": torch.tensor(0.003)}, values


_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_FINE = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": ["lm_head"]}
_GROUP = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
PACKERS = {
    "aqlm-2x8": Packer(partial(_aqlm, bits=8, books=2, rows=1, columns=8), _aqlm_config(8, 2, 1, 8), torch.float16),
    "aqlm-1x10-o2": Packer(partial(_aqlm, bits=10, books=1, rows=2, columns=4), _aqlm_config(10, 1, 2, 4), torch.float16),
    "bitnet-bitlinear": Packer(partial(_bitnet, divides=True), {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}),
    "bitnet-autobitlinear": Packer(partial(_bitnet, divides=False), {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline", "modules_to_not_convert": ["lm_head"]}),
    "mlx-4b-g64": Packer(partial(_mlx, mode="affine", bits=4, group=64), {"group_size": 64, "bits": 4}, torch.float16, True),
    "mlx-5b-g32": Packer(partial(_mlx, mode="affine", bits=5, group=32), {"group_size": 32, "bits": 5, "mode": "affine"}, embedding=True),
    "mlx-mxfp4": Packer(partial(_mlx, mode="mxfp4", bits=4, group=32), {"group_size": 32, "bits": 4, "mode": "mxfp4"}, embedding=True),
    "mlx-nvfp4": Packer(partial(_mlx, mode="nvfp4", bits=4, group=16), {"group_size": 16, "bits": 4, "mode": "nvfp4"}, embedding=True),
    "mlx-mxfp8": Packer(partial(_mlx, mode="mxfp8", bits=8, group=32), {"group_size": 32, "bits": 8, "mode": "mxfp8"}, embedding=True),
    "metal-8b-g32": Packer(partial(_metal, bits=8, group=32), {
        "quant_method": "metal", "bits": 8, "group_size": 32, "modules_to_not_convert": ["lm_head"]}, torch.float16),
    "eetq-int8": Packer(_eetq, {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": ["lm_head"]}, torch.float16),
    "fbgemm-fp8": Packer(_fbgemm, {
        "quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}),
    "fp8-b64": Packer(partial(_blocks, rows=64, columns=64), _FINE | {"weight_block_size": [64, 64]}),
    "fp8-b128": Packer(partial(_blocks, rows=128, columns=128), _FINE | {"weight_block_size": [128, 128]}),
    "fp8-mxfp8": Packer(partial(_blocks, rows=1, columns=32, powers=True), {
        "quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32], "scale_fmt": "ue8m0",
        "modules_to_not_convert": ["lm_head"]}),
    "modelopt-fp8": Packer(_modelopt_fp8, {}, beside={"producer": _PRODUCER, "quantization": {
        "quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}}),
    "modelopt-nvfp4": Packer(_nvfp4, {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": _PRODUCER,
        "config_groups": {"group_0": {"input_activations": _GROUP, "weights": _GROUP, "targets": ["Linear"]}}}),
}  # fmt: skip
