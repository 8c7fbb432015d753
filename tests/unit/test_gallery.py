"""One canonical tensor built by hand for each kind of quantization in the field, and its weights in exact rational arithmetic.

Every ``dequantize`` must equal ``rationals.weight``, an independent evaluator in plain Python, rounded once. The ggml kinds start from
random block bytes, decoded by hand in ``blocks_by_hand``, and are compared with ``gguf.quants.dequantize`` as well.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache

import blocks_by_hand
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from rationals import DTYPES, assert_rounded_once, elements, stepwise, weights
from torch import Tensor

from qformats.errors import BadFile, Unsupported
from qformats.scheme import Cyclic, Flat, Float, Integer, Learned, Table, Tile, whole
from qformats.tensor import ActivationScheme, Param, QuantizedTensor, constant

torch.set_num_threads(1)
Build = Callable[[], QuantizedTensor]
GALLERY: dict[str, Build] = {}


def exhibit(build: Build) -> Build:
    GALLERY[build.__name__] = cache(build)
    return GALLERY[build.__name__]


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ints(low: int, high: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(low, high, shape, generator=_rng(seed), dtype=torch.int64).to(dtype)


def _scales(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Scales of both signs around 2^-6, every eighth so small that half-precision weights are subnormal, one zero."""
    values = torch.randn(shape, generator=_rng(seed), dtype=torch.float64) / 64
    flat = values.reshape(-1)
    flat[::8] *= 2.0**-13
    flat[5:6] = 0.0
    return values.to(dtype)


# ---------------------------------------------------------------- affine kinds


@exhibit
def int4_act_order() -> QuantizedTensor:
    shape, groups = (6, 40), 3
    index = torch.tensor([(7 * k + k // 3) % groups for k in range(40)], dtype=torch.int32)  # groups of unequal size
    block = Tile((1, 16))
    zero = Param(_ints(0, 16, (6, groups), 1), block)
    return QuantizedTensor(shape, _ints(0, 16, shape, 2), Integer(4), (Param(_scales((6, groups), 3), block),), zero, group_index=index)


@exhibit
def int4_zero_of_16() -> QuantizedTensor:
    """GPTQ v1 stores zero - 1, so that a stored 15 means 16 = 2^bits."""
    shape, block = (5, 70), Tile((1, 32))  # the last group has 6 columns
    zero = torch.full((5, 3), 16, dtype=torch.uint8)
    zero[0, 0] = 0
    return QuantizedTensor(shape, _ints(0, 16, shape, 4), Integer(4), (Param(_scales((5, 3), 5), block),), Param(zero, block))


@exhibit
def int8_w8a8() -> QuantizedTensor:
    shape = (7, 33)
    codes = _ints(-128, 128, shape, 6, torch.int8)
    return QuantizedTensor(shape, codes, Integer(8, True), (Param(_scales((7, 1), 7, torch.float32), Tile((1, 33))),))


@exhibit
def int8_two_factors() -> QuantizedTensor:
    """LLM.int8(): a row's absolute maximum (SCB) times float32(1/127)."""
    shape = (4, 24)
    factors = (Param(_scales((4, 1), 8, torch.float32).abs(), Tile((1, 24))), constant(1 / 127, shape, torch.float32))
    return QuantizedTensor(shape, _ints(-127, 128, shape, 9, torch.int8), Integer(8, True), factors)


@exhibit
def experts_with_their_own_factor() -> QuantizedTensor:
    shape, block = (3, 4, 32), Tile((1, 1, 8))
    index = torch.stack([torch.randperm(32, generator=_rng(e)) // 8 for e in range(3)]).to(torch.int32)
    scales = (Param(_scales((3, 4, 4), 10, torch.bfloat16), block), Param(_scales((3, 1, 1), 11, torch.float32), Tile((1, 4, 32))))
    zero = Param(_ints(0, 9, (3, 4, 4), 12), block)
    return QuantizedTensor(shape, _ints(0, 8, shape, 13), Integer(3), scales, zero, group_index=index)


@exhibit
def factor_for_each_column() -> QuantizedTensor:
    """SINQ: (q - z) * s1[row, group] * s2[column]; the columns' factor ignores act-order."""
    shape, block = (5, 24), Tile((1, 8))
    scales = (Param(_scales((5, 3), 14), block), Param(_scales((1, 24), 15), Tile((5, 1))))
    zero = Param((torch.randn((5, 3), generator=_rng(16)) * 4).to(torch.float16), block)
    index = (torch.arange(24) % 3).to(torch.int32)
    return QuantizedTensor(shape, _ints(0, 16, shape, 17), Integer(4), scales, zero, group_index=index)


@exhibit
def embedding() -> QuantizedTensor:
    shape, block = (50, 48), Tile((1, 24))  # (vocabulary, hidden)
    offset = Param(_scales((50, 2), 18, torch.bfloat16), block)
    return QuantizedTensor(shape, _ints(0, 4, shape, 19), Integer(2), (Param(_scales((50, 2), 20, torch.bfloat16), block),), offset=offset)


# ---------------------------------------------------------------- bitsandbytes, HQQ, AQLM


@exhibit
def nf4_nested() -> QuantizedTensor:
    """Runs of 32 straddle rows of 931; absmax is uint8 codes of a 256-entry book in blocks of 256, plus an offset, in float32."""
    shape, runs = (9, 931), 262
    book = torch.linspace(-0.99297, 1, 256) ** 3
    absmax = QuantizedTensor(
        (runs,),
        _ints(0, 256, (runs, 1), 21),
        Learned(256),
        (Param(torch.tensor([0.0317823, 1.7130001]), Flat(256)),),
        offset=constant(2.63519287109375, (runs,), torch.float32),
        codebook=book.reshape(1, 256, 1, 1),
    )
    return QuantizedTensor(shape, _ints(0, 16, shape, 22), Table("nf4"), (Param(absmax, Flat(32), rounded_to=torch.float32),))


@exhibit
def hqq_axis_0() -> QuantizedTensor:
    """reshape(gs, -1): element i of the row-major vector belongs to group i mod (numel / gs)."""
    shape, groups = (8, 12), 24
    zero = (torch.rand(groups, generator=_rng(23)) * 16).to(torch.float16)
    return QuantizedTensor(
        shape, _ints(0, 16, shape, 24), Integer(4), (Param(_scales((groups,), 25), Cyclic(groups)),), Param(zero, Cyclic(groups))
    )


@exhibit
def hqq_3_bit_float_zero() -> QuantizedTensor:
    """reshape(-1, gs) on axis 1, where groups of 20 straddle rows of 30; scale itself stored as 8-bit codes with a float zero."""
    shape, groups = (40, 30), 60
    inner = Flat(20)
    scale = QuantizedTensor(
        (groups,),
        _ints(0, 256, (groups,), 26),
        Integer(8),
        (Param(torch.tensor([2.0**-9, 0.0123, 0.0007], dtype=torch.float16), inner),),
        Param(torch.tensor([17.3, -3.1, 100.2], dtype=torch.float16), inner),
    )
    zero = (torch.rand(groups, generator=_rng(27)) * 8).to(torch.float16)
    factor = Param(scale, Flat(20), rounded_to=torch.float16)
    return QuantizedTensor(shape, _ints(0, 8, shape, 28), Integer(3), (factor,), Param(zero, Flat(20)))


@exhibit
def aqlm_two_books() -> QuantizedTensor:
    codes = _ints(-128, 128, (5, 3, 2), 29, torch.int8)  # unsigned codes read as signed
    book = torch.randn((2, 256, 1, 8), generator=_rng(30)).to(torch.float16)
    return QuantizedTensor((5, 24), codes, Learned(256, 1, 8, 2), (Param(_scales((5, 1), 31), Tile((1, 24))),), codebook=book)


@exhibit
def aqlm_tall_entries() -> QuantizedTensor:
    codes = _ints(0, 1024, (3, 2, 1), 32, torch.int16)
    book = torch.randn((1, 1024, 2, 4), generator=_rng(33)).to(torch.bfloat16)
    return QuantizedTensor((6, 8), codes, Learned(1024, 2, 4, 1), (Param(_scales((3, 1), 34), Tile((2, 8))),), codebook=book)


@exhibit
def a_hair_from_every_tie() -> QuantizedTensor:
    """A row for each float dtype: just below, on and just above the middle between two of its numbers."""
    zero = torch.tensor([[0.0], [0.0], [0.0], [-(2.0**-53)]])
    scale = torch.tensor([[1 + 2.0**-11], [1 + 2.0**-8], [1 + 2.0**-12], [1.0]])
    square = torch.tensor([[1.0], [1.0], [1 + 2.0**-12], [1.0]])
    offset = torch.tensor([[-(2.0**-110), 0.0, 2.0**-110]] * 4)
    codes = torch.tensor([[1, 1, 1, -1, -1, -1]] * 4, dtype=torch.int8)
    row, run = Tile((1, 6)), Tile((1, 1))
    scales = (Param(scale, row), Param(square, row))
    return QuantizedTensor((4, 6), codes, Integer(2, True), scales, Param(zero, row), Param(torch.cat((offset, -offset), 1), run))


# ---------------------------------------------------------------- small floats


def _finite_e4m3(shape: tuple[int, ...], seed: int) -> Tensor:
    codes = _ints(0, 256, shape, seed)
    return torch.where((codes & 0x7F) == 0x7F, 0x80, codes).to(torch.uint8)


@exhibit
def fp8_128x128_ragged() -> QuantizedTensor:
    shape = (130, 140)
    scale = torch.tensor([[0.0123, 3.3e-5], [7.25, 1e-9]])
    return QuantizedTensor(shape, _finite_e4m3(shape, 35), Float("e4m3fn"), (Param(scale, Tile((128, 128))),))


@exhibit
def nvfp4_reciprocal_global_scale() -> QuantizedTensor:
    """compressed-tensors: e2m1 * e4m3 block scale / float32 global scale."""
    shape = (6, 48)
    block = Param(_finite_e4m3((6, 3), 36).view(torch.float8_e4m3fn), Tile((1, 16)))
    world = Param(torch.tensor([[2688.0 / 0.7]]), whole(shape), inverse=True)
    return QuantizedTensor(shape, _ints(0, 16, shape, 37), Float("e2m1"), (block, world))


@exhibit
def nvfp4_ggml_scales() -> QuantizedTensor:
    shape = (3, 64)
    sub = QuantizedTensor((3, 4), _ints(0, 128, (3, 4), 38), Float("ue4m3"))
    return QuantizedTensor(
        shape, _ints(0, 16, shape, 39), Float("e2m1"), (Param(sub, Tile((1, 16))), constant(0.0371, shape, torch.float32))
    )


# ---------------------------------------------------------------- ggml blocks

BLOCKS = {"q2_k": 84, "q3_k": 110, "q6_k": 210, "iq2_s": 82, "iq1_m": 56, "tq1_0": 54, "mxfp4": 17}


def _random_blocks(name: str, rows: int, per_row: int) -> bytes:
    """Random bytes whose fp16 fields are finite and whose e8m0 is not NaN."""
    blocks = _ints(0, 256, (rows * per_row, BLOCKS[name]), sum(name.encode()))
    at = {"q2_k": (81, 83), "q3_k": (109,), "q6_k": (209,), "iq2_s": (1,), "iq1_m": (55,), "tq1_0": (53,), "mxfp4": ()}[name]
    for byte in at:  # clear the lowest bit of the exponent (iq1_m: it is in the same place of the last word)
        blocks[:, byte] &= 0xFB if name != "iq1_m" else 0xBF
    if name == "mxfp4":
        blocks[:, 0] = torch.tensor([0, 1, 2, 100, 127, 128, 200, 254, 125, 64] * 10, dtype=torch.uint8)[: len(blocks)]
    return bytes(blocks.flatten().tolist())


@cache
def _planes(name: str, rows: int = 3, per_row: int = 2) -> dict[str, Tensor]:
    """Hand-decoded planes, each (rows, entries of a row)."""
    raw, size = _random_blocks(name, rows, per_row), BLOCKS[name]
    blocks = [getattr(blocks_by_hand, name)(raw[at : at + size]) for at in range(0, len(raw), size)]
    return {key: torch.tensor([b[key] for b in blocks], dtype=torch.float64).reshape(rows, -1) for key in blocks[0]}


def _nested(codes: Tensor, grid: Integer, d: Tensor, per: int, zero: float | None = None) -> QuantizedTensor:
    shape = tuple(codes.shape)
    dtype = torch.int8 if grid.signed else torch.uint8
    zero_point = None if zero is None else constant(zero, shape, torch.float32)
    return QuantizedTensor(shape, codes.to(dtype), grid, (Param(d.to(torch.float16), Tile((1, per))),), zero_point)


@exhibit
def q2_k() -> QuantizedTensor:
    p = _planes("q2_k")
    scale, low = _nested(p["sc"], Integer(4), p["d"], 16), _nested(p["m"], Integer(4), -p["dmin"], 16)
    block = Tile((1, 16))
    return QuantizedTensor((3, 512), p["codes"].to(torch.uint8), Integer(2), (Param(scale, block),), offset=Param(low, block))


@exhibit
def q3_k() -> QuantizedTensor:
    p = _planes("q3_k")
    scale = Param(_nested(p["sc"], Integer(6), p["d"], 16, zero=32), Tile((1, 16)))
    return QuantizedTensor((3, 512), p["codes"].to(torch.uint8), Integer(3), (scale,), constant(4, (3, 512)))


@exhibit
def q6_k() -> QuantizedTensor:
    p = _planes("q6_k")
    scale = Param(_nested(p["sc"], Integer(8, True), p["d"], 16), Tile((1, 16)))
    return QuantizedTensor((3, 512), p["codes"].to(torch.uint8), Integer(6), (scale,), constant(32, (3, 512)))


@exhibit
def iq2_s() -> QuantizedTensor:
    """d * (s4 + 1/2) * 1/4 * grid * sign."""
    p, shape = _planes("iq2_s"), (3, 512)
    scales = (Param(_nested(p["s4"], Integer(4), p["d"], 16, zero=-0.5), Tile((1, 16))), constant(0.25, shape, torch.float32))
    return QuantizedTensor(shape, p["codes"].to(torch.int16), Table("iq2_s", 8), scales, signs=p["signs"].to(torch.uint8))


@exhibit
def iq1_m() -> QuantizedTensor:
    """d * 2 * (s3 + 1/2) * (grid - zero), zero = -delta."""
    p, shape = _planes("iq1_m"), (3, 512)
    scales = (Param(_nested(p["s3"], Integer(3), p["d"], 16, zero=-0.5), Tile((1, 16))), constant(2, shape))
    zero = Param(-p["delta"].to(torch.float32), Tile((1, 8)))
    return QuantizedTensor(shape, p["codes"].to(torch.int16), Table("iq1_s", 8), scales, zero)


@exhibit
def tq1_0() -> QuantizedTensor:
    p, shape = _planes("tq1_0"), (3, 512)
    scale = Param(p["d"].to(torch.float16), Tile((1, 256)))
    return QuantizedTensor(shape, p["codes"].to(torch.uint8), Integer(2), (scale,), constant(1, shape))


@exhibit
def mxfp4() -> QuantizedTensor:
    p = _planes("mxfp4", 3, 4)
    scale = QuantizedTensor((3, 4), p["e"].to(torch.uint8), Float("e8m0"))
    return QuantizedTensor((3, 128), p["codes"].to(torch.uint8), Float("e2m1"), (Param(scale, Tile((1, 32))),))


# ---------------------------------------------------------------- the tests


@cache
def _exact(name: str) -> list[Fraction]:
    return weights(GALLERY[name]())


@pytest.mark.parametrize("name", GALLERY)
def test_dequantize_is_the_formula_in_rationals_rounded_once(name: str) -> None:
    t = GALLERY[name]()
    for dtype in DTYPES:
        found = t.dequantize(dtype)
        assert tuple(found.shape) == t.shape
        assert_rounded_once(found, _exact(name), dtype)


@pytest.mark.parametrize("name", [name for name in GALLERY if name not in ("mxfp4", "fp8_128x128_ragged", "nf4_nested")])
def test_stepwise_evaluation_rounds_every_step(name: str) -> None:
    t = GALLERY[name]()
    found = t.evaluate_in(torch.float32).reshape(-1).tolist()
    assert found == [float(stepwise(t, where, torch.float32)) for where in elements(t.shape)]


@pytest.mark.parametrize("name", BLOCKS)
def test_ggml_kinds_equal_gguf_dequantize(name: str) -> None:
    t = GALLERY[name]()
    rows, k = t.shape
    per_row = k // (32 if name == "mxfp4" else 256)
    raw = np.frombuffer(_random_blocks(name, rows, per_row), np.uint8).reshape(rows, -1)
    expected = torch.from_numpy(quants.dequantize(raw, GGMLQuantizationType[name.upper()]))
    assert torch.equal(t.dequantize(torch.float32, like="ggml"), expected)
    if name != "q2_k":  # every product is exact in float32; types with a min round twice in ggml
        assert torch.equal(t.dequantize(torch.float32), expected)


def test_nested_nf4_equals_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    t = GALLERY["nf4_nested"]()
    absmax = t.scales[0].values
    assert isinstance(absmax, QuantizedTensor) and absmax.codebook is not None and absmax.offset is not None
    nested = functional.QuantState(absmax=absmax.scales[0].values, blocksize=256, code=absmax.codebook.flatten(), dtype=torch.float32)
    state = functional.QuantState(
        absmax=absmax.codes.flatten(), shape=torch.Size(t.shape), code=functional.get_4bit_type("nf4", device="cpu"), blocksize=32,
        quant_type="nf4", dtype=torch.float32, offset=absmax.offset.values.reshape(()), state2=nested,
    )  # fmt: skip
    flat = torch.nn.functional.pad(t.codes.flatten(), (0, t.codes.numel() % 2), value=7)
    packed = (flat[::2] << 4 | flat[1::2]).unsqueeze(1)
    assert torch.equal(t.dequantize(torch.float32), functional.dequantize_4bit(packed, state))


def test_aqlm_equals_its_own_library() -> None:
    aqlm = pytest.importorskip("aqlm.utils")
    t = GALLERY["aqlm_two_books"]()
    assert t.codebook is not None and isinstance(t.scales[0].values, Tensor)
    scales = t.scales[0].values.float().reshape(5, 1, 1, 1)
    theirs = aqlm._dequantize_weight(aqlm.unpack_int_data(t.codes, 8), t.codebook.float(), scales)
    assert torch.allclose(t.dequantize(torch.float32), theirs, rtol=2.0**-22, atol=0)  # theirs rounds the sum, then the product


def test_activation_scheme_stands_beside_the_weight() -> None:
    scheme = ActivationScheme(Integer(8, True), "token", dynamic=True)
    assert scheme.grid == GALLERY["int8_w8a8"]().grid and scheme.group_size is None


def test_embedding_rows_are_looked_up_on_codes() -> None:
    from qformats.rewrite import select_rows

    t, ids = GALLERY["embedding"](), torch.tensor([3, 49, 3, 0])
    assert torch.equal(select_rows(t, ids).dequantize(torch.float32), t.dequantize(torch.float32)[ids])


@pytest.mark.parametrize("name", GALLERY)
def test_scheme_describes_the_tensor_without_its_data(name: str) -> None:
    t = GALLERY[name]()
    assert t.scheme.shape == t.shape and t.scheme.grid == t.grid and len(t.scheme.scales) == len(t.scales)
    assert hash(t.scheme) == hash(t.replace().scheme) and t.scheme == t.replace().scheme


def _q4(**changes: object) -> QuantizedTensor:
    fields: dict[str, object] = {"shape": (2, 8), "codes": torch.zeros((2, 8), dtype=torch.uint8), "grid": Integer(4)} | changes
    return QuantizedTensor(**fields)  # type: ignore[arg-type]


BOOK = torch.zeros((1, 4, 1, 2))
BROKEN: dict[str, tuple[str, Callable[[], object]]] = {
    "codes of another shape": ("codes-shape", lambda: _q4(shape=(2, 9))),
    "K is not whole entries": ("codes-shape", lambda: _q4(grid=Table("iq2_s", 3))),
    "codes of a float dtype": ("codes-dtype", lambda: _q4(codes=torch.zeros((2, 8)))),
    "scale of another shape": ("param-shape", lambda: _q4(scales=(Param(torch.ones(2, 3), Tile((1, 4))),))),
    "flat scale too short": ("param-shape", lambda: _q4(scales=(Param(torch.ones(3), Flat(5)),))),
    "signs of another shape": ("signs-shape", lambda: _q4(signs=torch.zeros((2, 2), dtype=torch.uint8))),
    "group index of another length": ("group-index", lambda: _q4(group_index=torch.zeros(7, dtype=torch.int32))),
    "group index names no group": ("group-index", lambda: _q4(
        scales=(Param(torch.ones(2, 2), Tile((1, 4))),), group_index=torch.full((8,), 2, dtype=torch.int32)).dequantize()),
    "no codebook": ("codebook", lambda: _q4(codes=torch.zeros((2, 4, 1), dtype=torch.uint8), grid=Learned(4, 1, 2))),
    "codebook of another shape": ("codebook", lambda: _q4(
        codes=torch.zeros((2, 4, 1), dtype=torch.uint8), grid=Learned(8, 1, 2), codebook=BOOK)),
    "code beyond the codebook": ("codes-range", lambda: _q4(
        codes=torch.full((2, 4, 1), 4, dtype=torch.uint8), grid=Learned(4, 1, 2), codebook=BOOK).dequantize()),
    "code beyond the table": ("codes-range", lambda: _q4(codes=torch.full((2, 8), 16, dtype=torch.uint8), grid=Table("nf4")).dequantize()),
    "negative table code": ("codes-range", lambda: _q4(codes=torch.full((2, 8), -1, dtype=torch.int8), grid=Table("nf4")).dequantize()),
    "code beyond the float": ("codes-range", lambda: _q4(codes=torch.full((2, 8), 16, dtype=torch.uint8), grid=Float("e2m1")).dequantize()),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_contradictions_are_refused_by_name(case: str) -> None:
    code, build = BROKEN[case]
    with pytest.raises(BadFile) as refusal:
        build()
    assert refusal.value.code == code


def test_unknown_rounding_order_is_refused() -> None:
    with pytest.raises(Unsupported):
        _q4(scales=(constant(1, (2, 8)),)).dequantize(like="nobody")


def test_nan_and_infinite_patterns_pass_through() -> None:
    codes = torch.tensor([[0x7C, 0xFC, 0x7D, 0x3C]], dtype=torch.uint8)
    t = QuantizedTensor((1, 4), codes, Float("e5m2"), (constant(0.1, (1, 4), torch.float32),))
    found = t.dequantize(torch.float16)[0]
    assert found[0] == torch.inf and found[1] == -torch.inf and found[2].isnan() and found[3] == torch.tensor(0.1).half()
