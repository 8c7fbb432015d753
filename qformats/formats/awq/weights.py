"""AWQ tensors: the checks and scheme from headers, reading and writing. The layout table is in the package's docstring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Any

from qformats.bits import pack_interleaved, pack_rows, unpack_interleaved, unpack_rows, words_for
from qformats.errors import BadFile, Unsupported, UsageError
from qformats.formats import autoround
from qformats.formats.awq.settings import REFUSED, Settings, module_settings
from qformats.formats.packed import (
    CONTAINER_FLOATS,
    FLOATS,
    affine_verdict,
    blank_codes,
    check_dtype,
    float_array,
    float_tensor,
    group_option,
    made_by,
    wrong_shape,
    yes_no,
)
from qformats.formats.protocol import Module, PartInfo, Piece, Target
from qformats.scheme import Integer, No, ParamSpec, Scheme, Storage, Tile, Yes, whole

if TYPE_CHECKING:
    import numpy as np

    from qformats.tensor import QuantizedTensor

    Array = np.ndarray[Any, Any]

__all__ = ["ROW_MULTIPLE", "SUFFIXES", "can_store", "layout", "module_warnings", "read", "scheme", "storage_of", "storages", "write"]

SUFFIXES = frozenset({"qweight", "qzeros", "scales"})
ROW_MULTIPLE = 32  # row ranges for ``write`` start at multiples of this: whole words of 8 columns, whole stream blocks of 32
_OPTIONS = {"group", "version", "sym", "zero_point"}


@dataclass(frozen=True, slots=True)
class _Geometry:
    """``order``: ``"gemm"`` (eight interleaved along N), ``"natural"`` (plain stream along N) or ``"gemv"`` (along K)."""

    n: int
    k: int
    bits: int
    group: int
    scale: str
    order: str
    has_zeros: bool
    settings: Settings

    @property
    def groups(self) -> int:
        return self.k // self.group

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k


def _geometry(module: Module) -> _Geometry:
    if "geometry" not in module.memo:
        module.memo["geometry"] = _checked(module)
    g: _Geometry = module.memo["geometry"]
    return g


def _checked(module: Module) -> _Geometry:
    parts, said = module.parts, module_settings(module.match.config, module.name)
    _check_parts(module, said)
    g = _gemv_geometry(module, said) if said.version == "gemv" else _gemm_geometry(module, said)
    if "bias" in parts and parts["bias"].shape != (g.n,):
        raise wrong_shape(module, "bias", f"({g.n},)")
    return g


def _check_parts(module: Module, said: Settings) -> None:
    parts = module.parts
    needed = ["qweight", "scales"] + (["qzeros"] if said.zero_point else [])
    for leaf in needed:
        if leaf not in parts:
            text = f"AWQ module has no {leaf} (found {', '.join(sorted(parts))})"
            raise BadFile(f"missing-{leaf}", text, tensor=module.name, hint="a shard may be missing")
    unknown = sorted(set(parts) - SUFFIXES - {"bias"})
    if unknown:
        raise Unsupported("unknown-part", f"AWQ module has parts of another kind: {', '.join(unknown)}", tensor=module.name)
    for leaf in ("qweight", "scales", "qzeros"):
        if leaf in parts and (len(parts[leaf].shape) != 2 or 0 in parts[leaf].shape):
            raise wrong_shape(module, leaf, "two dimensions, none of them 0")
    if parts["qweight"].dtype == "I16":
        raise Unsupported("awq-gemv-fast", f"16-bit words: {REFUSED['gemv_fast']}", tensor=module.name)
    for leaf, allowed in (("qweight", ("I32", "U32")), ("qzeros", ("I32", "U32")), ("scales", tuple(FLOATS)), ("bias", tuple(FLOATS))):
        check_dtype(module, leaf, allowed)


def _group(module: Module, said: Settings, k: int, groups: int | None) -> int:
    """Columns a group: the config's, which must divide K and agree with the ``groups`` that the tensors have."""
    if said.group is None and groups is not None and k % groups == 0:
        return k // groups
    if said.group is None:
        raise BadFile("group-size", "the config has no group_size and the shapes do not tell it", tensor=module.name)
    group = k if said.group == -1 or said.group > k else said.group
    if k % group or (groups is not None and k // group != groups):
        text = (
            f"the config says groups of {said.group}, but {k} inputs have {groups if groups is not None else 'a broken number of'} groups"
        )
        raise BadFile("group-size", text, tensor=f"{module.name}.scales")
    return group


def _gemm_geometry(module: Module, said: Settings) -> _Geometry:
    (k, columns), (groups, n) = module.parts["qweight"].shape, module.parts["scales"].shape
    fits = [b for b in range(2, 9) if words_for(n, b) == columns]
    if not fits or k < groups:
        raise _other_layout(module, said, k, columns, groups, n)
    bits = said.bits if said.bits is not None else fits[0]
    if bits not in fits:
        raise BadFile("bits-disagree", f"the config says {bits} bits, the shapes say {' or '.join(map(str, fits))}", tensor=module.name)
    order = _order(module, bits)
    if order == "gemm" and (n % 8 or n * bits % 32):
        raise wrong_shape(module, "scales", f"a multiple of {8 if bits == 4 else 32} columns")
    group = _group(module, said, k, groups)
    has_zeros = "qzeros" in module.parts
    if has_zeros and module.parts["qzeros"].shape != (groups, columns):
        raise wrong_shape(module, "qzeros", f"({groups}, {columns})")
    return _Geometry(n, k, bits, group, module.parts["scales"].dtype, order, has_zeros, said)


def _order(module: Module, bits: int) -> str:
    if bits == 4:
        return "gemm"
    config = module.match.config
    by_autoround = module.match.dialect == autoround.DIALECT or "autoround_version" in config
    if by_autoround and bits in (5, 6, 7):
        return "gemm"
    if made_by(config, "gptqmodel"):
        return "natural"
    text = f"{bits}-bit AWQ weights of an unknown writer: the order of the columns inside a word is not known"
    raise Unsupported("awq-order", text, tensor=module.name)


def _gemv_geometry(module: Module, said: Settings) -> _Geometry:
    (n, columns), (rows, width) = module.parts["qweight"].shape, module.parts["scales"].shape
    if said.bits not in (None, 4):
        raise Unsupported("awq-gemv-bits", f"{said.bits}-bit GEMV weights are not known", tensor=module.name)
    if n != rows:
        raise _other_layout(module, said, n, columns, rows, width)
    k = columns * 8
    group = _group(module, said, k, None)
    words = zeros_width(k, group)
    if width != words * 8:
        raise wrong_shape(module, "scales", f"({n}, {words * 8})")
    has_zeros = "qzeros" in module.parts
    if has_zeros and module.parts["qzeros"].shape != (n, words):
        raise wrong_shape(module, "qzeros", f"({n}, {words})")
    return _Geometry(n, k, 4, group, module.parts["scales"].dtype, "gemv", has_zeros, said)


def _other_layout(module: Module, said: Settings, first: int, columns: int, groups: int, n: int) -> BadFile:
    """The planes fit another layout than the config names, or none."""
    found = "GPTQ" if columns == n else "AWQ GEMV" if first == groups else "AWQ GEMM" if columns * 8 == n else None
    if found is None or found == f"AWQ {said.version.upper()}":
        return wrong_shape(module, "qweight", f"a match for scales ({groups}, {n})")
    text = f"the config says AWQ {said.version}, but qweight {(first, columns)} beside scales {(groups, n)} is the {found} layout"
    return BadFile("config-disagrees", text, tensor=module.name, hint="check quant_method and version in config.json")


def zeros_width(k: int, group: int) -> int:
    """Words of a GEMV row of zero points (autoawq 0.2.9 ``calculate_zeros_width``)."""
    multiple = 1 if group >= 128 else 2 if group >= 64 else 4 if group >= 32 else 8
    return -(-words_for(k // group, 4) // multiple) * multiple


def scheme(module: Module) -> Scheme:
    """The scheme as far as headers tell; a ``zero_point: false`` config's constant is a claim that reading the tensor may refute."""
    g = _geometry(module)
    tile = Tile((1, g.group))
    if not g.has_zeros or not g.settings.zero_point:
        zero = ParamSpec("int16", whole(g.shape), constant=float(1 << (g.bits - 1)))
    else:
        zero = ParamSpec("uint8", tile)
    return Scheme(g.shape, Integer(g.bits), (ParamSpec(FLOATS[g.scale], tile),), zero)


def read(module: Module, start: int = 0, stop: int | None = None, *, codes: bool = True) -> QuantizedTensor:
    """Output rows ``start:stop`` as codes uint8 (n, K), scale (n, G) in its stored dtype, zero points uint8 (n, G) or one constant.

    With ``codes=False`` the codes are a zero-stride plane of zeros and only the parameters are read.
    """
    import torch

    from qformats.tensor import Param, QuantizedTensor, constant

    g = _geometry(module)
    stop = g.n if stop is None else stop
    shape, tile = (stop - start, g.k), Tile((1, g.group))
    stored = torch.from_numpy(_read_plane(module, "qweight", g, g.k, start, stop)) if codes else blank_codes(shape)
    if g.order == "gemv":
        scales = float_tensor(module.parts["scales"].row_range(start, stop)[:, : g.groups].copy(), g.scale)  # (n, 8 Zw) -> (n, G)
    else:
        scales = float_tensor(module.parts["scales"].column_range(start, stop), g.scale).T.contiguous()  # (G, n) -> (n, G)
    single = _constant_zero(module, g)
    if single is not None:
        zero = constant(single, shape)
    else:
        zero = Param(torch.from_numpy(_read_plane(module, "qzeros", g, g.groups, start, stop)), tile)
    return QuantizedTensor(shape, stored, Integer(g.bits), (Param(scales, tile),), zero)


def _read_plane(module: Module, leaf: str, g: _Geometry, count: int, start: int, stop: int) -> Array:
    """Rows ``start:stop`` of codes or zero points as uint8 (n, count)."""
    import numpy as np

    raw = module.parts[leaf]
    if g.order == "gemv":
        return unpack_rows(raw.row_range(start, stop), 4, count)
    align = 8 if g.bits == 4 else 32
    first = start // align * align
    last = min(-(-stop // align) * align, g.n)
    words = raw.column_range(first * g.bits // 32, words_for(last, g.bits))
    if g.order == "gemm":
        rows = unpack_interleaved(words, g.bits)
    else:
        rows = np.ascontiguousarray(unpack_rows(words, g.bits, last - first).T)
    return np.ascontiguousarray(rows[start - first : stop - first])


def _constant_zero(module: Module, g: _Geometry) -> int | None:
    """The one zero point of the whole module, or None if they differ."""
    if not g.has_zeros:
        return 1 << (g.bits - 1)
    if "zero" not in module.memo:
        module.memo["zero"] = _find_constant(module, g)
    zero: int | None = module.memo["zero"]
    return zero


def _find_constant(module: Module, g: _Geometry) -> int | None:
    import numpy as np

    words = module.parts["qzeros"].array().view(np.int32)
    count = g.groups if g.order == "gemv" else g.n
    first = int(unpack_rows(words[:1], g.bits, count)[0, 0])
    row = pack_rows(np.full((1, count), first, np.uint8), g.bits)
    same = np.array_equal(words[:, : row.shape[1]], np.broadcast_to(row, (words.shape[0], row.shape[1])))
    return first if same else None


def module_warnings(module: Module) -> tuple[str, ...]:
    """What a user should know of how ``module`` was understood."""
    g = _geometry(module)
    half = 1 << (g.bits - 1)
    if not g.settings.zero_point and _constant_zero(module, g) != half:
        return (f"zero_point is false, but the zero points are not all {half}; the stored ones are used",)
    return ()


def storage_of(module: Module) -> Storage:
    """The storage that reproduces ``module`` byte for byte when what ``read`` returns is written again."""
    g = _geometry(module)
    single = _constant_zero(module, g)
    options: dict[str, object] = {
        "version": g.settings.version,
        "order": g.order,
        "qzeros": "stored" if g.has_zeros else "absent",
        "zero_point": g.settings.zero_point,
        "word_dtype": module.parts["qweight"].dtype,
        "dialect": module.match.dialect,
        "in_features": g.k,
    }
    zero = single if single is not None else (0, (1 << g.bits) - 1)
    return _storage(g.bits, None if g.groups == 1 else g.group, zero, FLOATS[g.scale], options)


def _storage(bits: int, group: int | None, zero: int | tuple[int, int], scale: str, options: dict[str, object]) -> Storage:
    version = options["version"]
    return Storage(
        f"int{bits}",
        Integer(bits),
        group,
        bits + ((16 + bits) / group if group else 0.0),
        (scale,),
        zero_point=zero,
        k_multiple=lcm(8, group or 1) if version == "gemv" else group or 1,
        n_multiple=1 if options["order"] == "natural" else 8,
        options=options,
    )


def storages(target: Target, scheme: Scheme) -> list[Storage]:
    """The one storage of the target: zero points 0 … 15, or the constant 8 with ``sym`` (``zero_point=false``).

    Options: ``group=N|-1`` (default: the source's, else 128), ``version=gemm|gemv``, ``sym``, ``zero_point=yes|no``.
    """
    if target.type not in (None, "int4"):
        raise UsageError("type", f"awq has no type {target.type!r}", hint="types: int4")
    unknown = sorted(set(target.options) - _OPTIONS)
    if unknown:
        raise UsageError("option", f"awq has no option {unknown[0]!r}", hint=f"options: {', '.join(sorted(_OPTIONS))}")
    version = target.options.get("version", "gemm").lower()
    if version not in ("gemm", "gemv"):
        raise UsageError("option", f"version={version} cannot be written", hint="use version=gemm or version=gemv")
    group = group_option(target, scheme)
    if version == "gemv" and group is not None and group < 32:
        raise UsageError("option", f"AWQ gemv has no groups of {group}", hint="use groups of 32, 64, 128 or more, or version=gemm")
    sym = yes_no(target, "sym", not yes_no(target, "zero_point", True))
    options: dict[str, object] = {
        "version": version,
        "order": version,
        "qzeros": "stored",
        "zero_point": not sym,
        "word_dtype": "I32",
        "dialect": "",
        "in_features": scheme.shape[-1],
    }
    return [_storage(4, group, 8 if sym else (0, 15), "float16", options)]


def can_store(storage: Storage, scheme: Scheme) -> Yes | No:
    """Whether ``write`` takes such a tensor as it stands (the values of its zero points aside)."""
    verdict = affine_verdict(storage, scheme)
    if not verdict:
        return verdict
    n, k = scheme.shape
    if n % storage.n_multiple:
        return No(f"its {n} outputs are not a multiple of {storage.n_multiple}")
    group = min(storage.group or k, k)
    if k % group or (storage.options.get("version") == "gemv" and k % 8):
        return No(f"its {k} inputs are not whole groups of {group}")
    return Yes()


def layout(storage: Storage, shape: tuple[int, ...]) -> dict[str, PartInfo]:
    """The parts of a weight (N, K)."""
    n, k = shape
    bits, group, options = storage.integers.bits, min(storage.group or k, k), storage.options
    words, scale = str(options.get("word_dtype", "I32")), CONTAINER_FLOATS[storage.scale_dtypes[0]]
    if options.get("version") == "gemv":
        width = zeros_width(k, group)
        parts = {"qweight": PartInfo(words, (n, k // 8)), "qzeros": PartInfo(words, (n, width)), "scales": PartInfo(scale, (n, width * 8))}
    else:
        columns = words_for(n, bits)
        parts = {
            "qweight": PartInfo(words, (k, columns)),
            "qzeros": PartInfo(words, (k // group, columns)),
            "scales": PartInfo(scale, (k // group, n)),
        }
    if options.get("qzeros") == "absent":
        del parts["qzeros"]
    return parts


def write(storage: Storage, tensor: QuantizedTensor, start: int, shape: tuple[int, ...]) -> list[Piece]:
    """Rows ``start : start + len(tensor)`` of a weight ``shape``; ``start`` is a multiple of ``ROW_MULTIPLE``, and so is the end unless it
    is N. ``Unsupported('storage-form')`` if ``tensor`` is not exactly in the storage's form."""
    rows = tensor.shape[0]
    if start % ROW_MULTIPLE or ((start + rows) % ROW_MULTIPLE and start + rows != shape[0]):
        raise Unsupported("row-range", f"rows {start} … {start + rows} of {shape[0]} do not fall on multiples of {ROW_MULTIPLE}")
    verdict = affine_verdict(storage, tensor.scheme)
    whole_verdict = can_store(storage, Scheme(shape, tensor.grid, tensor.scheme.scales, tensor.scheme.zero_point)) if verdict else verdict
    if isinstance(whole_verdict, No):
        raise Unsupported("storage-form", f"cannot be written as awq {storage.type}: {whole_verdict.reason}")
    groups = shape[1] // min(storage.group or shape[1], shape[1])
    zeros = _zero_array(tensor, storage, groups)
    scale = float_array(tensor.scales[0].values.contiguous())  # type: ignore[union-attr]
    planes = {"qweight": tensor.codes.numpy(), "scales": scale, "qzeros": zeros}
    if storage.options.get("qzeros") == "absent":
        del planes["qzeros"]
    if storage.options.get("version") == "gemv":
        return _gemv_pieces(planes, zeros_width(shape[1], shape[1] // groups), start)
    return [_gemm_piece(storage, leaf, plane, start) for leaf, plane in planes.items()]


def _zero_array(tensor: QuantizedTensor, storage: Storage, groups: int) -> Array:
    """Zero points uint8 (n, G), checked against what the storage can hold."""
    import numpy as np

    assert tensor.zero_point is not None
    values: Array = tensor.zero_point.values.numpy()  # type: ignore[union-attr]
    half, top = 1 << (storage.integers.bits - 1), (1 << storage.integers.bits) - 1
    low, high = (half, half) if storage.options.get("qzeros") == "absent" else (0, top)
    if values.size and (int(values.min()) < low or int(values.max()) > high):
        raise Unsupported("zero-point-range", f"zero points {int(values.min())} … {int(values.max())} are outside {low} … {high}")
    return np.ascontiguousarray(np.broadcast_to(values, (tensor.shape[0], groups)).astype(np.uint8))


def _gemm_piece(storage: Storage, leaf: str, plane: Array, start: int) -> Piece:
    """(n, K) or (n, G) -> rows of K or G, packed along N."""
    import numpy as np

    bits = storage.integers.bits
    if leaf == "scales":
        return Piece(leaf, np.ascontiguousarray(plane.T), 0, start)
    if storage.options.get("order") == "natural":
        words = pack_rows(np.ascontiguousarray(plane.T), bits)
    else:
        words = pack_interleaved(plane, bits)
    return Piece(leaf, words, 0, start * bits // 32)


def _gemv_pieces(planes: Mapping[str, Array], width: int, start: int) -> list[Piece]:
    """Rows as they are; scales and zero points padded with zeros to ``width`` words."""
    import numpy as np

    pieces = [Piece("qweight", pack_rows(planes["qweight"], 4), start)]
    for leaf in ("scales", "qzeros"):
        if leaf in planes:
            plane = planes[leaf]
            padded = np.zeros((plane.shape[0], width * 8), plane.dtype)
            padded[:, : plane.shape[1]] = plane
            pieces.append(Piece(leaf, pack_rows(padded, 4) if leaf == "qzeros" else padded, start))
    return pieces
