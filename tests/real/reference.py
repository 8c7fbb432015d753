"""A second, slow reading of GPTQ and AWQ checkpoints in plain numpy: every weight as scale * (code - zero point) in float64.

Shares no code with the library. Layouts from GPTQModel 7.7.0 ``nn_modules/qlinear`` and ``utils/model.py`` (the v1 zero points
that it writes are one less, taken off whole words for 2, 4 and 8 bits and field by field for 3) and AutoAWQ 0.2.9
``modules/linear/{gemm,gemv}.py``; ``test_reference.py`` holds it against those libraries' own dequantization.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Reference", "permute_heads", "raw_tensors", "unpack_stream"]

Array = np.ndarray[Any, Any]
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BF16": "<u2"}
_AWQ_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)  # the field that holds column c of eight


def raw_tensors(path: Path) -> dict[str, tuple[str, Array]]:
    """Name -> (dtype word, stored values) of a .safetensors file or of all of a directory; BF16 as its uint16 bits."""
    found: dict[str, tuple[str, Array]] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        data = file.read_bytes()
        (header,) = struct.unpack_from("<Q", data)
        for name, entry in json.loads(data[8 : 8 + header]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                values = np.frombuffer(data[8 + header + begin : 8 + header + end], _NUMPY[entry["dtype"]])
                found[name] = entry["dtype"], values.reshape(entry["shape"])
    return found


def unpack_stream(words: Array, bits: int) -> Array:
    """int32 (R, W) -> codes (R, W * 32 / bits): each row is one little-endian stream of ``bits``-wide fields."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    stream = np.unpackbits(octets, axis=1, bitorder="little")  # (R, W * 32)
    fields = stream.reshape(len(words), -1, bits).astype(np.int64)
    return fields @ (1 << np.arange(bits))


class Reference:
    """One checkpoint directory. ``weight(module)`` is float64 (N, K) in the file's own row and column order."""

    def __init__(self, path: Path) -> None:
        self.tensors = raw_tensors(path)
        self.config = json.loads((path / "config.json").read_text())
        self.quantization: dict[str, Any] = self.config["quantization_config"]

    def is_quantized(self, module: str) -> bool:
        return f"{module}.qweight" in self.tensors

    def weight(self, module: str) -> Array:
        if not self.is_quantized(module):
            return self.values(f"{module}.weight")
        codes, zeros, scales = self._awq(module) if self.quantization["quant_method"] == "awq" else self._gptq(module)
        index = self.group_index(module, codes.shape[1], scales.shape[1])
        result: Array = scales[:, index] * (codes - zeros[:, index])
        return result

    def values(self, name: str) -> Array:
        """A float tensor in float64."""
        kind, stored = self.tensors[name]
        if kind == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return stored.astype(np.float64)

    def group_index(self, module: str, k: int, groups: int) -> Array:
        """The group of each input column (K,)."""
        if f"{module}.g_idx" in self.tensors:
            return self.tensors[f"{module}.g_idx"][1].astype(np.int64)
        return np.arange(k) // -(-k // groups)

    def _scales(self, module: str) -> Array:
        return self.values(f"{module}.scales").T  # (N, G)

    def _gptq(self, module: str) -> tuple[Array, Array, Array]:
        """Codes (N, K), zero points (N, G), scales (N, G)."""
        scales = self._scales(module)
        words = self.tensors[f"{module}.qweight"][1]  # (K * bits / 32, N)
        k = len(self.tensors[f"{module}.g_idx"][1])
        bits = len(words) * 32 // k
        codes = unpack_stream(words.T, bits)
        zeros = self.tensors[f"{module}.qzeros"][1]  # (G, N * bits / 32)
        if self.quantization.get("checkpoint_format", "gptq") != "gptq":
            return codes, unpack_stream(zeros, bits).T, scales
        if bits == 3:
            return codes, (unpack_stream(zeros, bits).T + 1) % 8, scales
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
        return codes, unpack_stream((zeros.view(np.uint32) + ones).view(np.int32), bits).T, scales

    def _awq(self, module: str) -> tuple[Array, Array, Array]:
        words, zeros = self.tensors[f"{module}.qweight"][1], self.tensors[f"{module}.qzeros"][1]
        if self.quantization["version"] == "gemm":  # (K, N / 8), (G, N / 8)
            column = np.arange(words.shape[1] * 8).reshape(-1, 8)[:, _AWQ_COLUMN].reshape(-1)
            return unpack_stream(words, 4)[:, column].T, unpack_stream(zeros, 4)[:, column].T, self._scales(module)
        codes = unpack_stream(words, 4)  # (N, K / 8)
        groups = codes.shape[1] // self.quantization["group_size"]
        return codes, unpack_stream(zeros, 4)[:, :groups], self.values(f"{module}.scales")[:, :groups]


def permute_heads(rows: Array, heads: int) -> Array:
    """Rows of a query or key weight as GGUF's llama orders them: of each head, the two rotary halves interleaved."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
