"""Checkpoints made by hand: a one-layer llama of GPTQ ``gptq_v2`` planes with chosen codes, scales, zero points and group indices.

Scales are powers of two and codes small integers, so that every product and sum in the tests is exact in float64.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import TOKENIZER, Tensors, store

Array = np.ndarray[Any, Any]
LAYER = "model.layers.0"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class Llama:
    """``indices``: group index (K,) by leaf name (trivial where absent); ``zeros``: a number or "mixed" by leaf; ``bits`` of all."""

    hidden: int = 64
    inner: int = 128
    heads: int = 4
    kv: int = 2
    head_dim: int = 32
    group: int = 32
    bits: int = 4
    seed: int = 1
    zero: int | str = 8
    indices: dict[str, Array] = field(default_factory=dict)
    codes: dict[str, Array] = field(default_factory=dict)
    zeros: dict[str, Array] = field(default_factory=dict)
    scales: dict[str, Array] = field(default_factory=dict)

    def shape(self, leaf: str) -> tuple[int, int]:
        """(N, K)."""
        q, kv, hidden = self.heads * self.head_dim, self.kv * self.head_dim, self.hidden
        sizes = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
        sizes |= {"gate_proj": (self.inner, hidden), "up_proj": (self.inner, hidden), "down_proj": (hidden, self.inner)}
        return sizes[leaf]

    @staticmethod
    def name(leaf: str) -> str:
        return f"{LAYER}.{'self_attn' if leaf in ATTENTION else 'mlp'}.{leaf}"

    def write(self, directory: Path) -> Path:
        """The directory, with config, tokenizer and weights."""
        directory.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, directory / name)
        rng, tensors = np.random.default_rng(self.seed), Tensors()
        vocabulary = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]

        def dense(name: str, values: Array) -> None:
            values = np.ascontiguousarray(values, "<f2")
            tensors[name] = ("F16", list(values.shape), values.tobytes())

        dense("model.embed_tokens.weight", rng.integers(-8, 8, (vocabulary, self.hidden)) / 8)
        dense("lm_head.weight", rng.integers(-8, 8, (vocabulary, self.hidden)) / 8)
        for norm in ("model.norm", f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"):
            dense(f"{norm}.weight", np.ones(self.hidden))
        for leaf in (*ATTENTION, "gate_proj", "up_proj", "down_proj"):
            self._linear(leaf, rng, tensors)
        store(directory / "model.safetensors", tensors, {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(self.config(vocabulary), indent=2))
        return directory

    def _linear(self, leaf: str, rng: np.random.Generator, tensors: Tensors) -> None:
        n, k = self.shape(leaf)
        group = k if self.group == -1 else self.group
        groups, top = k // group, (1 << self.bits) - 1
        codes = self.codes.setdefault(leaf, rng.integers(0, top + 1, (n, k)))
        if leaf not in self.zeros:
            constant = isinstance(self.zero, int)
            self.zeros[leaf] = np.full((n, groups), self.zero) if constant else rng.integers(0, top + 1, (n, groups))
        scales = self.scales.setdefault(leaf, 2.0 ** rng.integers(-6, -2, (n, groups)))
        index = self.indices.setdefault(leaf, np.arange(k) // group)
        name = self.name(leaf)
        for part, values in (("qweight", pack(codes, self.bits).T), ("qzeros", pack(self.zeros[leaf].T, self.bits)), ("g_idx", index)):
            data = np.ascontiguousarray(values, "<i4")
            tensors[f"{name}.{part}"] = ("I32", list(data.shape), data.tobytes())
        half = np.ascontiguousarray(scales.T, "<f2")
        tensors[f"{name}.scales"] = ("F16", list(half.shape), half.tobytes())

    def weight(self, leaf: str) -> Array:
        """(N, K) float64."""
        index = self.indices[leaf]
        values: Array = self.scales[leaf][:, index] * (self.codes[leaf] - self.zeros[leaf][:, index].astype(np.int64))
        return values

    def config(self, vocabulary: int) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((TOKENIZER / "config.json").read_text())
        quantization = {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group, "sym": False, "checkpoint_format": "gptq_v2",
            "desc_act": any((np.diff(i) < 0).any() for i in self.indices.values()),
        }  # fmt: skip
        return config | {
            "hidden_size": self.hidden, "intermediate_size": self.inner, "num_attention_heads": self.heads, "head_dim": self.head_dim,
            "num_key_value_heads": self.kv, "num_hidden_layers": 1, "vocab_size": vocabulary, "tie_word_embeddings": False,
            "quantization_config": quantization,
        }  # fmt: skip


def pack(codes: Array, bits: int) -> Array:
    """(R, C) codes -> (R, ceil(C * bits / 32)) int32, value i in bits [i * bits, (i + 1) * bits) of its row."""
    plain = ((codes.astype(np.int64)[:, :, None] >> np.arange(bits)) & 1).astype("u1").reshape(len(codes), -1)
    plain = np.pad(plain, ((0, 0), (0, -plain.shape[1] % 32)))
    words: Array = np.packbits(plain, axis=1, bitorder="little").view("<i4")
    return words
