"""Checkpoints that their formats' owners made, or that were packed after the owners' sources: into GGUF, into another format, and back.

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

from converters import convert
from converters.verify import verify
from qformats.checkpoint import open_checkpoint
from qformats.errors import QFormatError

TOKENS, WINDOW = 513, 256
NEAR = {"gguf:q8_0": 0.01, "gguf:q6_k": 0.03}  # the most that new codes of a type are off, relative to the norm of a tensor
STORED = 2.0**-7  # codes kept: a scale rounded to float16 or bfloat16, an offset of up to fifteen steps to float16
# by the first word of a name: its format, the owner whose order of rounding is asked for, and what that owner dequantizes to
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
OWNERS: dict[str, tuple[str, str | None, torch.dtype]] = {
    "bnb": ("bitsandbytes", "bitsandbytes", BRAIN), "hqq": ("hqq", "hqq", HALF), "quanto": ("quanto", "quanto", BRAIN),
    "torchao": ("torchao", "torchao", BRAIN), "ct": ("compressed-tensors", "compressed-tensors", BRAIN), "aqlm": ("aqlm", "aqlm", HALF),
    "bitnet": ("bitnet", None, FULL), "mlx": ("mlx", "mlx", BRAIN), "metal": ("mlx", None, FULL), "eetq": ("eetq", None, FULL),
    "fbgemm": ("fbgemm_fp8", "transformers", FULL), "fp8": ("fp8", "transformers", FULL), "modelopt": ("modelopt", "modelopt", FULL),
}  # fmt: skip
OTHER_DTYPES = {"bnb-int8": FULL, "mlx-4b": HALF}


@dataclass(frozen=True)
class Case:
    """A checkpoint, a target, and the worst kind that a linear weight may become."""

    name: str
    to: str
    kind: str
    soon: bool = False  # in the short tier

    def param(self) -> Any:
        return pytest.param(self, marks=pytest.mark.real if self.soon else pytest.mark.real_full, id=f"{self.name} {self.to}")


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
    Case("torchao-int4-g32-whole", "gguf", "codes-exact"),
    Case("ct-nvfp4-slice", "gguf", "codes-exact"), Case("ct-mxfp4-slice", "gguf", "exact"),
    Case("ct-fp8-block-slice", "gguf:q8_0", "requantized"), Case("ct-w8a8-slice", "gguf", "codes-exact"),
    Case("ct-nvfp4-whole", "gguf", "codes-exact"), Case("ct-fp8-dynamic-slice", "gguf:q8_0", "requantized"),
    Case("aqlm-2x8-slice", "gguf:q8_0", "requantized", soon=True), Case("aqlm-1x10-o2-slice", "gguf:q6_k", "requantized"),
    Case("bitnet-bitlinear-wide", "gguf", "codes-exact"), Case("bitnet-autobitlinear-slice", "gguf", "codes-exact", soon=True),
    Case("mlx-4b-g64-slice", "gguf", "codes-exact", soon=True), Case("mlx-5b-g32-slice", "gguf", "codes-exact"),
    Case("mlx-mxfp4-slice", "gguf", "exact"), Case("mlx-nvfp4-slice", "gguf", "exact"),
    Case("mlx-mxfp8-slice", "gguf:q8_0", "requantized"), Case("metal-8b-g32-slice", "gguf:q8_0", "requantized"),
    Case("eetq-int8-slice", "gguf", "exact", soon=True), Case("fbgemm-fp8-slice", "gguf:q8_0", "requantized"),
    Case("fp8-b64-slice", "gguf:q8_0", "requantized"), Case("fp8-b128-wide", "gguf:q6_k", "requantized"),
    Case("fp8-mxfp8-slice", "gguf:q8_0", "requantized"), Case("modelopt-fp8-slice", "gguf:q8_0", "requantized"),
    Case("modelopt-nvfp4-slice", "gguf", "exact"),
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
    Case("torchao-int4-g64-asym-slice", "hqq", "codes-exact"), Case("ct-fp8-dynamic-slice", "torchao", "exact"),
    Case("aqlm-2x8-slice", "bitsandbytes:nf4", "requantized"), Case("aqlm-1x10-o2-slice", "compressed-tensors:int8", "requantized"),
    Case("bitnet-bitlinear-wide", "torchao", "codes-exact"), Case("bitnet-autobitlinear-slice", "quanto", "exact"),
    Case("mlx-4b-g64-slice", "hqq", "codes-exact"), Case("mlx-mxfp4-slice", "compressed-tensors", "exact"),
    Case("mlx-nvfp4-slice", "torchao", "exact"), Case("mlx-mxfp8-slice", "torchao", "exact"),
    Case("metal-8b-g32-slice", "hqq", "codes-exact"), Case("eetq-int8-slice", "torchao", "exact"),
    Case("eetq-int8-slice", "compressed-tensors", "exact"), Case("fbgemm-fp8-slice", "compressed-tensors", "exact"),
    Case("fp8-b64-slice", "compressed-tensors", "exact"), Case("fp8-b128-wide", "compressed-tensors", "exact"),
    Case("fp8-mxfp8-slice", "compressed-tensors", "exact"), Case("modelopt-fp8-slice", "compressed-tensors", "exact"),
    Case("modelopt-nvfp4-slice", "torchao", "exact"), Case("modelopt-nvfp4-slice", "compressed-tensors", "codes-exact"),
)  # fmt: skip
LOSSES = ("copied", "exact", "dequantized", "codes-exact", "requantized")


def options(case: Case) -> dict[str, bool]:
    return {"allow_requantize": case.kind == "requantized", "allow_pickle": "-qmodel-" in case.name}


def owners_dtype(name: str) -> torch.dtype:
    """What the checkpoint's owner dequantizes to."""
    return next((dtype for start, dtype in OTHER_DTYPES.items() if name.startswith(start)), OWNERS[name.partition("-")[0]][2])


def read_exactly(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Every quantized weight in float32, each seen to be the owner's own value in the owner's order of rounding."""
    oracle, mine, like = load_file(floats_of(folder) / "model.safetensors"), {}, OWNERS[name.partition("-")[0]][1]
    with open_checkpoint(folder, allow_pickle="-qmodel-" in name) as checkpoint:
        for module in filter(checkpoint.is_quantized, checkpoint.modules):
            tensor: Any = checkpoint.read(module)
            values = oracle[f"{module}.weight"]
            assert torch.equal(tensor.dequantize(owners_dtype(name), like=like).float(), values), module
            mine[module] = tensor.dequantize()
            assert float((mine[module] - values).norm() / values.norm()) < STORED, module
    assert mine.keys() - {"model.embed_tokens"} == {k.removesuffix(".weight") for k in oracle if k.endswith("_proj.weight")}
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
    # a ternary file's inputs in 8 bits are noise that these few tokens show (test_ternary_products.py): its weights are judged as floats
    judged = workshop.convert(file, "gguf:f32")[0] if case.name.startswith("bitnet") else file
    for gguf in (judged, plain):
        with llama.Llama(gguf) as model:
            nll.append(model.nll(ids, WINDOW))
    figure(f"{dict(report.kinds)}, error at most {worst:.2g}: NLL {nll[0]:.4f}, the owner's floats {nll[1]:.4f}")
    assert abs(nll[0] - nll[1]) <= (0.015 * nll[1] if case.kind == "requantized" else 0.015)


@pytest.mark.real_full
def test_rows_of_zeros_that_torchao_made_no_numbers_are_refused(checkpoint: Any, tmp_path: Path) -> None:
    """torchao divides a row of zeros by its scale of zero."""
    source = checkpoint("torchao-fp8-wide")
    with pytest.raises(QFormatError) as caught:
        convert(source, tmp_path / "out.gguf", to="gguf:q6_k", allow_requantize=True, workers=1)
    assert caught.value.code == "not-finite" and not list(tmp_path.iterdir())


def is_embedding_of_floats(module: str, kinds: dict[str, str]) -> bool:
    """An embedding whose codes the loaders of the other format do not take."""
    return module == "model.embed_tokens" and kinds[module] == "dequantized"


def stored_dtype(folder: Path, module: str) -> torch.dtype:
    """What the scales are stored in, for a model that computes in it: other parameters would be rounded as they are loaded."""
    with open_checkpoint(folder) as checkpoint:
        scales, form = checkpoint.scheme(module).scales, checkpoint.format
    known = {"float16": HALF} | ({"float32": FULL} if form == "compressed-tensors" else {})
    return known.get(scales[0].dtype, BRAIN) if scales else BRAIN


@pytest.mark.parametrize("case", [case.param() for case in INTO_ANOTHER])
def test_into_another(case: Case, checkpoint: Any, workshop: Workshop, figure: Any) -> None:
    """The weights of the other format are the source's; its owner loads them to our values and computes with them."""
    source = checkpoint(case.name)
    mine = read_exactly(source, case.name)
    folder, report = workshop.convert(source, case.to, **options(case))
    assert verify(source, folder, allow_pickle="-qmodel-" in case.name).ok
    kinds, worst = {line.name.removesuffix(".weight"): line.kind for line in report.tensors}, 0.0
    owner = case.to.partition(":")[0]
    with open_checkpoint(folder) as made:
        for module, values in mine.items():
            assert LOSSES.index(kinds[module]) <= LOSSES.index(case.kind) or is_embedding_of_floats(module, kinds), (module, kinds[module])
            tensor: Any = made.read(module)
            found = tensor.dequantize() if made.is_quantized(module) else tensor.float()
            worst = max(worst, assert_near(found, values, case, kinds[module], module))
        model = owners_model(folder, owner, stored_dtype(folder, next(filter(made.is_quantized, mine))))
        if owner == "compressed-tensors":
            forward(model)  # it unpacks in the first pass; bitsandbytes moves its scales away there
        for module in filter(made.is_quantized, mine):
            tensor, theirs = made.read(module), owners_weight(model, module)
            like = "transformers" if owner == "fp8" else owner
            assert torch.equal(theirs, tensor.dequantize(theirs.dtype, like=like)), module
    logits, plain = forward(model), forward(owners_model(floats_of(source), "hf", torch.float32))
    apart = float((logits - plain).norm() / plain.norm())
    figure(f"{dict(report.kinds)}, error at most {worst:.2g}; logits {apart:.3f} apart")
    rounds_inputs = "w8a8" in case.name or (case.name.startswith("modelopt") and owner == "compressed-tensors")
    assert apart < (0.2 if case.kind == "requantized" or rounds_inputs else 0.05)


# Formats that hold the codes of the first: the bytes must come back through them. No other format holds those of NF4, FP4, AQLM and of
# HQQ's axis 0.
BACK = (
    ("bnb-int8-slice", "gguf"), ("hqq-4-g64-ax1-slice", "gguf"), ("hqq-3-g64-ax1-slice", "gguf"),
    ("quanto-qint8-slice", "gguf"), ("quanto-qint4-slice", "gguf"), ("quanto-qfloat8-slice", "torchao"), ("torchao-int8-slice", "gguf"),
    ("torchao-int4-g32-slice", "gguf"), ("torchao-int4-g64-asym-slice", "gguf"), ("torchao-fp8-slice", "compressed-tensors"),
    ("ct-nvfp4-slice", "gguf"), ("ct-mxfp4-slice", "gguf"), ("ct-w8a8-slice", "gguf"), ("ct-fp8-block-slice", "fp8"),
    ("ct-fp8-dynamic-slice", "torchao"), ("bitnet-bitlinear-wide", "gguf"), ("bitnet-autobitlinear-slice", "gguf"),
    ("mlx-4b-g64-slice", "gguf"), ("mlx-5b-g32-slice", "gguf"), ("mlx-mxfp4-slice", "gguf"), ("mlx-nvfp4-slice", "gguf"),
    ("metal-8b-g32-slice", "hqq"), ("eetq-int8-slice", "gguf"), ("fbgemm-fp8-slice", "compressed-tensors"),
    ("fp8-b64-slice", "compressed-tensors"), ("fp8-b128-wide", "compressed-tensors"), ("fp8-mxfp8-slice", "torchao"),
    ("modelopt-fp8-slice", "torchao"), ("modelopt-nvfp4-slice", "gguf"),
)  # fmt: skip
SOON = ("mlx-4b-g64-slice", "eetq-int8-slice")  # of the short tier


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> (dtype, shape, bytes) of every tensor."""
    with open_checkpoint(folder) as checkpoint:
        return {name: (raw.dtype, raw.shape, bytes(raw.read())) for name, raw in checkpoint.raw.items()}


@pytest.mark.parametrize(
    ("name", "to"),
    [pytest.param(*pair, marks=pytest.mark.real if pair[0] in SOON else pytest.mark.real_full, id=" ".join(pair)) for pair in BACK],
)
def test_there_and_back(name: str, to: str, checkpoint: Any, workshop: Workshop, figure: Any) -> None:
    """Every tensor has its bytes again, and every configuration file its words."""
    source = checkpoint(name)
    middle, report = workshop.convert(source, to)
    back, _ = workshop.convert(middle, OWNERS[name.partition("-")[0]][0])
    theirs, mine = stored(source), stored(back)
    assert theirs.keys() == mine.keys()
    assert [key for key in theirs if theirs[key] != mine[key]] == []
    for file in ("config.json", "hf_quant_config.json", "quanto_qmap.json", "quantization_map.json"):
        if (source / file).exists():
            assert json.loads((back / file).read_text()) == json.loads((source / file).read_text()), file
    assert verify(middle, back, replay=True).ok
    figure(f"{dict(report.kinds)}; {len(theirs)} tensors have their bytes again")
