"""Everything on a real GPU: exact weights, products, the same bits on every run, graphs, gradients, whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import SAMPLE
from checkpoints import ready
from gpu_weights import CLASSES
from kinds import KINDS, sorted_order, stacked

from qformats.kernels import gpu, reference
from qformats.kernels.dispatch import matmul
from qformats.kernels.lower import Lowered, lower
from qformats.tensor import QuantizedTensor

pytest.importorskip("triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (1, 2, 4, 5, 17, 64, 130, 1100)


def on_device(t: QuantizedTensor) -> Lowered:
    lowered = lower(t)
    return Lowered(lowered.layout, {name: plane.cuda() for name, plane in lowered.planes.items()})


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool(((found == wanted) | ((found != found) & (wanted != wanted))).all())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_the_exact_values_rounded_once(name: str, dtype: torch.dtype) -> None:
    t = KINDS[name]()
    lowered = on_device(t)
    ids = torch.arange(lowered.layout.rows, device="cuda")
    found = gpu.embed(ids, lowered, dtype)
    assert found is not None and same(found.cpu(), t.dequantize(dtype).reshape(len(ids), -1))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_weights_are_the_exact_values_rounded_once(name: str, dtype: torch.dtype) -> None:
    t = CLASSES[name](384, 1024, "cpu")
    found = gpu.embed(torch.arange(384, device="cuda"), on_device(t), dtype)
    assert found is not None and same(found.cpu(), t.dequantize(dtype))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_weights(name: str, count: int, dtype: torch.dtype) -> None:
    t = CLASSES[name](384, 1024, "cpu")
    lowered = on_device(t)
    x = torch.randn(count, 1024, device="cuda").to(dtype)
    found = gpu.matmul(x, lowered, 3, 381, "exact")
    again = gpu.matmul(x, lowered, 3, 381, "exact")
    assert found is not None and again is not None and torch.equal(found, again)
    w = t.dequantize(torch.float32 if count <= gpu.VECTOR else dtype).double().cuda()[3:381]
    wanted, size = x.double() @ w.t(), x.double().abs() @ w.abs().t()
    assert bool(((found.double() - wanted).abs() <= 4e-6 * size + wanted.abs() * torch.finfo(dtype).eps).all())


@pytest.mark.parametrize("count", [1, 16, 300])
def test_a_product_is_captured_in_a_graph(count: int) -> None:
    lowered = on_device(CLASSES["q4_k"](512, 1024, "cpu"))
    x = torch.randn(count, 1024, device="cuda", dtype=torch.bfloat16)
    wanted = gpu.matmul(x, lowered, 0, 512, "exact")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gpu.matmul(x, lowered, 0, 512, "exact")
    assert wanted is not None and found is not None
    found.zero_()
    graph.replay()
    assert torch.equal(found, wanted)


def test_experts_take_their_own_rows() -> None:
    t = stacked()
    lowered, w = on_device(t), t.dequantize(torch.float32).cuda()
    for counts in ((4, 0, 19), (0, 0, 1), (117, 16, 2)):
        offsets = torch.tensor([0, *counts], device="cuda").cumsum(0)
        x = torch.randn(sum(counts), 64, device="cuda")
        found = gpu.experts(x, lowered, offsets, 20)
        ends = offsets.tolist()
        wanted = torch.cat([x[ends[e] : ends[e + 1]] @ w[e].t() for e in range(3)])
        assert found is not None and torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_input() -> None:
    lowered = on_device(sorted_order())
    grad = torch.randn(7, 6, device="cuda")
    found = gpu.matmul_back(grad, lowered, 0, 6)
    assert found is not None and torch.allclose(found, reference.matmul_back(grad, lowered, 0, 6), rtol=1e-4, atol=1e-4)


def test_the_operator_takes_the_kernels_and_compiles_whole() -> None:
    lowered = on_device(CLASSES["int4 g128"](256, 512, "cpu"))
    planes = list(lowered.planes.values())

    def product(x: torch.Tensor) -> torch.Tensor:
        return matmul(x, planes, lowered.layout.text, 0, 256, "exact") + 1

    x = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(torch.compile(product, fullgraph=True)(x), product(x))


@pytest.mark.parametrize("case", SAMPLE)
def test_models_say_the_same_as_on_the_cpu(case: str, tmp_path: Path) -> None:
    import qformats

    path = ready(case, tmp_path)
    ids = torch.arange(12).reshape(1, -1) % 30
    there = qformats.load_model(path, dtype=torch.float32)
    if getattr(there.config, "is_encoder_decoder", False):
        pytest.skip("an encoder and decoder take more than ids")
    wanted = there(input_ids=ids).logits
    here = qformats.load_model(path, dtype=torch.float32, device="cuda")(input_ids=ids.cuda()).logits.cpu()
    assert torch.allclose(here, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
