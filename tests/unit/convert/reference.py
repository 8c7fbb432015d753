"""An independent second reader: weights of GPTQ, AWQ, dense and GGUF checkpoints as float64, by HF name. Shares no code with qformats.

GPTQ and AWQ planes are read as one bit stream (AutoGPTQ 0.7.1, GPTQModel 7.7.0, AutoAWQ 0.2.9 packers); ggml blocks follow
llama.cpp's ggml-common.h; names come from gguf-py's tensor map; llama's rows are permuted as llama.cpp's converter permutes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from checkpoints import Tensors, load

Array = np.ndarray[Any, Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def floats(dtype: str, shape: list[int], data: bytes) -> Array:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64).reshape(shape)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float64).reshape(shape)


def stream(words: Array, bits: int, count: int) -> Array:
    """(R, words) int32 -> (R, count): value i in bits [i * bits, (i + 1) * bits) of the row."""
    plain = np.unpackbits(np.ascontiguousarray(words).view("u1").reshape(len(words), -1), axis=1, bitorder="little")
    fields = plain[:, : count * bits].reshape(len(words), count, bits).astype(np.int64)
    return fields @ (1 << np.arange(bits))


def planar(words: Array, bits: int, count: int) -> Array:
    """(R, words) int32 -> (R, count): blocks of 32 values in ``bits`` words, planes of 4, 2 and 1 bits, the low one first."""
    blocks = words.reshape(len(words), -1, bits)
    total, at = np.zeros((len(words), count), np.int64), 0
    for width in {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]:
        plane = np.ascontiguousarray(blocks[:, :, at : at + width]).reshape(len(words), -1)
        total += stream(plane, width, count) << at
        at += width
    return total


class Packed:
    """One checkpoint directory with packed linear weights."""

    def __init__(self, directory: Path, entry: dict[str, Any]) -> None:
        self.tensors: Tensors = load(directory / "model.safetensors")
        self.config = json.loads((directory / "config.json").read_text())
        self.entry = entry
        self.modules = [name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight")]

    def _words(self, name: str) -> Array:
        dtype, shape, data = self.tensors[name]
        return np.frombuffer(data, {"I16": "<u2"}.get(dtype, "<i4")).reshape(shape)

    def inputs(self, module: str) -> int:
        config, leaf = self.config, module.rpartition(".")[2]
        hidden = int(config["hidden_size"])
        width = int(config.get("head_dim") or hidden // config["num_attention_heads"])
        inner = config["moe_intermediate_size"] if ".experts." in module else config["intermediate_size"]
        return {"down_proj": int(inner), "o_proj": width * int(config["num_attention_heads"])}.get(leaf, hidden)

    def planes(self, module: str) -> tuple[Array, Array, Array, Array]:
        """codes (N, K), zero points (N, G), scales (N, G), group of each column (K,)."""
        if self.entry["format"] == "gptq":
            return self._gptq(module)
        return self._awq(module)

    def _gptq(self, module: str) -> tuple[Array, Array, Array, Array]:
        k, words = self.inputs(module), self._words(f"{module}.qweight")
        n, bits = words.shape[1], words.shape[0] * 32 // k
        in_planes = self.config["quantization_config"].get("checkpoint_format") == "gptq_p" and bits in (3, 5, 6, 7)
        unpack = planar if in_planes else stream
        codes = unpack(np.ascontiguousarray(words.T), bits, k)
        packed, policy = self._words(f"{module}.qzeros"), self.entry["zero_policy"]
        if policy == "v1-word":
            packed = (packed.view("<u4") + np.uint32(sum(1 << i for i in range(0, 32, bits)))).view("<i4")
        zeros = unpack(packed, bits, n)
        if policy in ("v1", "v1-ambiguous"):
            zeros = zeros + 1
        elif policy == "v1-field":
            zeros = (zeros + 1) % (1 << bits)
        scales = floats(*self.tensors[f"{module}.scales"])
        groups = self.tensors.get(f"{module}.g_idx")
        size = -(-k // len(scales))
        if "ragged" in self.entry["path"]:
            size = self.entry["group_size"]
        index = np.arange(k) // size if groups is None else np.frombuffer(groups[2], "<i4").astype(np.int64)
        return codes, zeros.T, scales.T, index

    def _awq(self, module: str) -> tuple[Array, Array, Array, Array]:
        k, words = self.inputs(module), self._words(f"{module}.qweight")
        if "fast" in self.entry["path"] or "llm-awq" in self.entry["path"]:
            return self._fast(module, k, words)
        scales, stored = floats(*self.tensors[f"{module}.scales"]), f"{module}.qzeros" in self.tensors
        if "gemv" in self.entry["path"]:
            size = self.entry["group_size"]
            n, groups = len(words), 1 if size == -1 else k // size
            codes, scales = stream(words, 4, k), scales[:, :groups]
            zeros = stream(self._words(f"{module}.qzeros"), 4, groups)
        else:
            n, groups = words.shape[1] * 8, len(scales)
            codes, scales = interleaved(words).T, scales.T
            zeros = interleaved(self._words(f"{module}.qzeros")).T if stored else np.full((n, groups), 8)
        return codes, zeros, scales, np.arange(k) // (k // groups)

    def _fast(self, module: str, k: int, words: Array) -> tuple[Array, Array, Array, Array]:
        """Word 16 r + 8 h + j of 64 holds row r, columns 32 h + j + 8 f; zero points are -(scale * z) in float16."""
        n, groups = len(words) * 4, k // self.entry["group_size"]
        codes = np.empty((n, k), np.int64)
        for word in range(64):
            row, half, j = word // 16, word // 8 % 2, word % 8
            for field in range(4):
                codes[row::4, 32 * half + j + 8 * field :: 64] = words[:, word::64] >> 4 * field & 15
        leaf = "scaled_zeros" if f"{module}.scaled_zeros" in self.tensors else "qzeros"
        scales, zeros = (floats(*self.tensors[f"{module}.{name}"])[:groups].T for name in ("scales", leaf))
        return codes, np.rint(-zeros / scales).astype(np.int64), scales, np.arange(k) // (k // groups)

    def weight(self, module: str) -> Array:
        codes, zeros, scales, index = self.planes(module)
        values: Array = scales[:, index] * (codes - zeros[:, index])
        return values


def interleaved(words: Array) -> Array:
    """AWQ GEMM: nibble i of word j is column 8 j + AWQ_ORDER[i]."""
    nibbles = stream(words, 4, words.shape[1] * 8).reshape(len(words), -1, 8)
    out = np.empty_like(nibbles)
    out[:, :, list(AWQ_ORDER)] = nibbles
    return out.reshape(len(words), -1)


def hf_values(directory: Path, entry: dict[str, Any]) -> dict[str, Array]:
    """Every tensor of an HF checkpoint by name, packed weights as ``module.weight``."""
    packed = Packed(directory, entry)
    leaves = tuple(f"{m}.{leaf}" for m in packed.modules for leaf in ("qweight", "qzeros", "scales", "g_idx", "scaled_zeros"))
    values = {name: floats(*t) for name, t in packed.tensors.items() if name not in leaves}
    return values | {f"{m}.weight": packed.weight(m) for m in packed.modules}


# ---------------------------------------------------------------- GGUF


def _half_split(qs: Array) -> Array:
    return np.concatenate((qs & 15, qs >> 4), axis=-1).astype(np.float64)


def _f16(raw: Array) -> Array:
    values: Array = np.ascontiguousarray(raw).view("<f2").astype(np.float64)
    return values


def _fifth(raw: Array) -> Array:
    return np.unpackbits(np.ascontiguousarray(raw), axis=-1, bitorder="little").astype(np.float64) * 16


def _q4_0(b: Array) -> Array:
    values: Array = _f16(b[:, :2]) * (_half_split(b[:, 2:]) - 8)
    return values


def _q4_1(b: Array) -> Array:
    return _f16(b[:, :2]) * _half_split(b[:, 4:]) + _f16(b[:, 2:4])


def _q5_0(b: Array) -> Array:
    values: Array = _f16(b[:, :2]) * (_half_split(b[:, 6:]) + _fifth(b[:, 2:6]) - 16)
    return values


def _q5_1(b: Array) -> Array:
    values: Array = _f16(b[:, :2]) * (_half_split(b[:, 8:]) + _fifth(b[:, 4:8])) + _f16(b[:, 2:4])
    return values


def _q8_0(b: Array) -> Array:
    values: Array = _f16(b[:, :2]) * np.ascontiguousarray(b[:, 2:]).view("i1").astype(np.float64)
    return values


def _q4_k(b: Array) -> Array:
    d, dmin, s = _f16(b[:, :2]), _f16(b[:, 2:4]), b[:, 4:16]
    sc = np.concatenate((s[:, :4] & 63, (s[:, 8:] & 15) | (s[:, :4] >> 6 << 4)), 1).astype(np.float64)
    mn = np.concatenate((s[:, 4:8] & 63, (s[:, 8:] >> 4) | (s[:, 4:8] >> 6 << 4)), 1).astype(np.float64)
    qs = b[:, 16:].reshape(-1, 4, 32)
    q = np.stack((qs & 15, qs >> 4), 2).reshape(-1, 8, 32).astype(np.float64)
    values: Array = ((d * sc)[:, :, None] * q - (dmin * mn)[:, :, None]).reshape(-1, 256)
    return values


BLOCKS = {"Q4_0": (32, 18, _q4_0), "Q4_1": (32, 20, _q4_1), "Q5_0": (32, 22, _q5_0), "Q5_1": (32, 24, _q5_1), "Q8_0": (32, 34, _q8_0),
          "Q4_K": (256, 144, _q4_k)}  # fmt: skip


def gguf_tensors(path: Path) -> dict[str, tuple[str, Array]]:
    """Type and float64 values of every tensor of a GGUF file, by its GGUF name."""
    result = {}
    for tensor in gguf.GGUFReader(path).tensors:
        kind, shape = tensor.tensor_type.name, [int(n) for n in reversed(tensor.shape)]
        data = np.asarray(tensor.data).tobytes()
        if kind in BLOCKS:
            _, nbytes, decode = BLOCKS[kind]
            values = decode(np.frombuffer(data, "u1").reshape(-1, nbytes)).reshape(shape)
        else:
            values = floats(kind, shape, data)
        result[tensor.name] = (kind, values)
    return result


ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3_moe": "QWEN3MOE", "gemma3_text": "GEMMA3"}


def expected_gguf(values: dict[str, Array], config: dict[str, Any]) -> dict[str, Array]:
    """HF values by GGUF name: experts stacked, llama's q and k rows reordered, gemma's norms plus one."""
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config["model_type"]])
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    result: dict[str, Array] = {}
    experts: dict[str, list[tuple[int, Array]]] = {}
    for name, value in values.items():
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            number, _, rest = after.partition(".")
            experts.setdefault(f"{before}.experts.{rest}", []).append((int(number), value))
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        result[target] = _rows(name, value, config)
    for name, parts in experts.items():
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None, name
        result[target] = np.stack([value for _, value in sorted(parts, key=lambda p: p[0])])
    if config.get("tie_word_embeddings") and "output.weight" in result:
        del result["output.weight"]
    return result


def _rows(name: str, value: Array, config: dict[str, Any]) -> Array:
    if config["model_type"] in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):
        heads = config["num_attention_heads"] if ".q_proj." in name else config["num_key_value_heads"]
        return value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    if config["model_type"].startswith("gemma3") and name.endswith("norm.weight"):
        return value + 1
    return value
