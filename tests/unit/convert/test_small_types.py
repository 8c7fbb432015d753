"""A float checkpoint into every type of four-bit tables, one and two bits, and back; codes of other formats become new codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builder import Llama
from checkpoints import converted, ready

import qformats
from converters.verify import verify
from qformats.containers.gguf import open_gguf
from qformats.formats import ggml
from qformats.formats.protocol import Target
from qformats.quantize import rtn
from qformats.reencode import fit
from qformats.rewrite import Refused
from qformats.scheme import Integer, Tile
from qformats.tensor import Param, QuantizedTensor, constant

TYPES = ["iq4_nl", "iq4_xs", "mxfp4", "nvfp4", "q1_0", "q2_0", "tq1_0", "tq2_0"]
NAME, SOURCE = "blk.0.ffn_gate.weight", "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("floats")
    hf = Llama(hidden=256, inner=256, heads=8, kv=4, head_dim=32).write(work / "codes")
    converted(hf, work / "hf", "hf:f32", allow_requantize=True)
    return work / "hf"


@pytest.mark.parametrize("kind", TYPES)
def test_floats_become_blocks_that_read_back(floats: Path, tmp_path: Path, kind: str) -> None:
    plan = converted(floats, tmp_path / "out.gguf", f"gguf:{kind}")
    assert {job.kind for job in plan.jobs if job.storage is not None} == {"requantized"}
    raw = open_gguf(tmp_path / "out.gguf").tensors[NAME]
    assert raw.dtype == kind.upper()
    with qformats.open(floats) as before, qformats.open(tmp_path / "out.gguf") as after:
        weights, found = before.read(SOURCE), after.read(NAME.removesuffix(".weight"))
        assert isinstance(weights, torch.Tensor)
        expected = rtn(weights, ggml.BLOCK_TYPES[kind.upper()].storage)
    assert isinstance(found, QuantizedTensor) and torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantize(), expected.dequantize())
    assert verify(floats, tmp_path / "out.gguf", replay=True).ok


@pytest.mark.parametrize("kind", ["iq4_nl", "mxfp4", "nvfp4"])
def test_gptq_codes_become_new_codes(tmp_path: Path, kind: str) -> None:
    plan = converted(ready("gptq/4b-g32-sym", tmp_path), tmp_path / "out.gguf", f"gguf:{kind}")
    made = [job for job in plan.jobs if job.storage is not None and job.storage.type == kind]
    assert made and {job.kind for job in made} == {"requantized"}
    assert any("do not stand for the values" in job.reason for job in made)


@pytest.mark.parametrize("kind", ["iq4_nl", "iq4_xs", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_codes_that_seem_to_fit_are_refused(kind: str, bits: int, zero: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(1).integers(0, 1 << bits, (2, 256), dtype=np.uint8))
    tensor = QuantizedTensor((2, 256), codes, Integer(bits), (Param(torch.ones(2, 1).half(), Tile((1, 256))),), constant(zero, (2, 256)))
    (storage,) = ggml.storages(Target("gguf", kind, {}), tensor.scheme)
    for rounding in (False, True):
        with pytest.raises(Refused, match="do not stand for the values"):
            fit(tensor, storage, rounding=rounding)


@pytest.mark.parametrize("kind", ["q2_0", "tq2_0"])
def test_two_bit_codes_around_one_are_kept(kind: str) -> None:
    codes = torch.from_numpy(np.random.default_rng(2).integers(0, 4 if kind == "q2_0" else 3, (2, 256), dtype=np.uint8))
    tensor = QuantizedTensor((2, 256), codes, Integer(2), (Param(torch.ones(2, 1).half(), Tile((1, 256))),), constant(1, (2, 256)))
    (storage,) = ggml.storages(Target("gguf", kind, {}), tensor.scheme)
    assert fit(tensor, storage).kind == "exact"
