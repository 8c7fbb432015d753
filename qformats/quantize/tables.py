"""ggml's quantizers to four-bit tables: IQ4_NL IQ4_XS (a table of levels) and MXFP4 NVFP4 (e2m1 floats), the same bytes as llama.cpp.

Source: ``quantize_row_iq4_nl_impl``, ``best_index_int8``, ``quantize_row_mxfp4_ref``, ``quantize_row_nvfp4_ref`` in
``ggml/src/ggml-quants.c`` and ``ggml_fp32_to_ue4m3`` in ``ggml/src/ggml-impl.h`` of llama.cpp v0.5.0, compiled without contraction to
fused multiply-adds, on x86-64.

IQ4_NL, IQ4_XS, each block of 32 weights x, errors weighted by x^2, or with importances q by q sqrt(2 mean x^2 + x^2), the mean over
32 (IQ4_NL) or 256 weights (IQ4_XS): of 16 inverse scales (``level_tries``) around the largest weight's, each with every weight at its
nearest level, the one whose least-squares scale has the least error wins. IQ4_NL stores that scale; IQ4_XS rounds eight of them to six bits
under d = -largest / 32. Then each weight gets its nearest level under the float32 scale (d times the six bits in IQ4_XS).

MXFP4: scale 2^(floor(log2(max |x|)) - 2), the logarithm rounded to float32 first, which lifts a maximum just below a power of two.
NVFP4: scale max |x| / 6 as ue4m3, ties up, for each 16 weights. Codes are the nearest level, of two the one nearer to zero; code 8 (-0)
is never written. Importances change nothing. The blocks are llama.cpp's row quantizer's: no tensor-wide factor is made beside NVFP4, so
weights well below 6 * 2^-6 have few scales to choose from, and blocks below 6 * 2^-10 become zeros.

One difference: MXFP4 blocks with a maximum below 2^-125 wrap round to huge scale bytes in llama.cpp, with all codes 0. The same byte is
written here, but not 255, which is NaN to all other readers: there the byte is 0 (and all weights 0, as llama.cpp reads its own).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from qformats.formats.ggml.iquants import IQUANTS
from qformats.formats.ggml.tables import TABLES
from qformats.loops import find
from qformats.quantize.affine import bounded, half
from qformats.quantize.kquants import importance_of
from qformats.quantize.ksearch import EPSILON, nearest, ordered_sum, over
from qformats.quantize.weighing import error_weights

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.scheme import Storage
    from qformats.tensor import QuantizedTensor

__all__ = ["NEEDY", "TYPES", "WEIGHTED", "quantize"]

TYPES = frozenset({"iq4_nl", "iq4_xs", "mxfp4", "nvfp4"})
WEIGHTED = frozenset({"iq4_nl", "iq4_xs"})
NEEDY: frozenset[str] = frozenset()

CHUNK = 1 << 18  # weights in one go: what lies between search and codes stays in the cache
BLOCK, SUBS = 32, 8  # weights under one scale of IQ4, and such blocks in a super-block of IQ4_XS
LARGEST = {"iq4_nl": 65504.0 * 127, "iq4_xs": 65504.0 * 127 * 32, "mxfp4": 3.4e38, "nvfp4": 448.0 * 6}  # beyond, no scale is enough
MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between e2m1's magnitudes


def _loops() -> Any:
    return find("tables")


# ---------------------------------------------------------------- IQ4_NL, IQ4_XS


def nearest_level(x: Tensor) -> Tensor:
    """int64, the code of the level of IQ4_NL's table nearest to each x, of two the upper one; 15 for NaN."""
    import torch

    from qformats import grids

    levels = grids.table_values("iq4_nl").to(torch.float32).to(x.device)
    codes = torch.bucketize(x.contiguous(), (levels[:-1] + levels[1:]) / 2, right=True)
    return torch.where(torch.isnan(x), 15, codes)


@cache
def level_tries() -> tuple[float, ...]:
    """What is tried over the weight of largest magnitude, after 1 / (it / 127), which maps it to a level that does not exist."""
    return tuple(float(step - 127) for step in range(-7, 8))


def best_level_scale(x: Tensor, w: Tensor) -> Tensor:
    """float32 (B,): the scale under which x (32, B) is nearest to levels by the weights w; zero where all of x is below 1e-15."""
    import torch

    from qformats import grids

    levels, size = grids.table_values("iq4_nl").to(torch.float32).to(x.device), x.abs()
    extreme = x.gather(0, size.argmax(0, keepdim=True)).squeeze(0)

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        value = levels[nearest_level(inverse * x)]
        wl = w * value
        return ordered_sum(wl * x), ordered_sum(wl * value)

    sum_lx, sum_l2 = sums(over(1.0, extreme / torch.full_like(extreme, 127.0)))
    scale = torch.where(sum_l2 > 0, sum_lx / sum_l2, 0.0)
    best = scale * sum_lx
    for numerator in level_tries():
        sum_lx, sum_l2 = sums(over(numerator, extreme))
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = torch.where(better, sum_lx / sum_l2, scale)
        best = torch.where(better, scale * sum_lx, best)
    return torch.where(size.amax(0) < EPSILON, 0.0, scale)


def _sub_scales(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IQ4_XS: float32 scales (B,) -> d (B / 8,), s as stored (B,) and the scale of each block, d * (s - 32), in float32."""
    import torch

    each = scale.reshape(-1, SUBS)
    value = size = torch.zeros_like(each[:, 0])
    for one in each.T:  # the first of largest magnitude; NaN never counts
        larger = one.abs() > size
        value, size = torch.where(larger, one, value), torch.where(larger, one.abs(), size)
    d = -value / 32
    inverse = torch.where(d != 0, over(1.0, d), 0.0)
    whole = nearest(inverse.unsqueeze(1) * each).clamp(-32, 31)
    return d, (whole + 32).to(torch.uint8).flatten(), (d.unsqueeze(1) * whole).flatten()


def level_codes(x: Tensor, scale: Tensor) -> Tensor:
    """uint8 (B, 32): the nearest levels of x (B, 32) under ``scale`` (B,); those of 0 where it is zero."""
    import torch

    inverse = torch.where(scale != 0, over(1.0, scale), 0.0)
    return nearest_level(inverse.unsqueeze(1) * x).to(torch.uint8)


def _searched(x: Tensor, w: Tensor | None, loops: Any) -> Tensor:
    """``best_level_scale`` of blocks x (B, 32) with weights w (B, 32), x^2 for None."""
    import numpy as np
    import torch

    if loops is None:
        return best_level_scale(x.T.contiguous(), (x * x if w is None else w).T.contiguous())
    scale = np.empty(len(x), np.float32)
    weights = np.empty((0, BLOCK), np.float32) if w is None else w.numpy()
    loops.search(x.numpy(), weights, scale, np.array(level_tries(), np.float32))
    return torch.from_numpy(scale)


def _coded(x: Tensor, scale: Tensor, loops: Any) -> Tensor:
    import numpy as np
    import torch

    if loops is None:
        return level_codes(x, scale)
    out = np.empty(tuple(x.shape), np.uint8)
    loops.codes(x.numpy(), scale.numpy(), out)
    return torch.from_numpy(out)


def _levels(name: str, x: Tensor, importance: Tensor | None, loops: Any) -> tuple[Tensor, ...]:
    """The planes of IQ4_NL (codes, d) or IQ4_XS (codes, s, d) of some rows (n, K)."""
    n, k = int(x.shape[0]), int(x.shape[1])
    run = BLOCK if name == "iq4_nl" else BLOCK * SUBS
    w = None if importance is None else error_weights(x, importance, run, 2.0).reshape(-1, BLOCK)
    blocks = x.reshape(-1, BLOCK)
    scale = _searched(blocks, w, loops)
    if name == "iq4_nl":
        return _coded(blocks, scale, loops).reshape(n, k), half(scale, "scale").reshape(n, k // BLOCK)
    d, s, scale = _sub_scales(scale)
    return _coded(blocks, scale, loops).reshape(n, k), s.reshape(n, k // BLOCK), half(d, "scale").reshape(n, k // run)


# ---------------------------------------------------------------- MXFP4, NVFP4


def power_scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4: largest magnitudes (B,) -> scale bytes uint8 and the scales, float32, infinite where codes are to be zero."""
    import torch

    power = torch.floor(torch.log2(largest.to(torch.float64)).to(torch.float32))
    byte = torch.where(largest > 0, power + 125, 0.0).to(torch.int32)
    bits = torch.where(byte > 0, byte << 23, 0x00400000)  # 2^(byte - 127), of byte 0 subnormal
    scale = torch.where(byte < 0, torch.inf, bits.view(torch.float32))
    return torch.where(byte == -1, 0, byte & 255).to(torch.uint8), scale


def small_scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    """NVFP4: as ``power_scales`` with ue4m3 scales; 256 and more become 448, as in llama.cpp."""
    import torch

    from qformats import grids

    sixth = (largest / torch.full_like(largest, 6.0)).clamp(max=448.0)
    bits = sixth.view(torch.int32)
    normal = ((bits >> 19) - ((127 - 7) << 4) + 1) >> 1  # exponent and three bits of mantissa, the fourth rounded up into them
    normal = torch.where(normal >= 15 << 3, 0x7E, normal)
    subnormal = (sixth * 512.0 + 0.5).to(torch.int32).clamp(max=7)
    byte = torch.where(sixth < 2.0**-6, subnormal, normal)
    values = grids.float_values("ue4m3").to(torch.float32).to(largest.device)
    scale = values[byte.to(torch.int64)]
    return byte.to(torch.uint8), torch.where(scale > 0, scale, torch.inf)


def float_codes(x: Tensor, scale: Tensor) -> Tensor:
    """uint8 (B, run): the e2m1 codes nearest to x (B, run) under ``scale`` (B,), of two the one nearer to zero; never code 8."""
    import torch

    size, each = x.abs(), scale.unsqueeze(1)
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for middle in MIDDLES:
        codes += size > middle * each
    return torch.where((x < 0) & (codes > 0), codes + 8, codes)


def _floats(name: str, x: Tensor, loops: Any) -> tuple[Tensor, Tensor]:
    """The planes codes, scales of some rows (n, K) of MXFP4 or NVFP4."""
    import numpy as np
    import torch

    kind = TABLES[name.upper()]
    n, k, blocks = int(x.shape[0]), int(x.shape[1]), x.reshape(-1, kind.run)
    if loops is None:
        byte, scale = (power_scales if name == "mxfp4" else small_scales)(blocks.abs().amax(1))
        codes = float_codes(blocks, scale)
    else:
        made, found = np.empty(tuple(blocks.shape), np.uint8), np.empty(len(blocks), np.uint8)
        loops.FLOATS[name](blocks.numpy(), made, found)
        codes, byte = torch.from_numpy(made), torch.from_numpy(found)
    return codes.reshape(n, k), byte.reshape(n, k // kind.run)


def quantize(weights: Tensor, storage: Storage, importance: Tensor | None = None) -> QuantizedTensor:
    """float (N, K), K whole blocks -> the canonical tensor of the type ``storage`` names; ``importance``: (K,) or None."""
    import torch

    name = storage.type
    x = bounded(weights, LARGEST[name], name.upper())
    n, k = int(x.shape[0]), int(x.shape[1])
    q = importance_of(importance, k)
    loops, rows = _loops() if x.device.type == "cpu" else None, max(1, CHUNK // max(k, 1))
    parts = [
        _levels(name, x[at : at + rows], q, loops) if name in WEIGHTED else _floats(name, x[at : at + rows], loops)
        for at in range(0, max(n, 1), rows)
    ]
    planes = [torch.cat(plane) for plane in zip(*parts, strict=True)]
    if name == "iq4_xs":
        codes, s, d = planes
        return IQUANTS["IQ4_XS"].to_tensor(codes, None, s, None, d)
    return TABLES[name.upper()].to_tensor(*planes)
