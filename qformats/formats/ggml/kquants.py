"""ggml's K-quants with integer codes: super-blocks of 256 weights whose sub-scales are themselves codes.

Source: ``block_q4_K`` … in ``ggml/src/ggml-common.h``, ``get_scale_min_k4`` and ``dequantize_row_*_K`` in ``ggml/src/ggml-quants.c`` of
llama.cpp v0.5.0. All fields are little-endian; a row is K / 256 super-blocks.

| type | super-block bytes, in file order                             | weight                       | sub-block |
|------|--------------------------------------------------------------|------------------------------|-----------|
| Q4_K | d f16, dmin f16, scales u8[12], qs u8[128]                   | d * sc * q - dmin * m        | 32        |
| Q5_K | d f16, dmin f16, scales u8[12], qh u8[32], qs u8[128]        | d * sc * q - dmin * m        | 32        |

``scales`` holds eight 6-bit sc and eight 6-bit m: for j < 4, byte j = sc[j] + (sc[j+4] >> 4 << 6), byte j + 4 = m[j] + (m[j+4] >> 4 << 6)
and byte j + 8 = (sc[j+4] & 15) + ((m[j+4] & 15) << 4). With sc = 1 and m = 8 everywhere: 01×4 08×4 81×4.
Byte 32 c + l of ``qs`` holds weight 64 c + l in its low and weight 64 c + 32 + l in its high nibble; bit j of ``qh`` byte l is the
fifth bit of weight 32 j + l.

The sign of ``dmin`` is flipped at this door, so that offset = (-dmin) * m is added. ``unpack_blocks`` and ``pack_blocks`` are the
definition, in torch; ``qformats.loops.ggml`` does the same in one pass over the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qformats.scheme import Integer, ParamSpec, Scheme, Storage, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["KQUANTS", "KQuant", "dequantize_blocks", "pack_blocks", "unpack_blocks"]

SUPER = 256
SUB = 32
_SIGN = -32768  # the sign bit of an fp16 seen as int16


@dataclass(frozen=True, slots=True)
class KQuant:
    """One type with 6-bit sub-scales and sub-minimums: its ggml name, code bits, bytes a super-block."""

    name: str
    bits: int
    nbytes: int

    @property
    def grid(self) -> Integer:
        return Integer(self.bits)

    @property
    def halves(self) -> tuple[int, ...]:
        """Where the fp16 fields start in a super-block."""
        return 0, 2

    @property
    def storage(self) -> Storage:
        return Storage(
            self.name.lower(),
            self.grid,
            SUPER,
            self.nbytes * 8 / SUPER,
            sub_scale=(SUB, 63, 63),
            k_multiple=SUPER,
        )

    def scheme(self, shape: tuple[int, ...]) -> Scheme:
        """The scheme of a weight ``shape`` (K last) in this type."""
        lead = (1,) * (len(shape) - 1)
        half = ParamSpec("float16", Tile((*lead, SUPER // SUB)))
        nested = Scheme((*shape[:-1], shape[-1] // SUB), Integer(6), (half,))
        spec = ParamSpec("codes", Tile((*lead, SUB)), nested=nested)
        return Scheme(shape, self.grid, (spec,), None, spec)


KQUANTS = {kind.name: kind for kind in (KQuant("Q4_K", 4, 144), KQuant("Q5_K", 5, 176))}

Planes = tuple[Any, Any, Any, Any, Any]  # codes, sc, m, d, dmin


def _unpack_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (N, S, 12) -> sc, m uint8 (N, S, 8)."""
    import torch

    low, mid, high = b[..., 0:4], b[..., 4:8], b[..., 8:12]
    sc = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], -1)
    m = torch.cat([mid & 63, (high >> 4) | ((mid >> 6) << 4)], -1)
    return sc, m


def _pack_scales(sc: Tensor, m: Tensor) -> Tensor:
    """The inverse of ``_unpack_scales``."""
    import torch

    low = sc[..., :4] | ((sc[..., 4:] >> 4) << 6)
    mid = m[..., :4] | ((m[..., 4:] >> 4) << 6)
    return torch.cat([low, mid, (sc[..., 4:] & 15) | ((m[..., 4:] & 15) << 4)], -1)


def unpack_params(kind: KQuant, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sc, m, d and dmin of ``unpack_blocks`` alone."""
    import torch

    b = blocks.reshape(blocks.shape[0], blocks.shape[1] // kind.nbytes, kind.nbytes)  # (N, S, nbytes)
    d = b[..., 0:2].contiguous().view(torch.float16).squeeze(-1)
    dmin = b[..., 2:4].contiguous().view(torch.float16).squeeze(-1)
    sc, m = _unpack_scales(b[..., 4:16])
    return sc.flatten(1), m.flatten(1), d, dmin


def unpack_blocks(kind: KQuant, blocks: Tensor) -> Planes:
    """uint8 (N, K/256 * nbytes) -> codes uint8 (N, K), sc and m uint8 (N, K/32), d and dmin float16 (N, K/256)."""
    import torch

    b = blocks.reshape(blocks.shape[0], blocks.shape[1] // kind.nbytes, kind.nbytes)  # (N, S, nbytes)
    qs = b[..., -128:].unflatten(-1, (4, SUB))  # (N, S, 4, 32)
    codes = torch.stack([qs & 15, qs >> 4], -2).flatten(-3, -2)  # (N, S, 8, 32)
    if kind.bits == 5:
        bits = b[..., 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8, device=b.device).unsqueeze(-1)
        codes |= (bits & 1) << 4
    return codes.flatten(1), *unpack_params(kind, blocks)


def pack_blocks(kind: KQuant, codes: Tensor, sc: Tensor, m: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """The inverse of ``unpack_blocks``; codes, sc and m must lie on their grids."""
    import torch

    q = codes.reshape(*d.shape, 4, 2, SUB)  # (N, S, 4, 2, 32)
    fields = [d.contiguous().unsqueeze(-1).view(torch.uint8), dmin.contiguous().unsqueeze(-1).view(torch.uint8)]
    fields.append(_pack_scales(sc.reshape(*d.shape, 8), m.reshape(*d.shape, 8)))
    if kind.bits == 5:
        shifts = torch.arange(8, dtype=torch.uint8, device=q.device).unsqueeze(-1)
        fields.append(((q >> 4).flatten(-3, -2) << shifts).sum(-2, dtype=torch.uint8))
    fields.append(((q[..., 0, :] & 15) | (q[..., 1, :] << 4)).flatten(-2))
    return torch.cat(fields, -1).flatten(1)


def dequantize_blocks(kind: KQuant, blocks: Tensor) -> Tensor:
    """uint8 (N, row bytes) -> float32 (N, K) in ggml's order: ``(d * sc) * q - (dmin * m)``."""
    import torch

    codes, sc, m, d, dmin = unpack_blocks(kind, blocks)
    single = torch.float32
    scale = d.to(single).repeat_interleave(8, -1) * sc.to(single)
    minimum = dmin.to(single).repeat_interleave(8, -1) * m.to(single)
    w = codes.to(single).reshape(*scale.shape, SUB) * scale.unsqueeze(-1) - minimum.unsqueeze(-1)
    values: Tensor = w.flatten(-2)
    return values


def flip_sign(half: Tensor) -> Tensor:
    """-dmin for dmin and back, by the sign bit, so that zeros and every other bit pattern survive the round trip."""
    import torch

    return (half.contiguous().view(torch.int16) ^ _SIGN).view(torch.float16)


def to_tensor(kind: KQuant, codes: Tensor, sc: Tensor, m: Tensor, d: Tensor, dmin: Tensor) -> QuantizedTensor:
    """The planes as a canonical tensor (N, K) whose scale and offset are themselves codes."""
    from qformats.tensor import Param, QuantizedTensor

    shape, small = (int(codes.shape[0]), int(codes.shape[1])), (int(sc.shape[0]), int(sc.shape[1]))
    per_super, per_sub = Tile((1, SUPER // SUB)), Tile((1, SUB))
    scale = QuantizedTensor(small, sc, Integer(6), (Param(d, per_super),))
    offset = QuantizedTensor(small, m, Integer(6), (Param(flip_sign(dmin), per_super),))
    return QuantizedTensor(shape, codes, kind.grid, (Param(scale, per_sub),), None, Param(offset, per_sub))


def planes(kind: KQuant, tensor: QuantizedTensor) -> Planes:
    """codes, sc, m, d, dmin of a canonical tensor in this type's form."""
    scale: Any = tensor.scales[0].values
    offset: Any = tensor.offset.values if tensor.offset is not None else None
    return tensor.codes, scale.codes, offset.codes, scale.scales[0].values, flip_sign(offset.scales[0].values)
