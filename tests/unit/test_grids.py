"""Value tables against torch's own 8-bit floats, bitsandbytes' published tables, gguf's dequantizers, and the formulas of the specs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qformats.errors import Unsupported
from qformats.grids import FLOAT_NAMES, TABLE_WIDTHS, float_values, table_values


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.view(torch.int64)[~found.isnan()], expected.view(torch.int64)[~expected.isnan()]) and torch.equal(
        found.isnan(), expected.isnan()
    )


@pytest.mark.parametrize("name", ["e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz"])
def test_eight_bit_floats_equal_torch_bit_for_bit(name: str) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(getattr(torch, f"float8_{name}")).to(torch.float64)
    assert _same(float_values(name), expected)


def test_e8m0_is_a_power_of_two_and_255_is_nan() -> None:
    values = float_values("e8m0")
    assert values[127] == 1 and values[0] == 2.0**-127 and values[254] == 2.0**127
    assert values[255].isnan() and values.isnan().sum() == 1


def test_ue4m3_follows_ggml() -> None:
    values = float_values("ue4m3")
    assert values[0] == 0 and values[0x7F] == 0 and values[0x7E] == 448 and values[1] == 2.0**-9
    assert torch.equal(values[:0x7F], float_values("e4m3fn")[:0x7F])
    assert torch.equal(values[0x80:0xFF], values[:0x7F]) and values[0xFF] == 480


def test_mx_elements() -> None:
    assert float_values("e2m1")[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert float_values("e2m3")[:32].tolist() == [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
    assert float_values("e3m2")[[1, 4, 31]].tolist() == [0.0625, 0.25, 28.0]
    for name, size in (("e2m1", 16), ("e2m3", 64), ("e3m2", 64)):
        values = float_values(name)
        assert len(values) == size and _same(values[size // 2 :], -values[: size // 2])


def test_bitsandbytes_tables() -> None:
    nf4, fp4 = table_values("nf4"), table_values("fp4")
    assert torch.equal(nf4, nf4.float().double()) and nf4[0] == -1 and nf4[7] == 0 and nf4[15] == 1 and bool((nf4.diff() > 0).all())
    assert fp4[1].item().hex() == "0x1.5555560000000p-8" and fp4[3] == 1 and not fp4[8].signbit()
    assert torch.equal(fp4[8:], -fp4[:8])


@pytest.mark.parametrize(("name", "entries", "values"), [
    ("iq1_s", 2048, {-1, 0, 1}), ("iq2_xxs", 256, {8, 25, 43}), ("iq2_xs", 512, {8, 25, 43}), ("iq2_s", 1024, {8, 25, 43}),
    ("iq3_xxs", 256, {4, 12, 20, 28, 36, 44, 52, 62}), ("iq3_s", 512, {1, 3, 5, 7, 9, 11, 13, 15}),
])  # fmt: skip
def test_ggml_grids_have_distinct_entries_of_known_values(name: str, entries: int, values: set[int]) -> None:
    grid = table_values(name)
    assert tuple(grid.shape) == (entries, TABLE_WIDTHS[name])
    assert set(grid.unique().tolist()) == values
    assert len(torch.unique(grid, dim=0)) == entries


def test_every_entry_is_exact_in_float32() -> None:
    for values in [*map(float_values, FLOAT_NAMES), *map(table_values, TABLE_WIDTHS)]:
        assert _same(values.float().double(), values)


def test_unknown_names_are_refused() -> None:
    for call in (float_values, table_values):
        with pytest.raises(Unsupported) as refusal:
            call("e9m9")
        assert refusal.value.code == "grid"


def test_import_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; sys.modules['gguf'] = None; import qformats.grids"
    subprocess.run([sys.executable, "-c", code], check=True)
