"""Checkpoints with structures beyond the plain one: the same logits on packed weights before and after, and the same bytes on the way back.

Each fixture is its owner's: GPTQModel's ``dynamic`` rules, layers left dense, act-order with and without neighbours that share its inputs,
AutoRound's bits by name, compressed-tensors' ``weight_g_idx`` and mixed groups, AQLM codes of two outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "convert"))

from checkpoints import ready

from converters import convert
from qformats import load_model
from qformats.checkpoint import open_checkpoint

pytestmark = pytest.mark.real
EXACT, STORED, NEW = 2e-5, 2e-2, 0.2  # of the norm of the logits: sums in another order, a parameter rounded, new codes
CASES = (
    ("gptq/4b-g32-act", "gguf"), ("gptq/4b-g32-act", "compressed-tensors"), ("gptq/4b-g64-asym-act-v2", "gguf"),
    ("gptq/4b-g64-asym-act-v2", "gguf:q8_0"), ("gptq/dynamic-mixed", "gguf"), ("gptq/dynamic-mixed", "compressed-tensors"),
    ("gptq/planar-mixed", "gguf"), ("gptq/lm-head", "gguf"), ("awq/gemm-skip", "gguf"), ("awq/gemm-skip", "gptq"),
    ("autoround/extra-config", "gguf"), ("autoround/gptq-dynamic", "gguf"), ("compressed-tensors/actorder", "gptq"),
    ("compressed-tensors/mixed", "torchao"), ("aqlm/1x10-o2", "gguf:q8_0"),
)  # fmt: skip


def logits(path: Path) -> torch.Tensor:
    model = load_model(path, dtype=torch.float32, activations="float").eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 35)[None]).logits[0].float()
    return found


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with open_checkpoint(folder) as checkpoint:
        return {name: (raw.dtype, raw.shape, bytes(raw.read())) for name, raw in checkpoint.raw.items()}


@pytest.mark.parametrize(("path", "to"), [pytest.param(*case, id=" ".join(case)) for case in CASES])
def test_the_same_model_there_and_back(path: str, to: str, tmp_path: Path, figure: Any) -> None:
    source, out = ready(path, tmp_path), tmp_path / ("out.gguf" if to.startswith("gguf") else "out")
    report = convert(source, out, to=to, allow_requantize=True)
    kinds = dict(report.kinds)
    allowed = NEW if "requantized" in kinds else STORED if {"codes-exact", "dequantized"} & kinds.keys() else EXACT
    before, after = logits(source), logits(out)
    apart = float((after[:, : before.shape[1]] - before).norm() / before.norm())
    figure(f"{kinds}: logits {apart:.1e} apart")
    assert apart <= allowed
    if "requantized" not in kinds:
        with open_checkpoint(source) as checkpoint:
            form = checkpoint.format
        convert(out, tmp_path / "back", to=form)
        assert stored(tmp_path / "back") == stored(source)
