"""Min-max rounding for integer types: the stated bound, exact zeros, scales rounded before the codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qformats.errors import BadFile, WouldLose
from qformats.quantize import rtn
from qformats.scheme import Integer, Storage, Tile


def storage(bits: int, group: int | None, *, sym: bool = False, zeros: tuple[int, int] | None = None) -> Storage:
    return Storage(f"int{bits}", Integer(bits), group, float(bits), zero_point=1 << (bits - 1) if sym else zeros or (0, (1 << bits) - 1))


def scales(w: torch.Tensor, target: Storage) -> torch.Tensor:
    values = rtn(w, target).scales[0].values
    assert isinstance(values, torch.Tensor)
    return values


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([32, 64, None]),
    kind=st.sampled_from(["sym", "asym", "v1"]),
    shift=st.sampled_from([0.0, 1.0, -3.0]),
    size=st.sampled_from([1.0, 0.02, 1e-4, 1e-7, 1e-9]),
    k=st.sampled_from([32, 80, 128]),
    seed=st.integers(0, 1000),
)
def test_error_bound(bits: int, group: int | None, kind: str, shift: float, size: float, k: int, seed: int) -> None:
    w = (torch.randn(5, k, generator=torch.Generator().manual_seed(seed)) + shift) * size
    top = (1 << bits) - 1
    target = storage(bits, group, sym=kind == "sym", zeros=(1, top) if kind == "v1" else None)
    tensor = rtn(w, target)
    s = tensor.scales[0].values
    assert isinstance(s, torch.Tensor) and s.dtype == torch.float16
    step = s.double().repeat_interleave(group or k, -1)[:, :k]
    bound = step * (0.5 + top * 2**-11) * (1 + 2**-20) + top * 2**-25
    error = (tensor.dequantize(torch.float64) - w.double()).abs()
    assert bool((error <= bound).all()), float((error / step).max())
    assert int(tensor.codes.max()) <= top


@pytest.mark.parametrize("sym", [True, False])
def test_zero_stays_zero(sym: bool) -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    w[:, 5::7] = 0
    assert bool((rtn(w, storage(4, 32, sym=sym)).dequantize(torch.float64)[:, 5::7] == 0).all())


def test_symmetric_has_one_constant_zero_and_asymmetric_a_plane() -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    sym, asym = rtn(w, storage(4, 32, sym=True)), rtn(w, storage(4, 32))
    assert sym.zero_point is not None and sym.zero_point.spec().constant == 8.0
    assert asym.zero_point is not None and asym.zero_point.block == Tile((1, 32))
    assert isinstance(asym.zero_point.values, torch.Tensor) and asym.zero_point.values.dtype == torch.uint8


def test_codes_use_the_rounded_scale() -> None:
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(6))
    tensor = rtn(w, storage(8, 128))
    again = rtn(tensor.dequantize(torch.float32), storage(8, 128))
    assert (tensor.codes.int() - again.codes.int()).abs().max() <= 1
    nearest = torch.round(w / scales(w, storage(8, 128)).float())
    zero = tensor.zero_point
    assert zero is not None and isinstance(zero.values, torch.Tensor)
    assert torch.equal((nearest + zero.values.float()).clamp(0, 255).to(torch.uint8), tensor.codes)


def test_groups_of_zeros_and_group_of_the_whole_row() -> None:
    w = torch.zeros(2, 64)
    w[1] = 1.0
    assert scales(w, storage(4, 64))[0, 0] == 1
    tensor = rtn(w, storage(4, None))
    assert tensor.scales[0].block == Tile((1, 64))
    torch.testing.assert_close(tensor.dequantize(torch.float64), w.double(), atol=1e-3, rtol=0)


def test_ragged_last_group() -> None:
    w = torch.randn(3, 80, generator=torch.Generator().manual_seed(8))
    tensor = rtn(w, storage(4, 32))
    assert tensor.codes.shape == (3, 80) and scales(w, storage(4, 32)).shape == (3, 3)
    assert torch.equal(tensor.codes[:, 64:], rtn(w[:, 64:], storage(4, 32)).codes)


def test_refusals() -> None:
    w = torch.ones(1, 32)
    w[0, 0] = float("nan")
    with pytest.raises(BadFile) as caught:
        rtn(w, storage(4, 32))
    assert caught.value.code == "not-finite"
    with pytest.raises(WouldLose) as lost:
        rtn(torch.full((1, 32), 1e7), storage(4, 32))
    assert lost.value.code == "f16-overflow"
