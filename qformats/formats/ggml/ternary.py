"""ggml's types of one scale and one or two bits a weight: Q1_0 Q2_0 and, for ternary models (BitNet b1.58, TriLMs), TQ1_0 TQ2_0.

Source: ``block_q1_0`` … ``block_tq2_0`` in ``ggml/src/ggml-common.h`` and ``dequantize_row_*`` in ``ggml/src/ggml-quants.c`` of
llama.cpp v0.5.0. The fp16 is little-endian; a row is K / block blocks.

| type  | weights | block bytes, in file order      | weight            | codes      |
|-------|---------|---------------------------------|-------------------|------------|
| Q1_0  | 128     | d f16, qs u8[16]                | d * (2 q - 1)     | 0, 1       |
| Q2_0  | 64      | d f16, qs u8[16]                | d * (q - 1)       | 0 … 3      |
| TQ1_0 | 256     | qs u8[48], qh u8[4], d f16      | d * (q - 1)       | 0, 1, 2    |
| TQ2_0 | 256     | qs u8[64], d f16                | d * (q - 1)       | 0 … 3      |

Q1_0: bit i of byte j is weight 8 j + i. Q2_0: bits 2 i and 2 i + 1 of byte j are weight 4 j + i. TQ2_0: those of byte 32 c + l are
weight 128 c + 32 i + l. (Quantizers write no code 3 in TQ2_0, but it reads as + 2 d.)

TQ1_0 holds five base-3 digits a byte: a byte b stands for the fraction b / 256, whose first digit is the first weight, and the number v
of five digits is stored as ceil(256 v / 243). Bytes 0 … 31 have digit n in weight 32 n + l, bytes 32 … 47 in weight 160 + 16 n + l, the
bytes of ``qh``, of four digits, in weight 240 + 4 n + l. So the digits 2 1 0 2 1 are v = 196 and the byte cf. Thirteen bytes that no
quantizer writes are second spellings of another byte's digits, and ``qh`` has a fifth digit that nobody reads; ``pack_blocks`` writes
the first spelling and a fifth digit of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qformats.formats.ggml.kind import PlaneSpec
from qformats.scheme import Integer, ParamSpec, Scheme, Storage, Tile, whole

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["SPELLINGS", "TERNARY", "LowBits"]

Planes = tuple[Any, Any]  # codes, d
SPELLINGS = frozenset({"TQ1_0"})  # types whose bytes are more than their codes; a tensor read from them keeps its own bytes
_TRIT_RUNS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))  # TQ1_0: first byte, bytes, digits of a byte


@dataclass(frozen=True, slots=True)
class LowBits:
    """One type: ggml name, code bits, weights and bytes a block, where ``d`` is, the centre of the codes in halves (2 q - 1 or q - 1)."""

    name: str
    bits: int
    block: int
    nbytes: int
    d_at: int
    zero_point: float = 1

    @property
    def grid(self) -> Integer:
        return Integer(self.bits)

    @property
    def halves(self) -> tuple[int, ...]:
        """Where ``d`` starts in a block."""
        return (self.d_at,)

    @property
    def swaps(self) -> tuple[tuple[int, int], ...]:
        return ((self.d_at, 2),)

    @property
    def plane_specs(self) -> tuple[PlaneSpec, ...]:
        """codes, d."""
        return PlaneSpec("uint8", self.block), PlaneSpec("float16", 1)

    @property
    def storage(self) -> Storage:
        """The TQ types take the codes 0 … 2 that their quantizers write."""
        zero, highest = None if self.doubled else int(self.zero_point), 2 if self.name.startswith("TQ") else None
        bits = self.nbytes * 8 / self.block
        return Storage(
            self.name.lower(), self.grid, self.block, bits, zero_point=zero, k_multiple=self.block, highest=highest, doubled=self.doubled
        )

    @property
    def doubled(self) -> bool:
        """Whether the weight is 2 d * (q - 1/2)."""
        return self.zero_point != int(self.zero_point)

    def scheme(self, shape: tuple[int, ...]) -> Scheme:
        """The scheme of a weight ``shape`` (K last) in this type."""
        d = ParamSpec("float16", Tile((*(1,) * (len(shape) - 1), self.block)))
        zero = ParamSpec("float32" if self.doubled else "int16", whole(shape), constant=float(self.zero_point))
        two = (ParamSpec("int16", whole(shape), constant=2.0),) if self.doubled else ()
        return Scheme(shape, self.grid, (d, *two), zero)

    def _blocks(self, blocks: Tensor) -> Tensor:
        return blocks.reshape(blocks.shape[0], blocks.shape[1] // self.nbytes, self.nbytes)  # (N, B, nbytes)

    def unpack_params(self, blocks: Tensor) -> tuple[Tensor]:
        """d of ``unpack_blocks`` alone."""
        import torch

        b = self._blocks(blocks)
        return (b[..., self.d_at : self.d_at + 2].contiguous().view(torch.float16).squeeze(-1),)

    def unpack_blocks(self, blocks: Tensor) -> Planes:
        """uint8 (N, K / block * nbytes) -> codes uint8 (N, K), d float16 (N, K / block)."""
        b = self._blocks(blocks)
        q = b[..., 2:] if self.d_at == 0 else b[..., : self.d_at]
        return _CODES[self.name][0](q).flatten(1), *self.unpack_params(blocks)

    def pack_blocks(self, codes: Tensor, d: Tensor) -> Tensor:
        """The inverse of ``unpack_blocks``; codes must lie on the type's grid."""
        import torch

        q = _CODES[self.name][1](codes.reshape(*d.shape, self.block))
        half = d.contiguous().unsqueeze(-1).view(torch.uint8)
        return torch.cat([half, q] if self.d_at == 0 else [q, half], -1).flatten(1)

    def dequantize_blocks(self, blocks: Tensor) -> Tensor:
        """uint8 (N, row bytes) -> float32 (N, K): one product, with ±1 for Q1_0's codes."""
        import torch

        codes, d = self.unpack_blocks(blocks)
        q = codes.to(torch.float32)
        centred = q * 2 - 1 if self.doubled else q - float(self.zero_point)
        values: Tensor = (centred.reshape(*d.shape, self.block) * d.to(torch.float32).unsqueeze(-1)).flatten(-2)
        return values

    def to_tensor(self, codes: Tensor, d: Tensor) -> QuantizedTensor:
        """The planes as a canonical tensor (N, K)."""
        import torch

        from qformats.tensor import Param, QuantizedTensor, constant

        shape, scale = (int(codes.shape[0]), int(codes.shape[1])), Param(d, Tile((1, self.block)))
        if self.doubled:
            half = constant(self.zero_point, shape, torch.float32)
            return QuantizedTensor(shape, codes, self.grid, (scale, constant(2, shape)), half)
        return QuantizedTensor(shape, codes, self.grid, (scale,), constant(int(self.zero_point), shape))

    def planes(self, tensor: QuantizedTensor) -> Planes:
        """codes, d of a canonical tensor in this type's form."""
        return tensor.codes, tensor.scales[0].values


TERNARY = {
    kind.name: kind
    for kind in (
        LowBits("Q1_0", 1, 128, 18, 0, zero_point=0.5),
        LowBits("Q2_0", 2, 64, 18, 0),
        LowBits("TQ1_0", 2, 256, 54, 52),
        LowBits("TQ2_0", 2, 256, 66, 64),
    )
}


def _shifts(q: Tensor, step: int) -> Tensor:
    import torch

    return torch.arange(0, 8, step, dtype=torch.uint8, device=q.device)


# ---------------------------------------------------------------- codes: uint8 (N, B, bytes) <-> uint8 (N, B, block)


def _neighbours(bits: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Codes of ``bits`` bits beside one another in each byte, the lowest bits first."""

    def unpack(q: Tensor) -> Tensor:
        codes: Tensor = (q.unsqueeze(-1) >> _shifts(q, bits) & ((1 << bits) - 1)).flatten(-2)
        return codes

    def pack(codes: Tensor) -> Tensor:
        import torch

        q: Tensor = (codes.unflatten(-1, (-1, 8 // bits)) << _shifts(codes, bits)).sum(-1, dtype=torch.uint8)
        return q

    return unpack, pack


def _unpack_lanes(q: Tensor) -> Tensor:
    """TQ2_0: bytes 32 c + l -> weights 128 c + 32 i + l."""
    codes: Tensor = (q.unflatten(-1, (2, 1, 32)) >> _shifts(q, 2).unsqueeze(-1) & 3).flatten(-3)
    return codes


def _pack_lanes(codes: Tensor) -> Tensor:
    import torch

    q: Tensor = (codes.unflatten(-1, (2, 4, 32)) << _shifts(codes, 2).unsqueeze(-1)).sum(-2, dtype=torch.uint8).flatten(-2)
    return q


def _unpack_trits(q: Tensor) -> Tensor:
    """TQ1_0: digit n of a byte b is the integer part of 3 * frac(3^n * b / 256); uint8 products wrap as ggml's do."""
    import torch

    runs = []
    for start, width, digits in _TRIT_RUNS:
        power = torch.tensor([3**n for n in range(digits)], dtype=torch.uint8, device=q.device).unsqueeze(-1)
        fraction = q[..., start : start + width].unsqueeze(-2) * power  # (N, B, digits, width), mod 256
        runs.append((fraction.to(torch.int16) * 3 >> 8).to(torch.uint8).flatten(-2))
    return torch.cat(runs, -1)


def _pack_trits(codes: Tensor) -> Tensor:
    import torch

    fields, at = [], 0
    for _, width, digits in _TRIT_RUNS:
        power = torch.tensor([3 ** (4 - n) for n in range(digits)], dtype=torch.int32, device=codes.device).unsqueeze(-1)
        number = (codes[..., at : at + digits * width].unflatten(-1, (digits, width)) * power).sum(-2, dtype=torch.int32)
        fields.append(((number * 256 + 242) // 243).to(torch.uint8))
        at += digits * width
    return torch.cat(fields, -1)


_CODES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "Q1_0": _neighbours(1),
    "Q2_0": _neighbours(2),
    "TQ1_0": (_unpack_trits, _pack_trits),
    "TQ2_0": (_unpack_lanes, _pack_lanes),
}
