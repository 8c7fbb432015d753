"""Checkpoints that bitsandbytes, HQQ, Quanto, torchao and compressed-tensors made themselves: into GGUF and into another format.

The floats beside each checkpoint (``make_owner_checkpoints.py``) are the owner's own values of every quantized weight; what is exact has
those numbers before the owner's last rounding, what has new codes is judged by the type's own rounding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workshop
from lab import floats_of
from owners import forward, owners_model, owners_weight
from reference import permute_heads
from running import ids_of
from safetensors.torch import load_file
from test_weights import dequantized, gguf_name
from text import evaluation_text

from converters.verify import verify
from qformats.checkpoint import open_checkpoint

TOKENS, WINDOW = 1025, 256
NEAR = {"gguf:q8_0": 0.01, "gguf:q6_k": 0.03}  # the most that new codes of a type are off, relative to the norm of a tensor
STORED = 2.0**-7  # codes kept: a scale rounded to float16 or bfloat16, an offset of up to fifteen steps to float16
OWNERS = {"bnb": "bitsandbytes", "hqq": "hqq", "quanto": "quanto", "torchao": "torchao", "ct": "compressed-tensors"}


@dataclass(frozen=True)
class Case:
    """A checkpoint, a target, and the worst kind that a linear weight may become."""

    name: str
    to: str
    kind: str

    def param(self) -> Any:
        return pytest.param(self, marks=pytest.mark.real_full, id=f"{self.name} {self.to}")


INTO_GGUF = (
    Case("bnb-nf4-slice", "gguf:q8_0", "requantized"), Case("bnb-nf4-double-slice", "gguf:q8_0", "requantized"),
    Case("bnb-fp4-slice", "gguf:q8_0", "requantized"), Case("bnb-nf4-wide", "gguf:q6_k", "requantized"),
    Case("bnb-int8-slice", "gguf", "codes-exact"), Case("bnb-nf4-double-whole", "gguf:q8_0", "requantized"),
    Case("hqq-4-g64-ax1-slice", "gguf", "codes-exact"), Case("hqq-3-g64-ax1-slice", "gguf", "codes-exact"),
    Case("hqq-4-g64-ax0-slice", "gguf:q8_0", "requantized"), Case("hqq-qmodel-4-g64-ax1-slice", "gguf", "codes-exact"),
    Case("hqq-4-g64-ax1-whole", "gguf", "codes-exact"), Case("hqq-4-g64-ax1-wide", "gguf:q6_k", "requantized"),
    Case("quanto-qint8-slice", "gguf", "codes-exact"), Case("quanto-qint4-slice", "gguf", "codes-exact"),
    Case("quanto-qfloat8-slice", "gguf:q8_0", "requantized"), Case("quanto-qint4-whole", "gguf", "codes-exact"),
    Case("torchao-int8-slice", "gguf", "codes-exact"), Case("torchao-int4-g32-slice", "gguf", "codes-exact"),
    Case("torchao-int4-g64-asym-slice", "gguf", "codes-exact"), Case("torchao-fp8-slice", "gguf:q8_0", "requantized"),
    Case("torchao-int4-g32-whole", "gguf", "codes-exact"), Case("torchao-fp8-wide", "gguf:q6_k", "requantized"),
    Case("ct-nvfp4-slice", "gguf", "codes-exact"), Case("ct-mxfp4-slice", "gguf", "exact"),
    Case("ct-fp8-block-slice", "gguf:q8_0", "requantized"), Case("ct-w8a8-slice", "gguf", "codes-exact"),
    Case("ct-nvfp4-whole", "gguf", "codes-exact"),
)  # fmt: skip
INTO_ANOTHER = (
    Case("bnb-nf4-slice", "fp8:fp8,block=64x64", "requantized"), Case("bnb-nf4-double-slice", "torchao:int8", "requantized"),
    Case("bnb-fp4-slice", "compressed-tensors:int8", "requantized"), Case("bnb-int8-slice", "torchao", "codes-exact"),
    Case("hqq-4-g64-ax1-slice", "torchao", "codes-exact"), Case("hqq-3-g64-ax1-slice", "torchao", "codes-exact"),
    Case("hqq-4-g64-ax0-slice", "bitsandbytes:nf4", "requantized"), Case("hqq-qmodel-4-g64-ax1-slice", "torchao", "codes-exact"),
    Case("quanto-qint8-slice", "compressed-tensors", "exact"), Case("quanto-qint4-slice", "hqq", "codes-exact"),
    Case("quanto-qfloat8-slice", "torchao", "exact"), Case("torchao-int8-slice", "compressed-tensors", "exact"),
    Case("torchao-int4-g32-slice", "compressed-tensors", "exact"), Case("torchao-fp8-slice", "quanto", "exact"),
    Case("torchao-fp8-slice", "compressed-tensors", "exact"), Case("torchao-int8-slice", "bitsandbytes", "codes-exact"),
    Case("ct-fp8-block-slice", "fp8", "exact"), Case("ct-w8a8-slice", "bitsandbytes", "codes-exact"),
    Case("ct-w8a8-slice", "torchao", "exact"), Case("ct-nvfp4-slice", "torchao", "codes-exact"),
    Case("ct-mxfp4-slice", "torchao", "exact"), Case("torchao-int8-whole", "compressed-tensors", "exact"),
)  # fmt: skip
LOSSES = ("copied", "exact", "dequantized", "codes-exact", "requantized")


def options(case: Case) -> dict[str, bool]:
    return {"allow_requantize": case.kind == "requantized", "allow_pickle": "-qmodel-" in case.name}


def owner_of(name: str) -> str:
    return OWNERS[name.partition("-")[0]]


def owners_dtype(name: str) -> torch.dtype:
    """What the checkpoint's owner dequantizes to."""
    return torch.float32 if name.startswith("bnb-int8") else torch.float16 if name.startswith("hqq") else torch.bfloat16


def read_exactly(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Every quantized weight in float32, each seen to be the owner's own value in the owner's order of rounding."""
    oracle, mine = load_file(floats_of(folder) / "model.safetensors"), {}
    with open_checkpoint(folder, allow_pickle="-qmodel-" in name) as checkpoint:
        for module in filter(checkpoint.is_quantized, checkpoint.modules):
            tensor: Any = checkpoint.read(module)
            values = oracle[f"{module}.weight"]
            assert torch.equal(tensor.dequantize(owners_dtype(name), like=owner_of(name)).float(), values), module
            mine[module] = tensor.dequantize()
            assert float((mine[module] - values).norm() / values.norm()) < STORED, module
    assert len(mine) == len([k for k in oracle if k.endswith("_proj.weight")])
    return mine


def assert_near(found: torch.Tensor, wanted: torch.Tensor, case: Case, kind: str, module: str) -> float:
    """Relative error of one tensor, bounded by what became of it."""
    if kind in ("copied", "exact", "dequantized"):
        assert torch.equal(found, wanted), f"{module}: {kind}"
        return 0.0
    error = float((found - wanted).norm() / wanted.norm())
    assert error <= (STORED if kind == "codes-exact" else NEAR.get(case.to, 0.12)), f"{module}: {kind}, relative error {error}"
    return error


@pytest.mark.parametrize("case", [case.param() for case in INTO_GGUF])
def test_into_gguf(case: Case, checkpoint: Any, workshop: Workshop, llama: Any, figure: Any) -> None:
    """Every weight as llama.cpp reads it, and its NLL beside that of the owner's floats."""
    source = checkpoint(case.name)
    mine = read_exactly(source, case.name)
    file, report = workshop.convert(source, case.to, **options(case))
    lines, found, worst = {line.name: line for line in report.tensors}, dequantized(llama, file), 0.0
    config = json.loads((source / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for module, values in mine.items():
        name = gguf_name(module)
        leaf = module.rpartition(".")[2][0] if module.endswith(("q_proj", "k_proj")) else ""
        wanted = torch.from_numpy(np.ascontiguousarray(permute_heads(values.numpy(), heads[leaf]))) if leaf else values
        assert LOSSES.index(lines[name].kind) <= LOSSES.index(case.kind), lines[name]
        factor = found.get(f"{name.removesuffix('.weight')}.scale")  # llama.cpp multiplies the product by it
        read = torch.from_numpy(found[name] if factor is None else found[name] * factor.reshape(-1)[0])
        worst = max(worst, assert_near(read, wanted, case, lines[name].kind, module))
    assert verify(source, file, allow_pickle="-qmodel-" in case.name).ok
    plain, _ = workshop.convert(floats_of(source), "gguf:f32")
    ids, nll = ids_of(plain, evaluation_text(), TOKENS), []
    for gguf in (file, plain):
        with llama.Llama(gguf) as model:
            nll.append(model.nll(ids, WINDOW))
    figure(f"{dict(report.kinds)}, error at most {worst:.2g}: NLL {nll[0]:.4f}, the owner's floats {nll[1]:.4f}")
    assert abs(nll[0] - nll[1]) <= (0.015 * nll[1] if case.kind == "requantized" else 0.015)


def stored_dtype(folder: Path, module: str) -> torch.dtype:
    """What the scales are stored in, for a model that computes in it: other parameters would be rounded as they are loaded."""
    with open_checkpoint(folder) as checkpoint:
        scales = checkpoint.scheme(module).scales
    return torch.float16 if scales and scales[0].dtype == "float16" else torch.bfloat16


@pytest.mark.parametrize("case", [case.param() for case in INTO_ANOTHER])
def test_into_another(case: Case, checkpoint: Any, workshop: Workshop, figure: Any) -> None:
    """The weights of the other format are the source's; its owner loads them to our values and computes with them."""
    source = checkpoint(case.name)
    mine = read_exactly(source, case.name)
    folder, report = workshop.convert(source, case.to, **options(case))
    assert verify(source, folder, allow_pickle="-qmodel-" in case.name).ok
    kinds, worst = {line.name.removesuffix(".weight"): line.kind for line in report.tensors}, 0.0
    owner = case.to.partition(":")[0]
    model = owners_model(folder, owner, stored_dtype(folder, next(iter(mine))))
    if owner == "compressed-tensors":
        forward(model)  # it unpacks in the first pass; bitsandbytes moves its scales away there
    with open_checkpoint(folder) as made:
        for module, values in mine.items():
            assert LOSSES.index(kinds[module]) <= LOSSES.index(case.kind), (module, kinds[module])
            tensor: Any = made.read(module)
            worst = max(worst, assert_near(tensor.dequantize(), values, case, kinds[module], module))
            theirs = owners_weight(model, module)
            like = "transformers" if owner == "fp8" else owner
            assert torch.equal(theirs, tensor.dequantize(theirs.dtype, like=like)), module
    logits, plain = forward(model), forward(owners_model(floats_of(source), "hf", torch.float32))
    apart = float((logits - plain).norm() / plain.norm())
    figure(f"{dict(report.kinds)}, error at most {worst:.2g}; logits {apart:.3f} apart")
    assert apart < (0.2 if case.kind == "requantized" or "w8a8" in case.name else 0.05)
