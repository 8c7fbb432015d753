"""ggml's legacy blocks: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0, 32 weights each.

Source: ``block_q4_0`` … ``block_q8_0`` in ``ggml/src/ggml-common.h`` and ``dequantize_row_*`` in ``ggml/src/ggml-quants.c`` of
llama.cpp v0.5.0. All fields are little-endian; a row is K / 32 blocks and never shares one with the next row.

| type | block bytes, in file order              | weight              |
|------|-----------------------------------------|---------------------|
| Q4_0 | d f16, qs u8[16]                        | d * (q - 8)         |
| Q4_1 | d f16, m f16, qs u8[16]                 | d * q + m           |
| Q5_0 | d f16, qh u32, qs u8[16]                | d * (q - 16)        |
| Q5_1 | d f16, m f16, qh u32, qs u8[16]         | d * q + m           |
| Q8_0 | d f16, qs i8[32]                        | d * q               |

Nibbles are split in halves: byte j of ``qs`` holds weight j in its low and weight j + 16 in its high nibble. Bit i of ``qh`` is the
fifth bit of weight i. So codes 0, 1, …, 7 in weights 0 … 7 and 8 … 15 in weights 16 … 23 are the eight bytes 80 91 a2 b3 c4 d5 e6 f7.

``unpack_blocks`` and ``pack_blocks`` are the definition, in torch; ``qformats.loops.ggml`` does the same in one pass over the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qformats.formats.ggml.kind import PlaneSpec
from qformats.scheme import Integer, ParamSpec, Scheme, Storage, Tile, whole

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["LEGACY", "Legacy"]

BLOCK = 32


@dataclass(frozen=True, slots=True)
class Legacy:
    """One type: its ggml name, code bits, bytes a block, the constant zero point, whether it has a minimum ``m``."""

    name: str
    bits: int
    nbytes: int
    zero_point: int | None = None
    has_offset: bool = False

    @property
    def grid(self) -> Integer:
        return Integer(self.bits, signed=self.bits == 8)

    @property
    def halves(self) -> tuple[int, ...]:
        """Where the fp16 fields start in a block."""
        return (0, 2) if self.has_offset else (0,)

    @property
    def block(self) -> int:
        return BLOCK

    @property
    def swaps(self) -> tuple[tuple[int, int], ...]:
        """The fp16 fields, and Q5's u32 ``qh``, which ggml copies as one word."""
        halves = tuple((at, 2) for at in self.halves)
        return (*halves, (2 * len(halves), 4)) if self.bits == 5 else halves

    @property
    def plane_specs(self) -> tuple[PlaneSpec, ...]:
        """codes, d, m."""
        codes = PlaneSpec("int8" if self.grid.signed else "uint8", BLOCK)
        return codes, PlaneSpec("float16", 1), PlaneSpec("float16", int(self.has_offset))

    @property
    def storage(self) -> Storage:
        return Storage(
            self.name.lower(),
            self.grid,
            BLOCK,
            self.nbytes * 8 / BLOCK,
            zero_point=self.zero_point,
            offset="float16" if self.has_offset else None,
            k_multiple=BLOCK,
        )

    def scheme(self, shape: tuple[int, ...]) -> Scheme:
        """The scheme of a weight ``shape`` (K last) in this type."""
        block = Tile((*(1,) * (len(shape) - 1), BLOCK))
        half = ParamSpec("float16", block)
        zero = None if self.zero_point is None else ParamSpec("int16", whole(shape), constant=float(self.zero_point))
        return Scheme(shape, self.grid, (half,), zero, half if self.has_offset else None)

    def unpack_params(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """d and m of ``unpack_blocks`` alone."""
        import torch

        b = blocks.reshape(blocks.shape[0], blocks.shape[1] // self.nbytes, self.nbytes)  # (N, B, nbytes)
        d = b[..., 0:2].contiguous().view(torch.float16).squeeze(-1)
        return d, b[..., 2:4].contiguous().view(torch.float16).squeeze(-1) if self.has_offset else None

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """uint8 (N, K/32 * nbytes) -> codes uint8 or int8 (N, K), d float16 (N, K/32), m float16 (N, K/32) or None."""
        import torch

        b = blocks.reshape(blocks.shape[0], blocks.shape[1] // self.nbytes, self.nbytes)  # (N, B, nbytes)
        d, m = self.unpack_params(blocks)
        if self.bits == 8:
            return b[..., 2:].contiguous().view(torch.int8).flatten(-2), d, None
        qs = b[..., -16:]
        codes = torch.cat([qs & 15, qs >> 4], -1)  # (N, B, 32)
        if self.bits == 5:
            qh = b[..., -20:-16].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=b.device)  # (N, B, 4, 8)
            codes |= (qh & 1).flatten(-2) << 4
        return codes.flatten(-2), d, m

    def pack_blocks(self, codes: Tensor, d: Tensor, m: Tensor | None = None) -> Tensor:
        """The inverse of ``unpack_blocks``; codes must lie on the type's grid."""
        import torch

        q = codes.view(torch.uint8).reshape(*d.shape, BLOCK)  # (N, B, 32)
        fields = [d.contiguous().unsqueeze(-1).view(torch.uint8)]
        if m is not None:
            fields.append(m.contiguous().unsqueeze(-1).view(torch.uint8))
        if self.bits == 8:
            return torch.cat([*fields, q], -1).flatten(-2)
        if self.bits == 5:
            bits = (q >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8, device=q.device)
            fields.append(bits.sum(-1, dtype=torch.uint8))
        fields.append((q[..., :16] & 15) | (q[..., 16:] << 4))
        return torch.cat(fields, -1).flatten(-2)

    def dequantize_blocks(self, blocks: Tensor) -> Tensor:
        """uint8 (N, row bytes) -> float32 (N, K) in ggml's order: one product, then one sum where there is a minimum."""
        import torch

        codes, d, m = self.unpack_blocks(blocks)
        centred = codes.to(torch.float32) - float(self.zero_point or 0)
        w = centred.reshape(*d.shape, BLOCK) * d.to(torch.float32).unsqueeze(-1)
        w = w if m is None else w + m.to(torch.float32).unsqueeze(-1)
        values: Tensor = w.flatten(-2)
        return values

    def to_tensor(self, codes: Tensor, d: Tensor, m: Tensor | None) -> QuantizedTensor:
        """The planes as a canonical tensor (N, K)."""
        from qformats.tensor import Param, QuantizedTensor, constant

        shape, block = (int(codes.shape[0]), int(codes.shape[1])), Tile((1, BLOCK))
        zero = None if self.zero_point is None else constant(self.zero_point, shape)
        return QuantizedTensor(shape, codes, self.grid, (Param(d, block),), zero, None if m is None else Param(m, block))

    def planes(self, tensor: QuantizedTensor) -> tuple[Any, Any, Any]:
        """codes, d, m (or None) of a canonical tensor in this type's form."""
        return tensor.codes, tensor.scales[0].values, None if tensor.offset is None else tensor.offset.values


LEGACY = {
    kind.name: kind
    for kind in (
        Legacy("Q4_0", 4, 18, zero_point=8),
        Legacy("Q4_1", 4, 20, has_offset=True),
        Legacy("Q5_0", 5, 22, zero_point=16),
        Legacy("Q5_1", 5, 24, has_offset=True),
        Legacy("Q8_0", 8, 34),
    )
}
