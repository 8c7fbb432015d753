"""A layout as kernels see it: constants that a kernel is compiled for, in one place for all kinds of quantization. Torch- and Triton-free.

A weight is value(code) - zero_point, its sign, the factors one after the other, a division, the offset. The factors come in the order of
their digits, so that every step but the last is exact in the arithmetic that is chosen from the digits alone: float32 where they fit 24
bits, else float64 (``wide``). The last step's error is known to the kernel, which rounds once to a narrower dtype. A half-precision zero
point under one half-precision scale is an offset of -zero * scale, which float32 holds exactly.

Assumed of the numbers, which are not looked at: integer zero points and constant ones are multiples of one half inside the codes' range,
a grid's own zero points eighths (ggml's IQ1). A float zero point of 8 or 24 digits under a float32 scale is subtracted in float64, exact
unless it is more than 2^21 times smaller than a step of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from math import gcd, prod

from qformats.kernels.layout import Layout, ParamLayout, widths
from qformats.kernels.packing import RUN, row_nbytes
from qformats.scheme import Cyclic, Flat, Float, Grid, Integer, Learned, Table, Tile

__all__ = ["FLOATS", "Field", "Spec", "spec_of"]

_DIGITS = {"float16": 11, "bfloat16": 8, "float32": 24, "uint8": 8, "int8": 8, "int16": 10, "int32": 24}
_FLOAT_DIGITS = {"e4m3fn": 4, "e4m3fnuz": 4, "ue4m3": 4, "e5m2": 3, "e5m2fnuz": 3, "e2m1": 2, "e2m3": 4, "e3m2": 3, "e8m0": 1}
_TABLE_DIGITS = {"iq4_nl": 7, "iq1_s": 1, "iq2_xxs": 6, "iq2_xs": 6, "iq2_s": 6, "iq3_xxs": 6, "iq3_s": 4}
_STORED = {  # small floats that a plane may have as its dtype: their bytes are read
    "float8_e4m3fn": "e4m3fn", "float8_e4m3fnuz": "e4m3fnuz", "float8_e5m2": "e5m2", "float8_e5m2fnuz": "e5m2fnuz",
    "float8_e8m0fnu": "e8m0",
}  # fmt: skip

FLOATS = {
    "e4m3fn": (0x7F, 20, 120, 0x80, 24),
    "e4m3fnuz": (0x7F, 20, 119, 0x80, 24),
    "ue4m3": (0x7F, 20, 120, 0, 0),
    "e5m2": (0x7F, 21, 112, 0x80, 24),
    "e5m2fnuz": (0x7F, 21, 111, 0x80, 24),
    "e2m1": (0x07, 22, 126, 0x08, 28),
    "e2m3": (0x1F, 20, 126, 0x20, 26),
    "e3m2": (0x1F, 21, 124, 0x20, 26),
}
"""Bits of the magnitude, their place in a float32, the power of two that its bias then lacks, the sign's bit and its way up to bit 31."""


@dataclass(frozen=True, slots=True)
class Field:
    """One parameter. ``plane``: its place among the kernel's pointers; ``dtype``: as what it is read.

    A number's row and column in the plane: ``kind`` "tile": ((r // per) // t0 * c1 + (r % per) // t1, c // tk or 0 if there is one
    column), "flat": (0, (r K + c) // tk), "cyclic": (0, (r K + c) % tk). ``run``: neighbouring columns, a power of two, that share a
    number. ``grouped``: the column is the group index's. ``inner``: the spec of codes that the numbers are stored as.
    """

    plane: int
    dtype: str
    kind: str
    per: int
    t0: int
    t1: int
    c1: int
    tk: int
    ck: int
    run: int
    grouped: bool
    digits: int
    inner: Spec | None = None
    rounded: str = ""


@dataclass(frozen=True)
class Spec:
    """A weight's constants. ``width``: columns of one phase, 16 codes of ``v`` columns; ``phases`` phases are a unit of neighbouring
    codes in which every plane has whole runs. ``books``, ``v_out``: of a learned grid. ``low``: what an integer code has added.
    ``exact``: float32 holds the last step's result too, so a narrower dtype needs no correction.
    """

    kind: str  # integer, float, table, learned
    name: str
    bits: int
    widths: tuple[int, ...]
    row_nbytes: tuple[int, ...]
    low: int
    flip: int
    rows: int
    columns: int
    v: int
    v_out: int
    books: int
    entries: int
    table: int
    factors: tuple[Field, ...]
    divisor: Field | None
    zero: Field | None
    offset: Field | None
    fold: bool
    signs: int
    sign_nbytes: int
    index: int
    index_rows: int
    wide: bool
    exact: bool

    @property
    def whole_zero(self) -> bool:
        """Whether codes and zero points are integers."""
        return self.kind == "integer" and self.zero is not None and self.zero.dtype in ("uint8", "int8", "int16")

    @property
    def ends_in_product(self) -> bool:
        """Whether the last factor is the last step."""
        return self.divisor is None and self.offset is None and not self.fold

    @property
    def middle(self) -> float:
        """What a vector kernel takes off an integer code whose zero point or offset follows later: half its range."""
        later = self.offset is not None or (self.zero is not None and not self.whole_zero)
        return float(1 << (self.bits - 1)) if self.kind == "integer" and later and not self.low and not self.whole_zero else 0.0

    @property
    def chain(self) -> int:
        """Neighbouring columns, a power of two, that have the same parameters; a vector kernel adds their products first."""
        zero = None if self.whole_zero else self.zero
        runs = [field.run for field in (*self.factors, self.divisor, zero, self.offset) if field is not None]
        return min([RUN if self.v == 1 else self.v, *runs])

    @property
    def span(self) -> int:
        """Phases, a power of two, that have the same parameters column by column of a phase's lanes."""
        fields = [field for field in (*self.factors, self.divisor, self.zero, self.offset) if field is not None]
        return min([self.phases, *(self._span(field) for field in fields)])

    def _span(self, field: Field) -> int:
        if field.grouped or field.kind != "tile" or (field.ck > 1 and field.tk % self.width):
            return 1
        phases = self.phases if field.ck == 1 else field.tk // self.width
        return min(self.phases, phases & -phases)

    @property
    def places(self) -> tuple[int, int, int]:
        """Of the zero point, the divisor and the offset among a tile's parameters."""
        zero = len(self.factors)
        divisor = zero + (self.zero is not None)
        return zero, divisor, divisor + (self.divisor is not None)

    @property
    def half_up(self) -> int:
        """Where the magnitude of a small float begins in the upper byte of a float16; -1 if it does not fit there."""
        return {"e2m1": 1, "e3m2": 0, "e5m2": 0}.get(self.name, -1) if self.kind == "float" else -1

    @property
    def lift(self) -> float:
        """What the values that a kernel makes of a phase's codes are to be multiplied by."""
        return {"e2m1": 2.0**14, "e3m2": 2.0**12}.get(self.name, 1.0) if self.kind == "float" else 1.0

    @property
    def width(self) -> int:
        return RUN * self.v

    @property
    def phases(self) -> int:
        return 8 // min(self.widths)

    @property
    def units(self) -> int:
        """Units in a row."""
        return row_nbytes(self.columns // self.v, min(self.widths)) // RUN

    @property
    def unit(self) -> int:
        """Columns of a unit."""
        return self.width * self.phases

    def __repr__(self) -> str:  # part of the names and keys of compiled kernels
        return f"Spec_{_key(self)}"


@lru_cache(maxsize=4096)
def _key(spec: Spec) -> str:
    parts = [getattr(spec, name) for name in spec.__dataclass_fields__]
    return sha256(repr(parts).encode()).hexdigest()[:16]


@lru_cache(maxsize=4096)
def spec_of(layout: Layout) -> Spec | None:
    """What kernels need to know of ``layout``; None where none serves it.

    Pointers are numbered as ``Layout.names``; a constant table is behind them, that of the grid first, then one for each parameter.
    """
    grid = layout.grid
    v, v_out = getattr(grid, "v_in", 1), getattr(grid, "v_out", 1)
    if not layout.rows or not layout.columns or v & (v - 1) or v > 64 or not _aligned(layout, v):
        return None
    places = {name: i for i, name in enumerate(layout.names)}
    tables = len(places)
    fields: dict[str, Field] = {}
    grid_table = "codebook" if isinstance(grid, Learned) else ""
    table = places[grid_table] if grid_table else tables
    tables += isinstance(grid, Table)
    for param in layout.params:
        made = _field(layout, param, places, RUN * v, tables)
        if made is None:
            return None
        fields[param.role] = made
        tables += made.inner is not None and made.inner.kind == "table"
    return _assembled(layout, fields, places, table, v, v_out)


def _aligned(layout: Layout, v: int) -> bool:
    """Whether each book's codes start at a run."""
    grid = layout.grid
    if not isinstance(grid, Learned) or grid.books == 1:
        return True
    return all(width == 8 or (layout.columns // v) % (128 // width) == 0 for width in widths(layout.bits))


def _field(layout: Layout, param: ParamLayout, places: dict[str, int], width: int, table: int) -> Field | None:
    block, shape, k = param.block, param.shape, layout.columns
    per, t0, t1, c1, tk, ck, kind = 0, 1, 1, 1, k, 1, "tile"
    if isinstance(block, Flat):
        if k % block.n == 0:
            tk, ck = block.n, k // block.n
        else:
            kind, tk = "flat", block.n
    elif isinstance(block, Cyclic):
        kind, tk = "cyclic", block.count
    elif isinstance(block, Tile):
        tk, ck = block.sizes[-1], shape[-1]
        t1 = block.sizes[-2] if len(shape) > 1 else 1
        if len(shape) == 3:
            per, t0, c1 = layout.shape[1], block.sizes[0], shape[1]
    grouped = layout.index == "group_index" and kind == "tile" and ck > 1 and tk > 1
    run = width if kind == "tile" and ck == 1 else gcd(tk, k, width) if kind == "flat" else gcd(tk, width)
    run = 1 if grouped or kind == "cyclic" else run
    common = (kind, per, t0, t1, c1, tk, ck, run & -run, grouped)
    if param.nested is None:
        dtype = _STORED.get(param.dtype, param.dtype)
        digits = _FLOAT_DIGITS.get(dtype) or _DIGITS.get(dtype)
        return None if digits is None else Field(places[param.role], dtype, *common, digits)
    inner = _inner(param, places, table)
    if inner is None:
        return None
    digits = _DIGITS[param.rounded_to] if param.rounded_to else _inner_digits(inner)
    return Field(places[f"{param.role}_codes0"], "codes", *common, digits, inner, param.rounded_to)


def _inner(param: ParamLayout, places: dict[str, int], table: int) -> Spec | None:
    """The spec of a parameter's own codes, with pointers numbered as those of the whole."""
    nested = param.nested
    assert nested is not None
    if nested.signs or nested.index or getattr(nested.grid, "v_in", 1) > 1 or getattr(nested.grid, "books", 1) > 1:
        return None
    start = f"{param.role}_"
    own = {name.removeprefix(start): place for name, place in places.items() if name.startswith(start)}
    fields = {}
    for p in nested.params:
        made = None if p.nested is not None else _field(nested, p, own, RUN, 0)
        if made is None:
            return None
        fields[p.role] = made
    place = own["codebook"] if isinstance(nested.grid, Learned) else table
    return _assembled(nested, fields, own, place, 1, 1)


def _value_digits(grid: Grid) -> int:
    """Significant bits of a code's value, a zero point inside the range subtracted."""
    if isinstance(grid, Integer):
        return grid.bits
    if isinstance(grid, Float):
        return _FLOAT_DIGITS[grid.name]
    return _TABLE_DIGITS.get(grid.name, 24) if isinstance(grid, Table) else 24


def _inner_digits(inner: Spec) -> int:
    found = _DIGITS["float32"] if inner.kind in ("table", "learned") else _FLOAT_DIGITS.get(inner.name, inner.bits)
    found += 1 if inner.zero is not None and inner.zero.digits > 8 else 0  # halves
    return found + sum(f.digits for f in inner.factors) + (24 if inner.offset is not None or inner.divisor is not None else 0)


def _assembled(layout: Layout, fields: dict[str, Field], places: dict[str, int], table: int, v: int, v_out: int) -> Spec | None:
    grid = layout.grid
    params = {p.role: p for p in layout.params}
    scales = [(f, params[role].inverse) for role, f in fields.items() if role.startswith("scale")]
    factors = tuple(sorted((f for f, inverse in scales if not inverse), key=lambda f: f.digits))
    divisors = [f for f, inverse in scales if inverse]
    zero, offset = fields.get("zero_point"), fields.get("offset")
    if len(divisors) > 1 or (divisors and offset is not None) or (zero is not None and zero.dtype in ("codes", *_FLOAT_DIGITS)):
        return None
    fold = _folds(zero, factors, divisors, offset, layout)
    steps = _steps(layout, factors, divisors, zero, offset, fold)
    certain = max(steps[:-1], default=0)
    if certain > 53:
        return None
    signed = isinstance(grid, Integer) and grid.signed
    shape = layout.shape
    return Spec(
        kind={Integer: "integer", Float: "float", Table: "table", Learned: "learned"}[type(grid)],
        name=getattr(grid, "name", ""),
        bits=layout.bits,
        widths=widths(layout.bits),
        row_nbytes=tuple(row_nbytes(layout.columns // v * getattr(grid, "books", 1), w) for w in widths(layout.bits)),
        low=1 << (layout.bits - 1) if signed else 0,
        flip=0x80 if signed and layout.bits == 8 else 0,
        rows=layout.rows,
        columns=layout.columns,
        v=v,
        v_out=v_out,
        books=getattr(grid, "books", 1),
        entries=getattr(grid, "entries", 0),
        table=table,
        factors=factors,
        divisor=divisors[0] if divisors else None,
        zero=zero,
        offset=offset,
        fold=fold,
        signs=places.get("signs", -1) if layout.signs else -1,
        sign_nbytes=-(-layout.columns // 8),
        index=places["group_index"] if layout.index == "group_index" else -1,
        index_rows=shape[-2] if layout.index == "group_index" and len(shape) == 3 else layout.rows,
        wide=certain > 24,
        exact=max(steps) <= 24,
    )


def _folds(zero: Field | None, factors: tuple[Field, ...], divisors: list[Field], offset: Field | None, layout: Layout) -> bool:
    """Whether the zero point is taken as an offset: it and the only scale are numbers of half precision."""
    half = ("float16", "bfloat16")
    only = len(factors) == 1 and not divisors and offset is None and not layout.signs and isinstance(layout.grid, Integer)
    return only and zero is not None and prod((zero.dtype in half, factors[0].dtype in half)) == 1


def _steps(
    layout: Layout, factors: tuple[Field, ...], divisors: list[Field], zero: Field | None, offset: Field | None, fold: bool
) -> list[int]:
    """Digits of the exact result of each step; 99 where nothing is known of it."""
    grid = layout.grid
    found = [_value_digits(grid)]
    if isinstance(grid, Learned) and grid.books > 1:
        found.append(42)  # up to four half-precision entries
    if zero is not None and not fold:
        found.append(_centred(grid, zero, found[-1], prod(next(p for p in layout.params if p.role == "zero_point").shape) == 1))
    for factor in factors:
        found.append(found[-1] + factor.digits)
    if fold:
        found += [22, 99]
    if offset is not None:
        found += [offset.digits, 99]
    return found + [99] * len(divisors)


def _centred(grid: Grid, zero: Field, digits: int, constant: bool) -> int:
    if isinstance(grid, Table):
        return digits + 4 if grid.v_in > 1 else 53
    if zero.dtype in ("uint8", "int8", "int16", "int32") or constant:
        return digits + (zero.dtype == "float32")
    return 40 if zero.dtype == "float16" else 42
