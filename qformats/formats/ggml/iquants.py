"""ggml's codebook super-blocks of 256 weights: IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S, and IQ4_XS with a value table.

Source: ``block_iq*`` in ``ggml/src/ggml-common.h`` and ``dequantize_row_iq*`` in ``ggml/src/ggml-quants.c`` of llama.cpp v0.5.0.
Words are little-endian; a row is K / 256 super-blocks. A code names an entry of 8 (IQ1, IQ2) or 4 (IQ3) weights in a book of
``qformats.grids``, of one weight in IQ4_XS. Bits are counted from the lowest; ``g`` runs over entries, ``b`` over 32 weights.

| type    | super-block bytes, in file order                        | weight                          | s for  | code |
|---------|---------------------------------------------------------|---------------------------------|--------|------|
| IQ2_XXS | d f16, qs u32[8][2]                                     | d * (s + 1/2) / 4 * sign * book | 32     | 8    |
| IQ2_XS  | d f16, qs u16[32], scales u8[8]                         | d * (s + 1/2) / 4 * sign * book | 16     | 9    |
| IQ2_S   | d f16, qs u8[32], signs u8[32], qh u8[8], scales u8[8]  | d * (s + 1/2) / 4 * sign * book | 16     | 10   |
| IQ3_XXS | d f16, qs u8[64], aux u32[8]                            | d * (s + 1/2) / 2 * sign * book | 32     | 8    |
| IQ3_S   | d f16, qs u8[64], qh u8[8], signs u8[32], scales u8[4]  | d * (s + 1/2) * 2 * sign * book | 32     | 9    |
| IQ1_S   | d f16, qs u8[32], qh u16[8]                             | d * (s + 1/2) * 2 * (book - z)  | 32     | 11   |
| IQ1_M   | qs u8[32], qh u8[16], scales u16[4]                     | d * (s + 1/2) * 2 * (book - z)  | 16     | 11   |
| IQ4_XS  | d f16, scales_h u16, scales_l u8[4], qs u8[128]         | d * (s - 32) * iq4_nl           | 32     | 4    |

- IQ2_XXS: the bytes of the first word of pair b are codes 4 b … 4 b + 3; the second holds their signs in 7 bits each, then s in 4.
  IQ3_XXS: ``qs`` are the codes, word b of ``aux`` is such a second word (the struct counts both as ``qs``).
- IQ2_XS: bits 0-8 of word g are code g, bits 9-15 its signs.
- IQ2_S, IQ3_S: ``qs`` are the low 8 bits of the codes; ``qh`` byte b holds the high ones, 2 bits for each of 4 (IQ2_S) or 1 bit for each
  of 8 entries (IQ3_S). Byte j of ``signs`` is for weights 8 j … 8 j + 7.
- s of these: nibbles, the low one first.
- IQ1_S: bits 0-11 of ``qh`` word b are the high 3 bits of codes 4 b …, 12-14 are s, 15 says z = 1/8, else z = -1/8.
  IQ1_M: nibble g of ``qh`` is the high 3 bits of code g and such a bit for its 8 weights; ``scales`` word i holds s of four
  sub-blocks in 3 bits each, and in bits 12-15 nibble i of the fp16 d.
- IQ4_XS: byte 16 b + l of ``qs`` is weight 32 b + l (low) and 32 b + 16 + l (high); s = nibble b of ``scales_l`` + 16 * (bits 2 b and
  2 b + 1 of ``scales_h``).

A sign bit set means minus, bit i for the i-th of 8 weights; where only 7 are stored the eighth makes the number of minus signs even, so
``planes`` refuses an odd byte there. Every stored bit is in exactly one plane: any block survives reading and writing.
A z is itself a code: z = 1/4 * (bit - 1/2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qformats.errors import Unsupported
from qformats.formats.ggml.kind import PlaneSpec
from qformats.grids import TABLE_WIDTHS
from qformats.scheme import Integer, ParamSpec, Scheme, Storage, SubScale, Table, Tile, whole

if TYPE_CHECKING:
    from torch import Tensor

    from qformats.tensor import QuantizedTensor

__all__ = ["IQUANTS", "IQuant"]

SUPER = 256
_D = ("d", 2, 2)

Fields = dict[str, Any]  # field name -> its bytes, uint8, or its wider words, int64 (N, S, words)
Planes = tuple[Any, Any, Any, Any, Any]  # codes, signs or None, s, shift bits or None, d


def _split(words: Tensor, shifts: Sequence[int], bits: int) -> Tensor:
    """(…, w) -> (…, w * len(shifts)) of the same dtype: the ``bits`` of each word that start at each of ``shifts``."""
    import torch

    cut = words.unsqueeze(-1) >> torch.tensor(shifts, dtype=words.dtype, device=words.device)
    return (cut & ((1 << bits) - 1)).flatten(-2)


def _join(values: Tensor, shifts: Sequence[int], *, wide: bool = False) -> Tensor:
    """The inverse of ``_split``: (…, w * len(shifts)) -> (…, w), bytes or, where ``wide``, int64 words."""
    import torch

    dtype = torch.int64 if wide else torch.uint8
    parts = values.to(dtype).unflatten(-1, (-1, len(shifts)))
    joined: Tensor = (parts << torch.tensor(shifts, dtype=dtype, device=values.device)).sum(-1, dtype=dtype)
    return joined


def _index(low: Tensor, high: Tensor) -> Tensor:
    """Codes of more than 8 bits, int16."""
    import torch

    return low | (high.to(torch.int16) << 8)


_NIBBLES, _BYTES, _PAIRS, _BITS = (0, 4), (0, 8, 16, 24), (0, 2, 4, 6), range(8)
_SEVENS, _THREES, _DOUBLES = (0, 7, 14, 21), (0, 3, 6, 9), range(0, 16, 2)


def _parity(byte: Tensor) -> Tensor:
    """1 where the number of set bits is odd."""
    byte = byte ^ (byte >> 4)
    byte = byte ^ (byte >> 2)
    return (byte ^ (byte >> 1)) & 1


def _even(seven: Tensor) -> Tensor:
    """Seven sign bits with the eighth that makes their number even."""
    return seven | (_parity(seven) << 7)


# ---------------------------------------------------------------- one pair for each type: fields <-> codes, signs, s, shift (N, S, …)
# d, int64 bits (N, S, 1), passes through


def _read_2xxs(f: Fields) -> Planes:
    index, aux = f["qs"][..., 0::2], f["qs"][..., 1::2]
    return _split(index, _BYTES, 8), _even(_split(aux, _SEVENS, 7)), aux >> 28, None, f["d"]


def _aux(signs: Any, s: Tensor) -> Tensor:
    """Words of seven signs for each of four entries under s."""
    import torch

    return _join(signs & 127, _SEVENS, wide=True) | (s.to(torch.int64) << 28)


def _write_2xxs(codes: Tensor, signs: Any, s: Tensor, shift: Any, d: Tensor) -> Fields:
    import torch

    return {"d": d, "qs": torch.stack([_join(codes, _BYTES, wide=True), _aux(signs, s)], -1).flatten(-2)}


def _read_2xs(f: Fields) -> Planes:
    return f["qs"] & 511, _even(f["qs"] >> 9), _split(f["scales"], _NIBBLES, 4), None, f["d"]


def _write_2xs(codes: Tensor, signs: Any, s: Tensor, shift: Any, d: Tensor) -> Fields:
    return {"d": d, "qs": codes.to(d.dtype) | ((signs & 127).to(d.dtype) << 9), "scales": _join(s, _NIBBLES)}


def _read_2s(f: Fields) -> Planes:
    return _index(f["qs"], _split(f["qh"], _PAIRS, 2)), f["signs"], _split(f["scales"], _NIBBLES, 4), None, f["d"]


def _write_2s(codes: Tensor, signs: Any, s: Tensor, shift: Any, d: Tensor) -> Fields:
    return {"d": d, "qs": codes & 255, "qh": _join(codes >> 8, _PAIRS), "signs": signs, "scales": _join(s, _NIBBLES)}


def _read_3xxs(f: Fields) -> Planes:
    return f["qs"], _even(_split(f["aux"], _SEVENS, 7)), f["aux"] >> 28, None, f["d"]


def _write_3xxs(codes: Tensor, signs: Any, s: Tensor, shift: Any, d: Tensor) -> Fields:
    return {"d": d, "qs": codes, "aux": _aux(signs, s)}


def _read_3s(f: Fields) -> Planes:
    return _index(f["qs"], _split(f["qh"], _BITS, 1)), f["signs"], _split(f["scales"], _NIBBLES, 4), None, f["d"]


def _write_3s(codes: Tensor, signs: Any, s: Tensor, shift: Any, d: Tensor) -> Fields:
    return {"d": d, "qs": codes & 255, "qh": _join(codes >> 8, _BITS), "signs": signs, "scales": _join(s, _NIBBLES)}


def _read_1s(f: Fields) -> Planes:
    return _index(f["qs"], _split(f["qh"], _THREES, 3)), None, (f["qh"] >> 12) & 7, f["qh"] >> 15, f["d"]


def _write_1s(codes: Tensor, signs: Any, s: Tensor, shift: Any, d: Tensor) -> Fields:
    high = _join(codes >> 8, _THREES, wide=True)
    return {"d": d, "qs": codes & 255, "qh": high | (s.to(d.dtype) << 12) | (shift.to(d.dtype) << 15)}


def _read_1m(f: Fields) -> Planes:
    high, d = _split(f["qh"], _NIBBLES, 4), _join(f["scales"] >> 12, (0, 4, 8, 12), wide=True)
    return _index(f["qs"], high & 7), None, _split(f["scales"], _THREES, 3), high >> 3, d


def _write_1m(codes: Tensor, signs: Any, s: Tensor, shift: Any, d: Tensor) -> Fields:
    scales = _join(s, _THREES, wide=True) | (_split(d, (0, 4, 8, 12), 4) << 12)
    return {"qs": codes & 255, "qh": _join((codes >> 8) | (shift << 3), _NIBBLES), "scales": scales}


def _read_4xs(f: Fields) -> Planes:
    import torch

    qs = f["qs"].unflatten(-1, (8, 16))
    s = _split(f["scales_l"], _NIBBLES, 4) | (_split(f["scales_h"], _DOUBLES, 2) << 4)
    return torch.stack([qs & 15, qs >> 4], -2).flatten(-3), None, s, None, f["d"]


def _write_4xs(codes: Tensor, signs: Any, s: Tensor, shift: Any, d: Tensor) -> Fields:
    halves = codes.unflatten(-1, (8, 2, 16))
    qs = (halves[..., 0, :] | (halves[..., 1, :] << 4)).flatten(-2)
    return {"d": d, "scales_h": _join(s >> 4, _DOUBLES, wide=True), "scales_l": _join(s & 15, _NIBBLES), "qs": qs}


_DOORS: dict[str, tuple[Callable[[Fields], Planes], Callable[..., Fields]]] = {
    "IQ2_XXS": (_read_2xxs, _write_2xxs),
    "IQ2_XS": (_read_2xs, _write_2xs),
    "IQ2_S": (_read_2s, _write_2s),
    "IQ3_XXS": (_read_3xxs, _write_3xxs),
    "IQ3_S": (_read_3s, _write_3s),
    "IQ1_S": (_read_1s, _write_1s),
    "IQ1_M": (_read_1m, _write_1m),
    "IQ4_XS": (_read_4xs, _write_4xs),
}


def _constant(value: float, shape: tuple[int, ...]) -> ParamSpec:
    return ParamSpec("float32", whole(shape), constant=value)


@dataclass(frozen=True, slots=True)
class IQuant:
    """One type.

    - ``book``: its table in ``qformats.grids``; ``code_bits`` of a code; ``fields``: (name, bytes, bytes a word) in file order.
    - ``sub``: weights under one s of ``sub_bits``; the scale is ``d * (s - sub_zero) * factor``.
    - ``signs``: whether there are any, ``even`` where the eighth is implied; ``shift``: weights under one z, 0 for none.
    """

    name: str
    book: str
    code_bits: int
    fields: tuple[tuple[str, int, int], ...]
    sub: int
    sub_bits: int
    factor: float
    sub_zero: float = -0.5
    signs: bool = False
    even: bool = False
    shift: int = 0

    @property
    def nbytes(self) -> int:
        return sum(size for _, size, _ in self.fields)

    @property
    def block(self) -> int:
        return SUPER

    @property
    def halves(self) -> tuple[int, ...]:
        """Where the fp16 fields start; none in IQ1_M, whose d is scattered."""
        return (0,) if self.fields[0] == _D else ()

    @property
    def swaps(self) -> tuple[tuple[int, int], ...]:
        """Every word of several bytes."""
        starts = {name: sum(size for _, size, _ in self.fields[:i]) for i, (name, _, _) in enumerate(self.fields)}
        wide = [(starts[name], size, width) for name, size, width in self.fields if width > 1]
        return tuple((at, width) for start, size, width in wide for at in range(start, start + size, width))

    @property
    def plane_specs(self) -> tuple[PlaneSpec, ...]:
        """codes, signs, s, shift, d."""
        codes = PlaneSpec("uint8" if self.code_bits <= 8 else "int16", SUPER // TABLE_WIDTHS[self.book])
        widths = SUPER // 8 if self.signs else 0, SUPER // self.sub, SUPER // self.shift if self.shift else 0
        return codes, *(PlaneSpec("uint8", width) for width in widths), PlaneSpec("float16", 1)

    @property
    def grid(self) -> Table:
        return Table(self.book, TABLE_WIDTHS[self.book])

    @property
    def storage(self) -> Storage:
        """Name, grid and size; signs and half-integer sub-scales are more than ``Storage`` has words for, so only ``scheme`` says them."""
        whole_levels = self.sub_zero == int(self.sub_zero)
        sub = SubScale(self.sub, Integer(self.sub_bits), int(self.sub_zero)) if whole_levels else None
        group = SUPER if whole_levels else self.sub
        return Storage(self.name.lower(), self.grid, group, self.nbytes * 8 / SUPER, sub_scale=sub, k_multiple=SUPER)

    def scheme(self, shape: tuple[int, ...]) -> Scheme:
        """The scheme of a weight ``shape`` (K last) in this type."""
        lead, small = (1,) * (len(shape) - 1), (*shape[:-1], shape[-1] // self.sub)
        half = ParamSpec("float16", Tile((*lead, SUPER // self.sub)))
        nested = Scheme(small, Integer(self.sub_bits), (half,), _constant(self.sub_zero, small))
        scale = ParamSpec("codes", Tile((*lead, self.sub)), nested=nested)
        scales = (scale,) if self.factor == 1 else (scale, _constant(self.factor, shape))
        zero = None
        if self.shift:
            few = (*shape[:-1], shape[-1] // self.shift)
            bit = Scheme(few, Integer(1), (_constant(0.25, few),), _constant(0.5, few))
            zero = ParamSpec("codes", Tile((*lead, self.shift)), nested=bit)
        return Scheme(shape, self.grid, scales, zero, signs=self.signs)

    def _fields(self, blocks: Tensor) -> Fields:
        b = blocks.reshape(blocks.shape[0], blocks.shape[1] // self.nbytes, self.nbytes)  # (N, S, nbytes)
        cuts = zip(self.fields, b.split([size for _, size, _ in self.fields], -1), strict=True)
        return {name: cut if width == 1 else _join(cut, range(0, 8 * width, 8), wide=True) for (name, _, width), cut in cuts}

    def unpack_blocks(self, blocks: Tensor) -> Planes:
        """uint8 (N, K/256 * nbytes) -> planes of a weight (N, K).

        codes uint8, or int16 above 8 bits, (N, K/v); signs uint8 (N, K/8) or None; s uint8 (N, K/sub); shift 0 or 1, uint8
        (N, K/shift) or None; d float16 (N, K/256).
        """
        import torch

        codes, signs, s, shift, d = _DOORS[self.name][0](self._fields(blocks))
        small = (None if plane is None else plane.flatten(1).to(torch.uint8) for plane in (signs, s, shift))
        dtype = getattr(torch, self.plane_specs[0].dtype)
        return codes.flatten(1).to(dtype), *small, d.squeeze(-1).to(torch.int16).view(torch.float16)

    def unpack_params(self, blocks: Tensor) -> tuple[Any, ...]:
        """signs, s, shift and d of ``unpack_blocks`` alone."""
        return self.unpack_blocks(blocks)[1:]

    def pack_blocks(self, codes: Tensor, signs: Any, s: Tensor, shift: Any, d: Tensor) -> Tensor:
        """The inverse of ``unpack_blocks``: uint8 (N, row bytes); the planes must lie on their grids, as ``planes`` makes sure."""
        import torch

        bits = d.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
        across = (None if plane is None else plane.reshape(*d.shape, plane.shape[-1] // d.shape[-1]) for plane in (codes, signs, s, shift))
        f = _DOORS[self.name][1](*across, bits.unsqueeze(-1))
        pieces = (f[name] if width == 1 else _split(f[name], range(0, 8 * width, 8), 8) for name, _, width in self.fields)
        return torch.cat([piece.to(torch.uint8) for piece in pieces], -1).flatten(1)

    def dequantize_blocks(self, blocks: Tensor) -> Tensor:
        """uint8 (N, row bytes) -> float32 (N, K). Every product is exact in float32, so the order is free; a zero's sign is ggml's."""
        import torch

        from qformats.grids import table_values

        codes, signs, s, shift, d = self.unpack_blocks(blocks)
        single = torch.float32
        scale = d.to(single).repeat_interleave(SUPER // self.sub, -1) * ((s.to(single) - self.sub_zero) * self.factor)
        w: Tensor = table_values(self.book).to(single)[codes.to(torch.int64)].reshape(codes.shape[0], d.shape[1] * SUPER)
        if shift is not None:
            w = w + (0.125 - 0.25 * shift.to(single)).repeat_interleave(self.shift, -1)
        w = w * scale.repeat_interleave(self.sub, -1)
        return w if signs is None else w * (1 - 2 * _split(signs, _BITS, 1).to(single))

    def to_tensor(self, codes: Tensor, signs: Any, s: Tensor, shift: Any, d: Tensor) -> QuantizedTensor:
        """The planes as a canonical tensor (N, K) whose scale, and z where there is one, are themselves codes."""
        import torch

        from qformats.tensor import Param, QuantizedTensor, constant

        def number(value: float, shape: tuple[int, ...]) -> Param:
            return constant(value, shape, torch.float32)

        shape, small = (int(d.shape[0]), int(d.shape[1]) * SUPER), (int(s.shape[0]), int(s.shape[1]))
        half = Param(d, Tile((1, SUPER // self.sub)))
        scale = QuantizedTensor(small, s, Integer(self.sub_bits), (half,), number(self.sub_zero, small))
        scales = (Param(scale, Tile((1, self.sub))), *(() if self.factor == 1 else (number(self.factor, shape),)))
        zero = None
        if shift is not None:
            few = (int(shift.shape[0]), int(shift.shape[1]))
            bit = QuantizedTensor(few, shift, Integer(1), (number(0.25, few),), number(0.5, few))
            zero = Param(bit, Tile((1, self.shift)))
        return QuantizedTensor(shape, codes, self.grid, scales, zero, signs=signs)

    def planes(self, tensor: QuantizedTensor) -> Planes:
        """codes, signs, s, shift, d of a canonical tensor in this type's form.

        ``Unsupported('form')`` for a code or a sign byte that a block has no bits for.
        """
        scale: Any = tensor.scales[0].values
        shift: Any = None if tensor.zero_point is None else tensor.zero_point.values
        self._check("code", tensor.codes, self.code_bits)
        self._check("sub-scale", scale.codes, self.sub_bits)
        if shift is not None:
            self._check("zero point", shift.codes, 1)
        if self.even and tensor.signs is not None and bool(_parity(tensor.signs).any()):
            reason = "eight weights have an odd number of minus signs, it stores seven and implies the eighth"
            raise Unsupported("form", f"cannot be stored as {self.name.lower()}: {reason}")
        return tensor.codes, tensor.signs, scale.codes, None if shift is None else shift.codes, scale.scales[0].values

    def _check(self, what: str, codes: Tensor, bits: int) -> None:
        if not codes.numel():
            return
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= 1 << bits:
            reason = f"a {what} is {low if low < 0 else high}, outside 0 … {(1 << bits) - 1}"
            raise Unsupported("form", f"cannot be stored as {self.name.lower()}: {reason}")


IQUANTS = {
    kind.name: kind
    for kind in (
        IQuant("IQ2_XXS", "iq2_xxs", 8, (_D, ("qs", 64, 4)), 32, 4, 0.25, signs=True, even=True),
        IQuant("IQ2_XS", "iq2_xs", 9, (_D, ("qs", 64, 2), ("scales", 8, 1)), 16, 4, 0.25, signs=True, even=True),
        IQuant("IQ2_S", "iq2_s", 10, (_D, ("qs", 32, 1), ("signs", 32, 1), ("qh", 8, 1), ("scales", 8, 1)), 16, 4, 0.25, signs=True),
        IQuant("IQ3_XXS", "iq3_xxs", 8, (_D, ("qs", 64, 1), ("aux", 32, 4)), 32, 4, 0.5, signs=True, even=True),
        IQuant("IQ3_S", "iq3_s", 9, (_D, ("qs", 64, 1), ("qh", 8, 1), ("signs", 32, 1), ("scales", 4, 1)), 32, 4, 2.0, signs=True),
        IQuant("IQ1_S", "iq1_s", 11, (_D, ("qs", 32, 1), ("qh", 16, 2)), 32, 3, 2.0, shift=32),
        IQuant("IQ1_M", "iq1_s", 11, (("qs", 32, 1), ("qh", 16, 1), ("scales", 8, 2)), 16, 3, 2.0, shift=8),
        IQuant("IQ4_XS", "iq4_nl", 4, (_D, ("scales_h", 2, 2), ("scales_l", 4, 1), ("qs", 128, 1)), 32, 6, 1.0, 32.0),
    )
}
