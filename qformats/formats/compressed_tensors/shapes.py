"""What a compressed-tensors module's headers say: kind, sizes, groups; every check that needs no weights. Torch-free.

The tensors say which of the ``KINDS`` a module is, the config how wide its groups are; both must agree. ``weight_shape`` (two integers) is
read where it is there, because the packed words alone do not tell K.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from qformats.bits import words_for
from qformats.errors import BadFile, Unsupported
from qformats.formats.compressed_tensors.config import Args, Group, candidates, dense_packing
from qformats.formats.packed import FLOATS, check_dtype, wrong_shape
from qformats.formats.protocol import Module
from qformats.scheme import Block, Float, Grid, Integer, ParamSpec, Scheme, Tile, whole

__all__ = [
    "MX",
    "SUFFIXES",
    "Geometry",
    "geometry",
    "grid_of",
    "missing",
    "packed_words",
    "quantized_args",
    "scheme",
    "stored_numbers",
    "tile_of",
    "zero_of",
]

SPARSE = frozenset({"weight.shape", "weight.compressed", "weight.bitmask", "weight.row_offsets"})
SPARSE_24 = frozenset({"shape", "compressed", "bitmask"})
SUFFIXES = SPARSE | SPARSE_24 | {
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale", "scale_packed", "meta",
}  # fmt: skip
MX = {"mxfp4": ("e2m1", 4), "mxfp6": ("e2m3", 6), "mxfp8": ("e4m3fn", 8)}
_BYTES = ("U8", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class Geometry:
    """A weight (N, K) or (E, N, K) of ``bits`` bits.

    ``kind``: ``pack int float nvfp4 mxfp4 mxfp6 mxfp8 dense sparse sparse24``. ``rows`` and ``group``: the tile of one scale (rows None:
    one scale for all). ``scale``: container dtype of the scales. ``zero``: ``none packed plain zeros``. ``stream``: 3, 5, 6, 7 bits are
    one stream. ``stored``: container dtype of the values of a sparse weight. ``strategy``: the config's word.
    """

    kind: str
    shape: tuple[int, ...]
    bits: int
    rows: int | None
    group: int
    scale: str = ""
    zero: str = "none"
    stream: bool = True
    indexed: bool = False
    stored: str = ""
    strategy: str = "group"

    @property
    def k(self) -> int:
        return self.shape[-1]

    @property
    def height(self) -> int:
        """Rows over all experts."""
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Columns under one scale in rows of this width."""
        return min(self.group, self.k)

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)


def geometry(module: Module) -> Geometry:
    """Check every part against the others and the config; ``BadFile`` or ``Unsupported`` names what is wrong."""
    return module.remember("geometry", _checked)


def _checked(module: Module) -> Geometry:
    parts = module.parts
    if "scale_packed" in parts or "meta" in parts:
        raise Unsupported("marlin-24", "holds 2:4 sparse weights repacked for Marlin, which nothing reads back", tensor=module.name)
    kind = _kind(module)
    if kind in ("dense", "sparse", "sparse24"):
        from qformats.formats.compressed_tensors.sparse import sparse_geometry

        g = sparse_geometry(module, kind)
    else:
        args = quantized_args(module, kind)
        g = _packed(module, args) if kind == "pack" else _plain(module, kind, args) if kind in ("int", "float") else _small(module, kind)
    if "bias" in parts and parts["bias"].shape != (g.shape[-2],) and len(g.shape) == 2:
        raise wrong_shape(module, "bias", f"({g.shape[0]},)")
    return g


def _kind(module: Module) -> str:
    parts = module.parts
    if "compressed" in parts or "bitmask" in parts:
        return "sparse24"
    if any(leaf in parts for leaf in SPARSE):
        return "sparse"
    if "weight_packed" in parts:
        check_dtype(module, "weight_packed", ("I32", "U8"))
        return "pack" if parts["weight_packed"].dtype == "I32" else _small_kind(module)
    if "weight" not in parts:
        leaf = "weight_packed" if "weight_shape" in parts or "weight_global_scale" in parts else "weight"
        raise missing(module, leaf)
    dtype = parts["weight"].dtype
    if dtype in FLOATS:
        return "dense"
    check_dtype(module, "weight", ("I8", "F8_E4M3"))
    scale = _present(module, "weight_scale")
    return "int" if dtype == "I8" else "mxfp8" if scale.dtype in _BYTES else "float"


def _small_kind(module: Module) -> str:
    """Which of the 4- and 6-bit floats bytes in ``weight_packed`` are, by the scales' dtype and the rows' lengths."""
    scale = _present(module, "weight_scale")
    if scale.dtype == "F8_E4M3":
        _present(module, "weight_global_scale")
        return "nvfp4"
    check_dtype(module, "weight_scale", (*_BYTES, "F8_E4M3"))
    packed = module.parts["weight_packed"].shape
    return "mxfp6" if packed and scale.shape and packed[-1] == scale.shape[-1] * 24 else "mxfp4"


def _present(module: Module, leaf: str) -> Any:
    raw = module.parts.get(leaf)
    if raw is None:
        raise missing(module, leaf)
    return raw


def missing(module: Module, leaf: str) -> BadFile:
    """The error for a part that is not there."""
    found = ", ".join(sorted(module.parts))
    word = leaf.replace("_", "-").replace(".", "-")
    return BadFile(f"missing-{word}", f"the module has no {leaf} (found {found})", tensor=module.name, hint="a shard may be missing")


def quantized_args(module: Module, kind: str) -> Args:
    """The weights' arguments of the best matching group that can be these tensors."""
    wanted = "float" if kind in ("float", "nvfp4", "mxfp4", "mxfp6", "mxfp8") else "int"
    found: list[Group] = list(candidates(module.match.config, module.name))
    if not found:
        text = "no config group has a target for this module, but it has quantized weights"
        raise BadFile("config-group", text, tensor=module.name, hint="check config_groups in config.json")
    fitting = [g.weights for g in found if g.weights is not None and g.weights.kind == wanted and _format_fits(g.format, kind)]
    fitting = [a for a in fitting if kind != "pack" or _width_fits(module, a.bits)] or fitting
    fitting = [a for a in fitting if _groups_fit(module, a)] or fitting
    if not fitting:
        said = "; ".join(f"{g.name}: {g.weights.bits}-bit {g.weights.kind}, format {g.format}" for g in found if g.weights)
        raise BadFile("config-disagrees", f"the tensors are of the kind {kind}, the config says {said}", tensor=module.name)
    return fitting[0]


def _format_fits(word: str | None, kind: str) -> bool:
    """Whether a group's format can be a module of ``kind``; words for whole models and unpacked states say nothing."""
    formats = {
        "pack-quantized": ("pack",),
        "int-quantized": ("int",),
        "float-quantized": ("float",),
        "nvfp4-pack-quantized": ("nvfp4",),
        "mxfp4-pack-quantized": ("mxfp4",),
        "mxfp6-pack-quantized": ("mxfp6",),
        "mxfp8-quantized": ("mxfp8",),
        "naive-quantized": ("int", "float", "mxfp8"),
    }
    return word not in formats or kind in formats[word]


def packed_words(count: int, bits: int, stream: bool) -> int:
    """int32 words for ``count`` values: one stream, or ``32 // bits`` values a word (compressed-tensors up to 0.17)."""
    return words_for(count, bits) if stream else -(-count // (32 // bits))


def _width_fits(module: Module, bits: int) -> bool:
    shape, words = _stored_shape(module), _matrix(module, "weight_packed")
    return bits <= 8 and (shape is None or words[-1] in (packed_words(shape[-1], bits, True), packed_words(shape[-1], bits, False)))


def _groups_fit(module: Module, args: Args) -> bool:
    """Whether the scales have as many columns as the arguments say; True where the parts are too odd to tell."""
    scale, shape = module.parts.get("weight_scale"), _stored_shape(module)
    k = shape[-1] if shape else module.parts["weight"].shape[-1] if "weight" in module.parts and module.parts["weight"].shape else 0
    if scale is None or not k:
        return True
    try:
        return tuple(scale.shape) in _scale_shapes(args, (*scale.shape[:-1], k) if len(scale.shape) > 1 else (1, k))
    except BadFile:
        return False


def _stored_shape(module: Module) -> tuple[int, ...] | None:
    """The content of ``weight_shape``, or None where there is none; ``BadFile`` for another dtype or size."""
    raw = module.parts.get("weight_shape")
    if raw is None:
        return None
    return stored_numbers(module, "weight_shape")


def stored_numbers(module: Module, leaf: str) -> tuple[int, ...]:
    """The two or three integers of a part that holds a shape; ``BadFile`` for another dtype or size."""
    raw = module.parts[leaf]
    check_dtype(module, leaf, ("I64", "I32"))
    count = prod(raw.shape)
    if count not in (2, 3) or max(raw.shape) != count or raw.nbytes != count * (8 if raw.dtype == "I64" else 4):
        raise wrong_shape(module, leaf, "two or three numbers")
    if leaf not in module.memo:
        module.memo[leaf] = tuple(int(n) for n in raw.array().reshape(-1))
    found: tuple[int, ...] = module.memo[leaf]
    return found


def _matrix(module: Module, leaf: str) -> tuple[int, ...]:
    shape: tuple[int, ...] = tuple(module.parts[leaf].shape)
    if len(shape) not in (2, 3) or 0 in shape:
        raise wrong_shape(module, leaf, "two or three dimensions, none of them 0")
    return shape


def _packed(module: Module, args: Args) -> Geometry:
    """A module of ``weight_packed`` int32."""
    words = _matrix(module, "weight_packed")
    if not 1 <= args.bits <= 8:
        raise BadFile("bits-disagree", f"the config says {args.bits} bits, packed weights have 1 … 8", tensor=module.name)
    said, scale = _stored_shape(module), _present(module, "weight_scale")
    if said is None and not args.group:  # groups tell K; words alone may end with what fills them up
        raise missing(module, "weight_shape")
    k = said[-1] if said else scale.shape[-1] * args.group if args.group and scale.shape else words[-1] * 32 // args.bits
    shape = (*words[:-1], k)
    if (said is not None and said != shape) or k <= 0:
        raise BadFile("weight-shape", f"weight_shape says {said}, weight_packed has shape {words}", tensor=module.name)
    lengths = {stream: packed_words(k, args.bits, stream) for stream in (True, False)}
    fits = [stream for stream, count in lengths.items() if count == words[-1]]
    if not fits:
        expected = " or ".join(str(n) for n in sorted(set(lengths.values())))
        raise wrong_shape(module, "weight_packed", f"{expected} columns for {k} weights of {args.bits} bits")
    rows, group = tile_of(module, args, shape)
    zero = zero_of(module, args, shape, -(-k // group))
    stream = fits[0] if len(fits) == 1 else _by_zero(module, args, shape) if zero == "packed" else dense_packing(module.match.config)
    _check_zero_words(module, args, shape, zero, stream)
    indexed = _index(module, args, shape, rows, group)
    return Geometry("pack", shape, args.bits, rows, group, scale.dtype, zero, stream, indexed, strategy=args.strategy)


def _by_zero(module: Module, args: Args, shape: tuple[int, ...]) -> bool:
    """The packing generation that the words of the zero points say, the version's where they fit both."""
    words = module.parts["weight_zero_point"].shape[-2]
    fits = [s for s in (True, False) if packed_words(shape[-2], args.bits, s) == words]
    return fits[0] if len(fits) == 1 else dense_packing(module.match.config)


def _check_zero_words(module: Module, args: Args, shape: tuple[int, ...], zero: str, stream: bool) -> None:
    if zero == "packed":
        raw = module.parts["weight_zero_point"]
        wanted = packed_words(shape[-2], args.bits, stream)
        if raw.shape[-2] != wanted:
            raise wrong_shape(module, "weight_zero_point", f"{wanted} rows for {shape[-2]} zero points of {args.bits} bits")


def _scale_shapes(args: Args, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes that scales of a weight ``shape`` may have."""
    *lead, n, k = shape
    if args.strategy == "tensor":
        return ((1,), (), (1, 1), *(((lead[0], 1, 1), (lead[0], 1), (lead[0],)) if lead else ()))
    if args.strategy == "channel":
        return ((*lead, n, 1), *(((n,),) if not lead else ()))
    if args.strategy == "block" and args.block is not None:
        return ((*lead, -(-n // args.block[0]), -(-k // args.block[1])),)
    if args.group is None:
        raise BadFile("config-value", f"weights cannot have the strategy {args.strategy!r}")
    return ((*lead, n, -(-k // args.group)),)


def tile_of(module: Module, args: Args, shape: tuple[int, ...]) -> tuple[int | None, int]:
    """Rows (None: all) and columns under one scale; checks dtype and shape of ``weight_scale``."""
    scale = _present(module, "weight_scale")
    check_dtype(module, "weight_scale", tuple(FLOATS))
    allowed = _scale_shapes(args, shape)
    if tuple(scale.shape) not in allowed:
        raise wrong_shape(module, "weight_scale", f"{allowed[0]} for {args.strategy} scales of a weight {shape}")
    if args.group and shape[-1] % args.group and shape[-1] > args.group:
        raise BadFile("group-size", f"groups of {args.group} do not divide {shape[-1]} columns", tensor=module.name)
    if args.strategy == "tensor":
        return (shape[-2] if prod(scale.shape) > 1 else None), shape[-1]
    if args.strategy == "block" and args.block is not None:
        if len(shape) > 2 and shape[-2] % args.block[0]:
            raise Unsupported("ct-experts", f"experts of {shape[-2]} rows in blocks of {args.block[0]} are not read", tensor=module.name)
        return args.block
    return 1, args.group or shape[-1]


def zero_of(module: Module, args: Args, shape: tuple[int, ...], groups: int) -> str:
    """How zero points are stored: ``none``, ``packed`` along the rows, ``plain`` in the scales' shape, or ``zeros``, which say nothing."""
    raw, scale = module.parts.get("weight_zero_point"), module.parts["weight_scale"]
    packs = "weight_packed" in module.parts and args.strategy in ("group", "channel")
    if raw is None:
        if not args.symmetric:
            raise missing(module, "weight_zero_point")
        return "none"
    check_dtype(module, "weight_zero_point", ("I8", "I32", "F8_E4M3", *FLOATS))
    if raw.dtype == "I32" and packs and not args.symmetric:
        if len(raw.shape) != len(shape) or raw.shape[-1] != groups or raw.shape[:-2] != shape[:-2]:
            raise wrong_shape(module, "weight_zero_point", f"(words, {groups})")
        return "packed"
    if raw.shape != scale.shape:
        raise wrong_shape(module, "weight_zero_point", str(tuple(scale.shape)))
    if args.symmetric or args.kind == "float":
        return "zeros"  # releases up to 0.7 stored them
    if raw.dtype != "I8":
        raise BadFile("wrong-dtype", f"weight_zero_point is {raw.dtype}, expected I8", tensor=f"{module.name}.weight_zero_point")
    return "plain"


def _index(module: Module, args: Args, shape: tuple[int, ...], rows: int | None, group: int) -> bool:
    raw = module.parts.get("weight_g_idx")
    if raw is None and args.ordered and rows == 1 and group < shape[-1]:
        raise missing(module, "weight_g_idx")
    if raw is None:
        return False
    check_dtype(module, "weight_g_idx", ("I32", "I64"))
    if tuple(raw.shape) != (shape[-1],):
        raise wrong_shape(module, "weight_g_idx", f"({shape[-1]},)")
    return rows == 1 and group < shape[-1]


def _plain(module: Module, kind: str, args: Args) -> Geometry:
    """A module of ``weight`` int8 or float8_e4m3fn and float scales."""
    shape = _matrix(module, "weight")
    bits = args.bits if kind == "int" else 8
    if not 2 <= bits <= 8 or (kind == "float" and args.bits != 8):
        raise BadFile("bits-disagree", f"the config says {args.bits} bits, the weight is stored in bytes", tensor=module.name)
    rows, group = tile_of(module, args, shape)
    zero = zero_of(module, args, shape, -(-shape[-1] // group))
    indexed, scale = _index(module, args, shape, rows, group), module.parts["weight_scale"].dtype
    return Geometry(kind, shape, bits, rows, group, scale, zero, True, indexed, strategy=args.strategy)


def _small(module: Module, kind: str) -> Geometry:
    """Small floats under scales that are small floats themselves."""
    scale = _present(module, "weight_scale")
    block = 16 if kind == "nvfp4" else 32
    leaf = "weight" if kind == "mxfp8" else "weight_packed"
    stored = _matrix(module, leaf)
    bits = 4 if kind == "nvfp4" else MX[kind][1]
    k = stored[-1] * 8 // bits
    args = quantized_args(module, kind)
    if (args.bits, args.group) != (bits, block):
        text = f"the config says {args.bits} bits in groups of {args.group}, the tensors are {kind}: {bits} bits in groups of {block}"
        raise BadFile("config-disagrees", text, tensor=module.name)
    if len(stored) != 2:
        raise Unsupported("ct-experts", f"stacked experts of {kind} are not read", tensor=module.name)
    if stored[-1] * 8 % bits or tuple(scale.shape) != (stored[0], -(-k // block)) or k % block:
        raise wrong_shape(module, "weight_scale", f"({stored[0]}, {-(-k // block)}) for {leaf} {stored}")
    if kind == "nvfp4":
        check_dtype(module, "weight_global_scale", ("F32",))
        if prod(_present(module, "weight_global_scale").shape) != 1:
            raise wrong_shape(module, "weight_global_scale", "(1,)")
    return Geometry(kind, (stored[0], k), bits, 1, block, scale.dtype)


def grid_of(g: Geometry) -> Grid:
    """What a code of the kind stands for."""
    if g.kind == "pack":
        return Integer(g.bits)
    if g.kind == "int":
        return Integer(g.bits, signed=True)
    return Float("e2m1" if g.kind == "nvfp4" else MX[g.kind][0] if g.kind in MX else "e4m3fn")


def scheme(module: Module) -> Scheme:
    """The scheme as far as headers tell; ``group_index`` says that an act-order index may be there."""
    g = geometry(module)
    if g.kind in ("dense", "sparse", "sparse24"):
        from qformats.formats.compressed_tensors.sparse import sparse_scheme

        return sparse_scheme(module, g)
    grid, lead = grid_of(g), (1,) * (len(g.shape) - 2)
    if g.kind in ("nvfp4", *MX):
        nested = Scheme((*g.shape[:-1], g.groups), Float("e4m3fn" if g.kind == "nvfp4" else "e8m0"))
        scales: tuple[ParamSpec, ...] = (ParamSpec("codes", Tile((1, g.columns)), nested=nested),)
        if g.kind == "nvfp4":
            scales = (*scales, ParamSpec("float32", whole(g.shape), inverse=True))
        return Scheme(g.shape, grid, scales)
    tile: Block = whole(g.shape) if g.rows is None else Tile((*lead, g.rows, g.columns))
    return Scheme(g.shape, grid, (ParamSpec(FLOATS[g.scale], tile),), _zero_spec(g, tile), group_index=g.indexed)


def _zero_spec(g: Geometry, tile: Block) -> ParamSpec | None:
    if g.kind == "pack" and g.zero in ("none", "zeros"):
        return ParamSpec("int16", whole(g.shape), constant=float(1 << (g.bits - 1)))
    if g.kind == "pack":
        return ParamSpec("int16" if g.bits == 8 else "uint8", tile)
    return ParamSpec("int8", tile) if g.zero == "plain" and g.kind == "int" else None
