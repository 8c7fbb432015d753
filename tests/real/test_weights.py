"""(a) Every tensor of our GGUF, dequantized by llama.cpp, against the checkpoint's codes and parameters in float64, rounded once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import Workshop, made, new_codes
from reference import Reference, permute_heads

from qformats.checkpoint import open_checkpoint

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd.weight", "model.norm": "output_norm.weight", "lm_head": "output.weight"}


def gguf_name(module: str) -> str:
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return TOP[module] if found is None else f"blk.{found[1]}.{NAMES[found[2]]}.weight"


def expected(reference: Reference, absorbed: set[str]) -> dict[str, np.ndarray[Any, Any]]:
    """GGUF name -> float64 weights as llama.cpp must see them: heads permuted, absorbed act-orders applied to both sides."""
    config = reference.config
    modules = sorted({name.rpartition(".")[0] for name in reference.tensors})
    weights = {module: reference.weight(module) for module in modules}
    for module in modules:
        if gguf_name(module) not in absorbed:
            continue
        assert module.endswith("mlp.down_proj"), f"{module}: the test knows no other absorbed module"
        order = np.argsort(reference.group_index(module, weights[module].shape[1], 0), kind="stable")
        weights[module] = weights[module][:, order]
        for producer in ("gate_proj", "up_proj"):
            name = module.replace("down_proj", producer)
            weights[name] = weights[name][order]
    for module, weight in weights.items():
        if module.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
            weights[module] = permute_heads(weight, heads)
    return {gguf_name(module): weight for module, weight in weights.items()}


def dequantized(llama: Any, path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """GGUF name -> float32 by llama.cpp's own ``to_float`` on the bytes that gguf-py finds (ours where it knows no Q2_0, 0.19)."""
    found = {}
    try:
        tensors = gguf.GGUFReader(path).tensors
    except ValueError:
        with open_checkpoint(path) as file:
            for name, raw in file.raw.items():
                octets = np.frombuffer(raw.read(), np.uint8).reshape(int(np.prod(raw.shape[:-1])), -1)
                found[name] = llama.dequantize_rows(octets, raw.dtype, raw.shape[-1]).reshape(raw.shape)
        return found
    for tensor in tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        rows = int(np.prod(shape[:-1]))
        octets = np.frombuffer(tensor.data.tobytes(), np.uint8).reshape(rows, -1)
        found[tensor.name] = llama.dequantize_rows(octets, tensor.tensor_type.name, shape[-1]).reshape(shape)
    return found


def assert_every_weight(llama: Any, figure: Any, source: Path, out: Path, report: Any) -> None:
    lines = {line.name: line for line in report.tensors}
    absorbed = {line.name for line in report.tensors if any("absorb act-order" in note for note in line.rewrites)}
    wanted, found = expected(Reference(source), absorbed), dequantized(llama, out)
    assert set(wanted) == set(found) == set(lines)
    requantized = sorted(name for name, line in lines.items() if line.kind == "requantized")
    compared = sorted(set(wanted) - set(requantized))
    different = [name for name in compared if not np.array_equal(found[name], wanted[name].astype(np.float32))]
    types = sorted({lines[name].type for name in compared})
    figure(f"{len(compared) - len(different)} of {len(wanted)} tensors equal in {', '.join(types)}; requantized {len(requantized)}")
    assert not different
    assert all(lines[name].lossless for name in compared)
    assert all(lines[name].reason for name in requantized)
    assert bool(requantized) == new_codes(source.name)
    if requantized:  # never in a layer whose producers could be reordered
        assert "-8-asym-" in source.name or not any("ffn_down" in name for name in requantized)
        for name in requantized:
            error = np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])
            assert error < 0.01, f"{name}: relative error {error}"


@pytest.mark.parametrize("source", made(without=""), indirect=True)
def test_llama_cpp_sees_the_checkpoints_weights(source: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    out, report = workshop.convert(source, "gguf", allow_requantize=new_codes(source.name))
    assert_every_weight(llama, figure, source, out, report)


@pytest.mark.parametrize("source", made(only="awq-gemm-g64-slice"), indirect=True)
def test_q4_1_keeps_the_codes_and_rounds_offsets(source: Path, workshop: Workshop, llama: Any, figure: Any) -> None:
    """A named type whose offset is float16: every weight within that rounding (relative 2^-11 of the offset), no tensor given new codes."""
    out, report = workshop.convert(source, "gguf:q4_1")
    lines = {line.name: line for line in report.tensors if line.type == "Q4_1"}
    kinds = {line.kind for line in lines.values()}
    assert kinds <= {"exact", "codes-exact"}
    wanted, found = expected(Reference(source), set()), dequantized(llama, out)
    worst = 0.0
    for name in (n for n in lines if n.startswith("blk.")):
        blocks = wanted[name].reshape(-1, 32)
        error = np.abs(found[name].reshape(-1, 32) - blocks).max(1)
        step = np.abs(blocks).max(1) * 2  # an offset is at most the whole range away from zero: scale * 15
        worst = max(worst, float((error / (step * 2.0**-11 + 2.0**-24)).max()))
    figure(f"{len(lines)} tensors, error at most {worst:.2f} of the bound")
    assert worst <= 15 / 8
