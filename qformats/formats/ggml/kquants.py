"""ggml's K-quants: super-blocks of 256 weights whose sub-block scales are themselves codes. Q2_K Q3_K Q4_K Q5_K Q6_K.

Source: ``block_q2_K`` … ``block_q6_K`` in ``ggml/src/ggml-common.h``, ``get_scale_min_k4`` and ``dequantize_row_*_K`` in
``ggml/src/ggml-quants.c`` of llama.cpp v0.5.0. All fields are little-endian; a row is K / 256 super-blocks.

| type | super-block bytes, in file order                       | weight                      | sub-block | sc, m   |
|------|--------------------------------------------------------|-----------------------------|-----------|---------|
| Q2_K | scales u8[16], qs u8[64], d f16, dmin f16              | d * sc * q - dmin * m       | 16        | 4 bits  |
| Q3_K | hmask u8[32], qs u8[64], scales u8[12], d f16          | d * (sc - 32) * (q - 4)     | 16        | 6 bits  |
| Q4_K | d f16, dmin f16, scales u8[12], qs u8[128]             | d * sc * q - dmin * m       | 32        | 6 bits  |
| Q5_K | d f16, dmin f16, scales u8[12], qh u8[32], qs u8[128]  | d * sc * q - dmin * m       | 32        | 6 bits  |
| Q6_K | ql u8[128], qh u8[64], scales i8[16], d f16            | d * sc * (q - 32)           | 16        | int8    |

Scales. Q2_K: byte j = sc[j] + 16 m[j]. Q4_K, Q5_K, for j < 4: byte j = sc[j] + (sc[j+4] >> 4 << 6),
byte j + 4 = m[j] + (m[j+4] >> 4 << 6), byte j + 8 = (sc[j+4] & 15) + ((m[j+4] & 15) << 4); so sc = 1 and m = 8 everywhere is
01 01 01 01 08 08 08 08 81 81 81 81. Q3_K: the low nibble of byte j < 8 is the low nibble of sc[j], the high one that of sc[j+8];
bits 2 i and 2 i + 1 of byte 8 + j are the top two bits of sc[4 i + j].

Codes. Q4_K, Q5_K: byte 32 c + l of ``qs`` has weight 64 c + l in its low, weight 64 c + 32 + l in its high nibble; bit j of byte l of
``qh`` is the fifth bit of weight 32 j + l. Q2_K, Q3_K: bits 2 j and 2 j + 1 of byte 32 c + l of ``qs`` are weight 128 c + 32 j + l; bit j
of byte l of ``hmask`` is the third bit of weight 32 j + l (a set bit means "no minus 4"). Q6_K: byte 64 c + l of ``ql`` has weights
128 c + l and 128 c + 64 + l in its nibbles (l < 64), bits 2 j and 2 j + 1 of byte 32 c + l of ``qh`` are the top two bits of weight
128 c + 32 j + l.

The sign of ``dmin`` is flipped at this door, so that offset = (-dmin) * m is added. ``unpack_blocks`` and ``pack_blocks`` are the
definition, in torch; ``qformats.loops.ggml`` does the same in one pass over the bytes where it has the type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qformats.formats.ggml.kind import PlaneSpec
from qformats.scheme import Integer, ParamSpec, Scheme, Storage, SubScale, Tile, whole

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["KQUANTS", "KQuant"]

SUPER = 256
_SIX = Integer(6)
_SIGN = -32768  # the sign bit of an fp16 seen as int16


@dataclass(frozen=True, slots=True)
class KQuant:
    """One type: ggml name, code bits, (field, bytes) in file order, weights a sub-block, the sub-scales' grid, constant zero points."""

    name: str
    bits: int
    fields: tuple[tuple[str, int], ...]
    sub: int
    sub_grid: Integer = _SIX
    zero_point: int | None = None
    sub_zero: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.fields)

    @property
    def has_offset(self) -> bool:
        return any(field == "dmin" for field, _ in self.fields)

    @property
    def grid(self) -> Integer:
        return Integer(self.bits)

    @property
    def halves(self) -> tuple[int, ...]:
        """Where the fp16 fields start in a super-block."""
        starts = {field: sum(size for _, size in self.fields[:i]) for i, (field, _) in enumerate(self.fields)}
        return tuple(starts[field] for field in ("d", "dmin") if field in starts)

    @property
    def block(self) -> int:
        return SUPER

    @property
    def swaps(self) -> tuple[tuple[int, int], ...]:
        return tuple((at, 2) for at in self.halves)

    @property
    def plane_specs(self) -> tuple[PlaneSpec, ...]:
        """codes, sc, m, d, dmin."""
        sc = PlaneSpec("int8" if self.sub_grid.signed else "uint8", SUPER // self.sub)
        low = int(self.has_offset)
        return PlaneSpec("uint8", SUPER), sc, PlaneSpec("uint8", low * sc.width), PlaneSpec("float16", 1), PlaneSpec("float16", low)

    @property
    def storage(self) -> Storage:
        return Storage(
            self.name.lower(),
            self.grid,
            SUPER,
            self.nbytes * 8 / SUPER,
            zero_point=self.zero_point,
            sub_scale=SubScale(self.sub, self.sub_grid, self.sub_zero or 0, self.has_offset),
            k_multiple=SUPER,
        )

    def scheme(self, shape: tuple[int, ...]) -> Scheme:
        """The scheme of a weight ``shape`` (K last) in this type."""
        lead, small = (1,) * (len(shape) - 1), (*shape[:-1], shape[-1] // self.sub)
        half = ParamSpec("float16", Tile((*lead, SUPER // self.sub)))
        nested = Scheme(small, self.sub_grid, (half,), _constant(self.sub_zero, small))
        spec = ParamSpec("codes", Tile((*lead, self.sub)), nested=nested)
        return Scheme(shape, self.grid, (spec,), _constant(self.zero_point, shape), spec if self.has_offset else None)

    def unpack_params(self, blocks: Tensor) -> tuple[Any, Any, Any, Any]:
        """sc, m, d and dmin of ``unpack_blocks`` alone."""
        f = _cut(self, blocks)
        sc, m = _SCALES[self.name][0](f["scales"])
        return sc.flatten(1), None if m is None else m.flatten(1), _half(f, "d"), _half(f, "dmin")

    def unpack_blocks(self, blocks: Tensor) -> Planes:
        """uint8 (N, K/256 * nbytes) -> codes uint8 (N, K), sc and m (N, K/sub), d and dmin float16 (N, K/256); no m, dmin in Q3_K, Q6_K."""
        codes = _CODES[self.name][0](_cut(self, blocks))
        return codes.flatten(1), *self.unpack_params(blocks)

    def pack_blocks(self, codes: Tensor, sc: Tensor, m: Any, d: Tensor, dmin: Any) -> Tensor:
        """The inverse of ``unpack_blocks``; codes, sc and m must lie on their grids."""
        import torch

        subs = (*d.shape, SUPER // self.sub)
        f = _CODES[self.name][1](codes.reshape(*d.shape, SUPER))
        f["scales"] = _SCALES[self.name][1](sc.reshape(subs), None if m is None else m.reshape(subs))
        f["d"] = d.contiguous().unsqueeze(-1).view(torch.uint8)
        if dmin is not None:
            f["dmin"] = dmin.contiguous().unsqueeze(-1).view(torch.uint8)
        return torch.cat([f[field] for field, _ in self.fields], -1).flatten(1)

    def dequantize_blocks(self, blocks: Tensor) -> Tensor:
        """uint8 (N, row bytes) -> float32 (N, K) in ggml's order: ``(d * sc) * q``, then ``- dmin * m`` where there is a minimum."""
        import torch

        codes, sc, m, d, dmin = self.unpack_blocks(blocks)
        single, subs = torch.float32, SUPER // self.sub
        scale = d.to(single).repeat_interleave(subs, -1) * (sc.to(single) - float(self.sub_zero or 0))
        w = (codes.to(single) - float(self.zero_point or 0)).reshape(*scale.shape, self.sub) * scale.unsqueeze(-1)
        if m is not None:
            w = w - (dmin.to(single).repeat_interleave(subs, -1) * m.to(single)).unsqueeze(-1)
        values: Tensor = w.flatten(-2)
        return values

    def to_tensor(self, codes: Tensor, sc: Tensor, m: Any, d: Tensor, dmin: Any) -> QuantizedTensor:
        """The planes as a canonical tensor (N, K) whose scale and offset are themselves codes."""
        from qformats.tensor import Param, QuantizedTensor, constant

        shape, small = (int(codes.shape[0]), int(codes.shape[1])), (int(sc.shape[0]), int(sc.shape[1]))
        per_super, per_sub = Tile((1, SUPER // self.sub)), Tile((1, self.sub))
        sub_zero = None if self.sub_zero is None else constant(self.sub_zero, small)
        scale = QuantizedTensor(small, sc, self.sub_grid, (Param(d, per_super),), sub_zero)
        zero = None if self.zero_point is None else constant(self.zero_point, shape)
        offset = None if m is None else Param(QuantizedTensor(small, m, self.sub_grid, (Param(flip_sign(dmin), per_super),)), per_sub)
        return QuantizedTensor(shape, codes, self.grid, (Param(scale, per_sub),), zero, offset)

    def planes(self, tensor: QuantizedTensor) -> Planes:
        """codes, sc, m, d, dmin of a canonical tensor in this type's form."""
        scale: Any = tensor.scales[0].values
        if tensor.offset is None:
            return tensor.codes, scale.codes, None, scale.scales[0].values, None
        offset: Any = tensor.offset.values
        return tensor.codes, scale.codes, offset.codes, scale.scales[0].values, flip_sign(offset.scales[0].values)


def _constant(value: int | None, shape: tuple[int, ...]) -> ParamSpec | None:
    return None if value is None else ParamSpec("int16", whole(shape), constant=float(value))


_HALVES = (("d", 2), ("dmin", 2))
KQUANTS = {
    kind.name: kind
    for kind in (
        KQuant("Q2_K", 2, (("scales", 16), ("qs", 64), *_HALVES), 16, Integer(4)),
        KQuant("Q3_K", 3, (("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2)), 16, zero_point=4, sub_zero=32),
        KQuant("Q4_K", 4, (*_HALVES, ("scales", 12), ("qs", 128)), 32),
        KQuant("Q5_K", 5, (*_HALVES, ("scales", 12), ("qh", 32), ("qs", 128)), 32),
        KQuant("Q6_K", 6, (("ql", 128), ("qh", 64), ("scales", 16), ("d", 2)), 16, Integer(8, signed=True), zero_point=32),
    )
}

Fields = dict[str, Any]  # field name -> uint8 (N, S, bytes)
Planes = tuple[Any, Any, Any, Any, Any]  # codes, sc, m or None, d, dmin or None


def _bits_at(values: Tensor, shifts: range) -> Tensor:
    """uint8 (…, w) -> (…, len(shifts), w): the values shifted right by each of ``shifts``."""
    import torch

    return values.unsqueeze(-2) >> torch.tensor(list(shifts), dtype=torch.uint8, device=values.device).unsqueeze(-1)


def _gathered(values: Tensor, shifts: range) -> Tensor:
    """The inverse of masking ``_bits_at``: (…, len(shifts), w) -> (…, w), each shifted left and summed."""
    import torch

    return (values << torch.tensor(list(shifts), dtype=torch.uint8, device=values.device).unsqueeze(-1)).sum(-2, dtype=torch.uint8)


# ---------------------------------------------------------------- codes: fields <-> uint8 (N, S, 256)


def _codes2(f: Fields) -> Tensor:
    return (_bits_at(f["qs"].unflatten(-1, (2, 32)), range(0, 8, 2)) & 3).flatten(-3)


def _fields2(q: Tensor) -> Fields:
    return {"qs": _gathered(q.unflatten(-1, (2, 4, 32)), range(0, 8, 2)).flatten(-2)}


def _codes3(f: Fields) -> Tensor:
    return _codes2(f) | ((_bits_at(f["hmask"], range(8)) & 1) << 2).flatten(-2)


def _fields3(q: Tensor) -> Fields:
    return {"hmask": _gathered((q >> 2).unflatten(-1, (8, 32)), range(8)), **_fields2(q & 3)}


def _codes4(f: Fields) -> Tensor:
    return (_bits_at(f["qs"].unflatten(-1, (4, 32)), range(0, 8, 4)) & 15).flatten(-3)


def _fields4(q: Tensor) -> Fields:
    return {"qs": _gathered((q & 15).unflatten(-1, (4, 2, 32)), range(0, 8, 4)).flatten(-2)}


def _codes5(f: Fields) -> Tensor:
    return _codes4(f) | ((_bits_at(f["qh"], range(8)) & 1) << 4).flatten(-2)


def _fields5(q: Tensor) -> Fields:
    return {"qh": _gathered((q >> 4).unflatten(-1, (8, 32)), range(8)), **_fields4(q)}


def _codes6(f: Fields) -> Tensor:
    low = (_bits_at(f["ql"].unflatten(-1, (2, 64)), range(0, 8, 4)) & 15).flatten(-3)
    return low | ((_bits_at(f["qh"].unflatten(-1, (2, 32)), range(0, 8, 2)) & 3) << 4).flatten(-3)


def _fields6(q: Tensor) -> Fields:
    low = _gathered((q & 15).unflatten(-1, (2, 2, 64)), range(0, 8, 4)).flatten(-2)
    return {"ql": low, "qh": _gathered((q >> 4).unflatten(-1, (2, 4, 32)), range(0, 8, 2)).flatten(-2)}


# ---------------------------------------------------------------- sub-scales: bytes <-> sc, m (N, S, 8 or 16)


def _scales2(b: Tensor) -> tuple[Tensor, Tensor | None]:
    return b & 15, b >> 4


def _bytes2(sc: Tensor, m: Any) -> Tensor:
    packed: Tensor = sc | (m << 4)
    return packed


def _scales3(b: Tensor) -> tuple[Tensor, Tensor | None]:
    low = (_bits_at(b[..., :8], range(0, 8, 4)) & 15).flatten(-2)
    return low | ((_bits_at(b[..., 8:], range(0, 8, 2)) & 3) << 4).flatten(-2), None


def _bytes3(sc: Tensor, m: Any) -> Tensor:
    import torch

    low = _gathered((sc & 15).unflatten(-1, (2, 8)), range(0, 8, 4))
    return torch.cat([low, _gathered((sc >> 4).unflatten(-1, (4, 4)), range(0, 8, 2))], -1)


def _scales4(b: Tensor) -> tuple[Tensor, Tensor | None]:
    import torch

    low, mid, high = b[..., 0:4], b[..., 4:8], b[..., 8:12]
    sc = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], -1)
    return sc, torch.cat([mid & 63, (high >> 4) | ((mid >> 6) << 4)], -1)


def _bytes4(sc: Tensor, m: Any) -> Tensor:
    import torch

    low = sc[..., :4] | ((sc[..., 4:] >> 4) << 6)
    mid = m[..., :4] | ((m[..., 4:] >> 4) << 6)
    return torch.cat([low, mid, (sc[..., 4:] & 15) | ((m[..., 4:] & 15) << 4)], -1)


def _scales6(b: Tensor) -> tuple[Tensor, Tensor | None]:
    import torch

    return b.contiguous().view(torch.int8), None


def _bytes6(sc: Tensor, m: Any) -> Tensor:
    import torch

    return sc.contiguous().view(torch.uint8)


_CODES: dict[str, tuple[Callable[[Fields], Tensor], Callable[[Tensor], Fields]]] = {
    "Q2_K": (_codes2, _fields2),
    "Q3_K": (_codes3, _fields3),
    "Q4_K": (_codes4, _fields4),
    "Q5_K": (_codes5, _fields5),
    "Q6_K": (_codes6, _fields6),
}
_SCALES: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor | None]], Callable[[Tensor, Any], Tensor]]] = {
    "Q2_K": (_scales2, _bytes2),
    "Q3_K": (_scales3, _bytes3),
    "Q4_K": (_scales4, _bytes4),
    "Q5_K": (_scales4, _bytes4),
    "Q6_K": (_scales6, _bytes6),
}


def _cut(kind: KQuant, blocks: Tensor) -> Fields:
    b = blocks.reshape(blocks.shape[0], blocks.shape[1] // kind.nbytes, kind.nbytes)  # (N, S, nbytes)
    return dict(zip((field for field, _ in kind.fields), b.split([size for _, size in kind.fields], -1), strict=True))


def _half(f: Fields, field: str) -> Any:
    import torch

    return f[field].contiguous().view(torch.float16).squeeze(-1) if field in f else None


def flip_sign(half: Tensor) -> Tensor:
    """-dmin for dmin and back, by the sign bit, so that zeros and every other bit pattern survive the round trip."""
    import torch

    return (half.contiguous().view(torch.int16) ^ _SIGN).view(torch.float16)
