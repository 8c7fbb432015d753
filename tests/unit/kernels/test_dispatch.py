"""The operators against products with the dequantized weight; fake, autograd and compile by torch's own checks."""

from __future__ import annotations

import pytest
import torch
from test_gallery import GALLERY

from qformats.kernels.dispatch import embed, matmul, multiply
from qformats.kernels.lower import Lowered, lower

torch.set_num_threads(1)
TWO = [name for name, build in GALLERY.items() if len(build().shape) == 2 and bool(build().dequantize().isfinite().all())]


def weights(name: str) -> tuple[Lowered, torch.Tensor]:
    t = GALLERY[name]()
    return lower(t), t.dequantize(torch.float32)


def call(x: torch.Tensor, lowered: Lowered, start: int, stop: int) -> torch.Tensor:
    made: torch.Tensor = matmul(x, list(lowered.planes.values()), lowered.layout.text, start, stop, "exact")
    return made


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("batch", [(1,), (2, 3)])
def test_a_product_is_that_of_the_weights(name: str, batch: tuple[int, ...]) -> None:
    lowered, w = weights(name)
    x = torch.randn(*batch, w.shape[1], generator=torch.Generator().manual_seed(1))
    stop = len(w)
    start = stop // 2 if stop % 2 == 0 else 0
    found = call(x, lowered, start, stop)
    wanted = x.double() @ w[start:stop].double().t()
    assert found.shape == (*batch, stop - start) and found.dtype == x.dtype
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert torch.equal(found, multiply(x, lowered, start, stop, "exact"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once_to_the_inputs_dtype(dtype: torch.dtype) -> None:
    lowered, w = weights("int4_act_order")
    x = torch.randn(4, w.shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(call(x, lowered, 0, len(w)), (x.float() @ w.t()).to(dtype))


def test_the_operators_pass_torchs_own_checks() -> None:
    lowered, w = weights("int4_act_order")
    x = torch.randn(2, w.shape[1], requires_grad=True)
    torch.library.opcheck(matmul, (x, list(lowered.planes.values()), lowered.layout.text, 0, len(w), "exact"))
    ids = torch.tensor([[0, 2], [1, 1]])
    torch.library.opcheck(embed, (ids, list(lowered.planes.values()), lowered.layout.text, torch.float32))


def test_the_gradient_is_that_of_the_input() -> None:
    lowered, w = weights("int4_act_order")
    x = torch.randn(3, w.shape[1], requires_grad=True)
    other = x.detach().clone().requires_grad_()
    call(x, lowered, 0, len(w)).square().sum().backward()
    (other @ w.t()).square().sum().backward()
    assert x.grad is not None and other.grad is not None
    assert torch.allclose(x.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TWO[:6])
def test_an_embedding_takes_rows(name: str) -> None:
    lowered, w = weights(name)
    ids = torch.tensor([[len(w) - 1, 0], [1, 1]])
    found = embed(ids, list(lowered.planes.values()), lowered.layout.text, torch.bfloat16)
    assert torch.equal(found, GALLERY[name]().dequantize(torch.bfloat16)[ids])
    assert embed(ids[:0], list(lowered.planes.values()), lowered.layout.text, torch.float32).shape == (0, 2, w.shape[1])
