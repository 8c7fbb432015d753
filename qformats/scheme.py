"""What a quantized tensor *is*, without its data: grids, blocks, parameter specs, schemes, and what a target type can store.

Torch-free. ``Scheme`` describes a tensor (the planner reads it from headers); ``Storage`` describes the tensors that one target
type can hold. Whether a scheme, after exact rewrites, fits a storage is decided in ``qformats.reencode``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import gcd, prod

from qformats.errors import Unsupported

__all__ = [
    "Block",
    "Cyclic",
    "Factor",
    "Flat",
    "Float",
    "Grid",
    "Integer",
    "Learned",
    "No",
    "ParamSpec",
    "Scheme",
    "Storage",
    "SubScale",
    "Table",
    "Tile",
    "Yes",
    "whole",
]


@dataclass(frozen=True, slots=True)
class Integer:
    """Code c stands for the integer c. Unsigned: 0 … 2^bits − 1; signed: −2^(bits−1) … 2^(bits−1) − 1."""

    bits: int
    signed: bool = False

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1


@dataclass(frozen=True, slots=True)
class Float:
    """Code c is the bit pattern of a small float: ``e4m3fn e4m3fnuz ue4m3 e5m2 e5m2fnuz e2m1 e2m3 e3m2 e8m0``."""

    name: str


@dataclass(frozen=True, slots=True)
class Table:
    """Code c indexes a constant book of ``qformats.grids``: ``nf4 fp4 iq4_nl iq2_s …``; one entry is ``v_in`` values along K."""

    name: str
    v_in: int = 1


@dataclass(frozen=True, slots=True)
class Learned:
    """Code c indexes the tensor's own ``codebook`` (books, entries, v_out, v_in); the books' entries are summed."""

    entries: int
    v_out: int = 1
    v_in: int = 1
    books: int = 1


Grid = Integer | Float | Table | Learned


@dataclass(frozen=True, slots=True)
class Tile:
    """One parameter for each tile of ``sizes`` (same rank as the tensor); the last tile of an axis may be short."""

    sizes: tuple[int, ...]

    def counts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(-(-n // size) for n, size in zip(shape, self.sizes, strict=True))


@dataclass(frozen=True, slots=True)
class Flat:
    """One parameter for each run of ``n`` elements of the row-major vector."""

    n: int

    def counts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (-(-prod(shape) // self.n),)


@dataclass(frozen=True, slots=True)
class Cyclic:
    """Element i of the row-major vector uses parameter i mod ``count``."""

    count: int

    def counts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.count,)


Block = Tile | Flat | Cyclic


def whole(shape: tuple[int, ...]) -> Tile:
    """The tile that covers a whole tensor: one parameter."""
    return Tile(tuple(max(1, n) for n in shape))


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter: dtype (torch's word: ``float16``, ``int32``, … or ``"codes"`` when nested), block, constant value if known."""

    dtype: str
    block: Block
    inverse: bool = False
    nested: Scheme | None = None
    constant: float | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """A tensor's shape (K last), grid and parameters; ``group_index`` says whether an act-order index *may* be non-trivial."""

    shape: tuple[int, ...]
    grid: Grid
    scales: tuple[ParamSpec, ...] = ()
    zero_point: ParamSpec | None = None
    offset: ParamSpec | None = None
    signs: bool = False
    group_index: bool = False

    @property
    def group_size(self) -> int | None:
        """Columns under one scale when all tiles are single rows (K for per-channel), else None."""
        sizes = [s.block.sizes for s in self.scales if isinstance(s.block, Tile) and s.block.sizes[-1] < self.shape[-1]]
        if not all(isinstance(s.block, Tile) for s in self.scales):
            return None
        return min((size[-1] for size in sizes), default=self.shape[-1])


@dataclass(frozen=True, slots=True)
class Yes:
    """The target can hold it as it stands."""

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class No:
    """The target cannot hold it; ``reason`` completes the sentence "cannot be stored as X: …"."""

    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class SubScale:
    """The second level of a scale: for each ``width`` columns an integer on ``grid``, minus ``zero``; with ``offset`` a like sub-offset."""

    width: int
    grid: Integer
    zero: int = 0
    offset: bool = False

    @property
    def lowest(self) -> int:
        return self.grid.lowest - self.zero

    @property
    def highest(self) -> int:
        return self.grid.highest - self.zero


@dataclass(frozen=True, slots=True)
class Factor:
    """A second scale: one number of ``dtype`` for the whole tensor (``inverse``: it divides), or the number ``constant``, not stored."""

    dtype: str
    inverse: bool = False
    constant: float | None = None


@dataclass(frozen=True, slots=True)
class Storage:
    """The tensors that one target type holds: ``w = scale * (value(code) - zero_point) + offset`` with one scale a K-group.

    - ``type``: the type's name as users write it (``q5_0``, ``int4``); ``bits_per_weight`` all parameters included.
    - ``grid``: what a code stands for. ``highest``: the largest code, where the grid has more than the type can hold.
    - ``group``: columns under one scale, None = the whole row, always consecutive.
    - ``k_multiple``/``n_multiple``: required divisors of in_features/out_features.
    - ``scale_dtypes``: dtypes the scale may be stored in (first = the default). ``negative_scale``: whether its sign is free.
      ``scale_grid``: the small float whose codes the scale is stored as, instead of a dtype; a table's codes have a scale of their own
      and an offset beside, both in ``scale_dtypes[0]``.
    - ``zero_point``: an int (that constant, always), a pair (lowest, highest) of per-group integers, or None (no zero point).
      ``doubled``: codes q stand for 2 q - 1, a zero point of one half under a constant second scale of 2.
    - ``offset``: dtype of a per-group additive offset, or None.
    - ``sub_scale``: for two-level types, scale = d * integer and, with its ``offset``, offset = -dmin * integer, where d and dmin in
      ``scale_dtypes[0]`` are for each ``group`` columns.
    - ``group_index``: whether an act-order index can be stored beside it. ``full_groups``: one that gives ``group`` columns to each group.
    - ``options``: the type's own switches, kept for its writer (format version, packing, labels).
    - ``rows``: consecutive output rows under one scale, None = all of them (then ``group`` None is one number for the tensor).
    - ``flat``: the groups run along the row-major vector, over the ends of rows.
    - ``inverse``: the stored scale divides. ``zero_dtype``: dtype of a per-group zero point that may be any float.
    - ``factor``: one more scale for the whole tensor, or a constant.
    - ``whole``: new codes need the whole tensor at once (a scale's own codes, a factor found from all weights).
    - ``cyclic``: element i of the row-major vector belongs to the group i mod (number of groups); ``group`` elements in each, None = N.
    - ``together``: the codes of distant rows share words, so that all rows are written at once.
    """

    type: str
    grid: Grid
    group: int | None
    bits_per_weight: float
    scale_dtypes: tuple[str, ...] = ("float16",)
    negative_scale: bool = True
    zero_point: int | tuple[int, int] | None = None
    offset: str | None = None
    sub_scale: SubScale | None = None
    k_multiple: int = 1
    n_multiple: int = 1
    group_index: bool = False
    options: dict[str, object] = field(default_factory=dict, hash=False)
    highest: int | None = None
    scale_grid: Float | Table | None = None
    doubled: bool = False
    rows: int | None = 1
    flat: bool = False
    inverse: bool = False
    zero_dtype: str | None = None
    factor: Factor | None = None
    whole: bool = False
    cyclic: bool = False
    together: bool = False
    full_groups: bool = False

    @property
    def integers(self) -> Integer:
        """The grid of a type of integer codes; ``Unsupported('grid')`` for the others."""
        if not isinstance(self.grid, Integer):
            raise Unsupported("grid", f"the codes of {self.type} are on {self.grid}, not integers")
        return self.grid

    @property
    def top(self) -> int:
        """The largest code of a type of integer codes."""
        return self.integers.highest if self.highest is None else self.highest

    def with_group(self, group: int | None) -> Storage:
        return replace(self, group=group)

    def scale_block(self, shape: tuple[int, ...]) -> Block:
        """The block of one scale in a weight (N, K) or (K,) of ``shape``."""
        k = shape[-1]
        if self.cyclic:
            return Cyclic(prod(shape) // (self.group or prod(shape[:-1])))
        if self.flat:
            return Flat(self.group or prod(shape))
        group = min(self.group or k, k)
        if len(shape) == 1:
            return Tile((group,))
        rows = shape[-2] if self.rows is None else self.rows
        return Tile((*(1 for _ in shape[:-2]), rows, group))

    def row_unit(self, shape: tuple[int, ...]) -> int:
        """How many rows of a weight ``shape`` share no scale with the rows around them; 0 if only all together do."""
        if self.rows is None or self.whole or self.cyclic:
            return 0
        if self.flat:
            group = self.group or prod(shape)
            return group // gcd(group, shape[-1])
        return self.rows
