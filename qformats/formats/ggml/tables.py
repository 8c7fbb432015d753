"""ggml's four-bit codes of a fixed table: IQ4_NL, and the microscaling floats MXFP4 and NVFP4.

Source: ``block_iq4_nl``, ``block_mxfp4``, ``block_nvfp4`` and ``kvalues_*`` in ``ggml/src/ggml-common.h``, ``ggml_e8m0_to_fp32_half``
and ``ggml_ue4m3_to_fp32`` in ``ggml/src/ggml-impl.h``, ``dequantize_row_*`` in ``ggml/src/ggml-quants.c`` of llama.cpp v0.5.0.

| type   | weights | block bytes, in file order | weight                 | under one scale |
|--------|---------|----------------------------|------------------------|-----------------|
| IQ4_NL | 32      | d f16, qs u8[16]           | d * iq4_nl[q]          | 32              |
| MXFP4  | 32      | e u8, qs u8[16]            | 2^(e - 127) * e2m1[q]  | 32              |
| NVFP4  | 64      | d ue4m3[4], qs u8[32]      | d * e2m1[q]            | 16              |

Nibbles are split in halves of the weights under one scale: byte j of ``qs`` holds weight j in its low nibble and weight j + 16 (NVFP4:
j + 8, eight bytes for each of the four scales) in its high one. So the e2m1 codes 1 and 10, for 0.5 and -1, in weights 0 and 16 of an
MXFP4 block are the byte a1; checkpoints of other libraries put neighbours there.

ggml multiplies doubled table values (0 1 2 3 4 6 8 12 …) by half the scale, which is the same real number; its zero of code 8 is +0,
that of the e2m1 grid -0. An MXFP4 scale byte of 255, NaN in the OCP specification and so in the canonical tensor, is 2^128 to ggml and
to ``dequantize_blocks``. NVFP4's factor for the whole tensor is a tensor of its own, ``.scale`` beside ``.weight``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from qformats.formats.ggml.kind import PlaneSpec
from qformats.scheme import Float, Grid, Integer, ParamSpec, Scheme, Storage, Table, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["TABLES", "FourBits"]

Planes = tuple[Any, Any]  # codes, scales


@dataclass(frozen=True, slots=True)
class FourBits:
    """One type: ggml name, weights a block, weights under one scale, the codes' grid, the scales' grid (None: fp16)."""

    name: str
    block: int
    run: int
    grid: Grid
    scale_grid: Float | None = None

    @property
    def scale_nbytes(self) -> int:
        """Bytes of all scales of a block, which come first."""
        return self.block // self.run * (2 if self.scale_grid is None else 1)

    @property
    def nbytes(self) -> int:
        return self.scale_nbytes + self.block // 2

    @property
    def halves(self) -> tuple[int, ...]:
        """Where the fp16 field starts, if there is one."""
        return (0,) if self.scale_grid is None else ()

    @property
    def swaps(self) -> tuple[tuple[int, int], ...]:
        return tuple((at, 2) for at in self.halves)

    @property
    def plane_specs(self) -> tuple[PlaneSpec, ...]:
        """codes, scales."""
        return PlaneSpec("uint8", self.block), PlaneSpec("float16" if self.scale_grid is None else "uint8", self.block // self.run)

    @property
    def storage(self) -> Storage:
        """The type by name and size; ``values`` and ``scales`` name the grids that its codes must have already."""
        values = self.grid.name if isinstance(self.grid, (Float, Table)) else ""
        grids: dict[str, object] = {"values": values, "scales": self.scale_grid.name if self.scale_grid else "float16"}
        return Storage(self.name.lower(), Integer(4), self.run, self.nbytes * 8 / self.block, k_multiple=self.block, options=grids)

    def scheme(self, shape: tuple[int, ...]) -> Scheme:
        """The scheme of a weight ``shape`` (K last) in this type."""
        tile = Tile((*(1,) * (len(shape) - 1), self.run))
        if self.scale_grid is None:
            return Scheme(shape, self.grid, (ParamSpec("float16", tile),))
        nested = Scheme((*shape[:-1], shape[-1] // self.run), self.scale_grid)
        return Scheme(shape, self.grid, (ParamSpec("codes", tile, nested=nested),))

    def _blocks(self, blocks: Tensor) -> Tensor:
        return blocks.reshape(blocks.shape[0], blocks.shape[1] // self.nbytes, self.nbytes)  # (N, B, nbytes)

    def unpack_params(self, blocks: Tensor) -> tuple[Tensor]:
        """The scales of ``unpack_blocks`` alone."""
        import torch

        head = self._blocks(blocks)[..., : self.scale_nbytes].contiguous()
        return ((head if self.scale_grid else head.view(torch.float16)).flatten(1),)

    def unpack_blocks(self, blocks: Tensor) -> Planes:
        """uint8 (N, row bytes) -> codes uint8 (N, K), scales float16 or uint8 (N, K / run)."""
        import torch

        qs = self._blocks(blocks)[..., self.scale_nbytes :].unflatten(-1, (-1, self.run // 2))  # (N, B, runs, run / 2)
        return torch.cat([qs & 15, qs >> 4], -1).flatten(1), *self.unpack_params(blocks)

    def pack_blocks(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The inverse of ``unpack_blocks``; codes must be below 16."""
        import torch

        rows, across = codes.shape[0], codes.shape[1] // self.block
        q = codes.reshape(rows, across, self.block // self.run, 2, self.run // 2)
        head = scales.contiguous().view(torch.uint8).reshape(rows, across, self.scale_nbytes)
        return torch.cat([head, (q[..., 0, :] | (q[..., 1, :] << 4)).flatten(-2)], -1).flatten(1)

    def dequantize_blocks(self, blocks: Tensor) -> Tensor:
        """uint8 (N, row bytes) -> float32 (N, K): one product of a table value and a scale, doubled and halved where ggml does that."""
        import torch

        codes, scales = self.unpack_blocks(blocks)
        values = _values(self.name).to(codes.device)[codes.to(torch.int64)].reshape(*scales.shape, self.run)
        if self.scale_grid is None:
            d = scales.to(torch.float32)
        else:
            d = _half_scales(self.scale_grid.name).to(codes.device)[scales.to(torch.int64)]
        product: Tensor = (values * d.unsqueeze(-1)).flatten(-2)
        return product

    def to_tensor(self, codes: Tensor, scales: Tensor) -> QuantizedTensor:
        """The planes as a canonical tensor (N, K); small-float scales stay codes."""
        from qformats.tensor import Param, QuantizedTensor

        shape, small = (int(codes.shape[0]), int(codes.shape[1])), (int(scales.shape[0]), int(scales.shape[1]))
        held = scales if self.scale_grid is None else QuantizedTensor(small, scales, self.scale_grid)
        return QuantizedTensor(shape, codes, self.grid, (Param(held, Tile((1, self.run))),))

    def planes(self, tensor: QuantizedTensor) -> Planes:
        """codes, scales of a canonical tensor in this type's form."""
        held: Any = tensor.scales[0].values
        return tensor.codes, held if self.scale_grid is None else held.codes


TABLES = {
    kind.name: kind
    for kind in (
        FourBits("IQ4_NL", 32, 32, Table("iq4_nl")),
        FourBits("MXFP4", 32, 32, Float("e2m1"), Float("e8m0")),
        FourBits("NVFP4", 64, 16, Float("e2m1"), Float("ue4m3")),
    )
}


@cache
def _values(name: str) -> Tensor:
    """What ggml multiplies for each code, float32 (16,): the table of IQ4_NL, else twice the e2m1 values with +0 for code 8."""
    import torch

    from qformats import grids

    if name == "IQ4_NL":
        return grids.table_values("iq4_nl").to(torch.float32)
    return (grids.float_values("e2m1") * 2 + 0.0).to(torch.float32)  # -0 + 0 is +0


@cache
def _half_scales(name: str) -> Tensor:
    """Half of what each scale byte stands for, float32 (256,); in ggml e8m0 has no NaN."""
    import torch

    from qformats import grids

    values = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127) if name == "e8m0" else grids.float_values(name)
    return (values / 2).to(torch.float32)
