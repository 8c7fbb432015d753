"""What a target's owner asks of a whole checkpoint: one type, one group size, embeddings in floats; and names that its owner changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import FIXTURES, converted, header, load, ready, store
from families import family

from converters.inspect import inspect_path
from converters.verify import verify
from qformats.checkpoint import open_checkpoint
from qformats.tensor import QuantizedTensor

MIXED = "compressed-tensors/mixed"


def test_new_codes_are_of_the_type_that_was_kept(tmp_path: Path) -> None:
    """Some matrices are integers by rows and stay so in int8: bitsandbytes has no table of four bits beside them."""
    source = ready("torchao/intx-mixed", tmp_path)
    plan = converted(source, tmp_path / "out", "bitsandbytes", allow_requantize=True)
    coded = {job.map.target: job for job in plan.jobs if job.storage is not None}
    assert {job.type for job in coded.values()} == {"int8"}
    kinds = {job.kind for job in coded.values()}
    assert "requantized" in kinds and len(kinds) > 1
    assert verify(source, tmp_path / "out").ok


def test_new_codes_have_the_group_that_was_kept(tmp_path: Path) -> None:
    """AWQ states its group size once: 32, which one matrix has; one of 32 columns has a group a row."""
    source = ready(MIXED, tmp_path)
    plan = converted(source, tmp_path / "out", "awq", allow_requantize=True)
    assert {job.storage.group for job in plan.jobs if job.storage is not None} <= {32, None}
    assert any(job.kind == "exact" for job in plan.jobs if job.storage is not None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == 32
    assert verify(source, tmp_path / "out").ok


@pytest.mark.parametrize("target", ["gptq", "quanto", "bitsandbytes", "hqq", "fp8"])
def test_embeddings_are_floats_where_the_owner_has_no_codes_for_them(target: str, tmp_path: Path) -> None:
    source = ready("mlx/4b-g64", tmp_path)
    plan = converted(source, tmp_path / "out", target, allow_requantize=True)
    jobs = {job.name: job for job in plan.jobs}
    assert jobs["model.embed_tokens.weight"].kind == "dequantized"
    with open_checkpoint(source) as before, open_checkpoint(tmp_path / "out") as after:
        wanted, found = before.read("model.embed_tokens"), after.read("model.embed_tokens")
        assert isinstance(wanted, QuantizedTensor) and isinstance(found, torch.Tensor)
        assert torch.equal(found, wanted.dequantize(found.dtype))


@pytest.mark.parametrize(("target", "codes"), [("torchao:int4", True), ("compressed-tensors:int4", False)])
def test_embeddings_stay_codes_where_transformers_reads_them(target: str, codes: bool, tmp_path: Path) -> None:
    source = ready("mlx/4b-g64", tmp_path)
    converted(source, tmp_path / "out", target, allow_requantize=True)
    with open_checkpoint(tmp_path / "out") as after:
        assert after.is_quantized("model.embed_tokens") is codes


def test_torchao_tensors_saved_under_older_names(tmp_path: Path) -> None:
    """transformers 5.23 saves Mixtral's experts as ``block_sparse_moe`` and their metadata as ``mlp``, its own name for the module."""
    source = ready("torchao/fp8", tmp_path)
    metadata = header(source / "model.safetensors")["__metadata__"]
    tensors = {name.replace(".mlp.", ".block_sparse_moe."): entry for name, entry in load(source / "model.safetensors").items()}
    store(source / "model.safetensors", tensors, metadata)
    with open_checkpoint(FIXTURES / "torchao" / "fp8") as before, open_checkpoint(source) as after:
        for module in filter(after.is_quantized, after.modules):
            wanted, found = before.read(module.replace(".block_sparse_moe.", ".mlp.")), after.read(module)
            assert isinstance(wanted, QuantizedTensor) and isinstance(found, QuantizedTensor)
            assert torch.equal(wanted.dequantize(), found.dequantize()), module


@pytest.mark.parametrize("path", ["mlx/4b-g64", MIXED, "torchao/fp8"])
def test_inspect_counts_the_codes_of_a_weight(path: str) -> None:
    """Every stored byte belongs to one tensor, and codes count with their scales."""
    found = inspect_path(FIXTURES / path)
    assert not any(tensor.type in ("U32", "I8", "U8") for tensor in found.tensors)
    assert all(tensor.bits_per_weight > 1.5 for tensor in found.tensors if tensor.type.startswith("int"))


def test_blocks_of_other_sizes_become_one_group(tmp_path: Path) -> None:
    """Runs of 64 weights do not divide rows of 96: all new codes of AWQ get the one group that does."""
    source = family("phi3", tmp_path / "floats", num_hidden_layers=1)
    converted(source, tmp_path / "fp4", "bitsandbytes:fp4")
    plan = converted(tmp_path / "fp4", tmp_path / "awq", "awq", allow_requantize=True)
    assert {job.storage.group for job in plan.jobs if job.storage is not None} == {32}
    assert json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]["group_size"] == 32
    assert verify(tmp_path / "fp4", tmp_path / "awq", replay=True).ok


@pytest.mark.parametrize(("target", "kind"), [("compressed-tensors:fp8", "fp8"), ("hqq:int8", "int8"), ("hqq:int4", "F32")])
def test_a_router_in_codes_gets_the_named_type(target: str, kind: str, tmp_path: Path) -> None:
    """Not the format's own default; floats where the type has no groups for a weight of one row."""
    source = family("qwen2_moe", tmp_path / "floats", num_hidden_layers=1)
    gate = "model.layers.0.mlp.shared_expert_gate.weight"
    converted(source, tmp_path / "nf4", "bitsandbytes:nf4", tensor_types=((gate, "nf4"),))
    plan = converted(tmp_path / "nf4", tmp_path / "made", target, allow_requantize=True)
    assert {job.name: job.type for job in plan.jobs}[gate] == kind
    assert verify(tmp_path / "nf4", tmp_path / "made", replay=True).ok
