"""ggml's block quantizers: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0, the same bytes as llama.cpp writes. With importances see ``legacy_search``.

Source: ``quantize_row_q4_0_ref`` … ``quantize_row_q8_0_ref`` in ``ggml/src/ggml-quants.c`` of llama.cpp v0.5.0 (what
``ggml_quantize_chunk`` calls), in float32, with weights divided by the scale before it is rounded. Blocks of 32:

| type        | scale d (rounded to fp16 when stored) | code                                  | error bound, d and m as stored        |
|-------------|---------------------------------------|---------------------------------------|---------------------------------------|
| Q4_0, Q5_0  | x / -2^(b-1), x the first of max|x|   | min(2^b - 1, floor(x / d + z + 1/2))  | |d| (1 on the far side, else 1/2 + e) |
| Q4_1, Q5_1  | (max - min) / (2^b - 1), m = min      | floor((x - m) / d + 1/2)              | d (1/2 + e) + |m| 2^-11               |
| Q8_0        | max|x| / 127                          | round half away from zero (x / d)     | d (1/2 + e)                           |

e = 2^b * 2^-11 comes from storing d in fp16 (below 2^-14: an absolute 2^-25 a step instead). "The far side" are values near -x, whose
code 2^b does not exist. Where d is so small that 1 / d overflows float32, ggml's codes come out of converting infinities: 0 on x86, and 0
here; d itself is then stored as zero. The torch functions are the definition, ``qformats.loops.quantize`` does the same in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from qformats.loops import find
from qformats.quantize.affine import bounded, checked, half
from qformats.quantize.kquants import importance_of
from qformats.quantize.ksearch import over
from qformats.quantize.legacy_search import TOPS, searched
from qformats.scheme import Storage, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["NEEDY", "QUANTIZERS", "TYPES", "WEIGHTED", "quantize"]

BLOCK = 32


def _first(x: Tensor, mask: Tensor) -> Tensor:
    """The value at the first set place of ``mask`` in each block, sign of zero included."""
    import torch

    return x.gather(-1, mask.to(torch.uint8).argmax(-1, keepdim=True)).squeeze(-1)


def _inverse(d: Tensor) -> Tensor:
    import torch

    return torch.where(d != 0, over(1.0, d), 0.0).unsqueeze(-1)


def _truncate(codes: Tensor, highest: int) -> Tensor:
    """C's conversion to an integer, then the upper limit; infinities and NaN become 0 as on x86."""
    import torch

    return torch.where(torch.isfinite(codes), codes, 0.0).clamp(0, highest).to(torch.uint8)


def _centred(x: Tensor, bits: int) -> tuple[Tensor, Tensor, None]:
    import torch

    size = x.abs()
    largest = size.amax(-1)
    extreme = torch.where(largest > 0, _first(x, size == largest.unsqueeze(-1)), 0.0)
    d = extreme / -float(1 << (bits - 1))
    codes = x * _inverse(d) + (float(1 << (bits - 1)) + 0.5)
    return _truncate(codes, (1 << bits) - 1), d, None


def _with_minimum(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    low = _first(x, x == x.amin(-1, keepdim=True))
    d = (x.amax(-1) - low + 0.0) / torch.full_like(low, (1 << bits) - 1)  # of zeros of both signs the difference is +0
    codes = (x - low.unsqueeze(-1)) * _inverse(d) + 0.5
    return _truncate(codes, (1 << bits) - 1), d, low


def _bytes(x: Tensor) -> tuple[Tensor, Tensor, None]:
    import torch

    largest = x.abs().amax(-1)
    d = largest / torch.full_like(largest, 127)
    scaled = x * _inverse(d)
    scaled = torch.where(torch.isfinite(scaled), scaled, 0.0)
    whole = torch.trunc(scaled)
    codes = whole + torch.where((scaled - whole).abs() >= 0.5, torch.sign(scaled), 0.0)
    return codes.to(torch.int8), d, None


QUANTIZERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]] = {
    "q4_0": lambda x: _centred(x, 4),
    "q4_1": lambda x: _with_minimum(x, 4),
    "q5_0": lambda x: _centred(x, 5),
    "q5_1": lambda x: _with_minimum(x, 5),
    "q8_0": _bytes,
}
TYPES = frozenset(QUANTIZERS)
WEIGHTED = frozenset(TOPS)
NEEDY: frozenset[str] = frozenset()


def _loops() -> Any:
    return find("quantize")


def _compiled(loops: Any, blocks: Tensor, storage: Storage) -> tuple[Tensor, Tensor, Tensor | None, list[float]]:
    """What ``QUANTIZERS`` define, in one pass, and the largest magnitudes in d and m (NaN if any value is)."""
    import numpy as np
    import torch

    x = blocks.contiguous().numpy().reshape(blocks.shape[0] * blocks.shape[1], BLOCK)
    codes = np.empty(x.shape, np.int8 if storage.integers.signed else np.uint8)
    d = np.empty(len(x), np.float32)
    m = np.empty(len(x) if storage.offset else 0, np.float32)
    tops = np.zeros(2, np.uint32)
    loops.QUANTIZE[storage.type](x, codes, d, m, tops)
    shape = blocks.shape[:2]
    low = torch.from_numpy(m).reshape(shape) if storage.offset else None
    return torch.from_numpy(codes).reshape(blocks.shape), torch.from_numpy(d).reshape(shape), low, tops.view(np.float32).tolist()


def _halved(values: Tensor, top: float | None, what: str) -> Tensor:
    """``half``; without its check where ``top``, the largest magnitude in ``values``, is known and harmless."""
    import torch

    return values.to(torch.float16) if top is not None and top < 65520 else half(values, what)


def quantize(weights: Tensor, storage: Storage, importance: Tensor | None = None) -> QuantizedTensor:
    """float (N, K) -> the canonical tensor of a legacy ggml type (K a multiple of 32); ``importance``: (K,) or None."""
    import torch

    from qformats.tensor import Param, QuantizedTensor, constant

    name, m = storage.type, None
    tops: Sequence[float | None] = (None, None)
    n, k = int(weights.shape[0]), int(weights.shape[1])
    if importance is None:
        loops = _loops() if weights.device.type == "cpu" else None
        w = checked(weights) if loops is None else weights.to(torch.float32)
        blocks = w.reshape(n, k // BLOCK, BLOCK)
        if loops is None:
            codes, d, m = QUANTIZERS[name](blocks)
        else:
            codes, d, m, tops = _compiled(loops, blocks, storage)
            if not isfinite(tops[0]):  # as the loops make it for every block with a NaN or an infinity
                checked(w)
    else:
        w = bounded(weights, 65504.0 * (TOPS[name] + 1), name.upper())
        q = importance_of(importance, k)
        assert q is not None
        codes, d, low = searched(name, w, q)
        m = low if storage.offset else None
    block = Tile((1, BLOCK))
    zero = constant(storage.zero_point, (n, k)) if isinstance(storage.zero_point, int) else None
    offset = None if m is None else Param(_halved(m, tops[1], "minimum"), block)
    return QuantizedTensor((n, k), codes.reshape(n, k), storage.grid, (Param(_halved(d, tops[0], "scale"), block),), zero, offset)
