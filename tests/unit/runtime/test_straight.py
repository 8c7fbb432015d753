"""Products that go straight to a loop: every input as the definition has it, and nothing kept of planes that are others now."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from test_gallery import GALLERY

from qformats.kernels.lower import lower
from qformats.runtime.embedding import QuantEmbedding
from qformats.runtime.linear import QuantLinear, TiedHead

torch.set_num_threads(1)
COLUMNS = 70


def layer(compute: str = "exact") -> QuantLinear:
    return QuantLinear([lower(copy.deepcopy(GALLERY["int4_zero_of_16"]()))], torch.arange(5.0), compute=compute)


def given(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "one": lambda: given(COLUMNS),
    "one of a batch": lambda: given(1, 1, COLUMNS),
    "a matrix": lambda: given(3, COLUMNS),
    "of a batch": lambda: given(2, 1, COLUMNS),
    "none": lambda: given(0, COLUMNS),
    "not contiguous": lambda: given(COLUMNS, 2).t(),
    "expanded": lambda: given(COLUMNS).expand(2, 3, COLUMNS),
    "bfloat16": lambda: given(1, 1, COLUMNS).bfloat16(),
    "float64": lambda: given(2, COLUMNS).double(),
    "with a gradient": lambda: given(2, COLUMNS).requires_grad_(),
}


@pytest.mark.parametrize("what", INPUTS)
def test_every_input_is_multiplied(what: str) -> None:
    linear, x = layer(), INPUTS[what]()
    for _ in range(2):  # the second time by what is kept
        with torch.no_grad():
            found = linear(x)
    wanted = torch.nn.functional.linear(x.detach().float(), linear.dequantize(torch.float32)).to(x.dtype) + torch.arange(5.0).to(x.dtype)
    assert found.shape == wanted.shape and found.dtype == x.dtype and not found.requires_grad
    assert torch.allclose(found.float(), wanted.float(), rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_columns_that_do_not_fit_are_refused(compute: str) -> None:
    for x in (given(2, COLUMNS - 1), given(1, 2 * COLUMNS), given(2, COLUMNS // 2)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="70 columns"):
            layer(compute)(x)


def test_sorted_columns_of_inputs() -> None:
    linear = QuantLinear([lower(GALLERY["int4_act_order"]())])
    x = given(2, linear.in_features)
    assert torch.allclose(linear(x), x @ linear.dequantize().t(), atol=1e-4)


def test_what_is_kept_follows_the_planes() -> None:
    linear, x = layer(), given(1, COLUMNS)
    linear.bias = None
    first = linear(x)
    linear.scale.mul_(2)  # written to
    assert torch.allclose(linear(x), 2 * first, atol=1e-5)
    linear.scale = linear.scale / 2  # another tensor
    assert torch.equal(linear(x), first) and torch.equal(linear.dequantize(), layer().dequantize())
    with torch.inference_mode():
        assert torch.equal(linear(x), first)
    kept = weakref.ref(linear.codes0)
    linear.to("meta")
    assert kept() is None  # nothing holds what has moved


def test_copies_have_their_own() -> None:
    linear, x = layer(), given(1, COLUMNS)
    wanted = linear(x)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        linear.codes0.zero_()
        assert torch.equal(other(x), wanted)
        linear.codes0.copy_(other.codes0)
    assert torch.equal(linear(x), wanted)


def test_a_gradient_takes_the_operator() -> None:
    linear, x = layer(), given(2, COLUMNS).requires_grad_()
    linear(x.detach())
    linear(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, linear.dequantize().sum(0).expand(2, -1), atol=1e-4)


def test_rows_of_an_embedding_and_its_head() -> None:
    table = QuantEmbedding([lower(copy.deepcopy(GALLERY["q6_k"]()))], torch.nn.Embedding(3, 512))
    head, rows = TiedHead(table), table.dequantize()
    for ids in (torch.tensor([[2]]), torch.tensor([0, 1, 2], dtype=torch.int32), torch.zeros(0, dtype=torch.int64)):
        assert torch.equal(table(ids), rows[ids.long()])
    for wrong in (3, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([wrong]))
    x = given(1, 1, 512)
    assert torch.allclose(head(x), x @ rows.t(), atol=1e-4)
    table.codes0.bitwise_not_()
    assert torch.equal(table(torch.tensor([1])), table.dequantize()[[1]]) and not torch.equal(table.dequantize(), rows)
