"""The Triton kernels under Triton's interpreter, against the definition, in tiles with rows and columns to spare."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from kinds import KINDS, integers, sorted_order, stacked
from test_gallery import GALLERY

from qformats.kernels import dispatch, gpu, reference
from qformats.kernels.lower import Lowered, lower
from qformats.tensor import constant

os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret or "qformats.kernels.triton.rounding" in sys.modules:
    pytest.skip("Triton was imported to compile, not to interpret", allow_module_level=True)

from qformats.kernels.triton import launch, tuning  # noqa: E402

torch.set_num_threads(1)
HALF = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered", "ignore:divide by zero")


def small(shape: str, spec: object, device: torch.device, count: int, height: int, single: bool = False) -> tuning.Block:
    """Few programs: the interpreter's time goes by their number."""
    if shape == "tiles":
        return tuning._fitted(tuning.Block(16, 1024 // spec.unit or 1, 16, splits=2), spec)  # type: ignore[attr-defined]
    rows = min(64, 1 << max(2, (height - 1).bit_length() - 1))
    return tuning._fitted(tuning.Block(rows, 1024 // spec.unit or 1, splits=2), spec)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "block", small)
    gpu._refused.clear()
    yield
    gpu._refused.clear()


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal; any NaN is as good as another, and a zero as its negative (a zero scale makes either)."""
    return bool(((found == wanted) | ((found != found) & (wanted != wanted))).all())


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_the_exact_values_rounded_once(name: str) -> None:
    t = KINDS[name]()
    lowered = lower(t)
    spec = launch.served(lowered, torch.float32)
    assert spec is not None
    rows = lowered.layout.rows
    for dtype in (torch.float32, HALF[len(name) % 2]):
        wanted = t.dequantize(dtype).reshape(rows, -1)
        guard = torch.full((rows + 2, spec.columns), 7.0, dtype=dtype)
        launch.dequantize(lowered, spec, slice(1, rows), dtype, guard[1:rows])
        assert same(guard[1:rows], wanted[1:])
        assert bool((guard[rows:] == 7).all()) and bool((guard[0] == 7).all())


def product(name: str, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A product by a kernel, what it should be in float64, and the size of its terms."""
    t = KINDS[name]()
    lowered = lower(t)
    w = t.dequantize(torch.float32 if count <= gpu.VECTOR else dtype).reshape(lowered.layout.rows, -1)
    x = torch.randn(count, w.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    found = gpu.matmul(x, lowered, 1, len(w), "exact")
    assert found is not None and found.dtype == dtype
    return found, x.double() @ w[1:].double().t(), x.double().abs() @ w[1:].double().abs().t()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "name", ["int4_zero_of_16", "q4_k", "nf4_nested", "3_bits", "iq2_s", "sorted_order", "aqlm_tall_entries", "float_zero"]
)
def test_a_vector_product_is_that_of_the_weights(name: str, count: int) -> None:
    dtype = torch.float32 if count == 1 else HALF[len(name) % 2]
    found, wanted, size = product(name, count, dtype)
    tiny = torch.finfo(dtype).tiny
    assert bool(((found.double() - wanted).abs() <= 2e-6 * size + wanted.abs() * torch.finfo(dtype).eps + tiny).all())


def test_a_row_of_zeros_sums_to_zero_and_any_address_will_do() -> None:
    """Codes that are their zero points are exact zeros in sums too; x may begin at any number."""
    t = integers(4)
    lowered = lower(t.replace(codes=torch.full_like(t.codes, 5), zero_point=constant(5, t.shape)))
    x = torch.randn(151, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)[1:].view(1, 150)
    found = gpu.matmul(x, lowered, 0, 5, "exact")
    assert found is not None and bool((found == 0).all())
    plain = lower(t)
    shifted, again = gpu.matmul(x, plain, 0, 5, "exact"), gpu.matmul(x.clone(), plain, 0, 5, "exact")
    assert shifted is not None and again is not None and torch.equal(shifted, again)


@pytest.mark.parametrize("name", ["int4_zero_of_16", "q4_k", "5_bits", "aqlm_two_books", "sorted_order", "nvfp4_reciprocal_global_scale"])
def test_a_tile_product_is_that_of_the_weights(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        found, wanted, size = product(name, 5, dtype)
        assert bool(((found.double() - wanted).abs() <= 2e-6 * size + wanted.abs() * torch.finfo(dtype).eps).all())


def test_more_rows_go_through_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_SCRATCH_WEIGHTS", 4 * 96)
    lowered = lower(integers(4, (300, 96)))
    x = torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(3))
    found = gpu.matmul(x, lowered, 5, 290, "exact")
    assert found is None or found.shape == (2, 9, 285)
    monkeypatch.setattr(gpu, "LARGE_SINGLE", 4)
    found = gpu.matmul(x, lowered, 5, 290, "exact")
    assert found is not None and torch.allclose(found, reference.matmul(x, lowered, 5, 290), rtol=1e-5, atol=1e-4)
    grad = torch.randn(3, 285, generator=torch.Generator().manual_seed(4))
    back = gpu.matmul_back(grad, lowered, 5, 290)
    assert back is not None and torch.allclose(back, reference.matmul_back(grad, lowered, 5, 290), rtol=1e-5, atol=1e-4)


def test_gradients_and_rows_come_in_the_weights_own_order_of_columns() -> None:
    lowered = lower(sorted_order())
    assert lowered.layout.index == "order"
    grad = torch.randn(2, 6, generator=torch.Generator().manual_seed(4))
    back = gpu.matmul_back(grad, lowered, 0, 6)
    assert back is not None and torch.allclose(back, reference.matmul_back(grad, lowered, 0, 6), rtol=1e-5, atol=1e-5)
    ids = torch.tensor([[5, 0], [2, 2]])
    found = gpu.embed(ids, lowered, torch.bfloat16)
    assert found is not None and torch.equal(found, reference.embed(ids, lowered, torch.bfloat16))


@pytest.mark.parametrize("counts", [(4, 0, 19), (0, 0, 1), (17, 16, 2)])
def test_experts_take_their_own_rows(counts: tuple[int, ...]) -> None:
    t = stacked()
    lowered = lower(t)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    x = torch.randn(int(offsets[-1]), 64, generator=torch.Generator().manual_seed(5))
    found = gpu.experts(x, lowered, offsets, 20)
    w = t.dequantize(torch.float32)
    wanted = torch.cat([x[a:b] @ w[e].t() for e, (a, b) in enumerate(itertools.pairwise(offsets))])
    assert found is not None and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_nothing_to_multiply_is_nothing() -> None:
    lowered = lower(integers(4))
    empty = gpu.matmul(torch.empty(0, 150), lowered, 0, 5, "exact")
    assert empty is not None and empty.shape == (0, 5)
    none = gpu.embed(torch.empty((0, 2), dtype=torch.int64), lowered, torch.float16)
    assert none is not None and none.shape == (0, 2, 150)


def test_a_layout_that_no_kernel_serves_is_said_once() -> None:
    lowered = lower(GALLERY["a_hair_from_every_tie"]())
    x = torch.ones(1, 6)
    with pytest.warns(UserWarning, match="no GPU kernel for Integer"):
        assert gpu.matmul(x, lowered, 0, 4, "exact") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.matmul(x, lowered, 0, 4, "exact") is None
        assert gpu.embed(torch.tensor([1]), lowered, torch.float32) is None
    assert dispatch.multiply(x, lowered, 0, 4, "exact").shape == (1, 4)


def test_a_kernel_that_cannot_be_compiled_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise triton.OutOfResources(1, 0, "shared memory")

    monkeypatch.setattr(launch, "vector_product", broken)
    with pytest.warns(UserWarning, match="cannot be compiled here: OutOfResources"):
        assert gpu.matmul(torch.ones(1, 150), lower(integers(4)), 0, 5, "exact") is None


def test_the_interpreter_is_not_asked_for_planes_of_another_form() -> None:
    lowered = lower(integers(4))
    planes = {name: plane.t().contiguous().t() if name == "scale" else plane for name, plane in lowered.planes.items()}
    assert launch.served(Lowered(lowered.layout, planes), torch.float32) is None
    assert launch.served(lowered, torch.float64) is None


def test_blocks_come_from_the_table_or_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    spec = launch.served(lower(integers(4)), torch.float32)
    assert spec is not None
    for shape in ("gemv", "tiles", "dequantize"):
        for count in (1, 4, 16, 64, 512):
            found = tuning.block(shape, spec, torch.device("cpu"), count, 4096)
            assert all(value & (value - 1) == 0 for name, value in dataclasses.asdict(found).items() if name != "stages")
    assert tuning.bucket(5) == tuning.bucket(8) == 8 and tuning.bucket(1) == 1
