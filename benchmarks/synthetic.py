"""A synthetic llama checkpoint of a given size: random codes, plausible scales and zero points, in GPTQ or AWQ layout.

No model weights: every word comes from a seeded generator. Written with the safetensors package's own byte layout by our container.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from qformats.containers.safetensors import layout_safetensors

HIDDEN, FEED, HEADS, KV, LAYERS, GROUP = 4096, 11008, 32, 8, 12, 128
FIXTURE = Path(__file__).parent.parent / "fixtures" / "gptq" / "4b-g32-sym"


def linear(rng: np.random.Generator, name: str, n: int, k: int, method: str) -> list[tuple[str, str, np.ndarray]]:
    """The planes of one N x K module: (full name, dtype word, array)."""
    groups = k // GROUP
    scales = (rng.random((groups, n), np.float32) * 0.01 + 0.002).astype("<f2")
    if method == "gptq":
        words = _words(rng, k // 8, n)
        zeros = np.full((groups, n // 8), 0x77777777, "<i4")
        index = (np.arange(k) // GROUP).astype("<i4")
        return [*_planes(name, words, zeros, scales), (f"{name}.g_idx", "I32", index)]
    words = _words(rng, k, n // 8)
    zeros = _words(rng, groups, n // 8)
    return _planes(name, words, zeros, scales)


def _words(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.frombuffer(rng.bytes(4 * rows * columns), "<i4").reshape(rows, columns)


def _planes(name: str, words: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    return [(f"{name}.qweight", "I32", words), (f"{name}.qzeros", "I32", zeros), (f"{name}.scales", "F16", scales)]


def make(directory: Path, method: str, layers: int = LAYERS) -> Path:
    """Write the checkpoint (about 105 MB a layer) unless it is there; returns its directory."""
    return _make(directory / f"synthetic-{method}-{layers}", method, layers, HIDDEN, FEED)


def make_wide(directory: Path, method: str, rows: int, columns: int, act_order: bool = False) -> Path:
    """One layer whose ``gate_proj`` and ``up_proj`` are ``rows`` x ``columns``.

    With ``act_order`` (GPTQ) ``down_proj`` has a shuffled g_idx, so that every row of the two moves.
    """
    name = f"synthetic-{method}-{rows}x{columns}{'-act' if act_order else ''}"
    return _make(directory / name, method, 1, columns, rows, act_order)


def _make(target: Path, method: str, layers: int, hidden: int, feed: int, act_order: bool = False) -> Path:
    if (target / "config.json").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    vocab = json.loads((FIXTURE / "config.json").read_text())["vocab_size"]
    tensors: list[tuple[str, str, np.ndarray]] = [
        ("model.embed_tokens.weight", "F16", rng.standard_normal((vocab, hidden)).astype("<f2")),
        ("lm_head.weight", "F16", rng.standard_normal((vocab, hidden)).astype("<f2")),
        ("model.norm.weight", "F16", np.ones(hidden, "<f2")),
    ]
    kv = hidden // HEADS * KV
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (feed, hidden), "mlp.up_proj": (feed, hidden),
              "mlp.down_proj": (hidden, feed)}  # fmt: skip
    for layer in range(layers):
        base = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors.append((f"{base}.{name}.weight", "F16", np.ones(hidden, "<f2")))
        for name, (n, k) in shapes.items():
            tensors += linear(rng, f"{base}.{name}", n, k, method)
        if act_order:
            index = tensors[-1][2]  # the g_idx of down_proj
            rng.shuffle(index)
    layout = layout_safetensors([(name, dtype, tuple(a.shape)) for name, dtype, a in tensors], {"format": "pt"})
    with open(target / "model.safetensors", "wb") as out:
        out.write(layout.header)
        for name, _, array in tensors:
            out.seek(layout.offsets[name])
            out.write(array.tobytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURE / name, target / name)
    quantization: dict[str, object] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}
    quantization |= {"desc_act": act_order, "checkpoint_format": "gptq"}
    if method == "awq":
        quantization = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": feed,
              "num_attention_heads": HEADS, "num_key_value_heads": KV, "num_hidden_layers": layers,
              "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "head_dim": hidden // HEADS,
              "max_position_embeddings": 2048, "tie_word_embeddings": False,
              "torch_dtype": "float16", "hidden_act": "silu", "quantization_config": quantization}  # fmt: skip
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return target
